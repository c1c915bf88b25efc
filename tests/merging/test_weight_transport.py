"""The source's delta: lazy, the difference of both, held or read from disk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_merge_jax import source_delta
from ot_merge_jax.io.hf import load_hf
from ot_merge_jax.io.lazy import open_lazy
from ot_merge_jax.models import specs


@pytest.fixture(scope="module")
def folders(tiny_checkpoint):
    return [tiny_checkpoint("qwen2", seed=2, drift=drift) for drift in (0.3, 0.0)]


@pytest.mark.parametrize("is_on_disk", [False, True])
def test_the_delta_is_the_difference_leaf_by_leaf_and_layer_by_layer(is_on_disk, folders):
    source, base = (load_hf(folder) for folder in folders)
    sides = [open_lazy(folder) for folder in folders] if is_on_disk else [source, base]
    delta = source_delta(*(side.params for side in sides))
    assert not specs.is_resident(delta)
    change = 0.0
    for spec in specs.param_specs(source.cfg):
        expected = specs.get(source.params, spec.path) - specs.get(base.params, spec.path)
        leaf = specs.get(delta, spec.path)
        leaf = jnp.stack([leaf[l] for l in range(spec.shape[0])]) if spec.is_stacked else leaf
        np.testing.assert_array_equal(leaf, expected)
        change = max(change, float(np.abs(expected).max()))
    assert change > 0
    for l in range(source.cfg.num_layers):
        layer = specs.layer(delta, l)
        jax.tree.map(
            lambda ours, one, other: np.testing.assert_array_equal(ours, one - other),
            layer, specs.layer(source.params, l), specs.layer(base.params, l),
        )  # fmt: skip
    assert not specs.has(delta, "lm_head/bias")


def test_the_delta_of_half_precision_is_taken_in_float32():
    one, other = (
        {"norm": {"scale": jnp.full(2, x, jnp.bfloat16)}} for x in (1.0, 1 / 512)
    )  # their difference is no bfloat16
    found = source_delta(one, other).leaf("norm/scale")
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.float32(1 - 1 / 512))


def test_the_delta_of_a_model_and_itself_is_zero(folders):
    source = load_hf(folders[0])
    delta = source_delta(source.params, source.params)
    for spec in specs.param_specs(source.cfg):
        leaf = delta.leaf(spec.path)
        assert not np.any(np.asarray(leaf[0] if spec.is_stacked else leaf)), spec.path

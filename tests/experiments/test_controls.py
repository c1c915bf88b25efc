"""Controls break what they say they break, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_merge_jax.experiments import controls
from ot_merge_jax.merging import fuse, projections
from ot_merge_jax.models import families, specs
from ot_merge_jax.transport import coupling as couplings
from ot_merge_jax.types import Activations, HParams, MergeSpec, VocabularyMatch

UP = MergeSpec(weights=("up",))


@pytest.fixture
def planted():
    """A target whose layers are the source's layers 0 and 2, neurons permuted: (rows, coupling)."""
    rng = np.random.default_rng(0)
    source, target = {}, {}
    for site, width in (("mlp_in", 8), ("up_out", 12)):
        values = rng.normal(size=(3, 400, width)).astype(np.float32)
        order = rng.permutation(width)
        source[site], target[site] = values, values[[0, 2]][:, :, order]
    rows = tuple(Activations(one, np.arange(400)) for one in (target, source))
    return rows, couplings.couple(*rows, HParams(1.0), spec=UP)


def layers_of(coupling):
    """The source layer of each target layer."""
    share = projections.layer_weights(coupling, in_site="mlp_in", out_site="up_out", spec=UP)
    return np.asarray(share).argmax(1).tolist()


def test_permuted_plan_is_the_plan_with_its_columns_in_another_order(planted):
    (target, source), coupling = planted
    broken, rows = controls.permuted(coupling, source, seed=0)
    for site in ("mlp_in", "up_out"):
        one = np.asarray(couplings.plan(coupling, target, source, site=site, l=1, m=2))
        other = np.asarray(couplings.plan(broken, target, rows, site=site, l=1, m=2))
        assert np.abs(one - other).max() > 0.5 * one.max()
        back = [np.abs(one - column[:, None]).sum(0).argmin() for column in other.T]
        assert sorted(back) == list(range(one.shape[1]))
        np.testing.assert_allclose(other, one[:, back], atol=1e-7)


def test_permuted_units_stay(planted):
    (_, source), coupling = planted
    broken, _ = controls.permuted(coupling, source, seed=0)
    for before, after in zip(coupling.std_source.values(), broken.std_source.values(), strict=True):
        np.testing.assert_array_equal(before, after)


def test_permuted_weight_is_not_the_transported_one(planted):
    (target, source), coupling = planted
    weights = np.random.default_rng(1).normal(size=(3, 8, 12)).astype(np.float32)
    where = {"in_site": "mlp_in", "out_site": "up_out", "spec": UP}
    moved = projections.transported(weights, coupling, target, source, **where)
    broken, rows = controls.permuted(coupling, source, seed=0)
    other = projections.transported(weights, broken, target, rows, **where)
    cosine = jnp.vdot(moved, other) / jnp.linalg.norm(moved) / jnp.linalg.norm(other)
    assert abs(float(cosine)) < 0.5


@pytest.mark.parametrize("seed", range(4))
def test_wrong_layers_lose_the_planted_map(seed, planted):
    _, coupling = planted
    assert layers_of(coupling) == [0, 2]
    broken = controls.wrong_layers(coupling, seed=seed)
    assert all(a != b for a, b in zip(layers_of(broken), [0, 2], strict=True))
    for before, after in zip(coupling.layer_plan.values(), broken.layer_plan.values(), strict=True):
        assert sorted(before.sum(0).tolist()) == sorted(after.sum(0).tolist())


@pytest.mark.parametrize("rule", ["interpolate", "residual", "delta"])
@pytest.mark.parametrize("k", [None, 3])
def test_noise_makes_an_update_of_the_same_norm_in_the_same_mask(rule, k):
    rng = np.random.default_rng(0)
    path = "layers/mlp/up_proj/kernel"
    params = {"layers": {"mlp": {"up_proj": {"kernel": jnp.asarray(rng.normal(size=(2, 5, 7)))}}}}
    moved = {path: jnp.asarray(rng.normal(size=(2, 5, 7)), jnp.float32)}
    masks = {} if k is None else {path: jnp.zeros((2, 1, 7)).at[:, :, :k].set(1.0)}
    spec = MergeSpec(weights=("up",), rule=rule)
    found = [controls.noise(params, moved, masks, spec=spec, seed=seed) for seed in (0, 0, 1)]

    def update(leaf):
        return np.asarray(fuse.update(specs.get(params, path), leaf, masks.get(path), rule=rule))

    expected, drawn = update(moved[path]), [update(one[path]) for one in found]
    for layer in range(2):
        sizes = [np.linalg.norm(one[layer]) for one in (expected, *drawn)]
        np.testing.assert_allclose(sizes[1:], sizes[0], rtol=1e-5)
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - drawn[2]).max() > 0.1
    if k is not None:
        assert np.abs(drawn[0][:, :, k:]).max() < 1e-6


def test_shrink_leaves_the_rest_of_the_target():
    params = {"layers": {"mlp": {"up_proj": {"kernel": jnp.full((1, 2, 2), 4.0)}}}}
    moved = controls.shrink({"layers/mlp/up_proj/kernel": jnp.ones((1, 2, 2))})
    spec = MergeSpec(weights=("up",), rule="interpolate")
    fused = fuse.fuse(params, moved, 0.25, spec=spec, mask={})
    np.testing.assert_array_equal(fused["layers"]["mlp"]["up_proj"]["kernel"], 3.0)


def test_permuted_tokens_keep_the_target_rows_and_their_weights():
    matched = VocabularyMatch(jnp.arange(30), jnp.arange(30) + 5, jnp.arange(30.0))
    found = controls.permuted_tokens(matched, seed=0)
    np.testing.assert_array_equal(found.target_ids, matched.target_ids)
    np.testing.assert_array_equal(found.weights, matched.weights)
    assert sorted(found.source_ids.tolist()) == sorted(matched.source_ids.tolist())
    assert np.mean(np.asarray(found.source_ids) == np.asarray(matched.source_ids)) < 0.3


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
def test_random_source_is_a_fresh_model_whether_held_or_read(family, config_dict):
    cfg = families.read(config_dict(family), where="tiny")
    held, read = (controls.random_source(cfg, seed=1, is_resident=x) for x in (True, False))
    expected = specs.init(jax.random.key(0), cfg)
    for spec in specs.param_specs(cfg):
        leaf, other = specs.get(held, spec.path), specs.get(read, spec.path)
        for l in range(spec.shape[0]) if spec.is_stacked else [slice(None)]:
            np.testing.assert_array_equal(leaf[l], other[l])
        fresh = specs.get(expected, spec.path)
        assert leaf.shape == fresh.shape
        np.testing.assert_allclose(np.std(leaf), np.std(fresh), rtol=0.2, atol=1e-3)
        np.testing.assert_allclose(np.mean(leaf), np.mean(fresh), atol=5e-3)


def test_what_does_not_apply_says_why():
    vocabulary = MergeSpec(weights=("embed",), rule="delta")
    said = {
        name: controls.inapplicable_reason(name, spec=vocabulary, source_layers=4, has_dev=False)
        for name in controls.arms(["shrink", "permuted", "wrong-layer", "unigram"])
    }
    assert said["permuted"] is None
    assert all(said[name] for name in ("shrink", "wrong-layer", "unigram"))
    interpolated = UP._replace(rule="interpolate")
    assert controls.inapplicable_reason("shrink", spec=interpolated, source_layers=4) is None
    assert controls.inapplicable_reason("wrong-layer", spec=UP, source_layers=1)

"""Rules from logical to mesh axes, and: eight fake devices give what one device gives."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ot_merge_jax.distributed import sharding
from ot_merge_jax.errors import RecipeError
from ot_merge_jax.io.hf import load_hf
from ot_merge_jax.models import decoder, families, specs

MESHES = [{"data": 2, "model": 4}, {"model": 8}, {"data": 8}]
#: One site of each width.
SITES = ("mlp_in", "k_out", "o_in", "up_out")


def test_there_are_eight_devices():
    assert jax.device_count() == 8


# ---- the rules ----


@pytest.mark.parametrize("sizes", [*MESHES, {"model": 4, "data": 2}, {"data": 1}], ids=str)
def test_mesh_has_the_asked_axes(sizes):
    mesh = sharding.make_mesh(sizes)
    assert dict(mesh.shape) == sizes
    assert mesh.axis_names == tuple(sizes)


def test_axes_are_auto():
    """ott-jax fails on the Explicit axes that jax makes by default."""
    assert set(sharding.make_mesh({"data": 2, "model": 4}).axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("sizes", [{"data": 3, "model": 4}, {"model": 16}], ids=str)
def test_mesh_larger_than_the_machine_is_refused(sizes):
    with pytest.raises(RecipeError, match="8 device"):
        sharding.make_mesh(sizes)


@pytest.mark.parametrize("sizes", [{"data": 0}, {"data": -2}, {"data": 2, "model": 0}, {}], ids=str)
def test_mesh_axis_without_a_device_is_refused(sizes):
    with pytest.raises(RecipeError, match="does not fit the 8 device"):
        sharding.make_mesh(sizes)


def test_unknown_mesh_axis_is_refused_with_the_known_ones():
    with pytest.raises(RecipeError, match=r"'tensor'.*data, model"):
        sharding.make_mesh({"tensor": 2})


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("layers", None, "mlp"), (3, 24, 40), (None, None, "model")),
        (("layers", "heads", None), (3, 32, 24), (None, "model", None)),
        (("vocab", None), (304, 24), ("model", None)),
        (("batch", None), (6, 11), ("data", None)),
        (("layers", None, "mlp"), (3, 24, 42), (None, None, None)),  # 42 is no multiple of 4
        (("batch",), (3,), (None,)),
        ((None,), (24,), (None,)),
        (("no-such-axis",), (8,), (None,)),
    ],
)
def test_leaf_lives_where_the_rules_say(axes, shape, expected):
    place = sharding.leaf_sharding(sharding.make_mesh({"data": 2, "model": 4}), axes, shape)
    assert tuple(place.spec) == expected


def test_axis_that_the_mesh_lacks_is_replicated():
    place = sharding.leaf_sharding(
        sharding.make_mesh({"data": 8}), ("layers", None, "mlp"), (3, 24, 40)
    )
    assert tuple(place.spec) == (None, None, None)
    assert place.is_fully_replicated


def test_axes_and_shape_of_different_length_are_a_bug():
    with pytest.raises(ValueError, match="zip"):
        sharding.leaf_sharding(sharding.make_mesh({"model": 8}), ("vocab",), (304, 24))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_no_leaf_uses_a_mesh_axis_twice(family, config_dict):
    mesh = sharding.make_mesh({"data": 2, "model": 4})
    for spec in specs.param_specs(families.read(config_dict(family, kv_heads=4))):
        places = [
            place for place in sharding.leaf_sharding(mesh, spec.axes, spec.shape).spec if place
        ]
        assert len(places) == len(set(places)), spec.path


def test_every_logical_axis_of_the_table_has_a_rule(config_dict):
    """A misspelt axis would silently be replicated."""
    named = {
        axis
        for family in ("llama", "qwen2")
        for spec in specs.param_specs(families.read(config_dict(family)))
        for axis in spec.axes
        if axis not in (None, "layers")
    }
    assert named == sharding.RULES.keys() - {"batch"}


# ---- the model ----


def run(params, batch, cfg):
    step = functools.partial(decoder.forward, cfg=cfg, capture=frozenset(SITES))
    return jax.jit(step)(params, batch)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def alone(request, tiny_checkpoint, random_batch):
    """(folder, batch, logits and sites on one device)."""
    folder = tiny_checkpoint(request.param, kv_heads=4, layers=2)
    cfg, params = load_hf(folder)
    batch = random_batch(cfg, padding="left", lengths=(7, 4, 6, 5, 7, 1, 2, 3))
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(params)} == {1}
    return folder, batch, run(params, batch, cfg)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_forward_on_eight_devices_equals_one(sizes, alone):
    folder, batch, (logits, sites) = alone
    mesh = sharding.make_mesh(sizes)
    cfg, params = load_hf(folder, mesh=mesh)
    rows = NamedSharding(mesh, PartitionSpec("data" if "data" in sizes else None))
    got_logits, got_sites = run(params, jax.device_put(batch, rows), cfg)
    assert len(got_logits.sharding.device_set) == mesh.size
    np.testing.assert_allclose(got_logits, logits, rtol=0, atol=1e-5)
    for site in SITES:
        np.testing.assert_allclose(got_sites[site], sites[site], rtol=0, atol=1e-5, err_msg=site)


def test_captures_are_split_without_annotations(alone):
    """The MLP sites come out split over the model axis, from the rules of the weights alone."""
    folder, batch, _ = alone
    cfg, params = load_hf(folder, mesh=sharding.make_mesh({"model": 8}))
    _, sites = run(params, batch, cfg)
    assert sites["up_out"].addressable_shards[0].data.shape == (2, 8, 2, 5)


def test_heads_that_the_mesh_does_not_divide_still_work(tiny_checkpoint, random_batch):
    """One kv head of width 8 on 8 devices splits inside a head; the result must not change."""
    folder = tiny_checkpoint("qwen2", kv_heads=1, layers=2)
    cfg, params = load_hf(folder)
    batch = random_batch(cfg, padding="left")
    _, split = load_hf(folder, mesh=sharding.make_mesh({"model": 8}))
    np.testing.assert_allclose(
        run(split, batch, cfg)[0], run(params, batch, cfg)[0], rtol=0, atol=1e-5
    )

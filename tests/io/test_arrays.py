"""The coupling on disk: the same bytes for the same values, any mesh, nothing left behind."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_merge_jax.io import arrays
from ot_merge_jax.types import Coupling, Potentials

L, M, N_TARGET, N_SOURCE = 3, 8, 5, 7


@pytest.fixture
def coupling(rng):
    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    found = Potentials(
        f=draw(L, M, N_TARGET),
        g=draw(L, M, N_SOURCE),
        epsilon=draw(L, M),
        cost=draw(L, M),
        error=draw(L, M),
        iterations=jnp.arange(L * M).reshape(L, M),
        converged=draw(L, M) > 0,
        used_log_domain=draw(L, M) > 0,
    )
    sites = ("mlp_in", "up_out")
    return Coupling(
        dict.fromkeys(sites, draw(L, M)),
        dict.fromkeys(sites, found),
        dict.fromkeys(sites, draw(L, N_TARGET)),
        dict.fromkeys(sites, draw(M, N_SOURCE)),
    )


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert jax.tree.map(lambda leaf: leaf.dtype, one) == jax.tree.map(
        lambda leaf: leaf.dtype, other
    )


def test_what_is_read_is_what_was_written(coupling, tmp_path):
    arrays.save_coupling(tmp_path / "coupling", coupling)
    same(arrays.load_coupling(tmp_path / "coupling"), coupling)


def test_the_same_values_are_the_same_bytes(coupling, tmp_path):
    found = []
    for name in ("once", "again"):
        arrays.save_coupling(tmp_path / name, coupling)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        found.append({
            str(path.relative_to(tmp_path / name)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        })  # fmt: skip
    assert found[0] == found[1]
    assert len(found[0]) > 20  # a header and a chunk of each of its 22 arrays


def test_it_is_read_under_another_mesh(coupling, tmp_path):
    """Written from arrays split over eight devices, read onto two."""
    spec = jax.sharding.PartitionSpec(None, "data")
    eight, two = (
        jax.make_mesh((size,), ("data",), axis_types=(jax.sharding.AxisType.Auto,),
                      devices=jax.devices()[:size])
        for size in (8, 2)
    )  # fmt: skip
    split = coupling._replace(
        layer_plan=jax.device_put(coupling.layer_plan, jax.sharding.NamedSharding(eight, spec))
    )
    assert len(split.layer_plan["mlp_in"].sharding.device_set) == 8
    arrays.save_coupling(tmp_path / "coupling", split)
    found = arrays.load_coupling(tmp_path / "coupling", mesh=two)
    same(found, coupling)
    assert found.neuron_potentials["mlp_in"].f.sharding.device_set == set(jax.devices()[:2])


def test_what_a_killed_run_left_is_cleared(coupling, tmp_path):
    left = tmp_path / "coupling.orbax-checkpoint-tmp"
    left.mkdir()
    (left / "half").write_bytes(b"half")
    arrays.save_coupling(tmp_path / "coupling", coupling)
    assert [path.name for path in tmp_path.iterdir()] == ["coupling"]

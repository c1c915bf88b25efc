"""Rows that are few, repeated, constant or of extreme scale: coupled and carried, finite."""

import jax
import numpy as np
import pytest

from ot_merge_jax.merging import projections
from ot_merge_jax.transport import coupling as couplings
from ot_merge_jax.types import Activations, HParams, MergeSpec

ENDS = {"in_site": "mlp_in", "out_site": "up_out"}
WIDTHS = {"mlp_in": (4, 7), "up_out": (9, 6)}
L, M = 2, 3
SPEC = MergeSpec(weights=("up",))


def few(values, t):
    return values[:, :t]


def doubled(values, _):
    """Every neuron but the first is its neighbour's copy."""
    return np.repeat(values[..., ::2], 2, axis=-1)[..., : values.shape[-1]]


def mostly_constant(values, _):
    values = values.copy()
    values[..., 1:] = 3.0
    return values


def scaled(values, power):
    return (values * np.float32(10.0**power)).astype(np.float32)


def mixed_scales(values, power):
    """Neighbouring neurons differ by many orders of magnitude."""
    return (values * 10.0 ** np.linspace(-power, power, values.shape[-1])).astype(np.float32)


def rows(rng, side, change):
    latent = np.random.default_rng(1).normal(size=(30, 5))
    values = {}
    for site, widths in WIDTHS.items():
        count = (L, M)[side]
        found = latent @ rng.normal(size=(count, 5, widths[side]))
        found = found + 0.3 * rng.normal(size=found.shape)
        values[site] = change(found.astype(np.float32))
    return Activations(values, np.arange(next(iter(values.values())).shape[1]))


@pytest.mark.parametrize(
    ("change", "argument"),
    [(few, 2), (few, 3), (doubled, 0), (mostly_constant, 0), (scaled, -8), (scaled, 8),
     (mixed_scales, 8)],
)  # fmt: skip
@pytest.mark.parametrize("form", ["joint", "barycentric"])
def test_coupled_and_carried_finite(rng, change, argument, form):
    target, source = (rows(rng, side, lambda x: change(x, argument)) for side in (0, 1))
    coupling = couplings.couple(target, source, HParams(1.0, 0.05), spec=SPEC)
    for site, found in coupling.neuron_potentials.items():
        assert np.asarray(found.converged).all(), site
        assert np.asarray(found.error).max() < 3e-6, site
        assert not np.asarray(found.used_log_domain).any(), site
        np.testing.assert_allclose(np.asarray(coupling.layer_plan[site]).sum(), 1, rtol=1e-5)
    kernels = rng.normal(size=(M, 7, 6)).astype(np.float32)
    moved = projections.transported(
        kernels, coupling, target, source, **ENDS, spec=SPEC._replace(form=form)
    )
    assert np.isfinite(moved).all()


@pytest.mark.parametrize("power", [-8, 8])
def test_a_scale_of_the_rows_changes_no_plan(rng, power):
    """A power of two, so that scaling rounds nothing."""
    target, source = rows(rng, 0, lambda x: x), rows(rng, 1, lambda x: x)
    other = target._replace(
        values={site: one * np.float32(2.0 ** (3 * power)) for site, one in target.values.items()}
    )
    plain, scaled = (
        couplings.couple(one, source, HParams(1.0, 0.05), spec=SPEC) for one in (target, other)
    )
    for site in plain.neuron_potentials:
        np.testing.assert_allclose(
            plain.neuron_potentials[site].f, scaled.neuron_potentials[site].f, atol=1e-6
        )


def test_neurons_that_are_one_another_share_their_mass(rng):
    target, source = (rows(rng, side, lambda x: doubled(x, 0)) for side in (0, 1))
    coupling = couplings.couple(target, source, HParams(1.0, 0.05), spec=SPEC)
    plan = np.asarray(couplings.plan(coupling, target, source, site="up_out", l=0, m=0))
    np.testing.assert_allclose(plan[0], plan[1], rtol=1e-4)
    np.testing.assert_allclose(plan[:, 0], plan[:, 1], rtol=1e-4)


@pytest.mark.parametrize("layers_at_once", [5, 2])
def test_programs_are_few(rng, caplog, layers_at_once):
    """At most two for each shape of site in coupling, and two more; blocks share them."""
    odd = 40 + layers_at_once  # shapes that no other test has
    rows_at_once = layers_at_once * odd * 19

    def wide(layers, widths):
        return Activations(
            {site: rng.normal(size=(layers, odd, width)).astype(np.float32)
             for site, width in widths.items()},
            np.arange(odd),
        )  # fmt: skip

    target = wide(3, {"mlp_in": 11, "gate_out": 13, "up_out": 13})
    source = wide(5, {"mlp_in": 17, "gate_out": 19, "up_out": 19})
    spec = MergeSpec(weights=("gate", "up"))
    with jax.log_compiles(), caplog.at_level("WARNING"):
        couplings.couple(target, source, HParams(1.0, 0.05), spec=spec, rows_at_once=rows_at_once)
    compiled = [one for one in caplog.messages if one.startswith("Finished XLA compilation")]
    assert 2 <= len(compiled) <= 2 * 2 + 2, compiled

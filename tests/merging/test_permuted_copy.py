"""An FFN whose neurons are permuted and rescaled arrives as the original; a mistake would not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_merge_jax.merging import projections
from ot_merge_jax.transport import coupling as couplings
from ot_merge_jax.types import Activations, HParams, MergeSpec


class Ffn:
    """A gated FFN in numpy, float64, and its activations."""

    def __init__(self, gate, up, down):
        self.kernels = {"gate": gate, "up": up, "down": down}

    def __call__(self, x):
        gate, up = x @ self.kernels["gate"], x @ self.kernels["up"]
        inner = gate / (1 + np.exp(-gate)) * up
        out = inner @ self.kernels["down"]
        return out, {
            "mlp_in": x,
            "gate_out": gate,
            "up_out": up,
            "down_in": inner,
            "down_out": out,
        }


WIRING = {
    "gate": ("mlp_in", "gate_out"),
    "up": ("mlp_in", "up_out"),
    "down": ("down_in", "down_out"),
}
HIDDEN, INNER, SAMPLES = 6, 9, 400


def copy_of(ffn, rng):
    """The same function in another basis: neurons permuted and rescaled, residual features too.

    Returns:
        The copy, the residual permutation and the scale of the residual features it reads.
    """
    residual, inner = rng.permutation(HIDDEN), rng.permutation(INNER)
    while (np.argsort(inner) == inner).any() or (np.argsort(residual) == residual).all():
        residual, inner = rng.permutation(HIDDEN), rng.permutation(INNER)  # not its own inverse
    read, neuron = rng.uniform(0.2, 5, HIDDEN), rng.uniform(0.2, 5, INNER)
    gate, up, down = (ffn.kernels[name] for name in WIRING)
    return (
        Ffn(
            (gate / read[:, None])[residual][:, inner],
            (up / read[:, None] * neuron)[residual][:, inner],
            (down / neuron[:, None])[inner][:, residual],
        ),
        residual,
        read,
    )


@pytest.fixture(scope="module")
def copied():
    """(original, its input, activations of target and source, kernels of the source, a copy)."""
    rng = np.random.default_rng(11)
    ffn = Ffn(*(rng.normal(size=s) for s in ((HIDDEN, INNER), (HIDDEN, INNER), (INNER, HIDDEN))))
    x = rng.normal(size=(SAMPLES, HIDDEN))
    copy, residual, read = copy_of(ffn, rng)
    (out, ours), (other_out, theirs) = ffn(x), copy((x * read)[:, residual])
    np.testing.assert_allclose(other_out, out[:, residual], rtol=1e-9, atol=1e-9)
    row_id = np.arange(SAMPLES)
    target, source = (
        Activations({k: v[None].astype(np.float32) for k, v in sites.items()}, row_id)
        for sites in (ours, theirs)
    )
    return ffn, x, target, source, {k: v[None].astype(np.float32) for k, v in copy.kernels.items()}


def carried(copied, epsilon, *, mutate=None, **kw):
    """The FFN transported from the copy to the target, float64."""
    _, _, target, source, kernels = copied
    spec = MergeSpec(weights=("gate", "up", "down"), **kw)
    coupling = couplings.couple(target, source, HParams(1.0, epsilon), spec=spec)
    if mutate is not None:
        coupling = mutate(coupling)
    return Ffn(
        *(
            np.asarray(
                projections.transported(
                    jnp.asarray(kernels[name]),
                    coupling,
                    target,
                    source,
                    in_site=in_site,
                    out_site=out_site,
                    spec=spec,
                )[0],
                np.float64,
            )
            for name, (in_site, out_site) in WIRING.items()
        )
    )


def error_of(copied, ffn):
    """Relative error of an FFN's outputs against the original's."""
    original, x, *_ = copied
    expected = original(x)[0]
    return np.linalg.norm(ffn(x)[0] - expected) / np.linalg.norm(expected)


def test_a_permuted_copy_arrives_as_the_original(copied):
    """Function preserved to 1e-3 at epsilon 0.01, weights to 1e-3 of the largest."""
    ffn = carried(copied, 0.01)
    for name, kernel in copied[0].kernels.items():
        np.testing.assert_allclose(
            ffn.kernels[name], kernel, rtol=0, atol=1e-3 * np.abs(kernel).max(), err_msg=name
        )
    assert error_of(copied, ffn) < 1e-3


def test_a_larger_epsilon_blurs_the_function(copied):
    errors = [error_of(copied, carried(copied, epsilon)) for epsilon in (0.2, 0.1, 0.05, 0.01)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1


def without_units(coupling):
    """The same coupling with every standard deviation 1."""
    target, source = (
        jax.tree.map(jnp.ones_like, units) for units in (coupling.std_target, coupling.std_source)
    )
    return coupling._replace(std_target=target, std_source=source)


def swap_units(coupling):
    return coupling._replace(std_target=coupling.std_source, std_source=coupling.std_target)


@pytest.mark.parametrize("mutate", [swap_units, without_units])
def test_wrong_units_do_not_pass(copied, mutate):
    """All matrices of the copy are as wide as the original's: only the numbers can tell."""
    assert error_of(copied, carried(copied, 0.01, mutate=mutate)) > 0.3


def test_transposed_plans_do_not_pass(copied, monkeypatch):
    right = couplings.rebuild
    monkeypatch.setattr(couplings, "rebuild", lambda *args, **how: right(*args, **how).T)
    fresh = {"max_iterations": 1999}  # a static argument: the mutant is traced, and stays its own
    assert error_of(copied, carried(copied, 0.01, **fresh)) > 0.3


def test_swapped_models_do_not_pass(copied):
    """The coupling of (source, target) used as that of (target, source): the inverse one."""
    ffn, x, target, source, kernels = copied
    swapped = (ffn, x, source, target, kernels)
    assert error_of(copied, carried(swapped, 0.01)) > 0.3

"""Sharpness, mass and predictive power of plans whose answers are known."""

import jax.numpy as jnp
import numpy as np
import pytest

from ot_merge_jax.transport import cost as costs
from ot_merge_jax.transport import diagnostics, sinkhorn

SIZES = [(1, 1), (2, 5), (7, 3), (60, 97)]


def permutation(rng, n):
    """A hard plan between ``n`` neurons, and the source neuron of each target neuron."""
    order = rng.permutation(n)
    return jnp.asarray(np.eye(n)[order] / n, jnp.float32), order


def uniform(n, m):
    return jnp.full((n, m), 1 / (n * m), jnp.float32)


# ------------------------------------------------------------------------ neighbours


@pytest.mark.parametrize("n", [1, 2, 7])
def test_a_hard_match_has_one_neighbour(rng, n):
    plan, _ = permutation(rng, n)
    np.testing.assert_allclose(diagnostics.effective_neighbours(plan), 1, rtol=1e-5)


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_a_flat_plan_has_all_neighbours(n, m):
    np.testing.assert_allclose(diagnostics.effective_neighbours(uniform(n, m)), m, rtol=1e-4)


def test_neighbours_are_the_mean_over_rows_not_over_columns(rng):
    plan = rng.random((7, 3)).astype(np.float32)
    p = plan / plan.sum(1, keepdims=True)
    expected = np.exp(-(p * np.log(p)).sum(1)).mean()
    np.testing.assert_allclose(
        diagnostics.effective_neighbours(jnp.asarray(plan)), expected, rtol=1e-5
    )


def test_neighbours_ignore_signs_and_scale(rng):
    plan = rng.random((7, 3)).astype(np.float32)
    signs = rng.choice([-1, 1], plan.shape).astype(np.float32)
    np.testing.assert_allclose(
        diagnostics.effective_neighbours(jnp.asarray(plan * signs / 64)),
        diagnostics.effective_neighbours(jnp.asarray(plan)),
        rtol=1e-6,
    )


def test_neighbours_of_an_empty_row_are_finite():
    assert np.isfinite(diagnostics.effective_neighbours(jnp.zeros((2, 3))))


# ------------------------------------------------------------------------ mass


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_mass_curve_against_numpy(rng, n, m):
    plan = rng.random((n, m)).astype(np.float32)
    ks = (1, 2, n, n * m, n * m + 5)
    expected = [np.sort(plan.ravel())[::-1][:k].sum() / plan.sum() for k in ks]
    ours = diagnostics.mass_curve(plan, ks)
    np.testing.assert_allclose(ours, expected, rtol=1e-4)
    np.testing.assert_allclose(ours[-2:], 1, rtol=1e-6)


def test_mass_curve_counts_negative_entries_by_their_size():
    plan = jnp.array([[-0.5, 0.25], [0.25, 0.0]])
    assert diagnostics.mass_curve(np.asarray(plan), (1, 3)).tolist() == [0.5, 1.0]


# ------------------------------------------------------------------------ picture


@pytest.mark.parametrize("bins", [1, 4, 48])
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_picture_keeps_the_mass_in_bounded_size(rng, n, m, bins):
    plan = jnp.asarray(rng.random((n, m)), jnp.float32)
    picture = diagnostics.sorted_heat(np.asarray(plan), bins=bins)
    assert picture.shape == (min(bins, n), min(bins, m))
    assert picture.min() >= 0
    np.testing.assert_allclose(picture.sum(), plan.sum(), rtol=1e-4)


@pytest.mark.parametrize("n", [2, 7, 96])
def test_a_permutation_shows_a_diagonal(rng, n):
    plan, _ = permutation(rng, n)
    picture = diagnostics.sorted_heat(np.asarray(plan))
    np.testing.assert_allclose(np.diag(picture).sum(), 1, rtol=1e-5)


def test_a_flat_plan_shows_no_diagonal():
    picture = diagnostics.sorted_heat(np.asarray(uniform(96, 96)))
    np.testing.assert_allclose(picture, 1 / 48**2, rtol=1e-4)


# ------------------------------------------------------------------------ held-out R^2


def halves(values):
    return tuple(jnp.asarray(v[:100], jnp.float32) for v in values), tuple(
        jnp.asarray(v[100:], jnp.float32) for v in values
    )


def test_a_perfect_plan_explains_everything(rng):
    """Permuted, rescaled and shifted neurons: units are taken from the fitted rows."""
    plan, order = permutation(rng, 7)
    source = rng.normal(size=(150, 7)) * rng.uniform(0.1, 10, 7) + rng.normal(size=7)
    target = 3 * source[:, order] - 5
    np.testing.assert_allclose(
        diagnostics.held_out_r2(plan, *halves((target, source))), 1, rtol=1e-4
    )


def test_the_permuted_map_explains_less(rng):
    plan, order = permutation(rng, 7)
    source = rng.normal(size=(150, 7))
    target = source[:, order] + 0.3 * rng.normal(size=(150, 7))
    right = diagnostics.held_out_r2(plan, *halves((target, source)))
    wrong = diagnostics.held_out_r2(jnp.roll(plan, 1, 1), *halves((target, source)))
    assert right > 0.7
    assert wrong < 0


def test_no_mass_predicts_the_mean(rng):
    """R^2 counts from the fitted mean, so on other rows nothing at all is exactly 0."""
    values = rng.normal(size=(150, 5)), rng.normal(size=(150, 3))
    r2 = diagnostics.held_out_r2(jnp.zeros((5, 3)), *halves(values))
    np.testing.assert_allclose(r2, 0, atol=1e-6)


def test_r2_of_a_solved_plan_against_numpy(rng):
    """Widths differ; the plan is scaled by the TARGET's width."""
    latent = rng.normal(size=(150, 3))
    target, source = (latent @ rng.normal(size=(3, n)) + 0.2 for n in (5, 9))
    target, source = target + 0.3 * rng.normal(size=target.shape), source + 0
    fitted, held_out = halves((target, source))
    cost = costs.correlation_cost(*fitted)
    plan = sinkhorn.plan(cost, sinkhorn.solve(cost, epsilon=0.05))
    x, y = ((v - v[:100].mean(0)) / v[:100].std(0) for v in (target, source))
    mapped = y[100:] @ (5 * np.asarray(plan, np.float64)).T
    expected = 1 - ((x[100:] - mapped) ** 2).sum() / (x[100:] ** 2).sum()
    np.testing.assert_allclose(diagnostics.held_out_r2(plan, fitted, held_out), expected, atol=1e-4)
    assert expected > 0.2


def test_r2_of_constant_neurons_is_finite():
    ones = jnp.ones((10, 2))
    assert np.isfinite(diagnostics.held_out_r2(uniform(2, 2), (ones, ones), (ones, ones)))

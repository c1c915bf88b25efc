"""The accelerated step: numpy's least squares, and its guards."""

import jax.numpy as jnp
import numpy as np
import pytest

from ot_merge_jax.transport import anderson

B, M = 2, 21
NEAR = jnp.zeros((B,))  # an error at which every difference counts


def history_of(rng, window, count):
    """A random past, of which one problem does not know one difference."""
    residual = 0.1 * rng.normal(size=(B, M))
    moved = 0.1 * rng.normal(size=(B, M))
    residuals, targets = rng.normal(size=(2, window, B, M))
    is_known = np.ones((window, B), bool)
    is_known[-1, 1] = False
    arrays = [jnp.asarray(x, jnp.float32) for x in (moved, residual, residuals, targets)]
    return anderson.History(*arrays, jnp.asarray(is_known), jnp.ones((B,)), jnp.asarray(count))


def columns_of(rng):
    columns = rng.uniform(0.5, 1.5, (B, M))
    return jnp.asarray(columns / columns.sum(1, keepdims=True), jnp.float32)


@pytest.mark.parametrize("window", [1, 3, 5])
def test_a_step_is_a_least_squares_step(rng, window):
    slot = window // 2
    before, columns = history_of(rng, window, slot + window), columns_of(rng)
    found, after = anderson.step(columns, before, error=NEAR, before=NEAR)
    for index in range(B):
        mass = np.asarray(columns[index], np.float64)
        residuals, targets = (
            np.array(x[:, index], np.float64) for x in (before.residuals, before.targets)
        )
        residual = -np.log(M * mass)
        residuals[slot] = residual - before.residual[index]
        targets[slot] = residuals[slot] + before.moved[index]
        known = np.array(before.is_known[:, index])
        known[slot] = True
        root = np.sqrt(mass)
        share, *_ = np.linalg.lstsq((residuals[known] * root).T, residual * root, rcond=None)
        expected = residual - share @ targets[known]
        np.testing.assert_allclose(found[index], expected - expected.mean(), atol=2e-4)
    np.testing.assert_allclose(after.moved, found)
    assert int(after.count) == slot + window + 1


def test_slow_directions_are_solved_together(rng):
    """x <- x - S x with three slow directions: four differences leave next to nothing of them."""
    basis = rng.normal(size=(M, 3))
    basis, _ = np.linalg.qr(basis - basis.mean(0))  # none of them a common factor
    slow = basis @ np.diag([0.5, 0.2, 0.05]) @ basis.T
    start = left = 0.1 * basis @ np.ones(3)
    history = anderson.start(1, M, M)
    for _ in range(5):
        columns = jnp.asarray(np.exp(slow @ left)[None] / M, jnp.float32)
        moved, history = anderson.step(columns, history, error=NEAR[:1], before=NEAR[:1])
        left = left + np.asarray(moved[0])
    unaccelerated = np.linalg.matrix_power(np.eye(M) - slow, 5) @ start
    assert np.abs(unaccelerated).max() > 0.3 * np.abs(start).max()
    assert np.abs(left).max() < 2e-3 * np.abs(start).max()


def test_a_residual_that_crawls_doubles_the_step(rng):
    columns, far = columns_of(rng), jnp.ones((B,))
    moved, history = anderson.step(columns, anderson.start(B, M, M), error=far, before=far)
    residual = moved
    for factor in (2, 4, 8):
        moved, history = anderson.step(columns, history, error=far, before=far)
        np.testing.assert_allclose(moved, factor * residual, rtol=1e-5)
    assert not history.is_known.any()
    for _ in range(10):
        moved, history = anderson.step(columns, history, error=far, before=far)
    assert np.abs(moved).max() <= 2 * anderson._LONGEST  # the mean is taken out after


def test_an_error_that_grows_forgets_its_problem_alone(rng):
    before = history_of(rng, 5, 7)
    error = jnp.array([3e-4, 1e-4])
    _, after = anderson.step(columns_of(rng), before, error=error, before=jnp.full((B,), 1e-4))
    assert not after.is_known[:, 0].any()
    assert after.is_known[:, 1].any()


def test_a_problem_of_few_neurons_keeps_few_differences():
    assert anderson.start(1, 8, 2).residuals.shape == (2, 1, 8)
    assert anderson.start(1, 1, 0).residuals.shape == (1, 1, 1)

"""The Sinkhorn wrapper: marginals, duality, limits of epsilon, a second library, compilation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import ot as pot
import pytest
import scipy.optimize

from ot_merge_jax.transport import sinkhorn

#: (target, source), never square by accident.
SIZES = [(1, 1), (2, 1), (3, 5), (33, 21)]
EPSILON = 0.05
EXACT = 1e-6  # the default threshold


def draw(rng, *shape):
    return rng.uniform(0, 2, shape).astype(np.float32)


def run(cost, **kw):
    """Ours on a numpy cost, leaves as numpy."""
    found = sinkhorn.solve(jnp.asarray(cost), **{"epsilon": EPSILON, **kw})
    return jax.tree.map(np.asarray, found)


def plan(cost, found):
    """The plan in float64, from the definition."""
    f, g = found.f.astype(np.float64), found.g.astype(np.float64)
    return np.exp((f[..., :, None] + g[..., None, :] - cost) / found.epsilon[..., None, None])


def feasible(coupled):
    """The nearest plan with exactly uniform marginals (Altschuler et al. 2017, algorithm 2)."""
    n, m = coupled.shape
    coupled = coupled * np.minimum(1, 1 / (n * coupled.sum(1)))[:, None]
    coupled = coupled * np.minimum(1, 1 / (m * coupled.sum(0)))[None]
    missing_rows, missing_columns = 1 / n - coupled.sum(1), 1 / m - coupled.sum(0)
    total = missing_rows.sum()
    return coupled + (np.outer(missing_rows, missing_columns) / total if total > 0 else 0)


@pytest.fixture(params=SIZES, ids=str)
def solved(request, rng):
    cost = draw(rng, *request.param)
    return cost, run(cost)


def test_shapes_and_dtypes(solved):
    cost, found = solved
    assert found.f.shape == cost.shape[:1]
    assert found.g.shape == cost.shape[1:]
    for name in ("epsilon", "cost", "error", "iterations", "converged"):
        assert getattr(found, name).shape == (), name
    assert {leaf.dtype for leaf in (found.f, found.g, found.cost, found.error)} == {
        np.dtype("float32")
    }
    assert found.iterations.dtype == np.int32
    assert found.converged.dtype == bool


def test_marginals_are_uniform(solved):
    """Potentials of size ~1 are stored to 6e-8, which is 1e-6 of a plan's entry at epsilon 0.05."""
    cost, found = solved
    n, m = cost.shape
    coupled = plan(cost, found)
    error = np.abs(coupled.sum(1) - 1 / n).sum() + np.abs(coupled.sum(0) - 1 / m).sum()
    assert found.converged
    assert error < EXACT + 4e-6
    np.testing.assert_allclose(coupled.sum(), 1, atol=4e-6)


def test_reported_numbers_are_those_of_the_plan(solved):
    cost, found = solved
    n, m = cost.shape
    coupled = plan(cost, found)
    error = np.abs(coupled.sum(1) - 1 / n).sum() + np.abs(coupled.sum(0) - 1 / m).sum()
    np.testing.assert_allclose(found.cost, (coupled * cost).sum(), rtol=1e-5)
    np.testing.assert_allclose(found.error, error, atol=4e-6)
    assert found.epsilon == np.float32(EPSILON)
    assert 0 < found.iterations <= 2000


def test_plan_rebuilds_from_potentials(solved):
    cost, found = solved
    ours = sinkhorn.plan(jnp.asarray(cost), jax.tree.map(jnp.asarray, found))
    np.testing.assert_allclose(ours, plan(cost, found), rtol=2e-5, atol=1e-12)


def test_duality_gap_is_not_negative_and_closes(solved):
    """Weak duality holds for any feasible plan; it is exact only at the solution."""
    cost, found = solved
    n, m = cost.shape
    coupled, epsilon = plan(cost, found), float(found.epsilon)
    dual = found.f.mean(dtype=np.float64) + found.g.mean(dtype=np.float64) - epsilon * coupled.sum()
    candidate = feasible(coupled)
    np.testing.assert_allclose(candidate.sum(1), 1 / n, rtol=1e-12)
    np.testing.assert_allclose(candidate.sum(0), 1 / m, rtol=1e-12)
    positive = candidate[candidate > 0]
    primal = (candidate * cost).sum() + epsilon * (positive * (np.log(positive) - 1)).sum()
    assert primal - dual >= -1e-12
    assert primal - dual < 1e-5


def test_agrees_with_pot(solved):
    cost, found = solved
    n, m = cost.shape
    theirs = pot.sinkhorn(
        np.full(n, 1 / n),
        np.full(m, 1 / m),
        cost.astype(np.float64),
        EPSILON,
        method="sinkhorn_log",
        numItermax=50_000,
        stopThr=1e-12,
    )
    np.testing.assert_allclose(plan(cost, found), theirs, rtol=0, atol=1e-5 * theirs.max())


def test_transposing_the_problem_transposes_the_plan(solved):
    cost, found = solved
    turned = run(cost.T.copy())
    expected = plan(cost, found).T
    np.testing.assert_allclose(plan(cost.T, turned), expected, rtol=0, atol=1e-5 * expected.max())
    np.testing.assert_allclose(turned.cost, found.cost, atol=1e-5)


def test_a_constant_added_to_the_cost_moves_no_mass(solved):
    cost, found = solved
    shifted = run(cost + np.float32(0.5))
    expected = plan(cost, found)
    np.testing.assert_allclose(
        plan(cost + 0.5, shifted), expected, rtol=0, atol=2e-5 * expected.max()
    )
    np.testing.assert_allclose(shifted.cost, found.cost + 0.5, atol=1e-5)


@pytest.mark.parametrize("factor", [0.25, 3.0, 100.0])
def test_potentials_scale_with_cost_and_epsilon(solved, factor):
    cost, found = solved
    scaled = run(cost * np.float32(factor), epsilon=EPSILON * factor)
    tolerance = 2e-6 * factor
    np.testing.assert_allclose(scaled.f, factor * found.f, rtol=2e-5, atol=tolerance)
    np.testing.assert_allclose(scaled.g, factor * found.g, rtol=2e-5, atol=tolerance)
    np.testing.assert_allclose(scaled.cost, factor * found.cost, rtol=1e-5)


def test_a_large_epsilon_gives_the_product_plan(solved):
    cost, _ = solved
    n, m = cost.shape
    found = run(cost, epsilon=1000.0)
    np.testing.assert_allclose(plan(cost, found) * n * m, 1, atol=5e-3)
    np.testing.assert_allclose(found.cost, cost.mean(), rtol=5e-3)


@pytest.mark.parametrize("value", [0.0, 1.0, 2.0])
def test_a_constant_cost_gives_the_product_plan(value):
    cost = np.full((3, 5), value, np.float32)
    found = run(cost)
    assert found.converged
    np.testing.assert_allclose(plan(cost, found) * 15, 1, atol=2e-5)
    np.testing.assert_allclose(found.cost, value, atol=1e-5)


@pytest.mark.parametrize(("n", "m"), [(7, 7), (3, 6), (8, 2)])
def test_a_small_epsilon_gives_the_assignment(rng, n, m):
    """Against scipy, rows or columns repeated; the gap is at most epsilon log min(n, m)."""
    epsilon, slack, size = 0.002, 2e-3, max(n, m)
    cost = draw(rng, n, m)
    big = np.repeat(np.repeat(cost, size // n, 0), size // m, 1)
    rows, columns = scipy.optimize.linear_sum_assignment(big)
    best = big[rows, columns].mean()
    hard = np.zeros((n, m))
    np.add.at(hard, (rows // (size // n), columns // (size // m)), 1 / size)
    found = run(cost, epsilon=epsilon, max_iterations=20_000, threshold=1e-4)
    assert found.converged
    assert best - slack < found.cost < best + epsilon * np.log(min(n, m)) + slack
    np.testing.assert_allclose(plan(cost, found), hard, rtol=0, atol=0.05 / size)


def test_a_smaller_epsilon_is_sharper_and_cheaper(rng):
    cost = draw(rng, 3, 5)
    costs = [run(cost, epsilon=epsilon).cost for epsilon in (1.0, 0.3, 0.1, 0.05)]
    assert all(later < earlier for earlier, later in itertools.pairwise(costs))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_cost_that_is_not_finite_is_data_not_an_exception(rng, bad):
    cost = draw(rng, 3, 5)
    cost[1, 2] = bad
    assert not run(cost).converged


def test_a_broken_problem_does_not_spoil_its_batch(rng):
    costs = draw(rng, 3, 3, 5)
    costs[1, 0, 0] = np.nan
    found = run(costs)
    np.testing.assert_array_equal(found.converged, [True, False, True])
    assert np.isfinite(found.f[[0, 2]]).all()
    np.testing.assert_allclose(found.f[2], run(costs[2]).f, atol=1e-5)


@pytest.mark.parametrize("max_iterations", [1, 3, 7])
def test_too_few_iterations_do_not_converge(rng, max_iterations):
    cost = draw(rng, 3, 5)
    found = run(cost, epsilon=0.01, max_iterations=max_iterations)
    coupled = plan(cost, found)
    error = np.abs(coupled.sum(1) - 1 / 3).sum() + np.abs(coupled.sum(0) - 1 / 5).sum()
    assert not found.converged
    assert found.error > 1e-4
    np.testing.assert_allclose(found.error, error, rtol=1e-3)
    assert found.iterations <= max_iterations


@pytest.mark.parametrize("epsilon", [0.02, 0.005])
def test_costs_of_real_neurons_converge_in_float32(rng, epsilon):
    """Costs near 1 that differ a little: rounding of the potentials must not hide convergence."""
    cost = (1 + 0.1 * rng.normal(size=(33, 21))).astype(np.float32)
    found = run(cost, epsilon=epsilon)
    assert found.converged
    assert found.iterations < 1000
    assert found.error < 2 * EXACT


def test_a_looser_threshold_stops_earlier_within_it(rng):
    cost = draw(rng, 33, 21)
    loose, tight = run(cost, threshold=1e-2), run(cost)
    assert loose.iterations < tight.iterations
    assert tight.error < loose.error < 2e-2
    assert loose.converged


@pytest.mark.parametrize("batch", [1, 3, 65])  # 65 is one more than fits side by side
def test_a_batch_is_its_problems_one_by_one(rng, batch):
    costs = draw(rng, batch, 3, 5)
    together = run(costs)
    for index, cost in enumerate(costs[-3:], max(0, batch - 3)):
        alone = run(cost)
        np.testing.assert_allclose(together.f[index], alone.f, rtol=0, atol=2e-5)
        np.testing.assert_allclose(together.g[index], alone.g, rtol=0, atol=2e-5)
        np.testing.assert_allclose(together.cost[index], alone.cost, rtol=1e-5)
        assert together.converged[index] == alone.converged
    assert together.f.shape == (batch, 3)
    assert together.iterations.shape == together.epsilon.shape == (batch,)


def test_each_problem_of_a_batch_may_have_its_epsilon(rng):
    costs, epsilons = draw(rng, 3, 3, 5), np.array([0.05, 0.2, 1.0], np.float32)
    together = run(costs, epsilon=jnp.asarray(epsilons))
    np.testing.assert_array_equal(together.epsilon, epsilons)
    for index, epsilon in enumerate(epsilons):
        np.testing.assert_allclose(
            together.f[index], run(costs[index], epsilon=epsilon).f, rtol=0, atol=2e-5
        )


def test_vmap_over_epsilon_is_the_loop(rng):
    cost, epsilons = jnp.asarray(draw(rng, 3, 5)), jnp.array([0.05, 0.2, 1.0])
    swept = jax.vmap(lambda epsilon: sinkhorn.solve(cost, epsilon=epsilon))(epsilons)
    for index, epsilon in enumerate(epsilons):
        alone = run(cost, epsilon=epsilon)
        np.testing.assert_allclose(swept.f[index], alone.f, rtol=0, atol=2e-5)
        np.testing.assert_allclose(swept.cost[index], alone.cost, rtol=1e-5)


def test_epsilon_may_be_traced(rng):
    cost = jnp.asarray(draw(rng, 3, 5))
    traced = jax.jit(lambda epsilon: sinkhorn.solve(cost, epsilon=epsilon).f)(0.05)
    np.testing.assert_allclose(traced, run(cost).f, rtol=0, atol=2e-5)


def test_the_second_call_compiles_nothing(rng, caplog):
    """Not for other costs, and not for another epsilon or threshold."""
    first, second = (jnp.asarray(draw(rng, 6, 4)) for _ in range(2))

    def compiled():
        return [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]

    with jax.log_compiles(), caplog.at_level("WARNING"):
        sinkhorn.solve(first, epsilon=0.1, threshold=1e-6)
        assert compiled()  # the probe works
        caplog.clear()
        sinkhorn.solve(second, epsilon=0.03, threshold=1e-4)
        assert compiled() == []


@pytest.mark.parametrize("epsilon", [0, 0.0, -0.1, float("nan"), float("inf"), [0.1, 0.0, 0.1]])
def test_epsilon_must_be_positive_and_finite(epsilon):
    cost = jnp.zeros((3, 3, 5)) if isinstance(epsilon, list) else jnp.zeros((3, 5))
    with pytest.raises(ValueError, match="epsilon must be positive and finite"):
        sinkhorn.solve(cost, epsilon=jnp.array(epsilon))


@pytest.mark.parametrize("shape", [(), (3,), (2, 2, 3, 5)])
def test_a_cost_has_two_or_three_axes(shape, unchecked):
    with pytest.raises(ValueError, match="axes"):
        sinkhorn.solve(jnp.zeros(shape), epsilon=0.1)


@pytest.mark.parametrize("max_iterations", [0, -1])
def test_max_iterations_is_at_least_one(max_iterations):
    with pytest.raises(ValueError, match="max_iterations"):
        sinkhorn.solve(jnp.zeros((3, 5)), epsilon=0.1, max_iterations=max_iterations)


def test_half_precision_costs_are_solved_in_float32(rng):
    cost = jnp.asarray(draw(rng, 3, 5), jnp.bfloat16)
    found = run(cost)
    assert found.f.dtype == np.float32
    np.testing.assert_allclose(found.f, run(cost.astype(jnp.float32)).f, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (128, 192), (2048, 4096), (10**6, 10**6)])
def test_side_by_side_is_bounded(n, m):
    pairs = sinkhorn.pairs_at_once(n, m)
    assert 1 <= pairs <= 64
    assert pairs == 1 or pairs * n * m <= 2**18

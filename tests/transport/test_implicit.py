"""Gradients through the fixed point, against finite differences of a float64 solver and ott-jax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_merge_jax.transport import coupling as couplings
from ot_merge_jax.transport import sinkhorn as solve
from ot_merge_jax.types import Activations, HParams, MergeSpec

EPSILONS = [0.5, 0.1, 0.02]
#: (target, source, epsilon): longer on either side, and square. A square plan at a small epsilon is
#: nearly a permutation, and its potentials nearly undetermined: the oracle does not converge.
PROBLEMS = [(n, m, epsilon) for n, m in ((5, 8), (9, 4)) for epsilon in EPSILONS] + [(6, 6, 0.1)]
STEP = 1e-6


def cost_of(rng, n, m):
    """A correlation cost in float64."""
    shared = rng.normal(size=(30, 4))
    sides = [shared @ rng.normal(size=(4, k)) + 0.5 * rng.normal(size=(30, k)) for k in (n, m)]
    x, y = ((one - one.mean(0)) / np.linalg.norm(one - one.mean(0), axis=0) for one in sides)
    return np.asarray(1 - x.T @ y, np.float32).astype(np.float64)


def oracle(costs, epsilon):
    """Textbook Sinkhorn in float64: (plans, f, g) of ``[b, n, m]``."""
    epsilon = np.broadcast_to(epsilon, len(costs))[:, None]
    kernel = np.exp(-costs / epsilon[:, :, None])
    n, m = costs.shape[1:]
    v = np.ones((len(costs), m))
    for _ in range(200_000):
        u = 1 / n / np.einsum("bnm,bm->bn", kernel, v)
        columns = v * np.einsum("bnm,bn->bm", kernel, u)
        if np.abs(columns - 1 / m).sum(1).max() < 1e-13:
            break
        v = v / columns / m
    else:
        raise AssertionError("the oracle has not converged")
    return u[:, :, None] * kernel * v[:, None], epsilon * np.log(u), epsilon * np.log(v)


def differences(value, cost, epsilon):
    """Central differences with respect to every entry of the cost, and to epsilon.

    Args:
        value: From costs ``[b, n, m]``, epsilons ``[b]`` and what `oracle` returns to ``[b]``.
    """
    steps = STEP * np.eye(cost.size).reshape(-1, *cost.shape)
    costs = np.concatenate([cost + steps, cost - steps, cost[None], cost[None]])
    epsilons = np.full(len(costs), epsilon)
    epsilons[-2:] += np.array([STEP, -STEP])
    values = value(costs, epsilons, *oracle(costs, epsilons))
    up, down, rest = np.split(values, [cost.size, 2 * cost.size])
    return ((up - down) / (2 * STEP)).reshape(cost.shape), (rest[0] - rest[1]) / (2 * STEP)


def close(ours, theirs, tolerance=1e-3):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def gradients(function, cost, epsilon):
    return jax.grad(function, argnums=(0, 1))(jnp.asarray(cost, jnp.float32), jnp.float32(epsilon))


@pytest.fixture(params=PROBLEMS, ids=str)
def problem(request, rng):
    n, m, epsilon = request.param
    return cost_of(rng, n, m), epsilon


def test_transport_cost(problem):
    cost, epsilon = problem
    expected = differences(lambda c, _, q, f, g: (q * c).sum((1, 2)), cost, epsilon)
    found = gradients(lambda c, e: solve.solve(c, epsilon=e).cost, cost, epsilon)
    close(found[0], expected[0])
    close(found[1], expected[1])


def test_plan(rng, problem):
    cost, epsilon = problem
    weights = rng.normal(size=cost.shape)

    def value(cost, epsilon):
        plan = solve.plan(cost, solve.solve(cost, epsilon=epsilon))
        return (jnp.asarray(weights, jnp.float32) * plan).sum()

    expected = differences(lambda c, _, q, f, g: (q * weights).sum((1, 2)), cost, epsilon)
    found = gradients(value, cost, epsilon)
    close(found[0], expected[0])
    close(found[1], expected[1])


def test_potentials_up_to_their_gauge(rng, problem):
    """Of what a constant moved from f to g does not change."""
    cost, epsilon = problem
    n, m = cost.shape
    of_f, of_g = rng.normal(size=n), rng.normal(size=m)
    of_g += (of_f.sum() - of_g.sum()) / m

    def value(cost, epsilon):
        found = solve.solve(cost, epsilon=epsilon)
        return (jnp.asarray(of_f, jnp.float32) * found.f).sum() + (
            jnp.asarray(of_g, jnp.float32) * found.g
        ).sum()

    expected = differences(lambda c, _, q, f, g: f @ of_f + g @ of_g, cost, epsilon)
    found = gradients(value, cost, epsilon)
    close(found[0], expected[0])
    close(found[1], expected[1])


def test_a_constant_moved_between_the_potentials_has_no_gradient(rng):
    cost = jnp.asarray(cost_of(rng, 5, 8), jnp.float32)

    def gauge(cost):
        found = solve.solve(cost, epsilon=0.1)
        return found.f.sum() - found.g.sum()

    assert np.abs(jax.grad(gauge)(cost)).max() < 1e-4
    whole = jax.grad(lambda c: (found := solve.solve(c, epsilon=0.1)).f.sum() + found.g.sum())
    assert np.abs(whole(cost)).max() > 1e-2


def value_of(cost, epsilon):
    found = solve.solve(cost, epsilon=epsilon)
    return found.cost + jnp.sin(10 * solve.plan(cost, found)).sum()


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)], ids=str)
def test_gradients_under_vmap_are_the_loop(rng, axes):
    costs = jnp.stack([jnp.asarray(cost_of(rng, 5, 8), jnp.float32) for _ in range(3)])
    values = [v if axis == 0 else v[0] for v, axis in zip((costs, jnp.array(EPSILONS)), axes,
                                                          strict=True)]  # fmt: skip
    run = jax.grad(value_of, argnums=(0, 1))
    for swept in (jax.jit(jax.vmap(run, axes))(*values), jax.vmap(jax.jit(run), axes)(*values)):
        for index in range(3):
            alone = run(*(v[index] if a == 0 else v for v, a in zip(values, axes, strict=True)))
            close(swept[0][index], alone[0], 1e-4)
            close(swept[1][index], alone[1], 1e-4)


def test_the_gradient_of_a_vmap_is_the_sum_of_its_lanes(rng):
    """The other way round: what lanes share collects the gradients of all."""
    cost = jnp.asarray(cost_of(rng, 5, 8), jnp.float32)
    found = jax.grad(lambda c: jax.vmap(lambda e: value_of(c, e))(jnp.array(EPSILONS)).sum())(cost)
    close(found, sum(jax.grad(value_of)(cost, epsilon) for epsilon in EPSILONS), 1e-4)


def test_a_batch_has_the_gradients_of_its_problems(rng):
    costs = jnp.stack([jnp.asarray(cost_of(rng, 5, 8), jnp.float32) for _ in range(3)])
    found = jax.grad(lambda c: solve.solve(c, epsilon=0.1, pairs_at_once=2).cost.sum())(costs)
    for ours, cost in zip(found, costs, strict=True):
        close(ours, jax.grad(lambda c: solve.solve(c, epsilon=0.1).cost)(cost), 1e-4)


@pytest.mark.filterwarnings("ignore:.*NormalCG:DeprecationWarning")  # inside ott-jax
@pytest.mark.parametrize("solver", ["auto", "ott"])
def test_agrees_with_the_implicit_gradient_of_ott(rng, solver):
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import implicit_differentiation, sinkhorn

    cost, weights = jnp.asarray(cost_of(rng, 9, 4), jnp.float32), rng.normal(size=(9, 4))

    def theirs(cost):
        problem = linear_problem.LinearProblem(geometry.Geometry(cost, epsilon=0.1))
        solver = sinkhorn.Sinkhorn(
            threshold=1e-6, norm_error=1, max_iterations=5000,
            implicit_diff=implicit_differentiation.ImplicitDiff(),
        )  # fmt: skip
        return (solver(problem).matrix * (cost + weights)).sum()

    def ours(cost):
        found = solve.solve(cost, epsilon=0.1, solver=solver)
        return found.cost + (solve.plan(cost, found) * weights).sum()

    close(jax.grad(ours)(cost), jax.grad(theirs)(cost))


def test_what_is_no_solution_has_no_gradient(rng):
    cost = jnp.asarray(cost_of(rng, 5, 8), jnp.float32)
    assert not jax.grad(lambda c: solve.solve(c, epsilon=0.1).error)(cost).any()
    found = jax.grad(lambda t: solve.solve(cost, epsilon=0.1, threshold=t).cost)(1e-6)
    assert found == 0


def test_a_failed_problem_can_be_kept_out(rng):
    """0 times NaN is NaN: one lane would spoil the gradient of a cost that all share."""
    cost = jnp.asarray(cost_of(rng, 5, 8), jnp.float32)

    def total(cost, epsilons):
        found = jax.vmap(lambda e: solve.solve(cost, epsilon=e))(epsilons)
        return jnp.where(found.converged, found.cost, 0.0).sum()

    found = jax.grad(total)(cost, jnp.array([0.1, 1e-6]))
    close(found, jax.grad(total)(cost, jnp.array([0.1])), 1e-6)


def test_through_couple(rng):
    """A directional difference of the transport cost of activations."""
    rows = np.arange(40)

    def draw(layers, width):
        return rng.normal(size=(layers, 40, width)).astype(np.float32)

    source, target, direction = draw(2, 7), draw(1, 5), draw(2, 7)

    def value(source):
        sides = [Activations(dict.fromkeys(("mlp_in", "up_out"), x), rows) for x in
                 (target, source)]  # fmt: skip
        coupling = couplings.couple(*sides, HParams(1.0, 0.1), spec=MergeSpec(weights=("up",)))
        return (coupling.neuron_potentials["up_out"].cost * jnp.array([1.0, -2.0])).sum()

    found = (jax.grad(value)(jnp.asarray(source)) * direction).sum()
    up, down = (value(jnp.asarray(source + step * direction)) for step in (0.01, -0.01))
    np.testing.assert_allclose(found, (up - down) / 0.02, rtol=1e-2)

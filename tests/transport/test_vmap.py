"""Lanes of vmap are problems of a list: no log domain, nobody's iterations, no copies of a cost."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_merge_jax.transport import anderson, sinkhorn
from ot_merge_jax.transport import coupling as couplings
from ot_merge_jax.types import Activations, HParams, MergeSpec

N, M = 14, 23
EPSILONS = jnp.array([0.5, 0.02, 0.1])
THRESHOLDS = jnp.array([1e-2, 1e-6, 1e-4])
#: How many iterations a lane takes is a matter of rounding: here that of the programs of users.
AS_USERS_COMPILE = {"xla_cpu_use_fusion_emitters": True}


def costs_of(rng, count, n=N, m=M):
    return jnp.asarray(rng.uniform(0, 2, (count, n, m)), jnp.float32)


def activations(rng):
    rows = rng.normal(size=(60, 5))
    return [
        Activations(
            {
                site: (
                    rows @ rng.normal(size=(layers, 5, width))
                    + 0.5 * rng.normal(size=(layers, 60, width))
                ).astype(np.float32)
                for site in ("mlp_in", "up_out")
            },
            np.arange(60),
        )
        for layers, width in ((2, N), (3, M))
    ]


def inner(jaxpr):
    """(equation, whether it is in the body of a while loop) of a program, at any depth."""

    def visit(jaxpr, in_loop):
        for eqn in jaxpr.eqns:
            yield eqn, in_loop
            is_loop = in_loop or eqn.primitive.name == "while"
            for value in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                if hasattr(value, "jaxpr"):
                    yield from visit(value.jaxpr, is_loop)
                elif hasattr(value, "eqns"):
                    yield from visit(value, is_loop)

    return visit(jaxpr.jaxpr, in_loop=False)


def has_log_domain(function, *args):
    """Whether some loop takes the maximum of a whole matrix of costs, as log-sum-exp does."""
    return any(
        in_loop and eqn.primitive.name == "reduce_max" and {N, M} <= set(eqn.invars[0].aval.shape)
        for eqn, in_loop in inner(jax.make_jaxpr(function)(*args))
    )


def assert_same(swept, alone, index, *, is_regrouped=False):
    """One lane against the problem alone: the same path, not only the same end.

    Where other problems are side by side, sums are in another order, and a few iterations may be
    more or fewer.
    """
    spent = np.abs(swept.iterations[index] - alone.iterations)
    allowed = np.maximum(1, 0.1 * np.asarray(alone.iterations)) if is_regrouped else 0
    assert (spent <= allowed).all()
    np.testing.assert_array_equal(swept.converged[index], alone.converged)
    for name in ("f", "g", "cost"):
        np.testing.assert_allclose(
            getattr(swept, name)[index], getattr(alone, name),
            rtol=0, atol=2e-5 if is_regrouped else 2e-6,
        )  # fmt: skip


@pytest.mark.parametrize(("solver", "expected"), [("auto", False), ("ott", True)])
def test_vmapped_solve_has_the_log_domain_only_if_asked(rng, solver, expected):
    run = jax.jit(jax.vmap(lambda e: sinkhorn.solve(costs, epsilon=e, solver=solver).cost))
    costs = costs_of(rng, 2)
    assert has_log_domain(run, EPSILONS) is expected


@pytest.mark.parametrize(("solver", "expected"), [("auto", False), ("ott", True)])
def test_vmapped_couple_has_the_log_domain_only_if_asked(rng, solver, expected):
    sides, spec = activations(rng), MergeSpec(weights=("up",), solver=solver)

    @jax.jit
    @jax.vmap
    def run(epsilon):
        return (
            couplings.couple(*sides, HParams(1.0, epsilon), spec=spec)
            .neuron_potentials["up_out"]
            .cost
        )

    assert has_log_domain(run, EPSILONS) is expected


OVER = {
    "epsilon": (None, 0, None),
    "cost": (0, None, None),
    "threshold": (None, None, 0),
    "cost and epsilon": (0, 0, None),
    "all": (0, 0, 0),
}


@pytest.mark.parametrize(
    ("axes", "batch"),
    [*((axes, (2,)) for axes in OVER.values()), (OVER["all"], ())],
    ids=[*OVER, "all, one problem"],
)
def test_each_lane_spends_its_own_iterations(rng, axes, batch):
    costs = costs_of(rng, 3 * math.prod(batch)).reshape(3, *batch, N, M)
    arguments = (costs, EPSILONS, THRESHOLDS)
    arguments = [
        values if axis == 0 else values[1] for values, axis in zip(arguments, axes, strict=True)
    ]

    def run(cost, epsilon, threshold):
        return sinkhorn.solve(cost, epsilon=epsilon, threshold=threshold)

    lanes = [
        run(*(v[i] if axis == 0 else v for v, axis in zip(arguments, axes, strict=True)))
        for i in range(3)
    ]
    assert len({int(lane.iterations.max()) for lane in lanes}) > 1  # some would wait
    for transformed in (jax.jit(jax.vmap(run, axes)), jax.vmap(jax.jit(run), axes)):
        swept = transformed(*arguments)
        for index, lane in enumerate(lanes):
            assert_same(swept, lane, index, is_regrouped=axes == OVER["cost"])


def test_a_vmap_does_the_work_of_the_loop(rng, monkeypatch):
    """Iterations are masked for who has stopped; so what is counted is rounds of the loops."""
    costs, step, rounds = costs_of(rng, 2), anderson.step, []

    def counted(*args, **kw):
        jax.debug.callback(lambda: rounds.append(1))
        return step(*args, **kw)

    def run(epsilon):
        return sinkhorn.solve(
            costs, epsilon=epsilon, max_iterations=1997
        ).iterations  # a new program

    def count(function):
        rounds.clear()
        iterations = jax.block_until_ready(function())
        jax.effects_barrier()
        return len(rounds), np.asarray(iterations)

    monkeypatch.setattr(anderson, "step", counted)
    loop, iterations = count(lambda: jnp.stack([run(float(epsilon)) for epsilon in EPSILONS]))
    swept, _ = count(lambda: jax.jit(jax.vmap(run))(EPSILONS))
    assert loop >= iterations.max(1).sum()  # the probe works
    assert swept <= 1.1 * loop
    assert swept < 0.8 * len(EPSILONS) * iterations.max()  # had all waited for the slowest


@pytest.mark.parametrize("outer", ["epsilon", "cost"])
@pytest.mark.parametrize("pairs_at_once", [1, None])
def test_nested_vmaps(rng, outer, pairs_at_once):
    costs = costs_of(rng, 8).reshape(4, 2, N, M)
    run = functools.partial(_solve_one, pairs_at_once)
    over_costs, over_epsilons = (jax.vmap(run, axes) for axes in ((0, None), (None, 0)))
    jit = functools.partial(jax.jit, compiler_options=AS_USERS_COMPILE)
    if outer == "epsilon":
        swept = jit(jax.vmap(over_costs, (None, 0)))(costs, EPSILONS)
    else:
        swept = jit(jax.vmap(over_epsilons, (0, None)))(costs, EPSILONS)
        swept = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), swept)
    for i, epsilon in enumerate(EPSILONS):
        for j, cost in enumerate(costs):
            alone = jit(run)(cost, epsilon)
            assert_same(swept, alone, (i, j), is_regrouped=pairs_at_once is None)


def _solve_one(pairs_at_once, cost, epsilon):
    return sinkhorn.solve(cost, epsilon=epsilon, pairs_at_once=pairs_at_once)


def test_lanes_with_epsilons_for_each_problem(rng):
    costs = costs_of(rng, 2)
    epsilons = jnp.array([[0.5, 0.02], [0.1, 0.3], [0.03, 0.03]])
    swept = jax.jit(jax.vmap(lambda e: sinkhorn.solve(costs, epsilon=e)))(epsilons)
    np.testing.assert_array_equal(swept.epsilon, epsilons)
    for index, row in enumerate(epsilons):
        assert_same(swept, sinkhorn.solve(costs, epsilon=row), index)


def test_lanes_of_other_axes(rng):
    costs = costs_of(rng, 3)
    swept = jax.vmap(lambda c: sinkhorn.solve(c, epsilon=0.1), in_axes=2)(jnp.moveaxis(costs, 0, 2))
    for index, cost in enumerate(costs):
        assert_same(swept, sinkhorn.solve(cost, epsilon=0.1), index, is_regrouped=True)


def test_a_cost_that_lanes_share_is_not_copied(rng):
    cost, lanes = costs_of(rng, 1)[0], 50

    def largest(batched):
        epsilons = jnp.linspace(0.1, 1, lanes)
        cost_lanes = jnp.broadcast_to(cost, (lanes, N, M)) if batched else cost
        run = jax.vmap(
            lambda c, e: sinkhorn.solve(c, epsilon=e, pairs_at_once=1), (0 if batched else None, 0)
        )
        program = jax.make_jaxpr(run)(cost_lanes, epsilons)
        sizes = [math.prod(out.aval.shape) for eqn, _ in inner(program) for out in eqn.outvars]
        return max(sizes)

    assert largest(batched=True) >= lanes * N * M  # the probe works
    assert largest(batched=False) < lanes * N * M


def test_a_lane_that_is_too_wide_is_not_attempted(rng):
    costs = costs_of(rng, 2)
    epsilons = jnp.array([0.1, 1e-4, 0.05])
    swept = jax.jit(jax.vmap(lambda e: sinkhorn.solve(costs, epsilon=e)))(epsilons)
    assert swept.converged.tolist() == [[True] * 2, [False] * 2, [True] * 2]
    assert (swept.iterations[1] <= 1).all()
    assert not swept.used_log_domain.any()
    assert_same(swept, sinkhorn.solve(costs, epsilon=0.05), 2)
    eager = sinkhorn.solve(costs, epsilon=1e-4, solver="scaling", max_iterations=30)
    assert not eager.converged.any()
    assert not eager.used_log_domain.any()
    assert sinkhorn.solve(
        costs, epsilon=1e-4, max_iterations=30
    ).used_log_domain.all()  # outside a trace


def test_ott_under_vmap(rng):
    cost = costs_of(rng, 1)[0]
    swept = jax.jit(jax.vmap(lambda e: sinkhorn.solve(cost, epsilon=e, solver="ott")))(EPSILONS)
    assert swept.used_log_domain.all()
    for index, epsilon in enumerate(EPSILONS):
        assert_same(swept, sinkhorn.solve(cost, epsilon=epsilon, solver="ott"), index)


@pytest.mark.parametrize("solver", ["log", "", None])
def test_an_unknown_solver(solver, rng, unchecked):
    with pytest.raises(ValueError, match="solver is 'auto', 'scaling', 'ott'"):
        sinkhorn.solve(jnp.zeros((3, 5)), epsilon=0.1, solver=solver)
    with pytest.raises(ValueError, match="solver is"):
        couplings.layer_plan(jnp.zeros((3, 5)), epsilon=0.1, solver=solver)
    with pytest.raises(ValueError, match="solver is"):
        spec = MergeSpec(weights=("up",), solver=solver)
        couplings.couple(*activations(rng), HParams(1.0), spec=spec)


# ------------------------------------------------------------------------ budgets


@pytest.mark.parametrize("pairs_at_once", [1, 2, 5, 100])
def test_pairs_at_once_does_not_matter(rng, pairs_at_once):
    costs = costs_of(rng, 5)
    expected = sinkhorn.solve(costs, epsilon=0.05)
    found = sinkhorn.solve(costs, epsilon=0.05, pairs_at_once=pairs_at_once)
    np.testing.assert_allclose(found.f, expected.f, rtol=0, atol=2e-6)
    np.testing.assert_allclose(found.cost, expected.cost, rtol=0, atol=1e-6)


def test_pairs_at_once_is_what_runs_side_by_side(rng):
    costs = costs_of(rng, 5)
    for size in (1, 2):
        run = functools.partial(sinkhorn.solve, epsilon=0.05, solver="scaling", pairs_at_once=size)
        shapes = {
            out.aval.shape
            for eqn, in_loop in inner(jax.make_jaxpr(run)(costs))
            for out in eqn.outvars
            if in_loop and eqn.primitive.name == "exp" and out.aval.shape[-1:] == (M,)
        }
        assert (size, N, M) in shapes
        assert all(shape[0] == size for shape in shapes), shapes


@pytest.mark.parametrize("budget", [{"pairs_at_once": 1}, {"rows_at_once": 60 * M}])
def test_budgets_of_couple_do_not_matter(rng, budget):
    sides, spec = activations(rng), MergeSpec(weights=("up",))
    expected = couplings.couple(*sides, HParams(1.0, 0.05), spec=spec)
    found = couplings.couple(*sides, HParams(1.0, 0.05), spec=spec, **budget)
    for site, potentials in expected.neuron_potentials.items():
        np.testing.assert_allclose(found.neuron_potentials[site].f, potentials.f, rtol=0, atol=2e-6)
        np.testing.assert_allclose(
            found.layer_plan[site], expected.layer_plan[site], rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("name", ["pairs_at_once", "rows_at_once"])
def test_budgets_are_at_least_one(rng, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        couplings.couple(
            *activations(rng), HParams(1.0), spec=MergeSpec(weights=("up",)), **{name: 0}
        )
    if name == "pairs_at_once":
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            sinkhorn.solve(jnp.zeros((3, 5)), epsilon=0.1, pairs_at_once=0)


# ------------------------------------------------------------------------ couple


def test_vmapped_couple_is_the_loop(rng):
    sides, spec = activations(rng), MergeSpec(weights=("up",))

    def run(epsilon):
        return couplings.couple(*sides, HParams(1.0, epsilon), spec=spec)

    swept, spent = jax.jit(jax.vmap(run))(EPSILONS), []
    for index, epsilon in enumerate(EPSILONS):
        alone = run(float(epsilon))
        for site, potentials in alone.neuron_potentials.items():
            # the program that makes the costs is another, and rounds otherwise
            assert_same(swept.neuron_potentials[site], potentials, index, is_regrouped=True)
            np.testing.assert_allclose(
                swept.layer_plan[site][index], alone.layer_plan[site], atol=1e-5
            )
            spent.append(int(potentials.iterations.max()))
    assert max(spent) > 3 * min(spent)


def test_couple_by_ott_is_couple(rng):
    sides = activations(rng)
    ours, theirs = (
        couplings.couple(*sides, HParams(1.0, 0.05), spec=MergeSpec(weights=("up",), solver=name))
        for name in ("auto", "ott")
    )
    for site in ours.neuron_potentials:
        assert not ours.neuron_potentials[site].used_log_domain.any()
        assert theirs.neuron_potentials[site].used_log_domain.all()
        assert theirs.neuron_potentials[site].converged.all()
        np.testing.assert_allclose(
            ours.neuron_potentials[site].cost,
            theirs.neuron_potentials[site].cost,
            rtol=0,
            atol=1e-5,
        )
        for l in range(2):
            for m in range(3):
                plans = [
                    np.asarray(couplings.plan(one, *sides, site=site, l=l, m=m), np.float64)
                    for one in (ours, theirs)
                ]
                assert np.abs(plans[0] - plans[1]).sum() <= 1e-4
        assert np.abs(np.subtract(ours.layer_plan[site], theirs.layer_plan[site])).sum() <= 1e-4


@pytest.mark.parametrize(("solver", "expected"), [("auto", False), ("ott", True)])
def test_the_layer_plan_takes_the_solver(rng, solver, expected):
    run = functools.partial(couplings.layer_plan, epsilon=0.1, solver=solver)
    assert has_log_domain(jax.jit(run), costs_of(rng, 1)[0]) is expected


def test_a_layer_plan_that_was_not_solved_is_nan():
    """It has no flag; a plan after no iteration would pass for one."""
    costs = jnp.array([[0.0, 900.0], [900.0, 0.0]])
    run = functools.partial(couplings.layer_plan, layer_cost="plain")
    expected = run(costs, epsilon=0.1)
    np.testing.assert_allclose(expected, [[0.5, 0], [0, 0.5]], atol=1e-6)
    assert np.isnan(jax.jit(lambda e: run(costs, epsilon=e))(0.1)).all()
    assert np.isfinite(jax.jit(lambda e: run(costs, epsilon=e))(10.0)).all()
    by_ott = jax.jit(lambda e: run(costs, epsilon=e, solver="ott"))(0.1)
    np.testing.assert_allclose(by_ott, expected, atol=1e-6)

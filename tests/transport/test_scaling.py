"""The scaling form: the log domain's solution, whatever the blocks, the batch or the epsilon."""

import jax
import jax.numpy as jnp
import numpy as np
import ot as pot
import pytest

from ot_merge_jax.transport import anderson, batches, scaling, sinkhorn

N, M = 33, 21
THRESHOLD = 1e-6
EXACT = 1e-6  # in units of the cost


def costs_of(rng, batch, n=N, m=M):
    """Correlation costs of activations with a planted match: slow at a small epsilon."""
    shared = rng.normal(size=(batch, 60, 8))
    x = shared @ rng.normal(size=(batch, 8, n)) + 0.3 * rng.normal(size=(batch, 60, n))
    y = shared @ rng.normal(size=(batch, 8, m)) + 0.3 * rng.normal(size=(batch, 60, m))
    units = [one - one.mean(1, keepdims=True) for one in (x, y)]
    x, y = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in units)
    return jnp.asarray(1 - np.einsum("btn,btm->bnm", x, y), jnp.float32)


def run(costs, epsilon, **kw):
    epsilons = jnp.broadcast_to(jnp.asarray(epsilon, jnp.float32), costs.shape[:1])
    kw = {"threshold": THRESHOLD, "max_iterations": 2000} | kw
    threshold = kw.pop("threshold")
    return jax.tree.map(np.asarray, scaling.solve(costs, epsilons, threshold, **kw))


def plans(costs, found, epsilon):
    f, g = found.f.astype(np.float64), found.g.astype(np.float64)
    return np.exp((f[:, :, None] + g[:, None, :] - np.asarray(costs)) / epsilon)


def close(ours, theirs, tolerance=2e-5):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize("epsilon", [0.5, 0.1, 0.02, 0.005])
def test_plans_are_those_of_pot(rng, epsilon):
    costs = costs_of(rng, 3)
    found = run(costs, epsilon)
    assert found.converged.all()
    for cost, ours in zip(costs, plans(costs, found, epsilon), strict=True):
        theirs = pot.sinkhorn(
            np.full(N, 1 / N), np.full(M, 1 / M), np.asarray(cost, np.float64), epsilon,
            method="sinkhorn_log", numItermax=100_000, stopThr=1e-11,
        )  # fmt: skip
        close(ours, theirs, 2e-4 if epsilon < 0.01 else 2e-5)


def unaccelerated(columns, history, *, error, before):
    """The textbook's change of the column scalings, in the place of `anderson.step`."""
    del error, before
    return jnp.log(1 / columns.shape[1] / columns), history


def test_acceleration_saves_most_iterations(rng, monkeypatch):
    costs = costs_of(rng, 4)
    accelerated = run(costs, 0.01)
    monkeypatch.setattr(anderson, "step", unaccelerated)
    plain = run(costs, 0.01, max_iterations=20_000)
    assert accelerated.converged.all()
    assert plain.converged.all()
    assert (3 * accelerated.iterations < plain.iterations).all()
    close(plans(costs, accelerated, 0.01), plans(costs, plain, 0.01), 1e-3)


def test_a_step_without_acceleration_is_the_textbook_one(rng, monkeypatch):
    """Three updates of the rows and two of the columns between them, in float64."""
    monkeypatch.setattr(anderson, "step", unaccelerated)
    costs = costs_of(rng, 1)
    found = run(costs, 0.1, max_iterations=3, threshold=0.0)
    cost = np.asarray(costs[0], np.float64)
    row = cost.min(1)
    column = (cost - row[:, None]).min(0)
    kernel, v = np.exp(-(cost - row[:, None] - column) / 0.1), np.ones(M)
    u = 1 / N / (kernel @ v)
    for _ in range(2):
        v = 1 / M / (kernel.T @ u)
        u = 1 / N / (kernel @ v)
    close(found.f[0], row + 0.1 * np.log(u), 1e-5)
    close(found.g[0], column + 0.1 * np.log(v), 1e-5)
    error = np.abs(v * (kernel.T @ u) - 1 / M).sum()
    np.testing.assert_allclose(found.error, error, rtol=1e-3)
    assert found.iterations.tolist() == [3]
    assert not found.converged.any()


@pytest.mark.parametrize("epsilon", [0.3, 0.1, 0.03, 0.01])
@pytest.mark.parametrize("kind", ["random", "planted", "twins", "steep"])
def test_any_cost_converges_in_fewer_iterations(rng, monkeypatch, kind, epsilon):
    """Acceleration has no guarantee of its own: it must not cost iterations where it is no use."""
    n, m = 40, 64
    cost = {
        "random": rng.uniform(0, 2, (n, m)),
        "planted": np.where(rng.permutation(m)[:n, None] == np.arange(m), 0.05, 1.0)
        + 0.02 * rng.random((n, m)),
        "twins": np.repeat(np.repeat(rng.uniform(0, 2, (n // 4, m // 4)), 4, 0), 4, 1),
        "steep": rng.uniform(0, 1, (n, m)) * np.linspace(0.1, 2, m),
    }[kind]
    costs = jnp.asarray(cost[None], jnp.float32)
    accelerated = run(costs, epsilon)
    monkeypatch.setattr(anderson, "step", unaccelerated)
    plain = run(costs, epsilon, max_iterations=20_000)
    assert accelerated.converged.all()
    assert accelerated.iterations[0] <= plain.iterations[0] + 2
    close(plans(costs, accelerated, epsilon), plans(costs, plain, epsilon), 1e-3)


def test_scalings_out_of_range_are_absorbed(rng, monkeypatch):
    """Potentials of hundreds of epsilons: a kernel that is never rebuilt would overflow."""
    cost = costs_of(rng, 1).at[0, :5].add(0.4 * jnp.arange(5)[:, None] * jnp.arange(M) / M)
    for epsilon in (0.003, 0.001):
        found = run(cost, epsilon, threshold=1e-4)
        assert np.isfinite(found.f).all()
        assert found.error[0] < 1e-3
    builds = []
    build = scaling._kernel
    monkeypatch.setattr(scaling, "_kernel", lambda *args: builds.append(1) or build(*args))
    with jax.disable_jit():
        run(cost, epsilon, threshold=1e-4, max_iterations=12)
    assert len(builds) > 1


@pytest.mark.parametrize("entries", [1, 4 * M, 10 * M, 1 << 16])
def test_blocks_do_not_matter(rng, monkeypatch, entries):
    """One row at a time, blocks that do not divide the rows, all rows at once."""
    costs = costs_of(rng, 2)
    expected = run(costs, 0.05)
    monkeypatch.setattr(scaling, "BLOCK", 2 * entries)
    monkeypatch.setattr(scaling, "_MOST_BLOCKS", N)
    found = run(costs, 0.05)
    assert np.abs(found.iterations - expected.iterations).max() <= 1  # sums in another order
    np.testing.assert_allclose(found.f, expected.f, atol=EXACT)
    np.testing.assert_allclose(found.g, expected.g, atol=EXACT)


def test_a_problem_does_not_depend_on_its_batch(rng):
    costs = jnp.concatenate([costs_of(rng, 2), jnp.ones((1, N, M)), costs_of(rng, 2) * 3])
    for epsilon in (0.1, 0.02):  # at the default threshold
        together = plans(costs, run(costs, epsilon), epsilon)
        for index in range(len(costs)):
            alone = run(costs[index : index + 1], epsilon)
            alone = plans(costs[index : index + 1], alone, epsilon)[0]
            np.testing.assert_allclose(together[index], alone, rtol=0, atol=EXACT)
    # rounding decides the path, so only what the threshold pins down can be compared
    together = run(costs, 0.02, threshold=2e-7)
    for index in range(len(costs)):
        alone = run(costs[index : index + 1], 0.02, threshold=2e-7)
        np.testing.assert_allclose(alone.f[0], together.f[index], atol=EXACT)
        np.testing.assert_allclose(alone.g[0], together.g[index], atol=EXACT)


def test_each_stops_when_it_has_converged(rng):
    easy, hard = jnp.ones((1, N, M)), costs_of(rng, 1)
    found = run(jnp.concatenate([easy, hard]), 0.02)
    assert found.iterations[0] <= 2
    assert found.iterations[1] > 10


def test_wide_rows_converge_to_the_threshold(rng):
    """Sums of 32768 terms in float32 lose more of their mass than the threshold allows."""
    n, m = 24, 1 << 15
    costs = costs_of(rng, 1, n, m)
    found = run(costs, 0.1, max_iterations=100)
    assert found.converged.all()
    [plan] = plans(costs, found, 0.1)
    assert np.abs(plan.sum(0) - 1 / m).sum() < 2 * THRESHOLD
    assert np.abs(plan.sum(1) - 1 / n).sum() < 2 * THRESHOLD


@pytest.mark.parametrize(
    ("n", "m", "epsilon"),
    [(1 << 15, 24, 0.02), (24, 1 << 15, 0.02), (1 << 13, 512, 0.05)],
)
def test_the_error_is_that_of_the_plan_however_long_its_sums(rng, n, m, epsilon):
    """Tall and wide: what rounding takes from one side is not charged to the other."""
    costs = costs_of(rng, 1, n, m)
    found = run(costs, epsilon, max_iterations=150)
    [plan] = plans(costs, found, epsilon)
    true = max(np.abs(plan.sum(0) - 1 / m).sum(), np.abs(plan.sum(1) - 1 / n).sum())
    assert true < found.error[0] + THRESHOLD


def test_rows_without_mass_are_no_rounding():
    """What a row that nothing reaches lacks is not spread over the others."""
    kernel = (jnp.ones((1, 4, 8)).at[0, 0].set(0.0),)
    state = scaling._State(
        u=jnp.ones((1, 4)), v=jnp.ones((1, 8)), history=anderson.start(1, 8, 3),
        error=jnp.full((1,), jnp.inf), iterations=jnp.zeros((1,), jnp.int32),
    )  # fmt: skip
    found = scaling._iterate(kernel, state, 1e-6, 100)
    np.testing.assert_allclose(found.error, 0.25, rtol=1e-5)
    np.testing.assert_allclose(found.u[0], [0, 1 / 32, 1 / 32, 1 / 32], rtol=1e-6)


def test_nan_ends_at_once_and_alone(rng):
    costs = costs_of(rng, 2).at[0, 1, 2].set(jnp.nan)
    found = run(costs, 0.05)
    assert found.converged.tolist() == [False, True]
    assert found.iterations[0] <= 2


# ------------------------------------------------------------------------ which form


def test_the_form_follows_the_epsilons_a_cost_spans(rng):
    costs = costs_of(rng, 1)[0]
    span = float(costs.max() - costs.min())
    for share, used_log_domain in ((0.9, False), (1.1, True)):
        found = sinkhorn.solve(
            costs, epsilon=span / sinkhorn.MAX_COST_OVER_EPSILON / share, max_iterations=20
        )
        assert bool(found.used_log_domain) is used_log_domain


def test_both_solvers_agree(rng):
    costs = costs_of(rng, 2)
    ours, theirs = (
        jax.tree.map(np.asarray, sinkhorn.solve(costs, epsilon=0.05, solver=name))
        for name in ("auto", "ott")
    )
    assert theirs.used_log_domain.all()
    assert not ours.used_log_domain.any()
    assert ours.converged.all()
    assert theirs.converged.all()
    difference = np.abs(plans(costs, ours, 0.05) - plans(costs, theirs, 0.05))
    assert difference.sum((1, 2)).max() <= 1e-4
    np.testing.assert_allclose(ours.cost, theirs.cost, rtol=0, atol=1e-5)


def test_log_form_solves_what_the_kernel_form_cannot(rng):
    """A cost that spans 4000 epsilons because of a few entries that no mass may take."""
    costs = costs_of(rng, 1)[0]
    costs = jnp.where(jnp.asarray(rng.random(costs.shape) < 0.1), 800.0, costs)
    found = sinkhorn.solve(costs, epsilon=0.2)
    assert found.used_log_domain
    assert found.converged
    theirs = pot.sinkhorn(
        np.full(N, 1 / N), np.full(M, 1 / M), np.asarray(costs, np.float64), 0.2,
        method="sinkhorn_log", numItermax=10_000, stopThr=1e-11,
    )  # fmt: skip
    close(sinkhorn.plan(costs, found), theirs)


def test_a_batch_may_hold_both_forms(rng):
    costs = costs_of(rng, 2)
    found = sinkhorn.solve(costs, epsilon=jnp.array([0.05, 0.0005]), max_iterations=50)
    assert found.used_log_domain.tolist() == [False, True]
    alone = sinkhorn.solve(costs[0], epsilon=0.05, max_iterations=50)
    np.testing.assert_allclose(found.f[0], alone.f, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_scale_does_not_matter(rng, scale):
    """Cost and epsilon times the same number: the same plan."""
    costs = costs_of(rng, 1)
    plain, scaled = run(costs, 0.05), run(costs * scale, 0.05 * scale)
    assert scaled.iterations.tolist() == plain.iterations.tolist()
    close(plans(costs * scale, scaled, 0.05 * scale), plans(costs, plain, 0.05))


# ------------------------------------------------------------------------ batches


def test_no_batch_has_problems_of_two_groups():
    batched = []

    def tag(x):
        jax.debug.callback(lambda x: batched.append(x.tolist()), x, ordered=True)
        return 2 * x

    found = batches.in_batches(tag, jnp.arange(6), 2, groups=2)
    np.testing.assert_array_equal(found, 2 * np.arange(6))
    jax.effects_barrier()
    assert batched == [[0, 1], [2, 2], [3, 4], [5, 5]]


@pytest.mark.parametrize(("count", "size"), [(1, 4), (4, 4), (5, 4), (9, 4)])
def test_batches_are_filled_up_and_cut(count, size):
    shapes = []

    def double(x):
        shapes.append(x.shape)
        return 2 * x

    found = batches.in_batches(double, jnp.arange(3.0 * count).reshape(count, 3), size)
    np.testing.assert_array_equal(found, 2 * np.arange(3.0 * count).reshape(count, 3))
    assert set(shapes) == {(min(size, count), 3)}


def test_one_program_for_any_last_batch(rng, caplog):
    costs = costs_of(rng, 7, 4, 6)
    with jax.log_compiles():
        jax.block_until_ready(sinkhorn.solve(costs, epsilon=0.3, max_iterations=77))
    compiled = [one for one in caplog.messages if one.startswith("Finished XLA compilation")]
    assert sum("_solve" in one for one in compiled) == 1, compiled

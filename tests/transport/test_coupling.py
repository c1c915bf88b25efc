"""All layer pairs at all sites, the layer problem, and planted layers, neurons and signs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_merge_jax.merging import projections
from ot_merge_jax.transport import cost, sinkhorn
from ot_merge_jax.transport import coupling as couplings
from ot_merge_jax.types import Activations, Coupling, HParams, MergeSpec

SITES = ("mlp_in", "up_out")
#: (target layers, source layers): single layers, and both directions.
DEPTHS = [(1, 1), (2, 3), (3, 2)]
WIDTHS = {"mlp_in": (4, 7), "up_out": (5, 3)}  # (target, source): wider and narrower
ROWS = 40
EPSILON = 0.05


def spec_of(**kw):
    return MergeSpec(weights=("up",), **kw)


def draw(rng, layers, end, rows=ROWS):
    """Activations of one model (``end`` 0: target, 1: source) with latent factors in common."""
    latent = np.random.default_rng(5).normal(size=(rows, 6))
    values = {}
    for site, widths in WIDTHS.items():
        mixed = latent @ rng.normal(size=(layers, 6, widths[end]))
        noisy = mixed + 0.5 * rng.normal(size=(layers, rows, widths[end]))
        values[site] = noisy.astype(np.float32)
    return Activations(values, np.arange(3, 3 + rows))


@pytest.fixture(scope="module", params=DEPTHS, ids=str)
def coupled(request):
    """(target, source, coupling) for one pair of depths."""
    rng = np.random.default_rng(request.param)
    target, source = (draw(rng, depth, end) for end, depth in enumerate(request.param))
    return target, source, couplings.couple(target, source, HParams(1.0, EPSILON), spec=spec_of())


def pairs(coupled):
    """Every (site, l, m), the source layers beyond the target's depth included."""
    target, source, _ = coupled
    for site in SITES:
        for l in range(len(target.values[site])):
            for m in range(len(source.values[site])):
                yield site, l, m


def test_shapes(coupled):
    target, source, coupling = coupled
    L, M = len(target.values["mlp_in"]), len(source.values["mlp_in"])
    for site in SITES:
        n, m = WIDTHS[site]
        assert coupling.layer_plan[site].shape == (L, M)
        assert coupling.neuron_potentials[site].f.shape == (L, M, n)
        assert coupling.neuron_potentials[site].g.shape == (L, M, m)
        assert coupling.neuron_potentials[site].cost.shape == (L, M)
        assert coupling.neuron_potentials[site].converged.all()
        assert coupling.std_target[site].shape == (L, n)
        assert coupling.std_source[site].shape == (M, m)


@jax.jit
def solve_alone(x, y):
    """Cost and plan of one pair, by the solver alone."""
    costs = cost.correlation_cost(x, y)
    found = sinkhorn.solve(costs, epsilon=jnp.float32(EPSILON))
    return found.cost, sinkhorn.plan(costs, found)


def test_every_pair_is_solved(coupled):
    target, source, coupling = coupled
    for site, l, m in pairs(coupled):
        alone, expected = solve_alone(target.values[site][l], source.values[site][m])
        ours = couplings.plan(coupling, target, source, site=site, l=l, m=m)
        np.testing.assert_allclose(coupling.neuron_potentials[site].cost[l, m], alone, rtol=1e-5)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_every_plan_has_uniform_marginals(coupled):
    target, source, coupling = coupled
    for site, l, m in pairs(coupled):
        plan = np.asarray(couplings.plan(coupling, target, source, site=site, l=l, m=m))
        n, n_s = WIDTHS[site]
        assert plan.shape == (n, n_s)
        assert plan.min() >= 0
        np.testing.assert_allclose(plan.sum(1), 1 / n, atol=1e-5)
        np.testing.assert_allclose(plan.sum(0), 1 / n_s, atol=1e-5)


def test_layer_plan_is_that_of_the_costs(coupled):
    _, _, coupling = coupled
    for site in SITES:
        plan = couplings.layer_plan(coupling.neuron_potentials[site].cost, epsilon=0.1)
        np.testing.assert_allclose(coupling.layer_plan[site], plan, atol=1e-6)


def test_standard_deviations(coupled):
    target, source, coupling = coupled
    for site in SITES:
        np.testing.assert_allclose(coupling.std_target[site], target.values[site].std(1), rtol=1e-5)
        np.testing.assert_allclose(coupling.std_source[site], source.values[site].std(1), rtol=1e-5)


def test_a_wide_plan_rebuilt_is_the_plan_that_was_solved(rng):
    """Entries of about 1e-5: the error counts relative to them."""
    shared = rng.normal(size=(80, 16))
    x, y = (
        jnp.asarray(
            shared @ rng.normal(size=(16, width)) + rng.normal(size=(80, width)), jnp.float32
        )
        for width in (192, 256)
    )
    costs = cost.correlation_cost(x, y)
    found = sinkhorn.solve(costs, epsilon=0.05)
    solved = np.asarray(sinkhorn.plan(costs, found))
    rebuilt = np.asarray(couplings.rebuild(x, y, found))
    assert np.abs(rebuilt - solved).sum() <= 1e-5
    np.testing.assert_allclose(rebuilt, solved, rtol=1e-4, atol=1e-6 * solved.max())


@pytest.mark.parametrize("layers_at_once", [1, 2, 3, 4])
def test_blocks_of_source_layers_do_not_matter(rng, layers_at_once):
    """Blocks that divide the source's layers and blocks that do not, of which the last overlaps."""
    target, source = draw(rng, 2, 0), draw(rng, 5, 1)
    run = functools.partial(couplings.couple, target, source, HParams(1.0, EPSILON), spec=spec_of())
    whole = run()
    rows_at_once = layers_at_once * ROWS * 7
    assert len(couplings._blocks((5, ROWS, 7), rows_at_once)) > 1
    parts = run(rows_at_once=rows_at_once)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5),
        parts._replace(neuron_potentials=_numbers(parts)),
        whole._replace(neuron_potentials=_numbers(whole)),
    )
    for site in SITES:
        assert parts.neuron_potentials[site].converged.all()


def _numbers(coupling):
    """Potentials without the counts of iterations, which rounding decides."""
    return {site: (one.f, one.g, one.cost) for site, one in coupling.neuron_potentials.items()}


@pytest.mark.parametrize(
    ("layers", "at_once", "expected"),
    [
        (5, 9, [(0, 5)]),
        (6, 3, [(0, 3), (3, 6)]),
        (5, 3, [(0, 3), (2, 5)]),
        (28, 9, [(0, 7), (7, 14), (14, 21), (21, 28)]),
        (3, 1, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_blocks_of_source_layers_have_one_size(layers, at_once, expected):
    found = couplings._blocks((layers, 10, 4), at_once * 10 * 4 + 39)
    assert [(one.start, one.stop) for one in found] == expected


def test_only_the_sites_that_are_asked_for_are_solved(rng):
    target, source = draw(rng, 2, 0), draw(rng, 3, 1)
    extra = {"o_in": target.values["mlp_in"]}
    target = target._replace(values=target.values | extra)
    coupling = couplings.couple(target, source, HParams(1.0, EPSILON), spec=spec_of(), sites=SITES)
    for leaf in (
        coupling.layer_plan,
        coupling.neuron_potentials,
        coupling.std_target,
        coupling.std_source,
    ):
        assert set(leaf) == set(SITES)


def test_reordering_layers_reorders_the_coupling(rng):
    target, source = draw(rng, 2, 0), draw(rng, 3, 1)
    order = np.array([2, 0, 1])
    moved = source._replace(values={site: v[order] for site, v in source.values.items()})
    one, other = (
        couplings.couple(target, s, HParams(1.0, EPSILON), spec=spec_of()) for s in (source, moved)
    )
    for site in SITES:
        np.testing.assert_allclose(
            other.layer_plan[site], one.layer_plan[site][:, order], atol=1e-5
        )
        np.testing.assert_allclose(
            other.neuron_potentials[site].f, one.neuron_potentials[site].f[:, order], atol=1e-5
        )


def test_a_constant_neuron_counts_as_one_and_matches_nothing(rng):
    target, source = draw(rng, 2, 0), draw(rng, 3, 1)
    source.values["up_out"][1, :, 2] = 0.1
    coupling = couplings.couple(target, source, HParams(1.0, EPSILON), spec=spec_of())
    assert coupling.std_source["up_out"][1, 2] == 1
    assert np.isfinite(coupling.neuron_potentials["up_out"].f).all()


# ------------------------------------------------------------------------ layer problem

LAYERS = [(1, 1), (1, 3), (4, 1), (3, 5), (6, 4)]
layer_plan = jax.jit(couplings.layer_plan, static_argnames=("layer_cost",))


@pytest.mark.parametrize("layer_cost", ["plain", "median"])
@pytest.mark.parametrize(("L", "M"), LAYERS)
def test_layer_plan_has_uniform_marginals(rng, L, M, layer_cost):
    costs = jnp.asarray(0.8 + 0.05 * rng.random((L, M)), jnp.float32)
    plan = np.asarray(layer_plan(costs, epsilon=0.1, layer_cost=layer_cost))
    assert plan.shape == (L, M)
    assert plan.min() >= 0
    np.testing.assert_allclose(plan.sum(1), 1 / L, rtol=1e-4)
    np.testing.assert_allclose(plan.sum(0), 1 / M, rtol=1e-4)


def test_plain_takes_the_costs_as_they_are(rng):
    costs = jnp.asarray(rng.random((3, 5)), jnp.float32)
    alone = sinkhorn.solve(costs, epsilon=0.1, max_iterations=1000)
    np.testing.assert_allclose(
        layer_plan(costs, epsilon=0.1, layer_cost="plain"), sinkhorn.plan(costs, alone), atol=1e-6
    )


def test_median_shifts_to_the_minimum_and_divides_by_the_median(rng):
    costs = rng.random((3, 5)).astype(np.float32)
    shifted = costs - costs.min()
    np.testing.assert_allclose(
        layer_plan(jnp.asarray(costs), epsilon=0.1, layer_cost="median"),
        layer_plan(jnp.asarray(shifted / np.median(shifted)), epsilon=0.1, layer_cost="plain"),
        atol=1e-6,
    )


def test_median_ignores_shift_and_scale_and_plain_does_not_ignore_scale(rng):
    costs = jnp.asarray(rng.random((3, 5)), jnp.float32)
    wide = 0.5 + costs / 64
    plans = {
        kind: [layer_plan(c, epsilon=0.1, layer_cost=kind) for c in (costs, wide)]
        for kind in ("plain", "median")
    }
    np.testing.assert_allclose(*plans["median"], atol=1e-4)
    assert np.abs(plans["plain"][0] - plans["plain"][1]).max() > 0.02


@pytest.mark.parametrize("layer_cost", ["plain", "median"])
@pytest.mark.parametrize("value", [0.0, 0.8])
def test_equal_costs_give_the_product_plan(value, layer_cost):
    """Their median after the shift is 0, which counts as 1."""
    plan = layer_plan(jnp.full((3, 5), value), epsilon=0.1, layer_cost=layer_cost)
    np.testing.assert_allclose(plan, 1 / 15, rtol=1e-5)


def test_a_median_of_zero_counts_as_one():
    costs = jnp.zeros((3, 5)).at[1, 2].set(0.5)
    np.testing.assert_allclose(
        layer_plan(costs, epsilon=0.1, layer_cost="median"),
        layer_plan(costs, epsilon=0.1, layer_cost="plain"),
        atol=1e-6,
    )


@pytest.mark.parametrize(("largest", "grown"), [(1000.0, 1.0), (4000.0, 4.0)])
def test_eta_grows_above_a_cost_of_1000_only(rng, largest, grown):
    costs = rng.random((3, 5)).astype(np.float32)
    costs = jnp.asarray(costs * np.float32(largest) / costs.max())
    eta = 50.0

    def at(epsilon):
        return sinkhorn.plan(costs, sinkhorn.solve(costs, epsilon=epsilon, max_iterations=1000))

    ours = layer_plan(costs, epsilon=eta, layer_cost="plain")
    np.testing.assert_allclose(ours, at(eta * grown), atol=1e-5)
    if grown > 1:
        assert np.abs(ours - at(eta)).max() > 0.01


def test_layer_cost_must_be_known(unchecked):
    with pytest.raises(ValueError, match="layer_cost"):
        couplings.layer_plan(jnp.zeros((2, 3)), epsilon=0.1, layer_cost="mean")


# ------------------------------------------------------------------------ row alignment


@pytest.mark.parametrize(
    "rows",
    [np.arange(ROWS), np.arange(3, 3 + ROWS)[::-1], np.arange(3, 2 + ROWS), np.array([3])],
    ids=["other ids", "other order", "one less", "one"],
)
def test_rows_must_correspond(rng, rows):
    target, source = draw(rng, 2, 0), draw(rng, 3, 1)
    values = {site: v[:, : len(rows)] for site, v in source.values.items()}
    with pytest.raises(ValueError, match="correspond one to one"):
        couplings.couple(target, Activations(values, rows), HParams(1.0), spec=spec_of())


def test_one_row_is_too_few(rng):
    one = [draw(rng, 2, end, rows=1) for end in (0, 1)]
    with pytest.raises(ValueError, match="at least 2"):
        couplings.couple(*one, HParams(1.0), spec=spec_of())


# ------------------------------------------------------------------------ planted answers

PLANTED_LAYERS = (3, 0, 4)  # source layer of each target layer, of 5
NEURONS = {"mlp_in": (9, 14), "up_out": (12, 15)}


def planted(rng, *, flip, noise=0.1, rows=150):
    """A source, and a target made of some of its layers, some of its neurons, and noise.

    Returns:
        (target, source, neurons, signs): for each site the source neuron of each target neuron
        ``[L, n]`` and the sign it was copied with.
    """
    target, source, neurons, signs = {}, {}, {}, {}
    for site, (n, m) in NEURONS.items():
        ys = rng.normal(size=(5, rows, m)) * rng.uniform(0.1, 10, m)
        neurons[site] = np.stack([rng.permutation(m)[:n] for _ in PLANTED_LAYERS])
        signs[site] = rng.choice([-1, 1], neurons[site].shape) if flip else np.ones((3, n))
        target[site] = np.stack(
            [
                ys[m_of][:, columns] * sign
                for m_of, columns, sign in zip(
                    PLANTED_LAYERS, neurons[site], signs[site], strict=True
                )
            ]
        )
        target[site] = target[site] + noise * target[site].std(1, keepdims=True) * rng.normal(
            size=target[site].shape
        )
        source[site] = ys
    row_id = np.arange(rows)
    target, source = (
        Activations({site: v.astype(np.float32) for site, v in values.items()}, row_id)
        for values in (target, source)
    )
    return target, source, neurons, signs


@pytest.mark.parametrize("layer_cost", ["plain", "median"])
def test_planted_layers_are_recovered(rng, layer_cost):
    target, source, _, _ = planted(rng, flip=False)
    coupling = couplings.couple(
        target, source, HParams(1.0, 0.02), spec=spec_of(layer_cost=layer_cost)
    )
    for site in SITES:
        np.testing.assert_array_equal(coupling.layer_plan[site].argmax(1), PLANTED_LAYERS)


@pytest.mark.parametrize("signed", [False, True])
def test_planted_neurons_are_recovered(rng, signed):
    target, source, neurons, signs = planted(rng, flip=signed)
    coupling = couplings.couple(target, source, HParams(1.0, 0.02), spec=spec_of(signed=signed))
    for site in SITES:
        for l, m in enumerate(PLANTED_LAYERS):
            plan = np.asarray(
                couplings.plan(coupling, target, source, site=site, l=l, m=m, signed=signed)
            )
            best = np.abs(plan).argmax(1)
            np.testing.assert_array_equal(best, neurons[site][l])
            np.testing.assert_array_equal(np.sign(plan[np.arange(len(best)), best]), signs[site][l])
            np.testing.assert_allclose(np.abs(plan).sum(), 1, atol=1e-5)


def test_flipped_neurons_are_lost_without_signed(rng):
    """Mutation check of the test above."""
    target, source, neurons, signs = planted(rng, flip=True)
    coupling = couplings.couple(target, source, HParams(1.0, 0.02), spec=spec_of())
    plan = couplings.plan(coupling, target, source, site="up_out", l=0, m=3)
    flipped = signs["up_out"][0] < 0
    assert flipped.any()
    assert (plan.argmax(1) != neurons["up_out"][0])[flipped].all()


def test_a_smaller_epsilon_is_sharper(rng):
    target, source, _, _ = planted(rng, flip=False, noise=0.5)
    peaks = []
    for epsilon in (1.0, 0.2, 0.05):
        coupling = couplings.couple(target, source, HParams(1.0, epsilon), spec=spec_of())
        plan = couplings.plan(coupling, target, source, site="up_out", l=1, m=0)
        peaks.append(float(plan.max(1).mean()))
    assert peaks == sorted(peaks)
    assert peaks[-1] > 2 * peaks[0]


# ------------------------------------------------------------------------ transformations


def test_vmap_over_epsilon_is_the_loop(rng):
    target, source = draw(rng, 2, 0), draw(rng, 3, 1)

    def layers(epsilon, eta):
        return couplings.couple(
            target, source, HParams(1.0, epsilon, eta), spec=spec_of()
        ).layer_plan

    epsilons, etas = jnp.array([0.05, 0.5]), jnp.array([0.1, 0.2])
    swept = jax.jit(jax.vmap(layers))(epsilons, etas)
    for index in range(2):
        alone = layers(float(epsilons[index]), float(etas[index]))
        for site in SITES:
            np.testing.assert_allclose(swept[site][index], alone[site], atol=1e-5)


def test_the_second_call_compiles_nothing(rng, caplog):
    def compiled():
        return [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]

    with jax.log_compiles(), caplog.at_level("WARNING"):
        couplings.couple(draw(rng, 2, 0, 17), draw(rng, 3, 1, 17), HParams(1.0), spec=spec_of())
        assert compiled()  # the probe works
        caplog.clear()
        again = HParams(1.0, epsilon=0.07, layer_epsilon=0.2, threshold=1e-5)
        couplings.couple(draw(rng, 2, 0, 17), draw(rng, 3, 1, 17), again, spec=spec_of())
        assert compiled() == []


def test_layers_that_disagree_completely_still_have_a_weight():
    """The product of two plans may underflow float32; the roots of each do not."""
    tiny = 1e-25
    into = jnp.array([[1.0, tiny, tiny**1.4], [tiny, 1.0, tiny]])
    out = jnp.array([[tiny, tiny, 1.0], [tiny**1.4, tiny**1.2, 1.0]])
    coupling = Coupling({"mlp_in": into, "up_out": out}, {}, {}, {})
    sites = {"in_site": "mlp_in", "out_site": "up_out"}
    for layers in ("soft", "top1"):
        spec = MergeSpec(weights=("up",), layers=layers)
        share = projections.layer_weights(coupling, **sites, spec=spec)
        np.testing.assert_allclose(share.sum(1), 1.0, rtol=1e-6)
    assert share.argmax(1).tolist() == [0, 2]

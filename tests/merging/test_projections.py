"""The transported weight: forms, layer rules, bias, sign, units; and mistakes nobody would see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_merge_jax.merging import projections
from ot_merge_jax.transport import cost, sinkhorn
from ot_merge_jax.transport import coupling as couplings
from ot_merge_jax.types import Activations, HParams, MergeSpec

ENDS = {"in_site": "mlp_in", "out_site": "up_out"}
#: Site -> (target, source) width: on the way to the target one space shrinks, the other grows.
WIDTHS = {"mlp_in": (4, 7), "up_out": (5, 3)}
L, M, ROWS = 2, 3, 40
KINDS = [(form, layers) for form in ("joint", "barycentric") for layers in ("soft", "top1")]


def spec_of(**kw):
    return MergeSpec(weights=("up",), layer_cost="plain", **kw)


def draw(rng, layers, end):
    latent = np.random.default_rng(5).normal(size=(ROWS, 6))
    values = {}
    for site, widths in WIDTHS.items():
        width = widths[end]
        mixed = latent @ rng.normal(size=(layers, 6, width)) * rng.uniform(0.2, 5, width)
        noisy = mixed + 0.3 * rng.normal(size=(layers, ROWS, width))
        values[site] = noisy.astype(np.float32)
    return Activations(values, np.arange(ROWS))


def made(signed):
    """(target, source, coupling, signed, source kernels, source biases)."""
    rng = np.random.default_rng(3)
    target, source = draw(rng, L, 0), draw(rng, M, 1)
    coupling = couplings.couple(target, source, HParams(1.0, 0.1), spec=spec_of(signed=signed))
    kernels = rng.normal(size=(M, WIDTHS["mlp_in"][1], WIDTHS["up_out"][1])).astype(np.float32)
    biases = rng.normal(size=(M, WIDTHS["up_out"][1])).astype(np.float32)
    return target, source, coupling, signed, jnp.asarray(kernels), jnp.asarray(biases)


@pytest.fixture(scope="module")
def coupled():
    return made(signed=False)


@pytest.fixture(scope="module")
def signed():
    return made(signed=True)


def transported(coupled, form, layers, *, coupling=None, kernels=None):
    target, source, found, signed, weights, _ = coupled
    return projections.transported(
        weights if kernels is None else kernels,
        found if coupling is None else coupling,
        target,
        source,
        **ENDS,
        spec=spec_of(form=form, layers=layers, signed=signed),
    )


def transported_bias(coupled, form, layers, *, coupling=None, biases=None):
    target, source, found, signed, _, own = coupled
    return projections.transported_bias(
        own if biases is None else biases,
        found if coupling is None else coupling,
        target,
        source,
        **ENDS,
        spec=spec_of(form=form, layers=layers, signed=signed),
    )


def plans(coupled, site):
    """All plans of a site, ``[L, M, n_t, n_s]`` float64."""
    target, source, coupling, signed, *_ = coupled
    return np.array(
        [
            [
                couplings.plan(coupling, target, source, site=site, l=l, m=m, signed=signed)
                for m in range(M)
            ]
            for l in range(L)
        ],
        np.float64,
    )


def oracle(coupled, form, layers):
    """``w [L, M]``, ``Phi_in [L, M, n_s, n_t]``, ``Phi_out [L, M, n_t, n_s]``."""
    target, source, coupling, *_ = coupled
    effective = np.sqrt(
        np.asarray(coupling.layer_plan["mlp_in"], np.float64)
        * np.asarray(coupling.layer_plan["up_out"])
    )
    best = np.eye(M)[effective.argmax(1)]
    q_in, q_out = plans(coupled, "mlp_in"), plans(coupled, "up_out")
    phi_in = np.swapaxes(q_in, 2, 3)
    if form == "joint":
        return (effective if layers == "soft" else best * effective), phi_in, q_out
    deviation = {
        site: (target.values[site].std(1)[:, None], source.values[site].std(1)[None])
        for site in WIDTHS
    }
    (t_in, s_in), (t_out, s_out) = deviation["mlp_in"], deviation["up_out"]
    phi_in = s_in[..., :, None] * (WIDTHS["mlp_in"][1] * phi_in) / t_in[..., None, :]
    phi_out = t_out[..., :, None] * (WIDTHS["up_out"][0] * q_out) / s_out[..., None, :]
    share = effective / effective.sum(1, keepdims=True) if layers == "soft" else best
    return share, phi_in, phi_out


def close(ours, expected):
    assert ours.shape == expected.shape
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("form", "layers"), KINDS)
def test_is_the_formula(coupled, form, layers):
    share, phi_in, phi_out = oracle(coupled, form, layers)
    kernels = np.asarray(coupled[4], np.float64)  # [m, d_in, d_out]
    expected = np.einsum("lm,lmbi,mba,lmoa->lio", share, phi_in, kernels, phi_out)
    close(transported(coupled, form, layers), expected)


@pytest.mark.parametrize(("form", "layers"), KINDS)
def test_bias_is_the_formula(coupled, form, layers):
    share, _, phi_out = oracle(coupled, form, layers)
    expected = np.einsum("lm,lmoa,ma->lo", share, phi_out, np.asarray(coupled[5], np.float64))
    close(transported_bias(coupled, form, layers), expected)


def test_signed_is_the_formula(signed):
    """The same maps with the plans' signs; some are negative, or this shows nothing."""
    share, phi_in, phi_out = oracle(signed, "barycentric", "soft")
    assert (phi_in < 0).any()
    assert (phi_out < 0).any()
    kernels, biases = (np.asarray(leaf, np.float64) for leaf in signed[4:])
    expected = np.einsum("lm,lmbi,mba,lmoa->lio", share, phi_in, kernels, phi_out)
    close(transported(signed, "barycentric", "soft"), expected)
    expected = np.einsum("lm,lmoa,ma->lo", share, phi_out, biases)
    close(transported_bias(signed, "barycentric", "soft"), expected)


@pytest.mark.parametrize(("form", "layers"), KINDS)
def test_layer_weights(coupled, form, layers):
    expected, _, _ = oracle(coupled, form, layers)
    ours = projections.layer_weights(coupled[2], **ENDS, spec=spec_of(form=form, layers=layers))
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    if form == "barycentric":
        np.testing.assert_allclose(ours.sum(1), 1, rtol=1e-6)
    if layers == "top1":
        np.testing.assert_array_equal((np.asarray(ours) > 0).sum(1), 1)


def test_the_layer_rules_differ(coupled):
    """So that the tests above can tell them apart."""
    soft, hard = (transported(coupled, "barycentric", layers) for layers in ("soft", "top1"))
    assert np.abs(soft - hard).max() > 0.05 * np.abs(hard).max()


def without_units(coupling):
    """The same coupling with every standard deviation 1."""
    ones = {name: jax.tree.map(jnp.ones_like, getattr(coupling, name)) for name in STDS}
    return coupling._replace(**ones)


STDS = ("std_target", "std_source")


@pytest.mark.parametrize("layers", ["soft", "top1"])
def test_rows_of_the_out_map_sum_to_one_before_the_units(coupled, layers):
    """A source bias of ones arrives as ones: the out-map takes the TARGET's marginal."""
    ones = jnp.ones((M, WIDTHS["up_out"][1]))
    plain = without_units(coupled[2])
    ours = transported_bias(coupled, "barycentric", layers, coupling=plain, biases=ones)
    np.testing.assert_allclose(ours, np.ones((L, WIDTHS["up_out"][0])), atol=2e-5)


@pytest.mark.parametrize("layers", ["soft", "top1"])
def test_rows_of_the_in_map_sum_to_one_before_the_units(coupled, layers):
    """The sum over inputs of a kernel survives: the in-map takes the SOURCE's marginal."""
    d_in, d_out = WIDTHS["mlp_in"][1], WIDTHS["up_out"][1]
    kernels = jnp.full((M, d_in, d_out), 1 / d_in)  # every column sums to 1
    plain = without_units(coupled[2])
    ours = transported(coupled, "barycentric", layers, coupling=plain, kernels=kernels)
    np.testing.assert_allclose(ours.sum(1), np.ones((L, WIDTHS["up_out"][0])), atol=2e-5)


@pytest.mark.parametrize("layers", ["soft", "top1"])
def test_the_joint_form_vanishes(coupled, layers):
    """The bound of the plan-weighted sum; ``sum_m P_eff <= 1/L`` makes it L times smaller still."""
    kernels = np.abs(coupled[4]).max()
    bound = kernels / (WIDTHS["mlp_in"][0] * WIDTHS["up_out"][0] * L)
    assert np.abs(transported(coupled, "joint", layers)).max() <= bound * (1 + 1e-4)


def test_the_joint_form_of_a_constant_kernel_meets_its_bound(coupled):
    """Both plans only average: a constant arrives over ``n_out n_in``, times P_eff."""
    kernels = jnp.full(coupled[4].shape, 3.0)
    share, _, _ = oracle(coupled, "joint", "soft")
    expected = 3 * share.sum(1) / (WIDTHS["mlp_in"][0] * WIDTHS["up_out"][0])
    ours = np.asarray(transported(coupled, "joint", "soft", kernels=kernels))
    np.testing.assert_allclose(
        ours, np.broadcast_to(expected[:, None, None], ours.shape), rtol=1e-4
    )


def test_is_linear_in_the_kernel(coupled):
    """What rule ``delta`` rests on: no difference, no change, bit for bit."""
    nothing = transported(coupled, "barycentric", "soft", kernels=jnp.zeros_like(coupled[4]))
    np.testing.assert_array_equal(nothing, 0)
    twice = transported(coupled, "barycentric", "soft", kernels=2 * coupled[4])
    np.testing.assert_array_equal(twice, 2 * transported(coupled, "barycentric", "soft"))


def test_half_precision_kernels_are_carried_in_float32(coupled):
    half = coupled[4].astype(jnp.bfloat16)
    ours = transported(coupled, "barycentric", "top1", kernels=half)
    assert ours.dtype == jnp.float32
    np.testing.assert_array_equal(
        ours, transported(coupled, "barycentric", "top1", kernels=half.astype(jnp.float32))
    )


# ------------------------------------------------------------------------ only what is needed


@pytest.mark.parametrize("site", ["mlp_in", "up_out"])
def test_selected_neurons_are_those_of_the_whole(coupled, site):
    target, source, coupling, _, kernels, biases = coupled
    whole = (
        transported(coupled, "barycentric", "soft"),
        transported_bias(coupled, "barycentric", "soft"),
    )
    width = target.values[site].shape[-1]
    chosen = np.stack([np.arange(l % 2, width, 2)[: width // 2] for l in range(len(whole[0]))])
    kinds = [projections.ProjectionWeights(ENDS["out_site"], kernels=kernels, biases=biases)]
    kernel, bias = projections.transport_projections(
        kinds, coupling, target, source, in_site=ENDS["in_site"],
        spec=spec_of(layers="soft"), selected={site: chosen},
    )[0]  # fmt: skip
    mask = np.zeros((len(chosen), width))
    np.put_along_axis(mask, chosen, 1, axis=1)
    axis_mask = mask[:, :, None] if site == ENDS["in_site"] else mask[:, None, :]
    close(kernel, axis_mask * whole[0])
    close(bias, whole[1] * (mask if site == ENDS["out_site"] else 1))


def test_kinds_that_read_one_site_are_carried_as_each_alone(coupled):
    target, source, coupling, _, kernels, biases = coupled
    kinds = [
        projections.ProjectionWeights(ENDS["out_site"], kernels=kernels),
        projections.ProjectionWeights(ENDS["out_site"], kernels=-2 * kernels, biases=biases),
    ]
    first, second = projections.transport_projections(
        kinds, coupling, target, source, in_site=ENDS["in_site"], spec=spec_of(layers="soft")
    )
    close(first[0], transported(coupled, "barycentric", "soft"))
    close(second[0], -2 * np.asarray(first[0]))
    close(second[1], transported_bias(coupled, "barycentric", "soft"))
    assert first[1] is None


def test_only_pairs_with_a_weight_are_read_and_rebuilt(coupled, monkeypatch):
    target, source, coupling, _, kernels, _ = coupled
    spec = spec_of(layers="top1")
    share = np.asarray(projections.layer_weights(coupling, **ENDS, spec=spec))
    read, mapped = [], []

    class Counted:
        def __getitem__(self, m):
            read.append(m)
            return kernels[m]

    right = projections._map
    monkeypatch.setattr(
        projections, "_map", lambda *args, **how: mapped.append(how["side"]) or right(*args, **how)
    )
    projections.transported(Counted(), coupling, target, source, **ENDS, spec=spec)
    assert read == np.flatnonzero(share.any(0)).tolist()
    assert sorted(mapped) == sorted(["in", "out"] * np.count_nonzero(share))


def test_a_plan_in_blocks_is_the_plan(coupled):
    target, source, coupling, *_ = coupled
    where = {"site": ENDS["out_site"], "l": 0, "m": 1}
    expected = couplings.plan(coupling, target, source, **where)
    x, y = (np.asarray(one.values[where["site"]][i]) for one, i in ((target, 0), (source, 1)))
    solved = jax.tree.map(lambda leaf: leaf[0, 1], coupling.neuron_potentials[where["site"]])
    for rows in (1, 3, 1000):
        plan_at_once = rows * y.shape[1]
        close(couplings.rebuild(x, y, solved, plan_at_once=plan_at_once), expected)
        close(
            couplings.plan(coupling, target, source, **where, plan_at_once=plan_at_once), expected
        )
    few = np.array([2, 0])
    close(couplings.rebuild(x, y, solved, few), np.asarray(expected)[few])


def test_a_plan_rebuilt_is_the_plan_that_was_solved(coupled):
    target, source, coupling, *_ = coupled
    for site in coupling.neuron_potentials:
        x, y = target.values[site][1], source.values[site][0]
        costs = cost.correlation_cost(jnp.asarray(x), jnp.asarray(y))
        epsilon = coupling.neuron_potentials[site].epsilon[1, 0]
        solved = sinkhorn.plan(costs, sinkhorn.solve(costs, epsilon=epsilon, max_iterations=5000))
        rebuilt = couplings.plan(coupling, target, source, site=site, l=1, m=0)
        np.testing.assert_allclose(rebuilt, solved, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("into", "out", "flops"), [(2, 48, 14336), (40, 3, 27648)])
def test_the_cheaper_order_of_the_triple_product_is_taken(into, out, flops):
    sizes = ((64, 32), (into, 64), (out, 32))  # 2 FLOPs for each term of both products
    shapes = [jax.ShapeDtypeStruct(one, jnp.float32) for one in sizes]
    program = jax.jit(projections.apply_maps).lower(*shapes)
    assert program.cost_analysis()["flops"] == pytest.approx(flops, rel=0.1)


# ------------------------------------------------------------------------ transformations


def test_vmap_over_epsilon_is_the_loop(coupled):
    target, source, _, _, kernels, _ = coupled
    spec = spec_of(layers="soft")

    def moved(epsilon):
        coupling = couplings.couple(target, source, HParams(1.0, epsilon), spec=spec)
        return projections.transported(kernels, coupling, target, source, **ENDS, spec=spec)

    swept = jax.jit(jax.vmap(moved))(jnp.array([0.1, 0.5]))
    for index, epsilon in enumerate((0.1, 0.5)):
        alone = np.asarray(moved(epsilon))
        np.testing.assert_allclose(swept[index], alone, rtol=0, atol=2e-5 * np.abs(alone).max())


def test_the_second_call_compiles_nothing(coupled, caplog):
    """Not even with another coupling and other kernels."""
    target, source, _, _, kernels, _ = coupled
    others = jnp.asarray(np.asarray(kernels) + 1)
    fresh = spec_of(max_iterations=1998)  # a static argument that no other test uses
    one, other = (
        couplings.couple(target, source, HParams(1.0, epsilon), spec=spec_of())
        for epsilon in (0.1, 0.3)
    )

    def compiled():
        return [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]

    with jax.log_compiles(), caplog.at_level("WARNING"):
        projections.transported(kernels, one, target, source, **ENDS, spec=fresh)
        assert compiled()  # the probe works
        caplog.clear()
        projections.transported(others, other, target, source, **ENDS, spec=fresh)
        assert compiled() == []

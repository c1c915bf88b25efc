"""Every formula of SPEC sections 3 to 7 against an independent float64 oracle (tests/golden)."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from ot_merge_jax.merging import fuse, masks, projections, vocabulary
from ot_merge_jax.transport import coupling as couplings
from ot_merge_jax.transport import procrustes
from ot_merge_jax.types import Activations, HParams, MergeSpec, VocabularyMatch

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
EPSILONS, KINDS = (0.1, 0.02), ("plain", "median")
SITES = {"in": "mlp_in", "out": "up_out"}
PATH = "layers/mlp/up_proj/kernel"


def close(ours, oracle):
    """Within 1e-4 of the oracle, relative to its largest entry."""
    ours, oracle = np.asarray(ours), np.asarray(oracle)
    assert ours.shape == oracle.shape
    np.testing.assert_allclose(ours, oracle, rtol=0, atol=1e-4 * np.abs(oracle).max())


def kernels(weights):
    """Torch orientation to ours."""
    return jnp.asarray(np.swapaxes(weights, -1, -2), jnp.float32)


@pytest.fixture(scope="module", params=[0, 1])
def golden(request):
    with np.load(GOLDEN / f"merge_seed{request.param}.npz") as file:
        return {name.replace("__", "/"): file[name] for name in file.files}


def spec_of(**kw):
    return MergeSpec(weights=("up",), max_iterations=5000, **kw)


@pytest.fixture(scope="module")
def activations(golden):
    rows = np.arange(len(golden["x_in"][0]))

    def make(letter):
        values = {SITES[end]: golden[f"{letter}_{end}"].astype(np.float32) for end in SITES}
        return Activations(values, rows)

    return make("x"), make("y")


@pytest.fixture(scope="module", params=[(e, k) for e in EPSILONS for k in KINDS], ids=str)
def coupled(request, activations):
    epsilon, kind = request.param
    spec = spec_of(layer_cost=kind)
    return epsilon, kind, couplings.couple(*activations, HParams(1.0, epsilon), spec=spec)


def transported(golden, activations, coupling, weights, **kw):
    return projections.transported(
        kernels(weights),
        coupling,
        *activations,
        in_site="mlp_in",
        out_site="up_out",
        spec=spec_of(**kw),
    )


@pytest.mark.parametrize("end", SITES)
def test_plans_and_costs(golden, activations, coupled, end):
    epsilon, _, coupling = coupled
    oracle = golden[f"eps{epsilon}/q_{end}"]
    for l, row in enumerate(oracle):
        for m, expected in enumerate(row):
            close(couplings.plan(coupling, *activations, site=SITES[end], l=l, m=m), expected)
    close(coupling.neuron_potentials[SITES[end]].cost, golden[f"eps{epsilon}/cost_{end}"])


def test_the_constant_neuron_correlates_with_nothing(golden, activations, coupled):
    """The oracle's source layer 2 has a constant input neuron: its row of the plan is the blur."""
    _, _, coupling = coupled
    assert np.ptp(golden["y_in"][2][:, 3]) == 0
    np.testing.assert_array_equal(coupling.std_source["mlp_in"][2, 3], 1.0)


@pytest.mark.parametrize("end", SITES)
def test_layer_plans(golden, coupled, end):
    epsilon, kind, coupling = coupled
    close(coupling.layer_plan[SITES[end]], golden[f"eps{epsilon}/p_{end}_{kind}"])


def test_effective_layer_weights(golden, coupled):
    epsilon, kind, coupling = coupled
    spec = spec_of(form="joint", layers="soft")
    weights = projections.layer_weights(coupling, in_site="mlp_in", out_site="up_out", spec=spec)
    close(weights, golden[f"eps{epsilon}/p_eff_{kind}"])


@pytest.mark.parametrize(
    ("form", "layers", "name"),
    [
        ("joint", "soft", "joint"),
        ("barycentric", "soft", "barycentric_soft"),
        ("barycentric", "top1", "barycentric_top1"),
    ],
)
def test_transported_weights(golden, activations, coupled, form, layers, name):
    epsilon, kind, coupling = coupled
    moved = transported(golden, activations, coupling, golden["w_source"], form=form, layers=layers)
    close(np.swapaxes(moved, 1, 2), golden[f"eps{epsilon}/{name}_{kind}"])


def test_a_transposed_plan_would_be_noticed(golden, activations, coupled):
    """Mutation check: swapping the roles of the two spaces must not pass."""
    epsilon, kind, coupling = coupled
    swapped = coupling._replace(std_target=coupling.std_source, std_source=coupling.std_target)
    with pytest.raises((TypeError, ValueError, AssertionError)):
        moved = transported(golden, activations, swapped, golden["w_source"])
        close(np.swapaxes(moved, 1, 2), golden[f"eps{epsilon}/barycentric_top1_{kind}"])


def test_bias(golden, activations, coupled):
    epsilon, kind, coupling = coupled
    moved = projections.transported_bias(
        jnp.asarray(golden["b_source"], jnp.float32),
        coupling,
        *activations,
        in_site="mlp_in",
        out_site="up_out",
        spec=spec_of(),
    )
    close(moved, golden[f"eps{epsilon}/bias_top1_{kind}"])


def target_params(golden):
    return {"layers": {"mlp": {"up_proj": {"kernel": kernels(golden["w_target"])}}}}


def fused(golden, moved, strength, rule, mask):
    params = fuse.fuse(
        target_params(golden), {PATH: moved}, strength, spec=spec_of(rule=rule), mask=mask
    )
    return np.swapaxes(params["layers"]["mlp"]["up_proj"]["kernel"], 1, 2)


def test_interpolate_with_masked_rows(golden, activations, coupled):
    epsilon, kind, coupling = coupled
    moved = transported(
        golden, activations, coupling, golden["w_source"], form="joint", layers="soft"
    )
    mask = masks.masks_of(activations[0], spec=spec_of(k=int(golden["k"])))
    np.testing.assert_array_equal(mask[PATH][:, 0, :], golden["mask_rows"])
    ours = fused(golden, moved, golden["alpha"], "interpolate", mask)
    close(ours, golden[f"eps{epsilon}/interpolate_rows_{kind}"])


def test_residual_with_masked_columns(golden, activations, coupled):
    epsilon, kind, coupling = coupled
    moved = transported(golden, activations, coupling, golden["w_source"])
    kept = masks.largest(activations[0].values["mlp_in"], int(golden["k"]))
    chosen = np.zeros(golden["mask_columns"].shape, np.float32)
    np.put_along_axis(chosen, kept, 1.0, axis=1)
    np.testing.assert_array_equal(chosen, golden["mask_columns"])
    ours = fused(
        golden, moved, golden["alpha"], "residual", {PATH: jnp.asarray(chosen)[:, :, None]}
    )
    close(ours, golden[f"eps{epsilon}/residual_columns_{kind}"])


def test_delta(golden, activations, coupled):
    epsilon, kind, coupling = coupled
    change = golden["w_source"] - golden["w_source_base"]
    moved = transported(golden, activations, coupling, change)
    ours = fused(golden, moved, golden["lam"], "delta", {})
    close(ours, golden[f"eps{epsilon}/delta_top1_{kind}"])


def test_vocabulary(golden):
    count = int(golden["vocab_matched"])
    matched = VocabularyMatch(jnp.arange(count), jnp.arange(count))
    base, source, target = (
        jnp.asarray(golden[f"vocab_{name}"], jnp.float32)
        for name in ("source_base", "source", "target")
    )
    rotation = procrustes.procrustes(base[:count], target[:count])
    close(rotation, golden["vocab_map"])
    moved, mask = vocabulary.moved_rows(source - base, rotation, matched, size=len(target))
    params = {"embed_tokens": {"embedding": target}}
    path = "embed_tokens/embedding"
    ours = fuse.fuse(
        params, {path: moved}, golden["lam"], spec=MergeSpec(rule="delta"), mask={path: mask}
    )
    close(ours["embed_tokens"]["embedding"], golden["vocab_delta"])

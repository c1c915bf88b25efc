"""Merges of tiny random models of other depth, width, heads, vocabulary and family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_merge_jax.merging import diagnostics, fuse, merge, projections
from ot_merge_jax.models import gather, specs
from ot_merge_jax.models.model import Model, Models
from ot_merge_jax.models.sites import PROJECTIONS, sites_of
from ot_merge_jax.recipes import loading
from ot_merge_jax.transport import coupling as couplings
from ot_merge_jax.types import AlignedBatches, Budget, Choice, HParams, MergeSpec, Point

PATHS = {name: projection.path for name, projection in PROJECTIONS.items()}
EMBED, HEAD = "embed_tokens/embedding", "lm_head/kernel"
K = 7


def spec_of(preset):
    """The preset through the recipe, with a mask that masks at these widths."""
    said = {"target": "t", "source": "s", "source_base": "b", "calibration": "c", "preset": preset}
    if preset == "paper":
        said |= {"k": K, "max_iterations": 2000}  # the solver's program is shared with the others
    return loading.resolve(said).spec()


def bits(array):
    array = np.asarray(array)
    return array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


def same_bits(one, other):
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(bits(one), bits(other))


# ------------------------------------------------------------------------ presets

PRESETS = ("paper", "barycentric", "delta")
HPARAMS = HParams(0.1)


@pytest.fixture(scope="module", params=PRESETS)
def merged(request, model, batches, matched):
    """(spec, models, merged): llama from a deeper qwen2."""
    spec = spec_of(request.param)
    base = model("base", "qwen2") if request.param == "delta" else None
    models = Models(model("target"), model("source", "qwen2"), base)
    return spec, models, merge.merge(models, batches, HPARAMS, spec=spec, vocabulary=matched)


def test_the_result_has_the_targets_shapes_and_dtypes(merged):
    _, models, (params, *_) = merged
    before = models.target.params
    assert jax.tree.structure(params) == jax.tree.structure(before)
    for new, old in zip(jax.tree.leaves(params), jax.tree.leaves(before), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
        assert np.isfinite(new).all()


def moving(spec, cfg):
    """Paths of the leaves that a spec moves in a model without biases."""
    paths = {f"{PATHS[name]}/kernel" for name in spec.weights if name in PATHS}
    if set(spec.weights) & {"embed", "head"}:
        paths |= {EMBED} if cfg.tie_word_embeddings else {EMBED, HEAD}
    return paths


def test_what_moves_moves_and_nothing_else(merged):
    spec, models, (params, *_) = merged
    cfg, before = models.target
    for leaf in specs.param_specs(cfg):
        new, old = specs.get(params, leaf.path), specs.get(before, leaf.path)
        if leaf.path in moving(spec, cfg):
            assert (bits(new) != bits(old)).any(), leaf.path
        else:
            assert new is old, leaf.path


def test_strength_zero_is_the_target_bit_for_bit(merged):
    spec, models, (_, (weights, masks), *_) = merged
    fused = fuse.fuse(models.target.params, weights, 0.0, spec=spec, mask=masks)
    jax.tree.map(same_bits, fused, models.target.params)


def test_transported_weights_are_those_of_the_operator(merged):
    """Alignment by the source (or its base), weights of the source (or the delta)."""
    spec, models, (_, (weights, masks), alignment, *_) = merged
    for name in spec.weights:
        if name not in PATHS:
            continue
        path, wiring = f"{PATHS[name]}/kernel", PROJECTIONS[name]
        kernels = specs.get(models.source.params, path)
        if models.base is not None:
            kernels = kernels - specs.get(models.base.params, path)
        expected = projections.transported(
            kernels,
            *alignment,
            in_site=wiring.in_site,
            out_site=wiring.out_site,
            spec=spec,
        )
        mask = np.broadcast_to(masks[path], expected.shape)
        scale = float(np.abs(expected).max())
        np.testing.assert_allclose(weights[path], mask * expected, rtol=0, atol=1e-5 * scale)
        assert 0 < mask.mean() <= 1


def test_alignment_is_by_the_base_where_there_is_one(merged, batches):
    spec, models, (_, _, alignment, *_) = merged
    sites = sites_of(spec.weights)
    for (cfg, params), side, found in (
        (models.target, batches.target, alignment.target),
        (models.base or models.source, batches.source, alignment.source),
    ):
        expected = gather.gather(params, side, cfg=cfg, sites=sites)
        assert set(found.values) == set(sites)
        for site in sites:
            np.testing.assert_array_equal(found.values[site], expected.values[site])


def test_report(merged):
    spec, models, (params, transported, alignment, _, report) = merged
    cfg, before = models.target
    assert set(report.weights) == set(spec.weights)
    assert report.rows == 64
    assert report.coupling is alignment.coupling
    for name, facts in report.weights.items():
        count = cfg.num_layers if name in PATHS else 1
        for field, value in facts._asdict().items():
            assert np.shape(value) == (count,), (name, field)
            assert np.isfinite(value).all(), (name, field)
        path = f"{PATHS[name]}/kernel" if name in PATHS else {"embed": EMBED, "head": HEAD}[name]
        old, moved = specs.get(before, path), transported.weights[path]
        mask = np.broadcast_to(transported.masks.get(path, 1.0), old.shape)
        change = specs.get(params, path) - old

        def norms(x, count=count):
            return np.linalg.norm(np.asarray(x, np.float64).reshape(count, -1), axis=1)

        size = norms(mask * old)
        np.testing.assert_allclose(facts.ratio_transported, norms(mask * moved) / size, rtol=1e-4)
        np.testing.assert_allclose(facts.ratio_change, norms(change) / size, rtol=1e-2)


def test_report_of_the_plans(merged):
    """Source layers, neighbours and solver facts of the plans that were used."""
    spec, models, (_, _, alignment, _, report) = merged
    cfg = models.target.cfg
    for name in spec.weights:
        facts = report.weights[name]
        if name not in PATHS:
            np.testing.assert_array_equal(facts.source_layer, [-1])
            np.testing.assert_array_equal(facts.neighbours_out, [1])
            assert facts.converged.all()
            continue
        wiring = PROJECTIONS[name]
        share = projections.layer_weights(
            alignment.coupling, in_site=wiring.in_site, out_site=wiring.out_site, spec=spec
        )
        np.testing.assert_array_equal(facts.source_layer, np.asarray(share).argmax(1))
        for site, found in (
            (wiring.in_site, facts.neighbours_in),
            (wiring.out_site, facts.neighbours_out),
        ):
            for l in range(cfg.num_layers):
                plan = couplings.plan(*alignment, site=site, l=l, m=int(facts.source_layer[l]))
                p = np.asarray(plan, np.float64) * len(plan)
                p = p / p.sum(1, keepdims=True)
                expected = np.exp(-(p * np.log(np.maximum(p, 1e-300))).sum(1)).mean()
                np.testing.assert_allclose(found[l], expected, rtol=1e-3)
        used = np.asarray(share) > 0
        assert used.sum() == (used.size if spec.layers == "soft" else cfg.num_layers)
        potentials = [
            alignment.coupling.neuron_potentials[s] for s in (wiring.in_site, wiring.out_site)
        ]
        for fact, field in ((facts.error, "error"), (facts.iterations, "iterations")):
            worst = np.max([np.where(used, getattr(p, field), 0) for p in potentials], 0).max(1)
            np.testing.assert_allclose(fact, worst, rtol=1e-6)
        assert facts.converged.all()


def test_only_the_joint_form_transfers_nothing(merged):
    spec, _, (*_, report) = merged
    assert diagnostics.is_nothing_transferred(report, HPARAMS) == (spec.form == "joint")
    assert diagnostics.is_nothing_transferred(report, HPARAMS._replace(strength=0.0))
    groups = HPARAMS._replace(strength={"projections": 0.1, "vocabulary": 0.1})
    assert diagnostics.is_nothing_transferred(report, groups) == (spec.form == "joint")


@pytest.mark.parametrize("merged", ["paper"], indirect=True)
def test_the_mask_keeps_k_neurons(merged):
    spec, models, (params, *_) = merged
    before = models.target.params
    for name in spec.weights:
        path = f"{PATHS[name]}/kernel"
        changed = bits(specs.get(params, path)) != bits(specs.get(before, path))
        axis = 1 if PROJECTIONS[name].masked == "out" else 2
        neurons = changed.any(axis)
        np.testing.assert_array_equal(neurons.sum(1), np.full(len(neurons), K), err_msg=name)


@pytest.mark.parametrize("merged", ["delta"], indirect=True)
def test_source_equal_to_its_base_is_the_target_bit_for_bit(merged, batches, matched):
    spec, models, _ = merged
    same = models._replace(base=models.source)
    params, *_, report = merge.merge(same, batches, HParams(1.2), spec=spec, vocabulary=matched)
    jax.tree.map(same_bits, params, models.target.params)
    assert diagnostics.is_nothing_transferred(report, HParams(1.2))


# ------------------------------------------------------------------------ one weight

UP = MergeSpec(weights=("up",), rule="interpolate")
UP_PATH = f"{PATHS['up']}/kernel"


def test_merge_is_its_stages(model, batches):
    models = Models(model("target"), model("source", "qwen2"))
    params, *_, report = merge.merge(models, batches, HParams(0.3), spec=UP)
    alignment = merge.align_activations(models, batches, HParams(0.3), spec=UP)
    weights, masks = merge.transport_weights(models, alignment, spec=UP)
    target = models.target.params
    expected = fuse.fuse(target, weights, 0.3, spec=UP, mask=masks)
    jax.tree.map(same_bits, params, expected)
    same = diagnostics.describe(
        target, merge.Transported(weights, masks), alignment, HParams(0.3), spec=UP
    )
    jax.tree.map(np.testing.assert_array_equal, report, same)


def test_known_steps_are_not_computed_and_the_strength_is_chosen_between(model, batches):
    """`given` hands out what is known; ``choose`` sees what was transported."""
    models = Models(model("target"), model("source", "qwen2"))
    first = merge.merge(models, batches, HParams(0.3), spec=UP)
    seen, asked = [], []

    def choose(transported):
        seen.append(transported)
        return Choice(HParams(0.7), [Point(0.7, 1.0)])

    def otherwise(name, compute, *more, needs=()):
        asked.append(name)
        return compute()

    steps = merge.steps_of(first)
    del steps["report"]
    again = merge.merge(
        models,
        AlignedBatches([], []),
        HParams(0.0),
        spec=UP,
        stage=merge.given(steps, otherwise),
        choose=choose,
    )
    assert asked == ["report"]
    assert [one is first.transported for one in seen] == [True]
    assert again.choice == Choice(HParams(0.7), [Point(0.7, 1.0)])
    expected = merge.merge(models, batches, HParams(0.7), spec=UP)
    jax.tree.map(same_bits, again.params, expected.params)
    jax.tree.map(np.testing.assert_array_equal, again.report, expected.report)


def test_a_stand_in_takes_the_place_of_the_reference_alone(model, batches):
    """Aligned with the stand-in, the source's own weights are carried."""
    source, other = model("source", "qwen2"), model("base", "qwen2")
    models = Models(model("target"), source, stand_in=other)
    alignment = merge.align_activations(models, batches, HPARAMS, spec=UP)
    expected = merge.align_activations(Models(models.target, other), batches, HPARAMS, spec=UP)
    jax.tree.map(np.testing.assert_array_equal, alignment, expected)
    wiring = PROJECTIONS["up"]
    carried = projections.transported(
        specs.get(source.params, UP_PATH), *expected,
        in_site=wiring.in_site, out_site=wiring.out_site, spec=UP,
    )  # fmt: skip
    moved = merge.transport_weights(models, alignment, spec=UP)
    np.testing.assert_array_equal(moved.weights[UP_PATH], carried)


def test_strength_zero_through_merge(model, batches):
    models = Models(model("target"), model("source", "qwen2"))
    params, *_, report = merge.merge(models, batches, HParams(0.0), spec=UP)
    jax.tree.map(same_bits, params, models.target.params)
    np.testing.assert_array_equal(report.weights["up"].ratio_change, 0)


def test_half_precision_targets_stay_half_precision(model, batches):
    cfg, params = model("target")
    half = Model(cfg, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
    models = Models(half, model("source", "qwen2"))
    moved, (weights, masks), *_ = merge.merge(models, batches, HParams(0.3), spec=UP)
    still = fuse.fuse(half.params, weights, 0.0, spec=UP, mask=masks)
    jax.tree.map(same_bits, still, half.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(moved)} == {jnp.dtype(jnp.bfloat16)}
    assert (bits(specs.get(moved, UP_PATH)) != bits(specs.get(half.params, UP_PATH))).any()


def test_interpolate_with_a_base_aligns_by_it_and_carries_the_source(model, batches):
    target, source, base = model("target"), model("source", "qwen2"), model("base", "qwen2")
    with_base = merge.merge(Models(target, source, base), batches, HPARAMS, spec=UP)
    carried_base = merge.merge(Models(target, base), batches, HPARAMS, spec=UP)
    for site, rows in with_base.alignment.source.values.items():
        np.testing.assert_array_equal(rows, carried_base.alignment.source.values[site])
    wiring = PROJECTIONS["up"]
    expected = projections.transported(
        specs.get(source.params, UP_PATH),
        *carried_base.alignment,
        in_site=wiring.in_site,
        out_site=wiring.out_site,
        spec=UP,
    )
    one, other = (x.transported.weights[UP_PATH] for x in (with_base, carried_base))
    np.testing.assert_allclose(one, expected, atol=1e-6)
    assert np.abs(one - other).max() > 1e-3


def test_vmap_over_hparams_is_the_loop(model, batches):
    models = Models(model("target"), model("source", "qwen2"))

    def run(strength, epsilon):
        params, *_, report = merge.merge(models, batches, HParams(strength, epsilon), spec=UP)
        return specs.get(params, UP_PATH), report.weights["up"].ratio_change

    strengths, epsilons = (0.0, 0.3, 1.0), (0.02, 0.1, 0.5)
    swept = jax.vmap(run)(jnp.array(strengths), jnp.array(epsilons))
    for index, (strength, epsilon) in enumerate(zip(strengths, epsilons, strict=True)):
        kernel, ratio = run(strength, epsilon)
        np.testing.assert_allclose(swept[0][index], kernel, rtol=0, atol=1e-5)
        np.testing.assert_allclose(swept[1][index], ratio, rtol=1e-4, atol=1e-7)
    same_bits(swept[0][0], specs.get(models.target.params, UP_PATH))


def test_the_second_merge_compiles_nothing(model, batches, caplog):
    models = Models(model("target"), model("source", "qwen2"))
    merge.merge(models, batches, HParams(0.3, 0.05), spec=UP)
    others = [Model(cfg, jax.tree.map(lambda x: jnp.asarray(np.asarray(x) * 0.9), params))
              for cfg, params in models[:2]]  # fmt: skip
    with jax.log_compiles(), caplog.at_level("WARNING"):
        merge.merge(Models(*others), batches, HParams(0.7, 0.03, 0.2, 1e-5), spec=UP)
    assert [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()] == []


@pytest.mark.parametrize(
    "budget",
    [Budget(pairs=1), Budget(source_rows=1), Budget(plan_block=1), Budget(1, 1, 1, 1, 1)],
    ids=["pairs", "rows", "plan", "all"],
)
def test_blocks_change_a_merge_by_rounding_alone(budget, model, batches):
    """A cost rounds by 1e-7, and a plan divides that by epsilon, here 0.02."""
    models = Models(model("target"), model("source", "qwen2"))
    spec = MergeSpec(weights=("up", "down"), rule="interpolate")
    whole, blocks = (
        merge.merge(models, batches, HParams(0.3, 0.02), spec=spec, budget=each)
        for each in (Budget(), budget)
    )
    for path, weight in whole.transported.weights.items():
        other = blocks.transported.weights[path]
        np.testing.assert_allclose(other, weight, rtol=0, atol=5e-5 * np.abs(weight).max())
    for name, report in whole.report.weights.items():
        np.testing.assert_array_equal(report.source_layer, blocks.report.weights[name].source_layer)


# ------------------------------------------------------------------------ biases

BIASED = MergeSpec(weights=("k",), rule="interpolate")
K_BIAS = f"{PATHS['k']}/bias"


def biases_of(model, batches, families):
    models = Models(model("target", families[0]), model("source", families[1]))
    merged = merge.merge(models, batches, HPARAMS._replace(strength=0.5), spec=BIASED)
    return models.target.params, models.source.params, merged, merged.params


def test_a_bias_moves_where_both_have_one(model, batches):
    before, source, merged, fused = biases_of(model, batches, ("qwen2", "qwen2"))
    expected = projections.transported_bias(
        specs.get(source, K_BIAS),
        *merged.alignment,
        in_site="attn_in",
        out_site="k_out",
        spec=BIASED,
    )
    old = specs.get(before, K_BIAS)
    np.testing.assert_allclose(
        specs.get(fused, K_BIAS), old + 0.5 * (expected - old), rtol=0, atol=1e-5
    )
    assert (bits(specs.get(fused, K_BIAS)) != bits(old)).all()
    assert specs.get(fused, f"{PATHS['q']}/bias") is specs.get(before, f"{PATHS['q']}/bias")


def test_a_bias_without_a_counterpart_stays(model, batches):
    before, _, _, fused = biases_of(model, batches, ("qwen2", "llama"))
    assert specs.get(fused, K_BIAS) is specs.get(before, K_BIAS)


def test_a_target_without_biases_gets_none(model, batches):
    _, source, merged, fused = biases_of(model, batches, ("llama", "qwen2"))
    assert specs.has(source, K_BIAS)
    assert K_BIAS not in merged.transported.weights
    assert not specs.has(fused, K_BIAS)

"""Masks and the three rules: formulas against float64, and what must not move at all."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from ot_merge_jax.errors import RecipeError
from ot_merge_jax.merging import fuse, masks
from ot_merge_jax.models.sites import PROJECTIONS, SITES
from ot_merge_jax.types import Activations, MergeSpec

L, V = 3, 7
HIDDEN, HEADS, INNER = 4, 6, 10
SHAPES = {
    "q": (HIDDEN, HEADS),
    "k": (HIDDEN, 2),
    "v": (HIDDEN, 2),
    "o": (HEADS, HIDDEN),
    "gate": (HIDDEN, INNER),
    "up": (HIDDEN, INNER),
    "down": (INNER, HIDDEN),
}
RULES = ("interpolate", "residual", "delta")
UP, DOWN = (f"{PROJECTIONS[name].path}/kernel" for name in ("up", "down"))
Q_BIAS = f"{PROJECTIONS['q'].path}/bias"
EMBED, HEAD = "embed_tokens/embedding", "lm_head/kernel"


@pytest.fixture
def unchecked(monkeypatch):
    """Switches the shape checks of the test run off: what a user gets is our own exception."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def leaf(rng, shape, dtype="float32"):
    """Random numbers with both zeros, the smallest and the largest number among them."""
    values = rng.normal(size=shape).astype(np.float32)
    values.flat[0], values.flat[1] = -0.0, 0.0
    limits = jnp.finfo(dtype)
    values.flat[2], values.flat[3] = float(limits.smallest_subnormal), float(limits.max)
    return jnp.asarray(values).astype(dtype)


def target(rng, dtype="float32"):
    """Parameters of a small model with every kind of leaf."""
    layers = {"input_layernorm": {"scale": leaf(rng, (L, HIDDEN), dtype)}}
    for name, (d_in, d_out) in SHAPES.items():
        _, part, proj = PROJECTIONS[name].path.split("/")
        layers.setdefault(part, {})[proj] = {"kernel": leaf(rng, (L, d_in, d_out), dtype)}
    layers["self_attn"]["q_proj"]["bias"] = leaf(rng, (L, HEADS), dtype)
    return {
        "embed_tokens": {"embedding": leaf(rng, (V, HIDDEN), dtype)},
        "layers": layers,
        "norm": {"scale": leaf(rng, (HIDDEN,), dtype)},
        "lm_head": {"kernel": leaf(rng, (HIDDEN, V), dtype)},
    }


def at(params, path):
    for key in path.split("/"):
        params = params[key]
    return params


def moved_like(rng, params, paths):
    return {
        path: jnp.asarray(rng.normal(size=at(params, path).shape), jnp.float32) for path in paths
    }


def bits(array):
    array = np.asarray(array)
    return array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint32)


def same_bits(one, other):
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(bits(one), bits(other))


# ------------------------------------------------------------------------ top k


@pytest.mark.parametrize("k", [1, 2, 5, 11])
def test_the_largest_mean_absolute_activations_are_kept(rng, k):
    values = rng.normal(size=(L, 20, 11)).astype(np.float32) * rng.uniform(0.1, 3, 11)
    expected = np.abs(values).mean(1).argsort(1)[:, ::-1][:, :k]
    np.testing.assert_array_equal(masks.largest(values, k), np.sort(expected, 1))


def test_the_mean_is_of_absolute_values():
    swings, drifts = [9.0, -9.0], [1.0, 1.0]
    assert masks.largest(np.array([[swings, drifts]]).transpose(0, 2, 1), 1).tolist() == [[0]]


@pytest.mark.parametrize("k", [11, 12, 1000])
def test_k_of_enough_keeps_all(rng, k):
    kept = masks.largest(rng.normal(size=(L, 20, 11)), k)
    np.testing.assert_array_equal(kept, np.tile(np.arange(11), (L, 1)))


def test_of_equal_neurons_the_first_k_are_kept():
    np.testing.assert_array_equal(masks.largest(np.ones((L, 4, 11)), 3), np.tile([0, 1, 2], (L, 1)))


def test_each_layer_has_its_own_neurons():
    values = np.stack([np.broadcast_to(np.eye(3)[i], (3, 3)) for i in range(3)])
    assert masks.largest(values, 1).tolist() == [[0], [1], [2]]


# ------------------------------------------------------------------------ masks


@pytest.fixture
def activations(rng):
    """Every site has its own width and favourite neuron, so that none passes for another."""
    values = {}
    for place, site in enumerate(SITES):
        width = 13 + place
        values[site] = rng.uniform(0, 1, (L, 5, width)).astype(np.float32)
        values[site][:, :, place] += 10 + place
    return Activations(values, np.arange(5))


@pytest.mark.parametrize(
    ("name", "site"),
    [("q", "q_out"), ("k", "k_out"), ("v", "v_out"), ("gate", "gate_out"), ("up", "up_out")],
)
def test_rows_are_masked_by_the_output_site(activations, name, site):
    found = masks.masks_of(activations, spec=MergeSpec(weights=(name,), k=1))
    place, width = list(SITES).index(site), activations.values[site].shape[2]
    expected = np.broadcast_to(np.eye(width)[place], (L, width))
    path = PROJECTIONS[name].path
    np.testing.assert_array_equal(found[f"{path}/kernel"], expected[:, None, :])
    np.testing.assert_array_equal(found[f"{path}/bias"], expected)
    assert set(found) == {f"{path}/kernel", f"{path}/bias"}


@pytest.mark.parametrize(("name", "site"), [("o", "o_in"), ("down", "down_in")])
def test_columns_are_masked_by_the_input_site(activations, name, site):
    found = masks.masks_of(activations, spec=MergeSpec(weights=(name,), k=1))
    place, width = list(SITES).index(site), activations.values[site].shape[2]
    expected = np.broadcast_to(np.eye(width)[place], (L, width))
    np.testing.assert_array_equal(found[f"{PROJECTIONS[name].path}/kernel"], expected[:, :, None])


@pytest.mark.parametrize("name", ["o", "down"])
@pytest.mark.parametrize(("k", "expected"), [(1, 0.0), (999, 0.0), (None, 1.0)])
def test_biases_of_o_and_down_move_with_all_only(activations, name, k, expected):
    found = masks.masks_of(activations, spec=MergeSpec(weights=(name,), k=k))
    bias = found[f"{PROJECTIONS[name].path}/bias"]
    np.testing.assert_array_equal(bias, np.full(bias.shape, expected))
    assert np.broadcast_shapes(bias.shape, (L, HIDDEN)) == (L, HIDDEN)


def test_all_neurons_without_k(activations):
    found = masks.masks_of(activations, spec=MergeSpec(weights=tuple(PROJECTIONS)))
    assert len(found) == 2 * len(PROJECTIONS)
    for path, mask in found.items():
        np.testing.assert_array_equal(mask, 1, err_msg=path)


def test_the_vocabulary_has_no_activation_mask(activations):
    assert masks.masks_of(activations, spec=MergeSpec(weights=("embed", "head"), k=1)) == {}
    assert masks.masks_of(None, spec=MergeSpec(weights=("embed", "head"), k=1)) == {}


# ------------------------------------------------------------------------ rules


def formula(weight, moved, strength, mask, rule):
    """method: Fusion rules in float64."""
    weight, moved = np.asarray(weight, np.float64), np.asarray(moved, np.float64)
    return weight + strength * mask * (moved - weight if rule == "interpolate" else moved)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("path", [UP, DOWN, Q_BIAS, EMBED, HEAD])
def test_rules(rng, rule, path, strict):
    params = jax.tree.map(lambda x: jnp.where(jnp.abs(x) < 1e3, x, 1.0), target(rng))
    moved = moved_like(rng, params, [path])
    mask = rng.integers(0, 2, moved[path].shape).astype(np.float32)
    with strict():
        fused = fuse.fuse(
            params, moved, 0.7, spec=MergeSpec(rule=rule), mask={path: jnp.asarray(mask)}
        )
    expected = formula(at(params, path), moved[path], 0.7, mask, rule)
    np.testing.assert_allclose(at(fused, path), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_without_a_mask_the_whole_leaf_moves(rng, rule):
    params = target(rng)
    params["lm_head"]["kernel"] = jnp.ones((HIDDEN, V))
    moved = moved_like(rng, params, [HEAD])
    fused = fuse.fuse(params, moved, 0.5, spec=MergeSpec(rule=rule), mask={})
    expected = formula(np.ones((HIDDEN, V)), moved[HEAD], 0.5, 1.0, rule)
    np.testing.assert_allclose(at(fused, HEAD), expected, rtol=1e-5)


def test_interpolate_with_strength_one_arrives(rng):
    params = target(rng)
    params["layers"]["mlp"]["up_proj"]["kernel"] = jnp.ones((L, HIDDEN, INNER))
    moved = moved_like(rng, params, [UP])
    fused = fuse.fuse(params, moved, 1.0, spec=MergeSpec(rule="interpolate"), mask={})
    np.testing.assert_allclose(at(fused, UP), moved[UP], atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rule", RULES)
def test_half_precision_is_rounded_once(rng, rule, dtype):
    """The sum in float32, one rounding to the target's dtype: bit for bit."""
    params = target(rng, dtype)
    moved = moved_like(rng, params, [UP])
    fused = at(fuse.fuse(params, moved, 0.3, spec=MergeSpec(rule=rule), mask={}), UP)
    weight = np.asarray(at(params, UP), np.float32)
    step = np.asarray(moved[UP]) - weight if rule == "interpolate" else np.asarray(moved[UP])
    with np.errstate(over="ignore"):
        expected = jnp.asarray(weight + np.float32(0.3) * step).astype(dtype)
    same_bits(fused, expected)


# ------------------------------------------------------------------------ what stays


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rule", RULES)
def test_strength_zero_is_the_target_bit_for_bit(rng, rule, dtype):
    params = target(rng, dtype)
    paths = [UP, DOWN, Q_BIAS, EMBED, HEAD]
    moved = moved_like(rng, params, paths)
    for strength in (0.0, -0.0, jnp.zeros(()), {"projections": 0.0, "vocabulary": 0.0}):
        fused = fuse.fuse(params, moved, strength, spec=MergeSpec(rule=rule), mask={})
        jax.tree.map(same_bits, fused, params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rule", RULES)
def test_masked_entries_stay_bit_for_bit(rng, rule, dtype):
    params = target(rng, dtype)
    moved = moved_like(rng, params, [DOWN])
    mask = rng.integers(0, 2, (L, INNER, 1)).astype(np.float32)
    mask[0, 0] = 0  # where -0.0, 0.0 and the extreme numbers are
    fused = fuse.fuse(params, moved, 0.9, spec=MergeSpec(rule=rule), mask={DOWN: jnp.asarray(mask)})
    kept = np.broadcast_to(mask == 0, (L, INNER, HIDDEN))
    np.testing.assert_array_equal(bits(at(fused, DOWN))[kept], bits(at(params, DOWN))[kept])
    assert (bits(at(fused, DOWN))[~kept] != bits(at(params, DOWN))[~kept]).mean() > 0.9


def test_nothing_transported_is_the_target_bit_for_bit(rng):
    """Rule ``delta`` with source = source base."""
    params = target(rng, "bfloat16")
    moved = {path: jnp.zeros(at(params, path).shape) for path in (UP, EMBED)}
    fused = fuse.fuse(params, moved, 1.2, spec=MergeSpec(rule="delta"), mask={})
    jax.tree.map(same_bits, fused, params)


def test_untouched_leaves_are_the_same_buffers(rng):
    params = target(rng)
    moved = moved_like(rng, params, [UP, EMBED])
    fused = fuse.fuse(params, moved, 0.5, spec=MergeSpec(), mask={})
    before = dict(jax.tree_util.tree_leaves_with_path(params))
    after = dict(jax.tree_util.tree_leaves_with_path(fused))
    assert before.keys() == after.keys()
    changed = {jax.tree_util.keystr(key, simple=True, separator="/")
               for key in before if after[key] is not before[key]}  # fmt: skip
    assert changed == {UP, EMBED}


def test_the_target_is_not_written_into(rng):
    params = target(rng)
    before = dict(jax.tree_util.tree_leaves_with_path(params))
    fused = fuse.fuse(params, moved_like(rng, params, [UP]), 0.5, spec=MergeSpec(), mask={})
    fused["layers"]["mlp"]["up_proj"]["kernel"] = None
    fused["norm"].clear()
    after = dict(jax.tree_util.tree_leaves_with_path(params))
    assert after.keys() == before.keys()
    assert all(after[key] is before[key] for key in before)


def test_dtypes_are_the_targets_leaf_by_leaf(rng):
    params = target(rng, "bfloat16")
    params["embed_tokens"] = target(rng, "float32")["embed_tokens"]
    moved = moved_like(rng, params, [UP, EMBED])
    fused = fuse.fuse(params, moved, 0.5, spec=MergeSpec(), mask={})
    assert at(fused, UP).dtype == jnp.bfloat16
    assert at(fused, EMBED).dtype == jnp.float32


# ------------------------------------------------------------------------ strengths


def test_one_strength_for_each_layer(rng):
    params = target(rng)
    moved = moved_like(rng, params, [UP, Q_BIAS])
    strengths = np.array([0.0, 0.4, 1.0], np.float32)
    fused = fuse.fuse(params, moved, jnp.asarray(strengths), spec=MergeSpec(), mask={})
    same_bits(at(fused, UP)[0], at(params, UP)[0])
    for layer, strength in enumerate(strengths):
        alone = fuse.fuse(params, moved, float(strength), spec=MergeSpec(), mask={})
        for path in (UP, Q_BIAS):
            same_bits(at(fused, path)[layer], at(alone, path)[layer])


def test_one_strength_for_each_group(rng):
    params = target(rng)
    paths = [UP, Q_BIAS, EMBED, HEAD]
    moved = moved_like(rng, params, paths)
    groups = {"projections": 0.25, "vocabulary": jnp.float32(0.75)}
    fused = fuse.fuse(params, moved, groups, spec=MergeSpec(), mask={})
    for path in paths:
        strength = 0.25 if path.startswith("layers/") else 0.75
        alone = fuse.fuse(params, {path: moved[path]}, strength, spec=MergeSpec(), mask={})
        same_bits(at(fused, path), at(alone, path))


def test_a_group_may_have_a_strength_for_each_layer(rng):
    params = target(rng)
    moved = moved_like(rng, params, [UP, EMBED])
    groups = {"projections": jnp.array([0.0, 0.4, 1.0]), "vocabulary": 0.5}
    fused = fuse.fuse(params, moved, groups, spec=MergeSpec(), mask={})
    same_bits(at(fused, UP)[0], at(params, UP)[0])
    assert (bits(at(fused, UP)[1]) != bits(at(params, UP)[1])).any()


@pytest.mark.parametrize(("path", "given"), [(UP, "vocabulary"), (EMBED, "projections")])
def test_a_missing_group_raises(rng, path, given):
    params = target(rng)
    missing = {"vocabulary": "projections", "projections": "vocabulary"}[given]
    with pytest.raises(RecipeError, match=f"no strength for {missing}"):
        fuse.fuse(params, moved_like(rng, params, [path]), {given: 0.5}, spec=MergeSpec(), mask={})


def test_a_group_that_does_not_move_needs_no_strength(rng):
    params = target(rng)
    fused = fuse.fuse(
        params, moved_like(rng, params, [UP]), {"projections": 0.5}, spec=MergeSpec(), mask={}
    )
    assert at(fused, UP) is not at(params, UP)


@pytest.mark.parametrize("shape", [(L + 1,), (L, 2), (1, 1, 1, 1)])
def test_a_strength_that_does_not_fit_raises(rng, shape):
    params = target(rng)
    with pytest.raises(ValueError, match="strength"):
        fuse.fuse(params, moved_like(rng, params, [UP]), jnp.ones(shape), spec=MergeSpec(), mask={})


@pytest.mark.parametrize("rule", RULES)
def test_vmap_over_strength_is_the_loop(rng, rule):
    params = target(rng)
    moved = moved_like(rng, params, [UP, EMBED])
    mask = {UP: jnp.asarray(rng.integers(0, 2, (L, 1, INNER)), jnp.float32)}

    def fused(strength):
        return fuse.fuse(params, moved, strength, spec=MergeSpec(rule=rule), mask=mask)

    strengths = jnp.array([0.0, 0.3, 1.2])
    swept = jax.jit(jax.vmap(fused))({"projections": strengths, "vocabulary": strengths[::-1]})
    for index in range(3):
        alone = fused({"projections": strengths[index], "vocabulary": strengths[2 - index]})
        for path in (UP, EMBED):
            np.testing.assert_allclose(at(swept, path)[index], at(alone, path), rtol=2e-6)
    same_bits(at(swept, UP)[0], at(params, UP))
    same_bits(at(swept, EMBED)[2], at(params, EMBED))


def test_the_compiled_rule_keeps_strength_zero_exact(rng):
    params = target(rng, "bfloat16")
    moved = moved_like(rng, params, [UP, EMBED])
    compiled = jax.jit(lambda s: fuse.fuse(params, moved, s, spec=MergeSpec(), mask={}))
    jax.tree.map(same_bits, compiled(0.0), params)


# ------------------------------------------------------------------------ wrong input


@pytest.mark.parametrize("shape", [(L, INNER, HIDDEN), (HIDDEN, INNER), (L - 1, HIDDEN, INNER)])
def test_a_transported_weight_of_another_shape_raises(rng, shape, unchecked):
    with pytest.raises(ValueError, match=UP):
        fuse.fuse(target(rng), {UP: jnp.ones(shape)}, 0.5, spec=MergeSpec(), mask={})


def test_update_is_what_strength_one_adds(rng):
    weight, moved = (jnp.asarray(rng.normal(size=(3, 5)), jnp.float32) for _ in range(2))
    mask = jnp.asarray(rng.integers(0, 2, (3, 1)), jnp.float32)
    np.testing.assert_allclose(
        fuse.update(weight, moved, mask, rule="interpolate"), mask * (moved - weight), atol=1e-7
    )
    for rule in ("residual", "delta"):
        np.testing.assert_array_equal(fuse.update(weight, moved, mask, rule=rule), mask * moved)
        np.testing.assert_array_equal(fuse.update(weight, moved, None, rule=rule), moved)

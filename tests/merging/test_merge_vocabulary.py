"""Merging vocabulary tables of tiny random models, tied and untied, and merges that are refused.

Tables need no activations, so nothing is gathered here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ot_merge_jax.errors import InputError, RecipeError
from ot_merge_jax.merging import merge
from ot_merge_jax.models import specs
from ot_merge_jax.models.model import Models
from ot_merge_jax.types import AlignedBatches, HParams, MergeSpec

EMBED, HEAD = "embed_tokens/embedding", "lm_head/kernel"
HPARAMS = HParams(0.1)
NO_ROWS = AlignedBatches([], [])


def same_bits(one, other):
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(
        np.asarray(one).view(np.uint32), np.asarray(other).view(np.uint32)
    )


# ------------------------------------------------------------------------ vocabulary

BOTH = MergeSpec(weights=("embed", "head"), rule="delta")
TIES = [(t, s) for t in (False, True) for s in (False, True)]


def table(model, role):
    """The table ``[v, d]`` of a role; a tied table plays both."""
    cfg, params = model
    if role == "head" and not cfg.tie_word_embeddings:
        return np.asarray(params["lm_head"]["kernel"], np.float64).T
    return np.asarray(params["embed_tokens"]["embedding"], np.float64)


def moved_table(models, matched, role, strength):
    """The vocabulary map in float64: the role's table of the target after rule ``delta``."""
    target, source, base = (table(one, role) for one in models)
    target = target.copy()
    rows_t, rows_s = np.asarray(matched.target_ids), np.asarray(matched.source_ids)
    left, right = base[rows_s], target[rows_t]
    u, _, vt = np.linalg.svd(left.T @ right, full_matrices=False)
    rotation = u @ vt
    rotation *= np.linalg.norm(right) / np.linalg.norm(left @ rotation)
    target[rows_t] += strength * (source - base)[rows_s] @ rotation
    return target


def merge_tables(model, matched, ties, weights, strength=0.8):
    target = model("target", tied=ties[0])
    source, base = (model(role, "qwen2", tied=ties[1]) for role in ("source", "base"))
    models = Models(target, source, base)
    merged = merge.merge(
        models, NO_ROWS, HParams(strength), spec=BOTH._replace(weights=weights), vocabulary=matched
    )
    return models[:3], merged.params, merged.report


@pytest.mark.parametrize("ties", TIES, ids=["t-s", "t-S", "T-s", "T-S"])  # capital: tied
def test_tables_move_by_their_role(model, matched, ties):
    models, params, report = merge_tables(model, matched, ties, ("embed", "head"))
    cfg, before = models[0]
    if ties[0]:  # one table: once, by the head's map and delta
        expected = moved_table(models, matched, "head", 0.8)
        np.testing.assert_allclose(specs.get(params, EMBED), expected, rtol=0, atol=1e-4)
        assert not specs.has(params, HEAD)
    else:
        for role, ours in (
            ("embed", specs.get(params, EMBED)),
            ("head", specs.get(params, HEAD).T),
        ):
            expected = moved_table(models, matched, role, 0.8)
            np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4, err_msg=role)
    unmatched = np.setdiff1d(np.arange(cfg.vocab_size), matched.target_ids)
    same_bits(specs.get(params, EMBED)[unmatched], specs.get(before, EMBED)[unmatched])
    assert (
        params["layers"]["mlp"]["up_proj"]["kernel"] is before["layers"]["mlp"]["up_proj"]["kernel"]
    )
    assert report.coupling is None
    assert report.rows == 0


def test_the_roles_differ(model, matched):
    """So that the test above can tell them apart, for a tied target too."""
    for tied in (False, True):
        models, *_ = merge_tables(model, matched, (tied, False), ("embed",))
        target, source, base = (table(one, "embed") for one in models)
        rows = np.asarray(matched.target_ids)
        by_head = moved_table(models, matched, "head", 0.8)
        by_embed = moved_table(models, matched, "embed", 0.8)
        assert np.abs(by_embed - target)[rows].max() > 0.05
        assert np.abs(by_embed - by_head)[rows].max() > 0.05
        assert np.abs(source - base).max() > 0.05


@pytest.mark.parametrize("source_tied", [False, True])
def test_a_tied_table_moves_once_whatever_it_is_called(model, matched, source_tied):
    found = [
        merge_tables(model, matched, (True, source_tied), weights)[1]
        for weights in (("embed",), ("head",), ("embed", "head"))
    ]
    for other in found[1:]:
        jax.tree.map(same_bits, found[0], other)


@pytest.mark.parametrize(("weights", "still"), [(("embed",), HEAD), (("head",), EMBED)])
def test_an_untied_table_that_is_not_named_stays(model, matched, weights, still):
    models, params, report = merge_tables(model, matched, (False, True), weights)
    assert specs.get(params, still) is specs.get(models[0].params, still)
    assert set(report.weights) == set(weights)


def test_strength_zero_of_the_vocabulary(model, matched):
    models, params, _ = merge_tables(model, matched, (False, False), ("embed", "head"), 0.0)
    jax.tree.map(same_bits, params, models[0].params)


def test_weights_of_the_match_reach_the_map(model, matched):
    """Token frequencies change the map; equal ones do not."""
    skewed = np.ones(120, np.float32)
    skewed[:10] = 500
    plain, equal, other = (
        merge_tables(model, matched._replace(weights=w), (True, True), ("embed",))[1]
        for w in (None, jnp.full(120, 3.0), jnp.asarray(skewed))
    )
    np.testing.assert_allclose(specs.get(equal, EMBED), specs.get(plain, EMBED), atol=1e-4)
    assert np.abs(specs.get(other, EMBED) - specs.get(plain, EMBED)).max() > 0.01


# ------------------------------------------------------------------------ refusals


def test_delta_needs_a_base(model):
    with pytest.raises(RecipeError, match="source_base"):
        merge.merge(Models(model("target"), model("source")), NO_ROWS, HPARAMS, spec=BOTH)


@pytest.mark.parametrize("weights", [("embed",), ("head",), ("embed", "head")])
def test_moving_tables_needs_the_matched_tokens(model, weights):
    target, source = model("target"), model("source", "qwen2")
    spec = MergeSpec(weights=weights, rule="interpolate")
    with pytest.raises(RecipeError, match="matched tokens"):
        merge.merge(Models(target, source), NO_ROWS, HPARAMS, spec=spec)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"layers": 2}, "layers/"),
        ({"intermediate": 48}, "layers/mlp"),
        ({"vocab_size": 320}, "embed_tokens/embedding"),
        ({"tied": True}, "lm_head/kernel"),
        ({"kv_heads": 3}, "layers/self_attn/k_proj"),
    ],
    ids=["layers", "width", "vocabulary", "tied", "heads"],
)
@pytest.mark.parametrize("rule", ["delta", "interpolate"])
def test_a_base_of_other_shapes_is_refused(model, more, named, rule):
    source, base = model("source"), model("base", **more)
    spec = BOTH._replace(rule=rule)
    with pytest.raises(InputError, match=named):
        merge.merge(Models(model("target"), source, base), NO_ROWS, HPARAMS, spec=spec)


def test_a_base_of_another_family_is_refused(model):
    source, base = model("source", vocab_size=304), model("base", "qwen2", vocab_size=304)
    with pytest.raises(InputError, match="bias"):
        merge.merge(Models(model("target"), source, base), NO_ROWS, HPARAMS, spec=BOTH)

"""Matching tokens, the Procrustes map and the moved table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from ot_merge_jax.data import vocabulary
from ot_merge_jax.merging import vocabulary as vocabulary_module
from ot_merge_jax.transport import procrustes as procrustes_module
from ot_merge_jax.types import VocabularyMatch

#: (matched rows, source width, target width): equal, narrower, wider, fewer rows than features.
SIZES = [(40, 5, 5), (40, 9, 4), (40, 3, 7), (2, 5, 3), (1, 1, 2)]
procrustes = jax.jit(procrustes_module.procrustes)


def rotation_of(rng, d_s, d_t):
    """A random matrix with orthonormal rows or columns, whichever fit."""
    size = max(d_s, d_t)
    return (
        scipy.stats.ortho_group.rvs(size, random_state=rng)[:d_s, :d_t] if size > 1 else np.eye(1)
    )


@pytest.fixture(params=SIZES, ids=str)
def tables(request, rng):
    v, d_s, d_t = request.param
    return rng.normal(size=(v, d_s)), rng.normal(size=(v, d_t))


def ours(source, target, **kw):
    kw = {name: jnp.asarray(value, jnp.float32) for name, value in kw.items()}
    found = procrustes(jnp.asarray(source, jnp.float32), jnp.asarray(target, jnp.float32), **kw)
    return np.asarray(found)


# ------------------------------------------------------------------------ matching


def test_match_by_string_with_gaps():
    found = vocabulary.match(
        {"b": 4, "a": 9, "only": 2, "c": 1}, {"a": 0, "c": 7, "else": 3, "b": 5}
    )
    assert found.target_ids.tolist() == [1, 4, 9]
    assert found.source_ids.tolist() == [7, 5, 0]
    assert found.weights is None


def test_match_takes_lists_in_row_order():
    found = vocabulary.match(["x", "a", "b"], ["b", "y", "z", "a"])
    assert found.target_ids.tolist() == [1, 2]
    assert found.source_ids.tolist() == [3, 0]


def test_match_does_not_depend_on_the_order_of_a_mapping():
    tokens = {f"t{i}": i for i in range(20)}
    turned = dict(reversed(tokens.items()))
    for found in (vocabulary.match(tokens, turned), vocabulary.match(turned, tokens)):
        assert found.target_ids.tolist() == found.source_ids.tolist() == list(range(20))


def test_match_is_exact():
    """Case and marks of space make other tokens."""
    found = vocabulary.match(["a", "A", "Ġa"], ["A", " a", "a"])
    assert found.target_ids.tolist() == [0, 1]
    assert found.source_ids.tolist() == [2, 0]


@pytest.mark.parametrize(("target", "source"), [(["a"], ["b"]), ([], ["b"]), ({}, {})])
def test_no_shared_token_raises(target, source):
    with pytest.raises(ValueError, match="share no token"):
        vocabulary.match(target, source)


# ------------------------------------------------------------------------ the map


def test_is_orthogonal_up_to_its_scale(tables):
    source, target = tables
    found = ours(source, target).astype(np.float64)
    d_s, d_t = found.shape
    assert (d_s, d_t) == (source.shape[1], target.shape[1])
    gram = found @ found.T if d_s <= d_t else found.T @ found
    np.testing.assert_allclose(gram, gram[0, 0] * np.eye(min(d_s, d_t)), atol=1e-4 * gram[0, 0])
    assert gram[0, 0] > 0


def test_restores_the_norm_of_the_table(tables):
    source, target = tables
    found = ours(source, target)
    np.testing.assert_allclose(np.linalg.norm(source @ found), np.linalg.norm(target), rtol=1e-4)


def test_no_other_rotation_fits_better(tables, rng):
    """The trace that orthogonal Procrustes maximises reaches its bound, the nuclear norm."""
    source, target = tables
    product = source.T @ target
    found = ours(source, target)
    unit = found / np.linalg.norm(found, 2)
    reached = np.trace(unit.T @ product)
    np.testing.assert_allclose(reached, np.linalg.norm(product, "nuc"), rtol=1e-4)
    for _ in range(20):
        other = rotation_of(rng, *unit.shape)
        assert np.trace(other.T @ product) <= reached * (1 + 1e-4)


def test_agrees_with_scipy(rng):
    source, target = rng.normal(size=(40, 5)), rng.normal(size=(40, 5))
    expected, _ = scipy.linalg.orthogonal_procrustes(source, target)
    expected *= np.linalg.norm(target) / np.linalg.norm(source @ expected)
    np.testing.assert_allclose(ours(source, target), expected, atol=1e-4)


@pytest.mark.parametrize(("d_s", "d_t"), [(5, 5), (4, 9)])
def test_a_rotated_table_is_recovered(rng, d_s, d_t):
    """Rotated (into a wider space, too) and rescaled: exactly that map comes back."""
    source, rotation = rng.normal(size=(40, d_s)), 3 * rotation_of(rng, d_s, d_t)
    target = source @ rotation
    np.testing.assert_allclose(ours(source, target), rotation, atol=1e-4)


def test_a_projected_table_is_recovered(rng):
    """Into a narrower space: a source whose rows live in the subspace that the target keeps."""
    rotation = rotation_of(rng, 9, 4)
    target = rng.normal(size=(40, 4))
    np.testing.assert_allclose(ours(target @ rotation.T, target), rotation, atol=1e-4)


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_the_scale_follows_both_tables(tables, factor):
    source, target = tables
    plain = source @ ours(source, target)  # the mapped rows: a map of few rows is not unique
    wider = source @ ours(source, factor * target)
    narrower = source @ ours(factor * source, target)
    tolerance = {"rtol": 1e-3, "atol": 1e-4}
    np.testing.assert_allclose(wider / factor, plain, **tolerance)
    np.testing.assert_allclose(narrower * factor, plain, **tolerance)


def test_weights_equal_repeated_rows(rng):
    source, target = rng.normal(size=(12, 5)), rng.normal(size=(12, 3))
    times = rng.integers(1, 5, 12)
    np.testing.assert_allclose(
        ours(source, target, weights=times),
        ours(np.repeat(source, times, 0), np.repeat(target, times, 0)),
        atol=1e-4,
    )


def test_a_row_of_weight_zero_is_ignored(rng):
    source, target = rng.normal(size=(12, 5)), rng.normal(size=(12, 3))
    weights = np.r_[np.ones(11), 0]
    expected = ours(source[:11], target[:11])
    source[11], target[11] = 1e3, -1e3
    np.testing.assert_allclose(ours(source, target, weights=weights), expected, atol=1e-4)


def test_equal_weights_are_no_weights_and_others_matter(rng):
    source, target = rng.normal(size=(12, 5)), rng.normal(size=(12, 3))
    plain = ours(source, target)
    np.testing.assert_allclose(ours(source, target, weights=np.full(12, 7.0)), plain, atol=1e-4)
    skewed = ours(source, target, weights=np.r_[100.0, np.ones(11)])
    assert np.abs(skewed - plain).max() > 0.01


def test_empty_tables_stay_finite():
    found = ours(np.zeros((12, 5)), np.ones((12, 3)))
    assert np.isfinite(found).all()


def test_half_precision_tables_are_fitted_in_float32(rng):
    source, target = (jnp.asarray(rng.normal(size=(12, d)), jnp.bfloat16) for d in (5, 3))
    found = procrustes(source, target)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(
        found, ours(*(np.asarray(t, np.float32) for t in (source, target))), atol=1e-6
    )


def test_rows_must_correspond(unchecked):
    with pytest.raises(ValueError, match="must correspond"):
        procrustes_module.procrustes(jnp.ones((4, 2)), jnp.ones((3, 2)))


def test_promotes_nothing_implicitly(rng, strict):
    source, target = (jnp.asarray(rng.normal(size=(12, d)), jnp.float32) for d in (5, 3))
    with strict():
        found = procrustes_module.procrustes(source, target, weights=jnp.ones(12))
        vocabulary_module.moved_rows(source, found, pairs([1, 2], [0, 1]), size=4)
    np.testing.assert_allclose(found, ours(source, target), atol=1e-5)


# ------------------------------------------------------------------------ the moved table


def pairs(target_ids, source_ids):
    return VocabularyMatch(jnp.array(target_ids, jnp.int32), jnp.array(source_ids, jnp.int32))


def test_matched_rows_are_mapped_and_the_others_masked(rng):
    source = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)
    rotation = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    table, mask = vocabulary_module.moved_rows(
        source, rotation, pairs([1, 4, 6], [5, 0, 2]), size=8
    )
    assert table.shape == (8, 3)
    assert table.dtype == mask.dtype == jnp.float32
    expected = np.asarray(source, np.float64) @ np.asarray(rotation, np.float64)
    np.testing.assert_allclose(table[jnp.array([1, 4, 6])], expected[[5, 0, 2]], atol=1e-5)
    np.testing.assert_array_equal(np.delete(table, [1, 4, 6], 0), 0)
    assert mask[:, 0].tolist() == [0, 1, 0, 0, 1, 0, 1, 0]
    assert mask.shape == (8, 1)


def test_half_precision_rows_are_moved_in_float32(rng):
    source = jnp.asarray(rng.normal(size=(6, 5)), jnp.bfloat16)
    table, _ = vocabulary_module.moved_rows(source, 3 * jnp.eye(5), pairs([0], [4]), size=2)
    assert table.dtype == jnp.float32
    np.testing.assert_allclose(table[0], 3 * np.asarray(source[4], np.float32), rtol=1e-6)


@pytest.mark.parametrize(("d_s", "d_t"), [(5, 5), (4, 9)])
def test_a_rotated_vocabulary_arrives(rng, d_s, d_t):
    """Matching, map and move together: shuffled rows, gaps, another basis and scale."""
    source = rng.normal(size=(30, d_s)).astype(np.float32)
    names = [f"t{i}" for i in range(30)]
    shared = rng.permutation(30)[:21]
    target_names = [names[i] for i in shared] + ["only", "here"]
    rotation = 0.3 * rotation_of(rng, d_s, d_t)
    target = np.concatenate([source[shared] @ rotation, rng.normal(size=(2, d_t))])
    matched = vocabulary.match(target_names, names)
    found = ours(source[np.asarray(matched.source_ids)], target[np.asarray(matched.target_ids)])
    table, mask = vocabulary_module.moved_rows(
        jnp.asarray(source), jnp.asarray(found), matched, size=23
    )
    np.testing.assert_allclose(table[:21], target[:21], atol=1e-4)
    assert mask[:, 0].tolist() == [1] * 21 + [0, 0]

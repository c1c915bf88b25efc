"""The paired bootstrap: against scipy, against its own definition, and whether 95 % means 95 %."""

import numpy as np
import pytest
import scipy.stats

from ot_merge_jax.evaluate.compare import Difference, paired_bootstrap
from ot_merge_jax.evaluate.nll import Scores


def scores(nll, tokens=None, sizes=None):
    """Scores of documents of ten tokens and forty bytes each, unless said otherwise."""
    nll = np.asarray(nll, np.float64)
    tokens = np.full(len(nll), 10) if tokens is None else np.asarray(tokens)
    return Scores(nll, tokens, np.full(len(nll), 40) if sizes is None else np.asarray(sizes))


@pytest.fixture
def pair(rng):
    """Two models on 30 documents of unequal length, correlated as models are."""
    tokens = rng.integers(5, 200, 30)
    hard = rng.normal(3, 0.5, 30)
    a, b = ((hard + rng.normal(0, 0.1, 30)) * tokens for _ in range(2))
    sizes = 4 * tokens
    return scores(a, tokens, sizes), scores(b, tokens, sizes)


def test_the_difference_is_first_minus_second(pair):
    a, b = pair
    found = paired_bootstrap(a, b, draws=100)
    assert found.difference == pytest.approx(a.nll_per_token - b.nll_per_token, rel=1e-9)
    worse = scores(a.nll + a.tokens, a.tokens, a.bytes)
    assert paired_bootstrap(worse, a).low == pytest.approx(1)
    assert paired_bootstrap(a, worse).high == pytest.approx(-1)


def test_bits_per_byte(pair):
    a, b = pair
    found = paired_bootstrap(a, b, metric="bits_per_byte", draws=100)
    assert found.difference == pytest.approx(a.bits_per_byte - b.bits_per_byte, rel=1e-9)
    in_nats = paired_bootstrap(a, b, draws=100)
    ratio = a.tokens.sum() / (a.bytes.sum() * np.log(2))
    assert found.low == pytest.approx(in_nats.low * ratio, rel=1e-6)  # 4 bytes a token everywhere


def test_the_interval_is_scipys_on_equal_documents(rng):
    """The mean of equal documents: the percentile bootstrap, up to the noise of 10 000 draws."""
    a, b = rng.normal(30, 3, 40), rng.normal(29, 3, 40)
    found = paired_bootstrap(scores(a), scores(b))
    theirs = scipy.stats.bootstrap(
        ((a - b) / 10,), np.mean, n_resamples=10_000, method="percentile", rng=rng
    ).confidence_interval
    width = theirs.high - theirs.low
    assert found.low == pytest.approx(theirs.low, abs=0.04 * width)
    assert found.high == pytest.approx(theirs.high, abs=0.04 * width)


def test_long_documents_count_for_more(rng):
    """A ratio of sums in every draw, against scipy with the two sums drawn together."""
    tokens = rng.integers(1, 400, 40)
    a = rng.normal(3, 0.3, 40) * tokens
    b = rng.normal(3, 0.3, 40) * tokens
    found = paired_bootstrap(scores(a, tokens), scores(b, tokens))
    theirs = scipy.stats.bootstrap(
        (a - b, tokens.astype(float)),
        lambda change, size, axis: change.sum(axis) / size.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=10_000,
        method="percentile",
        rng=rng,
    ).confidence_interval
    width = theirs.high - theirs.low
    assert found.low == pytest.approx(theirs.low, abs=0.04 * width)
    assert found.high == pytest.approx(theirs.high, abs=0.04 * width)


def test_pairing_matters(rng):
    """Hard documents are hard for both: the interval is that of the differences, far narrower."""
    hard = rng.normal(30, 10, 40)
    a, b = scores(hard + rng.normal(0, 0.1, 40)), scores(hard + rng.normal(0, 0.1, 40))
    found = paired_bootstrap(a, b)
    assert found.high - found.low < 0.02
    unpaired = paired_bootstrap(a, scores(b.nll[::-1]))
    assert unpaired.high - unpaired.low > 0.2


def test_equal_models_differ_by_exactly_nothing(pair):
    assert paired_bootstrap(pair[0], pair[0]) == Difference(0.0, 0.0, 0.0)


def test_swapping_the_models_mirrors(pair):
    one, other = paired_bootstrap(*pair, draws=1000), paired_bootstrap(*pair[::-1], draws=1000)
    np.testing.assert_allclose(other, [-one.difference, -one.high, -one.low], rtol=1e-9)


def test_the_interval_is_ordered_and_holds_the_difference(pair):
    found = paired_bootstrap(*pair)
    assert found.low < found.difference < found.high


def test_a_seed_reproduces(pair):
    one = paired_bootstrap(*pair, seed=1)
    assert paired_bootstrap(*pair, seed=1) == one
    assert paired_bootstrap(*pair, seed=2) != one
    assert paired_bootstrap(*pair, seed=2).difference == one.difference


@pytest.mark.parametrize("draws", [1, 499, 500, 501, 1700])
def test_any_number_of_draws(pair, draws):
    found = paired_bootstrap(*pair, draws=draws)
    assert np.isfinite(found).all()
    assert found.low <= found.high
    assert (found.low == found.high) == (draws == 1)


def test_one_document_has_no_spread():
    assert paired_bootstrap(scores([20.0]), scores([30.0])) == Difference(-1.0, -1.0, -1.0)


def test_coverage(rng):
    """300 studies of 40 documents, true difference 0.2: about 95 % of the intervals hold it."""
    hits = 0
    for seed in range(300):
        b = rng.normal(30, 5, 40)
        a = b + 2 + rng.normal(0, 1.5, 40)
        found = paired_bootstrap(scores(a), scores(b), draws=500, seed=seed)
        hits += found.low <= 0.2 <= found.high
    assert 0.89 < hits / 300 < 0.985


def test_no_difference_is_seldom_measurable(rng):
    hits = 0
    for seed in range(300):
        b = rng.normal(30, 5, 40)
        found = paired_bootstrap(
            scores(b + rng.normal(0, 1.5, 40)), scores(b), draws=500, seed=seed
        )
        hits += found.low > 0 or found.high < 0
    assert hits / 300 < 0.11


def test_other_documents_raise(pair):
    a, _ = pair
    fewer = scores(a.nll[1:], a.tokens[1:], a.bytes[1:])
    for metric in ("nll_per_token", "bits_per_byte"):
        with pytest.raises(ValueError, match="same documents"):
            paired_bootstrap(a, fewer, metric=metric)


def test_other_tokens_compare_by_byte_only(pair):
    a, b = pair
    recut = scores(b.nll, b.tokens + 1, b.bytes)
    with pytest.raises(ValueError, match="equal tokens"):
        paired_bootstrap(a, recut)
    found = paired_bootstrap(a, recut, metric="bits_per_byte")
    assert found == paired_bootstrap(a, b, metric="bits_per_byte")


def test_other_bytes_raise(pair):
    a, b = pair
    with pytest.raises(ValueError, match="same documents"):
        paired_bootstrap(a, scores(b.nll, b.tokens, b.bytes + 1), metric="bits_per_byte")

"""Bootstrap, McNemar and Holm: against scipy, a textbook, and whether 95 % means 95 %."""

import numpy as np
import pytest
import scipy.stats

from ot_merge_jax.evaluation import statistics
from ot_merge_jax.evaluation.nll import Scores
from ot_merge_jax.evaluation.statistics import MeanDifference, paired_bootstrap


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
    assert paired_bootstrap(pair[0], pair[0]) == MeanDifference(0.0, 0.0, 0.0)


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
    assert paired_bootstrap(scores([20.0]), scores([30.0])) == MeanDifference(-1.0, -1.0, -1.0)


def studies(rng, *, effect, documents=200, count=2000):
    """Nats and tokens ``[studies, documents]``: lengths and difficulties differ, as in texts.

    The true ratio is ``effect``: what a document adds is proportional to its length on average, but
    long documents gain more than short ones.
    """
    tokens = np.ceil(rng.lognormal(4.5, 0.7, (count, documents)))
    slope = 0.05 * (np.log(tokens) - 4.5)
    each = effect + slope + rng.normal(0, 0.15, tokens.shape)
    nats = each * tokens + rng.normal(0, 0.5, tokens.shape) * np.sqrt(tokens)
    long = (
        0.7**2
    )  # E[tokens log tokens] / E[tokens] - 4.5 of the lognormal, which ceil hardly moves
    return nats, tokens, effect + 0.05 * long


def test_coverage_of_ratios(rng):
    """2000 studies of 200 documents of different lengths: 95 % of the intervals hold the truth."""
    nats, tokens, truth = studies(rng, effect=-0.1)
    found = statistics.interval(nats, tokens, draws=5000)
    hits = np.mean((found.low <= truth) & (truth <= found.high))
    assert 0.93 <= hits <= 0.97


def test_coverage_of_accuracies(rng):
    """The same of right and wrong answers to 200 questions."""
    right = (rng.random((2000, 200)) < 0.7).astype(float)
    found = statistics.interval(right, np.ones_like(right), draws=2000)
    assert 0.93 <= np.mean((found.low <= 0.7) & (found.high >= 0.7)) <= 0.97


def test_many_studies_are_each_as_if_alone(rng):
    nats, tokens, _ = studies(rng, effect=0, documents=7, count=3)
    together = statistics.interval(nats, tokens, draws=600, seed=3)
    for index in range(3):
        alone = statistics.interval(nats[index], tokens[index], draws=600, seed=3)
        np.testing.assert_allclose([one[index] for one in together], alone, rtol=1e-12)


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


# ---- p-values ----


def test_bootstrap_p_agrees_with_the_interval(rng):
    """Below 0.05 where the interval excludes 0, above where it holds it."""
    decided = []
    for effect in (0.0, 0.01, 0.02, 0.03, -0.1):
        nats, tokens, _ = studies(rng, effect=effect - studies(rng, effect=0, count=1)[2], count=1)
        p = statistics.p_value(nats[0], tokens[0])
        found = statistics.interval(nats[0], tokens[0])
        excludes = bool(found.low > 0 or found.high < 0)
        decided.append(excludes)
        if abs(p - 0.05) > 0.002:
            assert (p < 0.05) == excludes
    assert len(set(decided)) == 2


def test_bootstrap_p_is_uniform_where_nothing_differs(rng):
    nats = rng.normal(0, 1, (400, 60))
    found = np.array([statistics.p_value(one, np.ones(60), draws=400) for one in nats])
    assert 0.02 < (found < 0.05).mean() < 0.09
    assert 0.4 < (found < 0.5).mean() < 0.6


def test_bootstrap_p_is_never_0_and_at_most_1():
    assert statistics.p_value(np.ones(9), np.ones(9), draws=99) == 0.02
    assert statistics.p_value(np.zeros(9), np.ones(9), draws=99) == 1


@pytest.mark.parametrize(("documents", "least"), [(1, 1), (2, 0.5), (5, 0.0625)])
def test_few_documents_cannot_show_much(documents, least):
    """However clear each of them is."""
    assert statistics.p_value(np.ones(documents), np.ones(documents)) == least


def test_no_document_raises():
    with pytest.raises(ValueError, match="no document"):
        statistics.interval(np.ones(0), np.ones(0))


# ---- McNemar ----


def answers(both, only_a, only_b, neither):
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return a, b


def test_mcnemar_by_hand():
    """1 against 8 of 9: 2 (1 + 9) / 2^9."""
    found = statistics.mcnemar(*answers(20, 1, 8, 3))
    assert found == (1, 8, pytest.approx(20 / 512, rel=1e-12))


@pytest.mark.parametrize(
    ("only_a", "only_b"), [(0, 1), (3, 3), (5, 0), (4, 12), (70, 41), (900, 1000)]
)
def test_mcnemar_is_scipys_binomial_test(only_a, only_b):
    found = statistics.mcnemar(*answers(7, only_a, only_b, 11))
    assert (found.only_a, found.only_b) == (only_a, only_b)
    theirs = scipy.stats.binomtest(only_a, only_a + only_b).pvalue
    assert found.p == pytest.approx(theirs, rel=1e-9)
    assert statistics.mcnemar(*answers(7, only_b, only_a, 11)).p == found.p


def test_models_that_never_disagree():
    assert statistics.mcnemar(*answers(4, 0, 0, 4)) == (0, 0, 1)


def test_other_questions_raise():
    with pytest.raises(ValueError, match="same questions"):
        statistics.mcnemar([True], [True, False])


def test_outcomes_of_right_and_wrong_are_tested_by_mcnemar():
    a, b = (np.array(one, float) for one in answers(10, 9, 1, 10))
    found = statistics.outcomes((a, np.ones(30)), (b, np.ones(30)))
    assert found["difference"] == pytest.approx(8 / 30)
    assert found["low"] < found["difference"] < found["high"]
    assert (found["only_a"], found["only_b"]) == (9, 1)
    assert found["p"] == pytest.approx(scipy.stats.binomtest(9, 10).pvalue)


def test_outcomes_of_scores_are_tested_by_the_bootstrap(rng):
    a = rng.random(30)
    found = statistics.outcomes((a + 0.01, np.ones(30)), (a, np.ones(30)))
    assert set(found) == {"difference", "low", "high", "p"}
    assert found["difference"] == pytest.approx(0.01)
    assert found["p"] < 0.001


def test_outcomes_of_other_documents_raise():
    with pytest.raises(ValueError, match="same documents"):
        statistics.outcomes((np.ones(2), np.ones(2)), (np.ones(2), np.array([1.0, 2.0])))


# ---- Holm ----


def test_holm_of_the_textbook():
    """The worked example of Wikipedia's article: at 5 % the first and the last are rejected."""
    found = statistics.holm([0.01, 0.04, 0.03, 0.005])
    np.testing.assert_allclose(found, [0.03, 0.06, 0.06, 0.02], rtol=1e-12)


def test_holm_never_exceeds_1_and_leaves_one_test_alone():
    assert statistics.holm([0.6, 0.7]) == [1, 1]
    assert statistics.holm([0.04]) == [0.04]
    assert statistics.holm([]) == []


def test_holm_keeps_false_alarms_rare(rng):
    """Five tasks without a difference: one of them below 0.05 in at most 5 % of the studies."""
    p = rng.random((4000, 5))
    alarms = np.mean([min(statistics.holm(one)) < 0.05 for one in p])
    assert 0.035 < alarms < 0.06
    assert (p.min(1) < 0.05).mean() > 0.2


def test_pairs_are_adjusted_over_tasks_and_not_over_pairs():
    tasks = {
        "one": [{"a": "x", "b": "y", "p": 0.01}, {"a": "x", "b": "z", "p": 0.3}],
        "two": [{"a": "x", "b": "y", "p": 0.04}],
    }
    found = statistics.adjusted(tasks)
    assert [one["p_holm"] for one in found["one"]] == [0.02, 0.3]
    assert [one["p_holm"] for one in found["two"]] == [0.04]
    assert "p_holm" not in tasks["one"][0]

"""How sure a difference is: bootstrap over documents, McNemar, Holm. Imports nll.

Everything here is paired: models are compared on the same documents or questions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import special

from ot_merge_jax.evaluation.nll import Scores

#: No interval of fewer documents can be trusted: all of them agree in sign by chance in more than
#: 5 % of studies, ``2^(1-n)``.
FEWEST = 6
_DRAWS = 10_000
_DRAWS_AT_ONCE = 500
Metric = Literal["nll_per_token", "bits_per_byte"]


class MeanDifference(NamedTuple):
    """A difference with its 95 % interval; it is measurable if the interval excludes 0.

    Attributes:
        difference: First minus second.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    difference: float
    low: float
    high: float


class Interval(NamedTuple):
    """A ratio of sums with its 95 % interval.

    Attributes:
        value: The ratio, ``[...]``.
        low: Lower end.
        high: Upper end.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


class McNemar(NamedTuple):
    """Two models on the same questions.

    Attributes:
        only_a: Questions that only the first answers rightly.
        only_b: Questions that only the second does.
        p: Two-sided p-value of "both are right equally often".
    """

    only_a: int
    only_b: int
    p: float


def interval(
    sums: np.ndarray, sizes: np.ndarray, *, draws: int = _DRAWS, seed: int = 0
) -> Interval:
    """Bootstrap interval of ``sum(sums) / sum(sizes)`` over documents drawn with replacement.

    Args:
        sums: What each document adds to the numerator, ``[..., documents]``, e.g. nats; leading
            axes are separate studies, which share the draws.
        sizes: What it adds to the denominator, of the same shape, e.g. tokens.
        draws: Bootstrap samples.
        seed: Seed of the draws.

    Returns:
        The ratio and the 2.5 % and 97.5 % quantiles of the draws, ``[...]`` each.

    Raises:
        ValueError: if there is no document.

    Example:
        >>> estimate = interval(np.array([1.0, 1.0, 4.0]), np.array([1.0, 1.0, 4.0]))
        >>> [float(number) for number in estimate]
        [1.0, 1.0, 1.0]

    Source: Efron and Tibshirani 1993. Differs: a ratio of sums, so long documents count for more.
    """
    ratios = np.concatenate(list(_draws(sums, sizes, draws=draws, seed=seed)))
    low, high = np.quantile(ratios, [0.025, 0.975], axis=0)
    return Interval(sums.sum(-1) / sizes.sum(-1), low, high)


def p_value(sums: np.ndarray, sizes: np.ndarray, *, draws: int = _DRAWS, seed: int = 0) -> float:
    """Two-sided bootstrap p-value of "the ratio is 0", from the same draws as `interval`.

    Twice the share of draws on the other side of 0; the data themselves count as one draw, so that
    it is never 0. It is at least ``2^(1-n)``, the probability that all ``n`` documents happen to
    agree.

    Args:
        sums: What each document adds to the numerator, ``[documents]``, e.g. the difference of two
            models in nats.
        sizes: What it adds to the denominator.
        draws: Bootstrap samples.
        seed: Seed of the draws.

    Returns:
        A value in (0, 1].

    Example:
        >>> p_value(np.ones(16), np.ones(16), draws=999), p_value(np.ones(1), np.ones(1))
        (0.002, 1.0)

    Source: Davison and Hinkley 1997, section 4.2 (the +1). Differs: the interval is
    inverted; no null distribution is drawn.
    """
    below = above = 0
    for ratios in _draws(sums, sizes, draws=draws, seed=seed):
        below, above = below + int((ratios <= 0).sum()), above + int((ratios >= 0).sum())
    share = 2 * (1 + min(below, above)) / (1 + draws)
    return min(1.0, max(share, 0.5 ** (len(sums) - 1)))


def _draws(sums: np.ndarray, sizes: np.ndarray, *, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Ratios of drawn documents, ``[some draws, ...]``."""
    count = sums.shape[-1]
    if not count:
        raise ValueError("There is no document to draw.")
    rng = np.random.default_rng(seed)
    for start in range(0, draws, _DRAWS_AT_ONCE):
        drawn = rng.integers(0, count, (min(_DRAWS_AT_ONCE, draws - start), count))
        # how often each document is drawn: one product for many studies, not a gather for each
        first = count * np.arange(len(drawn))[:, None]
        times = np.bincount((first + drawn).ravel(), minlength=drawn.size).reshape(drawn.shape)
        times = times.astype(np.float64)
        yield np.tensordot(times, sums, (1, -1)) / np.tensordot(times, sizes, (1, -1))


def paired(a: Scores, b: Scores, *, metric: Metric) -> tuple[np.ndarray, np.ndarray]:
    """What each document adds to numerator and denominator of ``a - b``, as `interval` takes them.

    Raises:
        ValueError: if the documents, or for ``nll_per_token`` their token counts, differ.
    """
    is_loss = metric == "nll_per_token"
    size_a, size_b = (scores.tokens if is_loss else scores.bytes * np.log(2) for scores in (a, b))
    if len(size_a) != len(size_b) or not np.allclose(size_a, size_b):
        raise ValueError(
            "Models can only be compared on the same documents, cut into equal tokens."
        )
    return a.nll - b.nll, size_a


def paired_bootstrap(
    a: Scores, b: Scores, *, metric: Metric = "nll_per_token", draws: int = _DRAWS, seed: int = 0
) -> MeanDifference:
    """Bootstrap interval of ``a - b`` over documents that both models scored.

    Documents are drawn with replacement, the same ones for both models, and the metric is taken
    over all tokens (or bytes) of the drawn documents.

    Args:
        a: Scores of the first model.
        b: Scores of the second, of the same documents.
        metric: ``nll_per_token`` in nats (same tokenizer only) or ``bits_per_byte``.
        draws: Bootstrap samples.
        seed: Seed of the draws.

    Returns:
        The difference and the 2.5 % and 97.5 % quantiles of the draws.

    Raises:
        ValueError: if the documents, or for ``nll_per_token`` their token counts, differ.

    Example:
        >>> count = np.full(4, 10)
        >>> better, worse = (Scores(np.full(4, x), count, count) for x in (20.0, 30.0))
        >>> paired_bootstrap(better, worse)
        MeanDifference(difference=-1.0, low=-1.0, high=-1.0)

    Source: see `interval`.
    """
    estimate = interval(*paired(a, b, metric=metric), draws=draws, seed=seed)
    return MeanDifference(*map(float, estimate))


def mcnemar(a: Sequence[bool] | np.ndarray, b: Sequence[bool] | np.ndarray) -> McNemar:
    """McNemar's exact test of two models on the same questions.

    Only questions count that one model answers rightly and the other wrongly; if both are equally
    good, each of them wins such a question with probability one half.

    Args:
        a: Whether the first model answers each question rightly.
        b: Whether the second does.

    Returns:
        The counts and the two-sided p-value, which is 1 if they never disagree.

    Raises:
        ValueError: if the numbers of questions differ.

    Example:
        >>> mcnemar([True] * 5 + [False], [False] * 6)
        McNemar(only_a=5, only_b=0, p=0.0625)

    Source: McNemar 1947. Differs: the exact binomial at every count, not the chi-square.
    """
    first, second = np.asarray(a, bool), np.asarray(b, bool)
    if first.shape != second.shape:
        raise ValueError("Models can only be compared on the same questions.")
    only_a, only_b = int((first & ~second).sum()), int((second & ~first).sum())
    tail = special.bdtr(min(only_a, only_b), only_a + only_b, 0.5)
    return McNemar(only_a, only_b, min(1.0, 2 * float(tail)))


def holm(p_values: Sequence[float] | np.ndarray) -> list[float]:
    """Adjusts p-values of several tests, so that one of them below 0.05 by chance stays rare.

    Args:
        p_values: A p-value for each task.

    Returns:
        The adjusted p-values, in the same order.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]

    Source: Holm 1979. Differs: nothing.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * float(p_values[index])))
        adjusted[index] = largest
    return adjusted


def every_pair(
    scores: Mapping[str, Scores], has_one_tokenizer: Callable[[str, str], bool], *, seed: int = 0
) -> list[dict[str, Any]]:
    """The difference of every pair of models.

    Args:
        scores: Name -> scores, all of the same documents.
        has_one_tokenizer: Whether two of them share a tokenizer; if not, bytes are compared.
        seed: Seed of the bootstrap.

    Returns:
        ``{a, b, metric, difference, low, high}``, ``a`` minus ``b``.
    """
    pairs = []
    for a, b in name_pairs(scores):
        metric: Metric = "nll_per_token" if has_one_tokenizer(a, b) else "bits_per_byte"
        change = paired_bootstrap(scores[a], scores[b], metric=metric, seed=seed)
        pairs.append({"a": a, "b": b, "metric": metric, **change._asdict()})
    return pairs


def name_pairs(names: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every pair of names, in their order.

    Example:
        >>> name_pairs({"x": 0, "y": 0, "z": 0})
        [('x', 'y'), ('x', 'z'), ('y', 'z')]
    """
    return list(itertools.combinations(names, 2))


def outcomes(
    a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray], *, seed: int = 0
) -> dict[str, Any]:
    """Two models on the same questions or documents, as JSON values.

    Args:
        a: For the first model, what each document adds to the numerator of its score, e.g. whether
            it is right, and to the denominator, e.g. 1; ``[documents]`` each.
        b: The same for the second.
        seed: Seed of the bootstrap.

    Returns:
        ``{difference, low, high, p}``, the ratio of ``a`` minus that of ``b``. Where every document
        is right or wrong and counts for 1, ``p`` is McNemar's, and its counts ``{only_a, only_b}``
        are added; else ``p`` is the bootstrap's.

    Raises:
        ValueError: if the documents differ.

    Example:
        >>> each = np.ones(3)
        >>> difference = outcomes((np.array([1, 1, 0]), each), (np.array([0, 1, 0]), each))
        >>> difference["only_a"], difference["only_b"], difference["p"]
        (1, 0, 1.0)
    """
    (sums_a, sizes), (sums_b, sizes_b) = a, b
    if not np.array_equal(sizes, sizes_b):
        raise ValueError("Models can only be compared on the same documents.")
    change = np.subtract(sums_a, sums_b, dtype=float)
    difference = MeanDifference(*map(float, interval(change, sizes, seed=seed)))._asdict()
    if (sizes == 1).all() and np.isin([sums_a, sums_b], (0, 1)).all():
        return difference | mcnemar(sums_a, sums_b)._asdict()
    return difference | {"p": p_value(change, sizes, seed=seed)}


def adjusted(tasks: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Pairs with ``p_holm``, their ``p`` adjusted over the tasks.

    Args:
        tasks: Task -> its pairs, from `outcomes`. Pairs whose strings are equal (two models, a
            metric) are one comparison on several tasks.

    Returns:
        The same pairs with the key added.
    """

    def names(pair: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(value for value in pair.values() if isinstance(value, str))

    together: dict[tuple[str, ...], list[float]] = {}
    for pair in itertools.chain(*tasks.values()):
        together.setdefault(names(pair), []).append(pair["p"])
    ready = {key: iter(holm(values)) for key, values in together.items()}
    return {
        task: [{**pair, "p_holm": next(ready[names(pair)])} for pair in pairs]
        for task, pairs in tasks.items()
    }

"""How sure a difference between two models is: paired bootstrap over documents. Imports nll."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from ot_merge_jax.evaluate.nll import Scores

_DRAWS_AT_ONCE = 500
Metric = Literal["nll_per_token", "bits_per_byte"]


class Difference(NamedTuple):
    """A difference with its 95 % interval; it is measurable if the interval excludes 0.

    Attributes:
        difference: First minus second.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    difference: float
    low: float
    high: float


def paired_bootstrap(
    a: Scores, b: Scores, *, metric: Metric = "nll_per_token", draws: int = 10_000, seed: int = 0
) -> Difference:
    """Bootstrap interval of ``a - b`` over documents that both models scored.

    Documents are drawn with replacement, the same ones for both models, and the metric is taken
    over all tokens (or bytes) of the drawn documents.

    Args:
        a: Scores of the first model.
        b: Scores of the second, of the same documents.
        metric: ``nll_per_token`` in nats (same tokenizer only) or ``bits_per_byte``.
        draws: Bootstrap samples.
        seed: Of the draws.

    Returns:
        The difference and the 2.5 % and 97.5 % quantiles of the draws.

    Raises:
        ValueError: if the documents, or for ``nll_per_token`` their token counts, differ.

    Example:
        >>> count = np.full(4, 10)
        >>> better, worse = (Scores(np.full(4, x), count, count) for x in (20.0, 30.0))
        >>> paired_bootstrap(better, worse)
        Difference(difference=-1.0, low=-1.0, high=-1.0)

    Source: Efron and Tibshirani 1993. Differs: a ratio of sums, so long documents count for more.
    """
    is_loss = metric == "nll_per_token"
    size_a, size_b = (one.tokens if is_loss else one.bytes * np.log(2) for one in (a, b))
    if len(size_a) != len(size_b) or not np.allclose(size_a, size_b):
        raise ValueError(
            "Models can only be compared on the same documents, cut into equal tokens."
        )
    change = a.nll - b.nll
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, draws, _DRAWS_AT_ONCE):
        count = min(_DRAWS_AT_ONCE, draws - start)
        drawn = rng.integers(0, len(change), (count, len(change)))
        means.append(change[drawn].sum(1) / size_a[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Difference(float(change.sum() / size_a.sum()), float(low), float(high))


def every_pair(
    scores: Mapping[str, Scores], has_one_tokenizer: Callable[[str, str], bool], *, seed: int = 0
) -> list[dict[str, Any]]:
    """Each of several models against each that comes after it.

    Args:
        scores: Name -> scores, all of the same documents.
        has_one_tokenizer: Whether two of them share a tokenizer; if not, bytes are compared.
        seed: Of the bootstrap.

    Returns:
        ``{a, b, metric, difference, low, high}``, ``a`` minus ``b``.
    """
    pairs, names = [], list(scores)
    for index, a in enumerate(names):
        for b in names[index + 1 :]:
            metric: Metric = "nll_per_token" if has_one_tokenizer(a, b) else "bits_per_byte"
            change = paired_bootstrap(scores[a], scores[b], metric=metric, seed=seed)
            pairs.append({"a": a, "b": b, "metric": metric, **change._asdict()})
    return pairs

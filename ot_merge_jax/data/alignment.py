"""Which token of one model corresponds to which of the other: where tokens end, and the rows.

Knows neither tokenizers nor models: texts, character spans and positions in; positions out.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Span = tuple[int, int]
#: Where a token ends: (which range of the text, characters of that range up to there).
TokenEnd = tuple[int, int]


class Rows(NamedTuple):
    """Rows of both models, for each document its token positions and its row ids.

    Attributes:
        target: Token positions (-1: the mean over the document) and row ids in the target.
        source: The same for the source; equal ids correspond.
        total: Rows kept.
        total_before: Rows before the subsample.
    """

    target: list[tuple[list[int], list[int]]]
    source: list[tuple[list[int], list[int]]]
    total: int
    total_before: int


def token_ends(
    text: str,
    offsets: Sequence[Span],
    *,
    is_special: Sequence[bool],
    beyond: Sequence[Span] = (),
    contents: Sequence[Span] | None = None,
) -> dict[TokenEnd, int]:
    """Where tokens end in a text, and which token ends there.

    Of several tokens that end at one character (pieces of its bytes) the last counts: only that one
    has read the whole character. No token ends inside another, nor where the rest of its
    character was cut off. Leading white space does not belong to a token, so one that is white
    space alone ends nowhere.

    Args:
        text: What was tokenised.
        offsets: ``(start, stop)`` characters of each token, as fast tokenizers give them.
        is_special: True for tokens that give no row.
        beyond: Offsets of tokens after the last one, which the model does not read.
        contents: ``(start, stop)`` character ranges that count, ascending and apart, e.g. the
            messages of a rendered chat; None: the whole text.

    Returns:
        ``{(range, characters into it): token}`` in the order of the tokens. Texts that share the
        contents of their ranges but not what lies between have comparable keys.

    Example:
        >>> token_ends("to 河!", [(0, 2), (2, 3), (3, 4), (3, 4), (4, 5)], is_special=[False] * 5)
        {(0, 2): 0, (0, 4): 3, (0, 5): 4}
        >>> token_ends("to 河!", [(0, 2), (2, 3), (3, 4)], is_special=[False] * 3, beyond=[(3, 4)])
        {(0, 2): 0}

    Source: method: Activations, rows ``span``.
    """
    contents = [(0, len(text))] if contents is None else contents
    starts = [start for start, _ in contents]
    spans = [*offsets, *beyond]
    last = {stop: token for token, (_, stop) in enumerate(spans)}
    inside = {place for start, stop in spans for place in range(start + 1, stop)}
    ends = {}
    for token, (start, stop) in enumerate(offsets):
        if is_special[token] or last[stop] != token or stop in inside:
            continue
        content = bisect_left(starts, stop) - 1
        if content >= 0 and stop <= contents[content][1] and text[start:stop].strip():
            ends[content, stop - starts[content]] = token
    return ends


def common_boundaries(
    target: Mapping[TokenEnd, int], source: Mapping[TokenEnd, int]
) -> list[tuple[int, int]]:
    """(target token, source token) of every place where both tokenizations end a token.

    Example:
        >>> common_boundaries({(0, 2): 0, (0, 4): 3, (0, 5): 4}, {(0, 1): 0, (0, 2): 1, (0, 5): 2})
        [(0, 1), (4, 2)]
    """
    return [(token, source[place]) for place, token in target.items() if place in source]


def subsample(pairs: Sequence[Sequence[tuple[int, int]]], *, max_rows: int, seed: int) -> Rows:
    """Numbers the rows of all documents, a seeded subsample where there are too many.

    Args:
        pairs: For each document the (target, source) token positions of its rows.
        max_rows: Rows kept at most.
        seed: Of the subsample.

    Returns:
        Rows with ids ``0 .. total - 1`` in the order of documents and tokens.

    Example:
        >>> subsample([[(0, 0), (1, 2)], [], [(3, 4)]], max_rows=9, seed=0).source
        [([0, 2], [0, 1]), ([], []), ([4], [2])]
    """
    count = sum(map(len, pairs))
    keep = np.ones(count, bool)
    if count > max_rows:
        keep[:] = False
        keep[np.random.default_rng(seed).permutation(count)[:max_rows]] = True
    target, source = [], []
    start = row = 0
    for document in pairs:
        marks = keep[start : start + len(document)]
        rows = [pair for pair, mark in zip(document, marks, strict=True) if mark]
        ids = list(range(row, row + len(rows)))
        target.append(([t for t, _ in rows], ids))
        source.append(([s for _, s in rows], ids))
        start, row = start + len(document), row + len(rows)
    return Rows(target, source, row, count)

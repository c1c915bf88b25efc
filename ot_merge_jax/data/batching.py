"""Token lists as padded batches of few shapes, so that few programs are compiled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ot_merge_jax.types import Batch

TOKENS_PER_BATCH = 4096


_SHORTEST = 16


def batches(
    sequences: Sequence[Sequence[int]], rows: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[Batch]:
    """Pads token sequences into batches of few shapes; sequences without rows are left out.

    Args:
        sequences: Token ids of each document.
        rows: For each document the positions of its rows (-1: the mean) and their row ids.

    Returns:
        Right-padded batches; the last of each length is filled up with empty sequences.

    Example:
        >>> [batch] = batches([[5, 6, 7], [8]], [([0, 2], [0, 1]), ([-1], [2])])
        >>> batch.tokens.shape, batch.mask.sum(1).tolist(), batch.row_id[:, :2].tolist()
        ((2, 16), [3, 1], [[0, 1], [2, -1]])
    """
    members = [index for index, (_, ids) in enumerate(rows) if ids]
    widest = _power_of_two(max((len(rows[index][1]) for index in members), default=1))
    padded = []
    for group in grouped({index: len(sequences[index]) for index in members}):
        shape = (group.size, group.length)
        tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
        width = min(widest, group.length)
        position = np.zeros((group.size, width), np.int32)
        row_id = np.full((group.size, width), -1, np.int32)
        for place, index in enumerate(group.members):
            positions, ids = rows[index]
            tokens[place, : len(sequences[index])] = sequences[index]
            mask[place, : len(sequences[index])] = True
            position[place, : len(ids)], row_id[place, : len(ids)] = positions, ids
        padded.append(Batch(tokens, mask, position, row_id))  # pyright: ignore[reportArgumentType]
    return padded


class Group(NamedTuple):
    """Sequences that share a batch.

    Attributes:
        length: Tokens they are padded to.
        size: Sequences of the batch; more than there are members if the last is not full.
        members: Which sequences.
    """

    length: int
    size: int
    members: list[int]


def grouped(lengths: Mapping[int, int], *, longest: int | None = None) -> list[Group]:
    """Groups sequences of like length into batches of few shapes, since each shape compiles anew.

    Lengths are powers of two. A length that does not fill one batch joins the next longer one.

    Args:
        lengths: Sequence -> its tokens.
        longest: Upper limit of the padded length, e.g. a model's context.

    Returns:
        Groups, shorter ones first.

    Example:
        >>> [(g.length, g.size, g.members) for g in grouped({0: 100, 1: 20, 2: 70})]
        [(128, 4, [0, 1, 2])]
    """
    buckets: dict[int, list[int]] = defaultdict(list)
    for index, length in lengths.items():
        padded = _power_of_two(max(length, _SHORTEST))
        buckets[min(padded, longest or padded)].append(index)
    groups, waiting = [], []
    for length in sorted(buckets):
        waiting = sorted(waiting + buckets[length])
        size = max(1, TOKENS_PER_BATCH // length)
        if length < max(buckets) and len(waiting) < size:
            continue
        size = min(size, _power_of_two(len(waiting)))
        groups += [
            Group(length, size, waiting[start : start + size])
            for start in range(0, len(waiting), size)
        ]
        waiting = []
    return groups


def _power_of_two(size: int) -> int:
    """The smallest power of two that is at least ``size``."""
    return 1 << max(0, size - 1).bit_length()

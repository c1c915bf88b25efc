"""From documents to blocks of tokens: which tokens count, packing, batches by their number.

A batch is a function of its number and the seed, so the position in the data is one integer and
there is no hidden state. Imports data and losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ot_merge_jax.data import alignment, chat, vocabulary
from ot_merge_jax.data.chat import Chat, Document
from ot_merge_jax.errors import InputError
from ot_merge_jax.training.losses import Examples, Pairs

#: The role whose messages are learned in a chat.
RESPONDER = "assistant"
#: Universal distillation is refused where fewer tokens than this end at a common place.
FEWEST_ALIGNED = 0.3


class TrainingTokens(NamedTuple):
    """A tokenised document.

    Attributes:
        ids: Token ids, after the prefix that evaluation puts before a document too.
        loss_mask: Whether the prediction of each token counts.
        is_special: Whether each token is special.
        ends: Where tokens end (`alignment.token_ends`); empty unless asked for.
    """

    ids: list[int]
    loss_mask: list[bool]
    is_special: list[bool]
    ends: dict[alignment.TokenEnd, int]


class PairBlocks(NamedTuple):
    """The same blocks in the teacher's tokens; places are -1 where there are none.

    Attributes:
        tokens: The teacher's.
        mask: Which of them are real.
        position: Places in the student's block.
        source_position: The same places in the teacher's.
        target_matched: Fraction of the student's ordinary tokens that end at such a place.
        source_matched: The same for the teacher's tokens.
    """

    tokens: np.ndarray
    mask: np.ndarray
    position: np.ndarray
    source_position: np.ndarray
    target_matched: float
    source_matched: float


class Blocks(NamedTuple):
    """Documents cut into blocks of one length.

    Attributes:
        tokens: ``[n, s]`` int32.
        mask: ``[n, s]`` which tokens are real.
        loss_mask: ``[n, s]`` whether the prediction of each token counts.
        pairs: For a teacher with another vocabulary; else None.
    """

    tokens: np.ndarray
    mask: np.ndarray
    loss_mask: np.ndarray
    pairs: PairBlocks | None = None

    @property
    def count(self) -> int:
        """How many tokens are predicted."""
        return int(_predicted(self).sum())


def tokenize_for_training(
    document: Document, tokenizer: Any, *, responses_only: bool = True, has_ends: bool = False
) -> TrainingTokens:
    """Tokenises a document and says which tokens count.

    As in evaluation, the prefix (BOS, else EOS) is added unless the tokenizer or the template
    already writes it. Its prediction does not count, unless it is the EOS, which then ends the
    previous document.

    Args:
        document: A text or a chat.
        tokenizer: The model's tokenizer.
        responses_only: Whether in a chat only the assistant's messages count, each with the special
            token after it that ends a turn. In a text every token counts.
        has_ends: Whether to say where tokens end.

    Returns:
        The tokens.

    Raises:
        InputError: if offsets are needed and the tokenizer is slow, or a chat cannot be rendered.
    """
    rendered = chat.render(document, tokenizer)
    is_masked = responses_only and isinstance(document, Chat)
    needs_offsets = is_masked or has_ends
    if needs_offsets and not tokenizer.is_fast:
        raise InputError(
            f"The tokenizer of {tokenizer.name_or_path} gives no character offsets of tokens (no "
            "tokenizer.json), which chats and teachers with other tokens need; use plain texts and "
            "a teacher of the same vocabulary."
        )
    encoding = tokenizer(
        rendered.text,
        add_special_tokens=not rendered.has_special,
        return_special_tokens_mask=True,
        return_offsets_mapping=needs_offsets,
        verbose=False,  # no warning about texts longer than a context: they are cut into blocks
    )
    ids, special = list(encoding["input_ids"]), vocabulary.special_ids(tokenizer)
    is_special = [
        bool(added) or token in special
        for token, added in zip(ids, encoding["special_tokens_mask"], strict=True)
    ]
    loss_mask = [True] * len(ids)
    ends: dict[alignment.TokenEnd, int] = {}
    if is_masked and isinstance(document, Chat):
        spans = [
            span
            for turn, span in zip(document.turns, rendered.contents, strict=True)
            if turn.role == RESPONDER
        ]
        loss_mask = _responses(encoding["offset_mapping"], is_special, spans)
    if has_ends:
        ends = alignment.token_ends(
            rendered.text,
            encoding["offset_mapping"],
            is_special=is_special,
            contents=rendered.contents,
        )
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    prefix = eos if bos is None else bos
    if prefix is None or not ids:
        return TrainingTokens(ids, loss_mask, is_special, ends)
    if ids[0] != prefix:
        ids, loss_mask, is_special = [prefix, *ids], [True, *loss_mask], [True, *is_special]
        ends = {place: token + 1 for place, token in ends.items()}
    loss_mask[0] = prefix == eos and not is_masked
    return TrainingTokens(ids, loss_mask, is_special, ends)


def _responses(
    offsets: Sequence[alignment.Span], is_special: Sequence[bool], spans: Sequence[alignment.Span]
) -> list[bool]:
    """Whether each token overlaps a message of the assistant, or is the special token after one."""
    loss_mask = [
        start < stop and any(start < end and begin < stop for begin, end in spans)
        for start, stop in offsets
    ]
    behind = [
        index
        for index in range(1, len(loss_mask))
        if loss_mask[index - 1] and not loss_mask[index] and is_special[index]
    ]
    return [is_counted or index in set(behind) for index, is_counted in enumerate(loss_mask)]


def pack(documents: Sequence[TrainingTokens], length: int, *, has_tail: bool = False) -> Blocks:
    """Concatenates documents and cuts them into blocks; attention sees the documents before.

    Args:
        documents: From `tokenize_for_training`.
        length: Tokens of a block.
        has_tail: Whether the incomplete last block is used, padded with masked tokens.

    Returns:
        The blocks in which a prediction counts.

    Raises:
        InputError: if the text is too short for one block, or nothing in it counts.

    Example:
        >>> document = TrainingTokens([5, 6, 7], [True] * 3, [False] * 3, {})
        >>> pack([document, document], 2).tokens.tolist()
        [[5, 6], [7, 5], [6, 7]]
    """
    return _with_predictions(_cut(documents, length, has_tail=has_tail))


def _cut(documents: Sequence[TrainingTokens], length: int, *, has_tail: bool) -> Blocks:
    """All blocks of a stream of documents."""
    ids = [token for document in documents for token in document.ids]
    loss_mask = [flag for document in documents for flag in document.loss_mask]
    mask = [True] * len(ids)
    if has_tail and ids:
        missing = -len(ids) % length
        ids, loss_mask, mask = (
            [*stream, *[nothing] * missing]
            for stream, nothing in ((ids, 0), (loss_mask, False), (mask, False))
        )
    if len(ids) < length:
        raise InputError(
            f"The text has {len(ids)} tokens to learn from, and one block has {length}; give more "
            "text or a smaller --seq-len."
        )

    def blocks(stream: list[Any], kind: Any) -> np.ndarray:
        return np.array(stream[: len(stream) // length * length], kind).reshape(-1, length)

    return Blocks(blocks(ids, np.int32), blocks(mask, bool), blocks(loss_mask, bool))


def pair(
    documents: Sequence[Document],
    tokenizer: Any,
    source_tokenizer: Any,
    *,
    length: int,
    responses_only: bool = True,
) -> Blocks:
    """Blocks of whole documents in the tokens of two models, with the places where both end one.

    Long texts are cut, near the middle and after a space where there is one, until both
    tokenizations fit; a chat that does not fit is cut at its end. As many documents as fit share a
    block.

    Args:
        documents: Texts and chats.
        tokenizer: The student's tokenizer.
        source_tokenizer: The teacher's tokenizer.
        length: Tokens of a block, for both.
        responses_only: As in `tokenize_for_training`.

    Returns:
        Blocks with ``pairs``.

    Raises:
        InputError: if too few tokens of either model end at a common place (`FEWEST_ALIGNED`), or
            nothing counts.

    Source: method: Activations, rows ``span``.
    """
    bins: list[tuple[list[TrainingTokens], list[TrainingTokens]]] = []
    filled = [length, length]
    ordinary, common = np.zeros(2, int), 0
    for document in documents:
        for both in _fitting(document, (tokenizer, source_tokenizer), length, responses_only):
            sizes = [len(tokenized.ids) for tokenized in both]
            if any(size + more > length for size, more in zip(filled, sizes, strict=True)):
                bins.append(([], []))
                filled = [0, 0]
            for members, part in zip(bins[-1], both, strict=True):
                members.append(part)
            filled = [size + more for size, more in zip(filled, sizes, strict=True)]
            ordinary += [tokenized.is_special.count(False) for tokenized in both]
            common += len(alignment.common_boundaries(both[0].ends, both[1].ends))
    matched = [float(common / max(1, count)) for count in ordinary]
    if min(matched, default=0) < FEWEST_ALIGNED:
        raise InputError(
            "Teacher and student have different vocabularies, and their tokens end at too few "
            f"common places for universal distillation: {100 * matched[0]:.0f} % of the student's "
            f"tokens and {100 * matched[1]:.0f} % of the teacher's, where "
            f"{100 * FEWEST_ALIGNED:.0f} % are needed; use --objective sft or another source."
        )
    student, teacher = (_filled([block[side] for block in bins], length) for side in (0, 1))
    places = [_places(*block) for block in bins]
    width = max(1, max(map(len, places), default=1))
    position = np.full((len(bins), width, 2), -1, np.int32)
    for row, block_places in enumerate(places):
        position[row, : len(block_places)] = np.reshape(block_places, (-1, 2))
    pairs = PairBlocks(teacher.tokens, teacher.mask, position[..., 0], position[..., 1], *matched)
    return _with_predictions(student._replace(pairs=pairs))


def _fitting(
    document: Document, tokenizers: tuple[Any, Any], length: int, responses_only: bool
) -> Iterator[tuple[TrainingTokens, TrainingTokens]]:
    """A document, or its parts, in the tokens of both models."""
    options = {"responses_only": responses_only, "has_ends": True}
    student, teacher = (
        tokenize_for_training(document, tokenizer, **options) for tokenizer in tokenizers
    )
    if max(len(student.ids), len(teacher.ids)) > length and isinstance(document, str):
        middle = len(document) // 2
        space = document.rfind(" ", 1, middle + 1)
        place = space if space > middle // 2 else middle
        if 0 < place < len(document):
            for part in (document[:place], document[place:]):
                yield from _fitting(part, tokenizers, length, responses_only)
            return
    yield _shortened(student, length), _shortened(teacher, length)


def _shortened(document: TrainingTokens, length: int) -> TrainingTokens:
    """The first ``length`` tokens of a document."""
    ends = {place: token for place, token in document.ends.items() if token < length}
    return TrainingTokens(
        document.ids[:length], document.loss_mask[:length], document.is_special[:length], ends
    )


def _filled(bins: Sequence[Sequence[TrainingTokens]], length: int) -> Blocks:
    """Each bin as one block, padded."""
    parts = [_cut(documents, length, has_tail=True) for documents in bins]
    tokens, mask, loss_mask = map(np.concatenate, zip(*(block[:3] for block in parts), strict=True))
    return Blocks(tokens, mask, loss_mask)


def _places(
    student: Sequence[TrainingTokens], teacher: Sequence[TrainingTokens]
) -> list[tuple[int, int]]:
    """Places in one bin where both models end a token and the next token counts."""
    places, begun = [], (0, 0)
    for mine, other in zip(student, teacher, strict=True):
        for here, there in alignment.common_boundaries(mine.ends, other.ends):
            is_last = here + 1 >= len(mine.ids) or there + 1 >= len(other.ids)
            if not is_last and mine.loss_mask[here + 1]:
                places.append((begun[0] + here, begun[1] + there))
        begun = begun[0] + len(mine.ids), begun[1] + len(other.ids)
    return places


def _predicted(blocks: Blocks) -> np.ndarray:
    """``[n, s]`` tokens whose prediction counts; the first of a block has nothing before it."""
    loss_mask = blocks.loss_mask & blocks.mask
    loss_mask[:, 0] = False
    return loss_mask


def _with_predictions(blocks: Blocks) -> Blocks:
    """The blocks in which something counts."""
    is_used = np.asarray(_predicted(blocks).any(1))
    if not is_used.any():
        raise InputError(
            "Nothing in the text counts: it has no words of an assistant to learn from; give chats "
            "with answers, or --loss-on all."
        )
    return _rows(blocks, is_used)


def _rows(blocks: Blocks, chosen: np.ndarray) -> Blocks:
    """Some of the blocks, by a mask or by their numbers."""
    pairs = blocks.pairs
    if pairs is not None:
        tokens, mask, position, source_position = (array[chosen] for array in pairs[:4])
        pairs = pairs._replace(
            tokens=tokens, mask=mask, position=position, source_position=source_position
        )
    return Blocks(blocks.tokens[chosen], blocks.mask[chosen], blocks.loss_mask[chosen], pairs)


def per_epoch(blocks: Blocks, batch_size: int) -> int:
    """How many whole batches the blocks give."""
    return max(1, len(blocks.tokens) // min(batch_size, len(blocks.tokens)))


def batch_at(blocks: Blocks, index: int, *, batch_size: int, seed: int, parts: int = 1) -> Examples:
    """The batch of a step: a new seeded order each epoch, incomplete batches skipped.

    Args:
        blocks: All of them.
        index: Number of the step, from 0.
        batch_size: Blocks in a batch; lowered to the number of blocks.
        seed: Seed of the orders.
        parts: Parts for gradient accumulation; must divide the size of the batch.

    Returns:
        Examples whose weights sum to 1, with a leading axis ``[parts]`` if there are several.

    Raises:
        ValueError: if the parts do not divide the batch.

    Example:
        >>> blocks = Blocks(np.arange(6).reshape(3, 2), *np.ones((2, 3, 2), bool))
        >>> [batch_at(blocks, step, batch_size=1, seed=0).tokens[0, 0].item() for step in range(3)]
        [4, 0, 2]
    """
    size = min(batch_size, len(blocks.tokens))
    epoch, place = divmod(index, per_epoch(blocks, batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(len(blocks.tokens))
    chosen = order[place * size : (place + 1) * size]
    examples = _examples(blocks, chosen)
    if parts == 1:
        return examples
    if size % parts:
        raise ValueError(f"{parts} parts do not divide a batch of {size} blocks.")
    return jax.tree.map(lambda leaf: leaf.reshape(parts, size // parts, *leaf.shape[1:]), examples)


def in_order(blocks: Blocks, *, batch_size: int) -> list[Examples]:
    """All blocks in batches of one shape; the losses of the batches add up to the mean.

    Args:
        blocks: All of them.
        batch_size: Blocks in a batch; the last batch is padded with blocks that do not count.

    Returns:
        Examples whose weights sum to 1 over all batches.
    """
    size = min(batch_size, len(blocks.tokens))
    whole = _examples(blocks, np.arange(len(blocks.tokens)))
    missing = -len(blocks.tokens) % size
    whole = jax.tree.map(
        lambda leaf: np.concatenate([leaf, np.zeros_like(leaf, shape=(missing, *leaf.shape[1:]))]),
        whole,
    )
    return [
        jax.tree.map(lambda leaf, start=start: leaf[start : start + size], whole)
        for start in range(0, len(whole.tokens), size)
    ]


def _examples(blocks: Blocks, chosen: np.ndarray) -> Examples:
    """Some blocks with their weights, as numpy arrays, which jit takes."""
    some = _rows(blocks, chosen)
    predicted = _predicted(some)
    weight = (predicted / max(1, predicted.sum())).astype(np.float32)
    pairs = None
    if some.pairs is not None:
        is_there = some.pairs.position >= 0
        share = (is_there / max(1, is_there.sum())).astype(np.float32)
        places = (
            np.maximum(position, 0)
            for position in (some.pairs.position, some.pairs.source_position)
        )
        pairs = Pairs._make([some.pairs.tokens, some.pairs.mask, *places, share])
    return Examples._make([some.tokens, some.mask, weight, pairs])

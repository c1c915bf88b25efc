"""Texts to row-aligned batches: tokenising, aligning, padding. Imports texts, types, errors.

The rows of the two models correspond by ``row_id``; a text dropped for one is dropped for both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from ot_merge_jax.data import alignment, chat, vocabulary
from ot_merge_jax.data.batching import batches
from ot_merge_jax.data.chat import Document
from ot_merge_jax.data.tokenizers import is_same_tokenizer
from ot_merge_jax.errors import InputError
from ot_merge_jax.types import Batch


class Encoded(NamedTuple):
    """One tokenised document.

    Attributes:
        ids: Token ids, special tokens included.
        is_special: True where a token is special, added by the tokenizer or written in the text.
        ends: Where tokens end (`alignment.token_ends`); empty unless requested.
    """

    ids: list[int]
    is_special: list[bool]
    ends: dict[alignment.TokenEnd, int]


class Calibration(NamedTuple):
    """Row-aligned batches of both models.

    Attributes:
        target: Batches of the target.
        source: Batches of the source (and of its base, which shares its tokenizer).
        documents: Texts used.
        target_tokens: Tokens the target reads.
        source_tokens: Tokens the source reads.
        rows: Rows of activations.
        target_matched: Fraction of the target's tokens that could be rows, before any subsample;
            special tokens do not count. None where rows are not tokens (``sample``).
        source_matched: The same for the source.
    """

    target: list[Batch]
    source: list[Batch]
    documents: int
    target_tokens: int
    source_tokens: int
    rows: int
    target_matched: float | None
    source_matched: float | None


def encode(
    tokenizer: Any, documents: Sequence[Document], *, max_length: int, has_ends: bool = False
) -> list[Encoded]:
    """Tokenises documents as the model was trained to see them, cut at ``max_length`` tokens.

    Args:
        tokenizer: Of the model.
        documents: Texts.
        max_length: Tokens kept of a document, special ones included.
        has_ends: Whether to say where tokens end, which needs a fast tokenizer.

    Returns:
        One entry for each document.

    Raises:
        InputError: if a slow tokenizer is asked for ends, or a chat cannot be rendered.
    """
    if has_ends and not tokenizer.is_fast:
        raise InputError(
            f"rows: span needs the character offsets of tokens, and the tokenizer of "
            f"{tokenizer.name_or_path} has none (no tokenizer.json); use rows: sample."
        )
    encoded, special = [], vocabulary.special_ids(tokenizer)
    for document in documents:
        rendered = chat.render(document, tokenizer)
        encoding = tokenizer(
            rendered.text,
            add_special_tokens=not rendered.has_special,
            truncation=True,
            max_length=max_length,
            return_special_tokens_mask=True,
            return_offsets_mapping=has_ends,
        )
        ids, added = encoding["input_ids"], encoding["special_tokens_mask"]
        # the mask knows what was added, not what the text itself spells out
        is_special = [bool(x) or token in special for token, x in zip(ids, added, strict=True)]
        ends = {}
        if has_ends:
            cut = encoding.encodings[0].overflowing[:1]
            beyond = [span for part in cut for span in part.offsets]
            ends = alignment.token_ends(
                rendered.text,
                encoding["offset_mapping"],
                is_special=is_special,
                beyond=beyond,
                contents=rendered.contents,
            )
        encoded.append(Encoded(ids, is_special, ends))
    return encoded


def align(
    documents: Sequence[Document],
    target_tokenizer: Any,
    source_tokenizer: Any,
    *,
    rows: Literal["sample", "token", "span"],
    max_rows: int = 8192,
    max_length: int = 512,
    seed: int = 0,
) -> Calibration:
    """Tokenises documents for both models and says which rows of activations correspond.

    Args:
        documents: Texts and chats.
        target_tokenizer: Of the target.
        source_tokenizer: Of the source.
        rows: ``sample``: one row a document, the mean over its tokens, special ones included.
            ``token``: one row a token that is not special; needs identical tokenizers.
            ``span``: one row a character at which both tokenizers end a token; needs fast ones.
        max_rows: Rows kept for ``token`` and ``span``, a seeded subsample.
        max_length: Tokens of a document that are read.
        seed: Of the subsample.

    Returns:
        Batches whose rows correspond by ``row_id``.

    Raises:
        InputError: if fewer than 2 rows remain, tokenizers differ where they must not, or one is
            slow where it must not be.

    Source: method: Activations.
    """
    if rows == "token" and not is_same_tokenizer(target_tokenizer, source_tokenizer, documents):
        raise InputError(
            "rows: token needs identical tokenizers, and those of target and source "
            "differ; use rows: span or rows: sample."
        )
    both = [
        (t, s)
        for t, s in zip(
            encode(target_tokenizer, documents, max_length=max_length, has_ends=rows == "span"),
            encode(source_tokenizer, documents, max_length=max_length, has_ends=rows == "span"),
            strict=True,
        )
        if not all(t.is_special) and not all(s.is_special)
    ]
    if rows == "sample":
        picked = alignment.subsample([[(-1, -1)]] * len(both), max_rows=len(both), seed=seed)
    else:
        pairs = [
            alignment.common_boundaries(t.ends, s.ends)
            if rows == "span"
            else [(i, i) for i, special in enumerate(t.is_special) if not special]
            for t, s in both
        ]
        picked = alignment.subsample(pairs, max_rows=max_rows, seed=seed)
    if picked.total < 2:
        raise InputError(
            f"The calibration text gives {picked.total} usable row{'s' * (picked.total != 1)}, "
            "and at least 2 are needed; add text."
        )

    def matched(encoded: Iterable[Encoded]) -> float | None:
        ordinary = sum(document.is_special.count(False) for document in encoded)
        return None if rows == "sample" else picked.total_before / ordinary

    return Calibration(
        target=batches([t.ids for t, _ in both], picked.target),
        source=batches([s.ids for _, s in both], picked.source),
        documents=len(both),
        target_tokens=sum(len(t.ids) for t, _ in both),
        source_tokens=sum(len(s.ids) for _, s in both),
        rows=picked.total,
        target_matched=matched(t for t, _ in both),
        source_matched=matched(s for _, s in both),
    )

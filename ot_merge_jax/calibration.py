"""Texts to row-aligned batches: reading, sampling, tokenising, padding. Imports types, errors.

The rows of the two models correspond by ``row_id``; a text dropped for one is dropped for both.
"""

from __future__ import annotations

import codecs
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ot_merge_jax import rows as alignment
from ot_merge_jax import spelling
from ot_merge_jax.errors import InputError
from ot_merge_jax.types import Batch

#: Fraction of the documents that choose the strength and are never used for rows (SPEC section 9).
DEV_FRACTION = 0.2
_TOKENS_PER_BATCH = 4096
_SHORTEST = 16


class Encoded(NamedTuple):
    """One tokenised document.

    Attributes:
        ids: Token ids, special tokens included.
        is_special: True where a token is special, added by the tokenizer or written in the text.
        ends: Where tokens end (`rows.ends`); empty unless asked for.
    """

    ids: list[int]
    is_special: list[bool]
    ends: dict[alignment.Place, int]


class Calibration(NamedTuple):
    """Row-aligned batches of both models.

    Attributes:
        target: Batches of the target.
        source: Batches of the source (and of its base, which shares its tokenizer).
        documents: Texts used.
        target_tokens: Tokens the target reads.
        source_tokens: Tokens the source reads.
        rows: Rows of activations.
        target_matched: Fraction of the target's tokens that could be rows, before any subsample; of
            those it reads that are not special. None: a row is no token (``sample``).
        source_matched: The same of the source.
    """

    target: list[Batch]
    source: list[Batch]
    documents: int
    target_tokens: int
    source_tokens: int
    rows: int
    target_matched: float | None
    source_matched: float | None


def read_documents(path: Path, *, field: str = "text", encoding: str = "utf-8") -> Iterator[str]:
    """Yields the documents of a file, one after the other; blank ones are skipped.

    Args:
        path: ``.jsonl`` (one JSON object a line) or a text file (one document a line).
        field: Which field of a JSON object holds the text.
        encoding: Of the file; a byte order mark is dropped.

    Yields:
        Texts.

    Raises:
        InputError: if there is no such file, or naming the byte or line that cannot be read.
    """
    if not path.is_file():
        raise InputError(f"There is no text file {path}; give a .txt or .jsonl file.")
    try:
        name = codecs.lookup(encoding).name
    except LookupError as error:
        raise InputError(
            f"There is no encoding {encoding!r}; give one that Python knows."
        ) from error
    try:
        with path.open(encoding="utf-8-sig" if name == "utf-8" else encoding) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                if "\0" in line:
                    raise InputError(f"{path}, line {number}, holds a NUL byte; this is not text.")
                is_json = path.suffix == ".jsonl"
                text = _field(path, number, line, field) if is_json else line.strip()
                if text.strip():
                    yield text
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not {encoding} {_first_bad_byte(path, encoding)}; pass --encoding."
        ) from error


def _field(path: Path, number: int, line: str, field: str) -> str:
    """The text of one line of JSON."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}, line {number}, is not JSON ({error}); mend the line.") from error
    if not isinstance(value, dict) or field not in value:
        raise InputError(
            f"{path}, line {number}, has no field {field!r}; name the field that holds the text."
        )
    if not isinstance(value[field], str):
        raise InputError(f"{path}, line {number}: field {field!r} is not a string; mend the line.")
    return value[field]


def _first_bad_byte(path: Path, encoding: str) -> str:
    """Where a file stops being text in this encoding."""
    content = path.read_bytes()
    try:
        content.decode(encoding)
    except UnicodeDecodeError as error:
        return f"at byte {error.start} (line {content[: error.start].count(bytes([10])) + 1})"
    return "text"


def sample(documents: Iterator[str], *, count: int, seed: int) -> list[str]:
    """A seeded uniform sample of at most ``count`` documents, in file order, in one pass.

    Example:
        >>> sample(iter("abcdef"), count=3, seed=0) == sample(iter("abcdef"), count=3, seed=0)
        True
    """
    rng = random.Random(seed)
    kept: list[tuple[int, str]] = []
    for index, document in enumerate(documents):
        if len(kept) < count:
            kept.append((index, document))
        elif (place := rng.randrange(index + 1)) < count:
            kept[place] = (index, document)
    return [document for _, document in sorted(kept)]


def split(documents: Sequence[str], *, seed: int) -> tuple[list[str], list[str]]:
    """Splits documents into those that give rows and the dev split, a fifth of them.

    Example:
        >>> rows, dev = split([str(i) for i in range(10)], seed=0)
        >>> len(rows), len(dev), set(rows) & set(dev)
        (8, 2, set())
    """
    is_dev = np.zeros(len(documents), bool)
    count = round(DEV_FRACTION * len(documents))
    is_dev[np.random.default_rng(seed).permutation(len(documents))[:count]] = True
    train = [document for document, dev in zip(documents, is_dev, strict=True) if not dev]
    return train, [document for document, dev in zip(documents, is_dev, strict=True) if dev]


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model folder, by transformers; no code of the folder is ever run.

    Raises:
        InputError: if the folder has none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415, takes seconds to import; `--help` should not wait

    if not any(
        (path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    ):
        raise InputError(f"{path} has no tokenizer; copy the tokenizer files of the model into it.")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the libraries behind it raise anything
        first = str(error).strip().split("\n")[0]
        raise InputError(
            f"The tokenizer of {path} cannot be loaded ({first}); download its files again."
        ) from error


def is_same_tokenizer(target: Any, source: Any, documents: Sequence[str]) -> bool:
    """Whether two tokenizers have one vocabulary and cut these documents alike."""
    if target.get_vocab() != source.get_vocab():
        return False
    return all(target(text)["input_ids"] == source(text)["input_ids"] for text in documents)


def encode(
    tokenizer: Any, documents: Sequence[str], *, max_length: int, has_ends: bool = False
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
        InputError: if ends are asked of a slow tokenizer.
    """
    if has_ends and not tokenizer.is_fast:
        raise InputError(
            f"rows: span needs the character offsets of tokens, and the tokenizer of "
            f"{tokenizer.name_or_path} has none (no tokenizer.json); use rows: sample."
        )
    encoded, special = [], spelling.special_ids(tokenizer)
    for text in documents:
        one = tokenizer(
            text,
            truncation=True,
            max_length=max_length,
            return_special_tokens_mask=True,
            return_offsets_mapping=has_ends,
        )
        ids, added = one["input_ids"], one["special_tokens_mask"]
        # the mask knows what was added, not what the text itself spells out
        is_special = [bool(x) or token in special for token, x in zip(ids, added, strict=True)]
        ends = {}
        if has_ends:
            cut = one.encodings[0].overflowing[:1]
            beyond = [span for part in cut for span in part.offsets]
            ends = alignment.ends(text, one["offset_mapping"], is_special=is_special, beyond=beyond)
        encoded.append(Encoded(ids, is_special, ends))
    return encoded


def align(
    documents: Sequence[str],
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
        documents: Texts.
        target_tokenizer: Of the target.
        source_tokenizer: Of the source.
        rows: ``sample``: one row a document, the mean over its tokens, special ones included.
            ``token``: one row a token that is not special; needs identical tokenizers.
            ``span``: one row a character at which both end a token; needs fast tokenizers.
        max_rows: Rows kept for ``token`` and ``span``, a seeded subsample.
        max_length: Tokens of a document that are read.
        seed: Of the subsample.

    Returns:
        Batches whose rows correspond by ``row_id``.

    Raises:
        InputError: if fewer than 2 rows remain, tokenizers differ where they must not, or one is
            slow where it must not be.

    Source: SPEC section 2.
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
        picked = alignment.pick([[(-1, -1)]] * len(both), max_rows=len(both), seed=seed)
    else:
        pairs = [
            alignment.shared(t.ends, s.ends)
            if rows == "span"
            else [(i, i) for i, special in enumerate(t.is_special) if not special]
            for t, s in both
        ]
        picked = alignment.pick(pairs, max_rows=max_rows, seed=seed)
    if picked.total < 2:
        raise InputError(
            f"The calibration text gives {picked.total} usable row{'s' * (picked.total != 1)}, "
            "and at least 2 are needed; add text."
        )

    def matched(encoded: Iterable[Encoded]) -> float | None:
        ordinary = sum(one.is_special.count(False) for one in encoded)
        return None if rows == "sample" else picked.found / ordinary

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
    made = []
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
        made.append(Batch(tokens, mask, position, row_id))  # pyright: ignore[reportArgumentType]
    return made


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
        size = max(1, _TOKENS_PER_BATCH // length)
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

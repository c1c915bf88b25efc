"""Tokens and the bytes they stand for, so that different vocabularies can be matched.

How a tokenizer marks spaces and bytes is read from its own normalizer, pre-tokenizer, decoder and
model, never guessed from the look of its tokens.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ot_merge_jax.errors import InputError
from ot_merge_jax.types import VocabularyMatch

#: A token is its string, or the bytes it spells where two tokenizers mark them differently.
Tokens = Mapping[str, int] | Mapping[bytes, int] | Sequence[str]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level tokens: printable bytes are themselves, the rest is moved up.

    Source: Radford et al. 2019, GPT-2, ``bytes_to_unicode``.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(moved)
    }


_ALPHABET = _byte_alphabet()


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of special tokens: the named ones, and added ones marked special, as chat tokens are."""
    added = tokenizer.added_tokens_decoder
    return set(tokenizer.all_special_ids) | {row for row, token in added.items() if token.special}


def vocabulary(tokenizer: Any, *, size: int) -> dict[str, int]:
    """Token -> row of a tokenizer, special tokens and rows beyond ``size`` left out."""
    special = special_ids(tokenizer)
    return {
        token: row
        for token, row in tokenizer.get_vocab().items()
        if row < size and row not in special
    }


def token_bytes(tokenizer: Any, *, size: int) -> dict[bytes, int]:
    """Bytes -> row of a tokenizer; special tokens and rows beyond ``size`` are left out.

    Where several tokens spell the same bytes the lowest row is taken, but an ordinary token
    takes precedence over the byte token (``<0x61>`` beside ``a``), which is then never emitted.

    Args:
        tokenizer: A fast tokenizer.
        size: Rows of the model's table.

    Returns:
        Each spelling once.

    Raises:
        InputError: if the tokenizer is slow, so that how it marks spaces cannot be read.

    Example:
        >>> from ot_merge_jax.demo import assets
        >>> from ot_merge_jax.data.tokenizers import load_tokenizer
        >>> tokenizer = load_tokenizer(assets.path("sibling"))
        >>> tokenizer.convert_ids_to_tokens(token_bytes(tokenizer, size=2048)[b" the"])
        'Ġthe'
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"The tokenizer of {tokenizer.name_or_path} has no tokenizer.json, so its tokens "
            f"cannot be matched with another's; leave embed and head out of weights."
        )
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    coders = list(_parts([state["normalizer"], state["pre_tokenizer"]]))
    decoders = list(_parts([state["decoder"]]))
    kinds = {part["type"] for part in coders + decoders}
    is_byte_level = "ByteLevel" in kinds
    has_bytes = state["model"].get("byte_fallback") or "ByteFallback" in kinds
    marks = {part["replacement"] for part in coders + decoders if part["type"] == "Metaspace"}
    for part in coders:  # what is written for a space, and what is read back as one
        if part["type"] == "Replace" and part["pattern"].get("String") == " ":
            marks.add(part["content"])
    for part in decoders:
        if part["type"] == "Replace" and part["content"] == " " and "String" in part["pattern"]:
            marks.add(part["pattern"]["String"])
    literal = {token["id"] for token in state["added_tokens"]}  # added tokens are plain text
    special = special_ids(tokenizer)
    rows: dict[bytes, tuple[bool, int]] = {}
    for token, row in tokenizer.get_vocab().items():
        if row >= size or row in special:
            continue
        byte = _BYTE_TOKEN.fullmatch(token) if has_bytes else None
        if byte:
            word = bytes([int(byte[1], 16)])
        elif row in literal:
            word = token.encode()
        elif is_byte_level and all(char in _ALPHABET for char in token):
            word = bytes(_ALPHABET[char] for char in token)
        else:
            word = functools.reduce(lambda text, mark: text.replace(mark, " "), marks, token)
            word = word.encode()
        rows[word] = min(rows.get(word, (True, row)), (byte is not None, row))
    return {word: row for word, (_, row) in rows.items()}


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    """Every normalizer, pre-tokenizer and decoder, including those inside sequences."""
    if isinstance(value, dict) and "type" in value:
        yield value
    for child in value.values() if isinstance(value, dict) else value:
        if isinstance(child, dict | list):
            yield from _parts(child)


def matched_vocabulary(
    target: Any, source: Any, *, target_size: int, source_size: int, is_one: bool
) -> VocabularyMatch:
    """Pairs the tokens of two tokenizers: by token if both are the same, else by their bytes.

    Args:
        target: Tokenizer of the target.
        source: Tokenizer of the source.
        target_size: Rows of the target's table.
        source_size: Rows of the source's table.
        is_one: Whether they are the same tokenizer.

    Returns:
        Matched rows without weights; each row at most once.

    Raises:
        InputError: if fewer than 2 tokens match, or how one marks spaces cannot be read.

    Source: method: The vocabulary map.
    """
    read = vocabulary if is_one else token_bytes
    tokens = read(target, size=target_size), read(source, size=source_size)
    shared = len(tokens[0].keys() & tokens[1].keys())
    if shared < 2:
        raise InputError(
            f"The tokenizers of target and source share {shared} token{'s' * (shared != 1)}, and "
            f"moving embed or head needs at least 2; leave them out of weights."
        )
    return match(*tokens)


def match(target_tokens: Tokens, source_tokens: Tokens) -> VocabularyMatch:
    """Pairs the rows of two vocabularies whose tokens are equal.

    Args:
        target_tokens: Token -> row, or the tokens in row order. Leave special tokens out.
        source_tokens: The same for the source.

    Returns:
        Matched rows, ascending in the target's.

    Raises:
        ValueError: if no token is shared.

    Example:
        >>> match(["a", "b", "c"], {"c": 0, "a": 7}).source_ids.tolist()
        [7, 0]
    """

    def rows(tokens: Tokens) -> dict[Any, int]:
        if isinstance(tokens, Mapping):
            return dict(tokens)
        return {token: row for row, token in enumerate(tokens)}

    source_rows = rows(source_tokens)
    pairs = sorted(
        (row, source_rows[token])
        for token, row in rows(target_tokens).items()
        if token in source_rows
    )
    if not pairs:
        raise ValueError("The two vocabularies share no token.")
    target_ids, source_ids = np.asarray(pairs, np.int32).T
    return VocabularyMatch(jnp.asarray(target_ids), jnp.asarray(source_ids))

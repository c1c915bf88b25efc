"""Held-out documents that stand in the calibration text too: what they measure is memory."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

from ot_merge_jax.data.chat import Document
from ot_merge_jax.data.documents import documents_of, read_documents
from ot_merge_jax.data.sources import Source
from ot_merge_jax.errors import InputError
from ot_merge_jax.recipes.recipe import Text

#: Letters and digits that a line has at least, so that it says something when it comes twice.
_LINE = 20


def held_out(
    text: Text, source: Source, *, learned: Text, learned_source: Source, role: str
) -> tuple[list[Document], int]:
    """The documents of a held-out text that are not near-duplicates of learned ones.

    Args:
        text: The held-out text.
        source: Its files.
        learned: The text that something is learned from; all its documents count, also those that
            a sample leaves out.
        learned_source: Its files.
        role: What the learned text is called in messages.

    Returns:
        The documents, and how many were left out.

    Raises:
        InputError: if both are the same file, or no document is left.

    Source: method: Losses of content.
    """
    same = {path.resolve() for path in source.files} & {
        path.resolve() for path in learned_source.files
    }
    if same:
        raise InputError(
            f"The {role} text and the held-out text are the same file, {text.path}; give a "
            "held-out text that nothing is learned from."
        )
    documents = documents_of(text, source)
    others = read_documents(learned_source, field=learned.field, encoding=learned.encoding)
    is_leaked = near_duplicates(documents, others)
    kept = [document for document, leaked in zip(documents, is_leaked, strict=True) if not leaked]
    if not kept:
        raise InputError(
            f"Every document of the held-out text {text.path} also stands in the {role} text "
            f"{learned.path}; give other documents."
        )
    return kept, len(documents) - len(kept)


def near_duplicates(documents: Sequence[Document], others: Iterable[Document]) -> list[bool]:
    """Whether each document equals another one, or shares half of its longer lines with others.

    Compared are letters and digits alone, in lower case, after NFKC. Lines of fewer than 20 of
    these do not count.

    Args:
        documents: The documents in question; kept in memory.
        others: What they are compared with; read once.

    Example:
        >>> near_duplicates(["Once upon a time!", "Another."], ["once  upon a time"])
        [True, False]
    """
    whole = [normalized(_written(document)) for document in documents]
    lines = [
        [line for line in map(normalized, _written(document).splitlines()) if len(line) >= _LINE]
        for document in documents
    ]
    wanted = {text for text in whole if text}.union(*lines)
    met: set[str] = set()
    for other in others:
        text = _written(other)
        met |= wanted.intersection([normalized(text), *map(normalized, text.splitlines())])
    return [
        text in met or (bool(own) and 2 * sum(line in met for line in own) >= len(own))
        for text, own in zip(whole, lines, strict=True)
    ]


def sentence(leaked: int, total: int, role: str) -> str:
    """What is said of documents that were left out.

    Example:
        >>> sentence(1, 20, "calibration")
        '1 of 20 held-out documents also stands in the calibration text and is left out.'
    """
    also = "also stands" if leaked == 1 else "also stand"
    out = "is left out" if leaked == 1 else "are left out"
    return f"{leaked} of {total} held-out documents {also} in the {role} text and {out}."


def normalized(text: str) -> str:
    """Letters and digits of a text, in lower case, after NFKC.

    Example:
        >>> normalized("Naïve, 3.14")
        'naïve314'
    """
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", text).lower()))


def _written(document: Document) -> str:
    """What a document says, without roles."""
    if isinstance(document, str):
        return document
    return "\n".join(turn.content for turn in document.turns)

"""Documents: reading them, rendering chats, sampling, splitting. Imports io and errors.

A document is a plain text, or a `Chat` that every model renders with its own template.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ot_merge_jax.data import sources
from ot_merge_jax.data.chat import Chat, Document, Turn
from ot_merge_jax.errors import InputError
from ot_merge_jax.recipes.recipe import Text

#: Fraction of the documents that choose the strength and are never used for rows (method: Presets).
DEV_FRACTION = 0.2


def read_documents(
    source: Path | str | sources.Source,
    *,
    field: str | Sequence[str] = "text",
    encoding: str = "utf-8",
    offline: bool = False,
) -> Iterator[Document]:
    """Yields the documents of a file or dataset, one after the other; blank ones are skipped.

    Args:
        source: ``.jsonl`` (one JSON object a line), ``.parquet``, a text file (one document a
            line), or a dataset of the hub as ``hub:OWNER/NAME[@REVISION][:[CONFIG/]SPLIT]``.
        field: Which field of a record holds the text, or a list of ``{role, content}`` messages;
            or two fields, a prompt and its response, which make a chat of two turns.
        encoding: Of a file of lines; a byte order mark is dropped.
        offline: Whether the network is forbidden.

    Yields:
        Texts, and chats where the field holds messages.

    Raises:
        InputError: if there is no such file, or naming the byte, line or record that cannot be
            read.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "qa.jsonl"
        >>> _ = path.write_text('{"ask": "Where?", "answer": "Here."}')
        >>> [chat] = read_documents(path, field=("ask", "answer"))
        >>> chat.turns[1]
        Turn(role='assistant', content='Here.')
    """
    located = (
        source if isinstance(source, sources.Source) else sources.locate(source, offline=offline)
    )
    fields = (field,) if isinstance(field, str) else tuple(field)
    for file in located.files:
        for where, record in sources.read(file, fields=fields, encoding=encoding):
            document = record if isinstance(record, str) else _document(record, fields, where)
            contents = (
                [document] if isinstance(document, str) else [x.content for x in document.turns]
            )
            if any(content.strip() for content in contents):
                yield document


def _document(record: Any, fields: Sequence[str], where: str) -> Document:
    """The text or chat of a record that has the fields."""
    values = [record[field] for field in fields]
    if len(fields) == 1 and isinstance(values[0], list):
        return Chat(tuple(_turn(turn, n, fields[0], where) for n, turn in enumerate(values[0], 1)))
    for field, value in zip(fields, values, strict=True):
        if not isinstance(value, str):
            more = ", nor a list of messages" if len(fields) == 1 else ""
            raise InputError(f"{where}: field {field!r} is not a string{more}; fix it.")
        if "\0" in value:
            raise InputError(f"{where}: field {field!r} holds a NUL character; this is not text.")
    if len(fields) == 1:
        return values[0]
    return Chat(tuple(map(Turn, ("user", "assistant"), values)))


def _turn(message: Any, number: int, field: str, where: str) -> Turn:
    """One message of a record."""
    values = message if isinstance(message, dict) else {}
    for key in Turn._fields:
        if not isinstance(values.get(key), str) or "\0" in values[key]:
            raise InputError(
                f"{where}: field {field!r} is not a string, and its message {number} has no "
                f"{key!r} of plain text; fix it."
            )
    return Turn(values["role"], values["content"])


def sample(documents: Iterable[Document], *, count: int, seed: int) -> list[Document]:
    """A seeded uniform sample of at most ``count`` documents, in file order, in one pass.

    Example:
        >>> sample(iter("abcdef"), count=3, seed=0) == sample(iter("abcdef"), count=3, seed=0)
        True
    """
    rng = random.Random(seed)  # noqa: S311, no secret
    chosen: list[tuple[int, Document]] = []
    for index, document in enumerate(documents):
        if len(chosen) < count:
            chosen.append((index, document))
        elif (place := rng.randrange(index + 1)) < count:
            chosen[place] = (index, document)
    return [document for _, document in sorted(chosen, key=lambda numbered: numbered[0])]


def split(documents: Sequence[Document], *, seed: int) -> tuple[list[Document], list[Document]]:
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


def sampled(text: Text, source: sources.Source, *, samples: int, seed: int) -> list[Document]:
    """A seeded sample of a text: ``samples`` documents, and those of the dev split beside them."""
    count = round(samples / (1 - DEV_FRACTION))
    documents = read_documents(source, field=text.field, encoding=text.encoding)
    return sample(documents, count=count, seed=seed)


def documents_of(text: Text, source: sources.Source) -> list[Document]:
    """All documents of a text; InputError if there are none."""
    documents = list(read_documents(source, field=text.field, encoding=text.encoding))
    if not documents:
        raise InputError(f"{text.path} has 0 documents; add text.")
    return documents

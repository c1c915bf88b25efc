"""Tokenizers: loading one, reading a document with it, and whether two are the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ot_merge_jax.data import chat
from ot_merge_jax.data.chat import Document
from ot_merge_jax.errors import InputError
from ot_merge_jax.io.folder import ModelFolder


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a model folder, by transformers; no code of the folder is ever run.

    Raises:
        InputError: if the folder has none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415, takes seconds to import; `--help` should not wait

    path = Path(path).expanduser()
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


def tokenize(tokenizer: Any, document: Document, **options: Any) -> Any:
    """A document in the tokens of a model, with the special tokens it was trained to see.

    A chat writes its own special tokens by the model's template, so that none are added.

    Args:
        tokenizer: Of the model, by transformers.
        document: A text or a chat.
        **options: Passed to the tokenizer.

    Returns:
        What the tokenizer returns.

    Raises:
        InputError: if a chat cannot be rendered (`chat.render`).
    """
    rendered = chat.render(document, tokenizer)
    return tokenizer(rendered.text, add_special_tokens=not rendered.has_special, **options)


def is_same_tokenizer(target: Any, source: Any, documents: Sequence[Document]) -> bool:
    """Whether two tokenizers have one vocabulary and cut these documents alike."""
    if target.get_vocab() != source.get_vocab():
        return False
    return all(
        tokenize(target, document)["input_ids"] == tokenize(source, document)["input_ids"]
        for document in documents
    )


def tokenizer_of(folder: ModelFolder) -> Any:
    """The tokenizer of a model, if it fits the model's tables."""
    tokenizer = load_tokenizer(folder.path)
    if len(tokenizer) > folder.cfg.vocab_size:
        raise InputError(
            f"The tokenizer of {folder.path} has {len(tokenizer)} tokens but the model "
            f"has {folder.cfg.vocab_size} rows; use the model's own tokenizer."
        )
    return tokenizer

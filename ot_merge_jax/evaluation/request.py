"""What an evaluation is asked, and whether that can be asked at all. Imports no JAX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ot_merge_jax.errors import InputError, RecipeError
from ot_merge_jax.recipes.recipe import Text


class EvalRequest(NamedTuple):
    """What models are evaluated on: a text, questions or tasks, at least one of them.

    Attributes:
        text: Held-out text, or None.
        questions: Files of multiple-choice questions.
        tasks: Names of lm-eval tasks, groups or tags.
        include_path: Folder whose tasks are used instead of lm-eval's own, or None.
        limit: How many documents or questions of each are read at most; None: all.
        is_chat: Whether questions and tasks are written with the model's chat template.
        continued: How many documents of the text, from the first on, every model continues.
        new_tokens: How many tokens a continuation has at most.
        encoding: Encoding of the question files.
    """

    text: Text | None = None
    questions: Sequence[str] = ()
    tasks: Sequence[str] = ()
    include_path: str | None = None
    limit: int | None = None
    is_chat: bool = False
    continued: int = 0
    new_tokens: int = 32
    encoding: str = "utf-8"


def check(ask: EvalRequest, *, base: str | None = None) -> None:
    """Refuses what cannot be asked, before anything is read.

    Args:
        ask: What models are evaluated on.
        base: The model that divergences are taken from, or None.

    Raises:
        RecipeError: if nothing is asked, or something that needs a text has none.
        InputError: if the folder of tasks is missing.

    Example:
        >>> check(EvalRequest(questions=["questions.jsonl"]))
        >>> check(EvalRequest(questions=["questions.jsonl"]), base="owner/name")
        Traceback (most recent call last):
        ...
        ot_merge_jax.errors.RecipeError: --base needs documents; give --text.
    """
    if ask.text is None and not ask.questions and not ask.tasks:
        raise RecipeError("There is nothing to ask; give --text, --choices or --tasks.")
    if ask.text is None and (base is not None or ask.continued):
        flag = "--base" if base is not None else "--generate"
        raise RecipeError(f"{flag} needs documents; give --text.")
    task_folder(ask.include_path)


def task_folder(path: str | Path | None) -> Path | None:
    """The folder of task files, or None for lm-eval's own.

    Raises:
        InputError: if it is missing.
    """
    folder = None if path is None else Path(path).expanduser()
    if folder is not None and not folder.is_dir():
        raise InputError(f"There is no folder {folder}; give --include-path a folder of tasks.")
    return folder

"""What a command line names is looked for before anything that takes seconds is imported.

The checks are those that the run makes itself, with the same sentences; a run makes them again,
because a library user has no command line. What stands on the hub is left to the run.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ot_merge_jax.data import sources
from ot_merge_jax.io import atomic, hub, resolve


def look_for(
    *,
    models: Iterable[str | None] = (),
    texts: Iterable[str | None] = (),
    out: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Looks whether models and texts are there and whether the output may be written.

    Args:
        models: Folders, hub ids, or ``BASE+ADAPTER`` of either; None is left out.
        texts: Files, or datasets of the hub; None is left out.
        out: The folder to be written; None: none, or its place is not checked.
        overwrite: Whether it may exist.

    Raises:
        InputError: naming the first that is missing, or what is wrong with the output.

    Example:
        >>> look_for(models=["owner/name@main", None], texts=["hub:owner/name"])
        >>> look_for(texts=["nothing.txt"])
        Traceback (most recent call last):
        ...
        ot_merge_jax.errors.InputError: There is no text file nothing.txt; give a .txt, .jsonl or
        .parquet file, or a dataset of the hub as hub:OWNER/NAME.
    """
    sides = [side for model in models if model for side in resolve.split(model) if side]
    files = [text for text in texts if text is not None]
    if out is not None:
        named = [Path(path).expanduser() for path in (*sides, *files)]
        inputs = [path for path in named if path.exists()]
        atomic.check_output(out, inputs=inputs, overwrite=overwrite)
    for text in files:
        if hub.dataset_id(text) is None:
            sources.locate(text)
    for side in sides:
        if Path(side).expanduser().is_dir() or hub.model_id(side) is None:
            resolve.resolve(side)


def look_for_questions(files: Iterable[str]) -> None:
    """Looks whether files of multiple-choice questions are there.

    Raises:
        InputError: naming the first that is not.
    """
    for file in files:
        sources.questions(file)

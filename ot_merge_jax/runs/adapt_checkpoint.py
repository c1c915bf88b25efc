"""A training run on disk: checkpoints that a killed run continues from, and interrupts that wait.

A checkpoint is a stage of `ot_merge_jax.runs.stages`: written by Orbax beside the one before,
hashed by us (Orbax does not notice a flipped bit), and only then put in its place. It holds what
trains, the optimiser's state, the best parameters and all losses. The position in the data is the
number of steps, and all randomness comes from the seed, so nothing else has to be saved.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ot_merge_jax.io import arrays
from ot_merge_jax.runs import stages
from ot_merge_jax.training.loop import TrainHistory

_PREFIX = "step-"
_EVENTS = "events.jsonl"


def save(run: stages.RunFolder, history: TrainHistory, events: list[str]) -> None:
    """Writes a checkpoint and keeps the previous one: only the next step shows broken weights.

    Args:
        run: The run folder.
        history: Where the training stands.
        events: Lines of ``events.jsonl`` so far.

    Raises:
        OSError: if the disk is full.
    """
    name = name_of(history)
    if name in stages.finished(run):
        return
    stages.drop(run, _names(run)[:-1])
    leaves = {f"{place:05d}": leaf for place, leaf in enumerate(_leaves(history))}
    curves = {"losses": history.losses, "norms": history.norms, "dev": history.dev}

    def make(folder: Path) -> None:
        arrays.save_tree(folder / "arrays", leaves)
        arrays.save_json(folder / "history.json", curves)
        (folder / _EVENTS).write_text("".join(events), encoding="utf-8")

    stages.stage(run, name, make, lambda folder: folder)


def drop(run: stages.RunFolder, history: TrainHistory) -> None:
    """Deletes the checkpoint of this state, if there is one; the previous one stays."""
    stages.drop(run, [name for name in _names(run) if name == name_of(history)])


def restore(run: stages.RunFolder, new: TrainHistory) -> tuple[TrainHistory, list[str]]:
    """The newest checkpoint of a run, or ``new`` if there is none.

    Args:
        run: The run folder; its finished stages have been verified.
        new: A history before its first step: shapes, dtypes and places of all arrays.

    Returns:
        The history and its events.
    """
    names = _names(run)
    if not names:
        return new, []
    folder = run.folder / "state" / names[-1]
    leaves = arrays.load_tree(folder / "arrays")
    curves = arrays.load_json(folder / "history.json")
    stored = [leaves[key] for key in sorted(leaves)]
    template = new._replace(best=new.state.params) if len(stored) > len(_leaves(new)) else new
    treedef = jax.tree.structure((template.state, template.best))
    placed = [
        jax.device_put(np.asarray(leaf, like.dtype), like.sharding)
        for leaf, like in zip(stored, _leaves(template), strict=True)
    ]
    state, best = jax.tree.unflatten(treedef, placed)
    dev = tuple((step, loss) for step, loss in curves["dev"])
    history = TrainHistory(state, tuple(curves["losses"]), tuple(curves["norms"]), dev, best)
    return history, (folder / _EVENTS).read_text(encoding="utf-8").splitlines(keepends=True)


def name_of(history: TrainHistory) -> str:
    """The stage that holds a history."""
    return f"{_PREFIX}{len(history.losses):08d}"


def _names(run: stages.RunFolder) -> list[str]:
    """The checkpoints of a run, oldest first."""
    return sorted(name for name in stages.finished(run) if name.startswith(_PREFIX))


def _leaves(history: TrainHistory) -> list[Any]:
    """All arrays of a history, in order."""
    return jax.tree.leaves((history.state, history.best))


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Delays SIGINT and SIGTERM to the end of a step, whose old state is already donated to XLA.

    A second signal of either kind interrupts at once. Without effect outside the main thread.

    Yields:
        A function that returns whether to stop.

    Example:
        >>> with interrupts() as is_wanted:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     is_wanted()
        True
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    signals: list[int] = []

    def note(number: int, _: Any) -> None:
        if signals:
            raise KeyboardInterrupt
        signals.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(signals)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

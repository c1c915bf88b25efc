"""Progress of long loops: a rich bar on a terminal, a log line every few seconds elsewhere.

Stages wrap their loops in `track`; nothing is shown unless a front end has entered `shown`, so a
library user sees nothing and stages stay pure.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

import rich.console
import rich.progress

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 10.0
_console: contextvars.ContextVar[rich.console.Console | None] = contextvars.ContextVar(
    "console", default=None
)
_is_inside = contextvars.ContextVar("is_inside", default=False)  # of a loop that is shown


@contextlib.contextmanager
def shown(console: rich.console.Console) -> Iterator[None]:
    """Shows the progress of every `track` inside the block on this console (usually stderr)."""
    token = _console.set(console)
    try:
        yield
    finally:
        _console.reset(token)


def track(
    items: Iterable[T],
    description: str,
    *,
    total: int | None = None,
    note: Callable[[], str] | None = None,
) -> Iterable[T]:
    """Iterates, showing how far it is and how long it will take if a front end wants to know.

    Args:
        items: What to iterate.
        description: What is done, e.g. ``gather (batches)``.
        total: How many items there are; needed where ``items`` has no length.
        note: Says what has been found so far, e.g. ``loss 3.1``; asked whenever something is shown.

    Returns:
        The same items.

    Example:
        >>> list(track([1, 2], "nothing is shown without a front end"))
        [1, 2]
    """
    console = _console.get()
    if console is None or _is_inside.get():
        return items
    count = len(items) if isinstance(items, Sized) else total or 0
    show = _bar if console.is_terminal else _lines
    return _outermost(show(items, lambda: _with_note(description, note), count, console))


def _with_note(description: str, note: Callable[[], str] | None) -> str:
    """What is done and, if there is something to say, what was found."""
    latest = note() if note is not None else ""
    return f"{description}, {latest}" if latest else description


def _outermost(items: Iterator[T]) -> Iterator[T]:
    """Silences the loops inside this one, which would flicker and say nothing of the whole."""
    _is_inside.set(True)
    try:
        yield from items
    finally:
        _is_inside.set(False)


def _bar(
    items: Iterable[T], describe: Callable[[], str], total: int, console: rich.console.Console
) -> Iterator[T]:
    """A bar with elapsed and remaining time; it vanishes when done."""
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("left"),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(describe(), total=total)
        for item in items:
            yield item
            bar.update(task, advance=1, description=describe())


def _lines(
    items: Iterable[T], describe: Callable[[], str], total: int, console: rich.console.Console
) -> Iterator[T]:
    """A log line at most every few seconds."""
    del console  # log handlers know where to write
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last >= _SECONDS_BETWEEN_LINES:
            left = (now - start) / done * (total - done)
            _LOG.info("%s: %d of %d, about %.0f s left", describe(), done, total, left)
            last = now
        yield item

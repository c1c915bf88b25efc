"""Numbers of a report as people read them."""

from __future__ import annotations

from ot_merge_jax.reports.schema import Difference


def number(value: int | float | None, form: str = ".4f") -> str:
    """A number, or a dash.

    Example:
        >>> number(0.25), number(None)
        ('0.2500', '-')
    """
    return "-" if value is None else format(value, form)


def interval(change: Difference) -> str:
    """The interval of a difference.

    Example:
        >>> interval(Difference(low=-0.2, high=0.1))
        '[-0.2000, +0.1000]'
    """
    return f"[{number(change.low, '+.4f')}, {number(change.high, '+.4f')}]"

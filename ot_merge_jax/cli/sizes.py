"""Sizes as people write them in flags; they are read before anything that takes seconds."""

from __future__ import annotations

import re

from ot_merge_jax.errors import RecipeError

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def bytes_of(text: str | None) -> int | None:
    """Bytes of ``--memory-limit``; units are powers of 1024; None stays None.

    Raises:
        RecipeError: if it is not a size.

    Example:
        >>> bytes_of("8GiB") == bytes_of("8 G") == 8 << 30
        True
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise RecipeError(f"--memory-limit {text!r} is not a size; write it as in 8GiB.")
    return int(float(match[1]) * 2 ** _UNITS[match[2].upper()])


def axes_of(text: str | None) -> dict[str, int] | None:
    """Axes of ``--mesh`` and their devices; None stays None.

    Raises:
        RecipeError: if it is not like ``data=2,model=4``.

    Example:
        >>> axes_of("data=2,model=4")
        {'data': 2, 'model': 4}
    """
    if text is None:
        return None
    try:
        sizes = {name: int(size) for name, size in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise RecipeError(f"--mesh {text!r} is not like data=2,model=4.") from error
    if min(sizes.values()) < 1:
        raise RecipeError(f"--mesh {text!r} has an axis without devices; write data=2,model=4.")
    return sizes

"""Losses on disk: scores of models are saved and loaded, document by document."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ot_merge_jax.evaluation import nll
from ot_merge_jax.io import arrays


def save(folder: Path, scores: Mapping[str, nll.Scores]) -> None:
    """Writes the loss of models, document by document."""
    named = {
        f"{name}/{key}": array
        for name, of_model in scores.items()
        for key, array in of_model._asdict().items()
    }
    arrays.save_arrays(folder, named)


def load(folder: Path) -> dict[str, nll.Scores]:
    """Reads what `save` wrote, in the order of names.

    Example:
        >>> import tempfile, numpy as np
        >>> folder = Path(tempfile.mkdtemp())
        >>> save(folder, {"target": nll.Scores(np.array([1.5]), np.array([2]), np.array([3]))})
        >>> load(folder)["target"].nll.tolist()
        [1.5]
    """
    parts: dict[str, dict[str, Any]] = {}
    for name, array in arrays.load_arrays(folder).items():
        model, _, key = name.partition("/")
        parts.setdefault(model, {})[key] = array
    return {name: nll.Scores(**part) for name, part in parts.items()}


#: How a step that scores models is saved: ``(folder, compute)`` writes, ``(folder)`` reads.
SCORES = (lambda folder, compute: save(folder, compute()), load)

"""Which mixture of teacher and text, which ridge and which start a readout fit takes: by dev loss.

The ridge is searched along a path on which each fit begins where its neighbour ended, and the grid
is extended while its edge wins. Of mixtures the most of the teacher is taken that the dev split
cannot tell from the best: labels teach the style of a text, the teacher what it knows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ot_merge_jax.training import readout
from ot_merge_jax.training.readout import DevStates, FittedHead, ReadoutProblem

#: Shares of the teacher that are tried, and ridges (`readout.ridge_of`).
KAPPAS = (1.0, 0.7, 0.5, 0.3)
RIDGES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
#: How far the grid of ridges is extended, in both directions.
_LEAST, _MOST = 1e-4, 100.0


class TriedFit(NamedTuple):
    """A fit and its loss on each dev document.

    Attributes:
        start: Share of the vocabulary map's delta in the head that it begins from.
        kappa: Share of the teacher.
        ridge: As in `readout.ridge_of`; infinite: the start itself.
        loss: Mean loss of content on the dev split, in nats.
        by_document: ``[documents]`` summed losses.
        fitted: The change and its curve.
    """

    start: float
    kappa: float
    ridge: float
    loss: float
    by_document: np.ndarray
    fitted: FittedHead


class ReadoutChoice(NamedTuple):
    """What was tried and what was taken.

    Attributes:
        chosen: The fit that is taken.
        tried: Every fit, in the order in which they were made.
        unsure: Kappa -> (mean difference of its loss from the best kappa's, its standard error over
            dev documents), in nats per token.
        passes: Products with all states, over all fits.
    """

    chosen: TriedFit
    tried: tuple[TriedFit, ...]
    unsure: dict[float, tuple[float, float]]
    passes: int


def choose(
    tasks: Mapping[float, tuple[ReadoutProblem, DevStates]],
    document: np.ndarray,
    *,
    kappas: Sequence[float] = KAPPAS,
    ridges: Sequence[float] = RIDGES,
    iterations: int = 16,
    patience: int = 3,
) -> ReadoutChoice:
    """The largest kappa that is within one standard error of the best, at its best ridge and start.

    Args:
        tasks: Share of the vocabulary map's delta -> the problem that begins there, and its dev
            positions; at least one.
        document: ``[n]`` document of each dev position, from 0.
        kappas: Shares of the teacher to try; one: it is taken.
        ridges: Ascending; one: it is taken, otherwise the grid is extended by its own factor while
            its edge wins.
        iterations: Of each fit, at most.
        patience: As for `readout.fit`.

    Raises:
        ValueError: if there is nothing to choose from, or no dev position.

    Source: ours (method: Readout fit); the rule of one standard error is Breiman et al. 1984.
    """
    if not tasks or not kappas or not ridges:
        raise ValueError("There is nothing to choose from.")
    if not len(document):
        raise ValueError("There is no dev position to choose by.")
    tried: list[TriedFit] = []
    for start, (task, dev) in tasks.items():
        for kappa in sorted(kappas, reverse=True):
            tried += _path(
                task, dev, document, start, kappa, ridges, iterations=iterations, patience=patience
            )
    best = {kappa: _best([fit for fit in tried if fit.kappa == kappa]) for kappa in kappas}
    least = _best(list(best.values()))
    tokens = np.bincount(document)
    unsure = {kappa: _difference(fit, least, tokens) for kappa, fit in best.items()}
    near = [kappa for kappa, (mean, error) in unsure.items() if mean <= error]
    passes = sum(fit.fitted.curve[-1].passes for fit in tried)
    return ReadoutChoice(best[max(near)], tuple(tried), unsure, passes)


def _path(
    task: ReadoutProblem,
    dev: DevStates,
    document: np.ndarray,
    start: float,
    kappa: float,
    ridges: Sequence[float],
    *,
    iterations: int,
    patience: int,
) -> list[TriedFit]:
    """Fits of one kappa from the largest ridge down, each from the one before."""

    def tried(ridge: float, begin: jax.Array | None) -> TriedFit:
        fitted = readout.fit(
            task, dev, kappa=kappa, ridge=ridge, start=begin, iterations=iterations,
            patience=patience,
        )  # fmt: skip
        moving = task.start @ task.basis.T + readout.difference(task, fitted.change)
        losses = np.asarray(readout.losses(moving, dev, softcap=task.softcap), np.float64)
        by_document = np.bincount(document, losses)
        return TriedFit(start, kappa, ridge, float(losses.mean()), by_document, fitted)

    path: list[TriedFit] = []
    for ridge in sorted(ridges, reverse=True):
        begin = path[-1].fitted.change if path and path[-1].fitted.best else None
        path.append(tried(ridge, begin))
        if len(path) > 2 and path[-1].loss > path[-2].loss > path[-3].loss:
            break  # it only gets worse from here
    if len(ridges) == 1:
        return path
    factor = max(ridges) / sorted(ridges)[-2]
    while _best(path) is path[0] and path[0].ridge < _MOST and math.isfinite(path[0].ridge):
        path.insert(0, tried(path[0].ridge * factor, None))
    factor = sorted(ridges)[1] / min(ridges)
    while _best(path) is path[-1] and path[-1].ridge > _LEAST:
        path.append(tried(path[-1].ridge / factor, path[-1].fitted.change))
    return path


def _best(tried: Sequence[TriedFit]) -> TriedFit:
    """The lowest dev loss; of equal ones the first. What is not finite comes last."""
    return min(tried, key=lambda fit: fit.loss if math.isfinite(fit.loss) else math.inf)


def _difference(fit: TriedFit, other: TriedFit, tokens: np.ndarray) -> tuple[float, float]:
    """Mean difference of two losses per token, and its standard error over documents."""
    mean = (fit.by_document.sum() - other.by_document.sum()) / tokens.sum()
    deviation = fit.by_document - other.by_document - mean * tokens
    count = np.count_nonzero(tokens)
    if count < 2:
        return float(mean), math.inf
    error = math.sqrt(float(np.sum(deviation**2)) * count / (count - 1)) / tokens.sum()
    return float(mean), error


def moved_head(table: jax.Array, task: ReadoutProblem, fitted: FittedHead) -> jax.Array:
    """``[V, d]`` the whole head after a fit, float32; rows that did not move are the table's.

    Args:
        table: ``[V, d]`` the head that the fit began from.
        task: The problem.
        fitted: Its solution.
    """
    change = readout.difference(task, fitted.change)
    return jnp.asarray(table, jnp.float32).at[task.rows].add(change)

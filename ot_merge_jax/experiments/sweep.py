"""Choosing the strength on a dev split: one for all moved weights, then one for each group."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from ot_merge_jax import progress
from ot_merge_jax.errors import NonFiniteError
from ot_merge_jax.evaluation import nll
from ot_merge_jax.io import arrays
from ot_merge_jax.merging import fuse
from ot_merge_jax.merging.merge import Stage
from ot_merge_jax.models.model import AnyModel
from ot_merge_jax.models.sites import GROUPS
from ot_merge_jax.types import BUDGET, Choice, HParams, MergeSpec, Params, Point, Transported

#: method: Presets.
GRIDS: dict[str, tuple[float, ...]] = {
    "delta": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2),
    "interpolate": (0.0, 0.01, 0.03, 0.05, 0.1, 0.15, 0.2),
    "residual": (0.0, 0.01, 0.03, 0.05, 0.1, 0.15, 0.2),
}


def sweep(
    target: AnyModel,
    transported: Transported,
    dev: nll.Windows,
    hparams: HParams,
    *,
    spec: MergeSpec,
    grid: Sequence[float] | None = None,
    logits_at_once: int = BUDGET.logits,
) -> Choice:
    """Tries strengths on the dev split, never on a text that is reported.

    Args:
        target: The target, in the dtype to compute in.
        transported: From `ot_merge_jax.merging.weight_transport.transport_weights`.
        dev: The dev split, from `nll.windows`.
        hparams: Everything but the strength.
        spec: What moves and how.
        grid: Strengths to try; None: the grid of the rule (method: Presets). Must contain 0.
        logits_at_once: As for `nll.score`.

    Returns:
        The hyperparameters with the best strength (of equal losses, the smallest), and all points.
        The weights that are scored are not rounded to the dtype they will be stored in.

    Raises:
        NonFiniteError: if no strength gives a finite loss.
    """

    def loss(strength: Any) -> float:
        fused = _fused(target.params, transported, strength, spec=spec)
        try:
            return nll.score(
                fused, dev, cfg=target.cfg, text="dev split", logits_at_once=logits_at_once
            ).nll_per_token
        except NonFiniteError:
            return math.inf  # too far is a bad strength, not the end of the run

    groups = [name for name, members in GROUPS.items() if members & set(spec.weights)]
    points = search(loss, groups, GRIDS[spec.rule] if grid is None else grid)
    return chosen(points, hparams)


def chooser(
    stage: Stage,
    target: AnyModel,
    dev: nll.Windows,
    hparams: HParams,
    *,
    spec: MergeSpec,
    logits_at_once: int = BUDGET.logits,
) -> Callable[[Transported], Choice]:
    """`sweep` as a step ``sweep`` of a merge: every strength tried on the dev split, and the best.

    Args:
        stage: Keeps the step, e.g. `ot_merge_jax.merging.merge.call`.
        target: The target.
        dev: From `nll.windows` of the dev split.
        hparams: As for the merge.
        spec: As for the merge.
        logits_at_once: As for `sweep`.

    Returns:
        The ``choose`` of `ot_merge_jax.merging.merge.merge`.
    """

    def choose(transported: Transported) -> Choice:
        def compute() -> list[dict[str, Any]]:
            choice = sweep(
                target, transported, dev, hparams, spec=spec, logits_at_once=logits_at_once
            )
            return [point._asdict() for point in choice.tried]

        tried = stage("sweep", compute, *arrays.JSON, needs=["moved"])
        return chosen([Point(**point) for point in tried], hparams)

    return choose


@functools.partial(jax.jit, static_argnames="spec")
def _fused(params: Params, transported: Transported, strength: Any, *, spec: MergeSpec) -> Params:
    """`fuse.fuse` as one program for all strengths, and for all merges of one shape."""
    return fuse.fuse(params, transported.weights, strength, spec=spec, mask=transported.masks)


def chosen(points: list[Point], hparams: HParams) -> Choice:
    """The hyperparameters with the best of some strengths; of equal losses the first, the smaller.

    Example:
        >>> points = [Point(0.0, 2.0), Point(0.5, 1.0), Point(1.0, 1.0)]
        >>> chosen(points, HParams(0.0)).hparams.strength
        0.5
    """
    best = min(points, key=lambda point: point.loss)
    if not math.isfinite(best.loss):
        raise NonFiniteError("The loss on the dev split is not finite at any strength, not even 0.")
    return Choice(hparams._replace(strength=best.strength), points)


def at_the_edge(points: Sequence[Point], hparams: HParams) -> list[str]:
    """A sentence if the chosen strength is the largest that was tried, so that more may be better.

    Example:
        >>> at_the_edge([Point(0.0, 2.0), Point(1.2, 1.0)], HParams(1.2))
        ['The chosen strength 1.2 is the largest that was tried; a larger one may be better.']
    """
    shared = [point.strength for point in points if not isinstance(point.strength, Mapping)]
    chosen = hparams.strength
    values = chosen.values() if isinstance(chosen, Mapping) else [chosen]
    if not shared or max(values) < max(shared) or not any(values):
        return []
    return [
        f"The chosen strength {max(values):g} is the largest that was tried; "
        "a larger one may be better."
    ]


def search(
    loss: Callable[[Any], float], groups: Sequence[str], grid: Sequence[float]
) -> list[Point]:
    """One strength for all groups first, then a coordinate search over the groups.

    Args:
        loss: Loss of a strength (a number, or a mapping from group to number).
        groups: Groups that move.
        grid: Values to try; ascending, so that of equal losses the smallest is found first.

    Returns:
        Every point tried. The first ``len(grid)`` are the shared strengths.

    Example:
        >>> points = search(lambda s: (s["a"] - 1) ** 2 + s["b"] ** 2 if isinstance(s, dict)
        ...                 else (s - 1) ** 2 + s**2, ["a", "b"], [0.0, 0.5, 1.0])
        >>> min(points, key=lambda p: p.loss).strength
        {'a': 1.0, 'b': 0.0}
    """
    points = [Point(value, loss(value)) for value in progress.track(list(grid), "strength (grid)")]
    if len(groups) < 2:
        return points
    start = min(points, key=lambda point: point.loss)
    best = Point(dict.fromkeys(groups, start.strength), start.loss)
    for group in groups:
        others = [value for value in grid if value != best.strength[group]]
        tried = [
            _try(loss, {**best.strength, group: value})
            for value in progress.track(others, f"strength of {group} (grid)")
        ]
        points += tried
        best = min([best, *tried], key=lambda point: point.loss)
    return points


def _try(loss: Callable[[Any], float], strength: Mapping[str, float]) -> Point:
    """One point of the coordinate search."""
    return Point(dict(strength), loss(strength))

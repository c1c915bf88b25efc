"""The steps of a run as stages of its folder: each computes what is not there, and reads it.

What `merge`, `sweep` and `nll` do in memory, kept on disk so that a run can die anywhere. No maths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ot_merge_jax import sweep as sweeps
from ot_merge_jax.evaluate import nll
from ot_merge_jax.io import checkpoint, stages
from ot_merge_jax.merge import Stage
from ot_merge_jax.models.model import AnyModel
from ot_merge_jax.types import BUDGET, Choice, HParams, MergeSpec, Point, Transported


def keeping(run: stages.Run) -> Stage:
    """The stage of `ot_merge_jax.merge.merge` that keeps results in a run folder.

    Args:
        run: The run folder; steps without ``save`` and ``load`` are computed each time.
    """

    def stage(
        name: str, compute: Any, save: Any = None, load: Any = None, *, needs: Sequence[str] = ()
    ) -> Any:
        if save is None or load is None:
            return compute()
        return stages.stage(run, name, lambda folder: save(folder, compute), load, needs=needs)

    return stage


def kept(run: stages.Run, name: str, compute: Callable[[], Any], *, needs: Sequence[str]) -> Any:
    """A value that JSON can hold, as a stage of its own."""
    return stages.stage(
        run,
        name,
        lambda folder: checkpoint.save_json(folder / "value.json", compute()),
        lambda folder: checkpoint.load_json(folder / "value.json"),
        needs=needs,
    )


def chooser(
    run: stages.Run,
    target: AnyModel,
    dev: nll.Windows,
    hparams: HParams,
    *,
    spec: MergeSpec,
    logits_at_once: int = BUDGET.logits,
) -> Callable[[Transported], Choice]:
    """`sweeps.sweep` as a stage: every strength tried on the dev split, and the best."""

    def choose(transported: Transported) -> Choice:
        tried = kept(
            run,
            "sweep",
            lambda: (
                sweeps.sweep(
                    target, transported, dev, hparams, spec=spec, logits_at_once=logits_at_once
                ).tried
            ),
            needs=["moved"],
        )
        return sweeps.chosen([Point(**point) for point in tried], hparams)

    return choose


def save_scores(folder: Path, scores: Mapping[str, nll.Scores]) -> None:
    """Writes the loss of models, document by document."""
    named = {
        f"{name}/{key}": array
        for name, of_model in scores.items()
        for key, array in of_model._asdict().items()
    }
    checkpoint.save_arrays(folder, named)


def load_scores(folder: Path) -> dict[str, nll.Scores]:
    """Reads what `save_scores` wrote, in the order of names."""
    parts: dict[str, dict[str, Any]] = {}
    for name, array in checkpoint.load_arrays(folder).items():
        model, _, key = name.partition("/")
        parts.setdefault(model, {})[key] = array
    return {name: nll.Scores(**part) for name, part in parts.items()}

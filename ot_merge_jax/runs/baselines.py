"""The training baselines of a merge: other starts, the same data, steps and rates to try.

Every arm is a stage, so that a run resumes after the last finished one. Rates are chosen
on the dev split; the held-out text is scored once for each arm, at its chosen rate.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ot_merge_jax.errors import DivergedError
from ot_merge_jax.evaluation import nll
from ot_merge_jax.experiments import baseline_summary, controls, trial
from ot_merge_jax.experiments.baseline_summary import ArmOutcome
from ot_merge_jax.io import arrays, hf
from ot_merge_jax.merging import fuse
from ot_merge_jax.recipes import loading
from ot_merge_jax.recipes.training import Adaptation
from ot_merge_jax.reports.schema import Report
from ot_merge_jax.runs import adapt, adapt_inputs, stages
from ot_merge_jax.training import residual, step, tuning
from ot_merge_jax.training.initial import Parts, Start
from ot_merge_jax.training.loop import TrainHistory
from ot_merge_jax.training.step import Problem
from ot_merge_jax.types import MergeSpec, Params

_LOG = logging.getLogger(__name__)


def compare(settings: Adaptation, out: Path, **given: Any) -> adapt.AdaptResult:
    """Trains a merge and its baselines at equal budget, and publishes the best trained merge.

    Args:
        settings: With ``baselines``.
        out: The folder to write.
        given: As in `adapt.adapt`.

    Returns:
        The result; ``baselines`` of the report says how the arms compare.

    Raises:
        OtMergeError: as in `adapt.adapt`.
    """
    return adapt.adapt(settings, out, work=_compare, **given)


def inapplicable_reason(start: Start, name: str) -> str | None:
    """Why a start does not apply to a merge; None if it does."""
    spec = MergeSpec(rule=rule_of(start))
    return (
        controls.inapplicable_reason(name, spec=spec, source_layers=0) if name == "shrink" else None
    )


def rule_of(start: Start) -> Any:
    """The rule of a merge, from the recipe in its folder."""
    return loading.load(start.folder.path / "ot_merge" / "recipe.yaml")["rule"]


def starting(name: str, start: Start, parts: Parts, *, seed: int) -> dict[str, jax.Array]:
    """What a start adds to the target: path -> array, with the paths of the merge's residual.

    The base adds 0, so that all starts share one program. What noise and shrink add is rounded to
    the dtypes of the files, as the merge was.

    Args:
        name: ``merge``, ``base``, ``shrink`` or ``noise``.
        start: The merge.
        parts: Its base and residual.
        seed: Of the noise.

    Returns:
        For ``noise`` Gaussian numbers with the Frobenius norm of every matrix of the residual,
        where the merge moved anything; for ``shrink`` what the merge would have added if nothing
        had been transported.

    Source: method: Controls, "with training".
    """
    base, added, _ = parts
    if name == "merge":
        return added
    nothing = {path: jnp.zeros_like(leaf) for path, leaf in added.items()}
    if name == "base":
        return nothing
    masks = {path: update_of(path, leaf) for path, leaf in added.items()}
    if name == "noise":
        spec, strength = MergeSpec(rule="delta"), 1.0
        moved = controls.noise(base, added, masks, spec=spec, seed=seed)
    else:
        spec, strength = MergeSpec(rule="interpolate"), start.merged
        moved = controls.shrink(added)
    fused = fuse.fuse(base, moved, strength, spec=spec, mask=masks)
    return nothing | residual.between(trial.as_stored(fused, hf.stored_dtypes(start.folder)), base)


def update_of(path: str, added: jax.Array) -> jax.Array:
    """The mask of a residual: rows and columns of every matrix in which anything was added.

    Example:
        >>> update_of("lm_head/kernel", jnp.array([[0.0, 1.0], [0.0, 0.0], [0.0, 2.0]])).tolist()
        [[0.0, 1.0], [0.0, 0.0], [0.0, 1.0]]
    """
    mask = added != 0
    if not path.endswith("bias"):
        mask = mask.any(-1, keepdims=True) & mask.any(-2, keepdims=True)
    return mask.astype(jnp.float32)


def _compare(job: adapt.Job) -> Report:
    """The stages, up to the folder that is published."""
    settings = job.inputs.settings
    parts, source = adapt.load(job)
    trainable, frozen = step.begin(job.inputs.problem, *parts, source)
    before = adapt.scores_before(job, trainable, frozen)
    applicable = {
        name: inapplicable_reason(job.inputs.start, name) for name in settings.baselines or ()
    }
    names = ["merge", *_ordered([name for name, why in applicable.items() if why is None])]
    problems = _problems(job)
    arms: dict[str, dict[str, list[ArmOutcome]]] = {}
    for objective in settings.objectives:
        arms[objective] = {name: [] for name in names}
        for name, outcomes in arms[objective].items():
            for seed, problem in problems.items():
                rates = [outcomes[0].rate] if outcomes else settings.grid
                kind = problem.objective._replace(kind=objective)
                outcomes.append(
                    _arm(job, problem._replace(objective=kind), name, parts, source, rates)
                )
                _LOG.info(
                    "%s from %s, seed %d: dev loss %.4f at rate %g",
                    objective, name, seed, outcomes[-1].dev[-1][1], outcomes[-1].rate,
                )  # fmt: skip
    best = min(arms, key=lambda objective: arms[objective]["merge"][0].dev[-1][1])
    missing = [name for name in ("shrink", "noise") if name not in applicable]
    missing = [name for name in missing if inapplicable_reason(job.inputs.start, name) is None]
    comparison = baseline_summary.summary(
        arms, seed=settings.seed, rates=settings.grid, best=best, missing=missing,
        not_applicable={name: why for name, why in applicable.items() if why is not None},
    )  # fmt: skip
    chosen = arms[best]["merge"][0]
    stage = _name(best, "merge", settings.seed)
    trained = _trained(job.run.folder / "state" / stage, trainable)
    config = step.step_config(job.inputs.problem)
    whole = adapt.TrainedModel(
        parts._replace(base=step.base_of(trained, frozen, config=config)),
        step.params_of(trained, frozen, config=config),
        TrainHistory(None, chosen.losses, (), chosen.dev),  # pyright: ignore[reportArgumentType]
        _events(arms),
    )
    return adapt.finish(job, whole, before, needs=[stage], more=comparison._asdict())


def _ordered(names: Sequence[str]) -> list[str]:
    """``base``, then the other starts among the names, in a fixed order."""
    return ["base", *(name for name in ("shrink", "noise") if name in names)]


def _problems(job: adapt.Job) -> dict[int, Problem]:
    """Seed -> training problem, with its own dev split and order and the same settings."""
    settings = job.inputs.settings
    problems = {settings.seed: job.inputs.problem}
    for seed in range(settings.seed + 1, settings.seed + settings.seeds):
        again = settings.model_copy(update={"seed": seed})
        problems[seed] = adapt_inputs.check(again, job.run.folder / "unused", offline=True).problem
    return problems


def _name(objective: str, name: str, seed: int) -> str:
    """The stage of an arm."""
    return f"arm-{objective}-{name}-{seed}"


def _arm(
    job: adapt.Job,
    problem: Problem,
    name: str,
    parts: Parts,
    source: Params | None,
    rates: Sequence[float],
) -> ArmOutcome:
    """Trains one arm with one seed, and scores it.

    A rate that was best with the first seed and diverges with a later one does not end the
    run: that seed then tries all rates.
    """
    seed, objective = problem.settings.seed, problem.objective.kind
    teacher = source if objective == "kd" else None
    grid = job.inputs.settings.grid
    is_published = name == "merge" and seed == job.inputs.settings.seed

    def make(folder: Path) -> None:
        added = starting(name, job.inputs.start, parts, seed=seed)
        trainable, frozen = step.begin(problem, parts.base, added, parts.factor, teacher)
        tune = functools.partial(
            tuning.tune, problem, trainable, frozen, name=f"{objective} from {name}"
        )
        try:
            arm = tune(rates)
        except DivergedError:
            if len(rates) == len(grid):
                raise
            _LOG.warning(
                "%s from %s: the first seed's rate %g diverged with seed %d; all are tried.",
                objective, name, *rates, seed,
            )  # fmt: skip
            arm = tune(grid)
        params = step.params_of(arm.trained, frozen, config=step.step_config(problem))
        scores = adapt.score(
            job.inputs, trial.as_stored(params, hf.stored_dtypes(job.inputs.start.folder))
        )
        if is_published:
            leaves = jax.tree.leaves(arm.trained)
            arrays.save_tree(folder / "trained", {_key(i): x for i, x in enumerate(leaves)})
        best = arm.best._asdict() | {"tried": [(tried.rate, tried.loss) for tried in arm.tried]}
        arrays.save_json(folder / "arm.json", best)
        arrays.save_arrays(folder / "scores", scores._asdict())

    def load(folder: Path) -> ArmOutcome:
        saved = arrays.load_json(folder / "arm.json")
        scores = nll.Scores(**arrays.load_arrays(folder / "scores"))  # pyright: ignore[reportArgumentType]
        dev = [(number, loss) for number, loss in saved["dev"]]
        tried = [(rate, loss) for rate, loss in saved["tried"]]
        return ArmOutcome(seed, saved["rate"], tried, saved["losses"], dev, scores)

    return stages.stage(job.run, _name(objective, name, seed), make, load)


def _key(place: int) -> str:
    """The name of an array."""
    return f"{place:05d}"


def _trained(folder: Path, like: Any) -> Any:
    """The parameters that an arm trained, as `_arm` saved them."""
    saved = arrays.load_tree(folder / "trained")
    leaves, treedef = jax.tree.flatten(like)
    return jax.tree.unflatten(
        treedef,
        [
            jax.device_put(np.asarray(saved[_key(place)], leaf.dtype), leaf.sharding)
            for place, leaf in enumerate(leaves)
        ],
    )


def _events(arms: dict[str, dict[str, list[ArmOutcome]]]) -> list[str]:
    """Lines of ``events.jsonl``: every step of every arm at its chosen rate."""
    lines = []
    for objective, of_name in arms.items():
        for name, outcomes in of_name.items():
            for outcome in outcomes:
                dev = dict(outcome.dev)
                shared = {"objective": objective, "start": name, "seed": outcome.seed}
                for number, loss in enumerate(outcome.losses, 1):
                    line = {"step": number, "rate": outcome.rate, "loss": loss}
                    line |= {"dev_loss": dev[number]} if number in dev else {}
                    lines.append(json.dumps(shared | line) + "\n")
    return lines

"""A whole adaptation: a folder and texts in, one published folder out. Calls the stages in order.

Everything is checked that can be checked without reading weights before any weight is read.
"""

from __future__ import annotations

import glob
import importlib.metadata
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from ot_merge_jax import progress
from ot_merge_jax.data import leaks
from ot_merge_jax.errors import RecipeError, ResourceError
from ot_merge_jax.evaluation import nll, statistics
from ot_merge_jax.io import arrays, atomic, hf
from ot_merge_jax.recipes.training import Adaptation
from ot_merge_jax.reports import schema
from ot_merge_jax.reports.schema import Report
from ot_merge_jax.runs import (
    adapt_artifacts,
    adapt_checkpoint,
    adapt_inputs,
    artifacts,
    memory,
    provenance,
    stages,
)
from ot_merge_jax.runs.adapt_inputs import AdaptInputs
from ot_merge_jax.training import initial, loop, step
from ot_merge_jax.training.initial import Parts
from ot_merge_jax.training.loop import TrainHistory
from ot_merge_jax.training.step import Frozen, Problem

_LOG = logging.getLogger(__name__)
_SETTINGS = "settings"


#: Scores by name, and the dev loss of what was written.
Written = tuple[dict[str, nll.Scores], float | None]


class Job(NamedTuple):
    """An adaptation that is under way.

    Attributes:
        run: The folder of its stages.
        inputs: Its checked inputs.
        side: For the provenance.
        mesh: Where models live.
        began: ``time.monotonic()`` when this process began.
    """

    run: stages.RunFolder
    inputs: AdaptInputs
    side: dict[str, Any]
    mesh: jax.sharding.Mesh | None
    began: float


#: Runs the stages of a job, up to the folder that is published, and returns the report.
Work = Callable[[Job], Report]


class TrainedModel(NamedTuple):
    """A trained model.

    Attributes:
        parts: The trained base and the residual, which was held constant.
        folded: The plain parameters.
        history: How it was trained.
        events: Lines of ``events.jsonl``.
    """

    parts: Parts
    folded: Any
    history: TrainHistory
    events: list[str]


class AdaptResult(NamedTuple):
    """The result of an adaptation.

    Attributes:
        out: The published folder.
        report: What ``report.json`` holds.
    """

    out: Path
    report: Report


def adapt(
    settings: Adaptation,
    out: Path,
    *,
    command: str,
    overwrite: bool = False,
    resume: bool = False,
    offline: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    memory_limit: int | None = None,
    show: Callable[[Adaptation], None] | None = None,
    keep: bool = True,
    work: Work | None = None,
) -> AdaptResult:
    """Trains a model, or what a merge left trainable, and publishes the folded folder atomically.

    Args:
        settings: What is asked for.
        out: The folder to write; absent, or empty, unless ``overwrite``.
        command: What the user typed, for the card and the provenance.
        overwrite: Whether an existing folder is replaced.
        resume: Whether the training of an interrupted run of the same settings, inputs and versions
            is continued; on CPU the result has the bytes of an uninterrupted one.
        offline: Whether the network is forbidden.
        mesh: Where models and batches live; None: one device.
        memory_limit: Bytes that may be used; None: those of the machine.
        show: Called with the settings once all of them are decided, before weights are read.
        keep: Whether an interrupted run can be resumed.
        work: The stages; None: one training.

    Returns:
        The result. ``out`` is a Hugging Face folder with the details in ``ot_merge/``.

    Raises:
        OtMergeError: with an exit code; nothing has been written then, except the checkpoints
            that are kept when the disk is full or training diverges.
        KeyboardInterrupt: saying how to resume.
    """
    began = time.monotonic()
    inputs = adapt_inputs.check(settings, out, overwrite=overwrite or resume, offline=offline)
    _check_memory(inputs, memory_limit)
    if inputs.leaked:
        total = inputs.leaked + len(inputs.held_out or [])
        _LOG.warning("%s", leaks.sentence(inputs.leaked, total, "training"))
    if show is not None:
        show(inputs.settings)
    side = artifacts.inputs(inputs.folders, inputs.sources)
    if inputs.start.target is not None:
        initial.verify(inputs.start, side["inputs"]["target"])
    decided = {
        "adapt": inputs.settings.to_dict(), **side, "versions": _versions(),
    }  # fmt: skip
    key = stages.key(decided)
    side = {"run": key, "command": command, **side}
    with atomic.locked(out):
        if resume and (report := adapt_artifacts.read(out, key)) is not None:
            _LOG.info("resume: %s is finished", out)
            stages.clear(out, key)
            return AdaptResult(out, report)
        if resume:
            _refuse_others(out, key, decided)
        with stages.run_folder(
            out, key, command=command, resume=resume, overwrite=overwrite, keep=keep
        ) as run:
            stages.stage(
                run,
                _SETTINGS,
                lambda folder: arrays.save_json(folder / f"{_SETTINGS}.json", decided),
                lambda folder: folder,
            )
            job = Job(run, inputs, side, mesh, began)
            return AdaptResult(out, (work or _adapt)(job))


def load(job: Job) -> tuple[Parts, Any]:
    """The model taken apart, and the teacher's parameters; None without a teacher."""
    inputs, settings = job.inputs, job.inputs.settings
    _LOG.info("load %s", inputs.start.folder.where)
    parts = initial.load(inputs.start, strength=settings.strength, mesh=job.mesh)
    source = None
    if inputs.source is not None:
        _LOG.info("load %s", inputs.source.where)
        _, source = hf.load_folder(inputs.source, mesh=job.mesh, dtype=jnp.dtype(settings.dtype))
    return parts, source


def scores_before(job: Job, trainable: Any, frozen: Frozen) -> Written:
    """Scores of the start on the held-out text, and of its target if it was merged."""
    return stages.stage(
        job.run,
        "before",
        lambda folder: _save_scores(folder, job.inputs, trainable, frozen),
        _load_scores,
    )


def _adapt(job: Job) -> Report:
    """The stages of one training, up to the folder that is published."""
    run, problem = job.run, job.inputs.problem
    parts, source = load(job)
    trainable, frozen = step.begin(problem, *parts, source)
    before = scores_before(job, trainable, frozen)
    new = step.new_history(problem, trainable)
    history, events = adapt_checkpoint.restore(run, new)
    if history.losses:
        _LOG.info("resume: %d of %d steps are done", len(history.losses), problem.settings.steps)
    history, events = _train(run, problem, history, frozen, events)
    config, trained = step.step_config(problem), loop.result(history)
    parts = parts._replace(base=step.base_of(trained, frozen, config=config))
    folded = step.params_of(trained, frozen, config=config)
    return finish(
        job, TrainedModel(parts, folded, history, events), before,
        needs=[adapt_checkpoint.name_of(history)] if history.losses else [],
    )  # fmt: skip


def finish(
    job: Job,
    trained: TrainedModel,
    before: Written,
    *,
    needs: Sequence[str],
    more: Mapping[str, Any] | None = None,
) -> Report:
    """The stages after training: the model, its check, the details.

    Args:
        job: What is done.
        trained: What was trained.
        before: From `scores_before`.
        needs: Stages that hold the trained model.
        more: Fields of the report that replace, or add to, those of one training.

    Returns:
        The report.
    """
    run, inputs = job.run, job.inputs
    parts, folded, history, events = trained
    problem = inputs.problem
    model = stages.stage(
        run,
        "model",
        lambda folder: hf.write_model(
            folder, folded, cfg=problem.objective.cfg, like=inputs.start.folder.path
        ),
        lambda folder: folder,
        needs=needs,
        folder=stages.MODEL,
    )
    after = stages.stage(
        run, "after", lambda folder: _save_written(folder, inputs, model), _load_scores,
        needs=["model"],
    )  # fmt: skip
    report = _report(inputs, history, before, after).model_copy(update=more)
    stages.stage(
        run,
        "details",
        lambda folder: adapt_artifacts.write(
            folder,
            begun=inputs.start,
            folders=inputs.folders,
            settings=inputs.settings.to_yaml(),
            seed=inputs.settings.seed,
            parts=parts,
            report=report,
            events=events,
            side=job.side,
            began=job.began,
        ),
        lambda folder: folder,
        needs=list(stages.finished(run)),
        folder=stages.MODEL,
    )
    return report


def _train(
    run: stages.RunFolder,
    problem: Problem,
    history: TrainHistory,
    frozen: Frozen,
    events: list[str],
) -> tuple[TrainHistory, list[str]]:
    """The training, with checkpoints, events and progress; ends in a checkpoint."""
    settings, begun = problem.settings, time.monotonic()
    size = min(settings.batch_size, len(problem.train.tokens)) * problem.train.tokens.shape[1]
    first, live = len(history.losses), run.folder / "events.jsonl"
    live.write_text("".join(events), encoding="utf-8")

    def rate(history: TrainHistory) -> float:
        return (len(history.losses) - first) * size / max(1e-9, time.monotonic() - begun)

    with adapt_checkpoint.interrupts() as is_wanted:

        def on_step(history: TrainHistory) -> None:
            nonlocal latest
            latest, done = history, len(history.losses)
            is_dev = history.dev[-1][0] == done
            if done % settings.log_every == 0 or is_dev:
                events.append(_event(history, rate(history), is_dev=is_dev))
                with live.open("a", encoding="utf-8") as file:
                    file.write(events[-1])
            is_last = is_wanted()  # read once: a signal during saving waits for the next step
            if done % (settings.save_every or 1) == 0 or is_last:
                adapt_checkpoint.save(run, history, events)
            if is_last:
                raise KeyboardInterrupt

        def on_divergence(history: TrainHistory) -> None:
            dev = step.dev_loss(history.state.params, frozen, problem)
            if not np.isfinite(dev):
                adapt_checkpoint.drop(run, history)  # the update before has broken it
            elif history.losses:
                adapt_checkpoint.save(run, history, events)

        latest = history
        history = step.train(
            problem,
            history,
            frozen,
            on_step=on_step,
            on_divergence=on_divergence,
            progress_of=lambda steps: progress.track(
                steps, "adapt (steps)", note=lambda: _note(latest, rate(latest))
            ),
        )
        if history.losses:
            adapt_checkpoint.save(run, history, events)
        if is_wanted():
            raise KeyboardInterrupt
    live.unlink()
    return history, events


def _event(history: TrainHistory, rate: float, *, is_dev: bool) -> str:
    """One line of ``events.jsonl``."""
    line: dict[str, Any] = {
        "step": len(history.losses), "loss": history.losses[-1], "gradient_norm": history.norms[-1],
        "tokens_per_second": round(rate, 1),
    }  # fmt: skip
    return json.dumps(line | ({"dev_loss": history.dev[-1][1]} if is_dev else {})) + "\n"


def _note(history: TrainHistory, rate: float) -> str:
    """The note beside the steps in the progress line."""
    if not history.losses:
        return ""
    return f"loss {history.losses[-1]:.4f}, dev {history.dev[-1][1]:.4f}, {rate:.0f} tokens/s"


def _save_scores(folder: Path, inputs: AdaptInputs, trainable: Any, frozen: Frozen) -> None:
    """Scores of the start on the held-out text, and of its target if it was merged."""
    config = step.step_config(inputs.problem)
    models = {"before": lambda: step.params_of(trainable, frozen, config=config)}
    if frozen.residual:
        models["target"] = lambda: step.base_of(trainable, frozen, config=config)
    scores = (
        {name: score(inputs, make()) for name, make in models.items()} if inputs.held_out else {}
    )
    arrays.save_json(folder / "scores.json", {"scores": scores, "dev": None})


def _save_written(folder: Path, inputs: AdaptInputs, model: Path) -> None:
    """Scores of the files that were written, as they were rounded: the check of the export too."""
    _, written = hf.load_hf(model, dtype=jnp.float32)
    dev = step.next_token_loss(written, inputs.problem)
    if not np.isfinite(dev):
        raise OSError(f"{model} was written, but its loss is not finite; report this as a bug.")
    scores = {"after": score(inputs, written)} if inputs.held_out else {}
    arrays.save_json(folder / "scores.json", {"scores": scores, "dev": dev})


def score(inputs: AdaptInputs, params: Any) -> nll.Scores:
    """Scores on the held-out text."""
    cfg = inputs.problem.objective.cfg
    cut = nll.windows(inputs.held_out or [], inputs.tokenizer, max_positions=cfg.max_positions)
    return nll.score(params, cut, cfg=cfg)


def _load_scores(folder: Path) -> Written:
    """Reads what `_save_scores` or `_save_written` wrote."""
    saved = arrays.load_json(folder / "scores.json")
    scores = {
        name: nll.Scores(*(np.array(of_model[field]) for field in nll.Scores._fields))
        for name, of_model in saved["scores"].items()
    }
    return scores, saved["dev"]


def _report(inputs: AdaptInputs, history: TrainHistory, before: Written, after: Written) -> Report:
    """The report of one training."""
    settings, scores = inputs.settings, before[0] | after[0]
    evaluation = {name: schema.Entry(**of_model.totals) for name, of_model in scores.items()}
    change = None
    if "after" in scores:
        changes = {
            name: statistics.paired_bootstrap(scores["after"], scores[name], seed=settings.seed)
            for name in ("before", "target")
            if name in scores
        }
        change = changes["before"]
        differences: dict[str, Any] = {
            f"against_{name}": schema.Difference(**difference._asdict())
            for name, difference in changes.items()
        }
        evaluation["after"] = schema.Entry(**scores["after"].totals, **differences)
    best = min(history.dev, key=lambda point: point[1])
    blocks, pairs = inputs.problem.train, inputs.problem.train.pairs
    return Report(
        version=schema.VERSION,
        verdict=adapt_artifacts.verdict(change, steps=len(history.losses)),
        controls={},
        objective=settings.objective,
        steps=len(history.losses),
        losses=list(history.losses),
        dev=schema.Dev(
            before=history.dev[0][1],
            after=after[1],
            best_step=best[0],
            curve=[list(point) for point in history.dev],
        ),
        evaluation=evaluation,
        data=arrays.plain(
            {
                **inputs.counts,
                "blocks": len(blocks.tokens),
                "tokens_that_count": blocks.count,
                "dev_blocks": len(inputs.problem.dev.tokens),
                "universal_distillation": inputs.problem.objective.is_universal,
                "target_matched": pairs and pairs.target_matched,
                "source_matched": pairs and pairs.source_matched,
            }
        ),
        residual=schema.Residual(merged_at=inputs.start.merged, held_at=inputs.factor),
        settings=yaml.safe_load(provenance.public(settings.to_yaml())),
    )


def _versions() -> dict[str, str]:
    """Versions that decide the numbers, beside settings and inputs."""
    named = ("ot-merge-jax", "jax", "numpy", "optax", "tokenizers", "transformers")
    return {name: importlib.metadata.version(name) for name in named}


def _refuse_others(out: Path, key: str, decided: Mapping[str, Any]) -> None:
    """Refuses to resume where only a training with other settings or inputs was interrupted."""
    folders = sorted(out.resolve().parent.glob(f"{glob.escape(out.name)}.partial-*"))
    if any(folder.name.endswith(f"-{key}") for folder in folders):
        return
    for folder in folders:
        try:
            was = arrays.load_json(folder / "state" / _SETTINGS / f"{_SETTINGS}.json")
            changes = _changes(was, json.loads(json.dumps(decided)))
        except (OSError, ValueError, AttributeError):
            continue
        raise RecipeError(
            f"--resume: what was interrupted in {folder.name} differs in {', '.join(changes)}; "
            "give the same settings and inputs, or leave --resume out to start anew."
        )


def _changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys that differ, settings with both values."""
    before, after = was.get("adapt", {}), now["adapt"]
    changes = [
        f"{key} (was {before.get(key)!r}, now {after.get(key)!r})"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    for part in ("inputs", "texts", "versions"):
        earlier, later = was.get(part, {}), now[part]
        changes += [
            f"{part} {key}"
            for key in sorted(earlier.keys() | later.keys())
            if earlier.get(key) != later.get(key)
        ]
    return changes or ["something unknown"]


def _check_memory(inputs: AdaptInputs, limit: int | None) -> None:
    """Refuses, before weights are read, a step whose arrays do not fit into memory together."""
    needed = memory.PROCESS + step.peak_bytes(
        inputs.problem,
        residuals=(inputs.start.merged is not None) + (inputs.settings.baselines is not None),
        source=None if inputs.source is None else inputs.source.cfg,
    )
    most = memory.of_machine() if limit is None else limit
    _LOG.info("memory: at least %s", memory.gib(needed))
    if needed > most:
        raise ResourceError(
            f"The training needs at least {memory.gib(needed)}, and {memory.gib(most)} are "
            "allowed; use --lora-rank, --grad-accum-steps, --remat or a smaller --seq-len, or "
            "raise --memory-limit."
        )

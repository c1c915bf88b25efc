"""A whole run: folders and texts in, one published folder out. Calls the stages in order; no maths.

Everything is checked that can be checked without reading weights before any weight is read.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from ot_merge_jax.data import batching, calibration, leaks, tokenizers
from ot_merge_jax.data.documents import DEV_FRACTION
from ot_merge_jax.errors import StrictError
from ot_merge_jax.evaluation import nll, samples, saved_scores
from ot_merge_jax.evaluation.kl import divergence
from ot_merge_jax.experiments import summary, sweep, trial, verdict
from ot_merge_jax.experiments.controls import arms, inapplicable_reasons
from ot_merge_jax.io import arrays, atomic, hf, lazy, safetensors
from ot_merge_jax.io.folder import ModelFolder, eos_token_ids, open_folder
from ot_merge_jax.merging.merge import Stage, gather_rows, merge
from ot_merge_jax.models import decoder, offload, specs
from ot_merge_jax.models.config import ModelConfig
from ot_merge_jax.models.model import BASE, SOURCE, TARGET, AnyModel, DeferredModel, Models
from ot_merge_jax.models.sites import sites_of
from ot_merge_jax.recipes.recipe import Recipe
from ot_merge_jax.reports import schema
from ot_merge_jax.reports.schema import Report
from ot_merge_jax.runs import artifacts, controls, memory, plan, provenance, stages
from ot_merge_jax.runs.inputs import MergeInputs, calibration_summary, log_matches
from ot_merge_jax.transport import cost, site_diagnostics
from ot_merge_jax.types import BUDGET, Alignment, Budget, MergeReport, MergeSpec, Params

_LOG = logging.getLogger(__name__)


class RunResult(NamedTuple):
    """The result of a run.

    Attributes:
        out: The published folder.
        report: What ``report.json`` holds.
        merge: Diagnostics of the merge.
        warnings: Sentences for the user.
        scores: Role -> scores on the held-out text; empty without one.
    """

    out: Path
    report: Report
    merge: MergeReport
    warnings: list[str]
    scores: dict[str, nll.Scores]


def run(
    recipe: Recipe,
    out: Path,
    *,
    command: str,
    overwrite: bool = False,
    resume: bool = False,
    keep: bool = True,
    strict: bool = False,
    offline: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    memory_limit: int | None = None,
    known: Mapping[str, nll.Scores] | None = None,
    show: Callable[[Recipe], None] | None = None,
) -> RunResult:
    """Merges two folders into a third and publishes it atomically.

    Args:
        recipe: The resolved recipe.
        out: The folder to write; absent, or empty, unless ``overwrite``.
        command: What the user typed, for the card and the provenance.
        overwrite: Whether an existing folder is replaced.
        resume: Whether the finished stages of an earlier run of the same settings, inputs and
            versions are used, after their hashes have been checked.
        keep: Whether a run that is interrupted, or finds the disk or the memory full, keeps its
            finished stages beside ``out``.
        strict: Whether a solver that did not converge, or a worse verdict, is an error.
        offline: Whether the network is forbidden; the hub's local cache is still used.
        mesh: Where models and batches live; None: one device.
        memory_limit: Bytes of host memory the run may use; None: those of the machine. If that is
            too little, stages work in smaller blocks, and then the source and its base are read
            layer by layer.
        known: Role -> scores on the held-out text from an earlier run with the same model and text;
            they are not computed again.
        show: Called with the recipe once everything in it is decided, before weights are read.

    Returns:
        The result. ``out`` is a Hugging Face folder with the details in ``ot_merge/``.

    Raises:
        OtMergeError: with an exit code; nothing has been written then, except the finished stages
            after a `ResourceError`.
        KeyboardInterrupt: saying how to resume.
    """
    started = time.monotonic()
    inputs, memory_plan = plan.checked(
        recipe, out, overwrite=overwrite or resume, offline=offline, limit=memory_limit
    )
    recipe = inputs.recipe
    if show is not None:
        show(recipe)
    log_matches(inputs)
    _LOG.info("memory: %s", memory_plan)
    if memory_plan.budget != BUDGET:
        _LOG.info("memory: in smaller blocks, at a time %s", memory_plan.budget)
    side = artifacts.inputs(inputs.folders, inputs.sources)
    # reading layer by layer, or in other blocks, rounds differently, so it is another run
    decided: dict[str, Any] = {"versions": _versions(), "on disk": sorted(memory_plan.offloaded)}
    if memory_plan.budget != BUDGET:
        decided["budget"] = memory_plan.budget._asdict()
    key = stages.key({"recipe": recipe.to_yaml(), **decided, **side})
    side = {"run": key, "command": command, **side}
    with atomic.locked(out):
        if resume and (done := artifacts.read(out, key)):
            _LOG.info("resume: %s is finished", out)
            stages.clear(out, key)
            return RunResult(out, *done, done[0].warnings, {})
        with stages.run_folder(
            out, key, command=command, resume=resume, overwrite=overwrite, keep=keep
        ) as state:
            return _merge(
                state, inputs, out, side, known or {}, memory_plan,
                strict=strict, mesh=mesh, started=started,
            )  # fmt: skip


def _merge(
    state: stages.RunFolder,
    inputs: MergeInputs,
    out: Path,
    side: dict[str, Any],
    known: Mapping[str, nll.Scores],
    memory_plan: memory.MemoryPlan,
    *,
    strict: bool,
    mesh: jax.sharding.Mesh | None,
    started: float,
) -> RunResult:
    """The stages of a run, up to the folder that is published."""
    recipe, seed = inputs.recipe, inputs.recipe.seed
    spec, hparams, budget = recipe.spec(), recipe.hparams(), memory_plan.budget
    is_chosen = recipe.strength == "auto"
    deferred = _deferred(inputs.folders, memory_plan.offloaded, mesh)
    models = Models(deferred[TARGET], deferred[SOURCE], deferred.get(BASE))
    split, stage = controls.split(inputs), stages.keeping(state)
    _LOG.info("transport: %s", ", ".join(spec.weights))
    choose = None
    if is_chosen and split.dev is not None:
        choose = sweep.chooser(
            stage, models.target, split.dev, hparams,
            spec=spec, logits_at_once=budget.logits,
        )  # fmt: skip
    merged = merge(
        models, split.batches, hparams,
        spec=spec, vocabulary=split.vocabulary, stage=stage, choose=choose,
        budget=budget,
    )  # fmt: skip
    model = stages.stage(
        state,
        "model",
        lambda folder: _write_model(folder, merged.params, models.target.cfg, inputs.folders),
        lambda folder: folder,
        needs=["moved", *(["sweep"] if merged.choice.tried else [])],
        folder=stages.MODEL,
    )
    merged = merged._replace(params=None)  # read from the files from here on
    sites = _site_facts(stage, models, merged.alignment, inputs.held_out_data, spec, seed, budget)
    unconverged = _unconverged(merged.report)
    chosen, points = merged.choice
    warnings = [
        *_silent(merged.alignment, spec), *unconverged, *sweep.at_the_edge(points, chosen),
    ]  # fmt: skip
    if inputs.held_out is not None and inputs.leaked:
        total = inputs.leaked + len(inputs.held_out)
        warnings.append(leaks.sentence(inputs.leaked, total, "calibration"))
    if inputs.held_out is not None and (too_few := verdict.few(len(inputs.held_out))):
        warnings.append(f"No interval says anything: {too_few}; add documents.")
    scores, evaluation = _evaluate(stage, inputs, models, model, known, budget)
    measured, against, shown = verdict.judge(None, {}, missing=[]), None, {}
    controlled: dict[str, schema.Entry] = {}
    if inputs.held_out is not None:
        context = trial.TrialContext(
            models, hparams, spec, is_chosen, controls.target_windows(inputs, inputs.held_out),
            scores["target"], hf.stored_dtypes(inputs.folders["target"]), budget,
        )  # fmt: skip
        reasons = inapplicable_reasons(
            recipe.controls, spec=spec, source_layers=models.source.cfg.num_layers,
            has_dev=split.dev is not None,
        )  # fmt: skip
        names = [name for name in arms(recipe.controls) if name not in reasons]
        arm = trial.Arm(chosen.strength, points, scores["merge"])
        measured, against, by_seed = summary.outcome(
            controls.every_seed(state, inputs, context, merged, arm, names),
            scores["target"], kinds=recipe.controls, inapplicable=reasons, seed=seed,
        )  # fmt: skip
        shown = by_seed._asdict()
        models_alone = {name: evaluation[name] for name in ("target", "source")}
        controlled = models_alone | shown.pop("controls")
    for role in deferred.keys() - {TARGET}:
        deferred[role].release()  # only the target and the merge are read from here on
    judgement = verdict.of_merge(measured, merged.report, chosen, spec, against, is_auto=is_chosen)
    if strict and (unconverged or measured.outcome == "worse"):
        raise StrictError(f"--strict: {(unconverged or [judgement.sentence])[0]}")
    report = Report(
        version=schema.VERSION,
        verdict=judgement.sentence,
        outcome=judgement.outcome,
        warnings=warnings,
        controls=controlled,
        evaluation=evaluation,
        strength=schema.Strength(
            chosen=chosen.strength,
            tried=summary.tried(points),
            split=schema.Split(
                train_documents=len(inputs.texts),
                dev_documents=len(inputs.dev),
                fraction=DEV_FRACTION,
                seed=seed,
            ),
        ),
        samples=_samples(stage, inputs, models, model),
        weights=summary.weights(merged.report),
        sites=sites,
        calibration=arrays.plain(calibration_summary(inputs)),
        settings=yaml.safe_load(provenance.public(recipe.to_yaml())),
        **shown,
    )
    stages.stage(
        state,
        "details",
        lambda folder: artifacts.write(
            folder,
            settings=recipe.to_yaml(),
            seed=seed,
            folders=inputs.folders,
            coupling=None if merged.alignment is None else merged.alignment.coupling,
            report=report,
            side=side,
            started=started,
        ),
        lambda folder: folder,
        needs=list(stages.finished(state)),
        folder=stages.MODEL,
    )
    return RunResult(out, report, merged.report, warnings, scores)


def _deferred(
    folders: Mapping[str, ModelFolder], offloaded: Collection[str], mesh: jax.sharding.Mesh | None
) -> dict[str, DeferredModel]:
    """Role -> model, each loaded in float32 when a stage asks for it."""
    return {
        role: DeferredModel(
            folder.cfg,
            functools.partial(_open, folder)
            if role in offloaded
            else functools.partial(_load, folder, mesh),
        )
        for role, folder in folders.items()
    }


def _site_facts(
    stage: Stage,
    models: Models,
    alignment: Alignment | None,
    unseen: calibration.Calibration | None,
    spec: MergeSpec,
    seed: int,
    budget: Budget,
) -> dict[str, schema.Site]:
    """Diagnostics of every site, also on held-out rows if there are any."""
    held_out, needs = None, []
    if alignment is not None and unseen is not None:
        rows = functools.partial(
            gather_rows,
            sites=sites_of(spec.weights), stage=stage, hidden_at_once=budget.hidden,
        )  # fmt: skip
        held_out = (
            rows("unseen-target", models.target, unseen.target, role=TARGET),
            rows("unseen-source", models.reference, unseen.source, role=models.reference_role),
        )
        needs = ["unseen-target", "unseen-source"]
    if alignment is not None:
        needs += ["rows-target", "rows-source", "coupling"]

    def compute() -> dict[str, Any]:
        if alignment is None:
            return {}
        return site_diagnostics.sites(
            alignment, held_out, signed=spec.signed, seed=seed, plan_at_once=budget.plan_block
        )

    sites = stage("sites", compute, *arrays.JSON, needs=needs)
    return {name: schema.Site.model_validate(site) for name, site in sites.items()}


def _versions() -> list[str]:
    """Versions that decide the numbers, beside settings and inputs."""
    named = ("ot-merge-jax", "jax", "numpy", "ott-jax", "tokenizers", "transformers")
    return [importlib.metadata.version(name) for name in named]


def _load(folder: ModelFolder, mesh: jax.sharding.Mesh | None) -> Params:
    """The parameters of a model in float32."""
    _LOG.info("load %s", folder.where)
    return hf.load_folder(folder, mesh=mesh, dtype=jnp.float32).params


def _open(folder: ModelFolder) -> Params:
    """Parameters that stay on disk, in float32 when they are read."""
    _LOG.info("read layer by layer, on one device: %s", folder.where)
    return lazy.lazy_model(folder, dtype=jnp.float32).params


def _write_model(
    folder: Path, params: Params, cfg: ModelConfig, folders: Mapping[str, ModelFolder]
) -> None:
    """The fused parameters as a Hugging Face folder, read back and checked."""
    hf.write_model(folder, params, cfg=cfg, like=folders["target"].path)
    _self_check(folder, params)


def _unconverged(report: MergeReport) -> list[str]:
    """Sentences about plans that did not converge."""
    return [
        f"{name}: the neuron transport did not converge in "
        f"{int(np.sum(~np.asarray(weight.converged)))} "
        f"of {len(weight.converged)} layers "
        f"(largest marginal error {float(np.max(weight.error)):.1e}); "
        f"raise epsilon or max_iterations."
        for name, weight in report.weights.items()
        if not np.all(weight.converged)
    ]


def _silent(alignment: Alignment | None, spec: MergeSpec) -> list[str]:
    """Sentences about target layers whose activations never change."""
    if alignment is None:
        return []
    layers = {
        site: np.flatnonzero(~cost.is_nonconstant(alignment.target.values[site]))
        for site in sites_of(spec.weights)
    }
    return [
        f"The target's activations at {site} never change in layer "
        f"{', '.join(map(str, unchanging))}; the weights at it stay the target's: check them, or "
        "use more varied text."
        for site, unchanging in layers.items()
        if len(unchanging)
    ]


_head = jax.jit(decoder.head, static_argnames="cfg")


def _self_check(folder: Path, fused: Params) -> None:
    """Reads the written folder back, one piece at a time: parameters, tokenizer, a forward pass."""
    opened = open_folder(folder)
    cfg, written = lazy.lazy_model(opened)
    for spec in specs.param_specs(cfg):
        ours, theirs = np.asarray(specs.get(fused, spec.path)), specs.get(written, spec.path)
        pieces = zip(ours, theirs, strict=True) if spec.is_stacked else [(ours, theirs)]
        for name, (expected, read) in zip(spec.tensor_names(), pieces, strict=True):
            # the layers of a stack may have different dtypes
            dtype = safetensors.DTYPES[opened.tensors[name].dtype]
            if not np.array_equal(expected.astype(dtype), np.asarray(read).astype(dtype)):
                raise OSError(f"{folder} does not hold the merged parameters; check the disk.")
    tokenizers.load_tokenizer(folder)
    batch = batching.batches([[0, 1 % cfg.vocab_size]], [([-1], [0])])[0]
    cfg, written = lazy.lazy_model(opened, dtype=jnp.float32)
    [x] = offload.hidden_states(written, [batch], cfg=cfg, what="check what was written")
    logits = _head(offload.of_head(written, cfg=cfg), x[:1, :2], cfg=cfg)
    if not np.isfinite(np.asarray(logits)).all():
        raise OSError(f"{folder} was written, but its logits are not finite; report this as a bug.")


def _evaluate(
    stage: Stage,
    inputs: MergeInputs,
    models: Models,
    merged: Path,
    known: Mapping[str, nll.Scores],
    budget: Budget,
) -> tuple[dict[str, nll.Scores], dict[str, schema.Entry]]:
    """Scores on the held-out text, and the entry of every model in the report."""
    documents = inputs.held_out
    if documents is None:
        return {}, {}
    roles = ("target", "merge", "source")

    def score(role: str) -> nll.Scores:
        if role in known:
            return known[role]
        model = _scored_model(role, models, merged)
        tokenizer = inputs.tokenizers["source" if role == "source" else "target"]
        cut = nll.windows(documents, tokenizer, max_positions=model.cfg.max_positions)
        return nll.score(
            model.params, cut,
            cfg=model.cfg, logits_at_once=budget.logits, hidden_at_once=budget.hidden,
        )  # fmt: skip

    read = stage(
        "evaluation", lambda: {role: score(role) for role in roles}, *saved_scores.SCORES,
        needs=["model"],
    )  # fmt: skip
    scores = {role: read[role] for role in roles}
    same, seed = {"merge": True, "source": inputs.is_one_tokenizer}, inputs.recipe.seed
    entries = summary.compared(scores, has_one_tokenizer=same, seed=seed)
    if inputs.recipe.controls:  # two more passes, so only with controls
        entries["merge"].kl_to_base = _divergence(stage, inputs, models, merged, budget.logits)
    return scores, entries


def _divergence(
    stage: Stage, inputs: MergeInputs, models: Models, merged: Path, logits_at_once: int
) -> float:
    """KL(target || merge) on the held-out text, nats per token."""

    def compute() -> float:
        cut = controls.target_windows(inputs, inputs.held_out or [])
        model = _scored_model("merge", models, merged)
        sums = divergence(models.target, model, cut, logits_at_once=logits_at_once)
        return float(sums.sum() / cut.tokens.sum())

    return stage("divergence", compute, *arrays.JSON, needs=["model"])


def _samples(
    stage: Stage, inputs: MergeInputs, models: Models, merged: Path
) -> list[schema.Sample]:
    """Continuations by target and merge of the beginnings of a few held-out documents."""
    count = inputs.recipe.continuations
    if inputs.held_out is None or not count:
        return []
    tokenizer, folder = inputs.tokenizers["target"], inputs.folders["target"]
    prompts = samples.prompts(inputs.held_out[:count], tokenizer)

    def compute() -> list[dict[str, Any]]:
        continuations = {}
        for role in ("target", "merge"):
            model = _scored_model(role, models, merged)
            continuations[role] = samples.sample(
                model.params, model.cfg, tokenizer, prompts, stop=eos_token_ids(folder)
            )
        return samples.summary(prompts, continuations)

    written = stage("samples", compute, *arrays.JSON, needs=["model"])
    return [schema.Sample.model_validate(sample) for sample in written]


def _scored_model(role: str, models: Models, merged: Path) -> AnyModel:
    """A model by its role; the merge as it was written."""
    if role == "merge":
        return hf.load_hf(merged, dtype=jnp.float32)
    return models.target if role == TARGET else models.source

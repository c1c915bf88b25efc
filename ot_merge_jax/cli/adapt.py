"""`ot-merge adapt`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from ot_merge_jax.cli import early
from ot_merge_jax.cli.console import (
    OUT,
    Encoding,
    Field,
    Json,
    Offline,
    Overwrite,
    Quiet,
    Seed,
    Verbose,
    guarded,
    say,
    session,
)
from ot_merge_jax.recipes import training as adaptations

if TYPE_CHECKING:
    from ot_merge_jax.reports.schema import Report


@guarded
def adapt(
    model: Annotated[
        str,
        typer.Argument(help="Folder of `ot-merge run` (its residual stays frozen), or any model."),
    ],
    text: Annotated[
        str, typer.Option(help="What is learned from: .txt, .jsonl, .parquet, or hub:OWNER/NAME.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    objective: Annotated[
        str, typer.Option(help="sft (next token), kd (imitate the source) or mix.")
    ] = "sft",
    source: Annotated[
        str | None, typer.Option(help="Teacher of kd and mix; not used by sft.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="What MODEL was merged from, if it has moved.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps [one epoch].")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak rate [1e-5].")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Blocks of a step [8].")] = None,
    accumulate: Annotated[
        int | None, typer.Option(help="Parts a batch is computed in, to save memory [1].")
    ] = None,
    block: Annotated[
        int | None, typer.Option(help="Tokens of a block [512, or the context].")
    ] = None,
    kd_weight: Annotated[
        float | None, typer.Option(help="Share of the distillation in mix [0.5].")
    ] = None,
    loss_on: Annotated[
        str | None, typer.Option(help="Of chats: responses (default) or all.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="Hold the residual at this alpha or lambda.")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="cosine (default), linear or constant.")
    ] = None,
    warmup: Annotated[float | None, typer.Option(help="Fraction of the steps [0.05].")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of what trains [0].")] = None,
    clip: Annotated[float | None, typer.Option(help="Largest gradient norm [1].")] = None,
    lora: Annotated[
        int | None, typer.Option(help="Train adapters of this rank instead of all weights.")
    ] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Adapters count alpha/rank.")] = None,
    lora_targets: Annotated[str | None, typer.Option(help="E.g. q,v,up,down [all seven].")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="To compute in: float32, bfloat16 [by the device].")
    ] = None,
    remat: Annotated[bool, typer.Option(help="Save memory, compute layers twice.")] = False,
    samples: Annotated[int | None, typer.Option(help="Documents learned from [all].")] = None,
    eval_text: Annotated[str | None, typer.Option(help="Held-out text, only reported.")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between dev evaluations.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    log_every: Annotated[
        int | None, typer.Option(help="Steps between lines of events [1].")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many evaluations without a new best.")
    ] = None,
    baselines: Annotated[
        str | None,
        typer.Option(
            help="Train other starts of a merge at equal budget too: all, or of base,shrink,noise."
        ),
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(help="Learning rates that each of them tries [0.3, 1 and 3 times the rate]."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Seeds that each of them is trained with [1].")
    ] = None,
    field: Field = None,
    encoding: Encoding = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the same training where it was interrupted.")
    ] = False,
    mesh: Annotated[str | None, typer.Option(help="Devices, e.g. data=2,model=4.")] = None,
    memory_limit: Annotated[
        str | None, typer.Option(help="Memory to stay within, e.g. 8GiB [the machine's].")
    ] = None,
    offline: Offline = False,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Train a merged model with its residual frozen, or any model, and write a plain folder."""
    of_text = {"field": field, "encoding": encoding}
    of_text = {key: value for key, value in of_text.items() if value is not None}
    said: dict[str, Any] = {
        "model": model, "target": target, "source": source, "objective": objective,
        "kd_weight": kd_weight, "text": {"path": text, **of_text}, "samples": samples,
        "evaluation": {"path": eval_text, **of_text} if eval_text else None, "loss_on": loss_on,
        "steps": steps, "learning_rate": learning_rate, "batch_size": batch_size,
        "accumulate": accumulate, "block": block, "schedule": schedule, "warmup": warmup,
        "weight_decay": weight_decay, "clip": clip, "strength": strength, "lora": lora,
        "lora_alpha": lora_alpha,
        "lora_targets": [x.strip() for x in lora_targets.split(",")] if lora_targets else None,
        "dtype": dtype, "remat": remat, "eval_every": eval_every, "save_every": save_every,
        "log_every": log_every, "patience": patience, "seed": seed,
        "baselines": _starts(baselines), "rates": _rates(rates), "seeds": seeds,
    }  # fmt: skip
    settings = adaptations.resolve(said)
    early.look_for(
        models=(settings.model, settings.source if settings.is_distilled else None),
        texts=(text, eval_text),
        out=out,
        overwrite=overwrite or resume,
    )
    from ot_merge_jax.distributed import sharding
    from ot_merge_jax.reports.numbers import number
    from ot_merge_jax.runs import adapt as run
    from ot_merge_jax.runs import baselines as comparison
    from ot_merge_jax.runs import memory

    work = run.adapt if settings.baselines is None else comparison.compare
    with session(verbose=verbose, quiet=quiet):
        report = work(
            settings,
            out,
            # a resumed run publishes the same bytes, so it is the same command
            command=shlex.join(["ot-merge", *(w for w in sys.argv[1:] if w != "--resume")]),
            overwrite=overwrite,
            resume=resume,
            offline=offline,
            mesh=sharding.make_mesh(sharding.parse(mesh)) if mesh else None,
            memory_limit=memory.parse(memory_limit) if memory_limit else None,
            show=None if quiet else lambda decided: say(decided.to_yaml()),
        ).report
    if as_json:
        sys.stdout.write(report.to_json())
        return
    say_baselines(report)
    if report.dev is not None:
        say(f"dev loss: {number(report.dev.before)} -> {number(report.dev.after)} nats per token "
            f"after {report.steps} steps", OUT)  # fmt: skip
    for name, entry in report.evaluation.items():
        say(f"held-out, {name}: {number(entry.nll_per_token)} nats per token, "
            f"{number(entry.bits_per_byte)} bits per byte", OUT)  # fmt: skip
    if report.residual is not None and report.residual.merged_at is not None:
        say(f"residual held at: {json.dumps(report.residual.held_at)} of the merge", OUT)
    say(f"verdict: {report.verdict}", OUT)
    say(f"written: {out}", OUT)


def say_baselines(report: Report) -> None:
    """The table of a comparison, what was not run, and its warnings; nothing without baselines."""
    from ot_merge_jax.reports import tables

    if report.baselines is None:
        return
    OUT.print(tables.baselines_table(report.baselines))
    for name, why in report.baselines.not_applicable.items():
        say(f"{name}: not applicable, {why}", OUT)
    for sentence in report.baselines.not_run:
        say(f"not run: {sentence}", OUT)
    for sentence in report.warnings:
        say(f"warning: {sentence}", OUT)


def _starts(names: str | None) -> list[str] | None:
    """``all``, or some of the starts."""
    if names is None:
        return None
    from ot_merge_jax.recipes.training import Baseline

    return list(get_args(Baseline)) if names == "all" else [x.strip() for x in names.split(",")]


def _rates(said: str | None) -> list[str] | None:
    """Numbers between commas; what is none is refused with the settings."""
    return None if said is None else [x.strip() for x in said.split(",")]

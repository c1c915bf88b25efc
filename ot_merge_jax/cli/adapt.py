"""`ot-merge adapt`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ot_merge_jax.cli import compile_cache, early, sizes
from ot_merge_jax.cli.console import (
    OUT,
    Json,
    MemoryLimit,
    Mesh,
    NoCompileCache,
    Offline,
    Overwrite,
    Quiet,
    Resume,
    Verbose,
    guarded,
    say,
    session,
    typed,
)
from ot_merge_jax.cli.flags import with_adaptation
from ot_merge_jax.recipes.training import Adaptation

if TYPE_CHECKING:
    from ot_merge_jax.reports.schema import Report


@guarded
@with_adaptation
def adapt(
    settings: Adaptation,
    *,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    overwrite: Overwrite = False,
    resume: Resume = False,
    mesh: Mesh = None,
    memory_limit: MemoryLimit = None,
    offline: Offline = False,
    no_compile_cache: NoCompileCache = False,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Train a merged model with its residual frozen, or any model, and write a plain folder."""
    axes, limit = sizes.axes_of(mesh), sizes.bytes_of(memory_limit)
    early.look_for(
        models=(settings.model, settings.source if settings.is_distilled else None),
        texts=(settings.text.path, settings.evaluation and settings.evaluation.path),
        out=out,
        overwrite=overwrite or resume,
    )
    from ot_merge_jax.distributed import sharding
    from ot_merge_jax.reports.numbers import number
    from ot_merge_jax.runs import adapt as run
    from ot_merge_jax.runs import baselines as comparison

    work = run.adapt if settings.baselines is None else comparison.compare
    with session(verbose=verbose, quiet=quiet):
        compile_cache.enable(is_wanted=not no_compile_cache)
        report = work(
            settings,
            out,
            command=typed(),
            overwrite=overwrite,
            resume=resume,
            offline=offline,
            mesh=None if axes is None else sharding.make_mesh(axes),
            memory_limit=limit,
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

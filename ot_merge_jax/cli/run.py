"""`ot-merge run`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ot_merge_jax.cli import compile_cache, sizes
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
from ot_merge_jax.cli.flags import look_for_inputs, with_recipe
from ot_merge_jax.errors import RecipeError
from ot_merge_jax.recipes.recipe import Recipe


@guarded
@with_recipe
def run(
    recipe: Recipe,
    *,
    out: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    strict: Annotated[bool, typer.Option(help="Fail if not converged or worse.")] = False,
    mesh: Mesh = None,
    memory_limit: MemoryLimit = None,
    offline: Offline = False,
    no_compile_cache: NoCompileCache = False,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Merge a source into a target, by a recipe, by flags, or by both (flags win)."""
    if out is None:
        raise RecipeError("There is no --out; name the folder to write.")
    axes, limit = sizes.axes_of(mesh), sizes.bytes_of(memory_limit)
    look_for_inputs(recipe, out, overwrite=overwrite or resume)
    from ot_merge_jax.distributed import sharding
    from ot_merge_jax.reports import tables
    from ot_merge_jax.runs import merge

    with session(verbose=verbose, quiet=quiet):
        compile_cache.enable(is_wanted=not no_compile_cache)
        result = merge.run(
            recipe,
            out,
            command=typed(),
            overwrite=overwrite,
            resume=resume,
            strict=strict,
            offline=offline,
            mesh=None if axes is None else sharding.make_mesh(axes),
            memory_limit=limit,
            show=None if quiet else lambda decided: say(decided.to_yaml()),
        )
    if as_json:
        sys.stdout.write(result.report.to_json())
        return
    OUT.print(tables.weights_table(result.merge))
    report = result.report
    if report.evaluation:
        title = f"Held-out text ({report.evaluation['target'].documents} documents)"
        OUT.print(tables.evaluation_table(report.evaluation, title=title))
        if len(report.controls) > 2:  # more than target and source
            OUT.print(tables.controls_table(report))
    say(f"strength: {json.dumps(report.strength.chosen)}", OUT)
    for sentence in result.warnings:
        say(f"warning: {sentence}", OUT)
    say(f"verdict: {report.verdict}", OUT)
    say(f"written: {out}", OUT)

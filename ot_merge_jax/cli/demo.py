"""`ot-merge demo`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ot_merge_jax.cli import compile_cache
from ot_merge_jax.cli.console import (
    OUT,
    Json,
    NoCompileCache,
    Offline,
    Overwrite,
    Quiet,
    Seed,
    Verbose,
    guarded,
    print_json,
    say,
    session,
)


@guarded
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("ot-merge-demo"),
    full: Annotated[
        bool, typer.Option("--full", help="Three calibration seeds and all controls: minutes.")
    ] = False,
    adapt: Annotated[
        bool,
        typer.Option("--adapt", help="Train the merge and its target instead: minutes."),
    ] = False,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    offline: Offline = False,
    no_compile_cache: NoCompileCache = False,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Merge the small models that ship with the package, into a sibling and a stranger."""
    from ot_merge_jax.cli.adapt import say_baselines
    from ot_merge_jax.demo import merge as demos
    from ot_merge_jax.demo import training
    from ot_merge_jax.errors import RecipeError
    from ot_merge_jax.reports import tables

    started = time.monotonic()
    if full and adapt:
        raise RecipeError("--full and --adapt are two demos; give one of them.")
    if adapt:
        with session(verbose=verbose, quiet=quiet):
            compile_cache.enable(is_wanted=not no_compile_cache)
            trained = training.run(out, seed=seed, overwrite=overwrite, offline=offline)
        adapted = trained.adapted.report
        if as_json:
            print_json({
                "delta": trained.merge.report.to_dict(), "delta-adapted": adapted.to_dict()
            })  # fmt: skip
            return
        OUT.print(demos.table({"delta": trained.merge}))
        say_baselines(adapted)
        say(f"delta-adapted: {adapted.verdict}", OUT)
        say(f"written: {trained.merge.out}, {trained.adapted.out} "
            f"({time.monotonic() - started:.0f} s)", OUT)  # fmt: skip
        return
    with session(verbose=verbose, quiet=quiet):
        compile_cache.enable(is_wanted=not no_compile_cache)
        results = demos.run(out, is_full=full, seed=seed, overwrite=overwrite, offline=offline)
    if as_json:
        print_json({name: result.report.to_dict() for name, result in results.items()})
        return
    OUT.print(demos.table(results))
    for name, result in results.items():
        if full:
            OUT.print(f"{name}:")
            OUT.print(tables.controls_table(result.report))
        for sentence in result.warnings:
            say(f"{name}: warning: {sentence}", OUT)
        say(f"{name}: {result.report.verdict}", OUT)
    say(f"written: {', '.join(str(result.out) for result in results.values())} "
         f"({time.monotonic() - started:.0f} s)", OUT)  # fmt: skip

"""`ot-merge report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ot_merge_jax.cli.console import OUT, Json, Verbose, guarded, print_json, say
from ot_merge_jax.errors import InputError


@guarded
def report(
    run: Annotated[Path, typer.Argument(help="Folder that a run wrote.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write [OUT/ot_merge/report.html, and its plots].")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing --out file.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write the report of a run again, from what lies in its folder."""
    from ot_merge_jax.reports import run_folder

    details = run_folder.details_of(run)
    if out is not None and (out.is_dir() or (out.exists() and not overwrite)):
        advice = "name a file in it" if out.is_dir() else "choose another or pass --overwrite"
        raise InputError(f"The file {out} exists; {advice}.")
    if out is not None and not out.parent.is_dir():
        raise InputError(f"There is no folder {out.parent} to write {out.name} into; make it.")
    from ot_merge_jax.reports import html, schema

    files = html.write(details, file=out)
    read = schema.read(details / "report.json")
    if as_json:
        paths = [str(file) for file in files]
        print_json({"outcome": read.outcome, "verdict": read.verdict, "files": paths})
        return
    say(f"verdict: {read.verdict}", OUT)
    say(f"written: {files[0]}", OUT)

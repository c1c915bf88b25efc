"""`ot-merge eval`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table
from rich.text import Text as Words

from ot_merge_jax.console import (
    OUT,
    Encoding,
    Field,
    Json,
    Offline,
    Quiet,
    Seed,
    Verbose,
    guarded,
    print_json,
    say,
    session,
)


@guarded
def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Model folders, or hub ids as OWNER/NAME@REVISION.")
    ],
    text: Annotated[str, typer.Option(help="Held-out text: .txt, .jsonl, .parquet, or hub:...")],
    generate: Annotated[
        int, typer.Option(help="Documents whose beginning every model continues.", min=0)
    ] = 0,
    new_tokens: Annotated[int, typer.Option(help="Tokens of a continuation.", min=1)] = 32,
    field: Field = None,
    encoding: Encoding = None,
    seed: Seed = 0,
    offline: Offline = False,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Loss and bits per byte of models on a text, with intervals for their differences."""
    from ot_merge_jax import pipeline
    from ot_merge_jax import recipe as recipes
    from ot_merge_jax.report import tables

    with session(verbose=verbose, quiet=quiet):
        source = recipes.text(text, field=field, encoding=encoding)
        found = pipeline.evaluate(
            models, source, seed=seed, offline=offline, count=generate, new_tokens=new_tokens
        )
    if as_json:
        print_json(found)
        return
    table = Table(Column("model", overflow="fold"), box=SIMPLE_HEAD)
    for name in ("documents", "tokens", "nats/token", "bits/byte"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, one in found["models"].items():
        numbers = (str(one["documents"]), str(one["tokens"]))
        table.add_row(
            Words(name), *numbers, f"{one['nll_per_token']:.4f}", f"{one['bits_per_byte']:.4f}"
        )
    OUT.print(table)
    for pair in found["pairs"]:
        unit = "nats per token" if pair["metric"] == "nll_per_token" else "bits per byte"
        say(
            f"{pair['a']} minus {pair['b']}: {pair['difference']:+.4f} {unit}, "
            f"95 % interval [{pair['low']:+.4f}, {pair['high']:+.4f}]",
            OUT,
        )
    if "samples" in found:
        OUT.print(tables.samples(found["samples"]))

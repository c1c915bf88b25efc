"""The command line `ot-merge`: every command by its name."""

from __future__ import annotations

import signal
from typing import Annotated, Any

import typer

from ot_merge_jax.cli.adapt import adapt
from ot_merge_jax.cli.console import OUT, say
from ot_merge_jax.cli.demo import demo
from ot_merge_jax.cli.evaluate import evaluate
from ot_merge_jax.cli.inspect import families, inspect
from ot_merge_jax.cli.plan import plan
from ot_merge_jax.cli.report import report
from ot_merge_jax.cli.run import run

app = typer.Typer(
    name="ot-merge",
    help="Merge language models across architectures with optimal transport.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(is_asked: bool) -> bool:
    """Says the version and ends."""
    if is_asked:
        from importlib import metadata

        say(f"ot-merge {metadata.version('ot-merge-jax')}", OUT)
        raise typer.Exit
    return is_asked


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Say the version and exit.", callback=_version, is_eager=True
        ),
    ] = False,
) -> None:
    """What stands before the command."""


app.command()(run)
app.command()(plan)
app.command()(adapt)
app.command("eval")(evaluate)
app.command()(report)
app.command()(inspect)
app.command()(families)
app.command()(demo)


def _interrupt(*_: Any) -> None:
    """A signal that ends the run like Ctrl-C, so that it says how to resume."""
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of the command."""
    signal.signal(signal.SIGTERM, _interrupt)
    app()


if __name__ == "__main__":
    main()

"""The command line `ot-merge`. Reads flags, calls the package, prints; no logic of its own.

Tables go to stdout, progress and messages to stderr; with ``--json`` stdout holds the JSON alone.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

# before the libraries read them: no advice on stderr
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Column, Table
from rich.text import Text as Words

from ot_merge_jax import progress
from ot_merge_jax.errors import OtMergeError, RecipeError, is_out_of_memory
from ot_merge_jax.redaction import redacted

app = typer.Typer(
    name="ot-merge",
    help="Merge language models across architectures with optimal transport.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_out = Console()
_err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Say more; show tracebacks.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Say only errors and results.")]
Seed = Annotated[int, typer.Option(help="Of every random choice.", min=0)]
Overwrite = Annotated[bool, typer.Option(help="Replace an existing output folder.")]
Encoding = Annotated[str | None, typer.Option(help="Encoding of the text files [utf-8].")]
Field = Annotated[
    str | None,
    typer.Option(help="Field of a record: a text [text], or messages; or PROMPT,RESPONSE."),
]
Offline = Annotated[bool, typer.Option(help="Never use the network; the hub's cache is used.")]


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turns errors into one sentence on stderr and an exit code."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except OtMergeError as error:
            if kwargs.get("verbose"):
                _say(traceback.format_exc())
            _say(f"error: {error}")
            raise typer.Exit(error.exit_code) from None
        except BrokenPipeError:
            raise  # click ends quietly when the reader of a pipe has gone
        except OSError as error:
            if kwargs.get("verbose"):
                _say(traceback.format_exc())
            where = f"{error.filename or 'a file'} cannot be used ({error.strerror})"
            _say(f"error: {error if error.errno is None else f'{where}; check rights and disk.'}")
            is_input = isinstance(error, PermissionError | FileNotFoundError)
            raise typer.Exit(3 if is_input else 4) from None
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            _say("error: out of memory; use smaller models or fewer texts, or a larger machine.")
            raise typer.Exit(4) from None
        except KeyboardInterrupt as error:
            _say(str(error) or "interrupted; nothing unfinished was left behind.")
            raise typer.Exit(130) from None

    return wrapped


def _say(sentence: str, console: Console = _err) -> None:
    """One plain line, never wrapped."""
    console.print(Words(redacted(sentence)), soft_wrap=True)


class _Redacting(logging.Formatter):
    """The message of a log record without secrets: paths and names are the user's."""

    def format(self, record: logging.LogRecord) -> str:
        """The message."""
        return redacted(super().format(record))


def _print_json(value: Any) -> None:
    """The one thing on stdout."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def _session(*, verbose: bool, quiet: bool) -> Iterator[None]:
    """Logging and progress on stderr."""
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    handler = RichHandler(
        console=_err, show_path=False, show_level=False, markup=False, log_time_format="[%X]"
    )
    handler.setFormatter(_Redacting("%(message)s"))
    logger = logging.getLogger("ot_merge_jax")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(level)
    logging.getLogger("absl").setLevel(logging.ERROR)
    if quiet:
        yield
    else:
        with progress.shown(_err):
            yield


@app.command()
@_guarded
def run(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe file (YAML).")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="paper, barycentric or delta (default).")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Folder of the target (it is kept), OWNER/NAME@REVISION, or BASE+LORA."),
    ] = None,
    source: Annotated[str | None, typer.Option(help="Folder of the source, likewise.")] = None,
    source_base: Annotated[
        str | None, typer.Option(help="Folder of what the source was fine-tuned from.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="Unlabelled text: .txt, .jsonl, .parquet, or hub:OWNER/NAME."),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Documents that give rows.")] = None,
    eval_text: Annotated[str | None, typer.Option(help="Held-out text, only reported.")] = None,
    field: Field = None,
    encoding: Encoding = None,
    weights: Annotated[
        str | None, typer.Option(help="What moves, e.g. gate,up,down,embed.")
    ] = None,
    rows: Annotated[
        str | None, typer.Option(help="sample, token, span or auto (token or span).")
    ] = None,
    max_rows: Annotated[int | None, typer.Option(help="Rows kept for token and span.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens read of a document.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Of the neuron plans, cost units.")] = None,
    layer_epsilon: Annotated[float | None, typer.Option(help="Of the layer plan.")] = None,
    layer_cost: Annotated[str | None, typer.Option(help="plain or median.")] = None,
    layers: Annotated[str | None, typer.Option(help="soft or top1.")] = None,
    max_iterations: Annotated[int | None, typer.Option(help="Sinkhorn iterations at most.")] = None,
    threshold: Annotated[float | None, typer.Option(help="L1 marginal error to stop at.")] = None,
    signed: Annotated[bool | None, typer.Option(help="Let neurons match their negative.")] = None,
    form: Annotated[str | None, typer.Option(help="joint or barycentric.")] = None,
    rule: Annotated[str | None, typer.Option(help="interpolate, residual or delta.")] = None,
    strength: Annotated[str | None, typer.Option(help="alpha or lambda; or auto.")] = None,
    vocabulary_weights: Annotated[str | None, typer.Option(help="uniform or frequency.")] = None,
    k: Annotated[str | None, typer.Option(help="Neurons kept in each layer; or all.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of every random choice.", min=0)] = None,
    overwrite: Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the same run where it was interrupted.")
    ] = False,
    strict: Annotated[bool, typer.Option(help="Fail if not converged or worse.")] = False,
    mesh: Annotated[str | None, typer.Option(help="Devices, e.g. data=2,model=4.")] = None,
    memory_limit: Annotated[
        str | None, typer.Option(help="Host memory to stay within, e.g. 8GiB [the machine's].")
    ] = None,
    offline: Offline = False,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Merge a source into a target, by a recipe, by flags, or by both (flags win)."""
    from ot_merge_jax import memory, pipeline, sharding
    from ot_merge_jax import recipe as recipes
    from ot_merge_jax.report import tables

    said = {} if recipe is None else recipes.load(recipe)
    flags: dict[str, Any] = {
        "preset": preset, "target": target, "source": source, "source_base": source_base,
        "weights": [one.strip() for one in weights.split(",")] if weights else None,
        "rows": rows, "max_rows": max_rows, "max_length": max_length,
        "epsilon": epsilon, "layer_epsilon": layer_epsilon,
        "layer_cost": layer_cost, "layers": layers, "max_iterations": max_iterations,
        "threshold": threshold, "signed": signed, "form": form, "rule": rule,
        "strength": strength, "vocabulary_weights": vocabulary_weights, "k": k, "seed": seed,
        "calibration": {
            "path": calibration, "field": field, "encoding": encoding, "samples": samples,
        },
        "evaluation": {"path": eval_text, "field": field, "encoding": encoding},
    }  # fmt: skip
    said = recipes.overridden(said, flags)
    resolved = recipes.resolve(said, where=str(recipe or "the command line"))
    if out is None:
        raise RecipeError("There is no --out; name the folder to write.")
    with _session(verbose=verbose, quiet=quiet):
        result = pipeline.run(
            resolved,
            out,
            # a resumed run publishes the same bytes, so it is the same command
            command=shlex.join(["ot-merge", *(w for w in sys.argv[1:] if w != "--resume")]),
            overwrite=overwrite,
            resume=resume,
            strict=strict,
            offline=offline,
            mesh=sharding.make_mesh(_mesh_sizes(mesh)) if mesh else None,
            memory_limit=memory.parse(memory_limit) if memory_limit else None,
            show=None if quiet else lambda decided: _say(decided.to_yaml()),
        )
    if as_json:
        _print_json(result.report)
        return
    _out.print(tables.weights_table(result.merge))
    if result.report["evaluation"]:
        title = f"Held-out text ({result.report['evaluation']['target']['documents']} documents)"
        _out.print(tables.evaluation_table(result.report["evaluation"], title=title))
    _say(f"strength: {json.dumps(result.report['strength']['chosen'])}", _out)
    for sentence in result.warnings:
        _say(f"warning: {sentence}", _out)
    _say(f"verdict: {result.report['verdict']}", _out)
    _say(f"written: {out}", _out)


def _mesh_sizes(text: str) -> dict[str, int]:
    """``data=2,model=4`` as a mapping."""
    try:
        sizes = {name: int(size) for name, size in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise RecipeError(f"--mesh {text!r} is not like data=2,model=4.") from error
    if min(sizes.values()) < 1:
        raise RecipeError(f"--mesh {text!r} has an axis without devices; write data=2,model=4.")
    return sizes


@app.command(name="eval")
@_guarded
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

    with _session(verbose=verbose, quiet=quiet):
        source = recipes.text(text, field=field, encoding=encoding)
        found = pipeline.evaluate(
            models, source, seed=seed, offline=offline, count=generate, new_tokens=new_tokens
        )
    if as_json:
        _print_json(found)
        return
    table = Table(Column("model", overflow="fold"), box=SIMPLE_HEAD)
    for name in ("documents", "tokens", "nats/token", "bits/byte"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, one in found["models"].items():
        numbers = (str(one["documents"]), str(one["tokens"]))
        table.add_row(
            Words(name), *numbers, f"{one['nll_per_token']:.4f}", f"{one['bits_per_byte']:.4f}"
        )
    _out.print(table)
    for pair in found["pairs"]:
        unit = "nats per token" if pair["metric"] == "nll_per_token" else "bits per byte"
        _say(
            f"{pair['a']} minus {pair['b']}: {pair['difference']:+.4f} {unit}, "
            f"95 % interval [{pair['low']:+.4f}, {pair['high']:+.4f}]",
            _out,
        )
    if "samples" in found:
        _out.print(tables.samples(found["samples"]))


@app.command()
@_guarded
def inspect(
    model: Annotated[
        str, typer.Argument(help="Model folder, or its hub id as OWNER/NAME@REVISION.")
    ],
    offline: Offline = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """What a model folder holds, from its config and headers alone."""
    from ot_merge_jax.io.folder import open_folder
    from ot_merge_jax.models import specs
    from ot_merge_jax.report import facts

    folder = open_folder(model, offline=offline)
    cfg = facts.plain({name: getattr(folder.cfg, name) for name in folder.cfg.__slots__})
    dtypes = sorted({info.dtype for info in folder.tensors.values()})
    shards = sorted(set(folder.files.values()))
    parameters = [
        {"path": spec.path, "tensors": spec.name, "shape": list(spec.shape), "weight": spec.weight}
        for spec in specs.param_specs(folder.cfg)
    ]
    found = {
        "config": cfg, "parameters": specs.count(folder.cfg), "dtypes": dtypes, "shards": shards,
        "table": parameters,
    }  # fmt: skip
    if as_json:
        _print_json(found)
        return
    _say(f"{model}: {cfg['family']}, {found['parameters']:,} parameters in {', '.join(dtypes)}, "
         f"{len(shards)} file(s)", _out)  # fmt: skip
    for key, value in cfg.items():
        _say(f"  {key}: {value}", _out)
    names = (Column(name, no_wrap=True) for name in ("parameter", "shape", "moves as"))
    table = Table(*names, box=SIMPLE_HEAD)
    for row in parameters:
        table.add_row(row["path"], str(row["shape"]), row["weight"] or "never")
    _out.print(table)


@app.command()
@_guarded
def families(as_json: Json = False) -> None:
    """The families of models that can be merged."""
    from ot_merge_jax.models.families import FAMILIES

    rows = [
        {
            "model_type": one.model_type,
            "architecture": one.architecture,
            "only": {key: value for key, value in one.fixed.items() if value},
        }
        for one in FAMILIES.values()
    ]
    if as_json:
        _print_json(rows)
        return
    table = Table("model_type", "architecture", "only with", box=SIMPLE_HEAD)
    for one in rows:
        only = ", ".join(f"{key}={value}" for key, value in one["only"].items())
        table.add_row(one["model_type"], one["architecture"], only)
    _out.print(table)


@app.command()
@_guarded
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("ot-merge-demo"),
    seed: Seed = 0,
    overwrite: Overwrite = False,
    offline: Offline = False,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Merge the small models that ship with the package, into a sibling and a stranger."""
    from ot_merge_jax import demo as demos

    started = time.monotonic()
    with _session(verbose=verbose, quiet=quiet):
        results = demos.run(out, seed=seed, overwrite=overwrite, offline=offline)
    if as_json:
        _print_json({name: result.report for name, result in results.items()})
        return
    _out.print(demos.table(results))
    for name, result in results.items():
        for sentence in result.warnings:
            _say(f"{name}: warning: {sentence}", _out)
        _say(f"{name}: {result.report['verdict']}", _out)
    _say(f"written: {', '.join(str(one.out) for one in results.values())} "
         f"({time.monotonic() - started:.0f} s)", _out)  # fmt: skip


def _interrupt(*_: Any) -> None:
    """A signal that ends the run like Ctrl-C, so that it says how to resume."""
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of the command."""
    signal.signal(signal.SIGTERM, _interrupt)
    app()


if __name__ == "__main__":
    main()

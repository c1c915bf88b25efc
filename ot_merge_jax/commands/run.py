"""`ot-merge run`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ot_merge_jax.console import (
    OUT,
    Encoding,
    Field,
    Json,
    Offline,
    Overwrite,
    Quiet,
    Verbose,
    guarded,
    print_json,
    say,
    session,
)
from ot_merge_jax.errors import RecipeError


@guarded
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
    controls: Annotated[
        str | None,
        typer.Option(help="all, none, or e.g. noise,unigram [shrink,permuted,unigram]."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Calibration seeds to compare.")] = None,
    continuations: Annotated[
        int | None, typer.Option(help="Held-out documents continued for the report.")
    ] = None,
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
        "weights": _listed(weights) if weights else None,
        "rows": rows, "max_rows": max_rows, "max_length": max_length,
        "epsilon": epsilon, "layer_epsilon": layer_epsilon,
        "layer_cost": layer_cost, "layers": layers, "max_iterations": max_iterations,
        "threshold": threshold, "signed": signed, "form": form, "rule": rule,
        "strength": strength, "vocabulary_weights": vocabulary_weights, "k": k, "seed": seed,
        "controls": controls if controls in (None, "all", "none") else _listed(controls),
        "seeds": seeds, "continuations": continuations,
        "calibration": {
            "path": calibration, "field": field, "encoding": encoding, "samples": samples,
        },
        "evaluation": {"path": eval_text, "field": field, "encoding": encoding},
    }  # fmt: skip
    said = recipes.overridden(said, flags)
    resolved = recipes.resolve(said, where=str(recipe or "the command line"))
    if out is None:
        raise RecipeError("There is no --out; name the folder to write.")
    with session(verbose=verbose, quiet=quiet):
        result = pipeline.run(
            resolved,
            out,
            # a resumed run publishes the same bytes, so it is the same command
            command=shlex.join(["ot-merge", *(w for w in sys.argv[1:] if w != "--resume")]),
            overwrite=overwrite,
            resume=resume,
            strict=strict,
            offline=offline,
            mesh=sharding.make_mesh(sharding.parse(mesh)) if mesh else None,
            memory_limit=memory.parse(memory_limit) if memory_limit else None,
            show=None if quiet else lambda decided: say(decided.to_yaml()),
        )
    if as_json:
        print_json(result.report)
        return
    OUT.print(tables.weights_table(result.merge))
    if result.report["evaluation"]:
        title = f"Held-out text ({result.report['evaluation']['target']['documents']} documents)"
        OUT.print(tables.evaluation_table(result.report["evaluation"], title=title))
        if len(result.report["controls"]) > 2:  # more than target and source
            OUT.print(tables.controls_table(result.report))
    say(f"strength: {json.dumps(result.report['strength']['chosen'])}", OUT)
    for sentence in result.warnings:
        say(f"warning: {sentence}", OUT)
    say(f"verdict: {result.report['verdict']}", OUT)
    say(f"written: {out}", OUT)


def _listed(text: str) -> list[str]:
    """``a, b`` as a list."""
    return [one.strip() for one in text.split(",")]

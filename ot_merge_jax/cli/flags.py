"""The flags of a recipe, said once for all commands that take one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ot_merge_jax.cli import early
from ot_merge_jax.cli.console import Encoding, Field
from ot_merge_jax.recipes import loading
from ot_merge_jax.recipes.recipe import Recipe


def recipe_of(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe file (YAML).")] = None,
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
    solver: Annotated[
        str | None, typer.Option(help="auto, or ott (all by ott-jax: slow, a check).")
    ] = None,
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
) -> Recipe:
    """The recipe that a file, flags, or both ask for; flags win."""
    said = {} if recipe is None else loading.load(recipe)
    flags: dict[str, Any] = {
        "preset": preset, "target": target, "source": source, "source_base": source_base,
        "weights": _listed(weights) if weights else None,
        "rows": rows, "max_rows": max_rows, "max_length": max_length,
        "epsilon": epsilon, "layer_epsilon": layer_epsilon,
        "layer_cost": layer_cost, "layers": layers, "max_iterations": max_iterations,
        "threshold": threshold, "solver": solver, "signed": signed, "form": form, "rule": rule,
        "strength": strength, "vocabulary_weights": vocabulary_weights, "k": k, "seed": seed,
        "controls": controls if controls in (None, "all", "none") else _listed(controls),
        "seeds": seeds, "continuations": continuations,
        "calibration": {
            "path": calibration, "field": field, "encoding": encoding, "samples": samples,
        },
        "evaluation": {"path": eval_text, "field": field, "encoding": encoding},
    }  # fmt: skip
    said = loading.overridden(said, flags)
    return loading.resolve(said, where=str(recipe or "the command line"))


def with_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the flags of `recipe_of`, before its own.

    Args:
        command: Takes the resolved recipe first, then its own flags by keyword.

    Returns:
        The command as typer is to see it.
    """
    asked, own = (
        list(inspect.signature(one, eval_str=True).parameters.values())
        for one in (recipe_of, command)
    )
    flags = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in (*asked, *own[1:])]

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        said = {one.name: given.pop(one.name) for one in asked}
        command(recipe_of(**said), **given)

    # typer reads both
    wrapped.__signature__ = inspect.Signature(flags)  # pyright: ignore[reportAttributeAccessIssue]
    wrapped.__annotations__ = {one.name: one.annotation for one in flags}
    return wrapped


def look_for_inputs(recipe: Recipe, out: Path | None, *, overwrite: bool) -> None:
    """Looks for the models and texts of a recipe, before anything heavy is imported.

    Raises:
        InputError: naming the first that is missing, or what is wrong with the output.
    """
    texts = (recipe.calibration, recipe.evaluation)
    early.look_for(
        models=(recipe.target, recipe.source, recipe.source_base),
        texts=[None if text is None else text.path for text in texts],
        out=out,
        overwrite=overwrite,
    )


def _listed(text: str) -> list[str]:
    """``a, b`` as a list."""
    return [one.strip() for one in text.split(",")]

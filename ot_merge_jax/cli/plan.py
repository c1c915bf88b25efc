"""`ot-merge plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from ot_merge_jax.cli import sizes
from ot_merge_jax.cli.console import (
    OUT,
    Json,
    MemoryLimit,
    Offline,
    Overwrite,
    Quiet,
    Verbose,
    guarded,
    print_json,
    say,
    session,
)
from ot_merge_jax.cli.flags import look_for_inputs, with_recipe
from ot_merge_jax.recipes.recipe import Recipe

if TYPE_CHECKING:
    from ot_merge_jax.runs.plan import Needs


@guarded
@with_recipe
def plan(
    recipe: Recipe,
    *,
    out: Annotated[
        Path | None, typer.Option(help="Folder that would be written [in this folder].")
    ] = None,
    overwrite: Overwrite = False,
    memory_limit: MemoryLimit = None,
    offline: Offline = False,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Say what `run` would need: memory, disk, arithmetic. Reads no weights and writes nothing."""
    limit = sizes.bytes_of(memory_limit)
    look_for_inputs(recipe, out, overwrite=overwrite)
    from ot_merge_jax.runs import memory
    from ot_merge_jax.runs import plan as planning

    with session(verbose=verbose, quiet=quiet):
        needs = planning.needs(
            recipe,
            out,
            overwrite=overwrite,
            offline=offline,
            limit=limit,
        )
    facts = _facts(needs)
    if as_json:
        print_json(facts)
        return
    say(needs.inputs.recipe.to_yaml(), OUT)
    OUT.print(_table("memory at the peak of each stage", needs.memory.stages, memory.gib))
    say(f"memory: {needs.memory}; {memory.gib(needs.limit)} allowed", OUT)
    say(f"memory at a time: {needs.memory.budget}", OUT)
    OUT.print(_table("disk when everything has been made", needs.disk, memory.gib))
    disk = facts["disk"]
    say(f"disk: about {memory.gib(disk['needed'])}; {memory.gib(disk['free'])} free in "
        f"{disk['place']}", OUT)  # fmt: skip
    OUT.print(_table("arithmetic", needs.work.flops, lambda count: f"{count:.1e} FLOPs"))
    for site, problem in needs.work.problems.items():
        shape = f"{problem.target} x {problem.source}"
        say(f"transport: {problem.count:,} problems of {shape} at {site}", OUT)
    transport = facts["transport"]
    say(f"transport: {transport['neuron_problems']:,} problems of neurons, at most "
        f"{transport['max_iterations']:,} iterations each, and {transport['layer_problems']} of "
        "layers", OUT)  # fmt: skip
    if transport["seeds"] > 1:
        say(f"arithmetic and transport: once for each of {transport['seeds']} seeds", OUT)
    say("scores, the choice of the strength and controls come on top of the arithmetic", OUT)
    say("time: not estimated", OUT)


def _table(title: str, sizes: dict[str, int], spell: Any) -> Table:
    """One row for each size."""
    columns = Column(title), Column("", justify="right", no_wrap=True)
    table = Table(*columns, box=SIMPLE_HEAD, pad_edge=False)
    for name, size in sizes.items():
        table.add_row(name, spell(size))
    return table


def _facts(needs: Needs) -> dict[str, Any]:
    """The needs as JSON values; sizes in bytes."""
    from ot_merge_jax.runs import inputs

    recipe, work = needs.inputs.recipe, needs.work
    return {
        "recipe": json.loads(recipe.model_dump_json()),
        "calibration": inputs.calibration_summary(needs.inputs),
        "memory": {
            "stages": needs.memory.stages,
            "peak": needs.memory.peak,
            "limit": needs.limit,
            "on_disk": sorted(needs.memory.offloaded),
            "budget": needs.memory.budget._asdict(),
        },
        "disk": {
            "parts": needs.disk,
            "needed": sum(needs.disk.values()),
            "free": needs.free,
            "place": str(needs.place),
        },
        "transport": {
            "neuron_problems": sum(problem.count for problem in work.problems.values()),
            "layer_problems": len(work.problems),
            "sites": {site: problem._asdict() for site, problem in work.problems.items()},
            "max_iterations": recipe.max_iterations,
            "seeds": recipe.seeds,
        },
        "flops": work.flops,
        "seconds": None,
    }

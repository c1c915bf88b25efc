"""`ot-merge inspect` and `ot-merge families`: what is there, and what can be merged."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from ot_merge_jax.cli import early
from ot_merge_jax.cli.console import OUT, Json, Offline, Verbose, guarded, print_json, say


@guarded
def inspect(
    model: Annotated[
        str, typer.Argument(help="Model folder, or its hub id as OWNER/NAME@REVISION.")
    ],
    offline: Offline = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """What a model folder holds, from its config and headers alone."""
    early.look_for(models=[model])
    from ot_merge_jax.io.arrays import plain
    from ot_merge_jax.io.folder import open_folder
    from ot_merge_jax.models import specs

    folder = open_folder(model, offline=offline)
    cfg = plain({name: getattr(folder.cfg, name) for name in folder.cfg.__slots__})
    dtypes = sorted({info.dtype for info in folder.tensors.values()})
    shards = sorted(set(folder.files.values()))
    parameters = [
        {"path": spec.path, "tensors": spec.name, "shape": list(spec.shape), "weight": spec.weight}
        for spec in specs.param_specs(folder.cfg)
    ]
    facts = {
        "config": cfg, "parameters": specs.count(folder.cfg), "dtypes": dtypes, "shards": shards,
        "table": parameters,
    }  # fmt: skip
    if as_json:
        print_json(facts)
        return
    say(f"{model}: {cfg['family']}, {facts['parameters']:,} parameters in {', '.join(dtypes)}, "
         f"{len(shards)} file(s)", OUT)  # fmt: skip
    for key, value in cfg.items():
        say(f"  {key}: {value}", OUT)
    names = (Column(name, no_wrap=True) for name in ("parameter", "shape", "moves as"))
    table = Table(*names, box=SIMPLE_HEAD)
    for row in parameters:
        table.add_row(row["path"], str(row["shape"]), row["weight"] or "never")
    OUT.print(table)


@guarded
def families(as_json: Json = False) -> None:
    """The families of models that can be merged."""
    from ot_merge_jax.models.families import FAMILIES

    rows = [
        {
            "model_type": family.model_type,
            "architecture": family.architecture,
            "only": {key: value for key, value in family.fixed.items() if value},
        }
        for family in FAMILIES.values()
    ]
    if as_json:
        print_json(rows)
        return
    table = Table("model_type", "architecture", "only with", box=SIMPLE_HEAD)
    for row in rows:
        only = ", ".join(f"{key}={value}" for key, value in row["only"].items())
        table.add_row(row["model_type"], row["architecture"], only)
    OUT.print(table)

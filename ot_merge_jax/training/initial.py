"""Where an adaptation starts: a merge with its frozen residual, an adapted folder, or any model.

A folder that `ot-merge run` wrote holds merged weights and names its target: the residual is their
difference. A folder that `ot-merge adapt` wrote keeps the residual in ``ot_merge/residual/``, so
that it can be rescaled, removed or trained further. Imports io.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ot_merge_jax.distributed import sharding
from ot_merge_jax.errors import InputError, RecipeError
from ot_merge_jax.io import arrays, hf, resolve
from ot_merge_jax.io.folder import ModelFolder, open_folder
from ot_merge_jax.models import specs
from ot_merge_jax.models.sites import GROUPS
from ot_merge_jax.recipes import loading
from ot_merge_jax.reports import schema
from ot_merge_jax.training import residual
from ot_merge_jax.types import Params

RESIDUAL = "residual"
_STRENGTH = "strength.json"
_REMADE = "make the merge again with `ot-merge run`"


class Start(NamedTuple):
    """A checked start; no weights have been read.

    Attributes:
        folder: What is trained.
        target: The target of the merge, for a folder of `ot-merge run`; else None.
        stored: The folder of its residual, for one of `ot-merge adapt`; else None.
        merged: Group -> strength of the merge; None without a residual.
        factors: Group -> factor at which ``folder`` contains the residual, 1 for the merge itself.
    """

    folder: ModelFolder
    target: ModelFolder | None
    stored: Path | None
    merged: dict[str, float] | None
    factors: dict[str, float]


class Parts(NamedTuple):
    """A model taken apart.

    Attributes:
        base: What trains, float32.
        residual: Path -> what the merge added; empty for any other model.
        factor: Group -> how much of the residual is added.
    """

    base: Params
    residual: dict[str, jax.Array]
    factor: dict[str, float]


def open_start(model: str, *, target: str | None = None, offline: bool = False) -> Start:
    """Checks what is trained, and finds its residual.

    Args:
        model: A folder of `ot-merge run` or `ot-merge adapt`, or any other model.
        target: The target of the merge; None: the one that its recipe names.
        offline: Whether the network is forbidden.

    Returns:
        The start.

    Raises:
        InputError: if the target of a merge is missing or no longer fits, or its details are
            damaged or of a later version.
        RecipeError: if a target is named for a model that is not a merge.
    """
    folder = open_folder(model, offline=offline)
    details = folder.path / "ot_merge"
    if (details / RESIDUAL).is_dir():
        if (details / "report.json").is_file():
            schema.read(details / "report.json")  # a later version may mean something else
        strengths = resolve.read_json(details / RESIDUAL / _STRENGTH)
        return Start(
            folder, None, details / RESIDUAL, _by_group(strengths.get("merged"), details),
            _by_group(strengths.get("held"), details),
        )  # fmt: skip
    settings = {}
    if (details / "recipe.yaml").is_file():
        settings = loading.load(details / "recipe.yaml")
    if "rule" not in settings:
        if target is not None:
            raise RecipeError(
                f"--target names what a merge was made from, and {model} is not a folder of "
                "`ot-merge run`; leave it out."
            )
        return Start(folder, None, None, None, {})
    named = target or str(settings.get("target"))
    try:
        before = open_folder(named, offline=offline)
    except InputError as error:
        raise InputError(
            f"{str(error).rstrip('.')}; {model} was merged from it, so name it with --target."
        ) from error
    if before.cfg != folder.cfg:
        raise InputError(f"{named} has another shape than {model}, so it is not its target.")
    merged = _by_group(schema.read(details / "report.json").strength.chosen, details)
    return Start(folder, before, None, merged, residual.AS_MERGED)


def _by_group(value: Any, where: Path) -> dict[str, float]:
    """A strength, or one for each group, as numbers of every group."""
    try:
        numbers = {
            group: float(value.get(group, 0.0) if isinstance(value, dict) else value)
            for group in GROUPS
        }
        if all(map(np.isfinite, numbers.values())):
            return numbers
    except (TypeError, ValueError):
        pass
    raise InputError(f"{where} does not say at what strength was merged; {_REMADE}.")


def verify(start: Start, hashes: Mapping[str, Any]) -> None:
    """Refuses a target whose weights are not those that were merged.

    Args:
        start: From `open_start`.
        hashes: The input ``target`` as `ot_merge_jax.runs.artifacts.inputs` gives it.

    Raises:
        InputError: naming the target.
    """
    if start.target is None:
        return
    side = resolve.read_json(start.folder.path / "ot_merge" / "provenance.json")
    known, now = _files(_object(side.get("inputs")).get("target")), _files(hashes)
    weights = {name for name in known.keys() | now.keys() if name.endswith(".safetensors")}
    if not weights or any(known.get(name) != now.get(name) for name in weights):
        raise InputError(
            f"The weights of {start.target.where} are not those that {start.folder.name} was "
            "merged from; name the unchanged target with --target."
        )


def _files(model: Any) -> dict[str, Any]:
    """File name -> hash, for a model and its adapter, as far as the provenance records them."""
    entry = _object(model)
    return {**_object(entry.get("files")), **_object(_object(entry.get("adapter")).get("files"))}


def _object(value: Any) -> Mapping[str, Any]:
    """A JSON object; an empty one where a damaged file holds something else."""
    return value if isinstance(value, Mapping) else {}


def factor_of(start: Start, strength: float | None) -> dict[str, float]:
    """The factor of the residual that a strength stands for, 1 for the merge itself.

    Args:
        start: From `open_start`.
        strength: alpha or lambda of all groups; None: as it is in the folder.

    Returns:
        Group -> factor; empty without a residual.

    Raises:
        RecipeError: if a strength is given and there is no residual.
    """
    if strength is None:
        return start.factors
    if start.merged is None:
        raise RecipeError(
            f"--strength is that of a merge, and {start.folder.name} has no residual; leave it out."
        )
    return {group: strength / merged if merged else 1.0 for group, merged in start.merged.items()}


def load(
    start: Start, *, strength: float | None = None, mesh: jax.sharding.Mesh | None = None
) -> Parts:
    """Reads a start and takes it apart.

    Args:
        start: From `open_start`.
        strength: alpha or lambda of the residual; None: as it is in the folder.
        mesh: Where parameters live.

    Returns:
        Base and residual. If ``strength`` is None, `residual.fold` of them gives the folder's
        parameters, up to one rounding in float32.

    Raises:
        RecipeError: if a strength is given and there is no residual.
    """
    factor = factor_of(start, strength)
    _, params = hf.load_folder(start.folder, mesh=mesh, dtype=jnp.float32)
    if start.merged is None:
        return Parts(params, {}, factor)
    if start.target is not None:
        _, base = hf.load_folder(start.target, mesh=mesh, dtype=jnp.float32)
        return Parts(base, residual.between(params, base), factor)
    added = _read(start, mesh)
    return Parts(residual.unfold(params, added, start.factors), added, factor)


def _read(start: Start, mesh: jax.sharding.Mesh | None) -> dict[str, jax.Array]:
    """A stored residual, checked against the model."""
    if start.stored is None:
        return {}
    known = {spec.path: spec for spec in specs.param_specs(start.folder.cfg) if spec.weight}
    leaves = arrays.load_arrays(start.stored)
    for path, leaf in leaves.items():
        if path not in known or leaf.shape != known[path].shape or not np.isfinite(leaf).all():
            raise InputError(f"{start.stored} does not fit the model at {path}; {_REMADE}.")
    places = {
        path: None if mesh is None else sharding.leaf_sharding(mesh, spec.axes, spec.shape)
        for path, spec in known.items()
    }
    return {path: jax.device_put(leaf, places[path]) for path, leaf in leaves.items()}


def save_residual(folder: Path, start: Start, parts: Parts) -> None:
    """Writes the residual beside an adapted model, so that `open_start` finds it.

    Args:
        folder: ``OUT/ot_merge``.
        start: Where the training started.
        parts: Base and residual; the residual, which did not train, is written.
    """
    if start.merged is None:
        return
    arrays.save_arrays(folder / RESIDUAL, parts.residual)
    strengths = {"merged": start.merged, "held": parts.factor}
    arrays.save_json(folder / RESIDUAL / _STRENGTH, strengths)

"""What a run will need, known before weights are read: memory, disk beside OUT, arithmetic.

Everything follows from configurations, headers, texts and shapes.
"""

from __future__ import annotations

import functools
import logging
import math
import shutil
from pathlib import Path
from typing import NamedTuple

from ot_merge_jax.data import tokenizers
from ot_merge_jax.errors import ResourceError
from ot_merge_jax.io import safetensors
from ot_merge_jax.merging import weight_transport
from ot_merge_jax.models import gather, specs
from ot_merge_jax.models.sites import site_width, sites_of
from ot_merge_jax.recipes.recipe import Recipe
from ot_merge_jax.runs import flops, memory
from ot_merge_jax.runs import inputs as run_inputs
from ot_merge_jax.runs.inputs import MergeInputs
from ot_merge_jax.transport import coupling

_LOG = logging.getLogger(__name__)
_FEWEST_ROWS = 1024  # max_rows is not lowered below it when memory is short


class Needs(NamedTuple):
    """What a run will need.

    Attributes:
        inputs: The checked inputs; their recipe has everything decided.
        memory: Host memory by stage, and which models stay on disk.
        limit: Bytes of host memory that are allowed.
        disk: Kind of file on the disk of the output when the run ends -> bytes.
        free: Bytes that are free there.
        place: The existing folder whose disk it is.
        work: Transport problems and arithmetic of one calibration seed.
    """

    inputs: MergeInputs
    memory: memory.MemoryPlan
    limit: int
    disk: dict[str, int]
    free: int
    place: Path
    work: flops.Work


def needs(
    recipe: Recipe,
    out: Path | None,
    *,
    overwrite: bool = False,
    offline: bool = False,
    limit: int | None = None,
) -> Needs:
    """What a run would need; reads configurations, headers and texts, and no weights.

    Args:
        recipe: The resolved recipe.
        out: The folder that would be written; None: somewhere in the current folder.
        overwrite: Whether it may exist.
        offline: Whether the network is forbidden. Otherwise what is named by a hub id is fetched
            whole, because headers lie in the files of the weights.
        limit: Bytes of host memory; None: those of the machine.

    Returns:
        The needs.

    Raises:
        ResourceError: if memory or free disk is too small, naming what is needed.
        OtMergeError: for whatever a run would refuse before it starts.
    """
    inputs, memory_plan = checked(recipe, out, overwrite=overwrite, offline=offline, limit=limit)
    place = (out or Path("run")).expanduser().absolute().parent
    place = next(folder for folder in (place, *place.parents) if folder.exists())
    cfgs = {role: folder.cfg for role, folder in inputs.folders.items()}
    gathered = [data for data in (inputs.data, inputs.held_out_data) if data is not None]
    matched = 0 if inputs.vocabulary is None else len(inputs.vocabulary.target_ids)
    run_needs = Needs(
        inputs,
        memory_plan,
        memory.of_machine() if limit is None else limit,
        disk(inputs),
        shutil.disk_usage(place).free,
        place,
        flops.of_merge(cfgs, gathered, spec=inputs.recipe.spec(), matched=matched),
    )
    needed = sum(run_needs.disk.values())
    if needed > run_needs.free:
        parts = ", ".join(
            f"{name} {memory.gib(size)}" for name, size in run_needs.disk.items() if size
        )
        raise ResourceError(
            f"The run needs about {memory.gib(needed)} of disk ({parts}), and "
            f"{memory.gib(run_needs.free)} are free in {place}; make room, choose another --out, "
            "use fewer --samples or --max-rows, or move fewer --weights."
        )
    return run_needs


def checked(
    recipe: Recipe, out: Path | None, *, overwrite: bool, offline: bool, limit: int | None
) -> tuple[MergeInputs, memory.MemoryPlan]:
    """The checked inputs and the plan of memory, with fewer rows if memory is too small.

    Args:
        recipe: The resolved recipe.
        out: The folder to be written, or None.
        overwrite: Whether it may exist.
        offline: Whether the network is forbidden.
        limit: Bytes of host memory; None: those of the machine.

    Returns:
        The inputs and the plan of memory.

    Raises:
        OtMergeError: from `preflight.check` and `memory.choose`.
    """
    inputs = run_inputs.check(recipe, out, overwrite=overwrite, offline=offline)
    while True:
        try:
            return inputs, _memory(inputs, limit)
        except ResourceError:
            if inputs.recipe.max_rows <= _FEWEST_ROWS or inputs.data.rows <= _FEWEST_ROWS:
                raise
        inputs = run_inputs.with_rows(inputs, max(_FEWEST_ROWS, inputs.data.rows // 2))
        _LOG.info("memory: max_rows is lowered to %d", inputs.recipe.max_rows)


def _memory(inputs: MergeInputs, limit: int | None) -> memory.MemoryPlan:
    """The plan of memory of the run."""
    cfgs = {role: folder.cfg for role, folder in inputs.folders.items()}
    documents = [*inputs.dev, *(inputs.held_out or [])]
    both = [inputs.tokenizers[role] for role in ("target", "source")]
    scored = [
        max(len(tokenizers.tokenize(tokenizer, document)["input_ids"]) for tokenizer in both)
        for document in documents
    ]
    recipe = inputs.recipe
    return memory.choose(
        cfgs, inputs.data, spec=recipe.spec(), scored=scored, limit=limit,
        controls=recipe.controls if inputs.held_out else (),
    )  # fmt: skip


def disk(inputs: MergeInputs) -> dict[str, int]:
    """Bytes that lie beside the output, and in it, at the end of a run.

    Stages are kept until the output is published, since a killed run continues from them. The
    report and its plots, a few MB, are not counted; nor is what an existing output holds.

    Args:
        inputs: Checked inputs.

    Returns:
        Kind of file -> bytes, before any compression.
    """
    recipe, target = inputs.recipe, inputs.folders["target"]
    spec, source = recipe.spec(), inputs.folders["source"].cfg
    # every further calibration seed gathers, couples and moves for itself
    seeds = recipe.seeds if inputs.held_out is not None else 1
    rows_of = functools.partial(gather.result_bytes, sites=sites_of(spec.weights))
    # rows that both models give, and those of the random source of a control
    shared, alone = seeds * inputs.data.rows, 0
    if inputs.held_out_data is not None:
        shared += inputs.held_out_data.rows
    if inputs.held_out is not None and "wrong-source" in recipe.controls:
        alone = seeds * inputs.data.rows
    couplings = coupling.result_bytes(
        [
            (site_width(site, target.cfg), site_width(site, source))
            for site in sites_of(spec.weights)
        ],
        layers=(target.cfg.num_layers, source.num_layers),
    )
    names = {name for param in specs.param_specs(target.cfg) for name in param.tensor_names()}
    return {
        "activations": rows_of(target.cfg, rows=shared) + rows_of(source, rows=shared + alone),
        "coupling": (seeds + 1) * couplings,  # the stages, and the copy that is published
        "transported weights": seeds * weight_transport.result_bytes(target.cfg, spec),
        "model": sum(_bytes(target.tensors[name]) for name in names),
    }


def _bytes(tensor: safetensors.TensorInfo) -> int:
    """Bytes of a tensor in its file."""
    return safetensors.DTYPES[tensor.dtype].itemsize * math.prod(tensor.shape)

"""`gather`: the activations of one model at the sites asked for, row by row. Imports models."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np

from ot_merge_jax import progress
from ot_merge_jax.distributed import sharding
from ot_merge_jax.errors import NonFiniteError
from ot_merge_jax.models import decoder, offload, specs
from ot_merge_jax.models.config import ModelConfig
from ot_merge_jax.models.sites import site_width
from ot_merge_jax.types import BUDGET, Activations, Batch, Params


@functools.partial(jax.jit, static_argnames=("cfg", "sites"))
def _step(
    params: Params, batch: Batch, *, cfg: ModelConfig, sites: frozenset[str]
) -> dict[str, jax.Array]:
    """The captured rows of one batch; the logits are never computed."""
    return decoder.hidden_states(params, batch, cfg=cfg, capture=sites)[1]


def _in_memory(site: str, shape: tuple[int, ...]) -> np.ndarray:
    """Room for the activations of a site in host memory."""
    del site  # all sites live in one place
    return np.empty(shape, np.float32)


def _whole(
    params: Params,
    batches: Sequence[Batch],
    *,
    cfg: ModelConfig,
    sites: frozenset[str],
    model: str,
    mesh: jax.sharding.Mesh | None,
) -> Iterator[tuple[slice, int, dict[str, jax.Array]]]:
    """(layers, batch, captured rows) of all layers at once, batch by batch."""
    tracked = progress.track(
        list(enumerate(batches)), f"gather activations of the {model} (batches)"
    )
    for index, batch in tracked:
        split = sharding.split_batch(batch, mesh)
        yield slice(None), index, _step(params, split, cfg=cfg, sites=sites)


def _by_layer(
    params: Params,
    batches: Sequence[Batch],
    *,
    cfg: ModelConfig,
    sites: frozenset[str],
    model: str,
    mesh: jax.sharding.Mesh | None,
    hidden_at_once: int,
) -> Iterator[tuple[slice, int, dict[str, jax.Array]]]:
    """The same as `_whole`, layer by layer, where the parameters are on disk."""
    what = f"gather activations of the {model}"
    for part in offload.chunks(batches, cfg=cfg, hidden_at_once=hidden_at_once):
        split = [sharding.split_batch(batch, mesh) for batch in batches[part]]
        for l, index, _, rows in offload.through_layers(
            params, split, cfg=cfg, sites=sites, what=what
        ):
            captured = {site: picked[None] for site, picked in rows.items()}
            yield slice(l, l + 1), part.start + index, captured


def gather(
    params: Params,
    batches: Sequence[Batch],
    *,
    cfg: ModelConfig,
    sites: Iterable[str],
    mesh: jax.sharding.Mesh | None = None,
    model: str = "model",
    allocate: Callable[[str, tuple[int, ...]], np.ndarray] = _in_memory,
    hidden_at_once: int = BUDGET.hidden,
) -> Activations:
    """Runs a model over batches and keeps the wanted rows of the wanted sites.

    Rows are picked, or pooled over tokens, inside the jitted step, which compiles once for each
    shape of batch.

    Args:
        params: Parameters, in the dtype to compute in; of `specs.LazyParams` one layer at a
            time is in memory.
        batches: From `ot_merge_jax.data.calibration`.
        cfg: The model.
        sites: Names of `ot_merge_jax.models.sites.SITES`.
        mesh: Splits each batch along its ``data`` axis; None: that of the parameters, if any.
        model: Which model this is, for messages.
        allocate: Makes the float32 array of a site from its name and shape ``[layers, rows, d]``;
            host memory, unless it is e.g. `ot_merge_jax.io.arrays.allocator`.
        hidden_at_once: Bytes of hidden states in memory where parameters are lazy; at least
            those of one batch.

    Returns:
        Activations on the host, in the arrays that were allocated, rows sorted by ``row_id``.

    Raises:
        NonFiniteError: naming the site and the layer, if an activation is NaN or infinite.
        ValueError: if two rows have the same id.

    Source: Transport and Merge, arXiv 2602.05495, section 4, eq. 6. Differs: rows may be tokens.
    """
    sites = frozenset(sites)
    mesh = mesh or sharding.mesh_of(params)
    row_id = np.concatenate([np.asarray(batch.row_id).ravel() for batch in batches] or [[]])
    row_id = np.sort(row_id[row_id >= 0]).astype(np.int32)
    if len(np.unique(row_id)) != len(row_id):
        raise ValueError(
            "Two rows have the same row_id; each row of the calibration set needs its own."
        )
    values = {
        site: allocate(site, (cfg.num_layers, len(row_id), site_width(site, cfg)))
        for site in sorted(sites)
    }
    steps = _whole
    if not specs.is_resident(params):
        steps = functools.partial(_by_layer, hidden_at_once=hidden_at_once)
    for layers, index, captured in steps(
        params, batches, cfg=cfg, sites=sites, model=model, mesh=mesh
    ):
        ids = np.asarray(batches[index].row_id)
        wanted = ids >= 0
        places = np.searchsorted(row_id, ids[wanted])
        for site, rows in captured.items():
            values[site][layers, places] = np.asarray(rows)[:, wanted]
    for site, rows in values.items():
        for layer, layer_rows in enumerate(rows):
            if not np.isfinite(layer_rows).all():
                raise NonFiniteError(
                    f"Activations of the {model} at site {site}, layer {layer}, are not finite: "
                    f"its weights overflow there; check the checkpoint."
                )
    return Activations(values, row_id)  # pyright: ignore[reportArgumentType]


def result_bytes(cfg: ModelConfig, *, rows: int, sites: Iterable[str]) -> int:
    """Bytes of the activations of one model."""
    return 4 * rows * cfg.num_layers * sum(site_width(site, cfg) for site in sites)


def peak_bytes(
    cfg: ModelConfig,
    batches: Iterable[Batch],
    *,
    is_resident: bool = True,
    hidden_at_once: int = BUDGET.hidden,
) -> int:
    """Bytes of `gather` at its peak, beside parameters in memory and the activations themselves."""
    shapes = [np.shape(batch.tokens) for batch in batches]
    size, length = max(shapes, key=math.prod)
    step = decoder.peak_bytes(cfg, size=size, length=length)
    if is_resident:
        return step
    tokens = sum(map(math.prod, shapes))
    return step + offload.peak_bytes(
        cfg, tokens=tokens, batch=size * length, hidden_at_once=hidden_at_once
    )


def flops(cfg: ModelConfig, batches: Iterable[Batch]) -> int:
    """FLOPs of `gather` over padded batches."""
    shapes = (np.shape(batch.tokens) for batch in batches)
    return sum(decoder.flops(cfg, size=size, length=length) for size, length in shapes)

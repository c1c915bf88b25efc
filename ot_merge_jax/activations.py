"""`gather`: the activations of one model at the sites asked for, row by row. Imports models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np

from ot_merge_jax import progress, sharding
from ot_merge_jax.config import ModelConfig
from ot_merge_jax.errors import NonFiniteError
from ot_merge_jax.models import decoder, specs
from ot_merge_jax.spaces import VOCABULARY, site_width
from ot_merge_jax.types import Activations, Batch, Params


@functools.partial(jax.jit, static_argnames=("cfg", "sites"))
def _step(
    params: Params, batch: Batch, *, cfg: ModelConfig, sites: frozenset[str]
) -> dict[str, jax.Array]:
    """The captured rows of one batch; the logits are never computed."""
    return decoder.forward(params, batch, cfg=cfg, capture=sites)[1]


def _in_memory(site: str, shape: tuple[int, ...]) -> np.ndarray:
    """Room for the activations of a site in host memory."""
    del site  # all sites live in one place
    return np.empty(shape, np.float32)


@functools.partial(jax.jit, static_argnames=("cfg", "kind", "sites"))
def _layer_step(
    layer: Params, x: jax.Array, batch: Batch, *, cfg: ModelConfig, kind: int, sites: frozenset[str]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One layer of one batch: the residual stream behind it, and its captured rows."""
    seen = decoder.views(decoder.positions_of(batch.mask), batch.mask, cfg=cfg)
    x, found, _ = decoder.layer(layer, x, *decoder.of_kind(seen, kind), cfg=cfg)
    return x, {site: decoder.rows_of(found[site], batch) for site in sorted(sites)}


_embed = jax.jit(decoder.embed, static_argnames="cfg")


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
) -> Iterator[tuple[slice, int, dict[str, jax.Array]]]:
    """The same layer by layer: one layer's parameters are in memory, and all hidden states."""
    batches = [sharding.split_batch(batch, mesh) for batch in batches]
    table = {"embed_tokens": {"embedding": specs.get(params, VOCABULARY["embed"])}}
    hidden = [np.asarray(_embed(table, batch.tokens, cfg=cfg)) for batch in batches]
    del table
    kinds = cfg.layer_kinds()
    numbers = [sorted(set(kinds), key=kinds.index).index(one) for one in kinds]
    for l in progress.track(range(cfg.num_layers), f"gather activations of the {model} (layers)"):
        layer = specs.layer(params, l)
        for index, batch in enumerate(batches):
            x, rows = _layer_step(
                layer, hidden[index], batch, cfg=cfg, kind=numbers[l], sites=sites
            )
            hidden[index] = np.asarray(x)
            yield slice(l, l + 1), index, {site: one[None] for site, one in rows.items()}


def gather(
    params: Params,
    batches: Sequence[Batch],
    *,
    cfg: ModelConfig,
    sites: Iterable[str],
    mesh: jax.sharding.Mesh | None = None,
    model: str = "model",
    by_layer: bool = False,
    allocate: Callable[[str, tuple[int, ...]], np.ndarray] = _in_memory,
) -> Activations:
    """Runs a model over batches and keeps the wanted rows of the wanted sites.

    Rows are picked, or pooled over tokens, inside the jitted step, which compiles once for each
    shape of batch.

    Args:
        params: Parameters, in the dtype to compute in.
        batches: From `ot_merge_jax.calibration`.
        cfg: The model.
        sites: Names of `ot_merge_jax.spaces.SITES`.
        mesh: Splits each batch along its ``data`` axis; None: that of the parameters, if any.
        model: Which model this is, for messages.
        by_layer: Whether layers run one after the other over all batches, each one's parameters
            dropped behind it: for `ot_merge_jax.io.stored.StoredParams` larger than memory.
        allocate: Makes the float32 array of a site from its name and shape ``[layers, rows, d]``;
            host memory, unless it is e.g. `ot_merge_jax.io.checkpoint.allocator`.

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
    steps = _by_layer if by_layer else _whole
    for layers, index, captured in steps(
        params, batches, cfg=cfg, sites=sites, model=model, mesh=mesh
    ):
        ids = np.asarray(batches[index].row_id)
        wanted = ids >= 0
        places = np.searchsorted(row_id, ids[wanted])
        for site, rows in captured.items():
            values[site][layers, places] = np.asarray(rows)[:, wanted]
    for site, rows in values.items():
        for layer, one in enumerate(rows):
            if not np.isfinite(one).all():
                raise NonFiniteError(
                    f"Activations of the {model} at site {site}, layer {layer}, are not finite: "
                    f"its weights overflow there; check the checkpoint."
                )
    return Activations(values, row_id)  # pyright: ignore[reportArgumentType]

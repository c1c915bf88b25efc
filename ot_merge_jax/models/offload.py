"""The decoder layer by layer: one layer's parameters in memory, and all hidden states.

For parameters larger than memory (`specs.LazyParams`); `decoder.forward` is the
same in one program.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from ot_merge_jax import progress
from ot_merge_jax.models import decoder, specs
from ot_merge_jax.models.config import ModelConfig
from ot_merge_jax.models.sites import VOCABULARY
from ot_merge_jax.types import BUDGET, Batch, Params


def chunks(
    batches: Sequence[Batch], *, cfg: ModelConfig, hidden_at_once: int = BUDGET.hidden
) -> Iterator[slice]:
    """Stretches of batches whose hidden states, float32, stay within so many bytes."""
    start = size = 0
    for index, batch in enumerate(batches):
        more = 4 * cfg.hidden_size * np.size(batch.tokens)
        if index > start and size + more > hidden_at_once:
            yield slice(start, index)
            start, size = index, 0
        size += more
    if start < len(batches):
        yield slice(start, len(batches))


_embed = jax.jit(decoder.embed, static_argnames="cfg")


def _embedded(params: Params, batches: Sequence[Batch], *, cfg: ModelConfig) -> list[np.ndarray]:
    """The residual stream before the first layer, on the host, for each batch ``[b, s, d]``."""
    table = specs.unflatten({VOCABULARY["embed"]: specs.get(params, VOCABULARY["embed"])})
    return [np.asarray(_embed(table, batch.tokens, cfg=cfg)) for batch in batches]


def through_layers(
    params: Params,
    batches: Sequence[Batch],
    *,
    cfg: ModelConfig,
    sites: frozenset[str] = frozenset(),
    what: str,
) -> Iterator[tuple[int, int, np.ndarray, dict[str, jax.Array]]]:
    """Sends all batches through the table and then through one layer after the other.

    Args:
        params: Parameters, read one layer at a time.
        batches: The batches.
        cfg: The model.
        sites: Sites to capture.
        what: What is done, for the progress line.

    Yields:
        (layer, batch, residual stream behind the layer ``[b, s, d]`` on the host, captured rows
        ``[b, r, d]`` by site).
    """
    hidden = _embedded(params, batches, cfg=cfg)
    kinds = cfg.layer_kinds()
    numbers = [sorted(set(kinds), key=kinds.index).index(kind) for kind in kinds]
    for l in progress.track(range(cfg.num_layers), f"{what} (layers)"):
        layer = specs.layer(params, l)
        for index, batch in enumerate(batches):
            x, rows = _layer(layer, hidden[index], batch, cfg=cfg, kind=numbers[l], sites=sites)
            hidden[index] = np.asarray(x)
            yield l, index, hidden[index], rows


def peak_bytes(cfg: ModelConfig, *, tokens: int, batch: int, hidden_at_once: int) -> int:
    """Bytes beside one layer's work: hidden states, the layer in use and the one that is read.

    Args:
        cfg: The model.
        tokens: Tokens of all batches, with their padding.
        batch: Tokens of the largest batch.
        hidden_at_once: As for `chunks`.
    """
    token = 4 * cfg.hidden_size
    hidden = min(token * tokens, max(token * batch, hidden_at_once))
    return hidden + 2 * 4 * specs.largest_piece(cfg)


def hidden_states(
    params: Params, batches: Sequence[Batch], *, cfg: ModelConfig, what: str
) -> list[np.ndarray]:
    """The residual stream behind the last layer, on the host, for each batch ``[b, s, d]``."""
    steps = through_layers(params, batches, cfg=cfg, what=what)
    return [x for l, _, x, _ in steps if l == cfg.num_layers - 1]


def of_head(params: Params, *, cfg: ModelConfig) -> Params:
    """The parameters that `decoder.head` reads, in memory."""
    table = VOCABULARY["embed" if cfg.tie_word_embeddings else "head"]
    return specs.unflatten({path: specs.get(params, path) for path in ("norm/scale", table)})


@functools.partial(jax.jit, static_argnames=("cfg", "kind", "sites"))
def _layer(
    layer: Params, x: jax.Array, batch: Batch, *, cfg: ModelConfig, kind: int, sites: frozenset[str]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One layer of one batch: the residual stream behind it, and its captured rows."""
    contexts = decoder.attention_contexts(decoder.positions_of(batch.mask), batch.mask, cfg=cfg)
    x, captured, _ = decoder.layer(layer, x, *decoder.of_kind(contexts, kind), cfg=cfg)
    return x, {site: decoder.rows_of(captured[site], batch) for site in sorted(sites)}

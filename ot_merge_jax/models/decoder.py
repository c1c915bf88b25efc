"""One decoder for all dense families: stacked layers, scanned; activations are return values.

Outside this package a model is ``(cfg, params)``, a frozen config and a nested dict of arrays. The
forward pass is `embed`, then `layer` for each layer, then `head`: `forward` scans the layers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ot_merge_jax.models import specs
from ot_merge_jax.models.config import ModelConfig
from ot_merge_jax.models.layers import MLP, Attention, Cache, Sites, norm, rows_times
from ot_merge_jax.models.rope import rope_tables
from ot_merge_jax.models.specs import NORMS
from ot_merge_jax.types import Batch, Params


class Block(nnx.Module):
    """One decoder layer: attention and MLP on a residual stream, with norms before or after."""

    def __init__(self, cfg: ModelConfig):
        """Zero parameters."""
        self.names, self.residual_scale = NORMS[cfg.style.norms], cfg.style.residual_scale
        for name in self.names.values():
            setattr(self, name, norm(cfg.hidden_size, cfg))
        self.self_attn = Attention(cfg)
        self.mlp = MLP(cfg)

    def __call__(
        self, x: Float[Array, "b s d"], tables: Any, visible: Any, cache: Cache | None = None
    ) -> tuple[Float[Array, "b s d"], Sites, Cache]:
        """Runs the layer; returns the new residual stream, every site and the cache."""
        with jax.named_scope("attention"):
            inside = self._norm("attention_in", x)
            out, attention_sites, cache = self.self_attn(inside, tables, visible, cache)
            x = x + self._scaled(self._norm("attention_out", out))
        with jax.named_scope("mlp"):
            out, mlp_sites = self.mlp(self._norm("mlp_in", x))
            x = x + self._scaled(self._norm("mlp_out", out))
        return x, attention_sites | mlp_sites, cache

    def _norm(self, place: str, x: jax.Array) -> jax.Array:
        """The norm at a place, if the family has one there."""
        return getattr(self, self.names[place])(x) if place in self.names else x

    def _scaled(self, x: jax.Array) -> jax.Array:
        """A branch as it is added to the residual stream."""
        return x if self.residual_scale == 1 else x * jnp.asarray(self.residual_scale, x.dtype)


def _final_norm(cfg: ModelConfig) -> nnx.Module:
    """The norm before the head."""
    return norm(cfg.hidden_size, cfg)


@functools.lru_cache(maxsize=64)
def _structure(make: Callable[[ModelConfig], nnx.Module], cfg: ModelConfig) -> Any:
    """The static structure of a module, without arrays."""
    return nnx.split(nnx.eval_shape(lambda: make(cfg)))[0]


class AttentionContext(NamedTuple):
    """What tokens see and how they are rotated, for each distinct kind of layer.

    Attributes:
        tables: Cosines and sines of each kind.
        visible: Which keys each query may see, for each kind.
        kind: Which kind each layer is, ``[layers]``.
    """

    tables: list[tuple[jax.Array, jax.Array]]
    visible: list[jax.Array]
    kind: np.ndarray


def attention_contexts(
    positions: Int[Array, "b s"],
    key_mask: Bool[Array, "b k"],
    *,
    start: Any = 0,
    cfg: ModelConfig,
) -> AttentionContext:
    """Rotation tables and masks of every kind of layer.

    Args:
        positions: Position of each query among the real tokens of its sequence.
        key_mask: Which keys are real.
        start: Place of the first query among the keys.
        cfg: The model.

    Returns:
        The tables and masks; attention is causal and, in sliding layers, reaches one window back.
    """
    layers = cfg.layer_kinds()
    kinds = sorted(set(layers), key=layers.index)
    queries = start + jnp.arange(positions.shape[1])
    distance = queries[:, None] - jnp.arange(key_mask.shape[1])[None]  # [s, k]
    tables, visible = [], []
    for kind in kinds:
        cos, sin = rope_tables(positions, kind.rope or cfg.rope, cfg.head_dim)
        tables.append((cos, sin) if kind.rope else (jnp.ones_like(cos), jnp.zeros_like(sin)))
        near = (distance >= 0) & (distance < (kind.window or key_mask.shape[1]))
        visible.append(near[None, None] & key_mask[:, None, None, :])
    return AttentionContext(
        tables, visible, np.array([kinds.index(layer_kind) for layer_kind in layers], np.int32)
    )


def of_kind(seen: AttentionContext, kind: Any) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Tables and mask of one kind, whose number may be traced."""
    if len(seen.visible) == 1:
        return seen.tables[0], seen.visible[0]
    cos, sin = (jnp.stack(table)[kind] for table in zip(*seen.tables, strict=True))
    return (cos, sin), jnp.stack(seen.visible)[kind]


def positions_of(mask: Bool[Array, "b s"]) -> Int[Array, "b s"]:
    """Position of each token among the real tokens of its sequence."""
    return jnp.maximum(jnp.cumsum(mask, -1, dtype=jnp.int32) - 1, 0)


def embed(params: Params, tokens: Int[Array, "b s"], *, cfg: ModelConfig) -> Float[Array, "b s d"]:
    """The residual stream before the first layer; needs ``embed_tokens`` alone."""
    with jax.named_scope("embed"):
        x = params["embed_tokens"]["embedding"][tokens]
        scale = cfg.style.embedding_scale
        return x if scale == 1 else x * jnp.asarray(scale, x.dtype)


def layer(
    params: Params,
    x: Float[Array, "b s d"],
    tables: Any,
    visible: Any,
    *,
    cfg: ModelConfig,
    cache: Cache | None = None,
) -> tuple[Float[Array, "b s d"], Sites, Cache]:
    """One layer by its own parameters (those of ``layers``, without the stacking axis)."""
    return nnx.merge(_structure(Block, cfg), params)(x, tables, visible, cache)


def head(params: Params, x: Float[Array, "b s d"], *, cfg: ModelConfig) -> Float[Array, "b s v"]:
    """Logits in float32 of the residual stream after the last layer."""
    with jax.named_scope("head"):
        x = nnx.merge(_structure(_final_norm, cfg), params["norm"])(x)
        table = (
            params["embed_tokens"]["embedding"].T
            if cfg.tie_word_embeddings
            else params["lm_head"]["kernel"]
        )
        if x.dtype == jnp.float16:  # XLA's CPU has no product of float16 that sums in float32
            x, table = x.astype(jnp.float32), table.astype(jnp.float32)
        logits = rows_times(x, table, jnp.float32)
        style = cfg.style
        logits = logits if style.logit_scale == 1 else logits * style.logit_scale
        if style.logit_softcap is None:
            return logits
        return style.logit_softcap * jnp.tanh(logits / style.logit_softcap)


def forward(
    params: Params,
    batch: Batch,
    *,
    cfg: ModelConfig,
    capture: frozenset[str] = frozenset(),
    unroll: int = 1,
) -> tuple[Float[Array, "b s v"], dict[str, Float[Array, "layers b r d"]]]:
    """Runs the decoder; returns logits and the wanted rows of the wanted sites.

    Positions count real tokens, so left and right padding give the same result. Attention is causal
    and never sees padding. The rows are picked (or pooled over the mask) inside the layer scan:
    what leaves it is ``[layers, b, r, d]`` and not ``[layers, b, s, d]``.

    Args:
        params: Parameters, in the dtype to compute in.
        batch: Tokens, mask and the rows wanted.
        cfg: The model; static.
        capture: Sites to return (`ot_merge_jax.models.sites.SITES`); static.
        unroll: Layers per scan step; changes the compiled program, never the numbers.

    Returns:
        Logits float32, and for each captured site its rows, float32.

    Raises:
        KeyError: if a site does not exist.
    """
    x, captured = hidden_states(params, batch, cfg=cfg, capture=capture, unroll=unroll)
    return head(params, x, cfg=cfg), captured


def hidden_states(
    params: Params,
    batch: Batch,
    *,
    cfg: ModelConfig,
    capture: frozenset[str] = frozenset(),
    unroll: int = 1,
    remat: bool = False,
) -> tuple[Float[Array, "b s d"], dict[str, Float[Array, "layers b r width"]]]:
    """The residual stream behind the last layer, and what `forward` captures on the way.

    With ``remat`` a gradient keeps only the residual stream between layers and computes the inside
    of a layer once more: the memory of one layer instead of all, for a third more work.
    """
    contexts = attention_contexts(positions_of(batch.mask), batch.mask, cfg=cfg)

    def step(x: jax.Array, stacked: Any) -> tuple[jax.Array, Sites]:
        layer_params, kind = stacked
        x, sites, _ = layer(layer_params, x, *of_kind(contexts, kind), cfg=cfg)
        return x, {site: rows_of(sites[site], batch) for site in sorted(capture)}

    x = embed(params, batch.tokens, cfg=cfg)
    step = jax.checkpoint(step) if remat else step
    return jax.lax.scan(step, x, (params["layers"], contexts.kind), unroll=unroll)


def peak_bytes(cfg: ModelConfig, *, size: int, length: int) -> int:
    """Bytes of one layer's work on a batch ``[size, length]``, beside the weights, in float32.

    Wide arrays of the MLP, narrow ones, and the attention scores, masked and as weights.
    """
    tokens = size * length
    arrays = 3 * tokens * cfg.intermediate_size + 8 * tokens * cfg.hidden_size
    return 4 * (arrays + 3 * size * cfg.num_heads * length * length)


def flops(cfg: ModelConfig, *, size: int, length: int) -> int:
    """FLOPs of the layers on a batch ``[size, length]``; without the logits."""
    kernels = sum(
        math.prod(spec.shape)
        for spec in specs.param_specs(cfg)
        if spec.is_stacked and spec.path.endswith("/kernel")
    )
    # scores, and the sum of the values that they weigh
    attention = 4 * cfg.num_layers * cfg.num_heads * cfg.head_dim
    return size * length * (2 * kernels + attention * length)


def rows_of(site: Float[Array, "b s d"], batch: Batch) -> Float[Array, "b r d"]:
    """The rows of one site that the batch asks for."""
    site = site.astype(jnp.float32)
    weight = batch.mask.astype(jnp.float32)
    mean = jnp.einsum("bsd,bs->bd", site, weight) / jnp.maximum(weight.sum(-1, keepdims=True), 1.0)
    picked = jnp.take_along_axis(site, jnp.maximum(batch.row_position, 0)[..., None], axis=1)
    return jnp.where((batch.row_position >= 0)[..., None], picked, mean[:, None, :])


def token_nll(
    logits: Float[Array, "b s v"], batch: Batch
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """Next-token negative log-likelihood of every position that has a real successor.

    Args:
        logits: From `forward`.
        batch: The batch they came from.

    Returns:
        ``[b, s - 1]`` losses in nats, 0 where masked, and the weights (0 or 1) of those positions.
    """
    successor = batch.tokens[:, 1:]
    weight = (batch.mask[:, 1:] & batch.mask[:, :-1]).astype(jnp.float32)
    logits = logits[:, :-1]
    chosen = jnp.take_along_axis(logits, successor[..., None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - chosen) * weight, weight

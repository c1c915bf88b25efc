"""One decoder for all dense families: stacked layers, scanned; activations are return values.

Outside this package a model is ``(cfg, params)``, a frozen config and a nested dict of arrays; NNX
appears only between the two lines of `_modules` and `forward`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ot_merge_jax.config import ModelConfig
from ot_merge_jax.models.layers import MLP, Attention, RMSNorm, Sites, rope_tables
from ot_merge_jax.types import Batch, Params


class Block(nnx.Module):
    """One decoder layer: pre-norm attention and pre-norm MLP on a residual stream."""

    def __init__(self, cfg: ModelConfig):
        """Zero parameters."""
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MLP(cfg)

    def __call__(
        self, x: Float[Array, "b s d"], tables: Any, visible: Any
    ) -> tuple[Float[Array, "b s d"], Sites]:
        """Runs the layer; returns the new residual stream and every site."""
        with jax.named_scope("attention"):
            out, attention_sites = self.self_attn(self.input_layernorm(x), tables, visible)
        x = x + out
        with jax.named_scope("mlp"):
            out, mlp_sites = self.mlp(self.post_attention_layernorm(x))
        return x + out, attention_sites | mlp_sites


class Embedding(nnx.Module):
    """The token table."""

    def __init__(self, vocab_size: int, d: int):
        """Zero parameters."""
        self.embedding = nnx.Param(jnp.zeros((vocab_size, d)))


class Head(nnx.Module):
    """The LM head of an untied model."""

    def __init__(self, d: int, vocab_size: int):
        """Zero parameters."""
        self.kernel = nnx.Param(jnp.zeros((d, vocab_size)))


class Decoder(nnx.Module):
    """Token table, stacked layers, final norm and, unless tied, an LM head."""

    def __init__(self, cfg: ModelConfig):
        """Zero parameters; build under ``nnx.eval_shape``, which needs no memory."""
        self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nnx.vmap(lambda _: Block(cfg), in_axes=0, out_axes=0)(
            jnp.zeros((cfg.num_layers,))
        )
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        if not cfg.tie_word_embeddings:
            self.lm_head = Head(cfg.hidden_size, cfg.vocab_size)


@functools.lru_cache(maxsize=32)
def _graph(cfg: ModelConfig) -> Any:
    """The static structure of a decoder, without arrays."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(cfg)))[0]


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
        capture: Sites to return (`ot_merge_jax.spaces.SITES`); static.
        unroll: Layers per scan step; changes the compiled program, never the numbers.

    Returns:
        Logits float32, and for each captured site its rows, float32.

    Raises:
        KeyError: if a site does not exist.
    """
    with jax.named_scope("embed"):
        model = nnx.merge(_graph(cfg), params)
        x = model.embed_tokens.embedding[...][batch.tokens]
    positions = jnp.maximum(jnp.cumsum(batch.mask, -1, dtype=jnp.int32) - 1, 0)
    tables = rope_tables(positions, cfg.rope, cfg.head_dim)
    length = batch.tokens.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    visible = causal[None, None] & batch.mask[:, None, None, :]
    block, stacked = nnx.split(model.layers)

    def layer(x: jax.Array, state: Any) -> tuple[jax.Array, Sites]:
        x, sites = nnx.merge(block, state)(x, tables, visible)
        return x, {site: _rows(sites[site], batch) for site in sorted(capture)}

    x, captured = jax.lax.scan(layer, x, stacked, unroll=unroll)
    with jax.named_scope("head"):
        x = model.norm(x)
        table = (
            model.embed_tokens.embedding[...].T
            if cfg.tie_word_embeddings
            else model.lm_head.kernel[...]
        )
        if x.dtype == jnp.float16:  # XLA's CPU has no product of float16 that sums in float32
            x, table = x.astype(jnp.float32), table.astype(jnp.float32)
        logits = jnp.matmul(x, table, preferred_element_type=jnp.float32)
    return logits, captured


def _rows(site: Float[Array, "b s d"], batch: Batch) -> Float[Array, "b r d"]:
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

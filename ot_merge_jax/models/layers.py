"""The parts of a decoder layer: linear maps, norm, attention, gated MLP.

Modules hold parameters and nothing else; each returns its activations beside its output. In shape
comments ``b s`` are batch and sequence, ``h k`` query and key/value heads, ``e`` head features,
``d`` hidden features.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from ot_merge_jax.models.config import ModelConfig
from ot_merge_jax.models.rope import rotate

Sites = dict[str, jax.Array]


class Cache(NamedTuple):
    """Keys and values a layer has computed, for generation.

    Attributes:
        keys: Rotated keys of all positions there is room for.
        values: Their values.
        length: How many positions are filled; the next ones go there.
    """

    keys: Float[Array, "b k g e"]
    values: Float[Array, "b k g e"]
    length: Any


def rows_times(
    x: Float[Array, "*rows d_in"], kernel: Float[Array, "d_in d_out"], dtype: Any = None
) -> Float[Array, "*rows d_out"]:
    """``x @ kernel`` with all rows in one axis, summed in ``dtype``.

    The kernel's gradient then sums over one axis. Over two, XLA's CPU transposes both factors
    first, which took a sixth of a step of training.
    """
    y = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel, preferred_element_type=dtype)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


class Linear(nnx.Module):
    """``y = x @ kernel (+ bias)``."""

    def __init__(self, d_in: int, d_out: int, *, bias: bool = False):
        """Zero parameters: real values come from a checkpoint or `specs.init`."""
        self.kernel = nnx.Param(jnp.zeros((d_in, d_out)))
        if bias:
            self.bias = nnx.Param(jnp.zeros((d_out,)))

    def __call__(self, x: Float[Array, "*rows d_in"]) -> Float[Array, "*rows d_out"]:
        """Applies the map."""
        y = rows_times(x, self.kernel[...])
        return y + jnp.broadcast_to(self.bias[...], y.shape) if hasattr(self, "bias") else y


class RMSNorm(nnx.Module):
    """Root-mean-square norm, computed in float32 whatever the input's dtype."""

    def __init__(self, d: int, eps: float, *, unit_offset: bool = False):
        """Zero parameters of width ``d``; ``eps`` is added to the mean square."""
        self.scale = nnx.Param(jnp.zeros((d,)))
        self.eps, self.unit_offset = eps, unit_offset

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        """Normalises the last axis."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)
        scale = jnp.broadcast_to(self.scale[...], x.shape)
        if self.unit_offset:  # multiplied before the rounding, as the family was trained
            return (wide * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)
        return scale * wide.astype(x.dtype)


def norm(d: int, cfg: ModelConfig) -> RMSNorm:
    """A norm of width ``d`` as this model has them."""
    return RMSNorm(d, cfg.rms_norm_eps, unit_offset=cfg.style.unit_offset)


def attend(
    q: Float[Array, "b q h e"],
    k: Float[Array, "b k g e"],
    v: Float[Array, "b k g e"],
    visible: Bool[Array, "b 1 q k"],
    *,
    scale: float | None,
    softcap: float | None,
) -> Float[Array, "b q h e"]:
    """Softmax attention; query heads share key/value heads in groups.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        visible: True where a query may see a key.
        scale: Multiplies the products; None: ``e ** -0.5``.
        softcap: ``c tanh(x / c)`` of the scaled products; None: none.

    Returns:
        Mixed values of each query head.
    """
    if softcap is None:
        # XLA's CPU has no product of float16 that sums in float32
        wide = jnp.float32 if q.dtype == jnp.float16 else q.dtype
        mixed = jax.nn.dot_product_attention(
            q.astype(wide), k.astype(wide), v.astype(wide), mask=visible, scale=scale
        )
        return mixed.astype(q.dtype)
    b, length, heads, width = q.shape
    # the library has no soft cap
    grouped = q.astype(jnp.float32).reshape(b, length, k.shape[2], -1, width)
    factor: float = 1.0 / math.sqrt(width) if scale is None else scale
    products = jnp.einsum("bqgre,bkge->bgrqk", grouped, k.astype(jnp.float32))
    products = softcap * jnp.tanh(products * (factor / softcap))
    products = jnp.where(visible[:, :, None], products, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(products, -1).astype(v.dtype)
    return jnp.einsum("bgrqk,bkge->bqgre", weights, v).reshape(b, length, heads, width)


def _extended(cache: Cache, keys: jax.Array, values: jax.Array) -> Cache:
    """The cache with the keys and values of the next positions written in."""
    start = (0, cache.length, 0, 0)
    return Cache(
        jax.lax.dynamic_update_slice(cache.keys, keys, start),
        jax.lax.dynamic_update_slice(cache.values, values, start),
        cache.length + keys.shape[1],
    )


class Attention(nnx.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, cfg: ModelConfig):
        """Zero parameters."""
        self.cfg = cfg
        heads, kv_heads = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        self.q_proj = Linear(cfg.hidden_size, heads, bias=cfg.qkv_bias)
        self.k_proj = Linear(cfg.hidden_size, kv_heads, bias=cfg.qkv_bias)
        self.v_proj = Linear(cfg.hidden_size, kv_heads, bias=cfg.qkv_bias)
        self.o_proj = Linear(heads, cfg.hidden_size, bias=cfg.style.o_bias)
        if cfg.style.qk_norm:
            is_by_head = cfg.style.qk_norm == "head"
            self.q_norm = norm(cfg.head_dim if is_by_head else heads, cfg)
            self.k_norm = norm(cfg.head_dim if is_by_head else kv_heads, cfg)

    def __call__(
        self,
        x: Float[Array, "b s d"],
        tables: tuple[jax.Array, jax.Array],
        visible: Bool[Array, "b 1 s k"],
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "b s d"], Sites, Cache]:
        """Attends.

        Args:
            x: What the projections read.
            tables: Of the rotation at these positions.
            visible: True where a query (third axis) may see a key (fourth).
            cache: Keys and values of all positions so far, and where these go; None: these are all.

        Returns:
            The output, the sites, and the cache with these keys and values in it.
        """
        b, s, _ = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        sites = {"attn_in": x, "q_out": q, "k_out": k, "v_out": v}
        by_head = (b, s, -1, self.cfg.head_dim)
        match self.cfg.style.qk_norm:
            case "all":
                q, k = self.q_norm(q).reshape(by_head), self.k_norm(k).reshape(by_head)
            case "head":
                q, k = self.q_norm(q.reshape(by_head)), self.k_norm(k.reshape(by_head))
            case _:
                q, k = q.reshape(by_head), k.reshape(by_head)
        q, k, v = rotate(q, tables), rotate(k, tables), v.reshape(by_head)
        cache = Cache(k, v, 0) if cache is None else _extended(cache, k, v)
        mixed = attend(
            q,
            cache.keys,
            cache.values,
            visible,
            scale=self.cfg.style.attention_scale,
            softcap=self.cfg.style.attention_softcap,
        ).reshape(b, s, -1)
        out = self.o_proj(mixed)
        return out, sites | {"o_in": mixed, "o_out": out}, cache


_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}


class MLP(nnx.Module):
    """Gated MLP: ``down(act(gate(x)) * up(x))``."""

    def __init__(self, cfg: ModelConfig):
        """Zero parameters."""
        d, inner, bias = cfg.hidden_size, cfg.intermediate_size, cfg.style.mlp_bias
        self.gate_proj = Linear(d, inner, bias=bias)
        self.up_proj = Linear(d, inner, bias=bias)
        self.down_proj = Linear(inner, d, bias=bias)
        self.activation = cfg.style.activation

    def __call__(self, x: Float[Array, "b s d"]) -> tuple[Float[Array, "b s d"], Sites]:
        """Applies the MLP."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        inner = _ACTIVATIONS[self.activation](gate) * up
        out = self.down_proj(inner)
        return out, {"mlp_in": x, "gate_out": gate, "up_out": up, "down_in": inner, "down_out": out}

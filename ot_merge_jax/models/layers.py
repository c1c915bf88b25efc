"""The parts of a decoder layer: linear maps, norm, rotary embedding, attention, gated MLP.

Modules hold parameters and nothing else; each returns its activations beside its output. In shape
comments ``b s`` are batch and sequence, ``h k`` query and key/value heads, ``e`` head features,
``d`` hidden features.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ot_merge_jax.config import ModelConfig, Rope

Sites = dict[str, jax.Array]


class Linear(nnx.Module):
    """``y = x @ kernel (+ bias)``."""

    def __init__(self, d_in: int, d_out: int, *, bias: bool = False):
        """Zero parameters: real values come from a checkpoint or `specs.init`."""
        self.kernel = nnx.Param(jnp.zeros((d_in, d_out)))
        if bias:
            self.bias = nnx.Param(jnp.zeros((d_out,)))

    def __call__(self, x: Float[Array, "*rows d_in"]) -> Float[Array, "*rows d_out"]:
        """Applies the map."""
        y = x @ self.kernel[...]
        return y + jnp.broadcast_to(self.bias[...], y.shape) if hasattr(self, "bias") else y


class RMSNorm(nnx.Module):
    """Root-mean-square norm, computed in float32 whatever the input's dtype."""

    def __init__(self, d: int, eps: float):
        """Zero parameters of width ``d``; ``eps`` is added to the mean square."""
        self.scale = nnx.Param(jnp.zeros((d,)))
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        """Normalises the last axis."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)
        return jnp.broadcast_to(self.scale[...], x.shape) * wide.astype(x.dtype)


def rope_frequencies(rope: Rope, head_dim: int) -> Float[np.ndarray, " half"]:
    """Angular frequency of each rotated pair, in radians per position.

    Args:
        rope: Base and scaling.
        head_dim: Features of one head.

    Returns:
        ``[head_dim / 2]`` float32.

    Example:
        >>> rope_frequencies(Rope(10000.0), 4).tolist()
        [1.0, 0.009999999776482582]

    Source: Su et al., arXiv 2104.09864; ``llama3`` scaling as released with Llama 3.1. Differs:
    nothing.
    """
    frequency = (
        1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    ).astype(np.float32)
    if rope.kind == "default":
        return frequency
    turns = (
        rope.original_positions * frequency / (2 * math.pi)
    )  # full turns within the original context
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return ((1 - smooth) * frequency / rope.factor + smooth * frequency).astype(np.float32)


def rope_tables(
    positions: Int[Array, "b s"], rope: Rope, head_dim: int
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines ``[b, s, 1, head_dim]`` of the rotation at each position, float32."""
    angle = positions[..., None].astype(jnp.float32) * rope_frequencies(rope, head_dim)[None, None]
    angle = jnp.concatenate([angle, angle], -1)[:, :, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "b s h e"], tables: tuple[jax.Array, jax.Array]
) -> Float[Array, "b s h e"]:
    """Rotates feature ``i`` with feature ``i + e/2``, the pairing of Hugging Face checkpoints."""
    cos, sin = (table.astype(x.dtype) for table in tables)
    first, second = jnp.split(x, 2, -1)
    return x * cos + jnp.concatenate([-second, first], -1) * sin


class Attention(nnx.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, cfg: ModelConfig):
        """Zero parameters."""
        self.cfg = cfg
        heads, kv_heads = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        self.q_proj = Linear(cfg.hidden_size, heads, bias=cfg.qkv_bias)
        self.k_proj = Linear(cfg.hidden_size, kv_heads, bias=cfg.qkv_bias)
        self.v_proj = Linear(cfg.hidden_size, kv_heads, bias=cfg.qkv_bias)
        self.o_proj = Linear(heads, cfg.hidden_size)

    def __call__(
        self,
        x: Float[Array, "b s d"],
        tables: tuple[jax.Array, jax.Array],
        visible: Bool[Array, "b 1 s s"],
    ) -> tuple[Float[Array, "b s d"], Sites]:
        """Attends; ``visible`` is True where a query (third axis) may see a key (fourth)."""
        b, s, _ = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        by_head = (b, s, -1, self.cfg.head_dim)
        # XLA's CPU has no product of float16 that sums in float32
        wide = jnp.float32 if x.dtype == jnp.float16 else x.dtype
        mixed = jax.nn.dot_product_attention(
            rotate(q.reshape(by_head), tables).astype(wide),
            rotate(k.reshape(by_head), tables).astype(wide),
            v.reshape(by_head).astype(wide),
            mask=visible,
        ).astype(x.dtype)  # [b, s, h, e]
        mixed = mixed.reshape(b, s, -1)
        out = self.o_proj(mixed)
        return out, {"attn_in": x, "q_out": q, "k_out": k, "v_out": v, "o_in": mixed, "o_out": out}


class MLP(nnx.Module):
    """Gated MLP: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, cfg: ModelConfig):
        """Zero parameters."""
        self.gate_proj = Linear(cfg.hidden_size, cfg.intermediate_size)
        self.up_proj = Linear(cfg.hidden_size, cfg.intermediate_size)
        self.down_proj = Linear(cfg.intermediate_size, cfg.hidden_size)

    def __call__(self, x: Float[Array, "b s d"]) -> tuple[Float[Array, "b s d"], Sites]:
        """Applies the MLP."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        inner = jax.nn.silu(gate) * up
        out = self.down_proj(inner)
        return out, {"mlp_in": x, "gate_out": gate, "up_out": up, "down_in": inner, "down_out": out}

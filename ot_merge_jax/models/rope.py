"""Rotary position embedding: frequencies of every kind, tables, rotation."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ot_merge_jax.models.config import Rope


def rope_frequencies(
    rope: Rope, head_dim: int, *, is_long: bool = False
) -> Float[np.ndarray, " pairs"]:
    """Angular frequency of each rotated pair, in radians per position.

    Args:
        rope: Base and scaling.
        head_dim: Features of one head.
        is_long: Whether the sequence is longer than ``original_positions`` (for ``longrope``).

    Returns:
        ``[rotated * head_dim / 2]`` float32.

    Example:
        >>> rope_frequencies(Rope(10000.0), 4).tolist()
        [1.0, 0.009999999776482582]

    Source: Su et al., arXiv 2104.09864; ``llama3`` as released with Llama 3.1; ``yarn``: Peng et
    al., arXiv 2309.00071; ``longrope``: Ding et al., arXiv 2402.13753. Differs: nothing.
    """
    width = int(head_dim * rope.rotated)
    exponent = np.arange(0, width, 2, dtype=np.float32) / width
    frequency = (1.0 / rope.theta**exponent).astype(np.float32)
    if rope.kind == "linear":
        return frequency / np.float32(rope.factor)
    if rope.kind == "longrope":
        divisor = rope.long_factor if is_long else rope.short_factor
        return frequency / np.asarray(divisor, np.float32)
    if rope.kind == "llama3":
        # full turns within the original context
        turns = rope.original_positions * frequency / (2 * math.pi)
        smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        smooth = np.clip(smooth, 0.0, 1.0)
    elif rope.kind == "yarn":
        smooth = 1.0 - _yarn_ramp(rope, width)
    else:
        return frequency
    return ((1 - smooth) * frequency / rope.factor + smooth * frequency).astype(np.float32)


def _yarn_ramp(rope: Rope, width: int) -> Float[np.ndarray, " pairs"]:
    """0 at pairs that turn often within the original context, 1 at those that hardly turn."""

    def pair_of(turns: float) -> float:
        per_turn = rope.original_positions / (turns * 2 * math.pi)
        return width * math.log(per_turn) / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high += 0.001 * (low == high)
    return np.clip((np.arange(width // 2, dtype=np.float32) - low) / (high - low), 0.0, 1.0)


def rope_tables(
    positions: Int[Array, "b s"], rope: Rope, head_dim: int
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotation at each position, float32.

    Args:
        positions: Position of each token in its own sequence. The largest one says how long a
            sequence is, which chooses the frequencies of ``longrope``.
        rope: Base and scaling.
        head_dim: Features of one head.

    Returns:
        Two ``[b, s, 1, rotated * head_dim]``.
    """
    frequency = rope_frequencies(rope, head_dim)[None, None]  # [1, 1, pairs]
    if rope.kind == "longrope":
        is_long = positions.max(-1)[:, None, None] >= rope.original_positions
        long = rope_frequencies(rope, head_dim, is_long=True)[None, None]
        frequency = jnp.where(is_long, long, frequency)
    angle = positions[..., None].astype(jnp.float32) * frequency
    angle = jnp.concatenate([angle, angle], -1)[:, :, None, :]
    return jnp.cos(angle) * rope.attention_factor, jnp.sin(angle) * rope.attention_factor


def rotate(
    x: Float[Array, "b s h e"], tables: tuple[jax.Array, jax.Array]
) -> Float[Array, "b s h e"]:
    """Rotates feature ``i`` with feature ``i + r/2``, the pairing of Hugging Face checkpoints.

    The first ``r`` features of each head are rotated, ``r`` being the tables' width; the rest pass.
    """
    cos, sin = (table.astype(x.dtype) for table in tables)
    width = cos.shape[-1]
    turning, rest = x[..., :width], x[..., width:]
    first, second = jnp.split(turning, 2, -1)
    turned = turning * cos + jnp.concatenate([-second, first], -1) * sin
    return jnp.concatenate([turned, rest], -1) if rest.shape[-1] else turned

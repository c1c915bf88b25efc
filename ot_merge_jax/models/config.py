"""`ModelConfig`: the shape and the arithmetic of a decoder. Types only; imports nothing of ours.

`ot_merge_jax.models.hf_config` reads it from a ``config.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple


class Rope(NamedTuple):
    """Rotary position embedding: base frequency and how it is stretched to longer contexts.

    Attributes:
        theta: Base of the frequencies.
        kind: ``default``, ``linear``, ``dynamic``, ``llama3``, ``yarn`` or ``longrope``;
            ``dynamic`` changes nothing within `ModelConfig.max_positions`, and nothing here reads
            beyond it.
        factor: How much low frequencies are slowed down.
        low_freq_factor: Of ``llama3``: wavelengths above ``original_positions / low_freq_factor``
            are slowed fully.
        high_freq_factor: Of ``llama3``: wavelengths below ``original_positions / high_freq_factor``
            stay.
        original_positions: Context length before the scaling, in tokens.
        attention_factor: Multiplies cosines and sines (``yarn``, ``longrope``).
        beta_fast: Of ``yarn``: pairs that turn more often than this in the old context stay.
        beta_slow: Of ``yarn``: pairs that turn less often than this are slowed fully.
        truncate: Of ``yarn``: whether the two bounds are rounded to whole pairs.
        short_factor: Of ``longrope``: divisor of each frequency, for sequences up to
            ``original_positions`` tokens.
        long_factor: Of ``longrope``: the same for longer sequences.
        rotated: Fraction of a head's features that is rotated; the rest passes.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    rotated: float = 1.0


class LayerType(NamedTuple):
    """What one layer does differently from another.

    Attributes:
        window: How many tokens back a token sees, itself included; None: all.
        rope: Its rotary embedding; None: none.
    """

    window: int | None
    rope: Rope | None


class Style(NamedTuple):
    """What sets a family apart from the plain pre-norm decoder; the defaults are the plain one.

    Attributes:
        o_bias: Whether the attention's output projection has a bias.
        mlp_bias: Whether gate, up and down have a bias.
        qk_norm: Whether queries and keys are normalised: each head alone, or all features at once.
        norms: Where norms sit around the two branches: before, after, or both.
        unit_offset: Whether a norm multiplies by ``1 + scale``.
        activation: Of the gated MLP.
        attention_scale: Multiplies query-key products; None: ``head_dim ** -0.5``.
        attention_softcap: ``c tanh(x / c)`` of the scaled products; None: none.
        logit_softcap: The same for the logits.
        embedding_scale: Multiplies embedded tokens.
        residual_scale: Multiplies each branch before it is added.
        logit_scale: Multiplies the logits.
        is_fused: Whether the files hold q, k, v in one tensor, and gate and up in another.
    """

    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["head", "all"] | None = None
    norms: Literal["pre", "post", "both"] = "pre"
    unit_offset: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    is_fused: bool = False


PLAIN = Style()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything that fixes the shapes and the arithmetic of a decoder; hashable, static in jit.

    Attributes:
        family: Hugging Face ``model_type``.
        vocab_size: Rows of the embedding table, padding included.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gated MLP.
        num_layers: Decoder layers.
        num_heads: Query heads.
        num_kv_heads: Key/value heads; divides ``num_heads``.
        head_dim: Features of one head; need not be ``hidden_size / num_heads``.
        max_positions: Context length, in tokens.
        rms_norm_eps: Added to the mean square in every norm.
        rope: Rotary position embedding.
        tie_word_embeddings: Whether the LM head is the embedding table.
        qkv_bias: Whether q, k and v have a bias.
        dtype: Name of the dtype the checkpoint declares, e.g. ``bfloat16``.
        style: What else sets the family apart.
        pattern: The kind of each layer; empty if all see everything and use ``rope``.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool
    qkv_bias: bool
    dtype: str
    style: Style = PLAIN
    pattern: tuple[LayerType, ...] = ()

    def layer_kinds(self) -> tuple[LayerType, ...]:
        """The kind of each layer."""
        return self.pattern or (LayerType(None, self.rope),) * self.num_layers


class Family(NamedTuple):
    """One row of the table of families (`ot_merge_jax.models.families`).

    Attributes:
        model_type: Hugging Face ``model_type``.
        architecture: The one class accepted in ``architectures``.
        style: What the family always does.
        qkv_bias: Whether q, k and v always have a bias.
        embedding_by_width: Whether embedded tokens are multiplied by ``sqrt(hidden_size)``.
        reads: Config keys it reads besides those every family has.
        defaults: What transformers assumes where the file lacks a key.
        fixed: Config keys that must have this value (or be absent): no other is built.
        inert: Config keys that change nothing we compute, given the fixed ones.
    """

    model_type: str
    architecture: str
    style: Style = PLAIN
    qkv_bias: bool = False
    embedding_by_width: bool = False
    reads: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = {}
    fixed: Mapping[str, Any] = {}
    inert: frozenset[str] = frozenset()

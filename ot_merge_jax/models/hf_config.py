"""Reading a ``config.json`` into a `ModelConfig`. Imports config, rope_config and errors only.

Every key of the file is handled, known to be inert, or refused by name: a key we do not understand
could change what the model computes.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from ot_merge_jax.errors import InputError
from ot_merge_jax.models.config import Family, LayerType, ModelConfig, Rope, Style
from ot_merge_jax.models.rope_config import is_positive, read_ropes, shown

#: Keys of any family that describe training, generation, the file or the export, not the forward
#: pass.
_INERT = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "mlp_dropout",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "resid_pdrop",
        "return_dict",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    }
)
_FIXED = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "is_decoder": False,
    "tie_encoder_decoder": False,
    "hidden_act": "silu",
}
_READ = frozenset(
    {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "tie_word_embeddings",
        "layer_types",
    }
)
_DTYPES = ("float32", "float16", "bfloat16")


class _Keys:
    """The keys of one file, and what is wrong with them so far."""

    def __init__(self, config: Mapping[str, Any], family: Family):
        """Nothing is wrong yet."""
        self.config, self.family, self.problems = config, family, []

    def get(self, key: str) -> Any:
        """A value of the file or, where the key is absent or null, of the family's defaults."""
        value = self.config.get(key)
        return self.family.defaults.get(key) if value is None else value

    def number(self, key: str, kind: type, default: Any = None) -> Any:
        """A positive number; 1, and a problem noted, if it is not."""
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            self.problems.append(f"{key} is missing")
        elif kind is int and (isinstance(value, bool) or not isinstance(value, int)):
            self.problems.append(f"{key} must be an integer, not {shown(value)}")
        elif not is_positive(value):
            self.problems.append(f"{key} must be positive, not {shown(value)}")
        else:
            return kind(value)
        return kind(1)

    def optional(self, key: str, kind: type) -> Any:
        """As `number`, or None where the family does not read the key or the file has none."""
        is_present = key in self.family.reads and self.get(key) is not None
        return self.number(key, kind) if is_present else None

    def flag(self, key: str) -> bool:
        """A boolean the family reads; absent and null are false."""
        value = self.get(key) if key in self.family.reads or key in _READ else None
        if not isinstance(value, bool | None):
            self.problems.append(f"{key} must be true or false, not {shown(value)}")
        return value is True


def read_config(config: Mapping[str, Any], family: Family, *, where: str) -> ModelConfig:
    """Reads the parsed ``config.json`` of a supported family.

    Args:
        config: The parsed file.
        family: The row of its ``model_type``.
        where: Path of the file, for messages.

    Returns:
        The configuration.

    Raises:
        InputError: naming every unknown, unsupported, missing or ill-typed key at once.
    """
    keys = _Keys(config, family)
    problems = keys.problems
    problems += _unknown_keys(config, family)
    heads, hidden = keys.number("num_attention_heads", int), keys.number("hidden_size", int)
    kv_heads = keys.number("num_key_value_heads", int, heads)
    if keys.get("head_dim") is None and hidden % heads:
        problems.append(
            f"hidden_size {hidden} is not a multiple of num_attention_heads {heads} "
            "and head_dim is absent"
        )
    head_dim = keys.number("head_dim", int, max(1, hidden // heads))
    if heads % kv_heads:
        problems.append(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    if head_dim % 2:
        problems.append(f"head_dim {head_dim} is odd, which rotary embeddings cannot use")
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in _DTYPES:
        problems.append(f"dtype {shown(dtype)} is not supported (only {', '.join(_DTYPES)})")
    positions = keys.number("max_position_embeddings", int)
    ropes = read_ropes(config, family, positions, head_dim, problems)
    depth = keys.number("num_hidden_layers", int)
    attention_bias = keys.flag("attention_bias")
    result = ModelConfig(
        family=family.model_type,
        vocab_size=keys.number("vocab_size", int),
        hidden_size=hidden,
        intermediate_size=keys.number("intermediate_size", int),
        num_layers=depth,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=positions,
        rms_norm_eps=keys.number("rms_norm_eps", float),
        rope=ropes["full_attention"],
        tie_word_embeddings=keys.flag("tie_word_embeddings"),
        qkv_bias=family.qkv_bias or attention_bias,
        dtype=str(dtype),
        style=_style(keys, hidden, attention_bias),
        pattern=_pattern(keys, depth, ropes),
    )
    if problems:
        raise InputError(f"{where} cannot be used: {'; '.join(problems)}; fix it or use another.")
    return result


def _unknown_keys(config: Mapping[str, Any], family: Family) -> list[str]:
    """Keys that are not known, or have a value that is not supported."""
    problems = []
    fixed = {key: value for key, value in _FIXED.items() if key not in family.inert}
    fixed |= family.fixed
    for key, value in config.items():
        if key in fixed:
            if value != fixed[key] and value is not None:
                problems.append(
                    f"{key}={shown(value)} is not supported for {family.model_type} (only "
                    f"{fixed[key]!r})"
                )
        elif key not in _READ and key not in _INERT and key not in family.inert | family.reads:
            near = difflib.get_close_matches(key, _READ | set(fixed) | family.reads, n=1)
            problems.append(
                f"unknown key {key!r}" + (f" (did you mean {near[0]!r}?)" if near else "")
            )
    return problems


def _style(keys: _Keys, hidden: int, attention_bias: bool) -> Style:
    """The family's style, completed from the file."""
    style = keys.family.style
    scalar = keys.optional("query_pre_attn_scalar", float)
    multiplier = keys.optional("attention_multiplier", float)
    scaling = keys.optional("logits_scaling", float)
    return style._replace(
        o_bias=style.o_bias or attention_bias,
        mlp_bias=keys.flag("mlp_bias"),
        attention_scale=scalar**-0.5 if scalar else multiplier,
        attention_softcap=keys.optional("attn_logit_softcapping", float),
        logit_softcap=keys.optional("final_logit_softcapping", float),
        embedding_scale=math.sqrt(hidden)
        if keys.family.embedding_by_width
        else keys.optional("embedding_multiplier", float) or 1.0,
        residual_scale=keys.optional("residual_multiplier", float) or 1.0,
        logit_scale=1.0 / scaling if scaling else 1.0,
    )


def _pattern(keys: _Keys, depth: int, ropes: Mapping[str, Rope]) -> tuple[LayerType, ...]:
    """The kind of each layer; empty if all are the plain one."""
    depth = min(depth, 10_000)  # an absurd number is refused by the tensors that are missing
    window = keys.optional("sliding_window", int)
    types = _layer_types(keys, depth, window)
    rotary = keys.get("no_rope_layers") if "no_rope_layers" in keys.family.reads else None
    if rotary is None and "no_rope_layer_interval" in keys.family.reads:
        interval = keys.number("no_rope_layer_interval", int)
        rotary = [int((layer + 1) % interval != 0) for layer in range(depth)]
    rotary = [1] * depth if rotary is None else rotary
    if not isinstance(rotary, list) or len(rotary) != depth or set(rotary) - {0, 1}:
        keys.problems.append(
            f"no_rope_layers {shown(rotary)} is not a list of {depth} zeros and ones"
        )
        return ()
    kinds = tuple(
        LayerType(window if kind == "sliding_attention" else None, ropes[kind] if rotates else None)
        for kind, rotates in zip(types, rotary, strict=True)
    )
    return () if set(kinds) <= {LayerType(None, ropes["full_attention"])} else kinds


def _layer_types(keys: _Keys, depth: int, window: int | None) -> list[str]:
    """``full_attention`` or ``sliding_attention`` of each layer."""
    family, types = keys.family, keys.config.get("layer_types")
    can_slide = "sliding_window" in family.reads
    if types is None and "sliding_window_pattern" in family.reads:
        every = keys.number("sliding_window_pattern", int)
        types = [
            "full_attention" if (layer + 1) % every == 0 else "sliding_attention"
            for layer in range(depth)
        ]
    elif types is None:
        types = ["sliding_attention" if window else "full_attention"] * depth
    allowed = {"full_attention", "sliding_attention"} if can_slide else {"full_attention"}
    is_list = isinstance(types, list) and all(isinstance(kind, str) for kind in types)
    if not is_list or set(types) - allowed:
        keys.problems.append(
            f"layer_types {shown(types)} is not supported (only {', '.join(sorted(allowed))})"
        )
        return ["full_attention"] * depth
    if len(types) != depth:
        keys.problems.append(f"layer_types names {len(types)} layers, not {depth}")
        return ["full_attention"] * depth
    if "sliding_attention" in types and window is None:
        keys.problems.append("layer_types has sliding_attention, but sliding_window is missing")
    return types

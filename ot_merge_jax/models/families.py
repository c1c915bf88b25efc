"""One flag row per family of decoders. Imports config and errors only.

To add a family, see CONTRIBUTING: a row here, its names in `ot_merge_jax.models.specs` if they
differ, tests.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from ot_merge_jax.errors import InputError
from ot_merge_jax.models.config import Family, ModelConfig, Style
from ot_merge_jax.models.hf_config import read_config

_GEMMA = Style(norms="both", unit_offset=True, activation="gelu_tanh")
_GEMMA_FIXED = {
    "hidden_activation": "gelu_pytorch_tanh",
    "use_bidirectional_attention": False,
}
_GEMMA_READS = frozenset(
    {
        "attention_bias",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "query_pre_attn_scalar",
        "sliding_window",
        "sliding_window_pattern",
    }
)

FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family(
            model_type="llama",
            architecture="LlamaForCausalLM",
            reads=frozenset({"attention_bias", "mlp_bias"}),
            # marks of SmolLM2, which is a llama
            inert=frozenset({"is_llama_config", "rope_interleaved"}),
        ),
        Family(
            model_type="mistral",
            architecture="MistralForCausalLM",
            reads=frozenset({"sliding_window"}),
            defaults={"num_key_value_heads": 8},
        ),
        Family(
            model_type="qwen2",
            architecture="Qwen2ForCausalLM",
            qkv_bias=True,
            fixed={"use_sliding_window": False, "use_mrope": False},
            # read by transformers only when use_sliding_window is true
            inert=frozenset({"sliding_window", "max_window_layers"}),
        ),
        Family(
            model_type="qwen3",
            architecture="Qwen3ForCausalLM",
            style=Style(qk_norm="head"),
            reads=frozenset({"attention_bias"}),
            defaults={"head_dim": 128, "num_key_value_heads": 32},
            fixed={"use_sliding_window": False},
            inert=frozenset({"sliding_window", "max_window_layers"}),
        ),
        Family(
            model_type="gemma2",
            architecture="Gemma2ForCausalLM",
            style=_GEMMA,
            embedding_by_width=True,
            reads=_GEMMA_READS,
            defaults={
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
                "head_dim": 256,
                "num_key_value_heads": 4,
                "query_pre_attn_scalar": 256,
                "sliding_window": 4096,
                "sliding_window_pattern": 2,
                "tie_word_embeddings": True,
            },
            fixed=_GEMMA_FIXED,
            inert=frozenset({"hidden_act"}),
        ),
        Family(
            model_type="gemma3_text",
            architecture="Gemma3ForCausalLM",
            style=_GEMMA._replace(qk_norm="head"),
            embedding_by_width=True,
            reads=_GEMMA_READS | {"rope_local_base_freq"},
            defaults={
                "head_dim": 256,
                "num_key_value_heads": 4,
                "query_pre_attn_scalar": 256,
                "rope_local_base_freq": 1e4,
                "rope_theta": 1e6,
                "sliding_window": 4096,
                "sliding_window_pattern": 6,
                "tie_word_embeddings": True,
            },
            # soft caps are null in every release, and transformers does not apply them
            fixed=_GEMMA_FIXED | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
            inert=frozenset({"hidden_act", "_sliding_window_pattern"}),
        ),
        Family(
            model_type="phi3",
            architecture="Phi3ForCausalLM",
            style=Style(is_fused=True),
            reads=frozenset(
                {"original_max_position_embeddings", "partial_rotary_factor", "sliding_window"}
            ),
            fixed={"attention_bias": False},
            # the releases name remote code, for which transformers now has a class of its own
            inert=frozenset({"auto_map"}),
        ),
        Family(
            model_type="olmo2",
            architecture="Olmo2ForCausalLM",
            style=Style(norms="post", qk_norm="all"),
            reads=frozenset({"attention_bias"}),
        ),
        Family(
            model_type="smollm3",
            architecture="SmolLM3ForCausalLM",
            reads=frozenset(
                {"attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval"}
            ),
            defaults={
                "no_rope_layer_interval": 4,
                "num_key_value_heads": 4,
                "rope_theta": 2e6,
                "tie_word_embeddings": True,
            },
            fixed={"use_sliding_window": False},
            inert=frozenset({"sliding_window", "max_window_layers"}),
        ),
        Family(
            model_type="granite",
            architecture="GraniteForCausalLM",
            reads=frozenset(
                {
                    "attention_bias",
                    "attention_multiplier",
                    "embedding_multiplier",
                    "logits_scaling",
                    "mlp_bias",
                    "residual_multiplier",
                }
            ),
            defaults={"attention_multiplier": 1.0},
        ),
    )
}

_CHECKED = frozenset({"quantization_config", "compression_config", "auto_map"})

#: Why whole kinds of models are refused, by a part of their ``model_type``.
_REASONS = {
    "moe": "mixtures of experts route tokens, so a layer has no single set of neurons",
    "mixtral": "mixtures of experts route tokens, so a layer has no single set of neurons",
    "mamba": "state-space layers have no attention or gated MLP sites",
    "t5": "encoder-decoder models have two stacks",
    "bart": "encoder-decoder models have two stacks",
    "vl": "vision models are not language decoders",
    "llava": "vision models are not language decoders",
    "bert": "encoders predict no next token",
}
#: The same reasons, by a key that such models have whatever their name.
_REASONS_BY_KEY = {
    "vision_config": _REASONS["vl"],
    "num_experts": _REASONS["moe"],
    "num_local_experts": _REASONS["moe"],
    "n_routed_experts": _REASONS["moe"],
    "is_encoder_decoder": _REASONS["t5"],
    "ssm_cfg": _REASONS["mamba"],
    "state_size": _REASONS["mamba"],
}


def read(config: Mapping[str, Any], *, where: str = "config.json") -> ModelConfig:
    """Reads a parsed ``config.json``, refusing by name whatever is not supported.

    Args:
        config: The parsed file.
        where: Path of the file, for messages.

    Returns:
        The configuration.

    Raises:
        InputError: for quantised, remote-code, adapter or unsupported models, and for bad keys, all
            in one sentence.

    Example:
        >>> read({"model_type": "mamba"}, where="m/config.json")
        Traceback (most recent call last):
        ...
        ot_merge_jax.errors.InputError: m/config.json: model_type 'mamba' is not supported \
(state-space layers have no attention or gated MLP sites); supported are llama, mistral, \
qwen2, qwen3, gemma2, gemma3_text, phi3, olmo2, smollm3, granite.
    """
    if quantised := config.get("quantization_config") or config.get("compression_config"):
        method = (
            quantised.get("quant_method", "unknown")
            if isinstance(quantised, Mapping)
            else quantised
        )
        raise InputError(
            f"{where}: the model is quantised ({method}); use the unquantised parent "
            "it was made from."
        )
    if "peft_type" in config:
        raise InputError(
            f"{where}: this is a {config['peft_type']} adapter; merge it into its base model first."
        )
    kind = config.get("model_type")
    if config.get("auto_map") and not (
        kind in FAMILIES and "auto_map" in FAMILIES[str(kind)].inert
    ):
        raise InputError(
            f"{where}: the model needs remote code (auto_map), which is never run; "
            "use a supported family."
        )
    supported = ", ".join(FAMILIES)
    if not isinstance(kind, str) or kind not in FAMILIES:
        reasons = [why for part, why in _REASONS.items() if part in str(kind)]
        reasons += [why for key, why in _REASONS_BY_KEY.items() if config.get(key)]
        reason = next(iter(reasons), None)
        near = difflib.get_close_matches(str(kind), FAMILIES, n=1)
        hint = f" ({reason})" if reason else f" (nearest: {near[0]})" if near else ""
        raise InputError(
            f"{where}: model_type {kind!r} is not supported{hint}; supported are {supported}."
        )
    family = FAMILIES[kind]
    architectures = config.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise InputError(
            f"{where}: architectures is {architectures}, but only "
            f"[{family.architecture!r}] predicts tokens; use a checkpoint of it."
        )
    # checked above, and no part of the model
    rest = {key: value for key, value in config.items() if key not in _CHECKED}
    return read_config(rest, family, where=where)

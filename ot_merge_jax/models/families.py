"""One flag row per family of decoders. Imports config and errors only.

To add a family, see CONTRIBUTING: a row here, its names in `ot_merge_jax.models.specs` if they
differ, tests.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from ot_merge_jax.config import Family, ModelConfig, read_config
from ot_merge_jax.errors import InputError

FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family(
            model_type="llama",
            architecture="LlamaForCausalLM",
            qkv_bias=False,
            fixed={"attention_bias": False, "mlp_bias": False},
            inert=frozenset(),
        ),
        Family(
            model_type="qwen2",
            architecture="Qwen2ForCausalLM",
            qkv_bias=True,
            fixed={"use_sliding_window": False, "use_mrope": False},
            # read by transformers only when use_sliding_window is true
            inert=frozenset({"sliding_window", "max_window_layers"}),
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
(state-space layers have no attention or gated MLP sites); supported are llama, qwen2.
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
    if config.get("auto_map"):
        raise InputError(
            f"{where}: the model needs remote code (auto_map), which is never run; "
            "use a supported family."
        )
    if "peft_type" in config:
        raise InputError(
            f"{where}: this is a {config['peft_type']} adapter; merge it into its base model first."
        )
    kind = config.get("model_type")
    supported = ", ".join(FAMILIES)
    if not isinstance(kind, str) or kind not in FAMILIES:
        reason = next((why for part, why in _REASONS.items() if part in str(kind)), None)
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
    # null or empty here, and no part of the model
    rest = {key: value for key, value in config.items() if key not in _CHECKED}
    return read_config(rest, family, where=where)

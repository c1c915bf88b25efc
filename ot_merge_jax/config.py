"""`ModelConfig`: the shape of a decoder, read from a ``config.json``. Imports errors only.

Every key of the file is handled, known to be inert, or refused by name: a key we do not understand
could change what the model computes.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ot_merge_jax.errors import InputError


class Rope(NamedTuple):
    """Rotary position embedding: base frequency and, for ``llama3``, its scaling.

    Attributes:
        theta: Base of the frequencies.
        kind: ``default`` or ``llama3``.
        factor: How much low frequencies are slowed down.
        low_freq_factor: Wavelengths above ``original_positions / low_freq_factor`` are slowed
            fully.
        high_freq_factor: Wavelengths below ``original_positions / high_freq_factor`` stay.
        original_positions: Context length before the scaling, in tokens.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 0


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


class Family(NamedTuple):
    """One row of the table of families (`ot_merge_jax.models.families`).

    Attributes:
        model_type: Hugging Face ``model_type``.
        architecture: The one class accepted in ``architectures``.
        qkv_bias: Whether q, k and v have a bias.
        fixed: Config keys that must have this value (or be absent), because nothing else is built.
        inert: Family-specific config keys that change nothing we compute, given the fixed ones.
    """

    model_type: str
    architecture: str
    qkv_bias: bool
    fixed: Mapping[str, Any]
    inert: frozenset[str]


#: Keys of any family that describe training, generation, the file or the export, not the forward
#: pass.
_INERT = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
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
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
        "resid_pdrop",
        "embd_pdrop",
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
    problems: list[str] = []
    fixed = {**_FIXED, **family.fixed}
    for key, value in config.items():
        if key in fixed:
            if value != fixed[key] and value is not None:
                problems.append(
                    f"{key}={_shown(value)} is not supported for {family.model_type} (only "
                    f"{fixed[key]!r})"
                )
        elif key not in _READ and key not in _INERT and key not in family.inert:
            near = difflib.get_close_matches(key, _READ | set(fixed), n=1)
            problems.append(
                f"unknown key {key!r}" + (f" (did you mean {near[0]!r}?)" if near else "")
            )

    def number(key: str, kind: type, default: Any = None) -> Any:
        value = config.get(key)
        value = default if value is None else value
        if value is None:
            problems.append(f"{key} is missing")
        elif kind is int and (isinstance(value, bool) or not isinstance(value, int)):
            problems.append(f"{key} must be an integer, not {_shown(value)}")
        elif not _is_positive(value):
            problems.append(f"{key} must be positive, not {_shown(value)}")
        else:
            return kind(value)
        return kind(1)

    heads, hidden = number("num_attention_heads", int), number("hidden_size", int)
    kv_heads = number("num_key_value_heads", int, heads)
    if config.get("head_dim") is None and hidden % heads:
        problems.append(
            f"hidden_size {hidden} is not a multiple of num_attention_heads {heads} "
            "and head_dim is absent"
        )
    head_dim = number("head_dim", int, max(1, hidden // heads))
    if heads % kv_heads:
        problems.append(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    if head_dim % 2:
        problems.append(f"head_dim {head_dim} is odd, which rotary embeddings cannot use")
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list) or any(one != "full_attention" for one in layer_types):
        problems.append(f"layer_types {_shown(layer_types)} is not supported (only full_attention)")
    tie = config.get("tie_word_embeddings")
    if not isinstance(tie, bool | None):
        problems.append(f"tie_word_embeddings must be true or false, not {_shown(tie)}")
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in _DTYPES:
        problems.append(f"dtype {_shown(dtype)} is not supported (only {', '.join(_DTYPES)})")
    rope = _read_rope(config, problems)
    result = ModelConfig(
        family=family.model_type,
        vocab_size=number("vocab_size", int),
        hidden_size=hidden,
        intermediate_size=number("intermediate_size", int),
        num_layers=number("num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=number("max_position_embeddings", int),
        rms_norm_eps=number("rms_norm_eps", float),
        rope=rope,
        tie_word_embeddings=bool(tie),
        qkv_bias=family.qkv_bias,
        dtype=str(dtype),
    )
    if problems:
        raise InputError(f"{where} cannot be used: {'; '.join(problems)}; mend it or use another.")
    return result


def _is_positive(value: Any) -> bool:
    """Whether a value is a number above 0 that fits 32 bits, which every size and factor does."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**31


def _shown(value: Any) -> str:
    """A value for a message, cut short."""
    return reprlib.repr(value)


def _read_rope(config: Mapping[str, Any], problems: list[str]) -> Rope:
    """Reads ``rope_parameters`` (transformers 5) or ``rope_theta`` + ``rope_scaling`` (before)."""
    scaling: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        part = config.get(key) or {}
        if not isinstance(part, Mapping):
            problems.append(f"{key} must be an object, not {_shown(part)}")
            return Rope(10000.0)
        scaling |= part
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)  # old files name the kind twice
    # 10000 is the default of transformers for files that predate the key
    theta = scaling.pop("rope_theta", config.get("rope_theta") or 10000.0)
    if kind not in ("default", "llama3"):
        problems.append(f"RoPE type {_shown(kind)} is not supported (only default and llama3)")
        return Rope(10000.0)
    names = {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_positions",
    }
    expected = names if kind == "llama3" else {}
    missing = sorted(expected.keys() - scaling.keys())
    unknown = sorted(scaling.keys() - names.keys())
    if missing or unknown:
        problems.append(
            f"RoPE settings of type {kind}: missing {missing}, unknown {_shown(unknown)}"
        )
        return Rope(10000.0)
    values = {"rope_theta": theta, **{key: scaling[key] for key in expected}}
    for key, value in values.items():
        if not _is_positive(value):
            problems.append(f"RoPE {key} must be a positive number, not {_shown(value)}")
            return Rope(10000.0)
    rope = Rope(float(theta), kind, **{names[key]: scaling[key] for key in expected})
    if kind == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        problems.append("RoPE low_freq_factor must be below high_freq_factor")
    return rope

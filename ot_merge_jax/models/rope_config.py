"""Reading the rotary settings of a ``config.json``, in their old and new spellings."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from ot_merge_jax.models.config import Family, Rope

_NAMES = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_positions",
    "attention_factor": "attention_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "short_factor": "short_factor",
    "long_factor": "long_factor",
}
_YARN_ONLY = ("mscale", "mscale_all_dim", "truncate")
#: Kind -> settings it must have, and settings it may have.
_KINDS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "llama3": (
        {
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        },
        set(),
    ),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow", *_YARN_ONLY},
    ),
    "longrope": (
        {"short_factor", "long_factor"},
        {"factor", "attention_factor", "original_max_position_embeddings"},
    ),
}
_PLAIN = Rope(10000.0)


def is_positive(value: Any) -> bool:
    """Whether a value is a number above 0 that fits 32 bits, which every size and factor does."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**31


def shown(value: Any) -> str:
    """A value for a message, cut short."""
    return reprlib.repr(value)


def read_ropes(
    config: Mapping[str, Any],
    family: Family,
    max_positions: int,
    head_dim: int,
    problems: list[str],
) -> dict[str, Rope]:
    """The rotary embedding of each type of layer.

    Reads ``rope_parameters`` (transformers 5; nested by layer type where the types differ) or
    ``rope_theta``, ``rope_local_base_freq`` and ``rope_scaling`` (before).

    Args:
        config: The parsed file.
        family: The row of its ``model_type``.
        max_positions: Context length, in tokens.
        head_dim: Features of one head.
        problems: What is wrong is appended here.

    Returns:
        ``full_attention`` and ``sliding_attention``; the same for both unless the family has two.
    """
    settings: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        part = config.get(key) or {}
        if not isinstance(part, Mapping):
            problems.append(f"{key} must be an object, not {shown(part)}")
            return {"full_attention": _PLAIN, "sliding_attention": _PLAIN}
        settings |= part
    theta = config.get("rope_theta") or family.defaults.get("rope_theta", 10000.0)
    top = {
        key: config[key]
        for key in ("original_max_position_embeddings", "partial_rotary_factor")
        if key in family.reads and config.get(key) is not None
    }
    if "rope_local_base_freq" not in family.reads:
        rope = _read_rope(settings | top, family, theta, max_positions, head_dim, problems)
        return {"full_attention": rope, "sliding_attention": rope}
    local = config.get("rope_local_base_freq") or family.defaults["rope_local_base_freq"]
    nested = {key: settings.pop(key, None) for key in ("full_attention", "sliding_attention")}
    if any(not isinstance(own, Mapping | None) for own in nested.values()):
        problems.append(f"rope_parameters must hold objects, not {shown(nested)}")
        return {"full_attention": _PLAIN, "sliding_attention": _PLAIN}
    per_type = {
        "full_attention": (settings | (nested["full_attention"] or {}), theta),
        "sliding_attention": (nested["sliding_attention"] or {}, local),
    }
    return {
        key: _read_rope(own, family, base, max_positions, head_dim, problems)
        for key, (own, base) in per_type.items()
    }


def _read_rope(
    settings: Mapping[str, Any],
    family: Family,
    theta: Any,
    max_positions: int,
    head_dim: int,
    problems: list[str],
) -> Rope:
    """One rotary embedding from its settings."""
    settings = {key: value for key, value in settings.items() if value is not None}
    kind = settings.pop("rope_type", settings.get("type", "default"))
    settings.pop("type", None)  # old files name the kind twice
    if "original_max_position_embeddings" in family.reads and kind in ["su", "yarn"]:
        kind = "longrope"  # what Phi-3 called it before it had a name
    theta = settings.pop("rope_theta", theta)
    rotated = 1.0
    if "partial_rotary_factor" in family.reads:  # elsewhere transformers does not apply it
        rotated = settings.pop("partial_rotary_factor", 1.0)
    if kind == "yarn":
        settings.setdefault("original_max_position_embeddings", max_positions)
    if not isinstance(kind, str) or kind not in _KINDS:
        problems.append(f"RoPE type {shown(kind)} is not supported (only {', '.join(_KINDS)})")
        return _PLAIN
    required, optional = _KINDS[kind]
    missing = sorted(required - settings.keys())
    unknown = sorted(settings.keys() - _NAMES.keys() - set(_YARN_ONLY))
    if missing or unknown:
        problems.append(
            f"RoPE settings of type {kind}: missing {missing}, unknown {shown(unknown)}"
        )
        return _PLAIN
    used = {key: value for key, value in settings.items() if key in required | optional}
    pairs = int(head_dim * rotated) // 2 if is_positive(rotated) else 0
    numbers = {"rope_theta": theta, "partial_rotary_factor": rotated, **used}
    numbers.pop("truncate", None)
    for key in ("short_factor", "long_factor"):
        factors = numbers.pop(key, None)
        if factors is not None and (
            not isinstance(factors, list)
            or len(factors) != pairs
            or not all(map(is_positive, factors))
        ):
            problems.append(f"RoPE {key} must be a list of {pairs} positive numbers")
            return _PLAIN
    for key, value in numbers.items():
        if not is_positive(value):
            problems.append(f"RoPE {key} must be a positive number, not {shown(value)}")
            return _PLAIN
    if rotated > 1 or pairs < 1:
        problems.append(f"RoPE partial_rotary_factor {rotated} rotates no pair, or too many")
        return _PLAIN
    known: dict[str, Any] = {
        _NAMES[key]: tuple(value) if isinstance(value, list) else value
        for key, value in used.items()
        if key in _NAMES
    }
    rope = Rope(float(theta), kind, **known, rotated=float(rotated))
    if kind == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        problems.append("RoPE low_freq_factor must be below high_freq_factor")
    if kind == "yarn":
        return rope._replace(
            truncate=bool(used.get("truncate", True)),
            attention_factor=used.get("attention_factor") or _yarn_attention(used),
        )
    return _longrope(rope, used, max_positions) if kind == "longrope" else rope


def _yarn_attention(used: Mapping[str, Any]) -> float:
    """The factor of the cosines and sines that the authors of YaRN recommend."""

    def scale(multiplier: float) -> float:
        factor = used["factor"]
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    if used.get("mscale") and used.get("mscale_all_dim"):
        return scale(used["mscale"]) / scale(used["mscale_all_dim"])
    return scale(1.0)


def _longrope(rope: Rope, used: Mapping[str, Any], max_positions: int) -> Rope:
    """LongRoPE with the original context and the attention factor filled in."""
    original = rope.original_positions or max_positions
    factor = used.get("factor") or max_positions / original
    attention = used.get("attention_factor")
    if attention is None:
        # the logarithm of a context of one token is 0, and nothing is stretched
        is_longer = factor > 1 and original > 1
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if is_longer else 1.0
    return rope._replace(
        original_positions=original, factor=float(factor), attention_factor=float(attention)
    )

"""LoRA adapters in the format of PEFT: checked against their base, added to its tensors when read.

Such a model is named ``BASE+ADAPTER``. Only adapters that change nothing but weights are read:
low-rank factors of linear layers, and of an embedding that is not tied. Everything else is refused,
and the message names it. Imports models.specs, not flax.

Names and scales are those of ``peft``: ``W + alpha / r * B A``, with ``sqrt(r)`` for rslora
(Hu et al., arXiv 2106.09685; Kalajdzievski, arXiv 2312.03732).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ot_merge_jax.errors import InputError
from ot_merge_jax.io import hub, resolve, safetensors
from ot_merge_jax.models import specs
from ot_merge_jax.models.config import ModelConfig

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_FACTOR = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(?P<factor>lora_(?:A|B|embedding_A|embedding_B))"
    r"(?P<weight>\.weight)?"
)
#: Keys that are read here.
_READ = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias",
    "init_lora_weights", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "base_model_name_or_path",
}  # fmt: skip
#: Keys that say how the adapter was trained, and do not change the meaning of its tensors.
_TRAINING = {
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout",
    "megatron_core", "loftq_config", "eva_config", "qalora_group_size", "runtime_config",
}  # fmt: skip
#: Initialisations that do not change the base's weights; others (pissa...) do.
_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")
_PLAIN_NAME = re.compile(r"\^?(?:\w|\.|\\\.)+", re.ASCII)
_ELSEWHERE = "merge it into its base model with peft and save that"
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class Update(NamedTuple):
    """The change of one tensor of the base: ``scale * left @ right``.

    Attributes:
        left: Name of the left factor in the adapter's file.
        right: Name of the right one.
        scale: What their product is multiplied by.
        is_transposed: Whether the file holds both factors transposed (an embedding).
    """

    left: str
    right: str
    scale: float
    is_transposed: bool


class Adapter(NamedTuple):
    """A checked adapter; nothing but its header has been read.

    Attributes:
        path: The folder.
        origin: The repository of the hub it was fetched from, or None.
        updates: Name of a tensor of the base -> its change.
    """

    path: Path
    origin: hub.Origin | None
    updates: dict[str, Update]

    @property
    def file(self) -> Path:
        """The file of the factors."""
        return self.path / WEIGHTS


def is_alone(path: Path) -> InputError:
    """The error for an adapter that was named without its base."""
    try:
        base = resolve.read_json(path / CONFIG).get("base_model_name_or_path")
    except InputError:
        base = None
    hint = f" ({CONFIG} says {base[:200]!r})" if isinstance(base, str) and base else ""
    return InputError(
        f"{path} holds only an adapter; write BASE+{path} to merge it into its base model{hint}."
    )


def open_adapter(where: resolve.Location, *, cfg: ModelConfig) -> Adapter:
    """Checks an adapter folder against its base; reads no weights.

    Its tokenizer files are not used: names, config and tokenizer are the base's.

    Args:
        where: The folder, resolved.
        cfg: The base model.

    Returns:
        The checked adapter; every tensor of its file is used.

    Raises:
        InputError: listing at once all that cannot be merged, is missing or does not fit.
    """
    path, origin = where
    if not (path / CONFIG).exists():
        raise InputError(f"{path} has no {CONFIG}; write BASE+ADAPTER, the adapter's folder last.")
    config = resolve.read_json(path / CONFIG)
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"{path} is an adapter of type {str(config.get('peft_type'))[:60]}, and only LORA can "
            f"be merged on load; {_ELSEWHERE}."
        )
    if not (path / WEIGHTS).exists() and not (path / WEIGHTS).is_symlink():
        raise InputError(
            f"{path} holds no {WEIGHTS} (pickled .bin adapters are never opened); convert the "
            "adapter to safetensors."
        )
    if problems := _config_problems(config):
        raise resolve.unusable(path, problems, advice=_ELSEWHERE)
    problems = [why for name in (CONFIG, WEIGHTS) for why in resolve.link_problems(path, name)]
    updates: dict[str, Update] = {}
    if not problems:
        tensors = safetensors.read_header(path / WEIGHTS)
        updates, problems = _updates(config, tensors, cfg)
    if problems:
        raise resolve.unusable(path, problems)
    return Adapter(path, origin, updates)


def _config_problems(config: Mapping[str, Any]) -> list[str]:
    """Settings that cannot be merged, and settings with invalid values."""
    problems = [
        f"{key[:60]} is {str(value)[:60]!r}, which cannot be merged on load"
        for key, value in config.items()
        if key not in _READ | _TRAINING and value not in (None, False, "", [], {})
    ]
    if (bias := config.get("bias", "none")) != "none":
        problems.append(f"bias is {str(bias)[:60]!r}, and trained biases cannot be merged on load")
    begun = config.get("init_lora_weights", True)
    if not any(
        begun is known or (isinstance(known, str) and begun == known) for known in _BEGINNINGS
    ):
        problems.append(
            f"init_lora_weights is {str(begun)[:60]!r}, which changes the base's weights too"
        )
    if not isinstance(config.get("use_rslora", False), bool):
        problems.append("use_rslora is not true or false")
    if not _is_rank(config.get("r")):
        problems.append(f"r is {str(config.get('r'))[:60]!r} and not a positive integer")
    if not _is_number(config.get("lora_alpha")):
        problems.append(f"lora_alpha is {str(config.get('lora_alpha'))[:60]!r} and not a number")
    for key, is_valid in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict):
            problems.append(f"{key} is not an object")
            continue
        for name, value in pattern.items():
            # a regular expression from a file could run for ever
            if not _PLAIN_NAME.fullmatch(name):
                problems.append(f"{key} names {name[:60]!r}, which is not a plain module name")
            elif not is_valid(value):
                problems.append(f"{key} gives {name[:60]!r} the value {str(value)[:60]!r}")
    return problems


def _is_rank(value: Any) -> bool:
    """Whether a value is a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1e6


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number, which the largest integers of JSON are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _setting(pattern: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """The value of a module in a pattern: the first name that the module ends with, as in peft."""
    for name, value in (pattern or {}).items():
        plain = name.removeprefix("^").replace("\\.", ".")
        is_end = not name.startswith("^") and module.endswith(f".{plain}")
        if module == plain or is_end:
            return value
    return otherwise


def _updates(
    config: Mapping[str, Any], tensors: Mapping[str, safetensors.TensorInfo], cfg: ModelConfig
) -> tuple[dict[str, Update], list[str]]:
    """The change of every tensor of the base, and what is wrong with the adapter's tensors."""
    shapes = {  # module -> whether it is a table, and the shape of its weight
        name.removesuffix(".weight"): (spec.weight == "embed", spec.tensor_shape())
        for spec in specs.param_specs(cfg)
        if len(spec.tensor_shape()) == 2
        for name in spec.tensor_names()
    }
    by_module: dict[str, dict[str, str]] = {}
    problems = []
    for name, info in tensors.items():
        match = _FACTOR.fullmatch(name)
        if not match or bool(match["weight"]) == ("embedding" in match["factor"]):
            problems.append(f"{name} is not a LoRA factor, and nothing else is merged on load")
        elif info.dtype not in safetensors.DTYPES:
            problems.append(f"{name} has dtype {info.dtype}; only F32, F16 and BF16 are read")
        elif match["module"] not in shapes:
            problems.append(
                f"{name} has no {match['module']}.weight in the base that it could change"
            )
        else:
            by_module.setdefault(match["module"], {})[match["factor"]] = name
    updates = {}
    for module, factors in by_module.items():
        is_table, shape = shapes[module]
        a, b = ("lora_embedding_A", "lora_embedding_B") if is_table else ("lora_A", "lora_B")
        if set(factors) != {a, b}:
            wanted = " and ".join(f"{module}.{factor}" for factor in (a, b))
            problems.append(f"{wanted} are not both there, or not alone")
            continue
        if is_table and cfg.tie_word_embeddings:
            problems.append(f"{factors[a]} changes an embedding that is tied to the head")
            continue
        rank = _setting(config.get("rank_pattern"), module, config["r"])
        alpha = _setting(config.get("alpha_pattern"), module, config["lora_alpha"])
        d_out, d_in = shape[::-1] if is_table else shape
        for name, expected in ((factors[a], (rank, d_in)), (factors[b], (d_out, rank))):
            if tensors[name].shape != expected:
                problems.append(
                    f"{name} has shape {list(tensors[name].shape)} where base and rank say "
                    f"{list(expected)}"
                )
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        left, right = (factors[a], factors[b]) if is_table else (factors[b], factors[a])
        updates[f"{module}.weight"] = Update(left, right, scale, is_table)
    problems += [
        f"{module} is one of the target_modules, but the file has no factors for it"
        for module in shapes
        if module not in by_module and _is_targeted(config, module)
    ]
    if not tensors:
        problems.append(f"{WEIGHTS} is empty")
    return updates, problems


def _is_targeted(config: Mapping[str, Any], module: str) -> bool:
    """Whether the settings plainly say that a module is adapted; expressions are not read."""
    names, layers = config.get("target_modules"), config.get("layers_to_transform")
    if not isinstance(names, list) or config.get("exclude_modules"):
        return False
    if config.get("layers_pattern") or not isinstance(layers, int | list | None):
        return False
    if layers not in (None, []):
        number = _LAYER.search(module)
        chosen = layers if isinstance(layers, list) else [layers]
        if number is None or int(number[1]) not in chosen:
            return False
    return any(module == name or module.endswith(f".{name}") for name in names)


def change(
    update: Update,
    file: safetensors.TensorFile,
    index: tuple[slice, ...],
) -> tuple[np.ndarray, dict[str, int]]:
    """The change of a slice of one tensor, in float32.

    Args:
        update: From `Adapter.updates`.
        file: The adapter's file.
        index: Rows and columns of the base's tensor, as its file holds it.

    Returns:
        What is to be added, with zeros where a factor is not finite; and factor -> how many of its
        values are not finite.
    """
    factors, broken = [], {}
    for name in (update.left, update.right):
        factor = file.read(name).astype(np.float32)
        if bad := factor.size - int(np.isfinite(factor).sum()):
            broken[name] = bad
            factor = np.zeros_like(factor)
        factors.append(factor.T if update.is_transposed else factor)
    left, right = factors
    rows, columns = index
    with np.errstate(over="ignore", invalid="ignore"):  # the sum is checked by the caller
        return np.float32(update.scale) * (left[rows] @ right[:, columns]), broken

"""`ModelFolder`: a Hugging Face folder, checked before any weight is read.

All problems are listed at once: tensors that are missing, extra, doubled, misshapen or of an
unsupported dtype. Imports models.families and models.specs, not flax.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from ot_merge_jax.errors import InputError
from ot_merge_jax.io import hub, peft, resolve, safetensors
from ot_merge_jax.io.resolve import link_problems, read_json, unusable
from ot_merge_jax.models import families, specs
from ot_merge_jax.models.config import ModelConfig

INDEX = resolve.INDEX
SINGLE = "model.safetensors"
_SHARD_NAME = re.compile(r"[\w.\-]{1,200}\.safetensors", re.ASCII)
# buffers that old exporters stored; transformers ignores them too
_BUFFERS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class ModelFolder(NamedTuple):
    """A checked model folder; nothing but headers has been read.

    Attributes:
        path: The folder.
        config: Its ``config.json``, parsed.
        cfg: The model that it describes.
        files: Tensor name -> shard file name; empty for a folder without weights.
        tensors: Tensor name -> dtype and shape.
        origin: The repository of the hub it was fetched from, or None.
        adapter: What is added to the tensors when they are read, or None. Everything else
            (config, tokenizer, names, dtypes) is the base's alone.
    """

    path: Path
    config: dict[str, Any]
    cfg: ModelConfig
    files: dict[str, str]
    tensors: dict[str, safetensors.TensorInfo]
    origin: hub.Origin | None = None
    adapter: peft.Adapter | None = None

    @property
    def name(self) -> str:
        """What people call it: the hub id, or the name of the folder; with that of the adapter."""
        parts = [self] if self.adapter is None else [self, self.adapter]
        return "+".join(resolve.called(part.path, part.origin) for part in parts)

    @property
    def where(self) -> str:
        """Its path, for messages; with that of the adapter."""
        return f"{self.path}" if self.adapter is None else f"{self.path}+{self.adapter.path}"


def open_folder(
    path: str | Path,
    *,
    revision: str | None = None,
    needs_weights: bool = True,
    offline: bool = False,
) -> ModelFolder:
    """Checks a model folder by its config, index and headers; reads no weights.

    Args:
        path: The folder, or a hub id (`resolve.resolve`); or ``BASE+ADAPTER`` of either.
        revision: Branch, tag or commit of the hub id.
        needs_weights: Whether a folder without weights is an error.
        offline: Whether the network is forbidden.

    Returns:
        The checked folder.

    Raises:
        InputError: listing all problems of the tensors at once, and all of the adapter.
    """
    base, extra = resolve.split(path) if revision is None else (path, None)
    path, origin = resolve.resolve(base, revision=revision, offline=offline)
    if not (path / "config.json").exists() and (path / peft.CONFIG).exists():
        raise peft.is_alone(path)
    config = read_json(path / "config.json")
    cfg = families.read(config, where=str(path / "config.json"))
    files, problems = _shards(path, needs_weights=needs_weights)
    tensors: dict[str, safetensors.TensorInfo] = {}
    owner: dict[str, str] = {}
    shards = sorted(set(files.values()) or ({SINGLE} if (path / SINGLE).exists() else ()))
    for shard in shards:
        try:
            header = safetensors.read_header(path / shard)
        except InputError as error:
            problems.append(str(error).rstrip(".").removesuffix("; download it again"))
            continue
        for name, info in header.items():
            if name in owner:
                problems.append(f"{name} is in {owner[name]} and in {shard}")
            elif files and files.get(name, shard) != shard:
                problems.append(f"{name} is in {shard}, but the index says {files[name]}")
            owner[name], tensors[name] = shard, info
    if shards and not problems:
        problems += [
            f"{name} is listed in {INDEX} but is not in {shard}"
            for name, shard in files.items()
            if name not in owner
        ]
        problems += _tensor_problems(cfg, tensors)
    if problems:
        raise unusable(path, problems)
    added = None
    if extra is not None:
        added = peft.open_adapter(resolve.resolve(extra, offline=offline), cfg=cfg)
    return ModelFolder(path, config, cfg, owner, tensors, origin, added)


def eos_token_ids(folder: ModelFolder) -> list[int]:
    """Ids at which a model stops writing: those of generation_config.json, else of config.json.

    Raises:
        InputError: if they are not integers.
    """
    path = folder.path / "generation_config.json"
    value = read_json(path).get("eos_token_id") if path.exists() else None
    value = folder.config.get("eos_token_id") if value is None else value
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if wrong := [token for token in ids if not isinstance(token, int) or isinstance(token, bool)]:
        raise InputError(
            f"{folder.path}: eos_token_id holds {str(wrong[0])[:60]!r} and not a token id; fix it."
        )
    return [token for token in ids if 0 <= token < folder.cfg.vocab_size]


def _shards(path: Path, *, needs_weights: bool) -> tuple[dict[str, str], list[str]]:
    """Tensor -> shard from the index ({} for a single file), and what is wrong with it."""
    # if both exist, transformers reads the single file too
    if (path / SINGLE).exists() or (path / SINGLE).is_symlink():
        return {}, link_problems(path, SINGLE)
    if not (path / INDEX).exists():
        if not needs_weights:
            return {}, []
        if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
            raise InputError(
                f"{path} holds only pickled weights, which are never opened; convert them "
                "to safetensors."
            )
        if any(path.glob("*.gguf")):
            raise InputError(
                f"{path} holds quantised GGUF weights; use the unquantised parent it was made from."
            )
        raise InputError(f"{path} holds no weights ({SINGLE} or {INDEX}); download them.")
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path / INDEX} has no weight_map; download it again.")
    problems = []
    for shard in sorted({str(value) for value in weight_map.values()}):
        if not _SHARD_NAME.fullmatch(shard):
            problems.append(
                f"{INDEX} names {shard[:80]!r}, which is not a file name inside the folder"
            )
        elif not (path / shard).exists():
            problems.append(f"{shard} is missing")
        else:
            problems += link_problems(path, shard)
    if problems:
        raise unusable(path, problems)
    return weight_map, []


def _is_spare(name: str, cfg: ModelConfig) -> bool:
    """Whether an extra tensor may be ignored."""
    return bool(_BUFFERS.fullmatch(name)) or (name == "lm_head.weight" and cfg.tie_word_embeddings)


def _tensor_problems(cfg: ModelConfig, tensors: dict[str, safetensors.TensorInfo]) -> list[str]:
    """Missing, extra, misshapen and unsupported tensors."""
    if cfg.num_layers > len(tensors):  # an absurd number must not be spelled out name by name
        return [f"num_hidden_layers is {cfg.num_layers}, but the files hold {len(tensors)} tensors"]
    expected = {
        name: spec.tensor_shape() for spec in specs.param_specs(cfg) for name in spec.tensor_names()
    }
    problems = []
    for name, shape in expected.items():
        if name not in tensors:
            hint = " (and tie_word_embeddings is false)" if name == "lm_head.weight" else ""
            problems.append(f"{name} is missing{hint}")
        elif tensors[name].shape != shape:
            problems.append(
                f"{name} has shape {list(tensors[name].shape)} where the config says {list(shape)}"
            )
    for name, info in tensors.items():
        if name not in expected and not _is_spare(name, cfg):
            problems.append(f"{name} is unexpected")
        elif info.dtype not in safetensors.DTYPES and not _BUFFERS.fullmatch(name):
            problems.append(
                f"{name} has dtype {info.dtype}; use the unquantised parent (F32, F16 or BF16)"
            )
    return problems

"""`ModelFolder`: a Hugging Face folder, checked before any weight is read.

Checking is total: whatever is missing, extra, doubled, misshapen or of an unsupported dtype is
listed at once. Imports models.families and models.specs, not flax.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from ot_merge_jax.config import ModelConfig
from ot_merge_jax.errors import InputError
from ot_merge_jax.io import hub, safetensors
from ot_merge_jax.models import families, specs

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SHARD_NAME = re.compile(r"[\w.\-]{1,200}\.safetensors", re.ASCII)
# buffers that old exporters stored; transformers ignores them too
_BUFFERS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_DOWNLOADED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*")
#: Other exports of the same weights: subfolders (onnx, original), and Mistral's own format.
_NOT_DOWNLOADED = ("*/*", "consolidated*")
_MAX_JSON_BYTES = {"config.json": 5_000_000, INDEX: 100_000_000}


class ModelFolder(NamedTuple):
    """A checked model folder; nothing but headers has been read.

    Attributes:
        path: The folder.
        config: Its ``config.json``, parsed.
        cfg: The same, understood.
        files: Tensor name -> shard file name; empty for a folder without weights.
        tensors: Tensor name -> dtype and shape.
        origin: The repository of the hub it was fetched from, or None.
    """

    path: Path
    config: dict[str, Any]
    cfg: ModelConfig
    files: dict[str, str]
    tensors: dict[str, safetensors.TensorInfo]
    origin: hub.Origin | None = None

    @property
    def name(self) -> str:
        """What people call it: the hub id, or the name of the folder."""
        return self.path.resolve().name if self.origin is None else self.origin.repo


class Location(NamedTuple):
    """Where a model is.

    Attributes:
        path: An existing directory.
        origin: The repository it was fetched from; None for a directory that was named as such.
    """

    path: Path
    origin: hub.Origin | None


def resolve(path: str | Path, *, revision: str | None = None, offline: bool = False) -> Location:
    """The local folder of a model: a directory, or the snapshot of a hub id at a revision.

    An existing directory wins, whatever its name. A path is never taken for a hub id: without a
    revision, what is not a directory is an error.

    Args:
        path: A directory, ``OWNER/NAME@REVISION``, or a hub id when ``revision`` is given.
        revision: Branch, tag or commit of the hub id.
        offline: Whether the network is forbidden; the hub's local cache is used all the same.

    Returns:
        An existing directory and its origin.

    Raises:
        InputError: if there is no such directory, or the hub cannot provide the revision.
    """
    named = (str(path), revision) if revision is not None else None
    folder = Path(path).expanduser()
    if named is None and not folder.is_dir():
        named = hub.model_id(str(path))
    if named is not None:
        return Location(
            *hub.snapshot(
                *named,
                kind="model",
                patterns=_DOWNLOADED,
                ignored=_NOT_DOWNLOADED,
                offline=offline,
            )
        )
    if not folder.is_dir():
        raise InputError(
            f"There is no directory {folder}; give the folder of a Hugging Face checkpoint, or a "
            "hub id with its revision, as in OWNER/NAME@main."
        )
    return Location(folder, None)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object of bounded size; InputError names the file otherwise."""
    if not path.is_file():
        raise InputError(f"{path} is missing; download it, a Hugging Face folder has one.")
    limit = _MAX_JSON_BYTES.get(path.name, 5_000_000)
    if path.stat().st_size > limit:
        raise InputError(
            f"{path} is larger than {limit} bytes, so it is damaged; download it again."
        )
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object; download it again.")
    return value


def open_folder(
    path: str | Path,
    *,
    revision: str | None = None,
    needs_weights: bool = True,
    offline: bool = False,
) -> ModelFolder:
    """Checks a model folder by its config, index and headers; reads no weights.

    Args:
        path: The folder, or a hub id (`resolve`).
        revision: Branch, tag or commit of the hub id.
        needs_weights: Whether a folder without weights is an error.
        offline: Whether the network is forbidden.

    Returns:
        The checked folder.

    Raises:
        InputError: listing all problems of the tensors at once.
    """
    path, origin = resolve(path, revision=revision, offline=offline)
    for file in path.iterdir():  # reading a pipe never ends, and a device has no end
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise InputError(f"{file} is not a regular file; download the model again.")
    if not (path / "config.json").exists() and (path / "adapter_config.json").exists():
        raise InputError(f"{path} holds only an adapter; merge it into its base model first.")
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
        raise _unusable(path, problems)
    return ModelFolder(path, config, cfg, owner, tensors, origin)


def _unusable(path: Path, problems: list[str]) -> InputError:
    """The error that lists what is wrong with a folder, the first dozen in full."""
    shown = "; ".join(problems[:12])
    more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
    return InputError(f"{path} cannot be used: {shown}{more}; download it again or mend it.")


def _shards(path: Path, *, needs_weights: bool) -> tuple[dict[str, str], list[str]]:
    """Tensor -> shard from the index ({} for a single file), and what is wrong with it."""
    # where both are there, transformers reads the single file too
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
        raise _unusable(path, problems)
    return weight_map, []


def link_problems(path: Path, name: str) -> list[str]:
    """Whether a file links out of its folder; the blobs of a hub cache are part of a snapshot."""
    root = path.resolve()
    try:
        real = (path / name).resolve(strict=True)
    except (OSError, RuntimeError):
        return [f"{name} is a broken link"]
    is_snapshot = root.parent.name == "snapshots"
    if real.is_relative_to(root) or (
        is_snapshot and real.is_relative_to(root.parent.parent / "blobs")
    ):
        return []
    return [f"{name} is a link that leaves the folder"]


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

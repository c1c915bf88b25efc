"""Reading and writing Hugging Face folders: `load_hf`, `save_hf`. Imports models.specs, not flax.

Saving keeps the target's names, shapes, dtypes and shards, and never re-serialises its config or
tokenizer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory

from ot_merge_jax.distributed import sharding
from ot_merge_jax.errors import InputError, NonFiniteError
from ot_merge_jax.io import atomic, peft, resolve, safetensors
from ot_merge_jax.io.folder import INDEX, SINGLE, ModelFolder, link_problems, open_folder
from ot_merge_jax.models import specs
from ot_merge_jax.models.config import ModelConfig
from ot_merge_jax.models.model import Model
from ot_merge_jax.types import Params

DEFAULT_SHARD_BYTES = 5_000_000_000
_DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

#: Tensor -> slice -> how many of its values are not finite.
NonFinite = dict[str, dict[str, int]]

#: Files of the target that are copied to the output unchanged, where they exist.
SIDECARS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def load_hf(
    path: str | Path,
    *,
    revision: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Any = None,
) -> Model:
    """Loads a Hugging Face folder.

    Args:
        path: A directory, ``OWNER/NAME@REVISION``, or a hub id when ``revision`` is given; or
            ``BASE+ADAPTER``, where the LoRA adapter is merged in, in float32.
        revision: Branch, tag or commit of the hub id.
        mesh: Where the parameters go, by the rules of `ot_merge_jax.distributed.sharding`; each
            process reads only its slices. None: the default device.
        dtype: Dtype of the parameters; None: the widest dtype of each leaf's tensors.

    Returns:
        The configuration and the parameters, nested, layers stacked, kernels ``[d_in, d_out]``.

    Raises:
        InputError: listing at once what is missing, extra, misshapen, unsupported or not finite.

    Example:
        >>> from ot_merge_jax.demo import assets
        >>> cfg, params = load_hf(assets.path("sibling"))
        >>> cfg.family, params["layers"]["mlp"]["up_proj"]["kernel"].shape[0] == cfg.num_layers
        ('llama', True)
    """
    return load_folder(open_folder(path, revision=revision), mesh=mesh, dtype=dtype)


def load_folder(
    folder: ModelFolder, *, mesh: jax.sharding.Mesh | None = None, dtype: Any = None
) -> Model:
    """`load_hf` for a folder that is open already."""
    opened = open_files(folder)
    broken: NonFinite = {}
    leaves = {}
    dtypes = stored_dtypes(folder)
    for spec in specs.param_specs(folder.cfg):
        wanted = np.dtype(dtype) if dtype is not None else dtypes[spec.path]

        def read(
            index: tuple[slice, ...], spec: specs.ParamSpec = spec, wanted: Any = wanted
        ) -> np.ndarray:
            leaf, bad = read_leaf(folder, opened, spec, index, wanted)
            for name, counts in bad.items():  # of slices: several devices may read the same one
                broken.setdefault(name, {}).update(counts)
            return leaf

        if mesh is None:
            leaves[spec.path] = jax.device_put(read((slice(None),) * len(spec.shape)))
        else:
            place = sharding.leaf_sharding(mesh, spec.axes, spec.shape)
            leaves[spec.path] = jax.make_array_from_callback(
                spec.shape,
                place,
                read,  # pyright: ignore[reportArgumentType]
            )
    if broken:
        counts = {name: sum(parts.values()) for name, parts in broken.items()}
        listed = ", ".join(
            f"{name} ({count} value{'s' * (count > 1)})"
            for name, count in list(counts.items())[:12]
        )
        raise InputError(
            f"{folder.where} holds NaN or infinite weights"
            f"{'' if dtype is None else f' in {np.dtype(dtype)}'}: {listed}; download it again."
        )
    return Model(folder.cfg, specs.unflatten(leaves))


def stored_dtypes(folder: ModelFolder) -> dict[str, np.dtype]:
    """Path -> dtype of the leaf in its files, the widest among its tensors."""
    return {
        spec.path: jnp.result_type(
            *(safetensors.DTYPES[folder.tensors[name].dtype] for name in spec.tensor_names())
        )
        for spec in specs.param_specs(folder.cfg)
    }


def open_files(folder: ModelFolder) -> dict[Path, safetensors.TensorFile]:
    """All files of a model that hold tensors, with that of its adapter.

    Raises:
        InputError: if a tied model has a head in its files that differs from its embedding.
    """
    paths = {folder.path / shard for shard in folder.files.values()}
    if folder.adapter is not None:
        paths.add(folder.adapter.file)
    opened = {path: safetensors.TensorFile(path) for path in paths}
    if folder.cfg.tie_word_embeddings and "lm_head.weight" in folder.files:
        table, head = (
            opened[folder.path / folder.files[name]].read(name)
            for name in ("model.embed_tokens.weight", "lm_head.weight")
        )
        if table.tobytes() != head.tobytes():  # NaN is reported as such when it is read
            raise InputError(
                f"{folder.path} says tie_word_embeddings is true but holds another "
                "lm_head.weight; fix one."
            )
    return opened


def read_leaf(
    folder: ModelFolder,
    opened: dict[Path, safetensors.TensorFile],
    spec: specs.ParamSpec,
    index: tuple[slice, ...],
    dtype: Any,
) -> tuple[np.ndarray, NonFinite]:
    """Reads the slice ``index`` of one leaf, in our orientation, and counts what is not finite.

    The change of an adapter is added here, in float32 and in the orientation of the file, so that
    fused tensors and slices need no code of their own.
    """
    bounds = [range(*part.indices(size)) for part, size in zip(index, spec.shape, strict=True)]
    out = np.empty([len(bound) for bound in bounds], dtype)
    broken: NonFinite = {}
    names = spec.tensor_names()
    inner = bounds[1:] if spec.is_stacked else bounds
    offset = spec.rows[0] if spec.rows else 0  # of the leaf's first row in the file's tensor
    first, *rest = inner[::-1] if spec.transpose else inner
    stretches = [(first.start + offset, first.stop + offset), *((b.start, b.stop) for b in rest)]
    wanted = tuple(slice(*stretch) for stretch in stretches)
    for place, layer in enumerate(bounds[0] if spec.is_stacked else [0]):
        name = names[layer]
        tensor = opened[folder.path / folder.files[name]].read(name, wanted)
        if folder.adapter is not None and name in folder.adapter.updates:
            update, file = folder.adapter.updates[name], opened[folder.adapter.file]
            change, bad_factors = peft.change(update, file, wanted)
            broken |= {factor: {"all": count} for factor, count in bad_factors.items()}
            tensor = tensor.astype(np.float32) + change
        tensor = tensor.T if spec.transpose else tensor
        row = out[place] if spec.is_stacked else out
        with np.errstate(over="ignore"):  # what overflows is counted in the next line
            row[...] = tensor
        if bad := row.size - int(np.isfinite(row).sum()):
            broken[name] = {str(wanted): bad}
    return out, broken


def save_hf(
    path: str | Path,
    params: Params,
    *,
    cfg: ModelConfig,
    like: str | Path,
    max_shard_bytes: int | None = None,
) -> None:
    """Writes a complete Hugging Face folder, atomically: ``path`` is then complete or absent.

    Args:
        path: Does not exist yet.
        params: Parameters with the shapes of ``cfg``.
        cfg: The model; must be that of ``like``.
        like: The target's folder: names, dtypes, shards, config, tokenizer and generation files
            come from it. If it holds no weights, the parameter table and the config's dtype decide.
            With ``BASE+ADAPTER`` all of this comes from the base, even if the adapter's folder
            has a tokenizer.
        max_shard_bytes: Size of new shards; None: the shards of the target.

    Raises:
        InputError: if ``path`` exists or lies inside ``like``, or ``like`` is not a model folder
            with the configuration ``cfg``.
        NonFiniteError: if a parameter is not finite after rounding to its dtype.

    Example:
        >>> import tempfile, pathlib
        >>> from ot_merge_jax.demo import assets
        >>> cfg, params = load_hf(assets.path("sibling"))
        >>> out = pathlib.Path(tempfile.mkdtemp()) / "copy"
        >>> save_hf(out, params, cfg=cfg, like=assets.path("sibling"))
        >>> sorted(p.name for p in out.iterdir())[:2]
        ['config.json', 'generation_config.json']
    """
    atomic.check_output(Path(path), inputs=[Path(side) for side in resolve.split(like) if side])
    with atomic.atomic_folder(Path(path)) as partial:
        write_model(partial, params, cfg=cfg, like=like, max_shard_bytes=max_shard_bytes)


def write_model(
    folder: Path,
    params: Params,
    *,
    cfg: ModelConfig,
    like: str | Path,
    max_shard_bytes: int | None = None,
) -> None:
    """`save_hf` into an existing empty folder, for callers that publish it themselves."""
    model = open_folder(like, needs_weights=False)
    if model.cfg != cfg:
        raise InputError(f"{like} is not the folder of this model: its configuration differs.")
    infos = {
        name: model.tensors.get(
            name, safetensors.TensorInfo(_DTYPE_NAMES[cfg.dtype], spec.tensor_shape())
        )
        for spec in specs.param_specs(cfg)
        for name in spec.tensor_names()
    }
    licences = sorted(model.path.glob("LICENSE*"))
    sidecars = [file for file in [*map(model.path.joinpath, SIDECARS), *licences] if file.is_file()]
    if leaving := [why for file in sidecars for why in link_problems(model.path, file.name)]:
        raise InputError(f"{like} cannot be copied from: {'; '.join(leaving)}; put the file there.")
    shards = _plan_shards(infos, model, max_shard_bytes)
    for shard, names in shards.items():
        safetensors.write(folder / shard, dict(_tensors(params, cfg, infos, set(names))))
    if set(shards) != {SINGLE}:  # a single file of another name is found only through the index
        sizes = {name: safetensors.nbytes(info) for name, info in infos.items()}
        count = sum(
            size // safetensors.DTYPES[infos[name].dtype].itemsize for name, size in sizes.items()
        )
        index = {
            "metadata": {"total_size": sum(sizes.values()), "total_parameters": count},
            "weight_map": dict(
                sorted((name, shard) for shard, names in shards.items() for name in names)
            ),
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(
        json.dumps(patched_config(model.config), indent=2, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )
    for source in sidecars:
        shutil.copyfile(source, folder / source.name)


def _plan_shards(
    infos: dict[str, safetensors.TensorInfo], model: ModelFolder, max_shard_bytes: int | None
) -> dict[str, list[str]]:
    """Shard file -> tensor names: the target's own grouping, or a new one."""
    if max_shard_bytes is None and model.files:
        shards: dict[str, list[str]] = {}
        for name in infos:
            shards.setdefault(model.files[name], []).append(name)
        return shards
    split = split_state_dict_into_shards_factory(
        infos,  # pyright: ignore[reportArgumentType]
        get_storage_size=safetensors.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes or DEFAULT_SHARD_BYTES,
    )
    return split.filename_to_tensors


def _tensors(
    params: Params, cfg: ModelConfig, infos: dict[str, safetensors.TensorInfo], names: set[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """The named tensors, in the file's orientation and dtype."""
    sharing: dict[str, list[specs.ParamSpec]] = {}  # leaves that share one tensor of the file
    for spec in specs.param_specs(cfg):
        sharing.setdefault(spec.name, []).append(spec)
    for group in sharing.values():
        wanted = [
            (place, name) for place, name in enumerate(group[0].tensor_names()) if name in names
        ]
        if not wanted:
            continue
        leaves = [np.asarray(specs.get(params, spec.path)) for spec in group]
        for spec, leaf in zip(group, leaves, strict=True):
            if leaf.shape != spec.shape:
                raise InputError(
                    f"{spec.path} has shape {leaf.shape} where the config says {spec.shape}."
                )
        for place, name in wanted:
            parts = [leaf[place] if group[0].is_stacked else leaf for leaf in leaves]
            parts = [part.T if group[0].transpose else part for part in parts]
            with np.errstate(over="ignore"):  # what overflows is refused two lines on
                tensor = (np.concatenate(parts) if len(parts) > 1 else parts[0]).astype(
                    safetensors.DTYPES[infos[name].dtype]
                )
            if not np.isfinite(tensor).all():
                raise NonFiniteError(
                    f"{name} is not finite after rounding to {infos[name].dtype}; nothing was "
                    "written."
                )
            yield name, tensor


def patched_config(config: dict[str, Any]) -> dict[str, Any]:
    """The target's ``config.json`` with the few keys that older and newer readers both need.

    Both spellings of the dtype and of RoPE are written, where the target has one; the path it was
    saved from and anything about remote code or quantisation are removed.
    """
    result = {
        key: value
        for key, value in config.items()
        if key not in ("_name_or_path", "auto_map", "quantization_config")
    }
    if dtype := result.get("dtype") or result.get("torch_dtype"):
        result |= {"dtype": dtype, "torch_dtype": dtype}
    rope = result.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope and "rope_theta" not in result:
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        result["rope_theta"] = rope["rope_theta"]
        if scaling.get("rope_type", "default") != "default" and not result.get("rope_scaling"):
            result["rope_scaling"] = scaling
    return result

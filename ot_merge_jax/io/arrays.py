"""What the stages of a run leave on disk: arrays, activations, couplings, JSON values.

Equal values are written as equal bytes, so that a resumed run publishes the same as an
uninterrupted one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as orbax

from ot_merge_jax.io import atomic, safetensors
from ot_merge_jax.types import Activations, Coupling, Potentials, Transported

_ARRAYS = "arrays.safetensors"
_ROW_ID = "row_id"
#: Fields of `Coupling` and of `Potentials` -> their names on disk, which older runs have too.
_COUPLING = {
    "layer_plan": "layer",
    "neuron_potentials": "feature",
    "std_target": "std_target",
    "std_source": "std_source",
}
_POTENTIALS = {"used_log_domain": "is_log"}
#: Files of Orbax that hold nothing but the time; it restores without them.
_WITH_TIMES = ("_CHECKPOINT_METADATA", "commit_success.txt")


def save_arrays(folder: Path, arrays: Mapping[str, Any]) -> None:
    """Writes named arrays of at least one dimension into a folder; names may hold slashes."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.write(folder / _ARRAYS, {name: np.asarray(array) for name, array in arrays.items()})


def load_arrays(folder: Path) -> dict[str, np.ndarray]:
    """Reads what `save_arrays` wrote.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> save_arrays(folder, {"a/b": np.array([1.5, 2.5])})
        >>> load_arrays(folder)["a/b"].tolist()
        [1.5, 2.5]
    """
    file = safetensors.TensorFile(folder / _ARRAYS)
    return {name: file.read(name) for name in file.names()}


def allocator(folder: Path) -> Callable[[str, tuple[int, ...]], np.ndarray]:
    """Makes float32 arrays that live in files of a folder, for `ot_merge_jax.models.gather.gather`.

    The disk space is reserved at once: a memory map on a disk that fills up ends the process.

    Returns:
        A function from the name of a site and a shape to a writable memory map.
    """

    def allocate(site: str, shape: tuple[int, ...]) -> np.ndarray:
        path = folder / f"{site}.npy"
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        if hasattr(os, "posix_fallocate"):  # not on macOS
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return array

    return allocate


def save_row_ids(folder: Path, rows: Activations) -> None:
    """Completes a folder whose sites `allocator` has made, so that `load_activations` reads it."""
    np.save(folder / f"{_ROW_ID}.npy", rows.row_id)


def load_activations(folder: Path) -> Activations:
    """Activations that stay on disk until they are used.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> rows = Activations({"mlp_in": allocator(folder)("mlp_in", (1, 2, 3))}, np.arange(2))
        >>> rows.values["mlp_in"][:] = 0.5
        >>> save_row_ids(folder, rows)
        >>> again = load_activations(folder)
        >>> again.values["mlp_in"].shape, again.row_id.tolist()
        ((1, 2, 3), [0, 1])
    """
    stored = {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}
    row_id = np.array(stored.pop(_ROW_ID))
    return Activations(stored, row_id)  # pyright: ignore[reportArgumentType]


def save_coupling(folder: Path, coupling: Coupling) -> None:
    """Writes a coupling (potentials, layer plans, standard deviations) with Orbax.

    Args:
        folder: Replaced if it exists.
        coupling: The coupling, its arrays on any mesh.
    """
    tree = {_COUPLING[field]: sites for field, sites in coupling._asdict().items() if sites}
    if coupling.neuron_potentials:
        tree["feature"] = {
            site: {
                _POTENTIALS.get(field, field): array
                for field, array in potentials._asdict().items()
            }
            for site, potentials in coupling.neuron_potentials.items()
        }
    save_tree(folder, tree)


def load_coupling(folder: Path, *, mesh: jax.sharding.Mesh | None = None) -> Coupling:
    """Reads what `save_coupling` wrote, from any mesh.

    Args:
        folder: The folder of the coupling.
        mesh: Where the arrays go, whole on each device; None: the default device.

    Returns:
        The coupling.

    Example:
        >>> import tempfile
        >>> layer = {"mlp_in": jax.numpy.full((1, 2), 0.5)}
        >>> folder = Path(tempfile.mkdtemp()) / "coupling"
        >>> save_coupling(folder, Coupling(layer, {}, layer, layer))
        >>> load_coupling(folder).layer_plan["mlp_in"].tolist()
        [[0.5, 0.5]]
    """
    place = None if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    tree: Any = jax.device_put(load_tree(folder), place)
    parts: dict[str, Any] = {field: tree.get(name, {}) for field, name in _COUPLING.items()}
    fields = {name: field for field, name in _POTENTIALS.items()}
    parts["neuron_potentials"] = {
        site: Potentials(
            **{fields.get(str(name), str(name)): array for name, array in named.items()}
        )
        for site, named in parts["neuron_potentials"].items()
    }
    return Coupling(**parts)


def save_tree(folder: Path, tree: Any) -> None:
    """Writes nested dicts of arrays with Orbax, the same bytes for the same values.

    Args:
        folder: Replaced if it exists.
        tree: Arrays on any mesh.

    Raises:
        OSError: with the error number of a full disk, if there is no room.
    """
    for left in folder.parent.glob(f"{folder.name}.orbax-checkpoint-tmp*"):
        shutil.rmtree(left)  # left by a run that was killed while writing
    tree = jax.tree.map(np.asarray, tree)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    if shutil.disk_usage(folder.parent).free < size:  # else Orbax raises a very long error
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    try:
        with _quiet(), orbax.Checkpointer(_one_file_per_array()) as writer:
            writer.save(folder.absolute(), args=orbax.args.PyTreeSave(tree), force=True)
    except Exception as error:  # tensorstore hides the cause in the text of its own errors
        code = next((number for number in atomic.FULL if _says(error, number)), None)
        if code is None or isinstance(error, OSError):
            raise
        raise OSError(code, os.strerror(code), str(folder)) from error
    for file in _WITH_TIMES:
        (folder / file).unlink(missing_ok=True)


def load_tree(folder: Path) -> Any:
    """Reads what `save_tree` wrote, as arrays of numpy.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "tree"
        >>> save_tree(folder, {"a": {"b": np.arange(3)}})
        >>> load_tree(folder)["a"]["b"].tolist()
        [0, 1, 2]
    """
    with _quiet(), orbax.Checkpointer(_one_file_per_array()) as reader:
        return jax.tree.map(np.asarray, reader.restore(folder.absolute()))


def _says(error: BaseException, code: int) -> bool:
    """Whether the text of an error names an error code of the operating system."""
    return os.strerror(code) in str(error) or f"OS error {code}" in str(error)


def _one_file_per_array() -> orbax.PyTreeCheckpointHandler:
    """Orbax without OCDBT, which names its chunks at random."""
    return orbax.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the warning of Orbax at every save that there is no OCDBT, which is intended.

    Also the tracebacks that it logs for errors that it raises as well.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def plain(value: Any) -> Any:
    """NamedTuples, mappings and arrays as JSON values; numbers that are not finite become None.

    Example:
        >>> plain({"losses": np.array([1.5, np.inf]), 2: (jax.numpy.int32(3), "text")})
        {'losses': [1.5, None], '2': [3, 'text']}
    """
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value


def save_json(path: Path, value: Any) -> None:
    """Indented UTF-8 JSON of what `plain` takes; a float is read back as the same float."""
    text = json.dumps(plain(value), indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def load_json(path: Path) -> Any:
    """Reads what `save_json` wrote."""
    return json.loads(path.read_bytes())


def save_transported(folder: Path, transported: Transported) -> None:
    """Writes transported weights and their masks."""
    for part, arrays in transported._asdict().items():
        save_arrays(folder / _PARTS[part], arrays)


def load_transported(folder: Path) -> Transported:
    """Reads what `save_transported` wrote, onto the default device.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> save_transported(folder, Transported({"norm/scale": np.ones(2)}, {}))
        >>> load_transported(folder).weights["norm/scale"].tolist()
        [1.0, 1.0]
    """
    parts = {part: load_arrays(folder / name) for part, name in _PARTS.items()}
    return Transported(**jax.device_put(parts))


#: Fields of `Transported` -> folders.
_PARTS = {"weights": "moved", "masks": "masks"}
#: How the steps of `ot_merge_jax.merging.merge.merge`, and JSON values, are saved: ``(folder,
#: compute)`` writes what it computes, ``(folder)`` reads it. Activations are written while they are
#: gathered.
ACTIVATIONS = (
    lambda folder, compute: save_row_ids(folder, compute(allocate=allocator(folder))),
    load_activations,
)
COUPLING = (lambda folder, compute: save_coupling(folder, compute()), load_coupling)
TRANSPORTED = (lambda folder, compute: save_transported(folder, compute()), load_transported)
JSON = (
    lambda folder, compute: save_json(folder / "value.json", compute()),
    lambda folder: load_json(folder / "value.json"),
)

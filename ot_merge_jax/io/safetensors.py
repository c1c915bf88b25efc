"""Safetensors files: checked headers, lazy slices, the only writer. Imports errors only.

The library checks much, but it accepts duplicate names, does not name the file in its errors,
writes strided arrays wrongly and makes files that others cannot read; this module closes those gaps
and contains the only tensor writer.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16, which safetensors looks up)
import numpy as np
import safetensors
import safetensors.numpy

from ot_merge_jax.errors import InputError

#: Safetensors dtype -> (numpy dtype, bytes). Only those that can be merged.
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype("bfloat16"),
}
_MAX_HEADER_BYTES = 100_000_000


class TensorInfo(NamedTuple):
    """The entry of one tensor in a header.

    Attributes:
        dtype: Safetensors name, e.g. ``BF16``.
        shape: Its shape in the file.
    """

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Reads and checks the header of a file, without reading tensors.

    Args:
        path: A regular file (or a link to one).

    Returns:
        Tensor names, dtypes and shapes, in the order of the file.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    if not path.exists():
        raise InputError(f"{path} is missing; download the model again.")
    if not stat.S_ISREG(path.stat().st_mode):
        raise InputError(f"{path} is not a regular file; download the model again.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        is_plausible = len(start) == 8 and 2 <= length <= min(size - 8, _MAX_HEADER_BYTES)
        if start.startswith(b"version "):
            raise InputError(
                f"{path} is a Git LFS pointer and not the weights; run `git lfs pull` in "
                "its folder."
            )
        if not is_plausible and (start + file.read(100)).lstrip().startswith(b"<"):
            raise InputError(f"{path} is a web page and not the weights; download it again.")
        if not is_plausible:
            raise InputError(f"{path} is truncated or corrupt ({size} bytes); download it again.")
        text = file.read(length)

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(name for name, _ in pairs)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise InputError(
                f"{path} names {', '.join(map(repr, twice[:3]))} twice in its header, so it is "
                "corrupt; download it again."
            )
        return dict(pairs)

    try:
        header = json.loads(text, object_pairs_hook=no_duplicates)
        header.pop("__metadata__", None)
        infos = {
            name: TensorInfo(str(entry["dtype"]), tuple(entry["shape"]))
            for name, entry in header.items()
        }
        expected = (
            8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} has a corrupt header; download it again.") from error
    if size != expected:
        raise InputError(
            f"{path} holds {size} bytes where its header promises {expected}; download it again."
        )
    try:  # the library's own checks: overlaps, gaps, sizes against shapes
        with safetensors.safe_open(path, framework="np"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path} is corrupt ({error}); download it again.") from error
    return infos


class TensorFile:
    """Lazy access to the tensors of one file: nothing is read before a slice is asked for."""

    def __init__(self, path: Path):
        """Opens a file whose header `read_header` has accepted."""
        # not mapped: pages of a map count as memory of the process, and a file that shrinks would
        # end the process
        self._file = safetensors.safe_open(path, framework="np", backend="pread")

    def names(self) -> list[str]:
        """All tensors of the file."""
        return list(self._file.keys())

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Reads a tensor, or a slice of it, in the file's dtype."""
        if not index:
            return self._file.get_tensor(name)
        return self._file.get_slice(name)[index]


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors in their dtypes, reads the file back and compares every byte.

    Args:
        path: Does not exist yet, in an existing folder.
        tensors: Name -> array; strided arrays are made contiguous first.

    Raises:
        FileExistsError: if something is at ``path``.
        OSError: if what was read back differs from what was written, or the disk is full.
    """
    if path.is_symlink() or path.exists():
        raise FileExistsError(f"{path} exists and is not overwritten.")
    solid = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    try:
        # exactly one metadata key: with two, the order of the header's keys is random per run
        safetensors.numpy.save_file(solid, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        # the library hides the cause in its text; a full disk must stay recognisable
        code = re.search(r"os error (\d+)", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # the library leaves 0600, unreadable to a serving account
    with path.open("rb") as file:
        os.fsync(file.fileno())
    again = TensorFile(path)
    for name, array in solid.items():
        if again.read(name).tobytes() != array.tobytes():
            raise OSError(f"{path} does not hold what was written for {name!r}; check the disk.")


def nbytes(info: TensorInfo) -> int:
    """Bytes of a tensor's data; its dtype must be in `DTYPES`."""
    return math.prod(info.shape) * DTYPES[info.dtype].itemsize

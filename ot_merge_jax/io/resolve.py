"""Where a model is: folders, hub ids, ``BASE+ADAPTER``; reading its JSON files with checks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from ot_merge_jax.errors import InputError
from ot_merge_jax.io import hub

INDEX = "model.safetensors.index.json"
_DOWNLOADED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*")
#: Other exports of the same weights: subfolders (onnx, original), and Mistral's own format.
_NOT_DOWNLOADED = ("*/*", "consolidated*")
_MAX_JSON_BYTES = {"config.json": 5_000_000, INDEX: 100_000_000}


class Location(NamedTuple):
    """Where a model is.

    Attributes:
        path: An existing directory.
        origin: The repository it was fetched from; None for a directory that was named as such.
    """

    path: Path
    origin: hub.Origin | None


def split(text: str | Path) -> tuple[str, str | None]:
    """Base and adapter of ``BASE+ADAPTER``; for anything else the adapter is None.

    The name of an existing directory is never split. If there are several ``+``, the split counts
    with the most sides that exist; if no side exists, nothing is split.

    Example:
        >>> split("owner/name@main+./adapter"), split("model")
        (('owner/name@main', './adapter'), ('model', None))
    """
    text = str(text)
    parts = text.split("+")
    sides = [("+".join(parts[:i]), "+".join(parts[i:])) for i in range(1, len(parts))]
    sides = [pair for pair in sides if all(pair)]
    counts = [(0, (text, None)), *((sum(map(_is_there, pair)), pair) for pair in sides)]
    return (text, None) if _is_there(text) else max(counts, key=lambda entry: entry[0])[1]


def _is_there(text: str) -> bool:
    """Whether a text names a directory, or a model of the hub."""
    return Path(text).expanduser().is_dir() or hub.model_id(text) is not None


def called(path: Path, origin: hub.Origin | None) -> str:
    """What people call a folder: its hub id, or its name."""
    return path.resolve().name if origin is None else origin.repo


def resolve(path: str | Path, *, revision: str | None = None, offline: bool = False) -> Location:
    """The local folder of a model: a directory, or the snapshot of a hub id at a revision.

    An existing directory comes first, whatever its name. A path is never taken for a hub id:
    without a revision, what is not a directory is an error.

    Args:
        path: A directory, ``OWNER/NAME@REVISION``, or a hub id when ``revision`` is given.
        revision: Branch, tag or commit of the hub id.
        offline: Whether the network is forbidden; the hub's local cache is used all the same.

    Returns:
        An existing directory and its origin.

    Raises:
        InputError: if there is no such directory, the hub cannot provide the revision, or something
            in the folder is neither a file nor a directory.
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
    for file in folder.iterdir():  # reading a pipe never ends, and a device has no end
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise InputError(f"{file} is not a regular file; download the model again.")
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


def unusable(
    path: Path, problems: list[str], *, advice: str = "download it again or fix it"
) -> InputError:
    """The error that lists what is wrong with a folder, the first dozen in full."""
    shown = "; ".join(problems[:12])
    more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
    return InputError(f"{path} cannot be used: {shown}{more}; {advice}.")


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

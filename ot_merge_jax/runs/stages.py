"""The state of a run on disk: finished stages, checked by their hashes, so that a run can resume.

A run works in ``OUT.partial-KEY/``. `stage` is the only mechanism: whatever a stage makes is in
files, the manifest names them with their hashes once they are whole, and every run, resumed or not,
goes on with what it reads back from them. Imports errors, atomic and provenance.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pydantic

from ot_merge_jax.errors import DivergedError, ResourceError, is_out_of_memory
from ot_merge_jax.io import atomic
from ot_merge_jax.runs import provenance

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_MANIFEST = "manifest.json"
#: The folder of a run folder that is published.
MODEL = "model"


class File(pydantic.BaseModel):
    """Hash and size of a finished file."""

    model_config = pydantic.ConfigDict(extra="forbid")

    sha256: str
    bytes: int


class StageEntry(pydantic.BaseModel):
    """A finished stage: the stages it was made from, and its files, relative to the run folder."""

    model_config = pydantic.ConfigDict(extra="forbid")

    stage: str
    needs: list[str]
    files: dict[str, File]


class Manifest(pydantic.BaseModel):
    """All finished stages in order, and the hash of that list, which shows damage to it."""

    model_config = pydantic.ConfigDict(extra="forbid")

    sha256: str
    stages: list[StageEntry]


class RunFolder(NamedTuple):
    """A run folder that is being worked in.

    Attributes:
        folder: ``OUT.partial-KEY``.
        part: Prefix of the names of its stages; empty, or ends in a slash.
    """

    folder: Path
    part: str = ""


def key(parts: Mapping[str, Any]) -> str:
    """Eight hex digits that stand for everything a run depends on.

    Example:
        >>> key({"seed": 0}) == key({"seed": 0}), key({"seed": 0}) == key({"seed": 1})
        (True, False)
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def finished(run: RunFolder) -> dict[str, StageEntry]:
    """The finished stages by their names, in order, as the manifest has them."""
    return {entry.stage: entry for entry in _read_manifest(run.folder)}


def stage(
    run: RunFolder,
    name: str,
    make: Callable[[Path], object],
    load: Callable[[Path], T],
    *,
    needs: Sequence[str] = (),
    folder: str | None = None,
) -> T:
    """Makes a stage unless it is finished, and reads it.

    Args:
        run: The run folder.
        name: Of the stage.
        make: Writes files into the folder it is given.
        load: Reads them. Called also right after ``make``, so that every run reads what it uses.
        needs: Stages of the same part whose results ``make`` uses; if one is redone, so is this.
        folder: Where the files go, relative to the run folder; None: ``state/NAME``. Stages may
            share a folder: files there that belong to no other stage are this stage's.

    Returns:
        What ``load`` returns.

    Example:
        >>> import tempfile
        >>> run = RunFolder(Path(tempfile.mkdtemp()))
        >>> calls = []
        >>> def make(folder):
        ...     calls.append("once")
        ...     (folder / "a.txt").write_text("one")
        >>> read = lambda folder: (folder / "a.txt").read_text()
        >>> [stage(run, "a", make, read) for _ in range(2)], calls
        (['one', 'one'], ['once'])
    """
    name = run.part + name
    place = run.folder / (folder or f"state/{name}")
    entries = finished(run)
    if name not in entries:
        place.mkdir(parents=True, exist_ok=True)
        make(place)
        known = {file for entry in entries.values() for file in entry.files}
        files = {
            file: File(sha256=provenance.sha256(run.folder / file), bytes=_bytes(run.folder / file))
            for file in _files(run.folder, place)
            if file not in known
        }
        entry = StageEntry(stage=name, needs=[run.part + need for need in needs], files=files)
        _commit_point(f"before {name}")
        _write_manifest(run.folder, [*entries.values(), entry])
        _commit_point(f"after {name}")
    return load(place)


def drop(run: RunFolder, names: Sequence[str]) -> None:
    """Deletes finished stages and their files; the manifest is rewritten first.

    For stages that newer ones replace, such as the checkpoints of a training.

    Example:
        >>> import tempfile
        >>> run = RunFolder(Path(tempfile.mkdtemp()))
        >>> write = lambda folder: (folder / "a.txt").write_text("one")
        >>> place = stage(run, "a", write, lambda folder: folder)
        >>> drop(run, ["a"])
        >>> place.exists(), list(finished(run))
        (False, [])
    """
    if not names:
        return
    entries = finished(run)
    _write_manifest(run.folder, [entry for name, entry in entries.items() if name not in names])
    for file in (file for name in names for file in entries[name].files):
        (run.folder / file).unlink(missing_ok=True)
    _delete_empty(run)


@contextlib.contextmanager
def run_folder(
    out: Path,
    run_key: str,
    *,
    command: str,
    resume: bool = False,
    overwrite: bool = False,
    keep: bool = True,
) -> Iterator[RunFolder]:
    """The folder of a run, whose ``model`` becomes ``out`` when the block ends well.

    A run that is killed or interrupted, that finds the disk or the memory full, or whose training
    diverges, keeps its finished stages; any other error leaves nothing. Call it under
    `atomic.locked`.

    Args:
        out: The folder to publish.
        run_key: From `key`.
        command: What the user typed, shown with ``--resume`` when stages are kept.
        resume: Whether finished stages of a run of this key are used; otherwise they are deleted.
        overwrite: Whether an existing ``out`` is replaced.
        keep: Whether stages are kept at all.

    Yields:
        The run.

    Raises:
        InputError: from `atomic.check_output`.
        ResourceError: if the disk or the memory is full.
        KeyboardInterrupt: saying how to resume.
    """
    out = out.resolve()
    folder, aside = _places(out, run_key)
    if aside.exists() and not out.exists():  # killed between the two renames of publishing
        aside.rename(out)
    atomic.check_output(out, overwrite=overwrite)
    run = RunFolder(folder)
    try:
        if folder.exists() and not resume:
            shutil.rmtree(folder)
        if resume and not folder.exists():
            _LOG.info("resume: there is nothing to resume, so the run starts anew")
        folder.mkdir(exist_ok=True)
        _mention_others(out, folder)
        if resume:
            if entries := _verified(folder):
                _write_manifest(folder, entries)
            else:
                (folder / _MANIFEST).unlink(missing_ok=True)
            _delete_others(run)
        yield run
        _commit_point("before publish")
        atomic.publish(folder / MODEL, out, aside=aside, overwrite=overwrite)
        _commit_point("after publish")
    except BaseException as error:
        is_full = isinstance(error, OSError) and atomic.is_full(error)
        is_short = is_full or is_out_of_memory(error) or isinstance(error, ResourceError)
        has_diverged = isinstance(error, DivergedError)
        is_kept = keep and (is_short or has_diverged or not isinstance(error, Exception))
        is_kept = is_kept and (folder / _MANIFEST).exists()  # at least one stage is finished
        if not is_kept:
            shutil.rmtree(folder, ignore_errors=True)
        left = (
            f"finished stages are kept in {folder.name}, continue with: {command} --resume"
            if is_kept
            else "nothing was written."
        )
        if isinstance(error, OSError) and is_full:
            raise ResourceError(
                f"The disk is full at {out.parent} ({error.strerror}); {left}"
            ) from error
        if is_out_of_memory(error):
            raise ResourceError(
                f"The memory is full; use a lower --memory-limit or fewer --max-rows; {left}"
            ) from error
        if isinstance(error, ResourceError) and is_kept:
            raise ResourceError(f"{str(error).rstrip('.')}; {left}") from error
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"interrupted; {left}") from error
        if has_diverged and is_kept:  # the same settings would diverge again
            left = f"what was good before is kept in {folder.name}"
            raise DivergedError(f"{str(error).rstrip('.')}; {left}.") from error
        raise
    clear(out, run_key)


def clear(out: Path, run_key: str) -> None:
    """Deletes what a run has left beside its published folder."""
    for leftover in _places(out.resolve(), run_key):
        shutil.rmtree(leftover, ignore_errors=True)


def _places(out: Path, run_key: str) -> tuple[Path, Path]:
    """The run folder, and where a folder that is replaced waits."""
    return out.with_name(f"{out.name}.partial-{run_key}"), out.with_name(
        f"{out.name}.replaced-{run_key}"
    )


def _mention_others(out: Path, folder: Path) -> None:
    """Logs what other runs have left; only the user deletes it."""
    others = sorted(
        path.name
        for path in out.parent.iterdir()
        if path.name.startswith(f"{out.name}.partial-") and path != folder
    )
    if others:
        _LOG.info(
            "other runs to %s, with other settings or inputs, have left %s; "
            "delete what is not to be resumed",
            out.name,
            ", ".join(others),
        )


def _verified(folder: Path) -> list[StageEntry]:
    """The finished stages whose files, and those of the stages they need, are unchanged."""
    intact: dict[str, StageEntry] = {}
    again, damaged = [], []
    for entry in _read_manifest(folder):
        bad = [file for file, was in entry.files.items() if not _is_intact(folder / file, was)]
        damaged += bad
        if bad or not intact.keys() >= set(entry.needs):
            again.append(entry.stage)
        else:
            intact[entry.stage] = entry
    if again:
        _LOG.warning(
            "resume: %s: not what was written; done again: %s", ", ".join(damaged), ", ".join(again)
        )
    if intact:
        _LOG.info("resume: taken from %s: %s", folder.name, ", ".join(intact))
    return list(intact.values())


def _is_intact(path: Path, was: File) -> bool:
    """Whether a file still has its size and its hash."""
    try:
        return _bytes(path) == was.bytes and provenance.sha256(path) == was.sha256
    except OSError:
        return False


def _read_manifest(folder: Path) -> list[StageEntry]:
    """The entries of a manifest; none if it is missing or damaged."""
    path = folder / _MANIFEST
    if not path.exists():
        return []
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except (OSError, pydantic.ValidationError):
        manifest = None
    if manifest is None or manifest.sha256 != _digest(manifest.stages):
        _LOG.warning("resume: %s is damaged; the run starts anew", _MANIFEST)
        return []
    return manifest.stages


def _write_manifest(folder: Path, entries: Sequence[StageEntry]) -> None:
    """Replaces the manifest atomically: a crash leaves the old one or the new one.

    The files it names are not flushed to disk: if a power cut damages one, its hash is wrong.
    """
    new = folder / f"{_MANIFEST}.new"
    manifest = Manifest(sha256=_digest(entries), stages=list(entries))
    new.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    atomic.flush(new)
    new.replace(folder / _MANIFEST)
    atomic.flush(folder)


def _digest(entries: Sequence[StageEntry]) -> str:
    """SHA-256 of the list of stages."""
    return hashlib.sha256(
        "\n".join(entry.model_dump_json() for entry in entries).encode()
    ).hexdigest()


def _delete_others(run: RunFolder) -> None:
    """Deletes what belongs to no finished stage: files and folders of an interrupted stage."""
    known = {_MANIFEST} | {file for entry in finished(run).values() for file in entry.files}
    for file in _files(run.folder, run.folder):
        if file not in known:
            (run.folder / file).unlink()
    _delete_empty(run)


def _delete_empty(run: RunFolder) -> None:
    """Deletes the empty folders of a run."""
    for parent, _, _ in os.walk(run.folder, topdown=False):
        with contextlib.suppress(OSError):  # not empty
            Path(parent).rmdir()
    run.folder.mkdir(exist_ok=True)


def _files(root: Path, folder: Path) -> list[str]:
    """All files below a folder, as POSIX paths relative to ``root``; links are not followed."""
    paths = [
        Path(parent, name).relative_to(root).as_posix()
        for parent, _, names in os.walk(folder)
        for name in names
    ]
    return sorted(paths)


def _bytes(path: Path) -> int:
    """Size of a file."""
    return path.stat().st_size


def _commit_point(name: str) -> None:
    """Where tests can kill a run, like ``kill -9``: ``OT_MERGE_CRASH_AT="before coupling"``."""
    if os.environ.get("OT_MERGE_CRASH_AT") == name:
        os._exit(137)

"""Publishing a folder: it is absent or complete, never partial. Imports errors only."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

import filelock

from ot_merge_jax.errors import InputError, ResourceError

#: What a full disk looks like: no space, quota, file too large.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LOCK = ".ot-merge.lock"
#: Bytes of a name that leave room for ``.replaced-`` and a run id.
_MAX_NAME = 255 - len(".replaced-01234567")


def check_output(out: Path, *, inputs: Iterable[Path] = (), overwrite: bool = False) -> None:
    """Refuses an output folder before any work is done.

    Args:
        out: The folder to be written.
        inputs: Model folders and text files that are read.
        overwrite: Whether an existing folder may be replaced.

    Raises:
        InputError: if the folder exists, is or lies inside an input, contains one, or cannot be
            created.
    """
    real = out.expanduser().resolve()
    if len(os.fsencode(real.name)) > _MAX_NAME or any(
        len(os.fsencode(p)) > 255 for p in real.parts
    ):
        raise InputError(
            f"The name of the output folder {real.name[:40]}... is too long; shorten it."
        )
    for path in inputs:
        source = path.resolve()
        if real == source:
            raise InputError(f"The output folder {out} is also an input; choose another.")
        if source.is_dir() and real.is_relative_to(source):
            raise InputError(
                f"The output folder {out} lies inside the input {path}; choose another."
            )
        if source.is_relative_to(real):
            raise InputError(f"The output folder {out} contains the input {path}; choose another.")
    if real.exists() and not real.is_dir():
        raise InputError(f"The output {out} is a file; choose a folder.")
    if real.exists() and any(real.iterdir()) and not overwrite:
        raise InputError(
            f"The output folder {out} exists and is not empty; choose another or pass --overwrite."
        )
    parent = next(folder for folder in real.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(
            f"The output folder {out} cannot be created because {parent} is not "
            "writable; choose another."
        )


@contextlib.contextmanager
def atomic_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder that becomes ``out`` if the block succeeds, and is deleted if it fails.

    Args:
        out: The folder to publish.
        overwrite: Whether an existing folder is replaced; it is moved aside first and deleted last.

    Yields:
        The partial folder, on the same filesystem.

    Raises:
        InputError: from `check_output`.
        ResourceError: if the disk is full.

    Example:
        >>> import tempfile
        >>> out = Path(tempfile.mkdtemp()) / "result"
        >>> with atomic_folder(out) as partial:
        ...     _ = (partial / "a.txt").write_text("whole")
        >>> (out / "a.txt").read_text(), len(list(out.parent.iterdir()))
        ('whole', 1)
    """
    check_output(out, overwrite=overwrite)
    out = out.expanduser().resolve()
    run_id = secrets.token_hex(4)
    partial, aside = (
        out.with_name(f"{out.name}.partial-{run_id}"),
        out.with_name(f"{out.name}.replaced-{run_id}"),
    )
    with parents(out):
        try:
            partial.mkdir()
            yield partial
            publish(partial, out, aside=aside, overwrite=overwrite)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and is_full(error):
                raise ResourceError(
                    f"The disk is full at {out.parent} ({error.strerror}); nothing was written."
                ) from error
            raise
    shutil.rmtree(aside, ignore_errors=True)


def publish(folder: Path, out: Path, *, aside: Path, overwrite: bool = False) -> None:
    """Renames a finished folder to ``out``, flushed to disk first.

    Args:
        folder: The folder.
        out: Its new name.
        aside: Where an existing ``out`` is moved; it is moved back if something fails, else the
            caller deletes it.
        overwrite: Whether an existing ``out`` may be replaced.

    Raises:
        InputError: if somebody has written ``out`` meanwhile.
    """
    for path in [*folder.rglob("*"), folder]:
        flush(path)
    check_output(out, overwrite=overwrite)
    try:
        if out.exists():
            out.rename(aside)
        folder.rename(out)
    except BaseException:
        if aside.exists() and not out.exists():
            aside.rename(out)
        raise


@contextlib.contextmanager
def parents(out: Path) -> Iterator[None]:
    """Creates the folders above ``out``; those that it created are removed if they stay empty."""
    missing = [folder for folder in out.parents if not folder.exists()]  # deepest first
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps other processes from writing ``out`` while the block runs.

    The operating system holds the lock, so it is released when its process dies.

    Raises:
        InputError: naming host and process, if another process has the lock.

    Example:
        >>> import tempfile
        >>> out = Path(tempfile.mkdtemp()) / "result"
        >>> with locked(out), locked(out):
        ...     pass
        Traceback (most recent call last):
        ...
        ot_merge_jax.errors.InputError: Another run, process ... on ..., is writing ...
    """
    out = out.resolve()
    path = out.with_name(f"{out.name}{_LOCK}")
    with parents(out):
        lock = filelock.FileLock(path)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout as error:
            holder = path.read_text(encoding="utf-8") if path.exists() else "which is just ending"
            raise InputError(
                f"Another run, {holder}, is writing {out}; wait for it or choose another folder."
            ) from error
        try:
            with contextlib.suppress(OSError):  # a full disk is reported where it matters
                path.write_text(f"process {os.getpid()} on {socket.gethostname()}", "utf-8")
            yield
        finally:
            path.unlink(missing_ok=True)  # while we have it: a lock on a lost name is refused
            lock.release()


def is_full(error: OSError) -> bool:
    """Whether an error says that there is no room on the disk."""
    return error.errno in FULL


def flush(path: Path) -> None:
    """Flushes a file or a folder to disk, so that a rename publishes what was written."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Publishing a folder: absent or complete, never half. Imports errors only."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from ot_merge_jax.errors import InputError, ResourceError

#: What a full disk looks like: no space, quota, file too large.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
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
    for given in inputs:
        source = given.resolve()
        if real == source:
            raise InputError(f"The output folder {out} is also an input; choose another.")
        if source.is_dir() and real.is_relative_to(source):
            raise InputError(
                f"The output folder {out} lies inside the input {given}; choose another."
            )
        if source.is_relative_to(real):
            raise InputError(f"The output folder {out} contains the input {given}; choose another.")
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
    """A fresh folder that becomes ``out`` when the block ends well, and vanishes when not.

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
    partial, old = (
        out.with_name(f"{out.name}.partial-{run_id}"),
        out.with_name(f"{out.name}.replaced-{run_id}"),
    )
    missing = [folder for folder in out.parents if not folder.exists()]  # deepest first
    try:
        partial.mkdir(parents=True)
        yield partial
        _sync(partial)
        check_output(out, overwrite=overwrite)  # somebody may have written it meanwhile
        if out.exists():
            out.rename(old)
        partial.rename(out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not out.exists():
            old.rename(out)
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError) and error.errno in _FULL:
            raise ResourceError(
                f"The disk is full at {out.parent} ({error.strerror}); nothing was written."
            ) from error
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Flushes every file and folder to disk, so that the rename publishes what was written."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

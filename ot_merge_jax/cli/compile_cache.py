"""Compiled programs are kept in the user's cache folder, so that the next run compiles less.

JAX writes an entry in place, so a run that is killed or finds the disk full may leave a truncated
one; JAX reads that as a miss and then never replaces it. So entries are checked before a run, each
once: it is compressed, and what cannot be decompressed is removed. Which have been checked stands
in a file beside them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import secrets
import sys
import warnings
import zlib
from pathlib import Path

_LOG = logging.getLogger(__name__)
#: Bytes above which the oldest entries are removed before a run.
MAX_BYTES = 1 << 30
_CHECKED = "checked.json"
_ZSTD = b"\x28\xb5\x2f\xfd"


def folder() -> Path:
    """Where the programs of this machine's processor are kept; nothing is made.

    Programs for the CPU use all its instructions, and a home folder may be shared by machines, so
    that each kind of processor has a folder.

    Example:
        >>> folder().parent.parts[-2:]
        ('ot_merge_jax', 'xla')
    """
    home = {
        "darwin": Path("~/Library/Caches"),
        "win32": Path(os.environ.get("LOCALAPPDATA") or "~/AppData/Local"),
    }
    root = os.environ.get("XDG_CACHE_HOME") or home.get(sys.platform, Path("~/.cache"))
    return Path(root).expanduser() / "ot_merge_jax" / "xla" / _processor()


def enable(*, is_wanted: bool = True) -> None:
    """Tells JAX to keep compiled programs; to be called before anything is compiled.

    What the environment says about JAX's cache (``JAX_COMPILATION_CACHE_DIR``,
    ``JAX_ENABLE_COMPILATION_CACHE``) is left as it is. A folder that cannot be used is no error.

    Args:
        is_wanted: Whether programs are kept; if not, nothing is read either, wherever it is kept.
    """
    import jax

    if not is_wanted:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    # an entry that another process is writing is a miss, and no news for the user
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    values = jax.config.values
    if values["jax_compilation_cache_dir"] or not values["jax_enable_compilation_cache"]:
        return
    place = folder()
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)  # whoever writes there runs code here
        tidy(place)
    except OSError as error:
        _LOG.debug("compiled programs are not kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def tidy(place: Path, *, max_bytes: int = MAX_BYTES) -> None:
    """Removes entries that are not whole, and the oldest ones of a folder that is too large.

    Args:
        place: The folder.
        max_bytes: What its entries may take up.

    Raises:
        OSError: if the folder cannot be written.
    """
    checked = _read(place / _CHECKED)
    entries: dict[str, list[int]] = {}
    for file in place.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another run tidies too
            state = file.stat()
            seen = [state.st_size, state.st_mtime_ns]
            if checked.get(file.name) != seen and not _is_whole(file.read_bytes()):
                _LOG.debug("a compiled program is not whole and is compiled again: %s", file.name)
                file.unlink()
                continue
            entries[file.name] = seen
    excess = sum(size for size, _ in entries.values()) - max_bytes
    for name in sorted(entries, key=lambda name: entries[name][1]):
        if excess <= 0:
            break
        excess -= entries.pop(name)[0]
        (place / name).unlink(missing_ok=True)
    # also where nothing changed: this is what finds out whether the folder can be written
    draft = place / f".{_CHECKED}.{secrets.token_hex(4)}"
    try:
        draft.write_text(json.dumps(entries), encoding="utf-8")
        draft.replace(place / _CHECKED)
    finally:
        draft.unlink(missing_ok=True)


def _is_whole(entry: bytes) -> bool:
    """Whether an entry can be decompressed, by zstd where JAX found one and else by zlib."""
    try:
        if not entry.startswith(_ZSTD):
            zlib.decompress(entry)
        elif sys.version_info >= (3, 14):
            from compression import zstd

            zstd.decompress(entry)
        else:
            import zstandard  # pyright: ignore[reportMissingImports]

            zstandard.decompress(entry)
    except Exception:  # whatever it raises, JAX could not read the entry either
        return False
    return True


def _read(file: Path) -> dict[str, list[int]]:
    """Name -> size and time of the entries that have been checked; empty if that is damaged."""
    try:
        entries = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _processor() -> str:
    """A short name of the kind of processor and its instructions."""
    facts = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key = line.partition(":")[0].strip()
            if key in ("model name", "flags", "Features", "CPU part"):
                facts.append(line)
            elif not line and len(facts) > 2:
                break  # the others are alike
    return f"{platform.machine()}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"

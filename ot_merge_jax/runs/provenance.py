"""Hashes, versions and redacted texts for ``provenance.json`` and the model card."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import re
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from ot_merge_jax.io.redaction import redacted

_PACKAGES = ("ot-merge-jax", "jax", "jaxlib", "flax", "ott-jax", "optax", "safetensors",
             "transformers", "huggingface-hub", "numpy")  # fmt: skip


def sha256(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_hashes(folder: Path, patterns: Sequence[str]) -> dict[str, str]:
    """SHA-256 of the files of a folder that match, by name."""
    names = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return {path.name: sha256(path) for path in names if path.is_file()}


def without_home(text: str) -> str:
    """A text with the user's home folder written as ``~``; folders that only begin like it stay."""
    home = str(Path.home())
    return re.sub(rf"(?<![\w.~/-]){re.escape(home)}(?![\w.-])", "~", text) if home != "/" else text


def public(text: str) -> str:
    """A text as it may be published: without the user's home folder and without secrets."""
    return redacted(without_home(text))


def environment() -> dict[str, Any]:
    """Versions, devices and peak memory so far; no user or host names."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in kilobytes, but not everywhere
    return {
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "devices": [f"{device.platform}:{device.device_kind}" for device in jax.devices()],
        "precision": "float32, transport and fusion at highest matmul precision",
        "peak_memory_bytes": peak * (1 if sys.platform == "darwin" else 1024),
    }

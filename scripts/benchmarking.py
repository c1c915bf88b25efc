"""What the benchmarks share: facts of the machine, its limits, and how results are kept."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def machine(*packages: str) -> dict[str, Any]:
    """What the figures were measured on."""
    named = ("jax", "jaxlib", "numpy", *packages)
    return {
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in named},
    }


def keep(path: Path, found: dict[str, Any]) -> None:
    """Writes results as JSON, and shows them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.write(path.read_text())


def peak_bytes() -> int:
    """Largest resident set of this process alone; what ``getrusage`` says includes its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(one.split()[1]) * 1024 for one in lines if one.startswith("VmHWM"))


def seconds(function: Callable[[], Any], *, rounds: int = 3) -> float:
    """The fastest of some rounds, after one that compiles and warms."""
    jax.block_until_ready(function())
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(function())
        found.append(time.perf_counter() - start)
    return min(found)


def copy_rate(size: int = 1 << 28) -> float:
    """Bytes per second of copying memory, what is read and what is written."""
    source = np.ones(size // 4, np.float32)
    target = np.empty_like(source)
    return 2 * size / seconds(lambda: np.copyto(target, source))


def matmul_rate(width: int = 2048) -> float:
    """FLOP per second of a float32 matrix product at the highest precision."""
    x = jnp.ones((width, width))
    product = jax.jit(lambda x: jnp.matmul(x, x, precision=jax.lax.Precision.HIGHEST))
    return 2 * width**3 / seconds(lambda: product(x))

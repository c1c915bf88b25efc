"""What the benchmarks share: facts of the machine, its limits, and how results are kept."""

from __future__ import annotations

import importlib.metadata
import json
import math
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
    return _status("VmHWM")


def resident_bytes() -> int:
    """The resident set of this process now."""
    return _status("VmRSS")


def forget_peak() -> None:
    """Makes `peak_bytes` begin anew from what is resident now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    """A size that Linux tells of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(one.split()[1]) * 1024 for one in lines if one.startswith(name))


def seconds(function: Callable[[], Any], *, rounds: int = 3, at_most: float = math.inf) -> float:
    """The fastest of some rounds, after one that compiles and warms.

    Args:
        function: What is timed.
        rounds: How many.
        at_most: Seconds after which no further round begins; the first one counts then.
    """
    found, warm = [], _once(function)
    while len(found) < rounds and warm + sum(found) < at_most:
        found.append(_once(function))
    return min(found or [warm])


def _once(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def copy_rate(size: int = 1 << 28) -> float:
    """Bytes per second of copying memory of the device, what is read and what is written."""
    source = np.ones(size // 4, np.float32)
    if jax.default_backend() == "cpu":
        target = np.empty_like(source)
        return 2 * size / seconds(lambda: np.copyto(target, source))
    held, copied = jax.device_put(source), jax.jit(jnp.copy)
    return 2 * size / seconds(lambda: copied(held))


def matmul_rate(width: int = 2048) -> float:
    """FLOP per second of a float32 matrix product at the highest precision."""
    x = jnp.ones((width, width))
    product = jax.jit(lambda x: jnp.matmul(x, x, precision=jax.lax.Precision.HIGHEST))
    return 2 * width**3 / seconds(lambda: product(x))

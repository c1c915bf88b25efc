"""Measures the memory of a whole `ot-merge run` with a source of 3 billion parameters.

Writes a random source (bfloat16) and a small random target, merges them in a process of its own
with ``--memory-limit``, and compares the largest resident set with what the run said it would need:
with narrow and with wide sites, and once with whole models in memory.

    python scripts/bench_memory.py --out benchmarks/memory.json
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import benchmarking
import random_checkpoint

from ot_merge_jax.demo import assets

_SOURCE = {
    "hidden": 3072, "layers": 28, "heads": 24, "kv_heads": 8, "intermediate": 8192,
    "vocabulary": 32000,
}  # fmt: skip
_TARGET = {
    "hidden": 1024, "layers": 8, "heads": 8, "kv_heads": 4, "intermediate": 2816,
    "vocabulary": 32000,
}  # fmt: skip


#: What moves, and within how much: the whole models fit into the last limit only.
_CASES = (("k,v", "8GiB"), ("up", "8GiB"), ("k,v", "22GiB"))


def main() -> None:
    """Writes the models, merges them in every case, writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=24, help="documents that give rows")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/memory.json"))
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        counts = {
            "source": random_checkpoint.write(
                place / "source", random_checkpoint.config(**_SOURCE), seed=1
            ),
            "target": random_checkpoint.write(
                place / "target", random_checkpoint.config(**_TARGET), seed=2
            ),
        }
        lines = assets.path("heldout.jsonl").read_text(encoding="utf-8").splitlines()[:8]
        (place / "heldout.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        cases = [merged(place, weights, limit, said.texts) for weights, limit in _CASES]
    benchmarking.keep(
        said.out, {"machine": benchmarking.machine(), "parameters": counts, "cases": cases}
    )


def merged(place: Path, weights: str, limit: str, documents: int) -> dict[str, Any]:
    """One merge in a process of its own: what it said it would need, and what it took."""
    words = [
        *(sys.executable, "-m", "ot_merge_jax.cli.main", "run", "--preset", "barycentric"),
        *("--target", str(place / "target"), "--source", str(place / "source")),
        *("--weights", weights, "--calibration", str(assets.path("calibration.jsonl"))),
        *("--samples", str(documents), "--max-length", "128", "--max-rows", "1024"),
        *("--eval-text", str(place / "heldout.jsonl"), "--rows", "token"),
        *("--threshold", "1e-3", "--strength", "0.1", "--memory-limit", limit),
        *("--out", str(place / "out"), "--overwrite"),
    ]
    start = time.perf_counter()
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        log = process.stderr.read().decode() if process.stderr else ""
        # of this child; it begins with the parent's peak, about 1.2 GiB, which is no more than its
        # own. What `getrusage` says of children is the largest of all so far
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(log)
    promised = re.search(r"memory: (about .*)", log)
    return {
        "weights": weights,
        "limit": limit,
        "said": promised and promised[1],
        "peak_gib": usage.ru_maxrss / 2**20,
        "seconds": time.perf_counter() - start,
    }


if __name__ == "__main__":
    main()

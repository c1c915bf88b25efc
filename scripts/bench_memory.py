"""Measures the memory of a whole `ot-merge run` with a source of 3 billion parameters.

Writes a random source (bfloat16) and a small random target, merges them in a process of its own
with ``--memory-limit``, and compares the largest resident set with what the run said it would need.

    python scripts/bench_memory.py --limit 8GiB --out benchmarks/memory.json
"""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import benchmarking
import random_checkpoint

from ot_merge_jax import assets

_SOURCE = {
    "hidden": 3072, "layers": 28, "heads": 24, "kv_heads": 8, "intermediate": 8192,
    "vocabulary": 32000,
}  # fmt: skip
_TARGET = {
    "hidden": 1024, "layers": 8, "heads": 8, "kv_heads": 4, "intermediate": 2816,
    "vocabulary": 32000,
}  # fmt: skip


def main() -> None:
    """Writes the models, merges them, writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", default="8GiB")
    parser.add_argument("--weights", default="k,v", help="what moves")
    parser.add_argument("--texts", type=int, default=24, help="documents that give rows")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/memory.json"))
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        source, target = place / "source", place / "target"
        counts = {
            "source": random_checkpoint.write(source, random_checkpoint.config(**_SOURCE), seed=1),
            "target": random_checkpoint.write(target, random_checkpoint.config(**_TARGET), seed=2),
        }
        lines = assets.path("heldout.jsonl").read_text(encoding="utf-8").splitlines()[:8]
        (place / "heldout.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        words = [
            *(sys.executable, "-m", "ot_merge_jax.cli", "run", "--preset", "barycentric"),
            *("--target", str(target), "--source", str(source), "--weights", said.weights),
            *("--calibration", str(assets.path("calibration.jsonl"))),
            *("--samples", str(said.texts), "--max-length", "128", "--max-rows", "1024"),
            *("--eval-text", str(place / "heldout.jsonl"), "--rows", "token"),
            *("--threshold", "1e-3", "--strength", "0.1", "--memory-limit", said.limit),
            *("--out", str(place / "out")),
        ]
        start = time.perf_counter()
        done = subprocess.run(words, check=False, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            sys.exit(done.stderr)
    promised = re.search(r"memory: (about .*)", done.stderr)
    found = {
        "parameters": counts,
        "weights": said.weights,
        "limit": said.limit,
        "said": promised and promised[1],
        "peak_gib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20,
        "seconds": seconds,
    }
    benchmarking.keep(said.out, found)


if __name__ == "__main__":
    main()

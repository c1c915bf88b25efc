"""Measures a vmap over epsilon against a Python loop over the same epsilons.

Four epsilons, eight pairs and one, at two sizes; both compiled and warm, in one process, one round
of each in turn; medians.

    python scripts/bench_vmap.py --out benchmarks/vmap.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmarking
import jax
import jax.numpy as jnp
import numpy as np

from ot_merge_jax.transport import cost, sinkhorn

_EPSILONS = (0.1, 0.05, 0.03, 0.02)
_SIZES = ((512, 768), (128, 192))
_PAIRS = (8, 1)
_ROWS = 1000


def costs_of(pairs: int, n: int, m: int) -> jax.Array:
    """Correlation costs of random activations with factors in common, ``[pairs, n, m]``."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(pairs, _ROWS, 64))
    x, y = (
        shared @ rng.normal(size=(pairs, 64, width)) + 4 * rng.normal(size=(pairs, _ROWS, width))
        for width in (n, m)
    )
    correlation_costs = jax.vmap(cost.correlation_cost)
    return correlation_costs(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))


def alternated(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round of each function, which take turns after one that compiles."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def compared(pairs: int, n: int, m: int, rounds: int) -> dict[str, Any]:
    """The loop, the vmap and the loop again, whose difference from itself is the noise."""
    costs, epsilons = costs_of(pairs, n, m), jnp.array(_EPSILONS)
    swept = jax.jit(jax.vmap(lambda costs, e: sinkhorn.solve(costs, epsilon=e), (None, 0)))

    def loop() -> Any:
        return [sinkhorn.solve(costs, epsilon=epsilon) for epsilon in _EPSILONS]

    seconds = alternated(
        {"loop": loop, "vmap": lambda: swept(costs, epsilons), "loop again": loop}, rounds
    )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    together, alone = swept(costs, epsilons), loop()
    return {
        "target": n,
        "source": m,
        "pairs": pairs,
        "pairs_at_once": sinkhorn.pairs_at_once(n, m),
        "loop_seconds": medians["loop"],
        "vmap_seconds": medians["vmap"],
        "vmap_over_loop": medians["vmap"] / medians["loop"],
        "loop_over_itself": medians["loop again"] / medians["loop"],
        "iterations": [int(one.iterations.sum()) for one in alone],
        "iterations_of_vmap": together.iterations.sum(-1).tolist(),
        "converged": bool(together.converged.all()),
        "largest_difference_of_cost": max(
            float(jnp.abs(together.cost[index] - one.cost).max()) for index, one in enumerate(alone)
        ),
    }


def main() -> None:
    """Compares at every size and number of pairs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/vmap.json"))
    parser.add_argument("--rounds", type=int, default=15)
    said = parser.parse_args()
    benchmarking.keep(
        said.out,
        {
            "machine": benchmarking.machine(),
            "epsilons": _EPSILONS,
            "rounds": said.rounds,
            "compared": [
                compared(pairs, *size, said.rounds) for size in _SIZES for pairs in _PAIRS
            ],
        },
    )


if __name__ == "__main__":
    main()

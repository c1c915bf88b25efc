"""Measures one neuron transport: ours, ott-jax, POT and the paper's loop in torch, on one cost.

The cost comes from activations of the demo's models, widened by a random orthonormal map, half of
the target's neurons being noisy copies of source neurons: hard enough to need tens of iterations.
All solve the same float32 matrix; its computation is timed apart. The error is the L1 marginal
error of the plan that each one's potentials or scalings stand for, in float64.

    python scripts/bench_transport.py --out benchmarks/transport.json
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import benchmarking
import jax
import jax.numpy as jnp
import numpy as np

from ot_merge_jax import activations, assets, calibration, texts
from ot_merge_jax.io.hf import load_hf
from ot_merge_jax.transport import cost, coupling, solve
from ot_merge_jax.types import Activations, HParams, MergeSpec

_ROWS = 2000


class Solved(NamedTuple):
    """What one contestant did: seconds, iterations, and its plan's two sides in log form."""

    seconds: float
    iterations: int
    f: np.ndarray
    g: np.ndarray


def widened(n: int, m: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of target and source, ``[t, n]`` and ``[t, m]``."""
    rng = np.random.default_rng(seed)
    documents = list(texts.read_documents(assets.path("calibration.jsonl")))
    tokenizer = calibration.load_tokenizer(assets.path("sibling"))
    data = calibration.align(documents, tokenizer, tokenizer, rows="token", max_rows=_ROWS)
    sides = []
    for name, batches, width in (("sibling", data.target, n), ("source-base", data.source, m)):
        cfg, params = load_hf(assets.path(name), dtype="float32")
        found = activations.gather(params, batches, cfg=cfg, sites=["mlp_in"]).values["mlp_in"]
        narrow = np.asarray(found[2])
        narrow = (narrow - narrow.mean(0)) / (narrow.std(0) + 1e-6)
        map_, _ = np.linalg.qr(rng.normal(size=(width, narrow.shape[1])))
        sides.append((narrow @ map_.T).astype(np.float32))
    x, y = sides
    planted = rng.permutation(m)[: n // 2]
    copies = y[:, planted] / y[:, planted].std(0)
    x[:, rng.permutation(n)[: n // 2]] = copies + 0.2 * rng.normal(size=copies.shape)
    return x, y


def l1_error(found: Solved, costs: np.ndarray, epsilon: float) -> float:
    """The larger of the two L1 marginal errors, in float64."""
    n, m = costs.shape
    columns, rows = np.zeros(m), np.zeros(n)
    for start in range(0, n, 256):
        part = slice(start, start + 256)
        exponent = found.f[part, None].astype(np.float64) + found.g.astype(np.float64)
        plan = np.exp((exponent - costs[part]) / epsilon)
        rows[part] = plan.sum(1)
        columns += plan.sum(0)
    return float(max(np.abs(rows - 1 / n).sum(), np.abs(columns - 1 / m).sum()))


def ours(costs: np.ndarray, epsilon: float, threshold: float) -> Solved:
    """This project's solver."""
    held = jnp.asarray(costs)
    run = functools.partial(solve.solve, held, epsilon=epsilon, threshold=threshold)
    found = run()
    took = benchmarking.seconds(run)
    return Solved(took, int(found.iterations), np.asarray(found.f), np.asarray(found.g))


def ott(costs: np.ndarray, epsilon: float, threshold: float, *, is_log: bool) -> Solved:
    """ott-jax with its defaults, but for the threshold."""
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn

    held = jnp.asarray(costs)

    @jax.jit
    def run(held: jax.Array) -> Any:
        problem = linear_problem.LinearProblem(geometry.Geometry(held, epsilon=epsilon))
        solver = sinkhorn.Sinkhorn(lse_mode=is_log, threshold=threshold)
        found = solver(problem)
        return found.f, found.g, found.n_iters

    f, g, iterations = run(held)
    took = benchmarking.seconds(lambda: run(held), rounds=1)
    return Solved(took, int(iterations), np.asarray(f), np.asarray(g))


def pot(costs: np.ndarray, epsilon: float, threshold: float, *, method: str) -> Solved:
    """POT on numpy, float32 in kernel form and float64 in log form (its float32 may not end)."""
    import ot

    held = costs if method == "sinkhorn" else costs.astype(np.float64)
    n, m = costs.shape
    sides = np.full(n, 1 / n, held.dtype), np.full(m, 1 / m, held.dtype)

    def run() -> dict[str, Any]:
        # its threshold is of the columns' L2 error; the L1 error is at most sqrt(m) times that
        return ot.sinkhorn(
            *sides, held, epsilon, method=method, numItermax=2000, log=True, warn=False,
            stopThr=threshold / math.sqrt(m),
        )[1]  # fmt: skip

    start = time.perf_counter()
    log = run()
    took = time.perf_counter() - start
    if took < 1:  # so short that the first time would not be fair
        took = benchmarking.seconds(run)
    u, v = (log[x] if method == "sinkhorn" else np.exp(log[f"log_{x}"]) for x in "uv")
    with np.errstate(divide="ignore"):
        return Solved(took, log["niter"], epsilon * np.log(u), epsilon * np.log(v))


def paper(costs: np.ndarray, epsilon: float, iterations: int = 200) -> Solved:
    """The loop as the paper describes it: log domain, torch, float32, blocks of rows."""
    import torch

    held = torch.from_numpy(costs)
    n, m = costs.shape
    f, g = torch.zeros(n), torch.zeros(m)
    log_a, log_b = -math.log(n), -math.log(m)
    start = time.perf_counter()
    with torch.inference_mode():
        for _ in range(iterations):
            for first in range(0, n, 512):
                part = slice(first, first + 512)
                f[part] = epsilon * (log_a - torch.logsumexp((g - held[part]) / epsilon, 1))
            for first in range(0, m, 512):
                part = slice(first, first + 512)
                lse = torch.logsumexp((f[:, None] - held[:, part]) / epsilon, 0)
                g[part] = epsilon * (log_b - lse)
    return Solved(time.perf_counter() - start, iterations, f.numpy(), g.numpy())


def per_iteration(costs: np.ndarray, epsilon: float) -> float:
    """Seconds of one iteration of ours: many more against few, at a threshold never reached."""
    held = jnp.asarray(costs)
    few, many = (
        benchmarking.seconds(
            lambda count=count: solve.solve(
                held, epsilon=epsilon, threshold=0.0, max_iterations=count
            )
        )
        for count in (5, 45)
    )
    return (many - few) / 40


def inner(n: int, m: int, epsilons: list[float]) -> dict[str, Any]:
    """All contestants on one cost."""
    x, y = widened(n, m)
    correlate = jax.jit(cost.correlation_cost)
    costs = np.array(correlate(x, y))
    found: dict[str, Any] = {
        "shape": [n, m],
        "rows": len(x),
        "cost_seconds": benchmarking.seconds(lambda: correlate(x, y)),
        "floor_seconds_per_iteration": costs.nbytes / benchmarking.copy_rate(),
    }
    for epsilon in epsilons:
        reference = paper(costs, epsilon)
        threshold = 1e-6
        runs = {
            "torch": reference,
            "pot sinkhorn": pot(costs, epsilon, threshold, method="sinkhorn"),
            "pot sinkhorn_log": pot(costs, epsilon, threshold, method="sinkhorn_log"),
            "ott kernel": ott(costs, epsilon, threshold, is_log=False),
            "ott log": ott(costs, epsilon, threshold, is_log=True),
            "ours": ours(costs, epsilon, threshold),
        }
        table = {
            name: {
                "seconds": run.seconds,
                "iterations": run.iterations,
                "l1_error": l1_error(run, costs, epsilon),
            }
            for name, run in runs.items()
        }
        took = runs["ours"].seconds
        others = [run.seconds for name, run in runs.items() if name not in ("ours", "torch")]
        one = per_iteration(costs, epsilon)
        found[f"epsilon {epsilon}"] = {
            "runs": table,
            "faster_than_torch": runs["torch"].seconds / took,
            "faster_than_best_other": min(others) / took,
            "seconds_per_iteration": one,
            "over_floor": one / found["floor_seconds_per_iteration"],
        }
    return found


def wide(n: int, m: int, epsilon: float) -> None:
    """What the child process of the MLP-shaped measurement does: ours, then a part of the loop."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(256, 64)).astype(np.float32)
    x, y = (shared @ rng.normal(size=(64, width)).astype(np.float32) for width in (n, m))
    costs = cost.correlation_cost(x, y)
    jax.block_until_ready(costs)
    before = benchmarking.peak_bytes()
    run = functools.partial(solve.solve, costs, epsilon=epsilon)
    start = time.perf_counter()
    found = jax.block_until_ready(run())
    first = time.perf_counter() - start
    took = benchmarking.seconds(run, rounds=1)
    peak = benchmarking.peak_bytes()
    of_loop = paper(np.asarray(costs), epsilon, iterations=5).seconds * 40
    json.dump(
        {
            "shape": [n, m],
            "epsilon": epsilon,
            "seconds": took,
            "seconds_with_compilation": first,
            "iterations": int(found.iterations),
            "l1_error": float(found.error),
            "working_set_gib": (peak - before + costs.nbytes) / 2**30,
            "process_peak_gib": peak / 2**30,
            "torch_seconds_of_200_iterations_from_5": of_loop,
            "faster_than_torch": of_loop / took,
        },
        sys.stdout,
    )


def grid(layers: int, source_layers: int, n: int, m: int) -> None:
    """What the child process of the layer grid does: all pairs, rows that take no memory."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(_ROWS, 64)).astype(np.float32)
    sides = []
    for count, width in ((layers, n), (source_layers, m)):
        one = shared @ rng.normal(size=(64, width)).astype(np.float32)
        many = np.broadcast_to(one, (count, *one.shape))
        sides.append(Activations({"mlp_in": many, "up_out": many[:, :, :64]}, np.arange(_ROWS)))  # pyright: ignore
    spec = MergeSpec(weights=("up",))
    start = time.perf_counter()
    found = coupling.couple(*sides, HParams(1.0, 0.1), spec=spec)
    jax.block_until_ready(found)
    json.dump(
        {
            "layers": [layers, source_layers],
            "seconds": time.perf_counter() - start,
            "peak_gib": benchmarking.peak_bytes() / 2**30,
        },
        sys.stdout,
    )


def child(*words: Any) -> Any:
    """What this script prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, *map(str, words)], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout)


def main() -> None:
    """Runs all and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/transport.json"))
    parser.add_argument("--shape", type=int, nargs=2, default=(2048, 4096))
    parser.add_argument("--wide", type=int, nargs=2, default=(8192, 14336))
    parser.add_argument("--epsilon", type=float, nargs="+", default=[0.1, 0.05, 0.02])
    parser.add_argument("--child", choices=("wide", "grid"), help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, nargs=2, help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.child == "wide":
        wide(*said.wide, said.epsilon[0])
        return
    if said.child == "grid":
        grid(*said.layers, *said.shape)
        return
    shape = ("--shape", *said.shape)
    found = {
        "machine": benchmarking.machine("ott-jax", "torch", "POT"),
        "copy_bytes_per_second": benchmarking.copy_rate(),
        "inner": inner(*said.shape, said.epsilon),
        "wide": child("--child", "wide", "--wide", *said.wide, "--epsilon", 0.05),
        "grid": [child("--child", "grid", "--layers", *one, *shape) for one in ((1, 16), (4, 16))],
    }
    benchmarking.keep(said.out, found)


if __name__ == "__main__":
    main()

"""Measures one readout fit: seconds, memory, the share of the matrix rate, and torch's L-BFGS.

States, heads and teachers are random; what is timed does not depend on what they mean. All rows
move, except in the last case. Both solvers minimise one objective in the same preconditioned
coordinates, in float32, with the same memory and number of iterations; each is told how many
products with all states it made, as a line search makes more than one an iteration. Every case and
solver has a process of its own.

    python scripts/bench_readout.py --out benchmarks/readout.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import benchmarking
import jax
import jax.numpy as jnp
import numpy as np

from ot_merge_jax.training import head_survey, readout
from ot_merge_jax.training.head_survey import FinalStates, OutputHead

#: Vocabulary, width, positions, and how many rows move.
CASES = ((2048, 128, 2_000, 2048), (49_152, 576, 12_000, 49_152), (128_256, 2048, 2_000, 8192))
_ITERATIONS, _KAPPA, _RIDGE, _NAMED = 8, 0.7, 0.05, 64


def main() -> None:
    """Runs every case, or with ``--case`` one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/readout.json"))
    parser.add_argument("--case", type=int)
    parser.add_argument("--solver", choices=("ours", "torch"))
    given = parser.parse_args()
    if given.case is not None:
        measure = of_ours if given.solver == "ours" else of_torch
        sys.stdout.write(json.dumps(measure(*CASES[given.case])))
        return
    cases = []
    for index, (vocabulary, width, positions, rows) in enumerate(CASES):
        case: dict[str, Any] = {
            "vocabulary": vocabulary, "width": width, "positions": positions, "rows": rows,
        }  # fmt: skip
        for solver in ("ours", "torch"):
            command = [sys.executable, __file__, "--case", str(index), "--solver", solver]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            case[solver] = json.loads(done.stdout)
        case["torch_seconds_over_ours"] = case["torch"]["seconds"] / case["ours"]["seconds"]
        case["torch_pass_over_ours"] = _per_pass(case["torch"]) / _per_pass(case["ours"])
        cases.append(case)
    found = {"machine": benchmarking.machine("optax", "torch"), "iterations": _ITERATIONS}
    benchmarking.keep(given.out, found | {"cases": cases})


def _per_pass(measured: dict[str, Any]) -> float:
    return measured["seconds"] / measured["passes"]


def drawn(
    vocabulary: int, width: int, positions: int, rows: int
) -> tuple[readout.ReadoutProblem, readout.DevStates]:
    """A random problem whose first ``rows`` tokens move, and its own positions as dev split."""
    rng = np.random.default_rng(0)
    head = OutputHead(jnp.asarray(rng.normal(size=(vocabulary, width)) / width**0.5, jnp.float32))
    states = jnp.asarray(rng.normal(size=(positions, width)), jnp.float32)
    label = jnp.asarray(rng.integers(0, rows, positions), jnp.int32)
    token = jnp.asarray(rng.integers(0, rows, (positions, _NAMED)), jnp.int32)
    share = rng.dirichlet(np.full(_NAMED, 0.1), positions) * 0.9
    teacher = head_survey.TopTokens(token, jnp.asarray(share, jnp.float32))
    content = jnp.ones(vocabulary, bool)
    at = FinalStates(states, label)
    surveyed = head_survey.survey(head, at, teacher, content)
    moving = np.arange(rows)
    task = readout.problem(head, at, teacher, content, surveyed, moving)
    few = jax.tree.map(lambda leaf: leaf[: max(1, positions // 10)], at)
    return task, readout.dev_states(head, few, content, moving)


def of_ours(vocabulary: int, width: int, positions: int, rows: int) -> dict[str, Any]:
    """Seconds of `readout.fit` once compiled, its passes, and the largest resident set."""
    task, dev = drawn(vocabulary, width, positions, rows)

    def fitted() -> readout.FittedHead:
        return readout.fit(task, dev, kappa=_KAPPA, ridge=_RIDGE, iterations=_ITERATIONS,
                           patience=_ITERATIONS)  # fmt: skip

    readout.fit(task, dev, kappa=_KAPPA, ridge=_RIDGE, iterations=1)
    benchmarking.forget_peak()
    start = time.perf_counter()
    found = fitted()
    jax.block_until_ready(found.change)
    seconds = time.perf_counter() - start
    passes = found.curve[-1].passes
    flops = 4 * positions * rows * width * passes / seconds
    return {
        "seconds": seconds,
        "passes": passes,
        "objective": found.curve[-1].objective,
        "peak_bytes": benchmarking.peak_bytes(),
        "share_of_matmul_rate": flops / benchmarking.matmul_rate(),
    }


def of_torch(vocabulary: int, width: int, positions: int, rows: int) -> dict[str, Any]:
    """The same by ``torch.optim.LBFGS``, in blocks of positions as ours."""
    import torch

    task, _ = drawn(vocabulary, width, positions, rows)
    terms = readout._given(task, _KAPPA, _RIDGE)
    states, fixed, start, goal, scale = (
        torch.from_numpy(np.array(leaf))
        for leaf in (task.states, task.fixed, task.start, terms.goal, terms.scale)
    )
    mu, size = float(terms.mu), head_survey.block_size(positions, rows)
    del task, terms
    jax.clear_caches()
    theta, passes = torch.zeros_like(start, requires_grad=True), 0
    solver = torch.optim.LBFGS(
        [theta], max_iter=_ITERATIONS, max_eval=10_000, history_size=8, tolerance_grad=0,
        tolerance_change=0, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Any:
        nonlocal passes
        passes += 1
        solver.zero_grad()
        change = (theta * scale).detach().requires_grad_()
        value = mu / 2 * (change**2).sum() - (goal * (start + change)).sum()
        value.backward()
        total = value.detach()
        for place in range(0, positions, size):
            logits = states[place : place + size] @ (start + change).T
            sums = torch.logaddexp(torch.logsumexp(logits, -1), fixed[place : place + size])
            part = sums.sum() / positions
            part.backward()
            total = total + part.detach()
        theta.grad = change.grad * scale
        return total

    benchmarking.forget_peak()
    first = float(closure())
    passes, begun = 0, time.perf_counter()
    solver.step(closure)
    seconds, made = time.perf_counter() - begun, passes
    return {
        "seconds": seconds,
        "passes": made,
        "objective": float(closure()) - first,
        "peak_bytes": benchmarking.peak_bytes(),
    }


if __name__ == "__main__":
    main()

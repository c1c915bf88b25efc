"""Measures the carrying of one kernel: share of the matrix units' rate, and what a mask saves.

A query projection of 2048 into 2048 from one of 4096 into 4096 with 2000 rows, both plans rebuilt;
then the triple product alone, dense and with 128 rows kept.

    python scripts/bench_fusion.py --out benchmarks/fusion.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import benchmarking
import jax
import jax.numpy as jnp
import numpy as np

from ot_merge_jax.merging import projections
from ot_merge_jax.transport import coupling as couplings
from ot_merge_jax.types import Activations, HParams, MergeSpec

_T, _N, _M, _K = 2000, 2048, 4096, 128


def rows(width: int, *, seed: int) -> np.ndarray:
    """Correlated activations of one layer, ``[1, t, width]``."""
    shared = np.random.default_rng(0).normal(size=(_T, 256))
    rng = np.random.default_rng(seed)
    found = shared @ rng.normal(size=(256, width)) + 8 * rng.normal(size=(_T, width))
    return found.astype(np.float32)[None]


def main() -> None:
    """Times the dense and the masked carrying, and the products alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/fusion.json"))
    said = parser.parse_args()
    ids = np.arange(_T)
    target = Activations({"attn_in": rows(_N, seed=1), "q_out": rows(_N, seed=2)}, ids)
    source = Activations({"attn_in": rows(_M, seed=3), "q_out": rows(_M, seed=4)}, ids)
    spec = MergeSpec(weights=("q",))
    coupling = couplings.couple(target, source, HParams(1.0, 0.05), spec=spec)
    kernel = jax.random.normal(jax.random.key(0), (1, _M, _M))
    kept = {"q_out": np.arange(_K)[None] * (_N // _K)}

    def carry(selected: dict[str, Any]) -> Any:
        kinds = [projections.ProjectionWeights("q_out", kernels=kernel)]
        return projections.transport_projections(
            kinds, coupling, target, source, in_site="attn_in", spec=spec, selected=selected
        )[0][0]

    def product(count: int) -> float:
        into, out = jnp.ones((_N, _M)), jnp.ones((count, _M))
        triple = jax.jit(projections.apply_maps)
        return benchmarking.seconds(lambda: triple(kernel[0], into, out))

    rate = benchmarking.matmul_rate()
    plans, dense_product = 2 * (2 * _N * _M * _T), 2 * (_N * _M * _M + _N * _M * _N)
    dense, masked = (benchmarking.seconds(lambda chosen=one: carry(chosen)) for one in ({}, kept))
    alone, alone_masked = product(_N), product(_K)
    benchmarking.keep(
        said.out,
        {
            "machine": benchmarking.machine(),
            "shape": {"target": _N, "source": _M, "rows": _T, "kept": _K},
            "matmul_flops": rate,
            "dense_seconds": dense,
            "dense_share_of_matmul_rate": (plans + dense_product) / dense / rate,
            "product_share_of_matmul_rate": dense_product / alone / rate,
            "masked_seconds": masked,
            "masked_over_dense": masked / dense,
            "masked_over_dense_product_alone": alone_masked / alone,
        },
    )


if __name__ == "__main__":
    main()

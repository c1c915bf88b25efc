"""A rehearsal of transport and fusion at the true shapes of two real models, with random weights.

Activations are random and correlated, 2000 rows. Without ``--whole`` a fraction of the layer pairs
runs and the rest is extrapolated, which the result says.

    python scripts/bench_merge.py --shape llama-1b-8b --out benchmarks/merge.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import benchmarking
import jax
import jax.numpy as jnp
import numpy as np

from ot_merge_jax import fuse
from ot_merge_jax.config import ModelConfig, Rope
from ot_merge_jax.io import checkpoint
from ot_merge_jax.recipe import PRESETS
from ot_merge_jax.spaces import PROJECTIONS, site_width, sites_of
from ot_merge_jax.transport import coupling as couplings
from ot_merge_jax.transport import operator
from ot_merge_jax.types import Activations, HParams, MergeSpec

_ROPE = Rope(5e5)
_SHAPES = {
    "llama-1b-8b": (
        ModelConfig("llama", 128256, 2048, 8192, 16, 32, 8, 64, 131072, 1e-5, _ROPE, True, False,
                    "bfloat16"),
        ModelConfig("llama", 128256, 4096, 14336, 32, 32, 8, 128, 131072, 1e-5, _ROPE, False, False,
                    "bfloat16"),
    ),
}  # fmt: skip
_T = 2000


def rows(cfg: ModelConfig, sites: tuple[str, ...], layers: int, *, seed: int) -> Activations:
    """Correlated activations of some layers of a model."""
    shared = np.random.default_rng(0).normal(size=(_T, 256)).astype(np.float32)
    rng = np.random.default_rng(seed)
    values = {}
    for site in sites:
        width = site_width(site, cfg)
        values[site] = np.stack([
            shared @ rng.normal(size=(256, width)).astype(np.float32)
            + 8 * rng.standard_normal((_T, width), np.float32)
            for _ in range(layers)
        ])  # fmt: skip
    return Activations(values, np.arange(_T))  # pyright: ignore[reportArgumentType]


def rehearse(shape: str, preset: str, layers: tuple[int, int]) -> dict[str, Any]:
    """Couples and carries what a preset moves, for some target and source layers."""
    target, source = _SHAPES[shape]
    chosen = PRESETS[preset]
    weights = tuple(name for name in chosen["weights"] if name in PROJECTIONS)
    k = None if chosen["k"] == "all" else chosen["k"]
    spec = MergeSpec(
        weights=weights, form=chosen["form"], rule=chosen["rule"], layers=chosen["layers"],
        layer_cost=chosen["layer_cost"], k=k, max_iterations=chosen["max_iterations"],
    )  # fmt: skip
    sites = sites_of(weights)
    ours = rows(target, sites, layers[0], seed=1)
    theirs = rows(source, sites, layers[1], seed=2)
    start = time.perf_counter()
    coupling = couplings.couple(ours, theirs, HParams(1.0, chosen["epsilon"]), spec=spec)
    jax.block_until_ready(coupling)
    coupled = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        checkpoint.save_coupling(Path(place) / "coupling", coupling)
        wrote = time.perf_counter() - start
        size = sum(one.stat().st_size for one in Path(place).rglob("*") if one.is_file())
    start, carried = time.perf_counter(), 0
    selected = fuse.selected(ours, spec=spec)
    for in_site in dict.fromkeys(PROJECTIONS[name].in_site for name in weights):
        kinds = []
        for name in weights:
            if PROJECTIONS[name].in_site == in_site:
                out = PROJECTIONS[name].out_site
                widths = site_width(in_site, source), site_width(out, source)
                kinds.append(operator.Kind(out, kernels=_Random(widths)))
        moved = operator.carry(
            kinds, coupling, ours, theirs, in_site=in_site, spec=spec, selected=selected
        )
        carried += sum(int(np.asarray(one[0]).nbytes) for one in moved)
    fused = time.perf_counter() - start
    every = target.num_layers * source.num_layers / (layers[0] * layers[1])
    # a target layer takes one source layer with top1, all of them otherwise
    again = target.num_layers / layers[0] if spec.layers == "top1" else every
    first = coupling.feature[sites[0]]
    return {
        "layers_run": layers,
        "share_of_pairs_run": 1 / every,
        "sites": sites,
        "couple_seconds": coupled,
        "fuse_seconds": fused,
        "write_coupling_seconds": wrote,
        "coupling_bytes": size,
        "extrapolated": {
            "couple_seconds": coupled * every,
            "fuse_seconds": fused * again,
            "coupling_bytes": _coupling_bytes(target, source, sites),
        },
        "iterations": np.asarray(first.iterations).tolist(),
        "peak_gib": benchmarking.peak_bytes() / 2**30,
    }


def _coupling_bytes(target: ModelConfig, source: ModelConfig, sites: tuple[str, ...]) -> int:
    """Bytes of the potentials of all pairs and the standard deviations, without compression."""
    pairs, total = target.num_layers * source.num_layers, 0
    for site in sites:
        n, m = site_width(site, target), site_width(site, source)
        total += pairs * (n + m) + target.num_layers * n + source.num_layers * m
    return 4 * total


class _Random:
    """Random kernels of a source, one layer made at a time, as they are streamed from files."""

    def __init__(self, shape: tuple[int, int]):
        self._shape = shape

    def __getitem__(self, m: int) -> jax.Array:
        return jax.random.normal(jax.random.key(m), self._shape, jnp.bfloat16)


def main() -> None:
    """Rehearses both presets, each in a process of its own, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(_SHAPES), default="llama-1b-8b")
    parser.add_argument("--whole", action="store_true", help="all layer pairs")
    parser.add_argument("--layers", type=int, nargs=2, default=(1, 2), metavar=("L", "M"))
    parser.add_argument("--preset", choices=("paper", "delta"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/merge.json"))
    said = parser.parse_args()
    target, source = _SHAPES[said.shape]
    layers = (target.num_layers, source.num_layers) if said.whole else tuple(said.layers)
    if said.preset:
        json.dump(rehearse(said.shape, said.preset, layers), sys.stdout)
        return
    found: dict[str, Any] = {"machine": benchmarking.machine("ott-jax"), "shape": said.shape}
    for preset in ("paper", "delta"):
        words = [sys.executable, __file__, "--shape", said.shape, "--preset", preset]
        words += ["--layers", *map(str, layers)]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        found[preset] = json.loads(done.stdout)
    benchmarking.keep(said.out, found)


if __name__ == "__main__":
    main()

"""A rehearsal of transport and fusion at the true shapes of two real models, with random weights.

Activations are random and correlated, 2000 rows; weights are drawn when they are asked for, where
a run reads them from files. Without ``--whole`` a fraction of the layer pairs
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
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import benchmarking
import jax
import jax.numpy as jnp
import numpy as np

from ot_merge_jax.io import arrays
from ot_merge_jax.merging import fuse, masks, projections
from ot_merge_jax.models import specs
from ot_merge_jax.models.config import ModelConfig, Rope
from ot_merge_jax.models.sites import PROJECTIONS, site_width, sites_of
from ot_merge_jax.recipes.presets import PRESETS
from ot_merge_jax.transport import coupling as couplings
from ot_merge_jax.types import Activations, Coupling, HParams, MergeSpec

T = TypeVar("T")
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
    selected = masks.selected_neurons(ours, spec=spec)
    mask = masks.masks_of(ours, spec=spec)

    def couple() -> Coupling:
        return couplings.couple(ours, theirs, HParams(1.0, chosen["epsilon"]), spec=spec)

    def carry() -> dict[str, jax.Array]:
        moved = {}
        for in_site in dict.fromkeys(PROJECTIONS[name].in_site for name in weights):
            names = [name for name in weights if PROJECTIONS[name].in_site == in_site]
            kinds = [
                projections.ProjectionWeights(
                    out, kernels=_Random((site_width(in_site, source), site_width(out, source)))
                )
                for out in (PROJECTIONS[name].out_site for name in names)
            ]
            found = projections.transport_projections(
                kinds, coupling, ours, theirs, in_site=in_site, spec=spec, selected=selected
            )
            moved |= {name: kernel for name, (kernel, _) in zip(names, found, strict=True)}
        return moved

    coupling, coupled = timed(couple)
    moved, carried = timed(carry)
    leaves = {f"{PROJECTIONS[name].path}/kernel": kernel for name, kernel in moved.items()}
    params = specs.unflatten({
        path: jax.random.normal(jax.random.key(0), leaf.shape) for path, leaf in leaves.items()
    })  # fmt: skip
    fused = timed(lambda: fuse.fuse(params, leaves, 0.5, spec=spec, mask=mask))[1]
    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        arrays.save_coupling(Path(place) / "coupling", coupling)
        wrote = time.perf_counter() - start
        size = sum(one.stat().st_size for one in Path(place).rglob("*") if one.is_file())
    every = target.num_layers * source.num_layers / (layers[0] * layers[1])
    # a target layer takes one source layer with top1, all of them otherwise
    deeper = target.num_layers / layers[0]
    again = deeper if spec.layers == "top1" else every
    cost_flops = (
        layers[0]
        * layers[1]
        * sum(2 * _T * site_width(site, target) * site_width(site, source) for site in sites)
    )
    return {
        "layers_run": layers,
        "share_of_pairs_run": 1 / every,
        "sites": sites,
        # the first call compiles, which a whole merge does once and not for each pair
        "couple_seconds": coupled,
        "costs_alone_at_matmul_rate_seconds": cost_flops / benchmarking.matmul_rate(),
        "carry_seconds": carried,
        "fuse_seconds": fused,
        "write_coupling_seconds": wrote,
        "coupling_bytes": size,
        "extrapolated": {
            "couple_seconds": coupled["compiling"] + coupled["warm"] * every,
            "carry_seconds": carried["compiling"] + carried["warm"] * again,
            "fuse_seconds": fused["compiling"] + fused["warm"] * deeper,
            "coupling_bytes": _coupling_bytes(target, source, sites),
            "fused_bytes": sum(2 * leaf.size for leaf in leaves.values()) * deeper,
        },
        "iterations": {
            site: np.asarray(one.iterations).tolist()
            for site, one in coupling.neuron_potentials.items()
        },
        "peak_gib": benchmarking.peak_bytes() / 2**30,
    }


def timed(function: Callable[[], T]) -> tuple[T, dict[str, float]]:
    """What a function returns, seconds of its second call, and what the first one took more."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        found = jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return found, {"warm": seconds[1], "compiling": max(0.0, seconds[0] - seconds[1])}


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

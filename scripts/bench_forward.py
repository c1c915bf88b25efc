"""Measures `gather`: speed against torch with hooks, compile time by depth, memory by mode.

Speed: the same Llama, batches, rows and sites, float32, both runtimes in one process and in turns,
so that a noisy machine is noisy for both; the median of the rounds counts. Compile time: one step
for each depth. Memory: a process of its own for each mode, by the largest resident set.

    python scripts/bench_forward.py --out benchmarks/forward.json
"""

from __future__ import annotations

import argparse
import json
import statistics
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
import random_checkpoint

from ot_merge_jax.io import hf
from ot_merge_jax.io.lazy import open_lazy
from ot_merge_jax.models import gather as activations
from ot_merge_jax.models.sites import SITES
from ot_merge_jax.types import Batch

_SHAPE = {"hidden": 512, "heads": 8, "kv_heads": 4, "intermediate": 1536, "vocabulary": 4096}
_BIG = {"hidden": 2048, "heads": 16, "kv_heads": 8, "intermediate": 5632, "vocabulary": 16384}
_ROUNDS, _BATCHES, _SIZE, _LENGTH, _ROWS = 7, 4, 16, 128, 16
#: Site -> (module below a layer, whether its input is meant).
_HOOKS = {
    "attn_in": ("self_attn.q_proj", True), "q_out": ("self_attn.q_proj", False),
    "k_out": ("self_attn.k_proj", False), "v_out": ("self_attn.v_proj", False),
    "o_in": ("self_attn.o_proj", True), "o_out": ("self_attn.o_proj", False),
    "mlp_in": ("mlp.gate_proj", True), "gate_out": ("mlp.gate_proj", False),
    "up_out": ("mlp.up_proj", False), "down_in": ("mlp.down_proj", True),
    "down_out": ("mlp.down_proj", False),
}  # fmt: skip


def batches(vocabulary: int) -> list[Batch]:
    """Full batches, with rows at random positions."""
    rng = np.random.default_rng(0)
    made = []
    for index in range(_BATCHES):
        tokens = rng.integers(1, vocabulary, (_SIZE, _LENGTH)).astype(np.int32)
        shuffled = rng.permuted(np.tile(np.arange(_LENGTH), (_SIZE, 1)), axis=1)
        positions = np.sort(shuffled[:, :_ROWS], 1)
        rows = np.arange(_SIZE * _ROWS).reshape(_SIZE, _ROWS) + index * _SIZE * _ROWS
        ones = np.ones_like(tokens, bool)
        made.append(Batch(tokens, ones, positions.astype(np.int32), rows.astype(np.int32)))  # pyright: ignore
    return made


class Hooked:
    """The straightforward way: transformers in torch, a forward hook at every site."""

    def __init__(self, folder: Path):
        """Loads the model in float32, eager."""
        import torch
        import transformers

        self.torch = torch
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ).model.eval()
        self.found: dict[tuple[str, int], Any] = {}
        self.positions = None
        for l, layer in enumerate(self.model.layers):
            for site, (name, is_input) in _HOOKS.items():
                module = layer.get_submodule(name)
                if is_input:
                    module.register_forward_pre_hook(
                        lambda _, args, key=(site, l): self._keep(key, args[0])
                    )
                else:
                    module.register_forward_hook(
                        lambda _, __, out, key=(site, l): self._keep(key, out)
                    )

    def _keep(self, key: tuple[str, int], value: Any) -> None:
        index = self.positions[..., None].expand(-1, -1, value.shape[-1])
        self.found[key] = value.gather(1, index)

    def gather(self, parts: list[Batch]) -> dict[str, np.ndarray]:
        """The rows of all sites, ``[layers, rows, d]`` on the host."""
        rows: dict[tuple[str, int], list[np.ndarray]] = {}
        with self.torch.inference_mode():
            for batch in parts:
                self.positions = self.torch.from_numpy(np.asarray(batch.row_position)).long()
                tokens = self.torch.from_numpy(np.asarray(batch.tokens)).long()
                self.model(input_ids=tokens, use_cache=False)
                for key, value in self.found.items():
                    rows.setdefault(key, []).append(value.flatten(0, 1).numpy())
        depth = len(self.model.layers)
        return {
            site: np.stack([np.concatenate(rows[site, l]) for l in range(depth)]) for site in _HOOKS
        }


def speed(folder: Path) -> dict[str, Any]:
    """Tokens per second of both, and how far apart the activations are."""
    cfg, params = hf.load_hf(folder, dtype=jnp.float32)
    parts = batches(cfg.vocab_size)
    theirs = Hooked(folder)
    found = theirs.gather(parts)  # warm, and compared
    ours = activations.gather(params, parts, cfg=cfg, sites=SITES)
    apart = max(
        float(np.abs(ours.values[site] - found[site]).max() / np.abs(found[site]).max())
        for site in SITES
    )
    seconds: dict[str, list[float]] = {"ours": [], "torch": []}
    for _ in range(_ROUNDS):
        for name, run in (
            ("ours", lambda: activations.gather(params, parts, cfg=cfg, sites=SITES)),
            ("torch", lambda: theirs.gather(parts)),
        ):
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    tokens = sum(np.asarray(batch.tokens).size for batch in parts)
    rate = {name: tokens / statistics.median(one) for name, one in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["torch"], strict=True)]
    return {
        "tokens": tokens,
        "tokens_per_second": rate,
        "ours_over_torch": {"median": statistics.median(ratios), "rounds": sorted(ratios)},
        "largest_difference": apart,
    }


def compile_seconds(depths: list[int], place: Path) -> dict[int, float]:
    """Seconds to compile one step of `gather`, by the number of layers."""
    found = {}
    for layers in depths:
        folder = place / f"depth-{layers}"
        random_checkpoint.write(folder, random_checkpoint.config(layers=layers, **_SHAPE), seed=0)
        cfg, params = hf.load_hf(folder, dtype=jnp.float32)
        batch = jax.tree.map(jnp.asarray, batches(cfg.vocab_size)[0])
        jax.clear_caches()
        start = time.perf_counter()
        activations._step.lower(params, batch, cfg=cfg, sites=frozenset(SITES)).compile()
        found[layers] = time.perf_counter() - start
    return found


def peak_of(mode: str, folder: Path) -> None:
    """What the child process of a memory measurement does."""
    read = hf.load_hf if mode == "whole" else open_lazy
    cfg, params = read(folder, dtype=jnp.float32)
    parts = batches(cfg.vocab_size)[:1]
    start = time.perf_counter()
    found = activations.gather(params, parts, cfg=cfg, sites=("mlp_in", "down_out"))
    json.dump(
        {
            "peak_bytes": benchmarking.peak_bytes(),
            "seconds": time.perf_counter() - start,
            "sum": float(sum(np.abs(one).sum() for one in found.values.values())),
        },
        sys.stdout,
    )


def memory(place: Path) -> dict[str, Any]:
    """Largest resident set of gathering with the whole model and layer by layer."""
    folder = place / "big"
    count = random_checkpoint.write(folder, random_checkpoint.config(layers=16, **_BIG), seed=0)
    found: dict[str, Any] = {"parameters": count}
    for mode in ("whole", "by_layer"):
        done = subprocess.run(
            [sys.executable, __file__, "--peak-of", mode, str(folder)],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        found[mode] = json.loads(done.stdout)
    return found


def main() -> None:
    """Runs all three and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/forward.json"))
    parser.add_argument("--peak-of", nargs=2, metavar=("MODE", "FOLDER"), help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.peak_of:
        peak_of(said.peak_of[0], Path(said.peak_of[1]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        folder = place / "speed"
        random_checkpoint.write(folder, random_checkpoint.config(layers=8, **_SHAPE), seed=0)
        found = {
            "machine": benchmarking.machine("flax", "torch", "transformers"),
            "speed": speed(folder),
            "compile_seconds_by_layers": compile_seconds([2, 8, 32], place),
            "memory": memory(place),
        }
    benchmarking.keep(said.out, found)


if __name__ == "__main__":
    main()

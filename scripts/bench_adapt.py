"""Tokens per second of a training step: ours, and the same model in torch, eager and compiled.

The same Llama, blocks and AdamW in float32 on the same CPU, in one process and in turns, so that a
noisy machine is noisy for all; the median of the rounds counts. The first loss of each is compared.

    python scripts/bench_adapt.py --out benchmarks/adapt.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmarking
import jax
import jax.numpy as jnp
import numpy as np
import random_checkpoint

from ot_merge_jax.io import hf
from ot_merge_jax.recipes.training import resolve
from ot_merge_jax.training import packing
from ot_merge_jax.training import step as train_step
from ot_merge_jax.training.losses import Objective

_SHAPE = {"hidden": 512, "heads": 8, "kv_heads": 4, "intermediate": 1536, "vocabulary": 4096}
_ROUNDS, _BATCH, _LENGTH, _RATE, _CLIP = 5, 8, 128, 1e-4, 1.0


def blocks(vocabulary: int) -> packing.Blocks:
    """Random blocks, all of which counts."""
    tokens = np.random.default_rng(0).integers(1, vocabulary, (_BATCH, _LENGTH)).astype(np.int32)
    return packing.Blocks(tokens, np.ones_like(tokens, bool), np.ones_like(tokens, bool))


def ours(folder: Path, cut: packing.Blocks, *, remat: bool) -> Callable[[], float]:
    """One step at a time of `ot-merge adapt`; returns the loss."""
    cfg, params = hf.load_hf(folder, dtype=jnp.float32)
    said = {"model": "m", "text": {"path": "t"}, "steps": 1000, "learning_rate": _RATE,
            "batch_size": _BATCH, "dtype": "float32", "clip": _CLIP}  # fmt: skip
    problem = train_step.Problem(resolve(said), Objective("sft", cfg, remat=remat), cut, cut)
    trainable, frozen = train_step.begin(problem, params, {}, {})
    config, held = (
        train_step.step_config(problem),
        [train_step.new_history(problem, trainable).state],
    )
    batch = jax.tree.map(jnp.asarray, packing.batch_at(cut, 0, batch_size=_BATCH, seed=0))
    step = jax.jit(train_step.step, static_argnames="config", donate_argnums=0)

    def run() -> float:
        held[0], seen = step(held[0], frozen, batch, config=config)
        return float(seen.loss)

    return run


def theirs(folder: Path, cut: packing.Blocks, *, is_compiled: bool) -> Callable[[], float]:
    """The same in torch and transformers."""
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).train()
    adamw = torch.optim.AdamW(model.parameters(), lr=_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    given = torch.tensor(cut.tokens, dtype=torch.long)

    def loss_of() -> Any:
        logits = model(input_ids=given, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), given[:, 1:].flatten())

    loss_of = torch.compile(loss_of) if is_compiled else loss_of

    def run() -> float:
        adamw.zero_grad()
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        adamw.step()
        return loss.item()

    return run


def measure(folder: Path) -> dict[str, Any]:
    """Tokens per second of all, in turns."""
    cut = blocks(_SHAPE["vocabulary"])
    ways: dict[str, Callable[[], float]] = {
        "ours": ours(folder, cut, remat=False),
        "ours_remat": ours(folder, cut, remat=True),
        "torch": theirs(folder, cut, is_compiled=False),
        "torch_compiled": theirs(folder, cut, is_compiled=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    first, compiling = {}, {}
    for name, run in ways.items():
        start = time.perf_counter()
        first[name] = run()  # the same start for all
        compiling[name] = time.perf_counter() - start
        run()
    for _ in range(_ROUNDS):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    rate = {name: _BATCH * _LENGTH / statistics.median(one) for name, one in seconds.items()}
    return {
        "tokens_per_step": _BATCH * _LENGTH,
        "tokens_per_second": rate,
        "ours_over": {name: ratios(seconds, name) for name in ways if name != "ours"},
        "seconds": seconds,
        "first_step_seconds": compiling,
        "first_loss": first,
    }


def ratios(seconds: dict[str, list[float]], other: str) -> dict[str, Any]:
    """How many times as fast as another ours was, round by round."""
    found = [b / a for a, b in zip(seconds["ours"], seconds[other], strict=True)]
    return {"median": statistics.median(found), "rounds": sorted(found)}


def main() -> None:
    """Measures, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/adapt.json"))
    parser.add_argument("--beside", default="nothing", help="what else the machine did meanwhile")
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        random_checkpoint.write(folder, random_checkpoint.config(layers=4, **_SHAPE), seed=0)
        found = {
            "machine": benchmarking.machine("optax", "torch", "transformers"),
            "beside": said.beside,
            "step": measure(folder),
        }
    benchmarking.keep(said.out, found)


if __name__ == "__main__":
    main()

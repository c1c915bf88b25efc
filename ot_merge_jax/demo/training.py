"""The demo's training: a merge against its target, taught and tuned with the same budget."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ot_merge_jax.demo import assets
from ot_merge_jax.demo import merge as demo
from ot_merge_jax.io import atomic
from ot_merge_jax.recipes import loading, training
from ot_merge_jax.runs import baselines
from ot_merge_jax.runs import merge as merge_run
from ot_merge_jax.runs.adapt import AdaptResult

#: Settings of all arms: three seeds of them take a few minutes on two CPU cores.
BUDGET = {"steps": 48, "batch_size": 4, "seq_len": 128, "eval_every": 16}
#: Learning rates that every arm tries with the first seed.
RATES = [3e-4, 1e-3, 3e-3]
SEEDS = 3


class TrainedDemo(NamedTuple):
    """The merge, and the result of its training."""

    merge: merge_run.RunResult
    adapted: AdaptResult


def run(out: Path, *, seed: int = 0, overwrite: bool = False, offline: bool = False) -> TrainedDemo:
    """Merges into the sibling, then trains the merge and the sibling on the calibration texts.

    Both learn the next token, and from the source as a teacher; the demo's held-out text is only
    reported.

    Args:
        out: Folder that will hold ``delta`` and ``delta-adapted``, two model folders.
        seed: Seed of every random choice, and the first seed of the training.
        overwrite: Whether existing output folders are replaced.
        offline: Whether the network is forbidden; the demo never uses it.

    Returns:
        Both results.
    """
    merged, adapted = out / "delta", out / "delta-adapted"
    for folder in (merged, adapted):
        atomic.check_output(folder, overwrite=overwrite)
    recipe = demo.settings(seed=seed)["delta"]
    command = "ot-merge demo --adapt"
    merge = merge_run.run(
        loading.resolve(recipe, where="the demo"), merged,
        command=command, overwrite=overwrite, offline=offline, keep=False,
    )  # fmt: skip
    settings = training.resolve({
        "model": str(merged), "target": recipe["target"], "source": recipe["source"],
        "text": {"path": str(assets.path("calibration.jsonl"))},
        "evaluation": {"path": recipe["evaluation"]},
        "baselines": ["base"], "rates": RATES, "seeds": SEEDS, "seed": seed, **BUDGET,
    }, where="the demo")  # fmt: skip
    adapting = baselines.compare(
        settings, adapted, command=command, overwrite=overwrite, offline=offline, keep=False
    )
    return TrainedDemo(merge, adapting)

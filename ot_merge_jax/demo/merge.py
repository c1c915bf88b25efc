"""The demo: the real pipeline on the small trained models that ship with the package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ot_merge_jax.demo import assets
from ot_merge_jax.evaluation import nll
from ot_merge_jax.io import atomic
from ot_merge_jax.recipes import loading
from ot_merge_jax.reports.numbers import number
from ot_merge_jax.reports.schema import Difference
from ot_merge_jax.runs import merge as merge_run

_LABELS = {
    "delta": "delta, sibling",
    "delta-stranger": "delta, stranger",
    "paper": "paper, stranger",
}


def run(
    out: Path,
    *,
    is_full: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    offline: bool = False,
) -> dict[str, merge_run.RunResult]:
    """Runs the merges of the demo.

    ``delta`` moves what a source learned on a domain into a smaller sibling; ``delta-stranger``
    tries the same with a target of another family and tokenizer (the stranger). ``paper`` applies
    the published formula to the stranger, where nothing moves.

    Args:
        out: Folder that will hold ``delta``, ``delta-stranger`` and ``paper``, three model folders.
        is_full: Whether three calibration seeds and all controls are run (method: Controls).
        seed: Seed of every random choice.
        overwrite: Whether existing output folders are replaced.
        offline: Whether the network is forbidden; the demo never uses it.

    Returns:
        The results by name.
    """
    recipes = settings(is_full=is_full, seed=seed)
    for name in recipes:
        atomic.check_output(out / name, overwrite=overwrite)
    results: dict[str, merge_run.RunResult] = {}
    scores: dict[str, nll.Scores] = {}  # folder -> scores, so that no model is scored twice
    for name, own in recipes.items():
        resolved = loading.resolve(own, where="the demo")
        folders = {"target": resolved.target, "source": resolved.source}
        results[name] = merge_run.run(
            resolved,
            out / name,
            command=f"ot-merge demo{' --full' * is_full}",
            overwrite=overwrite,
            offline=offline,
            keep=False,  # not to be resumed: the demo takes a minute and has no flag for it
            known={role: scores[path] for role, path in folders.items() if path in scores},
        )
        scores |= {path: results[name].scores[role] for role, path in folders.items()}
    return results


def settings(*, is_full: bool = False, seed: int = 0) -> dict[str, dict[str, Any]]:
    """The merges of the demo, name -> what `loading.resolve` takes.

    Args:
        is_full: Whether three calibration seeds and all controls are run.
        seed: Seed of every random choice.
    """
    text = {name: str(assets.path(f"{name}.jsonl")) for name in ("calibration", "heldout")}
    shared = {
        "source": str(assets.path("source")),
        # a tenth of the time of the defaults: few documents, in batches of one shape, and plans
        # that stop earlier; of the 64, 16 go to the dev split, which makes one batch
        "calibration": {"path": text["calibration"], "samples": 64},
        "max_rows": 2048,
        "threshold": 1e-4,
        "max_length": 128,
        "evaluation": text["heldout"],
        "controls": "all" if is_full else "none",
        "seeds": 3 if is_full else 1,
        "continuations": 3 if is_full else 0,
        "seed": seed,
    }
    delta = {"preset": "delta", "source_base": str(assets.path("source-base"))}
    recipes = {
        "delta": {**delta, "target": str(assets.path("sibling"))},
        "delta-stranger": {**delta, "target": str(assets.path("stranger"))},
        "paper": {"preset": "paper", "target": str(assets.path("stranger"))},
    }
    return {name: {**shared, **own} for name, own in recipes.items()}


def table(results: Mapping[str, merge_run.RunResult]) -> Table:
    """One table of all merges: held-out loss before and after, and what moved."""
    result_table = Table(
        title="Held-out text of the domain, nats per token",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    result_table.add_column("merge")
    for name in ("target", "merged", "change", "95 % interval", "source", "|W~|/|W|"):
        result_table.add_column(name, justify="right", no_wrap=True)
    for name, result in results.items():
        target, merge, source = (
            result.report.evaluation[role] for role in ("target", "merge", "source")
        )
        change = merge.against_target or Difference()
        ratios = [
            ratio
            for weight in result.report.weights.values()
            for ratio in weight.ratio_transported
            if ratio is not None
        ]
        result_table.add_row(
            _LABELS[name],
            number(target.nll_per_token, ".3f"),
            number(merge.nll_per_token, ".3f"),
            number(change.difference, "+.3f"),
            f"{number(change.low, '+.3f')} {number(change.high, '+.3f')}",
            # with other tokens the loss per token of the source is not comparable
            "" if source.has_own_tokens else number(source.nll_per_token, ".3f"),
            number(max(ratios, default=None), ".0e"),
        )
    return result_table

"""The same facts as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ot_merge_jax.redaction import visible
from ot_merge_jax.types import MergeReport


def weights_table(report: MergeReport) -> Table:
    """One row for each moved weight: mean over layers of the diagnostics of SPEC section 13."""
    rows = f" ({report.rows} activation rows)" if report.rows else " (by tokens alone)"
    title = f"What moved{rows}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("weight")
    for name in ("|W~|/|W|", "|dW|/|W|", "neighbours", "error", "iterations", "source layers"):
        table.add_column(name, justify="right")
    for name, one in report.weights.items():
        numbers = f"{np.mean(one.ratio_transported):.1e}", f"{np.mean(one.ratio_change):.1e}"
        if int(np.asarray(one.source_layer)[0]) < 0:
            table.add_row(name, *numbers, "", "", "", "by token")
            continue
        table.add_row(
            name,
            *numbers,
            f"{np.mean(one.neighbours_out):.1f}, {np.mean(one.neighbours_in):.1f}",
            f"{np.max(one.error):.0e}",
            f"{int(np.max(one.iterations))}{'' if np.all(one.converged) else ' (stopped)'}",
            " ".join(map(str, np.asarray(one.source_layer))),
        )
    table.caption = (
        "means over layers, Frobenius over selected entries; neighbours: exp(entropy) of the rows "
        "of the output and the input plan; error: largest L1 marginal error"
    )
    table.caption_justify = "left"
    return table


def evaluation_table(evaluation: Mapping[str, Any], *, title: str) -> Table:
    """One row for each model: loss, bits per byte, difference from the target."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("model")
    for name in ("nats/token", "bits/byte", "minus target", "95 % interval"):
        table.add_column(name, justify="right")
    for name, one in evaluation.items():
        change = one.get("against_target")
        has_own_tokens = change is not None and change["metric"] == "bits_per_byte"
        unit = " bits/byte" if has_own_tokens else ""
        table.add_row(
            Text(name),
            "other tokens" if has_own_tokens else f"{one['nll_per_token']:.4f}",
            f"{one['bits_per_byte']:.4f}",
            "" if change is None else f"{change['difference']:+.4f}{unit}",
            ""
            if change is None
            else f"[{change['low']:+.4f}, {change['high']:+.4f}]".replace("[", "\\["),
        )
    return table


def controls_table(report: Mapping[str, Any]) -> Table:
    """One row for each control: the merge must be better than every one that applies."""
    seeds = len(report["seeds"])
    title = f"Controls ({seeds} calibration seed{'s' * (seeds > 1)})"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("control")
    for name in ("nats/token", "minus target", "merge minus control, 95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    notes = []
    for name, one in report["controls"].items():
        if name in ("target", "source"):
            continue  # they stand among the models
        if "not_applicable" in one:
            table.add_row(name, "", "", "not applicable")
            notes.append(f"{name}: {one['not_applicable']}")
            continue
        change = one.get("merge_minus_control") or one["beyond"]
        table.add_row(
            name if name != "unigram" else "unigram (*)",
            f"{one['nll_per_token']:.4f}",
            f"{one['against_target']['difference']:+.4f}",
            f"{change['difference']:+.4f} \\[{change['low']:+.4f}, {change['high']:+.4f}]",
        )
        if name == "unigram":
            notes.append("(*) compared with a bias per token fitted to each of the two")
    table.caption, table.caption_justify = "\n".join(notes), "left"
    return table


def baselines_table(found: Mapping[str, Any]) -> Table:
    """One row for each trained start: what it ends with, and the merge minus it.

    Args:
        found: ``baselines`` of a report.
    """
    seeds = len(found["seeds"])
    title = f"Trained by {found['steps']} steps ({seeds} seed{'s' * (seeds > 1)}), held-out text"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("start", no_wrap=True)
    for name in ("rate", "nats/token", "merge minus it, 95 %", "steps (*)"):
        table.add_column(name, justify="right", no_wrap=True)
    for objective, arms in found["arms"].items():
        for name, one in arms.items():
            change = one["merge_minus"]
            amount = "" if change is None else (
                f"{change['difference']:+.4f} \\[{change['low']:+.4f}, {change['high']:+.4f}]"
            )  # fmt: skip
            steps = "never" if one["merge_steps"] is None else str(one["merge_steps"])
            loss = f"{one['nll_per_token']:.4f}"
            table.add_row(f"{objective} from {name}", f"{one['rate']:g}", loss, amount,
                          "" if change is None else steps)  # fmt: skip
        for name in found["not_applicable"]:
            table.add_row(f"{objective} from {name}", "", "", "not applicable", "")
    table.caption = "(*) until the merge's dev loss is at or below this one's last"
    table.caption_justify = "left"
    return table


def samples(found: Sequence[Mapping[str, Any]]) -> Group:
    """Prompts, and below each what every model wrote, as `evaluate.samples.facts` has them."""
    blocks = []
    for number, one in enumerate(found, 1):
        blocks += [Text(), Text(f"{number}. {visible(one['prompt'])}", overflow="fold")]
        for model, continuation in one["continuations"].items():
            end = " [end of text]" if continuation["ended"] else ""
            name = Text(visible(model), style="bold", overflow="fold")
            text = Text(visible(continuation["text"]) + end, overflow="fold")
            blocks += [Padding(name, (0, 0, 0, 3)), Padding(text, (0, 0, 0, 6))]
    return Group(*blocks)

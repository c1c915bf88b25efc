"""The numbers of a report as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ot_merge_jax.io.redaction import visible
from ot_merge_jax.reports.numbers import interval, number
from ot_merge_jax.reports.schema import Baselines, Difference, Entry, Report
from ot_merge_jax.types import MergeReport


def weights_table(report: MergeReport) -> Table:
    """One row for each moved weight: mean over layers of the diagnostics of method: Diagnostics."""
    rows = f" ({report.rows} activation rows)" if report.rows else " (by tokens alone)"
    title = f"What moved{rows}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("weight")
    for name in ("|W~|/|W|", "|dW|/|W|", "neighbours", "error", "iterations", "source layers"):
        table.add_column(name, justify="right")
    for name, weight in report.weights.items():
        numbers = f"{np.mean(weight.ratio_transported):.1e}", f"{np.mean(weight.ratio_change):.1e}"
        if int(np.asarray(weight.source_layer)[0]) < 0:
            table.add_row(name, *numbers, "", "", "", "by token")
            continue
        table.add_row(
            name,
            *numbers,
            f"{np.mean(weight.neighbours_out):.1f}, {np.mean(weight.neighbours_in):.1f}",
            f"{np.max(weight.error):.0e}",
            f"{int(np.max(weight.iterations))}{'' if np.all(weight.converged) else ' (stopped)'}",
            " ".join(map(str, np.asarray(weight.source_layer))),
        )
    table.caption = (
        "means over layers, Frobenius over selected entries; neighbours: exp(entropy) of the rows "
        "of the output and the input plan; error: largest L1 marginal error"
    )
    table.caption_justify = "left"
    return table


def evaluation_table(evaluation: Mapping[str, Entry], *, title: str) -> Table:
    """One row for each model: loss, bits per byte, difference from the target."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("model")
    for name in ("nats/token", "bits/byte", "minus target", "95 % interval"):
        table.add_column(name, justify="right")
    for name, entry in evaluation.items():
        change = entry.against_target
        unit = " bits/byte" if entry.has_own_tokens else ""
        table.add_row(
            Text(name),
            "other tokens" if entry.has_own_tokens else number(entry.nll_per_token),
            number(entry.bits_per_byte),
            "" if change is None else f"{number(change.difference, '+.4f')}{unit}",
            Text("" if change is None else interval(change)),
        )
    return table


def controls_table(report: Report) -> Table:
    """One row for each control: the merge must be better than every one that applies."""
    seeds = len(report.seeds)
    title = f"Controls ({seeds} calibration seed{'s' * (seeds > 1)})"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("control")
    for name in ("nats/token", "minus target", "merge minus control, 95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    notes = []
    for name, entry in report.controls.items():
        if name in ("target", "source"):
            continue  # they stand among the models
        if entry.not_applicable is not None:
            table.add_row(name, "", "", "not applicable")
            notes.append(f"{name}: {entry.not_applicable}")
            continue
        own = entry.against_target
        table.add_row(
            name if name != "unigram" else "unigram (*)",
            number(entry.nll_per_token),
            "" if own is None else number(own.difference, "+.4f"),
            _amount(entry.merge_minus_control or entry.beyond),
        )
        if name == "unigram":
            notes.append("(*) compared with a bias per token fitted to each of the two")
    table.caption, table.caption_justify = "\n".join(notes), "left"
    return table


def baselines_table(baselines: Baselines) -> Table:
    """One row for each trained start: what it ends with, and the merge minus it."""
    seeds = len(baselines.seeds)
    title = f"Trained by {baselines.steps} steps ({seeds} seed{'s' * (seeds > 1)}), held-out text"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("start", no_wrap=True)
    for name in ("rate", "nats/token", "merge minus it, 95 %", "steps (*)"):
        table.add_column(name, justify="right", no_wrap=True)
    for objective, arms in baselines.arms.items():
        for name, arm in arms.items():
            change = arm.merge_minus
            steps = "never" if arm.merge_steps is None else str(arm.merge_steps)
            table.add_row(f"{objective} from {name}", number(arm.rate, "g"),
                          number(arm.nll_per_token), _amount(change),
                          "" if change is None else steps)  # fmt: skip
        for name in baselines.not_applicable:
            table.add_row(f"{objective} from {name}", "", "", "not applicable", "")
    table.caption = "(*) until the merge's dev loss is at or below this one's last"
    table.caption_justify = "left"
    return table


def _amount(change: Difference | None) -> Text:
    """A difference with its interval; empty if there is none."""
    if change is None:
        return Text()
    return Text(f"{number(change.difference, '+.4f')} {interval(change)}")


def samples(rows: Sequence[Mapping[str, Any]]) -> Group:
    """Prompts with what every model wrote, from `ot_merge_jax.evaluation.samples.summary`."""
    blocks = []
    for place, sample in enumerate(rows, 1):
        blocks += [Text(), Text(f"{place}. {visible(sample['prompt'])}", overflow="fold")]
        for model, continuation in sample["continuations"].items():
            end = " [end of text]" if continuation["ended"] else ""
            name = Text(visible(model), style="bold", overflow="fold")
            text = Text(visible(continuation["text"]) + end, overflow="fold")
            blocks += [Padding(name, (0, 0, 0, 3)), Padding(text, (0, 0, 0, 6))]
    return Group(*blocks)

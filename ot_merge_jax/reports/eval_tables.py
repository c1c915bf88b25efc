"""The results of `ot-merge eval`, as tables and sentences for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

from ot_merge_jax.reports import tables

_UNITS = {"nll_per_token": "nats per token", "bits_per_byte": "bits per byte"}


def parts(results: Mapping[str, Any]) -> Iterator[RenderableType]:
    """All results, in order.

    Args:
        results: From `ot_merge_jax.evaluation.evaluate`.

    Yields:
        Tables, and plain sentences, each of which is one line.
    """
    if any(results["models"].values()):
        yield _losses(results["models"])
    if any(pair["metric"] == "bits_per_byte" for pair in results["pairs"]):
        yield (
            "Models with other tokens are compared in bits per byte alone: "
            "their nats per token count other things."
        )
    for pair in results["pairs"]:
        yield _difference(pair, _UNITS[pair["metric"]])
    for name, model in results["models"].items():
        if "kl_to_base" in model:
            low, high = model["kl_to_base_interval"]
            yield (
                f"KL of {name} from {results['base']}: {model['kl_to_base']:.4f} nats per token, "
                f"95 % interval [{low:.4f}, {high:.4f}]"
            )
    for file, questions in results.get("choices", {}).items():
        yield _accuracies(file, questions)
        yield _letters(questions)
        for pair in questions["pairs"]:
            yield _difference(pair, f"accuracy, {pair['scoring']}, {file}")
    for task, metrics in results.get("tasks", {}).items():
        yield _metrics(task, metrics)
        for pair in metrics["pairs"]:
            yield _difference(pair, f"{pair['metric']}, {task}")
    if "samples" in results:
        yield tables.samples(results["samples"])


def _difference(pair: Mapping[str, Any], unit: str) -> str:
    """A difference with its interval, and its p-value where there is one."""
    line = (
        f"{pair['a']} minus {pair['b']}: {pair['difference']:+.4f} {unit}, "
        f"95 % interval [{pair['low']:+.4f}, {pair['high']:+.4f}]"
    )
    if "p" not in pair:
        return line
    line += f", p = {pair['p']:.3g}"
    return line if pair["p"] == pair["p_holm"] else f"{line} ({pair['p_holm']:.3g} after Holm)"


def _table(title: str | None, *names: str) -> Table:
    """An empty table whose rows will be models."""
    table = Table(
        Column("model", overflow="fold"), title=title, title_justify="left", box=SIMPLE_HEAD
    )
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _losses(models: Mapping[str, Any]) -> Table:
    """Loss, bits per byte and, where it is known, the divergence from the base."""
    has_base = any("kl_to_base" in model for model in models.values())
    more = ("KL to base",) if has_base else ()
    table = _table(None, "documents", "tokens", "nats/token", "bits/byte", *more)
    for name, model in models.items():
        row = [str(model["documents"]), str(model["tokens"])]
        row += [f"{model['nll_per_token']:.4f}", f"{model['bits_per_byte']:.4f}"]
        if has_base:
            row.append(f"{model['kl_to_base']:.4f}" if "kl_to_base" in model else "")
        table.add_row(Text(name), *row)
    return table


def _add(table: Table, name: str, rows: Iterable[Sequence[RenderableType]]) -> None:
    """Rows of one model; its name stands in the first."""
    for number, row in enumerate(rows):
        table.add_row(Text("" if number else name), *row)


def _accuracies(file: str, questions: Mapping[str, Any]) -> Table:
    """Accuracy of every model in every scoring."""
    title = f"{file} ({questions['questions']} questions)"
    table = _table(title, "scoring", "accuracy", "95 % interval")
    for name, scorings in questions["models"].items():
        rows = [
            (
                scoring,
                f"{value['accuracy']:.3f}",
                Text(f"[{value['low']:.3f}, {value['high']:.3f}]"),
            )
            for scoring, value in scorings.items()
            if scoring != "letters"
        ]
        _add(table, name, rows)
    return table


def _letters(questions: Mapping[str, Any]) -> Table:
    """How often each letter was chosen; every option stood behind every letter."""
    widest = max((model["letters"]["letter"] for model in questions["models"].values()), key=len)
    table = _table("letters chosen, over all orders of the options", "scoring", *widest)
    for name, model in questions["models"].items():
        rows = [(key, *map(str, counts.values())) for key, counts in model["letters"].items()]
        _add(table, name, rows)
    return table


def _metrics(task: str, metrics: Mapping[str, Any]) -> Table:
    """The metrics of lm-eval for every model."""
    table = _table(f"{task} ({metrics['documents']} documents)", "metric", "value")
    for name, values in metrics["models"].items():
        _add(table, name, [(metric, f"{value:.4f}") for metric, value in values.items()])
    return table

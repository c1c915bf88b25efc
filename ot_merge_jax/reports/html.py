"""A run as one HTML file for people, with its plots beside it. Reads the run's folder alone.

The file needs no network and runs no script: its plots are SVG inside it, its policy forbids the
rest. Text of models, documents and names is escaped.
"""

from __future__ import annotations

import functools
import importlib.resources
import logging
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup

from ot_merge_jax.errors import InputError
from ot_merge_jax.io.redaction import visible
from ot_merge_jax.reports import run_folder
from ot_merge_jax.reports.numbers import interval, number
from ot_merge_jax.reports.run_folder import RunRecord
from ot_merge_jax.reports.schema import Difference, Entry, Report, Strength, Weight

FILE = "report.html"
PLOTS = "plots"
_TEMPLATE = "report.html.jinja"
_METRICS = {"nll_per_token": "nats per token", "bits_per_byte": "bits per byte"}
_ROLES = {
    "target": "the base, untouched", "source": "the ceiling", "merge": "the result",
    "before": "where training began", "after": "the result",
}  # fmt: skip
#: What each control changes (method: Controls).
_CONTROLS = {
    "shrink": "nothing is carried; the weights only shrink",
    "noise": "noise of the same size instead of what was carried",
    "permuted": "the same plans, source neurons shuffled",
    "wrong-layer": "the same plans, source layers shuffled",
    "wrong-source": "aligned with a source of random weights",
    "unigram": "no merge: one bias per token of the vocabulary",
}


class Row(NamedTuple):
    """A line of the table of models and controls.

    Attributes:
        name: Of the model or control.
        note: What it is, and its strength.
        entry: Its numbers.
        merge_minus: The merge minus this one.
        has_own_tokens: Whether its loss per token cannot be compared with the target's.
    """

    name: str
    note: str
    entry: Entry
    merge_minus: Difference | None
    has_own_tokens: bool


def write(details: Path, *, file: Path | None = None) -> list[Path]:
    """Writes ``report.html``, and each plot as SVG and PNG in ``plots/``, beside ``report.json``.

    Two reports of one run are the same bytes.

    Args:
        details: Holds ``report.json``, ``provenance.json`` and ``recipe.yaml``.
        file: Where the report alone goes, instead of all files into the folder.

    Returns:
        The files, the report first.

    Raises:
        InputError: if a file of the run is missing or damaged, or ``plots`` is a link.
    """
    run = run_folder.read(details)
    folder = details / PLOTS
    if file is None and (folder.is_symlink() or (folder.exists() and not folder.is_dir())):
        raise InputError(f"{folder} is a link or a file; remove it, the plots go into a folder.")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it logs caches and fonts
    from ot_merge_jax.reports import plots, style  # noqa: PLC0415, matplotlib takes a second

    drawn = plots.draw(run.report)
    page = render(run, {plot.name: plot.inline for plot in drawn}, style=style.style()).encode()
    if file is not None:
        _replace(file, page)
        return [file]
    contents = {details / FILE: page}
    for plot in drawn:
        contents[folder / f"{plot.name}.svg"] = plot.svg.encode()
        contents[folder / f"{plot.name}.png"] = plot.png
    for path, content in contents.items():
        _replace(path, content)
    return list(contents)


def render(run: RunRecord, drawn: Mapping[str, str], *, style: str) -> str:
    """The page.

    Args:
        run: The record of the run.
        drawn: Name of a plot -> SVG.
        style: CSS that the plots need.

    Returns:
        HTML.
    """
    report = run.report
    names = {role: model.name for role, model in run.provenance.inputs.items()}
    rows = _rows(report)
    return _template().render(
        title=_title(report, names),
        subject=_subject(report),
        report=report,
        made=run.provenance,
        recipe=run.recipe,
        merge=_gain(report),
        headline=_headline(report),
        rows=rows,
        documents=report.evaluation.get(_subject(report), Entry()).documents,
        has_kl=any(row.entry.kl_to_base is not None for row in rows),
        has_controls=bool(report.controls.keys() - {"target", "source"}),
        beyond=next((entry.beyond for entry in report.controls.values() if entry.beyond), None),
        chosen=_strengths(report.strength.chosen),
        tone={"improved": "better", "worse": "worse"}.get(report.outcome or "", ""),
        is_zero=_is_zero(report.strength),
        split=_split(report),
        moved={name: _moved(weight) for name, weight in report.weights.items()},
        plots={name: Markup(svg) for name, svg in drawn.items()},  # noqa: S704, drawn by us
        style=Markup(style),  # noqa: S704, ours
    )


@functools.cache
def _template() -> jinja2.Template:
    """The template; every value is escaped, its control characters written out."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {
        "number": number, "amount": _amount, "reading": _reading, "strengths": _strengths,
        "bytes": _bytes,
    }  # fmt: skip
    text = importlib.resources.files(__package__ or "").joinpath(_TEMPLATE).read_text("utf-8")
    return environment.from_string(text)


def _shown(value: Any) -> Any:
    """A text with its control characters, except line ends, written out; floats with 4 digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "\n".join(visible(line) for line in value.split("\n"))


def _rows(report: Report) -> list[Row]:
    """Target, source, merge, and the controls in their order."""
    entries = {name: Entry() for name in ("target", "source", "merge", "before", "after")}
    entries = {**entries, **report.controls, **report.evaluation}
    minus = {"target": _gain(report)}
    if report.is_training:
        result = entries["after"]
        minus = {"target": result.against_target, "before": result.against_before}
    rows = []
    for name, entry in entries.items():
        if entry == Entry():
            continue
        kind = name.removesuffix(" 1")  # only the first of several seeds has the note
        notes = [_ROLES.get(name) or _CONTROLS.get(kind, ""), _choice(name, entry, report)]
        rows.append(
            Row(
                name,
                "; ".join(filter(None, notes)),
                entry,
                minus.get(name, entry.merge_minus_control),
                entry.has_own_tokens,
            )
        )
    return rows


def _title(report: Report, names: Mapping[str, str]) -> str:
    """The title of the page: which model was merged into which, or trained."""
    if report.is_training and "model" in names:
        return f"{names['model']}, trained"
    return " into ".join(names[role] for role in ("source", "target") if role in names)


def _subject(report: Report) -> str:
    """The model that the others are compared with."""
    return "after" if report.is_training else "merge"


def _choice(name: str, entry: Entry, report: Report) -> str:
    """What was chosen for a model or control on the dev split, in words."""
    if entry.gamma is not None:
        return f"{entry.gamma:g} of the bias"
    chosen = report.strength if name == "merge" else entry.strength
    text = _strengths(chosen.chosen) if chosen else ""
    return f"strength {text}" if text else ""


def _gain(report: Report) -> Difference | None:
    """The merge minus the target: over all calibration seeds, where that is known.

    For a training without baselines: the model after it minus the model before it.
    """
    if report.is_training:
        after = report.evaluation.get("after", Entry())
        return None if report.baselines else after.against_before
    return report.pooled or report.evaluation.get("merge", Entry()).against_target


def _headline(report: Report) -> str:
    """What the difference that `_gain` returns compares."""
    seeds = len(report.seeds)
    if report.is_training:
        return "after minus before training, on held-out text"
    if seeds < 2:
        return "merge minus target on held-out text"
    if report.pooled is not None:
        return f"merge minus target on held-out text, {seeds} calibration seeds together"
    return f"the merge that was written (seed {report.seeds[0]}) minus target on held-out text"


def _moved(weight: Weight) -> list[str]:
    """A line of the table of weights: means over layers, as the terminal shows them."""
    carried, change = (_mean(ratios) for ratios in (weight.ratio_transported, weight.ratio_change))
    if weight.is_by_token:
        return [carried, change, "", "", "by token"]
    near = f"{_mean(weight.neighbours_out, '.1f')}, {_mean(weight.neighbours_in, '.1f')}"
    stopped = "" if all(weight.converged) else " (not converged)"
    errors = [error for error in weight.error if error is not None]
    error = f"{max(errors):.0e}{stopped}" if errors else ""
    return [carried, change, near, error, " ".join(map(str, weight.source_layer))]


def _mean(values: Sequence[int | float | None], form: str = ".1e") -> str:
    """The mean of the numbers that are there."""
    known = [value for value in values if value is not None]
    return format(float(np.mean(known)), form) if known else "-"


def _split(report: Report) -> str:
    """Which documents chose the strength."""
    split = report.strength.split
    dev = split.dev_documents if split else report.calibration.get("dev_documents")
    rest = split.train_documents if split else report.calibration.get("documents")
    if dev is None or rest is None:
        return "a split of the calibration documents"
    more = []
    if split and split.fraction is not None:
        more.append(f"{split.fraction:.0%}")
    if split and split.seed is not None:
        more.append(f"seed {split.seed}")
    asides = f" ({', '.join(more)})" if more else ""
    return f"{dev} calibration documents{asides}, apart from the {rest} that gave rows"


def _is_zero(strength: Strength) -> bool:
    """Whether every chosen strength is 0."""
    chosen = strength.chosen
    if chosen is None:
        return False
    return not any(chosen.values() if isinstance(chosen, dict) else [chosen])


def _strengths(chosen: int | float | dict[str, Any] | None) -> str:
    """One strength, or those of the groups."""
    if isinstance(chosen, dict):
        return ", ".join(f"{group} {value:g}" for group, value in chosen.items())
    return "" if chosen is None else f"{chosen:g}"


def _amount(change: Difference, *, has_unit: bool = False) -> str:
    """A difference with its interval."""
    unit = _METRICS.get(change.metric, change.metric)
    is_said = has_unit or change.metric != "nll_per_token"
    numbers = f"{number(change.difference, '+.4f')} {interval(change)}"
    return f"{numbers} {unit}" if is_said else numbers


def _reading(change: Difference) -> str:
    """Whether the first of two losses is better or worse, by the interval of their difference."""
    if change.low is None or change.high is None:
        return ""
    return "better" if change.high < 0 else "worse" if change.low > 0 else "no difference"


def _bytes(count: int | float | None) -> str:
    """A size of memory."""
    return "-" if count is None else f"{count / 2**30:.2f} GiB"


def _replace(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, with the permissions of any new file."""
    path.parent.mkdir(exist_ok=True)
    new = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}")
    try:
        with new.open("xb") as file:
            file.write(content)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise

"""The plots of a report, drawn from the numbers of a run."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ot_merge_jax.reports import style
from ot_merge_jax.reports.schema import Difference, Report, Tried

_LOWEST_R2 = -1.5
_LEAST_RATIO = 1e-30


def draw(report: Report) -> list[style.Plot]:
    """Every plot for which a run has the numbers.

    Args:
        report: Of the run.

    Returns:
        The plots, in the order of the report.
    """
    plots = []
    with style.settings():
        for name, make in MAKERS.items():
            figure = Figure()
            if make(figure, report):
                plots.append(style.rendered(name, figure))
    return plots


# ---- losses and differences ----


def _differences(figure: Figure, report: Report) -> bool:
    """The merge minus everything it was compared with, as points with intervals."""
    compared: dict[str, Difference | None] = {}
    if merge := report.evaluation.get("merge"):
        compared["target"] = report.pooled or merge.against_target
    for name, entry in report.controls.items():
        compared[name] = compared.get(name) or entry.merge_minus_control
        if entry.beyond is not None:
            compared["beyond unigram"] = entry.beyond
    rows = [
        (name, difference)
        for name, difference in compared.items()
        if difference is not None
        and difference.metric == "nll_per_token"
        and None not in (difference.difference, difference.low, difference.high)
        and np.isfinite(
            style.values([difference.difference, difference.low, difference.high])
        ).all()
    ]
    if not rows:
        return False
    longest = max(len(style.word(name)) for name, _ in rows)
    axes = style.panel(figure, 0.3 * len(rows) + 0.1, left=0.25 + 0.085 * longest, bottom=0.75)
    axes.grid(visible=False)
    axes.axvline(0, color=style.INK, linewidth=1)
    for place, (_, difference) in enumerate(rows):
        low, middle, high = (
            float(x or 0) for x in (difference.low, difference.difference, difference.high)
        )
        kind, marker = (0, "o") if high < 0 else (1, "s") if low > 0 else (5, "D")
        axes.plot([low, high], [place, place], color=style.COLOURS[kind][0], linewidth=2.4)
        axes.plot([middle], [place], marker, color=style.COLOURS[kind][0], markersize=6)
    axes.set_yticks(range(len(rows)), [style.word(name) for name, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("merge minus the one named, nats per token\n(left of 0: the merge is better)")
    # below the whole figure: names of controls may leave the axes narrower than it
    height = axes.get_position().y0 - 0.3 / figure.get_figheight()
    axes.xaxis.set_label_coords(0.5, height, transform=figure.transFigure)
    return True


def _strength(figure: Figure, report: Report) -> bool:
    """Loss on the dev split over one strength for all weights, with the curves of the controls."""
    curves = {"merge": report.strength.tried}
    for name, entry in report.controls.items():
        if entry.strength is not None and name != "unigram":
            curves[name] = entry.strength.tried
    drawn = {name: points for name, tried in curves.items() if len(points := _shared(tried))}
    if "merge" not in drawn:
        return False
    kinds = list(dict.fromkeys(_kind(name) for name in drawn))
    axes = style.panel(figure, 2.6, names=len(kinds))
    labelled = set()
    for name, points in drawn.items():
        kind = _kind(name)
        axes.plot(
            *points.T, **style.look(kinds.index(kind)),
            label=None if kind in labelled else style.word(kind),
            zorder=3 if name == "merge" else 2,
            linewidth=2.2 if name == "merge" else 1.2,
        )  # fmt: skip
        labelled.add(kind)
    best = drawn["merge"][drawn["merge"][:, 1].argmin()]
    axes.plot(*best, "o", markersize=11, fillstyle="none", color=style.INK, zorder=4)
    _bounded(axes, drawn["merge"][:, 1], np.concatenate(list(drawn.values()))[:, 1])
    axes.set_xlabel(f"strength ({_letter(report)}), one for all moved weights")
    axes.set_ylabel("dev loss, nats per token")
    style.legend(figure, axes)
    return True


def _search(figure: Figure, report: Report) -> bool:
    """Loss on the dev split over the strength of one group, that of the other one fixed."""
    lines = _coordinates(report.strength.tried)
    if not lines:
        return False
    axes = style.panel(figure, 2.4, names=2, columns=1)
    for place, (label, points) in enumerate(lines.items()):
        axes.plot(*points.T, **style.look(place), label=label)
        best = points[points[:, 1].argmin()]
        axes.plot(*best, "o", markersize=11, fillstyle="none", color=style.INK, zorder=4)
    axes.set_xlabel(f"strength ({_letter(report)}) of one group, the other fixed")
    axes.set_ylabel("dev loss, nats per token")
    style.legend(figure, axes, columns=1)
    return True


def _shared(tried: Sequence[Tried]) -> np.ndarray:
    """``[points, 2]`` of the strengths that were the same for all weights, in their order."""
    points = [
        (trial.strength, trial.loss) for trial in tried if not isinstance(trial.strength, dict)
    ]
    return _sorted(points)


def _sorted(points: Sequence[Sequence[Any]]) -> np.ndarray:
    """Points that have two finite numbers, in the order of the first."""
    array = np.array([style.values(point) for point in points]).reshape(-1, 2)
    array = array[np.isfinite(array).all(1)]
    return array[array[:, 0].argsort(kind="stable")]


def _coordinates(tried: Sequence[Tried]) -> dict[str, np.ndarray]:
    """The two lines of a coordinate search, each with the points that the other search had."""
    groups = ("projections", "vocabulary")
    pairs = [
        [trial.strength.get(name) for name in groups]
        if isinstance(trial.strength, dict)
        else [trial.strength] * 2
        for trial in tried
    ]
    own = [place for place, trial in enumerate(tried) if isinstance(trial.strength, dict)]
    points = np.array(
        [style.values([*pair, trial.loss]) for pair, trial in zip(pairs, tried, strict=True)]
    ).reshape(-1, 3)
    if not own or not np.isfinite(points).all():
        return {}
    at = points[own[0], 1]  # the first search is over the projections
    first = points[points[:, 1] == at]
    best = first[first[:, 2].argmin(), 0]
    second = points[points[:, 0] == best]
    lines = {
        f"projections, vocabulary at {at:g}": _sorted(first[:, [0, 2]].tolist()),
        f"vocabulary, projections at {best:g}": _sorted(second[:, [1, 2]].tolist()),
    }
    return {label: line for label, line in lines.items() if len(line) > 1}


# ---- which layers and neurons correspond ----


def _layers(figure: Figure, report: Report) -> bool:
    """The layer plan of every site, as shares of each target layer's mass."""
    grids = {}
    for site, facts in report.sites.items():
        plan = style.values(facts.layer_plan)
        total = np.nansum(plan, 1, keepdims=True)
        grids[site] = plan / np.where(total > 0, total, np.nan)
    if not grids:
        return False
    # equal marginals: a layer cannot send more than this to one of many
    top = max(min(1.0, grid.shape[0] / grid.shape[1]) for grid in grids.values())
    rows, columns = math.ceil(len(grids) / 2), min(2, len(grids))
    whole = 1.9 * rows + 1.2
    figure.set_size_inches(style.WIDTH, whole)
    for place, (site, grid) in enumerate(grids.items()):
        row, column = divmod(place, columns)
        width = (style.WIDTH - 0.75 - 0.45 * (columns - 1)) / columns
        axes = figure.add_axes(
            (
                (0.65 + column * (width + 0.45)) / style.WIDTH,
                1 - (1.66 + 1.9 * row) / whole,
                width / style.WIDTH,
                1.38 / whole,
            )
        )
        axes.set_title(style.word(site), pad=4)
        style.cells(axes, grid, top)
        style.layer_ticks(axes, grid)
        axes.set_xlabel("source layer" if place + columns >= len(grids) else "", labelpad=2)
        axes.set_ylabel("target layer" if column == 0 else "")
    ticks = np.linspace(0, 100 * top, 5)
    style.colour_scale(figure, "share of the target layer's mass, %", ticks)
    return True


def _neurons(figure: Figure, report: Report) -> bool:
    """The neuron plan of the first target layer and its most coupled source layer, sorted."""
    drawable = ((name, site) for name, site in report.sites.items() if site.sorted_heat is not None)
    name, site = next(drawable, ("", None))
    if site is None:
        return False
    plan = np.nan_to_num(style.values(site.layer_plan[0]))
    # square roots, because a sharp plan is almost 0 away from its ridge
    grid = np.sqrt(np.maximum(style.values(site.sorted_heat), 0))
    figure.set_size_inches(style.WIDTH, 5.0)
    axes = figure.add_axes((0.09, 0.22, 0.88, 0.72))
    axes.set_title(f"{style.word(name)}: target layer 0, source layer {plan.argmax()}")
    style.cells(axes, grid, float(np.nanmax(grid, initial=0)))
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel("source neurons, sorted, in bins")
    axes.set_ylabel("target neurons, in bins")
    style.colour_scale(
        figure,
        "mass of a bin, % of the largest (square root scale)",
        100 * np.linspace(0, 1, 5) ** 2,
    )
    return True


# ---- how sharp and how accurate the plans are, how much moved ----


def _mass(figure: Figure, report: Report) -> bool:
    """Share of the mass in the largest entries of the plans (Transport and Merge, Fig. 3)."""
    curves = {
        site: facts.mass_curve
        for site, facts in report.sites.items()
        if facts.mass_curve and np.isfinite(style.values(facts.mass_curve.share)).any()
    }
    if not curves:
        return False
    axes = style.panel(figure, 2.6, names=len(curves))
    for place, (site, curve) in enumerate(curves.items()):
        share = np.ma.masked_invalid(100 * style.values(curve.share))
        look = style.look(place)
        axes.plot(curve.k, share.mean(0), **look, label=style.word(site))
        axes.fill_between(
            curve.k, share.min(0), share.max(0), color=look["color"], alpha=0.15, linewidth=0
        )
    axes.set_xscale("log")
    style.logarithmic(axes.xaxis)
    axes.set_ylim(0, 102)
    axes.set_xlabel("k, number of the plan's largest entries")
    axes.set_ylabel("mass in them, % of the plan")
    style.legend(figure, axes)
    return True


def _r2(figure: Figure, report: Report) -> bool:
    """How well the plans, and permuted plans, predict held-out activations."""
    curves = {
        site: [np.maximum(style.values(row), _LOWEST_R2) for row in (facts.r2, facts.r2_permuted)]
        for site, facts in report.sites.items()
    }
    curves = {site: rows for site, rows in curves.items() if np.isfinite(rows[0]).any()}
    if not curves:
        return False
    axes = style.panel(figure, 2.6, names=len(curves) + 1)
    axes.axhline(0, color=style.INK, linewidth=1)
    for place, (site, (r2, permuted)) in enumerate(curves.items()):
        look = style.look(place, points=len(r2))
        axes.plot(r2, **look, label=style.word(site))
        dotted: dict[str, Any] = {**look, "linestyle": ":"}
        axes.plot(permuted, **dotted, linewidth=1.1, fillstyle="none")
    axes.plot([], [], ":", color=style.INK, label="permuted plan")
    style.layer_axis(axes)
    axes.set_ylim(None, 1.05)
    axes.set_ylabel("held-out R², no unit")
    style.legend(figure, axes)
    return True


def _norms(figure: Figure, report: Report) -> bool:
    """Norms of what was carried and of the change, relative to the weight, for each layer."""
    if all(weight.is_by_token for weight in report.weights.values()):
        return False
    below = style.panel(figure, 4.0, names=len(report.weights), left=1.05)
    box = below.get_position()
    below.set_position((box.x0, box.y0, box.width, 0.46 * box.height))
    above = figure.add_axes((box.x0, box.y0 + 0.54 * box.height, box.width, 0.46 * box.height))
    panels = above, below
    for place, (name, weight) in enumerate(report.weights.items()):
        for axes, values in zip(
            panels, (weight.ratio_transported, weight.ratio_change), strict=True
        ):
            ratio = style.values(values)
            ratio = np.where(ratio > _LEAST_RATIO, ratio, np.nan)  # a logarithmic axis has no 0
            look, label = style.look(place, points=len(ratio)), style.word(name)
            if not weight.is_by_token:
                axes.plot(ratio, **look, label=label)
            elif np.isfinite(ratio).any():
                axes.axhline(
                    float(np.nanmean(ratio)), color=look["color"], linestyle="--", label=label
                )
    for axes, what in zip(panels, ("carried / weight", "change / weight"), strict=True):
        if any(np.isfinite(line.get_ydata()).any() for line in axes.lines):
            axes.set_yscale("log")
            style.logarithmic(axes.yaxis)
        else:
            axes.set_yticks([])
            axes.text(0.5, 0.5, "nothing above 0", ha="center", transform=axes.transAxes)
        axes.set_ylabel(f"{what},\nratio of norms")
        style.layer_axis(axes)
    above.set_xlabel("")
    above.tick_params(labelbottom=False)
    style.legend(figure, above)
    return True


# ---- training ----


def _learning(figure: Figure, report: Report, *, objective: str | None = None) -> bool:
    """Dev loss by step: of every start for an objective, or of a training without baselines."""
    if report.baselines is not None:
        arms = report.baselines.arms.get(objective or "", {})
        curves = {name: _sorted(arm.curve) for name, arm in arms.items()}
    elif report.dev is not None and objective is None:
        curves = {"dev split": _sorted(report.dev.curve)}
    else:
        curves = {}
    curves = {name: points for name, points in curves.items() if len(points)}
    if not curves:
        return False
    axes = style.panel(figure, 2.6, names=len(curves), columns=4)
    for place, (name, points) in enumerate(curves.items()):
        width = 2.2 if name == "merge" else 1.2
        axes.plot(*points.T, **style.look(place, points=len(points)), linewidth=width,
                  label=style.word(name))  # fmt: skip
    axes.set_xlabel("steps")
    axes.set_ylabel("dev loss, nats per token")
    style.legend(figure, axes, columns=4)
    return True


def _kind(name: str) -> str:
    """``noise (seeds)`` for ``noise 3``; a name without a number stays."""
    return re.sub(r" \d+$", " (seeds)", name)


def _letter(report: Report) -> str:
    """The letter of the strength in the papers."""
    return "lambda" if report.settings.get("rule") == "delta" else "alpha"


def _bounded(axes: Axes, own: np.ndarray, every: np.ndarray) -> None:
    """Limits that show one curve whole; far worse losses are cut off at the top."""
    span = max(float(np.ptp(own)), 0.02)
    low = min(float(every.min()), float(own.min()))
    axes.set_ylim(low - 0.08 * span, min(float(every.max()), float(own.max()) + span) + 0.08 * span)


#: Name of a plot -> the function that draws it; it returns False if there are no numbers.
MAKERS: dict[str, Callable[[Figure, Report], bool]] = {
    "differences": _differences, "strength": _strength, "search": _search, "layers": _layers,
    "neurons": _neurons, "mass": _mass, "r2": _r2, "norms": _norms,
    "learning": _learning,
    "learning-sft": functools.partial(_learning, objective="sft"),
    "learning-kd": functools.partial(_learning, objective="kd"),
}  # fmt: skip

"""The plots of a report, as SVG that takes on the colours of its page, and as PNG.

matplotlib is imported when something is drawn, and asked through its objects alone: no global
figure, no window, no settings of the user. The same numbers give the same bytes.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ot_merge_jax.report.document import Difference, Entry, Report, Tried

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

#: Lines and areas as (light, dark): the hues of Okabe and Ito, which colour-blind readers can tell
#: apart, as dark or as light as 3:1 on the page asks for. Markers differ as well.
COLOURS = (
    ("#0072b2", "#56b4e9"), ("#d55e00", "#f08a4b"), ("#008a64", "#2fc79d"), ("#b04f8b", "#d98fbb"),
    ("#a87400", "#e69f00"), ("#6b6f76", "#a2a7af"), ("#8a7f00", "#e5d94a"),
)  # fmt: skip
_MARKERS = "os^DvPX"
_INK = "#010203"  # stands for the colour of the text around an SVG
_WIDTH = 4.6  # inches of 72 units: the width of a phone, so that a font is as large as it says
_LEVELS = 24  # colours of a heat map
_PNG_DPI = 120
_LOWEST_R2 = -1.5
#: Larger numbers are not drawn: an axis of such numbers would show nothing else.
_LARGEST = 1e9
_NO_METADATA = ("Creator", "Date", "Format", "Type")
_RC = {
    "axes.edgecolor": _INK, "axes.labelcolor": _INK, "text.color": _INK, "xtick.color": _INK,
    "ytick.color": _INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 11, "axes.labelsize": 11, "xtick.labelsize": 10, "ytick.labelsize": 10,
    "legend.fontsize": 10, "legend.frameon": False, "legend.handlelength": 2.2, "font.size": 11,
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "svg.fonttype": "none",
    "axes.unicode_minus": False, "text.parse_math": False, "lines.markersize": 4.5,
    "lines.linewidth": 1.6, "axes.grid": True, "grid.alpha": 0.15, "grid.color": _INK,
    "axes.axisbelow": True, "figure.dpi": _PNG_DPI,
}  # fmt: skip


class Plot(NamedTuple):
    """One plot.

    Attributes:
        name: Of its files, and of its place in the report.
        svg: A file of its own; black on white, or white on black where the reader wants that.
        inline: The same for a page that defines `style`.
        png: Black on white.
    """

    name: str
    svg: str
    inline: str
    png: bytes


def style() -> str:
    """CSS: the colours of the plots on a light page and on a dark one."""
    light, dark = (
        "".join(f"--plot-{place}:{pair[side]};" for place, pair in enumerate(COLOURS))
        for side in (0, 1)
    )
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"


def draw(report: Report) -> list[Plot]:
    """Every plot that the numbers of a run are enough for.

    Args:
        report: Of the run.

    Returns:
        The plots, in the order of the report.
    """
    makers: dict[str, Callable[[Any, Report], bool]] = {
        "differences": _differences, "strength": _strength, "search": _search, "layers": _layers,
        "neurons": _neurons, "mass": _mass, "r2": _r2, "norms": _norms,
    }  # fmt: skip
    found = []
    with _settings():
        from matplotlib.figure import Figure

        for name, make in makers.items():
            figure = Figure()
            if make(figure, report):
                found.append(_rendered(name, figure))
    return found


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Our settings of matplotlib and nobody else's, for as long as the block runs."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it speaks of caches and fonts
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        yield


def _rendered(name: str, figure: Figure) -> Plot:
    """A figure as SVG and PNG, without dates and with ids of its own."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    png, svg = io.BytesIO(), io.StringIO()
    # not `savefig`: it draws everything twice
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    for one in (figure, *figure.axes):
        one.patch.set_visible(False)
    matplotlib.rcParams["svg.hashsalt"] = name
    FigureCanvasSVG(figure).print_svg(svg, metadata=dict.fromkeys(_NO_METADATA))
    text = svg.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    for place, (light, _) in enumerate(COLOURS):
        text = text.replace(light, f"var(--plot-{place})")
    for before, after in (
        (r'<g id="cells', r'<g shape-rendering="crispEdges" id="cells'),  # no seams between them
        (r'(<[^<>]*\bid=")', rf"\g<1>{name}-"),
        (r'xlink:href="#', f'href="#{name}-'),
        (r"url\(#", f"url(#{name}-"),
    ):
        text = re.sub(before, after, text)
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    page = f"{style()}svg{{color:#000;background:#fff}}@media(prefers-color-scheme:dark){{svg{{color:#fff;background:#111}}}}"
    return Plot(
        name,
        f"{head}><style>{page}</style>{body}",
        f'<svg {box[0] if box else ""} aria-hidden="true">{body}',
        png.getvalue(),
    )


# ---- what the models lose and gain ----


def _differences(figure: Figure, report: Report) -> bool:
    """The merge minus everything it was compared with, as points with intervals."""
    compared: dict[str, Difference | None] = {}
    if merge := report.evaluation.get("merge"):
        compared["target"] = merge.against_target
    for name, one in report.controls.items():
        compared[name] = compared.get(name) or one.merge_minus_control
        if one.beyond is not None:
            compared["target + unigram"] = one.beyond
    rows = [
        (name, one)
        for name, one in compared.items()
        if one is not None
        and one.metric == "nll_per_token"
        and None not in (one.difference, one.low, one.high)
        and np.isfinite(_values([one.difference, one.low, one.high])).all()
    ]
    if not rows:
        return False
    longest = max(len(_word(name)) for name, _ in rows)
    axes = _axes(figure, 0.3 * len(rows) + 0.1, left=0.25 + 0.085 * longest, bottom=0.75)
    axes.axvline(0, color=_INK, linewidth=1)
    for place, (_, one) in enumerate(rows):
        low, middle, high = (float(x or 0) for x in (one.low, one.difference, one.high))
        kind, marker = (0, "o") if high < 0 else (1, "s") if low > 0 else (5, "D")
        axes.plot([low, high], [place, place], color=COLOURS[kind][0], linewidth=2.4)
        axes.plot([middle], [place], marker, color=COLOURS[kind][0], markersize=6)
    axes.set_yticks(range(len(rows)), [_word(name) for name, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("merge minus the one named, nats per token\n(left of 0: the merge is better)")
    return True


def _strength(figure: Figure, report: Report) -> bool:
    """Loss on the dev split over one strength for all weights, with the curves of the controls."""
    curves = {"merge": report.strength.tried}
    for name, one in report.controls.items():
        if one.strength is not None and name != "unigram":
            curves[name] = one.strength.tried
    drawn = {name: one for name, tried in curves.items() if len(one := _shared(tried))}
    if "merge" not in drawn:
        return False
    kinds = list(dict.fromkeys(_kind(name) for name in drawn))
    axes = _axes(figure, 2.6, names=len(kinds))
    seen = set()
    for name, points in drawn.items():
        kind = _kind(name)
        axes.plot(
            *points.T, _look(kinds.index(kind)), color=_colour(kinds.index(kind)),
            label=None if kind in seen else _word(kind),
            zorder=3 if name == "merge" else 2,
            linewidth=2.2 if name == "merge" else 1.2,
        )  # fmt: skip
        seen.add(kind)
    best = drawn["merge"][drawn["merge"][:, 1].argmin()]
    axes.plot(*best, "o", markersize=11, fillstyle="none", color=_INK, zorder=4)
    _bounded(axes, drawn["merge"][:, 1], np.concatenate(list(drawn.values()))[:, 1])
    axes.set_xlabel(f"strength ({_letter(report)}), one for all moved weights")
    axes.set_ylabel("dev loss, nats per token")
    _legend(figure, axes)
    return True


def _search(figure: Figure, report: Report) -> bool:
    """Loss on the dev split over the strength of one group, that of the other one fixed."""
    lines = _coordinates(report.strength.tried)
    if not lines:
        return False
    axes = _axes(figure, 2.4, names=2, columns=1)
    for place, (label, points) in enumerate(lines.items()):
        axes.plot(*points.T, _look(place), color=_colour(place), label=label)
        best = points[points[:, 1].argmin()]
        axes.plot(*best, "o", markersize=11, fillstyle="none", color=_INK, zorder=4)
    axes.set_xlabel(f"strength ({_letter(report)}) of one group, the other fixed")
    axes.set_ylabel("dev loss, nats per token")
    _legend(figure, axes, columns=1)
    return True


def _shared(tried: Sequence[Tried]) -> np.ndarray:
    """``[points, 2]`` of the strengths that were the same for all weights, in their order."""
    points = [(one.strength, one.loss) for one in tried if not isinstance(one.strength, dict)]
    return _sorted(points)


def _sorted(points: Sequence[tuple[Any, Any]]) -> np.ndarray:
    """Points that have two finite numbers, in the order of the first."""
    found = np.array([_values(one) for one in points]).reshape(-1, 2)
    found = found[np.isfinite(found).all(1)]
    return found[found[:, 0].argsort(kind="stable")]


def _coordinates(tried: Sequence[Tried]) -> dict[str, np.ndarray]:
    """The two lines of a coordinate search, each with the points that the other search had."""
    groups = ("projections", "vocabulary")
    pairs = [
        [one.strength.get(name) for name in groups]
        if isinstance(one.strength, dict)
        else [one.strength] * 2
        for one in tried
    ]
    own = [place for place, one in enumerate(tried) if isinstance(one.strength, dict)]
    points = np.array(
        [_values([*pair, one.loss]) for pair, one in zip(pairs, tried, strict=True)]
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


# ---- who corresponds to whom ----


def _layers(figure: Figure, report: Report) -> bool:
    """The layer plan of every site, as shares of each target layer's mass."""
    grids = {}
    for site, one in report.sites.items():
        plan = _values(one.layer_plan)
        total = np.nansum(plan, 1, keepdims=True)
        grids[site] = plan / np.where(total > 0, total, np.nan)
    if not grids:
        return False
    # equal marginals: a layer cannot send more than this to one of many
    tops = [min(1.0, one.shape[0] / one.shape[1]) for one in grids.values()]
    rows, columns = math.ceil(len(grids) / 2), min(2, len(grids))
    whole = 1.9 * rows + 1.2
    figure.set_size_inches(_WIDTH, whole)
    for place, (site, grid) in enumerate(grids.items()):
        row, column = divmod(place, columns)
        width = (_WIDTH - 0.75 - 0.45 * (columns - 1)) / columns
        axes = figure.add_axes(
            (
                (0.65 + column * (width + 0.45)) / _WIDTH,
                1 - (1.66 + 1.9 * row) / whole,
                width / _WIDTH,
                1.38 / whole,
            )
        )
        axes.set_title(_word(site), pad=4)
        _cells(axes, grid, tops[place])
        _layer_ticks(axes, grid)
        axes.set_xlabel("source layer" if place + columns >= len(grids) else "", labelpad=2)
        axes.set_ylabel("target layer" if column == 0 else "")
    share = 100 * max(tops)
    _scale(figure, "share of the target layer's mass, %", np.linspace(0, share, 5))
    return True


def _neurons(figure: Figure, report: Report) -> bool:
    """The neuron plan of the first target layer and its most coupled source layer, sorted."""
    found = ((name, one) for name, one in report.sites.items() if one.sorted_heat is not None)
    name, site = next(found, ("", None))
    if site is None:
        return False
    plan = np.nan_to_num(_values(site.layer_plan[0]))
    # roots, because a plan that is sharp has little but zeros beside its ridge
    grid = np.sqrt(np.maximum(_values(site.sorted_heat), 0))
    figure.set_size_inches(_WIDTH, 5.0)
    axes = figure.add_axes((0.09, 0.22, 0.88, 0.72))
    axes.set_title(f"{_word(name)}: target layer 0, source layer {plan.argmax()}")
    _cells(axes, grid, float(np.nanmax(grid, initial=0)))
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel("source neurons, sorted, in bins")
    axes.set_ylabel("target neurons, in bins")
    _scale(
        figure,
        "mass of a bin, % of the largest (square root scale)",
        100 * np.linspace(0, 1, 5) ** 2,
    )
    return True


def _scale(figure: Figure, label: str, ticks: np.ndarray) -> None:
    """The colours of a heat map and what they stand for, at the foot of a figure."""
    whole = figure.get_figheight()
    axes = figure.add_axes((0.65 / _WIDTH, 0.5 / whole, 1 - 0.85 / _WIDTH, 0.14 / whole))
    _cells(axes, np.linspace(0, 1, _LEVELS)[None], 1.0)
    axes.grid(visible=False)
    axes.set_yticks([])
    axes.set_xticks(np.linspace(0, _LEVELS, len(ticks)), [f"{one:.0f}" for one in ticks])
    axes.set_xlabel(label)


def _cells(axes: Axes, grid: np.ndarray, top: float) -> None:
    """A grid as filled areas, one for each colour: as an image it would not be text in an SVG."""
    import matplotlib
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    shades = matplotlib.colormaps["cividis"].resampled(_LEVELS)
    height, width = grid.shape
    known = np.isfinite(grid)
    share = np.clip(np.where(known, grid, 0) / (top if top > 0 else 1), 0, 1)
    levels = np.where(known, np.rint(share * (_LEVELS - 1)), -1).astype(int)
    box = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    for level in np.unique(levels[known]):
        corners: list[tuple[int, int]] = []
        for y, row in enumerate(levels == level):
            edges = np.flatnonzero(np.diff(np.concatenate([[False], row, [False]])))
            for left, right in edges.reshape(-1, 2).tolist():
                corners += [(left, y), (right, y), (right, y + 1), (left, y + 1), (left, y)]
        area = Path(corners, box * (len(corners) // 5))
        patch = PathPatch(area, facecolor=shades(int(level)), linewidth=0, antialiased=False)
        patch.set_gid(f"cells-{len(axes.figure.axes)}-{level}")
        axes.add_artist(patch)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)


def _layer_ticks(axes: Axes, grid: np.ndarray) -> None:
    """Layers counted from 0 on both axes, and a dot at each target layer's most coupled one."""
    axes.grid(visible=False)
    for size, ticks in ((grid.shape[1], axes.set_xticks), (grid.shape[0], axes.set_yticks)):
        layers = np.arange(0, size, max(1, math.ceil(size / 8)))
        ticks(layers + 0.5, [str(one) for one in layers])
    rows = np.flatnonzero(np.isfinite(grid).any(1))
    best = np.nanargmax(grid[rows], 1) if len(rows) else rows
    axes.plot(best + 0.5, rows + 0.5, "o", color="#000000", markersize=3 if len(grid) < 20 else 1.5)


# ---- how sharp, how right, how much ----


def _mass(figure: Figure, report: Report) -> bool:
    """Share of the mass in the largest entries of the plans (Transport and Merge, Fig. 3)."""
    curves = {site: one.mass_curve for site, one in report.sites.items() if one.mass_curve}
    if not curves:
        return False
    axes = _axes(figure, 2.6, names=len(curves))
    for place, (site, one) in enumerate(curves.items()):
        share = np.ma.masked_invalid(100 * _values(one.share))
        axes.plot(one.k, share.mean(0), _look(place), color=_colour(place), label=_word(site))
        axes.fill_between(
            one.k, share.min(0), share.max(0), color=_colour(place), alpha=0.15, linewidth=0
        )
    axes.set_xscale("log")
    _logarithmic(axes.xaxis)
    axes.set_ylim(0, 102)
    axes.set_xlabel("k, number of the plan's largest entries")
    axes.set_ylabel("mass in them, % of the plan")
    _legend(figure, axes)
    return True


def _r2(figure: Figure, report: Report) -> bool:
    """What the plans predict of activations they have not seen, and what permuted plans do."""
    found = {
        site: [np.maximum(_values(row), _LOWEST_R2) for row in (one.r2, one.r2_permuted)]
        for site, one in report.sites.items()
    }
    found = {site: rows for site, rows in found.items() if np.isfinite(rows[0]).any()}
    if not found:
        return False
    axes = _axes(figure, 2.6, names=len(found) + 1)
    axes.axhline(0, color=_INK, linewidth=1)
    for place, (site, (r2, permuted)) in enumerate(found.items()):
        look, colour = _look(place), _colour(place)
        axes.plot(range(len(r2)), r2, look, color=colour, label=_word(site))
        axes.plot(
            range(len(permuted)), permuted, look[0] + ":", color=colour,
            linewidth=1.1, fillstyle="none",
        )  # fmt: skip
    axes.plot([], [], ":", color=_INK, label="permuted plan")
    _whole_layers(axes)
    axes.set_ylim(None, 1.05)
    axes.set_ylabel("held-out R², no unit")
    _legend(figure, axes)
    return True


def _norms(figure: Figure, report: Report) -> bool:
    """Norms of what was carried and of the change, relative to the weight, for each layer."""
    if all(one.is_by_token for one in report.weights.values()):
        return False
    below = _axes(figure, 4.0, names=len(report.weights))
    box = below.get_position()
    below.set_position((box.x0, box.y0, box.width, 0.46 * box.height))
    above = figure.add_axes((box.x0, box.y0 + 0.54 * box.height, box.width, 0.46 * box.height))
    panels = above, below
    for place, (name, one) in enumerate(report.weights.items()):
        for axes, values in zip(panels, (one.ratio_transported, one.ratio_change), strict=True):
            ratio = _values(values)
            ratio = np.where(ratio > 0, ratio, np.nan)  # 0 has no place on a logarithmic axis
            look = {"color": _colour(place), "label": _word(name)}
            if one.is_by_token and np.isfinite(ratio).any():
                axes.axhline(np.nanmean(ratio), linestyle="--", **look)
            elif not one.is_by_token:
                axes.plot(range(len(ratio)), ratio, _look(place), **look)
    for axes, what in zip(panels, ("carried / weight", "change / weight"), strict=True):
        if any(np.isfinite(line.get_ydata()).any() for line in axes.lines):
            axes.set_yscale("log")
            _logarithmic(axes.yaxis)
        else:
            axes.set_yticks([])
            axes.text(0.5, 0.5, "0 everywhere", ha="center", transform=axes.transAxes)
        axes.set_ylabel(f"{what},\nratio of norms")
        _whole_layers(axes)
    above.set_xlabel("")
    above.tick_params(labelbottom=False)
    _legend(figure, above)
    return True


# ---- what plots share ----


def _values(numbers: Any) -> np.ndarray:
    """Numbers as an array; NaN for what is missing or too large to be drawn."""
    found = np.array(numbers, dtype=float)
    return np.where(np.abs(found) <= _LARGEST, found, np.nan)


def _word(text: str) -> str:
    """A name as a label: short, and of characters every font has."""
    plain = text.encode("ascii", "backslashreplace").decode()
    plain = "".join(one if one.isprintable() else "?" for one in plain)
    return plain if len(plain) <= 24 else f"{plain[:21]}..."


def _kind(name: str) -> str:
    """``noise`` of ``noise 3``."""
    return re.sub(r" \d+$", " (seeds)", name)


def _letter(report: Report) -> str:
    """What the papers call the strength."""
    return "lambda" if report.settings.get("rule") == "delta" else "alpha"


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)][0]


def _look(place: int) -> str:
    """Marker and line; the line changes when the colours begin again."""
    return _MARKERS[place % len(_MARKERS)] + ("-", "--", "-.")[place // len(COLOURS) % 3]


def _whole_layers(axes: Axes) -> None:
    """An axis of target layers, counted from 0."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, -0.4), max(right, 0.4))
    axes.set_xlabel("target layer (counted from 0)")


def _logarithmic(axis: Axis) -> None:
    """A logarithmic axis whose few numbers are plain: matplotlib's own are formulas."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_data_interval()
    is_wide = low > 0 and high / low > 30
    axis.set_major_locator(LogLocator(subs=(1.0,) if is_wide else (1.0, 2.0, 5.0), numticks=7))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _bounded(axes: Axes, own: np.ndarray, every: np.ndarray) -> None:
    """Limits that show one curve whole; what is far worse leaves the plot at the top."""
    span = max(float(np.ptp(own)), 0.02)
    low = min(float(every.min()), float(own.min()))
    axes.set_ylim(low - 0.08 * span, min(float(every.max()), float(own.max()) + span) + 0.08 * span)


def _axes(
    figure: Figure,
    height: float,
    *,
    names: int = 0,
    columns: int = 3,
    left: float = 0.85,
    bottom: float = 0.55,
) -> Axes:
    """Axes of a height, with room around them; measuring words would take most of the time.

    Args:
        figure: Gets its size.
        height: Of the axes, in inches, as all that follows.
        names: How many `_legend` will write, in so many ``columns``.
        columns: Of the names.
        left: Room for labels.
        bottom: Likewise.
    """
    top = 0.12 + 0.23 * math.ceil(names / columns)
    whole = bottom + height + top
    figure.set_size_inches(_WIDTH, whole)
    return figure.add_axes(
        (left / _WIDTH, bottom / whole, 1 - (left + 0.12) / _WIDTH, height / whole)
    )


def _legend(figure: Figure, axes: Axes, *, columns: int = 3) -> None:
    """Names above the plot, where they hide nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="upper left", ncols=columns, borderaxespad=0.1, columnspacing=1.2
    )

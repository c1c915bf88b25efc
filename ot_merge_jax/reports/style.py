"""How every plot of a report looks: colours, letters, heat maps, and SVG and PNG of a figure.

Only matplotlib's objects are used: no global figure, no window, no settings of the user.
The same numbers give the same bytes.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

#: Lines and areas as (light, dark): the hues of Okabe and Ito, which colour-blind readers can tell
#: apart, as dark or as light as 3:1 on the page asks for. Markers differ as well.
COLOURS = (
    ("#0072b2", "#56b4e9"), ("#d55e00", "#f08a4b"), ("#008a64", "#2fc79d"), ("#b04f8b", "#d98fbb"),
    ("#a87400", "#e69f00"), ("#6b6f76", "#a2a7af"), ("#8a7f00", "#e5d94a"),
)  # fmt: skip
_MARKERS = "os^DvPX"
INK = "#010203"  # stands for the colour of the text around an SVG
WIDTH = 4.6  # inches of 72 units: the width of a phone, so that a font is as large as it says
_CROWD = 24  # layers on an axis; if there are more, not each one is marked
_LEVELS = 24  # colours of a heat map
_FINE_STEPS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)  # of a short logarithmic axis
_PNG_DPI = 120
#: Larger numbers are not drawn: an axis of such numbers would show nothing else.
_LARGEST = 1e9
_NO_METADATA = ("Creator", "Date", "Format", "Type")
_RC: dict[Any, Any] = {
    "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 11, "axes.labelsize": 11, "xtick.labelsize": 10, "ytick.labelsize": 10,
    "legend.fontsize": 10, "legend.frameon": False, "legend.handlelength": 2.2, "font.size": 11,
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "svg.fonttype": "none",
    "axes.unicode_minus": False, "text.parse_math": False, "lines.markersize": 4.5,
    "lines.linewidth": 1.6, "axes.grid": True, "grid.alpha": 0.15, "grid.color": INK,
    "axes.axisbelow": True, "figure.dpi": _PNG_DPI, "axes.grid.axis": "y",
    "xtick.major.size": 0, "ytick.major.size": 0,
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


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """Replaces all settings of matplotlib by ours while the block runs."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        yield


def rendered(name: str, figure: Figure) -> Plot:
    """A figure as SVG and PNG, without dates and with ids of its own."""
    png, svg = io.BytesIO(), io.StringIO()
    # not `savefig`: it draws everything twice
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    for part in (figure, *figure.axes):
        part.patch.set_visible(False)
    matplotlib.rcParams["svg.hashsalt"] = name
    FigureCanvasSVG(figure).print_svg(svg, metadata=dict.fromkeys(_NO_METADATA))
    text = svg.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
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
    dark = "@media(prefers-color-scheme:dark){svg{color:#fff;background:#111}}"
    page = f"{style()}svg{{color:#000;background:#fff}}{dark}"
    return Plot(
        name,
        f"{head}><style>{page}</style>{body}",
        f'<svg {box[0] if box else ""} aria-hidden="true">{body}',
        png.getvalue(),
    )


def values(numbers: Any) -> np.ndarray:
    """Numbers as an array; NaN for what is missing or too large to be drawn."""
    array = np.array(numbers, dtype=float)
    return np.where(np.abs(array) <= _LARGEST, array, np.nan)


def word(text: str) -> str:
    """A name as a label: short, and of characters every font has."""
    plain = text.encode("ascii", "backslashreplace").decode()
    plain = "".join(letter if letter.isprintable() else "?" for letter in plain)
    return plain if len(plain) <= 24 else f"{plain[:21]}..."


def look(place: int, *, points: int = 0) -> dict[str, Any]:
    """Colour, marker and line of a curve; line styles change when colours are used up.

    Args:
        place: Of the curve among the others.
        points: How many it has; many of them leave no room for markers.
    """
    return {
        "color": COLOURS[place % len(COLOURS)][0],
        "marker": _MARKERS[place % len(_MARKERS)] if points <= _CROWD else "",
        "linestyle": ("-", "--", "-.")[place // len(COLOURS) % 3],
    }


def panel(
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
        names: How many `legend` will write, in so many ``columns``.
        columns: Of the names.
        left: Room for labels.
        bottom: Likewise.
    """
    top = 0.12 + 0.23 * math.ceil(names / columns)
    whole = bottom + height + top
    figure.set_size_inches(WIDTH, whole)
    return figure.add_axes(
        (left / WIDTH, bottom / whole, 1 - (left + 0.12) / WIDTH, height / whole)
    )


def legend(figure: Figure, axes: Axes, *, columns: int = 3) -> None:
    """Writes the names above the plot, where they cover nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="upper left", ncols=columns, borderaxespad=0.1, columnspacing=1.2
    )


def layer_axis(axes: Axes) -> None:
    """An axis of target layers, counted from 0."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, -0.4), max(right, 0.4))
    axes.set_xlabel("target layer (counted from 0)")


def logarithmic(axis: Axis) -> None:
    """A logarithmic axis of a few plain numbers: matplotlib's own are formulas.

    A vertical axis ends at two of these numbers, so that nearly equal values are drawn close
    together.
    """
    low, high = axis.get_data_interval()
    steps = (1.0,) if high > 30 * low else (1.0, 2.0, 5.0) if high > 6 * low else _FINE_STEPS
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    first, last = low, high
    if axis.axis_name == "y":
        first = max(tick for tick in ticks if tick < low / 1.03)
        last = min(tick for tick in ticks if tick > high * 1.03)
        axis.axes.set_ylim(first, last)
    ticks = [tick for tick in ticks if first <= tick <= last]
    axis.set_major_locator(FixedLocator(ticks[:: math.ceil(len(ticks) / 8)]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def cells(axes: Axes, grid: np.ndarray, top: float) -> None:
    """A grid as filled areas, one for each colour: as an image it would not be text in an SVG."""
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


def colour_scale(figure: Figure, label: str, ticks: np.ndarray) -> None:
    """The colours of a heat map and what they stand for, at the foot of a figure."""
    whole = figure.get_figheight()
    axes = figure.add_axes((0.65 / WIDTH, 0.5 / whole, 1 - 0.85 / WIDTH, 0.14 / whole))
    cells(axes, np.linspace(0, 1, _LEVELS)[None], 1.0)
    axes.grid(visible=False)
    axes.set_yticks([])
    axes.set_xticks(np.linspace(0, _LEVELS, len(ticks)), [f"{tick:.0f}" for tick in ticks])
    axes.set_xlabel(label)


def layer_ticks(axes: Axes, grid: np.ndarray) -> None:
    """Labels layers, counted from 0, on both axes; few rows get a dot at their largest value."""
    axes.grid(visible=False)
    for size, ticks in ((grid.shape[1], axes.set_xticks), (grid.shape[0], axes.set_yticks)):
        layers = np.arange(0, size, max(1, math.ceil(size / 8)))
        ticks(layers + 0.5, [str(layer) for layer in layers])
    rows = np.flatnonzero(np.isfinite(grid).any(1))
    if 0 < len(rows) <= _CROWD:
        best = np.nanargmax(grid[rows], 1)
        axes.plot(best + 0.5, rows + 0.5, "o", color="#000000", markersize=3)

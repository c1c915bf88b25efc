"""Plots of runs of every shape, and that a heat map shows what it says."""

import numpy as np
import pytest
import reported
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from ot_merge_jax.reports import plots, style
from ot_merge_jax.reports.schema import Report

LAYERED = {"layers", "neurons", "mass", "r2", "norms"}
COMPARED = {"differences", "strength", "search"}

pytestmark = pytest.mark.usefixtures("every_plot")


def names(found):
    return {one.name for one in plots.draw(Report.model_validate(found))}


@pytest.mark.parametrize(("target", "source"), [(1, 1), (1, 4), (80, 80)])
def test_any_number_of_layers(target, source):
    drawn = plots.draw(Report.model_validate(reported.report(target, source, sites=("mlp_in",))))
    assert {one.name for one in drawn} == LAYERED | COMPARED
    for one in drawn:
        assert len(one.svg) < 1_500_000
        assert "<image" not in one.svg
        assert one.svg.startswith("<svg")
        assert one.png.startswith(b"\x89PNG")


@pytest.mark.parametrize("nothing", [None, float("inf"), 1e300, 0.0])
def test_numbers_that_are_none(nothing):
    """Everything that can be missing is."""

    def without(value):
        if isinstance(value, dict):
            kept = {
                "k",
                "seed",
                "source_layer",
                "chosen",
                *({"strength"} if "loss" in value else ()),
            }
            return {key: one if key in kept else without(one) for key, one in value.items()}
        if isinstance(value, list):
            return [without(one) for one in value]
        return nothing if isinstance(value, float) else value

    found = without(reported.report())
    is_none = nothing != 0
    assert names(found) == {"layers", "neurons", "norms"} | (
        set() if is_none else {"differences", "strength", "search", "mass", "r2"}
    )


def test_what_did_not_happen_has_no_plot():
    assert names({"verdict": "v."}) == set()
    found = reported.report(sites=())
    assert names(found) == COMPARED
    found["strength"]["tried"] = found["strength"]["tried"][:1]
    assert names(found) == COMPARED - {"search"}
    del found["evaluation"], found["controls"]
    assert names(found) == {"strength"}


def test_heat_map_is_target_by_source_and_bright_where_it_is_large():
    grid = np.array([[0.0, 1.0, 0.0], [0.25, np.nan, 0.5]])
    axes = Figure().subplots()
    style.cells(axes, grid, 1.0)
    assert axes.get_xlim() == (0, 3)
    assert axes.get_ylim() == (2, 0)  # the first row is at the top

    def colour(row, column):
        point = (column + 0.5, row + 0.5)
        return [
            to_hex(one.get_facecolor())
            for one in axes.patches
            if one.get_path().contains_point(point)
        ]

    assert colour(0, 0) == colour(0, 2) == ["#00224e"]
    assert colour(0, 1) == ["#fee838"]
    assert colour(1, 1) == []  # unknown
    assert len({*colour(1, 0), *colour(1, 2), *colour(0, 1), *colour(0, 0)}) == 4


def test_coordinate_search_is_two_lines_through_the_best_point():
    pairs = [(0.5, 1.0, 3.0), (1.5, 1.0, 5.0), (0.5, 0.0, 6.0), (0.5, 2.0, 7.0)]
    tried = [{"strength": one, "loss": 4.0 + abs(one - 1)} for one in (0.0, 1.0)] + [
        {"strength": {"projections": p, "vocabulary": v}, "loss": loss} for p, v, loss in pairs
    ]
    report = Report.model_validate({"verdict": "v.", "strength": {"tried": tried}})
    lines = plots._coordinates(report.strength.tried)
    assert {label: line.tolist() for label, line in lines.items()} == {
        "projections, vocabulary at 1": [[0.5, 3.0], [1.0, 4.0], [1.5, 5.0]],
        "vocabulary, projections at 0.5": [[0.0, 6.0], [1.0, 3.0], [2.0, 7.0]],
    }


def contrast(one, other):
    def light(colour):
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        parts = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("pair", style.COLOURS)
def test_lines_stand_out_on_a_light_and_on_a_dark_page(pair):
    light, dark = pair
    assert contrast(light, "#ffffff") >= 3
    assert contrast(dark, "#1b1e23") >= 3


def drawn(found):
    """Name -> figure of every plot there is."""
    report, figures = Report.model_validate(found), {}
    with style.settings():
        for name, make in plots.MAKERS.items():
            figure = Figure()
            FigureCanvasAgg(figure)
            if make(figure, report):
                figures[name] = figure
    return figures


def nearly_equal(found):
    """Ratios as of preset paper: small ones of what is carried, and a change that is shrinkage."""
    for one in found["weights"].values():
        count = len(one["ratio_change"])
        one["ratio_transported"] = (2e-6 * np.arange(1, count + 1)).tolist()
        one["ratio_change"] = (0.1 - 1e-7 * np.arange(count)).tolist()
    return found


@pytest.mark.parametrize("change", [dict, nearly_equal], ids=["random", "nearly equal"])
def test_nothing_is_cut_off(change):
    """Every label lies inside its figure."""
    for name, figure in drawn(change(reported.report())).items():
        with style.settings():
            box = figure.get_tightbbox(figure.canvas.get_renderer())
        assert box.x0 >= -0.02, name
        assert box.y0 >= -0.02, name
        assert box.x1 <= figure.get_figwidth() + 0.02, name
        assert box.y1 <= figure.get_figheight() + 0.02, name


def test_ratios_stand_between_plain_numbers():
    figures = [drawn(change(reported.report()))["norms"] for change in (dict, nearly_equal)]
    for axis in [one.yaxis for figure in figures for one in figure.axes]:
        ticks, (low, high) = axis.get_majorticklocs(), axis.get_view_interval()
        assert 2 <= len(ticks) <= 8
        assert low == ticks[0]
        assert low < axis.get_data_interval()[0] <= axis.get_data_interval()[1] < high
        assert high / low >= 1.4  # what is all but equal looks so


def test_learning_curves_of_every_start():
    curves = {"merge": [[0, 3.0], [5, 2.0]], "base": [[0, 4.0], [5, 2.5]], "noise": [[0, None]]}
    arms = {name: {"curve": one} for name, one in curves.items()}
    found = {"verdict": "v.", "baselines": {"arms": {"kd": arms}}}
    assert names(found) == {"learning-kd"}
    figure = Figure()
    plots.MAKERS["learning-kd"](figure, Report.model_validate(found))
    drawn = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert drawn == {name: curves[name] for name in ("merge", "base")}

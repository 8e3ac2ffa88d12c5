"""The interactive figures: the same values as the static ones, and JSON that a browser can read."""

import json
import math

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.synthetic_runs import write_run
from eval.report import interactive, plots
from eval.report.canvas import STYLE, format_palette
from eval.report.layers import read_sensitivities
from eval.report.pareto import panels
from eval.report.records import group_runs, read_each, read_runs, shown_runs
from eval.report.sections import pictures


@pytest.fixture
def runs(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, "search", seed, target=0.05)
    write_run(tmp_path, "uniform", 0, (8,))
    return sorted(read_runs([tmp_path])[0], key=lambda run: (run.record["method"], run.record["seed"]))


def test_the_front_holds_each_run_and_each_mean(runs):
    (panel,) = panels(group_runs(runs))
    figure = interactive.front(panel, ["search", "uniform"])
    marks = [trace for trace in figure["data"] if trace["mode"] == "markers"]
    points = {point for trace in marks for point in zip(trace["x"], trace["y"], strict=True)}
    assert points >= {(run.costs["compute"], run.quality) for run in runs}
    assert points >= {(group.cost("compute")[0], group.quality[0]) for group in panel.groups}
    assert sum(trace["showlegend"] for trace in figure["data"]) == 2


def test_the_front_of_many_runs_holds_their_means_alone(runs, monkeypatch):
    monkeypatch.setattr(interactive, "MAX_POINTS", 2)
    (panel,) = panels(group_runs(runs))
    texts = [text for trace in interactive.front(panel, ["search", "uniform"])["data"] for text in trace["customdata"]]
    assert len(texts) == 2 and any("mean of 2 seeds: 0, 1" in text for text in texts)


def test_bars_are_as_long_as_the_formats_have_bits(runs):
    figure = interactive.layer_bars(runs[0], {}, format_palette(runs))
    bits = {y: x for trace in figure["data"] for y, x in zip(trace["y"], trace["x"], strict=True)}
    assert [f"int{bits[row]:g}" for row in sorted(bits)] == [w for w, _ in runs[0].record["assignment"].values()]


def test_the_chosen_format_of_a_layer_is_filled(runs):
    run = runs[0]
    layer, (chosen, _) = next(iter(run.record["assignment"].items()))
    names = [*run.record["search_space"]]
    line = ",".join([layer, *(str(0.1 * (place + 1)) for place in range(len(names)))])
    (run.folder / "sensitivity.csv").write_text(f"decision,{','.join(f'measured {name}' for name in names)}\n{line}\n")
    figure = interactive.sensitivity_marks("measured", [run], {run.folder: read_sensitivities(run.folder)})
    filled = {trace["meta"].split(" · ")[-1] for trace in figure["data"] if "open" not in trace["marker"]["symbol"][0]}
    assert filled == {chosen}
    drawing = plots.sensitivities("measured", [run], {run.folder: read_sensitivities(run.folder)})
    with rc_context(STYLE):
        canvas = Figure(figsize=drawing.size, layout="constrained")
        drawing.draw(canvas)
        canvas.draw_without_rendering()
    (axes,) = canvas.axes
    full = [line for line in axes.lines if len(line.get_xdata()) and line.get_markerfacecolor() != "none"]
    assert [float(line.get_xdata()[0]) for line in full] == [pytest.approx(0.1 * (names.index(chosen) + 1))]
    assert not any("$" in label.get_text() for label in axes.get_xticklabels())


def test_every_picture_has_an_interactive_counterpart_in_strict_json(runs):
    groups = group_runs(runs)
    shown = shown_runs(groups, 4)
    sections = pictures(runs, groups, shown, read_each(shown, lambda run: run.history())[0])
    assert {"Pareto", "Formats", "Formats of all runs", "Policy", "Curves", "Draws"} == set(sections)
    for drawing in (drawing for drawings in sections.values() for drawing in drawings):
        figure = interactive.plain(drawing.figure())
        assert json.loads(json.dumps(figure, allow_nan=False)) == figure
        assert figure["data"] and figure["layout"]["height"] > 100


def test_numbers_become_json_and_markup_stays_text():
    assert interactive.plain({"a": np.array([1.23456789, math.nan]), "b": (1, None)}) == {
        "a": [1.23457, None],
        "b": [1, None],
    }
    assert interactive.escaped("<b>&\"'") == "&lt;b&gt;&amp;\"'"

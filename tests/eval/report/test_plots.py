"""The report's pictures: what they show is what the records hold, and nothing is cut off."""

import json
from itertools import pairwise, product
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from benchmarks.synthetic_runs import write_run
from eval.eval_parse import main
from eval.report import plots
from eval.report.canvas import COLOURS, STYLE, format_palette, series_style
from eval.report.labels import distinct_labels
from eval.report.pareto import hypervolume, panels, pareto_front
from eval.report.records import Run, group_runs, read_each, read_runs, shown_runs
from eval.report.sections import MAX_ROWS, pictures
from policy.allocators import Allocator

BERT = [f"bert.encoder.layer.{i}.{n}" for i in range(2) for n in ("attention.self.query", "attention.output.dense")]


def drawn(drawing) -> Figure:
    with rc_context(STYLE):
        figure = Figure(figsize=drawing.size, layout="constrained")
        FigureCanvasAgg(figure)
        drawing.draw(figure)
        figure.draw_without_rendering()
    return figure


def cut_off(drawing, figure) -> bool:
    box, (width, height) = figure.get_tightbbox(), drawing.size
    return min(box.x0, box.y0) < 0 or box.x1 > width or box.y1 > height


def runs_below(folder):
    return sorted(read_runs([folder])[0], key=lambda run: run.record["seed"])


grid_points = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=8)


@given(grid_points)
def test_hypervolume_counts_the_dominated_cells(points):
    """On an integer grid the dominated area is a number of unit cells."""
    box = [(0, 0), (8, 8)]
    cells = sum(
        any(cost <= x and quality >= y + 1 for cost, quality in points) for x in range(8) for y in range(8)
    )  # fmt: skip
    assert hypervolume(points, box) == pytest.approx(cells / 64)


@given(grid_points)
def test_front_holds_exactly_the_points_that_none_beats(points):
    def beaten(p):
        return any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)

    assert [p for p, _ in pareto_front([(p, p) for p in points])] == sorted({p for p in points if not beaten(p)})


def test_a_box_without_area_has_no_hypervolume():
    assert hypervolume([(1, 1)], [(1, 1), (1, 2)]) is None


def test_pareto_puts_runs_of_another_cost_type_in_the_panel(tmp_path):
    """The float run was charged in memory; the search in compute, where both are drawn."""
    write_run(tmp_path, "search", 0, target=0.05)
    write_run(tmp_path, "float", 0, (16,), cost_type="memory", cost_unit="MiB")
    (panel,) = panels(group_runs(read_runs([tmp_path])[0]))
    assert panel.cost_type == "compute" and set(panel.points) == {"float", "search"}
    axes = drawn(plots.pareto(panel, ["float", "search"])).axes[0]
    shown = {(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in axes.lines}
    assert shown == {panel.points["float"][0], panel.points["search"][0]}
    assert "compute" in axes.get_xlabel() and "GBOPs" in axes.get_xlabel() and "accuracy" in axes.get_ylabel()


def test_a_cost_that_a_run_does_not_know_is_not_plotted(tmp_path):
    write_run(tmp_path, "search", 0, target=0.05)
    other = {"cost_type": "memory", "cost_unit": "MiB", "cost": 7.0, "costs": {"compute": None}}
    write_run(tmp_path, "float", 0, (16,), **other)
    (panel,) = panels(group_runs(read_runs([tmp_path])[0]))
    assert set(panel.points) == {"search"} and panel.left_out == 1
    shown = [text.get_text() for text in drawn(plots.pareto(panel, ["search"])).findobj(Text)]
    assert "not shown, cost unknown: 1" in shown


def test_methods_differ_in_colour_and_marker():
    methods = ["float", "search", *get_args(Allocator)]
    styles = [series_style(method, methods) for method in methods]
    assert len({marker for _, marker in styles}) == len(methods) > len(COLOURS), "also in grey"
    assert len({colour for colour, _ in styles}) == len(COLOURS)
    many = [str(number) for number in range(50)]
    assert len({series_style(name, many) for name in many}) == len(many)


def test_bars_are_as_long_as_the_formats_have_bits(tmp_path):
    assignment = {"a": ["int4", "int8"], "b": ["e2m1", "float"], "c": ["int2", "int2"]}
    write_run(tmp_path, "search", 0, target=0.05, assignment=assignment, search_space=["int2", "int4", "e2m1", "int8"])
    (run,) = runs_below(tmp_path)
    palette = format_palette([run])
    axes = drawn(plots.layer_formats(run, palette)).axes[0]
    weights, activations = axes.patches[:3], axes.patches[3:]
    assert [bar.get_width() for bar in weights] == [4, 4, 2]
    assert [bar.get_width() for bar in activations] == [8, 16, 2]
    assert [to_hex(bar.get_facecolor()) for bar in weights] == [palette[n].colour for n in ("int4", "e2m1", "int2")]
    assert palette["int4"].hatch != palette["e2m1"].hatch
    assert axes.get_xlabel().startswith("bits")


def test_palette_is_ordered_and_no_two_formats_look_alike(tmp_path):
    names = ["int2", "int3", "e2m1", "int4", "int8", "e4m3", "mxfp4", "nvfp4"]
    write_run(tmp_path, "search", 0, target=0.05, search_space=names)
    palette = format_palette(runs_below(tmp_path))
    assert len({style.colour for style in palette.values()}) == len(palette)
    assert [style.bits for style in palette.values()] == sorted(style.bits for style in palette.values())
    luminance = [int(s.colour[1:3], 16) * 0.3 + int(s.colour[3:5], 16) * 0.59 for s in palette.values()]
    assert luminance == sorted(luminance)  # the order is also there without colour


def test_policy_sums_pairs_into_weights_and_activations(tmp_path):
    write_run(tmp_path, "search", 0, target=0.05, search_space=["int4", "int8"])
    (run,) = runs_below(tmp_path)
    layers = list(run.record["decisions"])
    pairs = [[0.1, 0.2, 0.3, 0.4]] * len(layers)  # (int4,int4) (int4,int8) (int8,int4) (int8,int8)
    history = [{"step": step, "probabilities": pairs} for step in (0, 10, 20)]
    figure = drawn(plots.policy(run, history))
    shown = {axes.get_title(): axes.collections[0].get_array().mean() for axes in figure.axes if axes.get_title()}
    assert shown == pytest.approx({"w int4": 0.3, "w int8": 0.7, "a int4": 0.4, "a int8": 0.6})
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == plots.short_names(layers)
    settled = [{"step": step, "probabilities": pairs, "phase": "settle"} for step in (30, 40, 50)]
    axes = drawn(plots.policy(run, history + settled)).axes[0]
    assert axes.get_xlim() == (0, 30), "nothing changes behind the choice"


def test_draws_show_every_assignment(tmp_path):
    write_run(tmp_path, "search", 0, target=0.05)
    (run,) = runs_below(tmp_path)
    history = [
        {"step": 1, "cost": 1.5, "quality": 0.55, "draws": [[1.0, 0.5], [2.0, 0.6]]},
        {"step": 2, "cost": 3.0, "quality": 0.7, "draws": [[3.0, 0.7]]},
        {"step": 3, "cost": 3.0},
    ]
    drawing = plots.drawn_assignments(run, history)
    np.testing.assert_array_equal(drawn(drawing).axes[0].collections[0].get_offsets(), [(1, 0.5), (2, 0.6), (3, 0.7)])
    assert "an assignment" in drawing.caption
    means = plots.drawn_assignments(run, [{**history[0], "draws": None}])
    np.testing.assert_array_equal(drawn(means).axes[0].collections[0].get_offsets(), [(1.5, 0.55)])
    assert "the mean over the draws" in means.caption
    assert plots.drawn_assignments(run, [{"step": 0}]) is None


def test_rows_of_the_policy_are_called_as_the_record_calls_its_decisions(tmp_path):
    blocks = {"encoder.*.query": BERT[::2], "encoder.*.dense": BERT[1::2]}
    write_run(tmp_path, "search", 0, (4, 8), assignment={name: ["int4", "int4"] for name in BERT}, decisions=blocks)
    (run,) = runs_below(tmp_path)
    rows = drawn(plots.policy(run, [{"step": s, "probabilities": [[0.5, 0.5], [0.9, 0.1]]} for s in (1, 11)]))
    assert [text.get_text() for text in rows.axes[0].get_yticklabels()] == ["query", "dense"]


def test_running_mean_keeps_constants_and_ignores_the_ends():
    np.testing.assert_allclose(plots.running_mean(np.full(100, 0.3)), 0.3, rtol=1e-12)
    values = np.arange(200.0)
    np.testing.assert_allclose(plots.running_mean(values)[10:-10], values[10:-10])


def test_of_many_runs_the_formats_of_a_few_configurations_are_drawn(tmp_path):
    for number, seed in product(range(50), (0, 1)):
        write_run(tmp_path, "search", seed, target=0.05 + number / 1000)
    runs = read_runs([tmp_path])[0]
    (drawing,) = pictures(runs, group_runs(runs), [], {})["Formats of all runs"]
    assert f"{MAX_ROWS} of " in drawing.caption and "the first seed" in drawing.caption
    heat = drawing.figure()["data"][0]
    labels = [row[0].splitlines()[1] for row in heat["customdata"]]
    assert len(heat["z"]) == MAX_ROWS == len({label.partition(" · seed")[0] for label in labels})


def test_short_names_drop_what_all_share():
    assert plots.short_names(["m.a.x", "m.a.y"]) == ["x", "y"]
    assert plots.short_names(["m.a", "m"]) == ["m.a", "m"]
    assert plots.short_names(["only.one"]) == ["only.one"]


@pytest.fixture(scope="module")
def every_picture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        write_run(folder, "float", seed, (16,))
        write_run(folder, "uniform", seed, (4,))
        write_run(folder, "search", seed, target=0.0076192, cost=0.0053487)
        long = {name: [("int4", "e2m1")[i % 2], "e4m3"] for i, name in enumerate(BERT)}
        names = {
            "task": "mrpc",
            "model": "bert-base-uncased-with-a-long-name",
            "search_space": ["int4", "e2m1", "e4m3"],
        }
        write_run(folder, "hawq_v2", seed, target=40.0, cost=39.0, assignment=long, cost_unit="MiB", **names)
    runs = read_runs([folder])[0]
    shown = shown_runs(groups := group_runs(runs), 4)
    return pictures(runs, groups, shown, read_each(shown, Run.history)[0])


def test_every_section_has_its_pictures(every_picture):
    assert {name: len(drawings) for name, drawings in every_picture.items()} == {
        "Pareto": 2,
        "Formats": 2,
        "Formats of all runs": 3,
        "Policy": 2,
        "Curves": 2,
        "Draws": 2,
    }


def test_no_text_is_cut_off_and_every_axis_has_a_label(every_picture):
    for drawing in (d for section in every_picture.values() for d in section):
        figure = drawn(drawing)
        assert not cut_off(drawing, figure), drawing.title
        for axes in figure.axes:
            low, high = sorted(axes.get_xlim())
            ticks = [t for t in axes.xaxis.get_major_ticks() if t.label1.get_visible() and low <= t.get_loc() <= high]
            shown = [tick.label1.get_window_extent() for tick in ticks]
            assert all(a.x1 < b.x0 for a, b in pairwise(shown) if a.width and b.width), drawing.title
        labels = " ".join(text.get_text() for text in figure.findobj(Text))
        assert any(unit in labels for unit in ("bits", "GBOPs", "MiB", "step", "layer")), drawing.title


def test_a_name_with_dollar_signs_is_no_formula(tmp_path):
    for seed, name in enumerate(("a$\\frac$", "$b$")):
        write_run(tmp_path, name, seed, target=0.05, folder=str(seed))
    runs = runs_below(tmp_path)
    (panel,) = panels(group_runs(runs))
    shown = {text.get_text() for text in drawn(plots.pareto(panel, sorted(panel.points))).findobj(Text)}
    assert any("a$\\frac$" in text for text in shown)


def test_files_of_a_report(tmp_path):
    write_run(tmp_path / "runs", "search", 0, target=0.05)
    write_run(tmp_path / "runs", "uniform", 0, (4,))
    assert main([str(tmp_path / "runs"), "--output_dir", str(tmp_path / "out"), "--format", "csv"]) == 0
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    names = ["pareto", "formats", "policy", "curves", "draws"]
    assert set(sizes) == {"summary.csv", "runs.csv", *(f"{name}.png" for name in names)}
    assert all((tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in names)


def test_costs_of_two_kinds_do_not_share_an_axis(tmp_path):
    write_run(tmp_path, target=0.05)
    write_run(tmp_path, target=3.0, cost=2.5, cost_type="memory", cost_unit="MiB")
    runs = runs_below(tmp_path)
    drawings = pictures(runs, group_runs(runs), runs, read_each(runs, Run.history)[0])["Curves"]
    assert len({drawing.title for drawing in drawings}) == 2
    titles = [axes.get_title(loc="left") for drawing in drawings for axes in drawn(drawing).axes]
    assert {title for title in titles if "cost" in title} == {"compute cost [GBOPs]", "memory cost [MiB]"}


def test_budgets_of_one_run_have_a_front_of_their_own(tmp_path):
    for number, target in enumerate((0.05, 0.06)):
        write_run(tmp_path, "search", target=target, cost=target, folder=f"own{number}")
        write_run(tmp_path, "search", target=target, cost=target, folder=f"shared{number}", budgets=[3.0, 4.0])
    runs = runs_below(tmp_path)
    groups = group_runs(runs)
    assert len(groups) == 4, "the same budget and seed, trained alone or together with others"
    (panel,) = panels(groups)
    assert list(panel.points) == ["search", "search for 2 budgets"]
    (drawing,) = pictures(runs, groups, [], {})["Pareto"]
    figure = drawn(drawing)
    assert any("search for 2 budgets" in text.get_text() for text in figure.legends[0].get_texts())
    assert not cut_off(drawing, figure)


def test_labels_name_what_tells_configurations_apart(tmp_path, capsys):
    common = {"model_path": "/a/long/path/to/a/model"}
    configurations = {
        "a": common | {"max_steps": 400, "quantizer": "lsq", "reward_draws": 1},
        "b": common | {"max_steps": 800, "quantizer": "lsq", "reward_draws": 2},
        "c": common | {"max_steps": 800, "quantizer": "fixed", "reward_draws": 2},
        "d": common
        | {"max_steps": 800, "quantizer": "fixed", "reward_draws": 2, "model_path": "/a/path/to/another/model"},
    }
    configurations["d"]["adam"] = 1  # others lack it
    folders = [
        write_run(tmp_path, seed=seed, target=0.1, settings=settings, folder=f"{name}{seed}")
        for name, settings in configurations.items()
        for seed in (0, 1)
    ]
    write_run(tmp_path, target=0.1, bits=(2, 4), settings=configurations["a"], folder="e0")
    write_run(tmp_path, target=0.2, settings=configurations["b"], folder="f0")
    runs = {run.folder.name: run for run in distinct_labels(runs_below(tmp_path))}
    labels = {name: run.label for name, run in runs.items()}
    assert len(set(labels.values())) == len(labels)
    assert labels["f0"] == "search ≤ 0.2 GBOPs · seed 0"
    assert "reward_draws" not in (every := "".join(labels.values())), "max_steps says the same"
    assert "adam" not in every, "model_path says the same, and all have it"
    assert labels["a1"] == labels["a0"].replace("seed 0", "seed 1")
    shown = [run for name, run in runs.items() if name.endswith("0")]
    sections = pictures(shown, group_runs(shown), shown, read_each(shown, Run.history)[0])
    assert not any(cut_off(drawing, drawn(drawing)) for drawings in sections.values() for drawing in drawings)
    (drawing,) = sections["Curves"]
    legend = {" ".join(text.get_text().split()) for text in drawn(drawing).legends[0].get_texts()}
    assert legend == {run.label for run in shown}
    assert main(["--compare", str(folders[2]), str(folders[4])]) == 0
    titles = [line.strip() for line in capsys.readouterr().out.splitlines()[:2]]
    assert titles == [
        f"{told} · seed 0"
        for told in ("A: search ≤ 0.1 GBOPs · quantizer=lsq", "B: search ≤ 0.1 GBOPs · quantizer=fixed")
    ]


def test_a_competitor_of_the_search_has_a_curve_of_its_loss_alone(tmp_path):
    write_run(tmp_path)
    path = write_run(tmp_path, "measured", search_space=["int2", "int8"]) / "history.jsonl"
    history = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({"step": line["step"], "loss": line["loss"]}) + "\n" for line in history))
    runs = runs_below(tmp_path)
    figure = drawn(plots.curves(runs, [run.history() for run in runs]))
    lines = {axes.get_title(loc="left"): len(axes.lines) for axes in figure.axes}
    assert lines["loss"] == 4 and lines["reward"] == 2
    (alone,) = [run for run in runs if run.record["method"] == "measured"]
    figure = drawn(plots.curves([alone], [alone.history()]))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["loss"], "no empty panels"
    assert plots.curves([alone], [[{"step": 1}]]) is None

"""Figures of runs. Each is a `Drawing`: static in a PNG file and in the page's SVG, interactive on the page."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator

from eval.report import interactive
from eval.report.canvas import COLOURS, INK, WIDTH, Canvas, Drawing, FormatStyle, plain_log_ticks, series_style
from eval.report.labels import short_names
from eval.report.layers import NOT_MEASURED, Sensitivities
from eval.report.pareto import Panel
from eval.report.records import Run, sort_formats
from eval.run.outcome import cost_title, counted_part, scope_of

HALF_A_LINE = 34
"""letters of a legend's entry of which two stand side by side"""
MARKER_OF = {symbol: marker for marker, symbol in interactive.SYMBOLS.items()}
"""symbol of plotly -> marker of matplotlib"""


def pareto(panel: Panel, every: Sequence[str]) -> Drawing:
    """One point per run, the means over seeds, and the front of each series.

    Args:
        panel: The runs that share the plot.
        every: All series of the report, since colours go by their order.
    """
    spread = any(len(group.runs) > 1 for group in panel.groups)

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        handles = []
        for series in panel.points:
            colour, marker = series_style(series, every)
            for group in (g for g in panel.groups if g.series == series):
                several = len(group.runs) > 1
                xy = [(run.costs[panel.cost_type], run.quality) for run in group.runs]
                size, alpha = (4, 0.55) if several else (6, 0.9)
                axes.plot(*zip(*xy, strict=True), marker, color=colour, ms=size, alpha=alpha, mew=0)
                if several:
                    mean = (group.cost(panel.cost_type)[0], group.quality[0])
                    axes.plot(*mean, marker, color=colour, ms=7, mec=INK, mew=0.8)
            if len(front := panel.front(series)) > 1:
                axes.plot(*zip(*front, strict=True), color=colour, lw=1, drawstyle="steps-post")
            volume = panel.hypervolume(series)
            name = series if volume is None else f"{series} (hypervolume {volume:.3f})"
            handles.append(Line2D([], [], color=colour, marker=marker, ms=5, lw=1, label=name))
        if panel.left_out:
            handles.append(Line2D([], [], ls="", label=f"not shown, cost unknown: {panel.left_out}"))
        axes.set_xlabel(panel.cost_title + (", log scale" if panel.log_cost else ""))
        axes.set_ylabel(f"{panel.metric} (validation)" + (", lower is better" if panel.lower_is_better else ""))
        axes.margins(0.08)
        if panel.log_cost:
            _log_axis(axes)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        longest = max(len(str(handle.get_label())) for handle in handles)
        canvas.legend(handles=handles, loc="outside lower left", ncols=2 if longest <= HALF_A_LINE else 1)

    what = "One point per run" + ("; outlined: the mean over its seeds. " if spread else ". ")
    what += "Line: the front of the means. " if spread else "Line: the front. "
    what += "Hypervolume: share of the box between the best and the worst of all runs that the front dominates."
    what += f" Not shown, since their cost is unknown: {panel.left_out}." if panel.left_out else ""
    if sum(len(group.runs) for group in panel.groups) > interactive.MAX_POINTS:
        what += f" Of more than {interactive.MAX_POINTS} runs, the pointer finds the means alone."
    title = f"{panel.task} · {panel.model}: {panel.metric} against {panel.cost_type}"
    figure = partial(interactive.front, panel, every)
    return Drawing(title, what, (WIDTH, 3.6), draw, f"{panel.task} · {panel.model}", figure)


def layer_formats(run: Run, palette: Mapping[str, FormatStyle], sensitivities: Sensitivities = NOT_MEASURED) -> Drawing:
    """One bar per layer, as long as its format has bits; two bars if weights and activations differ."""
    assignment: dict[str, Sequence[str]] = run.record["assignment"]
    sides = ("weights", "activations") if any(w != a for w, a in assignment.values()) else ("weights",)
    layers = short_names(list(assignment))
    present = sort_formats(name for pair in assignment.values() for name in pair[: len(sides)])

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        height = 0.8 / len(sides)
        for side in range(len(sides)):
            for index, pair in enumerate(assignment.values()):
                style = palette[pair[side]]
                offset = (side - (len(sides) - 1) / 2) * height
                axes.barh(index + offset, style.bits, height, color=style.colour, hatch=style.hatch, ec=INK, lw=0.4)
        axes.set_yticks(range(len(layers)), layers)
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.grid(False, axis="y")
        axes.set_xlabel("bits" + (" (upper bar weights, lower bar activations)" if len(sides) > 1 else ""))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        format_legend(canvas, present, palette)

    what = "Format of each layer, the first layer on top."
    figure = partial(interactive.layer_bars, run, sensitivities, palette)
    return Drawing(f"{where(run)}: {run.label}", what, (WIDTH, 1.1 + 0.19 * len(layers)), draw, where(run), figure)


def all_formats(
    runs: Sequence[Run],
    side: int,
    palette: Mapping[str, FormatStyle],
    found: Mapping[Path, Sensitivities] = MappingProxyType({}),
    total: int = 0,
) -> Drawing:
    """Formats of several runs: one row per run, one column per layer.

    Args:
        runs: Runs of one task and model.
        side: 0 for weights, 1 for activations.
        palette: Format -> its appearance.
        found: Run folder -> sensitivities, which the interactive figure shows.
        total: Number of runs that `runs` are a selection of, if it is one.
    """
    layers = list(dict.fromkeys(name for run in runs for name in run.record["assignment"]))
    present = sort_formats(pair[side] for run in runs for pair in run.record["assignment"].values())
    labels = [_wrapped(run.label, 45) for run in runs]
    codes = np.full((len(runs), len(layers)), np.nan)
    for row, run in enumerate(runs):
        for name, pair in run.record["assignment"].items():
            codes[row, layers.index(name)] = present.index(pair[side])

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        colours = ListedColormap([palette[name].colour for name in present])
        shape = (0.5, len(layers) + 0.5, len(runs) - 0.5, -0.5)
        axes.imshow(
            codes, colours, aspect="auto", extent=shape, vmin=-0.5, vmax=len(present) - 0.5, interpolation="none"
        )
        axes.set_yticks(range(len(runs)), labels, fontsize=6.5)
        axes.set_xlabel("layer, counted from the input")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(False)
        format_legend(canvas, present, palette, hatched=False)

    what = ("weights", "activations")[side]
    size = (WIDTH, 1.2 + (0.04 + 0.11 * _most_lines(labels)) * len(runs))
    figure = partial(interactive.format_map, runs, side, found, present, palette)
    title = f"{where(runs[0])}: formats of the {what}, run by run"
    caption = "One row per run, one column per layer."
    if total > len(runs):
        caption += f" {len(runs)} of {total} runs: the first seed of configurations that are evenly spaced by path."
    return Drawing(title, caption, size, draw, where(runs[0]), figure)


def policy(run: Run, history: Sequence[Mapping[str, Any]]) -> Drawing | None:
    """Probability of each choice in each decision over the steps; None if the run recorded none.

    The figure ends at the step of the final choice, after which the policy does not change.
    """
    recorded = [line for line in history if line.get("probabilities")]
    learning = sum(line.get("phase") != "settle" for line in recorded)
    kept = recorded[: learning + 1]
    if len(kept) < 2:
        return None
    steps = np.array([line["step"] for line in kept], dtype=float)
    values = np.array([line["probabilities"] for line in kept])  # (times, decisions, choices)
    if run.record.get("architecture"):  # whose decisions follow those of formats, and have other choices
        values = values[:, : len(run.record["decisions"])]
    panels = _by_format(values, run.record["search_space"] or [])
    decisions = _decision_names(run, values.shape[1])
    columns = min(len(panels), 4)
    rows = math.ceil(len(panels) / columns)
    middles = (steps[1:] + steps[:-1]) / 2
    edges = np.concatenate([[steps[0]], middles, [steps[-1]]])

    def draw(canvas: Canvas) -> None:
        grid = canvas.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, (name, shares) in zip(grid.flat, panels.items(), strict=False):
            rows_at = np.arange(len(decisions) + 1) - 0.5
            image = axes.pcolormesh(edges, rows_at, shares.T, cmap="cividis", vmin=0, vmax=1)
            image.set_rasterized(True)
            axes.set_title(name)
            axes.grid(False)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=2))
            axes.tick_params(axis="y", labelsize=6, length=0)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        grid[0, 0].set_yticks(range(len(decisions)), decisions)
        grid[0, 0].invert_yaxis()
        canvas.supxlabel("step", fontsize=8.5)
        canvas.colorbar(
            image, ax=grid, label="probability", shrink=min(1.0, 2.5 / (rows * len(decisions) * 0.16)), aspect=15
        )

    what = "One panel per format, one row per decision: its probability at each step, until the choice was made."
    size = (WIDTH, 1.0 + rows * (0.35 + 0.13 * len(decisions)))
    figure = partial(interactive.policy_maps, panels, steps, decisions)
    return Drawing(f"{where(run)}: policy of {run.label}", what, size, draw, where(run), figure)


def curves(runs: Sequence[Run], histories: Sequence[Sequence[Mapping[str, Any]]]) -> Drawing | None:
    """Loss, reward, quality, cost and entropy over the steps: recorded values thin, running means thick.

    Args:
        runs: Runs of one cost type.
        histories: The lines of each run's history.

    Returns:
        The figure, with a panel for each measure that any run recorded; None if there are none.
    """
    labels = [_wrapped(run.label, 75) for run in runs]
    kind, unit = (runs[0].record[name] for name in ("cost_type", "cost_unit"))
    measures = {
        "loss": "loss",
        "reward": "reward",
        "quality": "quality",
        "cost": f"{kind} cost [{unit}]",
        "entropy": "entropy [nat]",
    }
    known = {name: [series(history, name) for history in histories] for name in measures}
    shown = [name for name, lines in known.items() if any(len(values) for _, values in lines)]
    rows = [shown[i : i + 2] for i in range(0, len(shown), 2)]
    if not rows:
        return None

    def draw(canvas: Canvas) -> None:
        mosaic: list[Any] = [row if len(row) == 2 else row * 2 for row in rows]
        grid = canvas.subplot_mosaic(mosaic, sharex=True)
        for name in shown:
            axes = grid[name]
            for index, (run, (steps, values)) in enumerate(zip(runs, known[name], strict=True)):
                colour, dash = _line(index)
                if not len(values):
                    continue
                axes.plot(steps, values, color=colour, lw=0.5, alpha=0.3)
                axes.plot(steps, running_mean(values), dash, color=colour, lw=1.3)
                if name == "cost" and run.record["cost_target"] is not None:
                    axes.axhline(run.record["cost_target"], color=colour, lw=0.8, ls=(0, (4, 3)))
            axes.set_title(measures[name], loc="left")
        for name in rows[-1]:
            grid[name].set_xlabel("step")
        lines = [(label, *_line(index)) for index, label in enumerate(labels)]
        handles = [Line2D([], [], color=colour, ls=dash, label=label) for label, colour, dash in lines]
        canvas.legend(handles=handles, loc="outside lower left", ncols=1)

    parts = " or ".join(dict.fromkeys(counted_part(kind, scope_of(run.record)) for run in runs))
    what = f"Thick: running mean over a twentieth of the steps. Cost: {parts}; dashed level: the target."
    size = (WIDTH, 1.4 * len(rows) + (0.04 + 0.12 * _most_lines(labels)) * len(runs))
    smooth = {
        measures[name]: [(steps, running_mean(values) if len(values) else values) for steps, values in known[name]]
        for name in shown
    }
    levels = {measures["cost"]: [run.record["cost_target"] for run in runs]}
    figure = partial(interactive.course, [run.label for run in runs], smooth, levels)
    title = f"{where(runs[0])}: the course of the training ({kind})"
    return Drawing(title, what, size, draw, where(runs[0]), figure)


def drawn_assignments(run: Run, history: Sequence[Mapping[str, Any]]) -> Drawing | None:
    """Cost and quality of every assignment that the search drew; None if the run recorded none.

    A step's "draws" are pairs of cost and quality. Without them, "cost" and "quality" are the means over its draws.
    """
    points = np.array(
        [
            (line["step"], cost, quality)
            for line in history
            if line.get("quality") is not None
            for cost, quality in line.get("draws") or [(line["cost"], line["quality"])]
        ]
    )
    single = all(line.get("draws") for line in history if line.get("quality") is not None)
    if not len(points):
        return None

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        dots = axes.scatter(points[:, 1], points[:, 2], c=points[:, 0], cmap="cividis", s=10, linewidths=0.3)
        dots.set_edgecolor(INK)  # keeps the darkest dots visible on a dark page
        canvas.colorbar(dots, ax=axes, label="step")
        axes.set_xlabel(cost_title(run.record))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.set_ylabel("quality (held-out batch)")
        lines = {"target": (run.record["cost_target"], "--"), "chosen": (run.record["cost"], "-")}
        for name, (cost, dash) in lines.items():
            if cost is not None:
                axes.axvline(cost, color=COLOURS[1], ls=dash, lw=1, label=f"{name}: {cost:.4g}")
        canvas.legend(loc="outside lower left", ncols=2)

    dot = "an assignment that the search drew" if single else "the mean over the draws of a step"
    what = f"Each dot is {dot}, coloured by its step."
    figure = partial(interactive.draws, points, run.record)
    return Drawing(f"{where(run)}: draws of {run.label}", what, (WIDTH, 3.2), draw, where(run), figure)


def sensitivities(kind: str, runs: Sequence[Run], found: Mapping[Path, Sensitivities]) -> Drawing:
    """One row of marks per layer and run: how sensitive it is in each format, on a logarithmic axis.

    Args:
        kind: The measurement, such as "measured" or "fisher".
        runs: Runs of one task and model that have it.
        found: Run folder -> its sensitivities.
    """
    layers = short_names(list(dict.fromkeys(name for run in runs for name in run.record["assignment"])))
    figure = interactive.sensitivity_marks(kind, runs, found)
    labels = [_wrapped(trace["meta"], 75) for trace in figure["data"]]

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for trace, label in zip(figure["data"], labels, strict=True):
            colour = trace["marker"]["color"]
            for x, y, symbol in zip(trace["x"], trace["y"], trace["marker"]["symbol"], strict=True):
                face = "none" if symbol.endswith("-open") else colour
                axes.plot(y, x, MARKER_OF[symbol.removesuffix("-open")], color=colour, ms=4.5, mfc=face)
            if trace["x"]:
                marker = MARKER_OF[trace["marker"]["symbol"][0].removesuffix("-open")]
                axes.plot([], [], marker, color=colour, ms=4.5, label=label)
        axes.set_xscale("log")
        plain_log_ticks(axes.xaxis)
        axes.set_xlabel(figure["layout"]["yaxis"]["title"]["text"])
        axes.set_yticks(range(len(layers)), layers)
        axes.set_ylim(len(layers) - 0.4, -0.6)
        canvas.legend(loc="outside lower left", ncols=1)

    what = "What quantizing one layer alone does to the outputs. Filled: the format that the run chose."
    size = (WIDTH, 1.2 + 0.19 * len(layers) + (0.04 + 0.12 * _most_lines(labels)) * len(labels))
    return Drawing(f"{where(runs[0])}: sensitivities ({kind})", what, size, draw, where(runs[0]), lambda: figure)


def _wrapped(label: str, width: int) -> str:
    """Break a run's label into lines, only between its parts."""
    space = "\N{NO-BREAK SPACE}"
    parts = label.replace(" ", space).split(f"{space}·{space}")
    return textwrap.fill(f"{space}· ".join(parts), width)


def _most_lines(texts: Sequence[str]) -> int:
    return max(text.count("\n") + 1 for text in texts)


def _line(index: int) -> tuple[str, str]:
    """Colour and dashes of the index-th line; the first 24 lines all differ."""
    return COLOURS[index % len(COLOURS)], ("-", "--", ":")[index // len(COLOURS) % 3]


def series(history: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one measure, at the steps that recorded it."""
    known = [(line["step"], line[name]) for line in history if line.get(name) is not None]
    return np.array([step for step, _ in known]), np.array([value for _, value in known])


def running_mean(values: np.ndarray) -> np.ndarray:
    """Centred running mean over a twentieth of the values, and over fewer at both ends."""
    window = np.ones(2 * max(1, len(values) // 40) + 1)
    counts = np.convolve(np.ones(len(values)), window)
    half = len(window) // 2
    return (np.convolve(values, window) / counts)[half : half + len(values)]


def where(run: Run) -> str:
    """Task and model of a run, for titles."""
    return f"{run.record['task']} · {run.record['model']}"


def _decision_names(run: Run, count: int) -> list[str]:
    """Names of the policy's rows: the record's decisions, or its layers if their number fits, or else numbers."""
    names = list(run.record.get("decisions") or run.record["assignment"])
    return short_names(names) if len(names) == count else [f"decision {i}" for i in range(count)]


def _by_format(values: np.ndarray, formats: Sequence[str]) -> dict[str, np.ndarray]:
    """Probability of each format, (times, decisions).

    If a choice is a pair of formats, the result has one entry per format of the weights, and one per format of the
    activations, each summed over the formats of the other.

    Args:
        values: Probabilities of the policy, (times, decisions, choices).
        formats: The search space.
    """
    count = values.shape[-1]
    if count == len(formats) ** 2:
        pairs = values.reshape(*values.shape[:2], len(formats), len(formats))
        sides = {"w": pairs.sum(-1), "a": pairs.sum(-2)}
        return {f"{side} {name}": shares[..., i] for side, shares in sides.items() for i, name in enumerate(formats)}
    names = formats if len(formats) == count else [f"choice {i}" for i in range(count)]
    return {name: values[..., i] for i, name in enumerate(names)}


def _log_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    plain_log_ticks(axes.xaxis)


def format_legend(
    canvas: Canvas, names: Sequence[str], palette: Mapping[str, FormatStyle], hatched: bool = True
) -> None:
    """Draw a legend of formats, at most six side by side."""
    handles = [
        Patch(
            facecolor=palette[name].colour,
            hatch=palette[name].hatch if hatched else None,
            edgecolor=INK,
            linewidth=0.4,
            label=f"{name} ({palette[name].bits:g} bits)" if name == "float" else name,
        )
        for name in names
    ]
    canvas.legend(handles=handles, loc="outside lower left", ncols=min(len(names), 6), handlelength=1.2)

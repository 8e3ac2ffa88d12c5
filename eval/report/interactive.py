"""The report's figures as plotly.js takes them, with what the pointer shows on each point.

Texts in a figure (names, ticks, titles) pass through plotly's own mark-up and are escaped here. Hover texts are plain:
the page sets them as text, never as HTML. Colours of text, paper and grid are left to the page's theme.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from eval.report.canvas import COLOURS, HATCHES, INK, FormatStyle, series_style
from eval.report.labels import short_names
from eval.report.layers import NOT_MEASURED, Sensitivities, formats_by_layer, layer_texts
from eval.report.pareto import Panel
from eval.report.records import Group, Run, evenly_spaced, sort_formats
from eval.run.outcome import cost_title, file_sizes

Figure: TypeAlias = dict[str, Any]
"""`data` and `layout` of plotly.js; `customdata` of a point, or else `meta` of its trace, make up its hover text"""

MAX_POINTS = 600
"""single runs drawn in one front; above it, only the means over seeds"""
MAX_DRAWS = 1500
"""assignments drawn in one figure of draws, evenly spaced over the steps"""
MAX_STEPS = 250
"""steps drawn of one curve or policy, evenly spaced"""
SYMBOLS = {
    "o": "circle",
    "s": "square",
    "^": "triangle-up",
    "D": "diamond",
    "v": "triangle-down",
    "P": "cross",
    "X": "x",
    "*": "star",
    "<": "triangle-left",
    ">": "triangle-right",
    "d": "diamond-tall",
}
"""marker of matplotlib -> symbol of plotly"""
PATTERNS = dict(zip(HATCHES, ("", "/", ".", "x", "\\", "+"), strict=True))


def front(panel: Panel, every: Sequence[str]) -> Figure:
    """Cost against quality: runs, means over seeds, and the front of each series."""
    data: list[Figure] = []
    single = sum(len(group.runs) for group in panel.groups) <= MAX_POINTS
    for series in panel.points:
        colour, marker = series_style(series, every)
        groups = [group for group in panel.groups if group.series == series]
        repeated = [group for group in groups if len(group.runs) > 1]
        alone = [group for group in groups if len(group.runs) == 1]
        line = panel.front(series)
        if len(line) > 1:
            data.append(
                _lines([cost for cost, _ in line], [quality for _, quality in line], colour)
                | {"line": {"color": colour, "width": 1.5, "shape": "hv"}, "hoverinfo": "skip", "legendgroup": series}
            )
        base = {"type": "scatter", "mode": "markers", "name": escaped(series), "legendgroup": series}
        look = {"color": colour, "symbol": SYMBOLS[marker]}
        parts = [
            ([_run_point(run, panel) for group in repeated for run in group.runs if single], 7, 0.7, 0),
            ([_mean_point(group, panel) for group in repeated], 11, 1, 1.5),
            ([_run_point(group.runs[0], panel) for group in alone], 10, 0.9, 0),
        ]
        for points, size, opacity, outline in parts:
            if points:
                x, y, texts = zip(*points, strict=True)
                marks = look | {"size": size, "opacity": opacity, "line": {"width": outline}}
                data.append(base | {"x": x, "y": y, "customdata": texts, "marker": marks, "showlegend": False})
        volume = panel.hypervolume(series)
        data[-1]["showlegend"] = True
        data[-1]["name"] += "" if volume is None else f" (hypervolume {volume:.3f})"
    return {
        "data": data,
        "layout": {
            "height": 420,
            "xaxis": {
                "title": {"text": escaped(panel.cost_title)},
                "type": "log" if panel.log_cost else "linear",
                **({"dtick": "D2"} if panel.log_cost else {}),
            },
            "yaxis": {"title": {"text": escaped(panel.metric)}},
        },
    }


def _run_point(run: Run, panel: Panel) -> tuple[float, float, str]:
    """(cost, quality, hover text) of a run."""
    cost = run.costs[panel.cost_type]
    lines = [run.label, f"{panel.cost_type} cost {cost:.4g} {panel.cost_unit}", f"{panel.metric} {run.quality:.4f}"]
    if size := file_sizes(run.record):
        lines.append(f"whole file {size[0]:.4g} MiB, in float {size[1]:.4g}")
    return cost, run.quality, "\n".join([*lines, "formats (weights / activations):", *formats_by_layer(run)])


def _mean_point(group: Group, panel: Panel) -> tuple[float, float, str]:
    """(cost, quality, hover text) of the mean over a configuration's seeds."""
    (cost, cost_sd), (quality, quality_sd) = group.cost(panel.cost_type), group.quality
    first = group.runs[0]
    lines = [
        " · ".join([first.name, *first.details]),
        f"mean of {len(group.runs)} seeds: {_some([str(run.record['seed']) for run in group.runs])}",
        f"{panel.cost_type} cost {cost:.4g} ± {cost_sd:.2g} {panel.cost_unit}",
        f"{panel.metric} {quality:.4f} ± {quality_sd:.4f}",
    ]
    lines += [f"formats of seed {first.record['seed']} (weights / activations):", *formats_by_layer(first)]
    return cost, quality, "\n".join(lines)


def _some(texts: Sequence[str], most: int = 8) -> str:
    """Up to `most` of `texts`, then how many there are beyond these."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def bar_marker(style: FormatStyle) -> Figure:
    """Look of the bars of a format."""
    pattern = {"shape": PATTERNS[style.hatch], "fgcolor": INK, "solidity": 0.25}
    return {"color": style.colour, "pattern": pattern}


def layer_bars(run: Run, sensitivities: Sensitivities, palette: Mapping[str, FormatStyle]) -> Figure:
    """A bar for each layer, as long as its format has bits; two bars where weights and activations differ."""
    assignment = run.record["assignment"]
    sides = ("weights", "activations") if any(w != a for w, a in assignment.values()) else ("weights",)
    texts = layer_texts(run, sensitivities)
    data = []
    for side, side_name in enumerate(sides):
        for name in sort_formats(pair[side] for pair in assignment.values()):
            style = palette[name]
            rows = [row for row, pair in enumerate(assignment.values()) if pair[side] == name]
            layers = list(assignment)
            data.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "x": [style.bits] * len(rows),
                    "y": rows,
                    "name": escaped(name if len(sides) == 1 else f"{side_name} {name}"),
                    "offsetgroup": side_name,
                    "customdata": [texts[layers[row]] for row in rows],
                    "marker": bar_marker(style),
                }
            )
    return {
        "data": data,
        "layout": {
            "height": 130 + (17 if len(sides) == 1 else 26) * len(assignment),
            "barmode": "group",
            "showlegend": True,
            "bargap": 0.2,
            "xaxis": {"title": {"text": "bits"}},
            "yaxis": layer_axis(list(assignment)) | {"autorange": "reversed"},
        },
    }


def format_map(
    runs: Sequence[Run],
    side: int,
    found: Mapping[Path, Sensitivities],
    present: Sequence[str],
    palette: Mapping[str, FormatStyle],
) -> Figure:
    """Runs under each other, a column for each layer, in the colours of their formats.

    Args:
        runs: Of one task and model.
        side: 0 for weights, 1 for activations.
        found: Run folder -> sensitivities.
        present: The formats that occur, by rising bits.
        palette: Format -> its colour.
    """
    layers = list(dict.fromkeys(name for run in runs for name in run.record["assignment"]))
    codes = [
        [present.index(pair[side]) if (pair := run.record["assignment"].get(name)) else None for name in layers]
        for run in runs
    ]
    by_run = [layer_texts(run, found.get(run.folder, NOT_MEASURED)) for run in runs]
    edges = np.linspace(0, 1, len(present) + 1)
    scale = [
        [float(edge), palette[name].colour] for place, name in enumerate(present) for edge in edges[place : place + 2]
    ]
    heat = {
        "type": "heatmap",
        "z": codes,
        "zmin": -0.5,
        "zmax": len(present) - 0.5,
        "colorscale": scale,
        "showscale": False,
        "xgap": 1,
        "ygap": 1,
        "customdata": [[texts.get(name, "") for name in layers] for texts in by_run],
    }
    legend = [
        {"type": "scatter", "mode": "markers", "x": [None], "y": [None], "name": escaped(name), "showlegend": True}
        | {"marker": {"color": palette[name].colour, "symbol": "square", "size": 11, "line": {"width": 1}}}
        for name in present
    ]
    return {
        "data": [heat, *legend],
        "layout": {
            "height": 150 + (24 if len(runs) <= 20 else 16) * len(runs),
            "xaxis": layer_axis(layers) | {"tickangle": -40, "showgrid": False},
            "yaxis": _named_axis([run.label for run in runs]) | {"autorange": "reversed", "showgrid": False},
            "meta": {"long_names": True},
        },
    }


def sensitivity_marks(kind: str, runs: Sequence[Run], found: Mapping[Path, Sensitivities]) -> Figure:
    """Sensitivity of each layer in each format on a logarithmic axis; the format that the run chose is filled."""
    data = []
    layers = list(dict.fromkeys(name for run in runs for name in run.record["assignment"]))
    for place, run in enumerate(runs):
        decisions = run.record.get("decisions") or {name: [name] for name in run.record["assignment"]}
        texts = layer_texts(run, found[run.folder])
        titles = [title for title in found[run.folder] if title.split()[0] == kind]
        for number, title in enumerate(titles):
            values, name = found[run.folder][title], title.removeprefix(kind).strip()
            members = [(layer, own) for own, inner in decisions.items() if own in values for layer in inner]
            members = [(layer, own) for layer, own in members if values[own][0] and layer in texts]
            chosen = ["/".join(dict.fromkeys(run.record["assignment"][layer])) == name for layer, _ in members]
            symbol = list(SYMBOLS.values())[number % len(SYMBOLS)]
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "x": [layers.index(layer) for layer, _ in members],
                    "y": [abs(values[own][0]) for _, own in members],
                    "name": escaped(label := " · ".join(part for part in (run.label, name) if part)),
                    "meta": label,
                    "customdata": [texts[layer] for layer, _ in members],
                    "marker": {
                        "color": COLOURS[place % len(COLOURS)],
                        "symbol": [symbol if own else f"{symbol}-open" for own in chosen],
                        "size": 9,
                    },
                }
            )
    unit = {"measured": "divergence or loss [nats]", "fisher": "score"}.get(kind, f"|{kind}|")
    return {
        "data": data,
        "layout": {
            "height": 420 + 9 * len(data),
            "xaxis": layer_axis(layers) | {"tickangle": -40},
            "yaxis": {"title": {"text": escaped(f"{kind}: {unit}")}, "type": "log", "exponentformat": "e"},
        },
    }


def policy_maps(panels: Mapping[str, NDArray[Any]], steps: NDArray[Any], decisions: Sequence[str]) -> Figure:
    """A heat map for each format: probability by step and decision. panels: format -> (steps, decisions)."""
    kept = evenly_spaced(range(len(steps)), MAX_STEPS)
    layout: Figure = {"height": 150 + 15 * max(8, len(decisions)), "annotations": []}
    layout["coloraxis"] = {
        "cmin": 0,
        "cmax": 1,
        "colorscale": "Cividis",
        "colorbar": {"thickness": 10, "title": {"text": "p"}},
    }
    data = []
    width = 1 / len(panels)
    for number, (name, shares) in enumerate(panels.items()):
        suffix = "" if number == 0 else str(number + 1)
        data.append(
            {
                "type": "heatmap",
                "x": steps[kept],
                "z": shares[kept].T,
                "coloraxis": "coloraxis",
                "xaxis": f"x{suffix}",
                "yaxis": f"y{suffix}",
                "meta": {"label": name, "rows": list(decisions), "value": "probability"},
            }
        )
        left = number * width
        steps_axis = {"domain": [left, left + 0.88 * width], "nticks": 4, "title": {"text": "step"}}
        layout[f"xaxis{suffix}"] = steps_axis | {"anchor": f"y{suffix}"}
        layout[f"yaxis{suffix}"] = layer_axis(list(decisions)) | {"autorange": "reversed", "anchor": f"x{suffix}"}
        layout[f"yaxis{suffix}"]["showticklabels"] = number == 0
        layout["annotations"].append(
            {"text": escaped(name), "x": left + 0.44 * width, "y": 1, "xref": "paper", "yref": "paper"}
            | {"xanchor": "center", "yanchor": "bottom", "showarrow": False}
        )
    return {"data": data, "layout": layout}


def course(
    labels: Sequence[str],
    measures: Mapping[str, Sequence[tuple[NDArray[Any], NDArray[Any]]]],
    levels: Mapping[str, Sequence[float | None]],
) -> Figure:
    """A panel for each measure, a line for each run.

    Args:
        labels: Names of the runs.
        measures: Title of the measure -> (steps, smoothed values) of each run, empty where it recorded none.
        levels: Title of a measure -> level of each run that its panel shows as a dashed line.
    """
    rows = math.ceil(len(measures) / 2)
    layout: Figure = {"height": 90 + 190 * rows + 18 * len(labels), "meta": {"row_height": 190}}
    layout["grid"] = {"rows": rows, "columns": 2, "pattern": "independent", "xgap": 0.16, "ygap": 0.28}
    layout |= {"shapes": [], "hovermode": "x"}
    data = []
    for number, (title, lines) in enumerate(measures.items()):
        suffix = "" if number == 0 else str(number + 1)
        layout[f"xaxis{suffix}"] = {"title": {"text": "step", "standoff": 2}}
        layout[f"yaxis{suffix}"] = {"title": {"text": escaped(title)}}
        for place, (steps, values) in enumerate(lines):
            kept = evenly_spaced(range(len(steps)), MAX_STEPS)
            colour, dash = COLOURS[place % len(COLOURS)], ("solid", "dash", "dot")[place // len(COLOURS) % 3]
            if len(steps):
                data.append(
                    _lines(steps[kept], values[kept], colour, dash)
                    | {"name": escaped(labels[place]), "legendgroup": str(place), "showlegend": number == 0}
                    | {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}", "meta": {"label": labels[place], "value": title}}
                )
            if (level := levels.get(title, (None,) * len(labels))[place]) is not None:
                layout["shapes"].append(
                    {"type": "line", "xref": f"x{suffix} domain", "yref": f"y{suffix}", "x0": 0, "x1": 1}
                    | {"y0": level, "y1": level, "line": {"color": colour, "width": 1, "dash": "dash"}}
                )
    return {"data": data, "layout": layout}


def draws(points: NDArray[Any], record: Mapping[str, Any]) -> Figure:
    """Cost and quality of drawn assignments, coloured by step. points: (draws, 3) of step, cost, quality."""
    kept = points[evenly_spaced(range(len(points)), MAX_DRAWS)]
    lines = {"target": (record["cost_target"], "dash"), "chosen": (record["cost"], "solid")}
    data: list[Figure] = [
        {
            "type": "scatter",
            "mode": "markers",
            "x": kept[:, 1],
            "y": kept[:, 2],
            "customdata": [
                f"step {step:.0f}\ncost {cost:.4g} {record['cost_unit']}\nquality {quality:.4f}"
                for step, cost, quality in kept
            ],
            "marker": {
                "color": kept[:, 0],
                "colorscale": "Cividis",
                "size": 6,
                "line": {"width": 0.5},
                "colorbar": {"title": {"text": "step"}, "thickness": 10},
            },
            "showlegend": False,
        }
    ]
    low, high = float(kept[:, 2].min()), float(kept[:, 2].max())
    for name, (cost, dash) in lines.items():
        if cost is not None:
            own = f"{name}: {cost:.4g} {record['cost_unit']}"
            data.append(
                _lines([cost, cost], [low, high], COLOURS[1], dash)
                | {"name": escaped(own), "customdata": [own] * 2, "showlegend": True}
            )
    layout = {"height": 400, "xaxis": {"title": {"text": escaped(cost_title(record))}}}
    return {"data": data, "layout": layout | {"yaxis": {"title": {"text": "quality (held-out batch)"}}}}


def escaped(text: str) -> str:
    """`text` as plotly shows it literally; plotly knows no &quot;, so quotes stay."""
    return html.escape(text, quote=False)


def plain(value: Any) -> Any:
    """JSON values of a figure: arrays as lists, numbers to 6 digits, and null for those that are not finite."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _lines(x: Any, y: Any, colour: str, dash: str = "solid") -> Figure:
    style = {"color": colour, "width": 1.8, "dash": dash}
    return {"type": "scatter", "mode": "lines", "x": x, "y": y, "line": style, "showlegend": False}


def layer_axis(names: Sequence[str]) -> Figure:
    """Axis with a tick for each layer, named in short."""
    return _named_axis(short_names(names))


def _named_axis(names: Sequence[str]) -> Figure:
    """An axis whose positions 0, 1, ... carry names."""
    return {"tickvals": list(range(len(names))), "ticktext": [escaped(name) for name in names], "zeroline": False}

"""Picture of a searched architecture: what each layer keeps of its size, in the colour of its format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.ticker import PercentFormatter

from eval.report.canvas import INK, WIDTH, Canvas, Drawing, FormatStyle
from eval.report.interactive import Figure, bar_marker, escaped, layer_axis
from eval.report.labels import short_names
from eval.report.plots import format_legend, where
from eval.report.records import Run, sort_formats


@dataclass(frozen=True)
class KeptLayer:
    """A layer of the whole model, and what the chosen architecture keeps of it."""

    name: str
    share: float
    """Multiply-accumulate operations of the chosen layer over those of the whole one; 0 for a layer left out."""
    weight: str | None
    """Format of its weights; None for a layer left out."""
    text: str
    """What the pointer finds."""


def architecture(run: Run, palette: Mapping[str, FormatStyle]) -> Drawing | None:
    """One bar per layer of the whole model, as long as the share that is left; None without a searched architecture."""
    if not run.record.get("architecture"):
        return None
    layers = kept_layers(run.record)
    present = sort_formats(layer.weight for layer in layers if layer.weight is not None)

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        for row, layer in enumerate(layers):
            axes.barh(row, 1, 0.7, color="none", ec=INK, lw=0.4, alpha=0.4)
            if layer.weight is None:
                axes.text(0.01, row, "left out", va="center", fontsize=7)
            else:
                style = palette[layer.weight]
                axes.barh(row, layer.share, 0.7, color=style.colour, hatch=style.hatch, ec=INK, lw=0.4)
        axes.set_yticks(range(len(layers)), short_names([layer.name for layer in layers]))
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.grid(False, axis="y")
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.set_xlabel("operations of the layer that are left")
        format_legend(canvas, present, palette)

    what = "What the chosen architecture keeps of each layer's operations (MACs). Colour: format of the weights."
    size = WIDTH, 1.1 + 0.19 * len(layers)
    return Drawing(f"{where(run)}: {run.label}", what, size, draw, where(run), partial(_bars, layers, present, palette))


def kept_layers(record: Mapping[str, Any]) -> list[KeptLayer]:
    """Return the layers of the whole model of a record, from input to output."""
    left = {layer["name"]: layer for layer in record["layers"]}
    found = []
    for whole in record["whole_layers"]:
        name, own = whole["name"], left.get(whole["name"])
        if own is None:
            found.append(KeptLayer(name, 0.0, None, f"{name}\nleft out"))
            continue
        share = own["macs"] / whole["macs"] if whole["macs"] else 1.0
        weight, activation = record["assignment"][name]
        sizes = (f"{kind} {own[kind]:,} of {whole[kind]:,}" for kind in ("macs", "params"))
        found.append(KeptLayer(name, share, weight, "\n".join([name, *sizes, f"{weight} / {activation}"])))
    return found


def _bars(layers: Sequence[KeptLayer], formats: Sequence[str], palette: Mapping[str, FormatStyle]) -> Figure:
    """Return the interactive counterpart."""
    data: list[Figure] = []
    for name in formats:
        style = palette[name]
        rows = [row for row, layer in enumerate(layers) if layer.weight == name]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "x": [layers[row].share for row in rows],
                "y": rows,
                "name": escaped(name),
                "customdata": [layers[row].text for row in rows],
                "marker": bar_marker(style),
            }
        )
    return {
        "data": data,
        "layout": {
            "height": 130 + 17 * len(layers),
            "barmode": "overlay",
            "showlegend": True,
            "bargap": 0.2,
            "xaxis": {"title": {"text": "operations of the layer that are left"}, "tickformat": ".0%", "range": [0, 1]},
            "yaxis": layer_axis([layer.name for layer in layers]) | {"autorange": "reversed"},
        },
    }

"""The picture at the top of RESULTS.md, drawn from that file's own tables: docs/pictures/results.png.

python -m benchmarks.results_picture
"""

from __future__ import annotations

import re
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.report.canvas import COLOURS, STYLE

ROOT = Path(__file__).resolve().parents[1]
RESULTS = (ROOT / "benchmarks" / "RESULTS.md").read_text()
PICTURE = ROOT / "docs" / "pictures" / "results.png"


def rows(heading: str, header: str) -> list[list[str]]:
    """The cells of the first table below `heading` whose header line starts with `header`."""
    below = RESULTS.split(heading, 1)[1].split(header, 1)[1]
    lines = below[below.index("\n|--") + 1 :].split("\n\n")[0].splitlines()[1:]
    return [[cell.strip(" *") for cell in line.strip().strip("|").split("|")] for line in lines]


def number(cell: str) -> float:
    """The first number of a cell."""
    return float(re.findall(r"\d+\.?\d*", cell)[0])


def search_gains(axes: Axes) -> None:
    """ResNet-20 at three budgets: search, the measured allocator, one format everywhere."""
    points: dict[str, set[tuple[float, float]]] = {"one format": set(), "measured": set(), "search": set()}
    budget = ""
    for cells in rows("## The search and its competitors", "| budget, formats | method | cost [GBOPs]"):
        budget = cells[0] or budget
        method = "one format" if cells[1].startswith("uniform int") else cells[1]
        if budget in ("4.09 bits: 2,3,4,5,6,8", "3.5 bits: 2,3,4,6,8", "3 bits: 2,3,4,6,8") and method in points:
            points[method].add((number(cells[2]), number(cells[4])))
    for (method, found), colour, marker in zip(
        points.items(), (COLOURS[2], COLOURS[0], COLOURS[1]), "^os", strict=True
    ):
        axes.plot(*zip(*sorted(found), strict=True), color=colour, marker=marker, label=method)
    axes.axhline(91.64, color=COLOURS[-1], linewidth=1, linestyle="--", label="float (10.38 GBOPs)")
    axes.set(title="Search: ResNet-20, CIFAR-10", xlabel="compute [GBOPs]", ylabel="accuracy [%]")
    axes.legend()


def bars(axes: Axes, title: str, values: dict[str, float], label: str, line: float | None = None) -> None:
    """One horizontal bar for each value, the first at the top."""
    drawn = axes.barh(range(len(values)), list(values.values()), color=COLOURS[0], height=0.6)
    axes.bar_label(drawn, fmt="%.4g", padding=2, fontsize=7.5)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(title=title, xlabel=label)
    if line is not None:
        axes.axvline(line, color=COLOURS[-1], linewidth=1, linestyle="--")


def encoder(axes: Axes) -> None:
    """MRPC accuracy of the encoder, by method."""
    found = [cells for cells in rows("## A pre-trained encoder", "| task | method | memory")]
    mrpc = found[: next(at for at, cells in enumerate(found) if cells[0].startswith("SST-2"))]
    wanted = ("uniform int4", "hawq_v2", "fisher", "measured", "search")
    values = {f"{cells[1]}, {number(cells[2]):.2f} MiB": number(cells[4]) for cells in mrpc if cells[1] in wanted}
    bars(axes, "Encoder: MRPC (float 75.98, 20.25 MiB)", values, "accuracy [%]", number(mrpc[0][0].split("float")[1]))
    axes.set_xlim(65, 80)


def speed(axes: Axes) -> None:
    """Time of a search step over a float step, without and with rewards."""
    found = rows("## Speed", "| model | float [ms] | search")
    values = {cells[0].split()[0].rstrip(","): number(cells[2]) for cells in found}
    values |= {f"{cells[0].split()[0].rstrip(',')}, rewards": number(cells[4]) for cells in found}
    bars(axes, "Speed: search step / float step", values, "ratio of times", 1.0)
    axes.set_xlim(0, 1.6)


def exports(axes: Axes) -> None:
    """Size of packed and ONNX files over the float32 checkpoint."""
    values: dict[str, float] = {}
    model = ""
    for cells in rows("## Exports", "| run | export | layers as chosen"):
        model = cells[0] or model
        if cells[1] in ("packed", "onnx") and model in ("resnet20", "resnet18", "mobilenetv2", "encoder"):
            values[f"{model}, {cells[1]}"] = number(cells[3])
    bars(axes, "Exports: file / float32 checkpoint", values, "ratio of sizes")
    axes.set_xlim(0, 0.8)


def main() -> None:
    """Draw the four panels."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9.0, 6.4), layout="constrained")
        for axes, draw in zip(figure.subplots(2, 2).flat, (search_gains, encoder, speed, exports), strict=True):
            draw(axes)
        figure.savefig(PICTURE, dpi=120)


if __name__ == "__main__":
    main()

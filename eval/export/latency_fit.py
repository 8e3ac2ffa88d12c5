"""Fits a table of layers' latencies to whole models, so that the sum of its rows is what a stopwatch says.

Layers measured by themselves read and write memory that a whole model keeps in caches, and start what a whole model
joins: their latencies sum to more than the model's.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from eval.export.finished_run import FinishedRun
    from quant.formats import Format

Pair = tuple[str, str]
"""Names of a weight format and an activation format."""
FITTED, HELD_OUT = 16, 6
"""Number of assignments that the table is fitted to, besides one format throughout, and that it is judged by."""


@dataclass(frozen=True)
class LatencyFit:
    """latency of a model = offset + sum over its layers of scale[pair of formats] x latency of the layer alone."""

    scales: dict[str, float]
    """Pair of formats, as 'int4/int8' -> factor."""
    offset_ms: float
    fitted_on: int
    """Number of models that it was fitted to."""
    held_out: list[tuple[float, float]]
    """(sum of the table's rows, measured), in ms, of models that it was not fitted to."""

    @property
    def error(self) -> float:
        """Mean error on the models that it was not fitted to, as a share of the measured latency."""
        return float(np.mean([abs(table / measured - 1) for table, measured in self.held_out]))

    def as_json(self) -> dict[str, Any]:
        """Return the content of latency.json."""
        return {**asdict(self), "mean_relative_error": self.error}


def fit_to_models(
    run: FinishedRun, rows: Sequence[Mapping[str, Any]], repeats: int, threads: int
) -> tuple[list[dict[str, Any]], LatencyFit]:
    """Measure the model under drawn assignments, and scale the rows of a table to these.

    Args:
        run: The run.
        rows: Rows of the table, with the latency of each layer alone.
        repeats: Number of measurements of which the median is taken.
        threads: Threads of ONNX Runtime.

    Returns:
        The rows with latencies whose sum is the model's, and how well they do.
    """
    from cost.cost import assignment_from_json
    from eval.export.onnx_inputs import example

    alone: dict[str, dict[Pair, float]] = {}
    for row in rows:
        alone.setdefault(row["layer"], {})[row["weight_format"], row["activation_format"]] = row["ms"]
    fitted, held_out = draw(alone, FITTED), draw(alone, HELD_OUT, seed=1)
    pairs = list(dict.fromkeys(pair for own in alone.values() for pair in own))
    fitted = [*uniform(alone, pairs), *fitted]
    batches = [] if run.round_outputs is False else [example(run)]
    measured = [assignment_from_json(assignment) for assignment in (*fitted, *held_out)]
    times = model_latencies_of(run, measured, batches, repeats, threads)
    scales, offset = solve(alone, pairs, fitted, times[: len(fitted)])
    share = offset / len(alone)
    table = [
        {**row, "ms": round(scales[row["weight_format"], row["activation_format"]] * row["ms"] + share, 6)}
        for row in rows
    ]
    known = {(row["layer"], (row["weight_format"], row["activation_format"])): row["ms"] for row in table}
    sums = [sum(known[item] for item in assignment.items()) for assignment in held_out]
    judged = list(zip(sums, times[len(fitted) :], strict=True))
    return table, LatencyFit({"/".join(pair): scales[pair] for pair in pairs}, offset, len(fitted), judged)


def draw(alone: Mapping[str, Mapping[Pair, float]], count: int, seed: int = 0) -> list[dict[str, Pair]]:
    """Draw assignments, layer by layer."""
    generator = random.Random(seed)
    return [{layer: generator.choice(list(own)) for layer, own in alone.items()} for _ in range(count)]


def uniform(alone: Mapping[str, Mapping[Pair, float]], pairs: Sequence[Pair]) -> list[dict[str, Pair]]:
    """Return the assignments of one pair throughout; layers that do not have it take their first."""
    return [{layer: pair if pair in own else next(iter(own)) for layer, own in alone.items()} for pair in pairs]


def solve(
    alone: Mapping[str, Mapping[Pair, float]],
    pairs: Sequence[Pair],
    assignments: Sequence[Mapping[str, Pair]],
    times: Sequence[float],
) -> tuple[dict[Pair, float], float]:
    """Return a scale for each pair of formats and an offset, all >= 0, with the least relative squared error."""
    from scipy.optimize import nnls

    parts = np.array(
        [[*(sum(alone[n][p] for n, p in chosen.items() if p == pair) for pair in pairs), 1.0] for chosen in assignments]
    )
    measured = np.asarray(times)
    solution, _ = nnls(parts / measured[:, None], np.ones(len(measured)))
    return dict(zip(pairs, map(float, solution), strict=False)), float(solution[-1])


def model_latencies_of(
    run: FinishedRun,
    assignments: Sequence[Mapping[str, tuple[Format, Format]]],
    batches: Sequence[Mapping[str, Tensor]],
    repeats: int,
    threads: int,
) -> list[float]:
    """Measure the whole model under each assignment, in turns.

    Args:
        run: The run.
        assignments: Layer name -> formats.
        batches: Inputs to measure the ranges of outputs on; none: outputs stay in float.
        repeats: Number of measurements of which the median is taken.
        threads: Threads of ONNX Runtime.

    Returns:
        Median latencies in ms.
    """
    from eval.export.onnx_inputs import example
    from eval.export.onnx_timing import latencies
    from quant.convert import get_formats, set_formats
    from quant.export.onnx.export import trace, write_onnx
    from quant.formats import BlockFormat

    inputs, modules = example(run), run.modules
    before, traces = get_formats(modules), {}
    with TemporaryDirectory() as folder:
        files: list[Path] = []
        try:
            for assignment in assignments:
                set_formats(modules, assignment)
                blocks = tuple((name, str(a)) for name, (_, a) in assignment.items() if isinstance(a, BlockFormat))
                if blocks not in traces:  # block formats of inputs are part of the trace
                    traces[blocks] = trace(run.model, modules, inputs)
                files.append(Path(folder) / f"{len(files)}.onnx")
                write_onnx(files[-1], traces[blocks], modules, batches)
        finally:
            set_formats(modules, before)
        (times,) = latencies([(files, inputs)], repeats, threads)
    return times

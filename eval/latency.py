"""Measures latencies of a run's model on ONNX Runtime: `python -m eval.latency RUN_DIR`.

Measures, on the CPU with one example and in a separate process, the whole model as chosen and in float, and each
searched layer by itself in every pair of formats of the search space. The latencies of the layers are then fitted to
whole models under drawn assignments, so that they sum to a model's. `--max_latency` reads the resulting table.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that need these packages
    from eval.commands import require_packages

    require_packages()

import csv
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from eval.config.files import require, writing
from eval.config.parser import CommandParser, entry
from eval.export.finished_run import FinishedRun, finished_run
from eval.export.formats import ONNX_PACKAGES
from eval.export.latency_fit import fit_to_models, model_latencies_of
from eval.export.onnx_inputs import example, examples
from eval.export.onnx_timing import REPEATS, latencies
from eval.run.limits import COLUMNS
from quant.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from eval.report.tables import Column
    from quant.formats import Format
    from quant.quant_module import QuantModule

TABLE = "latency.csv"
ROUND_OUTPUTS_MEASURED = "what convolutions return is rounded to 8 bits, as in most exports (the default)"


def layer_latencies(run: FinishedRun, repeats: int = REPEATS, threads: int = 1) -> list[dict[str, Any]]:
    """Measure every searched layer in float and in every pair of formats of the search space.

    Equal calls (same layer type, settings and sizes) are measured once per pair of formats; the pairs take turns, so
    that slow phases of the machine affect them alike. The latency of a layer is the sum over its calls.

    Args:
        run: a finished run.
        repeats: number of measurements of which the median is taken.
        threads: threads of ONNX Runtime.

    Returns:
        Rows with the keys `COLUMNS`; latencies in ms.
    """
    from quant.convert import get_formats, set_formats
    from quant.export.onnx.export import write_onnx
    from quant.formats import BlockFormat

    modules, pairs = run.modules, format_pairs(run)
    each = [(name, pair) for name in run.record["assignment"] for pair in pairs_of(modules[name], pairs)]
    before = get_formats(modules)
    calls = layer_calls(run, modules)
    files: dict[Any, dict[tuple[Format, Format], Path]] = {}
    inputs: dict[Any, dict[str, Tensor]] = {}
    traces: dict[Any, Any] = {}
    with TemporaryDirectory() as folder:
        try:
            for name, (weight, activation) in each:
                module = modules[name]
                set_formats(modules, {name: (weight, activation)})
                for x in calls[name]:
                    alike = signature(module), x.shape
                    known, inputs[alike] = files.setdefault(alike, {}), {"x": x}
                    if (weight, activation) in known:
                        continue
                    # Of the formats, only a block format of the activations is part of the trace.
                    blocks = activation if isinstance(activation, BlockFormat) else None
                    if (alike, blocks) not in traces:
                        traces[alike, blocks] = trace_layer(module, x)
                    path = Path(folder) / f"{sum(map(len, files.values()))}.onnx"
                    examples = [] if run.round_outputs is False else [{"x": x}]
                    write_onnx(path, traces[alike, blocks], {"layer": module}, examples)
                    known[weight, activation] = path
        finally:
            set_formats(modules, before)
        groups = [(list(known.values()), inputs[alike]) for alike, known in files.items()]
        measured = latencies(groups, repeats, threads)
    times = {
        alike: dict(zip(known, taken, strict=True))
        for (alike, known), taken in zip(files.items(), measured, strict=True)
    }
    rows = []
    for name, pair in each:
        total = sum(times[signature(modules[name]), x.shape][pair] for x in calls[name])
        rows.append(dict(zip(COLUMNS, (name, pair[0].name, pair[1].name, round(total, 6)), strict=True)))
    return rows


def format_pairs(run: FinishedRun) -> list[tuple[Format, Format]]:
    """Return the (weight, activation) formats that a layer can have: float, the search space, those chosen."""
    from cost.cost import assignment_from_json
    from quant.formats import FLOAT

    chosen = assignment_from_json(run.record["assignment"]).values()
    config = run.config
    searched: Sequence[tuple[Format, Format]] = config.search_pairs if config.chooses else ()
    if config.engine is not None and searched:
        searched = config.stored_pairs
    return list(dict.fromkeys([(FLOAT, FLOAT), *searched, *chosen]))


def pairs_of(module: QuantModule, pairs: Sequence[tuple[Format, Format]]) -> list[tuple[Format, Format]]:
    """Return the different pairs that a layer runs in: an embedding has no activation format."""
    from quant.quant_module import runs_in

    return list(dict.fromkeys(runs_in(type(module).reach, pair) for pair in pairs))


def layer_calls(run: FinishedRun, modules: Mapping[str, QuantModule]) -> dict[str, list[Tensor]]:
    """Run the model on one example, and return the inputs of each layer, one per call."""
    import torch

    from quant.module_utils import first_tensor

    calls: dict[str, list[Tensor]] = {name: [] for name in modules}

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_tensor(args, kwargs)
        assert x is not None
        calls[name].append(x.detach().clone())

    handles = [
        module.register_forward_pre_hook(lambda _, *given, name=name: note(name, *given), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        with torch.no_grad():
            run.model(**example(run))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def trace_layer(module: QuantModule, x: Tensor) -> Any:
    """Trace a model that consists of this layer."""
    from torch import nn

    from quant.export.onnx.export import trace

    model = nn.Sequential()
    model.layer = module
    return trace(model, {"layer": module}, {"x": x})


def signature(module: Any) -> tuple[Any, ...]:
    """Return the properties of a layer that its latency depends on, besides formats and input."""
    settings = ("stride", "padding", "dilation", "groups", "padding_mode")
    return type(module), module.weight.shape, *(str(getattr(module, name, "")) for name in settings)


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the table as CSV with the columns `layer,weight_format,activation_format,ms`."""
    from trainer.training.checkpoint import write_atomically

    def write(temporary: str) -> None:
        with Path(temporary).open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


def model_latencies(run: FinishedRun, repeats: int = REPEATS, threads: int = 1) -> dict[str, float]:
    """Measure the whole model on one example.

    Returns:
        Latencies in ms of the model in the chosen formats ("chosen") and in float ("float").
    """
    from quant.convert import get_formats
    from quant.formats import FLOAT

    assignments = get_formats(run.modules), dict.fromkeys(run.modules, (FLOAT, FLOAT))
    chosen, floats = model_latencies_of(run, assignments, examples(run), repeats, threads)
    return {"chosen": chosen, "float": floats}


def print_latencies(run: FinishedRun, rows: Sequence[Mapping[str, Any]], model: Mapping[str, float]) -> None:
    """Print a table of the layers with one column per pair of formats, and the latencies of the whole model."""
    from rich.console import Console

    from eval.report.tables import Column, Table, print_table

    pairs = list(dict.fromkeys((row["weight_format"], row["activation_format"]) for row in rows))
    layers: dict[str, dict[str, Any]] = {}
    for row in rows:
        pair = f"{row['weight_format']}/{row['activation_format']}"
        layers.setdefault(row["layer"], {"layer": row["layer"]})[pair] = row["ms"]
    columns = [Column("layer", lambda row: row["layer"])]
    columns += [_milliseconds("/".join(pair)) for pair in pairs]
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=10_000)
    print_table(Table(f"{run.record['run_id']}, one example", columns, list(layers.values())), console)
    ratio = model["chosen"] / model["float"]
    console.print(f"\nmodel: {model['chosen']:.4g} ms, {ratio:.2f} of float ({model['float']:.4g} ms)", markup=False)


def _milliseconds(pair: str) -> Column:
    from eval.report.tables import Column

    return Column(f"{pair} [ms]", lambda row: f"{row[pair]:.4f}" if pair in row else "", pair)


def _flags(argv: Sequence[str]) -> Namespace:
    parser = CommandParser("mpq-latency", "ONNX Runtime latencies of a run.", "output/digits/default/RUN --threads 2")
    add = parser.add_argument
    add("run", metavar="RUN_DIR", type=Path, help="folder of a finished run")
    add("--output", type=Path, help=f"the table (default: RUN_DIR/{TABLE})")
    add("--data_dir", help="the run's data, if it has moved")
    add("--repeats", type=int, default=REPEATS, help=f"calls that the median is over (default: {REPEATS})")
    add("--threads", type=int, default=1, help="threads of ONNX Runtime (default: 1)")
    parser.add_switch("round_outputs", ROUND_OUTPUTS_MEASURED)
    flags = parser.parse_args(argv)
    for name in ("repeats", "threads"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name} must be 1 or more, got {getattr(flags, name)}")
    return flags


def main(argv: Sequence[str]) -> int:
    """Measure, print and write the table."""
    from trainer.training.checkpoint import write_json

    flags = _flags(argv)
    require(*ONNX_PACKAGES)
    run = replace(finished_run(flags.run, flags.data_dir), round_outputs=flags.round_outputs)
    if not run.modules:
        raise UserError(f"RUN_DIR {flags.run}: every layer is in float, there is nothing to compare")
    path = flags.output or flags.run / TABLE
    with writing("output", path):  # fail before measuring
        path.parent.mkdir(parents=True, exist_ok=True)
    model = model_latencies(run, flags.repeats, flags.threads)
    rows, fit = fit_to_models(run, layer_latencies(run, flags.repeats, flags.threads), flags.repeats, flags.threads)
    with writing("output", path):
        write_table(rows, path)
        write_json(path.with_suffix(".json"), fit.as_json())
    print_latencies(run, rows, model)
    print(
        f"fitted to {fit.fitted_on} models; on {len(fit.held_out)} others the rows of the table sum to the measured "
        f"latency within {100 * fit.error:.1f} % on average"
    )
    print(f"table: {path}")
    return 0


if __name__ == "__main__":
    entry(main)

"""A search under a latency target against uniform int8: `python -m benchmarks.latency_target FOLDER`.

The model's run for ONNX Runtime of `benchmarks.engines` gives the table of layers (`eval.latency`). The target is
`--share` of what the table says of int8 throughout, or, where that is out of reach, what the fastest formats take and
1 % more. Then int8 throughout and a search over 4 bits, 8 bits and float are trained for as many steps, exported, and
their files take turns in ONNX Runtime, one example, one thread: medians of the ratios of neighbouring calls, with their
quartiles, in the processor's time. FOLDER keeps what is done.
"""

from __future__ import annotations

import csv
import json
import sys
from argparse import ArgumentParser
from pathlib import Path

from benchmarks.engine_calls import OnnxRuntime, onnx_runtime
from benchmarks.engine_models import MODELS, flags_of, run_of, short, train
from benchmarks.engines import batches_of, metric, outputs, ratios
from eval import latency
from eval.config.parser import entry
from eval.export.__main__ import export
from eval.export.finished_run import FinishedRun, finished_run
from eval.export.formats import ONNX
from eval.export.onnx_inputs import example

INT8 = ("int8", "int8")
OWN = "ONNX Runtime's own int8"
Table = dict[str, dict[tuple[str, str], float]]
"""Layer -> (weight format, input format) -> ms."""


def table_of(run: FinishedRun) -> tuple[Path, Table]:
    """Return the file of the latencies of a run's layers, measured unless that is done, and what it says."""
    path = run.folder / latency.TABLE
    if not path.is_file():
        latency.main([str(run.folder)])
    table: Table = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            pair = row["weight_format"], row["activation_format"]
            table.setdefault(row["layer"], {})[pair] = float(row["ms"])
    return path, table


def told(name: str, table: Table, share: float) -> float:
    """Print what the table says of int8; return the target."""
    whole = sum(times[INT8] for times in table.values())
    best = sum(min(times.values()) for times in table.values())
    faster = [layer for layer, times in table.items() if min(times.values()) < 0.95 * times[INT8]]
    print(f"{name}: int8 throughout {whole:.3f} ms by the table, the fastest of each layer {best / whole:.3f} of it")
    print(f"{name}: {len(faster)} of {len(table)} layers have a format over 5 % faster than int8: {', '.join(faster)}")
    return max(share * whole, 1.01 * best)


def exported(run: FinishedRun) -> tuple[Path, float]:
    """Return a run's ONNX file and its accuracy in percent, made unless that is done."""
    folder = run.folder / "export" / "onnx"
    if not (folder / "export.json").is_file():
        export(run, "onnx", folder)
    verdict = json.loads((folder / "export.json").read_text())
    return folder / ONNX, 100 * float(verdict["metrics"]["exported"]["validation"]["accuracy"])


def compare(name: str, shared: Path, root: Path, steps: int, share: float) -> None:
    """Print the rows of a model."""
    path, table = table_of(run_of(name, "onnxruntime", shared, root))
    target = told(name, table, share)
    flags, known = flags_of(name, shared, root)
    common = f"{flags} --engine onnxruntime --max_steps {steps}"
    methods = {
        "uniform int8": "--bits 8",
        "search": f"--search --search_space 4,8,float --max_latency {path} --latency_target {target:.6f}",
    }
    runs = {
        title: finished_run(train(f"{common} {own}", known, root, f"{short(name)}-{title.replace(' ', '-')}-{steps}"))
        for title, own in methods.items()
    }
    files = {title: exported(run) for title, run in runs.items()} | {OWN: own_int8(runs["search"])}
    calls = {title: onnx_runtime(files[title][0]) for title in ("search", *methods, OWN)}
    inputs = {key: x[:1].numpy() for key, x in example(runs["search"]).items()}
    times, said = ratios(calls, inputs, 200)
    for title, (file, accuracy) in files.items():
        kinds = kinds_of(runs[title]) if title in runs else ""
        cells = (name, title, kinds, f"{accuracy:.2f}", f"{file.stat().st_size:,}", f"{times[title]:.3f}", said[title])
        print(f"| {' | '.join(cells)} |", flush=True)


def own_int8(run: FinishedRun) -> tuple[Path, float]:
    """Return ONNX Runtime's static int8 of a run's weights, and its accuracy in percent."""
    folder = run.folder / "own_int8"
    folder.mkdir(exist_ok=True)
    OnnxRuntime().write(run, folder)
    file = folder / "int8.onnx"
    batches = batches_of(run, sys.maxsize)
    return file, metric(outputs(onnx_runtime(file), batches), batches)


def kinds_of(run: FinishedRun) -> str:
    """Return how many layers hold their weights in each format."""
    weights = [pair[0] for pair in run.record["assignment"].values()]
    return ", ".join(f"{weights.count(kind)} {kind}" for kind in sorted(set(weights)))


def main(argv: list[str]) -> int:
    """Print the table."""
    parser = ArgumentParser(prog="python -m benchmarks.latency_target")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="that of benchmarks.engines")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--models", default="ResNet-20,EfficientNet-Lite0", help=f"comma list of {', '.join(MODELS)}")
    parser.add_argument("--steps", type=int, default=60, help="steps of training")
    parser.add_argument("--share", type=float, default=0.93, help="target as a share of int8's latency by the table")
    flags = parser.parse_args(argv)
    for name in flags.models.split(","):
        compare(name, flags.shared.resolve(), flags.folder.resolve(), flags.steps, flags.share)
    print("\ncolumns: model, file, weights of its layers, accuracy [%], bytes, ms, latency of the search / its own")
    return 0


if __name__ == "__main__":
    entry(main)

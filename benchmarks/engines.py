"""What engines make of a run's ONNX export: `python -m benchmarks.engines RUN_DIR... [--examples N]`.

A row for each run and engine (ONNX Runtime in a default session, OpenVINO in float32): whether it loads, on how many
validation examples it predicts what the run's model predicts in PyTorch, its accuracy, the file against float ONNX, and
the latency of one example against the engine's float model and the engine's own int8: ONNX Runtime's static int8
(quantize_static, QDQ, per channel, uint8 inputs, 128 training examples) for images, its dynamic int8 for texts;
OpenVINO's by NNCF (nncf.quantize, the same examples) for images, where the package nncf is installed. Files
take turns in one process, one thread; medians of the ratios of neighbouring calls, with their quartiles. A time is the
processor's for the process, so that what else runs on the machine does not lengthen the longer calls.
"""

from __future__ import annotations

import os
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from eval.config.parser import entry
from eval.export.finished_run import FinishedRun, finished_run
from eval.export.formats import ONNX, write_onnx
from eval.export.onnx_inputs import example, examples, write_float
from quant.errors import UserError

Arrays = Mapping[str, np.ndarray]
COLUMNS = (
    *("run", "engine", "loads", "same predictions", "accuracy [%], the run's", "file / float"),
    *("latency [ms]", "latency / float", "latency / the engine's own int8"),
)
WARM_UP = 5


def onnx_runtime(path: Path) -> Callable[[Arrays], np.ndarray]:
    """The first output of a file in a default session of one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return lambda inputs: session.run(None, {name: inputs[name] for name in names})[0]


def openvino(path: Path) -> Callable[[Arrays], np.ndarray]:
    """The first output of a file in OpenVINO, float32 where it computes in float, one thread."""
    from openvino import Core

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
    model = Core().compile_model(str(path), "CPU", settings)
    names = [entry.get_any_name() for entry in model.inputs]
    request = model.create_infer_request()
    return lambda inputs: request.infer({name: inputs[name] for name in names})[0]


ENGINES = {"ONNX Runtime": onnx_runtime, "OpenVINO": openvino}


def own_int8(run: FinishedRun, plain: Path, path: Path) -> None:
    """Write ONNX Runtime's own int8 of the float file."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_name("prepared.onnx")
    quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)  # which leaves files where it is called
    if run.inputs.pixels is None:
        quantize_dynamic(str(prepared), str(path), per_channel=True)
        return

    class Reader(CalibrationDataReader):
        def __init__(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
            self.batches = iter(batches)

        def get_next(self) -> Arrays | None:
            batch = next(self.batches, None)
            return None if batch is None else {name: x.numpy() for name, x in batch.items()}

    settings: dict[str, Any] = {"quant_format": QuantFormat.QDQ, "per_channel": True}
    batches = examples(replace(run, round_outputs=None))
    quantize_static(str(prepared), str(path), Reader(batches), activation_type=QuantType.QUInt8, **settings)


def nncf_int8(run: FinishedRun, plain: Path, path: Path) -> bool:
    """Write OpenVINO's own int8 of the float file, by NNCF's post-training quantization; False where there is none."""
    batches = examples(replace(run, round_outputs=None))
    if not batches or find_spec("nncf") is None:
        return False
    import nncf
    from openvino import Core, save_model

    feeds = [{name: x.numpy() for name, x in batch.items()} for batch in batches]
    model = nncf.quantize(Core().read_model(str(plain)), nncf.Dataset(feeds), subset_size=len(feeds))
    save_model(model, str(path), compress_to_fp16=False)
    return True


def validation(run: FinishedRun, count: int) -> list[dict[str, torch.Tensor]]:
    """Batches of the first validation examples, with their labels."""
    prepared = run.plan.prepared
    rows = next(iter(prepared.validation.values()))
    places = range(min(count, len(rows)))
    return [prepared.data_collator([rows[n] for n in places[start : start + 32]]) for start in places[::32]]


def predictions(call: Callable[[Arrays], np.ndarray], batches: Iterable[Mapping[str, torch.Tensor]]) -> np.ndarray:
    """The most likely class of each example."""
    outputs = [call({name: x.numpy() for name, x in batch.items()}) for batch in batches]
    return np.concatenate([np.asarray(logits).argmax(-1) for logits in outputs])


def ratios(
    calls: Mapping[str, Callable[[Arrays], np.ndarray]], inputs: Arrays, repeats: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Median time of each call in ms; the first's as a ratio to each: median and quartiles of the turns' ratios."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(WARM_UP + repeats):
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


def report(run: FinishedRun, count: int, repeats: int, folder: Path) -> None:
    """Print the rows of a run."""
    from quant.export.onnx.export import trace

    write_onnx(run, folder)
    exported, plain, own = folder / ONNX, folder / "float.onnx", folder / "int8.onnx"
    inputs = example(run)
    write_float(run, trace(run.model, run.modules, inputs), plain, run.modules)
    own_int8(run, plain, own)
    batches = validation(run, count)
    feed = {name: x.numpy() for name, x in inputs.items()}
    labels = np.concatenate([batch["labels"].numpy() for batch in batches])
    with torch.no_grad():
        logits = [run.model(**{k: x for k, x in batch.items() if k != "labels"})["logits"] for batch in batches]
    expected = torch.cat([x.argmax(-1) for x in logits]).numpy()
    size = f"{exported.stat().st_size / plain.stat().st_size:.3f}"
    for name, load in ENGINES.items():
        title = f"| {run.record['run_id']} | {name} | "
        try:
            calls = {"exported": load(exported), "float": load(plain)}
            if load is onnx_runtime:
                calls["int8"] = load(own)
            elif nncf_int8(run, plain, folder / "nncf.xml"):
                calls["int8"] = load(folder / "nncf.xml")
        except Exception as error:  # the engines' errors share no base class: the cell says what it was
            print(f"{title}no: {' '.join(str(error).split())[:80]} | | | | | | |", flush=True)
            continue
        got = predictions(calls["exported"], batches)
        times, said = ratios(calls, feed, repeats)
        accuracy = f"{100 * float((got == labels).mean()):.2f}, {100 * float((expected == labels).mean()):.2f}"
        same = f"{int((got == expected).sum()):,} of {len(got):,}"
        if "int8" in calls:
            rate = 100 * float((predictions(calls["int8"], batches) == labels).mean())
            said["int8"] += f"; its accuracy {rate:.2f}"
        cells = ("yes", same, accuracy, size, f"{times['exported']:.3f}", said["float"], said.get("int8", ""))
        print(title + " | ".join(cells) + " |", flush=True)


def main(argv: list[str]) -> int:
    """Print the table."""
    parser = ArgumentParser(prog="python -m benchmarks.engines")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--examples", type=int, default=1024, help="validation examples")
    parser.add_argument("--repeats", type=int, default=100, help="turns that medians are over")
    flags = parser.parse_args(argv)
    if missing := [str(folder) for folder in flags.runs if not folder.is_dir()]:
        raise UserError(f"RUN_DIR {missing[0]}: no such folder")
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    for folder in flags.runs:
        with TemporaryDirectory() as scratch:
            report(finished_run(folder), flags.examples, flags.repeats, Path(scratch))
    print(f"\nload of the machine (1, 5, 15 minutes): {', '.join(f'{load:.1f}' for load in os.getloadavg())}")
    return 0


if __name__ == "__main__":
    entry(main)

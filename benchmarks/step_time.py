"""Time and peak memory of a training step: float, uniform int4 and search, as ratios measured in one run.

    python -m benchmarks.step_time [--models resnet20,bert6x384] [--rounds 15]

A search step is its training part: draw an assignment, switch the formats, forward, backward, optimizer step. The
methods take turns, step by step, so that a drift of the machine's speed meets all of them; the ratios are medians over
rounds. Peak memory is a process of its own for each method: the most that was resident, less what was before training.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

METHODS = ("float", "uniform", "search")
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184"}
"""without these, page faults drown every ratio on a CPU"""
MODELS = ("resnet20", "bert6x384")


def model_and_batch(name: str) -> tuple[Any, dict[str, Any], Any]:
    """(model, one training batch, optimizer class with its settings) of a benchmark."""
    import torch

    torch.manual_seed(0)
    if name == "resnet20":
        from eval.vision_nets import CifarResNet

        batch = {"pixel_values": torch.randn(128, 3, 32, 32), "labels": torch.randint(0, 10, (128,))}
        return CifarResNet(20, 10), batch, lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9)
    from transformers import BertConfig, BertForSequenceClassification

    settings = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    batch = {
        "input_ids": torch.randint(0, settings.vocab_size, (32, 64)),
        "attention_mask": torch.ones(32, 64, dtype=torch.long),
        "labels": torch.randint(0, 2, (32,)),
    }
    return BertForSequenceClassification(settings), batch, lambda p: torch.optim.AdamW(p, lr=1e-5)


def make_step(name: str, method: str) -> Callable[[], None]:
    """A function that trains one step."""
    import torch

    from quant.convert import calibrate, quantize_model, set_formats
    from quant.formats import IntFormat

    model, batch, make_optimizer = model_and_batch(name)
    model.train()
    formats = [IntFormat(2), IntFormat(4), IntFormat(8)] if method == "search" else [IntFormat(4)]
    modules = {} if method == "float" else quantize_model(model, formats=formats)
    if modules:
        calibrate(model, modules, [batch])
        set_formats(modules, dict.fromkeys(modules, (formats[0], formats[0])))
    optimizer = make_optimizer(model.parameters())
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        if method == "search":
            drawn = torch.randint(0, len(formats), (len(modules),), generator=generator).tolist()
            set_formats(modules, {n: (formats[d], formats[d]) for n, d in zip(modules, drawn, strict=True)})
        output = model(**batch)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(name: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round's step, by method."""
    from quant.quant_utils import use_compiled

    use_compiled("on")
    steps = {method: make_step(name, method) for method in METHODS}
    for _ in range(3):
        for step in steps.values():
            step()
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(rounds):
        for method, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[method].append(time.perf_counter() - started)
    return seconds


def peak_memory(name: str, method: str) -> float:
    """MiB that training three steps adds to a process in which the model and its batch already are."""
    from quant.quant_utils import use_compiled

    use_compiled("on")
    _compile_on_small_layers()
    step = make_step(name, method)
    gc.collect()
    _reset_peak()
    before = _status("VmRSS")
    for _ in range(3):
        step()
    return (_status("VmHWM") - before) / 1024


def _compile_on_small_layers() -> None:
    """Compiling takes memory of its own, which is not the training's: every graph is made here, for every method."""
    import torch
    from torch import nn

    from quant.convert import calibrate, quantize_model, set_formats
    from quant.formats import IntFormat

    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    layers = quantize_model(net, formats=[IntFormat(4)])
    batch = torch.randn(2, 2, 4, 4)
    calibrate(net, layers, [batch])
    set_formats(layers, dict.fromkeys(layers, (IntFormat(4), IntFormat(4))))
    net(batch).sum().backward()


def _reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _status(key: str) -> float:
    """A field of /proc/self/status in KiB; without /proc, the peak of the whole process."""
    try:
        with open("/proc/self/status") as file:
            return float(next(line.split()[1] for line in file if line.startswith(key)))
    except OSError:
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.peak and any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.step_time", *sys.argv[1:]], os.environ | ALLOCATOR)
    if arguments.peak:
        print(json.dumps(peak_memory(*arguments.peak)))
        return
    import torch

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.rounds} rounds, medians")
    print(f"{'model':<10} {'method':<8} {'step [ms]':>10} {'of float':>9} {'peak [MiB]':>11} {'of float':>9}")
    for name in arguments.models.split(","):
        seconds = measure(name, arguments.rounds)
        peaks = {}
        for method in METHODS:
            command = [sys.executable, "-m", "benchmarks.step_time", "--peak", name, method]
            # Freed memory must go back to the system here, or what is resident says nothing.
            plain = {name: value for name, value in os.environ.items() if name not in ALLOCATOR}
            told = subprocess.run(command, capture_output=True, text=True, check=True, env=plain).stdout
            peaks[method] = json.loads(told)
        for method in METHODS:
            ratio = statistics.median(a / b for a, b in zip(seconds[method], seconds["float"], strict=True))
            print(
                f"{name:<10} {method:<8} {statistics.median(seconds[method]) * 1e3:>10.1f} {ratio:>9.3f} "
                f"{peaks[method]:>11.0f} {peaks[method] / peaks['float']:>9.3f}"
            )


if __name__ == "__main__":
    main()

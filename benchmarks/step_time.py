"""Time and peak memory of a training step: float, uniform int4 and search, as ratios measured in one run.

    python -m benchmarks.step_time [--models resnet20,resnet18,bert6x384,gpt2] [--rounds 15] [--methods float,search]

A search step is its training part: draw an assignment, switch the formats, forward, backward, optimizer step. `reward`
is the whole of it, as a search does it by default: besides, two draws, each a forward pass without gradients on a
quarter of a batch, and a policy step.
`joint` is a search step of formats and architecture: inner widths of 0.5, 0.75 and 1, the number of blocks in a stage.
`compiled` is the float model under torch.compile. The methods take turns, step by step, so that a drift of the
machine's speed meets all of them; the ratios are medians over rounds. Peak memory is a process of its own for each
method: the most that was resident, less what was before training.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.timing import ALLOCATOR, ratio, take_turns, with_allocator
from eval.modeling.vision_nets import CifarResNet, ImageClassifier
from policy.reinforce import Reinforce
from policy.simple_policy import SimplePolicy
from quant.convert import calibrate, quantize_model, rounded_weights_cached, set_formats
from quant.elastic.net import ElasticNet
from quant.formats import IntFormat
from quant.quant_utils import use_compiled

METHODS = ("float", "compiled", "uniform", "search", "reward", "joint")
WIDTHS, DEPTHS = (0.5, 0.75, 1.0), (1, 2)
MODELS = ("resnet20", "resnet18", "bert6x384", "gpt2")
FORMATS = (IntFormat(2), IntFormat(4), IntFormat(8))
REWARD_DRAWS, REWARD_SHARE = 2, 0.25
"""`ReinforceConfig`'s own, which is imported with scipy; a machine with a GPU need not have that"""


def model_and_batch(name: str, shrunk: int = 1) -> tuple[Any, dict[str, Any], Any]:
    """(model, one training batch, optimizer class with its settings) of a benchmark; batches `shrunk` times smaller."""
    torch.manual_seed(0)
    if name.startswith("resnet"):
        count, side = {"resnet20": (128, 32), "resnet18": (32, 64), "resnet50": (128, 224)}[name]
        count, side = max(count // shrunk, 2), max(side // shrunk, 32)
        batch = {"pixel_values": torch.randn(count, 3, side, side), "labels": torch.randint(0, 10, (count,))}
        return _images(name), batch, lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9)
    examples, tokens = {"bert6x384": (32, 64), "bert-base": (64, 128), "gpt2": (16, 64)}[name]
    examples = max(examples // shrunk, 2)
    model, vocabulary = _text(name)
    batch = {
        "input_ids": torch.randint(0, vocabulary, (examples, tokens)),
        "attention_mask": torch.ones(examples, tokens, dtype=torch.long),
    }
    batch["labels"] = batch["input_ids"] if name == "gpt2" else torch.randint(0, 2, (examples,))
    return model, batch, lambda p: torch.optim.AdamW(p, lr=1e-5)


def _images(name: str) -> nn.Module:
    if name == "resnet20":
        return CifarResNet(20, 10)
    import timm

    return ImageClassifier(timm.create_model(name, num_classes=10))


def _text(name: str) -> tuple[nn.Module, int]:
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

    if name == "gpt2":
        settings = GPT2Config(
            n_embd=256, n_layer=6, n_head=8, vocab_size=8192, n_positions=64, bos_token_id=0, eos_token_id=0
        )
        return GPT2LMHeadModel(settings), settings.vocab_size
    wide = BertConfig()
    small = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    config = wide if name == "bert-base" else small
    return BertForSequenceClassification(config), config.vocab_size


def make_step(
    name: str, method: str, device: str = "cpu", autocast: bool = False, shrunk: int = 1
) -> Callable[[], None]:
    """A function that trains one step. autocast: in bfloat16."""
    model, batch, make_optimizer = model_and_batch(name, shrunk)
    model, batch = model.to(device).train(), {key: value.to(device) for key, value in batch.items()}
    searches = method in ("search", "reward", "joint")
    net = ElasticNet(model, batch, WIDTHS, depths=DEPTHS) if method == "joint" else None
    modules = {}
    if method not in ("float", "compiled"):
        modules = quantize_model(model, formats=FORMATS if searches else FORMATS[1:2])
        calibrate(model, modules, [batch])
        set_formats(modules, dict.fromkeys(modules, (IntFormat(4), IntFormat(4))))
    optimizer = make_optimizer(model.parameters())
    run = torch.compile(model) if method == "compiled" else model
    policy = SimplePolicy(max(len(modules), 1), len(FORMATS))
    learner = Reinforce(policy, learning_rate=0.01, schedule="constant", max_entropy_beta=0.0, total_steps=1)
    held_out = {key: value[: math.ceil(REWARD_SHARE * len(value))] for key, value in batch.items()}
    generator = torch.Generator().manual_seed(0)

    def draw() -> torch.Tensor:
        choice = policy.sample(generator)
        if net is not None:
            net.set([int(torch.randint(len(d.choices), (), generator=generator)) for d in net.decisions])
        drawn = (FORMATS[index] for index in choice.tolist())
        set_formats(modules, {name: (f, f) for name, f in zip(modules, drawn, strict=True)})
        return choice

    def loss(inputs: dict[str, torch.Tensor] = batch) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            return run(**inputs)["loss"]

    def reward() -> tuple[torch.Tensor, torch.Tensor]:
        """Of one draw: its choice, and its quality, 0-d."""
        choice = draw()
        return choice, torch.exp(-loss(held_out).float()).double().cpu()

    def step() -> None:
        if searches:
            draw()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        if method == "reward":
            model.eval()
            with torch.inference_mode(), rounded_weights_cached(modules):
                choices, qualities = zip(*(reward() for _ in range(REWARD_DRAWS)), strict=True)
            model.train()
            learner.step(torch.stack(choices), torch.stack(qualities), 0)

    return step


def switch_seconds(name: str, repeats: int = 200) -> tuple[int, float]:
    """Layers of a model, and the median time of switching all of them."""
    modules = quantize_model(model_and_batch(name, shrunk=64)[0], formats=FORMATS)
    assignments = [dict.fromkeys(modules, (format, format)) for format in FORMATS]
    seconds = []
    for turn in range(repeats):
        started = time.perf_counter()
        set_formats(modules, assignments[turn % 3])
        seconds.append(time.perf_counter() - started)
    return len(modules), statistics.median(seconds)


def measure(name: str, rounds: int, methods: Sequence[str] = METHODS, **where: Any) -> dict[str, list[float]]:
    """Seconds of each round's step, by method; `where` goes to `make_step`."""
    device = where.get("device", "cpu")
    use_compiled("on", device)
    return take_turns({method: make_step(name, method, **where) for method in methods}, rounds, device)


def peak_memory(name: str, method: str) -> float:
    """MiB that training three steps adds to a process in which the model and its batch already are."""
    use_compiled("on")
    _warm_up()
    step = make_step(name, method)
    gc.collect()
    _reset_peak()
    before = _status("VmRSS")
    for _ in range(3):
        step()
    return (_status("VmHWM") - before) / 1024


def _warm_up() -> None:
    """What the first layer of a process allocates is not the training's."""
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


def peaks_of(name: str, methods: Sequence[str]) -> dict[str, float]:
    """`peak_memory` of each method, in a process of its own."""
    # Freed memory must go back to the system here, or what is resident says nothing.
    plain = {key: value for key, value in os.environ.items() if key not in ALLOCATOR}
    peaks = {}
    for method in methods:
        command = [sys.executable, "-m", "benchmarks.step_time", "--peak", name, method]
        told = subprocess.run(command, capture_output=True, text=True, check=True, env=plain).stdout
        peaks[method] = json.loads(told)
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--methods", default=",".join(METHODS), help="float comes first: the rest is told as its ratio")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(json.dumps(peak_memory(*arguments.peak)))
        return
    with_allocator("benchmarks.step_time")
    methods, models = arguments.methods.split(","), arguments.models.split(",")
    if unknown := [name for name in models if name not in MODELS] + [name for name in methods if name not in METHODS]:
        parser.error(f"unknown {unknown[0]}; models: {', '.join(MODELS)}; methods: {', '.join(METHODS)}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.rounds} rounds, medians")
    print(f"{'model':<10} {'method':<9} {'step [ms]':>10} {'of float':>9} {'peak [MiB]':>11} {'of float':>9}")
    for name in models:
        seconds = measure(name, arguments.rounds, methods)
        peaks = peaks_of(name, [method for method in methods if method != "compiled"])
        for method in methods:
            told = f"{name:<10} {method:<9} {statistics.median(seconds[method]) * 1e3:>10.1f} "
            told += f"{ratio(seconds, method, methods[0]):>9.3f}"
            if method in peaks:
                told += f" {peaks[method]:>11.0f} {peaks[method] / peaks[methods[0]]:>9.3f}"
            print(told, flush=True)
        layers, switch = switch_seconds(name)
        print(f"{name:<10} switching the formats of all {layers} layers takes {switch * 1e6:.0f} us", flush=True)


if __name__ == "__main__":
    main()

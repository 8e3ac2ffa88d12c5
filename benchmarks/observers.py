"""ResNet-20 quantized without training, its inputs' ranges by every observer; the table goes into RESULTS.md.

    python -m benchmarks.observers [--shared ../shared] [--bits 8,4] [--samples 256] [--observers minmax,mse]

The whole test split (1,017 images). Ranges come from the first training images, not augmented. Weights are quantized
per output channel, to their least squared error, in as many bits as the inputs. Every observer starts from a model of
its own, so none sees what another has found.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from eval.config.parser import parse
from eval.run.plan import make_plan
from eval.run.trainer import evaluate, make_trainer
from quant.convert import calibrate, quantize_model, set_formats
from quant.formats import IntFormat
from quant.quantizers.observers import OBSERVERS
from quant.quantizers.quantizer import QuantizerConfig
from quant.transforms.token_clipping import clip_tokens
from quant.validation import WEIGHTS_ONLY

FOR_INPUTS = [name for name in OBSERVERS if name not in WEIGHTS_ONLY]


def accuracies(
    shared: Path, bits: list[int], samples: int, observers: Iterable[str] = FOR_INPUTS
) -> dict[str, list[float]]:
    """Observer -> accuracy in percent at each of the bit widths; 'float' first."""
    flags = f"--task cifar10 --model resnet20 --data_dir {shared}/data/cifar10 --method float --max_steps 0 --seed 0"
    flags += f" --model_path {shared}/models/resnet20-cifar10 --no_augment --report_to none --quiet"
    plan = make_plan(parse([*flags.split(), "--calibration_samples", str(samples)]))
    trainer, *_ = make_trainer(plan)
    batches, original = list(trainer.calibration.batches()), trainer.model

    def score() -> float:
        return 100 * next(iter(evaluate(trainer, plan).values()))["accuracy"]

    found = {"float": [score()] * len(bits)}
    formats = [IntFormat(width) for width in bits]
    for observer in observers:
        trainer.model = trainer.model_wrapped = model = copy.deepcopy(original)
        activation: Any = QuantizerConfig(range="calibrated", observer=observer, symmetric=False)
        weight = QuantizerConfig(range="calibrated", granularity="channel", observer="mse")
        modules = quantize_model(model, include=plan.layers, formats=formats, weight=weight, activation=activation)
        calibrate(model, modules, batches)
        if observer == "avg_prune_minmax":
            for format in formats:
                clip_tokens(model, modules, batches, format, False)
        found[observer] = []
        for format in formats:
            set_formats(modules, dict.fromkeys(modules, (format, format)))
            found[observer].append(score())
        print(observer, *(f"{accuracy:.2f}" for accuracy in found[observer]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--bits", default="8,4", help="comma list of bit widths")
    parser.add_argument("--samples", type=int, default=256, help="training images that ranges are found on")
    parser.add_argument("--observers", default=",".join(FOR_INPUTS), help="comma list")
    arguments = parser.parse_args()
    bits = [int(width) for width in arguments.bits.split(",")]
    found = accuracies(arguments.shared, bits, arguments.samples, arguments.observers.split(","))
    print("\n| observer | " + " | ".join(f"int{width}" for width in bits) + " |\n|---|" + "---|" * len(bits))
    for observer, values in found.items():
        print(f"| {observer} | " + " | ".join(f"{value:.2f}" for value in values) + " |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

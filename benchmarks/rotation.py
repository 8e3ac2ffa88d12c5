"""Perplexity of SmolLM2-135M with quantized weights and activations, with and without --rotate.

    python -m benchmarks.rotation [--shared ../shared] [--windows 8] [--weight_observer weighted_mse] [--seeds 3]

Needs the packages of `benchmarks.smollm2`. Every Linear layer but the head is quantized: weights with a scale an output
channel, inputs with a scale a token, or with one static scale, calibrated on MRPC's training sentences. The text is
MRPC's test sentences. The rotated float model is measured beside them: it must have the float model's perplexity.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

from benchmarks.smollm2 import model_and_tokenizer, perplexity, windows
from quant.convert import calibrate, quantize_model, set_formats
from quant.formats import FLOAT, IntFormat
from quant.quantizers.quantizer import QuantizerConfig
from quant.transforms.rotation import rotate

INPUTS = {
    "a token": QuantizerConfig(range="dynamic", granularity="token", observer="minmax", symmetric=False),
    "static": QuantizerConfig(range="calibrated", granularity="tensor", observer="minmax", symmetric=False),
}
PAIRS = [(0, 0), (4, 0), (8, 8), (4, 8), (4, 4)]
"""Bits of weights and of activations; 0: float."""


def format_of(bits: int) -> Any:
    return IntFormat(bits) if bits else FLOAT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--weight_observer", default="weighted_mse", help="range estimator of weights")
    parser.add_argument("--seeds", type=int, default=3, help="rotations that are drawn")
    arguments = parser.parse_args()
    model, tokenizer = model_and_tokenizer()
    test = windows(tokenizer, arguments.shared, arguments.windows)
    train = windows(tokenizer, arguments.shared, 8, "train")
    weights = QuantizerConfig(range="calibrated", granularity="channel", observer=arguments.weight_observer)
    formats = [format_of(bits) for bits in sorted({bits for pair in PAIRS for bits in pair if bits})]
    for seed in (None, *range(arguments.seeds)):
        for kind, inputs in INPUTS.items():
            own = copy.deepcopy(model)
            if seed is not None:
                rotate(own, {"input_ids": test[:1]}, seed)
            modules = quantize_model(own, exclude=["lm_head"], formats=formats, weight=weights, activation=inputs)
            calibrate(own, modules, [{"input_ids": train}])
            for weight, activation in PAIRS:
                set_formats(modules, dict.fromkeys(modules, (format_of(weight), format_of(activation))))
                name = "not rotated" if seed is None else f"rotated, seed {seed}"
                print(f"{name}, scale {kind}: W{weight}A{activation} {perplexity(own, test):.2f}", flush=True)


if __name__ == "__main__":
    main()

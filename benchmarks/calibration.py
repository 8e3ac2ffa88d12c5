"""What finding activation ranges costs, observer by observer, as a ratio to the same forward passes in float.

    OMP_NUM_THREADS=1 python -m benchmarks.calibration [--samples 256] [--observers minmax,entropy]

An encoder of 6 layers x 384 with random weights and a GELU, 36 quantized layers, sequences of 64 tokens in batches of
32; int8; weighted_mse is for weights, beside minmax for inputs. CPU time of this process: ranges observed and chosen,
over the forward passes alone, measured in turns.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from quant.convert import calibrate, quantize_model
from quant.formats import IntFormat
from quant.quant_utils import use_compiled
from quant.quantizers.observers import OBSERVERS
from quant.quantizers.quantizer import QuantizerConfig
from quant.validation import WEIGHTS_ONLY

LENGTH, BATCH = 64, 32


def encoder() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
    return BertForSequenceClassification(BertConfig(**sizes)).eval()


def seconds(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--observers", default=",".join(OBSERVERS))
    arguments = parser.parse_args()
    use_compiled("auto")  # as a run does
    model = encoder()
    tokens = torch.randint(1000, 30000, (arguments.samples, LENGTH), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in tokens.split(BATCH)]

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            model(**batch)

    forward()
    floats, costs = [], {}
    for observer in arguments.observers.split(","):
        floats.append(seconds(forward))
        own = copy.deepcopy(model)
        for_weights = observer in WEIGHTS_ONLY
        activation = QuantizerConfig(
            range="calibrated", observer="minmax" if for_weights else observer, symmetric=False, ignore_padding=True
        )
        weight = QuantizerConfig(
            range="calibrated" if for_weights else "dynamic",
            granularity="channel",
            observer=observer if for_weights else "minmax",
        )
        layers = quantize_model(
            own, include=["*.layer.*"], formats=[IntFormat(8)], weight=weight, activation=activation
        )
        costs[observer] = seconds(lambda own=own, layers=layers: calibrate(own, layers, batches))
    plain = statistics.median(floats)
    print(f"float: {plain:.2f} s for {arguments.samples} sequences of {LENGTH} tokens")
    for observer, cost in costs.items():
        print(f"{observer}: {cost / plain:.2f}")


if __name__ == "__main__":
    main()

"""Time and memory of rounding by reconstruction, on SmolLM2-135M; the figures go into benchmarks/RESULTS.md.

    OMP_NUM_THREADS=1 python -m benchmarks.rounding [--shared ../shared] [--format int4g32] [--windows 32]

Processor seconds of float passes over the examples, of gathering the moments of the inputs (which takes the model
through its blocks twice), and of GPTQ itself; and resident memory in units of the float model, beyond that of the
process before it loads the model (and the packages that read it). Linux only.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.smollm2 import model_and_tokenizer, windows
from quant.convert import calibrate, quantize_model, set_formats
from quant.formats import FLOAT, parse_format
from quant.quantizers.quantizer import QuantizerConfig
from quant.reconstruction import rounding


def memory(name: str) -> int:
    """Return VmRSS (resident now) or VmHWM (most since the reset), in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--format", default="int4g32")
    parser.add_argument("--windows", type=int, default=32)
    arguments = parser.parse_args()
    import transformers.models.llama.modeling_llama  # noqa: F401 - belongs to the baseline

    empty = memory("VmRSS")
    model, tokenizer = model_and_tokenizer()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    batches = [
        {"input_ids": part} for part in windows(tokenizer, arguments.shared, arguments.windows, "train").split(4)
    ]
    began = time.process_time()
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    passes = time.process_time() - began
    format = parse_format(arguments.format)
    weight = QuantizerConfig(range="calibrated", granularity="channel", observer="minmax")
    modules = quantize_model(model, exclude=["lm_head"], formats=[format], weight=weight)
    calibrate(model, modules, batches[:1])
    set_formats(modules, dict.fromkeys(modules, (format, FLOAT)))
    inside, gptq = [0.0], rounding.gptq

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        rounded = gptq(*args, **kwargs)
        inside[0] += time.process_time() - start
        return rounded

    rounding.gptq = timed
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, began = memory("VmRSS"), time.process_time()
    rounding.round_weights(model, modules, batches)
    whole, peak = time.process_time() - began, memory("VmHWM")
    gathering = whole - inside[0]
    print(f"float passes {passes:.1f} s, moments {gathering:.1f} s ({gathering / passes:.2f}), gptq {inside[0]:.1f} s")
    print(
        f"float model {size / 2**20:.0f} MiB; resident before {(before - empty) / size:.2f}, "
        f"at most {(peak - empty) / size:.2f}, of rounding alone {(peak - before) / size:.2f}"
    )


if __name__ == "__main__":
    main()

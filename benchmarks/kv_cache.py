"""Perplexity of SmolLM2-135M whose cache of keys and values is quantized, and what a token takes, by format.

    python -m benchmarks.kv_cache [--shared ../shared] [--windows 8] [--formats int8,fp8,int4,mxfp4,int3]

Needs the packages of `benchmarks.smollm2`. Weights and activations are in float. Every token reads all keys and values
in the format, as in decoding. The text is MRPC's test sentences in windows of 128 tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.smollm2 import model_and_tokenizer, perplexity, windows
from quant.formats import FLOAT, parse_format
from quant.transforms.kv_cache import attach_caches, caches_of, find_caches, sites_of
from quant.transforms.rotation import rotate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--formats", default="int8,fp8,int4,mxfp4,int3", help="comma list")
    parser.add_argument("--windows", type=int, default=8)
    arguments = parser.parse_args()
    model, tokenizer = model_and_tokenizer()
    text = windows(tokenizer, arguments.shared, arguments.windows)
    found = find_caches(model, {"input_ids": text[:1]})
    attach_caches(model, sites_of(found), {attention.name: FLOAT for attention in found})
    for turn in ("as it is", "rotated"):
        if turn == "rotated":
            rotate(model, {"input_ids": text[:1]})
        for format in [FLOAT, *map(parse_format, arguments.formats.split(","))]:
            for cache in caches_of(model).values():
                cache.set_formats(format)
            size = sum(attention.bits(format) for attention in found) / 8
            print(f"{turn}, {format}: {perplexity(model, text):.2f}, {size:,.0f} bytes a token", flush=True)
        for cache in caches_of(model).values():
            cache.set_formats(FLOAT)


if __name__ == "__main__":
    main()

"""ONNX Runtime's times of untrained models in one format throughout: `python -m benchmarks.onnx_latency [NAME...]`.

One example, one thread, default sessions, medians of 40 calls in turns, in the processor's time, which other work on
the machine does not lengthen. Nothing is trained or read: batch norms keep values in range.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.engine_calls import onnx_runtime
from benchmarks.engines import ratios
from quant.convert import calibrate, quantize_model, set_formats
from quant.export.onnx.export import trace, write_onnx
from quant.formats import FLOAT, parse_format

PAIRS = {"int8": ("int8", "int8"), "int4": ("int4", "int4"), "int8 weights": ("int8", "float")}


def resnet20() -> tuple[nn.Module, dict[str, Tensor]]:
    from eval.modeling.vision_nets import CifarResNet

    return CifarResNet(20, 10, 3), {"pixel_values": torch.randn(2, 3, 32, 32)}


def resnet18() -> tuple[nn.Module, dict[str, Tensor]]:
    from eval.vision_utils import build_scratch

    return build_scratch("resnet18", 1000, 224).model, {"pixel_values": torch.randn(2, 3, 224, 224)}


def mobilenetv2() -> tuple[nn.Module, dict[str, Tensor]]:
    from eval.vision_utils import build_scratch

    return build_scratch("mobilenetv2", 1000, 224).model, {"pixel_values": torch.randn(2, 3, 224, 224)}


def efficientnet_lite0() -> tuple[nn.Module, dict[str, Tensor]]:
    import timm

    return timm.create_model("tf_efficientnet_lite0", num_classes=10), {"x": torch.randn(2, 3, 96, 96)}


def bert_6x384() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    tokens = torch.randint(5, 20_000, (2, 64))
    model = BertForSequenceClassification(BertConfig(**sizes))
    return model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


MODELS = {build.__name__: build for build in (resnet20, resnet18, mobilenetv2, efficientnet_lite0, bert_6x384)}


def files(model: nn.Module, batch: Mapping[str, Tensor], folder: Path) -> dict[str, Path]:
    """The model as ONNX in every variant, by what it is."""
    with (
        torch.no_grad()
    ):  # batch norms see the batch: values that shrink layer by layer end as denormals, which are slow
        for module in model.train().modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        model(**batch)
    formats = {parse_format(name) for pair in PAIRS.values() for name in pair} - {FLOAT}
    modules = quantize_model(model.eval(), formats=formats)
    calibrate(model, modules, [batch])
    traced = trace(model, modules, batch)
    convolutional = any(isinstance(module, nn.Conv2d) for module in modules.values())
    made: dict[str, Path] = {}

    def write(title: str, examples: Any = ()) -> None:
        made[title] = folder / f"{len(made)}.onnx"
        write_onnx(made[title], traced, modules, examples)

    set_formats(modules, dict.fromkeys(modules, (FLOAT, FLOAT)))
    write("float")
    for title, pair in PAIRS.items():
        weight, activation = map(parse_format, pair)
        set_formats(modules, dict.fromkeys(modules, (weight, activation)))
        write(title)
        if convolutional and activation != FLOAT:
            write(f"{title} --round_outputs", [batch])
    return made


def main() -> int:
    """Print the table."""
    parser = ArgumentParser(prog="python -m benchmarks.onnx_latency")
    parser.add_argument("names", nargs="*", default=list(MODELS), metavar="NAME")
    print("| model | variant | ms | of float |\n|---|---|---|---|", flush=True)
    for name in parser.parse_args().names:
        torch.manual_seed(0)
        model, batch = MODELS[name]()
        with TemporaryDirectory() as folder:
            made = files(model, batch, Path(folder))
            calls = {title: onnx_runtime(path) for title, path in made.items()}
            times, _ = ratios(calls, {key: x[:1].numpy() for key, x in batch.items()}, repeats=40)
        for title, time in times.items():
            print(f"| {name} | {title} | {time:.3f} | {time / times['float']:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

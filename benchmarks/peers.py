"""Quantized layers of other libraries beside ours: forward + backward in training, over the float layer.

    python -m benchmarks.peers [--rounds 15]        after: make extras

8-bit weights per output channel and 8-bit activations per tensor, as each library trains them: ours and Brevitas with
learned or running scales, modelopt with calibrated ones, torchao with scales per token (it has no others for
activations). A library that is not installed is left out, by name.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.timing import ratio, take_turns, with_allocator
from quant.convert import calibrate, quantize_model, set_formats
from quant.formats import IntFormat
from quant.quant_utils import use_compiled

LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear 384x1536, 2048 tokens": lambda: (nn.Linear(384, 1536), torch.randn(2048, 384)),
    "conv 64x64 3x3, 32 images of 16x16": lambda: (nn.Conv2d(64, 64, 3, padding=1), torch.randn(32, 64, 16, 16)),
}


def ours(model: nn.Module, x: Tensor) -> nn.Module:
    use_compiled("on")
    layers = quantize_model(model, formats=[IntFormat(8)])
    calibrate(model, layers, [x])
    set_formats(layers, dict.fromkeys(layers, (IntFormat(8), IntFormat(8))))
    return model


def brevitas(model: nn.Module, x: Tensor) -> nn.Module:
    import brevitas.nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

    layer = model[0]  # type: ignore[index]
    quantizers = {"weight_quant": Int8WeightPerChannelFloat, "input_quant": Int8ActPerTensorFloat}
    if isinstance(layer, nn.Linear):
        return nn.Sequential(qnn.QuantLinear(layer.in_features, layer.out_features, bias=True, **quantizers))
    sizes = layer.in_channels, layer.out_channels, layer.kernel_size
    return nn.Sequential(qnn.QuantConv2d(*sizes, padding=layer.padding, bias=True, **quantizers))


def quanto(model: nn.Module, x: Tensor) -> nn.Module:
    from optimum.quanto import Calibration, qint8, quantize

    quantize(model, weights=qint8, activations=qint8)
    with Calibration(), torch.no_grad():
        model(x)
    return model


def modelopt(model: nn.Module, x: Tensor) -> nn.Module:
    import modelopt.torch.quantization as mtq

    return mtq.quantize(model, mtq.INT8_DEFAULT_CFG, lambda model: model(x))


def torchao(model: nn.Module, x: Tensor) -> nn.Module:
    from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig

    layer = model[0]  # type: ignore[index]
    if not isinstance(layer, nn.Linear):
        raise NotImplementedError("torchao trains no quantized convolution")
    return nn.Sequential(
        FakeQuantizedLinear.from_linear(
            layer,
            activation_config=IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
            weight_config=IntxFakeQuantizeConfig(torch.int8, "per_channel"),
        )
    )


PEERS = {"brevitas": brevitas, "optimum.quanto": quanto, "modelopt": modelopt, "torchao": torchao}


def installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that it is part of
        return False


def training_pass(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward and backward."""
    model.train()
    x = x.clone().requires_grad_()
    with torch.no_grad():
        grad = torch.randn_like(model(x))

    def run() -> None:
        model(x).backward(grad)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    with_allocator("benchmarks.peers")
    absent = [name for name in PEERS if not installed(name)]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {rounds} rounds, medians; int8 weights and")
    print(f"activations, forward + backward over the float layer; not installed: {', '.join(absent) or 'none'}")
    for name, make in LAYERS.items():
        torch.manual_seed(0)
        layer, x = make()
        runs = {"float": training_pass(nn.Sequential(copy.deepcopy(layer)), x)}
        for peer, build in {"ours": ours, **PEERS}.items():
            if peer in absent:
                continue
            try:
                runs[peer] = training_pass(build(nn.Sequential(copy.deepcopy(layer)), x), x)
            except Exception as error:  # another library's: what it raises is part of the result
                print(f"{name:<36} {peer:<15} does not run: {type(error).__name__}: {str(error).splitlines()[0][:80]}")
        seconds = take_turns(runs, rounds)
        for peer in runs:
            milliseconds = statistics.median(seconds[peer]) * 1e3
            print(f"{name:<36} {peer:<15} {milliseconds:>8.2f} ms {ratio(seconds, peer, 'float'):>7.2f}", flush=True)


if __name__ == "__main__":
    main()

"""torchao: the Linear layers of an unpacked checkpoint, as torchao's own quantized weights.

What matches, per layer: integer or e4m3 weights with one scale an output channel (or tensor) and float inputs (weight
only), and integer weights with int8 inputs that get a scale and zero point a token (dynamic activations). Codes and
scales are the run's, none is found anew. Any other layer goes on as it is, rounding in float32, and its verdict tells.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quant.export.layer_report import LayerVerdict, as_chosen
from quant.export.packed import OnGrid
from quant.formats import FLOAT, BlockFormat, FloatFormat, IntFormat
from quant.quant_linear import QuantLinear
from quant.quant_module import QuantModule

INT8, E4M3 = IntFormat(8), FloatFormat(4, 3, 1)


def to_torchao(model: nn.Module, modules: Mapping[str, QuantModule]) -> dict[str, LayerVerdict]:
    """Replace, in place, every layer that torchao has a configuration for; `modules` come from `restore`."""
    verdicts = {}
    replacement: dict[int, nn.Module] = {}
    for name, module in modules.items():
        weight, activation = module.formats
        reason = mismatch(module)
        verdicts[name] = as_chosen(weight, activation)
        if reason is not None:
            why = (f"rounded in float32, not by torchao: {reason}",)
            bits = weight.bits, activation.bits
            verdicts[name] = LayerVerdict(weight, activation, weight.name, activation.name, *bits, why)
        elif (weight, activation) != (FLOAT, FLOAT):
            assert isinstance(module, QuantLinear)
            replacement[id(module)] = torchao_linear(module)
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if id(child) in replacement:
                parent._modules[key] = replacement[id(child)]
    return verdicts


def mismatch(module: QuantModule) -> str | None:
    """Why torchao has no configuration for a layer; None if it has."""
    weight, activation = module.formats
    if (weight, activation) == (FLOAT, FLOAT):
        return None
    if not isinstance(module, QuantLinear):
        return f"it quantizes Linear layers, this is a {type(module).__name__.removeprefix('Quant')}"
    if module._forward_pre_hooks or module._forward_hooks:  # a migrated layer divides its input, say
        return "more is done around this layer than a Linear does"
    if isinstance(weight, BlockFormat) or not (weight == E4M3 or (isinstance(weight, IntFormat) and weight.width <= 8)):
        return f"it has no {weight} weights"
    if not module.weight_quantizer.config.symmetric:
        return "its weights have no zero points"
    config = module.input_quantizer.config
    per_token = config.granularity == "token" and not config.symmetric and config.observer == "minmax"
    dynamic = activation == INT8 and per_token and not config.percentile and isinstance(weight, IntFormat)
    if activation == FLOAT or dynamic:
        return None
    return f"it has no {activation} inputs with a range that is fixed" if not per_token else f"no {activation} inputs"


def torchao_linear(module: QuantLinear) -> nn.Linear:
    """The layer as a Linear whose weight is a tensor of torchao's."""
    linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    linear.bias = module.bias
    linear.weight = nn.Parameter(torchao_weight(module), requires_grad=False)
    return linear.train(module.training)


def torchao_weight(module: QuantLinear) -> Tensor:
    """The weight's codes and scales as torchao holds them: (out_features, in_features), a scale a row."""
    from torchao.quantization.quantize_.workflows.float8.float8_tensor import Float8Tensor
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import IntxUnpackedToInt8Tensor

    weight, quantizer = module.weight.detach(), module.weight_quantizer
    assert isinstance(quantizer, OnGrid) and quantizer.scale is not None
    # The weight is code x scale, rounded once: dividing and rounding gives the code back.
    scale = quantizer.scale.expand(weight.shape[0], 1).contiguous()
    block = (1, weight.shape[1])
    if quantizer.format == E4M3:
        return Float8Tensor((weight / scale).to(torch.float8_e4m3fn), scale, list(block), dtype=weight.dtype)
    assert isinstance(quantizer.format, IntFormat)
    codes = torch.round(weight / scale).to(torch.int8)
    no_points = torch.zeros_like(scale, dtype=torch.int8)
    integers = getattr(torch, quantizer.format.name)
    activation = None if module.input_quantizer.format == FLOAT else "int8_asym_per_token"
    return IntxUnpackedToInt8Tensor(codes, scale, no_points, integers, block, weight.dtype, activation)

"""torchao: convert the Linear layers of an unpacked checkpoint to torchao's quantized weights.

Supported per layer: integer weights with a scale per output channel, tensor or group, or e4m3 weights, and float inputs
(weight-only); integer weights with int8 inputs that have a scale and zero point per token (dynamic activations). Codes
and scales are those of the run. All other layers stay as they are and round in float32, as their verdict says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from quant.export.layer_report import LayerVerdict, as_chosen
from quant.export.packed import OnGrid
from quant.formats import E4M3, FLOAT, BlockFormat, FloatFormat, GroupFormat, IntFormat
from quant.kernels.groups import spread
from quant.quant_embedding import QuantEmbedding
from quant.quant_linear import QuantLinear
from quant.quant_module import QuantModule

INT8 = IntFormat(8)


def to_torchao(model: nn.Module, modules: Mapping[str, QuantModule]) -> dict[str, LayerVerdict]:
    """Replace every layer that torchao supports.

    Args:
        model: The model; changed in place.
        modules: Its quantized layers, as `restore` returned them.

    Returns:
        How each layer is represented, by name.
    """
    verdicts = {}
    replacement: dict[int, nn.Module] = {}
    for name, module in modules.items():
        weight, activation = module.formats
        reason = mismatch(module)
        verdicts[name] = as_chosen(module)
        if reason is not None:
            verdicts[name] = replace(verdicts[name], why=(f"rounded in float32, not by torchao: {reason}",))
        elif (weight, activation) != (FLOAT, FLOAT):
            assert isinstance(module, QuantLinear)
            replacement[id(module)] = torchao_linear(module)
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if id(child) in replacement:
                parent._modules[key] = replacement[id(child)]
    return verdicts


def mismatch(module: QuantModule) -> str | None:
    """Return the reason why torchao does not support a layer; None if it does, or the layer is in float."""
    weight, activation = module.formats
    if (weight, activation) == (FLOAT, FLOAT):
        return None
    if isinstance(module, QuantEmbedding):
        return "it quantizes Linear layers, this is an embedding"
    if not isinstance(module, QuantLinear):
        return f"it quantizes Linear layers, this is a {type(module).__name__.removeprefix('Quant')}"
    if module._forward_pre_hooks or module._forward_hooks:  # for example, a migrated layer divides its input
        return "more is done around this layer than a Linear does"
    if isinstance(weight, GroupFormat):
        if module.in_features % weight.size:
            return f"its rows of {module.in_features} do not divide into groups of {weight.size}"
        return None if activation == FLOAT else f"it has no {weight} weights with {activation} inputs"
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
    """Return the layer as a Linear whose weight is a tensor of torchao."""
    linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    linear.bias = module.bias
    linear.weight = nn.Parameter(torchao_weight(module), requires_grad=False)
    return linear.train(module.training)


def torchao_weight(module: QuantLinear) -> Tensor:
    """Return the weight as a tensor of torchao, (out_features, in_features), with a scale per row."""
    from torchao.quantization.quantize_.workflows.float8.float8_tensor import Float8Tensor
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import IntxUnpackedToInt8Tensor

    weight, quantizer = module.weight.detach(), module.weight_quantizer
    assert isinstance(quantizer, OnGrid) and quantizer.scale is not None
    format = quantizer.format
    # The weight is code x scale, rounded once: division and rounding recover the code.
    element: IntFormat | FloatFormat
    if isinstance(format, GroupFormat):
        scale, size, element = quantizer.scale, format.size, format.element
    else:
        assert isinstance(format, IntFormat | FloatFormat)
        scale, size, element = quantizer.scale.expand(weight.shape[0], 1).contiguous(), weight.shape[1], format
    block = (1, size)
    if element == E4M3:
        return Float8Tensor((weight / scale).to(torch.float8_e4m3fn), scale, list(block), dtype=weight.dtype)
    points = torch.zeros_like(scale) if quantizer.zero_point is None else quantizer.zero_point
    codes = torch.round(weight / spread(scale, size, weight.shape[1])) + spread(points, size, weight.shape[1])
    integers = getattr(torch, element.name)
    activation = None if module.input_quantizer.format == FLOAT else "int8_asym_per_token"
    return IntxUnpackedToInt8Tensor(
        codes.to(torch.int8), scale, points.to(torch.int8), integers, block, weight.dtype, activation
    )

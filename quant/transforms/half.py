"""Round what stays in float to 16 bits, as the cost of a whole file counts it; a packed file then stores it exactly."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quant.formats import FLOAT
from quant.quant_module import QuantModule
from quant.quantizers.quantizer import Quantizer

TYPES = (torch.float16, torch.bfloat16)


def halved(x: Tensor) -> Tensor:
    """Return a float tensor in the 16-bit type that changes its values least: fp16, or bf16 for large values."""
    errors = [float((x - x.to(dtype).to(x.dtype)).abs().max()) if x.numel() else 0.0 for dtype in TYPES]
    return x.to(TYPES[1] if errors[1] < errors[0] else TYPES[0])


def holds_exactly(x: Tensor) -> Tensor:
    """Return a float tensor in a 16-bit type if that keeps every value; else the tensor itself."""
    if x.dtype not in (torch.float32, torch.float64):
        return x
    narrow = halved(x)
    return narrow if torch.equal(narrow.to(x.dtype), x) else x


@torch.no_grad()
def halve_rest(model: nn.Module, modules: Mapping[str, QuantModule]) -> None:
    """Round all parameters and saved buffers but the weights that formats round, in place; norms and biases, mostly.

    Args:
        model: The quantized model, in its final formats.
        modules: Its quantized layers, by name.
    """
    rounded = {id(p) for m in modules.values() if m.weight_quantizer.format != FLOAT for p in m._parameters.values()}
    rounded -= {id(module.bias) for module in modules.values() if getattr(module, "bias", None) is not None}
    scales = {id(tensor) for part in model.modules() if isinstance(part, Quantizer) for tensor in part.parameters()}
    scales |= {id(tensor) for part in model.modules() if isinstance(part, Quantizer) for tensor in part.buffers()}
    for part in model.modules():
        saved = {key: value for key, value in part._buffers.items() if key not in part._non_persistent_buffers_set}
        for value in [*part._parameters.values(), *saved.values()]:
            if value is not None and value.is_floating_point() and id(value) not in rounded | scales:
                value.copy_(halved(value))

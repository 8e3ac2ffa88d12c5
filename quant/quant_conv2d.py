"""QuantConv2d: a Conv2d (grouped, depthwise, dilated, any padding mode) whose formats can be switched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quant.quant_module import QuantModule


class QuantConv2d(QuantModule, nn.Conv2d):
    """y = Q(x) * Q(W) + b; x (N, C_in, H, W), W (C_out, C_in / groups, kh, kw).

    The input is rounded before it is padded. The weight's output channel is axis 0, also when grouped or depthwise.
    """

    input_reduction_dim = 1
    differentiable = True

    def compute(self, input: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(input, weight, self.bias)

    def knows_gradients(self, input: Tensor) -> bool:
        own = type(self)._conv_forward is not nn.Conv2d._conv_forward
        plain = self.padding_mode == "zeros" and not isinstance(self.padding, str) and input.dim() == 4 and not own
        return plain and super().knows_gradients(input)

    def input_gradient(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        return self._gradients(grad, input, weight, (True, False, False))[0]

    def parameter_gradients(
        self, grad: Tensor, input: Tensor, weight: Tensor, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        _, dw, db = self._gradients(grad, input, weight.to(grad.dtype), (False, *wanted))
        return dw, db

    def _gradients(self, grad: Tensor, input: Tensor, weight: Tensor, wanted: tuple[bool, ...]) -> tuple[Any, ...]:
        layout = self.stride, self.padding, self.dilation, False, (0, 0), self.groups
        return torch.ops.aten.convolution_backward(grad, input, weight, [self.out_channels], *layout, wanted)

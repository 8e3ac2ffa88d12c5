"""QuantConv2d: a Conv2d (grouped, depthwise, dilated, any padding mode) whose formats can be switched."""

from __future__ import annotations

from torch import Tensor, nn

from quant.quant_module import QuantModule


class QuantConv2d(QuantModule, nn.Conv2d):
    """y = Q(x) * Q(W) + b; x (N, C_in, H, W), W (C_out, C_in / groups, kh, kw).

    The input is rounded before it is padded. The weight's output channel is axis 0, also when grouped or depthwise.
    """

    input_reduction_dim = 1

    def compute(self, input: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(input, weight, self.bias)

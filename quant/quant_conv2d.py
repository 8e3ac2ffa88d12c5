"""QuantConv1d, QuantConv2d and QuantConv3d: convolutions whose weight and input formats can be switched."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from quant.kernels import onednn
from quant.quant_module import QuantModule
from quant.quantizers.byte_codes import ByteCodes


class _QuantConv(QuantModule):
    """y = Q(x) * Q(W) + b; x (N, C_in, ...), W (C_out, C_in / groups, ...), any groups, dilation and padding mode.

    The input is rounded before it is padded. The weight's output channel is axis 0, also when grouped or depthwise.
    """

    differentiable = True
    plain: ClassVar[type[_ConvNd]]
    """torch's class, whose gradients are implemented; subclasses may compute something else."""

    @property
    def input_channels(self: Any) -> int:
        """Number of the input's channels."""
        return int(self.in_channels)

    def compute(self: Any, input: Tensor, weight: Tensor) -> Tensor:
        """Return the convolution, plus the bias: (N, C_in, ...) -> (N, C_out, ...)."""
        made: Tensor = self._conv_forward(input, weight, self.bias)
        return made

    def knows_gradients(self: Any, input: Tensor) -> bool:
        """Whether this is torch's convolution of a batch, with explicit zero padding."""
        own = type(self)._conv_forward is not self.plain._conv_forward  # type: ignore[attr-defined]
        batched = input.dim() == self.weight.dim()
        usual = self.padding_mode == "zeros" and not isinstance(self.padding, str) and batched and not own
        return usual and QuantModule.knows_gradients(self, input)

    def takes_codes(self: Any, input: Tensor, weight: Tensor, zero_point: int) -> bool:
        """See `quant.quantizers.byte_codes.ByteLayer`."""
        return self.knows_gradients(input) and onednn.convolves(weight, input, self.bias, zero_point, self._place())

    def pack_codes(self: Any, weight: ByteCodes, input: ByteCodes) -> Tensor:
        """Return the filters as oneDNN reads them."""
        return onednn.pack_filters(weight.codes, input.zero_point, self._place(), input.codes.shape)

    def compute_codes(self: Any, input: ByteCodes, packed: Tensor, scale: Tensor) -> Tensor:
        """Return the layer's output, float32 (N, C_out, ...)."""
        made = onednn.convolve(input.codes, input.zero_point, packed, scale, self.bias, self._place())
        # Code that views the float layer's output must be able to view this one.
        return made if onednn.channels_innermost(input.codes) else made.contiguous()

    def _place(self: Any) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups

    def input_gradient(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient w.r.t. the input, (N, C_in, ...)."""
        return self._gradients(grad, input, weight, (True, False, False))[0]

    def parameter_gradients(
        self, grad: Tensor, input: Tensor, weight: Tensor, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients w.r.t. weight and bias, where wanted."""
        _, dw, db = self._gradients(grad, input, weight.to(grad.dtype), (False, *wanted))
        return dw, db

    def _gradients(self: Any, grad: Tensor, input: Tensor, weight: Tensor, wanted: tuple[bool, ...]) -> tuple[Any, ...]:
        layout = self.stride, self.padding, self.dilation, False, (0,) * len(self.stride), self.groups
        return torch.ops.aten.convolution_backward(grad, input, weight, [self.out_channels], *layout, wanted)


class QuantConv2d(_QuantConv, nn.Conv2d):
    """Conv2d: x (N, C_in, H, W), W (C_out, C_in / groups, kh, kw)."""

    plain = nn.Conv2d
    input_reduction_dim = -3  # channels, with or without a batch


class QuantConv1d(_QuantConv, nn.Conv1d):
    """Conv1d: x (N, C_in, L), W (C_out, C_in / groups, k). The Conv1D of transformers is a linear layer instead."""

    plain = nn.Conv1d
    input_reduction_dim = -2


class QuantConv3d(_QuantConv, nn.Conv3d):
    """Conv3d: x (N, C_in, D, H, W), W (C_out, C_in / groups, kd, kh, kw)."""

    plain = nn.Conv3d
    input_reduction_dim = -4

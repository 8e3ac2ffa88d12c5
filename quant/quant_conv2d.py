"""QuantConv1d, QuantConv2d and QuantConv3d: convolutions whose weight and input formats can be switched."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from quant.kernels import onednn
from quant.quant_module import QuantModule
from quant.quantizers.byte_codes import ByteCodes

LEAST_WINDOWS = 512
"""Windows of a batch's inputs that ranges of a convolution's weight look at, if it has so many."""


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

    def padded(self: Any, input: Tensor) -> Tensor:
        """Return the input (N, C_in, ...), or without N, as (N, C_in, ...) with the padding of the convolution."""
        x = input if input.dim() == self.weight.dim() else input.unsqueeze(0)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self._reversed_padding_repeated_twice, mode)

    def columns(self: Any, input: Tensor) -> Tensor:
        """Return the windows of some output positions; see `QuantModule.columns`.

        Args:
            input: (N, C_in, ...), or without N.

        Returns:
            (groups, N * positions, C_in / groups * kernel size).
        """
        x = self.padded(input)
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        missing = [max(k - size, 0) for k, size in zip(reach, x.shape[2:], strict=True)]
        x = F.pad(x, [side for more in reversed(missing) for side in (0, more)])  # a forward of its own may pad, too
        corners = [range(0, n - k + 1, step) for n, k, step in zip(x.shape[2:], reach, self.stride, strict=True)]
        windows = []
        for corner in _choose(corners, -(-LEAST_WINDOWS // max(len(x), 1))):
            place = [slice(c, c + k, d) for c, k, d in zip(corner, reach, self.dilation, strict=True)]
            windows.append(x[:, :, *place].reshape(len(x), self.groups, -1))
        return torch.stack(windows, dim=1).flatten(0, 1).transpose(0, 1)

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


def _choose(axes: Sequence[range], count: int) -> list[tuple[int, ...]]:
    """Choose at most `count` points of a grid at random, the same at every call."""
    points = list(product(*axes))
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    return [points[n] for n in order[:count].tolist()]

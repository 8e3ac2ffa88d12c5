"""QuantLinear and QuantConv1D (GPT-2's linear layer): layers whose weight and input formats can be switched."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quant.kernels import onednn
from quant.quant_module import QuantModule
from quant.quantizers.byte_codes import ByteCodes


class _QuantRows(QuantModule):
    """Integer arithmetic of both linear layers: a product of (rows, in) with a matrix."""

    def takes_codes(self, input: Tensor, weight: Tensor, zero_point: int) -> bool:
        """See `quant.quantizers.byte_codes.ByteLayer`."""
        return self.knows_gradients(input) and onednn.multiplies(self._matrix(weight), input, self.bias)

    def pack_codes(self, weight: ByteCodes, input: ByteCodes) -> Tensor:
        """Return the matrix as oneDNN reads it."""
        return onednn.pack_matrix(self._matrix(weight.codes))

    def _matrix(self, weight: Tensor) -> Tensor:
        """Return the weight as (out, in)."""
        return weight if self.channel_dim == 0 else weight.t()

    def compute_codes(self, input: ByteCodes, packed: Tensor, scale: Tensor) -> Tensor:
        """Return the layer's output, float32 (..., out)."""
        return onednn.multiply(input.codes, input.zero_point, packed, scale, self.bias)


class QuantLinear(_QuantRows, nn.Linear):
    """y = Q(x) Q(W)^T + b; x (..., in_features), W (out_features, in_features)."""

    differentiable = True

    @property
    def input_channels(self) -> int:
        """Number of input features."""
        return self.in_features

    def compute(self, input: Tensor, weight: Tensor) -> Tensor:
        """Return the product, plus the bias: (..., in_features) -> (..., out_features)."""
        return F.linear(input, weight, self.bias)

    def input_gradient(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient w.r.t. the input, (..., in_features)."""
        return (_rows(grad) @ weight).view(input.shape)

    def parameter_gradients(
        self, grad: Tensor, input: Tensor, weight: Tensor, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients w.r.t. weight and bias, where wanted."""
        rows = _rows(grad)
        return rows.t() @ _rows(input) if wanted[0] else None, rows.sum(0) if wanted[1] else None


class QuantConv1D(_QuantRows, Conv1D):
    """y = Q(x) Q(W) + b; x (..., in_features), W (in_features, out_features), as GPT-2 stores it."""

    channel_dim = 1
    weight_reduction_dim = 0
    differentiable = True
    weight: nn.Parameter

    @property
    def input_channels(self) -> int:
        """Number of input features."""
        return self.weight.shape[0]

    def compute(self, input: Tensor, weight: Tensor) -> Tensor:
        """Return the product, plus the bias: (..., in_features) -> (..., out_features)."""
        return torch.addmm(self.bias, _rows(input), weight).view(*input.shape[:-1], self.nf)

    def input_gradient(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient w.r.t. the input, (..., in_features)."""
        return (_rows(grad) @ weight.t()).view(input.shape)

    def parameter_gradients(
        self, grad: Tensor, input: Tensor, weight: Tensor, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients w.r.t. weight and bias, where wanted."""
        rows = _rows(grad)
        return _rows(input).t() @ rows if wanted[0] else None, rows.sum(0) if wanted[1] else None


def _rows(x: Tensor) -> Tensor:
    """Reshape (..., features) to (rows, features)."""
    return x.reshape(-1, x.shape[-1])

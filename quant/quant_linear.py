"""QuantLinear: a Linear, or GPT-2's Conv1D, whose weight and input formats can be switched."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quant.quant_module import QuantModule


class QuantLinear(QuantModule, nn.Linear):
    """y = Q(x) Q(W)^T + b; x (..., in_features), W (out_features, in_features)."""

    def compute(self, input: Tensor, weight: Tensor) -> Tensor:
        return F.linear(input, weight, self.bias)


class QuantConv1D(QuantModule, Conv1D):
    """y = Q(x) Q(W) + b; x (..., in_features), W (in_features, out_features), as GPT-2 stores it."""

    channel_dim = 1
    weight_reduction_dim = 0
    weight: nn.Parameter

    def compute(self, input: Tensor, weight: Tensor) -> Tensor:
        rows = input.reshape(-1, input.shape[-1])
        return torch.addmm(self.bias, rows, weight).view(*input.shape[:-1], self.nf)

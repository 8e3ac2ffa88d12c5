"""ExpertLinear: the matrices of all experts of a mixture in one tensor; QuantExpertLinear: with formats."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.quant_module import QuantModule


class ExpertLinear(nn.Module):
    """y[i] = W[e[i]] x[i] + b[e[i]]: each row goes to the expert e[i] that a router has chosen for it.

    W is (experts, out_features, in_features), or (experts, in_features, out_features) if `transposed`.
    """

    weight: Any
    bias: Any

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, transposed: bool) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)  # (experts, out_features)
        self.transposed = transposed
        self.experts = weight.shape[0]
        self.in_features, self.out_features = weight.shape[1:] if transposed else weight.shape[:0:-1]

    def forward(self, input: Tensor, experts: Tensor) -> Tensor:
        """input (rows, in_features), experts (rows,); rows of an expert beyond the last become 0."""
        return self.product(input, self.weight, experts)

    def product(self, input: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
        """`forward` with another weight of the same shape."""
        output = _Product.apply(input, weight, experts, self.transposed)
        if self.bias is None:
            return output
        inside = experts < self.experts
        bias = self.bias[experts.clamp(max=self.experts - 1)] * inside.unsqueeze(1)
        return output + bias.to(output.dtype)

    def extra_repr(self) -> str:
        return f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}"


class QuantExpertLinear(QuantModule, ExpertLinear):
    """An ExpertLinear with switchable formats: each output channel of each expert has a weight scale of its own."""

    routed_to: Tensor
    """the experts that the rows of the call go to"""

    def scale_shape(self) -> tuple[int, ...]:
        return self.experts, *((1, self.out_features) if self.transposed else (self.out_features, 1))

    @property
    def input_channels(self) -> int:
        return int(self.in_features)

    @property
    def reduction_dim(self) -> int | None:
        return 1 if self.transposed else 2

    def forward(self, input: Tensor, experts: Tensor) -> Tensor:  # type: ignore[override]
        self.__dict__["routed_to"] = experts
        try:
            return super().forward(input)
        finally:
            del self.__dict__["routed_to"]

    def compute(self, input: Tensor, weight: Tensor) -> Tensor:
        return self.product(input, weight, self.routed_to)


class _Product(torch.autograd.Function):
    """Without the bias. One step of autograd: the weight is kept whole, not once for each expert that reads it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, experts: Tensor, transposed: bool) -> Tensor:
        ctx.save_for_backward(x, weight, experts)
        ctx.transposed = transposed
        return _multiply(x, weight, experts, transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, experts = ctx.saved_tensors
        grad, transposed = grads[0], ctx.transposed
        weight = weight.to(grad.dtype)  # under autocast the product has the type of its output
        dx = _multiply(grad, weight, experts, not transposed) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            order, parts = _by_expert(experts, len(weight))
            x, grad = x.to(grad.dtype)[order], grad[order]
            left, right = (x, grad) if transposed else (grad, x)
            dw = torch.stack([left[start:stop].t() @ right[start:stop] for start, stop in parts])
        return dx, dw, None, None


def _multiply(x: Tensor, weight: Tensor, experts: Tensor, transposed: bool) -> Tensor:
    """x (rows, in) times each row's matrix: (out, in), or (in, out) if transposed."""
    if x.is_meta:  # nothing says where rows go, and all that matters is the shape
        return x.new_empty(len(x), weight.shape[2 if transposed else 1])
    order, parts = _by_expert(experts, len(weight))
    rows = x[order]
    products = [
        F.linear(rows[start:stop], matrix.t() if transposed else matrix)
        for matrix, (start, stop) in zip(weight.unbind(), parts, strict=True)
    ]
    inside = parts[-1][1]
    products.append(products[0].new_zeros(len(x) - inside, products[0].shape[1]))
    return torch.cat(products)[order.argsort()]


def _by_expert(experts: Tensor, count: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """The order that puts the rows of one expert side by side, and where those of each start and stop."""
    order = experts.argsort(stable=True)
    ends = accumulate(experts.clamp(max=count).bincount(minlength=count + 1)[:count].tolist(), initial=0)
    return order, list(pairwise(ends))

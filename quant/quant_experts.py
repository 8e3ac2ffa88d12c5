"""ExpertLinear: the weight matrices of all experts of a mixture, in one tensor; QuantExpertLinear: with formats."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.quant_module import QuantModule


class ExpertLinear(nn.Module):
    """y[i] = W[e[i]] x[i] + b[e[i]]: row i goes to the expert e[i] that a router has chosen.

    Args:
        weight: (experts, out_features, in_features), or (experts, in_features, out_features) if `transposed`.
        bias: (experts, out_features), or None.
        transposed: Whether each matrix is stored as (in_features, out_features).
    """

    weight: Any
    bias: Any

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, transposed: bool) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.transposed = transposed
        self.experts = weight.shape[0]
        self.in_features, self.out_features = weight.shape[1:] if transposed else weight.shape[:0:-1]

    def forward(self, input: Tensor, experts: Tensor) -> Tensor:
        """Apply each row's expert.

        Args:
            input: (rows, in_features).
            experts: Integers (rows,); an index beyond the last expert gives 0.

        Returns:
            (rows, out_features).
        """
        return self.product(input, self.weight, experts)

    def product(self, input: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
        """Apply each row's expert, with another weight.

        Args:
            input: (rows, in_features).
            weight: Same shape as the layer's weight.
            experts: Integers (rows,).

        Returns:
            (rows, out_features).
        """
        output = _Product.apply(input, weight, experts, self.transposed)
        if self.bias is None:
            return output
        inside = experts < self.experts
        bias = self.bias[experts.clamp(max=self.experts - 1)] * inside.unsqueeze(1)
        return output + bias.to(output.dtype)

    def extra_repr(self) -> str:
        """Describe the sizes in the printed model."""
        return f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}"


class QuantExpertLinear(QuantModule, ExpertLinear):
    """An ExpertLinear whose formats can be switched, with a weight scale per expert and output channel."""

    routed_to: Tensor
    """The experts of the current call."""
    idle: frozenset[int] = frozenset()
    """Experts that no row of the calibration data was sent to."""

    def scale_shape(self) -> tuple[int, ...]:
        """Return the shape of the weight's scales: one per expert and output channel."""
        return self.experts, *((1, self.out_features) if self.transposed else (self.out_features, 1))

    @property
    def input_channels(self) -> int:
        """Number of input features."""
        return int(self.in_features)

    @property
    def reduction_dim(self) -> int | None:
        """The weight's axis of input features."""
        return 1 if self.transposed else 2

    def forward(self, input: Tensor, experts: Tensor) -> Tensor:  # type: ignore[override]
        """Apply each row's expert, with rounded input and weight; see `ExpertLinear.forward`."""
        self.__dict__["routed_to"] = experts
        if self.observing:
            before = frozenset(range(self.experts)) if self.most_seen < 0 else self.idle
            self.idle = before - set(experts.unique().tolist())
        try:
            return super().forward(input)
        finally:
            del self.__dict__["routed_to"]

    def columns(self, input: Tensor) -> list[Tensor]:
        """Return the rows that were routed to each expert; see `QuantModule.columns`."""
        order, parts = by_expert(self.routed_to, self.experts)
        return [input[order[start:stop]] for start, stop in parts]

    def compute(self, input: Tensor, weight: Tensor) -> Tensor:
        """Return the product, plus the bias: (rows, in_features) -> (rows, out_features)."""
        return self.product(input, weight, self.routed_to)


class _Product(torch.autograd.Function):
    """The products, without bias, as one autograd function: the weight is saved once, not once per expert."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, experts: Tensor, transposed: bool) -> Tensor:
        ctx.save_for_backward(x, weight, experts)
        ctx.transposed = transposed
        return _multiply(x, weight, experts, transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, experts = ctx.saved_tensors
        grad, transposed = grads[0], ctx.transposed
        weight = weight.to(grad.dtype)  # under autocast the product has the dtype of its output
        dx = _multiply(grad, weight, experts, not transposed) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            order, parts = by_expert(experts, len(weight))
            x, grad = x.to(grad.dtype)[order], grad[order]
            left, right = (x, grad) if transposed else (grad, x)
            dw = torch.stack([left[start:stop].t() @ right[start:stop] for start, stop in parts])
        return dx, dw, None, None


def _multiply(x: Tensor, weight: Tensor, experts: Tensor, transposed: bool) -> Tensor:
    """Multiply each row of x, (rows, in), with its expert's matrix, (out, in) or, if transposed, (in, out)."""
    if x.is_meta:  # only the shape matters, and meta tensors hold no indices
        return x.new_empty(len(x), weight.shape[2 if transposed else 1])
    order, parts = by_expert(experts, len(weight))
    rows = x[order]
    products = [
        F.linear(rows[start:stop], matrix.t() if transposed else matrix)
        for matrix, (start, stop) in zip(weight.unbind(), parts, strict=True)
    ]
    inside = parts[-1][1]
    products.append(products[0].new_zeros(len(x) - inside, products[0].shape[1]))
    return torch.cat(products)[order.argsort()]


def by_expert(experts: Tensor, count: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return the order that sorts rows by expert, and (start, stop) of each expert's rows in it."""
    order = experts.argsort(stable=True)
    ends = accumulate(experts.clamp(max=count).bincount(minlength=count + 1)[:count].tolist(), initial=0)
    return order, list(pairwise(ends))

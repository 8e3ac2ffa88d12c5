"""QuantModule: what the quantized layers share: two quantizers, and memory given back between forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quant.formats import Format
from quant.quantizer import Quantizer, QuantizerConfig, Rounder


class QuantModule(nn.Module):
    """A layer whose weight and input are rounded to formats that may change at every step.

    Subclasses are also subclasses of the float layer they replace. They state the weight's output channel axis, its
    reduction axis and the input's, and compute with the tensors they are given.
    """

    channel_dim: ClassVar[int] = 0
    """the weight's output channel axis"""
    weight_reduction_dim: ClassVar[int | None] = None
    """the weight's axis that is summed over, along which block formats run; None: all but the first, flattened"""
    input_reduction_dim: ClassVar[int] = -1

    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_quantizer: Quantizer
    input_quantizer: Quantizer

    def add_quantizers(self, weight: QuantizerConfig, activation: QuantizerConfig) -> None:
        """Attach the two quantizers, in float until `set_formats`."""
        shape = [1] * self.weight.dim()
        if weight.granularity == "channel":
            shape[self.channel_dim] = self.weight.shape[self.channel_dim]
        device = self.weight.device
        self.weight_quantizer = Quantizer(weight, tuple(shape), self.weight_reduction_dim, batched=False, device=device)
        self.input_quantizer = Quantizer(activation, (), self.input_reduction_dim, device=device)
        self.observing = False

    def set_formats(self, weight: Format, activation: Format) -> None:
        """Round the weight and the input to these formats from now on."""
        self.weight_quantizer.set_format(weight)
        self.input_quantizer.set_format(activation)

    @property
    def formats(self) -> tuple[Format, Format]:
        """(weight format, activation format) as set now."""
        return self.weight_quantizer.format, self.input_quantizer.format

    def compute(self, input: Tensor, weight: Tensor) -> Tensor:
        """The float layer's own arithmetic on the given input and weight."""
        raise NotImplementedError(f"{type(self).__name__} must say how it computes")

    def forward(self, input: Tensor) -> Tensor:
        if self.observing:
            self.input_quantizer.observe(input)
        round_input, round_weight = self.input_quantizer.rounding(input), self.weight_quantizer.rounding(self.weight)
        with _Recompute(enabled=torch.is_grad_enabled()) as recompute:
            quantized_input = recompute.round(round_input, input)
            quantized_weight = recompute.round(round_weight, self.weight)
            with recompute.saved_tensors():
                return self.compute(quantized_input, quantized_weight)


class _Recompute:
    """Rounded tensors are not kept for the backward pass: they are rounded again, from what is kept anyway.

    A layer's backward needs its rounded input and weight, a quantizer's backward the unrounded ones. Keeping both would
    raise the peak memory of training by half; rounding is a small share of a step.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.again: dict[int, Callable[[], Tensor]] = {}

    def __enter__(self) -> _Recompute:
        return self

    def __exit__(self, *_: object) -> None:
        self.again = {}

    def round(self, rounder: Rounder | None, x: Tensor) -> Tensor:
        if rounder is None:
            return x
        rounded = rounder(x)
        if self.enabled:
            kept = x.detach()
            self.again[rounded.untyped_storage().data_ptr()] = lambda: rounder(kept)
        return rounded

    def saved_tensors(self) -> Any:
        again = self.again

        def pack(saved: Tensor) -> Tensor | tuple[Callable[[], Tensor], torch.Size, tuple[int, ...], int]:
            make = again.get(saved.untyped_storage().data_ptr())
            return saved if make is None else (make, saved.shape, saved.stride(), saved.storage_offset())

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            make, shape, stride, offset = packed
            with torch.no_grad():
                return make().as_strided(shape, stride, offset)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

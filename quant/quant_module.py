"""QuantModule: base class of the quantized layers, with a quantizer each for weight and input."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from quant.formats import FLOAT, BlockFormat, Format
from quant.module_utils import is_tracing
from quant.quantizers.autograd import run_quantized
from quant.quantizers.byte_codes import ByteCodes, Packed, compute_on_codes, fits_bytes, pack_weight
from quant.quantizers.prefix_cache import PrefixCache
from quant.quantizers.quantizer import Quantizer, QuantizerConfig, Rounder, without_padding
from quant.quantizers.recompute import Recompute
from quant.quantizers.weight_cache import Made, RoundedWeightCache
from quant.validation import WEIGHTS_ONLY

TABLE = "table"
"""Part of the names of embeddings' quantizers, which take the weight's format."""

Reach = Literal["called", "uncalled", "read", "looked_up"]
"""called: the layer runs. uncalled: calibration never ran it. read: other code reads its weight
(`quant.analysis.reach`). looked_up: the layer runs on indices, so that it has a weight format alone."""


def runs_in(reach: Reach, formats: tuple[Format, Format]) -> tuple[Format, Format]:
    """Return the formats that a layer can run in.

    Args:
        reach: What calibration found out about the layer.
        formats: (weight format, activation format) that the layer is set to.

    Returns:
        (weight format, activation format), with float where there is no range or the weight cannot be rounded.
    """
    weight, activation = formats
    if reach == "called":
        return formats
    if reach == "read":
        return FLOAT, FLOAT
    if reach == "looked_up":
        return weight, FLOAT
    needs_range = activation.scaled and not isinstance(activation, BlockFormat)
    return weight, FLOAT if needs_range else activation


class QuantModule(nn.Module):
    """A layer whose weight and input are rounded to formats that may change at every step.

    Subclasses also inherit from the float layer that they replace. They declare the weight's output channel axis, its
    reduction axis and the input's, and implement `compute`; `quant.convert.from_float` constructs them.
    """

    channel_dim: ClassVar[int] = 0
    """The weight's output channel axis."""
    weight_reduction_dim: ClassVar[int | None] = None
    """The weight's axis that is summed over, along which blocks run; None: all but the first, flattened."""
    input_reduction_dim: ClassVar[int] = -1
    """The input's, negative: a single example may come without a batch axis."""
    differentiable: ClassVar[bool] = False
    """Whether the class implements the gradients of its `compute`, see `quant.quantizers.autograd`."""

    weight: Tensor
    bias: Any
    """A tensor or None."""
    weight_quantizer: Quantizer
    input_quantizer: Quantizer
    reach: Reach = "called"
    """What calibration found out; of a class, the reach of its layers that run."""
    most_seen: int = -1
    """Elements of the largest input since calibration began; -1: the layer was not called."""
    rounded_weight_cache: RoundedWeightCache | None = None
    prefix_cache: PrefixCache | None = None

    def add_quantizers(self, weight: QuantizerConfig, activation: QuantizerConfig) -> None:
        """Attach the two quantizers; the layer runs in float until `set_formats`.

        Args:
            weight: How the weight's scales are computed.
            activation: How the input's scales are computed.

        Raises:
            ValueError: If weights were to have a scale per token, or activations an observer of weights.
        """
        if weight.granularity == "token":
            raise ValueError(f"weights are scaled per tensor or channel, got granularity {weight.granularity!r}")
        if activation.observer in WEIGHTS_ONLY:
            raise ValueError(f"observer {activation.observer} is for weights, got it for activations: take mse")
        shape = self.scale_shape() if weight.granularity == "channel" else (1,) * self.weight.dim()
        device, reduction = self.weight.device, self.reduction_dim
        self.weight_quantizer = Quantizer(
            weight, shape, reduction, batched=False, device=device, weight_shape=tuple(self.weight.shape)
        )
        scales: tuple[int, ...] = ()
        if activation.granularity == "channel":
            scales = (self.input_channels, *[1] * (-self.input_reduction_dim - 1))
        self.input_quantizer = Quantizer(activation, scales, self.input_reduction_dim, device=device)
        self.observing = False

    def scale_shape(self) -> tuple[int, ...]:
        """Return the shape of the weight's scales, one per output channel, which broadcasts to the weight."""
        return tuple(size if dim == self.channel_dim else 1 for dim, size in enumerate(self.weight.shape))

    @property
    def reduction_dim(self) -> int | None:
        """The weight's axis that this layer sums over; None: all but the first."""
        return self.weight_reduction_dim

    def set_formats(self, weight: Format, activation: Format) -> None:
        """Switch the formats; parts that cannot be quantized (see `runs_in`) stay in float."""
        if self.reach != "called":
            weight, activation = runs_in(self.reach, (weight, activation))
        modules = self._modules  # nn.Module.__getattr__ costs more than the switch itself
        cast(Quantizer, modules["weight_quantizer"]).set_format(weight)
        cast(Quantizer, modules["input_quantizer"]).set_format(activation)
        if (placed := modules.get("placed")) is not None:
            for name, quantizer in cast(nn.ModuleDict, placed).items():
                cast(Quantizer, quantizer).set_format(weight if TABLE in name else activation)

    def place(self, name: str, quantizer: Quantizer) -> None:
        """Add the quantizer of a tensor around this layer, which follows its formats (`quant.transforms.placement`).

        Args:
            name: Name of the quantizer, without dots.
            quantizer: The quantizer.
        """
        if "placed" not in self._modules:
            self.add_module("placed", nn.ModuleDict())
        cast(nn.ModuleDict, self._modules["placed"])[name] = quantizer
        self.set_formats(*self.formats)

    @property
    def input_channels(self) -> int:
        """Number of the input's channels."""
        raise NotImplementedError(f"{type(self).__name__} must say how many channels it reads")

    def columns(self, input: Tensor) -> Tensor | Sequence[Tensor] | None:
        """Return what the rows of the weight are multiplied with, see `quant.quantizers.weighted_mse.InputSketch.add`.

        Args:
            input: The layer's input, or the tokens of it that are not padding.

        Returns:
            (blocks, n, columns), where a row of the weight has as many columns; all of the input, or a sample of it.
            None: the weight is multiplied with nothing.
        """
        return input.reshape(1, -1, input.shape[-1])

    @property
    def activation_quantizers(self) -> list[Quantizer]:
        """Quantizers of activations: the input's first, then those that `place` has added."""
        placed = cast("nn.ModuleDict | None", self._modules.get("placed"))
        return [self.input_quantizer, *(cast(Quantizer, q) for q in (placed.values() if placed is not None else ()))]

    @property
    def formats(self) -> tuple[Format, Format]:
        """(weight format, activation format) in use."""
        return self.weight_quantizer.format, self.input_quantizer.format

    def compute(self, input: Tensor, weight: Tensor) -> Tensor:
        """Compute the float layer's output.

        Args:
            input: The rounded input, shaped as the float layer's.
            weight: The rounded weight, shaped as `self.weight`.

        Returns:
            The float layer's output for these tensors.
        """
        raise NotImplementedError(f"{type(self).__name__} must say how it computes")

    def knows_gradients(self, input: Tensor) -> bool:
        """Whether the two methods below give the gradients of `compute` for inputs like this one."""
        return self.differentiable

    def input_gradient(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        """See `quant.quantizers.autograd.Differentiable`."""
        raise NotImplementedError(f"{type(self).__name__} must say how it is differentiated")

    def parameter_gradients(
        self, grad: Tensor, input: Tensor, weight: Tensor, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """See `quant.quantizers.autograd.Differentiable`."""
        raise NotImplementedError(f"{type(self).__name__} must say how it is differentiated")

    def takes_codes(self, input: Tensor, weight: Tensor, zero_point: int) -> bool:
        """See `quant.quantizers.byte_codes.ByteLayer`, as for the two methods below."""
        return False

    def pack_codes(self, weight: ByteCodes, input: ByteCodes) -> Tensor:
        """Return the weight as oneDNN reads it."""
        raise NotImplementedError(f"{type(self).__name__} must say how it computes on codes")

    def compute_codes(self, input: ByteCodes, packed: Tensor, scale: Tensor) -> Tensor:
        """Return the layer's output, float32."""
        raise NotImplementedError(f"{type(self).__name__} must say how it computes on codes")

    def forward(self, input: Tensor) -> Tensor:
        """Return the float layer's output on the rounded input and weight."""
        if self.prefix_cache is not None:
            return self.prefix_cache.output(self, self._forward, input)
        return self._forward(input)

    def _forward(self, input: Tensor) -> Tensor:
        if is_tracing():
            return self.compute(self.input_quantizer(input), self.weight_quantizer(self.weight))
        if self.observing:
            self.most_seen = max(self.most_seen, input.numel())
            self.input_quantizer.observe(input)
            if (sketch := self.weight_quantizer.inputs) is not None and input.numel():
                columns = self.columns(without_padding(input, self.input_quantizer.real_tokens))
                if columns is not None:
                    sketch.add(columns)
        weight = self.weight  # read once: a parametrization recomputes it at every access
        input_rounder = self.input_quantizer.rounding(input)
        if not torch.is_grad_enabled():
            return self._infer(input, weight, input_rounder)
        weight_rounder = self.weight_quantizer.rounding(weight)
        rounders = [rounder for rounder in (input_rounder, weight_rounder) if rounder is not None]
        if rounders and self.knows_gradients(input) and all(rounder.plain for rounder in rounders):
            return run_quantized(self, input, weight, input_rounder, weight_rounder)
        recompute = Recompute()
        quantized_input = recompute.round(input_rounder, input)
        quantized_weight = recompute.round(weight_rounder, weight)
        with recompute.saved_tensors():
            return self.compute(quantized_input, quantized_weight)

    def _infer(self, input: Tensor, weight: Tensor, rounder: Rounder | None) -> Tensor:
        """Forward without gradients; `rounder` rounds the input."""
        quantizer = self.weight_quantizer

        def cached(form: Hashable, make: Callable[[], Made]) -> Made:
            cache = self.rounded_weight_cache
            return make() if cache is None else cache.get(quantizer, weight, form, make)

        def pack(codes: ByteCodes) -> Packed | None:
            weight_rounder = quantizer.rounding(weight)
            assert weight_rounder is not None
            form = codes.zero_point, codes.codes.shape
            return cached(form, lambda: pack_weight(self, weight_rounder, weight, codes))

        if rounder is not None and fits_bytes(self, input, weight, rounder.bytes, quantizer.bytes):
            made = compute_on_codes(self, input, rounder, pack)
            if made is not None:
                return made
        quantized_weight = cached(None, lambda: quantizer(weight))
        return self.compute(input if rounder is None else rounder(input), quantized_weight)

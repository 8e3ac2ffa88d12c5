"""QuantModule: what the quantized layers share: two quantizers, and memory given back between forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from quant.formats import FLOAT, BlockFormat, Format
from quant.modes import recorded
from quant.quantizers import autograd as fused
from quant.quantizers.byte_codes import ByteCodes, Packed, compute_on_codes, fits_bytes, pack_weight
from quant.quantizers.prefix_cache import Replay
from quant.quantizers.quantizer import Quantizer, QuantizerConfig, Rounder

Made = TypeVar("Made")

TABLE = "table"
"""what the names of quantizers of embeddings hold: these take the weight's format"""


Reach = Literal["called", "uncalled", "read"]
"""what calibration found of a layer: it is called; it was not; its weight is read past it (`quant.quantizers.reach`)"""


def runs_in(reach: Reach, formats: tuple[Format, Format]) -> tuple[Format, Format]:
    """(weight format, activation format) as a layer runs that is set to `formats`."""
    weight, activation = formats
    if reach == "called":
        return formats
    if reach == "read":
        return FLOAT, FLOAT
    needs_range = activation.scaled and not isinstance(activation, BlockFormat)
    return weight, FLOAT if needs_range else activation


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
    """counted from the end: the input of one example alone comes without a batch axis"""
    differentiable: ClassVar[bool] = False
    """whether the class states the gradients of its `compute`, see `quant.quantizers.autograd`"""

    weight: Tensor
    bias: Any
    """a tensor or None"""
    weight_quantizer: Quantizer
    input_quantizer: Quantizer
    reach: Reach = "called"
    most_seen: int = -1
    """numbers in the largest input since `observing` was set last; -1: the layer was not called"""
    kept_weight: KeptWeight | None = None
    replay: Replay | None = None

    def add_quantizers(self, weight: QuantizerConfig, activation: QuantizerConfig) -> None:
        """Attach the two quantizers, in float until `set_formats`. Raises ValueError for a granularity not theirs."""
        if weight.granularity == "token":
            raise ValueError(f"weights are scaled per tensor or channel, got granularity {weight.granularity!r}")
        shape = self.scale_shape() if weight.granularity == "channel" else (1,) * self.weight.dim()
        device, reduction = self.weight.device, self.reduction_dim
        self.weight_quantizer = Quantizer(weight, shape, reduction, batched=False, device=device)
        scales: tuple[int, ...] = ()
        if activation.granularity == "channel":
            scales = (self.input_channels, *[1] * (-self.input_reduction_dim - 1))
        self.input_quantizer = Quantizer(activation, scales, self.input_reduction_dim, device=device)
        self.observing = False

    def scale_shape(self) -> tuple[int, ...]:
        """Of the weight's scales, one for each output channel."""
        return tuple(size if dim == self.channel_dim else 1 for dim, size in enumerate(self.weight.shape))

    @property
    def reduction_dim(self) -> int | None:
        """The weight's axis that this layer sums over."""
        return self.weight_reduction_dim

    def set_formats(self, weight: Format, activation: Format) -> None:
        """Round the weight and the input to these formats from now on, or to what `reach` leaves of them."""
        if self.reach != "called":
            weight, activation = runs_in(self.reach, (weight, activation))
        modules = self._modules  # nn.Module's own lookup costs more than the switch, for every layer at every step
        cast(Quantizer, modules["weight_quantizer"]).set_format(weight)
        cast(Quantizer, modules["input_quantizer"]).set_format(activation)
        if (placed := modules.get("placed")) is not None:
            for name, quantizer in cast(nn.ModuleDict, placed).items():
                cast(Quantizer, quantizer).set_format(weight if TABLE in name else activation)

    def place(self, name: str, quantizer: Quantizer) -> None:
        """Take in the quantizer of a tensor around this layer, in the layer's format (`quant.transforms.placement`)."""
        if "placed" not in self._modules:
            self.add_module("placed", nn.ModuleDict())
        cast(nn.ModuleDict, self._modules["placed"])[name] = quantizer
        self.set_formats(*self.formats)

    @property
    def input_channels(self) -> int:
        """Channels of the input, which one example alone has too."""
        raise NotImplementedError(f"{type(self).__name__} must say how many channels it reads")

    @property
    def activation_quantizers(self) -> list[Quantizer]:
        """That of the input first, then those placed around."""
        placed = cast("nn.ModuleDict | None", self._modules.get("placed"))
        return [self.input_quantizer, *(cast(Quantizer, q) for q in (placed.values() if placed is not None else ()))]

    @property
    def formats(self) -> tuple[Format, Format]:
        """(weight format, activation format) as set now."""
        return self.weight_quantizer.format, self.input_quantizer.format

    def compute(self, input: Tensor, weight: Tensor) -> Tensor:
        """The float layer's own arithmetic on the given input and weight."""
        raise NotImplementedError(f"{type(self).__name__} must say how it computes")

    def knows_gradients(self, input: Tensor) -> bool:
        """Whether the gradients below are those of `compute` on this input."""
        return self.differentiable

    def input_gradient(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must say how it is differentiated")

    def parameter_gradients(
        self, grad: Tensor, input: Tensor, weight: Tensor, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        raise NotImplementedError(f"{type(self).__name__} must say how it is differentiated")

    def takes_codes(self, input: Tensor, weight: Tensor, zero_point: int) -> bool:
        """Whether `compute` on this input is known in integers, by the two below: see `quant.quantizers.byte_codes`."""
        return False

    def pack_codes(self, weight: ByteCodes, input: ByteCodes) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must say how it computes on codes")

    def compute_codes(self, input: ByteCodes, packed: Tensor, scale: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must say how it computes on codes")

    def forward(self, input: Tensor) -> Tensor:
        if self.replay is not None:
            return self.replay.output(self, self._forward, input)
        return self._forward(input)

    def _forward(self, input: Tensor) -> Tensor:
        if recorded():
            return self.compute(self.input_quantizer(input), self.weight_quantizer(self.weight))
        if self.observing:
            self.most_seen = max(self.most_seen, input.numel())
            self.input_quantizer.observe(input)
        weight = self.weight  # read once: a parametrization computes it at every access
        input_rounder = self.input_quantizer.rounding(input)
        if not torch.is_grad_enabled():
            return self._infer(input, weight, input_rounder)
        weight_rounder = self.weight_quantizer.rounding(weight)
        rounders = [rounder for rounder in (input_rounder, weight_rounder) if rounder is not None]
        if rounders and self.knows_gradients(input) and all(rounder.plain for rounder in rounders):
            return fused.run(self, input, weight, input_rounder, weight_rounder)
        recompute = Recompute()
        quantized_input = recompute.round(input_rounder, input)
        quantized_weight = recompute.round(weight_rounder, weight)
        with recompute.saved_tensors():
            return self.compute(quantized_input, quantized_weight)

    def _infer(self, input: Tensor, weight: Tensor, rounder: Rounder | None) -> Tensor:
        """Without gradients. rounder: the input's."""
        quantizer = self.weight_quantizer

        def kept(form: Hashable, make: Callable[[], Made]) -> Made:
            return make() if self.kept_weight is None else self.kept_weight.get(quantizer, weight, form, make)

        def pack(codes: ByteCodes) -> Packed | None:
            weight_rounder = quantizer.rounding(weight)
            assert weight_rounder is not None
            form = codes.zero_point, codes.codes.shape
            return kept(form, lambda: pack_weight(self, weight_rounder, weight, codes))

        if rounder is not None and fits_bytes(self, input, weight, rounder.bytes, quantizer.bytes):
            made = compute_on_codes(self, input, rounder, pack)
            if made is not None:
                return made
        quantized_weight = kept(None, lambda: quantizer(weight))
        return self.compute(input if rounder is None else rounder(input), quantized_weight)


class KeptWeight:
    """A layer's weight, rounded once for as many forward passes as nothing that the rounding depends on changes.

    Tensors are told apart by identity and version, which every change in place raises, an optimizer's step and
    `load_state_dict` among them. Only a change behind autograd's back (`weight.data[...] = x`) is not seen: so weights
    are kept within `quant.convert.weights_kept` alone, not in general.
    """

    def __init__(self) -> None:
        self.sources: list[tuple[Tensor, int]] = []
        self.form: Hashable = None
        self.value: Any = None

    def __reduce__(self) -> tuple[type[KeptWeight], tuple[()]]:
        """What is kept belongs to no copy, and packed weights cannot be copied."""
        return KeptWeight, ()

    def get(self, quantizer: Quantizer, weight: Tensor, form: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` makes of the weight as the quantizer rounds it now. form: what else that depends on."""
        tensors = [weight, *quantizer.grid_tensors()]
        if any(tensor.is_inference() for tensor in tensors):  # these have no version
            return make()
        form = quantizer.format, form
        sources = [(tensor, tensor._version) for tensor in tensors]
        fresh = len(sources) == len(self.sources) and all(
            now is then and version == before
            for (now, version), (then, before) in zip(sources, self.sources, strict=True)
        )
        if self.value is None or self.form != form or not fresh:
            self.value = make()
            self.sources, self.form = [(t, t._version) for t in (weight, *quantizer.grid_tensors())], form
        kept: Made = self.value
        return kept


class Recompute:
    """Rounded tensors are not kept for the backward pass: they are rounded again, from what is kept anyway.

    For layers that `quant.quantizers.autograd` does not know: with a forward of their own, learned offsets.
    A layer's backward needs its rounded input and weight, a quantizer's backward the unrounded ones. Keeping both would
    raise the peak memory of training by half; rounding is a small share of a step.
    """

    def __init__(self) -> None:
        self.sources: dict[int, tuple[Rounder, Tensor, int]] = {}
        """data pointer of a rounded tensor -> what rounded it, from what, and the rounded tensor's version"""

    def round(self, rounder: Rounder | None, x: Tensor) -> Tensor:
        """x rounded, to be rounded again when the backward pass asks for it."""
        if rounder is None:
            return x
        rounded = rounder(x)
        if torch.is_grad_enabled():
            self.sources[rounded.untyped_storage().data_ptr()] = rounder, x.detach(), rounded._version
        return rounded

    def saved_tensors(self) -> AbstractContextManager[Any]:
        """Within, what autograd saves of the rounded tensors is how to make them."""
        # Other hooks, such as activation checkpointing's, save more memory than these, and only one pair can act.
        if not self.sources or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            return nullcontext()
        sources = self.sources

        def pack(saved: Tensor) -> _Saved:
            rounder, source, version = sources.get(saved.untyped_storage().data_ptr(), (None, saved.detach(), None))
            if rounder is None or saved._version != version:  # changed in place since: keep it as it is
                rounder, source = None, saved.detach()
            layout = saved.shape, saved.stride(), saved.storage_offset()
            return _Saved(rounder, source, source._version, layout)

        return torch.autograd.graph.saved_tensors_hooks(pack, _Saved.unpack)


@dataclass(frozen=True)
class _Saved:
    """A tensor kept for the backward pass: itself, or what to round to get it."""

    rounder: Rounder | None
    source: Tensor
    version: int
    layout: tuple[Any, ...]

    def unpack(self) -> Tensor:
        """Raises RuntimeError, as autograd itself would, if the source was changed in place since the forward pass."""
        if self.source._version != self.version:
            raise RuntimeError(
                "a tensor needed for the gradient of a quantized layer was changed in place after the forward pass "
                f"(shape {tuple(self.source.shape)}, version {self.source._version}, expected {self.version})"
            )
        if self.rounder is None:
            return self.source
        with torch.no_grad():
            return self.rounder(self.source).as_strided(*self.layout)

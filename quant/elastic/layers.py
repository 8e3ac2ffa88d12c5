"""ElasticConv2d, ElasticLinear, ElasticBatchNorm2d: layers that compute with the first part of their weights.

At every moment an elastic layer is a plain layer of its chosen size: its attributes, such as `out_channels`,
and its `weight` are those of the smaller layer, and the weight is a slice of the stored one, which gets the gradients.
Quantized layers are made from it as from any other (`quant.convert`), and round the slice alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """Channels (or features) that a layer writes and reads, and the side of its kernel."""

    out: int
    read: int
    kernel: int = 1


class Elastic(nn.Module):
    """A layer with a stored size and a smaller chosen one."""

    whole: Size
    """The stored size."""
    size: Size
    """The chosen size."""

    @property
    def weight(self) -> Any:
        """The part of the weight in use, or None."""
        return self.stored("weight")

    @property
    def bias(self) -> Any:
        """The part of the bias in use, or None."""
        return self.stored("bias")

    @classmethod
    def from_float(cls, layer: Any) -> Any:
        """Return an elastic layer at its full size that shares the parameters, buffers and settings of `layer`."""
        module = cls.__new__(cls)
        module.__dict__.update(layer.__dict__)
        for registry in ("_parameters", "_buffers", "_modules"):
            module.__dict__[registry] = dict(layer.__dict__[registry])
        module.whole = module.size = module.own_size()
        return module

    def own_size(self) -> Size:
        """Return the size that the attributes tell."""
        raise NotImplementedError(f"{type(self).__name__} must say how large it is")

    def resize(self, size: Size) -> None:
        """Compute with the first `size.out` and `size.read` channels, and the centre of the kernel, from now on.

        Raises:
            ValueError: For a size that is not within the stored one.
        """
        whole = self.whole
        parts = (size.out, whole.out), (size.read, whole.read), (size.kernel, whole.kernel)
        if not all(1 <= part <= most for part, most in parts) or (whole.kernel - size.kernel) % 2:
            raise ValueError(f"{size} is no part of {whole}: kernels lose the same number of rows on each side")
        if size != self.size:
            self.size = size
            self.take(size)

    def take(self, size: Size) -> None:
        """Set the attributes of a plain layer of this size."""
        raise NotImplementedError(f"{type(self).__name__} must say what a size changes")

    def part_of(self, name: str, tensor: Tensor) -> Tensor:
        """Return the part of a stored tensor that the chosen size computes with."""
        return tensor[: self.size.out]

    def stored(self, name: str) -> Any:
        """Return the part in use of a parameter or buffer; itself at the full size, None if there is none."""
        tensor = self._parameters[name] if name in self._parameters else self._buffers[name]
        return tensor if tensor is None or self.size == self.whole else self.part_of(name, tensor)


class ElasticLinear(Elastic, nn.Linear):  # type: ignore[override]
    """Linear layer that computes with its first input and output features."""

    def own_size(self) -> Size:
        """See `Elastic.own_size`."""
        return Size(self.out_features, self.in_features)

    def take(self, size: Size) -> None:
        """See `Elastic.take`."""
        self.out_features, self.in_features = size.out, size.read

    def part_of(self, name: str, tensor: Tensor) -> Tensor:
        """See `Elastic.part_of`."""
        return tensor[: self.size.out, : self.size.read] if name == "weight" else tensor[: self.size.out]


class ElasticConv2d(Elastic, nn.Conv2d):  # type: ignore[override]
    """Convolution that computes with its first channels and the centre of its square kernel.

    It is a plain or a depthwise convolution. The padding shrinks with the kernel, so outputs keep their height and
    width.
    """

    depthwise: bool
    whole_padding: Any

    @classmethod
    def from_float(cls, layer: nn.Conv2d) -> Any:
        """See `Elastic.from_float`. Raises ValueError for groups of several channels."""
        if layer.groups not in (1, layer.in_channels) or layer.groups not in (1, layer.out_channels):
            raise ValueError(f"convolutions with groups of several channels are not elastic, got groups={layer.groups}")
        module = super().from_float(layer)
        module.depthwise, module.whole_padding = layer.groups > 1, layer.padding
        return module

    @property
    def smallest_kernel(self) -> int:
        """Side of the smallest kernel whose padding is not negative; the full one if it is not square."""
        sides = set(self.whole_kernel)
        if len(sides) > 1 or self.whole.kernel % 2 == 0:
            return self.whole.kernel
        if isinstance(self.whole_padding, str):
            return 1 if self.whole_padding == "same" else self.whole.kernel
        lost = min(pad // step for pad, step in zip(self.whole_padding, self.dilation, strict=True))
        return max(1, self.whole.kernel - 2 * lost)

    @property
    def whole_kernel(self) -> tuple[int, int]:
        """(height, width) of the stored kernel."""
        height, width = self._parameters["weight"].shape[2:]  # type: ignore[union-attr]
        return int(height), int(width)

    def own_size(self) -> Size:
        """See `Elastic.own_size`."""
        return Size(self.out_channels, self.in_channels, self.kernel_size[0])

    def take(self, size: Size) -> None:
        """See `Elastic.take`."""
        lost = (self.whole.kernel - size.kernel) // 2
        self.out_channels, self.in_channels = size.out, size.read
        self.kernel_size = tuple(side - 2 * lost for side in self.whole_kernel)  # type: ignore[assignment]
        if self.depthwise:
            self.groups = size.out
        if not isinstance(self.whole_padding, str):
            pads = (pad - step * lost for pad, step in zip(self.whole_padding, self.dilation, strict=True))
            self.padding = tuple(pads)
            self._reversed_padding_repeated_twice = [pad for pad in reversed(self.padding) for _ in range(2)]
        else:
            reach = (step * (side - 1) for step, side in zip(self.dilation, self.kernel_size, strict=True))
            sides = ((total // 2, total - total // 2) for total in reversed(list(reach)))
            self._reversed_padding_repeated_twice = [side for pair in sides for side in pair]

    def part_of(self, name: str, tensor: Tensor) -> Tensor:
        """See `Elastic.part_of`."""
        if name != "weight":
            return tensor[: self.size.out]
        lost = (self.whole.kernel - self.size.kernel) // 2
        height, width = (slice(lost, side - lost) for side in self.whole_kernel)
        return tensor[: self.size.out, : 1 if self.depthwise else self.size.read, height, width]


class ElasticBatchNorm2d(Elastic, nn.BatchNorm2d):  # type: ignore[override]
    """Batch norm of the first channels; the statistics of the others stay as they are."""

    @property
    def running_mean(self) -> Any:  # type: ignore[override]
        """The means in use: a view, which training updates in place."""
        return self.stored("running_mean")

    @property
    def running_var(self) -> Any:  # type: ignore[override]
        """The variances in use: a view, which training updates in place."""
        return self.stored("running_var")

    def own_size(self) -> Size:
        """See `Elastic.own_size`."""
        return Size(self.num_features, self.num_features)

    def take(self, size: Size) -> None:
        """See `Elastic.take`."""
        self.num_features = size.out


ELASTIC: Mapping[type[nn.Module], type[Elastic]] = {
    nn.Conv2d: ElasticConv2d,
    nn.Linear: ElasticLinear,
    nn.BatchNorm2d: ElasticBatchNorm2d,
}
"""Float layer -> elastic layer."""


def can_be_elastic(layer: nn.Module) -> bool:
    """Whether a layer, of one of these classes or derived from it, keeps its weights as plain parameters."""
    known = next((plain for plain in ELASTIC if isinstance(layer, plain)), None)
    computed = any(isinstance(getattr(type(layer), name, None), property) for name in ("weight", "bias"))
    return (
        known is not None and not isinstance(layer, Elastic) and not computed and not hasattr(layer, "parametrizations")
    )


def make_elastic(layer: nn.Module) -> Elastic:
    """Return an elastic layer in place of `layer`; of a derived class, it keeps the forward of that class."""
    own: Any = type(layer)
    made: Elastic = elastic_class(own).from_float(layer)
    return made


@cache
def elastic_class(own: Any) -> type[Elastic]:
    """Return the elastic class of a float class."""
    plain = next(known for known in ELASTIC if issubclass(own, known))
    if own is plain:
        return ELASTIC[plain]
    return type(f"Elastic{own.__name__}", (ELASTIC[plain], own), {"__module__": __name__})


def plain_class(elastic: Any) -> Any:
    """Return the float class that an elastic class was made from."""
    return next(c for c in elastic.__mro__ if not issubclass(c, Elastic) and any(issubclass(c, k) for k in ELASTIC))


@torch.no_grad()
def freeze_size(layer: Elastic, plain: type[nn.Module]) -> None:
    """Turn an elastic layer, in place, into a plain one of its chosen size, with copies of the slices in use.

    Args:
        layer: The layer.
        plain: The plain class: the float class, or the quantized class of it.
    """
    for registry in (layer._parameters, layer._buffers):
        for name, tensor in list(registry.items()):
            if tensor is not None and tensor.dim():
                part = layer.stored(name).detach().clone()
                parameter = isinstance(tensor, nn.Parameter)
                registry[name] = nn.Parameter(part, tensor.requires_grad) if parameter else part
    for name in ("whole", "size", "depthwise", "whole_padding"):
        layer.__dict__.pop(name, None)
    layer.__class__ = plain  # type: ignore[assignment]

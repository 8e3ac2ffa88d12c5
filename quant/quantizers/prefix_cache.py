"""PrefixCache: forward passes over one batch that differ only in formats share all layers before the first difference.

A search evaluates thousands of assignments, most of which differ from another one in a single layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from quant.formats import Format


class CachedLayer(Protocol):
    """A quantized layer, as far as the cache is concerned."""

    prefix_cache: PrefixCache | None

    @property
    def formats(self) -> tuple[Format, Format]:
        """(weight format, activation format) that the layer runs in."""


class Call(NamedTuple):
    """One call of a layer in a forward pass, its formats and size, and its output."""

    layer: CachedLayer
    setting: tuple[object, ...]
    output: Tensor
    version: int
    """`output._version`, which an in-place activation raises: such an output is computed again."""


class PrefixCache:
    """The calls of quantized layers in the last forward pass, in order.

    As long as each call of a pass meets the layer and the formats of the last pass, its input is the same, and so is
    its output. From the first difference on, layers run. The outputs of one pass are kept alive.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.position = 0

    def restart(self) -> None:
        """Start a forward pass; call this before each."""
        self.position = 0

    def output(self, layer: CachedLayer, compute: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        """Return the output of the next call of the pass.

        Args:
            layer: The layer that is called.
            compute: The layer's forward.
            input: The layer's input, any shape.

        Returns:
            The cached output if it is still valid, else compute(input).
        """
        if torch.is_inference_mode_enabled():  # its tensors do not record in-place changes
            return compute(input)
        last = self.calls[self.position] if self.position < len(self.calls) else None
        setting = layer.formats, getattr(layer, "size", None)  # of an elastic layer, see `quant.elastic`
        if last is None or last.layer is not layer or last.setting != setting:
            del self.calls[self.position :]  # all later calls had another input
            last = None
        if last is None or last.output._version != last.version:
            output = compute(input)
            last = Call(layer, setting, output, output._version)
            self.calls[self.position : self.position + 1] = [last]
        self.position += 1
        return last.output


@contextmanager
def prefix_cached(modules: Mapping[str, CachedLayer]) -> Iterator[PrefixCache]:
    """Within, forward passes over ONE batch in eval mode, without gradients, reuse their common prefix.

    Only formats may change between passes. Call `restart` before each pass.

    Args:
        modules: The quantized layers, by name.

    Yields:
        The cache.
    """
    cache = PrefixCache()
    for module in modules.values():
        module.prefix_cache = cache
    try:
        yield cache
    finally:
        for module in modules.values():
            module.prefix_cache = None

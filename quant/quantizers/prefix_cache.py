"""Replay: forward passes over one batch that differ in formats alone do not run again what comes before the difference.

Judging thousands of assignments is what a search spends its time on beside training, and most of them differ from
another one in a single layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from quant.formats import Format

if TYPE_CHECKING:
    from quant.quant_module import QuantModule


class Call(NamedTuple):
    """What a layer returned, at one place of the pass."""

    layer: QuantModule
    formats: tuple[Format, Format]
    output: Tensor
    version: int
    """of `output`, which an activation in place raises: such an output is computed again"""


class Replay:
    """The quantized layers' calls in the last forward pass, in order.

    As long as every call of a pass meets the layer and the formats of the last pass, its input is the same, and so is
    its output. From the first difference on, layers run. Keeps the outputs of one pass alive.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.position = 0

    def restart(self) -> None:
        """Before each forward pass."""
        self.position = 0

    def output(self, layer: QuantModule, compute: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        """What the layer returns for the input, played back or computed."""
        if torch.is_inference_mode_enabled():  # its tensors do not tell whether they were changed in place
            return compute(input)
        last = self.calls[self.position] if self.position < len(self.calls) else None
        if last is None or last.layer is not layer or last.formats != layer.formats:
            del self.calls[self.position :]  # whatever follows had another input
            last = None
        if last is None or last.output._version != last.version:
            output = compute(input)
            last = Call(layer, layer.formats, output, output._version)
            self.calls[self.position : self.position + 1] = [last]
        self.position += 1
        return last.output


@contextmanager
def replayed(modules: Mapping[str, QuantModule]) -> Iterator[Replay]:
    """Within, forward passes over ONE batch in eval mode, without gradients, play back what they have in common.

    Nothing but formats may change from pass to pass. Call `restart` before each.
    """
    replay = Replay()
    for module in modules.values():
        module.replay = replay
    try:
        yield replay
    finally:
        for module in modules.values():
            module.replay = None

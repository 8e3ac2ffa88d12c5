"""Recompute: rounded tensors are rounded again in the backward pass instead of being stored for it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.quantizers.quantizer import Rounder


class Recompute:
    """Saved-tensor hooks for layers that `quant.quantizers.autograd` cannot differentiate itself.

    Those are layers with a forward of their own and learned offsets. A layer's backward pass needs its rounded input
    and weight, a quantizer's the unrounded ones. Storing both would raise the peak memory of training by half, and
    rounding takes only a small share of a step.
    """

    def __init__(self) -> None:
        self.sources: dict[int, tuple[Rounder, Tensor, int]] = {}
        """Data pointer of a rounded tensor -> (its rounder, the unrounded tensor, the rounded tensor's version)."""

    def round(self, rounder: Rounder | None, x: Tensor) -> Tensor:
        """Round x, and remember how to do it again; None leaves x as it is."""
        if rounder is None:
            return x
        rounded = rounder(x)
        if torch.is_grad_enabled():
            self.sources[rounded.untyped_storage().data_ptr()] = rounder, x.detach(), rounded._version
        return rounded

    def saved_tensors(self) -> AbstractContextManager[Any]:
        """Within, autograd stores the source of a rounded tensor in its place."""
        # Only one pair of hooks can be active, and others (activation checkpointing) save more memory than these.
        if not self.sources or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            return nullcontext()
        sources = self.sources

        def pack(saved: Tensor) -> _Saved:
            rounder, source, version = sources.get(saved.untyped_storage().data_ptr(), (None, saved.detach(), None))
            if rounder is None or saved._version != version:  # changed in place since it was rounded: store it
                rounder, source = None, saved.detach()
            layout = saved.shape, saved.stride(), saved.storage_offset()
            return _Saved(rounder, source, source._version, layout)

        return torch.autograd.graph.saved_tensors_hooks(pack, _Saved.unpack)


@dataclass(frozen=True)
class _Saved:
    """A tensor stored for the backward pass: itself, or its unrounded source."""

    rounder: Rounder | None
    source: Tensor
    version: int
    layout: tuple[Any, ...]

    def unpack(self) -> Tensor:
        """Return the tensor; raise RuntimeError, as autograd does, if its source was changed in place meanwhile."""
        if self.source._version != self.version:
            raise RuntimeError(
                "a tensor needed for the gradient of a quantized layer was changed in place after the forward pass "
                f"(shape {tuple(self.source.shape)}, version {self.source._version}, expected {self.version})"
            )
        if self.rounder is None:
            return self.source
        with torch.no_grad():
            return self.rounder(self.source).as_strided(*self.layout)

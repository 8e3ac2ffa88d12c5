"""Grid: what a quantizer keeps for one format: scale, zero point and the row of numbers that rounds with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quant.formats import FloatFormat, IntFormat, IntGrid, byte_grid
from quant.quant_utils import rounding_row
from quant.quantizers.learned_scales import keep_positive, know, watch


class Grid(nn.Module):
    """Scale, zero point and rounding row of one tensor in one format."""

    scale: Tensor
    zero_point: Tensor
    ready: Tensor
    row: Tensor
    known_scale: Tensor
    """a learned scale when it was last seen, positive: see `learned_scales`"""
    known_version: int

    def __init__(
        self,
        format: IntFormat | FloatFormat,
        shape: tuple[int, ...],
        learned: bool,
        symmetric: bool,
        device: torch.device,
        learned_offset: bool = False,
    ) -> None:
        super().__init__()
        self.format = format
        asymmetric = isinstance(format, IntFormat) and not symmetric
        self.moved = asymmetric and not learned_offset
        """whether a zero point moves the grid; a learned offset moves the tensor instead"""
        scale = torch.ones(shape, device=device)
        self.learned = learned
        if learned:
            self.scale = nn.Parameter(scale)
            self.register_buffer("known_scale", scale.clone(), persistent=False)
            watch(self)
        else:
            self.register_buffer("scale", scale)
        if self.moved:
            self.register_buffer("zero_point", torch.zeros(shape, device=device))
        self.offset = nn.Parameter(torch.zeros(shape, device=device)) if asymmetric and learned_offset else None
        self.register_buffer("ready", torch.tensor(False, device=device))
        self.register_load_state_dict_post_hook(_refresh_loaded)
        self._refresh()

    def keep_positive(self) -> None:
        """Before the scale is used: a learned one may have been set to anything since."""
        if self.learned and not torch.compiler.is_compiling():
            keep_positive(self)

    @torch.no_grad()
    def set(self, scale: Tensor, zero_point: Tensor | None) -> None:
        self.scale.copy_(scale.view_as(self.scale))
        if self.moved and zero_point is not None:
            self.zero_point.copy_(zero_point.view_as(self.zero_point))
        if self.offset is not None and zero_point is not None:
            self.offset.copy_((-zero_point * scale).view_as(self.offset))  # the same grid: (q - zp) s = q s + offset
        self.ready.fill_(True)
        self._refresh()

    def _refresh(self) -> None:
        """After scale and zero point were given.

        The row is a new tensor, never an update in place, since a backward may still hold the old one.
        """
        with torch.inference_mode(False):  # a backward cannot hold what inference mode makes
            codes: IntGrid = "narrow" if self.offset is None else "full"
            zero_point = self.zero_point if self.moved else None
            row = rounding_row(self.format, zero_point, None if self.moved else codes, self.scale.device)
        self.register_buffer("row", row, persistent=False)
        # As Python values too: reading a buffer at every forward would stall a GPU.
        self.is_ready = not self.ready.is_meta and bool(self.ready)
        self.largest_code = float(row[:2].abs().max()) if self.is_ready else math.nan
        shared = self.is_ready and row.numel() == len(row) and self.offset is None
        self.bytes = byte_grid(self.format, float(row[0]), float(row[1])) if shared else None
        """how the values are held in bytes; None where they are not, channels differ, or an offset moves them"""
        if self.learned:
            know(self)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.keep_positive()
        super()._save_to_state_dict(*args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, whose scale is another parameter."""
        super().__setstate__(state)
        if self.learned:
            self.known_version = -2  # of no tensor
            watch(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves between devices, but keeps its float32 values when the model goes to half precision."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


def _refresh_loaded(grid: Grid, keys: Any) -> None:
    """After `load_state_dict`. Not a lambda: models that hold one can neither be pickled nor sent to a process."""
    grid._refresh()

"""Learned scales stay positive, whichever optimizer moves them, and each by itself.

A scale at or below zero would turn its grid over, and the channel that it belongs to would give nothing but zeros: no
gradient would bring it back. So an optimizer's step takes at most half of a scale, and a scale that was set to nothing
otherwise, as by a loop that writes to parameters itself, is half of what it was before as soon as it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from quant.quant_utils import MIN_LEARNED_SCALE

if TYPE_CHECKING:
    from quant.quantizers.quant_params import Grid

_grids: WeakSet[Grid] = WeakSet()
"""every grid with a learned scale"""


def watch(grid: Grid) -> None:
    """Keep the learned scale of `grid` positive from now on; it is positive now."""
    _grids.add(grid)


def keep_positive(grid: Grid) -> None:
    """Look after a learned scale that may have been set since it was last known."""
    if _changed(grid):
        _put_right(grid)


@torch.no_grad()
def _put_right(grid: Grid) -> None:
    """Half of what it was before for each scale that has been set to nothing; NaN stays NaN."""
    scale = grid.scale.data  # whose changes autograd does not count: a layer may be called twice before a backward
    halved = (grid.known_scale / 2).clamp(min=MIN_LEARNED_SCALE)
    scale.copy_(torch.where(scale < MIN_LEARNED_SCALE, halved, scale))
    know(grid)


@torch.no_grad()
def know(grid: Grid) -> None:
    """Take the scale as it is for what it should be."""
    grid.known_scale.copy_(grid.scale).clamp_(min=MIN_LEARNED_SCALE)
    grid.known_version = _version(grid.scale)


def _changed(grid: Grid) -> bool:
    """Whether the scale may have been set since. Reads nothing from a device, which would stall a GPU."""
    # A tensor that stands in for the parameter, as torch.func's do, is not ours to change.
    return isinstance(grid.scale, nn.Parameter) and _version(grid.scale) != grid.known_version


def _version(scale: Tensor) -> int:
    """Raised by each change in place; -1 where there is none (inference mode), or nothing to change."""
    return -1 if scale.is_inference() or scale.is_meta else scale._version


def _before_step(*_: Any) -> None:
    """What was set by hand is not the optimizer's doing."""
    for grid in list(_grids):
        keep_positive(grid)


@torch.no_grad()
def _after_step(*_: Any) -> None:
    moved = [grid for grid in list(_grids) if _changed(grid)]
    if not moved:
        return
    scales: list[Tensor] = [grid.scale.data for grid in moved]
    known: list[Tensor] = [grid.known_scale for grid in moved]
    torch._foreach_mul_(known, 0.5)
    torch._foreach_clamp_min_(known, MIN_LEARNED_SCALE)
    torch._foreach_maximum_(scales, known)
    torch._foreach_copy_(known, scales)
    for grid in moved:
        grid.known_version = _version(grid.scale)


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)

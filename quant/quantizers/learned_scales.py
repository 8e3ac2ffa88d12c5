"""Keep learned scales positive, under any optimizer.

A scale at or below zero would mirror its grid: the channel would output only zeros and receive no gradient to recover.
So an optimizer step takes at most half of a scale. A scale that a training loop sets to zero or less by other means is
replaced by half of its last positive value as soon as it is used.
"""

from __future__ import annotations

from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from quant.quant_utils import MIN_LEARNED_SCALE


class LearnedScale(Protocol):
    """What holds a learned scale: `quant.quantizers.quant_params.QuantParams`."""

    scale: Tensor
    """float32, the parameter that an optimizer changes."""
    known_scale: Tensor
    """float32 of the same shape: the last positive value."""
    known_version: int
    """`scale._version` at that time."""


_watched: WeakSet[LearnedScale] = WeakSet()


def watch(holder: LearnedScale) -> None:
    """Keep a learned scale, which is positive now, positive after every optimizer step."""
    _watched.add(holder)


def keep_positive(holder: LearnedScale) -> None:
    """Correct a learned scale that may have been changed since it was last seen."""
    if _changed(holder):
        _restore_positive(holder)


@torch.no_grad()
def _restore_positive(holder: LearnedScale) -> None:
    """Replace entries below the minimum by half of their last positive value; NaN stays NaN."""
    scale = holder.scale.data  # not counted by autograd: a layer may be called twice before a backward pass
    halved = (holder.known_scale / 2).clamp(min=MIN_LEARNED_SCALE)
    scale.copy_(torch.where(scale < MIN_LEARNED_SCALE, halved, scale))
    remember(holder)


@torch.no_grad()
def remember(holder: LearnedScale) -> None:
    """Record the current scale as the last positive value."""
    holder.known_scale.copy_(holder.scale).clamp_(min=MIN_LEARNED_SCALE)
    holder.known_version = _version(holder.scale)


def _changed(holder: LearnedScale) -> bool:
    """Whether the scale may have changed since it was last seen. Reads no values, which would stall a GPU."""
    # torch.func replaces the parameter by a tensor that must not be changed.
    return isinstance(holder.scale, nn.Parameter) and _version(holder.scale) != holder.known_version


def _version(scale: Tensor) -> int:
    """The counter of in-place changes; -1 for meta tensors and in inference mode, which have none."""
    return -1 if scale.is_inference() or scale.is_meta else scale._version


def _before_step(*_: Any) -> None:
    """Correct changes that other code has made, so that the optimizer's own can be told apart."""
    for holder in list(_watched):
        keep_positive(holder)


@torch.no_grad()
def _after_step(*_: Any) -> None:
    moved = [holder for holder in list(_watched) if _changed(holder)]
    if not moved:
        return
    scales: list[Tensor] = [holder.scale.data for holder in moved]
    known: list[Tensor] = [holder.known_scale for holder in moved]
    torch._foreach_mul_(known, 0.5)
    torch._foreach_clamp_min_(known, MIN_LEARNED_SCALE)
    torch._foreach_maximum_(scales, known)
    torch._foreach_copy_(known, scales)
    for holder in moved:
        holder.known_version = _version(holder.scale)


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)

"""What a model returns as its training loss: the checks, and a loss that can always be differentiated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quant.errors import UserError


def check_loss(loss: Any, model: nn.Module, devices: int) -> None:
    """Raise UserError for a loss that is no scalar; several devices return one value each."""
    if not isinstance(loss, Tensor) or (loss.numel() != 1 and devices < 2):
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise UserError(
            f"{type(model).__name__} returns {got} where its loss should be: return {{'loss': ..., 'logits': "
            "...} or (loss, logits) where there are labels, or pass compute_loss_func"
        )


def with_loss_first(loss: Tensor, outputs: Any) -> Any:
    """Return outputs that begin with the loss, because the Trainer drops the first entry of a tuple or a tensor."""
    if isinstance(outputs, Tensor):
        return loss, outputs
    return (loss, *outputs) if isinstance(outputs, tuple) else outputs


def with_gradient(loss: Tensor, model: nn.Module) -> Tensor:
    """Return a loss, scalar, that has a gradient.

    It has none where scales alone are trained and none of the drawn formats has one: a step without a gradient.
    """
    if loss.requires_grad or not torch.is_grad_enabled():
        return loss
    return loss + 0.0 * next(p for p in model.parameters() if p.requires_grad).sum()

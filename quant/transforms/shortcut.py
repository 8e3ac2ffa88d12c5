"""A gain on a shortcut, attached to the norm that reads the sum, so that no model's own code has to change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quant.module_utils import Arguments, first_tensor, replace_first_tensor


class Shortcut(nn.Module):
    """Multiplies the shortcut's part of a sum by `gain`; a submodule of the norm that reads the sum.

    The sum S = X + B arrives with X already added, so gain * X + B = S + (gain - 1) X. X is the last input of `reader`,
    a layer in the branch B; with dropout, X is taken after it.

    Args:
        channels: Size of the last axis.
        device: Device of the gain.
    """

    gain: Tensor

    def __init__(self, channels: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("gain", torch.ones(channels, device=device))
        self.latest: Tensor | None = None

    def remember(self, reader: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the reader: store its input."""
        self.latest = first_tensor(args, kwargs)

    def forward(self, total: Tensor) -> Tensor:
        """Return total + (gain - 1) X, (..., channels), and release X."""
        x, self.latest = self.latest, None
        assert x is not None
        return total + (self.gain - 1).to(total) * x.view_as(total)


def add_shortcut(norm: nn.Module, reader: nn.Module) -> Shortcut:
    """Return the norm's `Shortcut`, adding one if there is none.

    Args:
        norm: The norm that reads the sum; has a weight (channels,).
        reader: The layer whose last input is the shortcut's part of the sum.
    """
    if not hasattr(norm, "shortcut"):
        weight: Any = norm.weight
        norm.shortcut = Shortcut(len(weight), weight.device)
        reader.register_forward_pre_hook(norm.shortcut.remember, with_kwargs=True)
        norm.register_forward_pre_hook(_add_through_shortcut, with_kwargs=True)
    assert isinstance(norm.shortcut, Shortcut)
    return norm.shortcut


def _add_through_shortcut(norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    return replace_first_tensor(norm.shortcut, args, kwargs)

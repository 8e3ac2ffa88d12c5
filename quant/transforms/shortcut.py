"""A factor on what a shortcut adds, kept in the norm that reads the sum: no library's layer code is touched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quant.module_utils import Arguments, first_tensor, replace_first_tensor


class Shortcut(nn.Module):
    """What a shortcut adds, multiplied by `gain`: part of the norm that reads the sum.

    The sum S = X + B arrives with X already added, so gain * X + B = S + (gain - 1) X. X is what `reader`, a layer of
    the branch B, has read just before: after dropout, where there is one.
    """

    gain: Tensor

    def __init__(self, channels: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("gain", torch.ones(channels, device=device))
        self.latest: Tensor | None = None

    def remember(self, reader: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.latest = first_tensor(args, kwargs)

    def forward(self, total: Tensor) -> Tensor:
        x, self.latest = self.latest, None
        assert x is not None
        return total + (self.gain - 1).to(total) * x.view_as(total)


def add_shortcut(norm: nn.Module, reader: nn.Module) -> Shortcut:
    """The norm's `Shortcut`, made if it has none; what it adds is what `reader` read last."""
    if not hasattr(norm, "shortcut"):
        weight: Any = norm.weight
        norm.shortcut = Shortcut(len(weight), weight.device)
        reader.register_forward_pre_hook(norm.shortcut.remember, with_kwargs=True)
        norm.register_forward_pre_hook(_add_through_shortcut, with_kwargs=True)
    assert isinstance(norm.shortcut, Shortcut)
    return norm.shortcut


def _add_through_shortcut(norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    return replace_first_tensor(norm.shortcut, args, kwargs)

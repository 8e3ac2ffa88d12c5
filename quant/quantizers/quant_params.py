"""QuantParams: scale and zero point of one tensor in one format, and the rounding parameters that follow from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quant.formats import FloatFormat, IntFormat, IntGrid, byte_grid
from quant.quant_utils import rounding_params
from quant.quantizers.learned_scales import keep_positive, remember, watch


class QuantParams(nn.Module):
    """Scale, zero point or offset, and rounding parameters of one tensor in one format.

    Args:
        format: The format.
        shape: Shape of the scale, broadcasting to the tensor.
        learned: Whether the scale is a parameter (LSQ, arXiv 1902.08153).
        symmetric: Integers: whether the grid is symmetric around 0.
        device: Device of the tensors.
        learned_offset: Asymmetric integers: learn an offset of the tensor (LSQ+, arXiv 2004.09576) in place of a zero
            point.
    """

    scale: Tensor
    """float32, positive; a parameter if learned."""
    zero_point: Tensor
    """float32 whole numbers of the scale's shape; exists only if `moved`."""
    ready: Tensor
    """bool 0-d: whether a range has been set; part of the state dict."""
    rounding_params: Tensor
    """See `quant.kernels.eager.rounding_params`."""
    known_scale: Tensor
    """Last positive value of a learned scale, see `learned_scales`."""
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
        """Whether a zero point moves the grid; a learned offset moves the tensor instead."""
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
        """Correct a learned scale that other code may have set to any value; call before the scale is used."""
        if self.learned and not torch.compiler.is_compiling():
            keep_positive(self)

    @torch.no_grad()
    def set(self, scale: Tensor, zero_point: Tensor | None) -> None:
        """Set the range.

        Args:
            scale: float32 with as many entries as this scale, positive; fewer are those of the first channels.
            zero_point: Whole numbers of the same shape; None keeps the zero point or offset.
        """
        _copy_first(self.scale, scale)
        if self.moved and zero_point is not None:
            _copy_first(self.zero_point, zero_point)
        if self.offset is not None and zero_point is not None:
            _copy_first(self.offset, -zero_point * scale)  # the same grid: (q - zp) s = q s + offset
        self.ready.fill_(True)
        self._refresh()

    def _refresh(self) -> None:
        """Derive all else from scale and zero point.

        The rounding parameters are a new tensor, not updated in place: a backward pass may still hold the old one.
        """
        with torch.inference_mode(False):  # a backward pass cannot hold tensors of inference mode
            codes: IntGrid = "narrow" if self.offset is None else "full"
            zero_point = self.zero_point if self.moved else None
            params = rounding_params(self.format, zero_point, None if self.moved else codes, self.scale.device)
        self.register_buffer("rounding_params", params, persistent=False)
        # Kept as Python values as well: reading a buffer at every forward pass would stall a GPU.
        self.is_ready = not self.ready.is_meta and bool(self.ready)
        self.largest_code = float(params[:2].abs().max()) if self.is_ready else math.nan
        shared = self.is_ready and params.numel() == len(params) and self.offset is None
        self.bytes = byte_grid(self.format, float(params[0]), float(params[1])) if shared else None
        """One-byte codes of the values; None if they do not fit, channels differ, or an offset moves them."""
        if self.learned:
            remember(self)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.keep_positive()
        super()._save_to_state_dict(*args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, whose scale is another parameter."""
        super().__setstate__(state)
        if self.learned:
            self.known_version = -2  # matches no tensor
            watch(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move between devices, but stay float32 when the model is cast to half precision."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


def _copy_first(into: Tensor, values: Tensor) -> None:
    """Copy values into the first entries of a tensor: all of them, unless a part of a weight was calibrated."""
    part = into if values.numel() == into.numel() else into[: values.numel()]
    part.copy_(values.view_as(part))


def _refresh_loaded(params: QuantParams, keys: Any) -> None:
    """Run after `load_state_dict`. Not a lambda: models that hold one can be neither pickled nor sent to a process."""
    params._refresh()

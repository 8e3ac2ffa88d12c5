"""Second moments of the inputs of quantized layers, gathered while a block runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from quant.quant_experts import QuantExpertLinear
from quant.quant_module import QuantModule
from quant.quantizers.quantizer import without_padding
from quant.reconstruction.matrices import input_matrices, to_matrices


class Moments:
    """What reconstruction needs to know of a layer's inputs.

    Args:
        module: The layer.
        crossed: Whether to gather `cross` as well.
    """

    def __init__(self, module: QuantModule, crossed: bool) -> None:
        groups, _, columns = to_matrices(module, module.weight).shape
        dtype = torch.promote_types(module.weight.dtype, torch.float32)
        self.hessian = torch.zeros(groups, columns, columns, dtype=dtype, device=module.weight.device)
        """2 X X^T of the inputs as the layer reads them, rounded; (G, C, C)."""
        self.cross = torch.zeros_like(self.hessian) if crossed else None
        """2 X' X^T, where X' are the inputs in the float model."""
        self.rows = 0
        """Input rows so far."""

    def add(self, part: slice, product: Tensor, crossed: Tensor | None, rows: int) -> None:
        """Add 2 X^T X of some rows, and 2 X'^T X."""
        self.hessian[part] += product
        if self.cross is not None:
            self.cross[part] += product if crossed is None else crossed
        self.rows += rows


class InputCollector:
    """Gathers the moments of layers' inputs through hooks, batch by batch.

    Args:
        modules: The layers, by name.
        crossed: Whether to relate the inputs to those of the float model, which `reading_float` has seen before.
    """

    def __init__(self, modules: Mapping[str, QuantModule], crossed: bool = False) -> None:
        self.modules = dict(modules)
        self.crossed = crossed
        self.moments = {name: Moments(module, crossed) for name, module in modules.items()}
        self._masks: tuple[Tensor, ...] = ()
        self._float_inputs: dict[str, list[Tensor]] = {}
        self._last: tuple[Tensor, Tensor] | None = None
        """Input of the last linear layer in float, and its product: query, key and value read the same."""

    @contextmanager
    def reading_float(self) -> Iterator[None]:
        """Within, keep the inputs of the layers, which run in float, until `gathering` has seen the same batch."""

        def keep(name: str, module: QuantModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not isinstance(module, QuantExpertLinear):  # a router may choose other experts after rounding
                self._float_inputs.setdefault(name, []).append(_arguments(args, kwargs)[0])

        with self._hooked(keep):
            yield

    @contextmanager
    def gathering(self, masks: tuple[Tensor, ...] = ()) -> Iterator[None]:
        """Within, add the inputs of one batch to the moments.

        Args:
            masks: bool (B, T), False for padding, which is left out.
        """
        self._masks = masks
        with self._hooked(self._gather):
            yield
        self._masks, self._last = (), None
        self._float_inputs.clear()

    @torch.no_grad()
    def _gather(self, name: str, module: QuantModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, experts = _arguments(args, kwargs)
        moments, of_float = self.moments[name], self._float_inputs.get(name)
        whole = of_float.pop(0) if of_float else None
        rounded = module.input_quantizer(x)
        if rounded is x and whole is None and self._last is not None and self._last[0] is x:
            moments.add(slice(None), self._last[1], None, x.shape[:-1].numel())
            return
        dtype = moments.hessian.dtype
        product = None
        for part, rows, float_rows in self._rows(module, rounded, whole, experts):
            rows = rows.to(dtype)
            product = 2 * (rows.transpose(1, 2) @ rows)
            crossed = None if float_rows is None else 2 * (float_rows.to(dtype).transpose(1, 2) @ rows)
            moments.add(part, product, crossed, rows.shape[1])
        if rounded is x and experts is None and product is not None and module.weight.dim() == 2:
            self._last = x, product

    def _rows(
        self, module: QuantModule, x: Tensor, whole: Tensor | None, experts: Tensor | None
    ) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        if module.weight.dim() == 2:
            x = without_padding(x, self._masks)
            whole = None if whole is None else without_padding(whole, self._masks)
        rows = input_matrices(module, x, experts)
        if whole is None or not _resemble(x, whole):
            yield from ((part, own, None) for part, own in rows)
        else:
            of_float = input_matrices(module, whole, experts)
            yield from ((part, own, other) for (part, own), (_, other) in zip(rows, of_float, strict=True))

    @contextmanager
    def _hooked(self, function: Any) -> Iterator[None]:
        handles: list[RemovableHandle] = []
        for name, module in self.modules.items():

            def hook(module: Any, args: Any, kwargs: Any, name: str = name) -> None:
                function(name, module, args, kwargs)

            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _resemble(x: Tensor, whole: Tensor) -> bool:
    """Whether these are the same examples: a router may have sent others to this layer after rounding."""
    return x.shape == whole.shape and bool((x - whole).norm() <= whole.norm())


def _arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Return a layer's input and, of experts, the expert of each row."""
    x, experts, *_ = (*args, *kwargs.values(), None)
    return x, experts

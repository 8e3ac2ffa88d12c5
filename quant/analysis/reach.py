"""Which layers calibration reached; those that it did not reach stay in float as far as necessary.

An expert that no calibration example is routed to has no range for its input, which stays in float; its weight can be
rounded without data. A layer whose weight other code reads without calling the layer (a function, the float layer that
it replaced, an embedding) cannot round the weight, and stays in float altogether.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from quant.formats import FLOAT
from quant.quant_embedding import QuantEmbedding
from quant.quant_experts import QuantExpertLinear
from quant.quant_module import QuantModule, Reach
from quant.quantizers.quant_params import QuantParams

logger = logging.getLogger(__name__)

LOOK_UPS = (F.embedding, torch.embedding)
"""What an embedding reads its own weight with."""

_warned: WeakSet[nn.Module] = WeakSet()
"""Models that a warning has been issued for."""


def note_reach(model: nn.Module, modules: Mapping[str, QuantModule], run: Callable[[], Any]) -> None:
    """Set each layer's `reach` after calibration, and warn once per model about layers that stay in float.

    Args:
        model: The quantized model.
        modules: Its quantized layers, by name.
        run: Runs a forward pass over a calibration batch; called only if there are layers that were not reached.
    """
    reached = {name: module.most_seen > 0 or _has_range(module) for name, module in modules.items()}
    idle = {name: module for name, module in modules.items() if module.most_seen < 0 and not reached[name]}
    read = weights_read(idle, modules, run) if idle else set[str]()
    tables = {name: module for name, module in modules.items() if isinstance(module, QuantEmbedding)}
    with _in_float(tables.values()):  # else their own quantizers read them
        read |= weights_read(tables, modules, run, but_by=LOOK_UPS) if tables else set()
    for name, module in modules.items():
        # Dynamic ranges need no calibration.
        fine = reached[name] or module.input_quantizer.config.range == "dynamic"
        module.reach = "read" if name in read else type(module).reach if fine or name in tables else "uncalled"
        module.set_formats(*module.formats)
    if model not in _warned and (notes := notes_on_reach(modules)):
        _warned.add(model)
        for note in notes:
            logger.warning(note)


@contextmanager
def _in_float(tables: Iterable[QuantEmbedding]) -> Iterator[None]:
    """Within, look-ups return the tables' own rows."""
    formats = {table.weight_quantizer: table.weight_quantizer.format for table in tables}
    for quantizer in formats:
        quantizer.set_format(FLOAT)
    try:
        yield
    finally:
        for quantizer, format in formats.items():
            quantizer.set_format(format)


def notes_on_reach(modules: Mapping[str, QuantModule]) -> list[str]:
    """Return a sentence for each kind of layers that run in float although they are set to a format."""
    causes = {
        "uncalled": "layers were never called while calibrating, their inputs stay in float",
        "read": "layers are never called, what reads their weights past them reads these in float",
    }
    notes = []
    for reach, words in causes.items():
        names = [name for name, module in modules.items() if module.reach == reach]
        if names:
            more = ", ..." if len(names) > 3 else ""
            notes.append(f"{len(names)} of {len(modules)} {words}: {', '.join(names[:3])}{more}")
    return notes + _notes_on_experts(modules)


def _notes_on_experts(modules: Mapping[str, QuantModule]) -> list[str]:
    idle = {name: module for name, module in modules.items() if isinstance(module, QuantExpertLinear) and module.idle}
    if not idle:
        return []
    worst, module = max(idle.items(), key=lambda item: len(item[1].idle) / item[1].experts)
    return [
        f"{len(idle)} layers have experts that no calibration token was sent to, at most {len(module.idle)} of "
        f"{module.experts} ({worst}): the ranges of their weights are chosen without data"
    ]


def weights_read(
    idle: Mapping[str, QuantModule],
    modules: Mapping[str, QuantModule],
    run: Callable[[], Any],
    but_by: Collection[Any] = (),
) -> set[str]:
    """Find layers whose weights are read although the layers are not called.

    Args:
        idle: Layers that were not called; or tables, whose weights something else reads than look-ups.
        modules: All quantized layers.
        run: Runs a forward pass.
        but_by: Functions whose reads do not count.

    Returns:
        Names among `idle`.
    """
    inside = {id(module._parameters.get("weight")) for name, module in modules.items() if name not in idle}
    weights = {
        id(weight): name for name, module in idle.items() if (weight := module._parameters.get("weight")) is not None
    }
    with _Reads(weights.keys() - inside, but_by) as reads:
        run()
    return {name for name, module in idle.items() if id(module._parameters.get("weight")) in reads.read}


class _Reads(TorchFunctionMode):
    """Records which of the wanted tensors (by id) torch functions compute other tensors from."""

    def __init__(self, wanted: set[int], but_by: Collection[Any]) -> None:
        super().__init__()
        self.wanted, self.but_by, self.read = wanted, but_by, set[int]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in self.but_by:
            return output
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(output)):  # not only its shape or dtype
            self.read |= {id(leaf) for leaf in tree_leaves((args, kwargs))} & self.wanted
        return output


def _has_range(module: QuantModule) -> bool:
    """Whether training or an earlier calibration has reached the layer."""
    return any(cast(QuantParams, params).is_ready for params in module.input_quantizer.grids.values())


def reach_of(modules: Mapping[str, QuantModule]) -> dict[str, Reach]:
    """Return the layers that do not run in any pair of formats (see `quant.quant_module.runs_in`), with their reach."""
    return {name: module.reach for name, module in modules.items() if module.reach != "called"}

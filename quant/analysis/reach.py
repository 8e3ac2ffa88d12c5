"""What calibration reached: a layer that it did not reach runs in float as far as it has to.

An expert that no calibration example is routed to has seen no input, and its input has no range: that stays in float,
while its weight needs no data to be rounded. A layer whose weight the model reads past it (a function, the float layer
that it replaced, an embedding) cannot round it at all: that stays in float with all it has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, cast
from weakref import WeakSet

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from quant.quant_module import QuantModule, Reach
from quant.quantizers.quant_params import QuantParams

logger = logging.getLogger(__name__)

_warned: WeakSet[nn.Module] = WeakSet()
"""models whose layers that are never called were told of"""


def note_reach(model: nn.Module, modules: Mapping[str, QuantModule], run: Callable[[], Any]) -> None:
    """After the layers were shown calibration data: set what each of them can run in, and warn of float, once a model.

    Args:
        run: a forward pass over one calibration batch; it is run only if there are layers that were not reached.
    """
    reached = {name: module.most_seen > 0 or _has_range(module) for name, module in modules.items()}
    idle = {name: module for name, module in modules.items() if module.most_seen < 0 and not reached[name]}
    read = weights_read(idle, modules, run) if idle else set[str]()
    for name, module in modules.items():
        # A range that is found at every use has nothing to wait for.
        fine = reached[name] or module.input_quantizer.config.range == "dynamic"
        module.reach = "read" if name in read else "called" if fine else "uncalled"
        module.set_formats(*module.formats)
    if model not in _warned and (told := notes_on_reach(modules)):
        _warned.add(model)
        for note in told:
            logger.warning(note)


def notes_on_reach(modules: Mapping[str, QuantModule]) -> list[str]:
    """What runs in float although it is set to a format, in words."""
    told = {
        "uncalled": "layers were never called while calibrating, their inputs stay in float",
        "read": "layers are never called, what reads their weights past them reads these in float",
    }
    notes = []
    for reach, words in told.items():
        names = [name for name, module in modules.items() if module.reach == reach]
        if names:
            more = ", ..." if len(names) > 3 else ""
            notes.append(f"{len(names)} of {len(modules)} {words}: {', '.join(names[:3])}{more}")
    return notes


def weights_read(
    idle: Mapping[str, QuantModule], modules: Mapping[str, QuantModule], run: Callable[[], Any]
) -> set[str]:
    """The layers of `idle`, which were not called, whose weights something reads nevertheless."""
    inside = {id(module._parameters.get("weight")) for name, module in modules.items() if name not in idle}
    weights = {
        id(weight): name for name, module in idle.items() if (weight := module._parameters.get("weight")) is not None
    }
    with _Reads(weights.keys() - inside) as reads:
        run()
    return {name for name, module in idle.items() if id(module._parameters.get("weight")) in reads.read}


class _Reads(TorchFunctionMode):
    """Notes which of some tensors, by identity, functions of torch make other tensors of."""

    def __init__(self, wanted: set[int]) -> None:
        super().__init__()
        self.wanted, self.read = wanted, set[int]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(output)):  # not its shape or type alone
            self.read |= {id(leaf) for leaf in tree_leaves((args, kwargs))} & self.wanted
        return output


def _has_range(module: QuantModule) -> bool:
    """Whether training or an earlier calibration has reached the layer."""
    return any(cast(QuantParams, params).is_ready for params in module.input_quantizer.grids.values())


def reach_of(modules: Mapping[str, QuantModule]) -> dict[str, Reach]:
    """The layers that calibration did not reach, with what that leaves in float."""
    return {name: module.reach for name, module in modules.items() if module.reach != "called"}

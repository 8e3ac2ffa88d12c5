"""Find the attention heads that can be left out, by following one forward pass; fused projections stay whole."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quant.convert import run_model
from quant.elastic.channels import Channels
from quant.elastic.layers import Elastic, Size, can_be_elastic, make_elastic
from quant.module_utils import evaluating
from quant.transforms.graph import outputs

_PRODUCTS = {"scaled_dot_product_attention", "matmul"}


@dataclass(frozen=True)
class _Event:
    """A linear layer that was called, or, without a name, a product of queries and keys."""

    name: str | None
    read: int
    """Features that the layer reads; of a product, the number of heads."""
    written: int
    """Features that the layer writes; of a product, the features of a head."""


@torch.no_grad()
def find_heads(model: nn.Module, example: Any) -> list[Channels]:
    """Find attentions whose heads can be left out: those of separate linear layers for queries, keys and values.

    A trial with the first half of all heads has to give what the whole model gives without the others' contribution.

    Args:
        model: The float model.
        example: A batch.

    Returns:
        The channels of all heads of each attention, with the features of a head as `unit`; empty if the trial fails.
    """
    events = _events(model, example)
    found = [group for place, event in enumerate(events) if event.name is None and (group := _group(events, place))]
    layers = dict(model.named_modules())
    names = [name for group in found for name in (*group.writers, *group.readers)]
    alone = len(set(names)) == len(names) and all(can_be_elastic(layers[name]) for name in names)
    return found if found and alone and _keeps_the_first_heads(model, found, example) else []


def _group(events: list[_Event], place: int) -> Channels | None:
    """Return the heads of the product at `place`: its last three layers before it write them, the next reads them."""
    heads, size = events[place].read, events[place].written
    before = [event for event in events[:place] if event.name is not None][-3:]
    after = next((event for event in events[place:] if event.name is not None), None)
    if heads < 2 or len(before) < 3 or after is None or after.read != heads * size:
        return None
    if any(event.written != heads * size for event in before):
        return None
    return Channels(heads * size, [str(event.name) for event in before], [str(after.name)], unit=size)


def _events(model: nn.Module, example: Any) -> list[_Event]:
    events: list[_Event] = []

    def watch(name: str) -> Any:
        def hook(layer: nn.Module, args: Any, output: Tensor) -> None:
            events.append(_Event(name, layer.in_features, layer.out_features))  # type: ignore[arg-type]

        return hook

    hooks = [m.register_forward_hook(watch(name)) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    try:
        with evaluating(model), _Products(events):
            run_model(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return events


class _Products(TorchFunctionMode):
    """Records the first product of each attention: of queries (B, heads, T, features)."""

    def __init__(self, events: list[_Event]) -> None:
        super().__init__()
        self.events = events

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else (kwargs or {}).get("query")
        named = getattr(func, "__name__", "").strip("_") in _PRODUCTS
        repeated = bool(self.events) and self.events[-1].name is None  # the product with the values
        if named and isinstance(first, Tensor) and first.dim() == 4 and not repeated:
            self.events.append(_Event(None, first.shape[1], first.shape[3]))
        return func(*args, **(kwargs or {}))


def _keeps_the_first_heads(model: nn.Module, groups: list[Channels], example: Any) -> bool:
    half, muted = copy.deepcopy(model), copy.deepcopy(model)
    for group in groups:
        kept = group.size // group.unit // 2 * group.unit
        for name in (*group.writers, *group.readers):
            parent, _, child = name.rpartition(".")
            layer: Elastic = make_elastic(half.get_submodule(name))
            out, read = (kept, layer.whole.read) if name in group.writers else (layer.whole.out, kept)
            layer.resize(Size(out, read))
            half.get_submodule(parent)._modules[child] = layer
        for name in group.readers:
            muted.get_submodule(name).weight[:, kept:] = 0  # type: ignore[index,operator]
    try:
        with evaluating(half), evaluating(muted):
            pairs = list(zip(outputs(half, example), outputs(muted, example), strict=True))
    except (RuntimeError, ValueError):
        return False
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in pairs)

"""Groups layers that inference engines run in one format: they share an input, or their outputs are added.

One run of the model finds both: linear layers called with the same tensor (query, key and value; gate and up), and
convolutions whose outputs meet in an addition (residual blocks, including the shortcut of their stage).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eval.eval_partitions import Blocks
from policy.space import merge
from quant.convert import find_layers, run_model
from quant.module_utils import evaluating, first_tensor


def fused_groups(model: nn.Module, layer_names: Iterable[str], example_inputs: Any) -> Blocks:
    """Partition layers into groups that must share a format; every other layer is a block of its own.

    Args:
        model: the float model.
        layer_names: the layers to partition.
        example_inputs: inputs to run the model with.
    """
    names = list(layer_names)
    layers = {name: layer for name, layer in find_layers(model).items() if name in names}
    readers: dict[int, list[str]] = {}
    inputs: list[Tensor] = []  # kept alive, so that ids are not reused
    trace = AdditionTrace()

    def note(name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            trace.sources[id(output)] = frozenset([name])
            trace.alive.append(output)
        else:
            trace.sources.pop(id(output), None)
            inputs.append(x)
            readers.setdefault(id(x), []).append(name)

    with hooks(layers, note), trace, torch.no_grad(), evaluating(model):
        run_model(model, example_inputs)
    return merge({name: [name] for name in names}, [*readers.values(), *trace.added])


class AdditionTrace(TorchDispatchMode):
    """Follows the outputs of layers through later operations, and records which of them meet in an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: dict[int, frozenset[str]] = {}
        """id of a tensor -> the layers whose outputs it was computed from"""
        self.added: list[frozenset[str]] = []
        self.alive: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        operands = [x for x in tree_leaves(args) if isinstance(x, Tensor) and id(x) in self.sources]
        if operands:
            # In a product with a small gate (squeeze and excitation), only the gated tensor counts.
            size = max(x.numel() for x in operands)
            found = frozenset().union(*(self.sources[id(x)] for x in operands if x.numel() == size))
            if func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_):
                self.added.append(found)
            for x in tree_leaves(output):
                if isinstance(x, Tensor):
                    self.sources[id(x)] = found
                    self.alive.append(x)
        return output


@contextmanager
def hooks(layers: Mapping[str, nn.Module], note: Any) -> Iterator[None]:
    """Call note(name, module, input, output) after each call of a layer inside the context."""
    handles = [
        layer.register_forward_hook(
            lambda module, args, kwargs, output, name=name: note(name, module, first_tensor(args, kwargs), output),
            with_kwargs=True,
        )
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

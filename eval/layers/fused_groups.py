"""Layers that engines want in one format, because their inputs are one tensor or their outputs are added.

Both are seen by running the model once: linear layers called with the same tensor (query, key and value; gate and up),
and convolutions whose outputs meet in an addition (residual blocks, down to the shortcut of their stage).
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
    """A partition of the layers: each group that has to share a format is a block, every other layer its own."""
    names = list(layer_names)
    layers = {name: layer for name, layer in find_layers(model).items() if name in names}
    readers: dict[int, list[str]] = {}
    inputs: list[Tensor] = []  # kept, so that no other tensor gets the identity of one that is gone
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
    """Follows each layer's output through the operations behind it, and notes which meet in an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: dict[int, frozenset[str]] = {}
        """identity of a tensor -> the layers whose outputs it carries on"""
        self.added: list[frozenset[str]] = []
        self.alive: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        operands = [x for x in tree_leaves(args) if isinstance(x, Tensor) and id(x) in self.sources]
        if operands:
            # Of a product with a small gate (squeeze and excite), the gated tensor counts.
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
    """Call note(name, module, input, output) after every call of every layer."""
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

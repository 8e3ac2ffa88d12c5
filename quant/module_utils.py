"""Helpers for modules and their calls: eval mode, the tensor a layer reads, the size of a batch, tracing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a call: (positional, keyword)."""


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the first tensor among a module's arguments, which is the one that a layer reads."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def replace_first_tensor(
    change: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments:
    """Apply a function to the first tensor among a module's arguments.

    Args:
        change: Maps the tensor to its replacement.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call. At least one of all arguments is a tensor.

    Returns:
        The arguments, with that tensor replaced.
    """
    named: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    read = next(name for name, value in named.items() if isinstance(value, Tensor))
    named[read] = change(named[read])
    return tuple(named[place] for place in range(len(args))), {name: named[name] for name in kwargs}


def examples_of(batch: Any) -> int:
    """Count the examples in a batch.

    Args:
        batch: A tensor, or nested mappings, lists and tuples of tensors.

    Returns:
        The length of the first axis of the first tensor that has one and is not empty, else 0.
    """
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 0
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((rows for part in parts if (rows := examples_of(part))), 0)


class OfOrderedInputs(nn.Module):
    """A model as a function of its inputs in a fixed order, as exporters call it.

    Args:
        model: The model.
        names: The names of its inputs in that order.
    """

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Any:
        """Return what the model returns."""
        single = isinstance(self.model, nn.Sequential)  # the name of its forward's argument is arbitrary
        return self.model(*inputs) if single else self.model(**dict(zip(self.names, inputs, strict=True)))


def is_tracing() -> bool:
    """Whether torch.export or torch.jit.trace is building a graph, which can hold only torch's own operations.

    torch.compile does not count: it returns to Python for what it cannot compile.
    """
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode; restore the mode of each of its modules on exit, frozen parts included."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

"""Training and eval mode of a model's modules, and whether what they do is being recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def recorded() -> bool:
    """Whether torch.export or torch.jit.trace records what runs: their graphs hold torch's operations, and no others.

    torch.compile, which goes back to Python where it has to, does not count.
    """
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, all modules of `model` are in eval mode; then each is in its own mode again, frozen parts too."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

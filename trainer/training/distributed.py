"""Runs in several processes (torchrun): each works on its share of every batch, and all agree on the results.

In a single process these functions are exact identities.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from torch import Tensor, nn


def own_share(indices: Sequence[int]) -> list[int]:
    """Return this process's part of the indices; all of them if there are fewer than processes."""
    state = PartialState()
    return list(indices[state.process_index :: state.num_processes]) or list(indices)


def mean_over_processes(values: Tensor, weight: float = 1.0) -> Tensor:
    """Return the mean of all processes' `values`, of any shape, weighted by each process's `weight`."""
    if PartialState().num_processes == 1:
        return values
    weights = torch.full_like(values, weight)
    return reduce(values * weights, "sum") / reduce(weights, "sum")


def of_first_process(values: Tensor | None) -> Tensor | None:
    """Return the first process's values, because GPU kernels may round differently in each process."""
    state = PartialState()
    if values is None or state.num_processes == 1:
        return values
    return broadcast(values.to(state.device)).to(values.device)


def share_buffers(model: nn.Module) -> None:
    """Copy the first process's buffers to all others, whose batch norm statistics differ after a step."""
    if PartialState().num_processes > 1:
        with torch.no_grad():
            for buffer in model.buffers():
                if buffer.numel():
                    buffer.copy_(broadcast(buffer.clone()))

"""One run in several processes (torchrun): each works on its share of every batch, and all of them know the same.

Without several processes these are identities, bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from torch import Tensor, nn


def own_share(indices: Sequence[int]) -> list[int]:
    """This process's part of the indices; all of them where there are fewer than processes."""
    state = PartialState()
    return list(indices[state.process_index :: state.num_processes]) or list(indices)


def mean_over_processes(values: Tensor, weight: float = 1.0) -> Tensor:
    """The mean of each process's `values`, any shape on its device, weighted by that process's `weight`."""
    if PartialState().num_processes == 1:
        return values
    weights = torch.full_like(values, weight)
    return reduce(values * weights, "sum") / reduce(weights, "sum")


def of_first_process(values: Tensor | None) -> Tensor | None:
    """What the first process has: kernels on GPUs may round differently in each."""
    state = PartialState()
    if values is None or state.num_processes == 1:
        return values
    return broadcast(values.to(state.device)).to(values.device)


def share_buffers(model: nn.Module) -> None:
    """Give every process the first one's buffers: each has its own batch norm statistics from the last step."""
    if PartialState().num_processes > 1:
        with torch.no_grad():
            for buffer in model.buffers():
                if buffer.numel():
                    buffer.copy_(broadcast(buffer.clone()))

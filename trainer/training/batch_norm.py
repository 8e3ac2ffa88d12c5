"""Batch norm statistics of one assignment; those of the training are a mixture over all drawn assignments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from quant.convert import run_model
from quant.module_utils import evaluating, examples_of

LEAST_TELLING = 8
"""Least examples of a batch whose own statistics are better than moving averages of other formats."""


def recalibrate_batch_norm(model: nn.Module, batches: Iterable[Any]) -> int:
    """Replace running means and variances by the plain average over `batches`.

    Only the norms are in training mode, so dropout stays off and ranges do not change. Frozen norms, which are in eval
    mode while the model is in training mode, keep their statistics.

    Returns:
        The number of recalibrated norms.
    """
    norms = [norm for norm in _batch_norms(model) if norm.training or not model.training]
    if not norms:
        return 0
    momenta = [norm.momentum for norm in norms]
    try:
        with torch.no_grad(), evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # cumulative average
                norm.train()
            for batch in batches:
                run_model(model, batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return len(norms)


@contextmanager
def statistics_of_batch(model: nn.Module, batch: Mapping[str, Any]) -> Iterator[None]:
    """Normalize by the statistics of the batch in eval mode, without updating the moving averages.

    Moving averages belong to the formats that the weights were trained in. Under them, most of the degradation of
    other formats is an artifact that a few steps, or a recalibration, would remove. Batches of fewer than
    LEAST_TELLING examples use the moving averages.
    """
    norms = _batch_norms(model) if examples_of(batch) >= LEAST_TELLING else []
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm in norms:
            norm.training, norm.track_running_stats = False, True


def ignore_recomputation(model: nn.Module) -> None:
    """Keep moving averages as they are when a backward pass computes activations again (activation checkpointing).

    PyTorch would count each batch twice: the averages of a run would depend on whether it saves memory.
    """
    for norm in _batch_norms(model):
        momentum: list[Any] = []

        def before(norm: Any, args: Any, momentum: list[Any] = momentum) -> None:
            if norm.training and torch._C._current_graph_task_id() != -1:  # within a backward pass
                momentum.append(norm.momentum)
                norm.momentum = 0.0

        def after(norm: Any, args: Any, output: Any, momentum: list[Any] = momentum) -> None:
            if momentum:
                norm.momentum = momentum.pop()
                norm.num_batches_tracked.sub_(1)

        norm.register_forward_pre_hook(before)
        norm.register_forward_hook(after, always_call=True)  # a recomputation may stop in the middle of a norm


def has_untrained_batch_norm(model: nn.Module) -> bool:
    """Return whether any norm still has its initial statistics, mean 0 and variance 1."""
    return any(not n.running_mean.any() and not (n.running_var - 1).any() for n in _batch_norms(model))


def _batch_norms(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]

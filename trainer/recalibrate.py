"""Batch norm statistics of one assignment: those of training are a mixture over everything that was drawn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from quant.convert import run_model


def recalibrate_batch_norm(model: nn.Module, batches: Iterable[Any]) -> int:
    """Replace running means and variances by the plain average over `batches`. Returns the number of norms.

    Only the norms are in training mode, so dropout stays off and ranges stay put.
    """
    norms = _batch_norms(model)
    if not norms:
        return 0
    training, momenta = model.training, [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    try:
        with torch.no_grad():
            for batch in batches:
                run_model(model, batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.train(training)
    return len(norms)


def has_untrained_batch_norm(model: nn.Module) -> bool:
    """Whether a norm still holds the statistics it was made with: mean 0 and variance 1."""
    return any(not n.running_mean.any() and not (n.running_var - 1).any() for n in _batch_norms(model))


def _batch_norms(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]

"""Distillation: the float model that training started from teaches the quantized one what it knew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quant.errors import UserError


class Distiller:
    """Mixes the loss with the divergence from a float teacher's class probabilities (Hinton et al., arXiv 1503.02531).

    A few thousand examples cannot show again what a model was trained on; its own answers to them can.
    """

    def __init__(self, teacher: nn.Module, weight: float) -> None:
        """`teacher` is never trained; `weight` in (0, 1] is the divergence's share of the loss. ValueError otherwise."""
        if not 0 < weight <= 1:
            raise ValueError(f"the weight of distillation must lie in (0, 1], got {weight}")
        self.teacher = teacher.eval().requires_grad_(False)
        self.weight = weight

    def loss(self, loss: Tensor, logits: Tensor, batch: Any) -> Tensor:
        """(1 - weight) x loss + weight x mean KL(teacher || student), from logits (..., classes) of the same batch."""
        with torch.no_grad():
            answer = self.teacher(**batch)
        known = answer["logits"] if isinstance(answer, dict) else answer.logits
        before, now = known.float().log_softmax(-1), logits.float().log_softmax(-1)
        divergence = (before.exp() * (before - now)).sum(-1).mean()
        return (1 - self.weight) * loss + self.weight * divergence


def check_teachable(logits: Tensor | None) -> None:
    """Raises UserError for a model without classes to teach."""
    if logits is None:
        raise UserError("--distill needs a model that tells classes apart, from one sequence or image each")

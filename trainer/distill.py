"""Distillation: the float model that training started from teaches the quantized one what it knew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.sensitivity import divergence

TEMPERATURE = 4.0
"""What logits are divided by: of what it was trained on, a teacher is so sure that nothing but the label is left at 1
(measured in benchmarks/RESULTS.md)."""

WEIGHT = 0.9
"""the teacher's share of the loss, where it helps (the same)"""


class Distiller:
    """Mixes the loss with the divergence from a float teacher's class probabilities (Hinton et al., arXiv 1503.02531).

    A few thousand examples cannot show again all that a model was trained on; its own answers to them tell more.
    """

    def __init__(self, teacher: nn.Module, weight: float) -> None:
        """The teacher is never trained; `weight` is the divergence's share of the loss. ValueError outside (0, 1]."""
        if not 0 < weight <= 1:
            raise ValueError(f"the weight of distillation must lie in (0, 1], got {weight}")
        self.teacher = teacher.eval().requires_grad_(False)
        self.weight = weight

    def loss(self, loss: Tensor, logits: Tensor, batch: Mapping[str, Any], counted: Tensor | int | None) -> Tensor:
        """(1 - weight) x loss + weight x T^2 x KL(teacher || student), from logits (examples, classes) / T.

        T is TEMPERATURE; its square keeps the gradients as large as the loss's (as in the paper). The divergence is a
        mean over the batch, or over `counted` examples where the loss is: batches that are accumulated then add up.
        """
        with torch.no_grad():
            answer = self.teacher(**batch)
        known = answer["logits"] if isinstance(answer, Mapping) else answer.logits
        told = divergence(known / TEMPERATURE, logits / TEMPERATURE).sum() / (
            len(logits) if counted is None else counted
        )
        return (1 - self.weight) * loss + self.weight * TEMPERATURE**2 * told

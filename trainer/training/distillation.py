"""The float model as a teacher: how far from its answers others are tells formats apart, and training can follow it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quant.convert import run_model
from quant.errors import UserError

TEMPERATURE = 4.0
"""What logits are divided by: of what it was trained on, a teacher is so sure that nothing but the label is left at 1
(measured in benchmarks/RESULTS.md)."""
SHARE = 0.9
"""the teacher's share of the training loss, where it helps (the same)"""


class Teacher:
    """A float model whose class probabilities are known to be good (Hinton et al., arXiv 1503.02531).

    A few thousand examples cannot show again all that a model was trained on; its own answers to them tell more. And of
    the loss, a few examples hold most; in the distance from its answers, every example and class has a say.
    """

    def __init__(self, model: nn.Module, share: float = 0.0) -> None:
        """The model is never trained; `share` is what its answers have of the training loss. ValueError outside [0, 1].

        0: the loss stays as it is.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"the teacher's share must lie in [0, 1], got {share}")
        self.model = model.eval().requires_grad_(False)
        self.share = share

    @torch.no_grad()
    def answers(self, batch: Mapping[str, Any]) -> Tensor | None:
        """Its logits, (examples, classes); None where it tells no classes apart."""
        return class_logits(run_model(self.model, batch), batch, checked=False)

    def loss(
        self, loss: Tensor, logits: Tensor | None, batch: Mapping[str, Any], counted: Tensor | int | None
    ) -> Tensor:
        """(1 - share) x loss + share x T^2 x KL(teacher || student), from logits (examples, classes) / T.

        T is TEMPERATURE; its square keeps the gradients as large as the loss's (as in the paper). The divergence is a
        mean over the batch, or over `counted` examples where the loss is: batches that are accumulated then add up.
        Raises UserError for a model that tells no classes apart.
        """
        known = self.answers(batch)
        if known is None or logits is None:
            raise UserError("a teacher (--distill) needs a model that tells classes apart, one answer for each example")
        told = softened_divergence(known, logits).sum() / (len(logits) if counted is None else counted)
        return (1 - self.share) * loss + self.share * told


def divergence(reference: Tensor, now: Tensor) -> Tensor:
    """Return KL(reference || now) of each example, float32 (examples,) in nats, from logits (examples, classes).

    The loss of a well-trained model depends on the few examples it gets wrong; the divergence depends on all of them.
    """
    before, after = reference.float().log_softmax(-1), now.float().log_softmax(-1)
    return (before.exp() * (before - after)).sum(-1).clamp(min=0)


def softened_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """T^2 x KL(reference || logits) >= 0 at T = TEMPERATURE of each example, (examples,), from (examples, classes)."""
    return TEMPERATURE**2 * divergence(reference / TEMPERATURE, logits / TEMPERATURE)


def class_logits(outputs: Any, batch: Mapping[str, Any], checked: bool = True) -> Tensor | None:
    """The logits (examples, classes) of a model that tells classes apart, one for each example; None for any other.

    Labels below 0 are of examples that do not count. Without `checked` those above the last class are not looked for,
    for which a GPU would have to be waited for.
    """
    labels: Any = batch.get("labels")
    if isinstance(outputs, tuple) and not hasattr(outputs, "logits"):
        logits: Any = outputs[1] if len(outputs) > 1 and isinstance(outputs[1], Tensor) else None  # (loss, logits, ...)
    elif isinstance(outputs, Tensor):
        logits = outputs
    else:
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if logits is None or not isinstance(labels, Tensor) or logits.dim() != 2 or logits.shape[1] == 1:
        return None
    whole = not labels.is_floating_point() and labels.dtype != torch.bool
    if not whole or labels.numel() != len(logits) or labels.dim() > 2:
        return None
    return None if checked and bool((labels >= logits.shape[1]).any()) else logits

"""Distillation: the float model as a reference for comparing formats, and as a teacher in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from quant.convert import run_model
from quant.errors import UserError

TEMPERATURE = 4.0
"""Softmax temperature. At T = 1 the teacher's soft targets on its own training data carry almost no information beyond
the label (measured in benchmarks/RESULTS.md)."""
SHARE = 0.9
"""The teacher's share of the training loss on images (measured in benchmarks/RESULTS.md)."""


class Teacher:
    """A trained float model whose class probabilities others follow (Hinton et al., arXiv 1503.02531).

    A few thousand examples do not cover what a model was trained on; its class probabilities contain more of it.
    Besides, a few examples dominate the loss, but all examples and classes contribute to the divergence.

    Args:
        model: the float model, which is never trained.
        share: the teacher's share of the training loss, in [0, 1]; 0 leaves the loss unchanged.

    Raises:
        ValueError: for a share outside [0, 1].
    """

    def __init__(self, model: nn.Module, share: float = 0.0) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"the teacher's share must lie in [0, 1], got {share}")
        self.model = model.eval().requires_grad_(False)
        self.share = share

    @torch.no_grad()
    def reference(self, batch: Mapping[str, Any]) -> Answers | None:
        """Return what others are compared with on a batch, see `answers_of`."""
        return answers_of(run_model(self.model, batch), batch, checked=False)

    @torch.no_grad()
    def answers(self, batch: Mapping[str, Any]) -> Tensor | None:
        """Return its logits, (examples, classes); None for a model without classes."""
        return class_logits(run_model(self.model, batch), batch, checked=False)

    def loss(
        self, loss: Tensor, logits: Tensor | None, batch: Mapping[str, Any], counted: Tensor | int | None
    ) -> Tensor:
        """Return (1 - share) x loss + share x T^2 x KL(teacher || student) at T = TEMPERATURE.

        The factor T^2 keeps the gradients as large as those of the loss (as in the paper).

        Args:
            loss: the student's mean loss, scalar.
            logits: the student's logits, (examples, classes).
            batch: the batch, for the teacher.
            counted: number of examples in all accumulated batches if the loss is a mean over them; None: a mean over
                this batch.

        Raises:
            UserError: for a model without classes.
        """
        reference = self.answers(batch)
        if reference is None or logits is None:
            raise UserError("a teacher (--distill) needs a model that tells classes apart, one answer for each example")
        distance = softened_divergence(reference, logits).sum() / (len(logits) if counted is None else counted)
        return (1 - self.share) * loss + self.share * distance


def divergence(reference: Tensor, now: Tensor) -> Tensor:
    """Return KL(reference || now) of each example, float32 (examples,) in nats, from logits (examples, classes).

    The loss of a well-trained model depends on the few examples it gets wrong; the divergence depends on all of them.
    """
    before, after = reference.float().log_softmax(-1), now.float().log_softmax(-1)
    return (before.exp() * (before - after)).sum(-1).clamp(min=0)


def softened_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """Return T^2 x KL(reference || logits) at T = TEMPERATURE, (examples,), from logits (examples, classes)."""
    return TEMPERATURE**2 * divergence(reference / TEMPERATURE, logits / TEMPERATURE)


Answers: TypeAlias = Tensor | list[Tensor]
"""Class logits (examples, classes), or the logits (tokens, vocabulary) of each example of a language model."""


def answers_of(outputs: Any, batch: Mapping[str, Any], checked: bool = True) -> Answers | None:
    """Return a model's answers to a batch as logits; None for a model without classes or tokens.

    Args:
        outputs: outputs of the model.
        batch: the batch with its labels.
        checked: see `class_logits`.
    """
    logits = class_logits(outputs, batch, checked)
    return token_logits(outputs, batch) if logits is None else logits


def difference(reference: Answers, now: Answers) -> Tensor:
    """Return how far answers are from the reference, float32 (examples,).

    Of classes this is the `softened_divergence`. Of a language model it is the mean divergence per token in nats, not
    softened: its reference on held-out text is uncertain by itself.

    Args:
        reference: the float model's answers.
        now: the quantized model's answers to the same batch.
    """
    if isinstance(reference, Tensor):
        return softened_divergence(reference, now)  # type: ignore[arg-type]
    return torch.stack([divergence(before, after).mean() for before, after in zip(reference, now, strict=True)])


def token_logits(outputs: Any, batch: Mapping[str, Any]) -> list[Tensor] | None:
    """Return the logits (tokens, vocabulary) of each example of a language model; None for other models.

    Args:
        outputs: outputs of the model with logits (examples, tokens, vocabulary).
        batch: the batch; its labels are tokens, and padding is left out according to them or to its attention mask.
    """
    labels, logits = batch.get("labels"), _logits(outputs)
    if logits is None or logits.dim() != 3 or not isinstance(labels, Tensor) or labels.shape != logits.shape[:2]:
        return None
    if labels.is_floating_point() or labels.dtype == torch.bool:
        return None
    mask = batch.get("attention_mask")
    # A causal model predicts the label after a token, so that the mask of its input says where it answers.
    counted = mask.bool() if isinstance(mask, Tensor) and mask.shape == labels.shape else labels >= 0
    return [row[own] for row, own in zip(logits, counted, strict=True)]


def _logits(outputs: Any) -> Any:
    """Return the logits among a model's outputs, or None."""
    if isinstance(outputs, tuple) and not hasattr(outputs, "logits"):
        return outputs[1] if len(outputs) > 1 and isinstance(outputs[1], Tensor) else None  # (loss, logits, ...)
    if isinstance(outputs, Tensor):
        return outputs
    return outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)


def class_logits(outputs: Any, batch: Mapping[str, Any], checked: bool = True) -> Tensor | None:
    """Return the logits (examples, classes) of a model with one class per example; None for other models.

    Args:
        outputs: outputs of the model.
        batch: the batch with its labels; negative ones do not count.
        checked: also check that no label is beyond the last class, which waits for a GPU.
    """
    labels: Any = batch.get("labels")
    logits: Any = _logits(outputs)
    if logits is None or not isinstance(labels, Tensor) or logits.dim() != 2 or logits.shape[1] == 1:
        return None
    whole = not labels.is_floating_point() and labels.dtype != torch.bool
    if not whole or labels.numel() != len(logits) or labels.dim() > 2:
        return None
    return None if checked and bool((labels >= logits.shape[1]).any()) else logits

"""A classifier that scores the candidate answers of a question against each other."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class CandidateScorer(nn.Module):
    """Scores each candidate with a model of a single output; the classes are the indices of the candidates."""

    accepts_loss_kwargs = False
    """tells the Trainer not to pass `num_items_in_batch`: further arguments of forward are token inputs"""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    @property
    def config(self) -> PretrainedConfig:
        """The configuration of the inner model, which the Trainer reads and which is saved with the weights."""
        return self.model.config

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **inputs: Tensor) -> SequenceClassifierOutput:
        """Score the candidates.

        Args:
            input_ids: (B, candidates, length).
            labels: (B,), indices of the right candidates.
            inputs: further token inputs of the inner model, (B, candidates, length) each.

        Returns:
            Logits (B, candidates) and, with labels, the mean cross-entropy.
        """
        flat = {name: tokens.flatten(0, 1) for name, tokens in {"input_ids": input_ids, **inputs}.items()}
        logits = self.model(**flat).logits.view(input_ids.shape[:2])
        return SequenceClassifierOutput(
            loss=None if labels is None else functional.cross_entropy(logits, labels), logits=logits
        )

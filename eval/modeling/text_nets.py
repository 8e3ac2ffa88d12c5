"""A text classifier that scores several candidate answers against each other."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class CandidateScorer(nn.Module):
    """One score a candidate from a model with a single output; the classes are the candidates' places."""

    accepts_loss_kwargs = False
    """for the Trainer: what forward takes by other names are tokens, not the number of items in a batch"""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    @property
    def config(self) -> PretrainedConfig:
        """The configuration of the model inside: what the Trainer looks at, and what is saved beside the weights."""
        return self.model.config

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **inputs: Tensor) -> SequenceClassifierOutput:
        """input_ids and the other token inputs (B, candidates, length), labels (B,) -> logits (B, candidates)."""
        flat = {name: tokens.flatten(0, 1) for name, tokens in {"input_ids": input_ids, **inputs}.items()}
        logits = self.model(**flat).logits.view(input_ids.shape[:2])
        return SequenceClassifierOutput(
            loss=None if labels is None else functional.cross_entropy(logits, labels), logits=logits
        )

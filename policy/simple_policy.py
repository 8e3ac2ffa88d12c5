"""SimplePolicy: one categorical distribution per decision, independent of formats and models."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SimplePolicy(nn.Module):
    """Independent choices: decision d takes choice k with probability softmax(logits[d])[k].

    Log-probabilities come from log_softmax and are never clamped: a clamp would remove the gradient of improbable
    choices.

    Args:
        num_decisions: number of decisions.
        num_choices: choices per decision.
        prior: starting logits, (num_decisions, num_choices); None: uniform.

    Raises:
        ValueError: for a prior of another shape or with values that are not finite.
    """

    def __init__(self, num_decisions: int, num_choices: int, prior: Tensor | None = None) -> None:
        super().__init__()
        logits = torch.zeros(num_decisions, num_choices, dtype=torch.float64)
        if prior is not None:
            if prior.shape != logits.shape or not prior.isfinite().all():
                raise ValueError(f"prior must hold {tuple(logits.shape)} finite logits, got {tuple(prior.shape)}")
            logits.copy_(prior)
        self.logits = nn.Parameter(logits)

    def log_probabilities(self) -> Tensor:
        """Return the log-probabilities, (num_decisions, num_choices)."""
        return self.logits.log_softmax(-1)

    def probabilities(self) -> Tensor:
        """Return the probabilities, (num_decisions, num_choices)."""
        return self.logits.softmax(-1)

    @torch.no_grad()
    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Sample one choice per decision, int64 (num_decisions,)."""
        return torch.multinomial(self.probabilities(), 1, generator=generator).squeeze(-1)

    @torch.no_grad()
    def mode(self) -> Tensor:
        """Return the most probable choice per decision, the first one on ties: int64 (num_decisions,)."""
        return self.logits.argmax(-1)

    def log_prob(self, choice: Tensor) -> Tensor:
        """Return the log-probability of choices, summed over decisions: int64 (..., num_decisions) -> (...)."""
        table = self.log_probabilities().expand(*choice.shape, -1)
        return table.gather(-1, choice.unsqueeze(-1)).squeeze(-1).sum(-1)

    def entropy(self) -> Tensor:
        """Return the entropy in nats, summed over decisions: scalar."""
        return -(self.probabilities() * self.log_probabilities()).sum()

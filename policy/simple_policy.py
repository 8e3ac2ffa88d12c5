"""One categorical distribution per decision; it knows neither formats nor models."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SimplePolicy(nn.Module):
    """Independent choices: decision d takes choice k with probability softmax(logits[d])[k].

    Log-probabilities come from log_softmax and are never clamped: a clamp would cut the gradient of exactly the
    choices that the policy has turned away from.
    """

    def __init__(self, num_decisions: int, num_choices: int, prior: Tensor | None = None) -> None:
        """Starts at the logits `prior` (num_decisions, num_choices), or uniform. Raises ValueError for a bad prior."""
        super().__init__()
        logits = torch.zeros(num_decisions, num_choices, dtype=torch.float64)
        if prior is not None:
            if prior.shape != logits.shape or not prior.isfinite().all():
                raise ValueError(f"prior must hold {tuple(logits.shape)} finite logits, got {tuple(prior.shape)}")
            logits.copy_(prior)
        self.logits = nn.Parameter(logits)

    def log_probabilities(self) -> Tensor:
        """(num_decisions, num_choices)"""
        return self.logits.log_softmax(-1)

    def probabilities(self) -> Tensor:
        """(num_decisions, num_choices)"""
        return self.logits.softmax(-1)

    @torch.no_grad()
    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One choice per decision, drawn: int64 (num_decisions,)."""
        return torch.multinomial(self.probabilities(), 1, generator=generator).squeeze(-1)

    @torch.no_grad()
    def mode(self) -> Tensor:
        """The most probable choice per decision, the first of equals: int64 (num_decisions,)."""
        return self.logits.argmax(-1)

    def log_prob(self, choice: Tensor) -> Tensor:
        """Log-probability of a whole choice, summed over decisions: (..., num_decisions) -> (...)."""
        table = self.log_probabilities().expand(*choice.shape, -1)
        return table.gather(-1, choice.unsqueeze(-1)).squeeze(-1).sum(-1)

    def entropy(self) -> Tensor:
        """Entropy in nats, summed over decisions: scalar."""
        return -(self.probabilities() * self.log_probabilities()).sum()

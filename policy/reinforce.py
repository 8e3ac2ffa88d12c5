"""REINFORCE on a policy: the loss, its baselines, and the schedules of the entropy term."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from policy.simple_policy import SimplePolicy
from quant.errors import UserError

EntropySchedule: TypeAlias = Literal["linear", "cosine", "constant", "heaviside"]
Baseline: TypeAlias = Literal["leave_one_out", "ema"]


def entropy_weight(schedule: EntropySchedule, step: int, total_steps: int, max_beta: float) -> float:
    """Return beta_H, the weight of the entropy term in the loss.

    It rises from 0 to `max_beta`, because the entropy is a penalty: the policy first explores freely and later has to
    commit, so that the shared weights end up trained under the formats that stay. Source: FLIQS, arXiv 2308.03290, and
    its published code.

    Args:
        schedule: 'linear' and 'cosine' rise over all steps, 'heaviside' jumps halfway, 'constant' is `max_beta`.
        step: policy step in [0, total_steps); steps of the delay do not count.
        total_steps: number of policy steps.
        max_beta: largest weight.

    Raises:
        UserError: for an unknown schedule.
        ValueError: for a step outside the range.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step must be in [0, {total_steps}), got {step}")
    progress = step / total_steps
    match schedule:
        case "linear":
            return max_beta * progress
        case "cosine":
            return max_beta * (1 - math.cos(math.pi * progress)) / 2
        case "constant":
            return max_beta
        case "heaviside":
            return max_beta if progress >= 0.5 else 0.0
    raise UserError(f"--entropy_schedule_type {schedule!r}: choose from {', '.join(get_args(EntropySchedule))}")


class Reinforce:
    """Adam on loss = -mean(advantage x log-probability) + beta_H x entropy, both summed over decisions.

    Args:
        policy: policy to train.
        learning_rate: Adam's learning rate.
        schedule: schedule of beta_H, see `entropy_weight`.
        max_entropy_beta: largest beta_H.
        total_steps: number of policy steps.
        baseline: 'leave_one_out' compares each draw with the mean of the step's other draws and needs at least two;
            'ema' compares with the moving average of earlier steps, so that one draw per step is enough.
        ema_decay: decay of the moving average.

    Raises:
        UserError: for an unknown schedule.
        ValueError: for a negative beta, a decay outside [0, 1), no steps or an unknown baseline.
    """

    def __init__(
        self,
        policy: SimplePolicy,
        learning_rate: float,
        schedule: EntropySchedule,
        max_entropy_beta: float,
        total_steps: int,
        baseline: Baseline = "leave_one_out",
        ema_decay: float = 0.9,
    ) -> None:
        entropy_weight(schedule, 0, total_steps, max_entropy_beta)  # raises now instead of at the first step
        if not 0 <= max_entropy_beta < math.inf:
            raise ValueError(f"max_entropy_beta must not be negative, got {max_entropy_beta}")
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}")
        if baseline not in get_args(Baseline):
            raise ValueError(f"baseline must be one of {', '.join(get_args(Baseline))}, got {baseline!r}")
        self.policy = policy
        self.optimizer = torch.optim.Adam([policy.logits], lr=learning_rate)
        self.schedule: EntropySchedule = schedule
        self.max_entropy_beta = max_entropy_beta
        self.total_steps = total_steps
        self.baseline: Baseline = baseline
        self.ema_decay = ema_decay
        self.ema_reward: float | None = None

    def step(self, choices: Tensor, rewards: Tensor, step: int, penalty: Tensor | None = None) -> dict[str, float]:
        """Update the policy once.

        Args:
            choices: drawn choices, int64 (draws, decisions).
            rewards: reward of each draw, (draws,).
            step: policy step, for the schedule of beta_H.
            penalty: scalar that depends on the policy, such as its expected cost; it is added to the loss and
                differentiated instead of sampled.

        Returns:
            Values before the update: 'advantage' (mean magnitude), 'entropy', 'entropy_weight' and 'policy_loss'.

        Raises:
            ValueError: for rewards that are not finite, do not fit the choices or are too few for the baseline.
        """
        if choices.shape[:-1] != rewards.shape:
            raise ValueError(f"{tuple(rewards.shape)} rewards do not fit {tuple(choices.shape)} choices")
        weight = entropy_weight(self.schedule, step, self.total_steps, self.max_entropy_beta)
        advantages = self.advantages(rewards)
        entropy = self.policy.entropy()
        loss = weight * entropy - (advantages * self.policy.log_prob(choices)).mean()
        if penalty is not None:
            loss = loss + penalty
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {
            "advantage": advantages.abs().mean().item(),
            "entropy": entropy.item(),
            "entropy_weight": weight,
            "policy_loss": loss.item(),
        }

    def advantages(self, rewards: Tensor) -> Tensor:
        """Subtract from each reward, (draws,), a baseline that it is not part of; then update the moving average."""
        rewards = torch.as_tensor(rewards).detach().to(self.policy.logits)
        if rewards.dim() != 1 or not len(rewards) or not rewards.isfinite().all():
            raise ValueError(f"rewards must be one finite number per draw, got {rewards.tolist()}")
        if self.baseline == "leave_one_out":
            if len(rewards) < 2:
                raise ValueError("the leave_one_out baseline needs at least 2 draws a step; use ema with one")
            return rewards - (rewards.sum() - rewards) / (len(rewards) - 1)
        mean = rewards.mean().item()
        before = mean if self.ema_reward is None else self.ema_reward
        self.ema_reward = self.ema_decay * before + (1 - self.ema_decay) * mean
        return rewards - before

    def state_dict(self) -> dict[str, Tensor]:
        """Return logits, Adam's moments and the moving average as a flat dict of tensors, for safetensors."""
        state = {"logits": self.policy.logits.detach().clone()}
        state |= {f"adam.{key}": value.clone() for key, value in self.optimizer.state[self.policy.logits].items()}
        if self.ema_reward is not None:
            state["ema_reward"] = torch.tensor(self.ema_reward, dtype=torch.float64)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue exactly from a `state_dict`."""
        with torch.no_grad():
            self.policy.logits.copy_(state["logits"])
        self.optimizer.state[self.policy.logits] = {
            key.removeprefix("adam."): value.clone() for key, value in state.items() if key.startswith("adam.")
        }
        self.ema_reward = state["ema_reward"].item() if "ema_reward" in state else None

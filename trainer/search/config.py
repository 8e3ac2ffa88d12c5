"""ReinforceConfig: the settings of a search, and the budget that they name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from cost.profile import LayerProfile
from cost.units import UNITS, CostType
from policy.allocators import Allocator
from policy.budget import Budget, Limit
from policy.joint_space import JointSpace
from policy.reinforce import EntropySchedule
from policy.space import SearchSpace, uniform_cost
from quant.engines.table import ENGINES
from quant.errors import UserError
from quant.validation import check_choices

_ANY, _TINY = float("inf"), 1e-12
RANGES: dict[str, tuple[float, float, bool]] = {
    **dict.fromkeys(("cost_target", "target_bits", "rl_learning_rate"), (0.0, _ANY, True)),
    **dict.fromkeys(("cost_beta", "max_entropy_beta", "delay_steps"), (0.0, _ANY, False)),
    **dict.fromkeys(("reward_draws", "calibration_batches", "sensitivity_examples"), (1.0, _ANY, False)),
    **dict.fromkeys(("reward_share", "measure_share"), (_TINY, 1.0, False)),
    "max_drop": (0.0, 1.0, True),
    "settle_fraction": (0.0, 1.0, False),
}
"""Setting -> (least, most, whether both ends are excluded)."""
POLICY_SETTINGS = (
    *("cost_function", "cost_beta", "cost_gradient", "reward_draws", "reward_share", "rl_learning_rate"),
    *("max_entropy_beta", "entropy_schedule_type", "delay_steps", "settle_fraction", "policy_prior"),
)
"""Settings without effect under a competing method, which decides once and learns nothing."""


@dataclass(frozen=True)
class ReinforceConfig:
    """Settings of a search, named as the command line's flags.

    Defaults are the flags' too, except for `cost_type`: Python calls count compute, the command line counts memory.
    """

    method: Literal["search"] | Allocator = "search"
    """'search' learns a policy; every other method decides once, before the first step."""
    cost_type: CostType = "compute"
    cost_target: float | None = None
    """Budget in MiB (memory) or GBOPs (compute). Exactly one of cost_target, target_bits and max_drop is needed."""
    target_bits: float | tuple[float, ...] | None = None
    """Budget as the cost of all searched layers at that many bits. Several: one policy each, shared weights."""
    max_drop: float | None = None
    """Instead of a budget: the cheapest assignment that loses at most this much held-out quality against float."""
    cost_function: Literal["tunas_abs", "one_sided_tunas_abs", "soft_exponential", "hard_exponential"] = "tunas_abs"
    cost_beta: float = 1.0
    """Weight of the cost in the reward."""
    cost_gradient: Literal["expected", "sampled"] = "expected"
    """Gradient of the cost term: exact, from the policy's expected cost, or sampled from the draws."""
    reward_quality: Literal["likelihood", "accuracy"] = "likelihood"
    reward_draws: int = 2
    """Assignments drawn and rewarded per step, on the same held-out batch; a single one uses the 'ema' baseline."""
    reward_share: float = 0.25
    """Held-out examples per reward, as a share of the training batch."""
    rl_learning_rate: float = 0.01
    max_entropy_beta: float = 0.0
    entropy_schedule_type: EntropySchedule = "cosine"
    delay_steps: int | None = None
    """Steps before the policy learns; None: half of the steps before fine-tuning, or a quarter of all without it."""
    settle_fraction: float | None = None
    """Share of the steps, at the end, that fine-tune the chosen assignment; None: 3/4, of an architecture 15/16."""
    policy_prior: Literal["measured", "none", "fisher", "hawq_v2"] = "measured"
    """Sensitivities that the starting policy follows; 'none' starts uniform."""
    contest: bool = True
    """Choose the best of policy, prior and their neighbours on held-out data; False: the policy's most probable one."""
    engine: str | None = None
    """Engine of the result, a key of `quant.engines.table.ENGINES`: layers choose what it stores, at its cost."""
    calibration_batches: int = 8
    """Training batches for calibrating ranges and batch norms."""
    sensitivity_examples: int | None = None
    """Held-out examples per evaluated assignment; None: see `examples_to_evaluate`."""
    measure_share: float = 0.12
    """Largest share of the training's time for measuring single formats; fewer examples are measured to keep it."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.engine is not None and self.engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {self.engine!r}")
        if isinstance(self.target_bits, list):
            object.__setattr__(self, "target_bits", tuple(self.target_bits))
        aims = {name: getattr(self, name) for name in ("cost_target", "target_bits", "max_drop")}
        if sum(value is not None for value in aims.values()) != 1:
            given = ", ".join(f"{name}={value}" for name, value in aims.items())
            raise ValueError(f"set one of cost_target, target_bits and max_drop, got {given}")
        for name, (least, most, open_) in RANGES.items():
            for value in _values(getattr(self, name)):
                if not (least < value < most if open_ else least <= value <= most):  # also true for nan
                    ends = "()" if open_ else "[]"
                    raise ValueError(f"{name} must lie in {ends[0]}{least:g}, {most:g}{ends[1]}, got {value}")
        if self.method != "search":
            idle = [f.name for f in fields(self) if f.name in POLICY_SETTINGS and getattr(self, f.name) != f.default]
            if idle:
                raise ValueError(f"{idle[0]} has no effect under method {self.method!r}: it is for a search")
        if self.max_drop is not None and (self.method != "search" or self.policy_prior == "none" or not self.contest):
            raise ValueError("max_drop needs a search with a prior and a contest: both bisect over budgets")
        if self.settle_fraction == 1:
            raise ValueError("settle_fraction must lie in [0, 1), got 1: the policy would have no step to learn in")

    @property
    def bits_list(self) -> tuple[float | None, ...]:
        """One entry per target: its bits, or None where the budget is not given in bits."""
        return self.target_bits if isinstance(self.target_bits, tuple) else (self.target_bits,)

    @classmethod
    def fliqs(cls, **changes: Any) -> ReinforceConfig:
        """Return the published recipe: uniform start, one draw, moving-average baseline, no fine-tune phase.

        Source: FLIQS, arXiv 2308.03290. `changes` override its settings.
        """
        return cls(
            **{
                "policy_prior": "none",
                "reward_draws": 1,
                "reward_share": 1.0,
                "settle_fraction": 0.0,
                "contest": False,
                "cost_gradient": "sampled",
                "rl_learning_rate": 0.05,
                "max_entropy_beta": 0.01,
                **changes,
            }
        )


def _values(value: Any) -> Sequence[float]:
    return () if value is None else value if isinstance(value, tuple) else (value,)


def resolve_target(
    space: SearchSpace,
    profiles: Sequence[LayerProfile],
    cost_type: CostType,
    target: float | None,
    bits: float | None,
    flag: str = "--cost_target",
) -> float:
    """Return the budget in MiB or GBOPs.

    Args:
        space: search space that has to contain an assignment within the budget.
        profiles: profiles of the searched layers.
        cost_type: 'memory' (MiB) or 'compute' (GBOPs).
        target: the budget itself; None: it is given by `bits`.
        bits: bits of every searched layer that the budget allows.
        flag: name of `target` in errors.

    Raises:
        UserError: if no assignment meets the budget; the message states the feasible range.
    """
    choices = (pair for decision in space.decisions for pair in decision.choices)
    weight_only = all(activation.name == "float" for _, activation in choices)
    resolved = uniform_cost(profiles, bits, cost_type, weight_only) if target is None else target  # type: ignore[arg-type]
    low, high = space.cost_range(profiles, cost_type)
    slack = 1e-9 * high
    if not low - slack <= resolved <= high + slack:
        asked = f"--target_bits {bits:g} is {resolved:.6g}" if target is None else f"{flag} {target:g}"
        raise UserError(
            f"{asked} {UNITS[cost_type]}, but assignments of this search space cost {low:.6g} to {high:.6g} "
            f"{UNITS[cost_type]}"
        )
    return resolved


def make_budget(
    config: ReinforceConfig,
    space: SearchSpace,
    profiles: Sequence[LayerProfile],
    bits: float | None,
    limits: Sequence[Limit],
) -> Budget:
    """Return the budget for one of the target bits of a configuration, with hard limits on other costs.

    Under `max_drop` the budget admits every assignment; a bisection over held-out quality lowers it later.
    """
    if config.max_drop is not None:
        bits = max(weight.bits for weight, _ in space.decisions[0].choices)
    largest = config.max_drop is not None and config.engine is not None  # whose layers have choices of their own
    target = space.cost_range(profiles, config.cost_type)[1] if largest else config.cost_target
    target = resolve_target(space, profiles, config.cost_type, target, bits)
    return budget_of(space, profiles, config.cost_type, target, limits)


def budget_of(
    space: SearchSpace, profiles: Sequence[LayerProfile], cost_type: CostType, target: float, limits: Sequence[Limit]
) -> Budget:
    """Return the budget of a target and hard limits, for a space of formats or of architectures, too."""
    if isinstance(space, JointSpace):
        return space.budget(profiles, cost_type, target, limits)
    return Budget.of(space, space.cost_table(profiles, cost_type), target, limits)

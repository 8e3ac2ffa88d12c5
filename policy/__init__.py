"""Search spaces, the policy and its learning rule, exact solvers and allocators under a budget."""

from typing import TYPE_CHECKING

from quant.lazy import names_of

if TYPE_CHECKING:
    from policy.budget import Budget
    from policy.reinforce import Reinforce
    from policy.simple_policy import SimplePolicy
    from policy.solve import InfeasibleError, solve_assignment
    from policy.space import SearchSpace, build_space

__all__ = [
    "Budget",
    "InfeasibleError",
    "Reinforce",
    "SearchSpace",
    "SimplePolicy",
    "build_space",
    "solve_assignment",
]

__getattr__ = names_of(
    __name__,
    {
        "policy.simple_policy": ["SimplePolicy"],
        "policy.reinforce": ["Reinforce"],
        "policy.space": ["SearchSpace", "build_space"],
        "policy.budget": ["Budget"],
        "policy.solve": ["InfeasibleError", "solve_assignment"],
    },
)

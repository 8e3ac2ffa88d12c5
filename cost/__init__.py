"""The cost of a model under an assignment of formats: layer profiles, memory and compute."""

from typing import TYPE_CHECKING

from quant.lazy import names_of

if TYPE_CHECKING:
    from cost.cost import compute_cost, memory_cost
    from cost.file_scope import charge_file
    from cost.profile import LayerProfile, profile_model

__all__ = [
    "LayerProfile",
    "charge_file",
    "compute_cost",
    "memory_cost",
    "profile_model",
]

__getattr__ = names_of(
    __name__,
    {
        "cost.cost": ["compute_cost", "memory_cost"],
        "cost.file_scope": ["charge_file"],
        "cost.profile": ["LayerProfile", "profile_model"],
    },
)

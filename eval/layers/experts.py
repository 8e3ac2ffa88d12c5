"""Groups the experts of each mixture: all matrices between a router and the sum of what its experts return.

Experts are either stacked in tensors (`quant.quant_experts.ExpertLinear`), or a list of small networks of one structure
whose router has an output for each of them. Names of modules and classes differ between libraries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from quant.quant_experts import ExpertLinear
from quant.transforms.graph import is_norm


def expert_groups(model: nn.Module, layer_names: Iterable[str]) -> list[list[str]]:
    """Return the layers of the experts of each mixture, a list for each; routers and shared experts are in none.

    Args:
        model: The model, unfolded.
        layer_names: The layers to group.
    """
    names = list(layer_names)
    modules = dict(model.named_modules())
    stacked = {name.rpartition(".")[0] for name in names if isinstance(modules[name], ExpertLinear)}
    holders = [name for name, module in modules.items() if name in stacked or _holds_experts(name, module, modules)]
    groups = ([name for name in names if name.startswith(f"{holder}.")] for holder in holders)
    return [group for group in groups if group]


def _holds_experts(name: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a module is a list of experts: alike, and as many as a matrix beside it has outputs."""
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        return False
    elements = [*module.children()]
    if len(elements) < 2 or len({_structure(element) for element in elements}) > 1 or not _structure(elements[0]):
        return False
    if any(is_norm(part) for part in elements[0].modules()):
        return False  # blocks of a transformer, which follow each other
    around = modules[name.rpartition(".")[0]]
    beside = [part for child in around.children() if child is not module for part in child.modules()]
    routers = [part for part in (around, *beside) if not isinstance(part, nn.Embedding)]
    weights = [weight for part in routers for weight in part._parameters.values() if weight is not None]
    return any(weight.dim() == 2 and weight.shape[0] == len(elements) for weight in weights)


def _structure(module: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return the names and shapes of a module's parameters, which are alike in all experts of a mixture."""
    return tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())

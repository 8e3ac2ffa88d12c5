"""Block partitions: which layers share one decision, derived from where layers stand, not from what they are called.

Models repeat themselves: stacks hold units (transformer blocks, residual blocks, whole stages), each with several
layers. A layer's path through such stacks tells two things: its role (the path without the places in the stacks) and
its depth (the place in the outermost stack).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from eval.layers.roles import ancestors
from quant.convert import find_layers
from quant.errors import UserError

Blocks = dict[str, list[str]]
"""block name -> its layers"""
CONTAINERS = (nn.ModuleList, nn.Sequential)


def block_partition(model: nn.Module, layer_names: Iterable[str], mode: str) -> Blocks:
    """Every layer in exactly one block, blocks in the order of their first layer.

    Args:
        layer_names: what is to be divided, names of layers of `model`.
        mode: "role" ties the layers that do the same in every unit of one kind: query, key, ...; "depth" ties all
            layers of one transformer block or residual stage. Layers outside any stack are their own block.
    """
    if mode not in ("role", "depth"):
        raise UserError(f"--block_search {mode}: choose one of role, depth")
    stack_of = repeated_units(model)
    many = {stack for stack, units in Counter(stack_of.values()).items() if units > 1}
    roles = {name: role_of(model, name, [unit for unit in ancestors(name) if unit in stack_of]) for name in layer_names}
    kinds = Counter(role for role, _ in set(roles.values()))
    blocks: Blocks = {}
    for name, (role, kind) in roles.items():
        units = [unit for unit in ancestors(name) if unit in stack_of]
        if not units:
            block = name
        elif mode == "role":
            block = role if kinds[role] == 1 else f"{role}:{kind}"
        else:
            block = next((unit for unit in units if stack_of[unit] in many), units[0])
        blocks.setdefault(block, []).append(name)
    return blocks


def repeated_units(model: nn.Module) -> dict[str, str]:
    """Name of each unit -> name of the stack it stands in.

    A unit has two layers or more; what has one, such as a convolution within a residual block, has a role of its own.
    A stack is a ModuleList or Sequential, or a module with three units of one kind: layer1, layer2, layer3 of a ResNet.
    """
    sizes = Counter(holder for name in find_layers(model) for holder in ancestors(name))
    stack_of = {}
    for stack, module in model.named_modules():
        units = {f"{stack}.{child}" if stack else child: unit for child, unit in module.named_children()}
        units = {name: unit for name, unit in units.items() if sizes[name] > 1}
        kinds = Counter(kind_of(unit, name, sizes) for name, unit in units.items())
        kinds.pop("", None)
        if isinstance(module, CONTAINERS) or max(kinds.values(), default=0) > 2:
            stack_of.update(dict.fromkeys(units, stack))
    return stack_of


def kind_of(unit: nn.Module, name: str, sizes: Mapping[str, int]) -> str:
    """A unit's class; of a container, the classes of the units in it, "" if there are none."""
    if not isinstance(unit, CONTAINERS):
        return type(unit).__name__
    return " ".join(sorted({type(part).__name__ for key, part in unit.named_children() if sizes[f"{name}.{key}"] > 1}))


def role_of(model: nn.Module, name: str, units: list[str]) -> tuple[str, str]:
    """(`name` with * for its units' places in their stacks, what else keeps layers apart that share it).

    Units of different classes play different roles, and so do depthwise and dense convolutions.
    """
    places = {len(unit.split(".")) - 1 for unit in units}
    role = ".".join("*" if place in places else part for place, part in enumerate(name.split(".")))
    layer = model.get_submodule(name)
    depthwise = isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels
    return role, type(model.get_submodule(units[-1])).__name__ + ("-depthwise" if depthwise else "") if units else ""


def check_partition(blocks: Mapping[str, list[str]], layer_names: Iterable[str]) -> None:
    """UserError unless every layer is in exactly one block and no block is empty."""
    placed = [name for members in blocks.values() for name in members]
    wanted = set(layer_names)
    for problem, names in (
        ("twice in the partition", {name for name in placed if placed.count(name) > 1}),
        ("in no block", wanted - set(placed)),
        ("not a layer to search", set(placed) - wanted),
        ("an empty block", {block for block, members in blocks.items() if not members}),
    ):
        if names:
            raise UserError(f"--block_search: {min(names)} is {problem}")

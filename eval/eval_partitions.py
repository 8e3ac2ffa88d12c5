"""Partitions layers into blocks that share one decision, by the structure of the model rather than by names.

A model consists of stacks of units (transformer blocks, residual blocks, whole stages) with several layers each. The
path of a layer through the stacks yields its role (the path without the indices in the stacks) and its depth (the index
in the outermost stack).
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
    """Partition layers into blocks, in the order of their first layers.

    Args:
        model: the float model.
        layer_names: the layers to partition.
        mode: "role" joins the layers with the same role in all units of one kind, such as all query projections;
            "depth" joins the layers of one transformer block or residual stage. A layer outside of any stack is a
            block of its own.

    Raises:
        UserError: for any other mode.
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
    """Map the name of each unit to the name of its stack.

    A unit has at least two layers. A stack is a ModuleList or Sequential, or a module with at least three units of one
    kind, such as layer1, layer2 and layer3 of a ResNet.
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
    """Return the class name of a unit; of a container, those of the units in it, "" if there are none."""
    if not isinstance(unit, CONTAINERS):
        return type(unit).__name__
    return " ".join(sorted({type(part).__name__ for key, part in unit.named_children() if sizes[f"{name}.{key}"] > 1}))


def role_of(model: nn.Module, name: str, units: list[str]) -> tuple[str, str]:
    """Find the role of a layer.

    Args:
        model: the model.
        name: the layer.
        units: names of the units around it, from the outermost.

    Returns:
        The name with * for the units' indices in their stacks; and a suffix (the class of the innermost unit, and
        whether the layer is a depthwise convolution) that distinguishes layers with the same name.
    """
    places = {len(unit.split(".")) - 1 for unit in units}
    role = ".".join("*" if place in places else part for place, part in enumerate(name.split(".")))
    layer = model.get_submodule(name)
    depthwise = isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels
    return role, type(model.get_submodule(units[-1])).__name__ + ("-depthwise" if depthwise else "") if units else ""


def check_partition(blocks: Mapping[str, list[str]], layer_names: Iterable[str]) -> None:
    """Raise UserError unless every layer is in exactly one block and no block is empty."""
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

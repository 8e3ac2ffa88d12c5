"""Finds the roles of layers from module types and positions, since names differ between libraries and versions."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from quant.convert import find_layers

ROLES = ("self_attention", "self_output", "intermediate", "output", "pooler", "classifier")


def ancestors(name: str) -> list[str]:
    """Return the names of the modules around `name`, from the model ("") to its parent: a.b.c -> "", a, a.b."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts))]


def layer_roles(model: nn.Module) -> dict[str, str | None]:
    """Find the role of each layer.

    The last layer of an attention module is its output projection ("self_output"); the others compute queries, keys and
    values ("self_attention"). Of the remaining layers of a transformer block, the last one is "output", the others are
    "intermediate". The head ("classifier") consists of the layers outside of the base model of transformers, or is the
    last layer of any other network.

    Returns:
        Layer name -> one of ROLES, or None for a layer outside of transformer blocks that is neither pooler nor head.
    """
    modules = dict(model.named_modules())
    layers = list(find_layers(model))
    heads = head_layers(model, layers)
    attentions = [name for name, module in modules.items() if "Attention" in type(module).__name__]
    blocks = {block_around(modules, attention) for attention in attentions}
    parts: dict[tuple[str, str], list[str]] = {}
    roles: dict[str, str | None] = {}
    for name in layers:
        attention = outermost(modules, name, "Attention")
        block = next((holder for holder in reversed(ancestors(name)) if holder in blocks), None)
        if name in heads:
            roles[name] = "classifier"
        elif outermost(modules, name, "Pool"):
            roles[name] = "pooler"
        elif attention:
            parts.setdefault(("self_attention", attention), []).append(name)
        elif block is not None:
            parts.setdefault(("intermediate", block), []).append(name)
        else:
            roles[name] = None
    last_role = {"self_attention": "self_output", "intermediate": "output"}
    for (role, _), members in parts.items():
        roles.update(dict.fromkeys(members[:-1], role))
        roles[members[-1]] = last_role[role]
    return {name: roles[name] for name in layers}


def outermost(modules: dict[str, nn.Module], name: str, word: str) -> str | None:
    """Return the outermost module around layer `name` whose class name contains `word`, None if there is none."""
    return next((holder for holder in ancestors(name) if word in type(modules[holder]).__name__), None)


def block_around(modules: dict[str, nn.Module], attention: str) -> str:
    """Return the transformer block of an attention module: the innermost ModuleList element that holds it."""
    path = [*ancestors(attention), attention]
    for holder, element in reversed(list(pairwise(path))):
        if isinstance(modules[holder], nn.ModuleList | nn.Sequential):
            return element
    return ancestors(attention)[-1]


def head_layers(model: nn.Module, layers: list[str]) -> set[str]:
    """Return the layers of the classification or language modelling head."""
    for prefix, module in model.named_modules():
        # Recognise PreTrainedModel of transformers by its attributes: importing it takes two seconds.
        if (base_model := getattr(module, "base_model", None)) is not None:
            if base_model is module:
                break
            start = f"{prefix}." if prefix else ""
            base = f"{start}{module.base_model_prefix}."
            return {name for name in layers if name.startswith(start) and not name.startswith(base)}
    return set(layers[-1:])

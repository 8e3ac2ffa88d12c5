"""Blocks that can be left out: those that add something to their input, so that the input itself can replace them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from quant.module_utils import evaluating, first_tensor
from quant.transforms.graph import is_norm, outputs


class Skip(nn.Module):
    """What is left of a block that was left out: returns its first argument.

    Args:
        in_tuple: Whether the block returned a tuple, whose first entry was the tensor.
    """

    def __init__(self, in_tuple: bool = False) -> None:
        super().__init__()
        self.in_tuple = in_tuple

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return x, of any shape."""
        return (x,) if self.in_tuple else x


class Skippable(nn.Module):
    """A block that may be skipped; the class of an elastic block also inherits from its own."""

    skipped = False
    in_tuple = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the block's output, or its input if it is skipped."""
        if not self.skipped:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        read = first_tensor(args, kwargs)
        return (read,) if self.in_tuple else read


@cache
def _skippable(block: type[nn.Module]) -> type[nn.Module]:
    return type(f"Skippable{block.__name__}", (Skippable, block), {"own": block})


def make_skippable(block: nn.Module, in_tuple: bool) -> None:
    """Change the class of a block, in place, so that `skipped` can be set."""
    block.__class__ = _skippable(type(block))  # type: ignore[arg-type]
    block.in_tuple = in_tuple  # type: ignore[assignment]


def freeze_block(block: nn.Module) -> nn.Module:
    """Return what replaces an elastic block for good: the block in its own class, or a `Skip`."""
    if block.skipped:
        return Skip(bool(block.in_tuple))
    for name in ("skipped", "in_tuple"):
        block.__dict__.pop(name, None)
    block.__class__ = type(block).own  # type: ignore[attr-defined]
    return block


@dataclass(frozen=True)
class Stage:
    """Consecutive blocks of which the last ones can be left out."""

    name: str
    blocks: tuple[str, ...]
    """All blocks of the stage, in order; the first one may be needed."""
    least: int
    """Number of blocks, from the first on, that are needed."""
    in_tuple: bool


@torch.no_grad()
def find_stages(model: nn.Module, example: Any) -> list[Stage]:
    """Find the stages of a model: consecutive children of a Sequential or ModuleList, all residual but the first.

    Args:
        model: The float model.
        example: A batch.

    Returns:
        The stages with at least one block that can be left out, innermost ones only.
    """
    parents = {
        name: parent for name, parent in model.named_modules() if isinstance(parent, nn.Sequential | nn.ModuleList)
    }
    names = {
        f"{name}.{child}".lstrip("."): block
        for name, parent in parents.items()
        for child, block in parent._modules.items()
    }
    found = _residual(model, names, example)
    inner = {name for name in found if not any(other.startswith(f"{name}.") for other in found)}
    stages: list[Stage] = []
    for name, parent in parents.items():
        children = [f"{name}.{child}".lstrip(".") for child in parent._modules]
        stages += _stages_of(children, names, {child: found[child] for child in children if child in inner})
    return stages


def _stages_of(children: list[str], modules: dict[str, nn.Module], residual: dict[str, bool]) -> list[Stage]:
    """Split the children of one container into stages."""
    stages, run = [], list[str]()
    for child in [*children, None]:
        if child in residual and child is not None:
            run.append(child)
            continue
        if run:
            before = children.index(run[0]) - 1
            alike = before >= 0 and type(modules[children[before]]) is type(modules[run[0]])
            blocks = ([children[before]] if alike else []) + run
            stages.append(Stage(blocks[0], tuple(blocks), int(alike), residual[run[0]]))
        run = []
    return stages


def _residual(model: nn.Module, blocks: dict[str, nn.Module], example: Any) -> dict[str, bool]:
    """Return block name -> whether it returns a tuple, for blocks that add something to their input."""
    found: dict[str, bool] = {}
    calls = dict.fromkeys(blocks, 0)

    def watch(name: str) -> Callable[..., None]:
        def hook(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls[name] += 1
            first = output[0] if isinstance(output, tuple) and output else output
            read = first_tensor(args, kwargs)
            same = isinstance(first, Tensor) and read is not None and first.shape == read.shape
            if same and any(True for _ in block.parameters()) and _passes(block, args, kwargs):
                found[name] = isinstance(output, tuple)

        return hook

    hooks = [block.register_forward_hook(watch(name), with_kwargs=True) for name, block in blocks.items()]
    try:
        with evaluating(model):
            outputs(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: in_tuple for name, in_tuple in found.items() if calls[name] == 1}


def _passes(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the input reaches the output around all layers: also when they, and the batch norms, give zeros."""
    read = first_tensor(args, kwargs)
    assert read is not None
    if not read.is_floating_point():
        return False
    silent = copy.deepcopy(block)
    for module in silent.modules():
        module._forward_hooks.clear()
        if isinstance(module, nn.BatchNorm2d) or not is_norm(module):
            for parameter in module.parameters(recurse=False):
                parameter.zero_()

    def out(x: Tensor) -> Tensor:
        given = [x if value is read else value for value in args]
        output = silent(*given, **{name: x if value is read else value for name, value in kwargs.items()})
        return output[0] if isinstance(output, tuple) else output

    generator = torch.Generator().manual_seed(0)
    one, another = (torch.rand(read.shape, generator=generator).to(read) + 1 for _ in range(2))  # above any ReLU's zero
    return not torch.equal(out(one), out(another))

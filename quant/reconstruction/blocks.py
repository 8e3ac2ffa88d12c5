"""Chains of blocks: found by how a model calls them, and run one block after the other.

A chain is a ModuleList or Sequential of equal modules (decoder layers, encoder layers, a stage of a ResNet) that are
called once each, in order, and each read what the one before has returned. Running them one by one needs the inputs of
one block only, whatever the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quant.convert import run_model
from quant.module_utils import Arguments

Place = int | str
"""Where an argument stands: its position, or its name."""
Part = int | str | None
"""Which part of what a block returns: an index, a key, or the whole."""


@dataclass
class Chain:
    """Blocks that are called in order."""

    names: list[str]
    """Dotted names of the blocks."""
    modules: list[nn.Module]
    links: list[dict[Place, Part]] = field(default_factory=list)
    """For each block after the first: argument -> part of what the block before has returned."""
    alike: bool = True
    """Whether all blocks get the same arguments otherwise, such as one mask."""


@dataclass
class Unit:
    """Layers whose inputs are gathered at the same time: those of a block, or a single layer outside of all chains."""

    name: str
    layers: list[str]
    calls: int = 0
    """Calls of a single layer in a forward pass; 0: unknown, and all of the model is run."""
    chain: Chain | None = None
    index: int = 0
    """Index of the block in the chain."""


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


def find_units(model: nn.Module, layers: Mapping[str, nn.Module], batch: Any) -> list[Unit]:
    """Find the blocks and the single layers of a model, in the order of their first calls.

    Args:
        model: The model, which runs once on the batch.
        layers: The layers of interest, by name.
        batch: Input of the model, see `quant.convert.run_model`.

    Returns:
        The units; each layer is in one. Layers that the batch does not reach form the last one.
    """
    candidates = _candidates(model, layers)
    calls: dict[str, int] = {}
    handles = [_on_call(layer, partial(_count, calls, name)) for name, layer in layers.items()]
    watches = [_Watch(chain, partial(_count, calls, chain.names[0] + ".")) for chain in candidates]
    handles += [handle for watch in watches for handle in watch.handles]
    run_until_stopped(model, batch, [*handles, *_stop_at_head(model, layers)])
    units: dict[str, list[Unit]] = {}
    taken: set[str] = set()
    for chain in (watch.chain for watch in watches if watch.complete):
        blocks = [_within(name, layers) for name in chain.names]
        if taken.isdisjoint(layer for block in blocks for layer in block):
            own = zip(chain.names, blocks, strict=True)
            first = chain.names[0] + "."
            units[first] = [Unit(name, block, chain=chain, index=i) for i, (name, block) in enumerate(own)]
            taken.update(layer for block in blocks for layer in block)
    units |= {name: [Unit(name, [name], calls[name])] for name in layers if name in calls and name not in taken}
    found = [unit for name in calls for unit in units.get(name, ())]
    unreached = [name for name in layers if name not in calls and name not in taken]
    return [*found, *([Unit(unreached[0], unreached)] if unreached else [])]


def _stop_at_head(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[RemovableHandle]:
    """Stop a forward pass at an output embedding that is none of the layers: its logits can outweigh the model."""
    find: Any = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    if not isinstance(head, nn.Module) or head in layers.values():
        return []

    def stop() -> None:
        raise _Stop

    return [_on_call(head, stop)]


def _candidates(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[Chain]:
    """Return containers of at least two modules of one class with layers in each, the outermost first."""
    found = []
    for name, container in model.named_modules():
        if isinstance(container, nn.ModuleList | nn.Sequential) and len(container) > 1:
            blocks = {f"{name}.{key}".lstrip("."): block for key, block in container.named_children()}
            one_class = len({type(block) for block in blocks.values()}) == 1 and len(blocks) == len(container)
            if one_class and all(_within(block, layers) for block in blocks):
                found.append(Chain(list(blocks), list(blocks.values())))
    return found


def _within(block: str, layers: Iterable[str]) -> list[str]:
    return [name for name in layers if name == block or name.startswith(f"{block}.")]


def _count(calls: dict[str, int], name: str) -> None:
    calls[name] = calls.get(name, 0) + 1


class _Watch:
    """Watches the calls of a candidate's blocks in one forward pass, holding the output of one block at a time."""

    def __init__(self, chain: Chain, on_first: Callable[[], None]) -> None:
        self.chain, self._on_first = chain, on_first
        self._next = 0
        self._broken = False
        self._first: dict[Place, Any] = {}
        self._output: Any = None
        self.handles = []
        for index, module in enumerate(chain.modules):
            self.handles.append(module.register_forward_pre_hook(partial(self._before, index), with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._after))

    @property
    def complete(self) -> bool:
        """Whether the blocks form a chain."""
        return not self._broken and self._next == len(self.chain.modules)

    def _before(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = _named(args, kwargs)
        if index != self._next:
            self._broken = True
        elif index == 0:
            self._on_first()
            self._first = arguments
        else:
            links = _links(arguments, self._output)
            others = {place for place in arguments.keys() | self._first.keys() if place not in links}
            alike = all(_same(arguments.get(place), self._first.get(place)) for place in others)
            self._broken |= not links or links.keys() != (self.chain.links or [links])[0].keys()
            self.chain.alike &= alike and arguments.keys() == self._first.keys()
            self.chain.links.append(links)
        self._next += 1

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        last = self._next == len(self.chain.modules)
        self._output = None if last or self._broken else output
        if last:
            self._first = {}


def _named(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[Place, Any]:
    places: dict[Place, Any] = dict(enumerate(args))
    return places | dict(kwargs)


def _links(arguments: Mapping[Place, Any], output: Any) -> dict[Place, Part]:
    """Find the arguments that are tensors of an output."""
    parts = dict(_parts(output))
    return {
        place: next(part for part, value in parts.items() if value is argument)
        for place, argument in arguments.items()
        if isinstance(argument, Tensor) and any(value is argument for value in parts.values())
    }


def _parts(output: Any) -> Iterator[tuple[Part, Any]]:
    if isinstance(output, Mapping):
        yield from output.items()
    elif isinstance(output, tuple | list):
        yield from enumerate(output)
    else:
        yield None, output


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments are the same object, or equal values that hold no tensor, or sequences of such."""
    if isinstance(one, tuple | list) and isinstance(other, tuple | list) and len(one) == len(other):
        return all(_same(*pair) for pair in zip(one, other, strict=True))
    plain = (bool, int, float, str, type(None))
    return one is other or (isinstance(one, plain) and isinstance(other, plain) and one == other)


# ------------------------------------------------------ running


class BlockInputs:
    """The inputs of one block of a chain, for every batch; `advance` replaces them by those of the next.

    Args:
        model: The model, in eval mode.
        chain: The chain.
        batches: Inputs of the model. It runs on each of them up to the first block of the chain, or to the last one if
            blocks get arguments of their own.
    """

    def __init__(self, model: nn.Module, chain: Chain, batches: Sequence[Any]) -> None:
        self.chain, self.index = chain, 0
        self._others: list[list[dict[Place, Any]]] = []
        """[batch][block, or 0 if they are alike]: the arguments that do not change from block to block."""
        self._moving: list[dict[Place, Any]] = []
        """[batch]: the arguments that do, for the current block."""
        moving = {place for links in chain.links for place in links}
        for batch in batches:
            seen = self._arguments_in(model, batch, moving)
            self._moving.append({place: value for place, value in seen[0].items() if place in moving})
            self._others.append([{p: value for p, value in own.items() if p not in moving} for own in seen])

    def _arguments_in(self, model: nn.Module, batch: Any, moving: set[Place]) -> list[dict[Place, Any]]:
        seen: list[dict[Place, Any]] = []
        watched = self.chain.modules[:1] if self.chain.alike else self.chain.modules

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = _named(args, kwargs)
            seen.append(named if not seen else {p: None if p in moving else v for p, v in named.items()})
            if len(seen) == len(watched):
                raise _Stop

        handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in watched]
        run_until_stopped(model, batch, handles)
        return seen

    def __len__(self) -> int:
        return len(self._moving)

    def arguments(self, batch: int) -> Arguments:
        """Return the arguments of the current block for a batch."""
        others = self._others[batch]
        named = {**others[0 if self.chain.alike else self.index], **self._moving[batch]}
        positions = sorted(place for place in named if isinstance(place, int))
        return tuple(named[p] for p in positions), {p: value for p, value in named.items() if isinstance(p, str)}

    def run(self, batch: int) -> Any:
        """Run the current block on a batch, and return what it returns."""
        args, kwargs = self.arguments(batch)
        with torch.no_grad():
            return self.chain.modules[self.index](*args, **kwargs)

    def advance(self) -> None:
        """Go on to the next block, with what the current one returns as it is now."""
        links = self.chain.links[self.index]
        for batch in range(len(self)):
            parts = dict(_parts(self.run(batch)))
            self._moving[batch] = {**self._moving[batch], **{place: parts[part] for place, part in links.items()}}
        self.index += 1


def run_until_stopped(model: nn.Module, batch: Any, handles: Sequence[RemovableHandle] = ()) -> None:
    """Run a model without gradients until a hook raises `_Stop`, if one does; remove the handles."""
    with _removing(handles), torch.no_grad():
        try:
            run_model(model, batch)
        except _Stop:
            return


@contextmanager
def stopping_after(layer: nn.Module, calls: int) -> Iterator[None]:
    """Within, `run_until_stopped` stops once a layer has been called so often; 0: never."""
    left = [calls]

    def after(module: nn.Module, args: Any, output: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise _Stop

    with _removing([layer.register_forward_hook(after)]):
        yield


def _on_call(module: nn.Module, function: Callable[[], None]) -> RemovableHandle:
    return module.register_forward_pre_hook(lambda *_: function())


@contextmanager
def _removing(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

"""Find the channels that have to shrink together, by following tensors through one forward pass.

Two branches that are added have the same channels, and so do a depthwise convolution's input and output. Names of
classes and modules play no part. Channels that any operation reads which is not known to treat them alike stay whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from quant.elastic.layers import can_be_elastic
from quant.module_utils import evaluating, first_tensor
from quant.transforms.graph import outputs

_ALIKE = {
    *("relu", "relu6", "hardtanh", "leaky_relu", "elu", "gelu", "silu", "mish", "sigmoid", "hardsigmoid", "hardswish"),
    *("tanh", "softplus", "dropout", "dropout2d", "contiguous", "clone", "detach", "float", "to"),
    *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"),
}
"""Names of functions that keep the channel axis and compute a zero, or a constant, for what is not there."""
_JOINED = {"add", "iadd", "radd", "mul", "imul", "rmul"}
"""Names of functions of two tensors with the same channels."""
_FOLDED = {"flatten", "reshape", "view", "squeeze", "mean"}
"""Names of functions that may remove the axes behind the channels."""


@dataclass(eq=False)
class Channels:
    """Channels of one or several tensors that shrink together."""

    size: int
    writers: list[str] = field(default_factory=list)
    """Layers whose outputs they are."""
    readers: list[str] = field(default_factory=list)
    """Layers whose inputs they are."""
    followers: list[str] = field(default_factory=list)
    """Depthwise convolutions and norms, whose inputs and outputs they are."""
    fixed: bool = False
    """Whether something else reads them, so that they cannot shrink."""
    unit: int = 1
    """Channels that stay together: the features of an attention head."""


@dataclass
class _Tag:
    """What is known of a tensor: the axis of its channels, and the layer, or the sum, they come from."""

    node: _Node
    axis: int


@dataclass(eq=False)
class _Node:
    channels: Channels
    parent: _Node | None = None

    def root(self) -> _Node:
        return self if self.parent is None else self.parent.root()


@torch.no_grad()
def find_channels(model: nn.Module, example: Any) -> list[Channels]:
    """Find the channels of a model that can shrink.

    Args:
        model: The float model.
        example: A batch.

    Returns:
        The channels, each with a writer and a reader, in the order of the forward pass.
    """
    watch = _Watch()
    hooks = []
    for name, module in model.named_modules():
        if can_be_elastic(module):
            hooks.append(module.register_forward_pre_hook(watch.enter, with_kwargs=True))
            hooks.append(module.register_forward_hook(watch.leaver(name), with_kwargs=True))
    try:
        with evaluating(model), watch:
            for tensor in outputs(model, example):
                watch.fix(tensor)
    finally:
        for hook in hooks:
            hook.remove()
    return [c for c in watch.found() if not c.fixed and c.writers and c.readers]


class _Watch(TorchFunctionMode):
    """Tags tensors with their channels, outside of layers and norms."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[_Node] = []
        self.tags: dict[int, _Tag] = {}
        self.alive: list[Tensor] = []  # an id is valid only while its tensor lives
        self.depth = 0
        self.ends: dict[str, tuple[_Node | None, _Node | None]] = {}
        """Layer -> what it reads and writes, as another call of it has to agree."""

    def found(self) -> list[Channels]:
        return [node.channels for node in self.nodes if node.parent is None]

    def start(self, tensor: Tensor, axis: int) -> _Node:
        """Tag a tensor with channels of its own."""
        node = _Node(Channels(tensor.shape[axis]))
        self.nodes.append(node)
        self.tag(tensor, _Tag(node, axis))
        return node

    def tag(self, tensor: Tensor, tag: _Tag) -> None:
        self.tags[id(tensor)] = tag
        self.alive.append(tensor)

    def fix(self, tensor: Tensor) -> None:
        """Something reads all channels of a tensor."""
        if (tag := self.tags.get(id(tensor))) is not None:
            tag.node.root().channels.fixed = True

    def join(self, first: _Node | None, second: _Node | None) -> None:
        """Let two sets of channels shrink together; if one of them is not known, the other cannot."""
        if first is None or second is None:
            for node in (first, second):
                if node is not None:
                    node.root().channels.fixed = True
            return
        kept, gone = first.root(), second.root()
        if kept is gone:
            return
        gone.parent = kept
        into, other = kept.channels, gone.channels
        for own, more in zip(*((c.writers, c.readers, c.followers) for c in (into, other)), strict=True):
            own += [name for name in more if name not in own]
        into.fixed |= other.fixed or into.size != other.size

    # ------------------------------------------------------ layers

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.depth += 1

    def leaver(self, name: str) -> Any:
        """Return the forward hook of a layer."""

        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            self.depth -= 1
            read = first_tensor(args, kwargs)
            assert read is not None
            self.pass_layer(name, module, read, output)

        return leave

    def pass_layer(self, name: str, module: nn.Module, read: Tensor, output: Tensor) -> None:
        axis = (read.dim() if isinstance(module, nn.Linear) else 2) - 1
        tag = self.tags.get(id(read))
        node = tag.node.root() if tag is not None and tag.axis == axis and output.dim() == read.dim() else None
        groups = getattr(module, "groups", 1)
        if isinstance(module, nn.BatchNorm2d) or (groups > 1 and groups == module.in_channels == module.out_channels):
            if node is None:
                node = self.start(read, axis)
                node.channels.fixed = True
            _add(node.channels.followers, name)
            self.tag(output, _Tag(node, axis))
            return
        written = self.start(output, axis)
        _add(written.channels.writers, name)
        if node is not None:
            _add(node.channels.readers, name)
        elif tag is not None:
            self.fix(read)
        if groups > 1:
            for end in (node, written):
                if end is not None:
                    end.channels.fixed = True
        if name in self.ends:
            for before, now in zip(self.ends[name], (node, written), strict=True):
                self.join(before, now)
        self.ends[name] = node, written

    # ------------------------------------------------------ functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if self.depth or not results:
            return output
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        tagged = [tensor for tensor in inputs if id(tensor) in self.tags]
        if tagged:
            self.follow(getattr(func, "__name__", "").strip("_"), inputs, tagged, results[0])
        return output

    def follow(self, name: str, inputs: list[Tensor], tagged: list[Tensor], result: Tensor) -> None:
        tag = self.tags[id(tagged[0])]
        alone = len(inputs) == 1
        same = alone and result.dim() == inputs[0].dim()
        if (name in _ALIKE | _JOINED and same) or (
            name in _FOLDED and alone and _folds(inputs[0], result, tag.axis, name)
        ):
            self.tag(result, tag)
        elif name in _JOINED and _same_channels(inputs, tag.axis):
            ends = [self.tags.get(id(tensor)) for tensor in inputs]
            self.join(*(None if end is None or end.axis != tag.axis else end.node for end in ends))
            self.tag(result, tag)
        else:
            for tensor in tagged:
                self.fix(tensor)


def _folds(read: Tensor, result: Tensor, axis: int, name: str) -> bool:
    """Whether `result` has the channels of `read` on the same axis, and no other values on it."""
    if result.dim() <= axis or result.shape[: axis + 1] != read.shape[: axis + 1]:
        return False
    return name == "mean" or result.numel() == read.numel()


def _same_channels(inputs: list[Tensor], axis: int) -> bool:
    """Whether two tensors have equally many axes and channels; the axes behind may broadcast."""
    first, second = inputs if len(inputs) == 2 else (inputs[0], inputs[0].sum())
    return first.dim() == second.dim() > axis and first.shape[axis] == second.shape[axis]


def _add(names: list[str], name: str) -> None:
    if name not in names:
        names.append(name)

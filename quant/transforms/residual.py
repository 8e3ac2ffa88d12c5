"""Trace the residual stream of a model: what writes to it, what reads it, and which heads' values a layer reads.

A residual stream is the set of tensors that are connected by additions, from the embeddings to the last norm. Names of
modules and classes differ between libraries; the data flow does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from quant.module_utils import evaluating, first_tensor
from quant.quant_experts import ExpertLinear
from quant.transforms.graph import ADD, LAYERS, is_norm, outputs

_JOIN = ADD | {
    *(torch.sub, Tensor.sub, Tensor.__sub__, torch.cat, Tensor.index_add_, Tensor.index_add, Tensor.index_put_),
    *(Tensor.__setitem__, Tensor.copy_, torch.stack),
}
"""Functions whose output is linear in all their inputs, entry by entry or row by row."""
_MOVE = {
    *(Tensor.view, Tensor.reshape, Tensor.flatten, Tensor.unflatten, Tensor.transpose, Tensor.permute),
    *(Tensor.unsqueeze, Tensor.squeeze, Tensor.expand, Tensor.repeat, Tensor.repeat_interleave, Tensor.contiguous),
    *(Tensor.clone, Tensor.detach, Tensor.to, Tensor.type, Tensor.float, Tensor.type_as, Tensor.__getitem__),
    *(Tensor.index_select, Tensor.split, Tensor.chunk, Tensor.narrow, Tensor.sum, Tensor.view_as, Tensor.reshape_as),
    *(torch.reshape, torch.flatten, torch.transpose, torch.permute, torch.unsqueeze, torch.squeeze, torch.split),
    *(torch.chunk, torch.narrow, torch.index_select, torch.repeat_interleave, torch.clone, torch.sum, Tensor.unbind),
    *(F.dropout, torch.dropout),
}
"""Functions that only move, copy, convert or add up entries."""
_MULTIPLY = {
    *(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.mul_, Tensor.__imul__),
    *(torch.div, Tensor.div, Tensor.__truediv__, Tensor.div_, Tensor.__itruediv__),
}
_LOOK = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.new_zeros, Tensor.new_empty, torch.zeros_like, torch.empty_like}
"""Functions that read no values."""


@dataclass(eq=False)
class Stream:
    """Tensors that are connected by additions, views and products with one number a row."""

    writers: list[Any] = field(default_factory=list)
    """Layers, norms, embeddings, bare parameters, or calls of attention (`Attention`) whose output it is."""
    readers: list[Any] = field(default_factory=list)
    """Layers, norms and bare weights (`BareLinear`)."""
    norm_inputs: dict[Any, Tensor] = field(default_factory=dict)
    """Norm among the readers -> the tensor that it reads."""
    others: list[str] = field(default_factory=list)
    """Names of other functions that read it or made it."""
    values: list[Attention] = field(default_factory=list)
    """Calls of attention that it gives the values to."""
    widths: set[int] = field(default_factory=set)
    """Sizes of the tensors' last axes."""

    def join(self, other: Stream) -> None:
        """Take over the contents of another stream."""
        self.writers += other.writers
        self.readers += other.readers
        self.norm_inputs |= other.norm_inputs
        self.others += other.others
        self.values += other.values
        self.widths |= other.widths


@dataclass(frozen=True, eq=False)
class BareLinear:
    """A parameter (out_features, in_features) that F.linear multiplies with, outside of a linear layer."""

    weight: nn.Parameter


@dataclass(frozen=True, eq=False)
class Attention:
    """A product of attention probabilities with values, (..., tokens, head_dim)."""

    head_dim: int


@torch.no_grad()
def trace_streams(model: nn.Module, example: Any) -> list[Stream]:
    """Follow all float tensors through one forward pass, in eval mode.

    Args:
        model: The float model.
        example: A batch.

    Returns:
        The streams in the order of their first tensors.
    """
    trace = _Trace()
    known = (*LAYERS, ExpertLinear, nn.Embedding)
    hooks = [
        hook
        for module in model.modules()
        if isinstance(module, known) or is_norm(module)
        for hook in (
            module.register_forward_pre_hook(trace.enter, with_kwargs=True),
            module.register_forward_hook(trace.leave),
        )
    ]
    try:
        with evaluating(model), trace:
            made = outputs(model, example)
        for tensor in made:
            if tensor.is_floating_point():
                trace.stream(tensor).others.append("the model's output")
        return list(trace.all())
    finally:
        for hook in hooks:
            hook.remove()


class _Trace(TorchFunctionMode):
    """Follows tensors through one forward pass, but not inside layers and norms."""

    def __init__(self) -> None:
        super().__init__()
        self.by_id: dict[int, Stream] = {}
        self.alive: list[Any] = []  # an id is valid only while its tensor lives
        self.joined: dict[Stream, Stream] = {}
        self.inside: list[nn.Module] = []
        self.softmax: set[int] = set()

    def stream(self, tensor: Tensor) -> Stream:
        """Return the stream of a tensor, a new one for a tensor that is not known."""
        if id(tensor) not in self.by_id:
            self.alive.append(tensor)
            writers = [tensor] if isinstance(tensor, nn.Parameter) else []
            self.by_id[id(tensor)] = Stream(writers, widths={tensor.shape[-1]} if tensor.dim() else set())
        return self.root(self.by_id[id(tensor)])

    def root(self, stream: Stream) -> Stream:
        """Return the stream that has taken over this one."""
        while stream in self.joined:
            stream = self.joined[stream]
        return stream

    def all(self) -> Iterator[Stream]:
        """Yield each stream once."""
        return iter(dict.fromkeys(self.root(stream) for stream in self.by_id.values()))

    def unite(self, tensors: list[Tensor]) -> None:
        """Make one stream of several tensors."""
        first, *others = dict.fromkeys(self.stream(tensor) for tensor in tensors)
        for other in others:
            first.join(other)
            self.joined[other] = first

    # ------------------------------------------------------ modules

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        read = first_tensor(args, kwargs)
        if not self.inside and read is not None and read.is_floating_point():
            stream = self.stream(read)
            stream.readers.append(module)
            stream.norm_inputs[module] = read
        self.inside.append(module)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook."""
        self.inside.pop()
        if not self.inside and isinstance(output, Tensor):
            self.stream(output).writers.append(module)

    # ------------------------------------------------------ functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self.inside or func in _LOOK or func.__name__ == "__get__":  # the last: attributes such as `shape`
            return output
        made, read = _floats(output), _floats((args, kwargs))
        if read and (made or func in _JOIN):  # a function without a float result reads sizes, or counts
            self.follow(func, args, kwargs, read, made)
        return output

    def follow(self, func: Any, args: Any, kwargs: Any, read: list[Tensor], made: list[Tensor]) -> None:
        """Follow a function from the float tensors that it reads to those that it makes."""
        scaled = [tensor for tensor in read if tensor.dim() == 0 or tensor.shape[-1] == 1]
        if func in _JOIN | _MOVE:
            self.unite([tensor for tensor in (*read, *made) if tensor.numel()] or made)
        elif func in _MULTIPLY and len(read) - len(scaled) <= 1:
            self.unite([tensor for tensor in (*read, *made) if not any(tensor is one for one in scaled)] or made)
        elif func is F.linear and isinstance(args[1], nn.Parameter):
            self.stream(read[0]).readers.append(BareLinear(args[1]))
        elif (values := self.values_of(func, args, kwargs)) is not None:
            self.attend(values, read, made[0])
        else:
            self.read_by(func, read)
            for tensor in made:
                self.stream(tensor).others.append(func.__name__)
        if func in (F.softmax, torch.softmax, Tensor.softmax) or (func in _MOVE and id(read[0]) in self.softmax):
            self.softmax |= {id(tensor) for tensor in made}

    def read_by(self, func: Any, tensors: list[Tensor]) -> None:
        """Note a reader of no known kind."""
        for tensor in tensors:
            self.stream(tensor).others.append(func.__name__)

    def values_of(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """Return the values that a function multiplies with attention probabilities; None if it does not."""
        if func is F.scaled_dot_product_attention:
            return kwargs["value"] if "value" in kwargs else args[2]
        if func in (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm) and id(args[0]) in self.softmax:
            return args[1]
        return None

    def attend(self, values: Tensor, read: list[Tensor], made: Tensor) -> None:
        """Note a call of attention."""
        call = Attention(values.shape[-1])
        self.stream(values).values.append(call)
        self.stream(made).writers.append(call)
        for tensor in read:
            if tensor is not values:
                self.stream(tensor).others.append("attention")


def _floats(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]

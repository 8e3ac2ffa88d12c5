"""Who reads what in a model, found by watching one forward pass: groups of layers around a norm or a ReLU.

Names of modules and classes of a library change between versions; what reads a tensor does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from quant.convert import run_model
from quant.module_utils import evaluating, first_tensor
from quant.transforms.shortcut import Shortcut

LAYERS = (nn.Linear, nn.Conv2d, Conv1D)
ADD = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__}
_RECTIFY = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.leaky_relu}
"""functions with f(x / s) = f(x) / s for s > 0"""
_PASS = {F.dropout, F.dropout2d, torch.dropout}
"""in eval mode, what goes in comes out"""


@dataclass(frozen=True)
class Group:
    """Layers that read the same tensor, and what makes it: names of modules."""

    source: str | None
    """norm or layer whose output they read; None: nothing can absorb a scale there"""
    consumers: tuple[str, ...]
    shortcuts: tuple[str, ...] = ()
    """norms that read that output with something added"""
    normalizes: bool = False
    """the source is a LayerNorm or RMSNorm"""
    rectified: bool = False
    """a ReLU lies between, which only positive scales pass"""

    @property
    def has_gamma(self) -> bool:
        """Whether the source multiplies by a gamma of any sign that its readers can take."""
        return self.normalizes and not self.rectified

    def only(self, layers: Collection[str]) -> Group:
        """The group as far as it matters for `layers`: whole or empty with a source, else without the other layers."""
        inside = tuple(name for name in self.consumers if name in layers)
        return replace(self, consumers=self.consumers if self.source is not None and inside else inside)


@torch.no_grad()
def find_groups(model: nn.Module, example: Any) -> list[Group]:
    """Every Linear, Conv1D and Conv2d that is called, in groups by what it reads, in the order of the calls.

    A group has a source only if all readers of its output are known: layers, and norms behind a shortcut. Layers with
    another reader beside them, such as a pooler's slice or the model's own output, are a group without a source.
    Convolutions in groups other than depthwise, and those without a source, are left out.
    """
    watched = _Watch()
    names = {module: name for name, module in model.named_modules()}
    known = [module for module in names if isinstance(module, (*LAYERS, Shortcut)) or is_norm(module)]
    hooks = [hook for module in known for hook in (
        module.register_forward_pre_hook(watched.enter, with_kwargs=True),
        module.register_forward_hook(watched.leave, with_kwargs=True),
    )]  # fmt: skip
    try:
        with evaluating(model), watched:
            found = outputs(model, example)
        for tensor in found:
            watched.flow(tensor).others += 1
        uses = Counter(id(p) for module in names for p in module._parameters.values()) + Counter(watched.read_elsewhere)
        taken: set[str] = set()
        groups = []
        for flow in watched.flows:
            group = _group(flow, watched, names, uses, taken)
            if group is not None and not taken & set(group.consumers):  # a layer that is called twice is divided once
                groups.append(group)
                taken |= {*group.consumers, *group.shortcuts}
        return groups
    finally:
        for hook in hooks:
            hook.remove()


def outputs(model: nn.Module, example: Any) -> list[Tensor]:
    """Every tensor that the model gives for an example."""
    output = run_model(model, example)
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


@dataclass(eq=False)
class _Flow:
    """One tensor, under all its views, and what happens to it."""

    source: nn.Module | None = None
    source_input: Tensor | None = None
    readers: list[nn.Module] = field(default_factory=list)
    sums: list[_Flow] = field(default_factory=list)
    """flows that are this one plus something else"""
    rectified: bool = False
    others: int = 0
    """readers of any other kind"""


class _Watch(TorchFunctionMode):
    """Follows tensors through one forward pass; what happens inside a layer or norm is that module's own affair."""

    def __init__(self) -> None:
        super().__init__()
        self.flows: list[_Flow] = []
        self.by_id: dict[int, _Flow] = {}
        self.alive: list[Tensor] = []  # an id is only good while its tensor lives
        self.inside: list[nn.Module] = []
        self.calls: list[nn.Module] = []
        self.read_elsewhere: set[int] = set()
        """ids of parameters that something reads besides the module that holds them"""

    def flow(self, tensor: Tensor) -> _Flow:
        if id(tensor) not in self.by_id:
            self._start(tensor, _Flow())
        return self.by_id[id(tensor)]

    def _start(self, tensor: Tensor, flow: _Flow) -> None:
        self.by_id[id(tensor)] = flow
        self.alive.append(tensor)
        if flow not in self.flows:
            self.flows.append(flow)

    # ------------------------------------------------------ modules

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read = first_tensor(args, kwargs)
        if not self.inside and read is not None:
            self.calls.append(module)
            flow = self.flow(read)
            if not isinstance(module, Shortcut):
                flow.readers.append(module)
        self.inside.append(module)

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.inside.pop()
        if self.inside or not isinstance(output, Tensor):
            return
        read = first_tensor(args, kwargs)
        if isinstance(module, Shortcut) and read is not None:
            self._start(output, self.flow(read))  # the same sum, of an earlier migration
        else:
            self._start(output, _Flow(module, read))

    # ------------------------------------------------------ functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if not results:
            return output
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        own = {id(parameter) for parameter in self.inside[0].parameters()} if self.inside else set()
        self.read_elsewhere |= {id(leaf) for leaf in inputs if isinstance(leaf, nn.Parameter)} - own
        if self.inside:
            return output
        result = results[0]
        for tensor in inputs:
            flow = self.flow(tensor)
            if result is tensor and func not in ADD | _RECTIFY | _PASS:
                flow.others += 1  # changed in place
            elif func in _RECTIFY:
                flow.rectified = True
                self._start(result, flow)
            elif func in _PASS or _same_values(result, tensor):
                self._start(result, flow)
            elif func in ADD and _plain_sum(inputs, kwargs) and result is not tensor:
                flow.sums.append(self.flow(result))
            else:
                flow.others += 1
        return output


def _same_values(result: Tensor, tensor: Tensor) -> bool:
    """Whether `result` is `tensor` seen as other rows: the same channels, last, in the same memory."""
    return (
        result.data_ptr() == tensor.data_ptr()
        and result.numel() == tensor.numel()
        and result.dim() > 0
        and tensor.dim() > 0
        and result.shape[-1] == tensor.shape[-1]
        and result.is_contiguous()
        and tensor.is_contiguous()
    )


def _plain_sum(inputs: list[Tensor], kwargs: dict[str, Any]) -> bool:
    return len(inputs) == 2 and inputs[0].shape == inputs[1].shape and not kwargs


def is_norm(module: nn.Module) -> bool:
    """LayerNorm, RMSNorm by whatever name, BatchNorm2d: a weight, perhaps a bias, and nothing else."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.BatchNorm2d):
        return module.weight is not None and module.weight.dim() == 1
    parameters = dict(module.named_parameters(recurse=False))
    return (
        type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
        and set(parameters) in ({"weight"}, {"weight", "bias"})
        and parameters["weight"].dim() == 1
    )


def _group(
    flow: _Flow, watched: _Watch, names: Mapping[nn.Module, str], uses: Mapping[int, int], taken: set[str]
) -> Group | None:
    layers = list(dict.fromkeys(module for module in flow.readers if isinstance(module, LAYERS)))
    # A weight that is also an embedding's, say, or that a function reads, cannot take a scale.
    consumers = [layer for layer in layers if _absorbs(layer) and uses[id(layer.weight)] == 1]
    targets = [_only_norm(total) for total in flow.sums]
    source = flow.source
    whole = (
        source is not None
        and bool(consumers)
        and len(consumers) == len(flow.readers)
        and not flow.others
        and _add_up(targets, consumers[0], watched, names, taken)
        and not (targets and (flow.rectified or isinstance(consumers[0], nn.Conv2d)))
        and _called_once(watched, source, *consumers, *targets)
        # One that is shared, or computed (weight norm), cannot be divided.
        and all(uses[id(parameter)] == 1 for parameter in scaled_parameters(source))
        and _scales(source, flow.source_input)
        and len({_channels_last(source, flow.source_input), *(not isinstance(c, nn.Conv2d) for c in consumers)}) == 1
    )
    normal = not isinstance(source, (*LAYERS, nn.BatchNorm2d))
    if whole and source is not None:
        shortcuts = tuple(names[target] for target in targets if target is not None)
        return Group(names[source], tuple(names[c] for c in consumers), shortcuts, normal, flow.rectified)
    alone = [layer for layer in consumers if not isinstance(layer, nn.Conv2d)]
    return Group(None, tuple(names[layer] for layer in alone)) if alone else None


def _absorbs(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.Conv2d) or layer.groups == 1:
        return True
    return layer.groups == layer.in_channels == layer.out_channels


def _only_norm(total: _Flow) -> nn.Module | None:
    """The one LayerNorm or RMSNorm that reads a sum, if nothing else does."""
    if len(total.readers) != 1 or total.others or total.sums or total.rectified:
        return None
    norm = total.readers[0]
    return norm if is_norm(norm) and not isinstance(norm, nn.BatchNorm2d) else None


def _add_up(
    targets: list[nn.Module | None], reader: nn.Module, watched: _Watch, names: Mapping[nn.Module, str], taken: set[str]
) -> bool:
    """Whether norms can add a factor of what `reader` has read before: each has room for one, and takes it once."""
    norms = [target for target in targets if target is not None]
    free = {names[norm] for norm in norms} - taken
    calls = watched.calls
    return len(free) == len(targets) and all(calls.index(norm) > calls.index(reader) for norm in norms)


def _called_once(watched: _Watch, *modules: nn.Module | None) -> bool:
    """Modules that a model uses in several places stand for all of them: their weights belong to no group."""
    weights = {id(module.weight) for module in modules if module is not None}
    calls = sum(1 for flow in watched.flows if flow.source is not None and id(flow.source.weight) in weights)
    return calls == len({module for module in modules if module is not None})


def scaled_parameters(source: nn.Module) -> list[Any]:
    """What is divided where the source absorbs a scale."""
    return [part for part in (source.weight, getattr(source, "bias", None)) if part is not None]


def _channels_last(source: nn.Module, example: Tensor | None) -> bool:
    """Whether the output's last axis is what the weight stands along, as a Linear reads it; else it is the second."""
    if isinstance(source, (*LAYERS, nn.BatchNorm2d)):
        return isinstance(source, nn.Linear | Conv1D)
    forward: Callable[..., Any] = source.forward
    weight: Any = source.weight
    before, kept = forward(example), weight.clone()
    weight[0] += 1
    changed = (forward(example) != before).flatten(0, -2).any(0)
    weight.copy_(kept)
    return not bool(changed[1:].any())


def _scales(source: nn.Module, example: Tensor | None) -> bool:
    """Whether twice the weight and bias make twice the output: not so where a norm multiplies by 1 + weight."""
    if isinstance(source, (*LAYERS, nn.LayerNorm)):
        return True
    forward: Callable[..., Any] = source.forward
    parameters = [p for p in source.parameters(recurse=False)]
    before = forward(example)
    for parameter in parameters:
        parameter.mul_(2)
    after = forward(example)
    for parameter in parameters:
        parameter.div_(2)
    return torch.allclose(after, 2 * before, rtol=1e-3, atol=1e-6)

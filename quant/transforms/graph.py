"""Trace which modules read which tensors in one forward pass, and group the layers that read the same one.

Module and class names differ between libraries and their versions; the data flow does not.
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
"""Functions with f(x / s) = f(x) / s for s > 0."""
_PASS = {F.dropout, F.dropout2d, torch.dropout}
"""Functions that return their input in eval mode."""


@dataclass(frozen=True)
class Group:
    """Names of layers that read the same tensor, and of the module that produces it."""

    source: str | None
    """Norm or layer whose output they read; None: no module can absorb a scale there."""
    consumers: tuple[str, ...]
    shortcuts: tuple[str, ...] = ()
    """Norms that read the sum of that output and another tensor."""
    normalizes: bool = False
    """Whether the source is a LayerNorm or RMSNorm."""
    rectified: bool = False
    """Whether a ReLU lies between, so that scales must be positive."""

    @property
    def has_gamma(self) -> bool:
        """Whether the source has a gamma, of any sign, that its readers can absorb."""
        return self.normalizes and not self.rectified

    def only(self, layers: Collection[str]) -> Group:
        """Restrict the group to some layers.

        Args:
            layers: Layer names.

        Returns:
            With a source: the whole group if it contains one of the layers, else one without consumers. Without a
            source: the group without the other layers.
        """
        inside = tuple(name for name in self.consumers if name in layers)
        return replace(self, consumers=self.consumers if self.source is not None and inside else inside)


@torch.no_grad()
def find_groups(model: nn.Module, example: Any) -> list[Group]:
    """Group all Linear, Conv1D and Conv2d layers that are called by the tensor that they read.

    A group has a source only if all readers of the tensor are known: layers, and norms behind a shortcut. If there is
    another reader, such as a pooler's slice or the model's output, the layers form a group without a source. Grouped
    convolutions other than depthwise ones, and convolutions without a source, are left out.

    Args:
        model: The float model.
        example: A batch.

    Returns:
        The groups in the order of the calls.
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
            if group is not None and not taken & set(group.consumers):  # each layer belongs to one group
                groups.append(group)
                taken |= {*group.consumers, *group.shortcuts}
        return groups
    finally:
        for hook in hooks:
            hook.remove()


def outputs(model: nn.Module, example: Any) -> list[Tensor]:
    """Return all tensors in the model's output for an example."""
    output = run_model(model, example)
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


@dataclass(eq=False)
class _Flow:
    """One tensor, with all its views, and its readers."""

    source: nn.Module | None = None
    source_input: Tensor | None = None
    readers: list[nn.Module] = field(default_factory=list)
    sums: list[_Flow] = field(default_factory=list)
    """Sums of this tensor and another one."""
    rectified: bool = False
    others: int = 0
    """Number of readers of any other kind."""


class _Watch(TorchFunctionMode):
    """Follows tensors through one forward pass, but not inside layers and norms."""

    def __init__(self) -> None:
        super().__init__()
        self.flows: list[_Flow] = []
        self.by_id: dict[int, _Flow] = {}
        self.alive: list[Tensor] = []  # an id is valid only while its tensor lives
        self.inside: list[nn.Module] = []
        self.calls: list[nn.Module] = []
        self.read_elsewhere: set[int] = set()
        """ids of parameters that code outside of their own module reads."""

    def flow(self, tensor: Tensor) -> _Flow:
        """Return the record of a tensor."""
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
        """Forward pre-hook."""
        read = first_tensor(args, kwargs)
        if not self.inside and read is not None:
            self.calls.append(module)
            flow = self.flow(read)
            if not isinstance(module, Shortcut):
                flow.readers.append(module)
        self.inside.append(module)

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook."""
        self.inside.pop()
        if self.inside or not isinstance(output, Tensor):
            return
        read = first_tensor(args, kwargs)
        if isinstance(module, Shortcut) and read is not None:
            self._start(output, self.flow(read))  # the same sum: an earlier migration added this module
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
    """Whether `result` is a view of `tensor` with the same last axis, both contiguous."""
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
    """Whether a module is a BatchNorm2d, LayerNorm or RMSNorm (of any library): a weight, perhaps a bias, no more."""
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
    # A weight that is tied to an embedding, or that a function reads, cannot absorb a scale.
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
        # Shared and computed (weight norm) parameters cannot be divided.
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
    """Return the LayerNorm or RMSNorm that is the only reader of a sum, if there is one."""
    if len(total.readers) != 1 or total.others or total.sums or total.rectified:
        return None
    norm = total.readers[0]
    return norm if is_norm(norm) and not isinstance(norm, nn.BatchNorm2d) else None


def _add_up(
    targets: list[nn.Module | None], reader: nn.Module, watched: _Watch, names: Mapping[nn.Module, str], taken: set[str]
) -> bool:
    """Whether each target is a norm without a shortcut yet, and is called after `reader`."""
    norms = [target for target in targets if target is not None]
    free = {names[norm] for norm in norms} - taken
    calls = watched.calls
    return len(free) == len(targets) and all(calls.index(norm) > calls.index(reader) for norm in norms)


def _called_once(watched: _Watch, *modules: nn.Module | None) -> bool:
    """Whether each module, and each weight, is used only once in the pass."""
    weights = {id(module.weight) for module in modules if module is not None}
    calls = sum(1 for flow in watched.flows if flow.source is not None and id(flow.source.weight) in weights)
    return calls == len({module for module in modules if module is not None})


def scaled_parameters(source: nn.Module) -> list[Any]:
    """Return the parameters that are divided if the source absorbs a scale: weight, and bias if there is one."""
    return [part for part in (source.weight, getattr(source, "bias", None)) if part is not None]


def _channels_last(source: nn.Module, example: Tensor | None) -> bool:
    """Whether the source's channels are the last axis of its output, as a Linear reads it, not the second."""
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
    """Whether the output is linear in weight and bias; it is not if a norm multiplies by 1 + weight."""
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

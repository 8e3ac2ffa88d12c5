"""What one example costs a model: a record per quantizable layer, counted by running the model once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from quant.analysis.tied import tied_groups, tied_layers
from quant.convert import find_layers, run_model
from quant.module_utils import evaluating
from quant.quant_experts import ExpertLinear
from quant.transforms.unfold import unfold

ExampleInputs: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any]
"""What the model is called with: model(tensor), model(*list or tuple) or model(**mapping)."""


_KINDS = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d, "experts": ExpertLinear}


@dataclass(frozen=True)
class LayerProfile:
    """One quantizable layer. MACs and positions are per example, summed over the layer's calls."""

    name: str
    macs: int
    """multiply-accumulates of weights with activations: params x positions; of experts, those of one x positions"""
    params: int
    """weights, without the bias"""
    positions: int
    """output positions: tokens (of experts, once for each that a token is sent to), or pixels of the output map"""
    channels: int
    """output channels, each with a weight scale of its own"""
    kind: str
    """'linear' (also GPT-2's Conv1D), 'experts', 'conv1d', 'conv2d' or 'conv3d'"""
    calls: int
    """times one forward pass runs the layer; 0 where the model reads the weight without calling the layer"""
    attention: int = 0
    """multiply-accumulates of activations with activations that are charged to this layer, see `profile_model`"""
    tied_to: str | None = None
    """an earlier layer that has the same weight: `params` is 0 here then, since it is charged there"""


def profile_model(
    model: nn.Module,
    example_inputs: ExampleInputs,
    names: Collection[str] | None = None,
    charge_attention: bool = False,
) -> list[LayerProfile]:
    """The profile of every quantizable layer, or of those in `names`, in module order, from one forward pass.

    The model is taken apart as `quantize_model` would, see `quant.transforms.unfold`.
    It runs in eval mode without gradients, on real or meta tensors. Counts are divided by the batch: the first
    dimension of the first input that has two or more. With `charge_attention`, the products of `attention_macs` are
    shared out evenly among the layers of the smallest module around each product, so that costs stay additive.
    Raises ValueError for a name that is no quantizable layer and for positions that the batch does not divide.
    """
    layers = find_layers(unfold(model))
    if unknown := sorted(set(names or ()) - layers.keys()):
        raise ValueError(f"not quantizable layers of {type(model).__name__}: {', '.join(unknown)}")
    layers = {name: layer for name, layer in layers.items() if names is None or name in names}
    positions, calls = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)

    def count(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, _: Any, output: Tensor) -> None:
            if module is not layers[name]:  # one that was replaced shares its hooks, and the model still calls it
                return
            # The output knows what stride, padding, dilation and their subclasses' own arithmetic came to.
            positions[name] += output.numel() // _channels(module)
            calls[name] += 1

        return hook

    handles = [layer.register_forward_hook(count(name)) for name, layer in layers.items()]
    try:
        _run(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()

    batch = _batch_size(example_inputs)
    if uneven := [name for name, total in positions.items() if total % batch]:
        raise ValueError(f"positions of {uneven[0]} do not divide by the batch of {batch}: profile with one example")
    tied = tied_layers(layers)
    params = {name: cast(Tensor, layer.weight).numel() for name, layer in layers.items()}
    attention = _share(_attention_by_module(model, example_inputs), list(layers)) if charge_attention else {}
    return [
        LayerProfile(
            name=name,
            macs=params[name] // experts_of(layer) * positions[name] // batch,
            params=0 if name in tied else params[name],
            positions=positions[name] // batch,
            channels=_channels(layer) * experts_of(layer),
            kind=next((name for name, kind in _KINDS.items() if isinstance(layer, kind)), "linear"),
            calls=calls[name],
            tied_to=tied.get(name),
            attention=attention.get(name, 0),
        )
        for name, layer in layers.items()
    ]


def tied_in(profiles: Sequence[LayerProfile]) -> list[list[str]]:
    """Layers that share a weight, together."""
    return tied_groups({profile.name: profile.tied_to for profile in profiles})


def attention_macs(model: nn.Module, example_inputs: ExampleInputs) -> int:
    """Multiply-accumulates per example of activations with activations: Q K^T, A V and any other batched product.

    Masks are not looked at: a causal model counts the full square, as the kernels compute it.
    """
    return _attention_by_module(model, example_inputs).get("", 0)


def _attention_by_module(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, int]:
    """Dotted module name ('' is the model) -> MACs per example of the batched products inside it."""
    # The math backend spells attention out as two batched products, which every device and head layout counts alike.
    # The fused path of nn.MultiheadAttention hides them.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            _run(model, example_inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    products = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)
    flops_per_mac = 2 * _batch_size(example_inputs)
    return {
        name.partition(".")[2]: sum(flops.get(product, 0) for product in products) // flops_per_mac
        for name, flops in counter.get_flop_counts().items()
        if name != "Global"
    }


def _share(inside: Mapping[str, int], layers: Sequence[str]) -> dict[str, int]:
    """MACs inside each module, shared out among `layers`: layer name -> whole number, with the same total."""
    shares = dict.fromkeys(layers, 0)
    for module in sorted(inside, key=lambda name: len(name.split(".")) if name else 0, reverse=True):
        around = [name for name in layers if not module or name == module or name.startswith(f"{module}.")]
        rest = inside[module] - sum(shares[name] for name in around)
        for index, name in enumerate(around):
            shares[name] += rest // len(around) + (index < rest % len(around))
    return shares


def experts_of(layer: nn.Module) -> int:
    """Matrices in its weight, each of which computes some of the positions."""
    return layer.experts if isinstance(layer, ExpertLinear) else 1


def _channels(layer: nn.Module) -> int:
    """Output channels of a Conv2d, a Linear, a transformers Conv1D or an expert."""
    return next(getattr(layer, name) for name in ("out_channels", "out_features", "nf") if hasattr(layer, name))


def _batch_size(example_inputs: ExampleInputs) -> int:
    if isinstance(example_inputs, Tensor):
        example_inputs = [example_inputs]
    values = example_inputs.values() if isinstance(example_inputs, Mapping) else example_inputs
    return next((value.shape[0] for value in values if isinstance(value, Tensor) and value.dim() > 1), 1)


def _run(model: nn.Module, example_inputs: ExampleInputs) -> None:
    """One forward pass in eval mode."""
    with torch.no_grad(), evaluating(model):
        run_model(model, example_inputs)

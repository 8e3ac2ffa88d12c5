"""Profile a model: a record per quantizable layer with its MACs and weights, counted in one forward pass."""

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
from quant.transforms.kv_cache import CachedAttention
from quant.transforms.unfold import unfold

ExampleInputs: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any]
"""Inputs of a model, called as model(tensor), model(*list or tuple) or model(**mapping)."""


_KINDS = {
    "embedding": nn.Embedding,
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "experts": ExpertLinear,
}


@dataclass(frozen=True)
class FileShare:
    """What a layer takes in a packed file besides the codes of its weight."""

    scales: int
    """Weight scales, in float32; 0 for a weight that is stored with an earlier layer."""
    zero_points: bool = False
    """Whether integer weights have a zero point, in int16, beside each scale."""
    input_range: bool = True
    """Whether the file holds the range of the input: a scale in float32 and, for integers, a zero point."""
    rest: int = 0
    """16-bit numbers of the model outside of its layers, charged to one of them so that costs stay additive."""


@dataclass(frozen=True)
class LayerProfile:
    """One quantizable layer; MACs and positions are per example, summed over the layer's calls."""

    name: str
    macs: int
    """Multiply-accumulates of weights with activations: params x positions; for experts, params of one x positions; an
    embedding has none."""
    params: int
    """Number of weights, without the bias."""
    positions: int
    """Output positions: tokens (for experts, counted once per expert that a token is routed to), or output pixels."""
    channels: int
    """Number of output channels, each of which has a weight scale."""
    kind: str
    """'linear' (also GPT-2's Conv1D), 'experts', 'conv1d', 'conv2d', 'conv3d' or 'embedding'."""
    calls: int
    """Number of calls in a forward pass; 0 if the model reads the weight without calling the layer."""
    attention: int = 0
    """Multiply-accumulates of activations with activations charged to this layer, see `profile_model`."""
    tied_to: str | None = None
    """An earlier layer with the same weight; `params` is 0 then, since the weight is charged there."""
    file: FileShare | None = None
    """With it, the memory of all layers is the size of a packed file, see `cost.file_scope`; None: of weights alone."""
    engine: str | None = None
    """Engine whose file the weights are charged in (`quant.engines.table`); None: by their formats alone."""


def macs_share(sized: LayerProfile, whole: LayerProfile) -> float:
    """Return the multiply-accumulates of a narrower layer over those of the whole one, in [0, 1]."""
    return sized.macs / whole.macs if whole.macs else 1.0


def profile_model(
    model: nn.Module,
    example_inputs: ExampleInputs,
    names: Collection[str] | None = None,
    charge_attention: bool = False,
) -> list[LayerProfile]:
    """Profile the quantizable layers of a model in one forward pass, in eval mode without gradients.

    Attention and experts are unfolded first, as `quantize_model` does, see `quant.transforms.unfold`.

    Args:
        model: The model, on any device, meta included.
        example_inputs: Its inputs. Counts are divided by the batch size, which is the first dimension of the first
            input with two or more dimensions.
        names: Names of the layers to profile, embeddings among them; None: all quantizable layers but embeddings.
        charge_attention: Whether to distribute the products of `attention_macs` evenly over the layers of the smallest
            module around each product, so that costs stay additive.

    Returns:
        The profiles in module order.

    Raises:
        ValueError: For a name that is no quantizable layer, and if positions are not a multiple of the batch size.
    """
    layers = find_layers(unfold(model), tables=names is not None)
    if unknown := sorted(set(names or ()) - layers.keys()):
        raise ValueError(f"not quantizable layers of {type(model).__name__}: {', '.join(unknown)}")
    layers = {name: layer for name, layer in layers.items() if names is None or name in names}
    positions, calls = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)

    def count(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, _: Any, output: Tensor) -> None:
            if module is not layers[name]:  # a layer that was replaced shares its hooks and may still be called
                return
            # Counting on the output accounts for stride, padding, dilation and subclasses' own arithmetic.
            positions[name] += output.numel() // (output.shape[-1] if _is_table(module) else channels_of(module))
            calls[name] += 1

        return hook

    handles = [layer.register_forward_hook(count(name)) for name, layer in layers.items()]
    try:
        _run(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()

    batch = _batch_size(example_inputs)
    tables = {name for name, layer in layers.items() if _is_table(layer)}  # one of positions is read once per batch
    if uneven := [name for name, total in positions.items() if total % batch and name not in tables]:
        raise ValueError(f"positions of {uneven[0]} do not divide by the batch of {batch}: profile with one example")
    tied = tied_layers(layers)
    params = {name: cast(Tensor, layer.weight).numel() for name, layer in layers.items()}
    attention = _share(_attention_by_module(model, example_inputs), list(layers)) if charge_attention else {}
    return [
        LayerProfile(
            name=name,
            macs=0 if name in tables else params[name] // experts_of(layer) * positions[name] // batch,
            params=0 if name in tied else params[name],
            positions=positions[name] // batch,
            channels=channels_of(layer) * experts_of(layer),
            kind=next((name for name, kind in _KINDS.items() if isinstance(layer, kind)), "linear"),
            calls=calls[name],
            tied_to=tied.get(name),
            attention=attention.get(name, 0),
        )
        for name, layer in layers.items()
    ]


def cache_profile(attention: CachedAttention, tokens: int) -> LayerProfile:
    """Return the profile of a cache of keys and values: its values are charged like weights, and compute nothing.

    Args:
        attention: The attention that reads the cache.
        tokens: Tokens in the cache.
    """
    vectors = attention.heads * tokens
    return LayerProfile(attention.name, 0, attention.values * tokens, tokens, vectors, "kv_cache", calls=1)


def tied_in(profiles: Sequence[LayerProfile]) -> list[list[str]]:
    """Return lists of layers that share a weight."""
    return tied_groups({profile.name: profile.tied_to for profile in profiles})


def tables_in(profiles: Sequence[LayerProfile]) -> list[str]:
    """Return the embeddings."""
    return [profile.name for profile in profiles if profile.kind == "embedding"]


def attention_macs(model: nn.Module, example_inputs: ExampleInputs) -> int:
    """Count multiply-accumulates per example of activations with activations: Q K^T, A V and other batched products.

    Masks are ignored: a causal model counts the full square, as the kernels compute it.

    Args:
        model: The model.
        example_inputs: Its inputs, see `profile_model`.
    """
    return _attention_by_module(model, example_inputs).get("", 0)


def _attention_by_module(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, int]:
    """Return module name ('' is the model) -> MACs per example of the batched products inside it."""
    # The math backend computes attention as two batched products, so that counts are the same on every device and for
    # every layout of heads. The fused path of nn.MultiheadAttention hides them.
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
    """Distribute the MACs inside each module over layers: layer name -> integer, with the same total."""
    shares = dict.fromkeys(layers, 0)
    for module in sorted(inside, key=lambda name: len(name.split(".")) if name else 0, reverse=True):
        around = [name for name in layers if not module or name == module or name.startswith(f"{module}.")]
        rest = inside[module] - sum(shares[name] for name in around)
        for index, name in enumerate(around):
            shares[name] += rest // len(around) + (index < rest % len(around))
    return shares


def experts_of(layer: nn.Module) -> int:
    """Return the number of matrices in a layer's weight, each of which computes some of the positions."""
    return layer.experts if isinstance(layer, ExpertLinear) else 1


def channels_of(layer: nn.Module) -> int:
    """Return the channels with a weight scale: output channels, or the rows of an embedding."""
    names = ("out_channels", "out_features", "nf", "num_embeddings")
    return next(getattr(layer, name) for name in names if hasattr(layer, name))


def _is_table(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Embedding)


def _batch_size(example_inputs: ExampleInputs) -> int:
    if isinstance(example_inputs, Tensor):
        example_inputs = [example_inputs]
    values = example_inputs.values() if isinstance(example_inputs, Mapping) else example_inputs
    return next((value.shape[0] for value in values if isinstance(value, Tensor) and value.dim() > 1), 1)


def _run(model: nn.Module, example_inputs: ExampleInputs) -> None:
    """Run a forward pass in eval mode."""
    with torch.no_grad(), evaluating(model):
        run_model(model, example_inputs)

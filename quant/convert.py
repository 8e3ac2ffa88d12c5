"""From a float model to one whose layers can switch formats, in place, for any nn.Module."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from fnmatch import fnmatchcase
from functools import cache, partial
from glob import escape
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from quant.analysis.float_share import float_share
from quant.analysis.reach import note_reach
from quant.analysis.tied import differing, share_quantizers, tied_layers
from quant.errors import NotFiniteError, UserError
from quant.formats import FLOAT, Format
from quant.module_utils import evaluating
from quant.quant_conv2d import QuantConv1d, QuantConv2d, QuantConv3d
from quant.quant_experts import ExpertLinear, QuantExpertLinear
from quant.quant_linear import QuantConv1D, QuantLinear
from quant.quant_module import QuantModule
from quant.quantizers.quantizer import ACTIVATION, WEIGHT, QuantizerConfig, all_finite
from quant.quantizers.weight_cache import RoundedWeightCache
from quant.transforms.unfold import UnfoldedAttention, unfold

logger = logging.getLogger(__name__)

QUANTIZED: dict[type[nn.Module], type[QuantModule]] = {
    nn.Linear: QuantLinear,
    nn.Conv2d: QuantConv2d,
    nn.Conv1d: QuantConv1d,
    nn.Conv3d: QuantConv3d,
    Conv1D: QuantConv1D,
    ExpertLinear: QuantExpertLinear,
}
"""float layer -> quantized layer; subclasses of the float layer are covered by the same entry"""

Assignment = Mapping[str, tuple[Format, Format]]
"""layer name -> (weight format, activation format)"""


def find_layers(
    model: nn.Module, include: Collection[str] | None = None, exclude: Collection[str] | None = None
) -> dict[str, nn.Module]:
    """The layers of `model` that can be quantized, by dotted name, in module order, each once.

    Args:
        include: globs over layer names; None is all but adapters, see `adapter_layers`.
        exclude: globs over layer names to leave out; it wins over include.

    Raises UserError for a glob that matches no layer. Attention and experts have layers only once they are taken apart,
    see `quant.transforms.unfold`: `quantize_model` and `cost.profile.profile_model` do so first.
    """
    known: tuple[type[nn.Module], ...] = tuple(QUANTIZED)
    hidden = _hidden(model)
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, known) and name not in hidden
    }
    adapters = adapter_layers(model, layers) if include is None else ()
    for pattern in (*(include or ()), *(exclude or ())):
        if layers and not any(fnmatchcase(name, pattern) for name in layers):
            raise UserError(
                f"pattern {pattern!r} matches no layer; layers are named like {', '.join(list(layers)[:3])}"
            )
    return {
        name: module
        for name, module in layers.items()
        if (name not in adapters if include is None else _matches(name, include)) and not _matches(name, exclude or ())
    }


def adapter_layers(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of these layers that belong to a LoRA adapter: `lora_A` and `lora_B` of one module, or inside them.

    Adapters are small, are trained on top of a frozen layer, and are merged into it or swapped: they stay in float
    unless asked for.
    """
    pairs = [name for name, module in model.named_modules() if hasattr(module, "lora_A") and hasattr(module, "lora_B")]
    parts = tuple(f"{name}.{part}".lstrip(".") for name in pairs for part in ("lora_A", "lora_B"))
    return [name for name in names if name in parts or name.startswith(tuple(f"{part}." for part in parts))]


def _warn_of_float(model: nn.Module, layers: Collection[str], exclude: Collection[str]) -> None:
    """Of weights that no layer holds which can be quantized; the user knows of those that `exclude` names."""
    adapters = adapter_layers(model, dict(model.named_modules()))
    adapters = [name for name in adapters if "weight" in model.get_submodule(name)._parameters]
    if adapters:
        logger.warning(
            "%d layers of LoRA adapters stay in float: %s%s; name them in `include` to quantize them",
            len(adapters), ", ".join(adapters[:3]), ", ..." if len(adapters) > 3 else "",
        )  # fmt: skip
    found = float_share(model, [*layers, *adapters, *(find_layers(model, exclude) if exclude else ())])
    if found.left:
        logger.warning("%s; linear layers and convolutions are quantized", found)


def _hidden(model: nn.Module) -> set[str]:
    """Layers whose weights are read past them: within attention that cannot be taken apart."""
    return {
        f"{name}.out_proj".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) and not isinstance(module, UnfoldedAttention)
    }


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def from_float(
    layer: nn.Module, weight: QuantizerConfig = WEIGHT, activation: QuantizerConfig = ACTIVATION
) -> QuantModule:
    """A quantized layer that shares the float layer's parameters, hooks and settings; in float until `set_formats`."""
    float_class: Any = type(layer)
    module = _blank(float_class)
    # Copying the state, rather than constructing, keeps what subclasses of Conv2d and Linear add to it.
    module.__dict__.update(layer.__dict__)
    for registry in ("_parameters", "_buffers", "_modules"):
        module.__dict__[registry] = dict(layer.__dict__[registry])
    module.add_quantizers(weight, activation)
    return module.train(layer.training)


def _blank(float_class: Any) -> QuantModule:
    quant_class = _quant_class(float_class)
    return quant_class.__new__(quant_class)


@cache
def _quant_class(float_class: Any) -> type[QuantModule]:
    base = next(known for known in float_class.__mro__ if known in QUANTIZED)
    quant_class = QUANTIZED[base]
    if float_class is base:
        return quant_class
    members: dict[str, Any] = {"__module__": quant_class.__module__, "own": float_class, "__reduce_ex__": _reduce}
    if float_class.forward is not base.forward:  # a forward of its own, such as timm's "same" padding
        members |= {"compute": _compute_with_own_forward, "weight": _RoundedWeight(float_class)}
        members["differentiable"] = False
    return type(f"Quant{float_class.__name__}", (quant_class, float_class), members)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """How a user's pickle names a class that was made here, and that no module holds: by what it was made of."""
    return _blank, (self.own,), self.__getstate__()


def _compute_with_own_forward(self: Any, input: Tensor, weight: Tensor) -> Tensor:
    """`compute` for a layer that brings its own forward: that forward runs, and reads the rounded weight."""
    self.__dict__["rounded_weight"] = weight
    try:
        return self.own.forward(self, input)
    finally:
        del self.__dict__["rounded_weight"]


class _RoundedWeight:
    """The attribute `weight` of such a layer: rounded within `compute`, else the layer's own, however it holds it."""

    def __init__(self, float_class: type[nn.Module]) -> None:
        self.parametrized = getattr(float_class, "weight", None)  # the property of torch's parametrizations

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        if layer is None:
            return self
        state = layer.__dict__
        if "rounded_weight" in state:
            return state["rounded_weight"]
        if self.parametrized is not None:
            return self.parametrized.__get__(layer)
        return state["weight"] if "weight" in state else layer._parameters["weight"]

    def __set__(self, layer: Any, value: Any) -> None:
        if self.parametrized is not None:
            self.parametrized.__set__(layer, value)
        else:  # a plain tensor, as torch.nn.utils.weight_norm sets before every forward
            layer.__dict__["weight"] = value


def quantize_model(
    model: nn.Module,
    include: Collection[str] | None = None,
    exclude: Collection[str] | None = None,
    *,
    formats: Iterable[Format] = (),
    weight: QuantizerConfig = WEIGHT,
    activation: QuantizerConfig = ACTIVATION,
) -> dict[str, QuantModule]:
    """Replace the layers of any model, in place, by layers whose formats can be switched. They start in float.

    Attention and experts that read several weights at once are taken apart before, see `quant.transforms.unfold`.

    Args:
        include, exclude: globs over layer names, see `find_layers`.
        formats: the formats that will be used. Their learned scales then exist, for an optimizer made afterwards.
        weight, activation: how scales are found.

    Layers that share a weight share the quantizer that rounds it. Returns the quantized layers by name. Raises
    UserError if there is nothing to quantize.
    """
    layers = find_layers(unfold(model), include, exclude)
    if not layers:
        raise UserError(
            f"{type(model).__name__} holds no layer to quantize: no linear layer or convolution is left "
            f"with include={include} and exclude={exclude}"
        )
    if "" in layers:
        raise UserError("the model is itself a single layer and cannot be replaced in place; put it into nn.Sequential")
    if lazy := [name for name, layer in layers.items() if isinstance(layer.weight, nn.UninitializedParameter)]:
        raise UserError(f"layer {lazy[0]} is lazy and has no weight yet; run the model once before quantizing it")
    if include is None:
        _warn_of_float(model, layers, exclude or ())
    quantized = {
        name: layer if isinstance(layer, QuantModule) else from_float(layer, weight, activation)
        for name, layer in layers.items()
    }
    replacement = {layer: quantized[name] for name, layer in layers.items()}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacement:
                parent._modules[name] = replacement[child]
    share_quantizers(model)
    if any(isinstance(module, nn.TransformerEncoderLayer) for module in model.modules()):
        # Its inference fast path reads the weights past the layers, and would run them in float.
        torch.backends.mha.set_fastpath_enabled(False)
    for module in quantized.values():
        for format in formats:
            module.weight_quantizer.prepare(format)
            module.input_quantizer.prepare(format)
    return quantized


def describe_quantizers(modules: Mapping[str, QuantModule]) -> dict[str, Any]:
    """How scales are found, as JSON: `weight` and `activation` of the first layer, `others` that differ by name."""
    own = {
        name: {"weight": asdict(m.weight_quantizer.config), "activation": asdict(m.input_quantizer.config)}
        for name, m in modules.items()
    }
    first = next(iter(own.values()), {"weight": None, "activation": None})
    return {**first, "others": {name: configs for name, configs in own.items() if configs != first}}


def quantize_as_described(
    model: nn.Module, layers: Iterable[str], described: Mapping[str, Any], formats: Iterable[Format] = ()
) -> dict[str, QuantModule]:
    """Quantize these layers of a float model, in place, as `describe_quantizers` told of another one."""
    others, formats = described.get("others", {}), list(formats)
    made: dict[str, QuantModule] = {}
    for name in layers:
        own = others.get(name, described)
        weight, activation = QuantizerConfig(**own["weight"]), QuantizerConfig(**own["activation"])
        made |= quantize_model(model, [escape(name)], formats=formats, weight=weight, activation=activation)
    return made


def set_formats(modules: Mapping[str, QuantModule], assignment: Assignment) -> None:
    """Switch the layers named in the assignment to its formats. Raises KeyError for a layer that is not there.

    Layers that share a weight share its format: where they are given different ones, the last counts.
    """
    for name, (weight, activation) in assignment.items():
        modules[name].set_formats(weight, activation)


def check_tied(modules: Mapping[str, nn.Module], assignment: Assignment) -> None:
    """Raises UserError for layers that share a weight and are given different formats for it."""
    if names := differing(tied_layers(modules), {name: weight for name, (weight, _) in assignment.items()}):
        told = " and ".join(f"{name} ({assignment[name][0]})" for name in names)
        raise UserError(f"layers {told} share one weight, which has one format")


def get_formats(modules: Mapping[str, QuantModule]) -> dict[str, tuple[Format, Format]]:
    """The assignment as set now."""
    return {name: module.formats for name, module in modules.items()}


@contextmanager
def in_float(modules: Mapping[str, QuantModule]) -> Iterator[None]:
    """Within, every layer runs in float; the formats come back after."""
    before = get_formats(modules)
    set_formats(modules, dict.fromkeys(modules, (FLOAT, FLOAT)))
    try:
        yield
    finally:
        set_formats(modules, before)


@contextmanager
def rounded_weights_cached(modules: Mapping[str, QuantModule]) -> Iterator[None]:
    """Within, forward passes without gradients round each weight once, not once a batch; the same values, bit by bit.

    Weights may change within, through the optimizer or `load_state_dict`, but not through `.data`.
    """
    for module in modules.values():
        module.rounded_weight_cache = RoundedWeightCache()
    try:
        yield
    finally:
        for module in modules.values():
            module.rounded_weight_cache = None


def calibrate(
    model: nn.Module, modules: Mapping[str, QuantModule], batches: Iterable[Any], *, learned: bool = True
) -> None:
    """Choose the ranges of every prepared format from batches of data.

    The layers run in the formats they are set to: float at first; recalibrated under an assignment, what each layer
    sees under it. The model runs in eval mode, its mode comes back after.

    Args:
        batches: what the model takes: a mapping (keyword arguments), a tuple (positional ones) or a tensor.
        learned: also reset the learned scales, which is how they start; False leaves them as trained.

    A layer that no batch reaches runs in float as far as it has to from then on, see `quant.analysis.reach`.

    Raises UserError if there is no batch, NotFiniteError for a layer whose weight or input holds NaN or infinity.
    """
    for name, module in modules.items():
        if module.weight_quantizer.grids and not all_finite(module.weight):
            raise NotFiniteError(f"layer {name}: its weight holds NaN or infinity, which no range spans")
    first: list[Any] = []
    observe_inputs(model, modules, _keeping(first, batches))
    note_reach(model, modules, partial(_evaluate, model, first))
    for module in modules.values():
        module.weight_quantizer.observe(module.weight)
        for quantizer in (module.weight_quantizer, *module.activation_quantizers):
            quantizer.finish_calibration(again=learned or quantizer.config.range != "learned")


def _keeping(first: list[Any], batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, of which `first` gets the first."""
    for batch in batches:
        if not first:
            first.append(batch)
        yield batch


def _evaluate(model: nn.Module, batches: Iterable[Any]) -> None:
    with torch.no_grad(), evaluating(model):
        for batch in batches:
            run_model(model, batch)


def observe_inputs(model: nn.Module, modules: Mapping[str, QuantModule], batches: Iterable[Any]) -> None:
    """Show every layer's input to its quantizer, in eval mode: what `calibrate` chooses activation ranges from.

    Raises UserError if there is no batch, NotFiniteError for a layer whose input holds NaN or infinity.
    """
    quantizers = [quantizer for module in modules.values() for quantizer in module.activation_quantizers]
    unpadded = [quantizer for quantizer in quantizers if quantizer.config.ignore_padding]
    empty = True
    for module in modules.values():
        module.observing, module.most_seen = True, -1
    try:
        with torch.no_grad(), evaluating(model):
            for batch in batches:
                empty = False
                if unpadded:
                    batch, masks = _with_masks(model, batch)
                    for quantizer in unpadded:
                        quantizer.real_tokens = masks
                run_model(model, batch)
    finally:
        for module in modules.values():
            module.observing = False
        for quantizer in unpadded:
            quantizer.real_tokens = ()
    if empty:
        raise UserError("the calibration set is empty: ranges need at least one batch of training data")
    for name, module in modules.items():  # the first of them is where it began
        if not all(quantizer.saw_finite for quantizer in module.activation_quantizers):
            for quantizer in quantizers:
                quantizer.forget()
            raise NotFiniteError(
                f"layer {name}: its input holds NaN or infinity on calibration data, which no range spans"
            )


def _with_masks(model: nn.Module, batch: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """The batch, and which tokens of the sequences in it are real: bool (B, T) each, told apart by their shapes.

    Where what a decoder writes is as long as what the encoder reads, the latter gets one more token of padding.
    """
    real = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if real is None:
        return batch, ()
    written = batch.get("decoder_attention_mask")
    if written is None and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        labels = batch.get("labels")
        written = labels >= 0 if isinstance(labels, Tensor) and labels.dim() == 2 else None
    if written is None:
        return batch, (real.bool(),)
    if written.shape == real.shape:
        longer = {name: functional.pad(batch[name], (0, 1)) for name in ("input_ids", "attention_mask")}
        batch, real = {**batch, **longer}, longer["attention_mask"]
    return batch, (real.bool(), written.bool())


def run_model(model: nn.Module, batch: Any) -> Any:
    """model(batch), however the batch is packed."""
    if isinstance(batch, Mapping):
        return model(**_understood(model, batch))
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _understood(model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch without labels that `forward` has no place for: a loss function beside the model takes those."""
    if "labels" not in batch or _takes_labels(getattr(model.forward, "__func__", model.forward)):
        return batch
    return {name: value for name, value in batch.items() if name != "labels"}


@cache
def _takes_labels(forward: Any) -> bool:
    taken = inspect.signature(forward).parameters.values()
    return any(one.name == "labels" or one.kind is one.VAR_KEYWORD for one in taken)

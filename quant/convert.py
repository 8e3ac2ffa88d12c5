"""Convert the layers of any nn.Module, in place, to layers whose formats can be switched; calibrate them."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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
from quant.formats import FLOAT, Format, GroupFormat
from quant.mapped_weights import is_mapped
from quant.module_utils import evaluating
from quant.quant_conv2d import QuantConv1d, QuantConv2d, QuantConv3d
from quant.quant_embedding import QuantEmbedding, is_table
from quant.quant_experts import ExpertLinear, QuantExpertLinear
from quant.quant_linear import QuantConv1D, QuantLinear
from quant.quant_module import QuantModule
from quant.quantizers.quantizer import ACTIVATION, WEIGHT, QuantizerConfig, all_finite
from quant.quantizers.weight_cache import RoundedWeightCache
from quant.quantizers.weighted_mse import InputSketch
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
"""Float layer -> quantized layer; an entry also covers subclasses of the float layer."""
TABLES: dict[type[nn.Module], type[QuantModule]] = {nn.Embedding: QuantEmbedding}
"""The same for layers that are quantized only where they are asked for, see `find_layers`."""

Assignment = Mapping[str, tuple[Format, Format]]
"""Layer name -> (weight format, activation format)."""


def find_layers(
    model: nn.Module,
    include: Collection[str] | None = None,
    exclude: Collection[str] | None = None,
    tables: bool = False,
) -> dict[str, nn.Module]:
    """Find the layers that can be quantized.

    The weights of attention and experts are layers only after `quant.transforms.unfold`, which `quantize_model` and
    `cost.profile.profile_model` call first.

    Args:
        model: Any model.
        include: Globs over layer names; None: all layers but those of adapters, see `adapter_layers`.
        exclude: Globs over layer names to leave out; takes precedence over include.
        tables: Whether embeddings are layers like others; else only those whose whole name is in `include` are.

    Returns:
        The layers by dotted name, in module order, each once.

    Raises:
        UserError: For a glob that matches no layer.
    """
    known: tuple[type[nn.Module], ...] = tuple(QUANTIZED)
    hidden = _hidden(model)
    named = set(include or ())
    layers = {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, known) and name not in hidden)
        or ((tables or not named.isdisjoint({name, escape(name)})) and is_table(module))
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
    """Select the layers of LoRA adapters: `lora_A` and `lora_B` of the same module, and layers inside them.

    Adapters are small, are trained on top of a frozen layer and are later merged or swapped, so they stay in float
    unless the user includes them.

    Args:
        model: The model.
        names: Layer names to select from.

    Returns:
        The adapters' layers among the names.
    """
    pairs = [name for name, module in model.named_modules() if hasattr(module, "lora_A") and hasattr(module, "lora_B")]
    parts = tuple(f"{name}.{part}".lstrip(".") for name in pairs for part in ("lora_A", "lora_B"))
    return [name for name in names if name in parts or name.startswith(tuple(f"{part}." for part in parts))]


def _warn_of_float(model: nn.Module, layers: Collection[str], exclude: Collection[str]) -> None:
    """Warn about weights that stay in float although the user has not excluded them."""
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
    """Names of layers that are never called: those in attention modules that cannot be unfolded."""
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
    """Convert one layer; it runs in float until `set_formats`.

    Args:
        layer: A layer whose class, or a base class of it, is in `QUANTIZED` or `TABLES`.
        weight: How the weight's scales are computed.
        activation: How the input's scales are computed.

    Returns:
        A quantized layer that shares the float layer's parameters, buffers, hooks and settings.
    """
    float_class: Any = type(layer)
    module = _blank(float_class)
    # The state is copied, not constructed anew, to keep what subclasses of Conv2d and Linear add to it.
    module.__dict__.update(layer.__dict__)
    for registry in ("_parameters", "_buffers", "_modules"):
        module.__dict__[registry] = dict(layer.__dict__[registry])
    module.add_quantizers(weight, activation)
    return module.train(layer.training)


def _blank(float_class: Any) -> QuantModule:
    quant_class = quantized_class(float_class)
    return quant_class.__new__(quant_class)


@cache
def quantized_class(float_class: Any) -> type[QuantModule]:
    """Return the quantized class of a float class, or of a class derived from one."""
    classes = QUANTIZED | TABLES
    base = next(known for known in float_class.__mro__ if known in classes)
    quant_class = classes[base]
    if float_class is base:
        return quant_class
    members: dict[str, Any] = {"__module__": quant_class.__module__, "own": float_class, "__reduce_ex__": _reduce}
    if float_class.forward is not base.forward:  # a forward of its own, such as timm's "same" padding
        members |= {"compute": _compute_with_own_forward, "weight": _RoundedWeight(float_class)}
        members["differentiable"] = False
    return type(f"Quant{float_class.__name__}", (quant_class, float_class), members)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """Let users pickle an instance of a dynamic class: by its float class, since no module holds the class itself."""
    return _blank, (self.own,), self.__getstate__()


def _compute_with_own_forward(self: Any, input: Tensor, weight: Tensor) -> Tensor:
    """`compute` for a float class with a forward of its own: runs that forward, which reads the rounded weight."""
    self.__dict__["rounded_weight"] = weight
    try:
        return self.own.forward(self, input)
    finally:
        del self.__dict__["rounded_weight"]


class _RoundedWeight:
    """Descriptor for `weight` of such a class: the rounded weight within `compute`, else the layer's own."""

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
    """Replace the layers of any model, in place, by layers whose formats can be switched; they start in float.

    Attention and experts that read several weights at once are unfolded first, see `quant.transforms.unfold`. Layers
    that share a weight share the quantizer that rounds it.

    Args:
        model: The model; changed in place.
        include: Globs over layer names, see `find_layers`; an embedding is quantized if its whole name is among them.
        exclude: Globs over layer names, see `find_layers`.
        formats: Formats that will be used. Their learned scales are created now, before the optimizer is.
        weight: How weights' scales are computed.
        activation: How activations' scales are computed.

    Returns:
        The quantized layers by name.

    Raises:
        UserError: If there is nothing to quantize, or a layer cannot be replaced.
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
        # Its inference fast path reads the weights without calling the layers, and would run them in float.
        torch.backends.mha.set_fastpath_enabled(False)
    for module in quantized.values():
        for format in formats:
            module.weight_quantizer.prepare(format)
            if not isinstance(format, GroupFormat):
                module.input_quantizer.prepare(format)
    return quantized


def describe_quantizers(modules: Mapping[str, QuantModule]) -> dict[str, Any]:
    """Return the quantizers' configurations as JSON values.

    Args:
        modules: The quantized layers, by name.

    Returns:
        `weight` and `activation` of the first layer; `others`: name -> the same, for layers that differ from it.
    """
    own = {
        name: {"weight": asdict(m.weight_quantizer.config), "activation": asdict(m.input_quantizer.config)}
        for name, m in modules.items()
    }
    first = next(iter(own.values()), {"weight": None, "activation": None})
    return {**first, "others": {name: configs for name, configs in own.items() if configs != first}}


def quantize_as_described(
    model: nn.Module, layers: Iterable[str], described: Mapping[str, Any], formats: Iterable[Format] = ()
) -> dict[str, QuantModule]:
    """Quantize layers of a float model, in place, with the configurations that `describe_quantizers` returned.

    Args:
        model: The float model; changed in place.
        layers: Names of the layers.
        described: What `describe_quantizers` returned for another model with these layers.
        formats: Formats that will be used.

    Returns:
        The quantized layers by name.
    """
    others, formats = described.get("others", {}), list(formats)
    made: dict[str, QuantModule] = {}
    for name in layers:
        own = others.get(name, described)
        weight, activation = QuantizerConfig(**own["weight"]), QuantizerConfig(**own["activation"])
        made |= quantize_model(model, [escape(name)], formats=formats, weight=weight, activation=activation)
    return made


def set_formats(modules: Mapping[str, QuantModule], assignment: Assignment) -> None:
    """Switch the layers that an assignment names to its formats.

    Layers that share a weight share its format; if the assignment has several for it, the last one wins.

    Args:
        modules: The quantized layers, by name.
        assignment: Layer name -> (weight format, activation format); other layers keep their formats.

    Raises:
        UserError: For a layer that is not in `modules`; no format is changed then.
    """
    if unknown := next((name for name in assignment if name not in modules), None):
        close = difflib.get_close_matches(unknown, modules, n=3) or list(modules)[:3]
        raise UserError(f"unknown layer {unknown!r}; similar names: {', '.join(close)}")
    for name, (weight, activation) in assignment.items():
        modules[name].set_formats(weight, activation)


def check_tied(modules: Mapping[str, nn.Module], assignment: Assignment) -> None:
    """Check that an assignment has a single format for each weight.

    Args:
        modules: The layers, by name.
        assignment: Layer name -> (weight format, activation format).

    Raises:
        UserError: If layers that share a weight have different weight formats.
    """
    if names := differing(tied_layers(modules), {name: weight for name, (weight, _) in assignment.items()}):
        layers = " and ".join(f"{name} ({assignment[name][0]})" for name in names)
        raise UserError(f"layers {layers} share one weight, which has one format")


def get_formats(modules: Mapping[str, QuantModule]) -> dict[str, tuple[Format, Format]]:
    """Return the formats in use: layer name -> (weight format, activation format)."""
    return {name: module.formats for name, module in modules.items()}


@contextmanager
def in_float(modules: Mapping[str, QuantModule]) -> Iterator[None]:
    """Within, every layer runs in float; restores the formats on exit."""
    before = get_formats(modules)
    set_formats(modules, dict.fromkeys(modules, (FLOAT, FLOAT)))
    try:
        yield
    finally:
        set_formats(modules, before)


@contextmanager
def rounded_weights_cached(modules: Mapping[str, QuantModule]) -> Iterator[None]:
    """Within, forward passes without gradients round each weight once, not once per batch; results are bit-identical.

    Weights may change within, through an optimizer or `load_state_dict`, but not through `.data`. Those in mapped files
    are rounded once per batch all the same, since their rounded values would be in memory.
    """
    for module in modules.values():
        if not is_mapped(module.weight):
            module.rounded_weight_cache = RoundedWeightCache()
    try:
        yield
    finally:
        for module in modules.values():
            module.rounded_weight_cache = None


def calibrate(
    model: nn.Module,
    modules: Mapping[str, QuantModule],
    batches: Iterable[Any],
    *,
    learned: bool = True,
    watch: Callable[[Iterable[QuantModule]], Iterable[QuantModule]] = iter,
) -> None:
    """Choose the ranges of every prepared format from batches of data.

    The model runs in eval mode, with its layers in their current formats: float at first; to recalibrate under an
    assignment, set its formats before. Layers that no batch reaches stay in float from then on, as far as necessary:
    see `quant.analysis.reach`.

    Args:
        model: The quantized model.
        modules: Its quantized layers, by name.
        batches: Inputs of the model: mappings (keyword arguments), tuples (positional arguments) or tensors.
        learned: Whether to reset learned scales, too; False keeps their trained values.
        watch: Passes the layers on, one by one, while their ranges are chosen: a progress bar.

    Raises:
        UserError: If there is no batch.
        NotFiniteError: If the weight or the input of a layer holds NaN or infinity.
    """
    check_weights(modules)
    first: list[Any] = []
    with sketching_inputs(modules, learned):
        observe_inputs(model, modules, _keeping(first, batches))
        note_reach(model, modules, partial(_evaluate, model, first))
        for module in watch(modules.values()):
            module.weight_quantizer.observe(module.weight)
            for quantizer in (module.weight_quantizer, *module.activation_quantizers):
                quantizer.finish_calibration(again=learned or quantizer.config.range != "learned")


def check_weights(modules: Mapping[str, QuantModule]) -> None:
    """Raise NotFiniteError if the weight of a layer that has ranges holds NaN or infinity."""
    for name, module in modules.items():
        if module.weight_quantizer.grids and not all_finite(module.weight):
            raise NotFiniteError(f"layer {name}: its weight holds NaN or infinity, which no range spans")


@contextmanager
def sketching_inputs(modules: Mapping[str, QuantModule], learned: bool = True) -> Iterator[None]:
    """Within, `observe_inputs` also collects what observers of weights such as 'weighted_mse' know of the inputs.

    Args:
        modules: The quantized layers, by name.
        learned: Whether learned scales of weights will be set.
    """
    quantizers = [module.weight_quantizer for module in modules.values()]
    for quantizer in quantizers:
        if quantizer.wants_inputs and (learned or quantizer.config.range != "learned"):
            quantizer.inputs = InputSketch()
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.inputs = None


def _keeping(first: list[Any], batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches, and append the first one to `first`."""
    for batch in batches:
        if not first:
            first.append(batch)
        yield batch


def _evaluate(model: nn.Module, batches: Iterable[Any]) -> None:
    with torch.no_grad(), evaluating(model):
        for batch in batches:
            run_model(model, batch)


def observe_inputs(model: nn.Module, modules: Mapping[str, QuantModule], batches: Iterable[Any]) -> None:
    """Let the activation quantizers observe their tensors, in eval mode, as `calibrate` does before it sets ranges.

    Args:
        model: The quantized model.
        modules: Its quantized layers, by name.
        batches: Inputs of the model, see `calibrate`.

    Raises:
        UserError: If there is no batch.
        NotFiniteError: If the input of a layer holds NaN or infinity.
    """
    quantizers = [quantizer for module in modules.values() for quantizer in module.activation_quantizers]
    unpadded = [quantizer for quantizer in quantizers if quantizer.config.ignore_padding]
    sketches = [module.weight_quantizer.inputs for module in modules.values()]
    empty = True
    for module in modules.values():
        module.observing, module.most_seen = True, -1
    try:
        with torch.no_grad(), evaluating(model):
            for number, batch in enumerate(batches):
                empty = False
                for sketch in filter(None, sketches):
                    sketch.batch = number
                if unpadded:
                    batch, masks = with_masks(model, batch)
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
    for name, module in modules.items():  # in order: NaN spreads from the first layer that has it
        finite, known = (
            [quantizer.saw_finite for quantizer in module.activation_quantizers],
            module.weight_quantizer.inputs,
        )
        if not all(finite) or (known is not None and not known.is_finite):
            for quantizer in quantizers:
                quantizer.forget()
            raise NotFiniteError(
                f"layer {name}: its input holds NaN or infinity on calibration data, which no range spans"
            )


def with_masks(model: nn.Module, batch: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """Return the batch, and masks, bool (B, T), of the tokens that are not padding, for encoder and decoder.

    Layers are matched with masks by shape. If the encoder's sequences are as long as the decoder's, the encoder's get
    one more token of padding.
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
    """Call the model on a batch.

    Args:
        model: The model.
        batch: A mapping (keyword arguments), a tuple or list (positional arguments), or a single argument.

    Returns:
        What the model returns.
    """
    if isinstance(batch, Mapping):
        return model(**_understood(model, batch))
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _understood(model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Drop labels that `forward` does not accept: a loss function outside the model uses them."""
    if "labels" not in batch or _takes_labels(getattr(model.forward, "__func__", model.forward)):
        return batch
    return {name: value for name, value in batch.items() if name != "labels"}


@cache
def _takes_labels(forward: Any) -> bool:
    taken = inspect.signature(forward).parameters.values()
    return any(one.name == "labels" or one.kind is one.VAR_KEYWORD for one in taken)

"""compressed-tensors: a model of transformers with a config group per pair of formats, for transformers and vLLM.

Supported: Linear layers with symmetric integer weights of 2 to 8 bits (packed, or a byte each if both weights and
inputs have 8 bits; in groups with float inputs, or with a scale per output channel or tensor) or e4m3 weights, and
inputs in float, or with a fixed range in integers of 2 to 8 bits or e4m3; nvfp4 and mxfp4 weights with float inputs.
All other layers store the values of their rounded weights in float32 and read float inputs, as their verdict says.
Transformers runs all of them in float; `quant.engines.table` knows which of them vLLM runs.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quant.analysis.tied import stored_with
from quant.engines.table import ENGINES
from quant.errors import UserError
from quant.export.layer_report import LayerVerdict, as_chosen
from quant.export.weights import round_weight, static_range
from quant.formats import E4M3, FLOAT, BlockFormat, Format, GroupFormat, IntFormat
from quant.kernels.groups import from_rows
from quant.quant_embedding import QuantEmbedding
from quant.quant_linear import QuantLinear
from quant.quant_module import QuantModule

INT8 = IntFormat(8)
BLOCK_SCHEMES = {"nvfp4": "NVFP4A16", "mxfp4": "MXFP4A16"}
"""Block formats of weights -> their preset scheme of compressed-tensors, with float inputs."""


def check_fused(groups: Iterable[Sequence[str]], modules: Mapping[str, QuantModule]) -> None:
    """Check that layers that engines fuse into one (query, key and value; gate and up) have the same formats.

    Args:
        groups: Names of layers that read the same tensor, for each such tensor.
        modules: The quantized layers, by name.

    Raises:
        UserError: If formats differ within a group.
    """
    for group in groups:
        members = [name for name in group if isinstance(modules.get(name), QuantLinear)]
        pairs = {name: "/".join(format.name for format in modules[name].formats) for name in members}
        if len(set(pairs.values())) > 1:
            each = ", ".join(f"{name} {pair}" for name, pair in pairs.items())
            raise UserError(
                f"--format compressed-tensors: engines fuse {each}, which must share formats: search with --fuse_groups"
            )


def export_compressed(
    folder: Path, model: nn.Module, modules: Mapping[str, QuantModule]
) -> tuple[dict[str, LayerVerdict], int]:
    """Write a checkpoint that transformers' from_pretrained loads.

    Args:
        folder: The folder to write to.
        model: A model of transformers with float weights and plain layers, named as in `modules`; changed in place.
        modules: The quantized layers in their formats.

    Returns:
        How each layer is stored, by name, and the bytes of the layers' weights.

    Raises:
        UserError: If a quantized layer is not a layer of the model.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    if apart := sorted(modules.keys() - dict(model.named_modules()).keys()):
        raise UserError(
            f"--format compressed-tensors: {apart[0]} is no layer of {type(model).__name__} but part of a tensor that "
            "holds several matrices (experts, attention); choose --format packed"
        )
    reasons = mismatches(modules)
    verdicts: dict[str, LayerVerdict] = {}
    groups: dict[tuple[Format, Format], list[str]] = {}
    values: dict[str, Tensor] = {}
    for name, module in modules.items():
        weight, activation = module.formats
        reason, verdicts[name] = reasons[name], as_chosen(module)
        if (rounded := round_weight(name, module)) is not None:
            whole = rounded.values()
            if rounded.in_block is not None:
                whole = from_rows(whole, module.weight.shape, module.weight_quantizer.reduction_dim)
            values[name] = whole
        if reason is not None:
            why = (f"rounded weights in float32, inputs in float: {reason}",)
            bits = FLOAT.bits, FLOAT.bits
            verdicts[name] = LayerVerdict(weight, activation, "float32", "float", *bits, why, engine=BOTH)
        elif weight != FLOAT:
            verdicts[name] = replace(verdicts[name], engine=engine_of(module))
            groups.setdefault((weight, activation), []).append(name)
    layers = dict(model.named_modules())
    with torch.no_grad():
        for name, value in values.items():
            layers[name].weight = nn.Parameter(value, requires_grad=False)
    taken = {name for names in groups.values() for name in names}
    rest = [name for name, layer in layers.items() if isinstance(layer, nn.Linear) and name not in taken]
    schemes = {
        f"group_{place}": scheme(names, modules[names[0]], weight, activation)
        for place, ((weight, activation), names) in enumerate(groups.items())
    }
    config = QuantizationConfig(config_groups=schemes, ignore=rest, format="mixed-precision")
    with _quiet():
        apply_quantization_config(model, config)
        for name in taken:
            set_scales(name, layers[name], modules[name])
        compressor: Any = ModelCompressor(quantization_config=config)
        compressor.compress_model(model)
        model.save_pretrained(folder)  # type: ignore[operator]
        compressor.update_config(str(folder))
    stored = {name: layers[name].state_dict() for name in modules}
    return verdicts, sum(
        tensors[key].numel() * tensors[key].element_size()
        for tensors in stored.values()
        for key in ("weight", "weight_packed")
        if key in tensors
    )


def mismatches(modules: Mapping[str, QuantModule]) -> dict[str, str | None]:
    """Return for each layer the reason why compressed-tensors does not support it; None if it does."""
    tied = {name: owner for name, owner in stored_with(modules).items() if isinstance(modules[owner], QuantEmbedding)}
    stored_once = "its weight is that of {}, an embedding"
    return {
        name: stored_once.format(tied[name]) if name in tied and module.formats[0] != FLOAT else mismatch(name, module)
        for name, module in modules.items()
    }


def mismatch(name: str, module: QuantModule) -> str | None:
    """Return the reason why compressed-tensors does not support a layer; None if it does, or the layer is in float."""
    weight, activation = module.formats
    if (weight, activation) == (FLOAT, FLOAT):
        return None
    if isinstance(module, QuantEmbedding):
        return "compressed-tensors compresses Linear layers, this is an embedding"
    if not isinstance(module, QuantLinear):
        return f"compressed-tensors compresses Linear layers, this is a {type(module).__name__.removeprefix('Quant')}"
    if isinstance(weight, GroupFormat):
        if module.in_features % weight.size:
            return f"its rows of {module.in_features} do not divide into groups of {weight.size}"
        if weight.zero_point:
            return "transformers does not load the packed zero points of compressed-tensors"
        return None if activation == FLOAT else f"compressed-tensors has no {weight} weights with {activation} inputs"
    if isinstance(weight, BlockFormat) and weight.name in BLOCK_SCHEMES:
        if module.in_features % weight.block_size:
            return f"its rows of {module.in_features} do not divide into blocks of {weight.block_size}"
        return None if activation == FLOAT else f"compressed-tensors has no {weight} weights with {activation} inputs"
    if not (weight == E4M3 or (isinstance(weight, IntFormat) and weight.width <= 8)):
        return f"compressed-tensors has no scheme for {weight} weights"
    if not module.weight_quantizer.config.symmetric:
        return "asymmetric weights are not packed"
    if activation == FLOAT:
        return None
    if not (activation == E4M3 or (isinstance(activation, IntFormat) and activation.width <= 8)):
        return f"compressed-tensors has no scheme for {activation} inputs"
    if (range := static_range(name, module)) is None:
        return "the range of its inputs is not fixed"
    if range.offset is not None:
        return "compressed-tensors has no offsets learned beside the zero point (LSQ+)"
    if isinstance(activation, IntFormat) and module.input_quantizer.config.symmetric:  # ours omit -2^(k-1)
        return "compressed-tensors has no inputs in symmetric integers without the lowest one; choose asymmetric inputs"
    return None


BOTH, TRANSFORMERS = "vLLM, transformers", "transformers"


def engine_of(module: QuantModule) -> str:
    """Return which engines run a layer in its formats, of those that read a checkpoint of compressed-tensors."""
    vllm = ENGINES["vllm"].keeps("linear", module.formats, per_token=False, row=module.weight.shape[-1])
    return BOTH if vllm else TRANSFORMERS


def compression_format(weight: Format, activation: Format) -> str:
    """Return how the weights of a config group are stored, by the name that vLLM chooses its kernels by.

    Args:
        weight: Weight format.
        activation: Activation format.
    """
    if isinstance(weight, BlockFormat):
        return f"{weight.name}-pack-quantized"
    if (weight, activation) == (INT8, INT8):
        return "int-quantized"
    if isinstance(weight, IntFormat | GroupFormat):
        return "pack-quantized"
    return "naive-quantized" if activation == FLOAT else "float-quantized"


def scheme(names: list[str], module: QuantModule, weight: Format, activation: Format) -> Any:
    """Create the config group of layers with the same formats.

    Args:
        names: Names of the layers.
        module: One of them.
        weight: Weight format.
        activation: Activation format.
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    stored: Any = compression_format(weight, activation)
    if isinstance(weight, BlockFormat):
        return QuantizationScheme(
            targets=names, format=stored, **copy.deepcopy(PRESET_SCHEMES[BLOCK_SCHEMES[weight.name]])
        )

    def arguments(format: Format, strategy: str, symmetric: bool) -> Any:
        kind = "int" if isinstance(format, IntFormat) else "float"
        return QuantizationArgs(num_bits=int(format.bits), type=kind, strategy=strategy, symmetric=symmetric)  # type: ignore[arg-type]

    if isinstance(weight, GroupFormat):
        own = QuantizationArgs(
            num_bits=weight.width,
            type="int",  # type: ignore[arg-type]
            strategy="group",  # type: ignore[arg-type]
            group_size=weight.size,
            symmetric=True,
        )
        return QuantizationScheme(targets=names, weights=own, format=stored)
    channels = module.weight_quantizer.config.granularity == "channel"
    inputs = None
    if activation != FLOAT:
        symmetric = module.input_quantizer.config.symmetric or not isinstance(activation, IntFormat)
        inputs = arguments(activation, "tensor", symmetric)
    return QuantizationScheme(
        targets=names,
        weights=arguments(weight, "channel" if channels else "tensor", True),
        input_activations=inputs,
        format=stored,
    )


def set_scales(name: str, layer: Any, module: QuantModule) -> None:
    """Copy scales and zero points to the parameters that compressed-tensors has created.

    Args:
        name: Name of the layer, for errors.
        layer: The layer of the exported model.
        module: The quantized layer.
    """
    weight = round_weight(name, module)
    assert weight is not None
    with torch.no_grad():
        layer.weight_scale.copy_(weight.scale.reshape(layer.weight_scale.shape))
        if weight.tensor_scale is not None:
            layer.weight_global_scale.fill_(1.0 / weight.tensor_scale)
        if (range := static_range(name, module)) is not None:
            layer.input_scale.fill_(range.scale)
            if hasattr(layer, "input_zero_point"):
                layer.input_zero_point.fill_(range.zero_point)


@contextlib.contextmanager
def _quiet() -> Any:
    """Suppress the progress that compressed-tensors prints to stderr; failures are exceptions."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield

"""The packed checkpoint: a safetensors file in which each quantized weight takes as many bits as its format has.

Tensors of a layer L, besides those that stay as they are: `L.weight.codes` uint8 (packed, see `bit_packing`),
`L.weight.scale` float32, `L.weight.zero_point` int16 (asymmetric weights), `L.weight.block_scales` uint8 (MX e8m0,
nvfp4 e4m3), `L.weight.tensor_scale` float32 (nvfp4), `L.weight.group_scales` float16 and `L.weight.group_zero_points`
uint8 (packed like the codes; integers in groups), `L.input.scale` float32, and `L.input.zero_point` int8 or int16 or
`L.input.offset` float32 (LSQ+). Weights whose channels differ in format: see `packed_mix`. The file's metadata holds a
description (formats, shapes, values from the caller) and a SHA-256 checksum of it and all tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from quant.analysis.tied import stored_with
from quant.convert import describe_quantizers, in_float, quantize_as_described
from quant.errors import UserError
from quant.export.bit_packing import decode, decode_powers, encode, encode_powers, pack_bits, unpack_bits
from quant.export.layer_report import LayerVerdict, as_chosen, left_in_float
from quant.export.packed_mix import CODES, INDEX, pack_mix, unpack_mix
from quant.export.weights import (
    RoundedWeight,
    never_called,
    plain_weight,
    round_weight,
    static_range,
)
from quant.formats import (
    CHANNEL_GROUPS,
    FLOAT,
    NVFP4_SCALE,
    BlockFormat,
    FloatOff,
    Format,
    GroupFormat,
    IntFormat,
    MixedFormat,
    parse_format,
)
from quant.kernels.groups import from_rows, spread, to_rows
from quant.quant_module import QuantModule
from quant.quantizers.quant_params import QuantParams
from quant.quantizers.quantizer import Quantizer, Rounder
from quant.transforms.computed_weights import fold_weight, sources
from quant.transforms.half import holds_exactly
from quant.transforms.kv_cache import describe_caches, restore_caches
from quant.transforms.placement import is_cached, placed_sites
from quant.transforms.unfold import layer_state

VERSION = 1
METADATA = "packed"
SCALES = ("weight.scale", "weight.tensor_scale", f"weight.{INDEX}", "input.scale", "input.offset")
ZERO_POINTS = ("weight.zero_point", "input.zero_point")


class OnGrid(Quantizer):
    """The quantizer of an unpacked weight, whose values already lie on the grid and are not rounded again."""

    scale: Tensor | None = None
    """float32, broadcasts to the weight (groups: `Quantizer.scale_shape`); None for block formats and formats without a
    scale."""
    zero_point: Tensor | None = None
    """Whole numbers in float32, with the shape of a group format's scale."""

    def prepare(self, format: Format) -> None:
        """Create no scale: it is part of the weight's values."""
        self.prepared.add(format)

    def set_format(self, format: Format) -> None:
        """Raise UserError for any format but the weight's own."""
        if self.prepared and format not in self.prepared:
            raise UserError(f"an unpacked weight stays in {self.format}, it cannot be set to {format}")
        super().set_format(format)

    def rounding(self, x: Tensor) -> Rounder | None:
        """Return None: nothing is rounded."""
        return None


def write_packed(
    path: Path,
    model: nn.Module,
    modules: Mapping[str, QuantModule],
    extra: Mapping[str, Any] | None = None,
    halve: bool = False,
) -> dict[str, LayerVerdict]:
    """Write a packed checkpoint of a model in its current formats.

    Layers that the model never calls are written in float; computed weights with their current values.

    Args:
        path: The file to write.
        model: The quantized model.
        modules: Its quantized layers, by name.
        extra: JSON values to add to the description, by name.
        halve: Store tensors that stay in float in 16 bits where that keeps every value (see `quant.transforms.half`).

    Returns:
        How each layer is stored, by name.

    Raises:
        UserError: For a weight that cannot be stored, see `round_weight`, and for quantizers around layers.
    """
    if sites := [site for site in placed_sites(model) if not is_cached(site)]:
        raise UserError(f"a packed file has no place for the quantizers around layers, such as {sites[0]}")
    uncalled = never_called(modules)
    verdicts = {name: (left_in_float if name in uncalled else as_chosen)(m) for name, m in modules.items()}
    with in_float(uncalled):
        description, tensors = _contents(model, modules, extra or {}, halve)
    metadata = {METADATA: json.dumps({"sha256": _checksum(description, tensors), "description": description})}
    save_file(tensors, str(path), metadata)
    return verdicts


def _contents(
    model: nn.Module, modules: Mapping[str, QuantModule], extra: Mapping[str, Any], halve: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (description, tensors) of a packed file."""
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    owners = stored_with(modules)
    for name, module in modules.items():
        weight, activation = module.formats
        layers[name] = {"formats": [weight.name, activation.name], "shape": list(module.weight.shape)}
        if name in owners and weight != FLOAT:
            layers[name]["weight_of"] = owners[name]
        elif (rounded := round_weight(name, module)) is not None:
            tensors |= {f"{name}.weight.{key}": value for key, value in _pack(rounded).items()}
        elif sources(module):
            tensors[f"{name}.weight"] = plain_weight(name, module).cpu().contiguous()
        if (range := static_range(name, module)) is not None and range.format.scaled:
            tensors[f"{name}.input.scale"] = torch.tensor(range.scale)
            if range.offset is not None:
                tensors[f"{name}.input.offset"] = torch.tensor(range.offset)
            elif isinstance(range.format, IntFormat):
                dtype = torch.int8 if range.format.width <= 8 else torch.int16
                tensors[f"{name}.input.zero_point"] = torch.tensor(range.zero_point, dtype=dtype)
    rest, tied = _rest(model, modules)
    if halve:
        rest = {name: holds_exactly(tensor) for name, tensor in rest.items()}
    description = {
        **extra,
        "version": VERSION,
        "layers": layers,
        "tied": tied,
        "caches": describe_caches(model),
        **describe_quantizers(modules),
    }
    return description, tensors | rest


def read_packed(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a packed checkpoint.

    Args:
        path: The file.

    Returns:
        (description, tensors by name).

    Raises:
        UserError: If the file is missing, damaged or modified, or has another version.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such packed checkpoint")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
        packed = json.loads(metadata[METADATA])
        description, stated = packed["description"], packed["sha256"]
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or truncated: {error}") from None
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not a packed checkpoint, its metadata has no {METADATA!r}") from None
    if _checksum(description, tensors) != stated:
        raise UserError(f"{path}: damaged or changed: its contents do not match its checksum")
    if description["version"] != VERSION:
        raise UserError(f"{path}: packed checkpoint of version {description['version']}, this code reads {VERSION}")
    return description, tensors


def restore(model: nn.Module, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, QuantModule]:
    """Load a packed checkpoint into a float model, in place. Weights take the values of their codes.

    Args:
        model: A float model of the same architecture.
        description: What `read_packed` returned.
        tensors: What `read_packed` returned.

    Returns:
        The quantized layers by name, in the formats of the file.

    Raises:
        UserError: If the file belongs to another architecture.
    """
    layers = description["layers"]
    for name, layer in model.named_modules():
        if name in layers:
            fold_weight(layer)  # the file holds weights, not the tensors they were computed from
    modules = quantize_as_described(model, layers, description)
    restore_caches(model, description.get("caches", {}))
    taken: set[str] = set()
    for name, module in modules.items():
        shape = layers[name]["shape"]
        if list(module.weight.shape) != shape:
            raise UserError(f"layer {name}: the file has weights of {shape}, the model of {list(module.weight.shape)}")
        weight_format, activation_format = (parse_format(format) for format in layers[name]["formats"])
        own = {key: value for key, value in tensors.items() if key.startswith((f"{name}.weight.", f"{name}.input."))}
        own = {key.removeprefix(f"{name}."): value for key, value in own.items()}
        if "weight_of" in layers[name]:
            owner = modules[layers[name]["weight_of"]]
            module.weight, module.weight_quantizer = owner.weight, owner.weight_quantizer
        elif weight_format != FLOAT:
            old = module.weight_quantizer
            values = _unpack(own, weight_format, module.weight.shape, old)
            module.weight = nn.Parameter(values.to(module.weight.dtype), requires_grad=False)
            on_grid = OnGrid(old.config, old.shape, old.reduction_dim, batched=False, weight_shape=old.weight_shape)
            if isinstance(weight_format, MixedFormat):
                on_grid.channel_group.copy_(old.channel_group)
            on_grid.scale = own["weight.scale"].view(old.shape) if "weight.scale" in own else None
            if isinstance(weight_format, GroupFormat):
                scale, zero_point = _group_scales(own, weight_format)
                on_grid.scale = scale.view(old.scale_shape(weight_format))
                on_grid.zero_point = None if zero_point is None else zero_point.view(on_grid.scale.shape)
            module.weight_quantizer = on_grid
            taken |= {f"{name}.{key}" for key in own if key.startswith("weight.")}
        module.set_formats(weight_format, activation_format)
        if "input.scale" in own:
            params = module.input_quantizer.grids[activation_format.name]
            assert isinstance(params, QuantParams)
            params.set(own["input.scale"], own.get("input.zero_point"))
            if params.offset is not None:
                params.offset.data.copy_(own["input.offset"])
            taken |= {f"{name}.{key}" for key in own if key.startswith("input.")}
    rest = {name: value for name, value in tensors.items() if name not in taken}
    rest |= {alias: rest[name] for alias, name in description["tied"].items()}
    _check_names(model, modules, rest)
    model.load_state_dict(rest, strict=False)
    return modules


def packed_sizes(path: Path) -> dict[str, int]:
    """Return the bytes of a packed file by content; their sum is the file's size.

    Args:
        path: The file.

    Returns:
        Bytes of `codes` and `block_scales` (quantized weights; groups' zero points too), `scales` and `zero_points` (of
        weights and inputs; the groups of channels too), `float_weights` (weights of layers in float), `rest` (all other
        tensors) and `header` (names, shapes, description).
    """
    description, tensors = read_packed(path)
    floats = {f"{name}.weight" for name, layer in description["layers"].items() if layer["formats"][0] == FLOAT.name}
    sizes = dict.fromkeys(("codes", "block_scales", "scales", "zero_points", "float_weights", "rest"), 0)
    packed = {
        f"{name}.{part}": kind
        for name in description["layers"]
        for part, kind in (
            ("weight.codes", "codes"),
            *((f"weight.{CODES}.{number}", "codes") for number in range(max(CHANNEL_GROUPS))),
            ("weight.block_scales", "block_scales"),
            ("weight.group_scales", "block_scales"),
            ("weight.group_zero_points", "block_scales"),
            *((part, "scales") for part in SCALES),
            *((part, "zero_points") for part in ZERO_POINTS),
        )
    }
    for name, tensor in tensors.items():
        kind = "float_weights" if name in floats else packed.get(name, "rest")
        sizes[kind] += tensor.numel() * tensor.element_size()
    return {**sizes, "header": path.stat().st_size - sum(sizes.values())}


def _pack(weight: RoundedWeight) -> dict[str, Tensor]:
    packed = pack_mix(weight) if isinstance(weight.format, MixedFormat) else _pack_codes(weight)
    if isinstance(weight.format, BlockFormat):
        scales = weight.scale.numpy().reshape(-1)
        two_level = weight.format.two_level
        block_codes = encode(scales, NVFP4_SCALE).astype(np.uint8) if two_level else encode_powers(scales)
        packed["block_scales"] = torch.from_numpy(block_codes)
        if weight.tensor_scale is not None:
            packed["tensor_scale"] = weight.tensor_scale.clone()
    elif isinstance(weight.format, GroupFormat):
        packed["group_scales"] = weight.scale.reshape(-1).half()
        if weight.zero_point is not None:
            points = encode(weight.zero_point.numpy(), weight.element)
            packed["group_zero_points"] = torch.from_numpy(pack_bits(points, weight.format.width))
    elif weight.format.scaled:
        packed["scale"] = weight.scale.reshape(-1).clone()
        if weight.zero_point is not None:
            packed["zero_point"] = weight.zero_point.reshape(-1).to(torch.int16)
    return packed


def _pack_codes(weight: RoundedWeight) -> dict[str, Tensor]:
    codes = weight.elements
    if weight.zero_point is not None:
        codes = codes + spread(weight.zero_point, weight.in_block, codes.shape[-1])
    return {"codes": torch.from_numpy(pack_bits(encode(codes.numpy(), weight.element), int(weight.element.bits)))}


def _unpack(tensors: Mapping[str, Tensor], format: Format, shape: torch.Size, quantizer: Quantizer) -> Tensor:
    assert not isinstance(format, FloatOff)
    if isinstance(format, MixedFormat):
        elements = unpack_mix(tensors, format, shape, quantizer)
    else:
        element = format.element if isinstance(format, BlockFormat | GroupFormat) else format
        codes = unpack_bits(tensors["weight.codes"].numpy(), int(element.bits), shape.numel())
        elements = torch.from_numpy(decode(codes, element))
    if isinstance(format, BlockFormat | GroupFormat):
        rows = elements.view(to_rows(torch.empty(shape, device="meta"), quantizer.reduction_dim).shape)
    if isinstance(format, GroupFormat):
        group_scale, points = (None if x is None else x.view(len(rows), -1) for x in _group_scales(tensors, format))
        assert group_scale is not None
        rows = rows if points is None else rows - spread(points, format.size, rows.shape[1])
        return from_rows(RoundedWeight(format, rows, group_scale).values(), shape, quantizer.reduction_dim)
    if isinstance(format, BlockFormat):
        block_codes = tensors["weight.block_scales"].numpy()
        scales = decode(block_codes, NVFP4_SCALE) if format.two_level else decode_powers(block_codes)
        scale = torch.from_numpy(scales).view(len(rows), -1)
        values = RoundedWeight(format, rows, scale, tensors.get("weight.tensor_scale")).values()
        return from_rows(values, shape, quantizer.reduction_dim)
    scale, zero_point = torch.ones(()), tensors.get("weight.zero_point")
    if format.scaled:
        scale = tensors["weight.scale"].view(quantizer.shape)
    elements = elements.view(shape)
    if zero_point is not None:
        elements = elements - zero_point.view(quantizer.shape)
    return RoundedWeight(format, elements, scale).values()


def _group_scales(tensors: Mapping[str, Tensor], format: GroupFormat) -> tuple[Tensor, Tensor | None]:
    """Return the scales and zero points of groups as stored, float32 (rows x groups,)."""
    scale, points = tensors["weight.group_scales"].float(), tensors.get("weight.group_zero_points")
    if points is None:
        return scale, None
    codes = unpack_bits(points.numpy(), format.width, scale.numel())
    return scale, torch.from_numpy(decode(codes, format.element))


def _rest(model: nn.Module, modules: Mapping[str, QuantModule]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors that the packed layers do not cover, each once, and the other names of tied tensors."""
    packed = set(modules.values())
    named = {name: layer for name, layer in model.named_modules(remove_duplicate=False) if layer in packed}
    covered = {f"{name}.weight" for name, layer in named.items() if layer.weight_quantizer.format != FLOAT}  # type: ignore[union-attr]
    ranges = tuple(f"{name}.{part}_quantizer." for name in named for part in ("weight", "input"))
    ranges += tuple(f"{name}.{source}" for name, layer in named.items() for source in sources(layer))
    rest: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in layer_state(model).items():
        if name in covered or name.startswith(ranges):
            continue
        place = tensor.data_ptr(), tensor.shape, tensor.stride()
        if tensor.numel() and place in first:
            tied[name] = first[place]
            continue
        first[place] = name
        rest[name] = tensor.detach().cpu().contiguous().clone()
    return rest, tied


def _check_names(model: nn.Module, modules: Mapping[str, QuantModule], rest: Mapping[str, Tensor]) -> None:
    expected, _ = _rest(model, modules)
    own = layer_state(model)
    missing = sorted(expected.keys() - rest.keys())
    extra = sorted(rest.keys() - own.keys())
    other = sorted(name for name in rest.keys() & own.keys() if rest[name].shape != own[name].shape)
    for problem, names in (("lacks", missing), ("has, beyond the model,", extra), ("has another shape of", other)):
        if names:
            raise UserError(f"the packed file does not fit {type(model).__name__}: it {problem} {', '.join(names[:3])}")


def _checksum(description: Any, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the description and of each tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

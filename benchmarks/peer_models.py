"""Quantized models of other libraries for `benchmarks.peer_accuracy`: each from the same float model and batches.

A peer is a function that quantizes a model, in given bits or within a budget, and tells the bits of every layer, which
are read from the library's own quantizers. Weights have a scale per output channel, inputs one per tensor. Inputs that
are never negative (those after a ReLU) get unsigned integers where a library leaves that to its user.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Bits = dict[str, tuple[int, int]]
"""Layer -> bits of its weights and of its inputs."""


@dataclass(frozen=True)
class Start:
    """What a peer starts from."""

    model: nn.Module
    """The float model, which the peer may change."""
    batches: Sequence[Mapping[str, Tensor]]
    """Training batches for calibration, the same ones that our own ranges are calibrated on."""
    layers: Sequence[str]
    """Layers to quantize, in the order in which the model runs them."""
    bits: int
    """Bits of a peer that gives every layer the same."""
    choices: Sequence[int]
    """Bits that a peer may choose among."""
    cost: Callable[[Bits], float]
    """Exact cost of the layers' bits."""
    budget: float
    """What that may be at most."""

    def show(self, model: nn.Module) -> None:
        """Run a model on the calibration batches."""
        with torch.no_grad():
            for batch in self.batches:
                model(**batch)

    def unsigned(self) -> set[str]:
        """Layers whose inputs are never negative."""
        lowest = dict.fromkeys(self.layers, 0.0)

        def note(name: str) -> Any:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                lowest[name] = min(lowest[name], inputs[0].min().item())

            return self.model.get_submodule(name).register_forward_pre_hook(hook)

        handles = [note(name) for name in self.layers]
        self.show(self.model.eval())
        for handle in handles:
            handle.remove()
        return {name for name, value in lowest.items() if value == 0}


def model_optimizer(start: Start) -> tuple[nn.Module, Bits]:
    """Model Optimizer's auto_quantize among all bits of the row, then its own training with quantizers.

    Its limit is on bits a weight. Bisection finds the largest limit, to 0.01 bits, whose choice costs no more than the
    budget, on the same scores.
    """
    import modelopt.torch.quantization as mtq

    unsigned = start.unsigned()
    _, state = mtq.auto_quantize(
        copy.deepcopy(start.model).eval(),
        constraints={"effective_bits": float(max(start.choices))},
        data_loader=list(start.batches),
        forward_step=lambda model, batch: model(**batch),
        loss_func=lambda output, batch: output.loss,
        num_calib_steps=len(start.batches),
        num_score_steps=len(start.batches),
        module_search_spaces=[
            {
                "module_name_patterns": [name],
                "quantization_formats": [_format(bits, name in unsigned) for bits in start.choices],
                "allow_no_quant": False,
            }
            for name in start.layers
        ],
        quantization_formats=[_format(bits, False) for bits in start.choices],
    )
    low, high = 100 * min(start.choices), 100 * max(start.choices) + 1
    found = mtq.get_auto_quantize_config(state, {"effective_bits": low / 100})
    while high - low > 1:
        middle = (low + high) // 2
        config = mtq.get_auto_quantize_config(state, {"effective_bits": middle / 100})
        within = start.cost(_bits_of(config)) <= start.budget
        low, high, found = (middle, high, config) if within else (low, middle, found)
    return _model_optimizer(start, found)


def model_optimizer_uniform(start: Start) -> tuple[nn.Module, Bits]:
    """Model Optimizer with the same bits in every layer."""
    unsigned = start.unsigned()
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name in start.layers:
        own = _format(start.bits, name in unsigned)["quant_cfg"][1:]
        entries += [{**entry, "quantizer_name": name + "." + entry["quantizer_name"][1:]} for entry in own]
    return _model_optimizer(start, {"quant_cfg": entries})


def _format(bits: int, unsigned: bool) -> dict[str, Any]:
    quantizers = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}},
        {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": bits, "axis": None, "unsigned": unsigned}},
    ]
    return {"quant_cfg": quantizers, "algorithm": "max"}


def _bits_of(config: dict[str, Any]) -> Bits:
    bits = {
        entry["quantizer_name"]: entry["cfg"]["num_bits"] for entry in config["quant_cfg"] if entry.get("enable", True)
    }
    names = [name.removesuffix(".weight_quantizer") for name in bits if name.endswith(".weight_quantizer")]
    return {name: (bits[f"{name}.weight_quantizer"], bits[f"{name}.input_quantizer"]) for name in names}


def _model_optimizer(start: Start, config: dict[str, Any]) -> tuple[nn.Module, Bits]:
    """Quantize with ranges of weights by least squares (its `mse`), and of inputs by their largest values."""
    import modelopt.torch.quantization as mtq

    model = mtq.quantize(start.model, {**config, "algorithm": "mse"}, start.show)
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in start.layers}
    return model, {
        name: (layer.weight_quantizer.num_bits, layer.input_quantizer.num_bits) for name, layer in layers.items()
    }


def brevitas(start: Start) -> tuple[nn.Module, Bits]:
    """Brevitas with the same bits in every layer, learned ranges of inputs, ranges of weights by their maxima."""
    return _brevitas(start, dict.fromkeys(start.layers, start.bits), "")


def brevitas_mse(start: Start) -> tuple[nn.Module, Bits]:
    """Brevitas with the same bits in every layer, all ranges learned from least squares on."""
    return _brevitas(start, dict.fromkeys(start.layers, start.bits), "MSE")


def brevitas_ends(start: Start) -> tuple[nn.Module, Bits]:
    """Brevitas as its ImageNet examples are: the first and the last layer in 8 bits."""
    ends = dict.fromkeys((start.layers[0], start.layers[-1]), 8)
    return _brevitas(start, dict.fromkeys(start.layers, start.bits) | ends, "")


def _brevitas(start: Start, bits: Mapping[str, int], ranges: str) -> tuple[nn.Module, Bits]:
    import brevitas.nn as qnn
    import brevitas.quant as quant
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import layerwise_quantize

    unsigned = start.unsigned()
    signed_act, unsigned_act = (getattr(quant, f"{kind}8ActPerTensorFloat{ranges}") for kind in ("Int", "Uint"))
    quantizers = {
        "weight_quant": getattr(quant, f"Int8WeightPerChannelFloat{ranges}"),
        "weight_bit_width": lambda layer, name: bits[name],
        "input_quant": lambda layer, name: unsigned_act if name in unsigned else signed_act,
        "input_bit_width": lambda layer, name: bits[name],
    }
    kinds = {nn.Conv2d: (qnn.QuantConv2d, quantizers), nn.Linear: (qnn.QuantLinear, quantizers)}
    others = [name for name, module in start.model.named_modules() if type(module) in kinds and name not in bits]
    model = layerwise_quantize(start.model, kinds, others)
    with calibration_mode(model.eval()):
        start.show(model)
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in start.layers}
    return model, {
        name: (int(layer.weight_quant.bit_width()), int(layer.input_quant.bit_width()))
        for name, layer in layers.items()
    }


def nncf(start: Start) -> tuple[nn.Module, Bits]:
    """NNCF's `quantize` with the same bits in every layer, and no quantizers but those of the layers.

    It mixes bits of compressed weights alone, and has 4 bits for its target NPU alone.
    """
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters
    from nncf.torch.quantization.layers import BaseQuantizer

    own = QuantizationParameters(num_bits=start.bits)
    model = nncf.quantize(
        start.model.eval(),
        nncf.Dataset(list(start.batches), dict),
        target_device=nncf.TargetDevice.NPU,
        subset_size=len(start.batches),
        ignored_scope=nncf.IgnoredScope(types=["add", "mean"], validate=False),
        advanced_parameters=AdvancedQuantizationParameters(
            weights_quantization_params=own, activations_quantization_params=own
        ),
    )
    widths = [int(module.num_bits) for module in model.modules() if isinstance(module, BaseQuantizer)]
    assert widths == [start.bits] * 2 * len(start.layers), "a quantizer of the weights and one of the inputs a layer"
    return model, dict.fromkeys(start.layers, (start.bits, start.bits))


@dataclass(frozen=True)
class Peer:
    package: str
    """The distribution that it needs."""
    quantize: Callable[[Start], tuple[nn.Module, Bits]]
    widths: tuple[int, ...] = ()
    """The bits that it can give every layer; empty: any, or it chooses itself."""


PEERS = {
    "Model Optimizer, auto_quantize": Peer("nvidia-modelopt", model_optimizer),
    "Model Optimizer, uniform": Peer("nvidia-modelopt", model_optimizer_uniform),
    "Brevitas, uniform": Peer("brevitas", brevitas),
    "Brevitas, uniform, least squares": Peer("brevitas", brevitas_mse),
    "Brevitas, ends in 8 bits": Peer("brevitas", brevitas_ends),
    "NNCF, uniform": Peer("nncf", nncf, (4, 8)),
}
"""Row of the table -> what it runs."""

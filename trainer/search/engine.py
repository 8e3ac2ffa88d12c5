"""A search for an engine: the layers that it runs quantized, and the formats that it stores them in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from cost.engine import RunsAs, layer_kind, runnable, stores
from policy.space import SearchSpace
from quant.convert import find_layers, quantize_model
from quant.engines.rules import UNQUANTIZED, Engine, Pair
from quant.engines.table import ENGINES
from quant.errors import UserError
from quant.formats import Format, format_pairs
from quant.quant_cache import QuantCache
from quant.quant_module import QuantModule
from quant.quantizers.quantizer import ACTIVATION
from quant.transforms.unfold import unfold


def layers_for(engine: Engine, layers: Mapping[str, nn.Module], pairs: Sequence[Pair], per_token: bool) -> list[str]:
    """Return the layers that an engine runs quantized in one of some formats.

    Args:
        engine: The engine.
        layers: Layers by name.
        pairs: The formats asked for.
        per_token: Whether inputs have a range for each token.

    Raises:
        UserError: There is none.
    """
    names = runnable(layers, pairs, stores(engine, layers, per_token))
    if not names:
        kinds = list(dict.fromkeys(layer_kind(layer) for layer in layers.values()))
        raise UserError(
            f"--engine {engine.name}: runs none of the {len(layers)} layers ({', '.join(kinds)}) in these formats; "
            f"choices: {engine.choices()}"
        )
    return names


def quantize_for(
    name: str | None, model: nn.Module, formats: Sequence[Format], weight_only: bool, separate_activations: bool
) -> dict[str, QuantModule]:
    """Quantize the layers of a model that an engine runs, in place.

    Args:
        name: Name of the engine; None: there is none, and all layers are quantized.
        model: The float model.
        formats: The formats asked for.
        weight_only: Whether activations stay in float.
        separate_activations: Whether the formats of weights and activations are chosen independently.

    Returns:
        The quantized layers by name.
    """
    if name is None:
        return quantize_model(model, formats=formats)
    engine, pairs = ENGINES[name], format_pairs(formats, weight_only, separate_activations)
    layers = find_layers(unfold(model))
    names = layers_for(engine, layers, pairs, per_token=False)
    symmetric = ACTIVATION.symmetric if engine.symmetric_inputs is None else engine.symmetric_inputs
    stored = formats_in(engine.stored(pairs, per_token=False))
    return quantize_model(model, include=names, formats=stored, activation=replace(ACTIVATION, symmetric=symmetric))


def formats_in(pairs: Sequence[Pair]) -> list[Format]:
    """Return the different formats of some pairs, without float."""
    found = dict.fromkeys(format for pair in pairs for format in pair)
    return [format for format in found if format not in UNQUANTIZED]


def stored_in(engine: str | None, modules: Mapping[str, QuantModule]) -> RunsAs | None:
    """Return in which formats an engine stores quantized layers, see `cost.engine.stores`; None without an engine."""
    if engine is None:
        return None
    layers = [module for module in modules.values() if not isinstance(module, QuantCache)]
    tokens = any(module.input_quantizer.config.granularity == "token" for module in layers)
    return stores(ENGINES[engine], modules, tokens)


def check_choices(engine: str, space: SearchSpace) -> None:
    """Check that a search has something to choose.

    Raises:
        UserError: The engine stores every layer in one pair of formats.
    """
    if all(len(set(decision.choices)) == 1 for decision in space.decisions):
        pairs = dict.fromkeys("/".join(map(str, decision.choices[0])) for decision in space.decisions)
        raise UserError(
            f"--engine {engine}: stores each layer in one pair of formats of this search space ({', '.join(pairs)}), "
            f"which leaves no choice; choices: {ENGINES[engine].choices()}"
        )

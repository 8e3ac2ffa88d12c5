"""What --engine means for a model: which layers the engine runs quantized, and in which formats it stores them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from eval.config.engine import engine_notes
from eval.export.engine_reach import unreadable
from quant.engines.table import ENGINES
from quant.errors import UserError

if TYPE_CHECKING:  # importing torch takes seconds; flags are checked without it
    from torch import nn

    from cost.engine import RunsAs
    from eval.config.run_config import RunConfig
    from eval.modeling.bundle import ModelBundle

SHOWN = 3
"""Layers that a note names."""


def engine_layers(bundle: ModelBundle, names: Sequence[str], config: RunConfig) -> tuple[list[str], list[str]]:
    """Return the layers that the engine runs quantized, and notes on the others and on the formats.

    Args:
        bundle: The float model and its tokenizer.
        names: Names of the layers that the flags select.
        config: Flags of the run, with an engine.

    Raises:
        UserError: The engine runs none of them, or cannot read the model.
    """
    from cost.engine import layer_kind
    from trainer.search.engine import layers_for

    engine = ENGINES[str(config.engine)]
    if reason := unreadable(engine, bundle.model, bundle.tokenizer):
        raise UserError(f"--engine {engine.name}: {reason}")
    model = bundle.model
    layers = {name: model.get_submodule(name) for name in names}
    pairs = config.search_pairs if config.chooses else [config.uniform_formats]
    kept = layers_for(engine, layers, pairs, config.per_token)
    notes = engine_notes(config)
    if left := [name for name in names if name not in kept]:
        kinds = ", ".join(dict.fromkeys(layer_kind(layers[name]) for name in left))
        shown = ", ".join(left[:SHOWN]) + ", ..." * (len(left) > SHOWN)
        notes.append(f"--engine {engine.name}: leaves {len(left)} of {len(names)} layers ({kinds}) in float: {shown}")
    return kept, notes


def storage_of(model: nn.Module, names: Sequence[str], config: RunConfig) -> RunsAs | None:
    """Return in which formats the engine stores the layers, see `cost.engine.stores`; None without --engine."""
    from cost.engine import stores

    if config.engine is None:
        return None
    return stores(ENGINES[config.engine], {name: model.get_submodule(name) for name in names}, config.per_token)

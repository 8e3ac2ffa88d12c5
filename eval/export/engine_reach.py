"""Which engines run the layers of a model as their formats were chosen, and what stands in the way of the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from quant.engines.rules import UNQUANTIZED, Engine
from quant.engines.table import ENGINES
from quant.errors import UserError
from quant.formats import FLOAT, IntFormat, MixedFormat

if TYPE_CHECKING:
    from torch import nn

    from quant.quant_module import QuantModule

State: TypeAlias = Literal["runs", "float", "refused"]
"""How a layer runs: in the stored formats, in float because the file holds it so, or not at all."""
NO_MIX = "it has one format for the weights of a layer, and --channel_groups has chosen several"
"""Why a file cannot hold layers whose output channels differ in format."""
SHOWN = 2
"""Layers that a line names."""


@dataclass(frozen=True)
class EngineReach:
    """How far an engine runs a model as chosen."""

    layers: int
    """Quantized layers of the model."""
    in_the_way: dict[str, str]
    """Layers that do not run as chosen -> why."""
    refused: dict[str, str]
    """Those of them that do not run at all -> why."""
    in_float: int
    """How many of the others the file holds in float; the rest runs in wider formats."""
    why: str | None = None
    """Why the engine cannot read the model, whatever the formats are."""

    @property
    def as_chosen(self) -> bool:
        """Whether the engine runs every layer as chosen."""
        return self.why is None and not self.in_the_way

    @property
    def runs_some(self) -> bool:
        """Whether a file for the engine can be made, and has a quantized layer."""
        return self.refusal is None and (not self.layers or self.in_float < self.layers)

    @property
    def obstacle(self) -> str | None:
        """What stands in the way, with the first layers; None if nothing does."""
        return self.why or _told(self.in_the_way, self.layers)

    @property
    def refusal(self) -> str | None:
        """Why a file for the engine cannot be made; None if it can, though some layers may run in wider formats."""
        return self.why or _told(self.refused, self.layers)

    def to_json(self) -> dict[str, Any]:
        """Return the entry of the record."""
        return {"as_chosen": self.as_chosen, "obstacle": self.obstacle, "layers_in_the_way": self.in_the_way}


def engine_reach(
    model: nn.Module, modules: Mapping[str, QuantModule], fused: Iterable[Iterable[str]] = (), tokenizer: Any = None
) -> dict[str, EngineReach]:
    """Return for each engine how far it runs a model as chosen.

    Args:
        model: The model.
        modules: Its quantized layers by name, in their formats.
        fused: Names of layers that read the same tensor, for each such tensor; none: not looked at.
        tokenizer: The model's tokenizer; None: not looked at.
    """
    groups = [list(group) for group in fused]
    return {
        name: replace(
            _reach(engine, modules, groups), why=unreadable(engine, model, tokenizer) or _no_place(engine, model)
        )
        for name, engine in ENGINES.items()
    }


def writer_of(engine: Engine) -> Engine:
    """Return the engine that the files of an engine's export are first of all written for: the first of the table."""
    return next(other for other in ENGINES.values() if other.export == engine.export)


def unreadable(engine: Engine, model: nn.Module, tokenizer: Any = None) -> str | None:
    """Return why an engine has no way to compute a model; None if it has.

    Args:
        engine: The engine.
        model: The model.
        tokenizer: Its tokenizer; None: not looked at.
    """
    from transformers import PreTrainedModel

    from eval.export.gguf_model import architecture_of
    from eval.export.gguf_tokenizer import described_tokenizer
    from quant.elastic.saved import UNEVEN, described_sizes

    if engine.export in ("compressed-tensors", "gguf") and not isinstance(model, PreTrainedModel):
        return "it needs a model of transformers"
    if engine.export in ("compressed-tensors", "gguf") and described_sizes(model):
        return UNEVEN
    if engine.export == "gguf":
        try:
            architecture_of(model.config)  # type: ignore[arg-type]
            if tokenizer is not None:
                described_tokenizer(tokenizer)
        except UserError as error:
            return str(error).removeprefix("--format gguf: ").split(";")[0]
    return None


def _reach(engine: Engine, modules: Mapping[str, QuantModule], fused: list[list[str]]) -> EngineReach:
    found = {name: _of_layer(engine, module) for name, module in modules.items()}
    in_the_way = {name: reason for name, (reason, _) in found.items() if reason is not None}
    refused = {name: str(reason) for name, (reason, state) in found.items() if state == "refused"}
    in_float = sum(state == "float" for _, state in found.values())
    if engine.fuses:
        for group in fused:
            formats = {modules[name].formats for name in group if name in modules}
            if len(formats) > 1:
                refused |= dict.fromkeys(group, "it fuses them, and they do not share formats (--fuse_groups)")
    return EngineReach(len(modules), in_the_way | refused, refused, in_float)


def _of_layer(engine: Engine, module: QuantModule) -> tuple[str | None, State]:
    """Return why a layer does not run as chosen (None if it does), and how it runs."""
    from cost.engine import layer_kind, row_of

    pair = module.formats
    if pair == UNQUANTIZED:
        return None, "runs"
    kind, row = layer_kind(module), row_of(module)
    per_token = module.input_quantizer.config.granularity == "token"

    if grid := _wrong_grid(engine, module):
        return grid, "refused"
    if isinstance(pair[0], MixedFormat) and not engine.mixes:
        return NO_MIX, "refused"
    if engine.keeps(kind, pair, per_token, row):
        return None, "runs"
    in_file = writer_of(engine).stored_as(kind, pair, per_token, row) or UNQUANTIZED
    shown = "/".join(map(str, pair))
    if in_file == UNQUANTIZED:
        return f"it has no {shown} for {kind} layers, which the file holds in float", "float"
    if not engine.keeps(kind, in_file, per_token, row):
        return f"it has no {shown} for {kind} layers", "refused"
    return f"{shown} is stored as {'/'.join(map(str, in_file))}", "runs"


def _wrong_grid(engine: Engine, module: QuantModule) -> str | None:
    """Return which zero points of a layer the engine does not take; None if it takes all."""
    weight, activation = module.formats
    weights, inputs = module.weight_quantizer.config, module.input_quantizer.config
    if engine.symmetric_weights and isinstance(weight, IntFormat) and not weights.symmetric:
        return "weights have a zero point"
    if inputs.granularity == "channel" and activation != FLOAT:
        return "inputs have a scale per channel"
    if not isinstance(activation, IntFormat) or engine.symmetric_inputs is None:
        return None
    if inputs.learned_offset:
        return "inputs have a learned offset"
    if engine.symmetric_inputs != inputs.symmetric:
        return "inputs have a zero point" if engine.symmetric_inputs else "inputs have no zero point"
    return None


def _no_place(engine: Engine, model: nn.Module) -> str | None:
    """Return what of a model besides its layers the engine's file has no place for; None if there is nothing."""
    from quant.transforms.kv_cache import caches_of
    from quant.transforms.migration import added
    from quant.transforms.placement import is_cached, placed_sites

    if not all(map(is_cached, placed_sites(model))):
        return "it has no place for what is quantized besides layers"
    if caches_of(model) and not any("cache" in rule.kinds for rule in engine.rules):
        return "it has no place for the format of --quantize_kv_cache"
    if not engine.takes_factors and added(model).factors:
        return "it has no place for the factors of --gamma_migration or --smooth_quant"
    return None


def _told(reasons: Mapping[str, str], layers: int) -> str | None:
    """Return one text about the layers in the way: how many, why, and the first of them."""
    if not reasons:
        return None
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    reason, names = max(by_reason.items(), key=lambda found: len(found[1]))
    shown = ", ".join(names[:SHOWN]) + ", ..." * (len(names) > SHOWN)
    most = reason if len(by_reason) == 1 else f"{len(names)} since {reason}"
    return f"{len(reasons)} of {layers} layers: {most} ({shown})"

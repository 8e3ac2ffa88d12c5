"""Predicts, without writing files, which exports keep all formats of a run; reported at the end of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from eval.export.engine_reach import NO_MIX, engine_reach
from eval.export.formats import EXPORT_FORMATS, HOLD_CACHES, HOLD_MIXES, NO_CACHE
from quant.engines.table import ENGINES
from quant.errors import UserError
from quant.formats import MixedFormat

if TYPE_CHECKING:
    from eval.run.plan import Plan
    from quant.convert import Assignment
    from quant.quant_module import QuantModule

WIDENED = "{} of {} layers"


def export_reach(plan: Plan, modules: Mapping[str, QuantModule]) -> dict[str, str | None]:
    """Check each export format against the formats of the layers.

    Args:
        plan: Plan of the run.
        modules: Its quantized layers by name.

    Returns:
        Export format -> why it cannot keep all formats, or None if it can; empty for a float run.
    """
    if not modules:
        return {}
    from quant.transforms.placement import is_cached, placed_sites

    if not all(map(is_cached, placed_sites(plan.bundle.model))):
        return dict.fromkeys(EXPORT_FORMATS, "it has no place for what is quantized besides layers")
    return {name: _why_not(name, plan, modules) for name in EXPORT_FORMATS}


def engines_in_reach(
    plan: Plan, modules: Mapping[str, QuantModule], assignment: Assignment, target: float | None
) -> dict[str, dict[str, Any]]:
    """Return for each engine whether it runs the formats of the layers as chosen, and what stands in the way.

    Args:
        plan: Plan of the run.
        modules: Its quantized layers by name.
        assignment: Formats of the layers and caches.
        target: Budget of the run, if it has one.

    Returns:
        Engine -> the entry of the record; empty for a float run.
    """
    if not modules:
        return {}
    found = engine_reach(plan.bundle.model, modules, fused_in(plan, modules), plan.bundle.tokenizer)
    return {
        name: replace(reach, why=reach.why or _over(plan, name, assignment, target)).to_json()
        for name, reach in found.items()
    }


def _over(plan: Plan, engine: str, assignment: Assignment, target: float | None) -> str | None:
    """Return that the formats cost more than the target in the file of an engine; else None."""
    from cost.cost import memory_cost
    from cost.units import UNITS

    if target is None or plan.config.cost_type != "memory":
        return None
    cost = memory_cost([replace(profile, engine=engine) for profile in plan.profiles], assignment)
    if cost <= target * (1 + 1e-12):
        return None
    return f"its file costs {cost:.6g} {UNITS['memory']}, over the target of {target:.6g}"


def fused_in(plan: Plan, modules: Mapping[str, QuantModule]) -> list[list[str]]:
    """Return the names of layers that read the same tensor, which some engines run as one; of transformers' models."""
    from transformers import PreTrainedModel

    from eval.layers.fused_groups import fused_groups

    if not isinstance(plan.bundle.model, PreTrainedModel):
        return []
    inputs = {name: x for name, x in plan.prepared.example_inputs.items() if name != "labels"}
    return [list(group) for group in fused_groups(plan.bundle.model, modules, inputs).values()]


def _why_not(name: str, plan: Plan, modules: Mapping[str, QuantModule]) -> str | None:
    from quant.elastic.saved import UNEVEN, described_sizes

    if name not in HOLD_CACHES and plan.caches:
        return NO_CACHE
    if name in ("compressed-tensors", "gguf") and described_sizes(plan.bundle.model):
        return UNEVEN
    if name not in HOLD_MIXES and any(isinstance(module.formats[0], MixedFormat) for module in modules.values()):
        return NO_MIX
    try:
        kept = _KEPT.get(name, _all)(plan, modules)
    except UserError as error:
        return str(error).removeprefix(f"--format {name}: ")
    return None if kept == len(modules) else WIDENED.format(kept, len(modules))


def _all(plan: Plan, modules: Mapping[str, QuantModule]) -> int:
    return len(modules)  # packed stores each weight in its own number of bits


def _onnx(plan: Plan, modules: Mapping[str, QuantModule]) -> int:
    if plan.data.kind == "summary":
        raise UserError("a summary model writes")
    if plan.config.per_token:
        raise UserError("inputs have no fixed range under --per_token")
    return sum(ENGINES["onnxruntime"].keeps("linear", module.formats) for module in modules.values())


def _torchao(plan: Plan, modules: Mapping[str, QuantModule]) -> int:
    from quant.export.torchao import mismatch

    return sum(mismatch(module) is None for module in modules.values())


def _compressed(plan: Plan, modules: Mapping[str, QuantModule]) -> int:
    from transformers import PreTrainedModel

    from quant.export.compressed_tensors import check_fused, mismatches
    from quant.transforms.migration import added

    if not isinstance(plan.bundle.model, PreTrainedModel):
        raise UserError("it needs a model of transformers")
    if added(plan.bundle.model).factors:
        raise UserError("it has no place for the factors of --gamma_migration or --smooth_quant")
    check_fused(fused_in(plan, modules), modules)
    return sum(reason is None for reason in mismatches(modules).values())


def _gguf(plan: Plan, modules: Mapping[str, QuantModule]) -> int:
    from eval.export.gguf_model import architecture_of
    from quant.export.gguf_blocks import gguf_verdict, tensor_type
    from quant.transforms.migration import added

    if getattr(plan.bundle.model, "config", None) is None or added(plan.bundle.model).factors:
        raise UserError("it needs a decoder of transformers without migration factors")
    architecture_of(plan.bundle.model.config)  # type: ignore[arg-type]
    types = {
        name: tensor_type(module.formats[0], module.weight.shape[-1], not module.weight_quantizer.config.symmetric)
        for name, module in modules.items()
    }
    return sum(gguf_verdict(*module.formats, types[name]).as_chosen for name, module in modules.items())


def _executorch(plan: Plan, modules: Mapping[str, QuantModule]) -> int:
    from quant.export.core_aten import core_verdict

    if plan.data.kind in ("qa", "summary"):
        raise UserError(f"a {plan.data.kind} model has several outputs or writes")
    return sum(core_verdict(module).as_chosen for module in modules.values())


_KEPT = {
    "onnx": _onnx,
    "torchao": _torchao,
    "compressed-tensors": _compressed,
    "gguf": _gguf,
    "executorch": _executorch,
}
"""Export format -> how many layers it keeps in their formats; formats that are not listed keep all."""

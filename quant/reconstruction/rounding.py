"""Rounds the weights of a quantized model block by block, so that the outputs of its layers are kept (GPTQ, AdaRound).

Each block sees what the blocks before it, already rounded, return. Only the inputs of one block are in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quant.convert import get_formats, set_formats, with_masks
from quant.errors import UserError
from quant.formats import FLOAT, BlockFormat
from quant.module_utils import evaluating
from quant.progress import Listener, unheard
from quant.quant_module import QuantModule
from quant.reconstruction.adaround import adaround
from quant.reconstruction.blocks import BlockInputs, Unit, find_units, run_until_stopped, stopping_after
from quant.reconstruction.gptq import gptq
from quant.reconstruction.grid import grid_of, settled
from quant.reconstruction.hessian_inputs import InputCollector, Moments
from quant.reconstruction.matrices import from_matrices, to_matrices, why_nearest

Method = Literal["gptq", "adaround"]


def round_weights(
    model: nn.Module,
    modules: Mapping[str, QuantModule],
    batches: Iterable[Any],
    method: Method = "gptq",
    *,
    act_order: bool = True,
    tell: Listener = unheard,
) -> list[str]:
    """Round the weights of all layers, in place, to the formats that they are set to.

    The weights then lie on the grids of their quantizers, whose scales stay as they are: call it after `calibrate`.
    Layers keep the formats they have, and activations are rounded as these say.

    Args:
        model: The quantized model.
        modules: Its quantized layers, by name.
        batches: Inputs of the model, see `quant.convert.calibrate`; padding is left out.
        method: gptq (arXiv 2210.17323) or adaround (arXiv 2004.10568).
        act_order: For gptq: whether columns with large inputs come first.
        tell: Listener of the progress.

    Returns:
        Notes on the layers that are rounded to nearest instead, and why.

    Raises:
        UserError: If there is no batch, or adaround is asked for a block format.
    """
    check_method(method, {module.formats[0] for module in modules.values()})
    kept = list(batches)
    if not kept:
        raise UserError("the calibration set is empty: rounding by reconstruction needs at least one batch")
    return _Reconstruction(model, modules, kept, method, act_order, tell).run()


def check_method(method: str, formats: Iterable[Any]) -> None:
    """Raise UserError if a method cannot round to one of the formats."""
    blocks = sorted(format.name for format in formats if isinstance(format, BlockFormat))
    if method == "adaround" and blocks:
        raise UserError(
            f"rounding adaround has no {blocks[0]}, whose scales follow from the rounded values; choices: gptq, nearest"
        )


class _Reconstruction:
    """One run over all blocks of a model."""

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, QuantModule],
        batches: Sequence[Any],
        method: Method,
        act_order: bool,
        tell: Listener,
    ) -> None:
        self.model, self.modules, self.method, self.act_order, self.tell = model, modules, method, act_order, tell
        masked = [with_masks(model, batch) for batch in batches]
        self.batches, self.masks = [batch for batch, _ in masked], [masks for _, masks in masked]
        self.formats = get_formats(modules)
        self.nearest = _nearest_layers(model, modules)
        self.asymmetric = method == "adaround"
        self.originals: dict[Tensor, Tensor] = {}
        """Float weights that have been rounded since, for methods that compare with the float model."""
        self.rounded: set[int] = set()

    def run(self) -> list[str]:
        """Round all layers; returns the notes."""
        layers = {n: m for n, m in self.modules.items() if n not in self.nearest and self.formats[n][0] != FLOAT}
        with evaluating(self.model), _without_cache(self.model), _formats_restored(self.modules):
            # A weight on its grid need not be rounded again, and those of later layers are not rounded yet.
            set_formats(self.modules, {name: (FLOAT, own) for name, (_, own) in self.formats.items()})
            units = find_units(self.model, layers, self.batches[0]) if layers else []
            noun = "block" if any(unit.chain for unit in units) else "layer"
            self.tell("rounding", 0, len(units))
            for done, unit in enumerate(units, start=1):
                self._round(unit, self._gather_in_chain(unit) if unit.chain else self._gather_alone(unit))
                self.tell("rounding", done, len(units), f"{noun} {done} of {len(units)}")
        return self._notes()

    def _collector(self, unit: Unit) -> InputCollector:
        return InputCollector({name: self.modules[name] for name in unit.layers}, crossed=self.asymmetric)

    def _gather_in_chain(self, unit: Unit) -> dict[str, Moments]:
        """Run one block on the outputs of the block before; returns the moments of its layers' inputs."""
        assert unit.chain is not None
        if unit.index == 0:
            self.inputs = BlockInputs(self.model, unit.chain, self.batches)
        else:
            self.inputs.advance()
        if self.asymmetric:
            with self._in_float():
                if unit.index == 0:
                    self.float_inputs = BlockInputs(self.model, unit.chain, self.batches)
                else:
                    self.float_inputs.advance()
        collector = self._collector(unit)
        for batch, masks in enumerate(self.masks):
            if self.asymmetric:
                with self._in_float(), collector.reading_float():
                    self.float_inputs.run(batch)
            with collector.gathering(masks):
                self.inputs.run(batch)
        if unit.index == len(unit.chain.modules) - 1:
            del self.inputs
            self.__dict__.pop("float_inputs", None)
        return collector.moments

    def _gather_alone(self, unit: Unit) -> dict[str, Moments]:
        """Run the model as far as a layer outside of all chains."""
        collector, last = self._collector(unit), self.modules[unit.layers[0]]
        for batch, masks in zip(self.batches, self.masks, strict=True):
            if self.asymmetric:
                with self._in_float(), collector.reading_float(), stopping_after(last, unit.calls):
                    run_until_stopped(self.model, batch)
            with collector.gathering(masks), stopping_after(last, unit.calls):
                run_until_stopped(self.model, batch)
        return collector.moments

    def _round(self, unit: Unit, moments: dict[str, Moments]) -> None:
        for name in unit.layers:
            module, found = self.modules[name], moments.pop(name)
            if id(module.weight) in self.rounded:
                continue  # another layer with this weight came before
            if not found.rows:
                self.nearest[name] = "no calibration example reaches them"
                continue
            module.weight_quantizer.set_format(self.formats[name][0])
            if not self._reconstruct(module, found):
                self.nearest[name] = "their rounded values do not keep the scales they came from"
            module.weight_quantizer.set_format(FLOAT)
            self.rounded.add(id(module.weight))

    @torch.no_grad()
    def _reconstruct(self, module: QuantModule, moments: Moments) -> bool:
        """Round a layer's weight in place; returns whether ordinary rounding gives the result back."""
        grid = grid_of(module)
        weight = to_matrices(module, module.weight.detach())
        if self.method == "gptq":
            rounded = gptq(weight, moments.hessian, grid, act_order=self.act_order)
        else:
            assert moments.cross is not None
            rounded = adaround(weight, moments.hessian, moments.cross, grid)
        values = from_matrices(module, rounded).to(module.weight.dtype)
        rounder = module.weight_quantizer.rounding(values)
        assert rounder is not None
        stored = settled(rounder, values)
        if stored is None:
            return False
        if self.asymmetric:
            self.originals[module.weight] = module.weight.detach().clone()
        module.weight.copy_(stored)
        return True

    @contextmanager
    def _in_float(self) -> Iterator[None]:
        """Within, the model computes in float, with the weights it had."""
        before = get_formats(self.modules)
        set_formats(self.modules, dict.fromkeys(self.modules, (FLOAT, FLOAT)))
        self._swap_weights()
        try:
            yield
        finally:
            self._swap_weights()
            set_formats(self.modules, before)

    def _swap_weights(self) -> None:
        for parameter, other in self.originals.items():
            self.originals[parameter], parameter.data = parameter.data, other

    def _notes(self) -> list[str]:
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.nearest.items():
            if self.formats[name][0] != FLOAT:
                by_reason.setdefault(reason, []).append(name)
        return [
            f"rounding {self.method}: {len(names)} layers are rounded to nearest, since {reason}: "
            f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            for reason, names in by_reason.items()
        ]


def _nearest_layers(model: nn.Module, modules: Mapping[str, QuantModule]) -> dict[str, str]:
    """Return the layers whose weights must stay as they are, and why."""
    able = [module for module in modules.values() if why_nearest(module) is None]
    quantizers = {id(module): id(module.weight_quantizer) for module in able}
    users: dict[int, set[int | None]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            users.setdefault(id(parameter), set()).add(quantizers.get(id(module)))
    found = {}
    for name, module in modules.items():
        if (reason := why_nearest(module)) is not None:
            found[name] = reason
        elif len(users[id(module.weight)]) > 1:
            found[name] = "other modules read their weights as well"
    return found


@contextmanager
def _formats_restored(modules: Mapping[str, QuantModule]) -> Iterator[None]:
    before = get_formats(modules)
    try:
        yield
    finally:
        set_formats(modules, before)


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Within, models of transformers keep no keys and values, to which each run of a block would add its own."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    before = [(config, config.use_cache) for config in found if hasattr(config, "use_cache")]
    for config, _ in before:
        config.use_cache = False
    try:
        yield
    finally:
        for config, cached in reversed(before):
            config.use_cache = cached

"""RunCalibration: everything of a run's model that is set on training data without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from policy.hessian import held_weights
from quant.analysis.reach import notes_on_reach, reach_of
from quant.channel_groups import order_channels, split_layers
from quant.convert import Assignment, calibrate, check_weights, set_formats
from quant.mapped_weights import clone
from quant.quant_module import QuantModule, Reach
from quant.reconstruction.rounding import round_weights
from trainer.search.sensitivity import channel_sensitivity
from trainer.training.batch_norm import has_untrained_batch_norm, recalibrate_batch_norm
from trainer.training.distributed import of_first_process
from trainer.training.progress import Listener, counted


@dataclass(frozen=True)
class WeightRounding:
    """How weights are rounded by reconstruction."""

    method: Literal["gptq", "adaround"]
    samples: int = 128
    """Training examples that the layers' outputs are kept on."""


@dataclass
class RunCalibration:
    """Sets ranges, batch norm statistics and rounded weights of a model on training data."""

    model: nn.Module
    modules: Mapping[str, QuantModule]
    sample: Callable[..., Iterator[Any]]
    """(number of examples, phase=name in progress reports) -> training batches, the same ones every time."""
    samples: int
    """Training examples for ranges and batch norms."""
    rounding: WeightRounding | None
    tell: Listener
    reach: Mapping[str, Reach] = field(default_factory=dict)
    """Layers that the first calibration did not reach; they stay in float for good."""
    _float: dict[str, Tensor] = field(default_factory=dict)
    """Float weights of layers whose weights are rounded, if they will be rounded again."""

    def batches(self, phase: str | None = None) -> Iterator[Any]:
        """Yield the same training batches every time, augmented as in training.

        The weights have adapted to augmented images; plain ones have other statistics (a black border raises the
        variance of the first layer by half) and cost a ResNet-20 three points of accuracy on CIFAR-10.

        Args:
            phase: reports progress under this name; None: no reports.
        """
        return self.sample(self.samples, phase=phase)

    def find_ranges(self) -> list[str]:
        """Calibrate the ranges of all layers before the first step; return notes on layers that were not reached."""
        if has_untrained_batch_norm(self.model):  # its initial statistics would clip every range
            self.recalibrate_batch_norms("calibrating batch norms")
        watch = partial(counted, total=len(self.modules), phase="setting ranges", tell=self.tell, noun="layer")
        calibrate(self.model, self.modules, self.batches("calibrating"), watch=watch)
        self.reach = reach_of(self.modules)
        return notes_on_reach(self.modules)

    def order_channels(self, loss: Callable[..., Any], autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        """Give the first groups of divided layers the channels whose rounding costs most on training data.

        Args:
            loss: (model, batch) -> mean loss, scalar.
            autocast: context for forward passes.
        """
        divided = {name: self.modules[name] for name in split_layers(self.modules)}
        if not divided:
            return
        with held_weights(divided), autocast():
            scores = channel_sensitivity(self.model, divided, list(self.batches("ordering output channels")), loss)
        agreed = {name: of_first_process(own) for name, own in scores.items()}
        order_channels(divided, {name: own for name, own in agreed.items() if own is not None})

    def set_reach(self, reach: Mapping[str, Reach]) -> None:
        """Keep layers in float that the calibration of an earlier process did not reach."""
        self.reach = reach
        for name, found in reach.items():
            self.modules[name].reach = found

    def set_formats(self, assignment: Assignment) -> None:
        """Put the layers into the formats of an assignment, calibrated for it. Raises NotFiniteError if that fails."""
        set_formats(self.modules, assignment)
        layers = self.modules.values()
        quantizers = [q for layer in layers for q in (layer.weight_quantizer, *layer.activation_quantizers)]
        if all(quantizer.keeps_ranges for quantizer in quantizers):
            check_weights(self.modules)  # a pass over the batches would set nothing
        else:
            calibrate(self.model, self.modules, self.batches("calibrating the chosen formats"), learned=False)

    def recalibrate_batch_norms(self, phase: str = "recalibrating batch norms") -> None:
        """Replace the moving averages of batch norms by plain ones for the current formats."""
        recalibrate_batch_norm(self.model, self.batches(phase))

    def round_weights(self, again: bool) -> list[str]:
        """Round the weights, in place, for the current formats of the layers, if the run does so at all.

        Args:
            again: keep the float weights, for `restore_weights`.

        Returns:
            Notes on layers that are rounded to nearest instead.
        """
        if self.rounding is None:
            return []
        if again:
            own = {name: module.weight for name, module in self.modules.items() if "weight" in module._parameters}
            self._float = {name: clone(weight.detach()) for name, weight in own.items()}
        batches = self.sample(self.rounding.samples)
        return round_weights(self.model, self.modules, batches, self.rounding.method, tell=self.tell)

    @torch.no_grad()
    def restore_weights(self) -> None:
        """Put back the float weights that `round_weights` has kept."""
        for name, weight in self._float.items():
            self.modules[name].weight.copy_(weight)
        self._float = {}

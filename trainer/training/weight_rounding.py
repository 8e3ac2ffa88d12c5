"""WeightRounding: rounds a model's weights by reconstruction for the formats that were chosen, once or per budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quant.mapped_weights import clone
from quant.quant_module import QuantModule
from quant.reconstruction.rounding import round_weights
from trainer.training.progress import Listener, unheard

SAMPLES = 128
"""Default number of training examples whose inputs the layers are reconstructed on."""


@dataclass
class WeightRounding:
    """How weights are rounded, and the float weights if they will be rounded again for another budget."""

    method: Literal["gptq", "adaround"]
    samples: int = SAMPLES
    """Training examples that the layers' outputs are kept on."""
    _float: dict[str, Tensor] = field(default_factory=dict)

    def round(
        self,
        model: nn.Module,
        modules: Mapping[str, QuantModule],
        batches: Iterable[Any],
        *,
        again: bool = False,
        tell: Listener = unheard,
    ) -> list[str]:
        """Round the weights of all layers, in place, to their current formats.

        Args:
            model: The quantized model.
            modules: Its quantized layers, calibrated.
            batches: Training examples.
            again: Whether to keep the float weights, for `restore`.
            tell: Listener of the progress.

        Returns:
            Notes on layers that are rounded to nearest instead.
        """
        if again:
            own = {name: module.weight for name, module in modules.items() if "weight" in module._parameters}
            self._float = {name: clone(weight.detach()) for name, weight in own.items()}
        return round_weights(model, modules, batches, self.method, tell=tell)

    @torch.no_grad()
    def restore(self, modules: Mapping[str, QuantModule]) -> None:
        """Put back the float weights that `round` has kept."""
        for name, weight in self._float.items():
            modules[name].weight.copy_(weight)
        self._float = {}

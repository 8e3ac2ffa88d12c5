"""QuantCache: what a key-value cache stores of one attention, rounded to a format per token and head."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from quant.formats import FLOAT, Format
from quant.quant_module import QuantModule, Reach
from quant.quantizers.prefix_cache import PrefixCache
from quant.quantizers.quantizer import Quantizer, QuantizerConfig
from quant.quantizers.weight_cache import RoundedWeightCache

CACHE = QuantizerConfig(range="dynamic", granularity="token", observer="minmax", symmetric=False)
"""One scale for each token and head, and for integers a zero point: a token is rounded once, when it is stored."""


class QuantCache(nn.Module):
    """Rounds keys and values along the head's dimension; keys come with their rotary embedding.

    It has the interface of a quantized layer, so that a search can choose its format: the weight's format is the one
    that is stored, and its parameters are the values of all tokens.
    """

    prefix_cache: PrefixCache | None = None
    rounded_weight_cache: RoundedWeightCache | None = None
    reach: Reach = "called"
    observing = False
    most_seen = 0

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.weight_quantizer = Quantizer(CACHE, device=device)
        self.input_quantizer = Quantizer(CACHE, device=device)

    @property
    def weight(self) -> Tensor:
        """No weight."""
        return self.weight_quantizer.anchor

    @property
    def activation_quantizers(self) -> list[Quantizer]:
        """Quantizers that are calibrated: none, as every token brings its own range."""
        return []

    @property
    def formats(self) -> tuple[Format, Format]:
        """(format of the cache, float)."""
        return self.weight_quantizer.format, FLOAT

    def set_formats(self, weight: Format, activation: Format = FLOAT) -> None:
        """Switch the format of the cache, `weight`."""
        self.weight_quantizer.set_format(weight)

    def forward(self, input: Tensor) -> Tensor:
        """Round (B, heads, tokens, head_dim), keys or values."""
        if self.prefix_cache is not None:
            return self.prefix_cache.output(self, self.weight_quantizer, input)
        return cast(Tensor, self.weight_quantizer(input))


def as_layer(cache: QuantCache) -> QuantModule:
    """Return the cache under the type of the quantized layers whose interface it has."""
    return cast(QuantModule, cache)

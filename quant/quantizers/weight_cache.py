"""RoundedWeightCache: a layer's weight is rounded once for many forward passes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import Tensor

from quant.quantizers.quantizer import Quantizer

Made = TypeVar("Made")


class RoundedWeightCache:
    """One rounded weight, valid until a tensor that the rounding depends on changes.

    Tensors are compared by identity and version; every in-place change raises the version, including an optimizer's
    step and `load_state_dict`. Only changes through `.data` go unnoticed. That is why the cache is active only within
    `quant.convert.rounded_weights_cached`, not in general.
    """

    def __init__(self) -> None:
        self.sources: list[tuple[Tensor, int]] = []
        self.form: Hashable = None
        self.value: Any = None

    def __reduce__(self) -> tuple[type[RoundedWeightCache], tuple[()]]:
        """Copy as an empty cache: packed weights cannot be copied."""
        return RoundedWeightCache, ()

    def get(self, quantizer: Quantizer, weight: Tensor, form: Hashable, make: Callable[[], Made]) -> Made:
        """Return the cached value, or compute and cache it.

        Args:
            quantizer: Rounds the weight.
            weight: The float weight.
            form: What else the value depends on.
            make: Computes the value.
        """
        tensors = [weight, *quantizer.rounding_tensors()]
        if any(tensor.is_inference() for tensor in tensors):  # these have no version
            return make()
        form = quantizer.format, form
        sources = [(tensor, tensor._version) for tensor in tensors]
        fresh = len(sources) == len(self.sources) and all(
            now is then and version == before
            for (now, version), (then, before) in zip(sources, self.sources, strict=True)
        )
        if self.value is None or self.form != form or not fresh:
            self.value = make()
            self.sources, self.form = [(t, t._version) for t in (weight, *quantizer.rounding_tensors())], form
        kept: Made = self.value
        return kept

"""What an export did to each layer: kept as chosen, or widened, and why."""

from __future__ import annotations

from dataclasses import dataclass

from quant.formats import FLOAT, Format


@dataclass(frozen=True)
class LayerVerdict:
    """One layer, as the assignment chose it and as the exported file holds and runs it."""

    weight: Format
    activation: Format
    exported_weight: str
    """the type that the file stores"""
    exported_activation: str
    weight_bits: float
    """bits a weight takes in the file, block scales included, other scales not"""
    activation_bits: float
    why: tuple[str, ...] = ()
    """a reason for each deviation from the assignment; none: as chosen"""

    @property
    def as_chosen(self) -> bool:
        return not self.why


def as_chosen(weight: Format, activation: Format) -> LayerVerdict:
    """The verdict of a layer that the file holds in its own formats."""
    return LayerVerdict(weight, activation, weight.name, activation.name, weight.bits, activation.bits)


def left_in_float(weight: Format, activation: Format) -> LayerVerdict:
    """The verdict of a layer that the model never calls."""
    why = "the model does not call it: calibration never reached it; what reads its weight reads it in float"
    return LayerVerdict(weight, activation, FLOAT.name, FLOAT.name, FLOAT.bits, FLOAT.bits, (why,))

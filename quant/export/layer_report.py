"""How an export represents each layer: in the formats chosen, or in wider types, and why."""

from __future__ import annotations

from dataclasses import dataclass

from quant.formats import FLOAT, Format, MixedFormat, bits_in_rows
from quant.kernels.groups import to_rows
from quant.quant_module import QuantModule


@dataclass(frozen=True)
class LayerVerdict:
    """One layer: the formats that the assignment chose, and the types that the exported file uses."""

    weight: Format
    activation: Format
    exported_weight: str
    """Type that the file stores weights in."""
    exported_activation: str
    """Type that inputs are rounded to."""
    weight_bits: float
    """Bits per weight in the file, including block scales but no other scales."""
    activation_bits: float
    """Bits per input value."""
    why: tuple[str, ...] = ()
    """A reason for each deviation from the assignment."""
    engine: str = ""
    """Engines that run the layer, if not all that read the file do; '': all."""

    @property
    def as_chosen(self) -> bool:
        """Whether there is no deviation from the assignment."""
        return not self.why


def as_chosen(module: QuantModule) -> LayerVerdict:
    """Return the verdict for a layer that is stored in the formats chosen."""
    weight, activation = module.formats
    row = to_rows(module.weight, module.weight_quantizer.reduction_dim).shape[1]
    bits = bits_in_rows(weight.bits, weight, row)
    if isinstance(weight, MixedFormat):
        bits = weight.bits_of(module.weight_quantizer.channel_group.numel())
    return LayerVerdict(weight, activation, weight.name, activation.name, bits, activation.bits)


def left_in_float(module: QuantModule) -> LayerVerdict:
    """Return the verdict for a layer that the model never calls."""
    weight, activation = module.formats
    why = "the model does not call it: calibration never reached it; what reads its weight reads it in float"
    return LayerVerdict(weight, activation, FLOAT.name, FLOAT.name, FLOAT.bits, FLOAT.bits, (why,))

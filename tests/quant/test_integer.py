"""Integer execution against the emulated layer in float64."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quant.convert import calibrate, from_float, set_formats
from quant.formats import IntFormat, parse_format
from quant.integer import accumulate, run_in_integers, to_codes
from quant.quantizer import Quantizer, QuantizerConfig


def problem(kind, symmetric, granularity, bits):
    torch.manual_seed(0)
    layer = nn.Linear(48, 20) if kind is nn.Linear else Conv1D(20, 48)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    weight = QuantizerConfig(range="calibrated", granularity=granularity, observer="minmax", symmetric=symmetric)
    activation = QuantizerConfig(range="calibrated", observer="minmax", symmetric=symmetric)
    quantized = from_float(layer, weight, activation)
    format = IntFormat(bits)
    for quantizer in (quantized.weight_quantizer, quantized.input_quantizer):
        quantizer.prepare(format)
    x = torch.randn(7, 5, 48) * 3 + 1.5
    calibrate(quantized, {"": quantized}, [x])
    set_formats({"": quantized}, {"": (format, format)})
    output = Quantizer(activation).eval()
    output.set_format(format)
    with torch.no_grad():
        output.observe(quantized.eval()(x))
    output.finish_calibration()
    return quantized, output, x


def emulated(layer, x):
    """The layer in float64: (without its bias, with it)."""
    weight = to_codes(layer.weight_quantizer, layer.weight).values()
    product = to_codes(layer.input_quantizer, x).values() @ (weight if isinstance(layer, Conv1D) else weight.T)
    return product, product + layer.bias.double()


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_integers_compute_what_the_emulation_computes(kind, symmetric, granularity, bits):
    layer, output, x = problem(kind, symmetric, granularity, bits)
    weight, activation = to_codes(layer.weight_quantizer, layer.weight), to_codes(layer.input_quantizer, x)
    # The codes are those of the emulation.
    torch.testing.assert_close(activation.values().float(), layer.input_quantizer(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weight.values().float(), layer.weight_quantizer(layer.weight), rtol=1e-6, atol=1e-6)
    low, high = IntFormat(bits).bounds("full")
    assert activation.codes.min() >= low and activation.codes.max() <= high
    assert symmetric or (activation.zero_point != 0).all()
    product, whole = emulated(layer, x)
    if kind is Conv1D:
        weight = type(weight)(weight.codes.T, weight.scale.T, weight.zero_point.T)
    step = activation.scale * weight.scale.view(-1)
    bias, layer.bias = layer.bias, None
    total = accumulate(layer, activation, weight)
    layer.bias = bias
    torch.testing.assert_close(total.double(), product / step, rtol=0, atol=1e-6)  # exact: whole numbers
    codes = run_in_integers(layer, x, output)
    expected = to_codes(output, whole)
    assert (codes.codes - expected.codes).abs().max() <= 1
    assert (codes.codes == expected.codes).double().mean() > 0.95
    torch.testing.assert_close(whole.float(), layer(x), rtol=1e-4, atol=1e-4)


def test_an_accumulator_that_int32_does_not_hold_is_refused():
    layer, output, x = problem(nn.Linear, True, "tensor", 8)
    with torch.no_grad():
        layer.bias.fill_(1e9)
    with pytest.raises(OverflowError, match="more than int32 holds"):
        run_in_integers(layer, x, output)


def test_other_formats_are_refused():
    layer, output, x = problem(nn.Linear, True, "tensor", 8)
    layer.weight_quantizer.prepare(parse_format("e4m3"))
    layer.weight_quantizer.set_format(parse_format("e4m3"))
    with pytest.raises(ValueError, match="only integer formats run in integers, got e4m3"):
        run_in_integers(layer, x, output)

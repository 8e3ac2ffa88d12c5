"""Integer execution against the emulated layer in float64."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quant.convert import calibrate, from_float, set_formats
from quant.formats import IntFormat, parse_format
from quant.quantizers.quantizer import Quantizer, QuantizerConfig
from tests.quant.export.integers import accumulate, add, grid_of, look_up, run_in_integers, to_codes


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


class Block(nn.Module):
    """y = x + fc2(gelu(fc1(x))) with every tensor quantized, as on a device with int8 inputs and outputs."""

    def __init__(self, granularity, symmetric, reduce_range):
        super().__init__()
        torch.manual_seed(0)
        ranges = {"range": "calibrated", "observer": "minmax"}
        weight = QuantizerConfig(**ranges, granularity=granularity, reduce_range=reduce_range)
        activation = QuantizerConfig(**ranges, symmetric=symmetric)
        self.fc1 = from_float(nn.Linear(32, 64), weight, activation)
        self.fc2 = from_float(nn.Linear(64, 32), weight, activation)
        self.hidden, self.branch, self.output = (Quantizer(activation) for _ in range(3))

    def forward(self, x):
        hidden = self.hidden(self.fc1(x))
        branch = self.branch(self.fc2(nn.functional.gelu(hidden)))
        return self.output(self.fc1.input_quantizer(x) + branch)

    @property
    def outputs(self):
        return self.hidden, self.branch, self.output

    def calibrated(self, x, format):
        """Calibrated on x, in int8 or another integer format."""
        layers = {"fc1": self.fc1, "fc2": self.fc2}
        for layer in layers.values():
            layer.weight_quantizer.prepare(format)
            layer.input_quantizer.prepare(format)
        calibrate(self, layers, [x])
        set_formats(layers, dict.fromkeys(layers, (format, format)))
        hidden = self.eval().fc1(x)
        branch = self.fc2(nn.functional.gelu(hidden))
        for quantizer, seen in zip(self.outputs, (hidden, branch, x + branch), strict=True):
            quantizer.set_format(format)
            quantizer.observe(seen)
            quantizer.finish_calibration()
        return self


@pytest.mark.parametrize("reduce_range", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@torch.no_grad()
def test_a_whole_block_runs_in_integers(granularity, symmetric, reduce_range):
    """Two layers with GELU and a residual addition: int8 in, int8 out, and only codes in between."""
    x, format = torch.randn(50, 32, generator=torch.Generator().manual_seed(1)) * 2 + 0.5, IntFormat(8)
    block = Block(granularity, symmetric, reduce_range).calibrated(x, format)
    expected = to_codes(block.output, block(x))

    start = to_codes(block.fc1.input_quantizer, x)
    hidden = run_in_integers(block.fc1, start, block.hidden)
    active = look_up(nn.functional.gelu, hidden, block.fc2.input_quantizer)
    branch = run_in_integers(block.fc2, active, block.branch)
    made = add(start, branch, block.output)
    assert made.codes.unique().numel() > 100
    assert (made.codes - expected.codes).abs().max() <= 1
    assert (made.codes == expected.codes).double().mean() > 0.97
    assert torch.equal(made.scale, grid_of(block.output).scale)


def saturated_products(x, weight):
    """Sums of two neighbouring products u8 x s8, clipped to 16 bits, as without VNNI (VPMADDUBSW)."""
    products = x.codes.unsqueeze(-2) + 128  # unsigned
    pairs = (products * weight.codes).unflatten(-1, (-1, 2)).sum(dim=-1)
    return pairs.clamp(-(2**15), 2**15 - 1), pairs


@torch.no_grad()
def test_a_reduced_range_never_saturates_sixteen_bits():
    """For the largest codes, 2 x 255 x 127 = 64,770 overflows 16 bits, and 2 x 255 x 63 = 32,130 does not."""
    x = torch.full((3, 32), 2.0)
    x[0] = -2.0
    for reduce_range, saturates in ((False, True), (True, False)):
        block = Block("channel", False, reduce_range)
        block.fc1.weight.fill_(0.5)
        block.calibrated(x, IntFormat(8))
        weight = to_codes(block.fc1.weight_quantizer, block.fc1.weight)
        assert weight.codes.abs().max() == (63 if reduce_range else 127)
        clipped, exact = saturated_products(to_codes(block.fc1.input_quantizer, x), weight)
        assert bool((clipped != exact).any()) == saturates
        torch.testing.assert_close(weight.values().float(), block.fc1.weight, rtol=1e-6, atol=0)

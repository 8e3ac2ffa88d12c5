"""Elastic layers against plain layers with sliced weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quant.convert import calibrate, from_float, rounded_weights_cached
from quant.elastic import ElasticBatchNorm2d, ElasticConv2d, ElasticLinear
from quant.elastic.layers import Size, freeze_size
from quant.elastic.net import freeze
from quant.formats import parse_format
from quant.kernels.dispatch import kernels
from quant.quant_utils import fake_quantize, use_compiled
from quant.quantizers.quantizer import QuantizerConfig


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    out=st.integers(1, 6),
    read=st.integers(1, 4),
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.sampled_from([1, 2]),
    dilation=st.sampled_from([1, 2]),
    mode=st.sampled_from(["zeros", "reflect"]),
    bias=st.booleans(),
)
def test_a_convolution_is_that_of_its_slice(out, read, kernel, stride, dilation, mode, bias):
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 5, stride, 2 * dilation, dilation, bias=bias, padding_mode=mode)
    layer = ElasticConv2d.from_float(plain)
    layer.resize(Size(out, read, kernel))
    x = torch.randn(2, read, 11, 9)
    lost = (5 - kernel) // 2
    pad = dilation * (kernel // 2)
    padded = F.pad(x, (pad,) * 4, "constant" if mode == "zeros" else mode)
    weight = plain.weight[:out, :read, lost : 5 - lost, lost : 5 - lost]
    expected = F.conv2d(padded, weight, plain.bias[:out] if bias else None, stride, 0, dilation)
    torch.testing.assert_close(layer(x), expected)
    layer(x).sum().backward()
    outside = torch.ones(6, 4, 5, 5, dtype=torch.bool)
    outside[:out, :read, lost : 5 - lost, lost : 5 - lost] = False
    assert plain.weight.grad[outside].eq(0).all() and plain.weight.grad[~outside].ne(0).any()
    before = layer(x)
    freeze_size(layer, nn.Conv2d)
    assert type(layer) is nn.Conv2d and layer.weight.shape == (out, read, kernel, kernel)
    torch.testing.assert_close(layer(x), before, rtol=0, atol=0)


def test_a_depthwise_convolution_keeps_one_filter_per_channel():
    plain = nn.Conv2d(6, 6, 3, padding="same", groups=6)
    layer = ElasticConv2d.from_float(plain)
    layer.resize(Size(4, 4, 1))
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(layer(x), F.conv2d(x, plain.weight[:4, :, 1:2, 1:2], plain.bias[:4], groups=4))
    assert layer.weight.shape == (4, 1, 1, 1) and layer.groups == 4


def test_a_linear_layer_and_a_norm_are_those_of_their_slices():
    linear, norm = nn.Linear(6, 4), nn.BatchNorm2d(5)
    elastic, elastic_norm = ElasticLinear.from_float(linear), ElasticBatchNorm2d.from_float(norm)
    elastic.resize(Size(3, 2))
    x = torch.randn(7, 2)
    torch.testing.assert_close(elastic(x), F.linear(x, linear.weight[:3, :2], linear.bias[:3]))
    elastic_norm.resize(Size(2, 2))
    plain, x = nn.BatchNorm2d(2), torch.randn(4, 2, 3, 3)
    torch.testing.assert_close(elastic_norm(x), plain(x))
    torch.testing.assert_close(norm.running_mean, torch.cat([plain.running_mean, torch.zeros(3)]))
    torch.testing.assert_close(norm.running_var, torch.cat([plain.running_var, torch.ones(3)]))
    elastic_norm.reset_running_stats()
    assert norm.running_mean.eq(0).all()


def test_sizes_and_groups_that_do_not_exist_are_refused():
    layer = ElasticConv2d.from_float(nn.Conv2d(4, 8, 3))
    for size in (Size(9, 4, 3), Size(8, 0, 3), Size(8, 4, 2)):
        with pytest.raises(ValueError, match="no part of"):
            layer.resize(size)
    assert layer.smallest_kernel == 3, "a smaller kernel without padding would change the output's size"
    with pytest.raises(ValueError, match="groups=2"):
        ElasticConv2d.from_float(nn.Conv2d(4, 8, 3, groups=2))


@pytest.mark.parametrize("name", ["int4", "e2m1", "mxfp4"])
def test_a_quantized_elastic_layer_rounds_its_slice_with_the_first_scales(name):
    torch.manual_seed(0)
    format = parse_format(name)
    plain = nn.Conv2d(4, 6, 3, padding=1)
    layer = from_float(ElasticConv2d.from_float(plain))
    model, x = nn.Sequential(layer), torch.randn(2, 4, 8, 8)
    layer.weight_quantizer.prepare(format)
    layer.input_quantizer.prepare(format)
    calibrate(model, {"0": layer}, [x])
    layer.set_formats(format, format)
    layer.resize(Size(3, 2, 1))
    sliced, input = plain.weight[:3, :2, 1:2, 1:2], layer.input_quantizer(x[:, :2])
    scale = layer.weight_quantizer.grids[name].scale[:3] if name in layer.weight_quantizer.grids else None
    rounded = fake_quantize(sliced, format, scale, dim=None)
    torch.testing.assert_close(layer(x[:, :2]), F.conv2d(input, rounded, plain.bias[:3]))
    (layer(x[:, :2]) ** 2).sum().backward()
    alone = copy.deepcopy(layer)
    freeze(alone)
    alone.zero_grad()
    torch.testing.assert_close(alone(x[:, :2]), layer(x[:, :2]), rtol=0, atol=0)
    (alone(x[:, :2]) ** 2).sum().backward()
    torch.testing.assert_close(alone.weight.grad, plain.weight.grad[:3, :2, 1:2, 1:2])
    if scale is not None:
        grids = [module.weight_quantizer.grids[name].scale for module in (alone, layer)]
        torch.testing.assert_close(grids[0].grad, grids[1].grad[:3])
        assert grids[1].grad[3:].eq(0).all() and grids[0].shape == (3, 1, 1, 1)


def test_calibrating_a_narrowed_layer_sets_the_first_scales():
    """As with fixed ranges, which are chosen again for the final choice."""
    plain = nn.Conv2d(1, 6, 3)
    config = QuantizerConfig(range="calibrated", granularity="channel", observer="minmax")
    layer = from_float(ElasticConv2d.from_float(plain), weight=config, activation=config_of_inputs())
    int8, x = parse_format("int8"), torch.randn(2, 1, 8, 8)
    layer.weight_quantizer.prepare(int8)
    layer.input_quantizer.prepare(int8)
    calibrate(nn.Sequential(layer), {"0": layer}, [x])
    before = layer.weight_quantizer.grids["int8"].scale.clone()
    with torch.no_grad():
        plain.weight.mul_(2)
    layer.resize(Size(4, 1, 3))
    calibrate(nn.Sequential(layer), {"0": layer}, [x], learned=False)
    after = layer.weight_quantizer.grids["int8"].scale
    torch.testing.assert_close(after[:4], 2 * before[:4])
    torch.testing.assert_close(after[4:], before[4:])


def test_ranges_that_are_computed_at_every_use_are_those_of_the_slice():
    plain = nn.Conv2d(2, 6, 3)
    config = QuantizerConfig(range="dynamic", granularity="channel", observer="minmax")
    layer, int8 = from_float(ElasticConv2d.from_float(plain), weight=config), parse_format("int8")
    layer.set_formats(int8, parse_format("float"))
    x = torch.randn(2, 2, 8, 8)
    whole = layer(x)
    layer.resize(Size(4, 2, 3))
    torch.testing.assert_close(layer(x), whole[:, :4])


def config_of_inputs():
    return QuantizerConfig(range="calibrated", symmetric=False, observer="minmax")


@pytest.fixture
def native():
    if not use_compiled("auto") or not kernels().makes_codes:
        use_compiled("off")
        pytest.skip("no compiler, or no kernels that make codes")
    yield
    use_compiled("off")


def test_integer_arithmetic_takes_the_slice_too(native):
    torch.manual_seed(0)
    int8, plain = parse_format("int8"), nn.Conv2d(32, 64, 3, padding=1, bias=False)
    layer, x = from_float(ElasticConv2d.from_float(plain)), torch.randn(4, 32, 32, 32)
    layer.weight_quantizer.prepare(int8)
    layer.input_quantizer.prepare(int8)
    model = nn.Sequential(layer).eval()
    calibrate(model, {"0": layer}, [x])
    layer.set_formats(int8, int8)
    layer.resize(Size(32, 16, 3))
    with torch.no_grad(), rounded_weights_cached({"0": layer}):
        found = layer(x[:, :16])
        expected = F.conv2d(layer.input_quantizer(x[:, :16]), layer.weight_quantizer(layer.weight), padding=1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        layer.resize(layer.whole)
        assert layer(x).shape[1] == 64, "the cache notices another size"

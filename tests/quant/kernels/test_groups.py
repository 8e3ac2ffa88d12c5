"""Weights in groups: held against plain numpy, with eager, compiled and native kernels, for every shape."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from quant.convert import calibrate, quantize_model, set_formats
from quant.errors import UserError
from quant.export.weights import round_weight
from quant.formats import FLOAT, GroupFormat, IntFormat, parse_format
from quant.kernels.dispatch import use_compiled
from quant.kernels.groups import from_rows, half_scale, join_groups, scale_shape, split_groups, to_rows
from quant.quant_utils import fake_quantize
from quant.quantizers.quantizer import QuantizerConfig

SHAPES = [((4, 64), -1), ((5, 100), -1), ((3, 20), 1), ((96, 5), 0), ((6, 5, 3, 3), None), ((2, 70, 6), 1)]


@pytest.fixture(params=["off", "on"])
def kernels(request):
    use_compiled(request.param)
    yield
    use_compiled("off")


def oracle(x, scale, point, width, size):
    """Rows of x rounded group by group, in numpy; scale and point (rows, groups)."""
    out = np.empty_like(x)
    low, high = (-(2 ** (width - 1)), 2 ** (width - 1) - 1)
    for row in range(len(x)):
        for group in range(scale.shape[1]):
            part = slice(group * size, min((group + 1) * size, x.shape[1]))
            s = np.float32(np.float16(scale[row, group]))
            codes = np.rint(x[row, part] / s)
            if point is None:
                codes = np.clip(codes, low + 1, high)
            else:
                codes = np.clip(codes + point[row, group], low, high) - point[row, group]
            out[row, part] = codes * s
    return out


@pytest.mark.parametrize("shape, dim", SHAPES)
@pytest.mark.parametrize("name", ["int4g32", "uint4g32", "int3g16", "int8g64"])
def test_rounding_equals_plain_numpy(shape, dim, name, kernels):
    format = parse_format(name)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(scale_shape(shape, format.size, dim), generator=torch.Generator().manual_seed(1)) * 0.2 + 0.1
    point = torch.randint(-3, 4, scale.shape) if format.zero_point else None
    rounded = fake_quantize(x, format, scale, point, dim=dim)
    along = -1 if dim is None else dim
    parts = (to_rows(x, dim), to_rows(scale, along), None if point is None else to_rows(point, along))
    x_rows, scale_rows, points = (None if part is None else part.numpy() for part in parts)
    expected = oracle(x_rows, scale_rows, points, format.width, format.size)
    np.testing.assert_array_equal(to_rows(rounded, dim).numpy(), expected)
    assert rounded.shape == x.shape and rounded.stride() == x.stride()


@pytest.mark.parametrize("shape, dim", SHAPES)
def test_gradients_equal_those_of_channels_with_the_scale_repeated(shape, dim, kernels):
    format = parse_format("int4g32")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scale = half_scale(torch.rand(scale_shape(shape, 32, dim), generator=torch.Generator().manual_seed(1)) * 0.2 + 0.1)
    grad = torch.sin(torch.arange(x.numel())).view(shape)
    own, group_scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    fake_quantize(own, format, group_scale, dim=dim).backward(grad)
    rows, wide = to_rows(x, dim).clone().requires_grad_(), to_rows(scale, -1 if dim is None else dim).clone()
    wide.requires_grad_()
    repeated = wide.repeat_interleave(32, dim=1)[:, : rows.shape[1]]
    fake_quantize(rows, IntFormat(4), repeated).backward(to_rows(grad, dim))
    assert torch.equal(to_rows(own.grad, dim), rows.grad)
    torch.testing.assert_close(to_rows(group_scale.grad, -1 if dim is None else dim), wide.grad)


def test_native_kernels_equal_eager_ones_on_large_weights():
    format = parse_format("uint4g32")
    x = torch.randn(300, 1100)
    scale = torch.rand(300, 35) * 0.2 + 0.1
    point = torch.randint(-3, 4, scale.shape)
    found = []
    for mode in ("off", "on"):
        use_compiled(mode)
        leaf, learned = x.clone().requires_grad_(), scale.clone().requires_grad_()
        y = fake_quantize(leaf, format, learned, point)
        y.backward(torch.sin(x * 9))
        found.append((y.detach(), leaf.grad, learned.grad))
    use_compiled("off")
    assert all(torch.equal(a, b) for a, b in zip(found[0][:2], found[1][:2], strict=True))
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-4, atol=1e-3)


@given(st.integers(1, 5), st.integers(1, 200), st.integers(8, 64))
def test_groups_split_and_join(count, length, size):
    rows = torch.arange(count * length).view(count, length)
    parts = split_groups(rows, size)
    assert sum(part.numel() for part in parts) == rows.numel()
    firsts = join_groups([part[:, 0] for part in parts], count)
    assert torch.equal(firsts, rows[:, ::size])
    assert firsts.shape == (count, math.ceil(length / size))
    assert torch.equal(from_rows(rows, rows.shape, -1), rows)


@pytest.mark.parametrize(
    "name, bits", [("int4g32", 4.5), ("uint4g32", 4.625), ("int4g128", 4.125), ("int3g64", 3.25), ("INT8G128", 8.125)]
)
def test_bits_count_scales_and_zero_points(name, bits):
    format = parse_format(name)
    assert format.bits == bits and parse_format(format.name) == format


@pytest.mark.parametrize("name", ["int1g32", "int9g32", "int4g4", "int4g0", "int4g99999", "int4g", "g32"])
def test_impossible_groups_are_refused_with_the_choices(name):
    with pytest.raises(ValueError, match=f"unknown format {name!r}.*choices"):
        parse_format(name)


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))


@pytest.mark.parametrize("kind", ["learned", "calibrated", "dynamic"])
@pytest.mark.parametrize("name", ["int4g32", "uint4g32"])
def test_ranges_of_groups_are_those_of_their_values(kind, name):
    model, format = layers(), parse_format(name)
    config = QuantizerConfig(range=kind, granularity="channel", observer="minmax")
    modules = quantize_model(model, formats=[format], weight=config)
    calibrate(model, modules, [torch.randn(2, 3, 8, 8)])
    set_formats(modules, dict.fromkeys(modules, (format, FLOAT)))
    for name, module in modules.items():
        stored = round_weight(name, module)
        rows = to_rows(module.weight.detach(), module.reduction_dim)
        for group in range(stored.scale.shape[1]):
            part = rows[:, group * 32 : (group + 1) * 32]
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            expected = (high - low) / 15 if format.zero_point else torch.maximum(-low, high) / 7
            torch.testing.assert_close(stored.scale[:, group], expected.half().float())
        rounded = module.weight_quantizer(module.weight)
        assert torch.equal(to_rows(rounded, module.reduction_dim), stored.values())


def test_scales_of_groups_are_learned_one_each():
    model, format = layers(), parse_format("int3g32")
    modules = quantize_model(model, formats=[format])
    x = torch.randn(4, 3, 8, 8)
    calibrate(model, modules, [x])
    set_formats(modules, dict.fromkeys(modules, (format, FLOAT)))
    scales = [module.weight_quantizer.grids["int3g32"].scale for module in modules.values()]
    before = [scale.detach().clone() for scale in scales]
    assert [tuple(scale.shape) for scale in scales] == [(8, 1), (10, 9)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    assert all(bool((scale != old).any()) for scale, old in zip(scales, before, strict=True))


def test_a_model_with_groups_is_saved_and_loaded():
    model, format = layers(), parse_format("uint4g32")
    modules = quantize_model(model, formats=[format])
    calibrate(model, modules, [torch.randn(2, 3, 8, 8)])
    set_formats(modules, dict.fromkeys(modules, (format, FLOAT)))
    other = layers()
    again = quantize_model(other)
    other.load_state_dict(model.state_dict())
    set_formats(again, dict.fromkeys(again, (format, FLOAT)))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model.eval()(x), other.eval()(x))


def test_activations_have_no_groups():
    modules = quantize_model(layers())
    with pytest.raises(UserError, match="int4g32 is a format of weights"):
        set_formats(modules, dict.fromkeys(modules, (FLOAT, GroupFormat(4, 32))))

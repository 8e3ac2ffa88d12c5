"""GPTQ against an independent implementation, column by column with an explicit inverse, code by code."""

import numpy as np
import pytest
import torch
from torch import nn

from quant.convert import calibrate, quantize_model, set_formats
from quant.formats import FLOAT, GroupFormat, parse_format
from quant.quantizers.quantizer import QuantizerConfig
from quant.reconstruction.gptq import DAMPING, gptq
from quant.reconstruction.grid import grid_of
from quant.reconstruction.matrices import to_matrices

COLUMNS, ROWS = 150, 12  # more columns than are updated lazily, and a short last group of 32


def quantized_linear(name, *, granularity="channel", symmetric=True, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(COLUMNS, ROWS, bias=False))
    weight = QuantizerConfig(range="calibrated", granularity=granularity, observer="minmax", symmetric=symmetric)
    format = parse_format(name)
    modules = quantize_model(model, formats=[format], weight=weight)
    calibrate(model, modules, [torch.randn(4, COLUMNS)])
    set_formats(modules, {"0": (format, FLOAT)})
    return modules["0"], format


def inputs(seed=1):
    generator = np.random.default_rng(seed)
    mixed = generator.normal(size=(COLUMNS, COLUMNS)) * generator.uniform(0.1, 3, size=COLUMNS)
    return generator.normal(size=(400, COLUMNS)) @ mixed / np.sqrt(COLUMNS)


def slow_codes(weight, x, scale, low, high, act_order):
    """Optimal Brain Quantization with a fixed order: each column leaves the inverse by a Schur complement."""
    hessian = 2 * x.T @ x
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(len(hessian))
    inverse = np.linalg.inv(hessian + DAMPING * np.diag(hessian).mean() * np.eye(len(hessian)))
    weight, codes = weight.copy(), np.zeros_like(weight)
    left = list(order)
    while left:
        j = left.pop(0)
        codes[:, j] = np.clip(np.round(weight[:, j] / scale[:, j]), low, high)
        error = (weight[:, j] - codes[:, j] * scale[:, j]) / inverse[j, j]
        for k in left:
            weight[:, k] -= error * inverse[j, k]
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


def wide_scale(module, format):
    """The scale of each weight, by repetition."""
    scale = module.weight_quantizer.grids[format.name].scale.detach().double().numpy()
    if isinstance(format, GroupFormat):
        scale = scale.astype(np.float16).astype(np.float64)
        return np.repeat(scale, format.size, axis=1)[:, :COLUMNS]
    return np.broadcast_to(scale, (ROWS, COLUMNS))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", ["int4", "int2", "int3g32", "int4g128"])
def test_codes_are_those_of_the_slow_implementation(name, act_order):
    module, format = quantized_linear(name)
    x, scale = inputs(), wide_scale(module, format)
    weight = module.weight.detach().double()
    hessian = torch.from_numpy(2 * x.T @ x).unsqueeze(0)
    values = gptq(weight.unsqueeze(0), hessian, grid_of(module), act_order=act_order)[0].numpy()
    high = 2 ** (getattr(format, "width", 0) - 1) - 1
    expected = slow_codes(weight.numpy(), x, scale, -high, high, act_order)
    np.testing.assert_array_equal(np.round(values / scale), expected)
    np.testing.assert_allclose(values, expected * scale, rtol=1e-14)


def test_a_zero_point_moves_the_grid():
    module, _ = quantized_linear("int3", symmetric=False)
    x = inputs()
    params = module.weight_quantizer.grids["int3"]
    scale, point = (t.double().numpy() for t in (params.scale, params.zero_point))
    weight = module.weight.detach().double()
    values = gptq(weight.unsqueeze(0), torch.from_numpy(2 * x.T @ x).unsqueeze(0), grid_of(module))[0].numpy()
    wide = np.broadcast_to(scale, weight.shape)
    expected = slow_codes(weight.numpy(), x, wide, -4 - point[:, 0], 3 - point[:, 0], act_order=True)
    np.testing.assert_array_equal(np.round(values / scale), expected)


@pytest.mark.parametrize("name", ["int3", "e2m1", "mxfp4", "nvfp4", "int3g32", "uint3g32"])
def test_outputs_come_closer_than_by_rounding_to_nearest(name):
    module, _ = quantized_linear(name)
    x = torch.from_numpy(inputs())
    weight, grid = to_matrices(module, module.weight.detach()).double(), grid_of(module)
    rounded = gptq(weight, (2 * x.T @ x).unsqueeze(0), grid)
    fresh = torch.from_numpy(inputs(seed=1)[:50])
    errors = [((w[0] - weight[0]) @ fresh.T).square().sum() for w in (rounded, grid.round(weight))]
    assert errors[0] < 0.8 * errors[1]


def test_columns_without_inputs_are_rounded_to_nearest():
    module, _ = quantized_linear("int4")
    x = torch.from_numpy(inputs())
    x[:, 7:40] = 0
    weight, grid = to_matrices(module, module.weight.detach()), grid_of(module)
    rounded = gptq(weight, (2 * x.T @ x).unsqueeze(0), grid)
    torch.testing.assert_close(rounded[:, :, 7:40], grid.round(weight.double())[:, :, 7:40], rtol=0, atol=0)
    assert not torch.equal(rounded, grid.round(weight.double()))


def test_many_matrices_give_what_each_gives_alone(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(12, 8, 3, groups=4))
    modules = quantize_model(model, formats=[parse_format("int3")])
    calibrate(model, modules, [torch.randn(2, 12, 8, 8)])
    set_formats(modules, {"0": (parse_format("int3"), FLOAT)})
    weight, grid = to_matrices(modules["0"], modules["0"].weight.detach()), grid_of(modules["0"])
    x = torch.randn(4, 60, weight.shape[2], dtype=torch.float64)
    hessian = 2 * x.transpose(1, 2) @ x
    together = gptq(weight, hessian, grid)
    parts = (slice(i, i + 1) for i in range(4))
    alone = torch.cat([gptq(weight[part], hessian[part], grid.part(part)) for part in parts])
    assert torch.equal(together, alone)
    monkeypatch.setattr("quant.reconstruction.gptq.PART_ELEMENTS", 1)
    assert torch.equal(gptq(weight, hessian, grid), together)

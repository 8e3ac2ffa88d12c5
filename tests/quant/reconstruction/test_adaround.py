"""AdaRound: its error, what it reaches, and that no output channel gets worse than by rounding to nearest."""

import itertools

import pytest
import torch
from torch import nn

from quant.convert import calibrate, quantize_model, set_formats
from quant.formats import FLOAT, parse_format
from quant.quantizers.quantizer import QuantizerConfig
from quant.reconstruction.adaround import adaround, error
from quant.reconstruction.grid import grid_of
from quant.reconstruction.matrices import to_matrices


def layer(name, columns=40, rows=6):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(columns, rows))
    format = parse_format(name)
    modules = quantize_model(model, formats=[format], weight=QuantizerConfig(granularity="channel", observer="mse"))
    calibrate(model, modules, [torch.randn(4, columns)])
    set_formats(modules, {"0": (format, FLOAT)})
    return to_matrices(modules["0"], modules["0"].weight.detach()).double(), grid_of(modules["0"])


def examples(columns=40, noise=0.05, seed=1):
    """Inputs of float, and the noisy ones that the layer sees after rounding, (n, C) each."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(300, columns, generator=generator, dtype=torch.float64) @ mixed
    return x, x + noise * torch.randn(x.shape, generator=generator, dtype=torch.float64)


def moments(x, seen):
    return (2 * seen.T @ seen).unsqueeze(0), (2 * x.T @ seen).unsqueeze(0)


def squared_error(rounded, weight, x, seen):
    """Per output channel, from the outputs themselves."""
    return (seen @ rounded[0].T - x @ weight[0].T).square().sum(0)


def test_the_quadratic_form_is_the_squared_error_of_the_outputs():
    weight, grid = layer("int4")
    x, seen = examples()
    hessian, cross = moments(x, seen)
    pull = weight @ (hessian - cross)
    one, other = grid.round(weight), weight + 0.01
    expected = squared_error(one, weight, x, seen) - squared_error(other, weight, x, seen)
    found = (error(one - weight, hessian, pull) - error(other - weight, hessian, pull))[0] / 2
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["int2", "int4", "int4g16", "uint3g32", "e2m1"])
def test_it_is_better_than_nearest_in_every_channel_and_on_the_grid(name):
    weight, grid = layer(name)
    x, seen = examples()
    rounded = adaround(weight, *moments(x, seen), grid, iterations=300)
    ours, nearest = (squared_error(w, weight, x, seen) for w in (rounded, grid.round(weight)))
    assert (ours <= nearest).all() and ours.sum() < 0.8 * nearest.sum()
    torch.testing.assert_close(grid.round(rounded), rounded, rtol=1e-12, atol=0)
    units = grid.units(weight).clamp(grid.low, grid.high)
    assert ((grid.units(rounded) - units).abs() <= grid.step_at(units) * 1.0001).all()  # one of the two neighbours


def test_without_iterations_nothing_is_worse_than_nearest():
    weight, grid = layer("int4")
    x, seen = examples()
    rounded = adaround(weight, *moments(x, seen), grid, iterations=0)
    assert (squared_error(rounded, weight, x, seen) <= squared_error(grid.round(weight), weight, x, seen)).all()


def test_it_comes_close_to_the_best_of_all_roundings():
    weight, grid = layer("int3", columns=10, rows=1)
    x, seen = examples(columns=10)
    units = grid.units(weight)
    choices = torch.tensor(list(itertools.product((0.0, 1.0), repeat=10)), dtype=torch.float64)
    every = grid.values((units.floor()[0] + choices).clamp(grid.low[0], grid.high[0]).unsqueeze(0))
    errors = squared_error(every, weight, x, seen)
    rounded = adaround(weight, *moments(x, seen), grid)
    assert squared_error(rounded, weight, x, seen)[0] <= 1.5 * errors.min()

"""Quantized models under torch.export and torch.jit.trace: the same values, in torch's own operations."""

import pytest
import torch
from torch import nn

from quant.convert import calibrate, quantize_model, set_formats
from quant.formats import parse_format
from quant.kernels.eager import _cached_params, round_to_grid, rounding_params
from quant.kernels.emulation import emulate_grid
from quant.quantizers.quantizer import QuantizerConfig

FORMATS = ["int4", "int8", "e4m3", "e5m2", "e2m1", "bf16", "mxfp4", "mxint8", "nvfp4"]
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")


def quantized(name, **activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval()
    x, format = torch.randn(3, 3, 6, 6), parse_format(name)
    modules = quantize_model(model, formats=[format], activation=QuantizerConfig(**activation))
    calibrate(model, modules, [x])
    set_formats(modules, dict.fromkeys(modules, (format, format)))
    return model, x


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "inference"])
def test_exported_and_traced_models_give_the_same_values(name, gradients):
    model, x = quantized(name)
    _cached_params.cache_clear()
    with torch.set_grad_enabled(gradients):
        axes = ({0: torch.export.Dim.AUTO},)
        exported = torch.export.export(model, (torch.randn_like(x),), dynamic_shapes=axes).run_decompositions().module()
        traced = torch.jit.trace(model, (torch.randn_like(x),))
        for rows in (x, x[:2]):
            assert torch.equal(exported(rows), model(rows)) or name == "nvfp4"  # decomposed divisions may round twice
            torch.testing.assert_close(exported(rows), model(rows), atol=1e-6, rtol=1e-5)
        assert torch.equal(traced(x), model(x))
    assert isinstance(rounding_params(parse_format("int8")).sum().item(), float)  # no tensor of a trace is cached


@pytest.mark.parametrize(
    "activation",
    [
        {"range": "dynamic", "observer": "minmax"},
        {"symmetric": False, "learned_offset": True},
    ],
    ids=["dynamic", "offset"],
)
def test_other_ranges_are_recorded_too(activation):
    model, x = quantized("int8", **activation)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
        torch.testing.assert_close(torch.jit.trace(model, (x,))(x), model(x))


@pytest.mark.parametrize("name", ["int2", "int8", "int16", "e4m3", "e2m1", "e8m7", "e3m1"])
def test_the_grid_without_bits_is_the_grid(name):
    row = rounding_params(parse_format(name))
    powers = 2.0 ** torch.arange(-126, 127)
    near = torch.cat(
        [powers, torch.nextafter(powers, torch.tensor(0.0)), 1.5 * powers, torch.linspace(-500, 500, 4001)]
    )
    values = torch.cat([near, -near, torch.zeros(1)])
    assert torch.equal(emulate_grid(values, row), round_to_grid(values, row))

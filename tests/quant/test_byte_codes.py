"""Layers on codes of one byte against the exact result, and what has to stay in float."""

import copy

import pytest
import torch
from torch import nn

from quant import byte_codes, onednn
from quant.convert import calibrate, from_float, quantize_model, set_formats, weights_kept
from quant.formats import IntFormat, byte_grid, parse_format
from quant.kernels import kernels
from quant.quant_utils import use_compiled
from quant.quantizer import ACTIVATION, WEIGHT, QuantizerConfig
from tests.quant.test_quant_module import LAYERS, plainly, quantized

BYTES = [("int2", "int8"), ("int8", "int8"), ("int4", "int3"), ("e2m1", "e2m3"), ("int4", "e2m1")]
FLOATS = {"same", "reflect", "replicate", "circular", "conv1d same", "dilated and strided"}
"""kinds of `LAYERS` with a padding that oneDNN's operators do not know"""


@pytest.fixture
def codes():
    """Native kernels; the layers that were computed on codes, by the kind of product."""
    if not use_compiled("auto") or not kernels().makes_codes:
        use_compiled("off")
        pytest.skip("no compiler, or no integer kernels that are exact here")
    yield
    use_compiled("off")


@pytest.fixture
def products(codes, monkeypatch):
    made = []
    for name in ("multiply", "convolve"):
        original = getattr(onednn, name)
        monkeypatch.setattr(onednn, name, lambda *args, original=original: made.append(args) or original(*args))
    return made


def exact(module, layer, x):
    """The rounded tensors' product in float64."""
    weight, input = plainly(module.weight_quantizer, module.weight), plainly(module.input_quantizer, x)
    wide = copy.deepcopy(layer).double()
    return torch.func.functional_call(wide, {"weight": weight.detach().double()}, (input.detach().double(),))


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind not in FLOATS])
@pytest.mark.parametrize("pair", BYTES, ids="-".join)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_layer_on_codes_is_as_exact_as_float32_can_tell(products, kind, pair, training):
    layer, x = LAYERS[kind]()
    module = quantized(layer, *pair, x).train(training)
    with torch.set_grad_enabled(training):
        output = module(x)
    assert len(products) == 1
    wanted = exact(module, layer, x)
    assert (output - wanted).abs().max() <= 3e-7 * wanted.abs().max()
    assert output.stride() == layer(x).stride(), "views that fit the float layer's output fit this one"


@pytest.mark.parametrize("kind", ["linear", "conv", "depthwise"])
def test_inputs_without_negative_values_use_all_codes(products, kind):
    layer, x = LAYERS[kind]()
    module = quantized(layer, "int8", "int8", x.relu())
    assert torch.unique(module(x.relu()).isfinite()).tolist() == [True]
    assert products[0][1] == 0 and products[0][0].max() > 250
    wanted = exact(module, layer, x.relu())
    assert (module(x.relu()) - wanted).abs().max() <= 3e-7 * wanted.abs().max()


@pytest.mark.parametrize("name", ["int2", "int4", "int8", "e2m1", "e2m3", "e1m2"])
@pytest.mark.parametrize("groups", [1, 7], ids=["per tensor", "per channel"])
def test_codes_stand_for_the_rounded_values_to_the_bit(codes, name, groups):
    format = parse_format(name)
    x = torch.cat([torch.linspace(-3, 3, 7 * 4999), torch.tensor([0.0, -0.0, 1e30, -1e30, 1e-40, 2.5, -2.5])]).view(
        7, -1
    )
    module = from_float(nn.Linear(x.shape[1], 7), QuantizerConfig(granularity="channel" if groups > 1 else "tensor"))
    quantizer = module.weight_quantizer
    quantizer.set_format(format)
    quantizer.observe(x.clamp(-2, 2) * torch.linspace(0.1, 1, 7).view(7, 1))
    quantizer.finish_calibration()
    rounder = quantizer.rounding(x)
    made = byte_codes.codes_of(rounder, x, torch.int8)
    values = made.codes.float() * rounder.bytes.step * rounder.scale.detach()
    assert made.codes.dtype == torch.int8 and len(made.scale) == groups
    assert torch.equal(values, rounder.values(x))
    moved = byte_codes.codes_of(rounder, x, torch.uint8)
    assert torch.equal(moved.codes.int() - moved.zero_point, made.codes.int())


@pytest.mark.parametrize("name", ["int2", "int3", "int8", "e2m1", "e2m3", "e1m2", "e3m2", "e4m3", "int16"])
def test_the_formats_whose_values_a_byte_holds(name):
    format = parse_format(name)
    low, high = format.rounding().low, format.rounding().high
    grid = byte_grid(format, low, high)
    assert (grid is None) == (name in ("e3m2", "e4m3", "int16"))
    if grid is not None:
        assert grid.signed and grid.zero_point >= 0 and grid.zero_point + high / grid.step <= 255
    if isinstance(format, IntFormat) and format.width <= 8:
        unsigned = byte_grid(format, 0, 2**format.width - 1)
        assert unsigned.zero_point == 0 and unsigned.signed == (format.width < 8)


@pytest.mark.parametrize("place", ["input", "weight", "scale"])
def test_what_is_not_a_number_stays_seen(products, place):
    layer, x = LAYERS["linear"]()
    module = quantized(layer, "int4", "int8", x)
    with torch.no_grad():
        {"input": x, "weight": module.weight, "scale": module.input_quantizer.grids["int8"].scale}[place].fill_(
            torch.nan
        )
    assert module(x).isnan().any() and not products


def asymmetric_weights():
    layer, x = LAYERS["linear"]()
    module = from_float(layer, QuantizerConfig(granularity="channel", symmetric=False), ACTIVATION)
    return module, "int4", "int8", x


def other_configuration(**settings):
    layer, x = LAYERS["linear"]()
    return from_float(layer, WEIGHT, QuantizerConfig(**settings)), "int4", "int8", x


LEFT = {
    "asymmetric weights": asymmetric_weights,
    "a scale for each token": lambda: other_configuration(range="dynamic", granularity="token"),
    "a learned offset": lambda: other_configuration(symmetric=False, learned_offset=True),
    "wide floats": lambda: (from_float(LAYERS["linear"]()[0]), "int4", "e4m3", LAYERS["linear"]()[1]),
    "float inputs": lambda: (from_float(LAYERS["linear"]()[0]), "int4", "float", LAYERS["linear"]()[1]),
    "padding by reflection": lambda: (from_float(LAYERS["reflect"]()[0]), "int4", "int8", LAYERS["reflect"]()[1]),
    "half precision": lambda: (
        from_float(LAYERS["linear"]()[0]).bfloat16(),
        "int4",
        "int8",
        LAYERS["linear"]()[1].bfloat16(),
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_bytes_do_not_hold_is_computed_in_float(products, case):
    module, weight, activation, x = LEFT[case]()
    module.train().set_formats(parse_format(weight), parse_format(activation))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert module(x).isfinite().all()
    assert not products


def test_autocast_decides_the_type_of_the_output(products):
    layer, x = LAYERS["linear"]()
    module = quantized(layer, "int4", "int8", x)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    assert not products and module(x).dtype == torch.float32 and products


def test_channels_stay_innermost_where_they_are(products):
    layer, x = LAYERS["conv"]()
    module = quantized(layer, "int4", "int8", x)
    output = module(x.contiguous(memory_format=torch.channels_last))
    assert output.is_contiguous(memory_format=torch.channels_last) and module(x).is_contiguous()
    torch.testing.assert_close(output, module(x), rtol=0, atol=0)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 5))


def test_a_kept_weight_is_packed_once_until_something_changes(codes, monkeypatch):
    packed = []
    for name in ("pack_matrix", "pack_filters"):
        original = getattr(onednn, name)
        monkeypatch.setattr(onednn, name, lambda *args, original=original: packed.append(args) or original(*args))
    model, x = network(), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    int4, int8 = IntFormat(4), IntFormat(8)
    layers = quantize_model(model, formats=[int4, int8])
    calibrate(model, layers, [x])
    set_formats(layers, dict.fromkeys(layers, (int4, int8)))
    model.eval()
    with torch.inference_mode(), weights_kept(layers):
        first, again = model(x), model(x)
        assert len(packed) == 3 and torch.equal(first, again)
        set_formats({"2": layers["2"]}, {"2": (int8, int8)})
        assert not torch.equal(model(x), first) and len(packed) == 4
        with torch.inference_mode(False), torch.no_grad():
            model[4].weight.add_(1.0)
        assert not torch.equal(model(x), first) and len(packed) == 5


def test_processors_that_add_up_otherwise_compute_in_float(products, monkeypatch):
    monkeypatch.setattr(type(kernels()), "makes_codes", False, raising=False)
    monkeypatch.setattr(kernels(), "makes_codes", False)
    layer, x = LAYERS["conv"]()
    quantized(layer, "int4", "int8", x)(x)
    assert not products


def test_operators_that_are_missing_or_saturate_are_not_used(monkeypatch):
    onednn.exact.cache_clear()
    try:
        original = onednn.multiply
        monkeypatch.setattr(onednn, "multiply", lambda *args: original(*args).clamp(max=2**20))
        assert onednn.exact() is False
        onednn.exact.cache_clear()
        monkeypatch.setattr(onednn, "multiply", lambda *args: torch.ops.onednn.is_missing(*args))
        assert onednn.exact() is False
    finally:
        onednn.exact.cache_clear()

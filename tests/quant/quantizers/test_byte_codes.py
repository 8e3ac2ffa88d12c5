"""Layers computed on byte codes against the exact result, and layers that must stay in float."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from quant.convert import calibrate, from_float, quantize_model, rounded_weights_cached, set_formats
from quant.formats import IntFormat, byte_grid, parse_format
from quant.kernels import onednn
from quant.kernels.dispatch import kernels
from quant.quant_utils import use_compiled
from quant.quantizers import byte_codes
from quant.quantizers.quantizer import ACTIVATION, WEIGHT, QuantizerConfig
from tests.quant.test_quant_module import LAYERS, plainly, quantized

BYTES = [("int2", "int8"), ("int8", "int8"), ("int4", "int3"), ("e2m1", "e2m3"), ("int4", "e2m1")]
FLOATS = {"same", "reflect", "replicate", "circular", "zeros", "conv1d same", "dilated and strided"}
"""kinds of `LAYERS` with a padding or strides that oneDNN's operators do not know, or know wrongly"""


@pytest.fixture
def codes():
    """Enable native kernels; list the layers that were computed on codes, by the kind of product."""
    if not use_compiled("auto") or not kernels().makes_codes:
        use_compiled("off")
        pytest.skip("no compiler, or no integer kernels that are exact here")
    yield
    use_compiled("off")


@pytest.fixture
def products(codes, monkeypatch):
    return counted(monkeypatch, "multiply", "convolve")


def counted(monkeypatch, *names):
    """Record the arguments of each call of these operators, except trials of a shape."""
    made, trying = [], []

    def count(original):
        return lambda *args: made.append(args) or original(*args) if not trying else original(*args)

    def tried(*args, original=onednn._tried):
        trying.append(args)
        try:
            return original(*args)
        finally:
            trying.clear()

    monkeypatch.setattr(onednn, "_tried", tried)
    for name in names:
        monkeypatch.setattr(onednn, name, count(getattr(onednn, name)))
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


@pytest.mark.parametrize("more", [0, 1], ids=["longest", "one more"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_sums_that_int32_might_not_hold_are_left_to_float32(products, kind, more):
    length = onednn.LONGEST_SUM + more
    layer, x = nn.Linear(length, 2, bias=False), torch.ones(3, length)
    if kind == "conv":
        layer, x = nn.Conv1d(1, 2, length, bias=False), x.view(3, 1, length)
    with torch.no_grad():
        layer.weight[:] = torch.tensor([1.0, -1.0]).view(2, *(1,) * (layer.weight.dim() - 1))
    module = quantized(layer, "int8", "int8", x).eval()
    with torch.no_grad():
        output = module(x)
    assert len(products) == 1 - more and (more or products[0][0].max() == 255)
    torch.testing.assert_close(output.double(), exact(module, layer, x), rtol=1e-5, atol=0)


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


def biased(bias):
    layer = nn.Linear(8, 6)
    layer.bias = nn.Parameter(bias)
    return layer, torch.randn(5, 8)


WRONG = {
    "strides that differ, one column": lambda: (nn.Conv2d(1, 8, (1, 4), stride=(1, 4)), torch.randn(2, 1, 8, 4)),
    "strides that differ, groups": lambda: (nn.Conv2d(4, 32, (3, 4), stride=(1, 2), groups=4), torch.randn(2, 4, 8, 4)),
    "padding alone": lambda: (nn.Conv2d(1, 8, 2, padding=2), torch.randn(2, 1, 6, 6)),
    "padding alone, groups": lambda: (nn.Conv2d(4, 8, 3, padding=3, groups=4), torch.randn(2, 4, 6, 6)),
    "padding alone, dilation": lambda: (nn.Conv2d(8, 8, 2, padding=1, dilation=2), torch.randn(2, 8, 8, 1)),
    "padding alone, 1x1": lambda: (nn.Conv2d(3, 16, 1, padding=(0, 1)), torch.randn(4, 3, 3, 1)),
    "a flat volume": lambda: (nn.Conv3d(1, 8, 3, padding=1), torch.randn(2, 1, 1, 8, 8)),
    "a bias with gaps": lambda: biased(torch.arange(12.0)[::2]),
    "a bias of one number": lambda: biased(torch.tensor(0.5)),
    "a bias without memory of its own": lambda: biased(torch.arange(2.0)[1:].expand(6)),
}
"""what oneDNN's operators compute wrongly, by their own fault or since they look at memory alone"""


@pytest.mark.parametrize("case", WRONG)
def test_what_the_operators_compute_wrongly_is_left_to_float32(products, case):
    layer, x = WRONG[case]()
    module = quantized(layer, "int8", "int8", x)
    wanted = exact(module, layer, x)
    assert (module(x) - wanted).abs().max() <= 1e-5 * wanted.abs().max() and not products


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_convolutions_of_any_shape_are_exact(products, data):
    """Includes shapes for which the trial of oneDNN failed."""
    axes = data.draw(st.sampled_from([1, 2, 2, 3]))
    groups, into, out = data.draw(
        st.sampled_from([(1, 1, 8), (1, 3, 16), (1, 16, 5), (4, 1, 1), (16, 1, 2), (2, 8, 8)])
    )

    def sizes(*choices):
        return [data.draw(st.sampled_from(choices)) for _ in range(axes)]

    kernel, padding, dilation, image = sizes(1, 2, 3, 5), sizes(0, 1, 2), sizes(1, 1, 2), sizes(3, 4, 7, 8)
    stride = sizes(1, 2, 3) if data.draw(st.booleans()) else data.draw(st.sampled_from([1, 2]))
    if any(size + 2 * p <= (k - 1) * d for size, p, k, d in zip(image, padding, kernel, dilation, strict=True)):
        return
    torch.manual_seed(0)
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](
        groups * into, groups * out, kernel, stride, padding, dilation, groups, bias=data.draw(st.booleans())
    )
    x = torch.randn(data.draw(st.sampled_from([1, 2, 5])), groups * into, *image)
    module = quantized(layer, "int4", "int8", x)
    wanted, output = exact(module, layer, x), module(x)
    assert (output - wanted).abs().max() <= 1e-6 * wanted.abs().max() + 1e-12


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv"])
def test_weights_in_any_memory_order(products, kind):
    layer, x = LAYERS[kind]()
    order = torch.arange(layer.weight.dim()).roll(1).tolist()
    back = sorted(range(len(order)), key=order.__getitem__)
    layer.weight = nn.Parameter(layer.weight.detach().permute(order).contiguous().permute(back))
    module = quantized(layer, "int4", "int8", x)
    wanted = exact(module, layer, x)
    assert (
        not layer.weight.is_contiguous() and (module(x) - wanted).abs().max() <= 3e-7 * wanted.abs().max() and products
    )


def test_inputs_with_gaps_give_outputs_as_the_float_layer_does(products):
    for layer, x in (
        (nn.Conv1d(8, 4, 3), torch.randn(2, 10, 8).transpose(1, 2)),
        (nn.Conv2d(8, 4, 3), torch.randn(2, 8, 10, 20)[..., ::2]),
    ):
        output = quantized(layer, "int4", "int8", x)(x)
        assert output.stride() == layer(x).stride()
    assert len(products) == 2


def test_inputs_that_do_not_fit_are_refused_as_the_float_layer_does(codes):
    for kind, wrong in (
        ("conv", torch.randn(4, 8, 2, 2)),
        ("conv", torch.randn(4, 7, 9, 9)),
        ("linear", torch.ones(3)),
    ):
        layer, x = LAYERS[kind]()
        layer.padding = (0, 0)
        module = quantized(layer, "int4", "int8", x)
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises(RuntimeError) as float_error:
                layer(wrong)
            with torch.set_grad_enabled(grad), pytest.raises(RuntimeError) as error:
                module(wrong)
            assert str(error.value) == str(float_error.value)


@pytest.mark.filterwarnings("ignore")
def test_traces_hold_what_they_can_record(products):
    model, x = network().eval(), torch.randn(4, 3, 8, 8)
    int4 = IntFormat(4)
    layers = quantize_model(model, formats=[int4])
    calibrate(model, layers, [x])
    set_formats(layers, dict.fromkeys(layers, (int4, int4)))
    with torch.no_grad():
        traced = torch.jit.trace(model, x, check_trace=False)
        assert not products
        torch.testing.assert_close(traced(x), model(x))
    assert len(products) == 3


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
    packed = counted(monkeypatch, "pack_matrix", "pack_filters")
    model, x = network(), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    int4, int8 = IntFormat(4), IntFormat(8)
    layers = quantize_model(model, formats=[int4, int8])
    calibrate(model, layers, [x])
    set_formats(layers, dict.fromkeys(layers, (int4, int8)))
    model.eval()
    with torch.inference_mode(), rounded_weights_cached(layers):
        first, again = model(x), model(x)
        assert copy.deepcopy(layers["0"]).rounded_weight_cache.value is None
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

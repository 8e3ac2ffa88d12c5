"""ONNX exports run by ONNX Runtime: the fake-quantized model's logits, types, sizes, norms that are folded."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx
import onnxruntime

import quant.export_onnx
from quant.convert import calibrate, quantize_model, set_formats
from quant.errors import UserError
from quant.export_emulation import emulate, power_below, round_minifloat
from quant.export_onnx import export_onnx, onnx_sizes
from quant.formats import FLOAT, BlockFormat, parse_format
from quant.quant_utils import fake_quantize
from quant.quantizer import QuantizerConfig


@pytest.fixture(scope="module", autouse=True)
def trace_once():
    """Tracing takes most of an export's time, and only blocks of inputs make a difference to it."""
    traces = {}
    trace = quant.export_onnx.trace

    def cached(model, modules, inputs):
        blocks = tuple(str(m.formats[1]) for m in modules.values() if isinstance(m.formats[1], BlockFormat))
        key = type(model), blocks
        if key not in traces:
            traces[key] = trace(model, modules, inputs)
        return traces[key]

    quant.export_onnx.trace = cached
    yield
    quant.export_onnx.trace = trace


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2, padding=1)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12, stride=2, bias=False)
        self.linear = nn.Linear(12, 37)
        self.conv1d = Conv1D(5, 37)

    def forward(self, images):
        x = self.norm(self.conv(images)).relu()
        x = self.depthwise(self.grouped(x).relu()).relu().mean((2, 3))
        return self.conv1d(torch.nn.functional.gelu(self.linear(x)))


def quantized(pairs, **configs):
    torch.manual_seed(0)
    model = Net().eval()
    nn.init.normal_(model.norm.weight)  # signs of both kinds
    model.norm.running_mean.normal_()
    pairs = [tuple(map(parse_format, pair.split("/"))) for pair in pairs]
    modules = quantize_model(model, formats={f for pair in pairs for f in pair if f != FLOAT}, **configs)
    images = torch.randn(16, 3, 8, 8)
    calibrate(model, modules, [images])
    set_formats(modules, dict(zip(modules, pairs, strict=True)))
    return model, modules, images


def run(path, images, optimized=True):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


SETS = {
    "own types": ["int8/int8", "int4/int4", "int16/int8", "e4m3/e4m3", "e5m2/e5m2"],
    "wider types": ["int2/int3", "int3/int2", "int5/int6", "e2m1/e2m1", "e3m2/e2m3"],
    "wide floats": ["bf16/bf16", "fp16/fp16", "e3m4/e3m4", "e5m10/e6m2", "e8m1/int16"],
    "blocks": ["mxint8/mxint8", "mxfp4/mxfp4", "nvfp4/nvfp4", "mxfp6/mxfp8", "mxfp8/mxfp6"],
    "one side": ["int8/float", "float/int8", "mxfp4/float", "e4m3/int8", "float/e4m3"],
}


@pytest.mark.parametrize("pairs", SETS.values(), ids=SETS)
def test_onnx_runtime_gives_the_models_logits(pairs, tmp_path):
    model, modules, images = quantized(pairs)
    path = tmp_path / "m.onnx"
    layers = export_onnx(path, model, modules, {"images": images[:1]})
    with torch.no_grad():
        expected = model(images)
    scale = expected.abs().max()
    for optimized in (False, True):
        got = run(path, images, optimized)
        # A float sum that ends on the other side of a tie moves one code; all others agree to float rounding.
        assert ((got - expected).abs() > 1e-5 * scale).float().mean() < 0.05
        assert (got - expected).abs().max() < 0.05 * scale
    proto = onnx.load(path)
    assert {entry.domain: entry.version for entry in proto.opset_import} == {"": 21}
    assert list(layers) == list(modules)


def test_verdicts_name_what_is_wider_and_why(tmp_path):
    pairs = ["int8/int8", "int3/int6", "e2m1/e2m1", "mxfp4/e8m1", "int4/float"]
    model, modules, images = quantized(pairs)
    path = tmp_path / "m.onnx"
    layers = export_onnx(path, model, modules, {"images": images[:1]})
    told = {n: (v.exported_weight, v.exported_activation, v.weight_bits, v.activation_bits) for n, v in layers.items()}
    assert told == {
        "conv": ("int8", "int8", 8, 8),
        "grouped": ("int4", "int8", 4, 8),
        "depthwise": ("e4m3", "e4m3", 8, 8),
        "linear": ("e4m3", "float32", 9, 16),
        "conv1d": ("int4", "float", 4, 16),
    }
    assert [v.as_chosen for v in layers.values()] == [True, False, False, False, True]
    assert "int3 values stored as int4" in layers["grouped"].why[0] and "clipped" in layers["grouped"].why[1]
    sizes = onnx_sizes(path, layers)
    assert sum(sizes.values()) == path.stat().st_size
    counts = {name: module.weight.numel() for name, module in modules.items()}
    four_bits = -(-counts["grouped"] // 2) + -(-counts["conv1d"] // 2)
    assert sizes["codes"] == counts["conv"] + counts["depthwise"] + counts["linear"] + four_bits
    assert sizes["block_scales"] == 4 * 37 and sizes["float_weights"] == 0


def test_folded_norms_leave_the_codes_alone(tmp_path):
    model, modules, images = quantized(["int8/int8", "int8/int8", "int4/int4", "int8/int8", "int8/int8"])
    kinds, results = {}, {}
    for fold in (False, True):
        path = tmp_path / f"{fold}.onnx"
        export_onnx(path, model, modules, {"images": images[:1]}, fold)
        proto = onnx.load(path)
        kinds[fold] = [node.op_type for node in proto.graph.node]
        codes = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer if t.name.endswith(".codes")}
        results[fold] = codes["conv.weight.codes"], run(path, images, optimized=False)
    assert "BatchNormalization" in kinds[False] and "BatchNormalization" not in kinds[True]
    np.testing.assert_array_equal(np.abs(results[True][0]), np.abs(results[False][0]))
    torch.testing.assert_close(results[True][1], results[False][1], rtol=0.05, atol=0.02)


def test_asymmetric_weights_keep_their_zero_points(tmp_path):
    weight = QuantizerConfig(range="calibrated", granularity="channel", symmetric=False)
    model, modules, images = quantized(
        ["int8/float", "int4/float", "int3/float", "int8/float", "int8/float"], weight=weight
    )
    export_onnx(tmp_path / "m.onnx", model, modules, {"images": images[:1]})
    with torch.no_grad():
        torch.testing.assert_close(
            run(tmp_path / "m.onnx", images, optimized=False), model(images), rtol=1e-4, atol=1e-5
        )


def test_learned_offsets_are_taken_off_and_added_again(tmp_path):
    activation = QuantizerConfig(symmetric=False, learned_offset=True)
    model, modules, images = quantized(
        ["int8/int8", "int8/int4", "int8/int3", "int8/int8", "int8/e4m3"], activation=activation
    )
    modules["conv"].input_quantizer.grids["int8"].offset.data.add_(0.123)
    export_onnx(tmp_path / "m.onnx", model, modules, {"images": images[:1]})
    with torch.no_grad():
        expected = model(images)
    difference = (run(tmp_path / "m.onnx", images, optimized=False) - expected).abs() / expected.abs().max()
    assert (difference > 1e-5).float().mean() < 0.05 and difference.max() < 0.05


def test_ranges_found_at_run_time_are_refused(tmp_path):
    activation = QuantizerConfig(range="dynamic", granularity="token", symmetric=False)
    model, modules, images = quantized(["int8/int8"] * 5, activation=activation)
    with pytest.raises(UserError, match="the input of conv has no fixed range"):
        export_onnx(tmp_path / "m.onnx", model, modules, {"images": images[:1]})
    assert not list(tmp_path.iterdir())


def test_an_operation_that_onnx_lacks_is_one_line(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return torch.linalg.eigvals(self.linear(x.mT @ x)).real

    model = Odd().eval()
    modules = quantize_model(model)
    set_formats(modules, {"linear": (parse_format("int8"), FLOAT)})
    with pytest.raises(UserError, match=r"--format onnx: Odd cannot be exported: .*eig") as told:
        export_onnx(tmp_path / "m.onnx", model, modules, {"x": torch.ones(3, 4)})
    assert "\n" not in str(told.value) and not list(tmp_path.iterdir())
    assert isinstance(model.linear, nn.Linear) and "linear" in modules and model.linear is modules["linear"]


MINIFLOATS = ["e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "e3m4", "e1m2", "bf16", "fp16"]


@pytest.mark.parametrize("name", MINIFLOATS)
def test_emulated_rounding_is_fake_quantize(name):
    format = parse_format(name)
    exponents = torch.arange(-30, 18).float().exp2()
    around = torch.cat([exponents * factor for factor in (1 - 2**-24, 1, 1 + 2**-23, 1.25, 1.5, 1.75, 1.9999)])
    x = torch.cat([around, -around, torch.zeros(1), torch.randn(10_000) * 10])
    torch.testing.assert_close(round_minifloat(x, format), fake_quantize(x, format), rtol=0, atol=0)


def test_powers_are_exact_next_to_powers_of_two():
    powers = torch.arange(-126, 128).double().exp2().float()
    for x in (powers, torch.nextafter(powers, torch.tensor(torch.inf)).clamp(max=3e38)):
        assert torch.equal(power_below(x), powers)
    below = torch.nextafter(powers[1:], torch.tensor(0.0))
    assert torch.equal(power_below(below), powers[:-1])


@pytest.mark.parametrize("name", ["mxfp8", "mxfp6", "mxfp4", "mxint8", "nvfp4"])
@pytest.mark.parametrize("dim", [1, -1])
def test_emulated_blocks_are_fake_quantize(name, dim):
    format = parse_format(name)
    x = torch.randn(3, 40, 5, 50, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 50)
    x[0] = 0
    torch.testing.assert_close(emulate(x, format, dim), fake_quantize(x, format, dim=dim), rtol=1e-6, atol=0)

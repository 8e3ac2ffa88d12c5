"""ONNX exports in ONNX Runtime: the fake-quantized model's logits, types, sizes, integer operations."""

import copy
import math
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx
import onnxruntime
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

import quant.export.onnx.export
from cost.cost import compute_cost, cost_of_bits
from cost.profile import profile_model
from eval.export.onnx_timing import session, settings_of
from quant.convert import calibrate, quantize_model, set_formats
from quant.engines.table import ENGINES
from quant.errors import UserError
from quant.export.onnx.bounds import fold_bounds
from quant.export.onnx.export import export_onnx, onnx_sizes
from quant.export.onnx.export import trace as uncached_trace
from quant.export.onnx.integer_ops import grid_of
from quant.formats import FLOAT, BlockFormat, parse_format
from quant.kernels.emulation import emulate, power_below, round_minifloat
from quant.quant_experts import ExpertLinear
from quant.quant_utils import fake_quantize
from quant.quantizers.quantizer import QuantizerConfig


@pytest.fixture(scope="module", autouse=True)
def trace_once():
    """Cache traces: tracing takes most of an export's time and depends only on block formats of inputs."""
    traces = {}
    trace = quant.export.onnx.export.trace

    def cached(model, modules, inputs):
        blocks = tuple(str(m.formats[1]) for m in modules.values() if isinstance(m.formats[1], BlockFormat))
        shapes = tuple(tuple(x.shape[1:]) for x in inputs.values())
        key = tuple(type(module) for module in model.modules()), blocks, shapes
        if key not in traces:
            traces[key] = trace(model, modules, inputs)
        return traces[key]

    quant.export.onnx.export.trace = cached
    yield
    quant.export.onnx.export.trace = trace


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
    return torch.from_numpy(session.run(["logits"], {session.get_inputs()[0].name: images.numpy()})[0])


SETS = {
    "own types": ["int8/int8", "int4/int4", "int16/int8", "e4m3/e4m3", "e5m2/e5m2"],
    "wider types": ["int2/int3", "int3/int2", "int5/int6", "e2m1/e2m1", "e3m2/e2m3"],
    "wide floats": ["bf16/bf16", "fp16/fp16", "e3m4/e3m4", "e5m10/e6m2", "e8m1/int16"],
    "minifloats behind a relu": ["int8/int8", "int8/e4m3", "e4m3/e5m2", "int8/int8", "int8/int8"],
    "blocks": ["mxint8/mxint8", "mxfp4/mxfp4", "nvfp4/nvfp4", "mxfp6/mxfp8", "mxfp8/mxfp6"],
    "groups": ["int4g16/float", "uint4g16/int8", "int8g32/float", "int3g16/e4m3", "uint3g32/int4"],
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
        # A float sum on the other side of a tie changes one code; all others agree up to float rounding.
        assert ((got - expected).abs() > 1e-5 * scale).float().mean() < 0.05
        assert (got - expected).abs().max() < 0.05 * scale
    proto = onnx.load(path)
    assert {entry.domain: entry.version for entry in proto.opset_import} == {"": 21}
    assert list(layers) == list(modules)


def test_symmetric_integers_have_the_zero_point_0_as_tensorrt_wants_it(tmp_path):
    symmetric = QuantizerConfig(range="calibrated", symmetric=True)
    pairs = ["int8/int8", "int8/int8", "int4/int8", "int8/int8", "int8/int6"]
    model, modules, images = quantized(pairs, activation=symmetric)
    export_onnx(tmp_path / "m.onnx", model, modules, {"images": images[:1]})
    graph = onnx.load(tmp_path / "m.onnx").graph
    values = {tensor.name: tensor for tensor in graph.initializer}
    made = {node.output[0]: node for node in graph.node}
    roundings = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert sum(node.op_type == "QuantizeLinear" for node in roundings) == len(modules)
    for node in roundings:
        if len(node.input) > 2 and node.input[2]:
            point = values[node.input[2]]
            assert point.data_type == onnx.TensorProto.INT8 and not onnx.numpy_helper.to_array(point).any(), node.name
        if node.op_type == "DequantizeLinear" and node.input[0] in made:
            assert made[node.input[0]].op_type == "QuantizeLinear"
    with torch.no_grad():
        expected = model(images)
    for optimized in (False, True):
        got = run(tmp_path / "m.onnx", images, optimized)
        assert ((got - expected).abs() > 1e-5 * expected.abs().max()).float().mean() < 0.05


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("format", ["int8", "int4", "int3", "int16", "e4m3", "e2m1"])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-1, 2)], ids=["relu", "relu6", "hardtanh"])
def test_what_bounds_an_input_is_kept(activation, format, symmetric, tmp_path):
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3)
    model = nn.Sequential(
        OrderedDict(images=first, bounds=activation, second=second, mean=nn.AdaptiveAvgPool2d(1))
    ).eval()
    pair = tuple(map(parse_format, ("int8", format)))
    modules = quantize_model(model, formats=set(pair), activation=QuantizerConfig(symmetric=symmetric))
    images = 3 * torch.randn(16, 3, 8, 8)
    calibrate(model, modules, [images])
    set_formats(modules, dict.fromkeys(modules, pair))
    export_onnx(tmp_path / "m.onnx", model, modules, {"input": images[:1]})
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    got = torch.from_numpy(session.run(None, {"input": images.numpy()})[0])
    with torch.no_grad():
        expected = model(images)
    assert (got - expected).abs().max() < 0.02 * expected.abs().max()


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
        "linear": ("e4m3", "float32", 8 + 16 / 12, 16),
        "conv1d": ("int4", "float", 4, 16),
    }
    assert [v.as_chosen for v in layers.values()] == [True, False, False, False, True]
    assert "int3 values stored as int4" in layers["grouped"].why[0] and "clipped" in layers["grouped"].why[1]
    sizes = onnx_sizes(path, layers)
    assert sum(sizes.values()) == path.stat().st_size
    counts = {name: module.weight.numel() for name, module in modules.items()}
    four_bits = -(-counts["grouped"] // 2) + -(-counts["conv1d"] // 2)
    assert sizes["codes"] == counts["conv"] + counts["depthwise"] + counts["linear"] + four_bits
    assert sizes["block_scales"] == 2 * 37 and sizes["float_weights"] == 0


@pytest.mark.parametrize("inputs, outputs", [(64, 8), (128, 96)])
def test_bits_of_groups_and_blocks_are_those_of_the_file(inputs, outputs, tmp_path):
    """What verdict and cost say, counted in the file: codes, scales, zero points; few scales and many."""
    width = {TensorProto.INT4: 4, TensorProto.INT8: 8, TensorProto.FLOAT: 32}
    width |= dict.fromkeys((TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2), 8)
    width |= dict.fromkeys((TensorProto.FLOAT16, TensorProto.BFLOAT16), 16)
    for name in ("int4g32/float", "uint4g32/float", "int8g64/int8", "uint8g32/int8", "int3g32/float", "mxfp4/float"):
        torch.manual_seed(0)
        model, path = nn.Sequential(nn.Linear(inputs, outputs)), tmp_path / "m.onnx"
        weight, activation = map(parse_format, name.split("/"))
        modules = quantize_model(model, formats={weight, activation} - {FLOAT})
        calibrate(model, modules, [torch.randn(4, inputs)])
        set_formats(modules, {"0": (weight, activation)})
        said = export_onnx(path, model, modules, {"x": torch.randn(2, inputs)})["0"].weight_bits
        stored = [tensor for tensor in onnx.load(path).graph.initializer if tensor.name.startswith("0.weight")]
        assert sum(width[x.data_type] * math.prod(x.dims) for x in stored) / (inputs * outputs) == said, name
        if ENGINES["onnxruntime"].keeps("linear", (weight, activation)):
            assert ENGINES["onnxruntime"].weight_bits(weight) == said, name


def optimized_kinds(path):
    """Counts of the operations after ONNX Runtime's optimization."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


@pytest.mark.parametrize("narrow", [False, True])
def test_rounded_outputs_make_convolutions_integer_operations(narrow, tmp_path):
    pairs = ["int8/int8", *(["int4/int4", "int3/int6"] if narrow else ["int8/int8"] * 2), "int8/int8", "int8/int8"]
    model, modules, images = quantized(pairs)
    codes, results = {}, {}
    for examples in ((), [{"images": images}]):
        path = tmp_path / f"{len(examples)}.onnx"
        layers = export_onnx(path, model, modules, {"images": images[:1]}, examples)
        weights = {t.name: t for t in onnx.load(path).graph.initializer if t.name.endswith(".codes")}
        codes[path] = {name: onnx.numpy_helper.to_array(weight) for name, weight in weights.items()}
        results[path] = run(path, images)
    kinds = optimized_kinds(path)
    assert kinds["QLinearConv"] == 3 and not {"Conv", "FusedConv", "BatchNormalization"} & set(kinds)
    plain, integer = codes.values()
    assert plain.keys() == integer.keys()
    for name, values in plain.items():
        np.testing.assert_array_equal(np.abs(values.astype(int)), np.abs(integer[name].astype(int)))
    expected, got = results.values()
    assert (got - expected).abs().mean() < 0.05 * expected.abs().max()
    assert [layer.as_chosen for layer in layers.values()] == [pair == "int8/int8" for pair in pairs]


@pytest.mark.parametrize("rounded", [False, True])
def test_no_operation_of_the_engine_serves_nothing(rounded, tmp_path):
    """Padding by nothing, two slices in a row and values that nobody reads cost a step each."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, images):
            x = self.first(nn.functional.pad(images[..., ::2, ::2], (0, 0, 0, 0))).relu()
            return (self.second(x) + x).relu().mean((2, 3))

    torch.manual_seed(0)
    model, images, int8 = Block().eval(), torch.randn(16, 3, 8, 8), parse_format("int8")
    modules = quantize_model(model, formats=[int8])
    calibrate(model, modules, [images])
    set_formats(modules, dict.fromkeys(modules, (int8, int8)))
    export_onnx(path := tmp_path / "m.onnx", model, modules, {"images": images}, [{"images": images}] * rounded)
    graph = onnx.load(path).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["Pad"] == 0 and kinds["Slice"] == 1
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    assert all(not read.isdisjoint(node.output) for node in graph.node)
    optimized = optimized_kinds(path)
    assert optimized["Transpose"] + optimized["DequantizeLinear"] <= 3 or not rounded
    with torch.no_grad():
        expected = model(images)
    assert (run(path, images) - expected).abs().max() < 0.03 * expected.abs().max()


def test_a_convolution_in_float_stays_so(tmp_path):
    model, modules, images = quantized(["float/float", "int8/int8", "e4m3/e4m3", "int8/int8", "int8/int8"])
    path = tmp_path / "m.onnx"
    export_onnx(path, model, modules, {"images": images[:1]}, [{"images": images}])
    with torch.no_grad():
        expected = model(images)
    assert (run(path, images) - expected).abs().mean() < 0.05 * expected.abs().max()
    assert optimized_kinds(path)["QLinearConv"] == 1


def test_models_may_look_at_their_layers(tmp_path):
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, stride=2)

        def forward(self, images):
            return self.conv(nn.functional.pad(images, (self.conv.stride[0],) * 4)).mean((2, 3))

    model, images = Padded().eval(), torch.randn(4, 3, 8, 8)
    modules = quantize_model(model, formats=[int8 := parse_format("int8")])
    calibrate(model, modules, [images])
    set_formats(modules, {"conv": (int8, int8)})
    export_onnx(tmp_path / "m.onnx", model, modules, {"images": images})
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "m.onnx", images), model(images), rtol=1e-3, atol=1e-4)


class Own(nn.Module):
    """A custom model: integer features, a mask, names that nodes use as well, keyword calls, a hook."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.mix = nn.Linear(8 + 12, 6)
        self.head = nn.Linear(6, 3)
        self.head.register_forward_hook(lambda module, args, output: 3 * output)

    def forward(self, matmul, cat, mask):
        seen = (matmul * mask.unsqueeze(-1)).sum(1)
        mixed = self.mix(input=torch.cat([seen, self.embedding(cat).flatten(1)], 1))
        return self.head(mixed.relu())


def test_a_model_of_ones_own(tmp_path):
    torch.manual_seed(0)
    model, int8 = Own(), parse_format("int8")
    inputs = {
        "matmul": torch.randn(4, 6, 8),
        "cat": torch.randint(5, (4, 3)),
        "mask": torch.randint(2, (4, 6)).bool(),
    }
    modules = quantize_model(model, formats=[int8])
    calibrate(model, modules, [inputs])
    set_formats(modules, dict.fromkeys(modules, (int8, int8)))
    model.train()
    model.head.eval()
    export_onnx(tmp_path / "m.onnx", model, modules, inputs)
    assert model.training and model.mix.training and not model.head.training
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert [value.name for value in (*session.get_inputs(), *session.get_outputs())] == [*inputs, "logits"]
    for rows in (4, 1, 3):
        (found,) = session.run(["logits"], {name: value[:rows].numpy() for name, value in inputs.items()})
        with torch.no_grad():
            expected = model.eval()(**{name: value[:rows] for name, value in inputs.items()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-3)


class Uncalled(nn.Module):
    """A layer whose weight is read without a call, an unused one, and one called only for another width."""

    def __init__(self):
        super().__init__()
        self.called, self.read, self.unused, self.wide = (nn.Linear(n, 6) for n in (6, 6, 6, 9))

    def forward(self, x):
        x = self.wide(x) if x.shape[1] == 9 else x
        return nn.functional.linear(self.called(x), self.read.weight, self.read.bias)


def test_layers_that_are_never_called_are_not_in_the_file(tmp_path):
    torch.manual_seed(0)
    model, x, int8 = Uncalled().eval(), torch.randn(8, 6), parse_format("int8")
    modules, path = quantize_model(model, formats=[int8]), tmp_path / "m.onnx"
    calibrate(model, modules, [x])
    set_formats(modules, dict.fromkeys(modules, (int8, int8)))
    verdicts = export_onnx(path, model, modules, {"x": x})
    assert {name: (v.exported_weight, v.exported_activation) for name, v in verdicts.items()} == {
        "called": ("int8", "int8"), "read": ("float", "float"), "unused": ("int8", "float"), "wide": ("int8", "float")
    }  # fmt: skip
    assert not any(tensor.name.startswith(("unused", "wide")) for tensor in onnx.load(path).graph.initializer)
    with torch.no_grad():
        torch.testing.assert_close(run(path, x), model(x), rtol=1e-4, atol=1e-5)
    wide = torch.randn(8, 9)  # what calibration has not seen
    quant.export.onnx.export.write_onnx(path, uncached_trace(model, modules, {"x": wide}), modules)
    with torch.no_grad():
        torch.testing.assert_close(run(path, wide), model(wide), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["tuple", "mapping", "nested"])
def test_all_outputs_are_kept(kind, tmp_path):
    """A detector returns boxes and scores, others a number or several states."""

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.boxes, self.scores = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 3)

        def forward(self, x):
            states = self.body(x).relu()
            boxes, scores = self.boxes(states), self.scores(states)
            if kind == "tuple":
                return boxes, scores
            if kind == "mapping":
                return {"boxes": boxes, "x": scores, "loss": None, "past_key_values": states}
            return {"boxes": boxes, "states": (states, [scores])}

    torch.manual_seed(0)
    model, x, int8 = (
        Detector().to(torch.bfloat16).eval(),
        torch.randn(16, 6, dtype=torch.bfloat16),
        parse_format("int8"),
    )
    modules = quantize_model(model, formats=[int8])
    calibrate(model, modules, [x])
    set_formats(modules, dict.fromkeys(modules, (int8, int8)))
    quant.export.onnx.export.write_onnx(path := tmp_path / "m.onnx", uncached_trace(model, modules, {"x": x}), modules)
    opened = session(path)
    names = {"tuple": ["output_0", "output_1"], "mapping": ["boxes", "x_out"]}
    assert [o.name for o in opened.get_outputs()] == names.get(kind, ["boxes", "states.0", "states.1.0"])
    got = opened.run(None, {"x": x.float().numpy()})
    expected = model(x)
    boxes, scores = expected if kind == "tuple" else (expected["boxes"], None)
    assert all(array.dtype == np.float32 for array in got)
    assert np.abs(got[0] - boxes.float().detach().numpy()).max() < 0.05
    if scores is not None:
        assert np.abs(got[1] - scores.float().detach().numpy()).max() < 0.05


def test_a_model_that_cannot_be_written_is_refused_in_words(tmp_path):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return str(self.linear(x))

    model, x, int8 = Pair().eval(), torch.ones(3, 4), parse_format("int8")
    modules = quantize_model(model, formats=[int8])
    set_formats(modules, {"linear": (int8, FLOAT)})
    with pytest.raises(UserError, match="Pair cannot be exported: it returns a str, in which there are no tensors"):
        export_onnx(tmp_path / "m.onnx", model, modules, {"x": x})
    set_formats(modules, {"linear": (int8, int8)})
    with pytest.raises(UserError, match="layer 0: its int8 inputs were never calibrated"):
        export_onnx(tmp_path / "m.onnx", nn.Sequential(model.linear), {"0": modules["linear"]}, {"x": x})
    with pytest.raises(UserError, match=r"linear.weight is float64, .* model.float\(\)"):
        export_onnx(tmp_path / "m.onnx", model.double(), modules, {"x": x.double()})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pair", ["int8/int8", "int4/int8", "e4m3/e4m3", "mxfp4/mxfp8"])
def test_convolutions_in_one_dimension(pair, tmp_path):
    torch.manual_seed(0)
    model, series = nn.Sequential(nn.Conv1d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv1d(32, 5, 3)), torch.randn(4, 3, 20)
    weight, activation = map(parse_format, pair.split("/"))
    modules = quantize_model(model.eval(), formats={weight, activation})
    calibrate(model, modules, [series])
    set_formats(modules, dict.fromkeys(modules, (weight, activation)))
    export_onnx(tmp_path / "m.onnx", model, modules, {"input": series})
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "m.onnx", series), model(series), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bounds", [nn.ReLU(), nn.ReLU6()], ids=["relu", "relu6"])
def test_narrow_inputs_keep_the_convolution_before_them_in_integers(bounds, tmp_path):
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3)
    layers = OrderedDict(first=first, bounds=bounds, second=second, mean=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten())
    model, images, int4 = nn.Sequential(layers).eval(), 9 * torch.randn(16, 3, 8, 8), parse_format("int4")
    modules = quantize_model(model, formats=[int4])
    calibrate(model, modules, [images])
    set_formats(modules, dict.fromkeys(modules, (int4, int4)))
    traced = uncached_trace(model, modules, {"images": images})
    quant.export.onnx.export.write_onnx(path := tmp_path / "m.onnx", traced, modules, [{"images": images}])
    assert optimized_kinds(path)["QLinearConv"] == 2
    with torch.no_grad():
        expected = model(images)
    assert (run(path, images) - expected).abs().max() < 0.05 * expected.abs().max()


class Inverted(nn.Module):
    """A block of MobileNetV2: a depthwise convolution between two others, ReLU6, and a shortcut."""

    def __init__(self):
        super().__init__()
        self.first, self.wide = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 24, 1)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.narrow, self.last = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 16, 1)

    def forward(self, images):
        x = nn.functional.relu6(self.first(images))
        x = x + self.narrow(nn.functional.relu6(self.depthwise(nn.functional.relu6(self.wide(x)))))
        return nn.functional.relu6(self.last(x)).mean((2, 3))


@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_blocks_with_relu6_and_4_bits_run_in_integers(observer, tmp_path):
    """Whatever the grids are: MSE ranges end below 6, those of minmax where the ReLU6 does."""
    torch.manual_seed(0)
    model, images, int4 = Inverted().eval(), 9 * torch.randn(16, 3, 8, 8), parse_format("int4")
    activation = QuantizerConfig(symmetric=False, observer=observer)
    modules = quantize_model(model, formats=[int4], activation=activation)
    calibrate(model, modules, [images])
    set_formats(modules, dict.fromkeys(modules, (int4, int4)))
    traced = uncached_trace(model, modules, {"images": images})
    with torch.no_grad():
        expected = model(images)
    for examples, near in (([], 1e-2), ([{"images": images}], 0.1)):
        quant.export.onnx.export.write_onnx(path := tmp_path / "m.onnx", traced, modules, examples)
        for optimized in (False, True):
            assert (run(path, images, optimized) - expected).abs().mean() < near * expected.abs().max()
        kinds = optimized_kinds(path)
        if examples:
            assert kinds["QLinearConv"] == 5 and kinds["QLinearAdd"] == 1 and kinds["Transpose"] <= 2
            assert not {"Conv", "FusedConv", "Add"} & set(kinds)


def test_a_convolution_in_float_costs_what_the_run_counted(tmp_path):
    """Only convolutions in integers need inputs of 8 bits, which cost more compute than the 4 that were chosen."""
    torch.manual_seed(0)
    model, images, int4 = Inverted().eval(), torch.randn(4, 3, 8, 8), parse_format("int4")
    profiles = profile_model(model, images)
    modules = quantize_model(model, formats=[int4])
    calibrate(model, modules, [images])
    set_formats(modules, dict.fromkeys(modules, (int4, int4)))
    traced = uncached_trace(model, modules, {"images": images})
    counted = compute_cost(profiles, {name: module.formats for name, module in modules.items()})
    costs, codes = [], []
    for examples in ([], [{"images": images}]):
        layers = quant.export.onnx.export.write_onnx(path := tmp_path / "m.onnx", traced, modules, examples)
        held = [(layers[profile.name].weight_bits, layers[profile.name].activation_bits) for profile in profiles]
        costs.append(cost_of_bits(profiles, held, "compute"))
        codes.append({tensor.data_type for tensor in onnx.load(path).graph.initializer})
    assert costs == [counted, 2 * counted]
    assert [TensorProto.UINT4 in found for found in codes] == [True, False]


def test_bounds_in_codes_are_those_of_values():
    """Clip, then round; or round, then clip: for bounds inside, at and beyond the ends of a grid, and on ties."""
    x = np.random.default_rng(0).uniform(-4, 9, 50_000).astype(np.float32)
    for low, high, scale, point in ((0, 6, 6 / 255, 0), (0, 6, 0.4, 0), (-1, 2.5, 0.05, 90), (0, np.inf, 0.03, 7)):
        grid = [np.float32(scale), np.uint8(point)]
        names = ["scale", "point", *(["low", "high"] if np.isfinite(high) else [])]
        kind = "Clip" if np.isfinite(high) else "Relu"
        bounding = onnx.helper.make_node(kind, ["x", *names[2:]], ["bounded"])
        rounding = onnx.helper.make_node("QuantizeLinear", ["bounded", "scale", "point"], ["y"])
        reading = onnx.helper.make_node("DequantizeLinear", ["y", "scale", "point"], ["logits"])
        numbers = dict(zip(names, [*grid, np.float32(low), np.float32(high)], strict=False))
        constants = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in numbers.items()]
        ends = [onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, [None]) for name in ("x", "logits")]
        graph = onnx.helper.make_graph([bounding, rounding, reading], "g", ends[:1], ends[1:], constants)
        before = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
        after = copy.deepcopy(before)
        fold_bounds(after.graph)
        assert kind not in {n.op_type for n in after.graph.node if n.output[0] == "bounded"}
        results = [ReferenceEvaluator(proto).run(None, {"x": x})[0] for proto in (before, after)]
        np.testing.assert_array_equal(*results)


class Padded(nn.Module):
    """Convolutions behind paddings: with zeros on some sides, with ones, of channels, by repetition."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 4, 3, padding=1)
        self.ones, self.wide, self.same = nn.Conv2d(4, 4, 3), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 3)

    def forward(self, images):
        pad = nn.functional.pad
        x = self.first(pad(images, (0, 1, 0, 1))).relu()
        x = self.second(pad(x, (1, 2, 3, 0))).relu()
        x = self.wide(pad(self.ones(pad(x, (1, 1, 1, 1), value=1.0)).relu(), (0, 0, 0, 0, 1, 1)))
        return self.same(pad(x, (1, 1, 1, 1), mode="replicate")).mean((2, 3))


@pytest.mark.parametrize("pair", ["int8/int8", "int4/int4", "e4m3/e4m3", "int8/float"])
def test_padding_with_zeros_becomes_that_of_the_convolution(pair, tmp_path):
    torch.manual_seed(0)
    model, images = Padded().eval(), torch.randn(16, 3, 8, 8)
    weight, activation = map(parse_format, pair.split("/"))
    modules = quantize_model(model, formats={weight, activation} - {FLOAT})
    calibrate(model, modules, [images])
    set_formats(modules, dict.fromkeys(modules, (weight, activation)))
    traced = uncached_trace(model, modules, {"images": images})
    with torch.no_grad():
        expected = model(images)
    for examples in ([], [{"images": images}]):
        quant.export.onnx.export.write_onnx(path := tmp_path / "m.onnx", traced, modules, examples)
        graph = onnx.load(path).graph
        pads = {tuple(a.ints) for n in graph.node if n.op_type == "Conv" for a in n.attribute if a.name == "pads"}
        assert sum(n.op_type == "Pad" for n in graph.node) == 3 and {(0, 0, 1, 1), (4, 2, 1, 3)} <= pads
        for optimized in (False, True):
            difference = (run(path, images, optimized) - expected).abs()
            assert difference.mean() < (0.05 if examples else 1e-2) * expected.abs().max()


def test_padding_stays_where_zero_is_not_rounded_to_zero(tmp_path):
    """An LSQ+ offset moves the grid off 0: what is padded before the rounding is not 0 behind it."""
    torch.manual_seed(0)
    layers = OrderedDict(pad=nn.ZeroPad2d(1), conv=nn.Conv2d(3, 4, 3), mean=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten())
    model, images, int4 = nn.Sequential(layers).eval(), torch.rand(4, 3, 8, 8) + 1, parse_format("int4")
    learned = QuantizerConfig(range="learned", symmetric=False, learned_offset=True)
    modules = quantize_model(model, formats=[int4], activation=learned)
    calibrate(model, modules, [images])
    set_formats(modules, {"conv": (int4, int4)})
    with torch.no_grad():
        modules["conv"].input_quantizer.grids["int4"].offset.data.add_(0.37)
        expected = model(images)
    traced = uncached_trace(model, modules, {"images": images})
    quant.export.onnx.export.write_onnx(path := tmp_path / "m.onnx", traced, modules)
    assert "Pad" in {node.op_type for node in onnx.load(path).graph.node}
    torch.testing.assert_close(run(path, images), expected, rtol=1e-3, atol=1e-3)


def test_shortcuts_are_added_in_integers(tmp_path):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
            self.third, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 2)

        def forward(self, images):
            x = self.first(images).relu()
            x = (self.third(self.second(x).relu()) + x).relu()
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    model, images = Residual().eval(), torch.randn(16, 3, 8, 8)
    int4, int8 = parse_format("int4"), parse_format("int8")
    modules = quantize_model(model, formats=[int4, int8])
    calibrate(model, modules, [images])
    for name, format in (("8", int8), ("4", int4)):
        set_formats(modules, dict.fromkeys(modules, (format, format)))
        export_onnx(path := tmp_path / name, model, modules, {"images": images[:1]}, [{"images": images}])
        kinds = optimized_kinds(path)
        assert kinds["QLinearConv"] == 3 and kinds["QLinearAdd"] == 1 and not {"Conv", "FusedConv", "Add"} & set(kinds)
        with torch.no_grad():
            expected = model(images)
        assert (run(path, images) - expected).abs().mean() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(("low", "high", "step"), [(-1, 3, 0.25), (0, 6, 0.41), (-2, 0, 0.13), (0, 2, 0.01)])
def test_a_layer_rounds_what_was_rounded_before_as_it_would_have(low, high, step):
    scale, point = grid_of(low, high, step)
    x = np.random.default_rng(0).uniform(low, high, 20_000).astype(np.float32)
    once = np.round(x / np.float32(step))
    before = (np.clip(np.round(x / scale) + point, 0, 255) - point) * scale
    ties = np.abs(np.abs(x / step % 1) - 0.5) < 1e-4
    np.testing.assert_array_equal(np.round(before / np.float32(step))[~ties], once[~ties])
    assert scale <= step and (high - low) / scale <= 256


@pytest.mark.parametrize("pair", ["int8/int8", "int4/int4", "int3/int5", "int2/int8"])
@pytest.mark.parametrize("layer", [nn.Linear(16, 8), Conv1D(8, 16)], ids=["Linear", "Conv1D"])
def test_matrix_products_of_integers_are_integer_operations(layer, pair, tmp_path):
    torch.manual_seed(0)
    model, tokens = nn.Sequential(copy.deepcopy(layer)).eval(), torch.randn(2, 5, 16)
    weight, activation = map(parse_format, pair.split("/"))
    modules = quantize_model(model, formats=[weight, activation])
    calibrate(model, modules, [tokens])
    set_formats(modules, {"0": (weight, activation)})
    path = tmp_path / "m.onnx"
    quant.export.onnx.export.write_onnx(path, uncached_trace(model, modules, {"images": tokens}), modules)
    assert optimized_kinds(path)["MatMulIntegerToFloat"] == 1 and not onnx.load(path).metadata_props
    with torch.no_grad():
        torch.testing.assert_close(run(path, tokens), model(tokens), rtol=1e-4, atol=1e-5)
    codes = next(t for t in onnx.load(path).graph.initializer if t.name == "0.weight.codes")
    assert len(codes.raw_data) == 16 * 8 * (4 if weight.width <= 4 else 8) // 8


PRODUCTS = [
    *("int2/int8", "int4/int4", "int4/int8", "int8/int8", "float/int8", "bf16/int8"),  # biases were rounded
    *("int8/e4m3", "mxint8/int8", "mxfp4/int8", "mxfp4/e4m3"),  # were taken for products of integers
]


@pytest.mark.parametrize("pair", PRODUCTS)
@pytest.mark.parametrize("shape", [(64, 16), (8, 5, 16)], ids=["rows", "tokens"])
def test_default_sessions_give_the_logits_of_linear_layers(shape, pair, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), Conv1D(32, 64), nn.ReLU(), nn.Linear(32, 8)).eval()
    nn.init.normal_(model[2].bias)
    x, formats = torch.randn(shape), tuple(map(parse_format, pair.split("/")))
    weight = QuantizerConfig(granularity="channel", symmetric=pair != "int8/e4m3")
    modules = quantize_model(model, formats={f for f in formats if f != FLOAT}, weight=weight)
    calibrate(model, modules, [x])
    set_formats(modules, dict.fromkeys(modules, formats))
    path = tmp_path / "m.onnx"
    quant.export.onnx.export.write_onnx(path, uncached_trace(model, modules, {"images": x[:1]}), modules)
    with torch.no_grad():
        expected = model(x)
    off = (run(path, x) - expected).abs() / expected.abs().max()
    assert (off > 1e-5).float().mean() < 0.05 and off.max() < 0.05  # ties, as above
    in_integers = pair.startswith("int") and pair.endswith(("int4", "int8"))
    assert optimized_kinds(path)["MatMulIntegerToFloat"] == (3 if in_integers else 0)


def test_files_say_what_keeps_them_fast_and_exact(tmp_path):
    model, modules, images = quantized(["int8/int8"] * 5)
    path = tmp_path / "m.onnx"
    export_onnx(path, model, modules, {"images": images[:1]})
    assert settings_of(path) == {}  # what a session does by default is fast and exact
    got = torch.from_numpy(session(path).run(None, {"images": images.numpy()})[0])
    torch.testing.assert_close(got, run(path, images), rtol=1e-3, atol=1e-3)


def test_a_weight_that_two_layers_share_is_in_the_file_once(tmp_path):
    torch.manual_seed(0)
    first, second = nn.Linear(24, 24), nn.Linear(24, 24)
    second.weight = first.weight
    model = nn.Sequential(OrderedDict(first=first, relu=nn.ReLU(), second=second, last=nn.Linear(24, 3))).eval()
    int4, int8, x = parse_format("int4"), parse_format("int8"), torch.randn(8, 24)
    modules = quantize_model(model, formats=[int4, int8])
    calibrate(model, modules, [x])
    set_formats(modules, {"first": (int4, int8), "second": (int4, FLOAT), "last": (int8, int8)})
    verdicts = export_onnx(tmp_path / "m.onnx", model, modules, {"x": x})
    codes = [tensor.name for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer if "codes" in tensor.name]
    assert sorted(codes) == ["first.weight.codes", "last.weight.codes"]
    assert onnx_sizes(tmp_path / "m.onnx", verdicts)["codes"] == 24 * 24 // 2 + 24 * 3
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "m.onnx", x, optimized=False), model(x), rtol=1e-4, atol=1e-5)


class LongRows(nn.Module):
    """A product over `length` features, or such a convolution, whose terms all have the same sign."""

    def __init__(self, length, kind):
        super().__init__()
        self.kind = kind
        self.long = nn.Linear(length, 3) if kind == "product" else nn.Conv2d(8, 3, (1, length // 8))
        self.head = nn.Linear(3, 2)
        nn.init.uniform_(self.long.weight, 0.009, 0.01)
        with torch.no_grad():
            self.long.weight[1] *= -1

    def forward(self, x):
        x = x if self.kind == "product" else x.unflatten(1, (8, 1, -1))
        return self.head(self.long(x).flatten(1))


@pytest.mark.parametrize("kind", ["product", "convolution"])
@pytest.mark.parametrize(("length", "fits"), [(64000, True), (72000, False)])
def test_rows_whose_sums_int32_does_not_hold_leave_the_integers(kind, length, fits, tmp_path):
    torch.manual_seed(0)
    model, format, path = LongRows(length, kind).eval(), parse_format("int8"), tmp_path / "m.onnx"
    x = 1 - 0.1 * torch.rand(4, length)
    modules = quantize_model(model, formats=[format])
    calibrate(model, modules, [x])
    set_formats(modules, dict.fromkeys(modules, (format, format)))
    examples = [{"x": x}] if kind == "convolution" else []
    verdict = export_onnx(path, model, modules, {"x": x[:2]}, examples)["long"]
    integers = {"MatMulIntegerToFloat", "QLinearConv"}
    with torch.no_grad():
        torch.testing.assert_close(run(path, x), model(x), rtol=2e-2 if examples else 1e-4, atol=1e-5)
    if fits:
        assert verdict.as_chosen and integers & set(optimized_kinds(path))
    else:
        assert (verdict.exported_activation, verdict.activation_bits) == ("int16", 16)
        assert "which these long rows would overflow" in verdict.why[0]


def test_narrow_codes_keep_long_rows_in_integers(tmp_path):
    """The sums are smaller: the largest sum counts, not the length of the row."""
    torch.manual_seed(0)
    model, int2, int8 = LongRows(72000, "product").eval(), parse_format("int2"), parse_format("int8")
    modules, x = quantize_model(model, formats=[int2, int8]), torch.rand(4, 72000)
    calibrate(model, modules, [x])
    set_formats(modules, dict.fromkeys(modules, (int2, int8)))
    verdict = export_onnx(tmp_path / "m.onnx", model, modules, {"x": x[:2]})["long"]
    assert verdict.exported_activation == "int8" and "MatMulIntegerToFloat" in optimized_kinds(tmp_path / "m.onnx")


def test_inputs_in_float_are_not_rounded_by_the_engine(tmp_path):
    torch.manual_seed(0)
    model, tokens = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)).eval(), torch.randn(2, 5, 64)
    int8, int4 = parse_format("int8"), parse_format("int4")
    modules = quantize_model(model, formats=[int4, int8])
    calibrate(model, modules, [tokens])
    for floats in (3, 1):  # most weights, or the least part of them
        pairs = [(int4, FLOAT) if place < floats else (int8, int8) for place in range(3)]
        set_formats(modules, dict(zip(modules, pairs, strict=True)))
        path = tmp_path / f"{floats}.onnx"
        quant.export.onnx.export.write_onnx(path, uncached_trace(model, modules, {"images": tokens}), modules)
        got = torch.from_numpy(session(path).run(None, {"images": tokens.numpy()})[0])
        with torch.no_grad():
            expected = model(tokens)
        off = (got - expected).abs() > 1e-4 * expected.abs().max()
        assert off.float().mean() < 0.05  # ties of the layers in 8 bits; the engine's own rounding moves all values


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


# ------------------------------------------------------ what the model is made of


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0), 1)

    def forward(self, x, padding):
        return self.body(self.stem(x), src_key_padding_mask=padding).mean(1)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_is_exported_in_float32_and_attention_in_its_layers(dtype, close, tmp_path):
    torch.manual_seed(0)
    model = Encoder().to(dtype).eval()
    padding = torch.zeros(4, 5, dtype=torch.bool)
    padding[:, 4] = True
    batch = {"x": torch.randn(4, 5, 6, dtype=dtype), "padding": padding}
    int8 = parse_format("int8")
    modules = quantize_model(model, formats=[int8])
    calibrate(model, modules, [batch])
    set_formats(modules, dict.fromkeys(modules, (int8, int8)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    verdicts = export_onnx(tmp_path / "model.onnx", model, modules, batch, [batch])
    assert all(verdict.as_chosen for verdict in verdicts.values())
    assert "body.layers.0.self_attn.q_proj" in verdicts
    inputs = {"x": batch["x"].float().numpy(), "padding": padding.numpy()}
    logits = session(tmp_path / "model.onnx").run(None, inputs)[0]
    expected = model(**batch)
    assert logits.dtype == np.float32 and expected.dtype == dtype
    assert np.abs(logits - expected.float().detach().numpy()).max() < close
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    double = nn.Sequential(nn.Linear(6, 4)).double()
    with pytest.raises(UserError, match=r"0.weight is float64.*export model.float\(\)"):
        uncached_trace(double, quantize_model(double), {"input": torch.randn(2, 6).double()})


def test_experts_are_refused_in_one_line():
    weight = nn.Parameter(torch.randn(3, 4, 6))
    model = nn.ModuleDict({"experts": ExpertLinear(weight, None, transposed=False)})
    with pytest.raises(UserError, match=r"--format onnx: experts holds the matrices of many experts.*--format packed"):
        uncached_trace(model, quantize_model(model), {"input": torch.randn(2, 6)})


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_reduced_range_is_what_the_file_holds(symmetric, tmp_path):
    """With 7-bit int8 weights, sums of two products with u8 codes fit into 16 bits on every processor."""
    weight = QuantizerConfig(granularity="channel", symmetric=symmetric, reduce_range=True)
    model, modules, images = quantized(["int8/int8"] * 5, weight=weight)
    export_onnx(tmp_path / "model.onnx", model, modules, {"images": images[:2]})
    weights = {
        tensor.name: onnx.numpy_helper.to_array(tensor).astype(int)
        for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and tensor.name.endswith(".codes")
    }
    assert len(weights) == 5
    assert all(codes.min() >= -64 and codes.max() <= 63 for codes in weights.values())
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "model.onnx", images), model(images), rtol=1e-3, atol=1e-3)


class Reader(nn.Module):
    """Looks words up, and scores them by the same table."""

    def __init__(self):
        super().__init__()
        self.words, self.layer = nn.Embedding(24, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 24, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        return self.head(self.layer(self.words(ids)).relu())


def test_tables_are_stored_in_their_formats(tmp_path):
    ids, path = torch.arange(48).view(4, 12) % 24, tmp_path / "m.onnx"
    for name, stored in (("int4", "int4"), ("int4g16", "int4g16"), ("uint4g16", "uint4g16"), ("mxfp4", "e4m3")):
        torch.manual_seed(0)
        model, format = Reader().eval(), parse_format(name)
        modules = quantize_model(model, include=["words", "layer", "head"], formats=[format])
        calibrate(model, modules, [ids])
        set_formats(modules, dict.fromkeys(modules, (format, FLOAT)))
        layers = export_onnx(path, model, modules, {"ids": ids})
        with torch.no_grad():
            expected = model(ids)
        got = torch.from_numpy(session(path).run(["logits"], {"ids": ids.numpy()})[0])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()), msg=name)
        assert layers["words"].exported_weight == stored, name
        assert layers["words"].activation == FLOAT
        graph = onnx.load(path).graph
        made_by = {node.output[0]: node for node in graph.node}
        read = [made_by.get(node.input[0]) for node in graph.node if node.op_type == "Gather"]
        of_codes = [node for node in read if node is not None and list(node.input) == ["words.weight.codes"]]
        assert len(of_codes) == (name != "mxfp4"), name  # the rows that are read, not the table, are unpacked

"""Graphs of core ATen operations: they compute what the model does, and ExecuTorch, where installed, runs them."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quant.convert import calibrate, quantize_model, set_formats
from quant.export.core_aten import CoreLayer, core_verdict, export_graph, unlike_core
from quant.formats import FLOAT, parse_format
from quant.quantizers.quantizer import ACTIVATION, QuantizerConfig


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, stride=2)
        self.linear = nn.Linear(8, 32)
        self.wide = nn.Linear(32, 32)
        self.conv1d = Conv1D(5, 32)

    def forward(self, images):
        x = self.depthwise(self.norm(self.conv(images)).relu()).relu().mean((2, 3))
        return self.conv1d(torch.nn.functional.gelu(self.wide(self.linear(x).relu())))


def quantized(pairs, **configs):
    torch.manual_seed(0)
    model = Net().eval()
    pairs = [tuple(map(parse_format, pair.split("/"))) for pair in pairs]
    modules = quantize_model(model, formats={f for pair in pairs for f in pair if f != FLOAT}, **configs)
    images = torch.randn(8, 3, 8, 8)
    calibrate(model, modules, [images])
    set_formats(modules, dict(zip(modules, pairs, strict=True)))
    return model, modules, images


INTEGERS = ["int8/int8", "int4/int8", "int3/int4", "int8/int16", "int8/int8"]
SETS = {
    "integers": INTEGERS,
    "groups": ["int4/float", "int8/float", "int4g8/float", "uint4g16/int8", "float/int8"],
    "others": ["e4m3/e4m3", "mxfp4/float", "int16/e5m2", "nvfp4/mxfp8", "float/bf16"],
}
PER_TOKEN = QuantizerConfig(range="dynamic", granularity="token", observer="minmax", symmetric=False)


@pytest.mark.parametrize(
    ("pairs", "configs"),
    [
        *((pairs, {}) for pairs in SETS.values()),
        (["int8/int8"] * 3 + ["int4/int8", "int8/int8"], {"activation": PER_TOKEN}),
    ],
    ids=[*SETS, "per token"],
)
def test_the_graph_has_core_operations_alone_and_the_models_logits(pairs, configs):
    model, modules, images = quantized(pairs, **configs)
    program = export_graph(model, modules, {"images": images})
    assert unlike_core(program) == []
    with torch.no_grad():
        expected, found = model(images), program.module()(images)
    close = (found - expected).abs() <= 1e-5 * expected.abs().max()
    assert close.float().mean() > 0.9  # a sum on the other side of a tie changes one code
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * expected.abs().max().item())
    names = {str(node.target) for node in program.graph.nodes}
    assert not any("copysign" in name or "view.dtype" in name for name in names)


def test_a_model_may_read_the_settings_of_its_layers():
    module = quantize_model(nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1)), formats=[parse_format("int8")])["0"]
    layer = CoreLayer("0", module)
    assert (layer.stride, layer.kernel_size) == ((2, 2), (3, 3))
    with pytest.raises(AttributeError, match="strides"):
        _ = layer.strides


def test_verdicts_say_what_is_wider():
    _, modules, _ = quantized(SETS["groups"], activation=ACTIVATION)
    verdicts = [core_verdict(module) for module in modules.values()]
    assert [verdict.exported_weight for verdict in verdicts] == ["int8"] * 4 + ["float"]
    assert [verdict.weight_bits for verdict in verdicts] == [8, 8, 16, 12, 16]
    assert [verdict.as_chosen for verdict in verdicts] == [False, True, False, False, True]


@pytest.mark.parametrize(
    "pairs", [[*INTEGERS[:3], "int8/float", "int8/int8"], SETS["groups"]], ids=["integers", "groups"]
)
def test_executorch_computes_the_models_logits(tmp_path, pairs):
    pytest.importorskip("executorch.runtime")
    from eval.export.executorch_model import ExecutorchModel, dynamic_shapes, lower

    model, modules, images = quantized(pairs)  # without inputs of 16 bits, which XNNPACK refuses
    inputs = {"images": images}
    lower(export_graph(model, modules, inputs, dynamic_shapes(inputs, None), False), tmp_path / "m.pte")
    found = ExecutorchModel(tmp_path / "m.pte", "image", ["images"])(images=images)["logits"]
    with torch.no_grad():
        expected = model(images)
    close = (found - expected).abs() <= 1e-4 * expected.abs().max()
    assert close.float().mean() > 0.9

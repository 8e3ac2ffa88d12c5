"""Weight norm, spectral norm and other parametrizations: exports hold the computed weight."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from quant.convert import (
    calibrate,
    describe_quantizers,
    quantize_as_described,
    quantize_model,
    set_formats,
)
from quant.export.packed import read_packed, restore, write_packed
from quant.formats import parse_format
from quant.transforms.computed_weights import fold_weight, weight_of

INT8 = parse_format("int8")
NORMS = [
    parametrizations.weight_norm,
    parametrizations.spectral_norm,
    parametrizations.orthogonal,
    weight_norm,
    spectral_norm,
]
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.parametrize("norm", NORMS, ids=lambda norm: f"{norm.__module__}.{norm.__name__}"),
]


def plain():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def normed(norm):
    torch.manual_seed(0)
    model = plain()
    norm(model[0])
    return model


def trained(norm, weight):
    """A quantized model in training mode, after steps that changed its weight's parametrization; an input."""
    model, x = normed(norm), torch.randn(4, 8)
    modules = quantize_model(model, formats=[INT8])
    calibrate(model, modules, [x])
    set_formats(modules, dict.fromkeys(modules, (parse_format(weight), INT8)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return model, modules, x


def test_the_weight_is_what_the_layer_computes_with_and_reading_it_changes_nothing(norm):
    model = normed(norm)
    layer, rows = model[0], torch.eye(8)
    layer(rows)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    weight = weight_of(layer)
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
    layer.eval()
    torch.testing.assert_close(layer(rows) - layer.bias, weight.t())
    fold_weight(layer)
    assert isinstance(layer.weight, nn.Parameter) and list(layer.state_dict()) in (
        ["bias", "weight"],
        ["weight", "bias"],
    )
    torch.testing.assert_close(layer.weight.detach(), weight)


@pytest.mark.parametrize("weight", ["int8", "float"])
def test_a_packed_file_holds_the_weight_for_either_architecture(norm, weight, tmp_path):
    model, modules, x = trained(norm, weight)
    write_packed(tmp_path / "model.safetensors", model, modules)
    description, tensors = read_packed(tmp_path / "model.safetensors")
    assert not any("parametrizations" in name or "weight_" in name for name in tensors)
    expected = model.eval()(x)
    for other in (plain(), normed(norm)):
        restore(other, description, tensors)
        torch.testing.assert_close(other.eval()(x), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("weight", ["int8", "float"])
def test_an_onnx_file_holds_the_weight(norm, weight, tmp_path):
    pytest.importorskip("onnxscript", reason="pip install '.[export]'")
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install '.[export]'")
    from quant.export.onnx.export import export_onnx

    model, modules, x = trained(norm, weight)
    export_onnx(tmp_path / "model.onnx", model, modules, {"x": x})
    logits = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"x": x.numpy()})[0]
    assert np.abs(logits - model.eval()(x).detach().numpy()).max() < 1e-5


def test_a_state_dict_goes_back_into_the_same_architecture(norm):
    model, modules, x = trained(norm, "int8")
    again = normed(norm)
    made = quantize_as_described(again, list(modules), describe_quantizers(modules))
    again.load_state_dict(model.state_dict())
    set_formats(made, dict.fromkeys(made, (INT8, INT8)))
    assert torch.equal(again.eval()(x), model.eval()(x))

"""torchao's tensors compute what the fake-quantized layers compute; unsupported layers are reported."""

import pytest
import torch
from torch import nn

pytest.importorskip("torchao")

from torchao.utils import TorchAOBaseTensor

from quant.convert import calibrate, quantize_model, set_formats
from quant.export.packed import read_packed, restore, write_packed
from quant.export.torchao import to_torchao
from quant.formats import FLOAT, parse_format
from quant.quantizers.quantizer import ACTIVATION, WEIGHT, QuantizerConfig

PER_TOKEN = QuantizerConfig(range="dynamic", granularity="token", observer="minmax", symmetric=False)
PER_TENSOR = QuantizerConfig(granularity="tensor")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(1), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 5, bias=False))


def exported(folder, assignment, weight=WEIGHT, activation=ACTIVATION):
    model, images = net().eval(), torch.randn(6, 2, 6, 6)
    formats = {name: tuple(map(parse_format, pair.split("/"))) for name, pair in assignment.items()}
    used = {format for pair in formats.values() for format in pair if format != FLOAT}
    modules = quantize_model(model, formats=used, weight=weight, activation=activation)
    calibrate(model, modules, [images])
    set_formats(modules, formats)
    write_packed(folder / "m.safetensors", model, modules)
    again = net().eval()
    verdicts = to_torchao(again, restore(again, *read_packed(folder / "m.safetensors")))
    with torch.no_grad():
        torch.testing.assert_close(again(images), model(images), rtol=1e-5, atol=1e-5)
    taken = {
        name for name, module in again.named_modules() if isinstance(getattr(module, "weight", None), TorchAOBaseTensor)
    }
    return verdicts, taken


@pytest.mark.parametrize("weight", [WEIGHT, PER_TENSOR], ids=["per channel", "per tensor"])
@pytest.mark.parametrize("name", ["int8", "int4", "int3", "int2", "e4m3"])
def test_weight_only_layers_are_torchaos(name, weight, tmp_path):
    verdicts, taken = exported(tmp_path, {"2": f"{name}/float", "4": "int8/float"}, weight)
    assert taken == {"2", "4"} and all(verdicts[layer].as_chosen for layer in taken)


@pytest.mark.parametrize("name", ["int4g8", "uint4g8", "int8g24", "uint3g12"])
def test_weights_in_groups_are_torchaos(name, tmp_path):
    verdicts, taken = exported(tmp_path, {"2": f"{name}/float", "4": "int8/float"})
    assert taken == {"2", "4"} and all(verdicts[layer].as_chosen for layer in taken)


def test_groups_that_do_not_divide_a_row_stay(tmp_path):
    verdicts, taken = exported(tmp_path, {"2": "int4g32/float", "4": "int4g24/int8"})
    assert not taken and "48 do not divide into groups of 32" in verdicts["2"].why[0]
    assert "no int4g24 weights with int8 inputs" in verdicts["4"].why[0]


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_inputs_with_a_scale_a_token_are_torchaos(name, tmp_path):
    verdicts, taken = exported(tmp_path, {"2": f"{name}/int8", "4": f"{name}/int4"}, activation=PER_TOKEN)
    assert taken == {"2"} and verdicts["2"].as_chosen
    assert verdicts["4"].why == ("rounded in float32, not by torchao: no int4 inputs",)


def test_layers_around_which_more_is_done_stay():
    """A migrated layer divides its input before rounding it, which a plain Linear would not do."""
    model, images, int8 = net().eval(), torch.randn(6, 2, 6, 6), parse_format("int8")
    modules = quantize_model(model, formats=[int8])
    for name in modules:
        modules[name].register_forward_pre_hook(lambda module, args: (args[0] / 2,))
    set_formats(modules, dict.fromkeys(modules, (int8, FLOAT)))
    with torch.no_grad():
        expected = model(images)
    verdicts = to_torchao(model, modules)
    assert "more is done around this layer" in verdicts["2"].why[0] and not verdicts["2"].as_chosen
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected)


def test_what_does_not_match_goes_on_as_it_is_and_is_told(tmp_path):
    verdicts, taken = exported(tmp_path, {"0": "int8/float", "2": "e2m1/float", "4": "int8/int8"})
    assert not taken and not any(verdict.as_chosen for verdict in verdicts.values())
    reasons = [verdict.why[0].removeprefix("rounded in float32, not by torchao: ") for verdict in verdicts.values()]
    assert reasons == [
        "it quantizes Linear layers, this is a Conv2d",
        "it has no e2m1 weights",
        "it has no int8 inputs with a range that is fixed",
    ]


def test_an_embedding_stays_and_its_tied_head_is_torchaos(tmp_path):
    torch.manual_seed(0)

    def made():
        model = nn.Sequential(nn.Embedding(24, 32), nn.Linear(32, 24, bias=False)).eval()
        model[1].weight = model[0].weight
        return model

    model, ids, int8 = made(), torch.arange(24).view(2, 12), parse_format("int8")
    modules = quantize_model(model, include=["0", "1"], formats=[int8])
    calibrate(model, modules, [ids])
    set_formats(modules, dict.fromkeys(modules, (int8, FLOAT)))
    write_packed(tmp_path / "m.safetensors", model, modules)
    again = made()
    verdicts = to_torchao(again, restore(again, *read_packed(tmp_path / "m.safetensors")))
    assert "this is an embedding" in verdicts["0"].why[0] and verdicts["1"].as_chosen
    with torch.no_grad():
        torch.testing.assert_close(again(ids), model(ids), rtol=1e-5, atol=1e-5)

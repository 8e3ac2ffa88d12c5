"""Layers whose output channels differ in format: packed files in their own bits, ONNX in each group's type."""

import numpy as np
import pytest
import torch

from cost.cost import memory_cost
from cost.file_scope import charge_file
from cost.profile import profile_model
from quant.export.packed import packed_sizes, read_packed, restore, write_packed
from quant.export.weights import round_weight
from quant.formats import index_bits, parse_format
from tests.quant.test_channel_groups import WEIGHTS, Net, divided

MIXES = ["int8+int4", "int8+int5+int4+int2", "e4m3+e2m1", "int8+e2m1"]


@pytest.mark.parametrize("config", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("mix", MIXES)
def test_a_packed_model_returns_the_same_outputs_from_each_groups_own_bits(mix, config, tmp_path):
    model, modules, x = divided(mix, config)
    verdicts = write_packed(tmp_path / "file", model, modules)
    description, tensors = read_packed(tmp_path / "file")
    again = Net().eval()
    layers = restore(again, description, tensors)
    assert torch.equal(again(x), model(x))
    parts = parse_format(mix).parts
    for name, module in modules.items():
        assert layers[name].formats == module.formats and verdicts[name].as_chosen
        groups = round_weight(name, module).groups
        for number, (part, channels) in enumerate(zip(parts, groups, strict=True)):
            values = len(channels) * module.weight.numel() // sum(map(len, groups))
            assert tensors[f"{name}.weight.group_codes.{number}"].numel() == -(-values * int(part.bits) // 8)


def test_the_cost_of_the_whole_file_is_that_of_its_tensors(tmp_path):
    model, modules, x = divided("int8+int4+int4+int2")
    for module in modules.values():
        if module.bias is not None:
            module.bias.data.zero_()  # a value that 16 bits hold
    profiles = charge_file(profile_model(Net(), x, list(modules)), Net())
    charged = memory_cost(profiles, {name: module.formats for name, module in modules.items()}) * 2**20
    write_packed(tmp_path / "file", model, modules, halve=True)
    sizes = packed_sizes(tmp_path / "file")
    stored = sum(sizes.values()) - sizes["header"]
    assert 0 <= stored - charged < 4 * len(modules)  # the codes of each group end at a byte
    assert index_bits(2) == 1 and index_bits(4) == 2


@pytest.mark.parametrize("mix", MIXES)
def test_onnx_runtime_computes_the_same_outputs(mix, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    from quant.export.onnx.export import export_onnx, onnx_sizes

    model, modules, x = divided(mix, {"symmetric": mix != "int8+e2m1"})
    path = tmp_path / "model.onnx"
    verdicts = export_onnx(path, model, modules, {"x": x})
    (made,) = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
    expected = model(x).detach().numpy()
    assert np.abs(made - expected).max() < 0.03 * np.abs(expected).max()  # inputs of 8 bits may round to a neighbour
    bits = {"int8+int4": 6, "int8+int5+int4+int2": 6, "e4m3+e2m1": 8, "int8+e2m1": 16}[mix]
    assert verdicts["conv"].weight_bits == pytest.approx(bits, abs=0.5)
    assert verdicts["conv"].as_chosen == (mix == "int8+int4")
    if mix == "int8+int4":
        assert onnx_sizes(path, verdicts)["codes"] == packed_codes(tmp_path, model, modules)


def packed_codes(folder, model, modules):
    write_packed(folder / "file", model, modules)
    return packed_sizes(folder / "file")["codes"]

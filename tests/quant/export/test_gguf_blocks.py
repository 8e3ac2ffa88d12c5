"""Blocks of GGUF: the package gguf reads the values that a layer computes with, in the bits of ggml's types."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from quant.convert import quantize_model
from quant.export.gguf_blocks import BITS, float_tensor, gguf_verdict, tensor_type, weight_tensor
from quant.export.weights import round_weight
from quant.formats import FLOAT, parse_format
from quant.quantizers.quantizer import WEIGHT

gguf = pytest.importorskip("gguf")

EXACT = {
    **{"int2g32": "Q4_0", "int4g32": "Q4_0", "int4g128": "Q4_0", "int5g32": "Q5_0", "int6g64": "Q8_0"},
    **{"int8g32": "Q8_0", "uint6g32": "Q8_0", "uint7g64": "Q8_0", "mxint8": "Q8_0", "mxfp4": "MXFP4", "bf16": "BF16"},
    **{"int16": "F32", "e1m14": "F32"},
}
ROUNDED = {
    **{"int3": "Q4_0", "int4": "Q4_0", "int5": "Q5_0", "int8": "Q8_0", "e2m1": "Q5_0", "e2m3": "Q8_0"},
    **{"uint3g32": "Q4_1", "uint4g32": "Q4_1", "uint5g64": "Q5_1", "uint8g32": "F16", "int4g16": "F16"},
    **{"e4m3": "F16", "nvfp4": "F16", "mxfp8": "F16", "e3m2": "F16"},
}
"""what rounds a scale, a smallest value or the values themselves to fp16's 11 bits"""


def rounded_weight(name, columns=256, **config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(columns, 6))
    with torch.no_grad():
        model[0].weight.mul_(torch.tensor([1.0, 3.0, 0.1, 1.0, 7.0, 0.5]).unsqueeze(1)).add_(0.02)
        model[0].weight[3] = 0
    modules = quantize_model(model, formats=[parse_format(name)], weight=replace(WEIGHT, **config))
    modules["0"].set_formats(parse_format(name), FLOAT)
    return round_weight("0", modules["0"])


def read(tensor):
    """What the package gguf reads from a tensor."""
    data = tensor.data.view("uint8") if tensor.type == "BF16" else tensor.data
    return torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[tensor.type]))


@pytest.mark.parametrize(("name", "kind"), [*EXACT.items(), *ROUNDED.items()])
def test_gguf_reads_the_values_of_the_run(name, kind):
    weight = rounded_weight(name)
    tensor = weight_tensor(weight)
    assert tensor.type == kind == tensor_type(parse_format(name), 256)
    values = weight.values()
    tolerance = 0.0 if name in EXACT else 2.0**-11
    # a smallest value is rounded to fp16 too, which moves all values of its block
    most = values.abs().amax(1, keepdim=True) if kind in ("Q4_1", "Q5_1") else values.abs()
    error = (read(tensor) - values).abs()
    assert (error <= 2 * tolerance * most + 1e-7 * (tolerance > 0)).all()
    assert tensor.data.nbytes * 8 / values.numel() == BITS[kind]


@pytest.mark.parametrize(("width", "kind"), [(4, "Q4_1"), (5, "Q5_1"), (6, "Q8_0"), (8, "F16")])
def test_codes_with_a_zero_point_per_channel(width, kind):
    weight = rounded_weight(f"int{width}", symmetric=False)
    tensor = weight_tensor(weight)
    assert tensor.type == kind
    torch.testing.assert_close(read(tensor), weight.values(), rtol=2e-3, atol=2e-3 * weight.values().abs().max().item())


def test_the_codes_are_those_of_the_run_and_not_rounded_again():
    weight = rounded_weight("int4g32")
    data = torch.from_numpy(weight_tensor(weight).data).view(6, 8, 18)[..., 2:].int()
    codes = torch.cat([data & 15, data >> 4], dim=-1).view(6, 256) - 8
    assert torch.equal(codes.float(), weight.elements)
    assert codes.min() == -7 and codes.max() == 7


def test_rows_that_no_block_divides_stay_in_16_bits():
    weight = rounded_weight("int4g32", columns=48)
    tensor = weight_tensor(weight)
    assert tensor.type == "F16"
    torch.testing.assert_close(read(tensor), weight.values(), rtol=1e-3, atol=0)


def test_values_beyond_fp16_and_verdicts():
    assert float_tensor(torch.tensor([1e5])).type == "F32" and float_tensor(torch.ones(3)).type == "F16"
    assert gguf_verdict(parse_format("int4g32"), FLOAT, "Q4_0").as_chosen
    wider = gguf_verdict(parse_format("int4g128"), parse_format("int8"), "Q4_0")
    assert (wider.weight_bits, wider.exported_activation, len(wider.why)) == (4.5, "float", 2)

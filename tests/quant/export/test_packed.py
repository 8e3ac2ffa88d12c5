"""The packed checkpoint: every format's codes bit for bit, logits of the rebuilt model, sizes, damage."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from quant.convert import calibrate, quantize_model, set_formats
from quant.errors import UserError
from quant.export.bit_packing import decode, decode_powers, encode, encode_powers, pack_bits, packed_bytes, unpack_bits
from quant.export.packed import packed_sizes, read_packed, restore, write_packed
from quant.export.weights import round_weight
from quant.formats import FLOAT, FloatFormat, IntFormat, activation_format, parse_format
from quant.kernels.groups import from_rows, to_rows
from quant.quantizers.quantizer import ACTIVATION, WEIGHT, QuantizerConfig
from quant.transforms.placement import Placement, place_quantizers
from tests.quant.oracles import DTYPES

NAMES = [
    *(f"int{width}" for width in (2, 3, 4, 5, 6, 7, 8, 16)),
    *("e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "e1m2", "e3m4", "e8m1", "e1m14", "bf16", "fp16"),
    *("mxfp8", "mxfp6", "mxfp4", "mxint8", "nvfp4"),
    *("int4g32", "uint4g32", "int3g16", "uint3g16", "int8g64"),
]
ELEMENTS = [format for format in map(parse_format, NAMES) if isinstance(format, IntFormat | FloatFormat)]


class Net(nn.Module):
    """Grouped and depthwise convolutions, a Linear, GPT-2's Conv1D; odd sizes leave partial blocks."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.grouped = nn.Conv2d(6, 8, 3, groups=2, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.linear = nn.Linear(8 * 4 * 4, 37)
        self.conv1d = Conv1D(5, 37)

    def forward(self, x):
        x = self.depthwise(self.grouped(self.norm(self.conv(x)).relu())).relu()
        return self.conv1d(self.linear(x.flatten(1)).relu())


def quantized(formats, seed=0, **configs):
    torch.manual_seed(seed)
    model = Net().eval()
    modules = quantize_model(model, formats=[f for pair in formats for f in pair if f != FLOAT], **configs)
    batch = torch.randn(4, 2, 8, 8)
    calibrate(model, modules, [batch])
    set_formats(modules, {name: formats[index % len(formats)] for index, name in enumerate(modules)})
    return model, modules, batch


@given(st.integers(1, 16), st.integers(0, 200), st.integers(0, 2**32 - 1))
def test_codes_come_back_bit_for_bit_and_take_their_own_bits(width, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**width, count, dtype=np.uint32)
    packed = pack_bits(codes, width)
    assert packed.size == packed_bytes(count, width) == (count * width + 7) // 8
    np.testing.assert_array_equal(unpack_bits(packed, width, count), codes)
    whole = sum(int(code) << (width * place) for place, code in enumerate(codes))
    assert int.from_bytes(packed.tobytes(), "little") == whole


def test_packing_in_parts_is_packing_at_once(monkeypatch):
    codes = np.random.default_rng(0).integers(0, 8, 1003, dtype=np.uint32)
    at_once = pack_bits(codes, 3)
    monkeypatch.setattr("quant.export.bit_packing._CODES_AT_ONCE", 64)
    np.testing.assert_array_equal(pack_bits(codes, 3), at_once)
    np.testing.assert_array_equal(unpack_bits(at_once, 3, codes.size), codes)


def test_a_short_array_of_codes_is_refused():
    with pytest.raises(ValueError, match="10 codes of 3 bits take 4 bytes, got 3"):
        unpack_bits(np.zeros(3, np.uint8), 3, 10)


@pytest.mark.parametrize("format", ELEMENTS, ids=str)
def test_every_code_has_one_value(format):
    codes = np.arange(2 ** int(format.bits), dtype=np.uint32)
    if isinstance(format, FloatFormat):
        magnitudes = codes & (2 ** (format.exponent + format.mantissa) - 1)
        codes = codes[magnitudes < 2 ** (format.exponent + format.mantissa) - format.reserved]
    values = decode(codes, format)
    np.testing.assert_array_equal(encode(values, format), codes)
    assert values.max() == (format.bounds("full")[1] if isinstance(format, IntFormat) else format.qmax)


@pytest.mark.parametrize(("name", "dtype"), [*DTYPES, ("e3m4", ml_dtypes.float8_e3m4)])
def test_codes_of_floats_are_those_of_the_hardware(name, dtype):
    format = parse_format(name)
    whole = np.uint16 if np.dtype(dtype).itemsize == 2 else np.uint8
    codes = np.arange(2 ** int(format.bits)).astype(whole)
    with np.errstate(invalid="ignore"):
        values = codes.view(dtype).astype(np.float32)
    if name == "e3m4":  # theirs keeps codes for infinity and NaN, ours does not
        codes, values = codes[np.isfinite(values)], values[np.isfinite(values)]
    keep = np.isfinite(values)
    np.testing.assert_array_equal(decode(codes[keep], format), values[keep])
    np.testing.assert_array_equal(encode(values[keep], format), codes[keep])


def test_scales_of_mx_blocks_are_e8m0_codes():
    codes = np.arange(255, dtype=np.uint8)
    powers = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(decode_powers(codes), powers)
    np.testing.assert_array_equal(encode_powers(powers), codes)


@pytest.mark.parametrize("dim", [None, 0, 1, -1])
def test_rows_and_back(dim):
    x = torch.arange(60.0).view(3, 4, 5)
    rows = to_rows(x, dim)
    assert rows.shape[1] == (20 if dim is None else x.shape[dim])
    assert torch.equal(from_rows(rows, x.shape, dim), x)


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_a_weight_multiply_to_what_the_layer_computes_with(name):
    _, modules, _ = quantized([(parse_format(name), FLOAT)])
    for layer, module in modules.items():
        weight = round_weight(layer, module)
        values = weight.values()
        if weight.in_block is not None:
            values = from_rows(values, module.weight.shape, module.weight_quantizer.reduction_dim)
        expected = module.weight_quantizer(module.weight)
        assert torch.equal(values.view(torch.int32), expected.detach().view(torch.int32))


@pytest.mark.parametrize("name", NAMES)
def test_the_rebuilt_model_computes_the_same_logits(name, tmp_path):
    format = parse_format(name)
    model, modules, batch = quantized([(format, activation_format(format))], weight=WEIGHT, activation=ACTIVATION)
    write_packed(tmp_path / "m.safetensors", model, modules, {"about": "x"})
    torch.manual_seed(7)
    fresh = Net().eval()
    description, tensors = read_packed(tmp_path / "m.safetensors")
    again = restore(fresh, description, tensors)
    assert description["about"] == "x" and {n: m.formats for n, m in again.items()} == {
        n: m.formats for n, m in modules.items()
    }
    with torch.no_grad():
        torch.testing.assert_close(fresh(batch), model(batch), rtol=0, atol=0)


def assert_survives(model, modules, batch, path):
    """Assert that a model written and read back has the same logits."""
    write_packed(path, model, modules)
    fresh = Net().eval()
    restore(fresh, *read_packed(path))
    with torch.no_grad():
        torch.testing.assert_close(fresh(batch), model(batch), rtol=0, atol=0)


class Uncalled(nn.Module):
    """Layers whose weights are read without a call, or not at all."""

    def __init__(self):
        super().__init__()
        self.called, self.read, self.listed, self.unused = (nn.Linear(6, 6) for _ in range(4))
        self.plain = [self.listed]

    def forward(self, x):
        return self.plain[0](nn.functional.linear(self.called(x), self.read.weight, self.read.bias))


def test_layers_that_are_never_called_are_stored_as_they_run(tmp_path):
    torch.manual_seed(0)
    model, x, int2 = Uncalled().eval(), torch.randn(8, 6), parse_format("int2")
    modules = quantize_model(model, formats=[int2])
    set_formats(modules, dict.fromkeys(modules, (int2, int2)))
    with pytest.raises(UserError, match="layer called: its int2 inputs were never calibrated"):
        write_packed(tmp_path / "m", model, modules)
    calibrate(model, modules, [x])
    verdicts = write_packed(tmp_path / "m", model, modules)
    assert all(verdict.as_chosen for verdict in verdicts.values())
    fresh = Uncalled().eval()
    formats = {name: module.formats for name, module in restore(fresh, *read_packed(tmp_path / "m")).items()}
    assert formats == {name: module.formats for name, module in modules.items()}
    assert formats["called"] == (int2, int2) and formats["unused"] == (int2, FLOAT)
    assert formats["read"] == formats["listed"] == (FLOAT, FLOAT)
    with torch.no_grad():
        torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("range", ["dynamic", "calibrated", "learned"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_any_way_to_find_scales_survives(range, granularity, symmetric, tmp_path):
    pairs = [(parse_format("int3"), parse_format("int5")), (parse_format("e2m1"), FLOAT), (FLOAT, parse_format("int8"))]
    weight = QuantizerConfig(range=range, granularity=granularity, symmetric=symmetric)
    activation = QuantizerConfig(range=range, symmetric=symmetric)
    model, modules, batch = quantized(pairs, weight=weight, activation=activation)
    assert_survives(model, modules, batch, tmp_path / "m.safetensors")


def test_learned_offsets_survive(tmp_path):
    pairs = [(parse_format("int4"), parse_format("int4")), (parse_format("int3"), parse_format("e2m1"))]
    activation = QuantizerConfig(symmetric=False, learned_offset=True)
    model, modules, batch = quantized(pairs, activation=activation)
    modules["conv"].input_quantizer.grids["int4"].offset.data.add_(0.123)
    assert_survives(model, modules, batch, tmp_path / "m.safetensors")


def test_tied_weights_are_stored_once_and_tied_again(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.inner, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.inner(self.embedding(x)))

    int4, tokens = parse_format("int4"), torch.arange(11)
    for names in (["inner"], ["inner", "head"]):
        torch.manual_seed(0)
        model = Tied().eval()
        modules = quantize_model(model, include=names)
        set_formats(modules, dict.fromkeys(names, (int4, FLOAT)))
        write_packed(tmp_path / "m.safetensors", model, modules)
        fresh = Tied().eval()
        description, tensors = read_packed(tmp_path / "m.safetensors")
        assert sum(t.shape == (11, 6) and t.is_floating_point() for t in tensors.values()) == 1
        restore(fresh, description, tensors)
        with torch.no_grad():
            assert torch.equal(fresh(tokens), model(tokens))
        assert (fresh.head.weight is fresh.embedding.weight) == (names == ["inner"])


@pytest.mark.parametrize("name", ["int3", "e2m1", "mxfp4", "nvfp4"])
def test_convolutions_in_one_and_three_dimensions(name, tmp_path):
    format = parse_format(name)

    def build(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Unflatten(1, (8, 1, 1)), nn.Conv3d(8, 4, (1, 1, 3)))

    model, x = build(0), torch.randn(2, 3, 12)
    modules = quantize_model(model, formats=[format])
    calibrate(model, modules, [x])
    set_formats(modules, dict.fromkeys(modules, (format, format)))
    write_packed(tmp_path / "p.safetensors", model, modules)
    again = build(1)
    restore(again, *read_packed(tmp_path / "p.safetensors"))
    torch.testing.assert_close(again.eval()(x), model.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_model_of_another_precision_comes_back_in_it(dtype, tmp_path):
    int8 = parse_format("int8")
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype), torch.randn(4, 6).to(dtype)
    modules = quantize_model(model, formats=[int8])
    calibrate(model, modules, [x])
    set_formats(modules, dict.fromkeys(modules, (int8, int8)))
    write_packed(tmp_path / "p.safetensors", model, modules)
    again = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    restore(again, *read_packed(tmp_path / "p.safetensors"))
    assert {weight.dtype for weight in again.parameters() if weight.dim() == 2} == {dtype}
    torch.testing.assert_close(again.eval()(x), model.eval()(x))


def test_quantizers_around_layers_are_refused(tmp_path):
    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            return x + self.linear(x)

    model, x, int8 = Added(), torch.randn(4, 6), parse_format("int8")
    modules = quantize_model(model, formats=[int8])
    place_quantizers(model, modules, x, Placement(residual_adds=True))
    with pytest.raises(UserError, match="no place for the quantizers around layers"):
        write_packed(tmp_path / "p.safetensors", model, modules)


class UsedTwice(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.first = self.again = nn.Linear(8, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.again(self.first(x).relu()).relu())


@pytest.mark.parametrize("range", ["dynamic", "learned"])
def test_a_layer_with_two_names_is_stored_once(range, tmp_path):
    torch.manual_seed(0)
    model, x = UsedTwice(), torch.randn(16, 8)
    activation = QuantizerConfig(range, symmetric=False, observer="minmax")
    modules = quantize_model(model, formats=[IntFormat(2), IntFormat(8)], activation=activation)
    calibrate(model, modules, [x])
    set_formats(modules, dict.fromkeys(modules, (IntFormat(2), IntFormat(8))))
    write_packed(tmp_path / "p.safetensors", model, modules)
    description, tensors = read_packed(tmp_path / "p.safetensors")
    again = UsedTwice()
    restore(again, description, tensors)
    torch.testing.assert_close(again.eval()(x), model.eval()(x), rtol=0, atol=0)
    assert "again.weight" not in tensors


def test_layers_may_find_their_scales_in_different_ways(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(16, 8)
    static, dynamic = (QuantizerConfig(kind, symmetric=kind == "calibrated") for kind in ("calibrated", "dynamic"))
    modules = quantize_model(model, ["0"], formats=[IntFormat(4)], activation=static)
    modules |= quantize_model(model, ["2"], formats=[IntFormat(4)], activation=dynamic)
    calibrate(model, modules, [x])
    set_formats(modules, dict.fromkeys(modules, (IntFormat(4), IntFormat(4))))
    write_packed(tmp_path / "p.safetensors", model, modules)
    again = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    restore(again, *read_packed(tmp_path / "p.safetensors"))
    torch.testing.assert_close(again.eval()(x), model.eval()(x), rtol=0, atol=0)


def test_the_file_has_the_size_that_the_formats_say(tmp_path):
    int3, e2m3 = parse_format("int3"), parse_format("e2m3")
    model, modules, _ = quantized([(int3, int3), (e2m3, e2m3), (FLOAT, FLOAT)])
    path = tmp_path / "m.safetensors"
    write_packed(path, model, modules)
    sizes = packed_sizes(path)
    assert sum(sizes.values()) == path.stat().st_size
    weights = {name: (module.weight.numel(), module.formats[0]) for name, module in modules.items()}
    quantized_weights = [(n, int(f.bits)) for n, f in weights.values() if f != FLOAT]
    assert sizes["codes"] == sum((n * bits + 7) // 8 for n, bits in quantized_weights)
    assert sizes["float_weights"] == sum(4 * n for n, f in weights.values() if f == FLOAT)
    channels = 6 + 8 + 37 + 5  # conv, grouped, linear, conv1d; the depthwise layer is float
    assert sizes["scales"] == 4 * (channels + 4) and sizes["zero_points"] == 2 and sizes["block_scales"] == 0
    biases = 6 + 8 + 37 + 5
    assert sizes["rest"] == 4 * (biases + 4 * 6) + 8  # a batch norm has four vectors and a counter


@pytest.mark.parametrize("name", ["int4g32", "uint4g16"])
def test_groups_take_the_bits_that_the_format_says(name, tmp_path):
    torch.manual_seed(0)
    model, format = nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 32)), parse_format(name)
    modules = quantize_model(model, formats=[format])
    calibrate(model, modules, [torch.randn(4, 256)])
    set_formats(modules, dict.fromkeys(modules, (format, FLOAT)))
    write_packed(tmp_path / "m.safetensors", model, modules)
    sizes = packed_sizes(tmp_path / "m.safetensors")
    assert 8 * (sizes["codes"] + sizes["block_scales"]) == format.bits * (256 * 64 + 64 * 32)
    assert sizes["scales"] == sizes["zero_points"] == 0


def test_a_damaged_file_is_one_clear_error(tmp_path):
    model, modules, _ = quantized([(parse_format("int4"), parse_format("int8"))])
    path = tmp_path / "m.safetensors"
    write_packed(path, model, modules)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"m\.safetensors: damaged or truncated"):
        read_packed(path)
    for place in (len(whole) - 1, whole.index(b"int4")):  # a weight, a format
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(UserError, match="do not match its checksum"):
            read_packed(path)
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match="damaged or truncated"):
        read_packed(path)
    with pytest.raises(UserError, match="no such packed checkpoint"):
        read_packed(tmp_path / "none.safetensors")


def test_a_file_of_another_architecture_is_refused(tmp_path):
    model, modules, _ = quantized([(parse_format("int4"), FLOAT)])
    path = tmp_path / "m.safetensors"
    write_packed(path, model, modules)
    description, tensors = read_packed(path)
    other = Net()
    other.linear = nn.Linear(128, 36)
    with pytest.raises(UserError, match=r"layer linear: the file has weights of \[37, 128\], the model of \[36, 128\]"):
        restore(other, description, tensors)
    other = Net()
    other.more = nn.Parameter(torch.zeros(3))
    with pytest.raises(UserError, match="does not fit Net: it lacks more"):
        restore(other, description, tensors)


def test_weights_that_cannot_be_stored_are_refused(tmp_path):
    model, modules, _ = quantized([(parse_format("int4"), FLOAT)])
    with torch.no_grad():
        modules["linear"].weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="layer linear: its weight holds NaN"):
        write_packed(tmp_path / "m.safetensors", model, modules)

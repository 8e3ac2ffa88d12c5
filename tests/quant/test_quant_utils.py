"""fake_quantize, bit for bit, against ml_dtypes, torch.round and a float64 table; eager and compiled."""

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quant.kernels.dispatch
import quant.kernels.native
from quant.formats import FLOAT, IntFormat, parse_format
from quant.quant_utils import fake_quantize, rounding_params, scale_from_range, use_compiled
from tests.quant.oracles import (
    DTYPES,
    MINIFLOATS,
    around,
    assert_same_bits,
    bfloat16_patterns,
    bit_patterns,
    float_values,
    middles,
    nearest,
)

RESERVED = {(4, 3): 1, (5, 2): 4, (8, 7): 128}
INTEGERS = [2, 3, 4, 5, 6, 7, 8, 16]
SCALES = [1.0, 2.0**-9, 0.0371]
RANDOM = bit_patterns(1_000_000)


@pytest.fixture(scope="module", autouse=True)
def modes():
    """Compilers that work on this machine; kernels are eager again afterwards."""
    works = [compiler for compiler in ("native", "inductor") if use_compiled("auto", compiler=compiler)]
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # else "compiled" could quietly become eager
        yield [None, *works]
    use_compiled("off")


def quantized(modes, *args, **kwargs):
    """Return fake_quantize's result, after checks that all kernels agree and the input is unchanged."""
    before, results = args[0].clone(), []
    for compiler in modes:
        use_compiled("on" if compiler else "off", compiler=compiler)
        results.append(fake_quantize(*args, **kwargs))
        assert_same_bits(results[-1], results[0])
    assert_same_bits(args[0], before)
    return results[0]


def inputs_for(values, scale):
    """Float32 inputs: every bfloat16, random bits (a million for scale 1), and values around the scaled midpoints."""
    some = RANDOM if scale == 1 else RANDOM[::16]
    middle = np.minimum(middles(values), np.finfo(np.float32).max).astype(np.float32)
    return np.concatenate([some, bfloat16_patterns(), around(middle * np.float32(scale))])


def scaled(v, scale):
    """Divide in float32: v / scale."""
    with np.errstate(all="ignore"):
        return v.astype(np.float32) / np.float32(scale)


def expected_float(x, values, scale):
    with np.errstate(all="ignore"):
        return torch.from_numpy(nearest(scaled(x, scale), values).astype(np.float32) * np.float32(scale))


def expected_integer(x, low, high, zero_point, scale):
    """The formula with torch.round, as the difference of two integers, so that -0.0 becomes +0.0."""
    v = torch.from_numpy(scaled(x, scale))
    codes = torch.where(v.isnan(), v, (torch.round(v).double() + zero_point).clamp(low, high) - zero_point)
    return ((codes + 0.0).float() * torch.tensor(scale)).float()


# ------------------------------------------------------ bit for bit


@pytest.mark.parametrize("exponent,mantissa", MINIFLOATS, ids=lambda number: str(number))
def test_minifloats_equal_the_table_from_the_definition(exponent, mantissa, modes):
    format = parse_format(f"e{exponent}m{mantissa}")
    values = float_values(exponent, mantissa, RESERVED.get((exponent, mantissa), 0))
    for scale in SCALES:
        x = inputs_for(values, scale)
        assert_same_bits(quantized(modes, torch.from_numpy(x), format, scale), expected_float(x, values, scale))


def test_fp16_equals_the_table_from_the_definition(modes):
    values = float_values(5, 10, 1024)
    for scale in SCALES:
        x = inputs_for(values, scale)
        out = quantized(modes, torch.from_numpy(x), parse_format("fp16"), scale)
        assert_same_bits(out, expected_float(x, values, scale))


@pytest.mark.parametrize("width", INTEGERS)
@pytest.mark.parametrize("grid", ["narrow", "full", "unsigned"])
def test_integers_equal_torch_round(width, grid, modes):
    low, high = {
        "narrow": (1 - 2 ** (width - 1), 2 ** (width - 1) - 1),
        "full": (-(2 ** (width - 1)), 2 ** (width - 1) - 1),
        "unsigned": (0, 2**width - 1),
    }[grid]
    for scale in SCALES:
        x = inputs_for(np.arange(high + 2.0), scale)
        out = quantized(modes, torch.from_numpy(x), IntFormat(width), scale, grid=grid)
        assert_same_bits(out, expected_integer(x, low, high, 0, scale))


@pytest.mark.parametrize("width", INTEGERS)
def test_zero_points_move_the_full_grid(width, modes):
    low, high = -(2 ** (width - 1)), 2 ** (width - 1) - 1
    for zero_point, scale in zip((low, low // 2, high), SCALES, strict=True):
        x = inputs_for(np.arange(2.0**width + 1), scale)
        out = quantized(modes, torch.from_numpy(x), IntFormat(width), scale, torch.tensor(zero_point))
        assert_same_bits(out, expected_integer(x, low, high, zero_point, scale))


@pytest.mark.parametrize(("name", "dtype"), DTYPES)
def test_within_range_equal_to_ml_dtypes(name, dtype, modes):
    limit = np.float32(ml_dtypes.finfo(dtype).max)
    x = np.concatenate([RANDOM, bfloat16_patterns()])
    x = x[np.abs(x) <= limit]  # beyond it ml_dtypes gives infinity or NaN, and for NaN some give -0.0
    assert len(x) > 300_000
    expected = torch.from_numpy(x.astype(dtype).astype(np.float32))
    assert_same_bits(quantized(modes, torch.from_numpy(x), parse_format(name)), expected)


@pytest.mark.parametrize("name", ["int2", "int8", "int16", "e2m1", "e4m3", "e5m2", "bf16", "fp16", "e1m1", "e8m1"])
def test_special_values(name, modes):
    format = parse_format(name)
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -1e-45, 3.4e38])
    out = quantized(modes, x, format)
    assert out[0].isnan()
    assert out[1:3].tolist() == [format.qmax, -format.qmax] and out[7] == format.qmax
    assert out[3:7].tolist() == [0, 0, 0, 0]
    keeps_sign = not isinstance(format, IntFormat)
    assert torch.signbit(out[3:7]).tolist() == [False, keeps_sign, False, keeps_sign]


@pytest.mark.parametrize("name", ["int4", "int8", "e4m3", "e2m1", "bf16", "mxfp4", "nvfp4", "mxint8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_inputs_are_computed_in_float32(name, dtype, modes):
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    if name in ("mxfp4", "nvfp4", "mxint8"):
        x = x[x.isfinite()]
    format = parse_format(name)
    scale = 0.0371 if format.scaled else None
    assert_same_bits(quantized(modes, x, format, scale), fake_quantize(x.float(), format, scale).to(dtype))


# ------------------------------------------------------ shapes and memory


LAYOUTS = {
    "0-d": lambda x: x[0, 0, 0, 0],
    "empty": lambda x: x[:0],
    "empty inside": lambda x: x[:, :, :0],
    "one axis": lambda x: x[0, 0, 0],
    "transposed": lambda x: x.transpose(1, 3),
    "strided": lambda x: x[:, ::2, :, 1::3],
    "expanded": lambda x: x[:, :1].expand(-1, 5, -1, -1),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "reversed axes": lambda x: x.permute(3, 2, 1, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["int4", "e2m1", "mxfp4", "nvfp4", "float"])
def test_any_layout_gives_the_values_of_the_contiguous_one_and_keeps_its_memory_order(layout, name, modes):
    x = LAYOUTS[layout](torch.randn(3, 6, 5, 40, generator=torch.Generator().manual_seed(0)))
    out = quantized(modes, x, parse_format(name), None if name != "int4" else 0.3)
    assert_same_bits(out, fake_quantize(x.contiguous().clone(), parse_format(name), None if name != "int4" else 0.3))
    if x.numel():
        assert out.stride() == x.clone().stride() and out.data_ptr() != x.data_ptr()
    fake_quantize(torch.randn(4, 64, requires_grad=True), parse_format(name)).mul_(2)  # not a view: may be changed


SCALE_SHAPES = [(), (1,), (5,), (4, 5), (4, 1), (3, 1, 1), (2, 1, 1, 1), (1, 3, 1, 1), (2, 1, 4, 1), (2, 3, 4, 5)]


@pytest.mark.parametrize("shape", SCALE_SHAPES, ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 1, 2), (3, 1, 0, 2)], ids=str)
def test_a_scale_broadcasts_as_in_arithmetic(shape, order):
    generator = torch.Generator().manual_seed(1)
    sizes, back = [(2, 3, 4, 5)[d] for d in order], sorted(range(4), key=order.__getitem__)
    x = (torch.randn(sizes, generator=generator) * 3).permute(back)
    assert x.shape == (2, 3, 4, 5)
    scale = torch.rand(shape, generator=generator) + 0.1
    zero_point = torch.randint(-8, 8, shape, generator=generator)
    assert torch.equal(fake_quantize(x, IntFormat(4), scale), torch.round(x / scale).clamp(-7, 7) * scale)
    codes = (torch.round(x / scale) + zero_point).clamp(-8, 7) - zero_point
    assert torch.equal(fake_quantize(x, IntFormat(4), scale, zero_point), codes * scale)


def test_zero_points_and_scales_broadcast_with_each_other():
    x = torch.randn(4, 6)
    per_column = torch.arange(-3, 3)
    expected = ((torch.round(x / 0.5) + per_column).clamp(-8, 7) - per_column) * 0.5
    assert torch.equal(fake_quantize(x, IntFormat(4), 0.5, per_column), expected)
    assert torch.equal(fake_quantize(x, IntFormat(4), torch.full((6,), 0.5), per_column.double()), expected)
    one = fake_quantize(x, IntFormat(4), torch.full((4, 1), 0.5), 3)
    assert torch.equal(one, ((torch.round(x / 0.5) + 3).clamp(-8, 7) - 3) * 0.5)


def test_float_is_a_copy_and_one_grid_formats_only_have_a_row():
    x = torch.randn(3)
    out = fake_quantize(x, FLOAT)
    assert torch.equal(out, x) and out.data_ptr() != x.data_ptr()
    for name in ("float", "mxfp4"):
        with pytest.raises(ValueError, match=name):
            rounding_params(parse_format(name))


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["int2", "int3", "int8", "int16", "e2m1", "e4m3", "e5m2", "e3m4", "bf16", "fp16"]),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20),
    st.floats(min_value=2.0**-10, max_value=2.0**10, width=32),
)
def test_rounding_is_idempotent_monotone_odd_and_within_bounds(name, numbers, scale):
    format, x = parse_format(name), torch.tensor(sorted(numbers))
    scale = 2.0 ** round(np.log2(scale))  # a power of two: q * scale / scale is q again
    if not format.scaled:  # bf16 reaches to the end of float32: a larger grid would end in infinity
        scale = min(scale, 1.0)
    out = fake_quantize(x, format, scale)
    assert torch.equal(fake_quantize(out, format, scale), out)
    assert (out.diff() >= 0).all()
    assert torch.equal(fake_quantize(-x, format, scale), -out)
    assert (out.abs() <= format.qmax * scale).all()


# ------------------------------------------------------ ranges


def test_symmetric_scale_maps_the_largest_magnitude_to_the_formats_largest():
    low, high = torch.tensor([-3.0, -0.5, 0.0, 2.0]), torch.tensor([1.0, 4.0, 0.0, 5.0])
    for name in ("int2", "int8", "e4m3", "e2m1"):
        format = parse_format(name)
        scale, zero_point = scale_from_range(low, high, format, symmetric=True)
        assert zero_point is None
        tiny = torch.finfo(torch.float32).tiny
        assert torch.equal(scale, (torch.tensor([3.0, 4.0, 0.0, 5.0]) / torch.tensor(format.qmax)).clamp(min=tiny))


@pytest.mark.parametrize("width", INTEGERS)
def test_asymmetric_scale_and_zero_point(width):
    format = IntFormat(width)
    qmin, qmax = -(2 ** (width - 1)), 2 ** (width - 1) - 1
    low, high = torch.tensor([-1.0, 0.0, 2.0, -6.0, -6.0, 0.0]), torch.tensor([3.0, 4.0, 4.0, 0.0, -2.0, 0.0])
    scale, zero_point = scale_from_range(low, high, format, symmetric=False)
    spans = torch.tensor([4.0, 4.0, 4.0, 6.0, 6.0, 0.0])
    assert torch.equal(scale, (spans / torch.tensor(2.0**width - 1)).clamp(min=torch.finfo(torch.float32).tiny))
    inside = (qmin - torch.round(torch.tensor(-1.0) / scale[0])).clamp(qmin, qmax)
    assert zero_point.tolist() == [inside, qmin, qmin, qmax, qmax, qmin]  # one-sided: unsigned, or unsigned mirrored


def test_one_sided_tensors_use_every_code():
    for x in (torch.linspace(0, 3, 400), torch.linspace(-3, 0, 400), torch.linspace(1, 3, 400)):
        scale, zero_point = scale_from_range(x.min(), x.max(), IntFormat(2), symmetric=False)
        levels = fake_quantize(x, IntFormat(2), scale, zero_point).unique()
        assert len(levels) == (3 if x.min() == 1 else 4)  # of 0, 1, 2, 3 the last starts above 0.5
        assert levels.abs().max() == 3 and 3 in levels.abs()


@pytest.mark.parametrize("name", ["int2", "int8", "e2m1", "e4m3", "bf16", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_range_of_zero_keeps_zeros_and_stays_finite(name, symmetric):
    format, zero = parse_format(name), torch.zeros(())
    scale = zero_point = None
    if format.scaled:
        scale, zero_point = scale_from_range(zero, zero, format, symmetric)
        assert scale > 0
    assert torch.equal(fake_quantize(torch.zeros(40), format, scale, zero_point), torch.zeros(40))
    if format.scaled:
        assert fake_quantize(torch.tensor([1.0, -1.0]), format, scale, zero_point).isfinite().all()


def test_formats_as_wide_as_the_data_keep_scale_one():
    scale, zero_point = scale_from_range(torch.tensor(-2.0), torch.tensor(9.0), parse_format("bf16"), symmetric=False)
    assert (scale, zero_point) == (1, None)


# ------------------------------------------------------ compiling


def test_all_sizes_and_formats_share_one_graph(modes):
    if "inductor" not in modes:
        pytest.skip("no compiler here")
    torch._dynamo.reset()
    use_compiled("on", compiler="inductor")
    torch._dynamo.utils.counters.clear()
    names = ["int2", "int4", "int8", "e4m3", "e2m1", "e5m2"]
    for name, rows, columns in itertools.product(names, (3, 7), (33, 100)):
        x, scale = torch.randn(rows, columns), torch.rand(rows, 1) + 0.1
        fake_quantize(x, parse_format(name), scale)
        fake_quantize(x, parse_format(name), torch.tensor(0.1))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # per row and per tensor


@pytest.mark.parametrize("compiler", ["native", "inductor"])
@pytest.mark.parametrize("message", ["no C++ compiler\nsecond line", ""])
def test_without_a_compiler_auto_says_so_once_and_on_raises(message, compiler, monkeypatch, caplog):
    def compiling_fails(*tensors):
        raise RuntimeError(message)

    monkeypatch.setattr(torch, "compile", lambda kernel, **options: compiling_fails)
    monkeypatch.setattr(quant.kernels.native, "library", compiling_fails)
    caches = quant.kernels.dispatch._inductor, quant.kernels.native.NativeKernels.load
    try:
        for cache in caches:
            cache.cache_clear()
        with caplog.at_level("WARNING"):
            assert use_compiled("auto", compiler=compiler) is False
        assert [record.getMessage().count("\n") for record in caplog.records] == [0]
        assert (message.partition("\n")[0] or "RuntimeError") in caplog.text
        with pytest.raises(RuntimeError, match="--compile on"):
            use_compiled("on", compiler=compiler)
        assert quant.kernels.dispatch.kernels() is quant.kernels.eager.EAGER
    finally:
        for cache in caches:
            cache.cache_clear()


def test_a_compiler_that_fails_is_quoted_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("MPQ_CACHE_DIR", str(tmp_path))
    broken = tmp_path / "broken.cpp"
    broken.write_text("int main() { return nonsense; }")
    monkeypatch.setattr(quant.kernels.native, "SOURCE", broken)
    with pytest.raises(RuntimeError, match=r"broken\.cpp.*error.*nonsense"):
        quant.kernels.native.library.__wrapped__()
    assert list(tmp_path.iterdir()) == [broken]
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler found"):
        quant.kernels.native.library.__wrapped__()


def test_sums_do_not_depend_on_the_number_of_threads():
    if not use_compiled("auto"):
        pytest.skip("no compiler here")
    generator, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    x, grad = torch.randn(3, 20_000, 7, generator=generator), torch.randn(3, 20_000, 7, generator=generator)
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for shape in ((), (20_000, 1), (7,)):
                scale = torch.full(shape, 0.1, requires_grad=True)
                fake_quantize(x, IntFormat(4), scale).backward(grad)
                found.append(scale.grad)
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(found, found[3:], strict=False):
        assert torch.equal(one, other)

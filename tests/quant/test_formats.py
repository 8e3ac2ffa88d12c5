"""Formats: names, costs, and the numbers that define their grids."""

import dataclasses

import ml_dtypes
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant.formats import FLOAT, BlockFormat, FloatFormat, IntFormat, parse_format, parse_search_space
from tests.quant.oracles import DTYPES, MINIFLOATS, float_values

NAMED = ["e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "bf16", "fp16"]
ALL = [*(f"int{k}" for k in (2, 3, 4, 5, 6, 7, 8, 16)), *NAMED, "mxfp8", "mxfp6", "mxfp4", "mxint8", "nvfp4", "float"]
RESERVED = {(4, 3): 1, (5, 2): 4}


@pytest.mark.parametrize("name", ALL)
def test_a_format_is_called_by_its_name_and_is_a_dict_key(name):
    format = parse_format(name)
    assert format.name == str(format) == name
    assert parse_format(name.upper()) == format and {format: 1}[parse_format(f" {name} ")] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        format.width = 3


@pytest.mark.parametrize(
    ("alias", "name"),
    [("4", "int4"), (4, "int4"), (16, "int16"), (0, "float"), ("0", "float"), ("fp8", "e4m3"), ("fp4", "e2m1")],
)
def test_aliases(alias, name):
    assert parse_format(alias).name == name


@pytest.mark.parametrize(
    "name",
    [
        "int1",
        "1",
        1,
        "e9m9",
        "e0m3",
        "e3m0",
        "e8m8",
        "-8",
        "nan",
        "",
        "int",
        "int9",
        "9",
        "32",
        "e4",
        "4.0",
        "int0",
        "00",
        None,
    ],
)
def test_unknown_names_are_refused_with_the_value_and_the_choices(name):
    with pytest.raises(ValueError, match="int2") as refused:
        parse_format(name)
    assert repr(str(name)) in str(refused.value) and "mxfp4" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["4,", ",4", "4,4", "4,int4", "e4m3,fp8", "-8,4", "4", "", "4,nan", "int1,4"])
def test_search_spaces_that_leave_no_clear_choice_are_refused(text):
    with pytest.raises(ValueError):
        parse_search_space(text)


def test_a_search_space_keeps_its_order_and_may_mix_kinds():
    assert [format.name for format in parse_search_space("int8, e2m1,4,float")] == ["int8", "e2m1", "int4", "float"]


@pytest.mark.parametrize(
    ("name", "bits"),
    {"float": 16, "int2": 2, "int16": 16, "e4m3": 8, "e2m1": 4, "e3m2": 6, "bf16": 16, "fp16": 16}.items(),
)
def test_bits(name, bits):
    assert parse_format(name).bits == bits


@pytest.mark.parametrize(
    ("name", "bits"), {"mxfp8": 8.25, "mxfp6": 6.25, "mxfp4": 4.25, "mxint8": 8.25, "nvfp4": 4.5}.items()
)
def test_bits_of_block_formats_count_the_scales(name, bits):
    assert parse_format(name).bits == bits


def test_integer_grids():
    assert [IntFormat(2).bounds(grid) for grid in ("narrow", "full", "unsigned")] == [(-1, 1), (-2, 1), (0, 3)]
    assert [IntFormat(8).bounds(grid) for grid in ("narrow", "full", "unsigned")] == [
        (-127, 127),
        (-128, 127),
        (0, 255),
    ]
    assert IntFormat(8).qmax == 127 and IntFormat(8).smallest_subnormal == 1
    for width in (1, 0, 17):
        with pytest.raises(ValueError, match=f"int{width}"):
            IntFormat(width)


@pytest.mark.parametrize(("name", "dtype"), DTYPES)
def test_limits_equal_ml_dtypes(name, dtype):
    format, limits = parse_format(name), ml_dtypes.finfo(dtype)
    assert format.qmax == float(limits.max)
    assert format.smallest_normal == float(limits.smallest_normal)
    assert format.smallest_subnormal == float(limits.smallest_subnormal)
    assert (format.emin, format.bits) == (limits.minexp, limits.bits)


@pytest.mark.parametrize("exponent,mantissa", MINIFLOATS, ids=lambda number: str(number))
def test_limits_equal_the_table_from_the_definition(exponent, mantissa):
    format = parse_format(f"e{exponent}m{mantissa}")
    values = float_values(exponent, mantissa, RESERVED.get((exponent, mantissa), 0))
    assert format.qmax == values[-1] and format.smallest_subnormal == values[1]
    assert format.smallest_normal == values[2**mantissa]
    assert 2.0**format.emax <= format.qmax < 2.0 ** (format.emax + 1)
    assert format.bits == exponent + mantissa + 1


def test_one_exponent_bit_has_bias_zero():
    assert float_values(1, 2).tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    assert (FloatFormat(1, 2).qmax, FloatFormat(1, 2).smallest_normal, FloatFormat(1, 2).smallest_subnormal) == (
        3.5,
        2,
        0.5,
    )


def test_only_formats_as_wide_as_the_data_go_without_a_scale():
    assert not any(parse_format(name).scaled for name in ("float", "bf16", "fp16", "e8m3", "mxfp4", "nvfp4"))
    assert all(parse_format(name).scaled for name in ("int2", "int16", "e4m3", "e7m8", "e5m10"))


def test_block_formats_take_their_limits_from_the_element():
    format = parse_format("mxfp4")
    assert isinstance(format, BlockFormat) and format.block_size == 32
    assert (format.qmax, format.smallest_normal, format.smallest_subnormal) == (6, 1, 0.5)
    assert parse_format("nvfp4").block_size == 16 and parse_format("nvfp4").two_level and not format.two_level
    assert FLOAT.bits == 16


@given(st.sampled_from(MINIFLOATS), st.sampled_from(MINIFLOATS))
def test_distinct_minifloats_have_distinct_names_and_more_bits_never_a_coarser_step(one, other):
    a, b = parse_format("e{}m{}".format(*one)), parse_format("e{}m{}".format(*other))
    assert (a == b) == (a.name == b.name) == (one == other)
    if one[0] == other[0] and one[1] <= other[1]:
        assert a.smallest_subnormal >= b.smallest_subnormal

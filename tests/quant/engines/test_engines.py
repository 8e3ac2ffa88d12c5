"""The table of engines agrees with what the exporters do, for every pair of formats."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from quant.convert import calibrate, quantize_model
from quant.engines.rules import KINDS, UNQUANTIZED, holds
from quant.engines.table import ENGINES, markdown_table
from quant.export.compressed_tensors import mismatch as not_in_compressed_tensors
from quant.export.gguf_blocks import BITS, tensor_type
from quant.export.onnx.layers import INT_STORAGE, input_storage, own_name, storage_of
from quant.export.torchao import mismatch as not_in_torchao
from quant.formats import FLOAT, FloatFormat, GroupFormat, parse_format
from quant.quantizers.quantizer import ACTIVATION, QuantizerConfig

PLAIN = [parse_format(name) for name in ("float", *"2345678", "int16", "e4m3", "e5m2", "e3m2", "e2m1", "fp16", "bf16")]
BLOCKS = [parse_format(name) for name in ("mxfp8", "mxfp4", "mxint8", "nvfp4")]
GROUPS = [parse_format(f"{u}int{width}g{size}") for u in ("", "u") for width in (2, 3, 4, 8) for size in (32, 128)]
PAIRS = list(itertools.product(PLAIN + BLOCKS + GROUPS, PLAIN + BLOCKS))
PER_TOKEN = QuantizerConfig(granularity="token", observer="minmax", range="dynamic", symmetric=False)


def layer(activation=ACTIVATION):
    model = nn.Sequential(nn.Linear(128, 8))
    formats = {format for pair in PAIRS for format in pair} - {FLOAT}
    modules = quantize_model(model, formats=formats, activation=activation)
    calibrate(model, modules, [torch.randn(4, 128)])
    return modules["0"]


def in_onnx(weight, activation, kind="linear"):
    """Whether the types of ONNX that the exporter takes have both formats' own values."""
    if kind in ("conv", "depthwise") and weight.name in ("int4", "int8") and activation.name == "int4":
        return False  # integer convolutions read bytes: the exporter gives them int8
    inputs = input_storage(activation)
    if activation != FLOAT and (inputs is None or own_name(inputs) != activation.name):
        return False
    element = weight.element if isinstance(weight, GroupFormat) else weight
    stored = storage_of(weight) if isinstance(weight, FloatFormat) else None
    integers = [storage.name for storage in INT_STORAGE]
    return weight == FLOAT or element.name in integers or (stored is not None and own_name(stored) == weight.name)


def test_onnx_runtime_keeps_what_the_exporter_has_types_for():
    engine = ENGINES["onnxruntime"]
    kinds = ("linear", "conv", "depthwise", "experts")
    assert [pair for pair in PAIRS for kind in kinds if engine.keeps(kind, pair) != in_onnx(*pair, kind)] == []


@pytest.mark.parametrize("per_token", [False, True])
def test_torchao_keeps_what_the_exporter_gives_it(per_token):
    module = layer(PER_TOKEN if per_token else ACTIVATION)
    for pair in PAIRS:
        module.set_formats(*pair)
        assert ENGINES["torchao"].keeps("linear", pair, per_token) == (not_in_torchao(module) is None), pair


def test_transformers_keeps_what_compressed_tensors_has_schemes_for():
    module = layer()
    for pair in PAIRS:
        module.set_formats(*pair)
        kept = not_in_compressed_tensors("0", module) is None
        assert ENGINES["transformers"].keeps("linear", pair) == kept, pair


def test_llama_cpp_keeps_what_a_tensor_type_has_the_bits_of():
    """For weights with the exporter's type for rows of whole blocks, and of others."""
    engine = ENGINES["llama.cpp"]
    for weight in {weight for weight, _ in PAIRS} - {FLOAT}:
        for row in (128, 48):
            kind = tensor_type(weight, row)
            kept = engine.keeps("linear", (weight, FLOAT), row=row)
            assert not kept or engine.weight_bits(weight) == BITS[kind], (weight, row)
            groups = isinstance(weight, GroupFormat) and weight.size == 32 and kind.startswith(f"Q{weight.width}")
            assert kept == (groups or kind == "MXFP4" or weight.name in ("fp16", "bf16")), (weight, row, kind)


@pytest.mark.parametrize("engine", ENGINES.values(), ids=list(ENGINES))
def test_what_an_engine_stores_is_kept_and_holds_what_was_asked_for(engine):
    for kind, pair, per_token in itertools.product(set(KINDS) - {"cache"}, PAIRS, (False, True)):
        stored = engine.stored_as(kind, pair, per_token)
        assert stored is None or engine.keeps(kind, stored, per_token), (kind, pair)
        if stored is not None:
            assert engine.stored_as(kind, stored, per_token) == stored
            assert holds(stored[0], pair[0])
            assert kind == "embedding" or holds(stored[1], pair[1])


def test_the_wider_format_has_every_value_of_the_narrower():
    """All values of minifloats and integers at scale 1, against the grids as numbers."""
    grids = {format: values(format) for format in PLAIN if format != FLOAT and format.bits <= 8}
    for wide, narrow in itertools.product(grids, grids):
        if isinstance(wide, FloatFormat) == isinstance(narrow, FloatFormat):
            assert holds(wide, narrow) == (grids[narrow] <= grids[wide]), (wide, narrow)


def values(format):
    """Every value of a format of at most 8 bits, from its definition."""
    if not isinstance(format, FloatFormat):
        return set(range(-int(format.qmax), int(format.qmax) + 1))
    steps = 2**format.mantissa
    normal = {
        (1 + fraction / steps) * 2.0 ** (exponent - format.bias)
        for exponent in range(1, 2**format.exponent)
        for fraction in range(steps)
    }
    small = {fraction / steps * 2.0 ** (1 - format.bias) for fraction in range(steps)}
    return {sign * value for value in normal | small if value <= format.qmax for sign in (1, -1)}


def test_examples_from_the_documentation_of_the_engines():
    def stored(name, kind, weight, activation, **options):
        found = ENGINES[name].stored_as(kind, (parse_format(weight), parse_format(activation)), **options)
        return found and "/".join(map(str, found))

    assert stored("onnxruntime", "linear", "int3", "int3") == "int4/int4"
    assert stored("onnxruntime", "conv", "int3", "int3") == "int4/int8"
    assert stored("vllm", "linear", "int4", "int4") == "int4/float"  # it has nothing for 4-bit inputs
    assert stored("vllm", "linear", "int8", "int8") == "int8/int8"
    assert stored("vllm", "conv", "int8", "int8") is None
    assert stored("tensorrt", "conv", "int4", "int4") == "int8/int8"
    assert stored("llama.cpp", "linear", "int4", "float") == "int4g32/float"
    assert stored("llama.cpp", "linear", "int4", "float", row=48) is None
    assert stored("torchao", "linear", "int8", "int8", per_token=True) == "int8/int8"
    assert stored("torchao", "linear", "int8", "int8", per_token=False) == "int8/float"
    assert stored("executorch", "linear", "int4", "int8", per_token=True) == "int8/int8"  # in bytes
    assert ENGINES["llama.cpp"].weight_bits(parse_format("uint4g32")) == 5  # Q4_1: 20 bytes for 32 weights
    assert ENGINES["onnxruntime"].weight_bits(parse_format("int4g128")) == 4.125


def test_every_engine_runs_its_own_default_space():
    for engine in ENGINES.values():
        formats = [parse_format(name) for name in engine.default_space.split(",")]
        pairs = {engine.stored_as("linear", (format, FLOAT if "g" in format.name else format)) for format in formats}
        assert None not in pairs and len(pairs) == len(formats) and pairs != {UNQUANTIZED}, engine.name


def test_a_table_that_forgets_a_pair_is_seen():
    engine = ENGINES["onnxruntime"]
    short = replace(engine, rules=engine.rules[:1])
    assert any(short.keeps("linear", pair) != in_onnx(*pair) for pair in PAIRS)


def test_the_page_on_exports_shows_this_table():
    page = (Path(__file__).parents[3] / "docs" / "export.md").read_text()
    shown = page.partition("<!-- engines -->\n")[2].partition("<!-- engines end -->")[0]
    assert shown.strip() == markdown_table(), "paste the output of python -m quant.engines.table"

"""--engine: what it refuses in one line, what it sets, and what its formats cost."""

import pytest

from eval.config.parser import parse, parse_written, to_yaml
from quant.engines.table import ENGINES
from quant.errors import UserError

SEARCH = ["--task", "digits", "--model", "convnet", "--search"]


def read(*flags, base=SEARCH):
    return parse([*base, *flags])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--engine", "onnxrt"], ["--engine", "'onnxrt'", "llama.cpp"]),
        (["--engine", "onnxruntime", "--search_space", "4,mxfp4"], ["--search_space 4,mxfp4", "mxfp4", "e5m2"]),
        (["--engine", "onnxruntime", "--search_space", "2,3"], ["--search_space 2,3", "no choice"]),
        (["--engine", "onnxruntime", "--target_bits", "3"], ["--target_bits 3", "4 to 8 bits", "onnxruntime"]),
        (["--engine", "llama.cpp", "--per_token"], ["--per_token", "--engine llama.cpp"]),
        (["--engine", "torchao", "--smooth_quant"], ["--smooth_quant", "--engine torchao"]),
        (["--engine", "tensorrt", "--no_weight_symmetric"], ["--no_weight_symmetric", "--engine tensorrt"]),
        (["--engine", "tensorrt", "--quantizer", "lsq_plus"], ["--quantizer lsq_plus", "--engine tensorrt"]),
        (["--engine", "vllm", "--act_symmetric"], ["--act_symmetric", "--engine vllm"]),
        (["--engine", "openvino", "--act_per_channel"], ["--act_per_channel", "--engine openvino"]),
        (["--engine", "onnxruntime", "--quantize_residual_adds"], ["--quantize_residual_adds", "onnxruntime"]),
    ],
)
def test_what_an_engine_cannot_run_is_one_line(flags, named):
    with pytest.raises(UserError) as error:
        read(*flags)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in named), error.value


def test_a_uniform_format_has_to_be_one_of_the_engine_itself():
    base = SEARCH[:-1]
    assert read("--engine", "tensorrt", "--bits", "8", base=base).act_symmetric
    with pytest.raises(
        UserError, match=r"--bits 3: onnxruntime stores int3/int3 as int4/int4 or int4/int8; choices: int4, int8"
    ):
        read("--engine", "onnxruntime", "--bits", "3", base=base)
    with pytest.raises(UserError, match=r"--bits mxfp4: vllm stores mxfp4/mxfp4 as mxfp4/float; choices: int8"):
        read("--engine", "vllm", "--bits", "mxfp4", base=base)
    with pytest.raises(UserError, match="--engine vllm has no effect"):
        read("--engine", "vllm", base=base)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_alone_is_a_search_of_its_own(engine):
    """Its default space and default target, within what its formats cost; the written flags give the same run."""
    config = read("--engine", engine)
    assert config.search_space == ENGINES[engine].default_space
    assert min(config.charged_bits) < config.target_list[0] < max(config.charged_bits)
    assert engine in config.run_name


def test_formats_are_those_that_are_stored_and_cost_what_these_do():
    config = read("--engine", "onnxruntime", "--search_space", "2,3,4,5,6,8")
    assert [format.name for format in config.search_formats] == ["int4", "int8"]
    config = read("--engine", "llama.cpp", "--search_space", "3,uint4g32,8")
    assert [format.name for format in config.search_formats] == ["int4g32", "uint4g32", "int8g32"]
    assert config.charged_bits == [4.5, 5.0, 8.5]  # Q4_0, Q4_1, Q8_0: 18, 20 and 34 bytes for 32 weights
    assert [f"{w}/{a}" for w, a in read("--engine", "vllm", "--search_space", "4,8").stored_pairs] == [
        "int4/float",
        "int8/int8",
    ]


def test_an_engine_sets_what_it_wants_once(tmp_path):
    fused = read("--engine", "vllm")
    assert fused.fuse_groups and not fused.act_symmetric
    assert not read("--engine", "vllm", "--single_decision", base=SEARCH[:-1]).fuse_groups
    symmetric = read("--engine", "tensorrt")
    assert symmetric.act_symmetric and not symmetric.fuse_groups
    (tmp_path / "config.yaml").write_text(to_yaml(symmetric))
    assert parse_written(tmp_path / "config.yaml").updated(config=None) == symmetric

"""--channel_groups: what it refuses in one line, and what it changes of a run."""

import pytest

from eval.config.parser import parse
from quant.errors import UserError

SEARCH = ["--task", "digits", "--model", "convnet", "--search"]


def read(flags, base=SEARCH):
    return parse([*base, *flags.split()])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--channel_groups 3", ["--channel_groups 3", "1, 2, 4"]),
        ("--channel_groups 2 --no_per_channel", ["--no_per_channel", "--channel_groups 2"]),
        ("--channel_groups 2 --engine torchao", ["--engine torchao", "--channel_groups 2", "choose onnxruntime"]),
        ("--channel_groups 2 --search_space 4,mxfp4", ["--search_space 4,mxfp4", "--channel_groups 2", "intN, eXmY"]),
        ("--channel_groups 2 --architecture_space resnet --width_choices 0.5,1", ["--architecture_space resnet"]),
        ("--channel_groups 2 --search_space e2m1,8 --rounding gptq", ["--rounding gptq", "--channel_groups 2", "e2m1"]),
        (
            "--channel_groups 2 --weight_quantizer lsq_plus --no_weight_symmetric",
            ["--weight_quantizer lsq_plus", "--channel_groups 2"],
        ),
        ("--search_space 4+2,8", ["--search_space", "int4+int2", "channel groups"]),
    ],
)
def test_what_cannot_be_divided_is_one_line(flags, named):
    with pytest.raises(UserError) as error:
        read(flags)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in named), error.value


def test_groups_are_for_runs_that_choose():
    base = SEARCH[:-1]
    with pytest.raises(UserError, match="--channel_groups 2 has no effect here"):
        read("--bits 4 --channel_groups 2", base)
    with pytest.raises(UserError, match=r"--weight_bits 4\+2: groups of output channels are for a search"):
        read("--weight_bits 4+2", base)
    assert read("--method measured --target_bits 5 --channel_groups 4", base).channel_groups == 4


def test_runs_with_groups_have_folders_of_their_own():
    assert "channels2" in read("--channel_groups 2").run_name and "channels" not in read("").run_name
    assert read("--channel_groups 2 --engine onnxruntime").engine == "onnxruntime"

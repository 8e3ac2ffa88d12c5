"""--help fits on one screen, --help_all lists every flag once, and the parser accepts the examples."""

import shlex
from dataclasses import fields

import pytest

from eval.config.help import EXAMPLES, MOST_USED, every_flag, one_screen
from eval.config.parser import flags_given, read_flags
from eval.config.run_config import RunConfig


def test_help_fits_one_screen_and_names_what_comes_next():
    text = one_screen()
    assert len(text.splitlines()) <= 35
    assert all(f"  --{name}" in text for name in MOST_USED) and len(MOST_USED) == 10
    assert "eval_parse" in text and "--help_all" in text


def test_every_flag_is_listed_once_a_switch_that_is_on_by_what_turns_it_off():
    words = [line.split()[0].rstrip(",") for line in every_flag().splitlines() if line.startswith("  --")]
    expected = {f"--no_{f.name}" if f.default is True else f"--{f.name}" for f in fields(RunConfig)}
    assert sorted(words) == sorted(expected)
    assert "default: None" not in every_flag() and "default: False" not in every_flag()


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_name_flags_that_exist(example):
    assert read_flags(shlex.split(example.replace("\\\n", " "))).model


@pytest.mark.parametrize("flag", ["--help", "-h", "--help_all"])
def test_help_ends_the_program_without_an_error(flag, capsys):
    with pytest.raises(SystemExit) as left:
        flags_given(["--task", "digits", flag])
    assert left.value.code == 0 and "--task" in capsys.readouterr().out

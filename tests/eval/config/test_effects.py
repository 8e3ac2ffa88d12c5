"""Flags without effect are refused, from the command line and from a file; in a grid, each run drops them."""

import pytest
import yaml

from eval.config.effects import KINDS, NEEDS, check_kind
from eval.config.parser import parse, parse_written, read_flags
from eval.config.run_config import RUN_FILE, RunConfig
from eval.launch.grid import expand
from quant.errors import UserError
from trainer.search.config import ReinforceConfig

RUN = ["--task", "digits", "--model", "convnet"]
IGNORED = [
    "--weight_only_search",
    "--search_space 2,4,8",
    "--bits 4 --separate_activations",
    "--bits 4 --cost_beta 2",
    "--method measured --settle_fraction 0.5",
    "--method measured --recipe fliqs",
    "--search --policy_prior none --measure_share 0.1",
    "--method float --observer mse",
    "--quantizer fixed",
    "--activation_bits 8 --weight_observer mse",
    "--weight_bits 4 --per_token",
    "--search --weight_only_search --act_symmetric",
    "--bits 8 --smooth_quant --smooth_quant_samples 8",
    "--method float --train scales",
    "--method random --sensitivity_examples 4",
    "--subset_ratio 0.5",
    "--text_column sentence",
    "--data_dir .",
    "--max_length 64",
    "--max_target_length 64",
    "--no_augment",
    "--log_dir logs --report_to none",
    "--max_steps 0 --eval_steps 5",
    "--activation_bits 8 --rounding gptq",
    "--weight_bits 4 --rounding_samples 16",
]
USED = [
    "--search --weight_only_search --search_space 2,4,8",
    "--method measured --search_space 2,4 --measure_share 0.1",
    "--method measured --search_space int4g32,8 --sensitivity_examples 4 --train scales",
    "--method uniform --target_bits 5 --search_space 4,8",
    "--bits 4 --observer mse --no_per_channel",
    "--task sst2 --model bert-tiny --max_length 64 --data_dir .",
    "--task cifar10 --model resnet20 --no_augment --data_dir .",
    "--use_subset --subset_ratio 0.5",
    "--num_train_epochs 2",
    "--num_train_epochs 2 --max_steps 5",  # --max_steps wins, as in transformers
    "--cost_type compute",
]


def words(line):
    return line.split()


@pytest.mark.parametrize("line", IGNORED)
def test_what_would_be_ignored_is_refused_by_name(line):
    with pytest.raises(UserError, match="it needs") as refused:
        parse([*RUN, *words(line)])
    given = [word.removeprefix("--no_").removeprefix("--") for word in words(line) if word.startswith("--")]
    assert any(f"--{name} " in str(refused.value) or f"--no_{name} " in str(refused.value) for name in given)


@pytest.mark.parametrize("line", USED)
def test_what_has_an_effect_is_taken(line):
    parse([*RUN, *words(line)])


def test_a_file_is_held_to_the_same(tmp_path):
    (tmp_path / "run.yaml").write_text("task: digits\nmodel: convnet\nweight_only_search: true\n")
    with pytest.raises(UserError, match="--weight_only_search has no effect here"):
        parse(["--config", str(tmp_path / "run.yaml")])


def test_one_flag_under_two_names_is_refused():
    with pytest.raises(UserError, match="--model and --model_type are two names of one flag"):
        parse([*RUN, "--model_type", "resnet20"])
    assert parse([*RUN, "--model", "resnet20"]).model == "resnet20"


@pytest.mark.parametrize(
    "flag", ["--target_bits 3,,5", "--search_space 4,,8", "--exclude a,", "--include ,a", "--high_precision_ops gelu,,"]
)
def test_an_empty_entry_of_a_list_is_refused(flag):
    with pytest.raises(UserError, match="has an empty entry"):
        parse([*RUN, "--search", *words(flag)])


def test_runs_of_a_grid_keep_what_they_use():
    flags = [*RUN, "--methods", "search,measured,uniform,float", "--targets", "4", "--search_space", "2,4,8"]
    flags += ["--settle_fraction", "0.5", "--observer", "mse", "--weight_only_search", "--max_steps", "8"]
    runs = {run.method: run for run in expand(read_flags(flags))}
    assert runs["search"].settle_fraction == 0.5 and runs["measured"].settle_fraction is None
    assert runs["measured"].weight_only_search and not runs["uniform"].weight_only_search
    assert runs["uniform"].observer == "mse" and runs["float"].observer is None


def test_tasks_of_a_grid_keep_what_is_for_their_kind():
    flags = ["--tasks", "sst2,cifar10", "--model_path", ".", "--max_length", "64", "--no_augment", "--search"]
    text, image = expand(read_flags(flags))
    assert (text.max_length, text.augment) == (64, True)
    assert (image.max_length, image.augment) == (RunConfig.max_length, False)
    assert text.search and image.search


def test_a_folder_is_asked_what_kind_it_is_once_it_is_read():
    with pytest.raises(UserError, match="--image_size 32 has no effect here: it needs images; --task x is text"):
        check_kind(RunConfig(task="x", image_size=32), "text")


def test_every_flag_of_the_tables_is_one():
    names = [name for need in NEEDS for name in need.flags] + [name for flags in KINDS for name in flags]
    assert all(hasattr(RunConfig, name) for name in names)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"max_drop": value} for value in (-0.1, 0.0, 1.0, float("nan"))),
        *({"target_bits": value} for value in (0, -4.0, (4, -5))),
        *({"target_bits": 4, **own} for own in ({"cost_beta": -1}, {"reward_share": 0}, {"delay_steps": -1})),
        {"target_bits": 4, "settle_fraction": 1},
        {"target_bits": 4, "method": "measured", "settle_fraction": 0.5},
        {"target_bits": 4, "method": "greedy", "reward_draws": 4},
    ],
    ids=str,
)
def test_a_search_from_python_is_held_to_the_same(wrong):
    with pytest.raises(ValueError, match="|".join(wrong)):
        ReinforceConfig(**wrong)


def test_runs_of_earlier_versions_are_read_although_they_hold_flags_without_effect(tmp_path):
    folder = tmp_path / "digits" / "default" / "old"
    folder.mkdir(parents=True)
    flags = {"task": "digits", "model": "convnet", "method": "float", "search_space": "2,4", "data_dir": ".", "seed": 3}
    (folder / RUN_FILE).write_text(yaml.safe_dump(flags))
    with pytest.raises(UserError, match="no effect"):
        parse(["--config", str(folder / RUN_FILE)])
    for config in (parse_written(folder / RUN_FILE), parse(["--resume", str(folder)])):
        assert (config.method, config.seed, config.search_space, config.data_dir) == ("float", 3, "4,8", None)

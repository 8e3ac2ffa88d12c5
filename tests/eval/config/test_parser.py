"""The command line: flags reach the config, and wrong ones are refused in one line before anything loads."""

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.config.parser import RunConfig, complete, entry, markdown_table, parse, read_flags, to_yaml
from eval.config.validation import RANGES
from eval.run.plan import search_settings
from quant.errors import UserError

ROOT = Path(__file__).parents[3]
RUN = ["--task", "digits", "--model", "resnet20"]

SPEC = """
--num_train_epochs --learning_rate --train_batch_size --eval_batch_size --gradient_accumulation_steps --optimizer
--fp16 --bf16 --max_steps --eval_steps --log_steps --gradient_checkpointing --seed --search --block_search
--single_decision --search_space --weight_only_search --separate_activations --cost_function --cost_type
--cost_target --target_bits --cost_beta --delay_steps --rl_learning_rate --max_entropy_beta --entropy_schedule_type
--reward_quality --search_fraction --policy_prior --settle_fraction --recipe --bits --weight_bits --activation_bits
--method --per_channel --no_per_channel --per_token --act_range_percentile --weight_range_percentile --observer
--quantizer --smooth_quant --gamma_migration --quantize_self_attention --quantize_self_output
--quantize_intermediate --quantize_output --quantize_pooler --quantize_classifier --no_quantize_self_attention
--no_quantize_self_output --no_quantize_intermediate --no_quantize_output --no_quantize_pooler
--no_quantize_classifier --exclude --include --model --model_type --model_path --from_scratch --task --data_dir
--max_train_samples --max_eval_samples --use_subset --subset_ratio --max_length --image_size --cost_seq_len
--num_gpus --gpus_per_trial --num_cpus --cpus_per_trial --models --tasks --targets --seeds --methods --ray_address
--resume --dry_run --cuda_visible_devices --output_root_dir --exp_name --save_strategy --load_model_path
--save_model_path --log_dir --config --quiet
"""


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse([*RUN, *argv])
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_flag_of_the_specification_is_known():
    from eval.config.parser import make_parser

    assert set(SPEC.split()) <= set(make_parser()._option_string_actions)


def test_every_observer_is_a_choice():
    from quant.quantizers.observers import OBSERVERS

    choices = {f.name: set(f.metadata["choices"]) for f in fields(RunConfig) if f.name.endswith("observer")}
    assert choices == {"observer": set(OBSERVERS) - {"weighted_mse"}, "weight_observer": set(OBSERVERS)}


def test_published_defaults():
    config = parse(RUN)
    assert (config.num_train_epochs, config.learning_rate, config.optimizer) == (3, 5e-5, "adamw_torch")
    assert (config.train_batch_size, config.eval_batch_size, config.gradient_accumulation_steps) == (32, 32, 1)
    assert (config.max_steps, config.seed, config.search_space, config.cost_beta) == (-1, 42, "4,8", 1.0)
    assert (config.entropy_schedule_type, config.output_root_dir) == ("cosine", "output")


def test_the_recipe_fills_in_what_search_flags_leave_open():
    ours, published = (search_settings(parse([*RUN, "--search", *more])) for more in ([], ["--recipe", "fliqs"]))
    assert (ours.policy_prior, ours.reward_draws, ours.settle_fraction) == ("measured", 2, None)
    assert (published.policy_prior, published.reward_draws, published.settle_fraction) == ("none", 1, 0)
    assert search_settings(parse([*RUN, "--search", "--policy_prior", "none"])).policy_prior == "none"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "--task mrpc --model bert --block_search --search_space 4,8 --num_train_epochs 3 --learning_rate 5e-5",
            {"method": "search", "partition": "role", "task": "mrpc", "target_bits": "6"},
        ),
        (
            "--task cifar10 --model resnet18 --search --search_space 2,4,8 --num_train_epochs 3",
            {"method": "search", "partition": "layer", "target_bits": "5"},
        ),
        ("--task sst2 --model gpt2 --single_decision --search", {"method": "search", "partition": "single"}),
        (
            "--task imagenet-1k --model_type efficientnet-b0 --weight_bits 8 --activation_bits 8",
            {"method": "uniform", "model": "efficientnet-b0", "run_name": "efficientnet-b0-uniform-int8-s42"},
        ),
        ("--task digits --model resnet20", {"method": "float", "run_name": "resnet20-float-s42"}),
        ("--task digits --model resnet20 --weight_bits 4", {"run_name": "resnet20-uniform-int4-float-s42"}),
        ("--task digits --model resnet20 --bits 0", {"method": "uniform", "run_name": "resnet20-uniform-float-s42"}),
        ("--task mrpc --model google/bert --block_search depth", {"run_name": "google--bert-depth_search-6b-s42"}),
        ("--task digits --model timm:vit_tiny", {"run_name": "timm_vit_tiny-float-s42"}),
    ],
)
def test_the_method_follows_from_the_flags(line, expected):
    config = parse(line.split())
    assert {name: getattr(config, name) for name in expected} == expected


def test_uniform_formats():
    config = parse([*RUN, "--weight_bits", "e4m3"])
    assert [f.name for f in config.uniform_formats] == ["e4m3", "float"]
    assert [f.name for f in parse([*RUN, "--bits", "4"]).uniform_formats] == ["int4", "int4"]


@pytest.mark.parametrize("flag", ["per_channel", "augment", "quiet", "quantize_pooler", "search", "quantize_output"])
def test_switches_go_both_ways(flag):
    assert getattr(read_flags([f"--{flag}"]), flag) is True
    assert getattr(read_flags([f"--no_{flag}"]), flag) is False
    assert getattr(read_flags([f"--no-{flag.replace('_', '-')}"]), flag) is False


def test_an_unknown_task_suggests_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes").mkdir()
    with pytest.raises(UserError, match=r"unknown --task 'shape'; .*or a local folder; did you mean shapes\?"):
        parse(["--task", "shape", "--model", "convnet"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--task", "digit"], ["--task", "'digit'", "cifar10", "did you mean digits"]),
        (["--task", "./nowhere"], ["--task", "./nowhere", "no such folder"]),
        (["--model", "resnet21"], ["--model", "'resnet21'", "bert-tiny", "Hub id", "did you mean resnet"]),
        (["--engine", "openvnio"], ["--engine", "'openvnio'", "onnxruntime", "did you mean openvino?"]),
        (["--search_spce", "4,8"], ["unknown flag --search_spce", "did you mean --search_space"]),
        (["--optimizer", "adam"], ["--optimizer", "'adam'", "adamw_torch", "sgd"]),
        (["--entropy_schedule_type", "step"], ["--entropy_schedule_type", "'step'", "cosine"]),
        (["--cost_type", "time"], ["--cost_type", "'time'", "memory", "compute"]),
        (["--method", "best"], ["--method", "'best'", "uniform"]),
        (["--seed", "x"], ["--seed", "'x'"]),
        (["--search", "--search_space", "int1,4"], ["--search_space", "int1", "int2..int8"]),
        (["--search", "--search_space", "e9m9,4"], ["--search_space", "e9m9", "eXmY"]),
        (["--search", "--search_space", "4,"], ["--search_space", "4,", "empty"]),
        (["--search", "--search_space", "4,4"], ["--search_space", "4,4", "twice"]),
        (["--search", "--search_space", "-8"], ["--search_space", "-8"]),
        (["--search", "--search_space", "nan"], ["--search_space", "nan"]),
        (["--bits", "1"], ["--bits", "'1'", "int2..int8"]),
        (["--search", "--search_space", "int4g4,8"], ["--search_space", "int4g4", "8 to 65536"]),
        (["--activation_bits", "int4g32"], ["--activation_bits int4g32", "weights", "int8"]),
        (["--weight_bits", "int4g32", "--no_weight_symmetric"], ["--no_weight_symmetric", "uint4g32"]),
        (["--bits", "4", "--offload_weights"], ["--offload_weights", "--max_steps", "memory"]),
        (["--bits", "4", "--offload_weights", "--max_steps", "0", "--device", "cuda"], ["--offload_weights", "cuda"]),
        (["--bits", "4", "--train", "scales", "--max_steps", "0"], ["--train scales", "--max_steps 0"]),
        (["--bits", "4", "--train", "scales", "--quantizer", "fixed"], ["--train scales", "int4", "fixed"]),
        (["--bits", "mxfp4", "--train", "scales"], ["--train scales", "mxfp4"]),
        (["--search", "--target_bits", "9"], ["--target_bits 9", "4 to 8 bits"]),
        (["--search", "--target_bits", "nan"], ["--target_bits", "nan"]),
        (["--search", "--target_bits", "6:4"], ["--target_bits 6:4", "LOW:HIGH:STEP"]),
        (["--search", "--target_bits", "4:inf:1"], ["--target_bits 4:inf:1", "LOW:HIGH:STEP"]),
        (["--search", "--target_bits", "4:6:1:1"], ["--target_bits 4:6:1:1", "LOW:HIGH:STEP"]),
        (["--search", "--target_bits", "4:6:1,5"], ["--target_bits 4:6:1,5", "twice"]),
        (["--search", "--cost_target", "-1"], ["--cost_target", "(0, inf)", "-1"]),
        (["--search", "--cost_target", "3", "--target_bits", "5"], ["--cost_target 3", "--target_bits 5"]),
        (["--search", "--bits", "4"], ["--bits 4", "search"]),
        (["--method", "uniform"], ["--method uniform", "--bits"]),
        (["--method", "float", "--bits", "4"], ["--bits 4", "--method float"]),
        (["--method", "uniform", "--bits", "4", "--search"], ["--bits 4", "search"]),
        (["--bits", "4", "--weight_bits", "8"], ["--bits 4", "--weight_bits"]),
        (["--bits", "4", "--target_bits", "5"], ["--target_bits 5", "--method uniform"]),
        (["--search", "--weight_only_search", "--separate_activations"], ["--weight_only_search", "--separate_act"]),
        (["--block_search", "--single_decision"], ["--block_search", "--single_decision"]),
        (["--fuse_groups", "--single_decision"], ["--fuse_groups", "--single_decision"]),
        (["--fuse_groups", "--bits", "4"], ["--fuse_groups", "--method uniform"]),
        (["--search", "--max_steps", "0"], ["--max_steps 0", "search"]),
        (["--search", "--max_steps", "8", "--delay_steps", "8"], ["--delay_steps 8", "--max_steps 8"]),
        (["--learning_rate", "inf"], ["--learning_rate", "inf"]),
        (["--learning_rate", "nan"], ["--learning_rate", "nan"]),
        (["--train_batch_size", "0"], ["--train_batch_size", "0"]),
        (["--act_range_percentile", "101"], ["--act_range_percentile", "[0, 100]", "101"]),
        (["--fp16", "--device", "cpu"], ["--fp16", "--bf16"]),
        (["--fp16", "--cuda_visible_devices", ""], ["--fp16", "--bf16"]),
        (["--device", "cuda", "--cuda_visible_devices", ""], ["--device cuda", "cpu"]),
        (["--data_dir", "/no/where"], ["--data_dir", "/no/where", "no such folder"]),
        (["--output_root_dir", __file__], ["--output_root_dir", __file__, "is a file"]),
        (["--save_model_path", f"{__file__}/model"], ["--save_model_path", __file__, "is a file"]),
        (["--log_dir", __file__], ["--log_dir", __file__, "is a file"]),
        (["--model_path", "/no/where"], ["--model_path", "/no/where"]),
        (["--load_model_path", "/no/where"], ["--load_model_path", "/no/where"]),
        (["--resume", "/no/where"], ["--resume", "/no/where"]),
        (["--config", "/no/where.yaml"], ["--config", "/no/where.yaml"]),
        (["--exp_name", "../up"], ["--exp_name", "../up"]),
        (["--exp_name", ".."], ["--exp_name", ".."]),
        (["--exp_name", "/abs"], ["--exp_name", "/abs"]),
        (["--exp_name", ""], ["--exp_name"]),
        (["--run_id", "a/b"], ["--run_id", "a/b"]),
        (["--seeds", "1,2"], ["--seeds", "eval_parallel.py"]),
        (["--gpus_per_trial", "0.5"], ["--gpus_per_trial", "eval_parallel.py"]),
        (["--output_root_dir", "/proc/x"], ["--output_root_dir", "/proc/x", "cannot write"]),
        (["--log_dir", "/proc/x"], ["--log_dir", "/proc/x", "cannot write"]),
        (["--exp_name", "???"], ["exp_name", "???"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_input_is_one_line_with_flag_value_and_choices(argv, words):
    message = refusal(*argv)
    assert all(word in message for word in words), message


def test_a_missing_task_or_model_is_named():
    with pytest.raises(UserError, match=r"--task is missing; choices: .*digits"):
        parse(["--model", "resnet20"])
    with pytest.raises(UserError, match=r"--model is missing; choices: .*resnet20"):
        parse(["--task", "digits"])


@settings(deadline=None)
@given(st.sampled_from(sorted(RANGES)), st.sampled_from(["nan", "-inf", "-2", "1e12"]))
def test_every_numeric_flag_refuses_what_is_no_number_of_its_kind(name, value):
    if value == "1e12" and RANGES[name].endswith("inf)"):
        return
    with pytest.raises(UserError, match=f"--{name}"):
        parse([*RUN, f"--{name}={value}"])


def test_a_file_holds_the_same_names_and_flags_win(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("task: digits\nmodel_type: resnet20\nseed: 7\nbits: 4\nseeds: [0, 1]\nlearning_rate: 1e-3\n")
    config = read_flags(["--config", str(path), "--learning_rate", "5e-5"])
    assert (config.task, config.model, config.bits, config.seeds) == ("digits", "resnet20", "4", "0,1")
    assert (config.seed, config.learning_rate) == (7, 5e-5), "a flag wins even when it says the default"
    path.write_text("block_search: true\nhpo: false\n")
    assert read_flags(["--config", str(path)]).block_search == "role"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sed: 7", "unknown key 'sed'; did you mean seed"),
        ("seed: seven", "seed: Value 'seven'"),
        ("seed: 1.5", "seed: Value '1.5'"),
        ("seed: null", "seed"),
        ("task: {name: digits}", "task"),
        ("- task", "name: value"),
        ("task: [", "not readable as YAML"),
        ("task: digits\ntask: sst2", "duplicate key"),
        ("model: resnet20\nmodel_type: convnet", "say it once"),
        ("task: !!python/object/apply:os.system ['true']", "not readable as YAML"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path, text, words):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="--config") as caught:
        read_flags(["--config", str(path)])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_survives_its_file(tmp_path):
    config = parse([*RUN, "--search", "--target_bits", "4.5", "--exclude", "fc,*.conv1", "--no_per_channel"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert read_flags(["--config", str(path)]) == RunConfig(**{**vars(config), "config": str(path)})
    assert complete(config) == config


def test_a_run_to_resume_is_the_one_of_its_folder_wherever_that_lies_now(tmp_path):
    started = parse([*RUN, "--search", "--max_steps", "7", "--output_root_dir", "/elsewhere", "--run_id", "other"])
    folder = tmp_path / "digits" / "trial" / "mine"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match=rf"--resume {folder}: no config.yaml there; name the folder of a run$"):
        parse(["--resume", str(folder)])
    (folder / "config.yaml").write_text(to_yaml(started))
    resumed = parse(["--resume", str(folder), "--num_workers", "2"])
    assert resumed.run_folder == folder
    moved = {name: getattr(resumed, name) for name in ("output_root_dir", "exp_name", "run_id", "num_workers")}
    assert resumed == replace(started, **moved)
    (folder.parent / "launch.yaml").touch()
    with pytest.raises(UserError, match=r"eval_parallel.py --resume finishes a launch$"):
        parse(["--resume", str(folder.parent)])


def test_a_dollar_in_a_flag_means_itself(tmp_path):
    config = parse([*RUN, "--output_root_dir", f"{tmp_path}/${{USER}}"])
    assert config.output_root_dir == f"{tmp_path}/${{USER}}"
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert parse(["--config", str(path)]).output_root_dir == config.output_root_dir


def test_ctrl_c_is_told_in_a_word(capsys):
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="130"):
        entry(main)
    assert capsys.readouterr().err == "interrupted\n"


def test_the_run_folder_stays_inside_the_output_folder(tmp_path):
    config = parse([*RUN, "--output_root_dir", str(tmp_path), "--exp_name", "a", "--run_id", "b"])
    assert config.run_folder == tmp_path / "digits" / "a" / "b"


def test_the_table_shows_every_flag_once():
    table = markdown_table()
    assert all(table.count(f"| `--{f.name}`") == 1 for f in fields(RunConfig))
    assert "| `--settle_fraction` |  |" in table and "| `--max_steps` | `-1` |" in table
    assert "`0.0`" in table and "| `--per_channel` / `--no_per_channel` | `on` |" in table


def test_checking_flags_needs_no_torch():
    code = "import sys; from eval.config.parser import parse; parse(sys.argv[1:]); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, *RUN, "--search"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_the_page_of_flags_shows_them_as_they_are():
    assert markdown_table() in (ROOT / "docs" / "flags.md").read_text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--act_range_percentile 0.999", r"--act_range_percentile 0.999 .*\(1, 100\]; did you mean 99.9\?"),
        ("--weight_range_percentile 0.9999", r"--weight_range_percentile 0.9999 .*did you mean 99.99\?"),
        ("--act_range_percentile 1", r"--act_range_percentile 1 .*did you mean 100\?"),
        (
            "--quantizer lsq_plus --act_symmetric",
            "--quantizer lsq_plus contradicts --act_symmetric: it learns an offset",
        ),
        (
            "--weight_quantizer lsq_plus",
            "--weight_quantizer lsq_plus contradicts --weight_symmetric: .*--no_weight_sym",
        ),
        ("--quantizer lsq_plus --per_token", "--quantizer lsq_plus contradicts --per_token"),
        ("--act_per_channel --per_token", "--act_per_channel contradicts --per_token"),
        ("--act_per_channel --observer avg_minmax", "--act_per_channel contradicts --observer avg_minmax"),
    ],
)
def test_ranges_that_are_no_ranges_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        parse(["--task", "digits", "--model", "convnet", "--bits", "8", *given.split()])

"""Complete runs on the bundled digits, and a published accuracy if its dataset is available."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from eval.config.parser import parse
from eval.eval_run import main, run
from eval.run.plan import make_plan
from eval.run.record import outcome
from eval.run.trainer import float_teacher
from eval.saved_model import load_model
from quant.errors import UserError
from trainer.training.checksums import numbered
from trainer.training.distillation import SHARE

SHARED = Path(__file__).resolve().parents[3] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the data of {SHARED.name}/ beside the checkout")
DIGITS = "--task digits --model convnet --train_batch_size 64 --learning_rate 1e-2 --report_to none --quiet"


def config(folder, flags):
    return parse(f"{DIGITS} --output_root_dir {folder} {flags}".split())


class Killed(Exception):
    """Simulates that the process is killed."""


def kill_at(step):
    """Make an `on_step` callback that ends the run at a step."""

    def on_step(entry):
        if entry["step"] == step:
            raise Killed

    return on_step


def timeless(record):
    return {key: value for key, value in record.items() if key not in ("wall_seconds", "run_id")}


SEARCH = "--search --search_space 2,4,8 --cost_type compute --target_bits 4.5 --max_steps 40"


def test_a_search_writes_a_complete_record_within_its_target(tmp_path):
    settings = config(tmp_path, SEARCH)
    steps = []
    record = run(settings, on_step=steps.append)
    folder = settings.run_folder
    assert json.loads((folder / "result.json").read_text()) == record
    assert record["status"] == "finished" and record["steps"] == 40 and len(steps) == 40
    assert record["cost"] <= record["cost_target"] and record["cost"] == record["costs"]["compute"]
    assert record["cost_range"][0] <= record["cost"] <= record["cost_range"][1]
    assert list(record["assignment"]) == [layer["name"] for layer in record["layers"]]
    assert record["metrics"]["validation"]["n"] == 360
    assert record["metrics"]["validation"]["accuracy"] > 0.6
    assert {"config.yaml", "assignment.json", "history.jsonl", "model", "result.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert not [path for path in folder.rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".pkl")]


def test_the_saved_model_reproduces_the_recorded_accuracy(tmp_path):
    settings = config(tmp_path, SEARCH)
    record = run(settings)
    model = load_model(settings.run_folder)
    validation = make_plan(settings).prepared.validation["validation"]
    with torch.no_grad():
        images = torch.stack([validation[i]["pixel_values"] for i in range(len(validation))])
        labels = torch.stack([torch.as_tensor(validation[i]["labels"]) for i in range(len(validation))])
        together = model(pixel_values=images).logits
        alone = torch.cat([model(pixel_values=images[i : i + 1]).logits for i in range(8)])
    accuracy = (together.argmax(1) == labels).double().mean().item()
    assert accuracy == pytest.approx(record["metrics"]["validation"]["accuracy"], abs=1e-9)
    torch.testing.assert_close(alone, together[:8], rtol=1e-3, atol=1e-3)  # not a matter of the batch


def test_same_seed_same_record(tmp_path):
    first, second = (run(config(tmp_path, f"{SEARCH} --run_id {name}")) for name in ("one", "two"))
    assert timeless(first) == timeless(second)


def test_a_run_resumes_from_its_last_complete_checkpoint(tmp_path):
    whole = run(config(tmp_path, f"{SEARCH} --run_id whole"))

    stopped = config(tmp_path, f"{SEARCH} --run_id stopped")
    with pytest.raises(Killed):
        run(stopped, on_step=kill_at(30))
    assert not (stopped.run_folder / "result.json").exists()
    folder = stopped.run_folder / "checkpoints"
    assert numbered(folder)
    broken = folder / "checkpoint-9999"  # a process killed while saving leaves a folder without checksums
    broken.mkdir()
    (broken / "checksums.json").write_text("{}")
    assert timeless(run(parse(["--resume", str(stopped.run_folder)]))) == timeless(whole)


def test_a_run_is_not_resumed_with_another_budget(tmp_path):
    with pytest.raises(Killed):
        run(config(tmp_path, f"{SEARCH} --run_id stopped"), on_step=kill_at(30))
    for changed, message in (
        (SEARCH.replace("compute", "memory"), "--cost_type memory: .* holds checkpoints of a run with compute"),
        (f"{SEARCH} --max_compute 0.004", "--max_compute 0.004: .* of a run with None; .* or choose another --run_id"),
    ):
        with pytest.raises(UserError, match=message):
            run(config(tmp_path, f"{changed} --run_id stopped"))
    halved = f"{SEARCH} --train_batch_size 32 --gradient_accumulation_steps 2"  # as after running out of memory
    assert run(config(tmp_path, f"{halved} --run_id stopped --verify_retrain"))["steps"] == 40


@pytest.mark.parametrize("flags", ["--bits 8 --max_steps 10", f"{SEARCH} --log_steps 7"])
def test_a_run_killed_after_its_last_step_does_not_train_again(flags, tmp_path, monkeypatch):
    flags = f"{flags} --save_strategy steps"
    whole = run(config(tmp_path, f"{flags} --run_id whole"))
    stopped = config(tmp_path, f"{flags} --run_id stopped")
    with monkeypatch.context() as broken, pytest.raises(Killed):
        broken.setattr("eval.eval_run.write_result", Mock(side_effect=Killed))
        run(stopped)
    assert timeless(run(stopped)) == timeless(whole)
    lines = (stopped.run_folder / "history.jsonl").read_text().splitlines()
    assert len(lines) == whole["steps"]


def test_a_run_killed_before_its_first_checkpoint_restarts_its_history(tmp_path):
    stopped = config(tmp_path, "--bits 8 --max_steps 14 --save_strategy no")
    with pytest.raises(Killed):
        run(stopped, on_step=kill_at(10))
    run(stopped)
    lines = (stopped.run_folder / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 15))


def test_a_checkpoint_keeps_the_token_clipping(tmp_path):
    flags = "--bits 4 --observer avg_prune_minmax --quantizer fixed --max_steps 20 --save_strategy steps --log_steps 5"
    whole = run(config(tmp_path, f"{flags} --run_id whole"))
    stopped = config(tmp_path, f"{flags} --run_id stopped")
    with pytest.raises(Killed):
        run(stopped, on_step=kill_at(20))
    assert timeless(run(stopped)) == timeless(whole)


def test_a_metric_that_is_not_finite_fails_the_run(tmp_path):
    settings = config(tmp_path, "--learning_rate 1e30 --max_steps 1")
    record = run(settings)
    assert record["status"] == "failed" and "loss on validation is nan after 1 steps" in record["reason"]
    assert json.loads((settings.run_folder / "result.json").read_text()) == record


def test_the_best_checkpoint_is_kept(tmp_path):
    settings = config(tmp_path, "--bits 8 --max_steps 12 --save_strategy best --eval_steps 4")
    assert run(settings)["status"] == "finished"
    assert numbered(settings.run_folder / "checkpoints")
    with pytest.raises(UserError, match="--save_strategy best needs --eval_steps"):
        config(tmp_path, "--bits 8 --save_strategy best")


@pytest.mark.parametrize("flags", ["--max_steps 2", "--max_steps 20 --delay_steps 10 --settle_fraction 0.5"])
def test_a_search_without_learning_steps_is_refused_at_the_start(flags, tmp_path):
    with pytest.raises(UserError, match=r"--delay_steps \d+ leaves the policy no step to learn in: \d+ steps"):
        run(config(tmp_path, f"--search --search_space 4,8 {flags}"))
    assert not list(tmp_path.iterdir())


def test_a_run_starts_from_the_weights_of_another(tmp_path):
    first = config(tmp_path, "--bits 8 --max_steps 30 --run_id first")
    trained = run(first)
    again = run(config(tmp_path, f"--max_steps 0 --run_id again --load_model_path {first.run_folder}"))
    before, after = (record["metrics"]["validation"]["accuracy"] for record in (trained, again))
    assert abs(before - after) < 0.05 and after > 0.5
    with pytest.raises(UserError, match=r"--load_model_path .* holds no model\.safetensors"):
        run(config(tmp_path, f"--max_steps 0 --load_model_path {tmp_path}"))


def test_a_quiet_run_prints_its_result_only(tmp_path, capsys):
    assert main(f"{DIGITS} --output_root_dir {tmp_path} --max_steps 2 --log_steps 1".split()) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == ["validation", "cost", "record"]


@pytest.mark.parametrize(
    "flags",
    [
        *("", "--bits 8", "--weight_bits 4 --activation_bits 0", "--bits mxfp8"),
        *("--bits 4 --quantizer lsq_plus", "--bits 4 --quantizer fixed --observer mse_fast"),
        *("--bits 8 --quantizer fixed --observer entropy", "--bits 6 --observer avg_prune_minmax"),
    ],
)
def test_baselines_run(tmp_path, flags):
    record = run(config(tmp_path, f"{flags} --max_steps 4"))
    assert record["status"] == "finished" and record["cost_target"] is None


def test_a_diverged_run_is_a_failed_record(tmp_path):
    record = run(config(tmp_path, "--bits 8 --max_steps 20 --optimizer sgd --learning_rate 1e30"))
    assert record["status"] == "failed" and "at step" in record["reason"]
    assert json.loads((config(tmp_path, "--bits 8 --max_steps 20").run_folder / "result.json").read_text()) == record


def test_an_infeasible_target_states_the_range(tmp_path):
    with pytest.raises(UserError, match=r"--cost_target 5 GBOPs, but assignments of this search space cost 0\.\d+ to"):
        make_plan(config(tmp_path, "--search --search_space 2,8 --cost_type compute --cost_target 5"))


@needs_shared
def test_resnet20_scores_its_published_accuracy(tmp_path):
    data = f"--task cifar10 --data_dir {SHARED}/data/cifar10"
    model = f"--model resnet20 --model_path {SHARED}/models/resnet20-cifar10 --method float --max_steps 0"
    flags = f"{data} {model} --report_to none --quiet --output_root_dir {tmp_path}"
    metrics = run(parse(flags.split()))["metrics"]["validation"]
    assert metrics["n"] == 1017 and round(metrics["accuracy"] * 1017) == 932


SEVERAL = "--search --search_space 2,4,8 --cost_type compute --target_bits 3,6,4 --max_steps 40"


def test_one_run_writes_a_record_for_each_budget(tmp_path):
    settings = config(tmp_path, SEVERAL)
    last = run(settings)
    folders = [settings.run_folder / "3b", settings.run_folder / "4b", settings.run_folder]
    records = [json.loads((folder / "result.json").read_text()) for folder in folders]
    assert records[2] == last and len({record["run_id"] for record in records}) == 3
    targets = [record["cost_target"] for record in records]
    assert targets == sorted(targets) and len(set(targets)) == 3
    for record in records:
        assert record["cost"] <= record["cost_target"] and record["status"] == "finished"
        assert record["contest"]["certificate"]["rank"] >= 1
    assert len({json.dumps(record["assignment"]) for record in records}) > 1
    history = [json.loads(line) for line in (settings.run_folder / "history.jsonl").read_text().splitlines()]
    assert [entry["target"] for entry in history[:6]] == targets * 2, "the targets take turns"
    validation = make_plan(settings).prepared.validation["validation"]
    images = torch.stack([validation[i]["pixel_values"] for i in range(len(validation))])
    labels = torch.stack([torch.as_tensor(validation[i]["labels"]) for i in range(len(validation))])
    for folder, record in zip(folders, records, strict=True):  # each folder holds the whole model of its own budget
        with torch.no_grad():
            accuracy = (load_model(folder)(pixel_values=images).logits.argmax(1) == labels).double().mean().item()
        assert accuracy == pytest.approx(record["metrics"]["validation"]["accuracy"], abs=1e-9)


def test_two_processes_do_not_share_a_runs_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.eval_run.DYING", 0)
    settings = config(tmp_path, "--max_steps 2 --method float --run_id one")

    def second(entry):
        before = {path: path.stat().st_mtime_ns for path in settings.run_folder.rglob("*")}
        with pytest.raises(UserError, match=r"/one: another run is at work there; .* another --run_id"):
            run(settings)
        assert before == {path: path.stat().st_mtime_ns for path in settings.run_folder.rglob("*")}

    assert run(settings, on_step=second)["status"] == "finished"
    assert run(settings)["status"] == "finished", "the lock ends with the run"


@pytest.mark.parametrize("step", [12, 35])
def test_a_run_with_several_budgets_resumes_from_a_checkpoint(tmp_path, step):
    several = f"{SEVERAL} --save_strategy steps --log_steps 5"
    whole = run(config(tmp_path, f"{several} --run_id whole"))
    stopped = config(tmp_path, f"{several} --run_id stopped")
    with pytest.raises(Killed):
        run(stopped, on_step=kill_at(step))
    assert timeless(run(stopped)) == timeless(whole)
    parts = [
        json.loads((tmp_path / f"digits/default/{name}/3b/result.json").read_text()) for name in ("whole", "stopped")
    ]
    assert timeless(parts[0]) == timeless(parts[1])


def test_the_cheapest_within_a_drop_needs_no_budget(tmp_path):
    first = config(tmp_path, "--max_steps 150 --run_id float")
    run(first)
    start = f"--load_model_path {first.run_folder} --search --search_space 2,4,8 --max_steps 40 --learning_rate 1e-4"
    tight, loose = (run(config(tmp_path, f"{start} --max_drop {drop} --run_id {drop}")) for drop in (0.02, 0.5))
    for record, drop in ((tight, 0.02), (loose, 0.5)):
        assert record["cost"] <= record["cost_target"] <= record["cost_range"][1] * (1 + 1e-12)
        contest = record["contest"]
        assert contest["within_drop"] and contest["held_out_quality"] >= contest["float_quality"] - drop
    assert loose["cost"] < tight["cost"], "more may be lost for less cost"
    assert outcome(tight)[-1].endswith(": within 0.02") and "target" not in outcome(tight)[1]
    broken = tight | {"contest": tight["contest"] | {"within_drop": False}}
    assert outcome(broken)[-1].endswith(": NOT within 0.02")
    with pytest.raises(UserError, match="the drop sets the budget"):
        config(tmp_path, "--search --max_drop 0.1 --target_bits 5")


@pytest.mark.parametrize("flag", ["--max_drop 0.1", "--distill 0.5 --target_bits 4"])
def test_flags_that_refer_to_the_float_model_need_a_trained_one(tmp_path, flag):
    with pytest.raises(UserError, match=f"{flag.split(' --')[0]}.*weights are not all trained.*--load_model_path"):
        make_plan(config(tmp_path, f"--search {flag}"))


def test_a_trained_model_serves_the_search_and_optional_distillation(tmp_path):
    float_run = config(tmp_path, "--method float --max_steps 30 --run_id float")
    run(float_run)
    start = f"--load_model_path {float_run.run_folder} {SEARCH}"
    alone = run(config(tmp_path, f"{start} --run_id alone"))
    assert alone["distill"] == 0 and alone["contest"]["judged_by"] == "divergence"
    taught = run(config(tmp_path, f"{start} --distill --run_id taught"))
    assert taught["distill"] == SHARE and taught["contest"]["judged_by"] == "divergence"
    assert alone["metrics"]["validation"]["loss"] != taught["metrics"]["validation"]["loss"]
    assert float_teacher(make_plan(config(tmp_path, SEARCH))) is None, "its weights are not trained"


@needs_shared
def test_a_trained_model_teaches_augmented_images(tmp_path):
    model = f"--model resnet20 --model_path {SHARED}/models/resnet20-cifar10 --max_train_samples 64"
    base = f"--task cifar10 --data_dir {SHARED}/data/cifar10 {model} --output_root_dir {tmp_path} --max_steps 4"

    def teacher(flags):
        return float_teacher(make_plan(parse(f"{base} {flags}".split())))

    assert teacher("--bits 4").share == teacher("--search --target_bits 5").share == SHARE
    assert teacher("--search --target_bits 5 --augment false").share == 0, "it judges only"
    assert teacher("--search --target_bits 5 --recipe fliqs") is None, "as it was published"
    assert teacher("--bits 4 --distill 0.3").share == 0.3
    assert teacher("--bits 4 --distill 0") is None and teacher("--bits 4 --augment false") is None


def test_the_selected_assignment_is_retrained_without_search(tmp_path):
    settings = config(tmp_path, f"{SEARCH} --verify_retrain")
    record = run(settings)
    retrained = record["retrained"]["validation"]
    assert retrained["n"] == 360 and retrained["accuracy"] > 0.6
    assert retrained != record["metrics"]["validation"]
    history = (settings.run_folder / "retrained" / "history.jsonl").read_text().splitlines()
    assert len(history) == 40 and {json.loads(line)["phase"] for line in history} == {"train"}
    assert timeless(run(config(tmp_path, f"{SEARCH} --run_id plain")))["metrics"] == record["metrics"]
    with pytest.raises(UserError, match="--verify_retrain needs"):
        config(tmp_path, "--bits 4 --verify_retrain")


def test_a_search_in_bfloat16_channels_last_accumulated_and_with_workers(tmp_path):
    flags = "--bf16 --channels_last --num_workers 1 --gradient_accumulation_steps 2 --max_train_samples 256"
    settings = config(tmp_path, f"--search --target_bits 5 --max_steps 8 --train_batch_size 16 {flags}")
    weight = dict(make_plan(settings).bundle.model.named_parameters())["convs.1.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    record = run(settings)
    history = [json.loads(line) for line in (settings.run_folder / "history.jsonl").read_text().splitlines()]
    assert record["status"] == "finished" and len(history) == record["steps"] == 8
    assert all(entry["loss"] > 0 for entry in history) and any("reward" in entry for entry in history)


def test_channels_last_is_refused_for_text(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    (text / "train.csv").write_text("text,label\n" + "yes,1\nno,0\n" * 20)
    flags = f"--task {text} --model bert --from_scratch --bits 8 --channels_last --output_root_dir {tmp_path}"
    with pytest.raises(UserError, match="--channels_last has no effect here: it needs images"):
        make_plan(parse(flags.split()))

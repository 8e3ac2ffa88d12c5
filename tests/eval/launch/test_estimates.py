import pytest

from eval import eval_run
from eval.config.parser import parse
from eval.launch import estimates
from eval.run import trainer as run_trainer
from quant.errors import UserError

RUN = ["--task", "digits", "--model", "convnet", "--max_steps", "80", "--train_batch_size", "32"]


@pytest.mark.parametrize(
    ("flags", "seconds"),
    [
        (["--bits", "4"], 80.0),
        # 10 of the 80 steps reward two draws on a quarter of a batch. Five layers x 2 formats are measured on
        # 3 * 80 * 32 * 0.12 / 10 = 92 examples, 10 neighbours and 40 others evaluated on 64; an evaluation takes 0.6 of
        # a pass, and a pass a third of a step.
        (
            ["--search", "--search_space", "4,8", "--target_bits", "5"],
            80 + (10 * 2 / 4 + 0.6 * (10 * 92 + 50 * 64) / 32) / 3,
        ),
        (["--search", "--recipe", "fliqs", "--search_space", "4,8", "--target_bits", "5"], 80 + 60 / 3),
    ],
)
def test_the_estimate_includes_the_forward_passes_of_a_search(monkeypatch, flags, seconds):
    monkeypatch.setattr(estimates, "_seconds_per_step", lambda plan: 1.0)
    run = parse([*RUN, *flags])
    assert estimates.estimate_runs({"a": run}, measure=True)["a"].seconds == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("flags", "measured"),
    [
        (["--bits", "4"], 0.0),
        (["--method", "uniform", "--target_bits", "5"], 0.0),
        # Five layers x 2 formats on 32 examples, from the layer on.
        (["--method", "measured", "--target_bits", "5"], 0.6 * 5 * 2 * 32),
        # A pass forward and backward counts three times; besides, each layer computes its output in each format.
        (["--method", "fisher", "--target_bits", "5"], (3 + 2) * 64),
    ],
)
def test_the_estimate_without_training_is_of_measuring_calibrating_and_evaluating(monkeypatch, flags, measured):
    """What is told must not be a second for a run of an hour."""
    monkeypatch.setattr(estimates, "_seconds_per_pass", lambda plan: 1.0)
    run = parse([*RUN, "--max_steps", "0", "--max_eval_samples", "100", *flags])
    examples = measured + 2 * 8 * 32 + 100  # calibrated twice on 8 batches; evaluated once, as its weights are new
    assert estimates.estimate_runs({"a": run}, measure=True)["a"].seconds == pytest.approx(examples / 32)


def test_a_plan_without_training_computes_no_gradients(monkeypatch):
    monkeypatch.setattr("torch.Tensor.backward", lambda *_: pytest.fail("gradients of a large model need its memory"))
    run = parse([*RUN, "--max_steps", "0", "--bits", "4"])
    assert estimates.estimate_runs({"a": run}, measure=True)["a"].seconds > 0


def test_the_estimate_includes_the_forward_passes_of_a_teacher(monkeypatch):
    monkeypatch.setattr(estimates, "_seconds_per_step", lambda plan: 1.0)
    monkeypatch.setattr(run_trainer, "teacher_share", lambda plan: 0.9)
    run = parse([*RUN, "--bits", "4"])
    assert estimates.estimate_runs({run.run_name: run}, measure=True)[run.run_name].seconds == pytest.approx(
        80 * (1 + 1 / 3)
    )


def test_runs_that_share_a_plan_are_checked_separately():
    runs = {name: parse([*RUN, "--max_steps", "2", *flags]) for name, flags in (("a", []), ("b", ["--search"]))}
    with pytest.raises(UserError, match=r"2 steps .* of which the last 2 settle"):
        estimates.estimate_runs(runs)


def test_a_dry_run_describes_data_and_model(tmp_path, capsys):
    rows = [f"text {n},{('yes', 'no', '7')[n % 3]}" for n in range(40)]
    (tmp_path / "train.csv").write_text("\n".join(["said,meant", *rows]))
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    flags = ["--task", str(tmp_path), "--text_column", "said", "--label_column", "meant", "--model", "bert-tiny"]
    flags += ["--from_scratch", "--search", "--max_steps", "40", "--max_length", "16", "--dry_run"]
    assert eval_run.main([*flags, "--output_root_dir", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in told.splitlines()]
    assert f"train 36 rows {tmp_path / 'train.csv'}" in lines and "classes 3: 7, no, yes" in lines
    assert f"validation 4 rows {tmp_path / 'train.csv'}" in lines and "columns said (in) -> meant (truth)" in lines
    assert "note: not read: notes.csv" in lines and "input at most 16 tokens" in lines
    assert any(line.startswith("layers 12, with 393,216 weights (") for line in lines)
    assert "held out: 4 training examples" in told and not (tmp_path / "out").exists()

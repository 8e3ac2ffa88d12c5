"""Runs with migrations, observers and Token-Wise Clipping, with and without search; their models can be loaded."""

import csv

import pytest
import torch

import eval.run.ptq
from eval.config.parser import parse
from eval.eval_run import run
from eval.run.plan import make_plan
from eval.run.trainer import make_trainer
from eval.saved_model import load_model
from quant.transforms.migration import added
from trainer.reinforce_trainer import ReinforceTrainer

BASE = "--model bert-tiny --from_scratch --max_length 16 --train_batch_size 16 --eval_batch_size 16 --report_to none"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Sentences that contain the name of their class."""
    folder = tmp_path_factory.mktemp("data")
    words = ["red", "blue", "house", "tree", "river", "stone", "cloud", "bird"]
    for split, rows in (("train", 96), ("validation", 32)):
        with (folder / f"{split}.csv").open("w") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for i in range(rows):
                text = [words[i % 2], *(words[2 + (i * k) % 6] for k in range(1, 2 + i % 6))]
                writer.writerow([" ".join(text), i % 2])
    return folder


def config(task, folder, flags):
    return parse(f"--task {task} {BASE} --quiet --output_root_dir {folder} {flags}".split())


@pytest.mark.parametrize(
    "flags, observer",
    [
        ("", "weighted_mse"),
        ("--quantizer lsq_plus", "weighted_mse"),
        ("--weight_quantizer fixed", "minmax"),
        ("--quantizer fixed --weight_quantizer lsq", "weighted_mse"),
        ("--observer minmax", "minmax"),
        ("--observer entropy", "weighted_mse"),
        ("--weight_observer mse", "mse"),
    ],
)
def test_learned_scales_of_weights_start_from_the_error_of_the_output(flags, observer):
    run_flags = f"--task cifar10 --model resnet20 --bits 8 {flags}".split()
    weight, activation = eval.run.ptq.quantizer_configs(parse(run_flags))
    assert weight.observer == observer and activation.observer != "weighted_mse"


PTQ = "--max_steps 0 --remove_padding --calibration_samples 32 --bits 6"


@pytest.mark.parametrize(
    "flags",
    [
        f"{PTQ} --gamma_migration --quantizer fixed --observer avg_prune_minmax",
        f"{PTQ} --gamma_migration --smooth_quant --quantizer lsq_plus --observer avg_prune_minmax",
        f"{PTQ} --smooth_quant --smooth_quant_alpha auto --smooth_quant_samples 8 --quantizer fixed --observer entropy",
        "--max_steps 3 --gamma_migration --bits 4 --quantizer lsq_plus --observer avg_prune_minmax",
        f"{PTQ} --gamma_migration --quantizer fixed --high_precision_ops gelu,softmax,layernorm "
        "--quantize_residual_adds --quantize_products --quantize_embeddings",
        "--max_steps 12 --search --target_bits 6 --gamma_migration --smooth_quant --observer mse_fast",
    ],
)
def test_a_run_and_its_saved_model(task, tmp_path, flags):
    settings = config(task, tmp_path, flags)
    record = run(settings)
    assert record["status"] == "finished"
    model = load_model(settings.run_folder)
    assert added(model).shortcuts
    plan = make_plan(settings)
    validation = plan.prepared.validation["validation"]
    batch = plan.prepared.data_collator([validation[i] for i in range(len(validation))])
    with torch.no_grad():
        accuracy = (model(**batch).logits.argmax(1) == batch["labels"]).double().mean().item()
    assert accuracy == pytest.approx(record["metrics"]["validation"]["accuracy"], abs=1 / 32 + 1e-9)


def test_migrations_do_not_change_the_float_model(task, tmp_path):
    logits = []
    for flags in ("", "--gamma_migration --smooth_quant"):
        plan = make_plan(config(task, tmp_path, f"--max_steps 0 --bits 8 {flags}"))
        trainer, *_ = make_trainer(plan)
        batch = next(iter(trainer.calibration.batches()))
        with torch.no_grad():
            logits.append(trainer.model.eval()(**batch).logits)
    assert (logits[1] - logits[0]).abs().max() <= 1e-5 * logits[0].abs().max()


def test_a_migrated_run_resumes_from_its_checkpoint(task, tmp_path):
    flags = "--max_steps 6 --bits 4 --gamma_migration --save_strategy steps --log_steps 2"
    whole = run(config(task, tmp_path, f"{flags} --run_id whole"))

    class Killed(Exception):
        pass

    def kill(entry):
        if entry["step"] == 6:
            raise Killed

    stopped = config(task, tmp_path, f"{flags} --run_id stopped --save_strategy epoch --num_train_epochs 1")
    with pytest.raises(Killed):
        run(stopped, on_step=kill)
    assert run(stopped)["metrics"] == whole["metrics"]


@pytest.mark.parametrize(
    "flags",
    [
        "--gamma_migration --quantizer lsq_plus --observer lsq_plus",
        "--smooth_quant --smooth_quant_alpha auto:0.4:0.6:0.2 --smooth_quant_samples 4 --observer percentile",
        "--gamma_migration --quantizer fixed --observer avg_prune_minmax --policy_prior hawq_v2",
    ],
)
def test_each_option_works_with_a_search(task, tmp_path, monkeypatch, flags):
    """Migrations are folded once, before the search, and do not change the float model."""
    events, changes = [], []
    fold, prepare = eval.run.ptq.fold, ReinforceTrainer.prepare

    def watched_fold(model, example, *args, **kwargs):
        with torch.no_grad():
            before = model.eval()(**example).logits
            fold(model, example, *args, **kwargs)
            after = model(**example).logits
        events.append("fold")
        changes.append(float((after - before).abs().max() / before.abs().max()))

    monkeypatch.setattr("eval.run.ptq.fold", watched_fold)
    monkeypatch.setattr(ReinforceTrainer, "prepare", lambda trainer: (events.append("search"), prepare(trainer)))
    settings = config(task, tmp_path, f"--search --max_steps 4 --calibration_samples 16 --save_strategy no {flags}")
    trainer, modules, _ = make_trainer(make_plan(settings))
    weights = {name: module.weight for name, module in modules.items()}
    trainer.train()
    migrates = "gamma_migration" in flags or "smooth_quant" in flags
    assert events == ["fold", "search"] if migrates else events == ["search"]
    assert all(change <= 1e-5 for change in changes)
    assert trainer.target.search is not None and set(trainer.assignment) == set(weights)
    assert trainer.state.global_step == 4 and bool(added(trainer.model).shortcuts) == migrates
    offsets = [p for name, p in trainer.model.named_parameters() if name.endswith(".offset")]
    assert bool(offsets) == ("--quantizer lsq_plus" in flags)

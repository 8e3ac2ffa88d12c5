import copy
import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainingArguments

from cost.cost import compute_cost
from eval.saved_model import load_model
from quant.convert import get_formats, quantize_model, set_formats
from quant.errors import UserError
from quant.formats import FLOAT, parse_format
from quant.quant_module import QuantModule
from trainer.reinforce_trainer import ReinforceConfig, ReinforceTrainer, TrainingDiverged, quality
from trainer.training.batch_norm import recalibrate_batch_norm
from trainer.training.distillation import TEMPERATURE, Teacher
from trainer.training.sampler import hold_out


class Net(nn.Module):
    """A user's own module: takes what the data set holds, returns a loss."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU()
        )
        self.head = nn.Linear(8 * 16, 3)

    def forward(self, pixel_values, labels=None):
        logits = self.head(self.body(pixel_values).flatten(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


class Data(torch.utils.data.Dataset):
    def __init__(self, size=96):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(size) % 3
        self.images = torch.randn(size, 1, 6, 6, generator=generator) * 0.3
        self.images[torch.arange(size), 0, self.labels, 2] += 2

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def arguments(folder, **changes):
    values = {
        "output_dir": str(folder), "max_steps": 24, "per_device_train_batch_size": 8, "learning_rate": 1e-3,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": 3,
        "remove_unused_columns": False, "logging_strategy": "no",
    }  # fmt: skip
    return TrainingArguments(**{**values, **changes})


def make(folder, config=None, model=None, **changes):
    torch.manual_seed(0)
    model = model or Net()
    config = config or ReinforceConfig(target_bits=4.5, calibration_batches=2, sensitivity_examples=8)
    own = ("search_space", "history", "train_dataset")
    trainer_changes = {name: changes.pop(name) for name in own if name in changes}
    return ReinforceTrainer(
        model,
        arguments(folder, **changes),
        search=config,
        **{
            "search_space": "2,4,8",
            "history": folder / "history.jsonl",
            "train_dataset": Data(),
            **trainer_changes,
        },
    )


def outcome(trainer):
    state = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    return trainer.assignment, state


def test_a_model_of_ones_own_is_saved_and_read_back(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = load_model(tmp_path / "saved", Net())
    images = Data(8).images
    with torch.no_grad():
        assert torch.equal(again(images)["logits"], trainer.model.eval()(images)["logits"])
    formats = {name: module.formats for name, module in again.named_modules() if isinstance(module, QuantModule)}
    assert formats == trainer.assignment
    with pytest.raises(UserError, match=r"load_model\(folder, model\)"):
        load_model(tmp_path / "saved")


def test_a_search_ends_within_its_budget_and_in_its_assignment(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    assert compute_cost(trainer.searches.profiles, trainer.assignment) <= trainer.cost_target
    assert get_formats(trainer.modules) == trainer.assignment
    history = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in history] == list(range(1, 25))
    assert [entry["phase"] for entry in history] == ["delay"] * 3 + ["search"] * 3 + ["settle"] * 18
    assert all(math.isfinite(entry["loss"]) for entry in history)
    rewarded = [entry for entry in history if "reward" in entry]
    for entry in rewarded:
        costs, qualities = zip(*entry["draws"], strict=True)
        assert len(costs) == 2 and costs[0] == pytest.approx(trainer.target.search.cost(entry["choice"]), rel=1e-12)
        assert (sum(costs) / 2, sum(qualities) / 2) == pytest.approx((entry["cost"], entry["quality"]), rel=1e-12)
    assert [entry["phase"] for entry in rewarded] == ["search"] * 3
    assert all(0 < entry["quality"] <= 1 for entry in rewarded)


def test_a_search_holds_out_the_rows_that_the_command_line_would(tmp_path):
    assert make(tmp_path).search_rows == hold_out(Data(), 0.1, seed=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search_space": [2, 4, 8]}, r"search_space holds 2, .*search_space='2,4,8'"),
        ({"train_dataset": None}, "a search needs a train_dataset"),
    ],
    ids=["bits", "no data"],
)
def test_wrong_arguments_are_one_clear_line(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        make(tmp_path, **changes)


@pytest.mark.parametrize("recipe", ["default", "fliqs"])
def test_same_seed_same_run(tmp_path, recipe):
    made = ReinforceConfig.fliqs if recipe == "fliqs" else ReinforceConfig
    config = made(target_bits=4.5, calibration_batches=2, sensitivity_examples=8)
    results = []
    for name in ("one", "two"):
        trainer = make(tmp_path / name, config, max_steps=12)
        trainer.train()
        results.append((outcome(trainer), (tmp_path / name / "history.jsonl").read_text()))
    (first, second) = results
    assert first[0][0] == second[0][0] and first[1] == second[1]
    assert all(torch.equal(first[0][1][name], second[0][1][name]) for name in first[0][1])


@pytest.mark.parametrize("stop", [4, 8, 15], ids=["delay", "search", "settle"])
def test_a_resumed_run_equals_an_undisturbed_one(tmp_path, stop):
    whole = make(tmp_path / "whole")
    whole.train()

    class Stop(Exception):
        pass

    def stop_after(entry):
        if entry["step"] == stop + 1:
            raise Stop

    broken = make(tmp_path / "broken", save_strategy="steps", save_steps=stop)
    broken.step_logger.on_step = stop_after
    with pytest.raises(Stop):
        broken.train()
    resumed = make(tmp_path / "broken", save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / f"checkpoint-{stop}"))
    assert resumed.assignment == whole.assignment
    expected, got = outcome(whole)[1], outcome(resumed)[1]
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert (tmp_path / "broken" / "history.jsonl").read_text() == (tmp_path / "whole" / "history.jsonl").read_text()
    written = {path.suffix for path in (tmp_path / "broken").rglob("*") if path.is_file()}
    assert written == {".json", ".safetensors", ".jsonl"}  # no pickle


def test_every_batch_of_an_accumulated_step_sees_the_same_formats(tmp_path):
    trainer = make(tmp_path, gradient_accumulation_steps=3, max_steps=6)
    seen = []
    original = ReinforceTrainer.compute_loss

    def watching(self, model, inputs, *args, **kwargs):
        if model.training:
            seen.append((self.state.global_step, tuple(get_formats(self.modules).items())))
        return original(self, model, inputs, *args, **kwargs)

    ReinforceTrainer.compute_loss = watching
    try:
        trainer.train()
    finally:
        ReinforceTrainer.compute_loss = original
    assert len(seen) == 17  # an epoch's last step has two batches left
    assert all(len({formats for step, formats in seen if step == wanted}) == 1 for wanted in range(6))


def test_divergence_ends_the_run_and_names_step_and_assignment(tmp_path):
    trainer = make(tmp_path, learning_rate=1e30, optim="sgd", max_grad_norm=0.0)
    with pytest.raises(TrainingDiverged, match=r"(loss|reward) is nan at step \d+ under the assignment: body\.0 int"):
        trainer.train()


def test_weights_that_training_has_spoiled_are_divergence_and_no_wrong_input(tmp_path):
    trainer = make(tmp_path)
    trainer.prepare()
    trainer.target.assignment = get_formats(trainer.modules)
    next(iter(trainer.modules.values())).weight.data.fill_(torch.nan)  # by the last step, which no loss shows
    with pytest.raises(TrainingDiverged, match=r"layer \S+: its weight holds NaN or infinity.*, after 0 steps"):
        trainer.use(0)


def test_fixed_formats_and_float_need_no_search(tmp_path):
    torch.manual_seed(0)
    model = Net()
    int4 = parse_format("int4")
    modules = quantize_model(model, formats=[int4])
    trainer = ReinforceTrainer(
        model, arguments(tmp_path, max_steps=4), modules=modules, train_dataset=Data(),
        assignment=dict.fromkeys(modules, (int4, FLOAT)),
    )  # fmt: skip
    trainer.train()
    assert set(get_formats(modules).values()) == {(int4, FLOAT)}
    ReinforceTrainer(Net(), arguments(tmp_path, max_steps=2), train_dataset=Data()).train()


def test_a_table_with_columns_the_model_does_not_take(tmp_path):
    """As in the README: the trainer quantizes the model itself and holds out data for the reward itself."""
    data = Data(48)
    rows = {"pixel_values": data.images.tolist(), "labels": data.labels.tolist(), "name": ["x"] * 48}
    trainer = ReinforceTrainer(
        Net(),
        arguments(tmp_path, max_steps=8, remove_unused_columns=True),
        search=ReinforceConfig(target_bits=4.5, calibration_batches=1, sensitivity_examples=4),
        search_space="4,8",
        train_dataset=Dataset.from_dict(rows).with_format("torch"),
    )
    trainer.train()
    assert set(trainer.assignment) == {"body.0", "body.3", "head"}


def test_scales_learn_relative_to_their_size_under_adam_and_do_not_decay(tmp_path):
    trainer = make(tmp_path, weight_decay=0.1)
    trainer.prepare()
    optimizer = trainer.create_optimizer()
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    scales = [(group, p) for group in optimizer.param_groups for p in group["params"] if "grids" in names[p]]
    assert len(scales) == sum("grids" in name for name in names.values())
    for group, parameter in scales:
        assert group["weight_decay"] == 0
        assert 0.5 < group["lr"] / (1e-3 * parameter.mean().item()) < 2
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_a_float_run_ends_with_recalibrated_batch_norms(tmp_path):
    model = Net()
    model.body[1].momentum = 0.003  # as MobileNetV2's: five steps would leave them where they were
    trainer = ReinforceTrainer(model, arguments(tmp_path, max_steps=5), search=None, train_dataset=Data())
    trainer.train()
    ended = model.body[1].running_mean.clone()
    recalibrate_batch_norm(model, trainer.calibration.batches())
    torch.testing.assert_close(ended, model.body[1].running_mean)


@pytest.mark.parametrize(("examples", "recalibrated"), [(8, 1), (32, 0)])
def test_batch_norms_are_recalibrated_before_the_choice_where_its_batches_are_small(
    examples, recalibrated, tmp_path, monkeypatch
):
    """Four batches of two examples are normalized by moving averages, four of eight by their own statistics."""
    seen = []
    monkeypatch.setattr("trainer.search.targets.recalibrate_batch_norm", lambda model, batches: seen.append(model))
    config = ReinforceConfig(target_bits=4.5, calibration_batches=1, sensitivity_examples=examples)
    changes = {"max_steps": 8, "train_dataset": Data(400), "per_device_eval_batch_size": 8}
    make(tmp_path, config, **changes).train()
    assert len(seen) == recalibrated


class WithoutLoss(Net):
    """Leaves its loss to a function beside it, and has no place for labels."""

    def forward(self, pixel_values):
        return {"logits": self.head(self.body(pixel_values).flatten(1))}


class Tuples(Net):
    def forward(self, pixel_values, labels=None):
        outputs = super().forward(pixel_values, labels)
        return (outputs["logits"],) if labels is None else (outputs["loss"], outputs["logits"])


def cross_entropy(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs["logits"], labels)


@pytest.mark.parametrize("method", ["search", "fisher", "hawq_v2"])
@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (WithoutLoss, {"compute_loss_func": cross_entropy}),
        (Tuples, {}),
    ],
    ids=["loss beside the model", "tuples"],
)
def test_models_of_ones_own(model, changes, method, tmp_path):
    torch.manual_seed(0)
    config = ReinforceConfig(method, target_bits=4.5, calibration_batches=2, sensitivity_examples=8)
    made = model()
    trainer = ReinforceTrainer(made, arguments(tmp_path), search=config, train_dataset=Data(), **changes)
    trainer.train()
    assert trainer.cost <= trainer.cost_target


def test_a_model_with_frozen_layers_is_searched(tmp_path):
    model = Net()
    model.body.requires_grad_(False)
    before = model.body[0].weight.clone()
    trainer = make(tmp_path, model=model)
    trainer.train()
    assert torch.equal(model.body[0].weight, before) and not model.body[0].weight.requires_grad
    assert trainer.contest["candidates"].keys() >= {"measured", "policy"}


def test_quality_is_a_probability():
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
    expected = logits.softmax(1)[:, 0].mean()
    outputs, batch = {"logits": logits}, {"labels": labels}
    loss = torch.tensor(1.5)
    torch.testing.assert_close(quality(loss, outputs, batch, "likelihood"), expected)
    torch.testing.assert_close(quality(loss, outputs, batch, "accuracy"), torch.tensor(0.5))
    regression = {"labels": torch.tensor([0.3, 0.1])}
    torch.testing.assert_close(quality(loss, outputs, regression, "likelihood"), torch.exp(-loss))
    assert quality(torch.tensor(1e6), {}, {}, "likelihood") > 0


def test_evaluating_leaves_every_module_in_its_own_mode(tmp_path):
    trainer = make(tmp_path)
    trainer.prepare()
    trainer.model.train()
    trainer.model.body.eval()  # frozen
    before = [module.training for module in trainer.model.modules()]
    choice = [0] * trainer.space.num_decisions
    trainer.evaluator.measure()  # which also asks whether there are classes
    assert [module.training for module in trainer.model.modules()] == before
    trainer.evaluator.evaluate_assignments([choice])
    assert [module.training for module in trainer.model.modules()] == before
    trainer.evaluator.rewarded_qualities(torch.tensor([choice]), step=3)
    assert [module.training for module in trainer.model.modules()] == before


def test_examples_that_decide_are_none_that_proposed(tmp_path):
    config = ReinforceConfig(target_bits=4.5, calibration_batches=2)
    trainer = make(tmp_path, config, train_dataset=Data(2000))
    proposing, deciding = trainer.evaluator.evaluation_batches(), trainer.evaluator.deciding_batches()
    seen, others = (
        {image.numpy().tobytes() for batch in batches for image in batch["pixel_values"]}
        for batches in (proposing, deciding)
    )
    assert len(seen) == 64 and len(others) == 136 and not seen & others
    assert len(deciding) >= 4, "they come with an error"
    few = make(tmp_path, config, train_dataset=Data(1200))
    assert not few.evaluator.deciding_batches() and few.evaluator.decide is None, "56 examples are too few"


def test_a_teacher_compares_by_the_distance_from_its_answers(tmp_path):
    teacher = Net()
    trainer = make(tmp_path, model=copy.deepcopy(teacher))
    trainer.prepare()
    choice = [0] * trainer.space.num_decisions
    assert trainer.evaluator.criterion == "loss"
    by_loss = trainer.evaluator.evaluate_assignments([choice])[0]
    trainer.evaluator.teacher = Teacher(teacher)
    degradation, same = trainer.evaluator.evaluate_assignments([choice])[0]
    assert trainer.evaluator.criterion == "divergence" and np.array_equal(same, by_loss[1])
    set_formats(trainer.modules, trainer.space.assignment(choice))
    for batch, got in zip(trainer.evaluator.evaluation_batches(), degradation, strict=True):
        with torch.no_grad():
            reference, own = (m.eval()(**batch)["logits"] / TEMPERATURE for m in (teacher, trainer.model))
        wanted = nn.functional.kl_div(own.log_softmax(1), reference.softmax(1), reduction="batchmean")
        assert got == pytest.approx(TEMPERATURE**2 * float(wanted), rel=1e-2)


def test_a_teacher_pulls_the_search_towards_its_answers(tmp_path):
    teacher = Net()
    plain = make(tmp_path / "plain", model=copy.deepcopy(teacher), max_steps=40)
    taught = make(tmp_path / "taught", model=copy.deepcopy(teacher), max_steps=40)
    taught.teacher = Teacher(teacher, 1.0)
    batch = {"pixel_values": Data().images}
    apart = []
    for trainer in (plain, taught):
        trainer.train()
        with torch.no_grad():
            wanted, got = (model.eval()(**batch)["logits"].log_softmax(1) for model in (teacher, trainer.model))
        apart.append(float((wanted.exp() * (wanted - got)).sum(1).mean()))
    assert apart[1] < apart[0] / 2

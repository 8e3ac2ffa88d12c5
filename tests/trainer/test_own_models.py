"""Models, losses and data of one's own, as users bring them: what a search makes of them, and what it refuses."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification, MixtralConfig, TrainerCallback, TrainingArguments
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from cost.cost import COSTS
from eval.saved_model import load_model
from quant.convert import get_formats
from quant.errors import UserError
from quant.formats import FLOAT
from quant.module_utils import examples_of
from trainer.reinforce_trainer import ReinforceConfig, ReinforceTrainer
from trainer.search.evaluator import quality, reference_of
from trainer.training.distillation import Teacher, class_logits


class Rows(torch.utils.data.Dataset):
    """Random rows with three classes, and what `columns` make of (features, class)."""

    def __init__(self, size=80, **columns):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(size) % 3
        self.x = torch.randn(size, 8, generator=generator) + self.labels[:, None]
        self.columns = columns or {"x": lambda x, label: x, "labels": lambda x, label: label}

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {name: make(self.x[index], self.labels[index]) for name, make in self.columns.items()}


class Net(nn.Module):
    """Three layers and a loss of one's own."""

    def __init__(self, loss, outputs=3):
        super().__init__()
        torch.manual_seed(0)
        self.loss = loss
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.head = nn.Linear(16, outputs)

    def forward(self, x, labels=None):
        out = self.head(self.body(x))
        return {"loss": self.loss(out, labels), "logits": out}


def searched(folder, model, data=None, config=(), settings=(), **changes):
    arguments = {
        "output_dir": str(folder), "max_steps": 24, "per_device_train_batch_size": 8, "learning_rate": 1e-3,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": 3,
        "logging_strategy": "no", **dict(settings),
    }  # fmt: skip
    config = {"target_bits": 4.5, "calibration_batches": 2, "sensitivity_examples": 16, **dict(config)}
    return ReinforceTrainer(
        model,
        TrainingArguments(**arguments),
        search=ReinforceConfig(**config),
        search_space="2,4,8",
        train_dataset=data or Rows(),
        **changes,
    )


def cross_entropy(logits, labels):
    return nn.functional.cross_entropy(logits, labels)


def gaussian(out, labels):
    """Log-likelihood of a narrow density, below 0 as soon as it fits."""
    return ((out[:, 0] - labels) / 1e-3).square().mean() * 1e-6 - 40.0


def squares(out, labels):
    """In units that make it large."""
    return (out[:, 0] - 300.0 * labels).square().mean()


@pytest.mark.parametrize("loss", [gaussian, squares], ids=["below zero", "in the thousands"])
def test_losses_that_are_no_likelihood_tell_formats_apart(loss, tmp_path):
    trainer = searched(tmp_path, Net(loss, outputs=1))
    entries = []
    trainer.step_logger.on_step = entries.append
    trainer.train()
    reference = trainer.evaluator.reference_loss
    assert reference == pytest.approx(reference) and not 0 <= reference <= 20
    qualities = [entry["quality"] for entry in entries if "quality" in entry]
    assert len(set(qualities)) == len(qualities) > 1 and all(0 < value < 1 for value in qualities)
    least, most = sorted((reference - 1, reference + 1))
    better, worse = (quality(torch.tensor(loss), {}, {}, "likelihood", reference) for loss in (least, most))
    assert 0 < worse < quality(torch.tensor(reference), {}, {}, "likelihood", reference) == 0.5 < better < 1


def test_a_drop_is_kept_where_the_loss_is_large(tmp_path):
    trainer = searched(tmp_path, Net(squares, outputs=1), config={"target_bits": None, "max_drop": 0.02})
    trainer.train()
    contest = trainer.contest
    assert contest["float_quality"] == pytest.approx(0.5, abs=0.05), "half, at the float model's own loss"
    assert contest["within_drop"] == (contest["held_out_quality"] >= contest["float_quality"] - 0.02)


def test_which_losses_need_something_to_be_measured_by():
    words, numbers = torch.zeros(2, 5, dtype=torch.long), torch.zeros(2)
    assert reference_of(-0.1, words) == -0.1 and reference_of(2565.0, words) == 2565.0
    assert reference_of(0.1, numbers) == 0.1 and reference_of(0.3, None) == 0.3
    assert reference_of(0.0, words) is None and reference_of(10.8, words) is None
    assert reference_of(math.nan, numbers) is None
    assert float(quality(torch.tensor(-0.2), {}, {}, "likelihood", 0.0)) == pytest.approx(0.5 + 0.1 / 1.2)
    assert float(quality(torch.tensor(-0.5), {}, {}, "likelihood")) == 1.0, "one batch below zero"


def test_examples_that_do_not_count_have_no_quality(tmp_path):
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [5.0, 0.0]])
    outputs, loss = {"logits": logits}, torch.tensor(0.3)
    for shape in ((3,), (3, 1)):
        batch = {"labels": torch.tensor([0, 0, -100]).view(shape)}
        expected = logits[:2].softmax(1)[:, 0].mean()
        torch.testing.assert_close(quality(loss, outputs, batch, "likelihood"), expected)
        torch.testing.assert_close(quality(loss, outputs, batch, "accuracy"), torch.tensor(0.5))
    columns = {"x": lambda x, label: x, "labels": lambda x, label: label if x[0] > 0 else torch.tensor(-100)}
    # Eight rows per held-out batch, some of which count: the mean loss of a batch without any is not defined.
    searched(tmp_path, Net(cross_entropy), Rows(320, **columns), {"sensitivity_examples": 32}).train()


@pytest.mark.parametrize(
    "labels",
    [
        torch.ones(3, 2, dtype=torch.long),
        torch.ones(3, 2).bool(),
        torch.ones(3).bool(),
        torch.tensor([0, 1, 2]),
        [0, 1],
    ],
    ids=["several", "bool of each", "bool", "more than classes", "a list"],
)
def test_labels_that_are_no_classes(labels):
    logits = torch.randn(3, 2)
    assert class_logits({"logits": logits}, {"labels": labels}) is None
    assert class_logits(logits, {"labels": torch.tensor([0, 1, 1])}) is logits, "a model may return them bare"


def test_labels_of_several_kinds_at_once_are_searched_by_their_loss(tmp_path):
    def loss(logits, labels):
        return nn.functional.binary_cross_entropy_with_logits(logits, labels.float())

    columns = {"x": lambda x, label: x, "labels": lambda x, label: (torch.arange(3) <= label).long()}
    trainer = searched(tmp_path, Net(loss), Rows(**columns))
    trainer.train()
    assert trainer.evaluator.criterion == "loss" and trainer.cost <= trainer.cost_target


def test_rows_of_a_batch_however_deep():
    x = torch.zeros(5, 2)
    assert examples_of({"none": None, "number": 0.5, "scalar": torch.tensor(1.0), "deep": {"x": x}}) == 5
    assert examples_of([{"x": x}]) == examples_of(x) == 5 and examples_of({}) == 0


class Recomputing(Net):
    def forward(self, x, labels=None):
        out = self.head(checkpoint(self.body, x.requires_grad_(), use_reentrant=True))
        return {"loss": cross_entropy(out, labels), "logits": out}


def test_a_model_that_recomputes_its_activations(tmp_path):
    trainer = searched(tmp_path, Recomputing(None))
    trainer.train()
    assert "fisher" in trainer.contest["candidates"] or len(trainer.contest["candidates"]) > 1


class Listed(Net):
    """Calls layers through a list, which knows the float ones alone."""

    def __init__(self, head):
        super().__init__(cross_entropy)
        self.steps = [*self.body, *([self.head] if head else [])]

    def forward(self, x, labels=None):
        for step in self.steps:
            x = step(x)
        x = x if len(self.steps) > 4 else self.head(x)
        return {"loss": cross_entropy(x, labels), "logits": x}


def test_layers_that_were_replaced_behind_the_models_back(tmp_path):
    searched(tmp_path, Listed(head=False)).train()  # a warning names them
    with pytest.raises(UserError, match="the model calls none of its 3 quantized layers"):
        searched(tmp_path, Listed(head=True))


class Experts(Net):
    """The last expert gets the rows of a class that training data does not have."""

    def __init__(self):
        super().__init__(cross_entropy)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x, route, labels=None):
        hidden = self.body(x)
        out = torch.zeros_like(hidden)
        for place, expert in enumerate(self.experts):
            if (route == place).any():
                out[route == place] = expert(hidden[route == place])
        logits = self.head(out)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("cost_type", ["memory", "compute"])
@pytest.mark.parametrize("steps", [0, 24])
def test_an_expert_that_training_data_never_reach_is_charged_for_what_it_runs_in(steps, cost_type, tmp_path):
    columns = {"x": lambda x, label: x, "labels": lambda x, label: label}
    train = Rows(**columns, route=lambda x, label: label)
    rare = Rows(40, **columns, route=lambda x, label: label + (x[0] > 1).long())
    trainer = searched(
        tmp_path, Experts(), train, settings={"max_steps": steps}.items(),
        config={"cost_type": cost_type, "target_bits": 4.5}.items(), eval_dataset=rare, partition="single",
    )  # fmt: skip
    trainer.train()
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    weight, activation = trainer.assignment["experts.3"]
    assert activation == FLOAT and weight == trainer.assignment["experts.2"][0] != FLOAT
    assert get_formats(trainer.modules) == trainer.assignment
    assert trainer.cost == pytest.approx(COSTS[cost_type](trainer.searches.profiles, trainer.assignment))
    assert trainer.cost <= trainer.cost_target
    assert trainer.notes == ["1 of 7 layers were never called while calibrating, their inputs stay in float: experts.3"]
    trainer.save_model(str(tmp_path / "saved"))
    again, batch = load_model(tmp_path / "saved", Experts()), next(trainer.batches_of(rare))
    with torch.no_grad():
        assert torch.equal(again(**batch)["logits"], trainer.model.eval()(**batch)["logits"])


def test_a_run_that_goes_on_charges_unreached_experts_as_before(tmp_path):
    def trainer(**settings):
        columns = {"x": lambda x, label: x, "labels": lambda x, label: label, "route": lambda x, label: label}
        return searched(tmp_path, Experts(), Rows(**columns), settings={"save_strategy": "steps", **settings}.items())

    whole = trainer(save_steps=10)
    whole.train()
    resumed = trainer(save_steps=10)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert resumed.assignment == whole.assignment and resumed.assignment["experts.3"][1] == FLOAT
    assert (resumed.cost, resumed.notes) == (whole.cost, whole.notes)


def test_a_teacher_that_is_its_own_student_is_refused(tmp_path):
    model = Net(cross_entropy)
    with pytest.raises(ValueError, match="the teacher is the model itself: give it a copy"):
        searched(tmp_path, model, teacher=Teacher(model))


def test_a_stream_is_refused(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(Rows())

    with pytest.raises(UserError, match=r"train_dataset needs a length and rows by index, got a stream \(Stream\)"):
        searched(tmp_path, Net(cross_entropy), Stream())


def test_a_loss_function_beside_the_model_gets_the_labels(tmp_path):
    class Bare(Net):
        def forward(self, x):
            return self.head(self.body(x))

    def loss(outputs, labels, num_items_in_batch=None):
        return cross_entropy(outputs, labels)

    trainer = searched(tmp_path, Bare(None), compute_loss_func=loss, teacher=Teacher(Bare(None), share=0.5))
    trainer.train()
    assert trainer.evaluator.criterion == "divergence"


class Formats(TrainerCallback):
    """Notes the formats and the cost of what is evaluated."""

    def __init__(self):
        self.seen = []

    def on_evaluate(self, args, state, control, **others):
        self.seen.append((state.global_step, get_formats(self.trainer.modules), state.best_metric))


def test_evaluations_are_of_the_best_choice_and_only_the_chosen_one_is_ever_the_best(tmp_path):
    watcher = Formats()
    settings = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "best", "metric_for_best_model": "loss"}
    trainer = searched(
        tmp_path, Net(cross_entropy), settings=settings.items(), eval_dataset=Rows(40), callbacks=[watcher]
    )
    watcher.trainer = trainer
    trainer.train()
    chosen_at = trainer.searches.phases.settle
    for step, formats, best in watcher.seen:
        cost = trainer.target.limits.costs(trainer.space.choice(formats))[0]
        assert cost <= trainer.cost_target, f"step {step}: what is evaluated fits the budget"
        assert step > chosen_at or best is None
    assert watcher.seen[-1][2] is not None and chosen_at > 3


def test_steps_of_epochs_that_drop_their_last_batch(tmp_path):
    settings = {"max_steps": -1, "num_train_epochs": 8, "dataloader_drop_last": True, "per_device_train_batch_size": 16}
    trainer = searched(tmp_path, Net(cross_entropy), Rows(34), settings=settings.items())
    trainer.train()
    assert trainer.searches.phases.total == trainer.state.global_step == 8, (
        "30 rows without the held out make one batch"
    )


def test_a_folder_of_another_model_says_so(tmp_path):
    trainer = searched(tmp_path, Net(cross_entropy), settings={"max_steps": 8}.items())
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    for other in (Net(cross_entropy, outputs=4), nn.Sequential(nn.Linear(8, 3))):
        with pytest.raises(UserError, match=f"saved: was saved from a model other than this {type(other).__name__}: "):
            load_model(tmp_path / "saved", other)


def test_a_model_of_transformers_comes_back_by_itself(tmp_path):
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    columns = {"input_ids": lambda x, label: (x.abs() * 5).long() + label, "labels": lambda x, label: label % 2}
    trainer = searched(tmp_path / "run", copy.deepcopy(model), Rows(40, **columns), settings={"max_steps": 8}.items())
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = load_model(tmp_path / "saved")
    tokens = torch.arange(16).view(2, 8)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, trainer.model.eval()(tokens).logits)
    assert not list((tmp_path / "saved").glob("*.bin")), "no pickle"


def test_a_model_that_returns_no_loss_is_one_line(tmp_path):
    class Bare(Net):
        def forward(self, x, labels=None):
            return self.head(self.body(x))

    wanted = r"Bare returns a tensor of shape \(3,\) where its loss should be: return {'loss': ..., 'logits': ...} or"
    with pytest.raises(UserError, match=wanted):
        searched(tmp_path, Bare(None)).train()


@pytest.mark.parametrize("several", [False, True])
def test_outputs_beside_a_loss_function_lose_nothing(several, tmp_path):
    class Bare(Net):
        def forward(self, x):
            logits = self.head(self.body(x))
            return (logits, x) if several else logits

    def loss(outputs, labels, num_items_in_batch=None):
        return cross_entropy(outputs[0] if several else outputs, labels)

    data = Rows(20)
    trainer = searched(tmp_path, Bare(None), compute_loss_func=loss, settings={"max_steps": 0}.items())
    trainer.prepare()
    predictions = trainer.predict(data).predictions
    with torch.no_grad():
        wanted = trainer.model.eval()(data.x)
    assert [len(part) for part in (predictions if several else [predictions])] == [20] * (1 + several)
    torch.testing.assert_close(
        torch.from_numpy(predictions[0] if several else predictions), wanted[0] if several else wanted
    )


def test_experts_and_attention_are_searched_saved_and_loaded(tmp_path):
    class Mixed(nn.Module):
        """Attention whose projections are one tensor, and experts whose matrices are one tensor each."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            config = MixtralConfig(hidden_size=8, intermediate_size=12, num_local_experts=3, num_experts_per_tok=2)
            config._experts_implementation = "eager"
            self.mixture = MixtralSparseMoeBlock(config)
            for parameter in self.mixture.parameters():
                nn.init.normal_(parameter, std=0.3)
            self.head = nn.Linear(8, 3)

        def forward(self, x, labels=None):
            rows = x[:, None, :].expand(-1, 2, -1)
            mixed = self.mixture(rows + self.attention(rows, rows, rows)[0])
            out = self.head(mixed.mean(1))
            return {"loss": None if labels is None else nn.functional.cross_entropy(out, labels), "logits": out}

    trainer = searched(tmp_path, Mixed())
    trainer.train()
    parts = ("q_proj", "k_proj", "v_proj", "out_proj")
    experts = ["mixture.experts.gate_up_proj", "mixture.experts.down_proj"]
    assert set(trainer.assignment) == {*(f"attention.{part}" for part in parts), *experts, "head"}
    assert trainer.outside_cost.left == {"mixture.gate.weight (MixtralTopKRouter)": 24}
    trainer.save_model(str(tmp_path / "saved"))
    again = load_model(tmp_path / "saved", Mixed())
    x = torch.randn(4, 8)
    assert torch.equal(again(x)["logits"], trainer.model.eval()(x)["logits"])

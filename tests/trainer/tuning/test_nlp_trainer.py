"""Accuracy-aware tuning: by script and a fake clock, then with a real trainer whose model is saved and comes back."""

import logging
import math

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from eval.saved_model import load_model
from quant.errors import UserError
from trainer.tuning.nlp_trainer import NLPTrainer, QuantizationConfig, metrics, objectives
from trainer.tuning.strategy import OTHER, RECIPES, Measured, Recipe, Setting, tune

LAYERS = {"a": "Linear", "b": "Linear", "c": "Conv1D", "d": "Linear"}
STATIC, DYNAMIC = "PostTrainingStatic", "PostTrainingDynamic"
SIMPLE = 1 + len(RECIPES) + 2 + 1  # default, recipes, two layer types, the other approach


def metric(**fields):
    return metrics.Metric(**{"name": "eval_f1", "criterion": 0.01, **fields})


def run(score, base=0.9, fields=(), **config):
    """Tune by a script: `score` is a function of the setting. Returns (best, trials)."""

    def evaluate(setting):
        value = score(setting)
        return value if isinstance(value, Measured) else Measured({"eval_f1": value})

    config = QuantizationConfig(**{"metrics": [metric(**dict(fields))], **config})
    return tune(evaluate, {"eval_f1": base}, LAYERS, config)


def test_the_first_acceptance_ends_it():
    best, trials = run(lambda setting: 0.895)
    assert len(trials) == 1 and best.setting == Setting(STATIC)


@pytest.mark.parametrize(
    ("value", "base", "fields", "accepted"),
    [
        (0.891, 0.9, {}, True),
        (0.8909, 0.9, {}, False),
        (0.89, 0.9, {"is_relative": False}, True),
        (0.8899, 0.9, {"is_relative": False}, False),
        (-2.02, -2.0, {}, True),  # |base|: the share of a negative metric
        (-2.021, -2.0, {}, False),
        (3.03, 3.0, {"greater_is_better": False}, True),
        (3.031, 3.0, {"greater_is_better": False}, False),
        (-1.99, -2.0, {"greater_is_better": False, "is_relative": False}, True),
        (-1.98, -2.0, {"greater_is_better": False, "is_relative": False}, False),
        (0.0, 0.0, {}, True),
        (-1e-6, 0.0, {}, False),
        (float("nan"), 0.9, {}, False),
    ],
)
def test_what_is_accepted(value, base, fields, accepted):
    best, _ = run(lambda setting: value, base, fields.items(), max_trials=1)
    assert (best is not None) == accepted


def test_the_order_of_trials():
    _, trials = run(lambda setting: 0.5)
    settings = [trial.setting for trial in trials]
    assert settings[0] == Setting(STATIC)
    assert [setting.recipe for setting in settings[1:5]] == list(RECIPES)
    assert [set(setting.wide) for setting in settings[5:7]] == [{"Linear"}, {"Conv1D"}]
    assert settings[7].approach == DYNAMIC
    assert [set(setting.high_precision) for setting in settings[8:12]] == [{"a"}, {"b"}, {"c"}, {"d"}]
    assert [len(setting.high_precision) for setting in settings[12:]] == [2, 3]
    assert len(settings) == len(set(settings)) == SIMPLE + 4 + 2


@pytest.mark.parametrize("bad", list(LAYERS))
def test_only_the_planted_bad_layer_falls_back(bad):
    best, trials = run(lambda setting: 0.9 if bad in setting.high_precision else 0.4)
    assert set(best.setting.high_precision) == {bad}
    assert len(trials) == SIMPLE + list(LAYERS).index(bad) + 1


def test_two_bad_layers_fall_back_together_the_most_effective_first():
    def score(setting):
        return 0.4 + 0.2 * ("d" in setting.high_precision) + 0.3 * ("b" in setting.high_precision)

    best, trials = run(score)
    assert set(best.setting.high_precision) == {"b", "d"} and len(trials) == SIMPLE + 4 + 1


@pytest.mark.parametrize("names", ["a", "ab", "abc"])
def test_the_float_model_is_no_quantized_one(names):
    def evaluate(setting):
        return Measured({"eval_f1": 0.9 * (len(setting.high_precision) == len(names))})

    best, trials = tune(
        evaluate, {"eval_f1": 0.9}, dict.fromkeys(names, "Linear"), QuantizationConfig(metrics=[metric()])
    )
    assert best is None and len(trials) > SIMPLE - 2


def test_layers_are_tried_in_the_order_of_their_rank():
    config = QuantizationConfig(metrics=[metric()])

    def evaluate(setting):
        return Measured({"eval_f1": 0.9 if "c" in setting.high_precision else 0.4})

    best, trials = tune(evaluate, {"eval_f1": 0.9}, LAYERS, config, rank=lambda setting: ["c", "a", "b", "d"])
    assert set(best.setting.high_precision) == {"c"} and len(trials) == SIMPLE + 1


def test_each_stage_starts_from_the_best_so_far():
    good = Recipe(False, 0.5)
    _, trials = run(lambda setting: 0.7 if setting.recipe == good else 0.4)
    assert all(trial.setting.recipe == good for trial in trials[5:])


def test_no_setting_is_tried_twice():
    seen = []
    tune(
        lambda setting: seen.append(setting) or Measured({"eval_f1": 0.1}),
        {"eval_f1": 0.9},
        LAYERS,
        QuantizationConfig(metrics=[metric()]),
        recipes=[Recipe(), Recipe(True), Recipe(True)],  # the default again, and one twice
    )
    assert len(seen) == len(set(seen)) == 1 + 1 + 2 + 1 + 4 + 2


def test_training_has_no_counterpart():
    _, trials = run(lambda setting: 0.1, approach="QuantizationAwareTraining")
    assert len(trials) == SIMPLE - 1 + 4 + 2 and not OTHER.get("QuantizationAwareTraining")


def test_trials_are_counted():
    assert len(run(lambda setting: 0.1, max_trials=3)[1]) == 3


@pytest.mark.parametrize(("seconds", "trials"), [(10, 1), (25, 3), (1000, SIMPLE + 6)])
def test_time_is_kept(seconds, trials):
    now = [0.0]

    def evaluate(setting):
        now[0] += 10
        return Measured({"eval_f1": 0.95}, {"performance": 100 - now[0]})

    config = QuantizationConfig(metrics=[metric()], timeout=seconds)
    best, done = tune(evaluate, {"eval_f1": 0.9}, LAYERS, config, clock=lambda: now[0])
    assert len(done) == trials
    assert best is done[-1]  # all are accepted: the one of least cost


def test_the_best_accepted_is_the_cheapest():
    def score(setting):
        costs = {"performance": 4.0 if setting.wide else 5.0, "modelsize": 9.0 if setting.wide else 3.0}
        return Measured({"eval_f1": 0.9}, costs)

    chosen = {
        (objectives.performance,): True,
        (objectives.modelsize,): False,
        (objectives.performance, objectives.modelsize): False,
        (
            objectives.Objective("performance", weight_ratio=0.99),
            objectives.Objective("modelsize", weight_ratio=0.01),
        ): True,
    }
    for wanted, wide in chosen.items():
        best, _ = run(score, timeout=1e9, objectives=list(wanted))
        assert bool(best.setting.wide) == wide, wanted


@pytest.mark.parametrize("written", [None, True])
def test_performance_is_speed(written):
    """As its documents write it, greater is better: of the accepted models the one of fewest bit operations wins."""
    fast = objectives.Objective(name="performance", greater_is_better=written, weight_ratio=None)

    def score(setting):
        return Measured({"eval_f1": 0.9}, {"performance": 4.0 if setting.wide else 5.0})

    best, _ = run(score, timeout=1e9, objectives=fast)
    assert best.measured.costs["performance"] == 4
    slow = objectives.Objective("performance", greater_is_better=False)
    assert run(score, timeout=1e9, objectives=slow)[0].measured.costs["performance"] == 5


@pytest.mark.parametrize("weights", [(None, None), (0.9, 0.1), (0.1, 0.9)], ids=str)
@pytest.mark.parametrize(("values", "accepted"), [((0.87, 0.99), False), ((0.891, 0.791), True), ((0.95, 0.78), False)])
def test_several_metrics_keep_a_criterion_each(weights, values, accepted):
    """0.01 is allowed of each: no fall of one is bought by a rise of the other."""
    names = ("eval_f1", "eval_accuracy")
    both = [
        metrics.Metric(name, is_relative=False, criterion=0.01, weight_ratio=weight)
        for name, weight in zip(names, weights, strict=True)
    ]
    config = QuantizationConfig(metrics=both, max_trials=1)
    base = {"eval_f1": 0.9, "eval_accuracy": 0.8}
    best, _ = tune(lambda setting: Measured(dict(zip(names, values, strict=True))), base, LAYERS, config)
    assert (best is not None) == accepted


def test_the_least_fallen_of_several_metrics_is_the_best_that_was_seen():
    both = [metrics.Metric("eval_f1", weight_ratio=0.2), metrics.Metric("eval_accuracy", weight_ratio=0.8)]

    def score(setting):
        return Measured(
            {"eval_f1": 0.2, "eval_accuracy": 1.0} if setting.wide else {"eval_f1": 1, "eval_accuracy": 0.6}
        )

    base = {"eval_f1": 0.9, "eval_accuracy": 0.8}
    best, trials = tune(score, base, LAYERS, QuantizationConfig(metrics=both, max_trials=8))
    assert best is None  # 0.2 * 0.691 of the one is less than 0.8 * 0.192 of the other
    assert min(trials, key=lambda trial: trial.excess).setting.wide


def test_without_a_metric_the_first_model_is_accepted():
    best, trials = run(lambda setting: 0.0, metrics=None)
    assert len(trials) == 1 and best is trials[0]
    failed, _ = tune(lambda setting: Measured({}), {"eval_loss": 1.0}, LAYERS, QuantizationConfig(max_trials=2))
    assert failed is None


def test_a_single_metric_needs_no_list():
    alone = metrics.Metric(name="eval_f1", greater_is_better=True, is_relative=True, criterion=0.01, weight_ratio=None)
    q_config = QuantizationConfig(
        framework="pytorch",
        approach="PostTrainingStatic",
        metrics=alone,
        objectives=objectives.performance,
        timeout=0,
        max_trials=100,
    )
    assert q_config.required == (alone,) and q_config.wanted == (objectives.performance,)
    best, _ = tune(lambda setting: Measured({"eval_f1": 0.8}), {"eval_f1": 0.9}, LAYERS, q_config)
    assert best is None


@pytest.mark.parametrize("weight", [0, -0.5, math.inf])
def test_weights_are_positive(weight):
    for kind, name in ((metrics.Metric, "eval_f1"), (objectives.Objective, "modelsize")):
        with pytest.raises(UserError, match=f"{name}: weight_ratio must be positive, got {weight}"):
            kind(name, weight_ratio=weight)


def test_an_unknown_objective_is_named():
    with pytest.raises(UserError, match="unknown objective 'speed'; choices: performance, modelsize"):
        objectives.Objective("speed")


def test_nothing_accepted_says_what_was_best(caplog):
    with caplog.at_level(logging.INFO, logger="trainer.tuning.strategy"):
        best, trials = run(lambda setting: 0.6 if setting.wide else 0.5)
    assert best is None
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(trials) + 1
    assert lines[0].startswith("trial 1/100: PostTrainingStatic: eval_f1 0.5 (float 0.9): not accepted")
    assert lines[-1].startswith("no trial of 14 was accepted; best: ") and "'eval_f1': 0.6" in lines[-1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"approach": "Static"}, "approach must be one of PostTrainingStatic, PostTrainingDynamic, .* got 'Static'"),
        ({"metrics": []}, "metrics must hold at least one"),
        ({"max_trials": 0}, "max_trials must be at least 1, got 0"),
        ({"timeout": -1}, "timeout must be at least 0, got -1"),
        ({"metrics": ["eval_f1"]}, "metrics must be Metric or a list of them, got 'eval_f1'"),
        ({"objectives": "performance"}, "objectives must be Objective or a list of them, got 'performance'"),
        ({"framework": "tensorflow"}, "framework must be one of pytorch, got 'tensorflow'"),
        ({"metrics": [metric(weight_ratio=0.5), metric()]}, "metrics: give weight_ratio for all of them or for none"),
        (
            {"objectives": [objectives.performance, objectives.Objective("modelsize", weight_ratio=1)]},
            "objectives: give weight_ratio for all of them or for none, got 1 of 2",
        ),
    ],
)
def test_configurations_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        QuantizationConfig(**{"metrics": [metric()], **fields})


def test_what_cannot_be_tuned_is_named():
    with pytest.raises(UserError, match="metric 'eval_f2' is not in the evaluation; choices: eval_f1"):
        run(lambda setting: 0.9, fields={"name": "eval_f2"}.items())
    with pytest.raises(UserError, match="there is no layer to quantize"):
        tune(lambda setting: Measured({}), {"eval_f1": 0.9}, {}, QuantizationConfig(metrics=[metric()]))
    with pytest.raises(UserError, match=r"criterion must lie in \[0, inf\), got -1"):
        metric(criterion=-1)


# ------------------------------------------------------ a real trainer


class Rows(torch.utils.data.Dataset):
    """Sequences whose class is whether their first token is odd."""

    def __init__(self, size, seed):
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(5, 30, (size, 8), generator=generator)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        row = self.tokens[index]
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 2}


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def make_trainer(folder, **arguments):
    torch.manual_seed(0)
    settings = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=2
    )
    return NLPTrainer(
        BertForSequenceClassification(settings),
        TrainingArguments(
            str(folder), report_to="none", per_device_eval_batch_size=64, max_steps=5, use_cpu=True, disable_tqdm=True
        ),
        train_dataset=Rows(150, 0),
        eval_dataset=Rows(100, 1),
        compute_metrics=accuracy,
        **arguments,
    )


@pytest.mark.parametrize("approach", [STATIC, DYNAMIC, "QuantizationAwareTraining"])
def test_a_quantized_model_is_the_trainers_and_comes_back_from_disk(tmp_path, approach):
    trainer = make_trainer(tmp_path)
    metric = metrics.Metric(name="eval_accuracy", is_relative=False, criterion=0.2)
    q_config = QuantizationConfig(
        approach=approach, metrics=[metric], objectives=[objectives.performance], timeout=0, max_trials=100
    )
    model = trainer.quantize(quant_config=q_config)
    assert model is trainer.model and not model.training
    layers, assignment = trainer.quantized
    assert {str(f) for formats in assignment.values() for f in formats} == {"int8"} and len(layers) == 14
    trainer.save_model(str(tmp_path / "saved"))
    again = load_model(tmp_path / "saved")
    batch = {"input_ids": Rows(20, 2).tokens}
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits, rtol=0, atol=0)
    assert trainer.evaluate()["eval_accuracy"] > 0.2


def test_a_reduced_range_holds_for_every_layer(tmp_path):
    trainer = make_trainer(tmp_path)
    assert trainer.quantize(QuantizationConfig(reduce_range=True, sampling_size=20)) is trainer.model
    for layer in trainer.quantized[0].values():
        grid = layer.weight_quantizer.grids["int8"]
        with torch.no_grad():
            codes = layer.weight_quantizer(layer.weight) / grid.scale
        assert codes.abs().max().round() == 63 == grid.largest_code


def test_a_bad_layer_falls_back_in_a_real_model(tmp_path):
    """The loss doubles as soon as one layer is quantized; the others change nothing."""
    trainer = make_trainer(tmp_path)
    bad = "bert.encoder.layer.1.output.dense"

    original = trainer.evaluate
    float_loss = original()["eval_loss"]

    def evaluate(*arguments, **keywords):
        metrics = original(*arguments, **keywords)
        layer = trainer.model.get_submodule(bad)
        broken = hasattr(layer, "formats") and layer.formats[0].name != "float"
        return {**metrics, "eval_loss": float_loss * (2.0 if broken else 1.0)}

    trainer.evaluate = evaluate
    metric = metrics.Metric(name="eval_loss", greater_is_better=False, criterion=0.05)
    trainer.quantize(QuantizationConfig(metrics=[metric], sampling_size=20))
    _, assignment = trainer.quantized
    assert [name for name, formats in assignment.items() if formats[0].name == "float"] == [bad]


class Tiny(nn.Module):
    """Three layers, of which the first is normalized and rectified; it knows no loss. `tied`: two share a weight."""

    def __init__(self, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({"a[0]": nn.Linear(8, 8), "b*": nn.Linear(8, 8), "bc": nn.Linear(8, 3)})
        self.norm = nn.LayerNorm(8)
        if tied:
            self.layers["b*"].weight = self.layers["a[0]"].weight

    def forward(self, x):
        first, second, last = self.layers.values()
        return {"scores": last(second(self.norm(first(x)).relu()))}


class Points(torch.utils.data.Dataset):
    """48 random rows in three classes; `taken` says which were asked for."""

    def __init__(self):
        self.x = torch.randn(48, 8, generator=torch.Generator().manual_seed(0))
        self.taken = []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.taken.append(index)
        return {"x": self.x[index], "labels": index % 3}


class Stream(torch.utils.data.IterableDataset):
    """The same, one after the other."""

    def __init__(self):
        self.points = Points()

    def __iter__(self):
        return (self.points[i] for i in range(len(self.points)))


def cross_entropy(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs["scores"], labels)


def make_tiny(folder, model=None, train=None, kind=NLPTrainer, **arguments):
    settings = TrainingArguments(
        str(folder), report_to="none", max_steps=3, use_cpu=True, disable_tqdm=True, label_names=["labels"]
    )
    points = {"train_dataset": train or Points(), "eval_dataset": Points()}
    return kind(model or Tiny(), settings, **points, compute_loss_func=cross_entropy, **arguments)


def loss_within(criterion, **fields):
    allowed = metrics.Metric("eval_loss", greater_is_better=False, is_relative=False, criterion=criterion)
    return QuantizationConfig(metrics=[allowed], **fields)


def test_every_stage_is_reached_by_a_model_without_logits_and_with_a_rectified_norm(tmp_path, caplog):
    trainer = make_tiny(tmp_path)
    before, original = trainer.model, trainer.evaluate
    trainer.evaluate = lambda: {"eval_loss": original()["eval_loss"] if trainer.model is before else 9.0}
    with caplog.at_level(logging.INFO, logger="trainer.tuning.strategy"):
        assert trainer.quantize(loss_within(0.1, sampling_size=20)) is None
    tried = [record.getMessage() for record in caplog.records]
    assert not any("gamma_migration" in line for line in tried)
    # default, two recipes, one layer type, dynamic, three layers, two layers
    assert sum(line.startswith("trial") for line in tried) == 1 + 2 + 1 + 1 + 3 + 1


def test_a_stream_is_calibrated_on_by_its_first_rows(tmp_path):
    stream = Stream()
    assert make_tiny(tmp_path, train=stream).quantize(loss_within(9.0, sampling_size=20)) is not None
    assert stream.points.taken == list(range(20))
    trainer = make_tiny(tmp_path, train=stream)
    with pytest.raises(UserError, match="needs a train_dataset with a length and rows by index, got Stream"):
        trainer.quantize(loss_within(9.0, approach="QuantizationAwareTraining"))


class Watcher(TrainerCallback):
    """Remembers what it was called with."""

    def __init__(self):
        self.calls = []

    def on_train_end(self, args, state, control, model, optimizer, **others):
        self.calls.append((model, {group["initial_lr"] for group in optimizer.param_groups}, state.stateful_callbacks))


class Counter(TrainerCallback, ExportableState):
    """Counts steps by twos, say."""

    def __init__(self, by):
        self.by, self.count = by, 0

    def on_step_end(self, args, state, control, **others):
        self.count += self.by
        state.stateful_callbacks["Counter"] = self.state()

    def state(self):
        return {"args": {"by": self.by}, "attributes": {"count": self.count}}


def test_quantized_copies_are_trained_with_what_the_trainer_was_given(tmp_path):
    watcher, counter = Watcher(), Counter(by=2)
    sgd = (torch.optim.SGD, {"lr": 0.25, "momentum": 0.5})
    trainer = make_tiny(tmp_path, callbacks=[watcher, counter], optimizer_cls_and_kwargs=sgd)
    trainer.args.eval_strategy, trainer.args.eval_steps = "steps", 3  # which needs the evaluation set
    trainer.train()
    model = trainer.quantize(loss_within(9.0, approach="QuantizationAwareTraining"))
    (_, (trained, rates, stateful)) = watcher.calls
    assert trained is model and rates == {0.25}  # one rate: SGD needs no other for scales
    assert stateful["Counter"] == {"args": {"by": 2}, "attributes": {"count": 6}} and counter.count == 6


BOTH = [objectives.performance, objectives.modelsize]


def test_a_diverging_trial_is_not_accepted_and_others_follow(tmp_path, caplog):
    class Diverging(NLPTrainer):
        """Whose own loss is not finite in the first copies that it trains."""

        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords)
            self.trained = []

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            if model.training and not any(model is one for one in self.trained):
                self.trained.append(model)
            if model.training and len(self.trained) <= 2:
                loss = loss * float("nan")
            return (loss, outputs) if return_outputs else loss

    trainer = make_tiny(tmp_path, kind=Diverging)
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 2
    with caplog.at_level(logging.INFO):
        model = trainer.quantize(loss_within(9.0, approach="QuantizationAwareTraining", objectives=BOTH))
    assert model is not None and len(trainer.trained) == 3
    messages = [record.message for record in caplog.records if "loss is nan at step" in record.message]
    assert len(messages) == 2 and messages[0].startswith("QuantizationAwareTraining: ")
    assert {path.name for path in tmp_path.iterdir()} == {"trials"}, "checkpoints of copies are not the trainer's own"


def test_optimizers_of_one_model_are_refused_for_training_copies(tmp_path):
    model = Tiny()
    trainer = make_tiny(tmp_path, model, optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None))
    with pytest.raises(UserError, match="`optimizers` hold the parameters of one: give NLPTrainer optimizer_cls_and"):
        trainer.quantize(loss_within(9.0, approach="QuantizationAwareTraining"))
    trainer = make_tiny(tmp_path)
    trainer.train()  # the optimizer it then has is its own
    assert trainer.quantize(loss_within(9.0, approach="QuantizationAwareTraining")) is not None


def test_tied_weights_come_back_from_disk(tmp_path):
    trainer = make_tiny(tmp_path, Tiny(tied=True))
    model = trainer.quantize(loss_within(9.0))
    trainer.save_model(str(tmp_path / "own"))
    again, x = load_model(tmp_path / "own", Tiny(tied=True)), Points().x
    assert again.layers["b*"].weight is again.layers["a[0]"].weight
    with torch.no_grad():
        assert torch.equal(again(x)["scores"], model(x)["scores"])


def test_a_language_model_with_a_tied_head_comes_back_from_disk(tmp_path):
    torch.manual_seed(0)
    rows = [{"input_ids": row, "labels": row} for row in Rows(16, 0).tokens]
    trainer = NLPTrainer(
        GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=8, vocab_size=30)),
        TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True),
        train_dataset=rows,
        eval_dataset=rows,
    )
    model = trainer.quantize(loss_within(9.0))
    trainer.save_model(str(tmp_path / "saved"))
    again, ids = load_model(tmp_path / "saved"), Rows(4, 2).tokens
    assert again.lm_head.weight is again.transformer.wte.weight
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_no_model_is_accepted_and_the_float_model_stays(tmp_path):
    trainer = make_trainer(tmp_path)
    before = trainer.model
    impossible = metrics.Metric(name="eval_loss", greater_is_better=True, is_relative=False, criterion=0.0)
    original = trainer.evaluate
    trainer.evaluate = lambda: {**original(), "eval_loss": -1.0 if trainer.model is not before else 1.0}
    assert trainer.quantize(QuantizationConfig(metrics=[impossible], max_trials=2)) is None
    assert trainer.model is before and trainer.quantized is None


def test_what_is_missing_is_said(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(UserError, match=r"metric 'eval_f1' is not in the evaluation; choices: .*eval_accuracy"):
        trainer.quantize(QuantizationConfig(metrics=[metric()]))
    trainer.train_dataset = None
    with pytest.raises(UserError, match="calibration set is empty"):
        trainer.quantize(QuantizationConfig(metrics=[metric()]))

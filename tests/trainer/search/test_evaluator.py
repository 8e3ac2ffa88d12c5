"""The evaluator without a Trainer: measures a toy model, and drives a whole search of it."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from cost.profile import profile_model
from policy.space import build_space
from quant.convert import calibrate, get_formats, quantize_model
from quant.formats import parse_search_space
from trainer.search.baselines import allocator
from trainer.search.config import ReinforceConfig, make_budget
from trainer.search.evaluation_sizes import EvaluationSizes
from trainer.search.evaluator import AssignmentEvaluator
from trainer.search.search_state import Phases, Search
from trainer.search.targets import MultiTargetSearch
from trainer.training.distillation import Teacher

FORMATS = parse_search_space("2,4,8")
SIZES = EvaluationSizes(available=200, decisions=2, choices=3, batch_size=16, total_steps=20, step_examples=8)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x, labels):
        logits = self.last(self.first(x).relu())
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def rows(model, count=200):
    """Inputs that the float model labels itself, so that every rounding error counts."""
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = model.last(model.first(x).relu()).argmax(1)
    return [{"x": inputs, "labels": label} for inputs, label in zip(x, labels, strict=True)]


@pytest.fixture
def toy():
    model = Toy()
    data, teacher = rows(model), Teacher(copy.deepcopy(model))
    layers = quantize_model(model, formats=FORMATS)
    batch = torch.utils.data.default_collate(data)
    profiles = profile_model(model, batch, layers)
    calibrate(model, layers, [batch])
    return AssignmentEvaluator(
        model, layers, build_space(list(layers), FORMATS), data, seed=0, teacher=teacher
    ), profiles


def test_more_bits_degrade_less_and_the_same_seed_reads_the_same_examples(toy):
    evaluator, _ = toy
    assert evaluator.criterion == "divergence"
    found = evaluator.evaluate_assignments([(0, 0), (1, 1), (2, 2)])
    assert found.shape == (3, 2, 4) and np.array_equal(found, evaluator.evaluate_assignments([(0, 0), (1, 1), (2, 2)]))
    degradation, quality = found[:, 0].mean(1), found[:, 1].mean(1)
    assert degradation[0] > degradation[1] > degradation[2] > 0
    assert ((quality > 0) & (quality <= 1)).all() and evaluator.evaluate_float() == pytest.approx(quality[2], abs=0.01)
    measured = evaluator.measure()
    assert measured.mean.shape == (2, 3) and (measured.mean[:, 0] > measured.mean[:, 2]).all()


@pytest.mark.parametrize("method", ["uniform", "random", "greedy", "measured", "fisher", "hawq_v2", "exhaustive"])
def test_competitors_need_an_evaluator_a_budget_and_a_seed(toy, method):
    evaluator, profiles = toy
    budget = make_budget(ReinforceConfig(target_bits=4), evaluator.space, profiles, 4, ())
    choice = allocator(method, evaluator, seed=0)(budget)
    assert budget.fits(choice) and choice == allocator(method, evaluator, seed=0)(budget)


@pytest.mark.parametrize("method", ["measured", "greedy", "fisher"])
def test_competitors_measure_once_for_all_budgets(toy, method):
    evaluator, profiles = toy
    config, told = ReinforceConfig(method=method, target_bits=(3, 4, 5)), []
    alone = [
        allocator(method, evaluator, 0)(make_budget(config, evaluator.space, profiles, bits, ())) for bits in (3, 5)
    ]
    evaluator.tell = lambda phase, done=0, *_: told.append(done)
    searches = MultiTargetSearch(config, evaluator, profiles, (), Phases(0, 0, 0), 0)
    searches.prepare()
    chosen = [evaluator.space.choice(target.assignment) for target in searches.targets]
    assert [list(chosen[0]), list(chosen[2])] == alone and told.count(0) == 1


def test_a_search_is_driven_without_a_trainer(toy):
    """Its rewards come from the evaluator alone; the policy ends within the budget and better than the cheapest."""
    evaluator, profiles = toy
    config = ReinforceConfig(target_bits=5, policy_prior="none", rl_learning_rate=0.1)
    budget = make_budget(config, evaluator.space, profiles, 5, ())
    search = Search(evaluator.space, budget, config, Phases(0, 40, 40), torch.Generator().manual_seed(0))
    for step in range(40):
        choices = search.draws(step)
        search.learn(choices, evaluator.rewarded_qualities(choices, step), step)
    best = tuple(search.best())
    degradation = evaluator.evaluate_assignments([best, (0, 0)])[:, 0].mean(1)
    assert budget.fits(best) and degradation[0] < degradation[1]


@pytest.mark.parametrize("bits", [5, (4, 6)], ids=["one budget", "two budgets"])
def test_targets_are_prepared_and_chosen_without_a_trainer(toy, bits):
    evaluator, profiles = toy
    evaluator.sizes = SIZES
    config = ReinforceConfig(target_bits=bits)
    searches = MultiTargetSearch(config, evaluator, profiles, (), Phases.of(config, 20), seed=0)
    searches.prepare()
    told = []
    evaluator.tell = lambda phase, done, total, detail="": told.append((phase, detail))
    searches.choose(lambda: ())
    budgets = {detail.partition(", budget ")[2] for phase, detail in told if phase == "choosing" and detail}
    limits = {f"{target.limits.limits[0]:.6g} GBOPs" for target in searches.targets}
    assert budgets == (limits if len(limits) > 1 else {""})
    for target in searches.targets:
        assert target.limits.fits(evaluator.space.choice(target.assignment))
        assert target.contest["judged_by"] == "divergence" and target.contest["certificate"]["rank"] >= 1
    again = MultiTargetSearch(config, evaluator, profiles, (), Phases.of(config, 20), seed=1)
    again.load_state_dict(searches.state_dict())
    assert [target.assignment for target in again.targets] == [target.assignment for target in searches.targets]
    assert all(
        torch.equal(one.search.draw(), other.search.draw())
        for one, other in zip(again.targets, searches.targets, strict=True)
    )


def test_evaluating_reads_disjoint_examples_to_propose_and_to_decide(toy):
    evaluator, _ = toy
    proposing, deciding = evaluator.evaluation_batches(), evaluator.deciding_batches()
    seen, others = ({row.numpy().tobytes() for b in batches for row in b["x"]} for batches in (proposing, deciding))
    assert len(seen) == 64 and len(others) == 136 and not seen & others
    assert get_formats(evaluator.modules)


class Bigrams(nn.Module):
    """A language model: the next token from the one before."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.hidden, self.head = nn.Embedding(11, 16), nn.Linear(16, 16), nn.Linear(16, 11)

    def forward(self, input_ids, attention_mask, labels):
        logits = self.head(self.hidden(self.table(input_ids)).relu())
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return {"loss": loss, "logits": logits}


def test_language_models_are_judged_by_their_divergence_from_float_on_held_out_text():
    model = Bigrams()
    tokens = torch.randint(11, (60, 9), generator=torch.Generator().manual_seed(2))
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in tokens]
    teacher, layers = Teacher(copy.deepcopy(model)), quantize_model(model, formats=FORMATS)
    calibrate(model, layers, [torch.utils.data.default_collate(data)])
    space = build_space(list(layers), FORMATS, weight_only=True)
    evaluator = AssignmentEvaluator(model, layers, space, data, teacher=teacher)
    assert evaluator.criterion == "divergence"
    measured = evaluator.measure()
    assert (np.diff(measured.mean, axis=1) < 0).all() and (measured.error > 0).all()
    batches = evaluator.evaluation_batches()
    found = evaluator.evaluate_assignments([[0, 0]], batches)[0, 0]
    with torch.no_grad():
        for batch, value in zip(batches, found, strict=True):
            before, after = (m.eval()(**batch)["logits"].log_softmax(-1) for m in (teacher.model, model))
            assert value == pytest.approx(float((before.exp() * (before - after)).sum(-1).mean()), rel=1e-4)


def test_every_target_has_its_turns_and_a_resumed_run_the_same_ones(toy):
    evaluator, profiles = toy
    config = ReinforceConfig(target_bits=(4, 5, 6), policy_prior="none")
    searches = MultiTargetSearch(config, evaluator, profiles, (), Phases.of(config, 24), seed=0)
    searches.prepare()
    turns = [searches.turn(step) for step in range(24)]
    assert set(turns) == {0, 1, 2}
    again = MultiTargetSearch(config, evaluator, profiles, (), Phases.of(config, 24), seed=0)
    again.load_state_dict(searches.state_dict())
    assert [again.turn(step) for step in range(12, 24)] == turns[12:]

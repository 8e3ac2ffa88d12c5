"""Pairwise terms: which pairs are measured, what they hold, and a net whose layers' errors cancel in pairs."""

import copy

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from cost.profile import profile_model
from policy.budget import Budget
from policy.space import build_space
from quant.convert import calibrate, quantize_model
from quant.formats import parse_search_space
from quant.reconstruction.blocks import Chain, Unit
from trainer.search import targets
from trainer.search.config import ReinforceConfig
from trainer.search.evaluation_sizes import EvaluationSizes
from trainer.search.evaluator import AssignmentEvaluator
from trainer.search.pairs import PairTerms, adds_up, decisions_by_block, measure_pairs, pairs_that_matter
from trainer.search.search_state import Phases
from trainer.search.selection import CandidateSelector
from trainer.search.targets import MultiTargetSearch
from trainer.training.distillation import Teacher

FORMATS = parse_search_space("2,4,8")
GAIN = 3


class Equals(nn.Module):
    """Equal layers with alternating signs: their rounding errors cancel between signs and add up within one."""

    def __init__(self, width, pairs=3):
        super().__init__()
        layer = nn.Linear(width, width)
        self.plus = nn.ModuleDict({f"p{i}": copy.deepcopy(layer) for i in range(pairs)})
        self.minus = nn.ModuleDict({f"m{i}": copy.deepcopy(layer) for i in range(pairs)})

    def forward(self, x):
        plus, minus = (sum(layer(x) for layer in side.values()) for side in (self.plus, self.minus))
        return x + GAIN * (plus - minus)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Linear(64, 24), nn.ModuleList([Equals(24), Equals(24, pairs=1)])
        self.head = nn.Linear(24, 10)

    def forward(self, x, labels):
        x = self.stem(x).relu()
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.fixture(scope="module")
def digits():
    """An evaluator of the net, trained on digits, and the profiles of its layers."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float() / 16, torch.from_numpy(labels)
    model = Net()
    optimizer = torch.optim.Adam([*model.stem.parameters(), *model.head.parameters()], 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        model(x, y)["loss"].backward()
        optimizer.step()
    teacher, layers = Teacher(copy.deepcopy(model)), quantize_model(model, formats=FORMATS, exclude=["stem"])
    batch = {"x": x[:64], "labels": y[:64]}
    profiles = profile_model(model, batch, layers)
    calibrate(model, layers, [batch])
    held_out = [{"x": image, "labels": label} for image, label in zip(x[64:], y[64:], strict=True)]
    sizes = EvaluationSizes(len(held_out), len(layers), len(FORMATS), 64, total_steps=400, step_examples=64)
    space = build_space(list(layers), FORMATS, weight_only=True)
    return AssignmentEvaluator(model, layers, space, held_out, teacher=teacher, sizes=sizes), profiles


def chosen(digits):
    """The target of a search on digits whose choice is made at once."""
    evaluator, profiles = digits
    config = ReinforceConfig(target_bits=4, cost_type="memory")
    searches = MultiTargetSearch(config, evaluator, profiles, (), Phases.of(config, 400), seed=0)
    searches.prepare()
    searches.choose(lambda: ())
    return searches.targets[0]


def test_where_errors_cancel_in_pairs_the_choice_with_pairs_is_better(digits, monkeypatch):
    found = chosen(digits)
    pairs = found.contest["pairs"]
    assert found.contest["additivity"]["correlation"] < 0.9
    assert pairs["changed_choice"] and found.contest["winner"] == "pairs around measured" and pairs["measured"] == 18
    assert all(len({name.split(".")[1] for name in entry["changes"]}) == 1 for entry in pairs["largest"])
    monkeypatch.setattr(targets, "adds_up", lambda additivity: True)
    additive = chosen(digits)
    assert "pairs" not in additive.contest and found.limits.fits(found.choice)
    alone, with_pairs = digits[0].evaluate_assignments([additive.choice, found.choice])[:, 0].mean(1)
    assert with_pairs < 0.8 * alone


def test_blocks_are_those_of_the_model(digits):
    evaluator, _ = digits
    assert decisions_by_block(evaluator.space, evaluator.units()) == [[0, 1, 2, 3, 4, 5], [6, 7]]


def test_without_blocks_all_decisions_are_one_block_and_shared_decisions_are_in_none():
    space = build_space(["a.x", "a.y", "b.x", "b.y"], FORMATS)
    assert decisions_by_block(space, [Unit(name, [name]) for name in ("a.x", "a.y", "b.x", "b.y")]) == [[0, 1, 2, 3]]
    chain = Chain(["a", "b"], [])
    blocks = [Unit("a", ["a.x", "a.y"], chain=chain), Unit("b", ["b.x", "b.y"], chain=chain, index=1)]
    assert decisions_by_block(space, blocks) == [[0, 1], [2, 3]]
    by_role = build_space(["a.x", "a.y", "b.x", "b.y"], FORMATS, {"x": ["a.x", "b.x"], "y": ["a.y", "b.y"]})
    assert decisions_by_block(by_role, blocks) == []


def test_pairs_within_a_block_come_by_the_bound_of_their_term():
    effects = {(0, 1): 4.0, (0, 2): -1.0, (1, 0): 9.0, (2, 0): 100.0, (3, 0): 1.0}
    assert pairs_that_matter(effects, [[0, 1], [2, 3]], 3) == [((2, 0), (3, 0)), ((0, 1), (1, 0)), ((0, 2), (1, 0))]
    assert len(pairs_that_matter(effects, [[0, 1], [2, 3]], 1)) == 1 and pairs_that_matter(effects, [[0, 2]], 0) == []


def test_the_terms_of_a_quadratic_form_are_its_mixed_parts():
    """With them, the sum of effects and terms equals the degradation of every choice that was measured."""
    rng = np.random.default_rng(0)
    errors, form = rng.normal(size=(3, 2)), rng.normal(size=(3, 3))
    form = form @ form.T

    def degradation(choice):
        e = errors[np.arange(3), list(choice)]
        return e @ form @ e

    def evaluate(choices):
        return np.array([[[degradation(choice)], [0.5]] for choice in choices])

    budget = Budget((np.array([[1.0, 2.0]] * 3),), (6.0,))
    around = (0, 0, 0)
    selector = CandidateSelector(budget, evaluate)
    terms = measure_pairs(selector, around, [[0, 1, 2]], 10)
    effects = selector.sensitivities(around)
    assert len(terms.measured) == 3
    for ((d, _), (e, _)), term in terms.measured.items():
        change = errors[:, 1] - errors[:, 0]
        assert term == pytest.approx(2 * change[d] * form[d, e] * change[e])
    losses = {
        choice: sum(effects[d, 1] for d in range(3) if choice[d])
        - sum(float(f.tables[0][choice[f.decisions[0]], choice[f.decisions[1]]]) for f in terms.factors(2))
        for choice in np.ndindex(2, 2, 2)
    }
    for choice, loss in losses.items():
        assert loss == pytest.approx(degradation(choice) - degradation(around), abs=1e-9)
    best = min(losses, key=losses.__getitem__)
    values = np.array([[0.0, -effects[d, 1]] for d in range(3)])
    assert tuple(budget.solve(values, terms.factors(2))) == best


def test_a_record_holds_the_largest_terms_by_name():
    terms = PairTerms({((0, 1), (1, 2)): 0.5, ((0, 0), (1, 2)): -2.0})
    found = terms.describe(build_space(["a", "b"], FORMATS), changed=False)
    assert found["measured"] == 2 and not found["changed_choice"]
    assert found["largest"][0] == {"changes": {"a": "int2/int2", "b": "int8/int8"}, "term": -2.0}


@pytest.mark.parametrize(("correlation", "additive"), [(None, True), (0.95, True), (0.5, False), (-1.0, False)])
def test_effects_add_up_if_predictions_hold(correlation, additive):
    assert adds_up({"correlation": correlation}) is additive

"""A search of architecture and formats: within its budget, the same for the same seed, and resumable."""

import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from transformers import TrainerCallback, TrainingArguments

from cost.cost import compute_cost
from cost.profile import profile_model
from eval.modeling.vision_nets import CifarResNet
from eval.saved_model import load_model
from policy.factors import Factor
from policy.joint_budget import JointBudget
from quant.elastic import ElasticNet
from quant.errors import UserError
from quant.quant_module import QuantModule
from trainer.reinforce_trainer import ReinforceConfig, ReinforceTrainer
from trainer.search.joint import best_formats, joint_candidates, joint_prior

DIGITS = load_digits()
PIXELS = torch.tensor(DIGITS.images, dtype=torch.float32)[:, None] / 16
ROWS = [{"pixel_values": x, "labels": int(y)} for x, y in zip(PIXELS[:400], DIGITS.target, strict=False)]
EXAMPLE = {"pixel_values": PIXELS[:32]}


def trainer(folder, *, steps=12, search=None, save="no", **arguments):
    torch.manual_seed(0)
    model = CifarResNet(8, 10, in_channels=1)
    net = ElasticNet(model, EXAMPLE, widths=(0.5, 0.75, 1))
    settings = {"max_steps": steps, "per_device_train_batch_size": 16, "learning_rate": 1e-3, "save_strategy": save}
    return ReinforceTrainer(
        model,
        TrainingArguments(str(folder), report_to=[], use_cpu=True, disable_tqdm=True, save_steps=4, **settings),
        search=search or ReinforceConfig(target_bits=3, sensitivity_examples=32),
        search_space="2,4,8",
        architecture=net,
        train_dataset=ROWS,
        history=folder / "history.jsonl",
        **arguments,
    )


def test_a_search_ends_in_a_plain_model_within_its_budget(tmp_path):
    search = trainer(tmp_path)
    search.train()
    model = search.model.eval()
    assert not [m for m in model.modules() if "Elastic" in type(m).__name__]
    assert set(search.architecture) == {f"layer{n}.0.conv1 width" for n in (1, 2, 3)}
    sized = profile_model(model, EXAMPLE, search.modules)
    assert compute_cost(sized, search.assignment) == pytest.approx(search.cost, rel=1e-14)
    assert search.cost <= search.cost_target
    assert len(json.loads((tmp_path / "history.jsonl").read_text().splitlines()[0])["choice"]) == 8 + 3
    search.save_model(str(tmp_path / "saved"))
    again = load_model(tmp_path / "saved", CifarResNet(8, 10, in_channels=1))
    assert all(isinstance(again.get_submodule(name), QuantModule) for name in search.assignment)
    with torch.no_grad():
        expected = model(**EXAMPLE)["logits"]
        torch.testing.assert_close(again(**EXAMPLE)["logits"], expected, rtol=0, atol=0)


class Killed(Exception):
    pass


class Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def outcome(search, folder):
    weights = {name: tensor.clone() for name, tensor in search.model.state_dict().items()}
    return search.architecture, search.assignment, (folder / "history.jsonl").read_text(), weights


LEARNING = ReinforceConfig(target_bits=3, sensitivity_examples=32, settle_fraction=0.4)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    whole = trainer(folder, save="steps", search=LEARNING)
    whole.train()
    return outcome(whole, folder)


@pytest.mark.parametrize("step", [6, 10], ids=["during the search", "after the choice"])
def test_a_resumed_search_equals_an_undisturbed_one(tmp_path, undisturbed, step):
    with pytest.raises(Killed):
        trainer(tmp_path, save="steps", search=LEARNING, callbacks=[Kill(step)]).train()
    resumed = trainer(tmp_path, save="steps", search=LEARNING)
    resumed.train(resume_from_checkpoint=True)
    expected, found = undisturbed, outcome(resumed, tmp_path)
    assert found[:3] == expected[:3]
    torch.testing.assert_close(found[3], expected[3], rtol=0, atol=0)


class Watch(TrainerCallback):
    """Keeps the weight of the first layer as the optimizer finds it at each step."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.seen.append(model.conv1._parameters["weight"].detach().clone())


def test_the_chosen_architecture_is_trained_from_the_weights_of_the_start(tmp_path):
    watch = Watch()
    search = trainer(tmp_path, search=LEARNING, callbacks=[watch])
    search.train()
    settle = search.searches.phases.settle
    back = [torch.equal(weight, watch.seen[0]) for weight in watch.seen]
    assert [step for step, same in enumerate(back) if same] == [0, settle]
    assert not torch.equal(watch.seen[settle + 1], watch.seen[1]), "the optimizer starts again too, at its own rate"


def test_settings_that_contradict_are_refused(tmp_path):
    for settings, message in [
        ({"method": "uniform", "target_bits": 3}, "method uniform contradicts a search of architecture"),
        ({"target_bits": (3, 4)}, "give one budget"),
        ({"max_drop": 0.1}, "max_drop 0.1"),
    ]:
        with pytest.raises(UserError, match=message):
            trainer(tmp_path, search=ReinforceConfig(**settings))
    with pytest.raises(
        UserError, match=r"--target_bits 1 is .* but assignments of this search space cost .* to .* GBOPs"
    ):
        trainer(tmp_path, search=ReinforceConfig(target_bits=1))


BITS, WIDTH = np.array([2.0, 4.0, 8.0]), np.array([1.0, 2.0, 4.0])


def budget(limit):
    """Two decisions of formats, one of width that both layers share."""
    return JointBudget.within([Factor((layer, 2), (np.outer(BITS, WIDTH),)) for layer in (0, 1)], [limit], 3, 3)


def test_the_prior_costs_the_budget_and_leaves_the_architecture_open_under_a_wide_one():
    sensitivity = np.array([[3.0, 1.0, 0.0], [9.0, 2.0, 0.0]])
    wide = budget(1e3)
    logits, pressure = joint_prior(sensitivity, wide)
    assert logits[2].abs().max() < 1e-12 and pressure.abs().max() < 1e-12
    tight = budget(16.0)
    logits, pressure = joint_prior(sensitivity, tight)
    assert tight.expected_costs(logits.softmax(-1).numpy())[0] == pytest.approx(16, rel=1e-6)
    assert (pressure[2].diff() < 0).all(), "wider costs more"


def test_candidates_scale_the_whole_model_with_the_best_formats():
    sensitivity = np.array([[3.0, 1.0, 0.0], [9.0, 2.0, 0.0]])
    tight = budget(16.0)
    assert best_formats(sensitivity, tight, [0]) == [2, 2]
    found = joint_candidates(sensitivity, tight)
    assert found == {"whole model": [0, 0, 2], "architecture 2 of 3": [1, 1, 1], "architecture 1 of 3": [2, 2, 0]}
    assert set(joint_candidates(sensitivity, budget(8.0))) == {"architecture 2 of 3", "architecture 1 of 3"}


def test_a_repeated_choice_is_no_candidate_of_its_own():
    """The width has two choices only, the second of which is repeated."""
    tables = np.outer(BITS, [1.0, 2.0, 2.0])
    repeated = JointBudget.within([Factor((layer, 2), (tables,)) for layer in (0, 1)], [16.0], 3, 3)
    found = joint_candidates(np.array([[3.0, 1.0, 0.0], [9.0, 2.0, 0.0]]), repeated)
    assert set(found) == {"whole model", "architecture 1 of 3"}

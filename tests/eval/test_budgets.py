"""All budgets of one run in one model: each equals the model of its own record, and switching leaves nothing behind."""

import copy
import json

import pytest
import torch

from eval import load_model
from eval.config.parser import parse
from eval.eval_run import run
from quant.errors import UserError
from trainer.training.checkpoint import load_tensors

BASE = (
    "--task digits --model convnet --train_batch_size 32 --max_train_samples 96 --max_eval_samples 64 --report_to none"
)


def finished(folder, flags):
    config = parse(f"{BASE} --quiet --search_space 2,3,4,8 --output_root_dir {folder} {flags}".split())
    run(config)
    return config.run_folder


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("budgets"), "--search --target_bits 2.5:6.5:2,3 --max_steps 12")


@pytest.fixture
def images():
    return torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def logits(model, images):
    with torch.no_grad():
        return model(pixel_values=images).logits


def test_a_range_and_a_list_are_ascending_budgets():
    assert parse([*BASE.split(), "--search", "--search_space", "2,8", "--target_bits", "2.5:4:0.5,7"]).target_list == (
        *(2.5, 3, 3.5, 4),
        7,
    )
    assert parse([*BASE.split(), "--search", "--search_space", "2,8", "--target_bits", "3:4:0.1"]).target_list[3] == 3.3


def test_each_budget_is_the_model_of_its_own_record(searched, images):
    own = {2.5: searched / "2.5b", 3: searched / "3b", 4.5: searched / "4.5b", 6.5: searched}
    want = {bits: logits(load_model(folder), images) for bits, folder in own.items()}
    model = load_model(searched)
    assert model.budgets == tuple(own) and torch.equal(logits(model, images), want[6.5])
    for bits in (3, 6.5, 2.5, 4.5, 3):
        model.set_budget(bits)
        assert torch.equal(logits(model, images), want[bits]), bits
        assert torch.equal(logits(load_model(searched, target_bits=bits), images), want[bits])
    assert not torch.equal(want[2.5], want[6.5])


def test_a_copy_switches_by_itself_and_only_what_differs_is_stored(searched, images):
    model = load_model(searched, target_bits=2.5)
    other = copy.deepcopy(model)
    other.set_budget(6.5)
    assert not torch.equal(logits(model, images), logits(other, images))
    stored = load_tensors(searched / "model/budgets.safetensors")
    assert stored and all("running_" in name for name in stored)
    assert "set_budget" not in "".join(model.state_dict())


def test_weights_that_are_rounded_for_each_budget_come_along(tmp_path, images):
    folder = finished(
        tmp_path, "--method measured --target_bits 3,6 --max_steps 0 --rounding gptq --rounding_samples 64"
    )
    model = load_model(folder, target_bits=3)
    assert torch.equal(logits(model, images), logits(load_model(folder / "3b"), images))
    model.set_budget(6)
    assert torch.equal(logits(model, images), logits(load_model(folder), images))


def test_unknown_budgets_models_of_one_budget_and_damaged_files_are_named(searched, tmp_path):
    with pytest.raises(UserError, match=r"target_bits 5: no budget of this run; choices: 2\.5, 3, 4\.5, 6\.5"):
        load_model(searched, target_bits=5)
    with pytest.raises(UserError, match="has one budget"):
        load_model(searched / "3b", target_bits=3)
    assert not hasattr(load_model(searched / "3b"), "set_budget")
    file = searched / "model/budgets.json"
    whole = file.read_text()
    try:
        for broken in (whole[:20], json.dumps([1]), json.dumps({"three": {}})):
            file.write_text(broken)
            with pytest.raises(UserError, match=r"budgets\.json"):
                load_model(searched)
    finally:
        file.write_text(whole)

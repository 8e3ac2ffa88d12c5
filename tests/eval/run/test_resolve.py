"""`--resolve`: another budget from a finished search, without training; its record, its model, its export."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch

from eval import load_model
from eval.config.parser import parse
from eval.eval_run import main, run
from eval.export.__main__ import main as export
from eval.run.resolve import between
from policy.budget import Budget
from quant.errors import UserError
from trainer.training.checkpoint import load_tensors

BASE = (
    "--task digits --model convnet --train_batch_size 32 --max_train_samples 200 --max_eval_samples 64 --report_to none"
)
SEARCH = "--quiet --search --search_space 2,3,4,8 --max_steps 30 --learning_rate 1e-3"


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resolve")
    config = parse(f"{BASE} {SEARCH} --target_bits 2.5,4,6 --output_root_dir {folder}".split())
    run(config)
    return config.run_folder


def resolved(folder, bits, *flags):
    assert main(["--resolve", str(folder), "--target_bits", str(bits), "--quiet", *flags]) == 0
    return json.loads((folder / f"{bits:g}b/result.json").read_text())


def test_a_budget_between_two_gets_a_record_a_model_and_an_export(searched, tmp_path, capsys):
    folder = tmp_path / "text/default/run"
    shutil.copytree(searched, folder)
    weights = (folder / "model/model.safetensors").read_bytes()
    record = resolved(folder, 3.2)
    assert "within" not in capsys.readouterr().err
    lower, upper = (json.loads((folder / own / "result.json").read_text()) for own in ("2.5b", "4b"))
    assert (
        lower["cost_target"] < record["cost_target"] < upper["cost_target"] and record["cost"] <= record["cost_target"]
    )
    assert record["steps"] == 0 and any("not trained under" in note for note in record["notes"])
    assert {"formats of 2.5 and 4 bits", "formats of 2.5 bits", "policy of 4 bits"} < set(
        record["contest"]["candidates"]
    )
    assert record["contest"]["certificate"] and record["float_metrics"] == upper["float_metrics"]
    assert (folder / "model/model.safetensors").read_bytes() == weights  # shared, and not trained
    one, other = (load_tensors(place / "model/model.safetensors") for place in (folder, folder / "3.2b"))
    assert all(torch.equal(one[name], other[name]) for name in one if "running_" not in name)
    model, images = load_model(folder), torch.rand(8, 1, 8, 8)
    assert model.budgets == (2.5, 3.2, 4, 6)
    model.set_budget(3.2)
    with torch.no_grad():
        assert torch.equal(model(pixel_values=images).logits, load_model(folder / "3.2b")(pixel_values=images).logits)
    assert export([str(folder / "3.2b"), "--format", "packed"]) == 0
    verdict = json.loads((folder / "3.2b/export/packed/export.json").read_text())
    assert verdict["metrics"]["exported"]["validation"]["loss"] == pytest.approx(
        record["metrics"]["validation"]["loss"]
    )
    again = tmp_path / "other/default/run"
    shutil.copytree(searched, again)
    twin = resolved(again, 3.2)
    assert twin["assignment"] == record["assignment"] and twin["metrics"] == record["metrics"]


def test_formats_between_two_choices_use_most_of_the_budget():
    costs = np.array([[1.0, 2, 4], [3.0, 6, 12], [2.0, 4, 8], [1.0, 2, 4]])
    smaller, larger = [0, 1, 0, 2], [2, 2, 1, 0]
    budget = Budget((costs,), (18.0,))
    found = between(budget, smaller, larger)
    kinds = [list(kind) for kind in itertools.product(*zip(smaller, larger, strict=True))]
    spent = {tuple(kind): sum(costs[d, c] for d, c in enumerate(kind)) for kind in kinds}
    assert spent[tuple(found)] == max(cost for cost in spent.values() if cost <= 18)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--target_bits 7", ["--target_bits 7", "2.5, 4, 6"]),
        ("--target_bits 4", ["--target_bits 4", "none of them"]),
        ("--target_bits 3,5", ["--resolve", "one --target_bits", "3,5"]),
        ("", ["--resolve", "one --target_bits"]),
        ("--target_bits 3 --seed 1", ["--seed", "--resolve"]),
    ],
)
def test_wrong_budgets_and_other_flags_are_one_line(searched, flags, words):
    before = sorted(searched.rglob("*"))
    with pytest.raises(UserError) as error:
        main(["--resolve", str(searched), *flags.split()])
    assert all(word in str(error.value) for word in words)
    assert sorted(path for path in searched.rglob("*") if path.name != ".lock") == [
        p for p in before if p.name != ".lock"
    ]


def test_folders_that_are_no_such_search_are_named(searched, tmp_path):
    for folder, words in ((tmp_path / "none", "no such folder"), (tmp_path, "is no run's folder")):
        with pytest.raises(UserError, match=words):
            main(["--resolve", str(folder), "--target_bits", "3"])
    copied = tmp_path / "task/default/run"
    shutil.copytree(searched, copied)
    (copied / "4b/decisions.json").write_text("{")
    with pytest.raises(UserError, match=r"decisions\.json is damaged"):
        main(["--resolve", str(copied), "--target_bits", "3"])
    (copied / "4b/decisions.json").unlink()
    with pytest.raises(UserError, match="earlier version"):
        main(["--resolve", str(copied), "--target_bits", "3"])
    with pytest.raises(UserError, match=r"--resolve .* is for eval_run\.py"):
        parse([*BASE.split(), "--resolve", str(searched)])

"""Tasks: their rows, the splits to evaluate, and equal batches for equal seeds."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from eval.data.dataset import not_augmented
from eval.data.loading import load_task, prepare, task_kind
from eval.models import build_model
from eval.tasks import TASKS
from quant.errors import UserError
from trainer.training.sampler import hold_out

ROOT = Path(__file__).parents[3]
SHARED = ROOT.parent / "shared"


def config(task, **flags):
    return SimpleNamespace(task=task, **flags)


def needs(path):
    return pytest.mark.skipif(not (SHARED / path).exists(), reason=f"../shared/{path} is absent")


def batches(prepared, dataset, seed=0, batch_size=16):
    loader = DataLoader(
        dataset,
        batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=prepared.data_collator,
    )
    return list(loader)


def prepared_digits(**flags):
    run = config("digits", model="convnet", **flags)
    data = load_task(run)
    return prepare(data, build_model(run, data.num_labels), run)


def test_names_are_known_without_torch():
    code = (
        "import sys; from eval.data.loading import task_kind; from eval.models import MODELS, check_model;"
        "print([task_kind(n) for n in ('mrpc', 'cifar10', 'lm')]);"
        "print({'torch', 'datasets', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['text', 'image', 'lm']\nset()"


def test_unknown_task_names_flag_value_and_choices():
    with pytest.raises(UserError, match=r"--task mprc: .* cola, .*digits"):
        task_kind("mprc")


def test_unknown_task_suggests_a_task_or_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes").mkdir()
    for name, suggestion in (("mprc", "mrpc"), ("shape", "shapes")):
        with pytest.raises(UserError, match=f"or a local folder; did you mean {suggestion}\\?"):
            task_kind(name)
    with pytest.raises(UserError, match=r"or a local folder$"):
        task_kind("nothing-like-it")


def test_digits_are_split_in_proportion_and_whole():
    data = load_task(config("digits"))
    assert (data.metric, data.num_labels, list(data.validation)) == ("accuracy", 10, ["validation"])
    train, validation = (np.bincount(split["label"][:]) for split in (data.train, data.validation["validation"]))
    assert train.sum() + validation.sum() == 1797
    np.testing.assert_allclose(validation / (train + validation), 0.2, atol=0.005)


def test_subsets_have_every_class_and_do_not_depend_on_the_seed():
    first, second = (
        load_task(config("digits", max_train_samples=100, max_eval_samples=30, seed=seed)) for seed in (0, 1)
    )
    assert len(first.train) == 100 and len(first.validation["validation"]) == 30
    assert first.train["image"][:] == second.train["image"][:]
    assert set(first.train["label"][:]) == set(range(10))
    assert len(load_task(config("digits", use_subset=True, subset_ratio=0.25)).train) == 360


def test_compute_metrics_does_not_hide_divergence():
    data = load_task(config("digits"))
    logits = np.eye(10)[[3, 4]]
    assert data.compute_metrics(SimpleNamespace(predictions=logits, label_ids=np.array([3, 5]))) == {"accuracy": 0.5}
    logits[0, 0] = np.nan
    assert np.isnan(data.compute_metrics(SimpleNamespace(predictions=logits, label_ids=np.array([3, 5])))["accuracy"])


def test_held_out_rows_are_stratified_and_seeded():
    prepared = prepared_digits()
    held = hold_out(prepared.train, 0.1, seed=0)
    assert len(set(held)) == 144
    counts = np.bincount(prepared.train.select(held).labels)
    assert counts.min() >= 13 and counts.max() <= 16
    assert held == hold_out(prepared.train, 0.1, seed=0)
    assert held != hold_out(prepared.train, 0.1, seed=1)
    with pytest.raises(UserError, match="--search_fraction"):
        hold_out(prepared.train, 1.0, seed=0)


@needs("data/cifar10")
def test_augmentation_follows_the_seed_survives_resuming_and_spares_evaluation():
    def cifar(seed):
        run = config("cifar10", data_dir=SHARED / "data/cifar10", model="resnet20", max_train_samples=64, seed=seed)
        data = load_task(run)
        return prepare(data, build_model(run, data.num_labels), run)

    prepared = cifar(seed=1)
    first = batches(prepared, prepared.train)
    torch.rand(5)  # other draws from the global state must not matter
    again = batches(prepared, cifar(seed=1).train)
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0]["pixel_values"], batches(prepared, cifar(seed=2).train)[0]["pixel_values"])
    # A resumed run skips batches without loading them; the next ones are the same.
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3)).tolist()
    wanted = prepared.train.__getitems__(order[32:48])
    torch.testing.assert_close(cifar(seed=1).train.__getitems__(order[32:48]), wanted, rtol=0, atol=0)

    held = not_augmented(prepared.train.select(hold_out(prepared.train, 0.25, seed=0)))
    torch.testing.assert_close(held[0], held.__getitems__([3, 0])[1], rtol=0, atol=0)
    split = prepared.validation["validation"]
    torch.testing.assert_close(split[0], split.__getitems__([5, 0])[1], rtol=0, atol=0)


@needs("data/glue/mrpc")
def test_mrpc_is_padded_per_batch_and_counts_what_it_cuts():
    run = config(
        "mrpc", data_dir=SHARED / "data/glue/mrpc", model="bert-tiny", from_scratch=True, max_length=60, seed=0,
        max_train_samples=200,
    )  # fmt: skip
    data = load_task(run)
    assert (data.num_labels, data.label_names) == (2, ["not_equivalent", "equivalent"])
    bundle = build_model(run, data.num_labels, data.corpus())
    prepared = prepare(data, bundle, run)
    lengths = {batch["input_ids"].shape[1] for batch in batches(prepared, prepared.train, batch_size=4)}
    assert all(length % 8 == 0 or length == 60 for length in lengths) and len(lengths) > 1 and max(lengths) == 60
    row = data.train[0]
    tokens = bundle.tokenizer(row["sentence1"], row["sentence2"])["input_ids"]
    assert prepared.train[0]["input_ids"][:20] == tokens[:20]
    assert [note for note in prepared.notes if "texts were cut to 60 tokens" in note]
    assert prepared.example_inputs["input_ids"].shape == (1, 60)


@needs("data/glue/sst2")
def test_the_folder_of_the_whole_repository_does_as_well():
    assert len(load_task(config("sst2", data_dir=SHARED / "data/glue")).validation["validation"]) == 872


def test_missing_folder_names_the_flag():
    with pytest.raises(UserError, match="--data_dir /nowhere: no such folder"):
        load_task(config("mrpc", data_dir="/nowhere"))


def test_without_the_hub_the_error_names_the_flags(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"--data_dir DIR .*--model_path DIR"):
        load_task(config("cola"))


def test_every_task_has_a_metric_that_exists():
    from eval.data.metrics import METRICS, rouge

    classes = [task for task in TASKS.values() if task.kind in ("text", "image")]
    assert {metric for task in classes for metric in task.metrics} <= set(METRICS)
    assert all(set(task.metrics) == set(rouge(["a"], ["a"])) for task in TASKS.values() if task.kind == "summary")


def test_metrics_are_those_of_glue_by_hand():
    from eval.data.metrics import score

    # Predictions 1 1 0 1 0 against labels 1 0 0 1 1: two true and one false positive, one false and one true negative.
    logits = np.array([[0, 1], [0, 1], [1, 0], [0, 1], [1, 0]], dtype=float)
    told = score(("accuracy", "f1", "matthews_correlation"), logits, np.array([1, 0, 0, 1, 1]))
    assert told == pytest.approx({"accuracy": 3 / 5, "f1": 2 * 2 / (2 * 2 + 1 + 1), "matthews_correlation": 1 / 6})
    constant = score(("pearson", "spearman"), np.ones((3, 1)), np.array([1.0, 2.0, 3.0]))
    assert constant == {"pearson": 0.0, "spearman": 0.0}
    monotone = score(("pearson", "spearman"), np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 2.0, 3.0]))
    assert monotone["spearman"] == pytest.approx(1.0) and 0.98 < monotone["pearson"] < 1

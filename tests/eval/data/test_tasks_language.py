"""Language modelling, candidate answers and long texts."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GPT2Config

from eval.data.loading import load_task, prepare
from eval.data.text import PadCollator, token_scores
from eval.models import build_architecture, build_model
from quant.errors import UserError
from trainer.training.sampler import hold_out

LINES = [f"the {who} sees {number} hills and {number + 1} rivers" for who in ("cat", "dog") for number in range(40)]


def config(task, **flags):
    return SimpleNamespace(task=str(task), **{"seed": 0, "from_scratch": True, **flags})


@pytest.fixture
def gpt2(tmp_path):
    """A folder with the configuration of a very small GPT-2."""
    folder = tmp_path / "gpt2"
    GPT2Config(n_layer=1, n_embd=32, n_head=2, n_positions=64).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "wiki.train.txt").write_text("\n".join([*LINES, "", ""]))
    (folder / "wiki.valid.txt").write_text("\n".join(LINES[:5]))
    return folder


def test_text_files_are_cut_into_blocks_without_losing_a_token(texts, gpt2):
    run = config("lm", data_dir=texts, model=gpt2, max_length=16)
    data = load_task(run)
    assert (data.kind, data.metric, data.num_labels) == ("lm", "perplexity", 0)
    bundle = build_model(run, data.num_labels, data.corpus())
    prepared = prepare(data, bundle, run)
    stream = [token for text in LINES[:5] for token in bundle.tokenizer(text, add_special_tokens=False)["input_ids"]]
    blocks = prepared.validation["validation"]["input_ids"][:]
    assert [token for block in blocks for token in block] == stream
    assert {len(block) for block in blocks[:-1]} == {16}
    assert prepared.example_inputs["input_ids"].shape == (1, 16)
    assert len(hold_out(prepared.train, 0.1, seed=0)) == round(0.1 * len(prepared.train))


def test_perplexity_is_that_of_all_tokens_whatever_the_batches(texts, gpt2):
    run = config("lm", data_dir=texts, model=gpt2, max_length=16)
    data = load_task(run)
    bundle = build_model(run, 0, data.corpus())
    prepared = prepare(data, bundle, run)
    model = bundle.model.eval()
    blocks = [prepared.validation["validation"][n] for n in range(len(prepared.validation["validation"]))]
    losses = []  # transformers' own loss of each block by itself, summed over the tokens it predicts
    for block in blocks:
        batch = prepared.data_collator([block])
        losses.append(model(**batch).loss.item() * (len(block["input_ids"]) - 1))
    expected = math.exp(sum(losses) / sum(len(block["input_ids"]) - 1 for block in blocks))
    batch = prepared.data_collator(blocks)
    scores = token_scores(model(**batch).logits, batch["labels"]).detach().numpy()
    padded = np.concatenate([scores, np.full((len(scores), 3, 2), -100.0)], axis=1)  # as the Trainer joins batches
    told = data.compute_metrics(SimpleNamespace(predictions=padded, label_ids=None))
    assert told["perplexity"] == pytest.approx(expected, rel=1e-5) and 0 <= told["accuracy"] <= 1


def test_uniform_predictions_have_the_perplexity_of_the_vocabulary():
    labels = torch.tensor([[3, 1, 4, -100]])
    scores = token_scores(torch.zeros(1, 4, 11), labels).numpy()
    assert scores.shape == (1, 3, 2) and scores[0, 2, 0] == -1
    assert np.exp(scores[0, :2, 0].mean()) == pytest.approx(11)


def test_an_encoder_is_refused(texts):
    run = config("lm", data_dir=texts, model="bert-tiny")
    with pytest.raises(UserError, match="--model bert: an encoder cannot predict the next word"):
        build_model(run, 0, LINES)


def test_gpt2_classifies_by_the_last_word_and_ignores_padding(gpt2):
    bundle = build_model(config("sst2", model=gpt2), 2, LINES)
    model = bundle.model.eval()
    assert model.config.pad_token_id == bundle.tokenizer.pad_token_id is not None
    collate = PadCollator(bundle.tokenizer.pad_token_id, 64)
    items = [{**bundle.tokenizer(text), "labels": 0} for text in ("the cat", "the dog sees 3 hills and 4 rivers")]
    together = model(**collate(items)).logits
    alone = torch.cat([model(**collate([item])).logits for item in items])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_a_tokenizer_without_padding_gets_one(tmp_path, gpt2):
    bundle = build_model(config("sst2", model=gpt2), 2, LINES)
    bundle.model.save_pretrained(tmp_path / "saved")
    bundle.tokenizer.eos_token, bundle.tokenizer.pad_token = "[SEP]", None
    bundle.tokenizer.save_pretrained(tmp_path / "saved")
    loaded = build_model(config("sst2", model="gpt2", model_path=tmp_path / "saved", from_scratch=False), 2)
    assert loaded.notes == ["padded with the token '[SEP]'"] and loaded.trained
    assert loaded.model.config.pad_token_id == loaded.tokenizer.convert_tokens_to_ids("[SEP]")


def piqa(folder):
    folder.mkdir()
    rows = [{"goal": f"see {n} hills", "sol1": "the cat sees", "sol2": "rivers " * 9, "label": n % 2} for n in range(8)]
    for name in ("train", "validation"):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_piqa_scores_each_solution_beside_its_goal(tmp_path):
    run = config("piqa", data_dir=piqa(tmp_path / "piqa"), model="bert-tiny", max_length=24)
    data = load_task(run)
    bundle = build_model(run, data.num_labels, data.corpus())
    prepared = prepare(data, bundle, run)
    batch = prepared.data_collator([prepared.train[n] for n in range(3)])
    assert batch["input_ids"].shape[:2] == (3, 2) and batch["input_ids"].shape[2] % 8 == 0
    model = bundle.model.eval()
    output = model(**batch)
    first = bundle.tokenizer("see 1 hills", "the cat sees", return_tensors="pt")
    torch.testing.assert_close(output.logits[1, 0], model.model(**first).logits[0, 0], rtol=1e-4, atol=1e-5)
    expected = torch.nn.functional.cross_entropy(output.logits, torch.tensor([0, 1, 0]))
    torch.testing.assert_close(output.loss, expected)
    assert model(**prepared.example_inputs).logits.shape == (1, 2)
    assert data.compute_metrics(SimpleNamespace(predictions=np.eye(2), label_ids=np.array([0, 0])))["accuracy"] == 0.5


def test_two_texts_are_cut_at_the_longer_one_and_counted(tmp_path):
    rows = [
        {"sentence1": "cat " * 50, "sentence2": "the dog", "label": 0},
        {"sentence1": "a", "sentence2": "b", "label": 1},
    ]
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = config("mrpc", data_dir=tmp_path, model="bert-tiny", max_length=20, cost_seq_len=64)
    data = load_task(run)
    bundle = build_model(run, 2, LINES)
    prepared = prepare(data, bundle, run)
    assert prepared.notes == ["2 of 4 texts were cut to 20 tokens"]
    tokens = prepared.train[0]["input_ids"]
    ending = bundle.tokenizer("the dog", add_special_tokens=False)["input_ids"]
    assert len(tokens) == 20 and tokens[-1 - len(ending) : -1] == ending
    assert prepared.data_collator([prepared.train[0]])["input_ids"].shape == (1, 20)  # not rounded up past the limit
    assert prepared.example_inputs["input_ids"].shape == (1, 64)


def test_regression_trains_on_values(tmp_path):
    rows = [{"sentence1": f"cat {n}", "sentence2": "dog", "label": n / 2} for n in range(6)]
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = config("stsb", data_dir=tmp_path, model="bert-tiny")
    data = load_task(run)
    bundle = build_model(run, data.num_labels, data.corpus())
    prepared = prepare(data, bundle, run)
    batch = prepared.data_collator([prepared.train[n] for n in range(6)])
    assert batch["labels"].dtype == torch.float32
    output = bundle.model.eval()(**batch)
    torch.testing.assert_close(output.loss, ((output.logits[:, 0] - batch["labels"]) ** 2).mean())
    assert len(hold_out(prepared.train, 0.3, seed=0)) == 2


def test_a_scorer_of_answers_is_built_again_from_what_was_saved(tmp_path):
    run = config("piqa", model="bert-tiny")
    model = build_model(run, 2, LINES).model.eval()
    model.config.save_pretrained(tmp_path)
    again = build_architecture("piqa", "bert-tiny", 2, tmp_path)
    again.load_state_dict(model.state_dict())
    batch = {"input_ids": torch.arange(12).view(2, 2, 3), "attention_mask": torch.ones(2, 2, 3, dtype=torch.long)}
    torch.testing.assert_close(again.eval()(**batch).logits, model(**batch).logits, rtol=0, atol=0)

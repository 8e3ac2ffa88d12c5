"""Questions (SQuAD) and summaries (CNN/DailyMail, XSum) from local files: trained, searched, quantized, evaluated."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BartConfig

from eval.config.parser import parse
from eval.data.loading import load_task
from eval.data.metrics import exact_match, rouge, token_f1
from eval.data.question_answering import Pieces, SpanMetrics, best_span, span_of
from eval.eval_run import run
from eval.run.plan import make_plan
from eval.saved_model import load_model
from quant.errors import UserError
from quant.transforms.migration import added

PLACES = ["Paris", "Rome", "Oslo", "Lima", "Cairo", "Delhi"]
NAMES = ["Ann", "Bob", "Eve", "Max", "Ida", "Tom"]
BASE = "--from_scratch --max_length 24 --train_batch_size 8 --eval_batch_size 8 --report_to none --quiet"


def question(i):
    name, place = NAMES[i % 6], PLACES[(i * 5 + i // 6) % 6]
    other = NAMES[(i + 1) % 6]
    context = f"{other} stays at home all day . {name} went to {place} by train ."
    answers = [{"text": place, "answer_start": context.index(place)}]
    return context, {"id": str(i), "question": f"Where did {name} go ?", "answers": answers}


@pytest.fixture(scope="module")
def squad(tmp_path_factory):
    """Return a data set in the layout of SQuAD's original files."""
    folder = tmp_path_factory.mktemp("squad")
    for file, rows in (("train-v1.1.json", range(32)), ("dev-v1.1.json", range(32, 44))):
        paragraphs = [{"context": c, "qas": [q]} for c, q in map(question, rows)]
        (folder / file).write_text(json.dumps({"version": "1.1", "data": [{"title": "x", "paragraphs": paragraphs}]}))
    return folder


@pytest.fixture(scope="module")
def articles(tmp_path_factory):
    """Return rows with the columns of both data sets."""
    folder = tmp_path_factory.mktemp("articles")
    for split, rows in (("train", range(24)), ("validation", range(24, 32))):
        lines = []
        for i in rows:
            text, summary = question(i)[0], f"{NAMES[i % 6]} went to {PLACES[(i * 5 + i // 6) % 6]}"
            lines.append(json.dumps({"article": text, "highlights": summary, "document": text, "summary": summary}))
        (folder / f"{split}.json").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def bart(tmp_path_factory):
    """The configuration of a BART that trains in seconds."""
    folder = tmp_path_factory.mktemp("bart")
    sizes = dict.fromkeys(["encoder_layers", "decoder_layers"], 1) | {"d_model": 32, "max_position_embeddings": 64}
    heads = dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 2)
    BartConfig(**sizes, **heads, encoder_ffn_dim=64, decoder_ffn_dim=64).save_pretrained(folder)
    return folder


def config(flags, folder):
    return parse(f"{BASE} --output_root_dir {folder} {flags}".split())


def test_squads_files_and_the_hubs_rows_are_the_same_data(squad, tmp_path):
    for split, rows in (("train", range(32)), ("validation", range(32, 44))):
        lines = []
        for context, asked in map(question, rows):
            answers = {key: [answer[key] for answer in asked["answers"]] for key in ("text", "answer_start")}
            lines.append(json.dumps({**asked, "context": context, "answers": answers}))
        (tmp_path / f"{split}.json").write_text("\n".join(lines))
    own, hubs = (load_task(SimpleNamespace(task="squad", data_dir=folder)) for folder in (squad, tmp_path))
    for mine, theirs in ((own.train, hubs.train), (own.validation["validation"], hubs.validation["validation"])):
        for column in ("question", "context", "answers"):
            assert mine[column][:] == theirs[column][:]


def test_wrong_answers_are_named(tmp_path):
    row = {"id": "1", "question": "Where ?", "context": "in Rome", "answers": {"text": ["Oslo"], "answer_start": [3]}}
    for split in ("train", "validation"):
        (tmp_path / f"{split}.json").write_text(json.dumps(row))
    with pytest.raises(UserError, match=r"train.json, row 1, column answers: the context has no 'Oslo' at character 3"):
        load_task(SimpleNamespace(task="squad", data_dir=tmp_path))


@pytest.mark.parametrize("model", ["bert-tiny", "bart"])
def test_right_logits_give_the_right_answers(squad, bart, tmp_path, model):
    """The labels of the pieces yield the exact answers, also for contexts longer than a piece."""
    name = str(bart) if model == "bart" else model
    settings = config(
        f"--task squad --data_dir {squad} --model {name} --max_length 16 --bits 8 --max_steps 0", tmp_path
    )
    prepared = make_plan(settings).prepared
    pieces = prepared.validation["validation"]
    assert len(pieces) > 12  # of 12 questions
    starts, ends = (np.full((len(pieces), 16), -5.0) for _ in range(2))
    for row, piece in enumerate(pieces):
        if piece["start_positions"]:
            starts[row, piece["start_positions"]] = ends[row, piece["end_positions"]] = 5.0
    judged = prepared.split_metrics["validation"](SimpleNamespace(predictions=(starts, ends)))
    assert judged == {"f1": 1.0, "exact_match": 1.0}
    starts[0, 0] = np.nan
    assert np.isnan(prepared.split_metrics["validation"](SimpleNamespace(predictions=(starts, ends)))["f1"])


def test_the_best_span_is_brute_forces():
    generator = np.random.default_rng(0)
    start, end = generator.normal(size=(2, 40))
    allowed = generator.random(40) < 0.8
    spans = [
        (start[i] + end[j], i, j) for i in range(40) for j in range(i, min(i + 30, 40)) if allowed[i] and allowed[j]
    ]
    assert best_span(start, end, allowed) == pytest.approx(max(spans))


def test_questions_without_an_answer():
    offsets = np.array([[-1, -1], [0, 4], [5, 9]])
    metrics = SpanMetrics(["Rome Oslo"] * 2, [["Oslo"], []], Pieces([0, 1], [offsets, offsets]))
    starts = np.array([[0.0, 1, 5], [9, 1, 2]])
    assert metrics.texts(starts, starts) == ["Oslo", ""]
    assert metrics(SimpleNamespace(predictions=(starts, starts))) == {"f1": 1.0, "exact_match": 1.0}
    assert span_of({"text": [], "answer_start": []}, offsets) == (0, 0)
    assert span_of({"text": ["Oslo"], "answer_start": [5]}, offsets) == (2, 2)


def test_squads_own_examples():
    """Computed by hand with the rules of the published script."""
    assert exact_match("The  Cat!", "cat") == 1 and exact_match("cats", "cat") == 0
    assert token_f1("the black cat", "a cat sat") == pytest.approx(0.5)  # of 2 and 2 words, 1 in common
    assert token_f1("", "") == 1 and token_f1("cat", "") == 0 and token_f1("x x y", "x z") == pytest.approx(0.4)


def test_rouge_by_hand():
    scores = rouge(["the cat sat"], ["the cat ran home"])
    assert scores["rouge1"] == pytest.approx(4 / 7) and scores["rouge2"] == pytest.approx(2 / 5)
    assert scores["rougeL"] == pytest.approx(4 / 7)


PTQ = "--max_steps 0 --bits 8 --quantizer fixed --remove_padding --calibration_samples 8"


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("bert-tiny", "--max_steps 8 --search --target_bits 6"),
        ("bart", f"{PTQ} --gamma_migration --observer avg_prune_minmax"),
    ],
    ids=["search", "ptq"],
)
def test_questions_from_flags_to_record(squad, bart, tmp_path, model, flags):
    name = str(bart) if model == "bart" else model
    settings = config(f"--task squad --data_dir {squad} --model {name} {flags}", tmp_path)
    record = run(settings)
    metrics = record["metrics"]["validation"]
    assert record["status"] == "finished" and record["metric"] == "f1"
    assert 0 <= metrics["exact_match"] <= metrics["f1"] <= 1 and metrics["n"] == 12
    loaded = load_model(settings.run_folder)
    assert bool(added(loaded).shortcuts) == ("gamma" in flags)


@pytest.mark.parametrize("flags", ["--max_steps 6 --search", f"{PTQ} --gamma_migration --observer avg_prune_minmax"])
def test_bart_tells_classes_apart(bart, tmp_path, flags):
    for split, count in (("train", 48), ("validation", 16)):
        rows = [f"{NAMES[i % 2]} is here,{PLACES[i % 3]},{i % 2}" for i in range(count)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["sentence1,sentence2,label", *rows]))
    settings = config(f"--task mrpc --data_dir {tmp_path} --model {bart} {flags}", tmp_path / "runs")
    record = run(settings)
    assert record["status"] == "finished" and record["metrics"]["validation"]["n"] == 16
    assert not any(name.startswith("classification_head") for name in record["assignment"])
    logits = load_model(settings.run_folder)(**make_plan(settings).prepared.example_inputs).logits
    assert logits.shape == (1, 2) and logits.isfinite().all()


@pytest.mark.parametrize("task", ["cnn_dailymail", "xsum"])
def test_summaries_from_flags_to_record(articles, bart, tmp_path, task):
    """The search and Outlier Suppression work on an encoder-decoder."""
    flags = f"--max_target_length 8 --task {task} --data_dir {articles} --model {bart}"
    more = "--max_steps 8 --search --target_bits 6" if task == "xsum" else (
        f"{PTQ} --gamma_migration --observer avg_prune_minmax --num_beams 2"
    )  # fmt: skip
    settings = config(f"{flags} {more}", tmp_path)
    record = run(settings)
    metrics = record["metrics"]["validation"]
    assert record["status"] == "finished" and record["metric"] == "rougeL" and metrics["n"] == 8
    assert 0 <= metrics["rougeL"] <= metrics["rouge1"] <= 1
    model = load_model(settings.run_folder)
    plan = make_plan(settings)
    batch = plan.prepared.data_collator([plan.prepared.validation["validation"][i] for i in range(8)])
    again = rouge(plan.prepared.writer.write(model, batch), plan.prepared.writer.references["validation"])
    assert again["rougeL"] == pytest.approx(metrics["rougeL"], abs=1e-9)


def test_a_trained_model_writes_what_it_learned(articles, bart, tmp_path):
    flags = "--max_steps 80 --learning_rate 1e-2 --train_batch_size 24 --method float"
    plan_flags = f"--task xsum --data_dir {articles} --model {bart} --max_target_length 8 --seed 1 {flags}"
    metrics = run(config(plan_flags, tmp_path))["metrics"]["validation"]
    assert metrics["rougeL"] > 0.5, metrics


def test_encoders_write_no_summaries(articles, tmp_path):
    settings = config(f"--task xsum --data_dir {articles} --model bert-tiny --bits 8", tmp_path)
    with pytest.raises(UserError, match="--model bert: writes no summaries; choose bart"):
        make_plan(settings)


def test_a_decoders_padding_is_left_out_of_ranges(bart):
    from transformers import AutoModelForSeq2SeqLM

    from quant.convert import calibrate, quantize_model
    from quant.formats import IntFormat
    from quant.quantizers.quantizer import QuantizerConfig

    activation = QuantizerConfig(range="calibrated", observer="minmax", symmetric=False, ignore_padding=True)
    scales = []
    for pad in (1, 40):
        torch.manual_seed(0)
        settings = BartConfig.from_pretrained(bart, vocab_size=50)
        model = AutoModelForSeq2SeqLM.from_config(settings).eval()
        ids = torch.arange(5, 21).view(2, 8)
        mask = torch.ones_like(ids)
        mask[0, 5:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        written = torch.roll(ids, 1, 1).masked_fill(mask == 0, pad)
        batch = {"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask, "decoder_input_ids": written}
        modules = quantize_model(model, exclude=["lm_head"], formats=[IntFormat(8)], activation=activation)
        calibrate(model, modules, [{**batch, "labels": labels}])
        scales.append({name: m.input_quantizer.grids["int8"].scale.item() for name, m in modules.items()})
    assert len(scales[0]) == 16 and scales[0] == scales[1]

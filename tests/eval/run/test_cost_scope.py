"""`--cost_scope file`: a run's cost is the size of its packed export, and every text about it says what it counts."""

import json
from dataclasses import replace

import pytest

from eval.config.parser import parse
from eval.eval_run import main
from eval.export.__main__ import main as export
from eval.latency import pairs_of
from eval.report.records import read_run
from eval.run.outcome import captions, scope_of
from eval.run.plan import make_plan, search_space
from eval.run.trainer import compile_mode
from quant.convert import quantize_model
from quant.errors import UserError
from quant.formats import FLOAT, parse_format


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text and the configuration of a decoder whose head is its embedding."""
    folder = tmp_path_factory.mktemp("scope")
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 96, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    (folder / "llama").mkdir()
    (folder / "llama" / "config.json").write_text(json.dumps({"model_type": "llama", **sizes, **heads}))
    lines = [f"the {n}th line says that {n} times {n} is {n * n}" for n in range(40)]
    (folder / "text").mkdir()
    for name in ("train", "validation"):
        (folder / "text" / f"{name}.txt").write_text("\n".join(lines))
    return folder


def flags(place, *more):
    run = f"--task {place}/text --model {place}/llama --from_scratch --max_length 16 --max_train_samples 8".split()
    run += f"--max_eval_samples 4 --max_steps 0 --search_space 4,8 --output_root_dir {place}/out".split()
    return [*run, "--report_to", "none", "--observer", "minmax", *more]


def test_a_run_weighs_what_its_packed_file_weighs(place, capsys):
    asked = flags(place, "--method", "measured", "--cost_scope", "file", "--target_bits", "6.5", "--run_id", "measured")
    assert main(asked) == 0
    told = capsys.readouterr().out
    assert "MiB of the whole file (target" in told and "outside it" not in told
    folder = place / "out" / "text" / "default" / "measured"
    record = json.loads((folder / "result.json").read_text())
    assert record["cost_scope"] == "file" and record["cost"] <= record["cost_target"]
    assert record["costs"]["total"] == record["cost"] > record["costs"]["memory"]
    assert record["assignment"]["model.embed_tokens"][1] == "float"
    assert record["assignment"]["model.embed_tokens"][0] == record["assignment"]["lm_head"][0]
    assert record["assignment"]["lm_head"][1] != "float"
    assert read_run(folder).costs["memory"] == record["cost"]
    assert export([str(folder), "--format", "packed", "--output_dir", str(place / "packed")]) == 0
    verdict = json.loads((place / "packed" / "export.json").read_text())
    parts = verdict["size"]["parts"]
    assert sum(parts.values()) - parts["header"] == pytest.approx(record["cost"] * 2**20, rel=1e-3)
    assert verdict["metrics"]["exported"] == record["metrics"]
    assert verdict["cost"]["exported"] == pytest.approx(record["cost"])


def test_the_scope_decides_which_layers_there_are(place):
    layers = {}
    for scope in ("searched", "file"):
        plan = make_plan(parse(flags(place, "--method", "measured", "--weight_only_search", "--cost_scope", scope)))
        layers[scope] = set(plan.layers)
        table = search_space(plan).assignment([0] * search_space(plan).num_decisions)
    assert layers["file"] - layers["searched"] == {"model.embed_tokens", "lm_head"}
    assert table["model.embed_tokens"][1] == FLOAT
    with_head = make_plan(
        parse(flags(place, "--method", "measured", "--cost_scope", "file", "--no_quantize_classifier"))
    )
    assert "lm_head" not in with_head.layers and "model.embed_tokens" in with_head.layers


def test_an_impossible_budget_is_one_line_with_the_smallest_file(place, capsys):
    asked = flags(place, "--method", "measured", "--cost_scope", "file", "--max_memory", "0.01")
    plan = make_plan(parse(flags(place, "--method", "measured", "--cost_scope", "file", "--target_bits", "6")))
    low, _ = search_space(plan).cost_range(plan.profiles, "memory")
    with pytest.raises(UserError) as error:
        make_plan(parse(asked))
    assert str(error.value).startswith("--max_memory 0.01 MiB") and f"{low:.6g} to" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_dry_run_says_what_the_cost_counts(place, capsys):
    assert main(flags(place, "--method", "measured", "--cost_scope", "file", "--target_bits", "6", "--dry_run")) == 0
    assert "cost under --cost_scope file: memory of the whole file" in " ".join(capsys.readouterr().out.split())
    assert main(flags(place, "--method", "measured", "--target_bits", "6", "--dry_run")) == 0
    assert "--cost_scope" not in capsys.readouterr().out


def test_captions_name_each_scope_of_a_table():
    assert scope_of({}) == "searched"
    both = captions(scope for scope in ("file", "searched", "file"))
    assert len(both) == 3 and "searched layers alone" in both[0] and "whole file" in both[1]
    assert len(captions(["searched"])) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--bits", "4", "--quantize_embeddings"], "--quantize_embeddings contradicts --cost_scope file"),
        (["--method", "float"], "--cost_scope file has no effect here"),
    ],
)
def test_flags_that_contradict_the_scope_are_refused(place, more, message):
    run = [flag for flag in flags(place) if flag not in ("--search_space", "4,8", "--observer", "minmax")]
    with pytest.raises(UserError, match=message):
        parse([*run, "--cost_scope", "file", *more])


def test_latencies_of_an_embedding_are_of_its_weights_formats(place):
    plan = make_plan(parse(flags(place, "--method", "measured", "--cost_scope", "file", "--target_bits", "6")))
    modules = quantize_model(plan.bundle.model, include=plan.layers)
    int4, int8 = parse_format("int4"), parse_format("int8")
    pairs = [(FLOAT, FLOAT), (int4, int4), (int4, int8), (int8, int8)]
    assert pairs_of(modules["model.embed_tokens"], pairs) == [(FLOAT, FLOAT), (int4, FLOAT), (int8, FLOAT)]
    assert pairs_of(modules["lm_head"], pairs) == pairs


@pytest.mark.parametrize(("weights", "mode"), [(10_000, "off"), (50_000_000, "auto")])
def test_without_training_large_weights_are_worth_compiled_kernels(place, weights, mode):
    plan = make_plan(parse(flags(place, "--method", "measured", "--target_bits", "6")))
    assert compile_mode(plan, 8) == "off"
    plan.profiles = [replace(plan.profiles[0], params=weights), *plan.profiles[1:]]
    assert compile_mode(plan, 8) == mode

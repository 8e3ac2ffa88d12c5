"""Runs of small decoders: rotation, quantized caches of keys and values, experts; their models can be loaded."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from eval.config.parser import parse
from eval.eval_run import run
from eval.run.plan import make_plan
from eval.run.record import outcome
from eval.saved_model import load_model
from quant.errors import UserError
from quant.formats import FLOAT, IntFormat, parse_format
from quant.mapped_weights import is_mapped
from quant.transforms.kv_cache import caches_of
from trainer.training.saved_files import WEIGHTS

LINES = [f"the {who} sees {number} hills and {number + 1} rivers" for who in ("cat", "dog") for number in range(40)]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with texts, and one with a very small Llama: tied head, norms of several gains, and a tokenizer."""
    folder = tmp_path_factory.mktemp("decoder")
    (folder / "texts").mkdir()
    (folder / "texts/train.txt").write_text("\n".join(LINES))
    (folder / "texts/validation.txt").write_text("\n".join(LINES[:9]))
    words = {word: index for index, word in enumerate(["[UNK]", "[EOS]", *sorted(set(" ".join(LINES).split()))])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[EOS]").save_pretrained(folder / "llama")
    config = LlamaConfig(
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"intermediate_size": 48, "vocab_size": len(words), "tie_word_embeddings": True, "eos_token_id": 1},
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder / "llama")
    return folder


def settings(places, flags):
    """A config of a run of that model."""
    start = "" if "--load_model_path" in flags or "--model_path" in flags else f"--model_path {places / 'llama'}"
    return parse(
        f"--task {places / 'texts'} {start} --max_length 16 --report_to none --quiet --device cpu --save_strategy no "
        f"--calibration_samples 8 --output_root_dir {places / 'output'} {flags}".split()
    )


def batch_of(plan):
    split = plan.prepared.validation["validation"]
    return plan.prepared.data_collator([split[i] for i in range(len(split))])


def test_a_rotated_run_is_that_of_another_basis_and_its_model_loads(places):
    plain, rotated = (settings(places, f"--bits 8 --max_steps 0 {flag}") for flag in ("--run_id plain", "--rotate"))
    own, record = run(plain), run(rotated)
    assert float_loss(rotated) == pytest.approx(float_loss(plain), rel=1e-5)
    assert record["metrics"]["validation"]["loss"] == pytest.approx(own["metrics"]["validation"]["loss"], rel=0.02)
    assert any("lm_head is no longer tied" in note for note in record["notes"])
    head = make_plan(plain).bundle.model.lm_head.weight
    assert record["costs"]["unsearched"] - own["costs"]["unsearched"] == pytest.approx(head.numel() * 2 / 2**20)
    model, plan = load_model(rotated.run_folder), make_plan(rotated)
    with torch.no_grad():
        loss = float(model(**batch_of(plan)).loss)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert loss == pytest.approx(record["metrics"]["validation"]["loss"], rel=1e-3)
    again = settings(places, f"--load_model_path {rotated.run_folder} --bits 8 --max_steps 0 --run_id again")
    assert run(again)["metrics"]["validation"]["loss"] == pytest.approx(loss, rel=0.02)


def test_weights_in_mapped_files_give_the_same_results_and_leave_no_file(places, tmp_path):
    """A model stored in bfloat16, as published ones are: the file is read in float32 either way."""
    model = LlamaForCausalLM.from_pretrained(places / "llama", dtype=torch.bfloat16)
    shutil.copytree(places / "llama", tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    start = f"--model_path {tmp_path / 'model'} --method measured --search_space 2,8 --max_steps 0"
    start += " --target_bits 3,6 --rounding gptq --rotate --sensitivity_examples 4"
    records = []
    for more in ("--run_id memory", "--offload_weights --run_id files"):
        config = settings(places, f"{start} {more}")
        records.append(run(config))
        assert all(is_mapped(p) == config.offload_weights for p in make_plan(config).bundle.model.parameters())
    memory, files = records
    assert files["assignment"] == memory["assignment"] and files["metrics"] == memory["metrics"]
    saved = [(settings(places, f"{start} --run_id {name}").run_folder / "model") for name in ("memory", "files")]
    (own, one), (other, two) = [((at / "config.json").read_text(), load_file(at / WEIGHTS)) for at in saved]
    assert own == other and one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert not list((places / "output").glob("*.mapped"))


def float_loss(config):
    plan = make_plan(config)
    with torch.no_grad():
        return float(plan.bundle.model.eval()(**batch_of(plan)).loss)


def test_models_without_a_residual_stream_and_float_runs_are_refused(places):
    with pytest.raises(UserError, match="--rotate contradicts --method float"):
        settings(places, "--method float --rotate")
    convnet = parse(["--task", "digits", "--model", "convnet", "--bits", "4", "--rotate", "--quiet", "--device", "cpu"])
    with pytest.raises(UserError, match="--rotate: ConvNet has no residual stream"):
        make_plan(convnet)


@pytest.mark.parametrize("flags", ["--bits 8", "--method float"])
def test_a_run_with_a_cache_in_four_bits_tells_its_memory_and_loads(places, flags):
    config = settings(places, f"{flags} --max_steps 0 --quantize_kv_cache 4 --kv_cache_tokens 1000")
    record = run(config)
    per_token = 2 * 2 * 2 * (8 * 4 + 16 + 4) / 8  # layers, keys and values, heads; head_dim 8, fp16 scale, zero point
    assert record["kv_cache_bytes_per_token"] == per_token
    assert record["kv_cache"]["memory"] == pytest.approx(1000 * per_token / 2**20)
    assert record["kv_cache"]["float_memory"] == pytest.approx(1000 * 2 * 2 * 2 * 8 * 2 / 2**20)
    assert set(record["kv_cache"]["formats"].values()) == {"int4"}
    (line,) = [line for line in outcome(record) if line.startswith("cache of keys and values")]
    assert "int4; 52 bytes a token" in line and "for 1000 tokens, 41% of float's" in line
    loss = record["metrics"]["validation"]["loss"]
    assert loss != record["float_metrics"]["validation"]["loss"] == pytest.approx(float_loss(config), rel=1e-3)
    model = load_model(config.run_folder)
    with torch.no_grad():
        assert float(model(**batch_of(make_plan(config))).loss) == pytest.approx(loss, rel=1e-4)
    assert {cache.formats for cache in caches_of(model).values()} == {(IntFormat(4), FLOAT)}


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("--bits 8 --quantize_kv_cache int4g32", "give int4"),
        ("--bits 8 --quantize_kv_cache 99", "unknown format '99'"),
        ("--bits 8 --quantize_kv_cache 4,8", "several formats are a choice of a search; give one, or --search"),
        ("--search --quantize_kv_cache 4,4", "names a format twice"),
        ("--method hawq_v2 --target_bits 6 --quantize_kv_cache 4,8", "it sees weights alone"),
        ("--bits 8 --kv_cache_tokens 5", "--kv_cache_tokens 5 has no effect here: it needs --quantize_kv_cache"),
    ],
)
def test_wrong_formats_of_caches_are_refused_before_a_model_loads(places, flags, why):
    with pytest.raises(UserError, match=why):
        settings(places, flags)


@pytest.mark.parametrize("flags", ["--method measured --max_steps 0", "--search --max_steps 8 --learning_rate 1e-3"])
def test_a_search_chooses_the_format_of_each_cache_within_the_budget_of_memory(places, flags):
    flags += " --search_space int3,int4,int8 --weight_only_search --target_bits 5 --kv_cache_tokens 2000"
    config = settings(places, f"{flags} --quantize_kv_cache 4,fp8 --train_batch_size 4")
    record = run(config)
    caches = [f"model.layers.{block}.self_attn.kv_cache" for block in (0, 1)]
    assert set(record["assignment"]) == {layer["name"] for layer in record["layers"]} > set(caches)
    assert all(record["assignment"][name] in (["int4", "float"], ["e4m3", "float"]) for name in caches)
    numbers = {layer["name"]: layer["params"] for layer in record["layers"]}
    assert [numbers[name] for name in caches] == [2000 * 2 * 2 * 8] * 2  # tokens, keys and values, heads, head_dim
    bits = {name: parse_format(weight).bits for name, (weight, _) in record["assignment"].items()}
    memory = sum(numbers[name] * bits[name] for name in numbers) / 8 / 2**20
    assert record["cost"] == pytest.approx(memory) and memory <= record["cost_target"]
    assert record["cost_target"] == pytest.approx(sum(numbers.values()) * 5 / 8 / 2**20)
    of_weights = sum(numbers[name] * bits[name] for name in numbers if name not in caches) / 8 / 2**20
    costs = record["costs"]
    assert costs["total"] == pytest.approx(of_weights + costs["overhead"] + costs["unsearched"])
    model = load_model(config.run_folder)
    assert {name: cache.formats[0].name for name, cache in caches_of(model).items()} == record["kv_cache"]["formats"]
    assert record["kv_cache"]["formats"] == {name: record["assignment"][name][0] for name in caches}
    with torch.no_grad():
        loss = float(model(**batch_of(make_plan(config))).loss)
    assert loss == pytest.approx(record["metrics"]["validation"]["loss"], rel=1e-3)


def test_the_experts_of_each_mixture_are_one_decision(places):
    folder = places / "mixtral"
    shutil.copytree(places / "llama", folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    words = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    config = MixtralConfig(
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"intermediate_size": 48, "vocab_size": words, "num_local_experts": 4, "eos_token_id": 1},
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(folder)
    flags = "--method measured --search_space int4g32,int8 --target_bits 6 --weight_only_search --max_steps 0"
    record = run(settings(places, f"{flags} --model_path {folder} --fuse_experts"))
    assert "experts" in record["run_id"]
    for block in (0, 1):
        experts = [f"model.layers.{block}.mlp.experts.{part}_proj" for part in ("gate_up", "down")]
        assert experts in record["decisions"].values()
        assert len({tuple(record["assignment"][name]) for name in experts}) == 1
    assert len(record["decisions"]) == len(record["assignment"]) - 2
    with pytest.raises(UserError, match="--fuse_experts: LlamaForCausalLM has no experts"):
        make_plan(settings(places, f"{flags} --fuse_experts"))
    with pytest.raises(UserError, match="--fuse_experts contradicts --single_decision"):
        settings(places, "--single_decision --fuse_experts")

"""Small decoders as users have them, in a folder with their tokenizer: search, perplexity, every export, generate."""

import math
import random
import re

import pytest

from tests.journeys.conftest import record_of

WORDS = ["the", "a", "cat", "dog", "bird", "sees", "likes", "hears", "big", "small", "red", "hill", "tree", "river"]
SHAPE = {
    **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"intermediate_size": 128, "max_position_embeddings": 128},
}
SEARCH = {
    "llama": "--search_space int4,int8 --target_bits 6 --per_channel --fuse_groups",
    "qwen": "--search_space int4g64,int4g32,int8g32 --target_bits 6 --fuse_groups --block_search depth",
    "gpt2": "--weight_only_search --search_space int3g32,nvfp4,mxfp8 --target_bits 6 --train scales",
}
EXPORTS = [
    *(("llama", "packed"), ("llama", "onnx"), ("llama", "compressed-tensors")),
    *(("qwen", "compressed-tensors"), ("qwen", "torchao"), ("qwen", "gguf")),
    ("gpt2", "packed"),
]
"""each kind of export once or twice, of what it is for"""


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    """Text to model, and three untrained models beside a byte-level BPE tokenizer, each in a folder called 'model'."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("decoders")
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=draw.randint(5, 12))) + " ." for _ in range(300)]
    (folder / "text").mkdir()
    (folder / "text/train.txt").write_text("\n".join(lines[:240]))
    (folder / "text/validation.txt").write_text("\n".join(lines[240:]))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet, end = pre_tokenizers.ByteLevel.alphabet(), "<|endoftext|>"
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end)
    ends = {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 0}
    configurations = {
        "llama": transformers.LlamaConfig(**SHAPE, **ends),
        "qwen": transformers.Qwen2Config(**SHAPE, **ends, tie_word_embeddings=True),
        "gpt2": transformers.GPT2Config(n_layer=2, n_embd=64, n_head=4, n_positions=128, **ends),
    }
    for name, settings in configurations.items():
        model = transformers.AutoModelForCausalLM.from_config(settings)
        model.generation_config.repetition_penalty = 1.5  # a setting that a user would miss
        model.save_pretrained(folder / name / "model")
        words.save_pretrained(folder / name / "model")
    return folder


RUN = (
    "python eval/eval_run.py --task lm --data_dir {folder}/text --model_path {folder}/{name}/model --search {search}"
    " --max_length 32 --max_steps 12 --train_batch_size 8 --learning_rate 1e-3 --calibration_samples 16 --device cpu"
    " --compile off --save_strategy no --report_to none --quiet --output_root_dir {folder}/output"
)


@pytest.fixture(scope="module", params=SEARCH)
def searched(request, decoders, command):
    """A finished search of each decoder: its name, its folder and what its command said."""
    ended = command(RUN.format(folder=decoders, name=request.param, search=SEARCH[request.param]))
    return request.param, run_folder(decoders, request.param), ended


def run_folder(decoders, name):
    """Where the run of a decoder is: each has a folder, though all models' folders are called 'model'."""
    (folder,) = (decoders / "output/lm/default").glob(f"*{name}-model-*search-*")
    return folder


def test_a_search_ends_in_its_budget_with_a_perplexity_that_its_model_has(searched):
    import torch
    import transformers

    from eval.saved_model import load_model
    from quant.quant_module import QuantModule

    name, folder, ended = searched
    record = record_of(folder)
    assert record["status"] == "finished" and record["cost"] <= record["cost_target"]
    assert f"perplexity {record['metrics']['validation']['perplexity']:.5g}" in ended.out
    if name != "llama":
        assert {activation for _, activation in record["assignment"].values()} == {"float"}
    model, tokenizer = load_model(folder), transformers.AutoTokenizer.from_pretrained(folder / "model")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantModule)}
    formats = {name: [format.name for format in layer.formats] for name, layer in layers.items()}
    assert formats == record["assignment"] and len(formats) > 4
    text = (folder.parents[2] / "../text/validation.txt").resolve().read_text()
    tokens = torch.tensor(tokenizer(text + "\n", add_special_tokens=False)["input_ids"])
    losses = []
    with torch.no_grad():
        for block in tokens.split(32):
            logits = model(input_ids=block[None]).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, block[1:], reduction="none"))
    expected = math.exp(torch.cat(losses).mean())
    assert record["metrics"]["validation"]["perplexity"] == pytest.approx(expected, rel=1e-3)


def test_the_reloaded_model_generates_with_the_settings_it_was_published_with(searched):
    import torch
    import transformers

    from eval.saved_model import load_model

    _, folder, _ = searched
    model, tokenizer = load_model(folder), transformers.AutoTokenizer.from_pretrained(folder / "model")
    assert model.generation_config.repetition_penalty == 1.5
    inputs = tokenizer("the big dog", return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=6, do_sample=False, repetition_penalty=1.0)[0]
    tokens = inputs["input_ids"][0]
    for _ in range(len(written) - len(tokens)):  # word by word, without a cache
        with torch.no_grad():
            tokens = torch.cat([tokens, model(input_ids=tokens[None]).logits[0, -1:].argmax(-1)])
    assert written.tolist() == tokens.tolist() and len(written) > len(inputs["input_ids"][0])


@pytest.mark.parametrize("name, kind", EXPORTS)
def test_an_export_has_the_runs_perplexity_and_generates(name, kind, decoders, command):
    if kind == "torchao":
        pytest.importorskip("torchao")
    if kind in ("compressed-tensors", "gguf"):
        pytest.importorskip(kind.replace("-", "_"))
    folder = finished(decoders, name, command)
    ended = command(f"python -m eval.export {folder} --format {kind}")
    told = re.search(r"perplexity ([\d.]+) -> ([\d.]+)", ended.out)
    assert told and float(told[2]) == pytest.approx(float(told[1]), rel=0.02), ended.out
    assert float(told[1]) == pytest.approx(record_of(folder)["metrics"]["validation"]["perplexity"], rel=1e-3)
    if kind != "onnx":  # an ONNX file answers for the next word, and has no loop
        assert generated(folder / "export" / kind, kind)


def finished(decoders, name, command):
    """The folder of a decoder's search, which is made here where a test alone was asked for."""
    if not list((decoders / "output").glob(f"*/*/*{name}-model-*search-*/result.json")):
        command(RUN.format(folder=decoders, name=name, search=SEARCH[name]))
    return run_folder(decoders, name)


def test_block_formats_that_onnx_would_store_wider_are_refused_with_what_holds_them(decoders, command):
    folder = finished(decoders, "gpt2", command)
    ended = command(f"python -m eval.export {folder} --format onnx", code=2)
    (line,) = ended.err.strip().splitlines()
    assert "over the target" in line and "--format packed stores every format as it is" in line
    assert not (folder / "export/onnx").exists()


def generated(folder, kind):
    """What an export, read as its card says, writes behind three words."""
    import transformers

    from eval.packed_model import load_packed, load_torchao

    readers = {
        "packed": load_packed,
        "torchao": lambda place: load_torchao(place)[0],
        "compressed-tensors": transformers.AutoModelForCausalLM.from_pretrained,
        "gguf": lambda place: transformers.AutoModelForCausalLM.from_pretrained(place, gguf_file="model.gguf"),
    }
    model, tokenizer = readers[kind](folder), transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("the big dog", return_tensors="pt")
    settings = transformers.GenerationConfig.from_pretrained(folder)  # transformers reads none beside GGUF
    assert (settings if kind == "gguf" else model.generation_config).repetition_penalty == 1.5
    written = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0]
    return tokenizer.decode(written[inputs["input_ids"].shape[1] :])

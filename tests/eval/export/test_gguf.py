"""GGUF files: transformers, and llama.cpp where it is installed, compute and split texts as the run did."""

import json
import random

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from eval.export.gguf_model import ARCHITECTURES, gguf_contents, reader_config, write_gguf
from eval.export.gguf_tokenizer import pre_tokenizer
from quant.convert import quantize_model
from quant.errors import UserError
from quant.formats import FLOAT, parse_format

pytest.importorskip("gguf")

WORDS = ["the", "a", "cat", "dog's", "bird", "sees", "likes", "12", "big", "small", "rød", "hill", "tree!", "river"]
END = "<|end|>"
SHAPE = {
    **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"intermediate_size": 128, "max_position_embeddings": 128, "vocab_size": 300},
    **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 32,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
FAMILIES = {
    "llama": transformers.LlamaConfig(**SHAPE, attention_bias=True, tie_word_embeddings=False),
    "tied": transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama3": transformers.LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "linear": transformers.LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    ),
    "mistral": transformers.MistralConfig(**SHAPE, head_dim=32, sliding_window=64),
    "qwen2": transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=32),
    "phi3": transformers.Phi3Config(**SHAPE),
    "gemma2": transformers.Gemma2Config(**SHAPE, **GEMMA),
    "gemma3": transformers.Gemma3TextConfig(**SHAPE | {"num_hidden_layers": 6}, **GEMMA),
}
FORMATS = ["int4g32", "uint4g32", "int5g32", "int8g64", "int4", "mxfp4", "float"]


def lines():
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(5, 12))) + "." for _ in range(60)]


def byte_level(split="gpt-2"):
    """A byte-level BPE as GPT-2's, or as Llama 3's with its split of text and a token in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if split == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, tokenizer.pre_tokenizer])
    elif split != "gpt-2":
        from tokenizers import Regex
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

        regex = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[split]), behavior="isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([regex, plain])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines(), trainer)
    if split == "smaug-bpe":
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def sentencepiece():
    """A BPE with bytes to fall back on, as Llama 2's tokenizer.json."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    first = ["<unk>", END, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=len(first) + 40, special_tokens=first, show_progress=False)
    tokenizer.train_from_iterator(lines(), trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    described = json.loads(tokenizer.to_str())  # bytes are pieces of the model and not special
    described["added_tokens"] = described["added_tokens"][:2]
    plain = Tokenizer.from_str(json.dumps(described))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token=END, eos_token=END, unk_token="<unk>", pad_token=END
    )


def quantized(family):
    """A model whose matrices are large enough to tell apart, each layer in another format."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter)) if parameter.dim() == 1 else parameter.mul_(4)
    formats = [parse_format(name) for name in FORMATS]
    head = ["lm_head"] if family.startswith("gemma") else []  # llama.cpp has no head beside the table for these
    modules = quantize_model(model, exclude=head, formats=formats)
    for place, module in enumerate(modules.values()):
        module.set_formats(formats[place % len(formats)], FLOAT)
    return model, modules


def written(family, folder, tokenizer=None):
    """A model, its file with config.json beside it, and what the file holds."""
    model, modules = quantized(family)
    contents = gguf_contents(model, modules)
    write_gguf(folder / "model.gguf", model, contents, tokenizer or byte_level(), "a decoder")
    config = json.dumps(reader_config(model.config.to_dict(), contents))
    (folder / "config.json").write_text(config)
    return model, modules, contents


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


TOKENS = torch.randint(1, 290, (1, 48), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_and_llama_cpp_compute_what_the_run_did(family, tmp_path):
    model, modules, contents = written(family, tmp_path)
    assert set(contents.layers) == set(modules) and {"Q4_0", "Q4_1", "Q5_0", "Q8_0"} <= {
        tensor.type for tensor in contents.tensors.values()
    }
    expected = logits_of(model)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", config=config, dtype=torch.float32
    )
    spread = expected.std().item()
    torch.testing.assert_close(logits_of(again.eval()), expected, rtol=0, atol=0.02 * spread)
    llama_cpp = pytest.importorskip("llama_cpp")
    engine = llama_cpp.Llama(
        str(tmp_path / "model.gguf"), n_ctx=64, logits_all=True, verbose=False, n_threads=1, flash_attn=False
    )
    engine.eval(TOKENS[0].tolist())
    found = torch.from_numpy(engine.scores[: TOKENS.shape[1]].copy())
    # llama.cpp rounds inputs to 8 bits in blocks of 32
    assert (found - expected[0]).std() < 0.03 * spread


def test_a_plain_llama_needs_nothing_but_its_file(tmp_path):
    model, *_ = written("tied", tmp_path)
    (tmp_path / "config.json").unlink()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    torch.testing.assert_close(logits_of(again.eval()), logits_of(model), rtol=0, atol=0.02)


@pytest.mark.parametrize("family", ["tied", "gemma2"])
def test_a_head_in_other_formats_than_its_table(family):
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family])
    assert "output.weight" not in gguf_contents(model, {}).tensors
    modules = quantize_model(model, ["lm_head"], formats=[parse_format("int4g32")])
    modules["lm_head"].set_formats(parse_format("int4g32"), FLOAT)
    contents = gguf_contents(model, modules)
    held = "output.weight" if family == "tied" else "token_embd.weight"
    assert contents.tensors[held].type == "Q4_0" and contents.weights == {held}
    assert contents.tensors["token_embd.weight"].type == ("F16" if family == "tied" else "Q4_0")
    assert bool(contents.notes) is (family == "gemma2")


TEXTS = ["the cat sees 1234 hills", "  dog's  river\n\nrød tree!", "a", "ünknown ☃ 12"]


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "smaug-bpe", "qwen2", "sentencepiece"])
def test_texts_are_split_alike(kind, tmp_path):
    tokenizer = sentencepiece() if kind == "sentencepiece" else byte_level(kind)
    if kind != "sentencepiece":
        assert pre_tokenizer(json.loads(tokenizer.backend_tokenizer.to_str())) == kind
    written("llama", tmp_path, tokenizer)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    expected = [tokenizer(text)["input_ids"] for text in TEXTS]
    if kind != "smollm":  # transformers' reader splits its texts as GPT-2 does, and drops a space in front of words
        same = range(len(TEXTS)) if kind != "sentencepiece" else (0, 2, 3)
        assert [again(TEXTS[place])["input_ids"] for place in same] == [expected[place] for place in same]
    llama_cpp = pytest.importorskip("llama_cpp")
    engine = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    assert [engine.tokenize(text.encode(), add_bos=True, special=True) for text in TEXTS] == expected


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_act": "relu"}, "llama has the activation silu, this model relu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "no rotary positions of the"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(change, match):
    settings = transformers.LlamaConfig(**SHAPE | change)
    with pytest.raises(UserError, match=match):
        gguf_contents(transformers.AutoModelForCausalLM.from_config(settings), {})


def test_other_models_tokenizers_and_tensors_are_refused(tmp_path):
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9))
    with pytest.raises(UserError, match=rf"of the types {', '.join(ARCHITECTURES)}, this model is a gpt2"):
        gguf_contents(gpt2, {})
    classifier = transformers.LlamaForSequenceClassification(FAMILIES["llama"])
    with pytest.raises(UserError, match=r"no place for score\.weight"):
        gguf_contents(classifier, {})
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"])
    with pytest.raises(UserError, match="no tokenizer like this run's: WordLevel"):
        write_gguf(tmp_path / "model.gguf", model, gguf_contents(model, {}), plain, "words")


def test_a_run_is_exported_and_its_card_runs(tmp_path, monkeypatch, capsys):
    from eval.config.parser import parse
    from eval.eval_run import run
    from eval.export.__main__ import export
    from eval.export.finished_run import finished_run

    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(FAMILIES["tied"]).save_pretrained(tmp_path / "model")
    byte_level().save_pretrained(tmp_path / "model")
    (tmp_path / "text").mkdir()
    for split in ("train", "validation"):
        (tmp_path / f"text/{split}.txt").write_text("\n".join(lines()))
    where = f"--task lm --data_dir {tmp_path}/text --model_path {tmp_path}/model --output_root_dir {tmp_path}/runs"
    flags = "--weight_bits int4g32 --max_steps 0 --max_length 32 --report_to none --quiet --save_strategy no"
    config = parse(f"{where} {flags} --compile off".split())
    record = run(config)
    verdict = export(finished_run(config.run_folder), "gguf", tmp_path / "gguf")
    before = record["metrics"]["validation"]["perplexity"]
    assert verdict["metrics"]["exported"]["validation"]["perplexity"] == pytest.approx(before, rel=2e-3)
    assert verdict["size"]["file_bytes"] == (tmp_path / "gguf/model.gguf").stat().st_size
    assert all(layer["as_chosen"] for layer in verdict["layers"].values())
    card = (tmp_path / "gguf/README.md").read_text()
    program = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "gguf")
    capsys.readouterr()
    exec(compile(program, "card", "exec"), {})  # the program that users copy
    assert capsys.readouterr().out.startswith("The")
    llama_cpp = pytest.importorskip("llama_cpp")
    engine = llama_cpp.Llama("model.gguf", n_ctx=32, logits_all=True, verbose=False, n_threads=1)
    tokens = byte_level()((tmp_path / "text/validation.txt").read_text() + "\n")["input_ids"]
    losses = []
    for start in range(0, len(tokens), 32):
        block = tokens[start : start + 32]
        engine.reset()
        engine.eval(block)
        scores = torch.from_numpy(engine.scores[: len(block) - 1].copy())
        losses.append(torch.nn.functional.cross_entropy(scores, torch.tensor(block[1:]), reduction="none"))
    assert torch.cat(losses).mean().exp().item() == pytest.approx(before, rel=5e-3)

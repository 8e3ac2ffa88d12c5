"""compressed-tensors checkpoints: loaded by transformers, they compute what the fake-quantized model computes."""

import json

import pytest
import torch

pytest.importorskip("compressed_tensors")

from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from quant.convert import calibrate, quantize_model, set_formats
from quant.errors import UserError
from quant.export.compressed_tensors import check_fused, export_compressed, mismatches
from quant.formats import FLOAT, parse_format
from quant.quantizers.quantizer import ACTIVATION, WEIGHT, QuantizerConfig

BATCH = {"input_ids": torch.arange(2, 18).view(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=30, max_position_embeddings=16, **sizes)).eval()


def quantized(pairs, weight=WEIGHT, activation=ACTIVATION):
    model = bert()
    pairs = [tuple(map(parse_format, pair.split("/"))) for pair in pairs]
    formats = {format for pair in pairs for format in pair if format != FLOAT}
    modules = quantize_model(model, include=["bert.encoder.*"], formats=formats, weight=weight, activation=activation)
    calibrate(model, modules, [BATCH])
    set_formats(modules, {name: pairs[place % len(pairs)] for place, name in enumerate(modules)})
    return model, modules


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_transformers_loads_the_models_logits(granularity, tmp_path):
    pairs = ["int8/int8", "int4/int8", "int4/float", "int3/int5", "e4m3/e4m3", "e4m3/float"]
    model, modules = quantized(pairs, QuantizerConfig(granularity=granularity))
    verdicts, weight_bytes = export_compressed(tmp_path, bert(), modules)
    assert all(verdict.as_chosen for verdict in verdicts.values())
    again = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**BATCH).logits, model(**BATCH).logits, rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and len(config["config_groups"]) == len(pairs)
    targets = [name for group in config["config_groups"].values() for name in group["targets"]]
    assert sorted(targets) == sorted(modules) and "classifier" in config["ignore"]
    rows = {name: (module.weight.shape, int(module.formats[0].bits)) for name, module in modules.items()}
    assert weight_bytes == sum(  # 32 codes take as many words as they have bits
        rows * 4 * -(-columns * bits // 32) for (rows, columns), bits in rows.values()
    )


VLLM = {
    **{"int8/int8": "int-quantized", "int8/float": "pack-quantized", "int4/float": "pack-quantized"},
    **{"e4m3/e4m3": "float-quantized", "e4m3/float": "naive-quantized", "int4g32/float": "pack-quantized"},
    **{"nvfp4/float": "nvfp4-pack-quantized", "mxfp4/float": "mxfp4-pack-quantized"},
}
"""pairs of formats that vLLM has a scheme for -> how its checkpoints store them"""
TRANSFORMERS = {"int4/int8": "pack-quantized", "int4/int4": "pack-quantized", "int3/float": "pack-quantized"}


def test_groups_are_stored_as_vllm_reads_them_and_verdicts_name_the_engine(tmp_path):
    stored = VLLM | TRANSFORMERS
    _, modules = quantized(list(stored))
    verdicts, _ = export_compressed(tmp_path, bert(), modules)
    assert all(verdict.as_chosen for verdict in verdicts.values())
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    formats = {name: group["format"] for group in config["config_groups"].values() for name in group["targets"]}
    for name, module in modules.items():
        pair = "/".join(format.name for format in module.formats)
        assert formats[name] == stored[pair]
        assert verdicts[name].engine == ("vLLM, transformers" if pair in VLLM else "transformers"), pair


def test_transformers_unpacks_4_bit_floats_to_bfloat16(tmp_path):
    model, modules = quantized(["nvfp4/float", "mxfp4/float"])
    export_compressed(tmp_path, bert(), modules)
    again = BertForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**BATCH).logits.float(), model(**BATCH).logits, rtol=0.05, atol=0.02)
    for name, module in modules.items():
        unpacked, rounded = again.get_submodule(name).weight.float(), module.weight_quantizer(module.weight)
        exact = module.formats[0].name == "mxfp4"  # nvfp4's product of two scales has more bits than bfloat16
        torch.testing.assert_close(unpacked, rounded, rtol=0 if exact else 2.0**-7, atol=0)


def test_transformers_loads_weights_in_groups(tmp_path):
    model, modules = quantized(["int4g16/float", "int3g16/float", "int8g16/float"])
    verdicts, _ = export_compressed(tmp_path, bert(), modules)
    assert all(verdict.as_chosen for verdict in verdicts.values())
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert {group["weights"]["group_size"] for group in config["config_groups"].values()} == {16}
    again = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**BATCH).logits, model(**BATCH).logits, rtol=1e-4, atol=1e-5)


def test_what_has_no_scheme_stays_in_float_and_is_told(tmp_path):
    model, modules = quantized(
        ["e2m1/int8", "mxfp8/float", "int8/e5m2", "float/float", "int4g12/float", "int4g16/int8", "uint4g16/float"]
    )
    verdicts, _ = export_compressed(tmp_path, bert(), modules)
    told = [verdict.why[0].rpartition(": ")[2] if verdict.why else "" for verdict in verdicts.values()][:7]
    assert told == [
        "compressed-tensors has no scheme for e2m1 weights",
        "compressed-tensors has no scheme for mxfp8 weights",
        "compressed-tensors has no scheme for e5m2 inputs",
        "",
        "its rows of 32 do not divide into groups of 12",
        "compressed-tensors has no int4g16 weights with int8 inputs",
        "transformers does not load the packed zero points of compressed-tensors",
    ]
    again = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    set_formats(modules, {name: (module.formats[0], FLOAT) for name, module in modules.items()})
    with torch.no_grad():
        torch.testing.assert_close(again(**BATCH).logits, model(**BATCH).logits, rtol=1e-4, atol=1e-5)


def test_symmetric_inputs_without_the_lowest_integer_are_told(tmp_path):
    symmetric = QuantizerConfig(range="calibrated", symmetric=True)
    model, modules = quantized(["int8/int2", "int4/e4m3"], QuantizerConfig(granularity="channel"), symmetric)
    verdicts, _ = export_compressed(tmp_path, bert(), modules)
    for name, verdict in verdicts.items():
        assert verdict.as_chosen == (modules[name].formats[1].name == "e4m3")
        assert verdict.as_chosen or "without the lowest one" in verdict.why[0]
    again = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    inputs = {name: FLOAT if not verdicts[name].as_chosen else module.formats[1] for name, module in modules.items()}
    set_formats(modules, {name: (module.formats[0], inputs[name]) for name, module in modules.items()})
    with torch.no_grad():
        torch.testing.assert_close(again(**BATCH).logits, model(**BATCH).logits, rtol=1e-4, atol=1e-5)


def test_layers_that_engines_fuse_must_share_a_format():
    _, modules = quantized(["int8/int8", "int4/int4", "int8/int8"])
    names = list(modules)
    with pytest.raises(UserError, match=r"fuse .*query int8/int8, .*key int4/int4.* search with --fuse_groups"):
        check_fused([names[:3]], modules)
    _, modules = quantized(["int8/int8"])
    check_fused([names[:3], names[3:4]], modules)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_rounded_values_in_float(tied, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": tied}
    model, plain = (LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval() for _ in range(2))
    plain.load_state_dict(model.state_dict())
    int4 = parse_format("int4")
    modules = quantize_model(model, include=["*", "model.embed_tokens"], formats=[int4])
    calibrate(model, modules, [{"input_ids": BATCH["input_ids"]}])
    set_formats(modules, dict.fromkeys(modules, (int4, FLOAT)))
    verdicts, _ = export_compressed(tmp_path, plain, modules)
    assert "this is an embedding" in verdicts["model.embed_tokens"].why[0]
    assert verdicts["lm_head"].as_chosen is not tied
    reasons = mismatches(modules)
    assert {name: reason is None for name, reason in reasons.items()} == {n: v.as_chosen for n, v in verdicts.items()}
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model(BATCH["input_ids"]).logits
        torch.testing.assert_close(again(BATCH["input_ids"]).logits, expected, rtol=1e-4, atol=1e-5)

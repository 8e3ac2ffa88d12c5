"""Model folders as users have them: with code of their own, without a vocabulary, cut short, of another shape."""

import io
import json
from types import SimpleNamespace

import pytest
import transformers

from eval.models import build_model
from quant.errors import UserError

TEXTS = [f"the {who} sees {number} hills" for who in ("cat", "dog") for number in range(50)]
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def config(task="mrpc", model=None, **flags):
    return SimpleNamespace(task=task, model=model, **{"seed": 0, **flags})


OWN_CODE = """
from pathlib import Path
Path(r"{marker}").write_text("ran")
from transformers import BertConfig as Own, BertForSequenceClassification as Model, PreTrainedTokenizerFast as Words
from transformers import ViTImageProcessor as Processor
"""
OWN_MAP = {
    "AutoConfig": "own.Own",
    "AutoModelForSequenceClassification": "own.Model",
    "AutoModelForImageClassification": "own.Model",
    "AutoModelForCausalLM": "own.Model",
}


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """A model folder of which every part (configuration, tokenizer, image processor) asks for code beside it; the code
    leaves a marker. The user says yes to whatever is asked."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "own.py").write_text(OWN_CODE.format(marker=tmp_path / "marker"))
    (folder / "config.json").write_text(json.dumps({"model_type": "strange", "auto_map": OWN_MAP}))
    words = {"tokenizer_class": "Words", "auto_map": {"AutoTokenizer": [None, "own.Words"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    pixels = {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "own.Processor"}}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    (folder / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder


REFUSED = r"needs code that it brings along \(auto_map\), which is never run"


@pytest.mark.parametrize("task", ["mrpc", "lm", "cifar10"])
@pytest.mark.parametrize("from_scratch", [False, True])
def test_a_folders_own_code_is_refused_and_never_run(task, from_scratch, own_code, tmp_path):
    flags = {"model": str(own_code), "from_scratch": True} if from_scratch else {"model_path": own_code}
    with pytest.raises(UserError, match=REFUSED) as error:
        build_model(config(task, **flags), 2, TEXTS)
    assert "\n" not in str(error.value) and str(own_code) in str(error.value)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("part", ["tokenizer", "processor"])
def test_nor_is_that_of_a_tokenizer_or_image_processor_alone(part, own_code, tmp_path):
    if part == "tokenizer":
        transformers.BertConfig(**SMALL).save_pretrained(own_code)
    else:
        small = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
        transformers.ResNetForImageClassification(small).save_pretrained(own_code)
    with pytest.raises(UserError) as error:
        build_model(config("mrpc" if part == "tokenizer" else "cifar10", model_path=own_code), 2)
    assert "\n" not in str(error.value) and not (tmp_path / "marker").exists()

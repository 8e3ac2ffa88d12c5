"""Text models by name: classifiers, scorers of candidate answers and language models, with their tokenizers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.tasks import Task
from quant.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from eval.model_bundle import ModelBundle

SCRATCH_VOCABULARY = 8192
"""most word pieces of a tokenizer trained here"""


@dataclass(frozen=True)
class TextModel:
    """A published architecture: where its weights are, and the configuration that builds it without them."""

    hub: str
    config: str
    """class of transformers that `settings` belong to"""
    settings: dict[str, Any] = field(default_factory=dict)
    max_length: int = 512


def _bert(layers: int, hidden: int) -> TextModel:
    """Google's family: 64 channels a head, feed-forward four times as wide."""
    heads = hidden // 64
    settings = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
    }
    return TextModel(f"google/bert_uncased_L-{layers}_H-{hidden}_A-{heads}", "BertConfig", settings)


def _gpt2(name: str, layers: int, hidden: int) -> TextModel:
    settings = {"n_layer": layers, "n_embd": hidden, "n_head": hidden // 64}
    return TextModel(f"openai-community/{name}", "GPT2Config", settings, max_length=1024)


MODELS: dict[str, TextModel] = {
    "bert-tiny": _bert(2, 128),
    "bert-mini": _bert(4, 256),
    "bert-small": _bert(4, 512),
    "bert-medium": _bert(8, 512),
    "bert": TextModel("google-bert/bert-base-uncased", "BertConfig"),
    "roberta": TextModel(
        "FacebookAI/roberta-base",
        "RobertaConfig",
        # 512 positions: RoBERTa numbers them from the padding index on.
        {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    ),
    "gpt2": _gpt2("gpt2", 12, 768),
    "gpt2-medium": _gpt2("gpt2-medium", 24, 1024),
    "gpt2-large": _gpt2("gpt2-large", 36, 1280),
}


def build(config: Any, task: Task, num_labels: int, corpus: Iterable[str] | None) -> ModelBundle:
    """The text model of `config` with its tokenizer. UserError where it cannot be had."""
    import transformers

    from eval.model_bundle import ModelBundle
    from eval.pretrained import from_anywhere, load_pretrained

    auto = transformers.AutoModelForCausalLM if task.kind == "lm" else transformers.AutoModelForSequenceClassification
    head: dict[str, Any] = {}
    if task.kind != "lm":
        problem = "regression" if task.regression else "single_label_classification"
        head = {"num_labels": 1 if task.candidates else num_labels, "problem_type": problem}
    source = source_of(config)
    if getattr(config, "from_scratch", False):
        settings, limit = scratch_config(source)
        tokenizer = train_tokenizer(
            corpus or (), SCRATCH_VOCABULARY, limit, getattr(settings, "type_vocab_size", 0) > 1
        )
        settings.update({"vocab_size": len(tokenizer), **special_tokens(tokenizer), **head})
        check_causal(settings, task)
        model = auto.from_config(settings)
        notes = [f"random weights, a tokenizer of {len(tokenizer)} word pieces from the training texts"]
    else:
        check_causal(from_anywhere(transformers.AutoConfig.from_pretrained, source), task)
        tokenizer = from_anywhere(transformers.AutoTokenizer.from_pretrained, source)
        model, notes = load_pretrained(auto, source, **head)
        if tokenizer.pad_token is None:  # GPT-2 has none; what pads is masked, so any token will do
            tokenizer.pad_token = tokenizer.eos_token
            notes.append(f"padded with the token {tokenizer.pad_token!r}")
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = False
    limit = min(
        tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    )
    if task.candidates:
        from eval.text_nets import CandidateScorer

        model = CandidateScorer(model)
    return ModelBundle(model, task.kind, tokenizer=tokenizer, max_length=limit, notes=notes)


def source_of(config: Any) -> str:
    """The folder or Hub id that the model comes from; for `from_scratch`, also a name of `MODELS`."""
    path, name = getattr(config, "model_path", None), getattr(config, "model", None)
    if path is None:
        known = name in MODELS and not getattr(config, "from_scratch", False)
        return MODELS[name].hub if known else str(name)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"--model_path {path}: no such folder")
    if not (folder / "config.json").is_file():
        raise UserError(f"--model_path {path}: has no config.json; it should be a folder written by save_pretrained")
    return str(folder)


def scratch_config(source: str) -> tuple[PretrainedConfig, int]:
    """(configuration without weights, most tokens it has positions for)."""
    import transformers

    from eval.pretrained import from_anywhere

    if source in MODELS:
        spec = MODELS[source]
        return getattr(transformers, spec.config)(**spec.settings), spec.max_length
    settings = from_anywhere(transformers.AutoConfig.from_pretrained, source)
    return settings, getattr(settings, "max_position_embeddings", 512)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
    }


def check_causal(settings: PretrainedConfig, task: Task) -> None:
    """UserError where a task of language modelling gets an encoder, which sees the word it is asked for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    if task.kind == "lm" and settings.model_type in ENCODERS and not getattr(settings, "is_decoder", False):
        raise UserError(
            f"--model {settings.model_type}: an encoder cannot predict the next word; choose gpt2 or its like"
        )


def train_tokenizer(
    corpus: Iterable[str], vocabulary: int, max_length: int, token_types: bool
) -> PreTrainedTokenizerBase:
    """A lower-case WordPiece tokenizer of at most `vocabulary` pieces, the same for the same texts.

    `token_types`: also number the first and second text, for models that embed those numbers.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    texts = list(corpus)

    def word_pieces(vocabulary: dict[str, int]) -> Tokenizer:
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer

    def train(size: int, first: list[str]) -> dict[str, int]:
        tokenizer = word_pieces({})
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=first, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer.get_vocab()

    # The library numbers "##" letters in the order of a randomised hash table and breaks ties between pairs by those
    # numbers, so two trainings differ. A first pass that learns only letters lets us number them ourselves.
    letters = sorted(piece for piece in train(len(special), special) if piece not in special)
    if not letters:
        raise UserError("--from_scratch: the training texts are empty, there is nothing to train a tokenizer on")
    pieces = train(max(vocabulary, len(special) + len(letters)), special + letters)
    tokenizer = word_pieces(pieces)  # anew: in the one that was trained, letters count as special tokens
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, special.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", *(["token_type_ids"] if token_types else []), "attention_mask"],
        **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
    )

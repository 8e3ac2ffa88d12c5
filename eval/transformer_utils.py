"""Builds text models by name, with their tokenizers: classifiers, scorers of candidates, language models and others."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from eval.tasks import Task
from quant.errors import UserError
from trainer.training.saved_files import WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from eval.modeling.bundle import ModelBundle

Built: TypeAlias = "tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]"
"""model, tokenizer, notes"""
SCRATCH_VOCABULARY = 8192
"""largest vocabulary of a tokenizer that is trained for `from_scratch`"""


@dataclass(frozen=True)
class TextModel:
    """A published architecture: the repository of its weights, and the configuration to build it without them."""

    hub: str
    config: str
    """name of the configuration class in transformers, which takes `settings`"""
    settings: dict[str, Any] = field(default_factory=dict)


def _bert(layers: int, hidden: int) -> TextModel:
    """Return a model of Google's smaller BERTs: 64 channels per head, feed-forward layers four times as wide."""
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
    return TextModel(f"openai-community/{name}", "GPT2Config", settings)


_BART_BASE = {
    **{"d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072},
    **{"encoder_attention_heads": 12, "decoder_attention_heads": 12},
}
MODELS: dict[str, TextModel] = {
    "bert-tiny": _bert(2, 128),
    "bert-mini": _bert(4, 256),
    "bert-small": _bert(4, 512),
    "bert-medium": _bert(8, 512),
    "bert": TextModel("google-bert/bert-base-uncased", "BertConfig"),
    "roberta": TextModel(
        "FacebookAI/roberta-base",
        "RobertaConfig",
        {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    ),
    "bart": TextModel("facebook/bart-base", "BartConfig", _BART_BASE),
    "bart-large": TextModel("facebook/bart-large", "BartConfig"),
    "gpt2": _gpt2("gpt2", 12, 768),
    "gpt2-medium": _gpt2("gpt2-medium", 24, 1024),
    "gpt2-large": _gpt2("gpt2-large", 36, 1280),
}


def build(config: Any, task: Task, num_labels: int, corpus: Iterable[str] | None) -> ModelBundle:
    """Build the text model of a run with its tokenizer.

    Args:
        config: has `model`, `model_path` and `from_scratch`.
        task: the task, which determines the head.
        num_labels: outputs of the head.
        corpus: texts to train a tokenizer on, for `from_scratch`.

    Raises:
        UserError: if the model or its tokenizer is missing, damaged or unsuitable for the task.
    """
    head = head_of(task, num_labels)
    if getattr(config, "from_scratch", False):
        model, tokenizer, notes = build_scratch(str(config.model), task, head, corpus or ())
    else:
        model, tokenizer, notes = build_pretrained(config, task, head)
    return bundle_of(model, tokenizer, task, notes)


def build_saved(folder: Path, subject: str, task: Task, num_labels: int) -> ModelBundle:
    """Build the text model that a finished run saved, with its tokenizer, but without its weights.

    Args:
        folder: the folder of the saved model.
        subject: the flag and its value that name the run, for errors.
        task: the task, which determines the head.
        num_labels: outputs of the head.
    """
    from eval.modeling.pretrained import load_tokenizer, new_model, write_as_saved

    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise UserError(f"{subject}: has no {name}: its model is none for texts")
    tokenizer = load_tokenizer(str(folder))
    settings = configuration(str(folder))
    settings.update(head_of(task, num_labels))
    model = write_as_saved(new_model(auto_class(settings, task), settings), folder)
    return bundle_of(model, tokenizer, task, [])


def head_of(task: Task, num_labels: int) -> dict[str, Any]:
    """Return the settings of a configuration that determine the head; empty for models that generate text."""
    if task.candidates:
        return {"num_labels": 1}  # a score per candidate; CandidateScorer computes the loss
    if task.kind == "qa":
        return {"num_labels": 2}  # start and end of the answer
    if task.kind == "text":
        problem = "regression" if num_labels == 1 else "single_label_classification"
        return {"num_labels": num_labels, "problem_type": problem}
    return {}


def bundle_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, notes: list[str]) -> ModelBundle:
    """Combine a model with its tokenizer, and adjust their padding tokens and maximum length to each other.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        task: the task.
        notes: notes on weights that are new; empty if all were loaded.
    """
    from eval.modeling.bundle import ModelBundle
    from eval.modeling.pretrained import check_vocabulary
    from eval.modeling.text_nets import CandidateScorer

    check_vocabulary(tokenizer, model)
    trained = not notes
    if tokenizer.pad_token is None:  # GPT-2 has none; padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
        notes.append(f"padded with the token {tokenizer.pad_token!r}")
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = False
    model.config.architectures = [type(model).__name__]  # names the head when the configuration is loaded
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions_of(model))
    return ModelBundle(
        CandidateScorer(model) if task.candidates else model,
        task.kind,
        tokenizer=tokenizer,
        max_length=tokenizer.model_max_length,
        notes=notes,
        trained=trained,
    )


def build_scratch(name: str, task: Task, head: dict[str, Any], corpus: Iterable[str]) -> Built:
    """Build a model with random weights, and train a tokenizer for it.

    Args:
        name: a name of `MODELS`, a folder or a Hub id.
        task: the task.
        head: settings of the head, see `head_of`.
        corpus: texts to train the tokenizer on.
    """
    from eval.modeling.bundle import RANDOM_WEIGHTS
    from eval.modeling.pretrained import new_model

    settings = configuration(name)
    tokenizer = train_tokenizer(corpus, SCRATCH_VOCABULARY, getattr(settings, "type_vocab_size", 0) > 1)
    settings.update({"vocab_size": len(tokenizer), **special_tokens(tokenizer), **head})
    if getattr(settings, "is_encoder_decoder", False):  # the defaults are ids of the published vocabulary
        ends = {
            "decoder_start_token_id": tokenizer.sep_token_id,
            "forced_eos_token_id": None,
            "forced_bos_token_id": None,
        }
        settings.update(ends)
    model = new_model(auto_class(settings, task), settings)
    return model, tokenizer, [f"{RANDOM_WEIGHTS}, a tokenizer of {len(tokenizer)} word pieces from the training texts"]


def build_pretrained(config: Any, task: Task, head: dict[str, Any]) -> Built:
    """Load a model with its weights and its own tokenizer."""
    from eval.modeling.pretrained import check_weights, load_pretrained, load_tokenizer

    name, path = str(getattr(config, "model", None) or ""), getattr(config, "model_path", None)
    folder = weights_folder(Path(path).expanduser(), name) if path else None
    source = str(folder) if folder else MODELS[name].hub if name in MODELS else name
    if folder is None and Path(source).is_dir():
        check_weights("--model", Path(source))
    tokenizer = load_tokenizer(source)
    bare = folder is not None and not (folder / "config.json").is_file()
    settings = configuration(name if bare else source)
    settings.update({**({"vocab_size": len(tokenizer)} if bare else {}), **head})
    as_stored = getattr(config, "offload_weights", False)
    model, notes = load_pretrained(auto_class(settings, task), source, as_stored=as_stored, config=settings)
    return model, tokenizer, notes


def weights_folder(path: Path, name: str) -> Path:
    """Return the folder of `--model_path`; raise UserError unless it holds weights, tokenizer and configuration.

    Args:
        path: the folder, or the weights file in it.
        name: the value of --model; a known name makes the configuration optional.
    """
    from eval.modeling.pretrained import check_weights

    folder = path.parent if path.is_file() else path
    if not folder.is_dir():
        raise UserError(f"--model_path {path}: no such file or folder")
    if path.is_file() and path.name != WEIGHTS:
        raise UserError(f"--model_path {path}: text models are read from {WEIGHTS}; call it so, or give its folder")
    check_weights("--model_path", folder)
    for pattern in ("tokenizer_config.json", "model*.safetensors" if name in MODELS else "config.json"):
        if not any(folder.glob(pattern)):
            raise UserError(f"--model_path {path}: has no {pattern}; save_pretrained writes it")
    return folder


def configuration(source: str) -> PretrainedConfig:
    """Return the configuration of a name of `MODELS`, a folder or a Hub id."""
    import transformers

    from eval.modeling.pretrained import from_anywhere

    if source in MODELS:
        known = MODELS[source]
        return getattr(transformers, known.config)(**known.settings)
    return from_anywhere(transformers.AutoConfig.from_pretrained, source, trust_remote_code=False)


def positions_of(model: PreTrainedModel) -> int:
    """Return the number of tokens that the model has positions for. RoBERTa starts after its padding index."""
    from torch import nn

    total = getattr(model.config, "max_position_embeddings", 10**9)  # relative positions are unlimited
    words = model.get_input_embeddings()
    offsets = [
        table.padding_idx + 1
        for table in model.modules()
        if isinstance(table, nn.Embedding) and table is not words and table.num_embeddings == total
        if table.padding_idx is not None
    ]
    return total - max(offsets, default=0)


def auto_class(settings: PretrainedConfig, task: Task) -> Any:
    """Return the Auto class of transformers that builds a model for the task.

    Raises:
        UserError: for language modelling with an encoder, which sees the token to predict; or for summaries with a
            model that is not an encoder-decoder.
    """
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForQuestionAnswering,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
    )
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    if task.kind == "text":
        return AutoModelForSequenceClassification
    if task.kind == "qa":
        return AutoModelForQuestionAnswering
    if task.kind == "summary":
        if not getattr(settings, "is_encoder_decoder", False):
            raise UserError(
                f"--model {settings.model_type}: writes no summaries; choose bart or another encoder-decoder"
            )
        return AutoModelForSeq2SeqLM
    if settings.model_type in ENCODERS and not getattr(settings, "is_decoder", False):
        raise UserError(f"--model {settings.model_type}: an encoder cannot predict the next word; choose gpt2")
    return AutoModelForCausalLM


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the settings of a configuration that hold ids of special tokens."""
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
    }


def train_tokenizer(corpus: Iterable[str], vocabulary: int, token_types: bool) -> PreTrainedTokenizerBase:
    """Train a lower-case WordPiece tokenizer. The result is deterministic.

    Args:
        corpus: the texts.
        vocabulary: most word pieces.
        token_types: also return token_type_ids, for models that embed them.

    Raises:
        UserError: if the texts are empty.
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

    # The library numbers "##" letters in the order of a randomised hash table, and breaks ties between pairs by those
    # numbers, so that two trainings differ. A first pass that learns only letters allows to fix their order.
    letters = sorted(piece for piece in train(len(special), special) if piece not in special)
    if not letters:
        raise UserError("--from_scratch: the training texts are empty, there is nothing to train a tokenizer on")
    pieces = train(max(vocabulary, len(special) + len(letters)), special + letters)
    tokenizer = word_pieces(pieces)  # a new one: in the trained one, letters count as special tokens
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, special.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", *(["token_type_ids"] if token_types else []), "attention_mask"],
        **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
    )

"""Loads weights, configurations and tokenizers of transformers from a folder, the cache or the Hub, in that order."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from eval.hub import hub_answers, unreachable
from quant.errors import UserError

Loaded = TypeVar("Loaded")


def from_anywhere(load: Callable[..., Loaded], source: str, what: str = "", **options: Any) -> Loaded:
    """Call `load(source, **options)` for local files, and then for the Hub if it answers.

    Pass `trust_remote_code=False` to loaders of transformers: without it, they ask on the terminal whether to run code
    of the model. tests/test_architecture.py checks this.

    Args:
        load: a loader with the parameter `local_files_only`.
        source: a folder or a Hub id.
        what: start of the error message, if the loader's own message does not say what was loaded.
        options: further arguments of the loader.

    Raises:
        UserError: one line, within seconds, if neither the disk nor the Hub has it.
    """
    folder = Path(source).is_dir()
    try:
        return load(source, local_files_only=True, **options)
    except Exception as error:  # errors of damaged files (JSON, Rust, missing packages) have no common type
        if folder or not isinstance(error, OSError | ValueError):
            raise UserError(f"{'--model_path' if folder else '--model'} {source}: {what}{reason(error)}") from error
    if not hub_answers():
        raise unreachable(f"the model {source}")
    try:
        return load(source, **options)
    except Exception as error:
        raise UserError(f"--model {source}: {what}{reason(error)}") from error


def reason(error: Exception) -> str:
    """Return the cause of a loader's error in one line.

    The message on a model's own code is replaced, since that of transformers advises to enable it.
    """
    if "trust_remote_code" in str(error):
        return "needs code that it brings along (auto_map), which is never run; choose a model that transformers has"
    if isinstance(error, SafetensorError):
        return f"its weights are cut short or not safetensors: {error}"
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) < 200 else f"{said[:200]} ..."


def check_weights(flag: str, folder: Path) -> None:
    """Check that a folder holds weights as safetensors, and not a configuration alone.

    Raises:
        UserError: names the folder and `--from_scratch`.
    """
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{flag} {folder}: holds no weights (model.safetensors); save_pretrained writes them, or give "
            f"--model {folder} --from_scratch to start from random weights"
        )


def new_model(auto_class: Any, settings: PretrainedConfig) -> PreTrainedModel:
    """Build a model with random weights; raise UserError if its configuration does not suit `auto_class`."""
    try:
        return auto_class.from_config(settings, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, ZeroDivisionError, RuntimeError) as error:
        source = settings.name_or_path or settings.model_type
        raise UserError(
            f"--model {source}: builds no {auto_class.__name__.removeprefix('AutoModelFor')} model: {reason(error)}"
        ) from error


def write_as_saved(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Give a model the generation config saved in `folder`, if there is one, and return it."""
    file = folder / "generation_config.json"
    if file.is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_dict(json.loads(file.read_text()))
    return model


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or Hub id; raise UserError if its vocabulary is empty."""
    from transformers import AutoTokenizer

    failed = "its tokenizer cannot be read: "
    tokenizer = from_anywhere(AutoTokenizer.from_pretrained, source, failed, trust_remote_code=False)
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise UserError(
            f"--model_path {source}: its tokenizer has no vocabulary, every word would be unknown; a file is missing "
            "(tokenizer.json, vocab.txt or another)"
        )
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raise UserError if the tokenizer has more tokens than the model has embeddings."""
    words, rows = max(tokenizer.get_vocab().values()) + 1, len(cast(Any, model.get_input_embeddings()).weight)
    if words > rows:
        raise UserError(
            f"--model_path {tokenizer.name_or_path}: its tokenizer has {words} tokens and the model {rows} embeddings "
            "(vocab_size): they are of different models"
        )


def load_pretrained(
    auto_class: Any, source: str, *, as_stored: bool = False, **settings: Any
) -> tuple[PreTrainedModel, list[str]]:
    """Load a model in float32 from safetensors.

    Args:
        auto_class: a class such as `AutoModelForSequenceClassification`.
        source: a folder or a Hub id.
        as_stored: leave the weights in the dtype of the file, which is then read where it is used, and not into memory.
        settings: arguments of `from_pretrained`, such as `num_labels`.

    Returns:
        The model, and notes on the weights that are new, which only those of a classification head may be.

    Raises:
        UserError: if weights of the body or of a language modelling head are missing or of another shape;
            transformers would replace them by random ones.
    """
    model, info = from_anywhere(
        auto_class.from_pretrained,
        source,
        dtype="auto" if as_stored else torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **settings,
    )
    if as_stored:
        _check_buffers(model, source)
        model.config.dtype = torch.float32  # what the caller makes of the weights
    resized = {name: (tuple(before), tuple(after)) for name, before, after in info["mismatched_keys"]}
    new = set(info["missing_keys"])
    words = model.get_output_embeddings()
    for name in sorted(resized):
        if in_body(model, name) or (words is not None and model.get_submodule(name.rpartition(".")[0]) is words):
            before, after = resized[name]
            raise UserError(
                f"--model_path {source}: {name} is {before} in the file and {after} by the configuration "
                f"({len(resized)} such): only a head for other classes may differ"
            )
    if missing := sorted(name for name in new if in_body(model, name) and "pooler" not in name):
        raise UserError(
            f"--model_path {source}: has no {', '.join(missing[:3])} ({len(missing)} missing): another architecture?"
        )
    notes = [f"{name}: {before} in {source}, new {after}" for name, (before, after) in sorted(resized.items())]
    heads = sorted({name.rpartition(".")[0] for name in new} - {name.rpartition(".")[0] for name in resized})
    return model, notes + [f"{name} is new: {source} has none" for name in heads]


def _check_buffers(model: PreTrainedModel, source: str) -> None:
    """Raise UserError if tensors that no file holds are computed in another dtype than float32."""
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and buffer.dtype != torch.float32:
            raise UserError(
                f"--offload_weights: {source} computes {name} in {str(buffer.dtype).removeprefix('torch.')}, the type "
                "of its weights; save the model in float32 first"
            )


def in_body(model: PreTrainedModel, name: str) -> bool:
    """Return whether a weight belongs to the base model, not to a head."""
    if hasattr(model, model.base_model_prefix):
        return name.startswith(f"{model.base_model_prefix}.")
    words = model.get_output_embeddings()  # T5 has no base module around encoder and decoder
    return words is None or model.get_submodule(name.rpartition(".")[0]) is not words


def hub_file(repository: str, name: str) -> str:
    """Return the local path of a file of a Hub repository, downloaded unless it is in the cache."""
    from huggingface_hub import hf_hub_download

    return from_anywhere(partial(hf_hub_download, filename=name), repository)

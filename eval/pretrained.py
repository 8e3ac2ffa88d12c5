"""Weights, configurations and tokenizers of transformers, from a folder, the cache or the Hub, in that order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from eval.hub import hub_answers, unreachable
from quant.errors import UserError

Loaded = TypeVar("Loaded")


def from_anywhere(load: Callable[..., Loaded], source: str, **options: Any) -> Loaded:
    """`load(source, **options)` from the disk, else from the Hub; UserError, within seconds, where neither has it.

    Loaders of transformers have to be given `trust_remote_code=False`: left out, they ask on the terminal whether to
    run code that a model brings along (tests/test_architecture.py sees to it).
    """
    try:
        return load(source, local_files_only=True, **options)
    except (OSError, ValueError, SafetensorError) as error:
        if Path(source).is_dir():
            raise UserError(f"--model_path {source}: {reason(error)}") from error
    if not hub_answers():
        raise unreachable(f"the model {source}")
    try:
        return load(source, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"--model {source}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Why a loader gave up, in one line. What transformers says of a model's own code would have users switch it on."""
    if "trust_remote_code" in str(error):
        return "needs code that it brings along (auto_map), which is never run; choose a model that transformers has"
    return next(iter(str(error).splitlines()), type(error).__name__)


def load_pretrained(auto_class: Any, source: str, **settings: Any) -> tuple[PreTrainedModel, list[str]]:
    """A model in float32 with the head that `settings` ask for, and notes on what of it is new.

    Only safetensors are read. UserError where weights of the body are missing: it would train from noise, unnoticed.
    """
    model, info = from_anywhere(
        auto_class.from_pretrained,
        source,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **settings,
    )
    resized = {name: (tuple(before), tuple(after)) for name, before, after in info["mismatched_keys"]}
    body = f"{model.base_model_prefix}."
    lost = sorted(name for name in info["missing_keys"] if name.startswith(body) and "pooler" not in name)
    if lost:
        raise UserError(
            f"--model_path {source}: has no {', '.join(lost[:3])} ({len(lost)} missing): another architecture?"
        )
    notes = [f"{name}: {before} in {source}, new {after}" for name, (before, after) in sorted(resized.items())]
    new = sorted(
        {name.rpartition(".")[0] for name in info["missing_keys"]} - {name.rpartition(".")[0] for name in resized}
    )
    return model, notes + [f"{name} is new: {source} has none" for name in new]


def hub_file(repository: str, name: str) -> str:
    """Path of a file of a Hub repository, from the cache if it is there."""
    from huggingface_hub import hf_hub_download

    return from_anywhere(partial(hf_hub_download, filename=name), repository)

"""A model by name, ready for a task. Names are checked without importing torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval import transformer_utils, vision_utils
from eval.tasks import find_task
from quant.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from eval.model_bundle import ModelBundle

MODELS: dict[str, str] = {
    **dict.fromkeys(transformer_utils.MODELS, "text"),
    **dict.fromkeys(vision_utils.MODELS, "image"),
}
"""every model known by name -> 'text' or 'image'"""


def check_model(model: str, task: str) -> None:
    """UserError where `model` is neither known, a folder nor a Hub id, or does not do the kind of `task`."""
    kind = find_task(task).kind
    known = MODELS.get(model)
    if known is not None and known != ("image" if kind == "image" else "text"):
        names = ", ".join(name for name, other in MODELS.items() if other != known)
        raise UserError(f"--model {model}: takes {known}s, but --task {task} does not; choose one of {names}")
    if known is None and not ("/" in model or model.startswith(("timm:", "torchvision:")) or Path(model).is_dir()):
        raise UserError(
            f"--model {model}: no such model or folder; choose one of {', '.join(MODELS)}, "
            "timm:NAME, torchvision:NAME, a Hub id (owner/name) or a local folder"
        )


def build_model(config: Any, num_labels: int, tokenizer_corpus: Iterable[str] | None = None) -> ModelBundle:
    """The model of `config` for its task, with a head of `num_labels` outputs. UserError where it cannot be had.

    New weights depend on `config.seed` alone. `tokenizer_corpus`: texts to train a tokenizer on, for `from_scratch`.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    task = find_task(config.task)
    if getattr(config, "model", None):
        check_model(config.model, config.task)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(getattr(config, "seed", 0))
        if task.kind == "image":
            return vision_utils.build(config, task, num_labels)
        return transformer_utils.build(config, task, num_labels, tokenizer_corpus)

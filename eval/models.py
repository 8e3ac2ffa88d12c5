"""Builds the model of a run for its task. Names are checked without importing torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval import transformer_utils, vision_utils
from eval.data.loading import find_task
from eval.modeling.places import description, is_folder, starting_model
from eval.tasks import TASKS, Task
from quant.errors import UserError
from trainer.training.saved_files import WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import nn

    from eval.modeling.bundle import ModelBundle

MODELS: dict[str, str] = {
    **dict.fromkeys(transformer_utils.MODELS, "text"),
    **dict.fromkeys(vision_utils.MODELS, "image"),
}
"""name of a known model -> 'text' or 'image'"""


def check_model(model: str, task: str) -> None:
    """Raise UserError if `model` is no known name, folder or Hub id, or does not suit the kind of `task`."""
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
    """Build the model of a run for its task.

    New weights are drawn from `config.seed`, and do not depend on the global random state.

    Args:
        config: a `RunConfig`, or any object with some of its fields.
        num_labels: outputs of the head.
        tokenizer_corpus: texts to train a tokenizer on, for `from_scratch`.

    Raises:
        UserError: if the model is unknown, unreachable or damaged.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    task = find_task(config.task)
    start = starting_model(config)
    if getattr(config, "model", None):
        check_model(config.model, config.task)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(getattr(config, "seed", 0))
        if start is not None:
            return build_from_run(*start, config, task, num_labels)
        if task.kind == "image":
            return vision_utils.build(config, task, num_labels)
        return transformer_utils.build(config, task, num_labels, tokenizer_corpus)


def build_from_run(subject: str, folder: Path, config: Any, task: Task, num_labels: int) -> ModelBundle:
    """Build the float model of a finished run with its weights, tokenizer and image settings.

    The head is new if the number of classes differs. Quantization ranges are not loaded, since they belong to the
    formats of that run.

    Args:
        subject: the flag and its value that name the run, for errors.
        folder: the folder of its saved model.
        config: the config of the new run.
        task: the task of the new run.
        num_labels: outputs of the head.

    Raises:
        UserError: if the saved model is damaged, is another one than --model, or its weights were migrated.
    """
    from eval.modeling.bundle import copy_tensors, read_tensors
    from quant.transforms.migration import Migration

    described = description(folder, subject)
    build, name = described["build"], getattr(config, "model", None)
    saved = build.get("model")
    if name and saved and not is_folder(name) and not is_folder(saved) and alias(name) != alias(saved):
        raise UserError(f"--model {name}: {subject} holds {saved}; leave --model out")
    if Migration(**(described.get("migration") or {})).factors:
        raise UserError(
            f"{subject}: --gamma_migration or --smooth_quant has moved factors between its weights; "
            "start from the run that it started from"
        )
    if task.kind == "image":
        bundle = vision_utils.build_saved(folder, subject, build, config, task, num_labels)
    else:
        bundle = transformer_utils.build_saved(folder, subject, task, num_labels)
    tensors = read_tensors(folder / WEIGHTS, subject)
    weights = {name: tensor for name, tensor in tensors.items() if "_quantizer." not in name}
    resized = copy_tensors(bundle.model, weights, subject)
    bundle.notes += resized
    bundle.trained = not resized
    bundle.name = saved or name
    return bundle


def alias(name: str) -> str:
    """Return the library's name of a model for which there is an alias; any other name unchanged."""
    return vision_utils.ALIASES.get(name, name)


def build_architecture(
    task: str, model: str, num_labels: int, folder: Path, image_size: int | None = None
) -> nn.Module:
    """Build the module of a finished run, for its weights to be loaded into.

    Args:
        task: the run's task.
        model: the model's name; not used if the folder has a config.json.
        num_labels: outputs of the head.
        folder: where the run saved the model; has a config.json if it is a model of transformers.
        image_size: `image_size` of the run's `ModelBundle`.
    """
    import transformers

    from eval.modeling.pretrained import write_as_saved
    from eval.modeling.text_nets import CandidateScorer

    known = TASKS.get(task, Task("image", ()))  # the folder of another task may be gone; the defaults suffice
    if not (folder / "config.json").is_file():
        return vision_utils.build_named(alias(model), known, num_labels, image_size, scratch=True).model
    settings = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    inner = write_as_saved(getattr(transformers, settings.architectures[0])(settings), folder)
    return CandidateScorer(inner) if known.candidates else inner


def recompute_activations(model: nn.Module) -> None:
    """Enable gradient checkpointing: the backward pass recomputes the activations within each block.

    Raises:
        UserError: if the model's library does not support it.
    """
    from eval.modeling.text_nets import CandidateScorer
    from eval.modeling.vision_nets import ImageClassifier
    from trainer.training.batch_norm import ignore_recomputation

    ignore_recomputation(model)
    inner: Any = model.model if isinstance(model, CandidateScorer) else model
    inner = inner.net if isinstance(inner, ImageClassifier) else inner
    if getattr(inner, "supports_gradient_checkpointing", False):  # transformers; renamed in 5.23
        enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        return
    try:
        inner.set_grad_checkpointing(True)  # timm
    except (AttributeError, AssertionError):  # some timm models only have a stub of the method
        raise UserError(
            f"--gradient_checkpointing: {type(inner).__name__} has no way to recompute its activations; leave it out"
        ) from None


def published(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Build the published architecture of a known model, and an example input of one image or 128 tokens.

    Both are on the meta device: nothing is downloaded, initialised or kept in memory.
    """
    import torch
    import transformers

    if MODELS[name] == "text":
        known = transformer_utils.MODELS[name]
        settings = getattr(transformers, known.config)(**known.settings)
        with torch.device("meta"):
            tokens = torch.ones(1, 128, dtype=torch.long)
            if settings.is_encoder_decoder:
                # The default attention inspects the mask's values, which meta tensors do not have.
                model = transformers.AutoModelForSeq2SeqLM.from_config(
                    settings, attn_implementation="eager", trust_remote_code=False
                )
                return model, {"input_ids": tokens, "decoder_input_ids": tokens}
            model = transformers.AutoModelForSequenceClassification.from_config(settings, trust_remote_code=False)
            return model, {"input_ids": tokens}
    own = name in vision_utils.OWN
    task = find_task("digits" if name == "convnet" else "cifar10" if own else "imagenet-1k")
    with torch.device("meta"):
        bundle = vision_utils.build_named(alias(name), task, 10 if own else 1000, size=None, scratch=True)
        size = bundle.image_size or 8  # convnet takes any size; digits are 8x8
        return bundle.model, {"pixel_values": torch.zeros(1, bundle.in_channels, size, size)}

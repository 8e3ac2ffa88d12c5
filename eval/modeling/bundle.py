"""`ModelBundle`, which `build_model` returns, and loading of safetensors files into plain networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import Tensor, nn

from eval.modeling.vision_nets import ImageClassifier
from eval.tasks import Kind
from quant.errors import UserError
from trainer.training import checkpoint

if TYPE_CHECKING:  # takes a second to import, which image models need not spend
    from transformers import PreTrainedTokenizerBase

RANDOM_WEIGHTS = "random weights"
"""start of the note on a model without loaded weights"""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Pixels:
    """How an image becomes an input of a model.

    Its shorter side is resized to `side`, the central square of `window` pixels is normalised as
    (x / 255 - mean) / std, and the result is resized to `size`.
    """

    side: int
    window: int
    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int
    """PIL's number of the resizing filter"""


@dataclass
class ModelBundle:
    """A model with the Trainer's interface (tokens or `pixel_values`, and `labels`), and how to prepare its inputs."""

    model: nn.Module
    kind: Kind
    tokenizer: PreTrainedTokenizerBase | None = None
    max_length: int = 512
    """most tokens that the model has positions for"""
    image_size: int | None = None
    """side of the input in pixels; None: any, so that of the data is used"""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    in_channels: int = 3
    crop_fraction: float = 0.875
    """side of the central crop, as a share of the resized image's side"""
    resample: int = 2
    """PIL's number of the resizing filter: 2 bilinear, 3 bicubic"""
    notes: list[str] = field(default_factory=list)
    trained: bool = False
    """whether every weight was loaded, including those of the head"""
    name: str | None = None
    """name of the network if it was taken from the run that this one starts from, instead of --model"""

    @property
    def pixels(self) -> dict[str, Any]:
        """The preprocessing of images, which is saved with the model and read by `with_pixels`."""
        return {name: getattr(self, name) for name in PIXELS}

    def with_pixels(self, saved: Mapping[str, Any]) -> None:
        """Take over the preprocessing that `pixels` of another bundle returned."""
        for name in PIXELS:
            value = saved.get(name, getattr(self, name))
            setattr(self, name, tuple(value) if isinstance(value, list) else value)


PIXELS = ("mean", "std", "crop_fraction", "resample")


def load_weights(model: nn.Module, path: Path) -> list[str]:
    """Copy the tensors of a safetensors file (or of `model.safetensors` in a folder) into a model, by name.

    If the head has another number of classes, it keeps its new weights.

    Returns:
        A note on the head if it was not loaded, else an empty list.

    Raises:
        UserError: if any other tensor is missing, unknown or of another shape.
    """
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"--model_path {path}: no such file, or no model.safetensors in that folder")
    return copy_tensors(model, read_tensors(file, f"--model_path {path}"), f"--model_path {path}")


def read_tensors(file: Path, source: str) -> dict[str, Tensor]:
    """Read a safetensors file; raise UserError that names `source`, a flag and its value, if it is damaged."""
    try:
        return checkpoint.read_tensors(file)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{source}: {file.name} is cut short or not safetensors: {error}") from None


def copy_tensors(model: nn.Module, tensors: dict[str, Tensor], source: str) -> list[str]:
    """Copy tensors into a model as `load_weights` does; errors name `source`, a flag and its value."""
    if isinstance(model, ImageClassifier) and not any(name.startswith("net.") for name in tensors):
        model = model.net  # the library's own file has no prefix of our wrapper
    own = model.state_dict()
    head = last_layer(model)
    resized = [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
    wrong = [name for name in resized if name.rpartition(".")[0] != head]
    missing = [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    extra = [name for name in tensors if name not in own]
    for problem, names in (("has no", missing), ("does not know", extra), ("has another shape of", wrong)):
        if names:
            subject = "the model" if problem == "does not know" else "the file"
            raise UserError(f"{source}: {subject} {problem} {', '.join(names[:3])} ({len(names)} in all)")
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if name not in resized}, strict=False)
    return [f"head {head} resized to {own[name].shape[0]} classes" for name in resized[:1]]


def last_layer(model: nn.Module) -> str:
    """Return the name of the last Linear or Conv2d, which is the head of a plain network."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]

"""Image models of timm and torchvision behind the Trainer's interface."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torchvision
from torchvision.transforms import InterpolationMode

from eval.config.suggestions import did_you_mean
from eval.modeling.bundle import RANDOM_WEIGHTS, ModelBundle
from eval.modeling.pretrained import hub_file
from eval.modeling.vision_nets import ImageClassifier
from quant.errors import UserError

FILTERS = {"nearest": 0, "bilinear": 2, "bicubic": 3}
"""PIL's numbers of the resizing filters; `random` in a timm configuration stands for any"""
AUXILIARY = ("googlenet", "inception_v3")
"""torchvision's networks with auxiliary heads, which are left out"""


def build_timm(name: str, num_labels: int, size: int | None, scratch: bool) -> ModelBundle:
    """Build a model of timm.

    Args:
        name: timm's name of the model.
        num_labels: number of classes.
        size: side of the input in pixels; None: the model's own.
        scratch: use random weights instead of the safetensors file of its Hub repository.

    Raises:
        UserError: if timm is missing, or has no such model or no weights of it.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError(f"--model timm:{name}: needs the package timm (pip install timm)") from error
    if not timm.is_model(name.split(".")[0]):
        raise unknown("timm", name, timm.list_models())
    settings = timm.get_pretrained_cfg(name)
    overlay: dict[str, Any] = {}
    if not scratch:
        if settings is None or not settings.hf_hub_id:
            raise UserError(f"--model timm:{name}: has no weights on the Hub; give --from_scratch or --model_path FILE")
        overlay = {"file": hub_file(settings.hf_hub_id, "model.safetensors")}
    options: dict[str, Any] = {"img_size": size} if size and settings and settings.fixed_input_size else {}
    net = timm.create_model(
        name,
        pretrained=not scratch,
        pretrained_cfg_overlay=overlay,
        num_classes=num_labels,
        **options,
    )
    pixels = timm.data.resolve_model_data_config(net)
    notes = [RANDOM_WEIGHTS] if scratch else []
    if settings and not scratch and settings.num_classes != num_labels:
        notes = [f"head {settings.classifier} resized to {num_labels} classes"]
    return ModelBundle(
        ImageClassifier(net),
        "image",
        image_size=pixels["input_size"][-1],
        mean=pixels["mean"],
        std=pixels["std"],
        in_channels=pixels["input_size"][0],
        crop_fraction=pixels["crop_pct"],
        resample=FILTERS.get(pixels["interpolation"], FILTERS["bicubic"]),
        notes=notes,
        trained=not notes,
    )


def build_torchvision(name: str, num_labels: int, size: int | None, scratch: bool) -> ModelBundle:
    """Build a model of torchvision with random weights; its published weights are pickles, which are not read.

    Args:
        name: torchvision's name of the model.
        num_labels: number of classes.
        size: side of the input in pixels; None: the model's own.
        scratch: must be True.

    Raises:
        UserError: if torchvision has no such model, or `scratch` is False.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise unknown("torchvision", name, known)
    if not scratch:
        raise UserError(
            f"--model torchvision:{name}: its published weights are pickles, which are not read; "
            "give --from_scratch, --model_path FILE.safetensors, or the same model as timm:NAME"
        )
    options: dict[str, Any] = {"aux_logits": False, "init_weights": True} if name in AUXILIARY else {}
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    if size and "vit_" in name:
        options["image_size"] = size
    net = torchvision.models.get_model(name, num_classes=num_labels, **options)
    return ModelBundle(
        ImageClassifier(net),
        "image",
        image_size=preset.crop_size[0],
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        crop_fraction=preset.crop_size[0] / preset.resize_size[0],
        resample=FILTERS["bicubic" if preset.interpolation == InterpolationMode.BICUBIC else "bilinear"],
        notes=[RANDOM_WEIGHTS],
    )


def unknown(library: str, name: str, known: Iterable[str]) -> UserError:
    """Return the error for a name that the library does not know, with up to three similar names."""
    return UserError(f"--model {library}:{name}: {library} has no such model{did_you_mean(name, known, 3)}")

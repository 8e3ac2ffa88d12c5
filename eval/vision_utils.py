"""Image models by name: ours, transformers', timm's and torchvision's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.tasks import Task
from quant.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from eval.model_bundle import ModelBundle


@dataclass(frozen=True)
class HubModel:
    """A published architecture: where its weights are, and the configuration that builds it without them."""

    hub: str
    config: str
    """class of transformers that `settings` belong to"""
    settings: dict[str, Any] = field(default_factory=dict)
    image_size: int = 224


def _resnet(depths: tuple[int, ...], widths: tuple[int, ...], layer_type: str) -> HubModel:
    settings = {"depths": list(depths), "hidden_sizes": list(widths), "layer_type": layer_type}
    name = 2 + sum(depths) * (3 if layer_type == "bottleneck" else 2)
    return HubModel(f"microsoft/resnet-{name}", "ResNetConfig", settings)


def _efficientnet(version: int, width: float, depth: float, size: int, dropout: float, hidden: int) -> HubModel:
    settings = {
        "width_coefficient": width,
        "depth_coefficient": depth,
        "image_size": size,
        "dropout_rate": dropout,
        "hidden_dim": hidden,
    }
    return HubModel(f"google/efficientnet-b{version}", "EfficientNetConfig", settings, size)


def _deit(size: str, hidden: int) -> HubModel:
    settings = {"hidden_size": hidden, "num_attention_heads": hidden // 64, "intermediate_size": 4 * hidden}
    return HubModel(f"facebook/deit-{size}-patch16-224", "ViTConfig", settings)


HUB_MODELS: dict[str, HubModel] = {
    "resnet18": _resnet((2, 2, 2, 2), (64, 128, 256, 512), "basic"),
    "resnet50": _resnet((3, 4, 6, 3), (256, 512, 1024, 2048), "bottleneck"),
    # Width, depth and dropout: Tan & Le 2019, table of the reference implementation (efficientnet_builder.py).
    "efficientnet-b0": _efficientnet(0, 1.0, 1.0, 224, 0.2, 1280),
    "efficientnet-b1": _efficientnet(1, 1.0, 1.1, 240, 0.2, 1280),
    "efficientnet-b2": _efficientnet(2, 1.1, 1.2, 260, 0.3, 1408),
    "efficientnet-b3": _efficientnet(3, 1.2, 1.4, 300, 0.3, 1536),
    "efficientnet-b4": _efficientnet(4, 1.4, 1.8, 380, 0.4, 1792),
    "efficientnet-b5": _efficientnet(5, 1.6, 2.2, 456, 0.4, 2048),
    "efficientnet-b6": _efficientnet(6, 1.8, 2.6, 528, 0.5, 2304),
    "efficientnet-b7": _efficientnet(7, 2.0, 3.1, 600, 0.5, 2560),
    "mobilenetv2": HubModel("google/mobilenet_v2_1.0_224", "MobileNetV2Config"),
    "deit-tiny": _deit("tiny", 192),
    "deit-small": _deit("small", 384),
    "deit-base": _deit("base", 768),
}
CIFAR_RESNETS = {f"resnet{depth}": depth for depth in (20, 32, 44, 56)}
LIBRARY_MODELS = {"inceptionv3": "torchvision:inception_v3"}
MODELS = (*HUB_MODELS, *LIBRARY_MODELS, *CIFAR_RESNETS, "convnet")


def build(config: Any, task: Task, num_labels: int) -> ModelBundle:
    """The image model of `config`. A folder with its own configuration says itself what it is."""
    path = getattr(config, "model_path", None)
    name = getattr(config, "model", None)
    if path is not None and not Path(path).exists():
        raise UserError(f"--model_path {path}: no such file or folder")
    if path is None and name and Path(name).is_dir():
        path = name
    if path is not None and (Path(path) / "config.json").is_file():
        return build_pretrained(path, config, num_labels)
    name = LIBRARY_MODELS.get(name, name)
    if name is None:
        raise UserError(f"--model_path {path}: has no config.json, so --model NAME has to say what it is")
    if name in CIFAR_RESNETS or name == "convnet":
        return build_own(name, task, num_labels, config)
    if getattr(config, "from_scratch", False) or path is not None:
        return build_scratch(name, config, num_labels)
    return build_pretrained(HUB_MODELS[name].hub if name in HUB_MODELS else name, config, num_labels)


def build_pretrained(source: str, config: Any, num_labels: int) -> ModelBundle:
    """A model of transformers with its weights; size, mean and std are its own image processor's."""
    import transformers

    from eval.model_bundle import ModelBundle
    from eval.pretrained import from_anywhere, load_pretrained

    model, notes = load_pretrained(transformers.AutoModelForImageClassification, str(source), num_labels=num_labels)
    processor = from_anywhere(transformers.AutoImageProcessor.from_pretrained, str(source), use_fast=False)
    return ModelBundle(
        model,
        "image",
        image_size=getattr(config, "image_size", None) or side(processor),
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        in_channels=getattr(model.config, "num_channels", 3),
        notes=notes,
    )


def side(processor: Any) -> int:
    """Side of the square that the processor feeds the model."""
    size = getattr(processor, "crop_size", None) or processor.size
    return next(size[key] for key in ("height", "shortest_edge", "width") if size.get(key))


def build_scratch(name: str, config: Any, num_labels: int) -> ModelBundle:
    """A model of transformers from its configuration, with random weights or those of `config.model_path`."""
    import transformers

    from eval.model_bundle import ModelBundle, load_weights

    spec = HUB_MODELS[name]
    size = getattr(config, "image_size", None) or spec.image_size
    settings = getattr(transformers, spec.config)(**{**spec.settings, "image_size": size}, num_labels=num_labels)
    model = transformers.AutoModelForImageClassification.from_config(settings)
    path = getattr(config, "model_path", None)
    notes = ["random weights"] if path is None else load_weights(model, Path(path))
    return ModelBundle(model, "image", image_size=size, notes=notes)


def build_own(name: str, task: Task, num_labels: int, config: Any) -> ModelBundle:
    """ResNet-20 and its like, or the small network for digits: random weights unless `config.model_path` has some."""
    from eval.model_bundle import ModelBundle, load_weights
    from eval.vision_nets import CifarResNet, ConvNet

    channels = task.channels
    model: nn.Module
    if name in CIFAR_RESNETS:
        model, size = CifarResNet(CIFAR_RESNETS[name], num_labels, channels), 32
    else:
        model, size = ConvNet(num_labels, channels), None
    path = getattr(config, "model_path", None)
    notes = ["random weights"] if path is None else load_weights(model, Path(path))
    statistics = {} if channels == 3 else {"mean": (0.5,) * channels, "std": (0.5,) * channels}
    size = getattr(config, "image_size", None) or size
    return ModelBundle(
        model, "image", image_size=size, in_channels=channels, crop_fraction=1.0, notes=notes, **statistics
    )

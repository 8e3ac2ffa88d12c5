"""Builds image models by name: small ones of this package, and those of transformers, timm and torchvision."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.tasks import Task
from quant.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from eval.modeling.bundle import ModelBundle


@dataclass(frozen=True)
class HubModel:
    """A published architecture: the repository of its weights, and the configuration to build it without them."""

    hub: str
    config: str
    """name of the configuration class in transformers, which takes `settings`"""
    settings: dict[str, Any] = field(default_factory=dict)
    image_size: int = 224


def _resnet(depths: tuple[int, ...], widths: tuple[int, ...], layer_type: str) -> HubModel:
    settings = {"depths": list(depths), "hidden_sizes": list(widths), "layer_type": layer_type}
    name = 2 + sum(depths) * (3 if layer_type == "bottleneck" else 2)
    return HubModel(f"microsoft/resnet-{name}", "ResNetConfig", settings)


def _efficientnet(
    version: int, width: float, depth: float, size: int, dropout: float, hidden: int, padding: tuple[int, ...]
) -> HubModel:
    settings = {
        "width_coefficient": width,
        "depth_coefficient": depth,
        "image_size": size,
        "dropout_rate": dropout,
        "hidden_dim": hidden,
        "depthwise_padding": list(padding),
    }
    return HubModel(f"google/efficientnet-b{version}", "EfficientNetConfig", settings, size)


def _deit(size: str, hidden: int) -> HubModel:
    settings = {"hidden_size": hidden, "num_attention_heads": hidden // 64, "intermediate_size": 4 * hidden}
    return HubModel(f"facebook/deit-{size}-patch16-224", "ViTConfig", settings)


HUB_MODELS: dict[str, HubModel] = {
    "resnet18": _resnet((2, 2, 2, 2), (64, 128, 256, 512), "basic"),
    "resnet50": _resnet((3, 4, 6, 3), (256, 512, 1024, 2048), "bottleneck"),
    # Width, depth and dropout are those of the reference implementation (efficientnet_builder.py) of Tan & Le 2019. The
    # last argument lists the blocks that halve an odd size; they pad both sides alike, so MACs equal torchvision's.
    "efficientnet-b0": _efficientnet(0, 1.0, 1.0, 224, 0.2, 1280, ()),
    "efficientnet-b1": _efficientnet(1, 1.0, 1.1, 240, 0.2, 1280, (16,)),
    "efficientnet-b2": _efficientnet(2, 1.1, 1.2, 260, 0.3, 1408, (5, 8, 16)),
    "efficientnet-b3": _efficientnet(3, 1.2, 1.4, 300, 0.3, 1536, (5, 18)),
    "efficientnet-b4": _efficientnet(4, 1.4, 1.8, 380, 0.4, 1792, (6,)),
    "efficientnet-b5": _efficientnet(5, 1.6, 2.2, 456, 0.4, 2048, (13, 27)),
    "efficientnet-b6": _efficientnet(6, 1.8, 2.6, 528, 0.5, 2304, (31,)),
    "efficientnet-b7": _efficientnet(7, 2.0, 3.1, 600, 0.5, 2560, (18,)),
    "mobilenetv2": HubModel("google/mobilenet_v2_1.0_224", "MobileNetV2Config"),
    "deit-tiny": _deit("tiny", 192),
    "deit-small": _deit("small", 384),
    "deit-base": _deit("base", 768),
}
CIFAR_RESNETS = {f"resnet{depth}": depth for depth in (20, 32, 44, 56)}
ALIASES = {"inceptionv3": "timm:inception_v3"}
OWN = (*CIFAR_RESNETS, "convnet")
MODELS = (*HUB_MODELS, *ALIASES, *OWN)


def build(config: Any, task: Task, num_labels: int) -> ModelBundle:
    """Build the image model of a run.

    Args:
        config: has `model`, `model_path`, `image_size` and `from_scratch`. A folder with a config.json needs no
            `model`; other safetensors weights do.
        task: the task.
        num_labels: number of classes.

    Raises:
        UserError: if the model or its weights are missing or damaged.
    """
    from eval.modeling.bundle import load_weights
    from eval.modeling.pretrained import check_weights

    name = str(getattr(config, "model", None) or "")
    path = Path(getattr(config, "model_path", None) or name).expanduser()
    weights = path if getattr(config, "model_path", None) else None
    if weights is not None and not weights.exists():
        raise UserError(f"--model_path {weights}: no such file or folder")
    size = getattr(config, "image_size", None)
    scratch = getattr(config, "from_scratch", False)
    if (path / "config.json").is_file():
        if not scratch:
            check_weights("--model_path" if weights else "--model", path)
        bundle = build_scratch(str(path), num_labels, size) if scratch else build_pretrained(str(path), num_labels)
    elif not name:
        raise UserError(f"--model_path {path}: has no config.json; name its architecture with --model")
    else:
        bundle = build_named(ALIASES.get(name, name), task, num_labels, size, scratch or weights is not None)
        if weights is not None:
            bundle.notes = load_weights(bundle.model, weights)
            bundle.trained = not bundle.notes
    bundle.notes += correct_momentum(bundle.model)
    bundle.image_size = size or bundle.image_size
    return bundle


def build_saved(
    folder: Path, subject: str, build: dict[str, Any], config: Any, task: Task, num_labels: int
) -> ModelBundle:
    """Build the image model that a finished run saved, without its weights.

    Args:
        folder: the folder of the saved model.
        subject: the flag and its value that name the run, for errors.
        build: the section `build` of its quantization.json.
        config: the config of the new run.
        task: the task of the new run.
        num_labels: number of classes.
    """
    size = getattr(config, "image_size", None) or build.get("image_size")
    name = build.get("model") or getattr(config, "model", None)
    if (folder / "config.json").is_file():
        bundle = build_scratch(str(folder), num_labels, size)
    elif name:
        bundle = build_named(ALIASES.get(name, name), task, num_labels, size, scratch=True)
    else:
        raise UserError(f"{subject}: does not say what model it is; give --model NAME")
    bundle.notes = []
    if build.get("pixels"):
        bundle.with_pixels(build["pixels"])
    elif (folder / "config.json").is_file():
        bundle.notes.append(f"{folder} does not say how its images were scaled: mean and std of ImageNet")
    correct_momentum(bundle.model)
    bundle.image_size = size or bundle.image_size
    return bundle


def build_named(name: str, task: Task, num_labels: int, size: int | None, scratch: bool) -> ModelBundle:
    """Build a model by name, with its published weights if it has any.

    Args:
        name: a name of `MODELS`, a Hub id, timm:NAME or torchvision:NAME.
        task: the task.
        num_labels: number of classes.
        size: side of the input in pixels; None: the model's own.
        scratch: use random weights.
    """
    if name in OWN:
        return build_own(name, task, num_labels)
    if name.startswith(("timm:", "torchvision:")):
        from eval.modeling.vision_libraries import build_timm, build_torchvision

        library, _, name = name.partition(":")
        return {"timm": build_timm, "torchvision": build_torchvision}[library](name, num_labels, size, scratch)
    if scratch:
        return build_scratch(name, num_labels, size)
    return build_pretrained(HUB_MODELS[name].hub if name in HUB_MODELS else name, num_labels)


def build_own(name: str, task: Task, num_labels: int) -> ModelBundle:
    """Build a ResNet for CIFAR, or the small network for digits, with random weights."""
    from eval.modeling.bundle import IMAGENET_MEAN, IMAGENET_STD, RANDOM_WEIGHTS, ModelBundle
    from eval.modeling.vision_nets import CifarResNet, ConvNet

    cifar = name in CIFAR_RESNETS
    channels = task.channels
    return ModelBundle(
        CifarResNet(CIFAR_RESNETS[name], num_labels, channels) if cifar else ConvNet(num_labels, channels),
        "image",
        image_size=32 if cifar else None,
        mean=IMAGENET_MEAN if channels == 3 else (0.5,),
        std=IMAGENET_STD if channels == 3 else (0.5,),
        in_channels=channels,
        crop_fraction=1.0,
        notes=[f"{RANDOM_WEIGHTS}: {name} comes without any"],
    )


def build_scratch(source: str, num_labels: int, size: int | None) -> ModelBundle:
    """Build a model of transformers with random weights.

    Args:
        source: a name of `HUB_MODELS`, or the configuration's folder or Hub id.
        num_labels: number of classes.
        size: side of the input in pixels; None: the model's own.
    """
    import transformers

    from eval.modeling.bundle import RANDOM_WEIGHTS, ModelBundle
    from eval.modeling.pretrained import from_anywhere, new_model

    if source in HUB_MODELS:
        known = HUB_MODELS[source]
        size = size or known.image_size
        settings = getattr(transformers, known.config)(
            **{**known.settings, "image_size": size, "num_labels": num_labels}
        )
    else:
        settings = from_anywhere(
            transformers.AutoConfig.from_pretrained, source, num_labels=num_labels, trust_remote_code=False
        )
        size = size or getattr(settings, "image_size", None)
    model = new_model(transformers.AutoModelForImageClassification, settings)
    model.config.architectures = [type(model).__name__]  # names the head when the configuration is loaded
    channels = getattr(settings, "num_channels", 3)
    return ModelBundle(model, "image", image_size=size, in_channels=channels, notes=[RANDOM_WEIGHTS])


def build_pretrained(source: str, num_labels: int) -> ModelBundle:
    """Load a model of transformers; its image processor determines size, mean and std."""
    import transformers

    from eval.modeling.bundle import ModelBundle
    from eval.modeling.pretrained import from_anywhere, load_pretrained

    model, notes = load_pretrained(transformers.AutoModelForImageClassification, source, num_labels=num_labels)
    channels = getattr(model.config, "num_channels", 3)
    bundle = ModelBundle(model, "image", in_channels=channels, notes=notes, trained=not notes)
    if Path(source).is_dir() and not (Path(source) / "preprocessor_config.json").is_file():
        bundle.image_size = getattr(model.config, "image_size", None)
        bundle.notes.append(f"{source} has no preprocessor_config.json: mean and std of ImageNet")
        return bundle
    processor = from_anywhere(transformers.AutoImageProcessor.from_pretrained, source, trust_remote_code=False)
    bundle.image_size, bundle.crop_fraction = processor_geometry(processor)
    bundle.mean, bundle.std = processor_colours(processor)
    bundle.resample = int(processor.resample)
    return bundle


def processor_geometry(processor: Any) -> tuple[int, float]:
    """Return the side of a processor's output in pixels, and its share of the resized image's side."""
    resized = next(processor.size[key] for key in ("shortest_edge", "height") if processor.size.get(key))
    if getattr(processor, "do_center_crop", False):
        side = processor.crop_size["height"]
        return side, side / resized
    # ConvNeXT's processor, which ResNets use, crops inputs below 384 pixels by `crop_pct`.
    return resized, getattr(processor, "crop_pct", 1.0) if resized < 384 else 1.0


def processor_colours(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Find mean and std per channel such that (x / 255 - mean) / std equals the processor's output for pixels x.

    They are measured with a black and a white image, because processors apply their settings differently: that of
    EfficientNet divides by its std twice, others shift the values or skip the step.
    """
    from PIL import Image

    images = [Image.new("RGB", (512, 512), (value,) * 3) for value in (0, 255)]
    low, high = processor(images=images, return_tensors="pt")["pixel_values"].amax((2, 3))
    std = 1 / (high - low)
    return tuple((-low * std).tolist()), tuple(std.tolist())


def correct_momentum(model: nn.Module) -> list[str]:
    """Convert the momentum of batch norms from TensorFlow's definition (weight of the old average) to PyTorch's.

    EfficientNet (0.99) and MobileNetV2 (0.997) of transformers would otherwise keep only the last batch's statistics.

    Returns:
        A note if any were converted, else an empty list.
    """
    from torch import nn

    wrong = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and (m.momentum or 0) > 0.5]
    for module in wrong:
        module.momentum = round(1 - (module.momentum or 0), 6)
    return [f"momentum of {len(wrong)} batch norms corrected to {wrong[0].momentum:g}"] if wrong else []

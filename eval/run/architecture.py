"""--architecture_space in a run: makes the model elastic, as the flags say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from eval.config.architecture import depths, kernels, widths
from eval.config.run_config import RunConfig
from quant.errors import UserError

if TYPE_CHECKING:  # importing torch takes seconds; flags are checked without it
    from torch import nn

    from eval.data.dataset import PreparedData
    from eval.modeling.bundle import ModelBundle
    from quant.elastic.net import ElasticNet

EXAMPLES = 64
"""Training examples on which the importance of channels is computed."""


def elastic_model(bundle: ModelBundle, prepared: PreparedData, layers: Sequence[str], config: RunConfig) -> ElasticNet:
    """Make a model elastic, in place, as the flags say; its outputs stay the same.

    Args:
        bundle: The float model.
        prepared: Its data.
        layers: Names of the searched layers.
        config: Flags of the run.

    Raises:
        UserError: The model is of another kind than --architecture_space says, or leaves no choice.
    """
    from quant.elastic.net import ElasticNet

    given = f"--architecture_space {config.architecture_space}"
    _check_kind(bundle.model, given, config)
    try:
        choices = widths(config) or (1.0,), kernels(config), depths(config)
        return ElasticNet(bundle.model, _examples(prepared), *choices, layers)
    except UserError as error:
        raise UserError(f"{given}: {error}") from None


def larger_kernels(model: nn.Module, config: RunConfig) -> list[str]:
    """Give depthwise convolutions with random weights the largest kernel of --kernel_choices; return a note on it."""
    import torch

    from quant.elastic.kernels import grow_kernels

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        changed = grow_kernels(model, side := max(kernels(config)))
    return (
        [f"{changed} depthwise convolutions have kernels of {side} x {side}, for --kernel_choices"] if changed else []
    )


def _examples(prepared: PreparedData) -> Any:
    """Return a batch of the first training examples, without augmentation."""
    from eval.data.dataset import not_augmented

    train = not_augmented(prepared.train)
    return prepared.data_collator([train[row] for row in range(min(EXAMPLES, len(train)))])


def _check_kind(model: Any, given: str, config: RunConfig) -> None:
    from torch import nn

    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    depthwise = any(layer.groups == layer.in_channels > 1 for layer in convolutions)
    heads = any("attention" in type(module).__name__.lower() for module in model.modules())
    if config.architecture_space == "mobilenetv2" and not depthwise:
        raise UserError(f"{given}: {config.model_name} has no depthwise convolutions; take resnet")
    if config.architecture_space == "resnet" and len(convolutions) < 2:
        raise UserError(f"{given}: {config.model_name} is no convolutional network; take transformer")
    if config.architecture_space == "transformer" and not heads:
        raise UserError(f"{given}: {config.model_name} has no attention; take resnet or mobilenetv2")


def described(net: ElasticNet) -> dict[str, list[int]]:
    """Return decision -> its choices: the record's `architecture_space`."""
    return {f"{decision.name} {decision.kind}": list(decision.choices) for decision in net.decisions}

"""Gamma Migration and SmoothQuant: move scales between layers without changing the float model's output.

The output of a norm (or of a layer in front of a ReLU) can be divided by a factor g per channel if all its readers
compensate: a layer multiplies its weight's input channels by g, a shortcut multiplies its part of the sum by g.

Sources: Outlier Suppression (arXiv 2209.13325), SmoothQuant (arXiv 2211.10438).
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quant.convert import run_model
from quant.errors import UserError
from quant.formats import FloatFormat, Format, IntFormat
from quant.module_utils import Arguments, evaluating, examples_of, first_tensor, replace_first_tensor
from quant.quant_utils import fake_quantize, scale_from_range
from quant.transforms.graph import Group, find_groups, outputs, scaled_parameters
from quant.transforms.rotation import untie, untied_layers
from quant.transforms.shortcut import Shortcut, add_shortcut

logger = logging.getLogger(__name__)

SMALLEST = 1e-5
"""Smallest scale of SmoothQuant, and smallest |gamma| that is migrated."""
TOKENS = 2048
"""Tokens per batch that auto alpha is measured on."""


# ------------------------------------------------------ the operator


@torch.no_grad()
def migrate(
    source: nn.Module | None, consumers: Sequence[nn.Module], shortcuts: Sequence[nn.Module], g: Tensor
) -> None:
    """Divide the input of `consumers` by g, in place, without changing the model's output.

    Args:
        source: The norm or layer whose output they read; its weight and bias are divided. None: every consumer divides
            its input itself.
        consumers: Linear, Conv1D or Conv2d layers; the weight's input channel j is multiplied by g_j.
        shortcuts: Norms that read a sum of the source's output and another tensor; they multiply that output by g.
        g: float (channels,), not 0. Negative entries require that no ReLU lies between source and consumers.
    """
    for consumer in consumers:
        weight: Any = consumer.weight
        weight.mul_(_along_inputs(consumer, g).to(weight))
        if source is None:
            _divide_input(consumer, g)
    if source is None:
        return
    for parameter in scaled_parameters(source):
        parameter.copy_(_divided(source, parameter, g))
    for norm in shortcuts:
        shortcut = add_shortcut(norm, consumers[0])
        shortcut.gain.mul_(g.to(shortcut.gain))


def _along_inputs(consumer: nn.Module, g: Tensor) -> Tensor:
    """Reshape g to broadcast along the weight's input channels."""
    if isinstance(consumer, Conv1D):
        return g.unsqueeze(1)
    if isinstance(consumer, nn.Conv2d):
        # Depthwise: output channel j reads input channel j.
        return g.view(1, -1, 1, 1) if consumer.groups == 1 else g.view(-1, 1, 1, 1)
    return g


def _divided(source: nn.Module, parameter: Tensor, g: Tensor) -> Tensor:
    g = g.to(parameter)
    if parameter.dim() == 1 or isinstance(source, Conv1D):
        return parameter / g
    return parameter / g.view(-1, *(1,) * (parameter.dim() - 1))


def _divide_input(layer: nn.Module, g: Tensor) -> None:
    """Let the layer divide its input by g; a second call divides by both factors."""
    if not hasattr(layer, "input_divisor"):
        weight: Any = layer.weight
        layer.register_buffer("input_divisor", torch.ones(len(g), device=weight.device))
        layer.register_forward_pre_hook(_read_divided, with_kwargs=True)
    divisor: Any = layer.input_divisor
    divisor.mul_(g.to(divisor))


def _read_divided(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    return replace_first_tensor(lambda x: x / layer.input_divisor.to(x), args, kwargs)


# ------------------------------------------------------ saved and loaded


@dataclass(frozen=True)
class Migration:
    """Names of what migration adds to a model besides changed weights, for a file."""

    shortcuts: Mapping[str, str] = field(default_factory=dict)
    """Norm -> the layer whose input its shortcut adds."""
    divided: Sequence[str] = ()
    """Layers that divide their input."""
    untied: Sequence[str] = ()
    """Layers that a rotation has given a weight of their own."""

    @property
    def factors(self) -> bool:
        """Whether the model computes with factors of migration, besides its weights."""
        return bool(self.shortcuts or self.divided)


def added(model: nn.Module) -> Migration:
    """Return what migration has added to a model."""
    norms = {
        m.shortcut: name for name, m in model.named_modules() if isinstance(getattr(m, "shortcut", None), Shortcut)
    }
    readers = {
        norms[hook.__self__]: name
        for name, module in model.named_modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(getattr(hook, "__self__", None), Shortcut)
    }
    divided = [name for name, module in model.named_modules() if hasattr(module, "input_divisor")]
    return Migration(readers, divided, untied_layers(model))


def attach(model: nn.Module, migration: Migration) -> None:
    """Add the same to a new model, with scales of 1, which loading a state dict then sets.

    Args:
        model: The model; changed in place.
        migration: What `added` returned for another model.
    """
    modules = dict(model.named_modules())
    for norm, reader in migration.shortcuts.items():
        add_shortcut(modules[norm], modules[reader])
    for name in migration.divided:
        layer: Any = modules[name]
        _divide_input(layer, torch.ones(input_channels(layer)))
    untie(model, migration.untied)


def input_channels(layer: Any) -> int:
    """Return the number of input channels of a Linear, Conv1D or Conv2d."""
    if isinstance(layer, Conv1D):
        return int(layer.weight.shape[0])
    return int(layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features)


# ------------------------------------------------------ Gamma Migration


def gamma_migration(model: nn.Module, groups: Iterable[Group]) -> None:
    """Move each norm's gamma into its readers, so that activations are quantized before gamma amplifies outliers.

    Outlier Suppression (arXiv 2209.13325), Gamma Migration.

    Args:
        model: The model; changed in place.
        groups: Groups of `find_groups`; those without a gamma are skipped.
    """
    modules = dict(model.named_modules())
    for group in groups:
        if not group.has_gamma:
            continue
        norm: Any = modules[group.source or ""]
        gamma = norm.weight.detach()
        g = torch.where(gamma.abs() < SMALLEST, torch.ones_like(gamma), gamma)
        _migrate_group(modules, group, g)


def _migrate_group(modules: Mapping[str, nn.Module], group: Group, g: Tensor) -> None:
    source = None if group.source is None else modules[group.source]
    migrate(source, [modules[name] for name in group.consumers], [modules[name] for name in group.shortcuts], g)


# ------------------------------------------------------ SmoothQuant


@dataclass(frozen=True)
class SmoothQuantConfig:
    """Settings of SmoothQuant; alpha 'auto' chooses a value for each group of layers."""

    alpha: float | Literal["auto"] = 0.5
    """Migration strength: at 0 all outliers stay in the activations, at 1 they move into the weights."""
    alpha_min: float = 0.3
    alpha_max: float = 0.7
    alpha_step: float = 0.05
    shared_criterion: Literal["mean", "min", "max"] = "mean"
    """auto: how the best alphas of layers that share an input are combined."""
    n_samples: int = 32
    """auto: number of calibration examples that losses are measured on."""

    def __post_init__(self) -> None:
        if self.alpha != "auto" and not (isinstance(self.alpha, float | int) and 0 <= self.alpha <= 1):
            raise UserError(f"smooth_quant.alpha must be auto or lie in [0, 1], got {self.alpha!r}")
        if not 0 <= self.alpha_min <= self.alpha_max <= 1:
            raise UserError(
                f"smooth_quant.alpha_min and alpha_max must be ordered in [0, 1], got {self.alpha_min} and "
                f"{self.alpha_max}"
            )
        if not self.alpha_step > 0:
            raise UserError(f"smooth_quant.alpha_step must be positive, got {self.alpha_step}")
        if self.shared_criterion not in ("mean", "min", "max"):
            raise UserError(
                f"smooth_quant.shared_criterion must be one of mean, min, max, got {self.shared_criterion!r}"
            )
        if self.n_samples < 1:
            raise UserError(f"smooth_quant.n_samples must be at least 1, got {self.n_samples}")

    @property
    def grid(self) -> list[float]:
        """Alphas that auto tries."""
        steps = math.floor((self.alpha_max - self.alpha_min) / self.alpha_step + 1e-6)
        return [round(self.alpha_min + i * self.alpha_step, 10) for i in range(steps + 1)]


def smooth_quant(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Iterable[Any],
    config: SmoothQuantConfig | None = None,
    *,
    formats: tuple[Format, Format] = (IntFormat(8), IntFormat(8)),
) -> dict[str, float]:
    """Divide each group's input by s_j = amax_j^alpha / wmax_j^(1 - alpha), in place (arXiv 2211.10438, equation 4).

    Args:
        model: The float model; changed in place.
        groups: Groups of `find_groups`.
        batches: Calibration data; amax_j is computed from all of it, auto alpha from its first examples.
        config: The settings.
        formats: (weight format, activation format) that auto alpha quantizes to.

    Returns:
        The alpha of each group, by the name of its first layer; groups that no batch reaches are missing.

    Raises:
        UserError: If there is no batch.
    """
    config = config or SmoothQuantConfig()
    modules = dict(model.named_modules())
    layers: dict[str, nn.Module] = {group.consumers[0]: modules[group.consumers[0]] for group in groups}
    inputs = watch_inputs(model, layers, batches, config.n_samples if config.alpha == "auto" else 0)
    alphas: dict[str, float] = {}
    for group in groups:
        first = group.consumers[0]
        if first not in inputs:
            continue  # never called on this data
        seen, consumers = inputs[first], [modules[name] for name in group.consumers]
        if config.alpha == "auto":
            alphas[first] = shared_alpha(consumers, seen, config, formats)
        else:
            alphas[first] = config.alpha
        _migrate_group(modules, group, smoothing(seen.amax, weight_maxima(consumers), alphas[first]))
    return alphas


def smoothing(amax: Tensor, wmax: Tensor, alpha: float) -> Tensor:
    """Return SmoothQuant's factor for each channel.

    Args:
        amax: float (channels,), largest |input|.
        wmax: float (channels,), largest |weight|.
        alpha: Migration strength, 0 to 1.

    Returns:
        float (channels,); 1 where the input is always 0.
    """
    s = (amax**alpha / wmax.clamp(min=SMALLEST) ** (1 - alpha)).clamp(min=SMALLEST)
    return torch.where(amax > 0, s, torch.ones_like(s))


@torch.no_grad()
def weight_maxima(consumers: Iterable[nn.Module]) -> Tensor:
    """Return the largest |weight| of each input channel over layers that share their input, float32 (channels,)."""
    maxima = []
    for consumer in consumers:
        weight: Any = consumer.weight
        axis = 0 if isinstance(consumer, Conv1D) or getattr(consumer, "groups", 1) > 1 else 1
        maxima.append(weight.detach().float().abs().movedim(axis, 0).flatten(1).amax(dim=1))
    return torch.stack(maxima).amax(dim=0)


def shared_alpha(
    consumers: Sequence[nn.Module], seen: Inputs, config: SmoothQuantConfig, formats: tuple[Format, Format]
) -> float:
    """Return the alpha for layers that share an input: mean, min or max of the alphas that are best for each.

    Losses of layers of different sizes are never added or compared. neural-compressor 3.10 has the same min and max;
    its mean is another one, the alpha with the smallest sum of the losses.

    Args:
        consumers: The layers.
        seen: Statistics of their input.
        config: The settings.
        formats: (weight format, activation format) to quantize to.
    """
    scales = {alpha: smoothing(seen.amax, weight_maxima(consumers), alpha) for alpha in config.grid}
    best = [
        min(config.grid, key=lambda alpha: alpha_loss(consumer, seen.kept, scales[alpha], formats))
        for consumer in consumers
    ]
    return {"mean": sum(best) / len(best), "min": min(best), "max": max(best)}[config.shared_criterion]


@torch.no_grad()
def alpha_loss(consumer: nn.Module, inputs: Sequence[Tensor], s: Tensor, formats: tuple[Format, Format]) -> float:
    """Return the error of a layer's output with X / s and W * s quantized: the sum of |error / max|y||^0.5.

    The square root, as in neural-compressor, weighs many small errors more than a few large ones.

    Args:
        consumer: A Linear, Conv1D or Conv2d.
        inputs: Its inputs, (tokens, channels) or (B, channels, H, W) each.
        s: float (channels,), see `smoothing`.
        formats: (weight format, activation format). Weights are quantized per output channel, inputs with a single
            scale for all of them, both to their extrema.
    """
    weight: Any = consumer.weight
    axis = 1 if isinstance(consumer, Conv1D) else 0
    channels = weight.movedim(axis, 0)
    scaled = weight * _along_inputs(consumer, s).to(weight)
    rounded = _quantized(scaled.movedim(axis, 0).flatten(1), formats[0], symmetric=True)
    rounded = rounded.view_as(channels).movedim(0, axis)
    divisor = (s.view(-1, 1, 1) if isinstance(consumer, nn.Conv2d) else s).to(weight)
    quantized = _quantized(torch.cat([(x / divisor).flatten() for x in inputs]).view(1, -1), formats[1], False)
    loss = 0.0
    for x, part in zip(inputs, quantized[0].split([x.numel() for x in inputs]), strict=True):
        made, wanted = _output(consumer, part.view_as(x), rounded), _output(consumer, x, weight)
        largest = wanted.abs().max().clamp(min=SMALLEST)
        loss += float(((made - wanted) / largest).double().abs().sqrt().sum())
    return loss


def _output(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Return the layer's output for another weight, without its hooks, which have already changed x."""
    own = layer.weight
    layer.weight = nn.Parameter(weight, requires_grad=False)
    try:
        made: Tensor = layer.forward(x)
        return made
    finally:
        layer.weight = own


def _quantized(rows: Tensor, format: Format, symmetric: bool) -> Tensor:
    """Fake-quantize (rows, values), each row to its own extrema; formats without a scale need none."""
    if not isinstance(format, IntFormat | FloatFormat):
        return fake_quantize(rows, format)
    scale, zero_point = scale_from_range(rows.amin(dim=1), rows.amax(dim=1), format, symmetric)
    return fake_quantize(rows, format, scale.unsqueeze(1), None if zero_point is None else zero_point.unsqueeze(1))


@dataclass
class Inputs:
    """Statistics of a layer's input."""

    amax: Tensor
    """float32 (channels,): largest magnitude."""
    kept: list[Tensor] = field(default_factory=list)
    """Some of the inputs: (tokens, channels), or (B, channels, H, W)."""


@torch.no_grad()
def watch_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], samples: int
) -> dict[str, Inputs]:
    """Collect statistics of layers' inputs, in eval mode.

    Args:
        model: The model.
        layers: Layers by name.
        batches: Inputs of the model.
        samples: Number of examples whose inputs are kept, with at most TOKENS evenly spaced tokens per batch.

    Returns:
        Statistics by layer name; layers that are never called are missing.

    Raises:
        UserError: If there is no batch.
    """
    seen: dict[str, Inputs] = {}
    room = samples

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_tensor(args, kwargs)
            assert x is not None
            channel = 1 if isinstance(layer, nn.Conv2d) else -1
            amax = x.float().abs().movedim(channel, 0).flatten(1).amax(dim=1)
            entry = seen.setdefault(name, Inputs(amax))
            entry.amax = torch.maximum(entry.amax, amax)
            if room > 0:
                entry.kept.append(_thinned(x[:room], layer))

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    empty = True
    try:
        with evaluating(model):
            for batch in batches:
                empty = False
                run_model(model, batch)
                room -= examples_of(batch) or 1
    finally:
        for hook in hooks:
            hook.remove()
    if empty:
        raise UserError("the calibration set is empty: SmoothQuant needs at least one batch of training data")
    return seen


def _thinned(x: Tensor, layer: nn.Module) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        return x.contiguous()
    tokens = x.reshape(-1, x.shape[-1])
    return tokens[:: max(-(-len(tokens) // TOKENS), 1)].contiguous()


# ------------------------------------------------------ both


def sound_groups(model: nn.Module, example: Any, groups: Sequence[Group]) -> list[Group]:
    """Select the groups whose scales can move without changing the model's outputs, by trying it on a copy.

    `find_groups` cannot see code that reads a tensor without torch functions, nor layers that do more with their weight
    than multiply by it. Such groups are left out with a warning.

    Args:
        model: The float model; not changed.
        example: A batch.
        groups: Groups of `find_groups`.
    """
    if _unchanged(model, example, groups):
        return list(groups)
    sound: list[Group] = []
    for group in groups:
        if _unchanged(model, example, [*sound, group]):
            sound.append(group)
        else:
            readers = ", ".join(group.consumers)
            logger.warning("no scale is moved into %s: the model's output would change with it", readers)
    return sound


@torch.no_grad()
def _unchanged(model: nn.Module, example: Any, groups: Iterable[Group]) -> bool:
    """Whether a copy of the model keeps its outputs when powers of two are moved in these groups.

    Powers of two are exact except for a shortcut's gain, whose rounding error of a few eps is far below the tolerance
    of sqrt(eps).
    """
    # A weight that hooks compute (weight norm) cannot be copied; the next forward pass computes it again.
    computed = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
    trial = copy.deepcopy(model, {id(tensor): tensor for tensor in computed}).eval()
    before, modules = _seeded_outputs(trial, example), dict(trial.named_modules())
    for group in groups:
        g = torch.full((input_channels(modules[group.consumers[0]]),), 2.0)
        g[1::2] = 0.5 if group.rectified else -0.5
        _migrate_group(modules, group, g)
    tolerance = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()) ** 0.5
    return all(
        torch.allclose(now, then, rtol=0, atol=tolerance * float(then.nan_to_num(0, 0, 0).abs().max()), equal_nan=True)
        for then, now in zip(before, _seeded_outputs(trial, example), strict=True)
        if then.is_floating_point() and then.numel()
    )


def _seeded_outputs(model: nn.Module, example: Any) -> list[Tensor]:
    """Return the model's outputs, with a fixed seed in case it draws random numbers."""
    with torch.random.fork_rng({p.device.index for p in model.parameters() if p.is_cuda}):
        torch.manual_seed(0)
        return outputs(model, example)


def fold(
    model: nn.Module,
    example: Any,
    batches: Callable[[], Iterable[Any]],
    layers: Collection[str],
    *,
    gamma: bool = False,
    smooth: SmoothQuantConfig | None = None,
    formats: tuple[Format, Format] = (IntFormat(8), IntFormat(8)),
) -> None:
    """Apply Gamma Migration, then SmoothQuant, each if requested, to a float model.

    Args:
        model: The float model; changed in place.
        example: A batch; a forward pass over it shows which modules read which tensors.
        batches: Returns the calibration data.
        layers: Names of the layers that will be quantized; others change only if they share an input with these.
        gamma: Whether to apply Gamma Migration.
        smooth: Settings of SmoothQuant; None: do not apply it.
        formats: (weight format, activation format) that auto alpha quantizes to.

    Raises:
        UserError: If Gamma Migration finds no norm that it can be applied to.
    """
    groups = [group.only(layers) for group in find_groups(model, example)]
    groups = [group for group in groups if group.consumers and (smooth is not None or group.has_gamma)]
    groups = sound_groups(model, example, groups)
    if gamma:
        if not any(group.has_gamma for group in groups):
            raise UserError(
                f"--gamma_migration: {type(model).__name__} has no norm whose output only layers and shortcuts read"
            )
        gamma_migration(model, groups)
    if smooth is not None:
        smooth_quant(model, groups, batches(), smooth, formats=formats)

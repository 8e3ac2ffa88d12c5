"""Strategy of accuracy-aware tuning: which setting to try next and which to accept, independent of model and data."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar, get_args

from quant.errors import UserError
from trainer.tuning.metrics import Metric
from trainer.tuning.objectives import Objective, performance

logger = logging.getLogger(__name__)

Approach = Literal["PostTrainingStatic", "PostTrainingDynamic", "QuantizationAwareTraining"]
OTHER: dict[str, Approach] = {
    "PostTrainingStatic": "PostTrainingDynamic",
    "PostTrainingDynamic": "PostTrainingStatic",
}
"""Approach that is tried as the alternative; training has none."""
FRAMEWORKS = ("pytorch",)


@dataclass(frozen=True)
class Recipe:
    """Transformations between layers before quantization."""

    gamma_migration: bool = False
    smooth_quant: float | Literal["auto"] | None = None
    """SmoothQuant's alpha; None: not used."""


PLAIN = Recipe()
RECIPES = (Recipe(True), Recipe(False, 0.5), Recipe(False, "auto"), Recipe(True, "auto"))
"""Recipes in the order in which they are tried."""


@dataclass(frozen=True)
class Setting:
    """One way to quantize a model; equal settings are tried only once."""

    approach: Approach
    recipe: Recipe = PLAIN
    wide: frozenset[str] = frozenset()
    """Layer types with int16 activations instead of int8."""
    high_precision: frozenset[str] = frozenset()
    """Layers that stay in float."""
    reduce_range: bool = False
    """int8 weights use 7 of their bits, for processors with saturating int8 products."""

    def __str__(self) -> str:
        words: list[str] = [self.approach]
        words += ["gamma_migration"] * self.recipe.gamma_migration
        words += [] if self.recipe.smooth_quant is None else [f"smooth_quant={self.recipe.smooth_quant}"]
        words += [f"int16 inputs: {', '.join(sorted(self.wide))}"] * bool(self.wide)
        words += [f"float: {', '.join(sorted(self.high_precision))}"] * bool(self.high_precision)
        return " + ".join(words)


@dataclass(frozen=True)
class QuantizationConfig:
    """Settings of `NLPTrainer.quantize`: what to accept and how long to search."""

    approach: Approach = "PostTrainingStatic"
    metrics: Sequence[Metric] | Metric | None = None
    """Metric or metrics to keep; None accepts the first model."""
    objectives: Sequence[Objective] | Objective = (performance,)
    """What to improve among accepted models."""
    timeout: float = 0
    """Seconds; 0 stops at the first accepted model."""
    max_trials: int = 100
    sampling_size: int = 100
    """Training examples for calibrating static ranges."""
    framework: str = "pytorch"
    reduce_range: bool = False
    """int8 weights use 7 of their bits, for processors with saturating int8 products."""

    def __post_init__(self) -> None:
        if self.framework not in FRAMEWORKS:
            raise UserError(f"framework must be one of {', '.join(FRAMEWORKS)}, got {self.framework!r}")
        if self.approach not in get_args(Approach):
            raise UserError(f"approach must be one of {', '.join(get_args(Approach))}, got {self.approach!r}")
        if self.metrics is not None and not self.required:
            raise UserError("metrics must hold at least one Metric, or be None: then any model is good enough")
        _check_all("metrics", self.required, Metric)
        _check_all("objectives", self.wanted, Objective)
        for number, least in (("timeout", 0), ("max_trials", 1), ("sampling_size", 1)):
            if not getattr(self, number) >= least:
                raise UserError(f"{number} must be at least {least}, got {getattr(self, number)}")
        weights_of("metrics", self.required)
        weights_of("objectives", self.wanted)

    @property
    def required(self) -> tuple[Metric, ...]:
        """The metrics to keep."""
        return () if self.metrics is None else _several(self.metrics)

    @property
    def wanted(self) -> tuple[Objective, ...]:
        """The objectives."""
        return _several(self.objectives)


T = TypeVar("T")


def _several(parts: Sequence[T] | T) -> tuple[T, ...]:
    return tuple(parts) if isinstance(parts, list | tuple) else (parts,)  # type: ignore[return-value]


def _check_all(what: str, parts: Sequence[object], kind: type) -> None:
    for part in parts:
        if not isinstance(part, kind):
            raise UserError(f"{what} must be {kind.__name__} or a list of them, got {part!r}")


Weighed = TypeVar("Weighed", Metric, Objective)


def weights_of(what: str, parts: Sequence[Weighed]) -> list[float]:
    """Return the weights, 1/n each if none is given. Raises UserError if only some are."""
    given = [part.weight_ratio for part in parts if part.weight_ratio is not None]
    if given and len(given) < len(parts):
        raise UserError(f"{what}: give weight_ratio for all of them or for none, got {len(given)} of {len(parts)}")
    return given or [1 / max(len(parts), 1)] * len(parts)


@dataclass(frozen=True)
class Measured:
    """Results of a trial."""

    metrics: Mapping[str, float]
    costs: Mapping[str, float] = field(default_factory=dict)
    """Objective -> cost."""


@dataclass(frozen=True)
class Trial:
    """A setting that was tried."""

    setting: Setting
    measured: Measured
    excess: float
    """Drop of the metrics beyond the allowed one, see `_excess`; accepted if <= 0."""

    @property
    def accepted(self) -> bool:
        """Whether all metrics are kept."""
        return self.excess <= 0


class _Stop(Exception):
    """Ends the trials: limits reached, or a model is accepted."""


def tune(
    evaluate: Callable[[Setting], Measured],
    base: Mapping[str, float],
    layers: Mapping[str, str],
    config: QuantizationConfig,
    *,
    recipes: Sequence[Recipe] = RECIPES,
    rank: Callable[[Setting], Sequence[str]] | None = None,
    clock: Callable[[], float] = time.monotonic,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> tuple[Trial | None, list[Trial]]:
    """Try settings until one is accepted, or until the time or the trials are used up.

    The stages: the default; the recipes; wider activations, one layer type at a time; static instead of dynamic ranges
    or the reverse; single layers in high precision; growing sets of these, the most effective first. Each stage starts
    from the best setting so far, and at least one layer stays quantized.

    Args:
        evaluate: setting -> metrics of the evaluation, and costs.
        base: metrics of the float model.
        layers: name -> type of each quantized layer.
        config: what to accept and how long to search.
        recipes: recipes that the model supports.
        rank: setting -> layers in the order of trying; None: the order of `layers`.
        clock: current time in seconds.
        on_trial: called with every trial, before the next one.

    Returns:
        The accepted trial with the least cost (None if none is accepted), and all trials.

    Raises:
        UserError: without layers, and for a metric that the evaluation does not return.
    """
    if not layers:
        raise UserError(
            "there is no layer to quantize: the model has no linear layer or convolution that is not excluded"
        )
    metrics = config.required
    check_metrics(metrics, base)
    trials: list[Trial] = []
    tried: set[Setting] = set()
    started = clock()

    def attempt(setting: Setting) -> Trial | None:
        if setting in tried or setting.high_precision >= layers.keys():  # the latter is the float model
            return None
        if len(trials) >= config.max_trials or (config.timeout and clock() - started >= config.timeout):
            raise _Stop
        tried.add(setting)
        begun = clock()
        measured = evaluate(setting)
        check_metrics(metrics, measured.metrics)
        trials.append(trial := Trial(setting, measured, _excess(metrics, measured.metrics, base)))
        values = ", ".join(f"{m.name} {measured.metrics[m.name]:.5g} (float {base[m.name]:.5g})" for m in metrics)
        verdict = f"{values or 'no metric'}: {'accepted' if trial.accepted else 'not accepted'}"
        logger.info(f"trial {len(trials)}/{config.max_trials}: {setting}: {verdict}, {clock() - begun:.1f} s")
        on_trial(trial)
        if trial.accepted and config.timeout == 0:
            raise _Stop
        return trial

    try:
        for setting in _simple_settings(trials, layers, config, recipes):
            attempt(setting)
        start = _best(trials).setting
        singles = []
        for name in rank(start) if rank is not None else layers:
            if trial := attempt(replace(start, high_precision=frozenset([name]))):
                singles.append((trial.excess, name))
        order = [name for _, name in sorted(singles, key=lambda pair: pair[0])]
        for count in range(2, len(order) + 1):
            attempt(replace(start, high_precision=frozenset(order[:count])))
    except _Stop:
        pass
    accepted = [trial for trial in trials if trial.accepted]
    if not accepted:
        best = _best(trials)
        logger.warning(f"no trial of {len(trials)} was accepted; best: {best.setting}: {dict(best.measured.metrics)}")
        return None, trials
    first = next((trial for trial in trials if trial.measured.costs), trials[0])  # a failed trial has none
    return min(accepted, key=lambda trial: _cost(trial, first, config.wanted)), trials


def _excess(metrics: Sequence[Metric], values: Mapping[str, float], base: Mapping[str, float]) -> float:
    """Return the weighted drop of the metrics beyond their allowed drops.

    It is positive if any metric falls too far, and then counts only those: a gain of one does not pay for another.
    Infinite for a trial without results.
    """
    if not values:
        return math.inf
    beyond = [metric.excess(values[metric.name], base[metric.name]) for metric in metrics]
    counted = [max(one, 0.0) for one in beyond] if any(one > 0 for one in beyond) else beyond
    return sum(w * one for w, one in zip(weights_of("metrics", metrics), counted, strict=True))


def check_metrics(metrics: Sequence[Metric], returned: Mapping[str, float]) -> None:
    """Check that all metrics were evaluated. Raises UserError for one that is missing."""
    for metric in metrics:
        if metric.name not in returned:
            raise UserError(f"metric {metric.name!r} is not in the evaluation; choices: {', '.join(sorted(returned))}")


def _simple_settings(
    trials: list[Trial], layers: Mapping[str, str], config: QuantizationConfig, recipes: Sequence[Recipe]
) -> Iterator[Setting]:
    """Yield the settings of all stages without single layers; later stages read the growing list of `trials`."""
    default = Setting(config.approach, reduce_range=config.reduce_range)
    yield default
    for recipe in recipes:
        yield replace(default, recipe=recipe)
    start = _best(trials).setting
    for kind in dict.fromkeys(layers.values()):
        yield replace(start, wide=frozenset([kind]))
    if config.approach in OTHER:
        yield replace(_best(trials).setting, approach=OTHER[config.approach])


def _best(trials: Sequence[Trial]) -> Trial:
    return min(trials, key=lambda trial: trial.excess)


def _cost(trial: Trial, first: Trial, objectives: Sequence[Objective]) -> tuple[float, float]:
    """Return the weighted costs relative to those of the `first` trial, then the metrics' excess."""
    if not objectives:
        return 0.0, trial.excess
    total = 0.0
    for weight, objective in zip(weights_of("objectives", objectives), objectives, strict=True):
        reference = first.measured.costs.get(objective.name) or 1.0
        total += objective.sign * weight * trial.measured.costs.get(objective.name, 0.0) / reference
    return total, trial.excess

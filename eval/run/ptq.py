"""Post-training quantization according to the flags of a run: quantizers, outlier migration, token clipping."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from eval.config.quant_yaml import alpha_settings
from quant.formats import FLOAT, Format, IntFormat
from quant.quantizers.quantizer import WEIGHT, QuantizerConfig
from quant.transforms.kv_cache import caches_of, sites_of
from quant.transforms.migration import SmoothQuantConfig, fold
from quant.transforms.placement import Placement, place_quantizers
from quant.transforms.token_clipping import clip_tokens
from trainer.training.calibration import WeightRounding

if TYPE_CHECKING:
    from eval.config.run_config import RunConfig
    from eval.run.plan import Plan
    from trainer.reinforce_trainer import ReinforceTrainer

FOR_WEIGHTS = ("minmax", "mse", "mse_fast", "mse_grid", "lsq_plus")
"""Observers that --observer sets for weights too; the others average over batches or assume a normal distribution."""


def quantizer_configs(config: RunConfig) -> tuple[QuantizerConfig, QuantizerConfig]:
    """Return the quantizer configurations for weights and for activations."""
    learned = config.quantizer != "fixed"
    # Learned scales are initialized with the least error of tensor or layer, unless the user names another observer.
    # Fixed ranges of weights follow the weights in training, which those of a calibration do not.
    observer = config.observer or ("mse" if learned else "minmax")
    weight_learned = (config.weight_quantizer or config.quantizer) != "fixed"
    own = config.weight_observer or (
        observer if config.observer in FOR_WEIGHTS else WEIGHT.observer if weight_learned else "minmax"
    )
    ranges: Literal["learned", "dynamic", "calibrated"]
    ranges = "learned" if weight_learned else "dynamic" if own == "minmax" else "calibrated"
    weight = QuantizerConfig(
        range=ranges,
        granularity="channel" if config.per_channel else "tensor",
        observer=own,
        percentile=config.weight_range_percentile,
        symmetric=config.weight_symmetric,
        learned_offset=config.weight_quantizer == "lsq_plus",
        reduce_range=config.reduce_range,
    )
    activation = QuantizerConfig(
        range="dynamic" if config.per_token else "learned" if learned else "calibrated",
        granularity="token" if config.per_token else "channel" if config.act_per_channel else "tensor",
        observer="minmax" if config.per_token else observer,
        percentile=config.act_range_percentile,
        symmetric=config.act_symmetric,
        learned_offset=config.quantizer == "lsq_plus" and not config.per_token,
        ignore_padding=config.remove_padding,
    )
    return weight, activation


def migrate_outliers(plan: Plan, trainer: ReinforceTrainer) -> None:
    """Fold the factors of --gamma_migration and --smooth_quant into the float model."""
    config = plan.config
    if not (config.gamma_migration or config.smooth_quant):
        return
    smooth = SmoothQuantConfig(
        **alpha_settings(config.smooth_quant_alpha),
        shared_criterion=config.smooth_quant_criterion,  # type: ignore[arg-type]
        n_samples=config.smooth_quant_samples,
    )
    weight, activation = (FLOAT, FLOAT) if config.chooses else config.uniform_formats
    fold(
        trainer.model,
        next(iter(trainer.calibration.batches())),
        trainer.calibration.batches,
        plan.layers,
        gamma=config.gamma_migration,
        smooth=smooth if config.smooth_quant else None,
        formats=tuple(IntFormat(8) if f == FLOAT else f for f in (weight, activation)),  # type: ignore[arg-type]
    )


def place_around_layers(plan: Plan, trainer: ReinforceTrainer) -> None:
    """Quantize operations other than layers, as the flags say; after migration and before calibration."""
    config = plan.config
    placement = Placement(
        [op.strip() for op in (config.high_precision_ops or "").split(",") if op.strip()],
        residual_adds=config.quantize_residual_adds,
        products=config.quantize_products,
        embeddings=config.quantize_embeddings,
    )
    cached = sites_of(plan.caches)
    if (placement and trainer.modules) or cached:
        example = next(iter(trainer.calibration.batches()))
        place_quantizers(trainer.model, trainer.modules, example, placement if trainer.modules else Placement(), cached)


def quantize_caches(plan: Plan, trainer: ReinforceTrainer) -> None:
    """Set the caches of keys and values to the format of --quantize_kv_cache; a search sets them itself."""
    for name, cache in caches_of(trainer.model).items():
        if name not in plan.cache_choices:
            cache.set_formats(plan.config.cache_formats[0])


def changes_weights(config: RunConfig) -> bool:
    """Whether the float weights are migrated, rotated or rounded before the training."""
    return config.gamma_migration or config.smooth_quant or config.rotate or config.rounding != "nearest"


def weight_rounding(config: RunConfig) -> WeightRounding | None:
    """Return how weights are rounded according to --rounding; None to nearest."""
    if config.rounding == "nearest":
        return None
    return WeightRounding(config.rounding, config.rounding_samples)  # type: ignore[arg-type]


def clips_tokens(config: RunConfig) -> bool:
    """Whether the run searches for the clipping ratio of Token-Wise Clipping."""
    return config.observer == "avg_prune_minmax" and not config.per_token


def clip_outlier_tokens(plan: Plan, trainer: ReinforceTrainer) -> None:
    """Apply Token-Wise Clipping for every format of activations, with its fine stage if no training follows."""
    config = plan.config
    formats: list[Format] = [*(plan.formats if config.chooses else [config.uniform_formats[1]])]
    batches = list(trainer.calibration.batches())
    for format in formats:
        if format.scaled:
            clip_tokens(trainer.model, trainer.modules, batches, format, fine=config.max_steps == 0)

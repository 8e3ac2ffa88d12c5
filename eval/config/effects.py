"""Refuses flags that would have no effect, given the other flags of the run.

Flags at their default are never refused. In a grid, each run drops the flags it does not use; see `without_idle`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from eval.config.files import is_path
from eval.config.quant_yaml import TENSOR_FLAGS
from eval.config.run_config import RunConfig
from quant.errors import UserError
from quant.formats import FLOAT


@dataclass(frozen=True)
class Need:
    """A requirement that a group of flags needs to have an effect."""

    flags: tuple[str, ...]
    met: Callable[[RunConfig], bool]
    what: str
    """what meets the requirement; completes the sentence "it needs ..." of the error"""


def _chooses(config: RunConfig) -> bool:
    return config.chooses


def _searches(config: RunConfig) -> bool:
    return config.method == "search"


def _quantizes(config: RunConfig) -> bool:
    return config.chooses or config.uniform_formats != (FLOAT, FLOAT)


def _quantizes_activations(config: RunConfig) -> bool:
    return not config.weight_only_search if config.chooses else config.uniform_formats[1] != FLOAT


def _quantizes_weights(config: RunConfig) -> bool:
    return config.chooses or config.uniform_formats[0] != FLOAT


def _measures(config: RunConfig) -> bool:
    prior = config.policy_prior or ("none" if config.recipe == "fliqs" else "measured")
    return config.method in ("measured", "greedy") or (config.method == "search" and prior == "measured")


def _is_folder(config: RunConfig) -> bool:
    return _known_task(config) is None and is_path(str(config.task))


SEARCH = "a search: --search, --block_search or --single_decision"
NEEDS = (
    Need(("engine",), _quantizes, f"quantized layers: --bits B, or {SEARCH}"),
    Need(
        (
            *("search_space", "weight_only_search", "separate_activations", "fuse_groups", "fuse_experts"),
            "channel_groups",
        ),
        _chooses,
        f"{SEARCH}, or a --method that chooses formats",
    ),
    Need(
        (
            *("cost_function", "cost_beta", "delay_steps", "rl_learning_rate", "max_entropy_beta", "reward_quality"),
            *(
                "architecture_space",
                "entropy_schedule_type",
                "reward_draws",
                "search_fraction",
                "policy_prior",
                "settle_fraction",
                "recipe",
            ),
        ),
        _searches,
        SEARCH,
    ),
    Need(
        ("width_choices", "kernel_choices", "depth_choices"),
        lambda config: config.architecture_space is not None,
        "a search of architecture: --architecture_space resnet, mobilenetv2 or transformer",
    ),
    Need(
        ("measure_share", "sensitivity_examples"),
        _measures,
        "something that is measured: a search with --policy_prior measured",
    ),
    Need(
        (
            *("observer", "quantizer", "per_channel", "distill", "train", "smooth_quant", "gamma_migration", "rotate"),
            *TENSOR_FLAGS,
        ),
        _quantizes,
        f"quantized layers: --bits B, or {SEARCH}",
    ),
    Need(("cost_scope",), _quantizes_weights, f"quantized weights: --bits B, --weight_bits B, or {SEARCH}"),
    Need(("high_precision_ops",), _quantizes, f"quantized layers: --bits B, or {SEARCH}"),
    Need(
        (
            *("weight_observer", "weight_quantizer", "weight_range_percentile", "weight_symmetric", "reduce_range"),
            "rounding",
        ),
        _quantizes_weights,
        f"quantized weights: --bits B, --weight_bits B, or {SEARCH}",
    ),
    Need(
        ("act_range_percentile", "act_symmetric", "act_per_channel", "per_token", "remove_padding"),
        _quantizes_activations,
        "quantized activations: --bits B, --activation_bits B, or a search that is not --weight_only_search",
    ),
    Need(
        ("smooth_quant_criterion", "smooth_quant_samples"),
        lambda config: config.smooth_quant and config.smooth_quant_alpha.startswith("auto"),
        "--smooth_quant --smooth_quant_alpha auto",
    ),
    Need(("kv_cache_tokens",), lambda config: config.quantize_kv_cache is not None, "--quantize_kv_cache FORMAT"),
    Need(("rounding_samples",), lambda config: config.rounding != "nearest", "--rounding gptq or adaround"),
    Need(("subset_ratio",), lambda config: config.use_subset, "--use_subset"),
    Need(("text_column", "label_column"), _is_folder, "a local folder as --task"),
    Need(
        ("data_dir",),
        lambda config: config.task != "digits" and not _is_folder(config),
        "a task that is read from elsewhere: digits come with scikit-learn, a folder given as --task is the data",
    ),
    Need(("log_dir",), lambda config: config.report_to == "tensorboard", "--report_to tensorboard"),
    Need(("eval_steps",), lambda config: config.max_steps != 0, "steps: --max_steps 0 evaluates once, at the end"),
)
_TEXTS = ("text", "lm", "qa", "summary")
KINDS = {
    ("max_length", "cost_seq_len", "remove_padding", "quantize_kv_cache"): (_TEXTS, "texts"),
    ("max_target_length", "num_beams"): (("summary",), "a task whose model writes texts"),
    ("image_size", "augment", "channels_last"): (("image",), "images"),
}
"""flags -> (kinds of tasks that use them, how an error describes such a task)"""


def check_effects(config: RunConfig) -> None:
    """Raise UserError for the first flag that would be ignored."""
    for name, need in _idle(config):
        raise UserError(f"{shown(config, name)} has no effect here: it needs {need}")
    if config.quantizer == "lsq_plus" and config.per_token:
        raise UserError("--quantizer lsq_plus contradicts --per_token: scales found for each token learn no offset")


def reads_texts(task: Any) -> bool:
    """Return whether a task reads texts. A local folder counts as such, because its files are not inspected here."""
    from eval.tasks import TASKS

    known = TASKS.get(str(task))
    return known is None or known.kind in _TEXTS


def without_idle(config: RunConfig) -> RunConfig:
    """Return a copy with every flag that would be ignored reset to its default.

    In a grid, a flag applies only to the runs that use it.
    """
    defaults: dict[str, Any] = {entry.name: entry.default for entry in fields(RunConfig)}
    return replace(config, **{name: defaults[name] for name, _ in _idle(config)})


def check_kind(config: RunConfig, kind: str) -> None:
    """Raise UserError for a flag that only tasks of another kind use (see `eval.tasks.Kind`)."""
    for name, need in _other_kinds(config, kind):
        raise UserError(f"{shown(config, name)} has no effect here: it needs {need}; --task {config.task} is {kind}")


def shown(config: RunConfig, name: str) -> str:
    """Format a flag as the user types it: '--seed 3', '--per_token', '--no_augment'."""
    value = getattr(config, name)
    return f"--{name}" if value is True else f"--no_{name}" if value is False else f"--{name} {value}"


def _idle(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield (flag, what it needs) for each flag that would be ignored."""
    for need in NEEDS:
        if not need.met(config):
            yield from ((name, need.what) for name in need.flags if _given(config, name))
    if task := _known_task(config):
        yield from _other_kinds(config, task.kind)
        if not config.augment and task.kind == "image" and not task.augmented:
            yield "augment", "a task whose images are cropped and flipped"


def _other_kinds(config: RunConfig, kind: str) -> Iterator[tuple[str, str]]:
    for names, (kinds, what) in KINDS.items():
        if kind not in kinds:
            yield from ((name, what) for name in names if _given(config, name))


def _known_task(config: RunConfig) -> Any:
    from eval.tasks import TASKS

    return TASKS.get(str(config.task))


def _given(config: RunConfig, name: str) -> bool:
    default = next(entry.default for entry in fields(RunConfig) if entry.name == name)
    return getattr(config, name) not in (default, None)

"""--architecture_space: reads its lists of choices and checks them, without torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from eval.config.run_config import RunConfig
from quant.errors import UserError
from quant.formats import FLOAT, GroupFormat

T = TypeVar("T", int, float)

ALONE = {
    "engine": "the table of what engines store knows no sizes",
    "max_drop": "the budget of an architecture is a cost",
    "quantize_kv_cache": "caches are no layers of the architecture",
    "charge_attention": "products of activations belong to no single layer",
    **dict.fromkeys(("rotate", "gamma_migration", "smooth_quant"), "it ties the channels of layers to each other"),
    **dict.fromkeys(
        ("quantize_residual_adds", "quantize_products", "quantize_embeddings", "high_precision_ops"),
        "only layers and their inputs are quantized",
    ),
    "act_per_channel": "scales of inputs would have to follow the widths",
    "offload_weights": "weights are sliced in memory",
}
"""Flag -> why a search of architecture does not go with it."""


def widths(config: RunConfig) -> tuple[float, ...]:
    """Return the shares of --width_choices. Raises UserError for what is no list of shares in (0, 1]."""
    shares = _numbers(config, "width_choices", float)
    if wrong := [share for share in shares if not 0 < share <= 1]:
        raise UserError(
            f"--width_choices {config.width_choices}: {wrong[0]:g} is no share of the trained width, in (0, 1]"
        )
    return shares


def kernels(config: RunConfig) -> tuple[int, ...]:
    """Return the sides of --kernel_choices. Raises UserError for what is no list of odd numbers."""
    sides = _numbers(config, "kernel_choices", int)
    if wrong := [side for side in sides if side < 1 or side % 2 == 0]:
        raise UserError(f"--kernel_choices {config.kernel_choices}: kernels have odd sides, as 3,5,7; got {wrong[0]}")
    return sides


def depths(config: RunConfig) -> tuple[int, ...]:
    """Return the numbers of --depth_choices. Raises UserError for what is no list of positive numbers."""
    blocks = _numbers(config, "depth_choices", int)
    if wrong := [count for count in blocks if count < 1]:
        raise UserError(f"--depth_choices {config.depth_choices}: a stage keeps at least 1 block, got {wrong[0]}")
    return blocks


def check_architecture(config: RunConfig) -> None:
    """Check --architecture_space and its lists.

    Raises:
        UserError: One line that names the flag, the value and what is wrong.
    """
    if config.architecture_space is None:
        return
    given = f"--architecture_space {config.architecture_space}"
    if config.method != "search":
        raise UserError(f"{given} contradicts --method {config.method}: it needs --search")
    if config.kernel_choices is not None and config.architecture_space != "mobilenetv2":
        raise UserError(f"--kernel_choices {config.kernel_choices} contradicts {given}: take mobilenetv2")
    lists = widths(config), kernels(config)
    if not depths(config) and all(len(set(choices)) < 2 for choices in lists):
        raise UserError(
            f"{given} leaves no choice: give several --width_choices, --kernel_choices or --depth_choices, got "
            f"--width_choices {config.width_choices}"
        )
    for flag, why in ALONE.items():
        if getattr(config, flag):
            raise UserError(f"--{flag} contradicts {given}: {why}")
    if len(config.target_list) > 1:
        raise UserError(f"--target_bits {config.target_bits} contradicts {given}: one search ends as one model")
    if config.cost_scope == "file":
        raise UserError(f"--cost_scope file contradicts {given}: what stays in float has no size there")
    if config.rounding != "nearest":
        raise UserError(f"--rounding {config.rounding} contradicts {given}: the widths are chosen after it")
    if grouped := [f.name for f in config.search_formats if isinstance(f, GroupFormat) and f != FLOAT]:
        raise UserError(f"--search_space {config.search_space} contradicts {given}: widths would cut {grouped[0]}")


def _numbers(config: RunConfig, name: str, kind: Callable[[str], T]) -> tuple[T, ...]:
    value = getattr(config, name)
    try:
        return tuple(kind(entry) for entry in value.split(",")) if value else ()
    except ValueError:
        raise UserError(f"--{name} {value}: must be numbers with commas between them") from None

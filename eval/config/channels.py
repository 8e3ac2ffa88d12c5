"""--channel_groups: checks it against the other flags, without torch."""

from __future__ import annotations

from eval.config.run_config import RunConfig
from quant.engines.table import ENGINES
from quant.errors import UserError
from quant.formats import CHANNEL_GROUPS, IntFormat, has_channel_scales, mixed_formats

ALONE = {
    "architecture_space": "the channels of a layer are chosen, too",
    "max_latency": "the table has no latencies of layers with several formats",
}
"""Flag -> why groups of output channels do not go with it."""


def check_channel_groups(config: RunConfig) -> None:
    """Check --channel_groups.

    Raises:
        UserError: One line that names the flag, the value and what is wrong.
    """
    groups, given = config.channel_groups, f"--channel_groups {config.channel_groups}"
    if groups not in CHANNEL_GROUPS:
        raise UserError(f"{given}: no such number of groups; choices: {', '.join(map(str, CHANNEL_GROUPS))}")
    if groups == 1:
        return
    if config.engine is not None and not ENGINES[config.engine].mixes:
        able = ", ".join(name for name, engine in ENGINES.items() if engine.mixes)
        raise UserError(f"--engine {config.engine} contradicts {given}: its file has one format a layer; choose {able}")
    for flag, why in ALONE.items():
        if (value := getattr(config, flag)) is not None:
            raise UserError(f"--{flag} {value} contradicts {given}: {why}")
    if not config.per_channel:
        raise UserError(f"--no_per_channel contradicts {given}: each output channel needs a scale of its own")
    if config.weight_quantizer == "lsq_plus":
        raise UserError(f"--weight_quantizer lsq_plus contradicts {given}: minifloats and integers share no offset")
    if not mixed_formats(config.search_formats, groups):
        raise UserError(
            f"--search_space {config.search_space} contradicts {given}: it has fewer than two formats with a scale for "
            "each channel (intN, eXmY) to mix"
        )
    others = [f for f in config.search_formats if has_channel_scales(f) and not isinstance(f, IntFormat)]
    if config.rounding != "nearest" and others:
        raise UserError(f"--rounding {config.rounding} contradicts {given}: it mixes integers alone, not {others[0]}")

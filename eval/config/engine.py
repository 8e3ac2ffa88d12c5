"""--engine: checks that an engine runs what the flags ask for, and sets the flags that it wants, without torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from eval.config.run_config import RunConfig
from quant.engines.rules import COMPUTING, Engine, Pair
from quant.engines.table import ENGINES
from quant.errors import UserError
from quant.formats import FLOAT

BESIDE_COMPUTING = ("high_precision_ops", "quantize_residual_adds", "quantize_products", "quantize_embeddings")
"""Flags that quantize more than layers, which no engine's file has a place for."""


def check_engine(config: RunConfig) -> None:
    """Check that the engine runs the formats that the flags ask for.

    Raises:
        UserError: One line that names the flag, the value and what the engine runs.
    """
    if config.engine is None:
        return
    engine = ENGINES[config.engine]
    for flag, why in _contradictions(config, engine):
        raise UserError(f"--{flag} contradicts --engine {engine.name}: {why}")
    if config.chooses:
        _check_space(config, engine)
    else:
        _check_uniform(config, engine)


def for_engine(config: RunConfig) -> RunConfig:
    """Return the config with the flags set that its engine wants: shared formats, inputs without a zero point."""
    if config.engine is None:
        return config
    engine = ENGINES[config.engine]
    fuses = engine.fuses and config.chooses and not config.single_decision
    symmetric = engine.symmetric_inputs is True and any(activation != FLOAT for _, activation in config.stored_pairs)
    return replace(config, fuse_groups=config.fuse_groups or fuses, act_symmetric=config.act_symmetric or symmetric)


def engine_notes(config: RunConfig) -> list[str]:
    """Return notes on what --engine makes of the flags; none without it."""
    if config.engine is None:
        return []
    engine = ENGINES[config.engine]
    notes = []
    if config.chooses:
        changed = {
            _shown(pair): " or ".join(map(_shown, stored))
            for pair in config.search_pairs
            if (stored := engine.stored([pair], COMPUTING, config.per_token)) != [pair]
        }
        told = ", ".join(f"{asked} as {stored}" for asked, stored in changed.items())
        notes += [f"--engine {engine.name}: stores and charges {told}"] if told else []
    if config.fuse_groups and engine.fuses:
        notes.append(f"--engine {engine.name}: layers that it fuses share formats (--fuse_groups)")
    if config.act_symmetric and engine.symmetric_inputs:
        notes.append(f"--engine {engine.name}: inputs have no zero point (--act_symmetric)")
    return notes


def _check_space(config: RunConfig, engine: Engine) -> None:
    for pair in config.search_pairs:
        if not engine.stored([pair], COMPUTING, config.per_token):
            raise UserError(
                f"--search_space {config.search_space}: {engine.name} runs nothing that holds {_shown(pair)}; "
                f"choices: {engine.choices()}"
            )
    if all(len(engine.stored(config.search_pairs, [kind], config.per_token)) < 2 for kind in COMPUTING):
        raise UserError(
            f"--search_space {config.search_space}: {engine.name} stores all of it as "
            f"{_shown(config.stored_pairs[0])}, which leaves no choice; choices: {engine.choices()}"
        )


def _check_uniform(config: RunConfig, engine: Engine) -> None:
    pair = config.uniform_formats
    stored = engine.stored([pair], COMPUTING, config.per_token)
    if pair not in stored:
        flag = next(name for name in ("bits", "weight_bits", "activation_bits") if getattr(config, name) is not None)
        instead = f"stores {_shown(pair)} as {' or '.join(map(_shown, stored))}" if stored else f"has no {_shown(pair)}"
        raise UserError(f"--{flag} {getattr(config, flag)}: {engine.name} {instead}; choices: {engine.choices()}")


def _contradictions(config: RunConfig, engine: Engine) -> Iterator[tuple[str, str]]:
    """Yield (flag, why it cannot go with the engine)."""
    for name in BESIDE_COMPUTING:
        if getattr(config, name):
            yield name, "its file has a place for layers alone"
    for name in ("smooth_quant", "gamma_migration"):
        if getattr(config, name) and not engine.takes_factors:
            yield name, "its file has no place for the factors"
    if config.quantize_kv_cache is not None:
        runs = ", ".join(name for name, other in ENGINES.items() if any("cache" in rule.kinds for rule in other.rules))
        if not any("cache" in rule.kinds for rule in engine.rules):
            yield "quantize_kv_cache", f"its file has no place for formats of caches; those of {runs} have"
    if config.act_per_channel:
        yield "act_per_channel", "no engine has a scale per input channel"
    if config.per_token and not any(rule.per_token for rule in engine.rules):
        yield "per_token", "it reads inputs with fixed ranges"
    if not config.weight_symmetric and engine.symmetric_weights:
        yield "no_weight_symmetric", "its weights have no zero point"
    if config.act_symmetric and engine.symmetric_inputs is False:
        yield "act_symmetric", "its inputs have a zero point"
    if config.quantizer == "lsq_plus" and engine.symmetric_inputs is not None:
        yield "quantizer lsq_plus", "it has no learned offsets"


def _shown(pair: Pair) -> str:
    return "/".join(format.name for format in pair)

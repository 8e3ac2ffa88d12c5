"""Builds the searches of a run: the search space, the evaluator and the phases."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from cost.profile import LayerProfile, tables_in, tied_in
from policy.budget import Limit
from policy.joint_space import JointSpace
from policy.space import SearchSpace
from quant.elastic.net import ElasticNet
from quant.errors import UserError
from quant.formats import Format, MixedFormat, parse_search_space
from quant.quant_module import QuantModule
from trainer.search.config import ReinforceConfig
from trainer.search.engine import check_choices, stored_in
from trainer.search.evaluation_sizes import EvaluationSizes
from trainer.search.evaluator import AssignmentEvaluator
from trainer.search.measured_pairs import measured_formats
from trainer.search.search_state import Phases
from trainer.search.targets import MultiTargetSearch
from trainer.training.batches import BatchReader, TrainingLength


def parse_formats(search_space: str | Sequence[Format]) -> tuple[Format, ...]:
    """Return the formats of a flag ('2,4,8') or of a sequence. Raises UserError for what is no format."""
    if isinstance(search_space, str):
        return tuple(parse_search_space(search_space))
    if mixed := [entry for entry in search_space if isinstance(entry, MixedFormat)]:
        raise UserError(
            f"search_space holds {mixed[0]}, a mix: name its formats, and divide the layers (split_channels)"
        )
    if wrong := [entry for entry in search_space if not isinstance(entry, Format)]:
        text = ",".join(map(str, search_space))
        raise UserError(f"search_space holds {wrong[0]!r}, which is no Format: pass search_space={text!r}")
    return tuple(search_space)


def build_searches(
    config: ReinforceConfig,
    make_space: Callable[..., SearchSpace],
    model: nn.Module,
    modules: Mapping[str, QuantModule],
    held_out: Any,
    *,
    profiles: Sequence[LayerProfile],
    limits: Sequence[Limit],
    architecture: ElasticNet | None,
    reader: BatchReader,
    length: TrainingLength,
    batch_size: int,
    **evaluation: Any,
) -> MultiTargetSearch:
    """Return the searches of all targets of a run.

    Args:
        config: settings of the search, or of a competing method.
        make_space: (tied, tables, stores) -> search space, see `policy.space.build_space`.
        model: model whose layers are `modules`.
        modules: layer name -> quantized layer.
        held_out: dataset on which assignments are evaluated.
        profiles: cost profiles of the layers.
        limits: hard limits on further costs.
        architecture: decisions of an elastic model, searched beside the formats; None: formats alone.
        reader: reads rows as batches; its seed is that of all random choices.
        length: length of the training.
        batch_size: largest evaluation batch.
        **evaluation: further arguments of the AssignmentEvaluator.

    Raises:
        UserError: if the model calls none of its layers, or there is nothing to choose.
    """
    if profiles and not any(profile.calls for profile in profiles):
        raise UserError(
            f"the model calls none of its {len(profiles)} quantized layers: does it keep the float ones "
            "in a list, or read their weights itself?"
        )
    tied, tables, stores = tied_in(profiles), tables_in(profiles), stored_in(config.engine, modules)
    space = make_space(tied=tied, tables=tables, stores=stores)
    if config.engine is not None:
        check_choices(config.engine, space)
        profiles = [replace(profile, engine=config.engine) for profile in profiles]
    if architecture is not None:
        space = JointSpace.of(space, architecture)
    counts, training = (space.num_decisions, space.num_choices), (length.steps, length.step_examples)
    settings = config.sensitivity_examples, config.measure_share
    more = {"targets": len(config.bits_list), "measured": measured_formats(space)}
    evaluation |= {
        "sizes": EvaluationSizes(len(held_out), *counts, batch_size, *training, *settings, **more),
        "quality": config.reward_quality,
        "reward_examples": math.ceil(config.reward_share * length.batch_size),
    }
    evaluator = AssignmentEvaluator(model, modules, space, held_out, reader.seed, reader=reader, **evaluation)
    phases = Phases.of(config, length.steps if config.method == "search" else 0, architecture is not None)
    return MultiTargetSearch(config, evaluator, profiles, limits, phases, reader.seed)

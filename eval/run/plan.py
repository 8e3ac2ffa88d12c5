"""The plan of a run: its data, model, layers and budget, loaded and checked before training."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.config.effects import check_kind
from eval.config.files import writing
from eval.config.run_config import RunConfig
from eval.modeling.places import saved_model, starting_model
from eval.run.architecture import elastic_model, larger_kernels
from eval.run.engine import engine_layers, storage_of
from eval.run.limits import LIMIT_FLAGS, limits_of
from quant.errors import UserError
from quant.formats import FLOAT, Format
from trainer.training.saved_files import WEIGHTS

if TYPE_CHECKING:  # importing torch and the Trainer takes seconds; flags are checked without them
    from cost.profile import LayerProfile
    from eval.data.dataset import PreparedData, TaskData
    from eval.eval_partitions import Blocks
    from eval.modeling.bundle import ModelBundle
    from eval.modeling.inputs import ModelInputs
    from policy.space import Partition, SearchSpace
    from quant.elastic.net import ElasticNet
    from quant.transforms.kv_cache import CachedAttention
    from trainer.search.config import ReinforceConfig
    from trainer.training.progress import Listener

logger = logging.getLogger(__name__)


@dataclass
class Plan:
    """Data, model, layers and profiles of a run, after all checks and before training."""

    config: RunConfig
    data: TaskData
    bundle: ModelBundle
    prepared: PreparedData
    layers: list[str]
    profiles: list[LayerProfile]
    caches: list[CachedAttention] = field(default_factory=list)
    """With --quantize_kv_cache: the attentions that have a cache."""
    fused: Blocks = field(default_factory=dict)
    """With --fuse_groups, --fuse_experts: the finest partition that keeps each fused group together."""
    architecture: ElasticNet | None = None
    """With --architecture_space: the decisions about the model, which is elastic."""
    whole_profiles: list[LayerProfile] = field(default_factory=list)
    """After a search of architecture: profiles of the layers before they were made smaller."""

    @property
    def compute_metrics(self) -> Any:
        """Metrics for the Trainer; None if metrics need the texts of a split, see `eval.run.trainer.evaluate`."""
        own = self.prepared.split_metrics or self.prepared.writer
        return None if own else self.data.compute_metrics

    @property
    def cache_choices(self) -> dict[str, tuple[Format, ...]]:
        """Caches whose format is chosen -> their formats; empty if all have the same."""
        formats = self.config.cache_formats
        return {cache.name: formats for cache in self.caches} if len(formats) > 1 else {}

    @property
    def channel_groups(self) -> dict[str, int]:
        """With --channel_groups: layers whose output channels form groups -> how many."""
        from quant.channel_groups import can_split

        groups = self.config.channel_groups
        layers = {name: self.bundle.model.get_submodule(name) for name in self.layers} if groups > 1 else {}
        return dict.fromkeys(can_split(layers, groups), groups)

    @property
    def formats(self) -> tuple[Format, ...]:
        """Formats that layers may have, without float."""
        config = self.config
        if config.engine is not None:
            wanted = tuple(format for pair in config.stored_pairs for format in pair)
        else:
            wanted = config.search_formats if config.chooses else config.uniform_formats
        return tuple(dict.fromkeys(format for format in wanted if format != FLOAT))


def make_plan(config: RunConfig, on_progress: Listener | None = None) -> Plan:
    """Load the data and the model, find and profile the layers, and check the budget.

    Args:
        config: Flags of the run.
        on_progress: Called with the name of each phase.

    Raises:
        UserError: The data or the model cannot be loaded, or they contradict the flags.
    """
    from cost.file_scope import charge_file
    from cost.profile import cache_profile, profile_model
    from eval.data.loading import load_task, prepare
    from eval.layers.coverage import searched_layers, takes_file
    from eval.modeling.inputs import agree_on_classes
    from eval.models import build_model, recompute_activations
    from quant.transforms.kv_cache import find_caches
    from quant.transforms.unfold import unfold
    from trainer.search.engine import check_choices
    from trainer.training.progress import unheard

    check_phases(config)
    tell = on_progress or unheard
    tell("reading data")
    data = load_task(config)
    check_kind(config, data.kind)
    trains_tokenizer = config.from_scratch and data.kind != "image" and starting_model(config) is None
    corpus = data.corpus() if trains_tokenizer else None
    tell("building the model")
    bundle = build_model(config, data.num_labels, corpus)
    if config.offload_weights:
        offload(bundle.model, config)
    if config.gradient_checkpointing:
        recompute_activations(bundle.model)
    if config.channels_last:
        import torch

        bundle.model.to(memory_format=torch.channels_last)  # convolutions keep this layout in their outputs
    if config.load_model_path is not None and saved_model(config.load_model_path) is None:
        start_from(bundle, config)
    log_notes(bundle, config)
    if not bundle.trained:
        _refuse_untrained(config)
    data = agree_on_classes(data, bundle, config)
    tell("preparing data")
    prepared = prepare(data, bundle, config)
    tell("looking at the layers")
    unfold(bundle.model)
    if config.kernel_choices is not None and not bundle.trained:
        bundle.notes += larger_kernels(bundle.model, config)
    if config.rotate:
        rotate_model(bundle, prepared.example_inputs, config.seed)
    if config.offload_weights:
        offload(bundle.model, config)  # weights that have been made anew since
    layers = searched_layers(bundle.model, data.kind, config)
    if config.engine is not None:
        layers, notes = engine_layers(bundle, layers, config)
        for note in notes:
            logger.info(note)
        bundle.notes += notes
    profiles = profile_model(bundle.model, prepared.example_inputs, layers, charge_attention=config.charge_attention)
    if takes_file(config):
        ranges = config.per_channel, not config.weight_symmetric, not config.per_token
        profiles = charge_file(profiles, bundle.model, *ranges)
    caches = find_caches(bundle.model, prepared.example_inputs) if config.quantize_kv_cache else []
    plan = Plan(config, data, bundle, prepared, layers, profiles, caches)
    plan.profiles = [replace(profile, engine=config.engine) for profile in plan.profiles]
    plan.profiles += [cache_profile(cache, config.cache_tokens) for cache in caches if plan.cache_choices]
    plan.fused = fused(plan)
    if config.architecture_space is not None:
        plan.architecture = elastic_model(bundle, prepared, layers, config)
    if config.engine is not None and config.chooses:
        check_choices(config.engine, search_space(plan))
    budget(plan)
    return plan


def offload(model: Any, config: RunConfig) -> None:
    """Move a model's weights into files without a name in --output_root_dir, for --offload_weights.

    Raises:
        UserError: The disk has no room for them.
    """
    from quant.mapped_weights import map_weights

    folder = Path(config.output_root_dir)
    with writing("output_root_dir", folder):
        folder.mkdir(parents=True, exist_ok=True)
        map_weights(model, folder)


def fused(plan: Plan) -> Blocks:
    """Return the finest partition that keeps the groups of --fuse_groups and --fuse_experts together; {} without both.

    Raises:
        UserError: The model has no experts for --fuse_experts.
    """
    from eval.layers.experts import expert_groups
    from eval.layers.fused_groups import fused_groups
    from policy.space import merge

    config, model, layers = plan.config, plan.bundle.model, plan.layers
    experts = expert_groups(model, layers) if config.fuse_experts else []
    if config.fuse_experts and not experts:
        raise UserError(f"--fuse_experts: {type(model).__name__} has no experts among its quantized layers")
    inputs = fused_groups(model, layers, plan.prepared.example_inputs) if config.fuse_groups else {}
    return merge({name: [name] for name in layers}, [*inputs.values(), *experts]) if inputs or experts else {}


def rotate_model(bundle: ModelBundle, example: Any, seed: int) -> None:
    """Rotate the residual stream for --rotate; before the layers are profiled, as its head may no longer be tied."""
    from quant.transforms.rotation import rotate

    notes = rotate(bundle.model, example, seed)
    for note in notes:
        logger.info(note)
    bundle.notes += notes


def check_phases(config: RunConfig) -> None:
    """Raise UserError if a search has no steps in which the policy learns."""
    from trainer.search.search_state import Phases

    if config.method == "search" and config.max_steps > 0:
        Phases.of(search_settings(config), config.max_steps)


def count_steps(config: RunConfig, examples: int) -> int:
    """Optimizer steps of a run on `examples` training examples, counted as the Trainer of transformers counts them."""
    if config.max_steps >= 0:
        return config.max_steps
    batch = config.train_batch_size * config.gradient_accumulation_steps
    return math.ceil(config.num_train_epochs * max(1, math.ceil(examples / batch)))


def search_settings(config: RunConfig) -> ReinforceConfig:
    """Convert the search flags to the configuration of the trainer; the recipe sets the defaults."""
    from trainer.search.config import ReinforceConfig

    names = {field.name for field in fields(ReinforceConfig)}
    given = {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}
    if config.target_list:
        given["target_bits"] = config.target_list if len(config.target_list) > 1 else config.target_list[0]
    return ReinforceConfig.fliqs(**given) if config.recipe == "fliqs" else ReinforceConfig(**given)


def _refuse_untrained(config: RunConfig) -> None:
    """Raise UserError for flags that need a model whose weights, including the head, are all trained."""
    reasons = {"max_drop": "counts from what the float model scores", "distill": "has the float model teach"}
    for flag, why in reasons.items():
        if value := getattr(config, flag):
            raise UserError(
                f"--{flag} {value:g}: {why}, and this one's weights are not all trained: train it with --method float, "
                "then start from it with --load_model_path RUN"
            )


def start_from(bundle: ModelBundle, config: RunConfig) -> None:
    """Copy the weights of a --load_model_path that is not a finished run: a safetensors file, or a folder with one.

    Raises:
        UserError: There are no weights, or the tokenizer was trained for this run, so that the token ids differ.
    """
    from eval.modeling.bundle import copy_tensors, read_tensors

    path = Path(str(config.load_model_path)).expanduser()
    subject = f"--load_model_path {config.load_model_path}"
    file = path if path.is_file() else path / WEIGHTS
    if not file.is_file():
        raise UserError(f"{subject}: holds no {WEIGHTS}")
    if config.from_scratch and bundle.tokenizer is not None:
        raise UserError(
            f"{subject}: is no finished run, so its tokenizer is not known, and --from_scratch trains another one; "
            "give the run's folder, or a save_pretrained folder as --model_path"
        )
    # The notes of the builder concern weights that have just been replaced.
    bundle.notes = copy_tensors(bundle.model, read_tensors(file, subject), subject)
    bundle.trained = not bundle.notes


def log_notes(bundle: ModelBundle, config: RunConfig) -> None:
    """Log the notes of the model, as a warning if its weights are random and --from_scratch was not given."""
    from eval.modeling.bundle import RANDOM_WEIGHTS

    for note in bundle.notes:
        if note.startswith(RANDOM_WEIGHTS) and not config.from_scratch:
            logger.warning(
                f"--model {config.model}: {note}; --model_path or --load_model_path give trained ones, "
                "--from_scratch says that none are meant"
            )
        else:
            logger.info(f"model: {note}")


def budget(plan: Plan) -> float | None:
    """Return the target of the run, the largest of several, in the unit of its cost; None without a target.

    Raises:
        UserError: No assignment meets the target, or the target and all limits together; names the reachable range.
    """
    from cost.units import UNITS
    from policy.allocators import MAX_EXHAUSTIVE
    from policy.solve import InfeasibleError
    from trainer.search.config import budget_of, resolve_target

    config = plan.config
    if config.cost_target is None and config.target_bits is None:
        return None
    cost_type: Any = config.cost_type
    space, limits, target = search_space(plan), limits_of(config, plan.profiles), (cost_type, config.cost_target)
    # Without --cost_target, the limit on the same type of cost serves as the target; errors name its flag.
    flag = next((LIMIT_FLAGS[limit.name] for limit in limits if (limit.name, limit.value) == target), "--cost_target")
    targets = [
        resolve_target(space, plan.profiles, cost_type, config.cost_target, bits, flag)
        for bits in config.target_list or (None,)
    ]
    if config.method == "exhaustive" and (size := space.num_choices**space.num_decisions) > MAX_EXHAUSTIVE:
        raise UserError(f"--method exhaustive: {size:.3g} assignments are too many to try, at most {MAX_EXHAUSTIVE}")
    if limits:
        within = budget_of(space, plan.profiles, cost_type, targets[0], limits)
        try:
            within.solve(-within.tables[0])
        except InfeasibleError as error:
            requested = [(flag if config.target_bits is None else "--target_bits", targets[0], UNITS[cost_type])]
            requested += [(LIMIT_FLAGS[limit.name], limit.value, limit.unit) for limit in limits]
            limit_texts = [
                f"{flag} {value:.4g} {unit} (reachable: {low:.4g} to {high:.4g}"
                + (", not even alone)" if value < low else ")")
                for (flag, value, unit), (low, high) in zip(requested, error.ranges, strict=True)
            ]
            raise UserError(f"no assignment meets all limits: {', '.join(dict.fromkeys(limit_texts))}") from None
    return targets[-1]


def search_space(plan: Plan) -> SearchSpace:
    """Build the search space that the flags describe."""
    return space_of(plan, partition(plan))


def space_of(plan: Plan, partition: Partition) -> SearchSpace:
    """Build the search space of a partition of the layers."""
    from cost.profile import tables_in, tied_in
    from policy.joint_space import JointSpace
    from policy.space import build_space

    config, profiles = plan.config, plan.profiles
    activations = config.weight_only_search, config.separate_activations
    tied = tied_in(profiles), tables_in(profiles)
    names = [*plan.layers, *plan.cache_choices]
    stores = storage_of(plan.bundle.model, plan.layers, config)
    space = build_space(
        names, config.search_formats, partition, *activations, *tied, plan.cache_choices, stores, plan.channel_groups
    )
    return space if plan.architecture is None else JointSpace.of(space, plan.architecture)


def partition(plan: Plan) -> Partition:
    """Return the partition of the layers into groups that share a decision."""
    from eval.eval_partitions import block_partition
    from eval.layers.fused_groups import merge

    if plan.config.partition in ("role", "depth"):
        blocks = block_partition(plan.bundle.model, plan.layers, plan.config.partition)
        return merge(blocks, plan.fused.values())
    return plan.fused or plan.config.partition  # type: ignore[return-value]


def inputs_of(plan: Plan) -> ModelInputs:
    """Describe the inputs of the model, as saved with it."""
    from eval.modeling.inputs import ModelInputs

    task, config = plan.data.task, plan.config
    image = task.kind == "image"
    return ModelInputs(
        kind=task.kind,
        columns=plan.data.columns,
        classes=tuple(plan.data.label_names),
        regression=task.regression,
        candidates=task.candidates,
        max_length=None if image else min(config.max_length, plan.bundle.max_length),
        max_target_length=config.max_target_length if task.kind == "summary" else None,
        pixels=plan.prepared.pixels,
    )

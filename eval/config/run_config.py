"""The configuration of a run: every flag of the command line with its default and help text.

Each dataclass is one group in `--help_all` and docs/flags.md; `RunConfig` inherits them all. The field names are also
the keys of a YAML file. Nothing here imports torch, so that wrong flags are refused within seconds.
"""

from __future__ import annotations

import re
from dataclasses import Field, dataclass, field, replace
from pathlib import Path
from typing import Any

from cost.units import UNITS
from eval.config.files import is_path
from quant.cache_formats import parse_cache_formats
from quant.engines.rules import COMPUTING, Pair
from quant.engines.table import ENGINES
from quant.formats import Format, activation_format, format_pairs, parse_format, parse_search_space
from quant.validation import OBSERVER_NAMES, WEIGHTS_ONLY

LAUNCH_FILE, RUN_FILE = "launch.yaml", "config.yaml"
"""names of the files that hold the flags of a launch and of a run, in their folders"""
TUNE_FOLDER = "tune"
"""name of the folder of Ray Tune's files, next to the runs' folders"""


def flag(default: Any, help: str, **argparse: Any) -> Any:
    """Define a field with its help text. `argparse`: further arguments of `add_argument`, such as choices, aliases."""
    return field(default=default, metadata={"help": help, **argparse})


def switch(help: str) -> Any:
    """Define an on/off flag whose default depends on the model; None means the default."""
    return flag(None, help, nargs="?", const=True)


def name_of(entry: Field) -> str:
    """Return the flag of a field, as the user types it."""
    return f"--{entry.name}"


@dataclass(frozen=True)
class DataFlags:
    """Which model and data set to use, and how much of the data."""

    _argument_group_name = "Models and data"

    task: str | None = flag(
        None, "what to train on: a task's name, or a local folder with csv, json, parquet or images"
    )
    model: str | None = flag(
        None, "model by name, Hub id, local folder, timm:NAME or torchvision:NAME", aliases=["--model_type"]
    )
    model_path: str | None = flag(None, "save_pretrained folder, finished run, or safetensors file beside --model")
    from_scratch: bool = flag(False, "random weights from the model's configuration; needs no network")
    data_dir: str | None = flag(None, "local folder in the Hub's layout instead of the Hub")
    text_column: str | None = flag(None, "text column of a local folder's table")
    label_column: str | None = flag(None, "label column of a local folder's table")
    max_train_samples: int | None = flag(None, "use at most this many training examples")
    max_eval_samples: int | None = flag(None, "use at most this many validation examples")
    use_subset: bool = flag(False, "train on the share --subset_ratio of the training split")
    subset_ratio: float = flag(0.1, "share of the training split that --use_subset keeps, in (0, 1]")
    max_length: int = flag(128, "longest text, in tokens; of longer contexts, questions are asked piece by piece")
    max_target_length: int = flag(128, "longest summary, in tokens")
    num_beams: int | None = flag(None, "beams that summaries are searched with; default: the model's own")
    image_size: int | None = flag(None, "side of the input image in pixels; default: the model's own")
    cost_seq_len: int | None = flag(None, "tokens a text is charged for in the cost; default: --max_length")
    augment: bool = flag(True, "crop and flip training images")


@dataclass(frozen=True)
class TrainingFlags:
    """How the weights are trained, and on what hardware."""

    _argument_group_name = "Training"

    num_train_epochs: float = flag(3.0, "passes over the training split")
    max_steps: int = flag(-1, "optimizer steps, in place of epochs; -1: by epochs, 0: evaluate only")
    learning_rate: float = flag(5e-5, "peak learning rate of the weights")
    train: str = flag(
        "all",
        "what is trained: all weights with the learned scales of the formats, or these scales alone",
        choices=["all", "scales"],
    )
    train_batch_size: int = flag(32, "examples in one training batch")
    eval_batch_size: int = flag(32, "examples in one evaluation batch")
    gradient_accumulation_steps: int = flag(1, "batches added up before an optimizer step")
    optimizer: str = flag(
        "adamw_torch", "optimizer of the weights; sgd has momentum 0.9", choices=["adamw_torch", "sgd"]
    )
    distill: float | None = flag(
        None,
        "share of the loss that pulls towards the float model's own class probabilities, in [0, 1]; default: 0.9 for "
        "augmented images where the model comes trained, else 0",
        nargs="?",
        const=0.9,
    )
    fp16: bool = flag(False, "half precision autocast; needs a GPU")
    bf16: bool = flag(False, "bfloat16 autocast, on GPU or CPU")
    gradient_checkpointing: bool = flag(False, "recompute activations to save memory")
    offload_weights: bool = flag(
        False, "keep the weights in files mapped into memory, for models larger than memory; needs --max_steps 0"
    )
    channels_last: bool = flag(False, "images and convolutions with the channels innermost in memory")
    num_workers: int = flag(0, "processes that load and augment the data; 0: the training process itself")
    eval_steps: int | None = flag(None, "evaluate every so many steps; default: once, at the end")
    log_steps: int = flag(10, "log every so many steps")
    seed: int = flag(42, "seed of everything that is random")
    device: str = flag("auto", "where to compute", choices=["auto", "cpu", "cuda"])
    compile: str = flag(
        "auto", "compile the quantizer where it pays: C++ on CPUs, torch.compile on GPUs", choices=["auto", "on", "off"]
    )


@dataclass(frozen=True)
class SearchFlags:
    """What is searched, under which budget, and how the policy learns."""

    _argument_group_name = "Search"

    search: bool = flag(False, "search one format per layer")
    block_search: str | None = flag(
        None,
        "search one format per block: by role (query, key...; tied across depth) or by depth (one transformer block)",
        nargs="?",
        const="role",
        choices=["role", "depth"],
    )
    single_decision: bool = flag(False, "search one format for the whole model")
    fuse_experts: bool = flag(False, "one decision for all experts of a mixture, as engines run them in one format")
    fuse_groups: bool = flag(
        False, "layers that engines run in one format share a decision: query, key, value; gate, up; residual sums"
    )
    search_space: str = flag(
        "4,8", "formats to choose from, e.g. 2,4,8 or int4,e2m1,e4m3; the engine's own with --engine"
    )
    engine: str | None = flag(
        None,
        "what will run the result: layers choose among the formats that it stores, and cost what these take",
        choices=list(ENGINES),
    )
    weight_only_search: bool = flag(False, "search weight formats; activations stay in float")
    separate_activations: bool = flag(False, "weights and activations of a layer may differ")
    channel_groups: int = flag(
        1,
        "groups of output channels (2 or 4) within a layer with weight formats of their own, the channels ordered by "
        "sensitivity; activations keep one format a layer",
    )
    cost_type: str = flag("memory", "memory of the weights in MiB, or compute in GBOPs", choices=list(UNITS))
    cost_scope: str = flag(
        "searched",
        "what memory counts: the weights of the searched layers; or the whole packed file, with scales and what stays "
        "in float at 16 bits, in which embeddings and the head are layers with formats of their own",
        choices=["searched", "file"],
    )
    cost_target: float | None = flag(None, "budget in the unit of --cost_type")
    target_bits: str | None = flag(
        None,
        "budget as the cost of that many bits in every searched layer; default: the middle of the search space; "
        "3,4.5 or 2.5:6:0.5 trains one model for several",
    )
    max_memory: float | None = flag(None, "hard limit on the weights' memory in MiB, beside or instead of a target")
    max_compute: float | None = flag(None, "hard limit on the compute in GBOPs, beside or instead of a target")
    max_latency: str | None = flag(
        None,
        "hard limit on the latency: CSV with your own measurements (layer,weight_format,activation_format,ms); "
        "needs --latency_target",
    )
    max_drop: float | None = flag(
        None,
        "instead of a budget: the cheapest assignment whose held-out quality is within this of float, e.g. 0.01",
    )
    latency_target: float | None = flag(None, "largest sum of the layers' latencies in --max_latency, in ms")
    cost_function: str = flag(
        "tunas_abs",
        "reward that joins quality and cost",
        choices=["tunas_abs", "one_sided_tunas_abs", "soft_exponential", "hard_exponential"],
    )
    cost_beta: float = flag(1.0, "how hard the reward punishes cost")
    charge_attention: bool = flag(False, "charge the products Q*K^T and A*V at the activation width")
    delay_steps: int | None = flag(
        None,
        "steps before the policy learns; default: half of those before fine-tuning, or a quarter of all without it",
    )
    rl_learning_rate: float | None = flag(None, "learning rate of the policy; default: the recipe's")
    max_entropy_beta: float | None = flag(None, "weight of the entropy term at its largest; default: the recipe's")
    entropy_schedule_type: str = flag(
        "cosine", "how that weight changes over the steps", choices=["linear", "cosine", "constant", "heaviside"]
    )
    reward_quality: str = flag(
        "likelihood",
        "quality in the reward: mean probability of the truth, or accuracy",
        choices=["likelihood", "accuracy"],
    )
    reward_draws: int | None = flag(None, "assignments drawn for the reward at each step; default: the recipe's")
    search_fraction: float = flag(0.1, "share of the training split held out for the reward")
    policy_prior: str | None = flag(
        None,
        "where the policy starts: at the measured effect of each layer in each format, or uniform (none); "
        "default: the recipe's",
        choices=["measured", "none", "fisher", "hawq_v2"],
    )
    sensitivity_examples: int | None = flag(
        None, "held-out examples on which each format of a layer is measured; default: by the length of the training"
    )
    measure_share: float | None = flag(
        None,
        "most that measuring single formats before the first step may take, as a share of the training, in (0, 1]: "
        "the fewer examples; default: 0.12",
    )
    settle_fraction: float | None = flag(
        None, "last share of the steps, trained under the chosen assignment; default: the recipe's"
    )
    verify_retrain: bool = flag(
        False, "train the chosen assignment once more, alone and from the float weights; its metrics join the record"
    )
    recipe: str = flag("default", "the search as we run it, or as published (FLIQS)", choices=["default", "fliqs"])


@dataclass(frozen=True)
class ArchitectureFlags:
    """Decisions about the architecture, beside those about formats."""

    _argument_group_name = "Architecture"

    architecture_space: str | None = flag(
        None,
        "also search the architecture, within the same budget: widths and depths (resnet), of depthwise convolutions "
        "kernels too (mobilenetv2), of transformers heads and feed-forward parts; needs --search",
        choices=["mobilenetv2", "resnet", "transformer"],
    )
    width_choices: str = flag("0.5,0.75,1", "shares of the channels, and of the heads, that layers may keep")
    kernel_choices: str | None = flag(
        None, "sides of depthwise kernels, e.g. 3,5,7: a small one is the centre of the large one"
    )
    depth_choices: str | None = flag(
        None, "blocks that a stage may keep besides all, e.g. 1,2: the last ones are left out"
    )


@dataclass(frozen=True)
class BaselineFlags:
    """Fixed formats, and other methods to choose them."""

    _argument_group_name = "Baselines"

    method: str | None = flag(
        None,
        "default: search with a search flag, uniform with a bits flag, else float; the rest are competitors of the "
        "search, which choose the formats once, before training (uniform does so if no bits are given)",
        choices=[
            *("search", "uniform", "float", "measured", "random", "head_tail"),
            *("fisher", "hawq_v2", "qbert", "greedy", "exhaustive"),
        ],
    )
    bits: str | None = flag(None, "one format for all weights and activations: a bit width or a name, 0 = float")
    weight_bits: str | None = flag(None, "one format for all weights")
    activation_bits: str | None = flag(None, "one format for all activations")


@dataclass(frozen=True)
class QuantizationFlags:
    """How ranges are found, what else is quantized, and the transforms of outliers."""

    _argument_group_name = "Quantization"

    per_channel: bool = flag(True, "one weight scale per output channel")
    per_token: bool = flag(False, "one activation scale per token")
    act_per_channel: bool = flag(False, "one activation scale per input channel; no export holds it")
    act_range_percentile: float = flag(0.0, "activation range: percentile of |x| in (0, 100]; 0 = min-max")
    weight_range_percentile: float = flag(0.0, "weight range: percentile of |x| in (0, 100]; 0 = min-max")
    observer: str | None = flag(
        None,
        "range estimator; default: mse for learned scales, minmax for fixed ranges",
        choices=[name for name in OBSERVER_NAMES if name not in WEIGHTS_ONLY],
    )
    weight_observer: str | None = flag(
        None,
        "range estimator of weights; default: --observer where it suits weights, else weighted_mse for learned scales, "
        "minmax for fixed ranges",
        choices=list(OBSERVER_NAMES),
    )
    quantizer: str = flag(
        "lsq", "fixed ranges, learned scales, or learned scales and offsets", choices=["fixed", "lsq", "lsq_plus"]
    )
    weight_quantizer: str | None = flag(
        None,
        "the same for weights; default: as --quantizer, lsq for lsq_plus",
        choices=["fixed", "lsq", "lsq_plus"],
    )
    act_symmetric: bool = flag(False, "integer grid of activations without a zero point")
    weight_symmetric: bool = flag(True, "integer grid of weights without a zero point")
    reduce_range: bool = flag(
        False, "int8 weights use 7 of their bits, for processors whose int8 products saturate (without VNNI)"
    )
    rounding: str = flag(
        "nearest",
        "weights: to the nearest value, or so that the layers' outputs are kept on training examples, block by block; "
        "at --max_steps 0 for the chosen formats, else once before the first step",
        choices=["nearest", "gptq", "adaround"],
    )
    rounding_samples: int = flag(128, "training examples that --rounding gptq or adaround reads")
    calibration_samples: int | None = flag(
        None, "training examples that ranges are calibrated on; default: 8 training batches"
    )
    remove_padding: bool = flag(False, "leave padded tokens out of activation ranges")
    high_precision_ops: str | None = flag(
        None, "comma list of gelu, softmax, layernorm: they compute in float between quantized inputs and outputs"
    )
    quantize_residual_adds: bool = flag(False, "quantize both inputs of residual additions")
    quantize_products: bool = flag(False, "quantize queries, keys, values and attention probabilities where multiplied")
    quantize_kv_cache: str | None = flag(
        None,
        "format of a decoder's cache of keys and values, one scale a token and head; 8 = int8 with a zero point; "
        "several (4,8): a choice of the search for each attention, whose memory counts in the budget",
    )
    kv_cache_tokens: int | None = flag(
        None, "tokens in the cache whose memory --quantize_kv_cache counts; default: --max_length"
    )
    quantize_embeddings: bool = flag(False, "quantize embedding tables, one scale a row")
    gamma_migration: bool = flag(False, "move LayerNorm's gamma into the next layer (Outlier Suppression)")
    rotate: bool = flag(
        False,
        "rotate a decoder's residual stream and its heads' values by Hadamard matrices (QuaRot without online part)",
    )
    smooth_quant: bool = flag(False, "move activation outliers into the weights (SmoothQuant)")
    smooth_quant_alpha: str = flag(
        "0.5", "how much is moved: a number in [0, 1], or the best for each layer: auto, auto:MIN:MAX:STEP"
    )
    smooth_quant_criterion: str = flag(
        "mean",
        "auto alpha: what layers that share an input take of their own best alphas",
        choices=["mean", "min", "max"],
    )
    smooth_quant_samples: int = flag(32, "auto alpha: calibration examples that losses are measured on")


@dataclass(frozen=True)
class LayerFlags:
    """Which layers are quantized, by role or by name."""

    _argument_group_name = "Layers"

    quantize_self_attention: bool = flag(True, "query, key and value")
    quantize_self_output: bool = flag(True, "projection after the attention")
    quantize_intermediate: bool = flag(True, "first layer of the feed-forward part")
    quantize_output: bool = flag(True, "second layer of the feed-forward part")
    quantize_pooler: bool | None = switch("pooler; default: off for text, on for vision")
    quantize_classifier: bool | None = switch("classification head; default: off for text, on for vision")
    include: str | None = flag(None, "quantize only layers whose name matches one of these globs (comma list)")
    exclude: str | None = flag(None, "leave layers whose name matches one of these globs in float (comma list)")


@dataclass(frozen=True)
class LauncherFlags:
    """The grid of runs of the launcher, and its resources."""

    _argument_group_name = "Launcher"

    models: str | None = flag(None, "comma list: one run for each model")
    tasks: str | None = flag(None, "comma list: one run for each task")
    methods: str | None = flag(
        None, "comma list: one run for each method; uniform takes the whole bits of each target unless --bits is given"
    )
    targets: str | None = flag(None, "comma list of target bits: one run for each")
    seeds: str | None = flag(None, "comma list: one run for each seed")
    num_cpus: int | None = flag(None, "CPU cores to use in all; default: all of this machine")
    num_gpus: int | None = flag(None, "GPUs to use in all; default: all of this machine")
    cpus_per_trial: float | None = flag(None, "CPU cores of one run; default: its share when as many run as GPUs allow")
    gpus_per_trial: float | None = flag(None, "GPUs (or a fraction of one) of one run; default: 1 where there are GPUs")
    ray_address: str | None = flag(None, "join this Ray cluster instead of starting Ray on this machine")
    resume: str | None = flag(None, "folder of an earlier launch (eval_run.py: run): finish what is missing in it")
    resolve: str | None = flag(
        None,
        "folder of a finished search for several budgets (eval_run.py, with --target_bits): choose formats for a "
        "budget between them from what it has saved, without training",
    )
    dry_run: bool = flag(
        False, "print what was found (files, classes, model), the runs, their costs and times, and stop"
    )
    asha: bool = flag(False, "stop hopeless runs early (ASHA)")
    hpo: int | None = flag(
        None, "try so many settings of cost_beta, rl_learning_rate and max_entropy_beta (Optuna)", nargs="?", const=16
    )
    cuda_visible_devices: str | None = flag(None, "GPUs that may be used, e.g. 0,1")


@dataclass(frozen=True)
class OutputFlags:
    """Where a run starts from, and what it writes where."""

    _argument_group_name = "Output"

    output_root_dir: str = flag("output", "runs go to <output_root_dir>/<task>/<exp_name>/<run_id>")
    exp_name: str = flag("default", "name of the experiment's folder")
    run_id: str | None = flag(None, "name of the run's folder; default: <model>-<method>-<target>-s<seed>")
    save_strategy: str = flag(
        "epoch",
        "when to write checkpoints; steps: every --eval_steps, or ten times in the run",
        choices=["no", "steps", "epoch", "best"],
    )
    load_model_path: str | None = flag(
        None,
        "start from this finished run: its model, weights, tokenizer; or from a safetensors file beside --model",
    )
    save_model_path: str | None = flag(None, "write the final model here as well")
    log_dir: str | None = flag(None, "TensorBoard events; default: in the run's folder")
    report_to: str = flag("tensorboard", "where metrics go besides the files", choices=["tensorboard", "none", "wandb"])
    config: str | None = flag(None, "YAML file with the same names as the flags; flags win over it")
    quiet: bool = flag(False, "print the result only")


GROUPS = (
    *(DataFlags, TrainingFlags, SearchFlags, ArchitectureFlags, BaselineFlags, QuantizationFlags, LayerFlags),
    *(LauncherFlags, OutputFlags),
)
GRID_FLAGS = {"models": "model", "tasks": "task", "methods": "method", "targets": "target_bits", "seeds": "seed"}
"""launcher flag -> the field it sets in each run of the grid"""


@dataclass(frozen=True)
class RunConfig(
    OutputFlags,
    LauncherFlags,
    LayerFlags,
    QuantizationFlags,
    BaselineFlags,
    ArchitectureFlags,
    SearchFlags,
    TrainingFlags,
    DataFlags,
):
    """All flags of one run. `eval.config.parser.parse` makes a complete one from the command line."""

    def updated(self, **values: Any) -> RunConfig:
        """Return a copy with the given values replaced."""
        return replace(self, **values)

    @property
    def searches(self) -> bool:
        """Whether any flag turns on the search."""
        return self.search or self.block_search is not None or self.single_decision

    @property
    def own_method(self) -> str:
        """The given --method, or the one that the other flags imply."""
        given = any(bits is not None for bits in (self.bits, self.weight_bits, self.activation_bits))
        return self.method or ("search" if self.searches else "uniform" if given else "float")

    @property
    def chooses(self) -> bool:
        """Whether formats are chosen under a budget, by the search or by a baseline."""
        given = any(bits is not None for bits in (self.bits, self.weight_bits, self.activation_bits))
        return self.method not in (None, "float", "uniform") or (self.method == "uniform" and not given)

    @property
    def partition(self) -> str:
        """Which layers share one decision: 'layer' (none), 'role', 'depth' or 'single' (all)."""
        return self.block_search or ("single" if self.single_decision else "layer")

    @property
    def search_formats(self) -> tuple[Format, ...]:
        """The formats of --search_space; with --engine, those that it stores their weights in."""
        if self.engine is None:
            return parse_search_space(self.search_space)
        return tuple(dict.fromkeys(weight for weight, _ in self.stored_pairs))

    @property
    def charged_bits(self) -> list[float]:
        """Bits that a weight costs in each of `search_formats`."""
        engine = ENGINES.get(self.engine or "")
        return [format.bits if engine is None else engine.weight_bits(format) for format in self.search_formats]

    @property
    def search_pairs(self) -> tuple[Pair, ...]:
        """The pairs (weights, activations) of --search_space."""
        return format_pairs(parse_search_space(self.search_space), self.weight_only_search, self.separate_activations)

    @property
    def stored_pairs(self) -> list[Pair]:
        """With --engine: the pairs that layers of any kind are stored and run in."""
        pairs = self.search_pairs if self.chooses else [self.uniform_formats]
        return ENGINES[str(self.engine)].stored(pairs, COMPUTING, self.per_token)

    @property
    def uniform_formats(self) -> tuple[Format, Format]:
        """Formats (weights, activations) of a uniform run; float for the side without a flag."""
        weight, activation = (self.bits if own is None else own for own in (self.weight_bits, self.activation_bits))
        return parse_format(weight or "float"), activation_format(parse_format(activation or "float"))

    @property
    def cache_formats(self) -> tuple[Format, ...]:
        """The formats of --quantize_kv_cache; several are choices of the search."""
        return parse_cache_formats(self.quantize_kv_cache) if self.quantize_kv_cache else ()

    @property
    def cache_tokens(self) -> int:
        """Tokens that the memory of the cache of keys and values is told for."""
        return self.kv_cache_tokens or self.max_length

    @property
    def model_name(self) -> str:
        """The model's name in folders and tables."""
        from eval.modeling.places import model_name

        return model_name(self)

    @property
    def task_name(self) -> str:
        """The task's name, or the name of its local folder."""
        return Path(str(self.task)).resolve().name if is_path(str(self.task)) else str(self.task)

    @property
    def budget(self) -> str | None:
        """The target as part of the run's name: '4.5b', '33.5MiB'; None without a target."""
        if self.cost_target is not None:
            return f"{self.cost_target:g}{UNITS[self.cost_type]}"
        return None if self.target_bits is None else "-".join(f"{bits:g}" for bits in self.target_list) + "b"

    @property
    def target_list(self) -> tuple[float, ...]:
        """The budgets of --target_bits in ascending order; 2.5:6:0.5 stands for 2.5, 3, ... 6.

        Raises:
            ValueError: if one is not a number, or a range is empty.
        """
        entries = [entry.split(":") for entry in (self.target_bits or "").split(",") if entry.strip()]
        return tuple(sorted(bits for entry in entries for bits in _spread(*map(float, entry))))

    @property
    def run_name(self) -> str:
        """`run_id`, or a name made of model, method, target and seed, so that equal runs get the same folder."""
        if self.run_id is not None:
            return self.run_id
        method = str(self.method)
        if self.chooses and self.partition != "layer":
            method = f"{self.partition}_{method}"
        formats = None
        if self.method == "uniform" and not self.chooses:
            formats = "-".join(dict.fromkeys(f.name for f in self.uniform_formats))
        words = [
            self.model_name,
            method,
            *self.fusions,
            f"channels{self.channel_groups}" if self.channel_groups > 1 else None,
            self.engine,
            self.architecture_space,
            formats,
            self.budget,
            f"s{self.seed}",
        ]
        return "-".join(safe_name(word) for word in words if word)

    @property
    def fusions(self) -> tuple[str, ...]:
        """Words of the run's name for the layers that share a decision besides the partition."""
        return ("fused",) * self.fuse_groups + ("experts",) * self.fuse_experts

    @property
    def experiment_folder(self) -> Path:
        """<output_root_dir>/<task>/<exp_name>, as an absolute path."""
        return Path(self.output_root_dir).absolute() / safe_name(self.task_name) / self.exp_name

    @property
    def run_folder(self) -> Path:
        """The folder of this run in `experiment_folder`."""
        return self.experiment_folder / self.run_name

    @property
    def smaller_targets(self) -> dict[float, Path]:
        """Maps each budget of --target_bits, except the largest, to the sub-folder that holds its record."""
        return {bits: self.run_folder / f"{bits:g}b" for bits in self.target_list[:-1]}


MOST_BUDGETS = 100
"""Largest number of steps in a range of --target_bits."""


def _spread(low: float, high: float | None = None, step: float = 1.0) -> list[float]:
    """Return low, low + step, ... up to high, free of the rounding errors of a sum; [low] without high."""
    if high is None:
        return [low]
    if not (low < high and 0 < (high - low) / step <= MOST_BUDGETS):
        raise ValueError(f"{low:g}:{high:g}:{step:g} holds no numbers, or too many")
    return [round(low + step * turn, 9) for turn in range(int((high - low) / step + 1e-9) + 1)]


def safe_name(text: str) -> str:
    """Convert a text to a part of a file name: 'org/model' becomes 'org--model'."""
    return re.sub(r"[^\w.+-]", "_", text.replace("/", "--")).lstrip(".") or "_"

"""ReinforceTrainer: transformers' Trainer that trains shared weights while a policy chooses the layers' formats."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, Sampler, Subset
from transformers import TrainingArguments
from transformers.trainer_utils import has_length

from cost.profile import LayerProfile, profile_model, tables_in, tied_in
from policy.budget import Budget, Limit
from policy.joint_space import JointSpace
from policy.space import Partition, SearchSpace, build_space
from quant.analysis.float_share import FloatShare, float_share
from quant.analysis.reach import notes_on_reach, reach_of
from quant.convert import Assignment, calibrate, check_tied, quantize_model, rounded_weights_cached, set_formats
from quant.elastic.net import ElasticNet
from quant.engines.table import ENGINES
from quant.errors import NotFiniteError, UserError
from quant.formats import Format, format_pairs, parse_search_space
from quant.quant_module import QuantModule, Reach
from trainer.search.config import ReinforceConfig
from trainer.search.engine import check_choices, quantize_for, stored_in
from trainer.search.evaluation_sizes import EvaluationSizes
from trainer.search.evaluator import AssignmentEvaluator, quality
from trainer.search.search_state import Phases, Search
from trainer.search.targets import MultiTargetSearch, SearchTarget
from trainer.training import checkpoint
from trainer.training.batch_norm import has_untrained_batch_norm, recalibrate_batch_norm
from trainer.training.batches import BatchReader, TrainingLength, streams
from trainer.training.distillation import Teacher, class_logits
from trainer.training.distributed import share_buffers
from trainer.training.history import History
from trainer.training.progress import Listener, counted, unheard
from trainer.training.quantization_file import write_companions, write_quantization
from trainer.training.safetensors_trainer import PickleFreeTrainer
from trainer.training.sampler import PhasedSampler, hold_out
from trainer.training.scale_groups import SCALES, group_scales, needs_groups, scale_exponents
from trainer.training.step_logger import StepLogger, TrainingDiverged
from trainer.training.weight_rounding import WeightRounding

__all__ = ["ReinforceConfig", "ReinforceTrainer", "TrainingDiverged", "quality"]

STATE = "training"
"""File of a checkpoint with everything but the model and the random generators."""
SEARCH_FRACTION = 0.1
"""Share of the training rows that a search without a `search_dataset` holds out."""
PROBABILITY_STEPS = 10
"""Steps between records of the policy's probabilities."""
CALIBRATION_BATCHES = 8
"""Training batches for calibration in a run without a search."""


class ReinforceTrainer(PickleFreeTrainer):
    """Trains shared weights while a policy chooses the formats; ends in the chosen assignment, fine-tuned.

    Args:
        model: any module that takes the columns of the datasets and returns a loss (or pass `compute_loss_func`).
        args: the Trainer's arguments.
        search: settings of the search or of a competing method; None: train under `assignment`.
        search_space: formats to choose from, as a flag ('2,4,8') or parsed.
        partition: 'layer', 'single', or block name -> layer names.
        weight_only_search: keep activations in float.
        separate_activations: choose the formats of weights and activations independently.
        assignment: fixed formats for a run without a search; None: float.
        modules: the quantized layers of a model that is quantized already; None: all layers are quantized here.
        profiles: cost profiles of the layers; None: measured on the first training example.
        train_dataset: map-style training data.
        search_dataset: held-out training data on which assignments are evaluated; None: a search holds out 10 % of the
            training data, a competing method evaluates on all of it, because it does not learn from it.
        search_rows: rows of `train_dataset` that `search_dataset` holds, if it is a part of it. They are left out of
            the training until the assignment is chosen.
        limits: hard limits on further costs.
        teacher: the float model. Assignments are then compared by the divergence from its class probabilities, and
            training follows them with the teacher's share of the loss.
        history: file that gets one line per step.
        on_step: called with each entry of the history.
        calibration_samples: training examples for calibration; None: 8 batches.
        after_calibration: called with the trainer once ranges are calibrated.
        rounding: rounds the weights by reconstruction. Without steps (`max_steps=0`), for the assignment of each
            target; else once before the first step, for the given assignment or the choice that a search starts from
            (of several targets, the largest).
        architecture: the elastic model's decisions, which are searched beside the formats; `model` ends as the plain
            smaller one that was chosen. None: formats alone.
        on_progress: listener of the run's progress.
        **trainer_arguments: further arguments of the Trainer.

    Raises:
        UserError: if the data, the formats or the model do not fit a search.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        search: ReinforceConfig | None = None,
        search_space: str | Sequence[Format] = "4,8",
        partition: Partition = "layer",
        weight_only_search: bool = False,
        separate_activations: bool = False,
        assignment: Assignment | None = None,
        modules: Mapping[str, QuantModule] | None = None,
        profiles: Sequence[LayerProfile] | None = None,
        train_dataset: Dataset | None = None,
        search_dataset: Dataset | None = None,
        search_rows: Sequence[int] = (),
        limits: Sequence[Limit] = (),
        teacher: Teacher | None = None,
        history: Path | None = None,
        on_step: Callable[[dict[str, Any]], None] | None = None,
        calibration_samples: int | None = None,
        after_calibration: Callable[[ReinforceTrainer], None] | None = None,
        caches: Mapping[str, Sequence[Format]] | None = None,
        rounding: WeightRounding | None = None,
        architecture: ElasticNet | None = None,
        on_progress: Listener | None = None,
        **trainer_arguments: Any,
    ) -> None:
        if teacher is not None and teacher.model is model:
            raise ValueError("the teacher is the model itself: give it a copy, Teacher(copy.deepcopy(model))")
        _check_training_data(train_dataset, search is not None)
        formats = _parsed(search_space)
        if search is not None and modules is None:
            pairs = format_pairs(formats, weight_only_search, separate_activations)
            engine = ENGINES.get(search.engine or "")
            modules = quantize_for(engine, model, pairs) if engine else quantize_model(model, formats=formats)
        self.modules = dict(modules or {})
        check_tied(self.modules, assignment or {})
        searching = search is not None and search.method == "search"
        if searching and search_dataset is None:
            search_rows = hold_out(train_dataset, SEARCH_FRACTION, args.seed)
            search_dataset = Subset(train_dataset, search_rows)  # type: ignore[arg-type]
        args.logging_nan_inf_filter = False  # it would let a diverged run end normally
        super().__init__(model=model, args=args, train_dataset=train_dataset, **trainer_arguments)
        if self.compute_loss_func is not None and not self.label_names:
            self.label_names = ["labels"]  # otherwise the Trainer drops columns that `forward` does not take
        first = self.is_world_process_zero()  # with several processes, only the first one writes and reports
        self.search_config = search
        self.search_dataset: Any = train_dataset if search_dataset is None else search_dataset
        self.search_rows = list(search_rows) if searching else []
        self.teacher = teacher
        if teacher is not None:
            teacher.model.to(self.args.device)
        self.calibration_samples, self.after_calibration = calibration_samples, after_calibration
        self.rounding = rounding
        self.tell = on_progress if first and on_progress is not None else unheard
        self.reach: dict[str, Reach] = {}
        """Layers that the first calibration did not reach; they stay in float for good."""
        self.targets = [SearchTarget(assignment=dict(assignment) if assignment else None)]
        """One target, or one for each of several `target_bits`, which take turns at the steps."""
        self._reader = BatchReader(self._collate, args.seed)
        self._searches: MultiTargetSearch | None = None
        if search is not None:
            self.profiles = list(
                profiles or profile_model(self.model, self._reader.read(train_dataset, [0]), self.modules)
            )
            if self.profiles and not any(profile.calls for profile in self.profiles):
                raise UserError(
                    f"the model calls none of its {len(self.profiles)} quantized layers: does it keep the float ones "
                    "in a list, or read their weights itself?"
                )
            activations = weight_only_search, separate_activations
            tied = tied_in(self.profiles), tables_in(self.profiles)
            stores = stored_in(search.engine, self.modules)
            space = build_space(list(self.modules), formats, partition, *activations, *tied, caches, stores)
            if search.engine is not None:
                check_choices(search.engine, space)
                self.profiles = [replace(profile, engine=search.engine) for profile in self.profiles]
            if architecture is not None:
                space = JointSpace.of(space, architecture)
            phases = Phases.of(search, self._length.steps if searching else 0)
            evaluator = self._make_evaluator(search, space)
            self._searches = MultiTargetSearch(search, evaluator, self.profiles, limits, phases, args.seed)
            self.targets = self._searches.targets
        self.target = self.targets[0]
        """Target whose assignment the model runs in."""
        self._fine_tuning = not searching
        """Whether the assignments of all targets are final."""
        self.architecture: dict[str, str] = {}
        """The chosen architecture: decision -> choice, as the record holds it."""
        self.structure: list[int] | None = None
        """The same as one index per decision of the elastic model; None without a search of architecture."""
        self._choices: Tensor | None = None
        self._micro_step = 0
        self._scale_exponents: dict[str, int] = {}
        self._evaluated = 0
        self._to_evaluate: int | None = None
        self.history = History(history) if history is not None and first else None
        plotted = self.space if searching else None
        self.step_logger = StepLogger(
            self.callback_handler, self._formats_of, plotted, self.history, on_step if first else None
        )
        self.add_callback(self.step_logger)

    def _make_evaluator(self, search: ReinforceConfig, space: SearchSpace) -> AssignmentEvaluator:
        length, settings = self._length, (search.sensitivity_examples, search.measure_share)
        batches = self.args.per_device_eval_batch_size, length.steps, length.step_examples
        return AssignmentEvaluator(
            self.model,
            self.modules,
            space,
            self.search_dataset,
            self.args.seed,
            sizes=EvaluationSizes(
                len(self.search_dataset), space.num_decisions, space.num_choices, *batches, *settings
            ),
            reader=self._reader,
            loss_and_outputs=lambda model, batch: self.compute_loss(model, batch, return_outputs=True),
            autocast=self.compute_loss_context_manager,
            quality=search.reward_quality,
            reward_examples=math.ceil(search.reward_share * length.batch_size),
            teacher=self.teacher,
            tell=self.tell,
        )

    # ------------------------------------------------------ the search

    @property
    def searches(self) -> MultiTargetSearch:
        """The searches of all targets. Raises ValueError for a trainer without a search."""
        if self._searches is None:
            raise ValueError("this trainer was made without a search: pass search=ReinforceConfig(...)")
        return self._searches

    @property
    def evaluator(self) -> AssignmentEvaluator:
        """Evaluates assignments on held-out data. Raises ValueError for a trainer without a search."""
        return self.searches.evaluator

    @property
    def space(self) -> SearchSpace:
        """The search space. Raises ValueError for a trainer without a search."""
        return self.evaluator.space

    @property
    def phases(self) -> Phases:
        """The phases of the run. Raises ValueError for a trainer without a search."""
        return self.searches.phases

    @property
    def budget(self) -> Budget:
        """Limits of the current target. Raises ValueError for a trainer without a search."""
        return self.target.limits

    @property
    def cost_target(self) -> float:
        """Limit of the current target on the run's own cost, in MiB or GBOPs."""
        return self.budget.limits[0]

    @property
    def cost(self) -> float:
        """Cost of the current target's assignment in MiB or GBOPs. Raises ValueError before one is chosen."""
        if self.assignment is None:
            raise ValueError("nothing is chosen yet: train first")
        return self.budget.costs(self._chosen)[0]

    @property
    def _chosen(self) -> list[int]:
        """The choice of the current target; an assignment that was loaded or given tells it, too."""
        assert self.assignment is not None
        return self.target.choice or self.space.choice(self.assignment)

    @property
    def search(self) -> Search | None:
        """Search of the current target."""
        return self.target.search

    @property
    def assignment(self) -> dict[str, tuple[Format, Format]] | None:
        """Assignment of the current target; None: not chosen yet, or float."""
        return self.target.assignment

    @property
    def contest(self) -> dict[str, Any] | None:
        """How the current target's assignment was chosen: part of the record."""
        return self.target.contest

    @property
    def on_step(self) -> Callable[[dict[str, Any]], None] | None:
        """Function that is called with each entry of the history."""
        return self.step_logger.on_step

    @on_step.setter
    def on_step(self, function: Callable[[dict[str, Any]], None] | None) -> None:
        self.step_logger.on_step = function

    @property
    def outside_cost(self) -> FloatShare:
        """Matrices of the model that no cost counts, because they are not in its layers."""
        return float_share(self.model, self.modules)

    def use(self, turn: int) -> None:
        """Put the trained model into the assignment of one target, calibrated for it.

        Batch norms are recalibrated for a float model too: methods are compared, and the moving averages of some
        models (MobileNetV2's change 0.3 % per step) are far from converged after a short training.

        Args:
            turn: index of the target.
        """
        self.target = self.targets[turn]
        if self.assignment is not None:
            rounds = self.rounding is not None and self.args.max_steps == 0
            if self.rounding is not None and rounds:
                self.rounding.restore(self.modules)
            set_formats(self.modules, self.assignment)
            self._recalibrate()
            if rounds:
                self._round_weights()
        if self.args.max_steps != 0:
            recalibrate_batch_norm(self.model, self.calibration_batches("recalibrating batch norms"))

    # ------------------------------------------------------ the run

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Train to the end; the model then runs in `assignment`, calibrated on training data.

        Args:
            resume_from_checkpoint: a checkpoint's folder; True for the newest intact one, if there is one.
            **kwargs: further arguments of the Trainer's method.

        Raises:
            TrainingDiverged: for a loss or reward that is not finite.
            CheckpointError: for a damaged folder.
        """
        folder = self.checkpoint_to_resume(resume_from_checkpoint)
        if folder is None:
            if self.history is not None:
                self.history.truncate(0)  # of a run that was killed before its first checkpoint
            self.prepare()
        else:
            self._scale_exponents = checkpoint.load_state(Path(folder) / STATE)["scale_exponents"]
        output = None
        if folder is None or not self._load_finished(folder):
            output = super().train(resume_from_checkpoint=folder, **kwargs)
        self.finish()
        return output

    def prepare(self) -> None:
        """Calibrate ranges on training data and prepare the searches, before the first step."""
        if self.modules:
            if has_untrained_batch_norm(self.model):  # its initial statistics would clip every range
                recalibrate_batch_norm(self.model, self.calibration_batches("calibrating batch norms"))
            watch = partial(counted, total=len(self.modules), phase="setting ranges", tell=self.tell, noun="layer")
            calibrate(self.model, self.modules, self.calibration_batches("calibrating"), watch=watch)
            self._set_reach(reach_of(self.modules))
            self.notes += notes_on_reach(self.modules)  # calibration has logged them
            if self.after_calibration is not None:
                self.after_calibration(self)
        if self._searches is not None:
            self._searches.prepare()
            self.target = self.targets[-1]
        if self._fine_tuning and self.assignment:
            set_formats(self.modules, self.assignment)
        if self.rounding is not None and self.args.max_steps != 0:
            if self.search is not None:
                self.space.apply(self.modules, self.search.best())
            self._round_weights()

    def _round_weights(self) -> None:
        """Round the weights by reconstruction for the current formats."""
        assert self.rounding is not None
        examples, size = self.rounding.samples, self._length.batch_size
        batches = self._reader.sample(self.train_dataset, examples, size, exclude=self.search_rows)
        several = self.args.max_steps == 0 and len(self.targets) > 1
        notes = self.rounding.round(self.model, self.modules, batches, again=several, tell=self.tell)
        self.notes += [note for note in notes if note not in self.notes]

    def _set_reach(self, reach: Mapping[str, Reach]) -> None:
        """Keep layers that calibration did not reach in float: in assignments, and in their costs."""
        if not reach:
            return
        self.reach = dict(reach)
        for name, found in reach.items():
            self.modules[name].reach = found
        for target in self.targets:
            target.set_reach(reach)
        if self._searches is not None:
            self._searches.set_reach(reach)

    def finish(self) -> None:
        """Choose the assignment if that is still open, calibrate the model for it, and complete the history."""
        if self.search is not None and not self._fine_tuning:
            self._start_fine_tuning()
        share_buffers(self.model)
        self.use(len(self.targets) - 1)
        self._leave_supernet()
        self.step_logger.flush()

    def _leave_supernet(self) -> None:
        """After a search of architecture, make the model the plain smaller one that was chosen."""
        if self._searches is not None and isinstance(self.space, JointSpace) and self.target.choice is not None:
            self.structure = structure = self.space.structure(self.target.choice)
            self.architecture = self.space.net.describe(structure)
            self.space.net.extract(structure)
            self.modules = {name: self.modules[name] for name in self.assignment or {}}

    def _start_fine_tuning(self) -> None:
        """Choose the assignment of each target; from here on, only these are trained."""
        share_buffers(self.model)
        for target in self.targets:
            self.searches.choose(target, self.calibration_batches)
        self.evaluator.passes = None
        self._fine_tuning = True
        for target in self.targets:
            set_formats(self.modules, target.assignment or {})
            self._recalibrate()

    def _recalibrate(self) -> None:
        batches = self.calibration_batches("calibrating the chosen formats")
        try:
            calibrate(self.model, self.modules, batches, learned=False)
        except NotFiniteError as error:  # before the training it would have been wrong input
            self.step_logger.flush()  # names the step if the loss has shown it
            raise TrainingDiverged(f"{error}, after {self.state.global_step} steps") from None

    # ------------------------------------------------------ one step

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Train one batch; all batches of an optimizer step see the same formats.

        Args:
            model: the wrapped model.
            inputs: the batch.
            num_items_in_batch: labels of the whole optimizer step, for models that average over them.

        Returns:
            The batch's share of the step's loss, scalar.
        """
        if self._micro_step == 0:
            self._begin_step()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_logger.add_loss(loss)  # the Trainer has divided it by the number of accumulated batches
        self._micro_step += 1
        if self._micro_step == self.current_gradient_accumulation_steps:
            self._micro_step = 0
            self._end_step()
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch, with the teacher's share of it in training.

        Args:
            model: the model.
            inputs: the batch.
            return_outputs: return (loss, outputs).
            num_items_in_batch: labels of the whole optimizer step, for models that average over them.

        Raises:
            UserError: if the model returns no scalar loss.
        """
        inputs = dict(inputs)  # a custom loss function removes the labels
        batch = dict(inputs)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)  # type: ignore[misc]
        if not isinstance(loss, Tensor) or (loss.numel() != 1 and self.args.n_gpu < 2):
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise UserError(
                f"{type(self.model).__name__} returns {got} where its loss should be: return {{'loss': ..., 'logits': "
                "...} or (loss, logits) where there are labels, or pass compute_loss_func"
            )
        if self.compute_loss_func is not None and isinstance(outputs, Tensor | tuple):
            # The Trainer takes the first entry for the loss; without one it would drop an output, or a row of it.
            outputs = (loss, *outputs) if isinstance(outputs, tuple) else (loss, outputs)
        if self.teacher is not None and self.teacher.share and model.training:
            logits = class_logits(outputs, batch, checked=False)
            counted = num_items_in_batch if self.model_accepts_loss_kwargs else None
            loss = self.teacher.loss(loss, logits, batch, counted)
        if model.training and torch.is_grad_enabled() and not loss.requires_grad:
            # Scales alone are trained, and none of the drawn formats has one: a step without a gradient.
            loss = loss + 0.0 * next(p for p in self.model.parameters() if p.requires_grad).sum()
        return (loss, outputs) if return_outputs else loss

    def _begin_step(self) -> None:
        """Draw the formats of an optimizer step."""
        step = self.state.global_step
        self.target = self.targets[step % len(self.targets)]
        entry = {"step": step + 1, "phase": "train", "learning_rate": self._get_learning_rate()}
        self.step_logger.begin(entry)
        if len(self.targets) > 1:
            entry["target"] = self.cost_target
            if self._fine_tuning and self.assignment is not None:
                set_formats(self.modules, self.assignment)
        if self.search is None:
            return
        entry["phase"] = self.phases.name(step)
        if not self._fine_tuning and step >= self.phases.settle:
            self._start_fine_tuning()
            set_formats(self.modules, self.assignment or {})
        if self._fine_tuning:
            self._choices = None
            return
        self._choices = self.search.draws(step)
        self.space.apply(self.modules, self._choices[0].tolist())

    def _end_step(self) -> None:
        """Reward the drawn assignments and update the policy."""
        step, entry = self.state.global_step, self.step_logger.entry
        if self.search is not None:
            if self._choices is None:
                entry["cost"] = self.search.cost(self._chosen)
            elif step >= self.phases.delay:
                qualities = self.evaluator.rewarded_qualities(self._choices, step)
                if not all(math.isfinite(quality) for quality in qualities):
                    raise self.step_logger.diverged("reward", float("nan"), step + 1, self._choices[0].tolist())
                entry.update(self.search.learn(self._choices, qualities, step))
            else:
                entry["cost"] = self.search.cost(self._choices[0])
                entry["entropy"] = self.search.policy.entropy().item()
            if step % PROBABILITY_STEPS == 0:
                entry["probabilities"] = self.search.policy.probabilities().detach().tolist()
            if self._choices is not None:
                entry["choice"] = self._choices[0].tolist()
        self.step_logger.end()
        self.tell("training", step + 1, self.state.max_steps, entry["phase"])

    def _formats_of(self, choice: Sequence[int] | None) -> Assignment | None:
        return self.assignment if choice is None else self.space.assignment(choice)

    # ------------------------------------------------------ data

    @property
    def _length(self) -> TrainingLength:
        args, rows = self.args, len(self.train_dataset) - len(self.search_rows)  # type: ignore[arg-type]
        batches = args.per_device_train_batch_size * args.world_size, args.gradient_accumulation_steps
        return TrainingLength(rows, *batches, args.dataloader_drop_last, args.max_steps, args.num_train_epochs)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if not self.search_rows:
            return super()._get_train_sampler(train_dataset)
        size, returned_at = len(self.train_dataset), self._length.position(self.phases.settle)  # type: ignore[arg-type]
        return PhasedSampler(size, self.search_rows, returned_at, self.args.seed)

    def _collate(self, items: list[Any]) -> Any:
        # Columns that the model does not take are dropped, as in the Trainer's own loaders.
        return self._prepare_inputs(self._get_collator_with_removed_columns(self.data_collator)(items))

    def batches_of(self, dataset: Any) -> Iterator[Any]:
        """Yield a whole dataset in its order, in evaluation batches."""
        return self._reader.all_of(dataset, self.args.per_device_eval_batch_size)

    def calibration_batches(self, phase: str | None = None) -> Iterator[Any]:
        """Yield the same training batches every time, augmented as in training.

        The weights have adapted to augmented images; plain ones have other statistics (a black border raises the
        variance of the first layer by half) and cost a ResNet-20 three points of accuracy on CIFAR-10.

        Args:
            phase: reports progress under this name; None: no reports.
        """
        config, size = self.search_config, self._length.batch_size  # each process sees all of the batch
        batches = CALIBRATION_BATCHES if config is None else config.calibration_batches
        examples = self.calibration_samples or batches * size
        return self._reader.sample(
            self.train_dataset, examples, size, exclude=self.search_rows, phase=phase, tell=self.tell
        )

    # ------------------------------------------------------ optimizer, history

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of parameters with weight decay; on a learned scale it would shrink the range."""
        return [name for name in super().get_decay_parameter_names(model) if SCALES not in name]

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Return the Trainer's optimizer with groups of their own for learned scales, see `scale_groups`."""
        optimizer = super().create_optimizer(model)
        if needs_groups(optimizer):
            if not self._scale_exponents:  # a resumed run has those of its start from the checkpoint
                self._scale_exponents = scale_exponents(self.model)
            group_scales(optimizer, self.model, self._scale_exponents)
        return optimizer

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; during the search under its best choice so far, not under the last draw."""
        search = self.targets[-1].search
        if search is not None and not self._fine_tuning:
            self.space.apply(self.modules, search.best())
        loader = args[0] if args else kwargs["dataloader"]
        self._evaluated, self._to_evaluate = 0, len(loader) if has_length(loader) else None
        self.tell("evaluating", 0, self._to_evaluate)
        with rounded_weights_cached(self.modules):
            return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Predict one batch and report the progress."""
        predicted = super().prediction_step(*args, **kwargs)
        self._evaluated += 1
        self.tell("evaluating", self._evaluated, self._to_evaluate, f"batch {self._evaluated}")
        return predicted

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Return whether this evaluation is the best so far; only those of the chosen assignment count."""
        return self._fine_tuning and super()._determine_best_metric(metrics, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the Trainer's measures and, with the loss, those of the search.

        Args:
            logs: measures by name.
            start_time: start of the training, for speeds.
        """
        if "loss" in logs:
            logs |= self.step_logger.measures()
        super().log(logs, start_time)

    # ------------------------------------------------------ checkpoints, without pickles

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model, and its ranges and formats once they are chosen, for `eval.saved_model.load_model`."""
        super().save_model(output_dir, _internal_call)
        if not self.args.should_save or _internal_call:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        write_companions(folder, self)
        if self.assignment:
            write_quantization(folder, self.model, self.modules, self.assignment)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.step_logger.flush()
        if not self.args.should_save:
            return
        search = self._searches
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "targets": [target.state_dict() for target in self.targets],
            "scale_exponents": self._scale_exponents,
            "settled": self._fine_tuning,
            "reach": self.reach,
            "notes": self.notes,
            "float_quality": search and search.float_quality,
            "reference_loss": search and search.evaluator.reference_loss,
            "token_quantiles": {name: q.token_quantiles for name, q in self._quantizers().items() if q.token_quantiles},
        }
        checkpoint.save_state(state, Path(output_dir) / STATE)

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is None:
            return
        state = checkpoint.load_state(Path(checkpoint_folder) / STATE)
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["scheduler"])
        for name, quantizer in self._quantizers().items():
            quantizer.token_quantiles = state["token_quantiles"].get(name, {})
        self._set_reach(state.get("reach", {}))
        if self._searches is None:
            self.targets[0].load_state_dict(state["targets"][0])
        else:
            self._searches.load_state_dict(state)
        self._fine_tuning = state["settled"]
        self.target = self.targets[self.state.global_step % len(self.targets)]
        if self.assignment is not None:
            set_formats(self.modules, self.assignment)
        self.notes = [*state.get("notes", ()), *self.notes]
        if self.history is not None and (lost := self.history.truncate(self.state.global_step)):
            self.note(f"{self.history.path.name} was damaged: it lacks {lost} of the {self.state.global_step} steps")


def _check_training_data(dataset: Dataset | None, search: bool) -> None:
    if search and dataset is None:
        raise UserError("a search needs a train_dataset: it calibrates, measures and trains on it")
    if streams(dataset):
        kind = type(dataset).__name__
        raise UserError(f"train_dataset needs a length and rows by index, got a stream ({kind}): gather it in a list")


def _parsed(search_space: str | Sequence[Format]) -> tuple[Format, ...]:
    if isinstance(search_space, str):
        return tuple(parse_search_space(search_space))
    if wrong := [entry for entry in search_space if not isinstance(entry, Format)]:
        text = ",".join(map(str, search_space))
        raise UserError(f"search_space holds {wrong[0]!r}, which is no Format: pass search_space={text!r}")
    return tuple(search_space)

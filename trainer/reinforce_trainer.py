"""ReinforceTrainer: transformers' Trainer that trains shared weights while a policy chooses the layers' formats."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, Subset
from transformers import TrainingArguments

from cost.profile import LayerProfile, profile_model
from policy.budget import Limit
from policy.joint_space import JointSpace
from policy.space import Partition, SearchSpace, build_space
from quant.analysis.float_share import FloatShare, float_share
from quant.channel_groups import split_layers
from quant.convert import Assignment, check_tied, rounded_weights_cached, set_formats
from quant.elastic.net import ElasticNet
from quant.errors import NotFiniteError
from quant.formats import Format
from quant.quant_module import QuantModule, Reach
from trainer.search.build import build_searches, parse_formats
from trainer.search.config import ReinforceConfig
from trainer.search.engine import quantize_for
from trainer.search.evaluator import AssignmentEvaluator, quality
from trainer.search.targets import MultiTargetSearch, SearchTarget
from trainer.training.batches import BatchReader, TrainingLength, check_training_data
from trainer.training.calibration import RunCalibration, WeightRounding
from trainer.training.distillation import Teacher, class_logits
from trainer.training.distributed import share_buffers
from trainer.training.loss import check_loss, with_gradient, with_loss_first
from trainer.training.progress import EvaluationProgress, Listener, unheard
from trainer.training.quantization_file import write_companions, write_quantization
from trainer.training.safetensors_trainer import PickleFreeTrainer
from trainer.training.sampler import PhasedSampler, hold_out
from trainer.training.step_logger import StepLogger, TrainingDiverged

__all__ = ["ReinforceConfig", "ReinforceTrainer", "TrainingDiverged", "quality"]

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
        caches: attention layer -> formats that its cached keys and values may take; None: caches stay in float.
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
        check_training_data(train_dataset, search is not None)
        formats, activations = parse_formats(search_space), (weight_only_search, separate_activations)
        if search is not None and modules is None:
            modules = quantize_for(search.engine, model, formats, *activations)
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
        self.tell = on_progress if first and on_progress is not None else unheard
        self.teacher = teacher
        if teacher is not None:
            teacher.model.to(self.args.device)
        self.search_rows = list(search_rows) if searching else []
        self._reader = BatchReader(self._collate, args.seed)
        self._length = TrainingLength.of(args, train_dataset, len(self.search_rows))
        self.targets = [SearchTarget(assignment=dict(assignment) if assignment else None)]
        """One target, or one for each of several `target_bits`, which take turns at the steps."""
        self._searches: MultiTargetSearch | None = None
        if search is not None:
            self._searches = build_searches(
                search,
                lambda **ties: build_space(
                    list(self.modules),
                    formats,
                    partition,
                    *activations,
                    caches=caches,
                    channel_groups=split_layers(self.modules),
                    **ties,
                ),
                self.model,
                self.modules,
                train_dataset if search_dataset is None else search_dataset,
                profiles=profiles or profile_model(self.model, self._reader.read(train_dataset, [0]), self.modules),
                limits=limits,
                architecture=architecture,
                reader=self._reader,
                length=self._length,
                batch_size=args.per_device_eval_batch_size,
                loss_and_outputs=lambda model, batch: self.compute_loss(model, batch, return_outputs=True),
                autocast=self.compute_loss_context_manager,
                teacher=teacher,
                tell=self.tell,
            )
            self.targets = self._searches.targets
        self.target = self.targets[0]
        """Target whose assignment the model runs in."""
        size = self._length.batch_size  # each process sees all of the batch
        sample = partial(self._reader.sample, train_dataset, size=size, exclude=self.search_rows, tell=self.tell)
        samples = calibration_samples or size * (search.calibration_batches if search else CALIBRATION_BATCHES)
        self.calibration = RunCalibration(self.model, self.modules, sample, samples, rounding, self.tell)
        self.after_calibration = after_calibration
        self._fine_tuning = not searching
        """Whether the assignments of all targets are final."""
        self.architecture: dict[str, str] = {}
        """The chosen architecture: decision -> choice, as the record holds it."""
        self.structure: list[int] | None = None
        """The same as one index per decision of the elastic model; None without a search of architecture."""
        self._start: dict[str, Tensor] | None = None
        """What the model holds before the first step, until a search of architecture has gone back to it."""
        self._choices: Tensor | None = None
        self._micro_step = 0
        listeners = (history, on_step) if first else (None, None)
        plotted = self.space if searching else None
        self.step_logger = StepLogger(self.callback_handler, self._formats_of, plotted, *listeners)
        self.add_callback(self.step_logger)
        self._evaluation = EvaluationProgress(self.tell)
        self.add_callback(self._evaluation)

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
    def cost_target(self) -> float:
        """Limit of the current target on the run's own cost, in MiB or GBOPs."""
        return self.target.limits.limits[0]

    @property
    def cost(self) -> float:
        """Cost of the current target's assignment in MiB or GBOPs. Raises ValueError before one is chosen."""
        if self.assignment is None:
            raise ValueError("nothing is chosen yet: train first")
        return self.target.limits.costs(self.target.choice or self.space.choice(self.assignment))[0]

    @property
    def assignment(self) -> dict[str, tuple[Format, Format]] | None:
        """Assignment of the current target; None: not chosen yet, or float."""
        return self.target.assignment

    @property
    def contest(self) -> dict[str, Any] | None:
        """How the current target's assignment was chosen: part of the record."""
        return self.target.contest

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
        self.target, untrained = self.targets[turn], self.args.max_steps == 0
        if self.assignment is not None:
            self.calibration.restore_weights()
            self._set_formats(self.assignment)
            if untrained:
                self._round_weights()
        if not untrained:
            self.calibration.recalibrate_batch_norms()

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
            self.step_logger.truncate(0)  # of a run that was killed before its first checkpoint
            self.prepare()
        output = None
        if folder is None or not self._load_finished(folder):
            output = super().train(resume_from_checkpoint=folder, **kwargs)
        self.finish()
        return output

    def prepare(self) -> None:
        """Calibrate ranges on training data and prepare the searches, before the first step."""
        if self.modules:
            self.notes += self.calibration.find_ranges()  # calibration has logged them
            self._set_reach(self.calibration.reach)
            if self.after_calibration is not None:
                self.after_calibration(self)
            self.calibration.order_channels(self.compute_loss, self.compute_loss_context_manager)
        if self._searches is not None:
            self._searches.prepare()
            self.target = self.targets[-1]
        if self._fine_tuning and self.assignment:
            set_formats(self.modules, self.assignment)
        if self.calibration.rounding is not None and self.args.max_steps != 0:
            if self.target.search is not None:
                self.space.apply(self.modules, self.target.search.best())
            self._round_weights()
        if self._searches is not None and isinstance(self.space, JointSpace):
            self._start = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def _round_weights(self) -> None:
        several = self.args.max_steps == 0 and len(self.targets) > 1
        self.notes += [note for note in self.calibration.round_weights(several) if note not in self.notes]

    def _set_reach(self, reach: Mapping[str, Reach]) -> None:
        """Keep layers that calibration did not reach in float: in assignments, and in their costs."""
        if reach:
            (self._searches or self.target).set_reach(reach)

    def finish(self) -> None:
        """Choose the assignment if that is still open, calibrate the model for it, and complete the history."""
        if self.target.search is not None and not self._fine_tuning:
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
            self.calibration.modules = self.modules

    def _start_fine_tuning(self) -> None:
        """Choose the assignment of each target; from here on, only these are trained."""
        share_buffers(self.model)
        self.searches.choose(self.calibration.batches)
        self._fine_tuning = True
        self._go_back()
        for target in self.targets:
            self._set_formats(target.assignment or {})

    def _go_back(self) -> None:
        """Train a chosen architecture from the start's weights: those that served many sizes serve none well."""
        if self._start is not None and self.state.global_step < self.state.max_steps:
            self.model.load_state_dict(self._start)
            self.optimizer.state.clear()
        self._start = None

    def _set_formats(self, assignment: Assignment) -> None:
        """Put the model into an assignment, calibrated for it."""
        try:
            self.calibration.set_formats(assignment)
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
        check_loss(loss, self.model, self.args.n_gpu)
        if self.compute_loss_func is not None:
            outputs = with_loss_first(loss, outputs)
        if model.training:
            if self.teacher is not None and self.teacher.share:
                counted = num_items_in_batch if self.model_accepts_loss_kwargs else None
                loss = self.teacher.loss(loss, class_logits(outputs, batch, checked=False), batch, counted)
            loss = with_gradient(loss, self.model)
        return (loss, outputs) if return_outputs else loss

    def _begin_step(self) -> None:
        """Draw the formats of an optimizer step."""
        step, searches = self.state.global_step, self._searches
        entry = {"step": step + 1, "phase": "train", "learning_rate": self._get_learning_rate()}
        self.step_logger.begin(entry)
        if searches is None:
            return
        self.target = self.targets[searches.turn(step)]
        if len(self.targets) > 1:
            entry["target"] = self.cost_target
            if self._fine_tuning and self.assignment is not None:
                set_formats(self.modules, self.assignment)
        search, self._choices = self.target.search, None
        if search is None:
            return
        entry["phase"] = searches.phases.name(step)
        if not self._fine_tuning and step >= searches.phases.settle:
            self._start_fine_tuning()
            set_formats(self.modules, self.assignment or {})
        if not self._fine_tuning:
            self._choices = search.draws(step)
            self.space.apply(self.modules, self._choices[0].tolist())

    def _end_step(self) -> None:
        """Reward the drawn assignments and update the policy."""
        step, entry, search, choices = self.state.global_step, self.step_logger.entry, self.target.search, self._choices
        if search is not None:
            if choices is None:
                entry["cost"] = self.cost
            elif step >= self.searches.phases.delay:
                qualities = self.evaluator.rewarded_qualities(choices, step)
                if not all(math.isfinite(quality) for quality in qualities):
                    raise self.step_logger.diverged("reward", float("nan"), step + 1, choices[0].tolist())
                entry.update(search.learn(choices, qualities, step))
            else:
                entry["cost"] = search.cost(choices[0])
                entry["entropy"] = search.policy.entropy().item()
            if step % PROBABILITY_STEPS == 0:
                entry["probabilities"] = search.policy.probabilities().detach().tolist()
            if choices is not None:
                entry["choice"] = choices[0].tolist()
        if self._searches is not None and len(self.targets) > 1:
            self._searches.count(self.target, step, float(entry["loss"]))
        self.step_logger.end()
        self.tell("training", step + 1, self.state.max_steps, entry["phase"])

    def _formats_of(self, choice: Sequence[int] | None) -> Assignment | None:
        return self.assignment if choice is None else self.space.assignment(choice)

    # ------------------------------------------------------ data

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if not self.search_rows:
            return super()._get_train_sampler(train_dataset)
        size, returned_at = len(self.train_dataset), self._length.position(self.searches.phases.settle)  # type: ignore[arg-type]
        return PhasedSampler(size, self.search_rows, returned_at, self.args.seed)

    def _collate(self, items: list[Any]) -> Any:
        # Columns that the model does not take are dropped, as in the Trainer's own loaders.
        return self._prepare_inputs(self._get_collator_with_removed_columns(self.data_collator)(items))

    def batches_of(self, dataset: Any) -> Iterator[Any]:
        """Yield a whole dataset in its order, in evaluation batches."""
        return self._reader.all_of(dataset, self.args.per_device_eval_batch_size)

    # ------------------------------------------------------ evaluations, logs

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; during the search under its best choice so far, not under the last draw."""
        search = self.targets[-1].search
        if search is not None and not self._fine_tuning:
            self.space.apply(self.modules, search.best())
        self._evaluation.begin(args[0] if args else kwargs["dataloader"])
        with rounded_weights_cached(self.modules):
            return super().evaluation_loop(*args, **kwargs)

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

    # ------------------------------------------------------ files

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
        super()._save_optimizer_and_scheduler(output_dir)

    def run_state(self) -> dict[str, Any]:
        """Return the state of the searches and the reach of calibration."""
        searched = {"targets": [self.target.state_dict()]} if self._searches is None else self._searches.state_dict()
        return {**searched, "settled": self._fine_tuning, "reach": self.calibration.reach, "start": self._start}

    def load_run_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a `run_state`; older checkpoints have neither `reach` nor `start`."""
        reach = state.get("reach", {})
        self.calibration.set_reach(reach)
        self._set_reach(reach)
        if self._searches is None:
            self.target.load_state_dict(state["targets"][0])
        else:
            self._searches.load_state_dict(state)
            self.target = self.targets[self._searches.turn(self.state.global_step)]
        self._fine_tuning, self._start = state["settled"], state.get("start")
        if self.assignment is not None:
            set_formats(self.modules, self.assignment)
        if damage := self.step_logger.truncate(self.state.global_step):
            self.note(damage)

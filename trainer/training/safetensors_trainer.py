"""PickleFreeTrainer: transformers' Trainer for quantized models, whose checkpoints are safetensors and JSON."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from quant.quantizers.quantizer import Quantizer
from trainer.training import checkpoint, checksums
from trainer.training.checksums import forget_older, sealed
from trainer.training.scale_groups import SCALES, group_scales, needs_groups, scale_exponents

logger = logging.getLogger(__name__)

STATE = "training"
"""File of a checkpoint with everything but the model, the random generators and the gradient scaler."""


class PickleFreeTrainer(Trainer):
    """Trains weights and learned scales; saves and loads everything without a pickle."""

    notes: list[str]
    """Deviations from what was asked for: part of the run's record and of checkpoints."""

    # The Trainer types these as optional: they are None until its constructor and `train` set them.
    model: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.notes = []
        self._scale_exponents: dict[str, int] = {}

    def note(self, text: str) -> None:
        """Log a warning that the run's record repeats."""
        self.notes.append(text)
        logger.warning(text)

    # ------------------------------------------------------ learned scales

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of parameters with weight decay; on a learned scale it would shrink the range."""
        return [name for name in super().get_decay_parameter_names(model) if SCALES not in name]

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Return the Trainer's optimizer with groups of their own for learned scales, see `scale_groups`."""
        optimizer = super().create_optimizer(model)
        if needs_groups(optimizer):
            if not self._scale_exponents:  # a resumed run has those of its start
                self._scale_exponents = scale_exponents(self.model)
            group_scales(optimizer, self.model, self._scale_exponents)
        return optimizer

    # ------------------------------------------------------ resuming

    def checkpoint_to_resume(self, resume: str | bool | None) -> str | None:
        """Return the folder to resume from.

        Args:
            resume: a checkpoint's folder; True for the newest intact one, if there is one.

        Raises:
            CheckpointError: if a given folder is damaged or belongs to another model.
        """
        if isinstance(resume, bool):
            return self._newest_intact_checkpoint() if resume else None
        if resume is not None and (flaw := self._flaw(Path(resume))):
            raise checkpoint.CheckpointError(f"checkpoint {resume}: {flaw}")
        return resume

    def _newest_intact_checkpoint(self) -> str | None:
        """Set newer checkpoints aside; a note names those that are damaged."""
        newer: dict[Path, str] = {}
        found = None
        for folder in checksums.numbered(Path(str(self.args.output_dir))):
            if (flaw := self._flaw(folder)) is None:
                found = str(folder)
                break
            newer[folder] = flaw
        self.accelerator.wait_for_everyone()  # all processes look at the same folders
        for folder, flaw in newer.items() if self.is_world_process_zero() else ():
            checksums.set_aside(folder)
            if flaw != checksums.INTERRUPTED:
                then = f"went on from {Path(found).name}" if found else "started anew"
                self.note(f"{folder.name} was damaged ({flaw}): the run {then}")
        return found

    def _flaw(self, folder: Path) -> str | None:
        """Return why the run cannot continue from a checkpoint; None if it can."""
        if flaw := checksums.flaw(folder):
            return flaw
        saved = checkpoint.tensor_shapes(folder / "model.safetensors")
        own = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        # A quantizer takes the scales of all formats that a file holds.
        extensible = tuple(f"{name}." for name in self._quantizers())
        wrong = [name for name, shape in own.items() if saved.get(name) != shape]
        wrong += [name for name in saved.keys() - own.keys() if not name.startswith(extensible)]
        return f"model.safetensors is another model's: {min(wrong)}" if wrong else None

    def _quantizers(self) -> dict[str, Quantizer]:
        return {name: part for name, part in self.model.named_modules() if isinstance(part, Quantizer)}

    def _load_finished(self, checkpoint_folder: str) -> bool:
        """Load a checkpoint of the last step, for which the Trainer would go on training. Returns whether it is one."""
        state = TrainerState.load_from_json(str(Path(checkpoint_folder) / TRAINER_STATE_NAME))
        if state.global_step < state.max_steps:
            return False
        self.state = state
        self._load_from_checkpoint(checkpoint_folder)
        self.create_optimizer_and_scheduler(state.max_steps)
        self._load_optimizer_and_scheduler(checkpoint_folder)
        return True

    # ------------------------------------------------------ files

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save with checksums; remove older checkpoints only afterwards, and no other folders."""
        if not self.args.should_save:
            return super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial))
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with sealed(folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if limit:
            forget_older(folder, limit, self.state.best_model_checkpoint)

    def run_state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of a run besides the states of this class."""
        return {}

    def load_run_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint with the entries of `run_state`."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.args.should_save:
            return
        state = {
            **self.run_state(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "notes": self.notes,
            "scale_exponents": self._scale_exponents,
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
        self.notes = [*state.get("notes", ()), *self.notes]
        self.load_run_state(state)

    def _save_rng_state(self, output_dir: str) -> None:
        checkpoint.save_state(checkpoint.random_state(), Path(output_dir) / f"random_{self.args.process_index}")
        self.accelerator.wait_for_everyone()  # the next call declares the checkpoint complete

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None:
            path = Path(checkpoint_folder) / f"random_{self.args.process_index}"
            checkpoint.restore_random_state(checkpoint.load_state(path))

    def _save_scaler(self, output_dir: str) -> None:
        if self.accelerator.scaler is not None and self.args.should_save:
            checkpoint.save_state(self.accelerator.scaler.state_dict(), Path(output_dir) / "scaler")

    def _load_scaler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(checkpoint.load_state(Path(checkpoint_folder) / "scaler"))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        checkpoint.save_weights(state_dict or self.model.state_dict(), folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        tensors = checkpoint.load_tensors(Path(resume_from_checkpoint) / "model.safetensors")
        (model or self.model).load_state_dict(tensors)
        # The optimizer is made next, with the groups that it was saved with.
        self._scale_exponents = checkpoint.load_state(Path(resume_from_checkpoint) / STATE)["scale_exponents"]

"""PickleFreeTrainer: transformers' Trainer whose checkpoints are safetensors and JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trainer.training import checkpoint
from trainer.training.checksums import forget_older, sealed


class PickleFreeTrainer(Trainer):
    """Saves and loads the model, the random generators and the gradient scaler without a pickle."""

    # The Trainer types these as optional: they are None before its constructor and `train` have set them.
    model: Any
    optimizer: Any
    lr_scheduler: Any

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's, with checksums; older ones go only then, and what else lies there is left alone."""
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

    def _save_rng_state(self, output_dir: str) -> None:
        checkpoint.save_state(checkpoint.random_state(), Path(output_dir) / f"random_{self.args.process_index}")
        self.accelerator.wait_for_everyone()  # what follows declares the checkpoint complete

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

"""Evaluates exported models by the code of the run, on its evaluation splits or on training examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from eval.export.finished_run import FinishedRun

TRAINING_ROWS = 1024
"""Number of training examples that a choice of the export is judged on."""


def evaluate_exported(
    run: FinishedRun, model: nn.Module, splits: Mapping[str, Any] | None = None
) -> dict[str, dict[str, float]]:
    """Evaluate a model by the same code as the run.

    Args:
        run: The exported run.
        model: The loaded export.
        splits: Prepared rows by name; None: the evaluation splits of the run.

    Returns:
        Split -> metrics.
    """
    from transformers import PrinterCallback

    from eval.run.trainer import evaluate, training_arguments
    from trainer.reinforce_trainer import ReinforceTrainer

    plan = run.plan
    if splits is not None:
        plan = replace(plan, prepared=replace(plan.prepared, validation=dict(splits), split_metrics={}, writer=None))
    with TemporaryDirectory() as scratch:  # the Trainer requires an output folder
        config = run.config.updated(
            output_root_dir=scratch, log_dir=scratch, report_to="none", device="cpu", fp16=False
        )
        trainer = ReinforceTrainer(
            model,
            training_arguments(config.updated(quiet=True)),
            data_collator=plan.prepared.data_collator,
            compute_metrics=plan.compute_metrics,
            preprocess_logits_for_metrics=plan.prepared.preprocess_logits,
        )
        trainer.remove_callback(PrinterCallback)
        return evaluate(trainer, plan)


def training_rows(run: FinishedRun, behind: int) -> Any:
    """Return training examples without augmentation, behind those that ranges were measured on if there are enough.

    Args:
        run: The run.
        behind: Number of examples at the start that ranges were measured on.
    """
    from torch.utils.data import Subset

    from eval.data.dataset import not_augmented

    rows: Any = not_augmented(run.plan.prepared.train)
    start = behind if len(rows) >= 2 * behind else 0
    return Subset(rows, range(start, min(start + TRAINING_ROWS, len(rows))))


def metric_drop(name: str, before: float, after: float) -> float:
    """Return how much worse a metric is: a difference; relative for metrics that fall as models get better."""
    from eval.report.records import lower_is_better

    return after / before - 1 if lower_is_better(name) else before - after

"""A task's rows after reading, and as inputs of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eval.tasks import Kind, Task

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import EvalPrediction

    from eval.data.files import Source
    from eval.modeling.bundle import Pixels


@dataclass
class TaskData:
    """A task's rows, read and checked: `validation` holds every split that is evaluated, by its name in the record."""

    name: str
    task: Task
    train: Dataset
    validation: dict[str, Dataset]
    label_names: list[str]
    sources: dict[str, Source]
    """where the rows of `train` and of each validation split stand, for errors that name them"""
    notes: list[str] = field(default_factory=list)

    @property
    def kind(self) -> Kind:
        return self.task.kind

    @property
    def columns(self) -> tuple[str, ...]:
        return self.task.inputs

    @property
    def metric(self) -> str:
        return self.task.metrics[0]

    @property
    def num_labels(self) -> int:
        """Outputs of the model: 1 for regression, 0 where there are no classes."""
        return 1 if self.task.regression else len(self.label_names)

    def corpus(self) -> Iterator[str]:
        """Every training text: what a tokenizer is trained on."""
        for column in (*self.columns, *([self.task.label] if self.kind == "summary" else [])):
            yield from self.train[column]

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The task's metrics of logits (N, classes) and labels (N,); of (N, length, 2) for `lm`, see `token_scores`."""
        import numpy as np

        from eval.data.metrics import perplexity, score

        logits, labels = (
            np.asarray(values[0] if isinstance(values, tuple) else values)
            for values in (prediction.predictions, prediction.label_ids)
        )
        return perplexity(logits) if self.kind == "lm" else score(self.task.metrics, logits, labels)


@dataclass
class PreparedData:
    """A model's inputs. Items are dicts of tensors or lists; `data_collator` makes a batch of them."""

    train: Any
    """map-style dataset with `labels`; `hold_out` names the rows that a search keeps apart"""
    validation: dict[str, Any]
    data_collator: Any
    example_inputs: dict[str, torch.Tensor]
    """one example, shaped like what the cost is charged for: cost_seq_len tokens, or the model's image size"""
    judges: Mapping[str, Callable[[EvalPrediction], dict[str, float]]] = field(default_factory=dict)
    """by split, where metrics need more than predictions and labels: the texts of a question's answers"""
    writer: Any = None
    """split -> metrics of the summaries that a model writes for it, see `task_summary.Writer`"""
    notes: list[str] = field(default_factory=list)
    pixels: Pixels | None = None
    """how an image becomes an input"""
    preprocess_logits: Any = None
    """for the Trainer's `preprocess_logits_for_metrics`: keeps language models' logits out of memory"""


def not_augmented(data: Any) -> Any:
    """Prepared data as evaluation sees it."""
    return getattr(data, "without_augmentation", lambda: data)()

"""The data of a task: its rows after reading (`TaskData`), and as inputs of a model (`PreparedData`)."""

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
    """The rows of a task, read and checked. `validation` maps names in the record to the splits to evaluate."""

    name: str
    task: Task
    train: Dataset
    validation: dict[str, Dataset]
    label_names: list[str]
    sources: dict[str, Source]
    """where the rows of "train" and of each validation split come from, for error messages"""
    notes: list[str] = field(default_factory=list)

    @property
    def kind(self) -> Kind:
        """The kind of the task."""
        return self.task.kind

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the model sees."""
        return self.task.inputs

    @property
    def metric(self) -> str:
        """Name of the main metric."""
        return self.task.metrics[0]

    @property
    def num_labels(self) -> int:
        """Number of the model's outputs: 1 for regression, 0 for tasks without classes."""
        return 1 if self.task.regression else len(self.label_names)

    def corpus(self) -> Iterator[str]:
        """Yield every training text; a tokenizer is trained on them."""
        for column in (*self.columns, *([self.task.label] if self.kind == "summary" else [])):
            yield from self.train[column]

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Compute the task's metrics.

        Args:
            prediction: logits (N, classes) and labels (N,); for `lm`, the scores (N, length, 2) of
                `eval.data.text.token_scores`.

        Returns:
            Metric name -> value.
        """
        import numpy as np

        from eval.data.metrics import perplexity, score

        logits, labels = (
            np.asarray(values[0] if isinstance(values, tuple) else values)
            for values in (prediction.predictions, prediction.label_ids)
        )
        return perplexity(logits) if self.kind == "lm" else score(self.task.metrics, logits, labels)


@dataclass
class PreparedData:
    """The inputs of a model. Items are dicts of tensors or lists; `data_collator` batches them."""

    train: Any
    """map-style dataset with `labels`, from which a search holds out rows for the reward"""
    validation: dict[str, Any]
    data_collator: Any
    example_inputs: dict[str, torch.Tensor]
    """one example of the size that the cost is computed for: cost_seq_len tokens, or the model's image size"""
    split_metrics: Mapping[str, Callable[[EvalPrediction], dict[str, float]]] = field(default_factory=dict)
    """split -> its metrics, where they need more than predictions and labels, such as the answers' texts"""
    writer: Any = None
    """for summaries: generates them and computes their metrics, see `eval.data.summarization.Writer`"""
    notes: list[str] = field(default_factory=list)
    pixels: Pixels | None = None
    """how an image becomes an input; None for texts"""
    preprocess_logits: Any = None
    """the Trainer's `preprocess_logits_for_metrics`; reduces a language model's logits to two scores per token"""


def not_augmented(data: Any) -> Any:
    """Return a prepared dataset without random augmentation."""
    return getattr(data, "without_augmentation", lambda: data)()

"""Data sets by name or local folder: what to read, which split to evaluate, what to report.

`TASKS` and `task_kind` answer without importing torch or datasets, so that wrong names are refused at once.
`load_task` reads and checks the rows; `prepare` turns them into a model's inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from quant.errors import UserError

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import EvalPrediction

    from eval.data.files import Source
    from eval.modeling.bundle import ModelBundle
    from eval.modeling.inputs import Pixels

Kind = Literal["text", "image", "lm", "qa", "summary"]
"""what goes in and what comes out: classes of texts or images, the next token, a span of a text, a new text"""


@dataclass(frozen=True)
class Task:
    """What is known about a data set before it is read."""

    kind: Kind
    inputs: tuple[str, ...]
    """columns that the model sees: one or two texts, or one image"""
    hub: tuple[str, ...] = ()
    """repository and, where there are several, configuration on the Hub"""
    label: str = "label"
    """column of the truth: a class, a number, the answers of a question (SQuAD's struct), a summary"""
    metrics: tuple[str, ...] = ("accuracy",)
    """the first is the main one"""
    evaluation: tuple[tuple[str, str], ...] = ()
    """(split, name in the record) of every split to evaluate; empty: validation, or test when only that is labelled"""
    regression: bool = False
    candidates: int = 0
    """number of answers scored against each other; 0: the classes are labels"""
    channels: int = 3
    augmented: bool = True
    """whether training images are cropped and flipped"""

    @property
    def numbered(self) -> bool:
        """Whether the truth is a class or a value, not a text."""
        return self.kind in ("image", "text")


def _glue(name: str, *inputs: str, **facts: Any) -> Task:
    return Task("text", inputs, hub=("nyu-mll/glue", name), **facts)


ROUGE = ("rougeL", "rouge1", "rouge2")
TASKS: dict[str, Task] = {
    "cola": _glue("cola", "sentence", metrics=("matthews_correlation", "accuracy")),
    "sst2": _glue("sst2", "sentence"),
    "mrpc": _glue("mrpc", "sentence1", "sentence2", metrics=("accuracy", "f1")),
    "qqp": _glue("qqp", "question1", "question2", metrics=("accuracy", "f1")),
    "qnli": _glue("qnli", "question", "sentence"),
    "rte": _glue("rte", "sentence1", "sentence2"),
    "wnli": _glue("wnli", "sentence1", "sentence2"),
    "mnli": _glue(
        "mnli",
        "premise",
        "hypothesis",
        evaluation=(("validation_matched", "matched"), ("validation_mismatched", "mismatched")),
    ),
    "stsb": _glue("stsb", "sentence1", "sentence2", metrics=("pearson", "spearman"), regression=True),
    "boolq": Task("text", ("question", "passage"), hub=("google/boolq",), label="answer"),
    "piqa": Task("text", ("goal", "sol1", "sol2"), hub=("baber/piqa",), candidates=2),
    "squad": Task(
        "qa", ("question", "context"), hub=("rajpurkar/squad",), label="answers", metrics=("f1", "exact_match")
    ),
    "cnn_dailymail": Task(
        "summary", ("article",), hub=("abisee/cnn_dailymail", "3.0.0"), label="highlights", metrics=ROUGE
    ),
    "xsum": Task("summary", ("document",), hub=("EdinburghNLP/xsum",), label="summary", metrics=ROUGE),
    "cifar10": Task("image", ("img",), hub=("uoft-cs/cifar10",)),
    "cifar100": Task("image", ("img",), hub=("uoft-cs/cifar100",), label="fine_label"),
    "imagenet-1k": Task("image", ("image",), hub=("ILSVRC/imagenet-1k",)),
    "digits": Task("image", ("image",), channels=1, augmented=False),  # a mirrored 2 is no 2
    "lm": Task("lm", ("text",), hub=("Salesforce/wikitext", "wikitext-2-raw-v1"), metrics=("perplexity", "accuracy")),
}


def find_task(name: str) -> Task:
    """The task called `name`, or what the local folder of that name holds: its columns are known once it is read."""
    if name in TASKS:
        return TASKS[name]
    folder = Path(name).expanduser()
    if folder.is_dir():
        from eval.data.folder import folder_kind

        kind = folder_kind(folder)
        metrics = TASKS["lm" if kind == "lm" else "sst2"].metrics
        return Task(kind, ("image",) if kind == "image" else (), label="", metrics=metrics)
    raise UserError(f"--task {name}: no such task or folder; choose one of {', '.join(TASKS)}, or a local folder")


def task_kind(name: str) -> Kind:
    """What the task is, see `Kind`. UserError where `name` is neither a task nor a folder."""
    return find_task(name).kind


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
    """map-style dataset with `labels`; `trainer.training.sampler.hold_out` picks the rows of the search"""
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


def load_task(config: Any) -> TaskData:
    """Read the data of `config.task`: embedded, from `config.data_dir`, or from the Hub. UserError on anything wrong.

    Which rows a subset holds is part of the task: it depends on the sizes asked for, never on the run's seed.
    """
    from eval.data.checks import check_split, read_labels, training_split, usable_splits, with_columns
    from eval.data.files import read_splits

    task = find_task(config.task)
    splits, unread = read_splits(task, config)
    task = with_columns(task, training_split(splits).rows.features, config)
    train, validation, notes = usable_splits(task, splits)
    labels = read_labels(task, training_split(splits))  # with the rows that are held out, where some are
    if labels.regression and not task.regression:
        task = replace(task, regression=True, metrics=TASKS["stsb"].metrics)
    ratio = config.subset_ratio if getattr(config, "use_subset", False) else 1.0
    if not 0 < ratio <= 1:
        raise UserError(f"--subset_ratio {ratio}: must be above 0 and at most 1")
    limit = getattr(config, "max_train_samples", None) or len(train)
    train = check_split(task, train, labels).take(min(math.ceil(len(train) * ratio), limit))
    limit = getattr(config, "max_eval_samples", None)
    checked = {name: check_split(task, split, labels) for name, split in validation.items()}
    checked = {name: split.take(limit or len(split)) for name, split in checked.items()}
    return TaskData(
        name=Path(config.task).expanduser().resolve().name,
        task=task,
        train=train.rows,
        validation={name: split.rows for name, split in checked.items()},
        label_names=list(labels.names),
        sources={"train": train.source, **{name: split.source for name, split in checked.items()}},
        notes=[*unread, *labels.notes, *notes],
    )


def prepare(data: TaskData, bundle: ModelBundle, config: Any) -> PreparedData:
    """`data` as inputs of `bundle.model`: tokens padded per batch, or normalised images."""
    if data.kind == "image":
        from eval.data.vision import prepare_images

        return prepare_images(data, bundle, config)
    if data.kind == "qa":
        from eval.data.question_answering import prepare_questions

        return prepare_questions(data, bundle, config)
    if data.kind == "summary":
        from eval.data.summarization import prepare_summaries

        return prepare_summaries(data, bundle, config)
    from eval.data.text import prepare_text

    return prepare_text(data, bundle, config)


def not_augmented(data: Any) -> Any:
    """Prepared data as evaluation sees it."""
    return getattr(data, "without_augmentation", lambda: data)()

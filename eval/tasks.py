"""The registry of tasks: their data sets, columns, splits and metrics. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["text", "image", "lm", "qa", "summary"]
"""what the model predicts: the class of a text or an image, the next token, a span of a text, or a summary"""


@dataclass(frozen=True)
class Task:
    """The properties of a data set that are known before it is read."""

    kind: Kind
    inputs: tuple[str, ...]
    """columns that the model sees: one or two texts, or one image"""
    hub: tuple[str, ...] = ()
    """repository on the Hub and, if it has several, the configuration"""
    label: str = "label"
    """column of the target: a class, a number, the answers of a question (SQuAD's struct), or a summary"""
    metrics: tuple[str, ...] = ("accuracy",)
    """names of the metrics; the first one is the main metric"""
    evaluation: tuple[tuple[str, str], ...] = ()
    """(split, name in the record) of each split to evaluate; empty: validation, or test if only that is labelled"""
    regression: bool = False
    candidates: int = 0
    """number of candidate answers per row, of which one is right; 0: the classes are labels"""
    channels: int = 3
    augmented: bool = True
    """whether training images are cropped and flipped"""

    @property
    def numbered(self) -> bool:
        """Whether the target is a class or a number, rather than a text."""
        return self.kind in ("image", "text")


def _glue(name: str, *inputs: str, **fields: Any) -> Task:
    return Task("text", inputs, hub=("nyu-mll/glue", name), **fields)


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
    "digits": Task("image", ("image",), channels=1, augmented=False),  # a mirrored digit is another shape
    "lm": Task("lm", ("text",), hub=("Salesforce/wikitext", "wikitext-2-raw-v1"), metrics=("perplexity", "accuracy")),
}

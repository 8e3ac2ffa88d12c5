"""What must hold of rows before a model sees them; each error is one line that names file, row and column."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from eval.data_files import Split
from eval.data_labels import HIDDEN, Labels, labels_of
from eval.tasks import Task
from quant.errors import UserError

TEXT_NAMES = (("text",), ("sentence",), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "answer"))
LABEL_NAMES = ("label", "labels", "class", "target", "fine_label")
"""columns that are taken for granted in a user's folder when no flag names them"""
HELD_OUT = 0.1
"""share of the training split that is evaluated where nothing else can be"""


def with_columns(task: Task, features: Mapping[str, Any], config: Any) -> Task:
    """The task with the columns that the flags name or that the data has; UserError where one cannot be found."""
    text_column, label_column = (getattr(config, f"{part}_column", None) for part in ("text", "label"))
    named = tuple(name.strip() for name in text_column.split(",")) if text_column else task.inputs
    images = tuple(name for name, feature in features.items() if type(feature).__name__ == "Image")
    usual = images[:1] if task.kind == "image" else next((t for t in TEXT_NAMES if set(t) <= set(features)), ())
    inputs = named if text_column or set(named) <= set(features) or task.kind != "image" else ()
    inputs = inputs or usual
    label = label_column or task.label
    if not label or (label not in features and task.kind == "image" and not label_column):
        label = next((name for name in LABEL_NAMES if name in features), "")
    wanted = [("--text_column", name) for name in inputs or [""]]
    wanted += [] if task.kind == "lm" else [("--label_column", label)]
    for flag, name in wanted:
        if name not in features:
            problem = f"the data has no column {name}" if name else "no column of the data is known to hold it"
            raise UserError(f"{flag}: {problem}; choose from {', '.join(features)}")
    return replace(task, inputs=inputs, label=label)


def usable_splits(task: Task, splits: dict[str, Split]) -> tuple[Split, dict[str, Split], list[str]]:
    """(train, {name in the record: evaluated split}, notes). UserError without rows to train on or to evaluate."""
    names = ", ".join(splits) or "(none)"
    if "train" not in splits or not len(splits["train"]):
        raise UserError(f"no rows to train on: the data has the splits {names}")
    if not is_labelled(task, splits["train"]):
        raise UserError(f"{splits['train'].source.place(0)}: the training split has no labels")
    wanted = task.evaluation or (("validation", "validation"), ("test", "validation"))
    labelled = [name for name, split in splits.items() if is_labelled(task, split)]
    # From the last to the first: where two splits would have one name in the record, the first one stays.
    found = {title: splits[name] for name, title in reversed(wanted) if name in labelled}
    if found:
        return splits["train"], dict(reversed(found.items())), []
    if len(splits) > 1:
        choices = " or ".join(name for name, _ in wanted)
        raise UserError(f"no labelled split to evaluate: looked for {choices} among {names}")
    return hold_out(task, splits["train"])


def hold_out(task: Task, split: Split) -> tuple[Split, dict[str, Split], list[str]]:
    """A data set of one split, divided the same way in every run; lines of text are cut at one place."""
    from sklearn.model_selection import train_test_split

    if len(split) < 2:
        raise UserError(f"{split.source.place(0)}: one row cannot be divided into training and validation")
    rows = np.arange(len(split))
    shuffled = task.kind != "lm"
    parts = train_test_split(rows, test_size=HELD_OUT, shuffle=shuffled, random_state=0 if shuffled else None)
    train, validation = (split.select(np.sort(part)) for part in parts)
    return train, {"validation": validation}, [f"no validation split: {len(validation)} training rows are held out"]


def is_labelled(task: Task, split: Split) -> bool:
    """Whether the split has rows, and labels other than those that stand for a hidden one."""
    if not len(split) or task.kind == "lm":
        return bool(len(split))
    if task.label not in split.rows.column_names:
        return False
    return any(label not in HIDDEN for label in split.values(task.label))


def read_labels(task: Task, train: Split) -> Labels:
    """How the labels of the task are read, from its training split."""
    if not task.numbered:
        return Labels((), {})
    names = getattr(train.rows.features[task.label], "names", None)
    return labels_of(train.values(task.label), names, task.regression, in_column(train, task.label))


def check_split(task: Task, split: Split, labels: Labels) -> Split:
    """The split with its labels as numbers. UserError for the first row that is wrong."""
    if task.kind != "image":
        check_texts(task, split)
    if task.kind == "qa":
        check_answers(task, split)
    if not task.numbered:
        return split
    place = in_column(split, task.label)
    numbers: list[int | float] = []
    cells = split.values(task.label)
    for row, cell in enumerate(cells):
        try:
            numbers.append(labels.number(cell))
        except ValueError as error:
            raise UserError(f"{place(row)}: {error}") from None
    if numbers == cells:
        return split
    rows = split.rows.remove_columns(task.label).add_column(task.label, np.asarray(numbers))
    return Split(rows, split.source)


def check_texts(task: Task, split: Split) -> None:
    """Every cell is text, and every row has some; a language model's lines may be empty."""
    names = (*task.inputs, task.label) if task.kind == "summary" else task.inputs
    columns = {name: split.values(name) for name in names}
    for name, texts in columns.items():
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                problem = "is missing" if text is None else f"{text!r} is not text"
                raise UserError(f"{in_column(split, name)(row)}: {problem}")
    if task.kind != "lm":
        for row, together in enumerate(zip(*columns.values(), strict=True)):
            if not any(text.strip() for text in together):
                raise UserError(f"{in_column(split, task.inputs[0])(row)}: is empty")


def check_answers(task: Task, split: Split) -> None:
    """SQuAD's answers: {text: [...], answer_start: [...]} with every text where it is said to start; none is fine."""
    place, context = in_column(split, task.label), split.values(task.inputs[1])
    for row, answers in enumerate(split.values(task.label)):
        if not isinstance(answers, dict) or not {"text", "answer_start"} <= set(answers):
            raise UserError(f"{place(row)}: {answers!r} is not SQuAD's text and answer_start")
        for text, start in zip(answers["text"], answers["answer_start"], strict=True):
            if context[row][start : start + len(text)] != text:
                raise UserError(f"{place(row)}: the context has no {text!r} at character {start}")


def in_column(split: Split, column: str) -> Callable[[int], str]:
    return lambda row: f"{split.source.place(row)}, column {column}"

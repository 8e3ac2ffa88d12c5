"""Checks rows before a model sees them; each error is one line that names the file, row and column."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from eval.data.files import Split
from eval.data.labels import Labels, is_hidden, labels_of
from eval.tasks import Task
from quant.errors import UserError

TEXT_NAMES = (("text",), ("sentence",), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "answer"))
LABEL_NAMES = ("label", "labels", "class", "target", "fine_label")
"""label columns to look for in a user's folder if no flag names one"""
HELD_OUT = 0.1
"""share of the training split that is held out for evaluation if there is no other split"""


def with_columns(task: Task, features: Mapping[str, Any], config: Any) -> Task:
    """Return the task with the columns that the flags name, or else those found in the data.

    Args:
        task: the task; its own columns are used if the data has them.
        features: the columns of the data and their types.
        config: has `text_column` (a comma list) and `label_column`, if given.

    Raises:
        UserError: if a column is not found.
    """
    text_column, label_column = (getattr(config, f"{part}_column", None) for part in ("text", "label"))
    named = tuple(name.strip() for name in text_column.split(",")) if text_column else task.inputs
    images = tuple(name for name, feature in features.items() if type(feature).__name__ == "Image")
    usual = images[:1] if task.kind == "image" else next((t for t in TEXT_NAMES if set(t) <= set(features)), ())
    inputs = named if text_column or set(named) <= set(features) or task.kind != "image" else ()
    inputs = inputs or usual
    if "" in named:
        raise UserError(f"--text_column {text_column}: has an empty entry")
    label = label_column or task.label
    if not label or (label not in features and task.kind == "image" and not label_column):
        label = next((name for name in LABEL_NAMES if name in features), "")
    wanted = [("--text_column", name) for name in inputs or [""]]
    wanted += [] if task.kind == "lm" else [("--label_column", label)]
    for flag, name in wanted:
        if name not in features:
            problem = f"the data has no column {name}" if name else "no column of the data is known to hold it"
            raise UserError(f"{flag}: {problem}; choose from {', '.join(features)}")
    check_named(inputs, label, task, features, given=bool(text_column) and not label_column)
    return replace(task, inputs=inputs, label=label)


def check_named(inputs: Sequence[str], label: str, task: Task, features: Mapping[str, Any], given: bool) -> None:
    """Check that columns which exist can serve as inputs and label.

    Args:
        inputs: the input columns.
        label: the label column.
        task: the task, for the number of inputs it takes.
        features: the columns of the data.
        given: whether --text_column, but not --label_column, was given: decides which flag an error names.

    Raises:
        UserError: for a column named twice, too many columns, or a label column that is also an input.
    """
    names = ",".join(inputs)
    most = len(task.inputs) or (1 if task.kind in ("image", "lm") else 2)
    if len(set(inputs)) < len(inputs):
        raise UserError(f"--text_column {names}: names a column twice")
    if len(inputs) > most:
        raise UserError(f"--text_column {names}: names {len(inputs)} columns, and a row has at most {most} here")
    if task.kind != "lm" and label in inputs:
        others = ", ".join(name for name in features if name != label) or "(no other column)"
        wrong, holds = ("--text_column", "labels") if given else ("--label_column", "texts")
        raise UserError(f"{wrong} {label}: is the column of {holds}, too; choose another from {others}")


def training_split(splits: dict[str, Split]) -> Split:
    """Return the split to train on; raise UserError if there is none, or no row in it."""
    if "train" not in splits or not len(splits["train"]):
        raise UserError(f"no rows to train on: the data has the splits {', '.join(splits) or '(none)'}")
    return splits["train"]


def usable_splits(task: Task, splits: dict[str, Split]) -> tuple[Split, dict[str, Split], list[str]]:
    """Choose the splits to train on and to evaluate; only labelled splits are evaluated.

    Returns:
        The training split, the evaluation splits by their names in the record, and notes for the user.

    Raises:
        UserError: if training labels are missing, or no split can be evaluated although there are several.
    """
    train, notes = training_split(splits), []
    if not is_labelled(task, train):
        raise UserError(f"{train.source.place(0)}: the training split has no labels")
    wanted = task.evaluation or (("validation", "validation"), ("test", "validation"))
    hidden = {name: unlabelled(task, splits[name]) for name, _ in wanted if name in splits}
    labelled = [name for name, problem in hidden.items() if not problem]
    # In reverse, so that of two splits with the same name in the record the first one wins.
    found = {title: splits[name] for name, title in reversed(wanted) if name in labelled}
    notes = [problem for problem in hidden.values() if problem]
    if found:
        return train, dict(reversed(found.items())), [f"not evaluated: {problem}" for problem in notes]
    if len(splits) > 1:
        choices = " or ".join(name for name, _ in wanted)
        looked = f"no labelled split to evaluate: looked for {choices} among {', '.join(splits)}"
        remedy = "give its labels, or move it away: a tenth of the training rows is held out instead"
        raise UserError("; ".join([looked, *notes, *([remedy] if notes else [])]))
    return validation_from_training(task, train)


def validation_from_training(task: Task, split: Split) -> tuple[Split, dict[str, Split], list[str]]:
    """Hold out the share `HELD_OUT` of a split for evaluation, the same rows in every run; for `lm`, the last ones."""
    from sklearn.model_selection import train_test_split

    if len(split) < 2:
        raise UserError(f"{split.source.place(0)}: one row cannot be divided into training and validation")
    rows = np.arange(len(split))
    shuffled = task.kind != "lm"
    parts = train_test_split(rows, test_size=HELD_OUT, shuffle=shuffled, random_state=0 if shuffled else None)
    train, validation = (split.select(np.sort(part)) for part in parts)
    return train, {"validation": validation}, [f"no validation split: {len(validation)} training rows are held out"]


def is_labelled(task: Task, split: Split) -> bool:
    """Return whether the split has rows, and labels that are not hidden."""
    return not unlabelled(task, split)


def unlabelled(task: Task, split: Split) -> str:
    """Return why a split cannot be evaluated (no rows, no label column, or only hidden labels); "" if it can."""
    source = split.source.files[0] if split.source.files else f"split {split.source.split}"
    if not len(split):
        return f"{source} has no rows"
    if task.kind == "lm":
        return ""
    if task.label not in split.rows.column_names:
        return f"{source} has no column {task.label} (it has {', '.join(split.rows.column_names)})"
    shown = any(not is_hidden(label) for label in split.values(task.label))
    return "" if shown else f"{source} has no label in column {task.label}"


def read_labels(task: Task, train: Split) -> Labels:
    """Find out from the training split how labels are to be read."""
    if not task.numbered:
        return Labels((), {})
    names = getattr(train.rows.features[task.label], "names", None)
    return labels_of(train.values(task.label), names, task.regression, in_column(train, task.label))


def check_split(task: Task, split: Split, labels: Labels) -> Split:
    """Return the split with its labels as numbers; raise UserError for the first invalid row."""
    for name in task.inputs:
        if name not in split.rows.column_names:
            has = ", ".join(split.rows.column_names)
            raise UserError(f"{split.source.place(0)}: there is no column {name}, which training has; it has {has}")
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
    """Raise UserError unless all cells are text and no row is empty; for `lm`, rows may be empty."""
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
    """Raise UserError unless answers have SQuAD's form, {text: [...], answer_start: [...]}, and match the context.

    A question may have no answer.
    """
    place, context = in_column(split, task.label), split.values(task.inputs[1])
    for row, answers in enumerate(split.values(task.label)):
        if not isinstance(answers, dict) or not {"text", "answer_start"} <= set(answers):
            raise UserError(f"{place(row)}: {answers!r} is not SQuAD's text and answer_start")
        for text, start in zip(answers["text"], answers["answer_start"], strict=True):
            if context[row][start : start + len(text)] != text:
                raise UserError(f"{place(row)}: the context has no {text!r} at character {start}")


def in_column(split: Split, column: str) -> Callable[[int], str]:
    """Return a function from a row number to its place (file, row, column) for errors."""
    return lambda row: f"{split.source.place(row)}, column {column}"

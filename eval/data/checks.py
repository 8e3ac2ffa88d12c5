"""What must hold of rows before a model sees them; each error is one line that names file, row and column."""

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
    """UserError for columns that are there and cannot be what they are taken for.

    given: whether --text_column names the texts' columns and no flag that of the labels.
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
    """The split to train on; UserError where there is none."""
    if "train" not in splits or not len(splits["train"]):
        raise UserError(f"no rows to train on: the data has the splits {', '.join(splits) or '(none)'}")
    return splits["train"]


def usable_splits(task: Task, splits: dict[str, Split]) -> tuple[Split, dict[str, Split], list[str]]:
    """(train, splits to evaluate by their names in the record, notes). Only labelled splits are evaluated."""
    train, notes = training_split(splits), []
    if not is_labelled(task, train):
        raise UserError(f"{train.source.place(0)}: the training split has no labels")
    wanted = task.evaluation or (("validation", "validation"), ("test", "validation"))
    hidden = {name: unlabelled(task, splits[name]) for name, _ in wanted if name in splits}
    labelled = [name for name, problem in hidden.items() if not problem]
    # From the last to the first: where two splits would have one name in the record, the first one stays.
    found = {title: splits[name] for name, title in reversed(wanted) if name in labelled}
    notes = [problem for problem in hidden.values() if problem]
    if found:
        return train, dict(reversed(found.items())), [f"not evaluated: {problem}" for problem in notes]
    if len(splits) > 1:
        choices = " or ".join(name for name, _ in wanted)
        looked = f"no labelled split to evaluate: looked for {choices} among {', '.join(splits)}"
        remedy = "give its labels, or move it away: a tenth of the training rows is held out instead"
        raise UserError("; ".join([looked, *notes, *([remedy] if notes else [])]))
    return hold_out(task, train)


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
    return not unlabelled(task, split)


def unlabelled(task: Task, split: Split) -> str:
    """Why a split cannot be evaluated: it has no rows, no column of labels or none that is not hidden. "" if it can."""
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
    """How the labels of the task are read, from its training split."""
    if not task.numbered:
        return Labels((), {})
    names = getattr(train.rows.features[task.label], "names", None)
    return labels_of(train.values(task.label), names, task.regression, in_column(train, task.label))


def check_split(task: Task, split: Split, labels: Labels) -> Split:
    """The split with its labels as numbers. UserError for the first row that is wrong."""
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

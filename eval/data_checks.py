"""What must hold of rows before a model sees them; each error is one line that names split, row and column."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from eval.tasks import Task
from quant.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

Notes = list[str]


def usable_splits(task: Task, splits: dict[str, Dataset]) -> tuple[Dataset, dict[str, Dataset], Notes]:
    """(train, {name: evaluated split}, notes). UserError without a training split or a labelled one to evaluate."""
    for name, split in splits.items():
        missing = [column for column in required_columns(task) if column not in split.column_names]
        if missing and name != "test":  # the test split of a benchmark may come without labels
            raise UserError(
                f"split {name} has no column {missing[0]}; it has {', '.join(split.column_names)}: "
                "name the right ones with --text_column and --label_column"
            )
    if "train" not in splits or not len(splits["train"]):
        raise UserError(f"no rows to train on: the data has the splits {', '.join(splits) or '(none)'}")
    wanted = task.evaluation or tuple((name, "validation") for name in ("validation", "test"))
    labelled = [name for name, split in splits.items() if is_labelled(task, split)]
    # From the last to the first: where two splits would have one name in the record, the first one stays.
    found = {label: splits[name] for name, label in reversed(wanted) if name in labelled}
    if not found:
        names = " or ".join(name for name, _ in wanted)
        raise UserError(f"no labelled split to evaluate: looked for {names} among {', '.join(splits)}")
    return splits["train"], dict(reversed(found.items())), []


def required_columns(task: Task) -> tuple[str, ...]:
    return task.inputs if task.kind == "lm" else (*task.inputs, task.label)


def is_labelled(task: Task, split: Dataset) -> bool:
    """Whether the split has rows, and labels other than the -1 and None that stand for a hidden one."""
    if not len(split) or task.kind == "lm":
        return bool(len(split))
    if task.label not in split.column_names:
        return False
    return any(label is not None and label != -1 for label in split[task.label][:])


def label_names_of(task: Task, train: Dataset) -> list[str]:
    """The classes in the order of their numbers; for numbers without names, up to the largest in the training split."""
    if task.regression or task.kind == "lm":
        return []
    feature = train.features[task.label]
    if hasattr(feature, "names"):
        return list(feature.names)
    labels = train[task.label][:]
    if feature.dtype == "bool":
        return ["False", "True"]
    if feature.dtype == "string":
        return sorted(set(labels))
    return [str(number) for number in range(max(labels) + 1)]


def check_split(task: Task, split: Dataset, label_names: list[str]) -> Dataset:
    """`split` with its labels as class numbers."""
    if task.kind == "lm" or task.regression:
        return split
    labels = split[task.label][:]
    if isinstance(labels[0], str):
        number = {name: index for index, name in enumerate(label_names)}
        labels = [number[label] for label in labels]
        split = split.remove_columns(task.label).add_column(task.label, labels)
    for row, label in enumerate(np.asarray(labels, dtype=np.int64).tolist()):
        if not 0 <= label < len(label_names):
            raise UserError(f"row {row}, column {task.label}: label {label} is not in 0..{len(label_names) - 1}")
    return split

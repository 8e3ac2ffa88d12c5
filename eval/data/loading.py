"""Loads the data of a task by name, and prepares it as inputs of a model.

Heavy packages are imported only when rows are read, so that `find_task` refuses wrong names at once.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.config.suggestions import did_you_mean, local_folders
from eval.tasks import TASKS, Kind, Task
from quant.errors import UserError

if TYPE_CHECKING:
    from eval.data.dataset import PreparedData, TaskData
    from eval.modeling.bundle import ModelBundle


def find_task(name: str) -> Task:
    """Return the task called `name`, or one that describes the local folder of that name.

    The columns of a folder's task are filled in when its data is read.

    Raises:
        UserError: if there is no such task or folder.
    """
    if name in TASKS:
        return TASKS[name]
    folder = Path(name).expanduser()
    if folder.is_dir():
        from eval.data.folder import folder_kind

        kind = folder_kind(folder)
        metrics = TASKS["lm" if kind == "lm" else "sst2"].metrics
        return Task(kind, ("image",) if kind == "image" else (), label="", metrics=metrics)
    hint = did_you_mean(name, [*TASKS, *local_folders()])
    raise UserError(f"--task {name}: no such task or folder; choose one of {', '.join(TASKS)}, or a local folder{hint}")


def task_kind(name: str) -> Kind:
    """Return the kind of a task; raise UserError if `name` is neither a task nor a folder."""
    return find_task(name).kind


def load_task(config: Any) -> TaskData:
    """Read and check the data of `config.task`: built in, from `config.data_dir`, or from the Hub.

    The rows of a subset depend on its size alone, not on the run's seed, so that all runs use the same data.

    Args:
        config: a `RunConfig`, or any object with some of its fields.

    Raises:
        UserError: names the flag, or the file and row.
    """
    from eval.data.checks import check_split, read_labels, training_split, usable_splits, with_columns
    from eval.data.dataset import TaskData
    from eval.data.files import read_splits

    task = find_task(config.task)
    splits, unread = read_splits(task, config)
    task = with_columns(task, training_split(splits).rows.features, config)
    train, validation, notes = usable_splits(task, splits)
    labels = read_labels(task, training_split(splits))  # including rows that are held out
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
    """Prepare rows as inputs of `bundle.model`: tokens padded per batch, or normalised images."""
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

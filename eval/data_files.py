"""Where rows come from: scikit-learn (digits), a local folder in the Hub's layout, or the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.tasks import TASKS, Task
from quant.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def read_splits(task: Task, config: Any) -> dict[str, Dataset]:
    """Every split of the task by its name, unchecked."""
    if task is TASKS["digits"]:
        return read_digits()
    folder = config.task if config.task not in TASKS else getattr(config, "data_dir", None)
    return read_hub(task) if folder is None else read_folder(task, Path(folder).expanduser())


def read_digits() -> dict[str, Dataset]:
    """scikit-learn's handwritten digits, 8x8 pixels, 1,437 to train and 360 to validate, every digit in proportion."""
    import numpy as np
    from datasets import Array2D, ClassLabel, Dataset, Features
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    features = Features(image=Array2D((8, 8), "uint8"), label=ClassLabel(names=[str(digit) for digit in range(10)]))
    rows = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    return {
        name: Dataset.from_dict({"image": images[part], "label": labels[part]}, features=features)
        for name, part in zip(("train", "validation"), rows, strict=True)
    }


def read_folder(task: Task, folder: Path) -> dict[str, Dataset]:
    """The splits of a local folder; UserError where there is none or its files cannot be read."""
    import datasets
    from datasets.exceptions import DatasetsError

    if not folder.is_dir():
        raise UserError(f"--data_dir {folder}: no such folder")
    if task.hub and (folder / task.hub[-1]).is_dir():  # the folder of a repository with several configurations
        folder = folder / task.hub[-1]
    datasets.disable_progress_bars()
    try:
        return dict(datasets.load_dataset(str(folder)))
    except (DatasetsError, OSError, ValueError) as error:
        raise UserError(f"--data_dir {folder}: {first_line(error)}") from error


def read_hub(task: Task) -> dict[str, Dataset]:
    """The splits of a Hub data set, from the cache when the Hub does not answer."""
    import datasets
    from datasets.exceptions import DatasetsError

    from eval.hub import hub_answers, unreachable

    datasets.disable_progress_bars()
    online = hub_answers()
    datasets.config.HF_HUB_OFFLINE = not online
    try:
        return dict(datasets.load_dataset(*task.hub))
    except (DatasetsError, OSError, ValueError) as error:
        if not online:
            raise unreachable(f"the data set {'/'.join(task.hub)}") from error
        raise UserError(f"the data set {'/'.join(task.hub)} of the Hub: {first_line(error)}") from error


def take(split: Dataset, rows: int) -> Dataset:
    """`rows` rows spread over the whole split in its own order: a sorted file must not leave classes out."""
    import numpy as np

    if rows < 1:
        raise UserError(f"--max_train_samples and --max_eval_samples must be at least 1, got {rows}")
    if rows >= len(split):
        return split
    return split.select(np.sort(np.random.default_rng(0).permutation(len(split))[:rows]))


def first_line(error: BaseException) -> str:
    """The first line of the root cause: libraries wrap what the user needs to see."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).splitlines()), type(error).__name__)

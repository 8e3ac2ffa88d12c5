"""Where rows come from: scikit-learn (digits), a local folder in the Hub's layout, or the Hub."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.tasks import TASKS, Kind, Task
from quant.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

READERS: dict[str, str] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"), "images"),
}
"""file suffix -> what reads it: a builder of `datasets`, or one of the functions below"""


SHARD = re.compile(r"-\d{5}-of-\d{5}$")
IGNORED = re.compile(r"/\.|/(README|config|dataset_info|dataset_infos|dataset_dict|state|metadata)\.\w+$")
"""hidden files, and those that describe the data"""


@dataclass(frozen=True)
class Source:
    """Where the rows of a split stand, for errors that name them."""

    split: str
    files: tuple[str, ...] = ()
    rows: np.ndarray | None = None
    """place in the files of each row that is left; None: all of them, in order"""

    def select(self, rows: np.ndarray) -> Source:
        return replace(self, rows=rows if self.rows is None else self.rows[rows])

    def place(self, row: int) -> str:
        """'.../train.csv, row 3', counted from 1 without a header; 'split train, row 3' where there is no file."""
        row = row if self.rows is None else int(self.rows[row])
        for file in self.files:
            size = len(read_files([file])) if len(self.files) > 1 else row + 1
            if row < size:
                return f"{file}, row {row + 1}"
            row -= size
        return f"split {self.split}, row {row + 1}"


@dataclass(frozen=True)
class Split:
    """Rows and where they come from."""

    rows: Dataset
    source: Source

    def __len__(self) -> int:
        return len(self.rows)

    def values(self, column: str) -> list[Any]:
        return self.rows[column][:]

    def select(self, rows: np.ndarray) -> Split:
        return Split(self.rows.select(rows), self.source.select(rows))

    def take(self, count: int) -> Split:
        """`count` rows spread over the whole split, in its own order: a sorted file must not leave classes out."""
        import numpy as np

        if count >= len(self):
            return self
        return self.select(np.sort(np.random.default_rng(0).permutation(len(self))[:count]))


def read_splits(task: Task, config: Any) -> dict[str, Split]:
    """Every split of the task by its name, unchecked."""
    if task is TASKS["digits"]:
        return read_digits()
    folder = config.task if config.task not in TASKS else getattr(config, "data_dir", None)
    return read_hub(task) if folder is None else read_folder(task, Path(folder).expanduser())


def read_digits() -> dict[str, Split]:
    """scikit-learn's handwritten digits, 8x8 pixels, 1,437 to train and 360 to validate, every digit in proportion."""
    import numpy as np
    from datasets import Array2D, ClassLabel, Dataset, Features
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    features = Features(image=Array2D((8, 8), "uint8"), label=ClassLabel(names=[str(digit) for digit in range(10)]))
    parts = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    return {
        name: Split(
            Dataset.from_dict({"image": images[part], "label": labels[part]}, features=features),
            Source(name, rows=part),
        )
        for name, part in zip(("train", "validation"), parts, strict=True)
    }


def read_folder(task: Task, folder: Path) -> dict[str, Split]:
    """The splits of a local folder; UserError where there is none or its files cannot be read."""
    if not folder.is_dir():
        raise UserError(f"--data_dir {folder}: no such folder")
    if task.hub and (folder / task.hub[-1]).is_dir():  # the folder of a repository with several configurations
        folder = folder / task.hub[-1]
    splits = {
        name: Split(read_files(files, folder), Source(name, tuple(files)))
        for name, files in files_of(folder).items()
    }  # fmt: skip
    return {name: flat(split) for name, split in splits.items()} if task.kind == "qa" else splits


def flat(split: Split) -> Split:
    """SQuAD's own files, articles of paragraphs of questions, as a row a question; the Hub's rows as they are."""
    if "data" not in split.rows.column_names:
        return split
    from datasets import Dataset

    rows = [
        {
            "id": str(question.get("id")),
            "question": question["question"],
            "context": paragraph["context"],
            "answers": {
                "text": [answer["text"] for answer in question["answers"]],
                "answer_start": [answer["answer_start"] for answer in question["answers"]],
            },
        }
        for part in split.values("data")
        for article in (part if isinstance(part, list) else [part])
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    return Split(Dataset.from_list(rows), Source(split.source.split))


def files_of(folder: Path) -> dict[str, list[str]]:
    """Split name -> its files, of the kind that most files of the folder are.

    Of those called train, if there are any: a folder that also holds runs holds more of their files than of its own.
    """
    from datasets.data_files import DataFilesDict, get_data_patterns

    files = sorted(file for file in folder.rglob("*") if reader_of(file) and not ignored(file, folder))
    if not files:
        raise UserError(f"--data_dir {folder}: holds no {', '.join(READERS)} file")
    reader = commonest_reader(files)
    if reader != "images" and (called_train := [file for file in files if split_name(file) == "train"]):
        reader = commonest_reader(called_train)
    files = [file for file in files if reader_of(file) == reader]
    splits: dict[str, list[str]] = {}
    for file in files:
        splits.setdefault(split_name(file), []).append(str(file))
    if "train" in splits and reader != "images":
        return splits
    # Not files called after splits, but perhaps folders, or longer names: `datasets` has many patterns.
    found = DataFilesDict.from_patterns(get_data_patterns(str(folder)), base_path=str(folder))
    kept = {str(file.resolve()) for file in files}
    splits = {str(name): [file for file in members if file in kept] for name, members in found.items()}
    splits = {name: members for name, members in splits.items() if members}
    if not splits:
        raise UserError(f"--data_dir {folder}: no file or folder is called after a split: train, validation, test")
    return splits


def commonest_reader(files: Sequence[Path]) -> str:
    """What reads most of the files."""
    (reader, _), *_ = Counter(map(reader_of, files)).most_common(1)
    return reader


def split_name(file: Path) -> str:
    """train-00000-of-00002.parquet -> train, dev_matched.tsv -> validation_matched."""
    name = SHARD.sub("", file.stem)
    first, *rest = name.split("_")
    return "_".join(["validation" if first in ("dev", "val", "valid") else first, *rest])


def reader_of(file: str | Path) -> str:
    """What reads the file, "" if nothing does."""
    return READERS.get(Path(file).suffix.lower(), "")


def read_files(files: Sequence[str], folder: Path | None = None) -> Dataset:
    """The rows of the files, which are all of one kind; UserError that names the one that cannot be read."""
    import datasets
    import pyarrow
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it has to say comes with the exception
    reader = reader_of(files[0])
    if reader == "images":
        return read_images(files)
    if reader == "csv":
        return datasets.concatenate_datasets([datasets.Dataset.from_dict(read_csv(Path(file))) for file in files])
    try:
        return datasets.load_dataset(reader, data_files=list(files), split="train", trust_remote_code=False)
    except (DatasetsError, OSError, ValueError, pyarrow.ArrowException) as error:
        if len(files) > 1:
            for file in files:
                read_files([file])
        raise UserError(f"{files[0] if len(files) == 1 else folder}: {first_line(error)}") from error


def read_csv(file: Path) -> dict[str, list[str]]:
    """Column name -> its cells as they are written; labels are read from them in `data_labels`.

    pandas and `datasets` turn empty cells and words such as NA, null and None into missing values, guess the types of
    every ten thousand rows anew, and take a first column too many for an index.
    """
    csv.field_size_limit(2**31 - 1)
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = csv.reader(stream, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
            header = next(rows, None)
            if not header:
                raise UserError(f"{file}: is empty")
            cells = []
            for row in rows:
                if len(row) != len(header) and row:
                    raise UserError(f"{file}, line {rows.line_num}: {len(row)} fields, the header has {len(header)}")
                cells += [row] if row else []
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 ({error.reason} at byte {error.start})") from error
    except csv.Error as error:
        raise UserError(f"{file}, line {rows.line_num}: {error}") from error
    return {name: [row[place] for row in cells] for place, name in enumerate(header)}


def read_images(files: Sequence[str]) -> Dataset:
    """Images whose folder is their class: columns image and label."""
    from datasets import Dataset, Features, Image, Value

    features = Features(image=Image(), label=Value("string"))
    return Dataset.from_dict(
        {"image": list(files), "label": [Path(file).parent.name for file in files]}, features=features
    )


def read_hub(task: Task) -> dict[str, Split]:
    """The splits of a Hub data set, from the cache when the Hub does not answer."""
    import datasets
    from datasets.exceptions import DatasetsError

    from eval.hub import hub_answers, unreachable

    datasets.disable_progress_bars()
    online = hub_answers()
    datasets.config.HF_HUB_OFFLINE = not online
    try:
        splits = datasets.load_dataset(*task.hub, trust_remote_code=False)
    except (DatasetsError, OSError, ValueError) as error:
        if not online:
            raise unreachable(f"the data set {'/'.join(task.hub)}") from error
        raise UserError(f"the data set {'/'.join(task.hub)} of the Hub: {first_line(error)}") from error
    return {name: Split(rows, Source(name)) for name, rows in splits.items()}


def ignored(file: Path, folder: Path) -> bool:
    """Whether a file is no data. What stands above the folder does not count: it may lie in ~/.cache or be ../data."""
    return IGNORED.search(f"/{file.relative_to(folder).as_posix()}") is not None


def folder_kind(folder: Path) -> Kind:
    """What a local folder is for: images, lines of text to continue, or tables of texts and labels. No data is read."""
    readers = Counter(reader_of(file) for file in folder.rglob("*") if not ignored(file, folder))
    readers.pop("", None)
    if not readers:
        raise UserError(f"--task {folder}: holds no {', '.join(READERS)} file")
    (reader, _), *_ = readers.most_common(1)
    if reader == "parquet":
        return "image" if image_columns(next(folder.rglob("*.parquet"))) else "text"
    return {"images": "image", "text": "lm"}.get(reader, "text")  # type: ignore[return-value]


def image_columns(file: Path) -> list[str]:
    """The columns of a parquet file that hold images: a struct of bytes and path, as the Hub writes them."""
    from pyarrow import parquet, types

    schema = parquet.read_schema(file)
    return [field.name for field in schema if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0]


def first_line(error: BaseException) -> str:
    """The first line of the root cause: libraries wrap what the user needs to see."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).splitlines()), type(error).__name__)

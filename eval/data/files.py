"""Where rows come from: scikit-learn (digits), a local folder in the Hub's layout, or the Hub."""

from __future__ import annotations

import bz2
import csv
import gzip
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.data.folder import class_folder, find_data, reader_of
from eval.tasks import TASKS, Task
from quant.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""how compressed files are opened"""


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
        if self.files and reader_of(self.files[0]) == "images":
            return self.files[row]
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


def read_splits(task: Task, config: Any) -> tuple[dict[str, Split], list[str]]:
    """Every split of the task by its name, unchecked, and notes on what was not read."""
    if task is TASKS["digits"]:
        return read_digits(), []
    flag, folder = ("--data_dir", getattr(config, "data_dir", None))
    if config.task not in TASKS:
        flag, folder = "--task", config.task
    return (read_hub(task), []) if folder is None else read_folder(task, Path(folder).expanduser(), flag)


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


def read_folder(task: Task, folder: Path, flag: str) -> tuple[dict[str, Split], list[str]]:
    """The splits of the local folder that `flag` names, and notes; UserError where its files cannot be read."""
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: no such folder")
    if task.hub and (folder / task.hub[-1]).is_dir():  # the folder of a repository with several configurations
        folder = folder / task.hub[-1]
    found = find_data(folder, flag)
    splits = {
        name: Split(read_files(files, folder), Source(name, tuple(files))) for name, files in found.splits.items()
    }
    for split in splits.values():
        if not len(split):
            raise UserError(f"{split.source.files[0]}: holds no rows; fill or remove it")
    return {name: flat(split) for name, split in splits.items()} if task.kind == "qa" else splits, list(found.notes)


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


def read_files(files: Sequence[str], folder: Path | None = None) -> Dataset:
    """The rows of the files, which are all of one kind; UserError that names the one that cannot be read."""
    import datasets
    import pyarrow
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it has to say comes with the exception
    reader = reader_of(files[0])
    if reader == "images":
        return read_images(files, folder or Path(files[0]).parents[1])
    for file in files:
        if not os.path.getsize(file):
            raise UserError(f"{file}: is empty")
    if reader == "csv":
        return read_tables(files)
    if reader == "parquet":
        check_parquet(files)
    else:
        for file in files:
            check_text(Path(file))
    try:
        rows = datasets.load_dataset(reader, data_files=list(files), split="train", trust_remote_code=False)
    except (DatasetsError, OSError, ValueError, TypeError, pyarrow.ArrowException) as error:
        if len(files) > 1:
            for file in files:
                read_files([file])
        holds_none = Path(files[0]).read_bytes()[:64].strip() in (b"{}", b"[]")  # of which `datasets` says other things
        raise UserError(
            f"{files[0] if len(files) == 1 else folder}: {'holds no rows' if holds_none else first_line(error)}"
        ) from error
    return rows


def check_text(file: Path) -> None:
    """UserError for a file that is not UTF-8 to its end: `datasets` would find out when a row is asked for."""
    with opened(file) as stream:
        while stream.read(2**20):
            pass


def check_parquet(files: Sequence[str]) -> None:
    """UserError for a file that is damaged, has two columns of one name, or, where it is the only one, no rows."""
    import pyarrow
    from pyarrow import parquet

    for file in files:
        try:
            metadata = parquet.read_metadata(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file}: {first_line(error)}") from error
        check_header(file, metadata.schema.to_arrow_schema().names)
        if not metadata.num_rows and len(files) == 1:
            raise UserError(f"{file}: holds no rows")


def read_tables(files: Sequence[str]) -> Dataset:
    """The rows of csv files with the same columns."""
    from datasets import Dataset, concatenate_datasets

    tables = [read_csv(Path(file)) for file in files]
    for file, table in zip(files, tables, strict=True):
        if list(table) != list(tables[0]):
            raise UserError(f"{file}: has the columns {', '.join(table)}; {files[0]} has {', '.join(tables[0])}")
    return concatenate_datasets([Dataset.from_dict(table) for table in tables])


def read_csv(file: Path) -> dict[str, list[str]]:
    """Column name -> its cells as they are written; labels are read from them in `data_labels`.

    pandas and `datasets` turn empty cells and words such as NA, null and None into missing values, guess the types of
    every ten thousand rows anew, and take a first column too many for an index. Columns without a name are left out.
    """
    csv.field_size_limit(2**31 - 1)
    with opened(file) as stream:
        first = next((line for line in stream if line.strip()), "")
        if "\0" in first:
            raise UserError(f"{file}: is not UTF-8 but seems to be UTF-16; save it as UTF-8")
        stream.seek(0)
        rows = csv.reader(stream, delimiter=delimiter(file, first), strict=True)
        try:
            header = [name.strip() for name in next((row for row in rows if row), [])]
            if not any(header):
                raise UserError(f"{file}: is empty")
            cells = []
            for row in rows:
                if len(row) != len(header) and row:
                    raise UserError(f"{file}, line {rows.line_num}: {len(row)} fields, the header has {len(header)}")
                cells += [row] if row else []
        except csv.Error as error:
            raise UserError(f"{file}, line {rows.line_num}: {error}") from error
    check_header(str(file), [name for name in header if name])
    if not cells:
        raise UserError(f"{file}: has a header ({', '.join(filter(None, header))}) and no rows")
    return {name: [row[place] for row in cells] for place, name in enumerate(header) if name}


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """The text of a file, which may be compressed; within, UserError for what cannot be read or is not UTF-8."""
    opener = OPENERS.get(file.suffix.lower(), open)
    try:
        with opener(file, "rt", newline="", encoding="utf-8-sig") as stream:
            yield stream
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def delimiter(file: Path, header: str) -> str:
    """What stands between the columns of a table: a tab in a .tsv; else commas, or semicolons or tabs without any."""
    if ".tsv" in (suffix.lower() for suffix in file.suffixes):
        return "\t"
    return next((mark for mark in ",;\t" if mark in header), ",")


def check_header(file: str, names: Sequence[str]) -> None:
    """UserError where two columns have one name: only one of them would be seen."""
    if twice := next((name for place, name in enumerate(names) if name in names[:place]), None):
        raise UserError(f"{file}: has two columns called {twice}; rename or remove one")


def read_images(files: Sequence[str], folder: Path) -> Dataset:
    """Images whose folder is their class: columns image and label."""
    from datasets import Dataset, Features, Image, Value

    features = Features(image=Image(), label=Value("string"))
    labels = [class_folder(Path(file), folder) for file in files]
    return Dataset.from_dict({"image": list(files), "label": labels}, features=features)


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


def first_line(error: BaseException) -> str:
    """The first line of the root cause: libraries wrap what the user needs to see."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).splitlines()), type(error).__name__)

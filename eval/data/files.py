"""Reads the splits of a task from scikit-learn (digits), a local folder in the Hub's layout, or the Hub."""

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
"""suffix of a compressed file -> how to open it"""


@dataclass(frozen=True)
class Source:
    """Where the rows of a split come from, for error messages."""

    split: str
    files: tuple[str, ...] = ()
    rows: np.ndarray | None = None
    """position in the files of each row that was kept; None: all rows, in order"""

    def select(self, rows: np.ndarray) -> Source:
        """Return the source of the given rows only."""
        return replace(self, rows=rows if self.rows is None else self.rows[rows])

    def place(self, row: int) -> str:
        """Describe a row, counted from 0, for an error.

        Returns:
            '.../train.csv, row 3', where rows count from 1 and the header does not count; the path of an image; or
            'split train, row 3' for rows without a file.
        """
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
    """The rows of one split, and where they come from."""

    rows: Dataset
    source: Source

    def __len__(self) -> int:
        return len(self.rows)

    def values(self, column: str) -> list[Any]:
        """Return all cells of a column."""
        return self.rows[column][:]

    def select(self, rows: np.ndarray) -> Split:
        """Return the given rows only."""
        return Split(self.rows.select(rows), self.source.select(rows))

    def take(self, count: int) -> Split:
        """Return `count` random rows in their original order.

        They are not the first ones, because a file sorted by class would lose classes.
        """
        import numpy as np

        if count >= len(self):
            return self
        return self.select(np.sort(np.random.default_rng(0).permutation(len(self))[:count]))


def read_splits(task: Task, config: Any) -> tuple[dict[str, Split], list[str]]:
    """Read every split of the task.

    Args:
        task: the task.
        config: has `task` (a name or a folder) and, if given, `data_dir`.

    Returns:
        Split name -> rows, not yet checked; and notes on files that were not read.
    """
    if task is TASKS["digits"]:
        return read_digits(), []
    flag, folder = ("--data_dir", getattr(config, "data_dir", None))
    if config.task not in TASKS:
        flag, folder = "--task", config.task
    return (read_hub(task), []) if folder is None else read_folder(task, Path(folder).expanduser(), flag)


def read_digits() -> dict[str, Split]:
    """Read scikit-learn's handwritten digits: 8x8 pixels, 1,437 for training and 360 for validation, stratified."""
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
    """Read the splits of a local folder.

    Args:
        task: the task.
        folder: the folder.
        flag: the flag that names it, for errors.

    Returns:
        Split name -> rows; and notes on files that were not read.

    Raises:
        UserError: if there is no such folder, or a file in it cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: no such folder")
    if task.hub and (folder / task.hub[-1]).is_dir():  # a repository with several configurations
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
    """Flatten SQuAD's original files (articles of paragraphs of questions) to one row per question.

    Rows in the Hub's form, one per question already, are returned as they are.
    """
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
    """Read the rows of files of one kind.

    Args:
        files: paths.
        folder: the folder that holds them, for the classes of images and for errors.

    Raises:
        UserError: names the file that cannot be read.
    """
    import datasets
    import pyarrow
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the exceptions hold the same text
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
        holds_none = Path(files[0]).read_bytes()[:64].strip() in (b"{}", b"[]")  # `datasets` reports another cause
        raise UserError(
            f"{files[0] if len(files) == 1 else folder}: {'holds no rows' if holds_none else first_line(error)}"
        ) from error
    return rows


def check_text(file: Path) -> None:
    """Raise UserError if a file is not UTF-8; `datasets` would notice only when a row is read."""
    with opened(file) as stream:
        while stream.read(2**20):
            pass


def check_parquet(files: Sequence[str]) -> None:
    """Raise UserError for a damaged file, two columns with the same name, or a single file without rows."""
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
    """Read csv files that must have the same columns."""
    from datasets import Dataset, concatenate_datasets

    tables = [read_csv(Path(file)) for file in files]
    for file, table in zip(files, tables, strict=True):
        if list(table) != list(tables[0]):
            raise UserError(f"{file}: has the columns {', '.join(table)}; {files[0]} has {', '.join(tables[0])}")
    return concatenate_datasets([Dataset.from_dict(table) for table in tables])


def read_csv(file: Path) -> dict[str, list[str]]:
    """Read a csv file without interpreting its cells; `eval.data.labels` parses labels later.

    pandas and `datasets` are not used, because they turn empty cells and words such as NA, null and None into missing
    values, guess types anew for every chunk of rows, and take an extra first column for an index.

    Returns:
        Column name -> its cells as text. Columns without a name are left out.

    Raises:
        UserError: names the file and the line.
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
    """Open a text file, which may be compressed; read errors inside the context become a UserError."""
    opener = OPENERS.get(file.suffix.lower(), open)
    try:
        with opener(file, "rt", newline="", encoding="utf-8-sig") as stream:
            yield stream
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def delimiter(file: Path, header: str) -> str:
    """Return the delimiter of a table: a tab for .tsv; else the first of comma, semicolon, tab in the header."""
    if ".tsv" in (suffix.lower() for suffix in file.suffixes):
        return "\t"
    return next((mark for mark in ",;\t" if mark in header), ",")


def check_header(file: str, names: Sequence[str]) -> None:
    """Raise UserError if two columns have the same name, since one would hide the other."""
    if twice := next((name for place, name in enumerate(names) if name in names[:place]), None):
        raise UserError(f"{file}: has two columns called {twice}; rename or remove one")


def read_images(files: Sequence[str], folder: Path) -> Dataset:
    """Read images whose folder is their class, as columns `image` and `label`."""
    from datasets import Dataset, Features, Image, Value

    features = Features(image=Image(), label=Value("string"))
    labels = [class_folder(Path(file), folder) for file in files]
    return Dataset.from_dict({"image": list(files), "label": labels}, features=features)


def read_hub(task: Task) -> dict[str, Split]:
    """Read the splits of a Hub data set, from the cache if the Hub does not answer."""
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
    """Return the first line of an error's root cause, which libraries wrap in general messages."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).splitlines()), type(error).__name__)

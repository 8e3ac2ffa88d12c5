"""Finds the data files of a local folder and their splits, by their names alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.tasks import Kind
from quant.errors import UserError

READERS: dict[str, str] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".txt": "text",
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"), "images"),
}
"""file suffix -> its reader, see `eval.data.files.read_files`"""
COMPRESSED = (".gz", ".bz2", ".xz")
"""suffixes of compressed csv, json and text files, as in train.csv.gz"""
FOREIGN = (
    *(".xlsx", ".xls", ".ods", ".arrow", ".feather", ".orc", ".avro", ".h5", ".hdf5", ".db", ".sqlite", ".tfrecord"),
    *(".npy", ".npz", ".pkl", ".pickle", ".pt", ".bin", ".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z"),
)
"""suffixes of data files that are not supported"""
SPLITS = {"train": "train", "test": "test", **dict.fromkeys(("validation", "valid", "val", "dev"), "validation")}
"""start of a file's name -> the split"""
WORDS = {**SPLITS, "training": "train", **dict.fromkeys(("testing", "eval", "evaluation"), "test")}
"""word in the name of a file or folder -> the split"""
SHARD = re.compile(r"-\d{5}-of-(\d{5})(-[0-9a-f]+)?$")
IGNORED = re.compile(r"(README|config|dataset_info|dataset_infos|dataset_dict|state|metadata)\.\w+$")
"""files that describe the data, and hold none"""


@dataclass(frozen=True)
class DataFiles:
    """The data files of a folder."""

    splits: dict[str, list[str]]
    """split -> its files, all with the same reader"""
    notes: tuple[str, ...] = ()
    """files that are not read, and shards that are missing"""

    @property
    def first(self) -> Path:
        """The first file of the training split, or of any other split if there is none."""
        return Path((self.splits.get("train") or next(iter(self.splits.values())))[0])


def folder_kind(folder: Path) -> Kind:
    """Return the kind of task that a local folder holds, without reading data.

    Image files, or a parquet file with an image column, make it "image", text files "lm", other tables "text".
    """
    file = find_data(folder, "--task").first
    reader = reader_of(file)
    if reader == "images" or (reader == "parquet" and image_columns(file)):
        return "image"
    return "lm" if reader == "text" else "text"


def find_data(folder: Path, flag: str) -> DataFiles:
    """Find the files of each split.

    Tables named after splits (train.csv, validation.jsonl.gz, ...) take precedence. Otherwise images in one folder per
    class are used, or tables with the name of a split somewhere in their names or folders. Without any such name, all
    files are training data.

    Args:
        folder: the folder to search, with its sub-folders.
        flag: the flag that names it, for errors.

    Raises:
        UserError: if nothing is found, two files hold the same split, or a split's file has an unsupported format.
    """
    files = sorted(walk(folder, flag))
    readable = [file for file in files if reader_of(file)]
    if not readable:
        raise UserError(f"{flag} {folder}: holds no {', '.join(READERS)} file")
    images = [file for file in readable if reader_of(file) == "images"]
    tables = [file for file in readable if reader_of(file) != "images"]
    named = grouped((split_name(file), file) for file in tables)
    in_splits = any(split_folder(file, folder)[0] for file in images)
    if "train" in named and not (in_splits and len(images) > len(tables)):
        splits = {name: one_set(name, members, folder, flag) for name, members in named.items()}
    elif len(images) > len(tables):
        splits = grouped((split_folder(file, folder)[0], file) for file in images) or {"train": images}
    else:
        splits = loosely_named(tables, folder, flag)
    for file in files:
        split = split_name(file)
        if file.suffix.lower() in FOREIGN and split and split not in splits and not reader_of(file):
            raise UserError(
                f"{file}: files of this kind are not read; save it as csv, json or parquet, or move it away"
            )
    used = {file for members in splits.values() for file in members}
    notes = [*unused_note([file for file in readable if file not in used], folder), *missing_shards(splits)]
    return DataFiles({name: [str(file) for file in members] for name, members in splits.items()}, tuple(notes))


def walk(folder: Path, flag: str, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield every file below a folder that may hold data. Follows symlinks.

    Args:
        folder: where to start.
        flag: the flag that names it, for errors.
        above: resolved paths of the folders on the way here, to detect symlink cycles.

    Raises:
        UserError: for a data file's name that is a folder, a broken link or no regular file, such as a FIFO.
    """
    real = os.path.realpath(folder)
    if real in above:  # a symlink to one of its parents
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be read: {error.strerror}") from None
    for entry in entries:
        path = Path(entry.path)
        if entry.name.startswith(".") or IGNORED.match(entry.name):
            continue
        if os.path.isdir(path):
            if reader_of(path) and split_name(path):
                raise UserError(f"{path}: is a folder, not a file; rename it or move its files out")
            yield from walk(path, flag, (*above, real))
        elif os.path.isfile(path):  # False for broken and circular links
            yield path
        elif reader_of(path):
            problem = "links to a file that is not there" if entry.is_symlink() else "is no regular file"
            raise UserError(f"{path}: {problem}; mend or remove it")


def grouped(pairs: Iterator[tuple[str, Path]]) -> dict[str, list[Path]]:
    """Group (split, file) pairs by split; files without a split are left out."""
    groups: dict[str, list[Path]] = {}
    for name, file in pairs:
        if name:
            groups.setdefault(name, []).append(file)
    return groups


def loosely_named(tables: Sequence[Path], folder: Path, flag: str) -> dict[str, list[Path]]:
    """Group tables by the split that a word of their names, or else their folders, mentions.

    Next to other tables, text files are ignored: they are usually notes.

    Raises:
        UserError: if the files of a split need different readers.
    """
    tables = [file for file in tables if reader_of(file) != "text"] or tables
    found = grouped((split_word(stem(file)) or split_folder(file, folder)[0], file) for file in tables)
    splits = found or {"train": list(tables)}
    for name, members in splits.items():
        kinds = {reader_of(file): file for file in members}
        if len(kinds) > 1:
            first, second, *_ = (str(file.relative_to(folder)) for file in kinds.values())
            called = f"both seem to hold the split {name}" if found else "neither is called after a split"
            raise UserError(
                f"{flag} {folder}: {first} and {second}: {called}; call the files train, validation and test"
            )
    return splits


def one_set(name: str, files: list[Path], folder: Path, flag: str) -> list[Path]:
    """Check that the files of a split are one file, or the shards of one.

    Args:
        name: the split.
        files: its files.
        folder: the folder of the data, for errors.
        flag: the flag that names it, for errors.

    Returns:
        The files, unchanged.

    Raises:
        UserError: if there are two sets of files for the split.
    """
    sets = {(file.parent, SHARD.sub("", stem(file)), "".join(file.suffixes[-2:])): file for file in files}
    if len(sets) > 1:
        first, second, *_ = (str(file.relative_to(folder)) for file in sets.values())
        raise UserError(f"{flag} {folder}: {first} and {second} both hold the split {name}; keep one of them there")
    return files


def missing_shards(splits: dict[str, list[Path]]) -> Iterator[str]:
    """Yield a note for each split that lacks shards."""
    for name, files in splits.items():
        shard = SHARD.search(stem(files[0]))
        if shard and len(files) < int(shard[1]):
            yield f"the split {name} has {len(files)} of its {int(shard[1])} files"


def unused_note(files: Sequence[Path], folder: Path) -> list[str]:
    """Return a note on the files that are not read; an empty list if there are none."""
    names = [file.relative_to(folder).as_posix() for file in files]
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return [f"not read: {', '.join(names[:5])}{rest}"] if names else []


def reader_of(file: str | Path) -> str:
    """Return the reader of a file, "" if its format is not supported."""
    suffixes = [suffix.lower() for suffix in Path(file).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        reader = READERS.get(suffixes[-2], "") if len(suffixes) > 1 else ""
        return reader if reader in ("csv", "json", "text") else ""
    return READERS.get(suffixes[-1], "") if suffixes else ""


def stem(file: Path) -> str:
    """Remove the suffixes of data files from a name: train.csv.gz -> train, train-v1.1.json -> train-v1.1."""
    while file.suffix.lower() in (*READERS, *COMPRESSED, *FOREIGN):
        file = file.with_suffix("")
    return file.name


def split_name(file: Path) -> str:
    """Return the split that a file is named after, "" if none.

    train-00000-of-00002.parquet -> train, dev_matched.tsv -> validation_matched, notes.csv -> "".
    """
    first, *rest = SHARD.sub("", stem(file)).lower().split("_")
    return "_".join([SPLITS[first], *rest]) if first in SPLITS else ""


def split_word(name: str) -> str:
    """Return the split that a name mentions as a word: reviews-train -> train; "" if none or several."""
    found = {WORDS[word] for word in re.split(r"[-._ 0-9]+", name.lower()) if word in WORDS}
    return found.pop() if len(found) == 1 else ""


def split_folder(file: Path, folder: Path) -> tuple[str, tuple[str, ...]]:
    """Find the outermost folder above a file, within `folder`, that mentions a split.

    Returns:
        The split and the names of the folders below that one; ("", all folders) if none mentions a split.
    """
    parts = file.relative_to(folder).parts[:-1]
    for place, part in enumerate(parts):
        if split := split_word(part):
            return split, parts[place + 1 :]
    return "", parts


def class_folder(file: Path, folder: Path) -> str:
    """Return the class of an image: the folder below its split's, or else its parent folder."""
    split, below = split_folder(file, folder)
    if not below:
        raise UserError(f"{file}: stands in no class's folder; images go to {split or 'train'}/CLASS/{file.name}")
    return below[0] if split else below[-1]


def image_columns(file: Path) -> list[str]:
    """Return the columns of a parquet file that hold images: structs with `bytes`, as the Hub writes them."""
    from pyarrow import ArrowException, parquet, types

    try:
        schema = parquet.read_schema(file)
    except (ArrowException, OSError) as error:
        raise UserError(f"{file}: {str(error).splitlines()[0]}") from None
    return [field.name for field in schema if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0]

"""Which files of a local folder are its data, and which split each belongs to: their names alone decide."""

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
"""file suffix -> what reads it: a builder of `datasets`, or a function of `data_files`"""
COMPRESSED = (".gz", ".bz2", ".xz")
"""suffixes that may stand behind those of csv, json and text files"""
FOREIGN = (
    *(".xlsx", ".xls", ".ods", ".arrow", ".feather", ".orc", ".avro", ".h5", ".hdf5", ".db", ".sqlite", ".tfrecord"),
    *(".npy", ".npz", ".pkl", ".pickle", ".pt", ".bin", ".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z"),
)
"""suffixes of data that nothing here reads"""
SPLITS = {"train": "train", "test": "test", **dict.fromkeys(("validation", "valid", "val", "dev"), "validation")}
"""how the name of a split's file begins -> the split"""
WORDS = {**SPLITS, "training": "train", **dict.fromkeys(("testing", "eval", "evaluation"), "test")}
"""word in the name of a file or a folder -> the split"""
SHARD = re.compile(r"-\d{5}-of-(\d{5})(-[0-9a-f]+)?$")
IGNORED = re.compile(r"(README|config|dataset_info|dataset_infos|dataset_dict|state|metadata)\.\w+$")
"""files that describe the data"""


@dataclass(frozen=True)
class DataFiles:
    """The data of a folder."""

    splits: dict[str, list[str]]
    """split -> its files, all read alike"""
    notes: tuple[str, ...] = ()
    """what is there and is not read, and what is missing"""

    @property
    def first(self) -> Path:
        """A file of the training split, or of another where there is none."""
        return Path((self.splits.get("train") or next(iter(self.splits.values())))[0])


def folder_kind(folder: Path) -> Kind:
    """What a local folder is for: images, lines of text to continue, or tables of texts and labels. No data is read."""
    file = find_data(folder, "--task").first
    reader = reader_of(file)
    if reader == "images" or (reader == "parquet" and image_columns(file)):
        return "image"
    return "lm" if reader == "text" else "text"


def find_data(folder: Path, flag: str) -> DataFiles:
    """The files of each split.

    Tables called after splits (train.csv, validation.jsonl.gz, ...) come first. Else images in a folder for each class,
    or files whose longer names or whose folders tell of a split. One set of files without any such name is all for
    training.

    Raises:
        UserError: where nothing is found, a split is there twice, or a file cannot be one.
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
    """Every file below the folder that may hold data, links followed. What stands above the folder does not count.

    Raises:
        UserError: for what is called like data and is no file that can be read to its end: a link to nothing, a FIFO.
    """
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that it stands in
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
        elif os.path.isfile(path):  # False, not an error, for links that lead nowhere or to themselves
            yield path
        elif reader_of(path):
            problem = "links to a file that is not there" if entry.is_symlink() else "is no regular file"
            raise UserError(f"{path}: {problem}; mend or remove it")


def grouped(pairs: Iterator[tuple[str, Path]]) -> dict[str, list[Path]]:
    """(split, file) pairs as split -> files; files without a split are left out."""
    groups: dict[str, list[Path]] = {}
    for name, file in pairs:
        if name:
            groups.setdefault(name, []).append(file)
    return groups


def loosely_named(tables: Sequence[Path], folder: Path, flag: str) -> dict[str, list[Path]]:
    """Tables by a word in their names, else by their folders. Texts beside other tables are taken for remarks."""
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
    """The files of a split: one, or the shards of one. UserError where there are two."""
    sets = {(file.parent, SHARD.sub("", stem(file)), "".join(file.suffixes[-2:])): file for file in files}
    if len(sets) > 1:
        first, second, *_ = (str(file.relative_to(folder)) for file in sets.values())
        raise UserError(f"{flag} {folder}: {first} and {second} both hold the split {name}; keep one of them there")
    return files


def missing_shards(splits: dict[str, list[Path]]) -> Iterator[str]:
    """A line for each split of which shards are not there."""
    for name, files in splits.items():
        shard = SHARD.search(stem(files[0]))
        if shard and len(files) < int(shard[1]):
            yield f"the split {name} has {len(files)} of its {int(shard[1])} files"


def unused_note(files: Sequence[Path], folder: Path) -> list[str]:
    """A line that tells which files are not read, if any."""
    names = [file.relative_to(folder).as_posix() for file in files]
    return [f"not read: {', '.join(names[:5])}{f' and {len(names) - 5} more' * (len(names) > 5)}"] if names else []


def reader_of(file: str | Path) -> str:
    """What reads the file, "" if nothing does."""
    suffixes = [suffix.lower() for suffix in Path(file).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        reader = READERS.get(suffixes[-2], "") if len(suffixes) > 1 else ""
        return reader if reader in ("csv", "json", "text") else ""
    return READERS.get(suffixes[-1], "") if suffixes else ""


def stem(file: Path) -> str:
    """The name without the suffixes of files of data: train.csv.gz -> train, train-v1.1.json -> train-v1.1."""
    while file.suffix.lower() in (*READERS, *COMPRESSED, *FOREIGN):
        file = file.with_suffix("")
    return file.name


def split_name(file: Path) -> str:
    """train-00000-of-00002.parquet -> train, dev_matched.tsv -> validation_matched, notes.csv -> ""."""
    first, *rest = SHARD.sub("", stem(file)).lower().split("_")
    return "_".join([SPLITS[first], *rest]) if first in SPLITS else ""


def split_word(name: str) -> str:
    """The split that a word of the name tells of: reviews-train -> train; "" if none does, or several."""
    found = {WORDS[word] for word in re.split(r"[-._ 0-9]+", name.lower()) if word in WORDS}
    return found.pop() if len(found) == 1 else ""


def split_folder(file: Path, folder: Path) -> tuple[str, tuple[str, ...]]:
    """(split that the outermost folder above the file tells of, the folders below that); ("", all) if none does."""
    parts = file.relative_to(folder).parts[:-1]
    for place, part in enumerate(parts):
        if split := split_word(part):
            return split, parts[place + 1 :]
    return "", parts


def class_folder(file: Path, folder: Path) -> str:
    """The class of an image: the folder below its split's, or its own where no folder is called after a split."""
    split, below = split_folder(file, folder)
    if not below:
        raise UserError(f"{file}: stands in no class's folder; images go to {split or 'train'}/CLASS/{file.name}")
    return below[0] if split else below[-1]


def image_columns(file: Path) -> list[str]:
    """The columns of a parquet file that hold images: a struct of bytes and path, as the Hub writes them."""
    from pyarrow import ArrowException, parquet, types

    try:
        schema = parquet.read_schema(file)
    except (ArrowException, OSError) as error:
        raise UserError(f"{file}: {str(error).splitlines()[0]}") from None
    return [field.name for field in schema if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0]

"""Files in a user's folder: each is read, listed as not read, or refused in one line that names it."""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from eval.data.folder import find_data, reader_of, split_name, stem
from eval.data.loading import load_task
from quant.errors import UserError

ROWS = [("good film", "pos"), ("bad film", "neg"), ("fine", "pos"), ("awful", "neg")]
TABLE = "\n".join(["text,label", *(f"{text},{label}" for text, label in ROWS)]).encode()
LINES = "\n".join(json.dumps({"text": text, "label": label}) for text, label in ROWS).encode()
WRITERS = {
    "csv": TABLE,
    "tsv": TABLE.replace(b",", b"\t"),
    "jsonl": LINES,
    "ndjson": LINES,
    "json": LINES,
    "csv.gz": gzip.compress(TABLE),
    "tsv.gz": gzip.compress(TABLE.replace(b",", b"\t")),
    "csv.xz": lzma.compress(TABLE),
    "jsonl.gz": gzip.compress(LINES),
    "jsonl.bz2": bz2.compress(LINES),
}


def parquet_bytes(table):
    stream = pa.BufferOutputStream()
    parquet.write_table(table, stream)
    return stream.getvalue().to_pybytes()


WRITERS["parquet"] = parquet_bytes(pa.table(dict(zip(("text", "label"), zip(*ROWS, strict=True), strict=True))))


def write(folder, **files):
    """Create a folder with files of these contents; a function creates its file itself."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content(path) if callable(content) else path.write_bytes(content)
    return folder


def labels(*cells):
    return "\n".join(["text,label", *(f"text {row},{cell}" for row, cell in enumerate(cells))]).encode()


def load(folder, **flags):
    return load_task(SimpleNamespace(task=str(folder), **flags))


def refused(folder, **flags):
    with pytest.raises(UserError) as error:
        load(folder, **flags)
    assert "\n" not in str(error.value)
    return str(error.value).replace(f"{folder}/", "").replace(str(folder), "FOLDER")


@pytest.mark.parametrize("kind", WRITERS)
def test_splits_may_be_files_of_different_kinds(tmp_path, kind):
    for train, validation in ((f"train.{kind}", "validation.csv"), ("Train.CSV", f"dev.{kind}")):
        folder = write(tmp_path / train, **{train: WRITERS[kind] if kind in train else TABLE})
        write(folder, **{validation: WRITERS[kind] if "dev" in validation else TABLE})
        data = load(folder)
        assert data.train["text"][:] == data.validation["validation"]["text"][:] == [text for text, _ in ROWS]
        assert data.label_names == ["neg", "pos"] and not data.notes


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train.csv": TABLE, "train.jsonl": LINES}, "train.csv and train.jsonl both hold the split train"),
        (
            {"train.csv": TABLE, "dev.csv": TABLE, "val.csv": TABLE},
            "dev.csv and val.csv both hold the split validation",
        ),
        ({"train.csv": TABLE, "old/train.csv": TABLE}, "old/train.csv and train.csv both hold the split train"),
        ({"a.csv": TABLE, "b.jsonl": LINES}, "a.csv and b.jsonl: neither is called after a split"),
        ({"my-train.csv": TABLE, "my-train2.csv.gz": TABLE, "x train.json": b""}, "both seem to hold the split train"),
        ({"train.csv": TABLE, "validation.xlsx": b"x"}, "validation.xlsx: files of this kind are not read"),
        ({"train.csv.zip": b"x", "validation.csv": TABLE}, "train.csv.zip: files of this kind are not read"),
        ({"train.csv/part-0.csv": TABLE}, "train.csv: is a folder, not a file"),
        ({"train.csv": os.mkfifo, "validation.csv": TABLE}, "train.csv: is no regular file"),
        ({"train.csv": TABLE, "dev.csv": lambda path: path.symlink_to("x")}, "dev.csv: links to a file that is not th"),
        ({"train.csv": lambda path: path.symlink_to("train.csv")}, "train.csv: links to a file that is not there"),
        ({"train-00000-of-00002.csv": TABLE, "train-00001-of-00002.csv": b"text,x\na,b\n"}, "has the columns text, x"),
    ],
)
def test_files_that_contradict_each_other_are_named(tmp_path, files, message):
    assert message in refused(write(tmp_path, **files))


def test_what_is_not_read_is_told(tmp_path):
    files = {"train.csv": TABLE, "validation.csv": TABLE, "notes.csv": TABLE, "LICENSE.txt": b"x", "plot.png": b"x"}
    assert load(write(tmp_path / "a", **files)).notes == ["not read: LICENSE.txt, notes.csv, plot.png"]
    shards = {"train-00000-of-00003.csv": TABLE, "train-00002-of-00003.csv": TABLE, "validation.csv": TABLE}
    assert load(write(tmp_path / "b", **shards)).notes == ["the split train has 2 of its 3 files"]
    half = {"train.csv": TABLE, "validation.csv": b"text\na\n", "test.csv": TABLE}
    notes = load(write(tmp_path / "c", **half)).notes
    assert len(notes) == 1 and notes[0].endswith("validation.csv has no column label (it has text)")


def test_longer_names_links_and_one_file_are_found(tmp_path):
    loose = write(tmp_path / "loose", **{"films-train.csv": TABLE, "films-eval.jsonl": LINES, "README.txt": b"x"})
    assert {name: len(files) for name, files in find_data(loose, "--task").splits.items()} == {"train": 1, "test": 1}
    single = write(tmp_path / "single", **{"films.csv": TABLE, "LICENSE.txt": b"x"})
    assert len(load(single).train) == 3
    linked = write(tmp_path / "linked", **{"train.csv": lambda path: path.symlink_to(single / "films.csv")})
    (linked / "again").symlink_to(".")
    assert len(load(linked).train) == 3


def test_names_of_files():
    assert [reader_of(name) for name in ("a.csv.gz", "a.parquet.gz", "a.gz", "a.PNG", "a")] == [
        "csv",
        "",
        "",
        "images",
        "",
    ]
    assert stem(Path("train-v1.1.json")) == "train-v1.1" and stem(Path("train.csv.gz")) == "train"
    names = ("train-00000-of-00002-0a1b2c3d.parquet", "dev_matched.tsv", "Val.csv", "notes.csv", "trainer.json")
    assert [split_name(Path(name)) for name in names] == ["train", "validation_matched", "validation", "", ""]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.csv", b"text,label,text\na,x,b\n", "train.csv: has two columns called text"),
        ("train.csv", b"text,label, label\na,x,b\n", "train.csv: has two columns called label"),
        ("train.csv", b"text,label\n", "train.csv: has a header (text, label) and no rows"),
        ("train.csv", b"\n \n", "train.csv: is empty"),
        ("train.csv", TABLE.decode().encode("utf-16"), "train.csv: is not UTF-8"),
        ("train.csv", TABLE.decode().encode("utf-16-le"), "train.csv: is not UTF-8 but seems to be UTF-16"),
        ("train.csv.gz", gzip.compress(TABLE, mtime=0)[:30], "train.csv.gz: cannot be read: Compressed file ended"),
        ("train.jsonl.gz", gzip.compress(LINES, mtime=0)[:30], "train.jsonl.gz: cannot be read: Compressed file ended"),
        ("train.csv.gz", TABLE, "train.csv.gz: cannot be read: Not a gzipped file"),
        ("train.jsonl", '{"text": "caf\xe9", "label": 1}'.encode("latin-1"), "train.jsonl: is not UTF-8"),
        ("train.jsonl", b'{"text": "a", "text": "b", "label": 1}', "train.jsonl: JSON parse error"),
        (
            "train.jsonl",
            b'{"text": 5, "label": 1}\n' * 4 + b'{"text": 6, "label": 0}',
            "row 1, column text: 5 is not text",
        ),
        ("train.json", b"{}", "train.json: holds no rows"),
        ("train.json", b"", "train.json: is empty"),
        ("train.txt", b"", "train.txt: is empty"),
        ("train.txt", b"caf\xe9\n", "train.txt: is not UTF-8"),
        ("train.parquet", WRITERS["parquet"][:-9], "train.parquet: "),
        ("train.parquet", parquet_bytes(pa.table({"text": pa.array([], pa.string())})), "train.parquet: holds no rows"),
        ("train.parquet", parquet_bytes(pa.table([["a"], ["b"]], names=["text"] * 2)), "has two columns called text"),
    ],
)
def test_a_damaged_file_is_named_whichever_split_it_is(tmp_path, name, content, message):
    assert message in refused(write(tmp_path / "a", **{name: content}))
    other = {"train.csv": TABLE, name.replace("train", "validation"): content}
    assert message.replace("train", "validation") in refused(write(tmp_path / "b", **other))


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + TABLE,
        TABLE.replace(b"\n", b"\r"),
        b"\n\n" + TABLE,
        TABLE.replace(b"text,label", b"text, label "),
        TABLE.replace(b",", b";"),
        TABLE.replace(b",", b"\t"),
        b"\n".join(b"%d," % row + line if row else b"," + line for row, line in enumerate(TABLE.split(b"\n"))),
    ],
    ids=["byte order mark", "old Mac", "blank lines", "spaces", "semicolons", "tabs", "index column"],
)
def test_tables_as_programs_save_them(tmp_path, content):
    data = load(write(tmp_path, **{"train.csv": content, "validation.csv": TABLE}))
    assert data.train["text"][:] == [text for text, _ in ROWS] and data.train["label"][:] == [1, 0, 1, 0]
    assert set(data.train.column_names) == {"text", "label"}


@pytest.mark.parametrize(
    ("cells", "names"),
    [
        (("cat", "dog", "7"), ["7", "cat", "dog"]),
        (("1980s", "1990s", "2000"), ["1980s", "1990s", "2000"]),
        (("2000", "2010", "1990s") * 2, ["1990s", "2000", "2010"]),
        (("007", "7", "x", "x"), ["007", "7", "x"]),
        (("1e3", "nan", "none"), ["1e3", "nan", "none"]),
        ((1980, 1990, 2000) * 2, ["1980", "1990", "2000"]),
        ((-1, 1), ["-1", "1"]),
        ((-1, 0, 1) * 2, ["-1", "0", "1"]),
        (("True", "False"), ["False", "True"]),
        (("1.0", "2.0", "1"), ["1", "2"]),
    ],
)
def test_labels_are_read_as_they_are_written(tmp_path, cells, names):
    data = load(write(tmp_path, **{"train.csv": labels(*cells), "validation.csv": labels(*cells)}))
    assert data.label_names == names and data.metric == "accuracy"
    spelled = {"1.0": "1", "2.0": "2"}
    for split in (data.train, data.validation["validation"]):
        assert [names[number] for number in split["label"]] == [spelled.get(str(cell), str(cell)) for cell in cells]
    assert any("-1 is taken for a class" in note for note in data.notes) == (-1 in cells)


def test_classes_are_known_from_the_rows_that_are_held_out_too(tmp_path):
    data = load(write(tmp_path, **{"train.csv": labels("cat", "dog", "7")}))
    assert data.label_names == ["7", "cat", "dog"] and len(data.train) == 2


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (
            TABLE,
            {"label_column": "text"},
            "--label_column text: is the column of texts, too; choose another from label",
        ),
        (
            TABLE,
            {"text_column": "label"},
            "--text_column label: is the column of labels, too; choose another from text",
        ),
        (
            labels(*["a", "b"] * 20),
            {"text_column": "label", "label_column": "text"},
            "--label_column: 40 different labels in 40 rows are no classes",
        ),
        (labels(*range(30)), {}, "--label_column: 30 different labels in 30 rows are no classes"),
        (TABLE, {"text_column": "text,text"}, "--text_column text,text: names a column twice"),
        (TABLE, {"text_column": "text,"}, "--text_column text,: has an empty entry"),
        (b"a,b,c,label\n1,2,3,x\n4,5,6,y", {"text_column": "a,b,c"}, "--text_column a,b,c: names 3 columns"),
        (labels(0, 1, 0, 1, -1), {}, "train.csv, row 5, column label: has no label"),
        (
            labels(0.5, 1.5, "x", "x", 2.5),
            {},
            "train.csv, row 3, column label: label 'x' is text where most labels are nu",
        ),
        (labels(0, 1, 0, 1, 77), {}, "train.csv, row 5, column label: label 77 is out of range"),
    ],
)
def test_columns_and_labels_that_make_no_sense_are_refused(tmp_path, content, flags, message):
    assert message in refused(write(tmp_path, **{"train.csv": content, "validation.csv": content}), **flags)


@pytest.mark.parametrize("label", ["[1, 0]", '{"x": 1}'])
def test_a_row_has_one_label(tmp_path, label):
    line = f'{{"text": "a", "label": {label}}}\n'.encode()
    assert "row 1, column label" in refused(write(tmp_path / "a", **{"train.jsonl": line * 2}))
    both = {"train.csv": TABLE, "validation.jsonl": line}
    assert "validation.jsonl, row 1, column label" in refused(write(tmp_path / "b", **both))


def test_a_missing_number_is_no_regression(tmp_path):
    table = pa.table({"text": ["a", "b", "c"], "label": [0.0, 1.0, float("nan")]})
    wrong = refused(write(tmp_path, **{"train.parquet": parquet_bytes(table)}))
    assert wrong == "train.parquet, row 3, column label: has no label"


def test_every_split_has_the_columns_of_the_training(tmp_path):
    lacks = {"train.csv": TABLE, "validation.csv": b"txt,label\na,pos\n"}
    assert refused(write(tmp_path / "a", **lacks)) == (
        "validation.csv, row 1: there is no column text, which training has; it has txt, label"
    )
    typo = {"train.csv": TABLE, "validation.csv": b"text,lable\na,pos\n"}
    assert "validation.csv has no column label (it has text, lable); give its labels, or move" in refused(
        write(tmp_path / "b", **typo)
    )


def images(folder, *places):
    for place in places:
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / place)
    return folder


def test_a_class_is_the_folder_below_its_splits(tmp_path):
    layout = [
        f"data/{split}/{name}/more/{i}.png" for split in ("train", "val") for name in ("cat", "dog") for i in (1, 2)
    ]
    folder = images(tmp_path / "a", *layout)
    (folder / "data/train/bird").symlink_to(images(tmp_path / "birds", "1.png", "2.png"))
    (folder / "train.csv").write_bytes(TABLE)
    data = load(folder)
    assert data.label_names == ["bird", "cat", "dog"] and (len(data.train), len(data.validation["validation"])) == (
        6,
        4,
    )
    assert data.notes == ["not read: train.csv"]
    plain = load(images(tmp_path / "b", *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(5))))
    assert plain.label_names == ["cat", "dog"] and len(plain.train) == 9


@pytest.mark.parametrize("place", ["train/{name}{i}.png", "{name}/train/{i}.png", "{name}{i}.png"])
def test_images_without_a_class_are_named(tmp_path, place):
    folder = images(tmp_path, *(place.format(name=name, i=i) for name in ("cat", "dog") for i in (1, 2)))
    assert "stands in no class's folder; images go to train/CLASS/" in refused(folder)


def test_an_image_of_an_unknown_class_is_named(tmp_path):
    folder = images(tmp_path, *(f"train/{name}/1.png" for name in ("cat", "dog")), "val/cat/1.png", "val/bird/2.png")
    assert refused(folder) == "val/bird/2.png, column label: label 'bird' is not one of cat, dog"

"""A user's own folder as a task: its rows, and errors of one line."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image

from eval.data.loading import load_task, prepare, task_kind
from eval.models import build_model
from quant.errors import UserError


def config(task, **flags):
    return SimpleNamespace(task=str(task), **{"seed": 0, **flags})


def table(path, *rows):
    """Return a csv file of rows of cells; the first row is the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return path.parent


def picture(path, value, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(path)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "reviews"


def test_csv_is_read_as_it_is_written(folder):
    table(folder / "train.csv", ("text", "label"), ("NA", "good"), ("null", "bad"), ("a, b", "good"), ("c", "bad"))
    table(folder / "dev.csv", ("text", "label"), ("None", "bad"))
    data = load_task(config(folder))
    assert (data.name, data.kind, data.label_names, data.metric) == ("reviews", "text", ["bad", "good"], "accuracy")
    assert data.train["text"][:] == ["NA", "null", "a, b", "c"] and data.train["label"][:] == [1, 0, 1, 0]
    assert list(data.validation) == ["validation"] and data.validation["validation"]["text"][:] == ["None"]
    assert task_kind(str(folder)) == "text"


def test_the_file_as_it_is_now_is_read(folder):
    for first in ("one", "two"):
        table(folder / "train.csv", ("text", "label"), (first, "0"), ("x", "1"), ("y", "1"))
        assert load_task(config(folder)).train["text"][0] == first
        (folder / "train.csv").unlink()
        (folder / "train.jsonl").write_text(f'{{"text": "{first}", "label": 0}}\n' + '{"text": "x", "label": 1}\n' * 2)
        assert load_task(config(folder)).train["text"][0] == first
        (folder / "train.jsonl").unlink()


def test_columns_are_named_by_flags_and_numbers_may_start_at_one(folder):
    rows = [(f"title {n}", f"body {n}", n % 3 + 1) for n in range(30)]
    table(folder / "train.csv", ("title", "body", "stars"), *rows)
    table(folder / "test.csv", ("title", "body", "stars"), ("t", "b", 3))
    data = load_task(config(folder, text_column="title, body", label_column="stars"))
    assert data.columns == ("title", "body") and data.label_names == ["1", "2", "3"]
    assert data.validation["validation"]["stars"][:] == [2]


def test_fractions_make_it_a_regression(folder):
    table(folder / "train.csv", ("text", "label"), *((f"text {n}", n / 4) for n in range(10)))
    table(folder / "validation.csv", ("text", "label"), ("a", "1"), ("b", "2.5"))
    data = load_task(config(folder))
    assert (data.num_labels, data.metric, data.label_names) == (1, "pearson", [])
    assert data.validation["validation"]["label"][:] == [1.0, 2.5]
    told = data.compute_metrics(SimpleNamespace(predictions=np.array([[1.0], [2.0]]), label_ids=np.array([1.0, 2.5])))
    assert told == {"pearson": pytest.approx(1.0), "spearman": pytest.approx(1.0)}


def test_a_subset_of_a_sorted_file_has_every_class(folder):
    table(folder / "train.csv", ("text", "label"), *((f"text {n}", n // 40) for n in range(120)))
    table(folder / "validation.csv", ("text", "label"), *((f"text {n}", n // 40) for n in range(120)))
    data = load_task(config(folder, max_train_samples=24, max_eval_samples=24))
    for split in (data.train, *data.validation.values()):
        assert len(split) == 24 and set(split["label"][:]) == {0, 1, 2}


def test_a_single_split_is_divided_alike_every_time_and_said_so(folder):
    table(folder / "mine.csv", ("text", "label"), *((f"text {n}", n % 2) for n in range(40)))
    first, second = (load_task(config(folder, seed=seed)) for seed in (0, 1))
    assert first.notes == ["no validation split: 4 training rows are held out"]
    held = first.validation["validation"]["text"][:]
    assert held == second.validation["validation"]["text"][:] and not set(held) & set(first.train["text"][:])


def test_an_unlabelled_split_is_never_evaluated(folder):
    features = Features(text=Value("string"), label=ClassLabel(names=["no", "yes"]))
    folder.mkdir()
    for name, labels in (("train", [0, 1]), ("validation", [-1, -1]), ("test", [1, 0])):
        rows = Dataset.from_dict({"text": [f"{name} a", "b"], "label": labels}, features=features)
        rows.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    assert load_task(config(folder)).validation["validation"]["text"][0] == "test a"
    (folder / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(UserError, match="no labelled split to evaluate: looked for validation or test"):
        load_task(config(folder))


def test_mnli_evaluates_both_its_splits(folder):
    for name in ("train", "validation_matched", "dev_mismatched"):
        table(folder / f"{name}.csv", ("premise", "hypothesis", "label"), *((name, n, n) for n in (0, 1, 2)))
    data = load_task(config("mnli", data_dir=folder))
    assert {name: split["premise"][0] for name, split in data.validation.items()} == {
        "matched": "validation_matched",
        "mismatched": "dev_mismatched",
    }


def test_truth_values_are_classes(folder):
    folder.mkdir()
    rows = [{"question": f"q{n}", "passage": "p", "answer": n % 2 == 0} for n in range(4)]
    for name in ("train", "validation"):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load_task(config("boolq", data_dir=folder))
    assert data.label_names == ["False", "True"] and data.train["answer"][:] == [1, 0, 1, 0]


def test_image_folders_are_read_by_class_resized_and_cropped(folder):
    for split in ("train", "val"):
        for number, name in enumerate(("cat", "dog")):
            for copy in range(3):
                picture(folder / split / name / f"{copy}.png", 100 * number, size=(24, 16))
    run = config(folder, model="convnet", image_size=8)
    data = load_task(run)
    assert (data.kind, data.label_names, len(data.train)) == ("image", ["cat", "dog"], 6)
    prepared = prepare(data, build_model(run, data.num_labels), run)
    item = prepared.validation["validation"][5]
    assert item["pixel_values"].shape == (3, 8, 8) and item["labels"] == 1
    np.testing.assert_allclose(item["pixel_values"][0], (100 / 255 - 0.485) / 0.229, rtol=1e-5)


def test_a_benchmark_may_come_as_an_image_folder(folder):
    for number, name in enumerate(("cat", "dog")):
        picture(folder / "train" / name / "a.png", number)
        picture(folder / "test" / name / "a.png", number)
    data = load_task(config("cifar10", data_dir=folder))
    assert data.columns == ("image",) and data.label_names == ["cat", "dog"]


def broken(folder, *rows, columns=("text", "label"), **flags):
    table(folder / "train.csv", columns, ("a", "0"), ("b", "1"), *rows)
    table(folder / "validation.csv", columns, ("a", "0"))
    with pytest.raises(UserError) as error:
        load_task(config(flags.pop("task", folder), data_dir=folder, **flags))
    message = str(error.value)
    assert "\n" not in message
    return message.replace(str(folder), "")


@pytest.mark.parametrize(
    "rows, message",
    [
        ([("", "1")], "/train.csv, row 3, column text: is empty"),
        ([("  ", "1")], "/train.csv, row 3, column text: is empty"),
        ([("c", "")], "/train.csv, row 3, column label: has no label"),
        ([("c", "-1")], "/train.csv, row 3, column label: has no label"),
        ([("c", "7")], "/train.csv, row 3, column label: label 7 is out of range: 3 classes without names are 0 to 2"),
        ([("c", "one")], "/train.csv, row 3, column label: label 'one' is text where most labels are numbers"),
        ([("c", "1", "x")], "/train.csv, line 4: 3 fields, the header has 2"),
        ([("c",)], "/train.csv, line 4: 1 fields, the header has 2"),
    ],
    ids=["empty", "blank", "no label", "hidden label", "gap", "text label", "long row", "short row"],
)
def test_a_wrong_row_is_named(folder, rows, message):
    assert broken(folder, *rows).startswith(message)


def test_wrong_columns_name_the_flag_and_the_choices(folder):
    assert broken(folder, columns=("review", "label")) == (
        "--text_column: no column of the data is known to hold it; choose from review, label"
    )
    wrong = broken(folder, text_column="reviews", columns=("review", "label"))
    assert wrong == "--text_column: the data has no column reviews; choose from review, label"
    wrong = broken(folder, task="mrpc")
    assert wrong == "--text_column: the data has no column sentence1; choose from text, label"
    assert "--label_column" in broken(folder, columns=("text", "stars"))


def test_labels_of_the_evaluation_are_those_of_the_training(folder):
    table(folder / "train.csv", ("text", "label"), ("a", "0"), ("b", "1"))
    table(folder / "validation.csv", ("text", "label"), ("a", "0"), ("b", "2"))
    with pytest.raises(UserError, match=r"validation.csv, row 2, column label: label '2' is not one of 0, 1"):
        load_task(config(folder))


def test_labels_beyond_the_names_of_the_file_are_out_of_range(folder):
    folder.mkdir()
    features = Features(text=Value("string"), label=ClassLabel(names=["no", "yes"]))
    Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features).to_parquet(folder / "train.parquet")
    wrong = Dataset.from_dict({"text": ["a"], "label": [0]}, features=features)
    wrong.cast_column("label", Value("int64")).map(lambda row: {"label": 5}).to_parquet(folder / "test.parquet")
    with pytest.raises(UserError, match=r"test.parquet, row 1, column label: label 5 is not one of 0, 1"):
        load_task(config(folder))


def test_missing_text_of_the_second_file_is_found_there(folder):
    folder.mkdir()
    (folder / "train-00000-of-00002.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
    (folder / "train-00001-of-00002.jsonl").write_text('{"text": "c", "label": 0}\n{"text": null, "label": 1}\n')
    with pytest.raises(UserError, match=r"train-00001-of-00002.jsonl, row 2, column text: is missing"):
        load_task(config(folder))


@pytest.mark.parametrize(
    "files, message",
    [
        ({"train.csv": b"text,label\ncaf\xe9,0\n"}, "train.csv: is not UTF-8"),
        ({"train.csv": b""}, "train.csv: is empty"),
        ({"train.csv": b"text,label\n"}, "train.csv: has a header"),
        ({"train.csv": b'text,label\n"a,0\n'}, "train.csv, line 2: unexpected end of data"),
        ({"test.csv": b"text,label\na,0\n", "validation.csv": b"text,label\na,0\n"}, "no rows to train on"),
        ({"train.jsonl": b'{"text": nu\n'}, "train.jsonl: JSON parse error"),
        ({"train.parquet": b"nonsense"}, "train.parquet"),
        ({"notes.bin": b"x"}, "holds no .csv, .tsv, .json"),
        ({"train.csv": b"text,label\na,0\nb,0\n"}, "labels are all the same: 0"),
        (
            {"a.csv": b"text,label\na,0\n", "b.csv": b"text,label\nb,1\n", "c.json": b"{}"},
            "is called after a split",
        ),
    ],
    ids=["latin-1", "empty", "header only", "quote", "no train", "json", "parquet", "nothing", "one class", "no split"],
)
def test_files_that_cannot_be_used_are_named(folder, files, message):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_task(config("sst2" if "parquet" in message else folder, data_dir=folder))
    assert "\n" not in str(error.value)


def test_a_corrupt_image_is_named(folder):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            picture(folder / split / name / "a.png", 9)
    whole = (folder / "val/dog/a.png").read_bytes()
    for content in (b"not an image", whole[: len(whole) // 2]):
        (folder / "val/dog/a.png").write_bytes(content)
        run = config(folder, model="convnet")
        data = load_task(run)
        with pytest.raises(UserError, match=r"val/dog/a.png: is not an image"):
            prepare(data, build_model(run, data.num_labels), run)


def test_what_stands_above_the_folder_does_not_hide_its_files(tmp_path):
    above = tmp_path / ".cache" / "reviews"
    table(above / "train.csv", ("text", "label"), ("good film", "1"), ("bad film", "0"))
    table(above / "test.csv", ("text", "label"), ("fine", "1"))
    for path in (above, above.parent / ".." / ".cache" / "reviews"):
        assert len(load_task(config(path)).train) == 2


def test_runs_beside_the_data_are_not_data(folder):
    table(folder / "train.csv", ("text", "label"), ("good film", "1"), ("bad film", "0"))
    table(folder / "test.csv", ("text", "label"), ("fine", "1"))
    runs = folder / "output" / "reviews" / "a"
    runs.mkdir(parents=True)
    for name in ("result", "assignment", "predictions"):
        (runs / f"{name}.json").write_text("{}")
    assert len(load_task(config(folder)).train) == 2


def test_lines_of_text_are_judged_by_perplexity(folder):
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.txt").write_text("one two\nthree four\n")
    data = load_task(config(folder))
    assert (data.kind, data.metric) == ("lm", "perplexity")

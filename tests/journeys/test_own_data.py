"""The worked examples of docs/own-data.md, command by command, and what their model cards' programs then say."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig

from tests.journeys.conftest import ROOT, Ended, record_of

Command = Callable[..., Ended]
pytestmark = pytest.mark.xdist_group("own data")


def example(heading: str) -> tuple[str, list[list[str]]]:
    """(the Python program, the commands as words) below a heading of docs/own-data.md."""
    text = (ROOT / "docs" / "own-data.md").read_text()
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (program,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (block,) = re.findall(r"```\n(python .*?)```", section, re.DOTALL)
    return program, [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


def follow(command: Command, words: list[str], folder: Path, **options: object) -> Ended:
    """A command of the document, in `folder`."""
    scripts = [str(ROOT / word) if word.endswith(".py") else word for word in words[1:]]
    return command([sys.executable, *scripts], cwd=folder, env=path(), **options)


def path() -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT)}


def write_data(command: Command, program: str, folder: Path) -> None:
    (folder / "data.py").write_text(program)
    command([sys.executable, "data.py"], cwd=folder, env=path())


def card_says(command: Command, export: Path, folder: Path, *files: Path) -> list[str]:
    """What the program of an export's card prints, run as it is written."""
    (program,) = re.findall(r"```python\n(.*?)```", (folder / export / "README.md").read_text(), re.DOTALL)
    (folder / "card.py").write_text(program)
    return command([sys.executable, folder / "card.py", *files], cwd=folder / export, env=path()).out.splitlines()


def test_a_table_of_texts_and_labels(command: Command, tmp_path: Path) -> None:
    program, (look, train, search, export) = example("A table")
    write_data(command, program, tmp_path)
    told = follow(command, look, tmp_path).out
    assert re.search(r"train +400 rows +\S*train.csv", told) and re.search(r"validation +100 rows", told)
    assert "review (in) -> opinion (truth)" in told and re.search(r"classes +2: praise, scorn", told)
    assert re.search(r"layers +12, with 393,216 weights", told) and not (tmp_path / "output").exists()

    follow(command, train, tmp_path)
    follow(command, [*search, "--max_steps", "24"], tmp_path)  # of 60, to save time: the last of a flag counts
    folder = tmp_path / "output" / "reviews" / "default"
    float_record, record = record_of(folder / "float"), record_of(folder / "search")
    assert float_record["metrics"]["validation"]["accuracy"] > 0.9
    assert record["float_metrics"]["validation"]["accuracy"] == float_record["metrics"]["validation"]["accuracy"]
    assert record["cost"] <= record["cost_target"] and record["metrics"]["validation"]["accuracy"] > 0.9

    names = ["praise", "scorn"]
    answers = json.loads((folder / "search" / "predictions.json").read_text())["validation"]
    assert record["classes"] == answers["classes"] == names and len(answers["predicted"]) == 100
    assert AutoConfig.from_pretrained(folder / "search" / "model").id2label == dict(enumerate(names))

    follow(command, export, tmp_path)
    packed = Path("output/reviews/default/search/export/packed")
    assert "classes 0 `praise`, 1 `scorn`" in (tmp_path / packed / "README.md").read_text()
    (line,) = card_says(command, packed, tmp_path)
    assert line in [f"The review of an example. {name}" for name in names]


@pytest.mark.parametrize("model", ["timm:resnet10t", "torchvision:mobilenet_v3_small"])
def test_a_folder_of_images(command: Command, tmp_path: Path, model: str) -> None:
    program, (search, export) = example("Images")
    write_data(command, program, tmp_path)
    if not model.startswith("timm"):
        search = [model if word == "timm:resnet10t" else word for word in search]
        search = [word for word in search if word not in ("--search", "--search_space", "4,8", "--target_bits", "5")]
        search += ["--bits", "8"]
    follow(command, search, tmp_path)
    follow(command, export, tmp_path)
    folder = tmp_path / "output" / "photos" / "default" / "photos"
    answers = json.loads((folder / "predictions.json").read_text())["validation"]
    assert answers["classes"] == record_of(folder)["classes"] == ["moss", "rust", "sky"]
    card = (folder / "export" / "packed" / "README.md").read_text()
    assert "size 32, mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225" in card
    assert "classes 0 `moss`, 1 `rust`, 2 `sky`" in card
    files = sorted((tmp_path / "photos" / "validation").rglob("*.png"))
    told = card_says(command, folder / "export" / "packed", tmp_path, *files)
    predicted = [answers["classes"][number] for number in answers["predicted"]]
    assert told == [f"{file} {name}" for file, name in zip(files, predicted, strict=True)]


def test_text_for_a_decoder(command: Command, tmp_path: Path) -> None:
    program, (search, export) = example("Text for a decoder")
    write_data(command, program, tmp_path)
    follow(command, search, tmp_path)
    record = record_of(tmp_path / "output" / "notes" / "default" / "notes")
    assert record["metric"] == "perplexity" and record["cost"] <= record["cost_target"]
    assert {pair[1] for pair in record["assignment"].values()} == {"float"}
    follow(command, export, tmp_path)
    (line,) = card_says(command, Path("output/notes/default/notes/export/packed"), tmp_path)
    assert line.startswith("The ")

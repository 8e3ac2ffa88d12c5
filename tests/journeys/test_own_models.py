"""A user's own modules from Python: whatever they take and return, a search, its files and its exports work."""

import json
from pathlib import Path

import pytest

from tests.journeys.own_models import MODELS

SCRIPT = Path(__file__).with_name("own_models.py")


@pytest.fixture(scope="module")
def told(command, tmp_path_factory):
    """What the user's file prints of each model: all in one process, whose start takes most of the time."""
    ended = command(["python", SCRIPT, tmp_path_factory.mktemp("own")], env={"PYTHONPATH": "."})
    lines = [line.removeprefix("JOURNEY ") for line in ended.out.splitlines() if line.startswith("JOURNEY ")]
    return {entry["model"]: entry for entry in map(json.loads, lines)}


@pytest.mark.parametrize("model", MODELS)
def test_a_search_and_what_it_leaves(told, model):
    entry = told[model]
    assert 0 < entry["cost"] <= entry["target"]
    assert 0 < entry["eval_loss"] < 1e4 and entry["predicted"] == 20, "one prediction a row"
    assert entry["loaded"] == entry["unpacked"] == 0, "the same outputs, bit for bit"


@pytest.mark.parametrize("model", MODELS)
def test_an_onnx_file_has_the_same_outputs_under_their_own_names(told, model):
    assert told[model]["onnx"] < 1e-4

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from trainer.training import checkpoint
from trainer.training.checkpoint import (
    CheckpointError,
    load_state,
    random_state,
    read_tensors,
    restore_random_state,
    save_state,
    save_weights,
    write_atomically,
    write_json,
)


def test_nested_state_comes_back_with_its_types(tmp_path):
    state = {
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "m": torch.randn(2, 3)}}, "groups": [{"lr": 0.1}]},
        "none": None,
        "generator": torch.Generator().manual_seed(1).get_state(),
        "names": ["a", "b"],
    }
    save_state(state, tmp_path / "training")
    loaded = load_state(tmp_path / "training")
    assert loaded["optimizer"]["groups"] == [{"lr": 0.1}] and loaded["none"] is None and loaded["names"] == ["a", "b"]
    assert list(loaded["optimizer"]["state"]) == [0]  # an integer key stays one
    torch.testing.assert_close(loaded["optimizer"]["state"][0], state["optimizer"]["state"][0], rtol=0, atol=0)
    assert torch.equal(loaded["generator"], state["generator"])


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, suffix, damage):
    save_state({"x": torch.ones(4), "y": 1}, tmp_path / "training")
    file = tmp_path / f"training{suffix}"
    file.unlink() if damage == "missing" else file.write_bytes(file.read_bytes()[:5])
    with pytest.raises(CheckpointError, match=file.name.replace(".", r"\.")):
        load_state(tmp_path / "training")


def test_random_generators_continue(tmp_path):
    random.seed(3), np.random.seed(4), torch.manual_seed(5)
    random.random(), np.random.randn(), torch.randn(1)
    save_state(random_state(), tmp_path / "random")
    expected = random.random(), np.random.randn(), torch.randn(3)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    restore_random_state(load_state(tmp_path / "random"))
    assert (random.random(), np.random.randn()) == expected[:2]
    assert torch.equal(torch.randn(3), expected[2])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})  # not JSON

    def fails(temporary):
        Path(temporary).write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fails)
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_weights_that_share_memory_are_stored_each_and_others_not_copied(tmp_path, monkeypatch):
    base = torch.arange(12.0)
    state = {"whole": base.view(3, 4), "flat": base, "part": base[2:5], "turned": base.view(3, 4).t()}
    state |= {"again": base.view(3, 4), "empty": torch.empty(0), "scalar": torch.tensor(3.0)}
    written = {}

    def watched(tensors, path, metadata):
        written.update(tensors)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", watched)
    save_weights(state, tmp_path)
    found = read_tensors(tmp_path / "model.safetensors")
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    assert written["whole"].data_ptr() == base.data_ptr() and "again" not in written

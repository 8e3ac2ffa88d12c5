"""`--report_to wandb`: one-line errors for a missing package or key, and offline runs."""

import importlib.util
import json
import time

import pytest

from eval.config.parser import parse
from eval.eval_run import run
from quant.errors import UserError

RUN = ["--task", "digits", "--model", "convnet", "--report_to", "wandb", "--quiet"]


def test_a_missing_package_is_named_despite_a_folder_of_that_name(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_loader("wandb", loader=None)
    for found in (None, spec):
        monkeypatch.setattr("eval.run.tracking.find_spec", lambda name, found=found: found)
        with pytest.raises(
            UserError, match=r"--report_to wandb: the package is not installed: .* -m pip install wandb"
        ):
            parse(RUN)


def test_a_missing_key_is_an_error_before_the_run_starts(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="--report_to wandb: no key found: wandb login, or set WANDB_MODE=offline"):
        parse(RUN)


def test_an_offline_run_is_logged_to_its_folder_with_its_flags(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    seen = []
    made = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **how: seen.append(how) or made(**how))
    config = parse([*RUN, "--max_steps", "2", "--log_steps", "1", "--output_root_dir", str(tmp_path)])
    for name in ("one", "two"):
        config = config.updated(run_id=name)
        assert run(config)["status"] == "finished"
        assert wandb.run is None, "the next run in this process has one of its own"
        (events,) = config.run_folder.glob("wandb/offline-run-*/*.wandb")
        for _ in range(300):  # W&B's own process writes the file, and may be behind
            if b"train/loss" in events.read_bytes():
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"{events} never told the loss")
    assert [how["name"] for how in seen] == ["one", "two"] and seen[0]["config"]["max_steps"] == 2
    assert json.loads((config.run_folder / "result.json").read_text())["run_id"] == "two"

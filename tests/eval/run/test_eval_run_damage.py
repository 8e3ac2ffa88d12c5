"""A run resumes from its intact files if checkpoints or its history are damaged, and its record notes that."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from eval.config.parser import parse
from eval.eval_run import main, run
from quant.errors import UserError
from trainer.training.checksums import flaw, numbered

RUN = (
    "--task digits --model convnet --from_scratch --train_batch_size 64 --max_train_samples 128 --max_steps 10 "
    "--search --search_space 4,8 --policy_prior none --report_to none --quiet --device cpu --run_id run"
)


class Killed(Exception):
    """Simulates that the process is killed."""


def settings(folder):
    return parse([*RUN.split(), "--output_root_dir", str(folder)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The record of an undisturbed run."""
    return run(settings(tmp_path_factory.mktemp("whole")))


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The output folder of a run that was killed after its second checkpoint."""

    def kill(entry):
        if entry["step"] == 5:
            raise Killed

    folder = tmp_path_factory.mktemp("killed")
    with pytest.raises(Killed):
        run(settings(folder), on_step=kill)
    return folder


@pytest.fixture
def stopped(killed, tmp_path):
    shutil.copytree(killed, tmp_path / "copy")
    return settings(tmp_path / "copy")


def checkpoints(config):
    found = numbered(config.run_folder / "checkpoints")
    assert [path.name for path in found] == ["checkpoint-4", "checkpoint-2"]
    return found


def same(record, whole):
    """Whether two records are equal, apart from time and notes."""
    left_out = ("wall_seconds", "notes")
    first, second = ({k: v for k, v in json.loads(json.dumps(r)).items() if k not in left_out} for r in (record, whole))
    return first == second


def test_truncated_and_missing_files_are_detected(stopped):
    newest, older = checkpoints(stopped)
    assert flaw(newest) is None and flaw(older) is None
    names = [path.name for path in newest.iterdir() if path.is_file()]
    assert {"model.safetensors", "training.json", "training.safetensors", "trainer_state.json"} <= set(names)
    for name in names:
        content = (newest / name).read_bytes()
        (newest / name).write_bytes(content[: len(content) // 2])
        assert name in str(flaw(newest)), name
        (newest / name).unlink()
        assert name in str(flaw(newest)), name
        (newest / name).write_bytes(content)
    assert flaw(newest) is None


def test_a_damaged_checkpoint_is_replaced_by_the_older_one(stopped, whole, caplog):
    newest, _ = checkpoints(stopped)
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    stray = newest.with_name("checkpoint-abc")
    stray.mkdir()
    (stray / "mine.txt").write_text("not ours")
    record = run(stopped)
    assert same(record, whole)
    said = "checkpoint-4 was damaged (model.safetensors is not what was written): the run went on from checkpoint-2"
    assert said in record["notes"] and said in caplog.text and said not in whole["notes"]
    assert (newest.with_name("damaged-checkpoint-4") / "model.safetensors").stat().st_size == 1000
    assert (stray / "mine.txt").exists(), "what is not ours is left alone"
    lines = (stopped.run_folder / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 11))


def test_without_a_complete_checkpoint_the_run_restarts(stopped, whole):
    newest, older = checkpoints(stopped)
    for path in [path for path in newest.iterdir() if path.name != "trainer_state.json"]:
        path.unlink()
    (older / "checksums.json").write_bytes(b'{"model.saf\xff')
    record = run(stopped)
    assert same(record, whole)
    assert sum("damaged" in note and "started anew" in note for note in record["notes"]) == 2


def test_a_checkpoint_of_another_model_is_not_resumed(stopped, whole):
    """Its checksums may be correct if the whole checkpoint was copied."""
    from trainer.training.checksums import sealed

    newest, _ = checkpoints(stopped)
    weights = newest / "model.safetensors"
    with sealed(newest):
        save_file({f"other.{name}": tensor for name, tensor in load_file(weights).items()}, weights)
    record = run(stopped)
    assert same(record, whole)
    assert any("model.safetensors is another model's" in note for note in record["notes"])


def test_an_undecodable_history_line_is_dropped(stopped, whole):
    history = stopped.run_folder / "history.jsonl"
    lines = history.read_bytes().splitlines(keepends=True)
    history.write_bytes(lines[0] + b"\xff\xfe" + lines[1] + b"".join(lines[2:]) + b'{"step": 5, "lo')
    record = run(stopped)
    assert same(record, whole)
    assert "history.jsonl was damaged: it lacks 1 of the 4 steps" in record["notes"]
    steps = [json.loads(line)["step"] for line in history.read_text().splitlines()]
    assert steps == [1, *range(3, 11)]


def test_a_damaged_config_of_a_run_with_checkpoints_is_an_error(stopped):
    (stopped.run_folder / "config.yaml").write_bytes(b"task: [\xff")
    with pytest.raises(UserError, match=r"config\.yaml is damaged: remove it"):
        run(stopped)


def test_a_damaged_record_is_renamed_and_a_finished_one_is_kept(stopped, whole, capsys):
    given = [*RUN.split(), "--output_root_dir", stopped.output_root_dir]
    result = stopped.run_folder / "result.json"
    result.write_text('{"schema_version": 1, "sta')
    assert main(given) == 0
    assert "result.json: truncated or damaged" in capsys.readouterr().err
    assert result.with_name("result.json.old").exists() and same(json.loads(result.read_text()), whole)
    with pytest.raises(UserError, match=r"result\.json exists already"):
        main(given)

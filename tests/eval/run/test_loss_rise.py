"""A run whose loss ends far above its start is finished, and its summary, tables and report say so."""

import io

import pytest

from eval import eval_parse
from eval.config.parser import parse
from eval.eval_run import run
from eval.launch.grid import read_state
from eval.launch.progress import result_table
from eval.run.progress import make_console
from eval.run.record import outcome
from trainer.training.history import History


def history(folder, losses):
    found = History(folder / "history.jsonl")
    found.write([{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)])
    return found


@pytest.mark.parametrize(
    ("losses", "rise"),
    [
        ([2.3] * 10 + [1.0] * 10, None),
        ([2.3] * 10 + [4e6] * 10, (2.3, 4e6)),
        ([2.3] * 95 + [4e6] * 5 + [2.0] * 10, None),  # it came back
        ([0.001] * 10 + [0.05] * 10, None),  # what it had learned by heart, and new batches
        ([0.01] * 10 + [2.3] * 10, (0.01, 2.3)),
        ([], None),
    ],
)
def test_the_final_loss_is_compared_with_the_first(tmp_path, losses, rise):
    assert history(tmp_path, losses).rise() == rise


def test_a_rising_loss_is_reported_everywhere(tmp_path, capsys):
    flags = "--task digits --model convnet --from_scratch --method float --learning_rate 100 --max_steps 12"
    flags += f" --max_train_samples 128 --report_to none --quiet --device cpu --output_root_dir {tmp_path}"
    config = parse(flags.split())
    record = run(config)
    start, end = record["loss_rise"]
    assert record["status"] == "finished" and end > 3 * start
    told = f"{start:.3g} to {end:.3g}"
    assert [note for note in record["notes"] if "ended far above where it started" in note and told in note]
    assert told in outcome(record)[-1]
    file = io.StringIO()
    make_console(file).print(result_table({config.run_name: read_state(config)}, {}))
    assert f"(loss ROSE from {told})" in file.getvalue()
    capsys.readouterr()
    page = tmp_path / "page.html"
    assert eval_parse.main([str(tmp_path), "--no_plots", "--html", str(page)]) == 0
    assert told in capsys.readouterr().out and told in page.read_text()
    assert told in (tmp_path / "report" / "summary.csv").read_text()

"""Progress of a run as lines, as a live line, and as a file for other processes."""

import io
import json
import re

from rich.console import Console

from eval.run import progress as run_progress
from eval.run.progress import RunProgress, describe, make_console, read_progress


def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(run_progress.time, "monotonic", lambda: now[0])
    return now


def test_a_phase_prints_lines_at_its_start_with_its_first_estimate_and_at_intervals(monkeypatch):
    now, file = clock(monkeypatch), io.StringIO()
    progress = RunProgress(make_console(file))
    with progress.shown():
        progress("measuring", 0, 36, "36 layers in 2 formats on 32 examples")
        for layer in range(1, 37):
            now[0] += 2
            progress("measuring", layer, 36, f"layer {layer} of 36")
        progress("evaluating", 0, 4)
    assert file.getvalue().splitlines() == [
        "measuring: 36 layers in 2 formats on 32 examples",
        "measuring: layer 3 of 36, about 66 s left",
        "measuring: layer 13 of 36, about 46 s left",
        "measuring: layer 23 of 36, about 26 s left",
        "measuring: layer 33 of 36, about 6 s left",
        "evaluating",
    ]


def test_rounding_prints_a_line_a_block_that_takes_a_second_or_more(monkeypatch):
    now, file = clock(monkeypatch), io.StringIO()
    progress = RunProgress(make_console(file))
    with progress.shown():
        progress("rounding", 0, 4)
        for block, seconds in enumerate([6, 6, 0.2, 6], start=1):
            now[0] += seconds
            progress("rounding", block, 4, f"block {block} of 4")
    assert file.getvalue().splitlines() == [
        "rounding",
        "rounding: block 1 of 4",
        "rounding: block 2 of 4",
        "rounding: block 4 of 4",
    ]


def test_a_terminal_shows_a_live_line_below_the_logged_values(monkeypatch):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80)
    progress = RunProgress(console)
    with progress.shown():
        progress("training", 3, 60, "search")
        progress.log({"loss": 2.25, "search/cost": 0.5, "grad_norm": 1.0, "epoch": 0.5})
        assert progress._live is not None
    assert "step 3/60 search:  loss 2.25  cost 0.5" in re.sub("\\x1b\\[[0-9;]*m", "", file.getvalue())
    assert "grad_norm" not in file.getvalue() and progress._live is None


def test_the_progress_file_is_written_atomically_and_removed_at_the_end(monkeypatch, tmp_path):
    now = clock(monkeypatch)
    progress = RunProgress(make_console(io.StringIO(), quiet=True))
    with progress.shown():
        progress("calibrating", 0, 8)
        assert read_progress(tmp_path) == {}
        progress.write_to(tmp_path)
        now[0] += 4
        progress("calibrating", 4, 8, "batch 4 of 8")
        state = read_progress(tmp_path)
        assert state == {"phase": "calibrating", "done": 4, "total": 8, "what": "batch 4 of 8", "seconds_left": 4.0}
        assert describe(**state) == "calibrating: batch 4 of 8, about 4 s left"
        assert json.loads((tmp_path / "progress.json").read_text()) == state
        assert read_progress(tmp_path, since=4e9) == {}
    assert not list(tmp_path.iterdir())

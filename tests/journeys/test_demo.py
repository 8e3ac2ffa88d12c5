"""`make demo` in a fresh clone, with fewer steps than the one that .ci/run makes."""

import subprocess
import sys
from pathlib import Path

from tests.documents import ROOT
from tests.journeys.conftest import record_of
from tests.journeys.test_installed import copy_of_the_tree


def test_the_demo_in_a_fresh_clone_ends_with_a_report_and_lines_that_work(command, tmp_path):
    clone = copy_of_the_tree(tmp_path / "clone")
    (clone / ".venv").symlink_to(Path(sys.prefix))
    # The environment is there and belongs to others: `-o` keeps make from installing into it.
    done = command(
        [
            "make",
            "--no-print-directory",
            "-o",
            ".venv/.installed",
            "demo",
            "DEMO_ARGS=--max_steps 12 --train_batch_size 16",
        ],
        cwd=clone,
    )
    runs = clone / "output" / "digits" / "demo"
    records = [record_of(path.parent) for path in runs.glob("*/result.json")]
    assert sorted(record["method"] for record in records) == ["float", "search", "uniform", "uniform"]
    assert all(record["status"] == "finished" for record in records)
    assert (runs / "report" / "report.html").read_text().count("<svg") >= 4
    assert all((runs / "report" / f"{name}.png").stat().st_size > 1000 for name in ("pareto", "formats"))
    search, report, about = [line.strip() for line in done.out.split("\nNext:\n")[1].strip().splitlines()]
    for line in (report, about, f"{search} --dry_run"):
        pasted = subprocess.run(line, shell=True, cwd=clone, capture_output=True, text=True)
        assert pasted.returncode == 0, f"{line}\n{pasted.stdout}\n{pasted.stderr}"
    assert clone != ROOT

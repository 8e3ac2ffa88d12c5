import csv
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from eval.run.sensitivities import FILE, write_csv
from eval.sensitivity import main
from quant.errors import UserError

ROOT = Path(__file__).parents[2]
FLAGS = "--task digits --model convnet --max_train_samples 200 --search_space 2,8 --seed 0 --run_id look"
RUN = FLAGS.split()


def test_every_kind_is_told_and_drawn(tmp_path, capsys):
    flags = [*RUN, "--output_root_dir", str(tmp_path), "--kinds", "measured,fisher,trace,eigenvalue"]
    assert main(flags) == 0
    told = capsys.readouterr().out
    folder = tmp_path / "digits" / "default" / "look"
    with (folder / "sensitivity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["decision"] for row in rows] == [*(f"convs.{i}" for i in range(4)), "linear"]
    for row in rows:
        assert row["decision"] in told
        assert float(row["measured int2"]) > float(row["measured int8"]) >= 0
        assert float(row["fisher int2"]) > float(row["fisher int8"]) > 0
        assert float(row["trace error"]) > 0 and abs(float(row["eigenvalue"])) > 0
    with Image.open(folder / "sensitivity.png") as picture:
        assert picture.width > 600 and len(picture.convert("L").getcolors()) > 10


def test_a_block_is_one_line(tmp_path, capsys):
    assert main([*RUN, "--output_root_dir", str(tmp_path), "--single_decision", "--kinds", "measured"]) == 0
    assert "model" in capsys.readouterr().out
    with (tmp_path / "digits/default/look/sensitivity.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 1


def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match="--kinds hessian: unknown 'hessian'; choices: measured, fisher, trace"):
        main([*RUN, "--kinds", "hessian"])


def test_the_module_as_a_command():
    command = [sys.executable, "-m", "eval.sensitivity", *RUN, "--kinds", "hessian"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--kinds hessian: unknown 'hessian'; choices: measured, fisher, trace" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_table_that_cannot_be_written_leaves_nothing(tmp_path):
    columns = {"measured int4": [(0.5, None)]}  # of one decision, where there are two
    with pytest.raises(IndexError):
        write_csv(["first", "second"], columns, tmp_path / FILE)
    assert not list(tmp_path.iterdir())

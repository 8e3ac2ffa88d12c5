"""The result parser: what counts, what is averaged, what is printed, and what wrong calls get to read."""

import csv
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from benchmarks.synthetic_runs import write_run
from eval.eval_parse import main
from eval.report import tables
from eval.report.records import Group, group_runs, read_runs
from eval.report.summary import summary_rows
from eval.run.schema import SCHEMA_VERSION
from quant.errors import UserError

ROOT = Path(__file__).parents[2]


def table_of(capsys, *arguments) -> list[dict]:
    assert main([*map(str, arguments), "--no_plots", "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_means_and_deviations_over_seeds(tmp_path, capsys):
    accuracies = [0.91, 0.935, 0.9, 0.92]
    for seed, accuracy in enumerate(accuracies):
        write_run(tmp_path, "search", seed, target=0.05, cost=0.04, metrics={"validation": {"accuracy": accuracy}})
    write_run(tmp_path, "float", 0, (16,), metrics={"validation": {"accuracy": 0.95}})
    search, baseline = table_of(capsys, tmp_path)
    assert search["n"] == 4 and search["seeds"] == "0 1 2 3" and search["feasible"] == 4
    assert search["quality_mean"] == pytest.approx(np.mean(accuracies), rel=1e-12)
    assert search["quality_sd"] == pytest.approx(np.std(accuracies, ddof=1), rel=1e-12)
    assert search["minus_float"] == pytest.approx(np.mean(accuracies) - 0.95, rel=1e-9)
    assert baseline["quality_sd"] is None and baseline["minus_float"] is None and baseline["feasible"] is None


def test_the_float_model_is_one_that_was_trained_alike(tmp_path, capsys):
    def run(method, seed, accuracy, **settings):
        told = {"metrics": {"validation": {"accuracy": accuracy}}, "folder": f"{method} {seed} {settings}"}
        write_run(tmp_path, method, seed, (16,) if method == "float" else (4,), settings=settings, **told)

    def ahead(*flags):
        rows = table_of(capsys, tmp_path, *flags)
        return {row["quality_mean"]: row["minus_float"] for row in rows if row["method"] != "float"}

    run("uniform", 0, 0.90, max_steps=400, quantizer="fixed")
    run("uniform", 0, 0.45, max_steps=0, quantizer="fixed")
    run("uniform", 0, 0.40, max_steps=7, quantizer="fixed")
    assert set(ahead().values()) == {None}
    run("float", 0, 0.50, max_steps=0, quantizer="lsq")
    one = pytest.approx(0.40), pytest.approx(-0.05), pytest.approx(-0.10)
    assert ahead() == dict(zip((0.90, 0.45, 0.40), one, strict=True)), "it is clear which"
    for seed, accuracy in enumerate((0.98, 1.00)):
        run("float", seed, accuracy, max_steps=400, quantizer="lsq")
    run("float", 0, 0.96, max_steps=400, quantizer="lsq", cost_type="compute")  # the same model, charged otherwise
    several = {0.90: pytest.approx(-0.08), 0.45: pytest.approx(-0.05), 0.40: None}
    assert ahead() == several and ahead("--per_run") == several
    write_run(tmp_path, "search", 0, metric="perplexity", metrics={"validation": {"perplexity": 20.0}})
    assert ahead()[20.0] is None, "another metric"


def test_a_cost_above_the_target_is_not_feasible(tmp_path, capsys):
    write_run(tmp_path, "search", 0, target=0.05, cost=0.05)
    write_run(tmp_path, "search", 1, target=0.05, cost=0.0501)
    assert table_of(capsys, tmp_path)[0]["feasible"] == 1
    assert main([str(tmp_path), "--no_plots"]) == 0
    assert "1/2" in capsys.readouterr().out


def spoil(run: Path, how: str) -> None:
    path = run / "result.json"
    record = json.loads(path.read_text())
    match how:
        case "unfinished":
            path.unlink()
        case "truncated":
            path.write_text(path.read_text()[:200])
        case "not text":
            path.write_bytes(b"\xff\xfe\x00\x81")
        case "failed":
            path.write_text(
                json.dumps({**record, "status": "failed", "reason": "loss is nan at step 7", "metrics": {}})
            )
        case "nan":
            path.write_text(json.dumps({**record, "metrics": {"validation": {"accuracy": float("nan")}}}))
        case "infinite cost":
            path.write_text(json.dumps({**record, "cost": float("inf")}))
        case "foreign":
            path.write_text('{"loss": 0.1}')
        case "list":
            path.write_text("[1, 2]")
        case "newer":
            path.write_text(json.dumps({**record, "schema_version": SCHEMA_VERSION + 1}))
        case "field missing":
            path.write_text(json.dumps({key: value for key, value in record.items() if key != "cost"}))
        case "metric missing":
            path.write_text(json.dumps({**record, "metric": "f1"}))
        case "unknown format":
            path.write_text(json.dumps({**record, "assignment": {"layer": ["int77", "int4"]}}))
        case "duplicate":
            shutil.copytree(run, run.parents[2] / "zz_copy")
            run.rename(run.parents[2] / "zz_original")
        case "config damaged":
            (run / "config.yaml").write_text("- just\n- a list\n")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("unfinished", "unfinished: no result.json"),
        ("truncated", "truncated or damaged"),
        ("not text", "truncated or damaged"),
        ("failed", "failed: loss is nan at step 7"),
        ("nan", "not finite: metrics.validation.accuracy is nan"),
        ("infinite cost", "not finite: cost is inf"),
        ("foreign", "foreign: not a result record"),
        ("list", "foreign: not a result record"),
        ("newer", f"foreign: schema_version {SCHEMA_VERSION + 1}"),
        ("field missing", "incomplete: cost is null"),
        ("metric missing", "incomplete: the metric f1 is null"),
        ("unknown format", "foreign: unknown format 'int77'"),
        ("duplicate", "duplicate: same settings, seed and the same result as"),
        ("config damaged", "damaged: not a YAML mapping"),
    ],
)
def test_what_does_not_count_is_listed_with_its_reason(tmp_path, capsys, how, reason):
    good = {seed: 0.9 + seed / 100 for seed in (0, 1)}
    for seed, accuracy in good.items():
        write_run(tmp_path, "search", seed, target=0.05, metrics={"validation": {"accuracy": accuracy}})
    spoil(write_run(tmp_path, "search", 2, target=0.05, metrics={"validation": {"accuracy": 0.1}}), how)
    assert main([str(tmp_path), "--no_plots", "--format", "csv"]) == 0
    shown = capsys.readouterr()
    (row,) = csv.DictReader(io.StringIO(shown.out))
    if how == "duplicate":  # the copy is left out, the original counts
        assert int(row["n"]) == 3
    else:
        assert int(row["n"]) == 2 and float(row["quality_mean"]) == pytest.approx(0.905)
    assert "1 left out" in shown.err and reason in shown.err


def test_only_repetitions_are_averaged(tmp_path, capsys):
    for steps in (200, 400):
        for seed in (0, 1):
            settings = {"max_steps": steps, "output_root_dir": f"/elsewhere/{seed}", "num_cpus": seed}
            write_run(tmp_path, "uniform", seed, (4,), settings=settings, folder=f"{steps}-{seed}")
    rows = table_of(capsys, tmp_path)
    assert [(row["n"], row["settings"]) for row in rows] == [(2, "max_steps=200"), (2, "max_steps=400")]


def test_what_differs_is_found_in_one_look_at_each_run(tmp_path):
    """Every run against every other took minutes for a thousand of them."""
    looks = []

    class Setting(str):
        def __ne__(self, other):
            looks.append(self)
            return str(self) != other

    write_run(tmp_path, "uniform", 0, (4,))
    (run,), _ = read_runs([tmp_path])
    runs = [replace(run, settings={"max_steps": Setting(number % 2)}) for number in range(200)]
    rows = summary_rows([Group((run,)) for run in runs])
    assert [row["settings"] for row in rows] == ["max_steps=0", "max_steps=1"] * 100
    assert len(looks) <= len(runs)


def test_folders_inside_one_another_count_once(tmp_path, capsys):
    run = write_run(tmp_path, "uniform", 0, (4,))
    assert table_of(capsys, tmp_path, run.parent, run)[0]["n"] == 1


def test_what_stands_inside_a_run_or_beside_a_launch_is_no_run(tmp_path, capsys):
    run = write_run(tmp_path, "uniform", 0, (4,))
    (run.parent / "launch.yaml").write_text("task: digits\n")
    for inner in (run / "model", run / "checkpoints" / "checkpoint-5", run.parent / "tune" / "trial"):
        inner.mkdir(parents=True)
        (inner / "result.json").write_text('{"loss": 1}\n{"loss": 2}\n')
        (inner / "config.yaml").write_text("")
    (run / "retrained").mkdir()  # of --verify_retrain
    (run / "retrained" / "history.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    write_run(tmp_path, "uniform", 1, (4,), task="tune", model="model", folder="checkpoints")
    assert [row["task"] for row in table_of(capsys, tmp_path)] == ["digits", "tune"]
    assert main([str(tmp_path), "--no_plots"]) == 0 and capsys.readouterr().err == ""


def test_several_folders_and_one_row_a_run(tmp_path, capsys):
    runs = [write_run(tmp_path / name, "uniform", seed, (4,)) for seed, name in enumerate("ab")]
    rows = table_of(capsys, tmp_path / "a", tmp_path / "b", "--per_run")
    assert [row["run"] for row in rows] == [str(run) for run in runs]
    assert all(row["n"] == 1 for row in rows)


def test_a_history_cut_off_in_mid_line_keeps_its_whole_lines(tmp_path):
    run = write_run(tmp_path, target=0.05)
    lines = (run / "history.jsonl").read_text().splitlines()
    (run / "history.jsonl").write_text("\n".join(lines[:10]) + '\n{"step": 10, "lo')
    (found,), _ = read_runs([tmp_path])
    assert [line["step"] for line in found.history()] == list(range(10))
    (run / "history.jsonl").write_bytes(f"{lines[0]}\n".encode() + b'{"step": \xff')
    assert len(found.history()) == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [("{broken", "2 is not JSON"), ("\udcff", "2 is not JSON"), ("{}", "2 has no step"), ("7", "no step")],
)
def test_a_damaged_history_costs_no_other_run_its_pictures(tmp_path, capsys, line, reason):
    """It stands among what was left out; its run counts without it."""
    damaged = write_run(tmp_path / "runs", target=0.05) / "history.jsonl"
    write_run(tmp_path / "runs", target=0.06)
    lines = damaged.read_text().splitlines()
    damaged.write_bytes("\n".join([lines[0], line, lines[1], ""]).encode(errors="surrogateescape"))
    page = tmp_path / "report.html"
    assert main([str(tmp_path / "runs"), "--format", "csv", "--html", str(page)]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 3
    assert f"1 left out:\n  {damaged}: " in shown.err and reason in shown.err and "counts without it" in shown.err
    assert page.read_text().count(": policy of") == 1 and reason in page.read_text()


def rows_of(tmp_path):
    write_run(tmp_path, "hawq_v2", 0, target=0.05)
    write_run(tmp_path, "hawq_v2", 1, target=0.05)
    write_run(tmp_path, "float", 0, (16,), metric="perplexity", metrics={"validation": {"perplexity": 23.456}})
    return summary_rows(group_runs(read_runs([tmp_path])[0]))


def test_csv_and_json_hold_the_same(tmp_path):
    rows = rows_of(tmp_path)
    from_csv = pd.read_csv(io.StringIO(tables.to_csv(rows)))
    from_json = pd.DataFrame(json.loads(tables.to_json(rows)))
    assert list(from_csv.columns) == list(from_json.columns)
    np.testing.assert_array_equal(from_csv["quality_mean"], from_json["quality_mean"])


def test_markdown_and_latex_have_one_cell_a_column(tmp_path):
    table = tables.summary_table(rows_of(tmp_path))
    lines = tables.to_markdown(table).splitlines()
    cells = [line.count("|") for line in lines if line.startswith("|")]
    assert len(cells) == 2 + len(table.rows) and set(cells) == {len(table.columns) + 1}
    latex = tables.to_latex(table)
    assert r"hawq\_v2" in latex and r"$\pm$" in latex and "hawq_v2" not in latex
    body = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") for line in body} == {len(table.columns) - 1}


def test_values_of_different_kinds_keep_their_own_digits_and_units(tmp_path):
    table = tables.summary_table(rows_of(tmp_path))
    metric = next(column for column in table.columns if column.heading == "metric")
    assert {metric.text(row).split()[-1] for row in table.rows} == {"accuracy", "perplexity"}
    assert "23.46 perplexity" in {metric.text(row) for row in table.rows}


def test_names_are_shown_as_they_are(tmp_path, capsys):
    name = "mö[/x]del [v2] :car:"
    runs = [write_run(tmp_path, "search", seed, target=0.05, model=name, folder=str(seed)) for seed in (0, 1)]
    assert main([str(tmp_path), "--no_plots"]) == 0
    assert f"digits · {name} " in capsys.readouterr().out
    named = [write_run(tmp_path / "named", method, target=0.05, folder=method) for method in ("[v2]", "[/x]")]
    assert main(["--compare", *map(str, named)]) == 0
    assert "A: [v2] ≤" in (shown := capsys.readouterr().out) and "B: [/x] ≤" in shown
    record = json.loads((runs[0] / "result.json").read_text())
    for run in runs:
        told = {"metric": "[m]:car:", "metrics": {"validation": {"[m]:car:": 0.5}}}
        (run / "result.json").write_text(json.dumps(record | told))
    assert main(["--compare", *map(str, runs)]) == 0
    assert "[m]:car:: 0.5000 (A)" in capsys.readouterr().out


def test_a_difference_says_what_it_means_where_less_is_better(tmp_path, capsys):
    def run(method, metric, value):
        told = {"metric": metric, "metrics": {"validation": {metric: value}}}
        return write_run(tmp_path, method, task=metric, **told)

    runs = [run(method, "perplexity", value) for method, value in (("greedy", 30.0), ("search", 18.0), ("float", 20.0))]
    run("search", "accuracy", 0.5)
    run("float", "accuracy", 0.25)
    table = tables.summary_table(summary_rows(group_runs(read_runs([tmp_path])[0])))
    column = [column.heading for column in table.columns].index("Δ float")
    assert {cells[column] for cells in table.texts()} == {"+10.00 (worse)", "-2.00 (better)", "+0.2500", "–"}
    assert main(["--compare", *map(str, runs[:2])]) == 0
    assert "30.0000 (A), 18.0000 (B), -12.0000 (better)" in capsys.readouterr().out


def test_compare_shows_every_layer_of_both(tmp_path, capsys):
    assignment = {"a": ["int4", "int4"], "b": ["int2", "int8"], "c": ["int8", "int8"]}
    first = write_run(tmp_path, "search", 0, target=0.05, assignment=assignment)
    changed = {"a": ["int4", "int4"], "b": ["int8", "int8"], "d": ["float", "float"]}
    second = write_run(tmp_path, "search", 1, target=0.05, assignment=changed)
    assert main(["--compare", str(first), str(second / "result.json"), "--format", "json"]) == 0
    rows = {row["layer"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == ["a", "b", "c", "d"]
    assert rows["a"]["weight_bits_change"] == 0
    assert (rows["b"]["a"], rows["b"]["b"], rows["b"]["weight_bits_change"]) == ("int2 / int8", "int8", 6)
    assert rows["c"]["b"] == rows["d"]["a"] == "–" and rows["c"]["weight_bits_change"] is None
    assert main(["--compare", str(first), str(second)]) == 0
    assert "1 of 2 shared layers differ" in capsys.readouterr().out
    assert main(["--compare", str(first), str(second), "--format", "latex"]) == 0
    title = capsys.readouterr().out.split("\\begin")[0].splitlines()
    assert [line[:4] for line in title] == ["% A:", "% B:"]


def test_compare_says_where_a_cost_is_not_known(tmp_path, capsys):
    first = write_run(tmp_path, "search", 0, target=0.05, cost=0.04)
    second = write_run(tmp_path, "search", 1, cost_type="memory", cost_unit="MiB", cost=7.0, costs={})
    assert main(["--compare", str(first), str(second)]) == 0
    assert "compute: 0.04 GBOPs (A), not known (B)" in capsys.readouterr().out
    assert main(["--compare", str(second), str(first)]) == 0
    assert "memory: 7 MiB (A), " in (shown := capsys.readouterr().out) and "not known" not in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["DIR"]),
        (["nowhere"], ["DIR", "nowhere"]),
        (["{empty}"], ["DIR", "no finished run"]),
        (["{empty}", "--format", "excel"], ["--format", "excel", "latex"]),
        (["{empty}", "--max_runs", "0"], ["--max_runs", "0"]),
        (["{empty}", "--fromat", "csv"], ["--fromat"]),
        (["--compare", "{empty}", "{empty}"], ["--compare", "no result.json"]),
        (["--compare", "{empty}", "{empty}", "--html", "page.html"], ["--html contradicts --compare"]),
    ],
)
def test_wrong_calls_name_the_flag_and_the_value(tmp_path, arguments, words):
    with pytest.raises(UserError) as caught:
        main([argument.format(empty=tmp_path) for argument in arguments])
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_folders_of_the_page_are_made_as_those_of_the_files_are(tmp_path, capsys):
    write_run(tmp_path / "runs", "uniform", 0, (4,))
    page, folder = tmp_path / "new" / "er" / "page.html", tmp_path / "files" / "here"
    arguments = [str(tmp_path / "runs"), "--html", str(page), "--output_dir", str(folder), "--no_plots"]
    assert main(arguments) == 0 and page.is_file() and any(folder.iterdir())
    assert str(page) in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "makes its folder" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("flag", "path", "reason"),
    [
        ("--output_dir", "file/report", ".*file is a file, no folder"),
        ("--html", "file/report.html", ".*file is a file, no folder"),
        ("--html", "runs", "is a folder"),
    ],
)
def test_what_cannot_be_written_is_named_before_the_work(tmp_path, capsys, flag, path, reason):
    write_run(tmp_path / "runs", "uniform", 0, (4,))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"{flag} .*{path.split('/')[0]}.*: {reason}"):
        main([str(tmp_path / "runs"), flag, str(tmp_path / path)])
    assert capsys.readouterr().out == "" and not (tmp_path / "runs" / "report").exists()
    with pytest.raises(UserError, match=r"DIR: no folder .*file"):
        main([str(tmp_path / "file")])


def test_files_that_cannot_be_written_are_named_by_their_flag(tmp_path, capsys):
    write_run(tmp_path / "runs", "uniform", 0, (4,))
    report = tmp_path / "runs" / "report"
    (report / "runs.csv").mkdir(parents=True)
    with pytest.raises(UserError, match=r"--output_dir .*runs.csv"):
        main([str(tmp_path / "runs"), "--no_plots"])
    (report / "runs.csv").rmdir()
    (report / "page.html").symlink_to(tmp_path / "nowhere" / "page.html")
    with pytest.raises(UserError, match=r"--html .*page.html"):
        main([str(tmp_path / "runs"), "--no_plots", "--html", str(report / "page.html")])


def test_the_folders_of_report_and_page_are_made(tmp_path):
    write_run(tmp_path / "runs", "uniform", 0, (4,))
    out = tmp_path / "new" / "report"
    for page in (out / "page.html", tmp_path / "of" / "its" / "own" / "page.html"):
        assert main([str(tmp_path / "runs"), "--no_plots", "--output_dir", str(out), "--html", str(page)]) == 0
        assert page.exists()


@pytest.mark.parametrize("command", [["eval/eval_parse.py"], ["-m", "eval.eval_parse"]], ids=["file", "module"])
def test_runs_as_a_file_and_as_a_module(tmp_path, command):
    write_run(tmp_path, "uniform", 0, (4,))
    done = subprocess.run([sys.executable, *command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "uniform" in done.stdout and done.stderr == ""
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"summary.csv", "runs.csv", "pareto.png"}
    wrong = subprocess.run([sys.executable, *command, "nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1 and wrong.stdout == ""


def test_a_real_config_groups_by_what_changes_the_result(tmp_path, capsys):
    """Settings come from eval.config.parser' own file: a flag renamed there must not split repetitions here."""
    from eval.config.parser import RunConfig, to_yaml

    base = RunConfig(task="digits", model="convnet", method="uniform", bits="4")
    for seed in (0, 1):
        config = replace(base, seed=seed, exp_name=f"e{seed}", output_root_dir=f"/x{seed}", run_id=f"r{seed}")
        write_run(tmp_path, "uniform", seed, (4,), settings=yaml.safe_load(to_yaml(config)))
    assert table_of(capsys, tmp_path)[0]["n"] == 2

"""What the first panel says: the best of a budget, its margins with their errors, and no more than the runs show."""

import json

from benchmarks.synthetic_runs import write_run
from eval.report.findings import MAX_BUDGETS, MAX_CLASSES, findings, left_out
from eval.report.paired import read_answers
from eval.report.pareto import panels
from eval.report.records import Excluded, group_runs, read_runs
from eval.report.summary import summary_rows
from eval.report.tables import summary_table


def write(folder, method, right, seed=0, bits=(4, 8), target=0.05, **changes):
    """A run that answers the first `right` of 100 examples rightly."""
    changes = {"cost": 0.04, "metrics": {"validation": {"accuracy": right / 100}}} | changes
    run = write_run(folder, method, seed, bits, target, **changes)
    splits = {"validation": {"predicted": [int(i < right) for i in range(100)], "label": [1] * 100}}
    (run / "predictions.json").write_text(json.dumps(splits))
    return run


def found_in(folder):
    runs, _ = read_runs([folder])
    return findings(group_runs(runs), {run.folder: read_answers(run.folder) for run in runs})


def sentences(folder):
    return [line for finding in found_in(folder) for _, lines in finding.paragraphs for line in lines]


def saying(folder, start):
    (line,) = (line for line in sentences(folder) if line.startswith(start))
    return line


def test_a_margin_beyond_its_error_and_one_within_it(tmp_path):
    """Of 100 paired examples 20 differ: 0.2 +- 1.96 x 0.402 / 10 = 0.0788. Of 1: 0.01 +- 0.0196."""
    write(tmp_path, "search", 90)
    write(tmp_path, "uniform", 70, bits=(4,), target=None)
    write(tmp_path, "float", 91, bits=(16,), target=None, cost=0.5)
    assert saying(tmp_path, "search (int4,int8) is the only configuration with this target: accuracy 0.9000 (1 seed)")
    uniform = saying(tmp_path, "Against the best uniform run that fits (uniform int4, 0.7000): +0.2000 ± 0.0788")
    assert uniform.endswith("(95 %, paired over 100 examples): better by more than the error.")
    within = saying(tmp_path, "Against float (0.9100): -0.0100 ± 0.0196")
    assert within.endswith("within the error, so no difference is shown.")


def test_a_run_over_its_budget_is_not_the_best_of_it(tmp_path):
    write(tmp_path, "search", 95, cost=0.06)
    write(tmp_path, "fisher", 80)
    assert saying(tmp_path, "fisher (int4,int8) is the only configuration with this target")


def test_a_budget_that_nothing_kept(tmp_path):
    write(tmp_path, "search", 95, cost=0.06)
    assert sentences(tmp_path) == ["none of 1 configurations kept to the budget in all of its runs."]


def test_without_answers_no_error_is_claimed(tmp_path):
    (write(tmp_path, "search", 90) / "predictions.json").unlink()
    write(tmp_path, "float", 91, bits=(16,), target=None)
    assert "the error of this is not known" in saying(tmp_path, "Against float")


def test_less_is_better_for_a_perplexity(tmp_path):
    for method, value in {"search": 20.0, "fisher": 30.0}.items():
        write(tmp_path, method, 90, metric="perplexity", metrics={"validation": {"perplexity": value}})
    assert saying(tmp_path, "search (int4,int8) is the best of the 2 configurations with this target: perplexity 20.0")


def test_cost_file_and_choice_are_said(tmp_path):
    write(tmp_path, "search", 90)
    assert "80% of the budget; the whole file has" in saying(tmp_path, "It costs 0.04 GBOPs")
    assert "assignments compared" in saying(tmp_path, "Why this one (seed 0)")


def test_few_of_many_budgets_are_told(tmp_path):
    for number in range(9):
        write(tmp_path, "search", 90, target=0.05 + number / 100)
    (finding,) = found_in(tmp_path)
    openings = [opening for opening, _ in finding.paragraphs]
    assert len(openings) == MAX_BUDGETS + 1
    assert openings[0] == "Within 0.05 GBOPs (compute)" and openings[-2] == "Within 0.13 GBOPs (compute)"
    assert finding.paragraphs[-1][1] == ("5 more budgets lie between these: see the summary.",)


def test_runs_without_a_budget(tmp_path):
    write(tmp_path, "uniform", 90, bits=(4,), target=None)
    (finding,) = found_in(tmp_path)
    assert finding.paragraphs[0][0] == "Without a budget"
    assert "There is no float run to compare with." in sentences(tmp_path)


def test_class_names_are_bounded(tmp_path):
    write(tmp_path, "search", 90, classes=["x" * 100, *(f"c{i}" for i in range(30))])
    (finding,) = found_in(tmp_path)
    assert finding.classes.startswith("31 classes: xxx") and finding.classes.endswith(f", and {31 - MAX_CLASSES} more")
    assert len(finding.classes) < 300


def test_what_was_left_out_is_counted(tmp_path):
    assert left_out([]) == "Every run that was read counts; none was left out."
    twice = [Excluded(tmp_path, "failed: nan"), Excluded(tmp_path, "unfinished: no result.json")]
    assert left_out(twice).startswith("2 runs or files were left out (failed, unfinished).")


def test_costs_of_layers_and_of_whole_files_are_not_compared(tmp_path):
    memory = {"cost_type": "memory", "cost_unit": "MiB"}
    write(tmp_path, "search", 80, **memory)
    write(tmp_path, "measured", 70, seed=1, cost_scope="file", **memory)
    groups = group_runs(read_runs([tmp_path])[0])
    assert {panel.scope: panel.cost_title for panel in panels(groups)} == {
        "searched": "memory cost of the searched layers [MiB]",
        "file": "memory cost of the whole file [MiB]",
    }
    assert [len(panel.groups) for panel in panels(groups)] == [1, 1]
    assert len(saying(tmp_path, "search (int4,int8) is the only configuration with this target")) > 0
    assert len(saying(tmp_path, "measured (int4,int8) is the only configuration with this target")) > 0
    table = summary_table(summary_rows(groups, {}))
    assert "searched layers alone" in table.title and "--cost_scope file" in table.title
    column = next(column for column in table.columns if column.heading == "cost scope")
    assert sorted(column.text(row) for row in table.rows) == ["file", "searched"]

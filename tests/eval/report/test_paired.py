"""Differences between methods, paired by example."""

import json

import numpy as np
import pytest
from scipy import stats

from benchmarks.synthetic_runs import write_run
from eval.eval_parse import main
from eval.report.paired import half_width, read_answers, share_right
from eval.report.records import group_runs, read_each, read_runs
from eval.report.summary import summary_rows
from eval.report.tables import summary_table
from quant.errors import UserError

LABELS = np.random.default_rng(0).integers(0, 3, 400)


def run_with_answers(root, method, seed, wrong, labels=LABELS):
    """A finished run that answers the examples `wrong` wrongly."""
    answers = labels.copy()
    answers[list(wrong)] = (answers[list(wrong)] + 1) % 3
    accuracy = float((answers == labels).mean())
    folder = write_run(root, method, seed, target=0.05, cost=0.04, metrics={"validation": {"accuracy": accuracy}})
    told = {"validation": {"predicted": answers.tolist(), "label": labels.tolist()}}
    (folder / "predictions.json").write_text(json.dumps(told))
    return folder


def rows_of(root):
    runs, _ = read_runs([root])
    answers, damaged = read_each(runs, lambda run: read_answers(run.folder))
    assert not damaged
    return {row["method"]: row for row in summary_rows(group_runs(runs), answers)}


def test_the_interval_is_that_of_a_paired_test(tmp_path):
    for seed in (0, 1):
        run_with_answers(tmp_path, "search", seed, range(seed, 20))
        run_with_answers(tmp_path, "measured", seed, range(10, 40 + 3 * seed))
    rows = rows_of(tmp_path)
    ours, best = (
        share_right([run.folder for run in group.runs])
        for method in ("measured", "search")
        for group in group_runs(read_runs([tmp_path])[0])
        if group.record["method"] == method
    )
    low, high = stats.ttest_rel(ours, best).confidence_interval(0.95)
    behind = rows["measured"]
    assert behind["minus_best"] == pytest.approx(rows["measured"]["quality_mean"] - rows["search"]["quality_mean"])
    assert behind["minus_best"] == pytest.approx((low + high) / 2)
    assert behind["minus_best_half_width"] == pytest.approx((high - low) / 2, rel=5e-3)  # 1.96 is that of many examples
    assert rows["search"]["minus_best"] == 0 == rows["search"]["minus_best_half_width"]


def test_the_table_names_the_best_and_says_where_formats_are_the_same(tmp_path):
    folders = [run_with_answers(tmp_path, "search", 0, [3]), run_with_answers(tmp_path, "measured", 0, [3, 4])]
    first, second = (json.loads((folder / "result.json").read_text()) for folder in folders)
    (folders[1] / "result.json").write_text(json.dumps(second | {"assignment": first["assignment"]}))
    rows = list(rows_of(tmp_path).values())
    table = summary_table(rows)
    column = [column.heading for column in table.columns].index("Δ best, 95 %")
    shown = {row["method"]: texts[column] for row, texts in zip(rows, table.texts(), strict=True)}
    assert shown == {"search": "best", "measured": "-0.0025 ± 0.0049 (the same formats)"}


def test_without_rivals_or_answers_there_is_no_difference(tmp_path):
    run_with_answers(tmp_path, "search", 0, [3])
    assert rows_of(tmp_path)["search"]["minus_best"] is None
    folder = run_with_answers(tmp_path, "measured", 0, [3, 4], LABELS[:300])
    assert rows_of(tmp_path)["measured"]["minus_best"] is None, "fewer examples"
    other = run_with_answers(tmp_path, "greedy", 0, [3, 4], LABELS[::-1])
    assert rows_of(tmp_path)["greedy"]["minus_best"] is None, "other examples, as many"
    same = run_with_answers(tmp_path, "greedy", 1, [3, 4])
    assert share_right([same, same]) is not None and share_right([same, other]) is None
    (folder / "predictions.json").unlink()
    assert read_answers(folder) is None and share_right([folder]) is None
    rows = list(rows_of(tmp_path).values())
    assert rows[0]["minus_best"] is None
    assert "Δ best, 95 %" not in [column.heading for column in summary_table(rows).columns]


@pytest.mark.parametrize(
    "text",
    [
        *('{"validation": {"predicted": [1, 2', "{}", "[]", '{"validation": [1]}', '{"validation": {"label": [1]}}'),
        *('{"validation": {"predicted": [1, 2], "label": [1]}}', '{"validation": {"predicted": [[1]], "label": [1]}}'),
        *('{"validation": {"predicted": [], "label": []}}', "\udcff"),
    ],
)
def test_damaged_answers_are_told_of_and_the_rest_is_shown(tmp_path, capsys, text):
    for seed, method in enumerate(("search", "measured", "greedy")):
        folder = run_with_answers(tmp_path, method, 0, range(seed))
    (folder / "predictions.json").write_bytes(text.encode(errors="surrogateescape"))
    assert main([str(tmp_path), "--no_plots", "--format", "json"]) == 0
    shown = capsys.readouterr()
    assert f"1 left out:\n  {folder / 'predictions.json'}: " in shown.err and "damaged" in shown.err
    behind = {row["method"]: row["minus_best"] for row in json.loads(shown.out)}
    assert behind == {"search": 0, "measured": pytest.approx(-1 / 400), "greedy": None}
    with pytest.raises(UserError, match=r"predictions.json: .*damaged"):
        share_right([folder])


def test_one_example_has_no_spread():
    assert half_width(np.array([1.0])) == 0

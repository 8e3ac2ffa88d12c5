"""Report on finished runs as tables, figures and one page: `python eval/eval_parse.py DIR [DIR...]`.

It neither loads a model nor imports torch, so a report on thousands of runs takes seconds.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if __name__ == "__main__":  # run as a file, Python puts this folder first on the path, where `eval` is not a package
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from eval.commands import require_packages

    require_packages()

from rich.console import Console
from rich.text import Text

from eval.config.files import writing
from eval.config.parser import CommandParser, entry
from eval.config.validation import check_can_be_made
from eval.report import tables
from eval.report.findings import Finding, findings
from eval.report.labels import distinct_labels
from eval.report.layers import read_sensitivities
from eval.report.paired import read_answers
from eval.report.records import Excluded, Group, Run, group_runs, read_each, read_run, read_runs, shown_runs
from eval.report.summary import summary_rows
from quant.errors import UserError

if TYPE_CHECKING:  # loads matplotlib, which tables do without
    from eval.report.canvas import Drawing

Sections: TypeAlias = "dict[str, list[Drawing]]"
"""Heading -> the figures below it."""

FORMATS = ("table", "csv", "json", "markdown", "latex")


def main(argv: Sequence[str]) -> int:
    """Print the tables of the runs below the given folders; write CSV, figures and, on request, the page."""
    flags = _flags(argv)
    console = _console()
    if flags.compare:
        return _compare(flags.compare, flags.format, console)
    if not flags.folders:
        raise UserError("DIR is missing: name the folder of one or more runs, for example output")
    _check_places(flags)
    runs, excluded = read_runs(flags.folders)
    groups = group_runs(runs := distinct_labels(runs))
    shown = [] if flags.no_plots else shown_runs(groups, flags.max_runs)
    answers, damaged_answers = read_each(runs, lambda run: read_answers(run.folder))
    histories, damaged_histories = read_each(shown, Run.history)
    excluded += damaged_answers + damaged_histories
    _print_excluded(excluded)
    if not runs:
        raise UserError(f"DIR {' '.join(map(str, flags.folders))}: no finished run in it, {len(excluded)} left out")
    summary = summary_rows(groups, answers)
    every_run = summary_rows([Group((run,)) for run in runs], answers)
    rows = every_run if flags.per_run else summary
    _print(tables.summary_table(rows, flags.per_run), rows, flags.format, console)
    sections: Sections = {}
    if not flags.no_plots:
        from eval.report.sections import pictures  # late: matplotlib takes a second to load

        sensitivities, damaged_tables = read_each(runs, lambda run: read_sensitivities(run.folder))
        excluded += damaged_tables
        sections = pictures(runs, groups, shown, histories, sensitivities)
    folder = _output_folder(flags)
    with writing("output_dir", folder):
        written = _write_files(folder, summary, every_run, sections)
    if flags.html:
        page = _page(findings(groups, answers), summary, every_run, sections, excluded)
        with writing("html", flags.html):
            flags.html.parent.mkdir(parents=True, exist_ok=True)
            flags.html.write_text(page)
        written.append(("page", flags.html))
    if flags.format == "table":
        console.print()
        for what, path in written:
            console.print(Text(f"{what:19}"), Text(str(path), no_wrap=True, overflow="ignore"), soft_wrap=True)
    return 0


def _flags(argv: Sequence[str]) -> Namespace:
    parser = CommandParser("mpq-report", "Tables and pictures of finished runs.", "output --html report.html")
    add = parser.add_argument
    add("folders", metavar="DIR", nargs="*", type=Path, help="folder of runs, searched through to any depth")
    add("--format", choices=FORMATS, default="table", help="how the table is printed (default: table)")
    add("--per_run", action="store_true", help="one row a run instead of one a configuration")
    add("--output_dir", type=Path, help="where files are written (default: report/ in the first DIR)")
    add(
        "--html",
        type=Path,
        metavar="FILE",
        help="also write everything as one page that needs no network; makes its folder",
    )
    add("--no_plots", action="store_true", help="print and write tables only")
    add("--max_runs", type=int, default=6, help="runs that get pictures of their own (default: 6)")
    add("--compare", nargs=2, type=Path, metavar=("A", "B"), help="show two runs layer by layer and stop")
    flags = parser.parse_args(argv)
    if flags.max_runs < 1:
        raise UserError(f"--max_runs must be 1 or more, got {flags.max_runs}")
    if flags.compare:
        written = {"DIR": flags.folders, "--html": flags.html, "--output_dir": flags.output_dir}
        if given := [name for name, value in written.items() if value]:
            raise UserError(f"{given[0]} contradicts --compare: it prints two runs side by side, and writes nothing")
    return flags


def _console() -> Console:
    """Console of the terminal's width; unlimited if the output is not a terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=10_000)


def _print(table: tables.Table, rows: Sequence[tables.Row], form: str, console: Console) -> None:
    if form == "table":
        tables.print_table(table, console)
    else:
        render = {"csv": tables.to_csv, "json": tables.to_json}
        text = render[form](rows) if form in render else getattr(tables, f"to_{form}")(table)
        print(text, end="")


def _print_excluded(excluded: Sequence[Excluded]) -> None:
    """Print what was excluded to stderr, so that a printed CSV stays valid."""
    if excluded:
        print(f"{len(excluded)} left out:", file=sys.stderr)
    for one in excluded:
        print(f"  {one.path}: {one.reason}", file=sys.stderr)


def _compare(paths: Sequence[Path], form: str, console: Console) -> int:
    runs = []
    for path in paths:
        found = read_run(path.parent if path.name == "result.json" else path)
        if isinstance(found, Excluded):
            raise UserError(f"--compare {path}: {found.reason}")
        runs.append(found)
    runs = distinct_labels(runs)
    table = tables.comparison_table(*runs)
    _print(table, table.rows, form, console)
    if form == "table":
        console.print(Text("\n".join(["", *tables.comparison_notes(*runs)])))
    return 0


def _check_places(flags: Namespace) -> None:
    """Raise UserError before the work starts if the output could not be written."""
    if flags.output_dir or flags.folders[0].is_dir():  # otherwise the error is about DIR
        check_can_be_made("output_dir", _output_folder(flags))
    if flags.html and flags.html.is_dir():
        raise UserError(f"--html {flags.html}: is a folder, name a file")
    if flags.html:
        check_can_be_made("html", flags.html.parent)


def _output_folder(flags: Namespace) -> Path:
    return flags.output_dir or flags.folders[0] / "report"


def _write_files(
    folder: Path, summary: Sequence[tables.Row], every_run: Sequence[tables.Row], sections: Sections
) -> list[tuple[str, Path]]:
    """Write the tables as CSV and the figures of each section as a PNG; (kind, path) of each file."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for what, rows in {"summary": summary, "runs": every_run}.items():
        written.append((what, folder / f"{what}.csv"))
        written[-1][1].write_text(tables.to_csv(rows))
    for name, drawings in sections.items():
        from eval.report.canvas import write_png

        written.append((name.lower(), folder / f"{name.lower().replace(' ', '_')}.png"))
        write_png(drawings, written[-1][1])
    return written


def _page(
    found: Sequence[Finding],
    summary: Sequence[tables.Row],
    every_run: Sequence[tables.Row],
    sections: Sections,
    excluded: Sequence[Excluded],
) -> str:
    from eval.report.html import page

    shown = (tables.summary_table(summary), tables.summary_table(every_run, per_run=True))
    title = "Mixed-precision results: " + ", ".join(dict.fromkeys(row["task"] for row in every_run))
    return page(title, found, *shown, sections, excluded)


if __name__ == "__main__":
    entry(main)

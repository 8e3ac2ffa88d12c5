"""Tables of runs: plain rows, printed in the terminal or written as CSV, JSON, Markdown or LaTeX."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from eval.report.records import Run, lower_is_better
from eval.run.outcome import captions
from quant.formats import parse_format

Row: TypeAlias = Mapping[str, Any]
"""Plain values by name, as CSV and JSON hold them."""


@dataclass(frozen=True)
class Column:
    """Heading and text of one column."""

    heading: str
    text: Callable[[Row], str]
    key: str = ""
    """Key of the numeric value to sort by; if empty, the column sorts by its text."""

    def sort_value(self, row: Row) -> Any:
        """Value to sort a row by; empty where the row has none."""
        value = row[self.key] if self.key else self.text(row)
        return "" if value is None else value

    @property
    def numeric(self) -> bool:
        """Whether the column holds numbers, which are aligned to the right."""
        return bool(self.key)


@dataclass(frozen=True)
class Table:
    """A table for people: a title, and columns that render its rows."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]

    def texts(self) -> list[list[str]]:
        """The cells as text, row by row."""
        return [[column.text(row) for column in self.columns] for row in self.rows]


def summary_table(rows: Sequence[Row], per_run: bool = False) -> Table:
    """Render the rows of `summary_rows`. Values that all rows share move from the columns into the title."""
    shared = {key for key in ("task", "model", "metric", "cost_unit") if len({row[key] for row in rows}) == 1}
    metric, unit = ("metric", "cost_unit")
    in_unit, with_unit = (f" [{rows[0][unit]}]", False) if unit in shared else ("", True)
    name, with_name = (rows[0][metric], False) if metric in shared else ("metric", True)
    columns = [
        *(Column(key, _plain(key)) for key in ("task", "model") if key not in shared),
        Column("method", _plain("method")),
        Column("formats", _plain("formats")),
        Column(f"cost{in_unit}", _mean_sd(rows, "cost", unit, with_unit), "cost_mean"),
        Column("file [MiB]", _number(rows, "file_mib", "task"), "file_mib"),
        Column(name, _mean_sd(rows, "quality", metric, with_name), "quality_mean"),
        Column("Δ float", _minus_float(rows), "minus_float"),
        Column(f"target{in_unit}", _number(rows, "cost_target", unit, "cost_mean", show_unit=with_unit), "cost_target"),
        Column("feasible", _feasible, "feasible"),
        Column("seed", _plain("seeds"), "seeds") if per_run else Column("n", _plain("n"), "n"),
        Column("time [s]", _number(rows, "seconds", metric), "seconds"),
    ]
    if any(row["minus_best"] is not None for row in rows):
        columns.insert(-3, Column("Δ best, 95 %", _best(rows), "minus_best"))
    if len({row["cost_scope"] for row in rows}) > 1:
        columns.append(Column("cost scope", _plain("cost_scope"), "cost_scope"))
    if any(row["loss_rise"] for row in rows):
        columns.append(Column("loss ROSE", lambda row: row["loss_rise"] or ""))
    if any(row["settings"] for row in rows):
        columns.append(Column("settings", _plain("settings")))
    if per_run:
        columns.append(Column("run", lambda row: "/".join(Path(row["run"]).parts[-2:])))
    title = [*(rows[0][key] for key in ("task", "model") if key in shared), *_outside_cost(rows)]
    scopes = captions(row["cost_scope"] for row in rows)
    return Table("\n".join([" · ".join(title), *scopes]).strip(), columns, rows)


def _outside_cost(rows: Sequence[Row]) -> list[str]:
    """Share of the weights that the costs do not count; empty if it is zero or unknown."""
    shares = [row["float_share"] for row in rows if row.get("float_share")]
    if not shares:
        return []
    most, least = (f"{100 * share:.3g}" for share in (max(shares), min(shares)))
    return [f"outside the cost, in float: {most if most == least else f'{least} to {most}'} % of weights in matrices"]


def comparison_table(a: Run, b: Run) -> Table:
    """Compare two runs layer by layer, in the order of the first; a dash marks a layer that one of them lacks."""
    sizes = {layer["name"]: layer for run in (b, a) for layer in run.record["layers"]}
    first, second = a.record["assignment"], b.record["assignment"]
    rows = [
        {
            "layer": name,
            "macs": sizes.get(name, {}).get("macs"),
            "params": sizes.get(name, {}).get("params"),
            "a": _pair(first.get(name)),
            "b": _pair(second.get(name)),
            "weight_bits_change": _bits(second.get(name)) - _bits(first.get(name))
            if name in first and name in second
            else None,
        }
        for name in dict.fromkeys([*first, *second])
    ]
    columns = [
        Column("layer", _plain("layer")),
        Column("MACs [M]", lambda row: "–" if row["macs"] is None else f"{row['macs'] / 1e6:.3f}", "macs"),
        Column("weights [k]", lambda row: "–" if row["params"] is None else f"{row['params'] / 1e3:.1f}", "params"),
        Column("A", _plain("a")),
        Column("B", _plain("b")),
        Column("Δ weight bits", lambda row: _change(row["weight_bits_change"]), "weight_bits_change"),
    ]
    return Table(f"A: {a.label}\nB: {b.label}", columns, rows)


def comparison_notes(a: Run, b: Run) -> list[str]:
    """Differences between two runs as a whole (layers, metric, cost), one line each."""
    first, second = a.record["assignment"], b.record["assignment"]
    both = [name for name in first if name in second]
    lines = [f"{sum(first[name] != second[name] for name in both)} of {len(both)} shared layers differ"]
    metric, unit = a.record["metric"], a.record["cost_unit"]
    if metric == b.record["metric"]:
        ahead = b.quality - a.quality
        lines.append(f"{metric}: {a.quality:.4f} (A), {b.quality:.4f} (B), {ahead:+.4f}{_verdict(metric, ahead)}")
    cost_type = a.record["cost_type"]
    if cost_type in b.costs:
        cost_a, cost_b = a.costs[cost_type], b.costs[cost_type]
        lines.append(f"{cost_type}: {cost_a:.4g} {unit} (A), {cost_b:.4g} {unit} (B), {cost_b - cost_a:+.3g}")
    else:
        lines.append(f"{cost_type}: {a.costs[cost_type]:.4g} {unit} (A), not known (B)")
    return lines


def print_table(table: Table, console: Console) -> None:
    """Print the table aligned. Cells that do not fit the terminal are folded, never cut."""
    # Text objects, since rich reads brackets in a plain string as markup.
    title = Text(table.title, style="bold") if table.title else None
    shown = RichTable(title=title, title_justify="left", box=None, pad_edge=False)
    for column in table.columns:
        shown.add_column(Text(column.heading), justify="right" if column.numeric else "left", overflow="fold")
    for texts in table.texts():
        shown.add_row(*map(Text, texts))
    console.print(shown)


def to_csv(rows: Sequence[Row]) -> str:
    """Rows as CSV with a header line."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def to_json(rows: Sequence[Row]) -> str:
    """Rows as a JSON list of objects."""
    return json.dumps(list(rows), indent=1) + "\n"


def to_markdown(table: Table) -> str:
    """Table in Markdown, with its title above."""
    marks = ["---:" if column.numeric else "---" for column in table.columns]
    lines = [[column.heading for column in table.columns], marks, *table.texts()]
    body = "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
    title = "  \n".join(table.title.splitlines())
    return (f"{title}\n\n" if title else "") + body


_LATEX = {
    **{c: "\\" + c for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "Δ": r"$\Delta$",
    "≤": r"$\le$",
    "–": "--",
    "·": r"$\cdot$",
}


def to_latex(table: Table) -> str:
    """Table as a LaTeX `tabular`, which needs the booktabs package."""
    lines = [[_escape_latex(cell) for cell in line] for line in ([c.heading for c in table.columns], *table.texts())]
    head, *body = [" & ".join(line) + r" \\" for line in lines]
    shape = "".join("r" if column.numeric else "l" for column in table.columns)
    title = [f"% {line}" for line in table.title.splitlines()]
    begin = [rf"\begin{{tabular}}{{{shape}}}", r"\toprule", head, r"\midrule"]
    return "\n".join([*title, *begin, *body, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _escape_latex(text: str) -> str:
    return re.sub("|".join(map(re.escape, _LATEX)), lambda match: _LATEX[match[0]], text)


def _plain(key: str) -> Callable[[Row], str]:
    return lambda row: "–" if row[key] in (None, "") else str(row[key])


def _decimals(rows: Iterable[Row], key: str, unit: str) -> dict[Any, int]:
    """Number of decimals per unit that shows its largest value with four significant digits."""
    largest: dict[Any, float] = {}
    for row in rows:
        if row[key] is not None:
            largest[row[unit]] = max(largest.get(row[unit], 0.0), abs(row[key]))
    return {name: min(6, max(0, 3 - math.floor(math.log10(value)))) if value else 0 for name, value in largest.items()}


def _number(
    rows: Sequence[Row], key: str, unit: str, like: str = "", show_unit: bool = False, sign: str = ""
) -> Callable[[Row], str]:
    """Text of a value, with the decimals that its own column, or the column `like`, needs."""
    decimals = _decimals(rows, like or key, unit)

    def text(row: Row) -> str:
        if row[key] is None:
            return "–"
        return f"{row[key]:{sign}.{decimals[row[unit]]}f}" + (f" {row[unit]}" if show_unit else "")

    return text


def _minus_float(rows: Sequence[Row]) -> Callable[[Row], str]:
    number = _number(rows, "minus_float", "metric", "quality_mean", sign="+")
    return lambda row: number(row) + _verdict(row["metric"], row["minus_float"])


def _verdict(metric: str, difference: float | None) -> str:
    """Suffix for metrics where lower is better, since a plus sign reads like a gain."""
    if not difference or not lower_is_better(metric):
        return ""
    return " (worse)" if difference > 0 else " (better)"


def _mean_sd(rows: Sequence[Row], key: str, unit: str, show_unit: bool) -> Callable[[Row], str]:
    decimals = _decimals(rows, f"{key}_mean", unit)

    def text(row: Row) -> str:
        digits = decimals[row[unit]]
        spread = "" if row[f"{key}_sd"] is None else f" ± {row[f'{key}_sd']:.{digits}f}"
        return f"{row[f'{key}_mean']:.{digits}f}{spread}" + (f" {row[unit]}" if show_unit else "")

    return text


def _best(rows: Sequence[Row]) -> Callable[[Row], str]:
    digits = max(_decimals(rows, "quality_mean", "metric").values())

    def text(row: Row) -> str:
        if row["minus_best"] is None:
            return "–"
        if not row["minus_best"] and not row["minus_best_half_width"]:  # equal in every single answer
            return "best"
        margin = f"{row['minus_best']:+.{digits}f} ± {row['minus_best_half_width']:.{digits}f}"
        return margin + (" (the same formats)" if row["formats_of_best"] else "")

    return text


def _feasible(row: Row) -> str:
    if row["feasible"] is None:
        return "–"
    return f"{row['feasible']}/{row['n']}" if row["n"] > 1 else ("no", "yes")[row["feasible"]]


def _pair(pair: Sequence[str] | None) -> str:
    return "–" if pair is None else " / ".join(dict.fromkeys(pair))


def _bits(pair: Sequence[str]) -> float:
    return parse_format(pair[0]).bits


def _change(bits: float | None) -> str:
    return "–" if bits is None else "=" if bits == 0 else f"{bits:+g}"

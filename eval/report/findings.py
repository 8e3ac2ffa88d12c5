"""What the runs of a report show, in sentences: the best configuration of each budget, its margins, their errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from eval.report.paired import Answers, group_answers, half_width
from eval.report.records import Excluded, Group, evenly_spaced, is_within, lower_is_better
from eval.run.outcome import choice_line, file_sizes, scope_of

MAX_BUDGETS = 4
"""budgets of one task and model that get sentences"""
MAX_CLASSES = 20
"""class names that are listed"""
MAX_CLASS_LENGTH = 40
"""characters of one class name that are shown"""
AnswersOf = Mapping[Path, Answers | None]
"""run folder -> its answers, where it kept any"""


@dataclass(frozen=True)
class Finding:
    """What was found for one task and model."""

    heading: str
    paragraphs: tuple[tuple[str, tuple[str, ...]], ...]
    """(opening words, sentences) of each budget"""
    classes: str
    """names of the classes and how many there are; empty where the task has none"""


def findings(groups: Sequence[Group], answers: AnswersOf) -> list[Finding]:
    """One finding for each task, model and metric, in the order of `groups`."""
    found = []
    for name in dict.fromkeys(_place(group) for group in groups):
        own = [group for group in groups if _place(group) == name]
        budgets = sorted({_budget(g) for g in own if g.record["cost_target"]})
        paragraphs = [_of_budget(own, *budget, answers) for budget in evenly_spaced(budgets, MAX_BUDGETS)]
        if len(budgets) > MAX_BUDGETS:
            more = f"{len(budgets) - MAX_BUDGETS} more budgets lie between these: see the summary."
            paragraphs.append(("", (more,)))
        if not budgets:
            paragraphs.append(_without_budget(own, answers))
        found.append(Finding(f"{name[0]} · {name[1]}", tuple(paragraphs), _classes(own)))
    return found


def left_out(excluded: Sequence[Excluded]) -> str:
    """One sentence on what the report does not count."""
    if not excluded:
        return "Every run that was read counts; none was left out."
    count = "1 run or file was" if len(excluded) == 1 else f"{len(excluded)} runs or files were"
    kinds = dict.fromkeys(entry.reason.partition(":")[0] for entry in excluded)
    return f"{count} left out ({', '.join(list(kinds)[:5])}). The end of the page gives each path and reason."


def _place(group: Group) -> tuple[str, str, str]:
    return group.record["task"], group.record["model"], group.record["metric"]


def _budget(group: Group) -> tuple[str, float, str]:
    """Return (cost type, target, scope)."""
    return group.record["cost_type"], group.record["cost_target"], scope_of(group.record)


def _of_budget(
    groups: Sequence[Group], cost_type: str, target: float, scope: str, answers: AnswersOf
) -> tuple[str, tuple[str, ...]]:
    """(opening words, sentences) of one budget: the best configuration, and how it compares with float and uniform."""
    groups = [g for g in groups if scope_of(g.record) == scope or g.record["method"] == "float"]
    aimed = [g for g in groups if _budget(g) == (cost_type, target, scope)]
    unit = aimed[0].record["cost_unit"]
    opening = f"Within {target:.4g} {unit} ({cost_type})"
    within = [
        g for g in groups if g.has_cost(cost_type) and g.record["method"] != "float" and _fits(g, cost_type, target)
    ]
    own = [g for g in within if g in aimed]
    if not own:
        return opening, (f"none of {len(aimed)} configurations kept to the budget in all of its runs.",)
    best = _best(own)
    uniform = [g for g in within if g.record["method"] == "uniform" and g is not best]
    rivals = [_against(best, _best(uniform), "the best uniform run that fits", answers)] if uniform else []
    others = [g for g in own if g is not best and g not in uniform]
    if others:
        rivals.append(_against(best, _best(others), "the next best method", answers))
    return opening, (
        _score(best, len(own), " with this target"),
        _float_sentence(best, groups, answers),
        *rivals,
        _price(best),
        *_why(best),
    )


def _without_budget(groups: Sequence[Group], answers: AnswersOf) -> tuple[str, tuple[str, ...]]:
    """Sentences where no run had a budget: the best configuration other than float."""
    quantized = [group for group in groups if group.record["method"] != "float"]
    best = _best(quantized or groups)
    if not quantized:
        return "Without a budget", (_score(best, len(groups)), "No quantized run was read.", _price(best))
    return "Without a budget", (_score(best, len(quantized)), _float_sentence(best, groups, answers), _price(best))


def _fits(group: Group, cost_type: str, target: float) -> bool:
    return all(is_within(run.costs[cost_type], target) for run in group.runs)


def _best(groups: Sequence[Group]) -> Group:
    """The group of the best mean quality; of equal ones the cheapest."""
    sign = -1 if lower_is_better(groups[0].record["metric"]) else 1
    return max(groups, key=lambda group: (sign * group.quality[0], -group.cost(group.record["cost_type"])[0]))


def _score(best: Group, count: int, aim: str = "") -> str:
    """Which configuration is best, and its score over its seeds."""
    quality, spread = best.quality
    first = best.runs[0]
    seeds = "1 seed" if spread is None else f"mean of {len(best.runs)} seeds, standard deviation {spread:.4f}"
    among = f"is the best of the {count} configurations" if count > 1 else "is the only configuration"
    name = " · ".join([f"{first.record['method']} ({first.formats})", *first.details])
    return f"{name} {among}{aim}: {best.record['metric']} {quality:.4f} ({seeds})."


def _float_sentence(best: Group, groups: Sequence[Group], answers: AnswersOf) -> str:
    """The margin to the float model: of float runs, else of what the runs measured before quantizing."""
    if floats := [group for group in groups if group.record["method"] == "float"]:
        return _against(best, _best(floats), "float", answers)
    own = [run.float_quality for run in best.runs if run.float_quality is not None]
    if not own:
        return "There is no float run to compare with."
    told = f"Against its float model ({mean(own):.4f}): {best.quality[0] - mean(own):+.4f}"
    return f"{told}; the error of this is not known."


def _against(best: Group, other: Group, what: str, answers: AnswersOf) -> str:
    """The margin to another configuration with its paired 95 % error, and whether it exceeds that error."""
    if other is best:
        return "The float model itself is the best."
    gap = best.quality[0] - other.quality[0]
    name = "" if other.record["method"] == "float" else f"{other.runs[0].name}, "
    told = f"Against {what} ({name}{other.quality[0]:.4f}): {gap:+.4f}"
    a, b = (group_answers(group, answers) for group in (best, other))
    if best.record["metric"] != "accuracy" or a is None or b is None or a.examples != b.examples:
        return f"{told}; the error of this is not known, since the runs kept no answers that can be paired."
    half = half_width(a.right - b.right)
    count = len(a.right)
    if gap == 0 and half == 0:
        return f"{told}: every one of {count} examples is answered alike."
    told += f" ± {half:.4f} (95 %, paired over {count} examples)"
    if abs(gap) <= half:
        return f"{told}: within the error, so no difference is shown."
    return f"{told}: {'better' if gap > 0 else 'worse'} by more than the error."


def _price(best: Group) -> str:
    """Cost against the target, and the whole file against float's."""
    record = best.record
    cost, _ = best.cost(record["cost_type"])
    line = f"It costs {cost:.4g} {record['cost_unit']}"
    if record["cost_target"]:
        line += f", {cost / record['cost_target']:.0%} of the budget"
    sizes = [size for run in best.runs if (size := file_sizes(run.record))]
    if not sizes:
        return f"{line}; the size of the whole file is not known."
    own, whole = mean(size[0] for size in sizes), mean(size[1] for size in sizes)
    return f"{line}; the whole file has {own:.4g} MiB, {own / whole:.0%} of float's {whole:.4g}."


def _why(best: Group) -> list[str]:
    """How the assignment of the first seed was chosen, and how it ranks among the others that were evaluated."""
    if not (told := choice_line(best.record)):
        return []
    lines = [f"Why this one (seed {best.record['seed']}): {told.removeprefix('chosen: ')}."]
    if report := (best.record.get("contest") or {}).get("certificate"):
        those = f"{'all' if report['kind'] == 'all' else 'a sample of'} {report['among']} assignments within the budget"
        rank = f"it ranks {report['rank']}, with a regret of {report['regret']:.2g} ± {report['regret_error']:.1g}"
        lines.append(f"Among {those}, {'none scored better' if report['rank'] == 1 else rank} on held-out data.")
    return lines


def _classes(groups: Sequence[Group]) -> str:
    """'10 classes: 0, 1, …' from the first record that names them."""
    names = next((names for group in groups for run in group.runs if (names := run.record.get("classes"))), None)
    if not isinstance(names, list) or not names:
        return ""
    shown = [text if len(text) <= MAX_CLASS_LENGTH else f"{text[: MAX_CLASS_LENGTH - 1]}…" for text in map(str, names)]
    more = f", and {len(names) - MAX_CLASSES} more" if len(names) > MAX_CLASSES else ""
    return f"{len(names)} classes: {', '.join(shown[:MAX_CLASSES])}{more}"

"""The texts of --help (one screen with the most used flags) and --help_all (every flag by group)."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import Field, fields
from pathlib import Path

from eval.commands import command
from eval.config.run_config import GROUPS, RunConfig, name_of

MOST_USED = (
    *("task", "model", "data_dir", "search", "search_space", "target_bits", "bits", "max_steps"),
    *("output_root_dir", "dry_run"),
)
EXAMPLES = (
    "--task digits --model convnet --method float --max_steps 600 --learning_rate 3e-3 --run_id float",
    "--task digits --model convnet --load_model_path output/digits/default/float \\\n"
    "      --search --search_space 2,4,8 --target_bits 3.5 --max_steps 300 --learning_rate 1e-3",
    "--task mrpc --model bert --data_dir DATA/mrpc --model_path FINE_TUNED --search --target_bits 5",
)
WIDTH = 110


def requested_help(argv: Sequence[str]) -> str | None:
    """Return the help text if `argv` holds a help flag, else None."""
    if "--help_all" in argv or "--help-all" in argv:
        return every_flag()
    return one_screen() if "--help" in argv or "-h" in argv else None


def one_screen() -> str:
    """Return the text of --help: purpose, three examples, the most used flags, and the next command."""
    alone = Path(sys.argv[0]).stem in ("eval_run", "mpq-run")
    run = command("mpq-run" if alone else "mpq-search")
    what = "One run, in this process" if alone else "One run, or a grid of runs as Ray Tune trials"
    known = {entry.name: entry for entry in fields(RunConfig)}
    shown = [known[name] for name in MOST_USED if not (alone and name == "dry_run")]
    lines = [
        f"{what}: searches a number format for each layer, within a budget,",
        "and trains the weights in the drawn formats at the same time.",
        "",
        "Train in float, search from there, or search a model of yours:",
        *(f"  {run} {example}" for example in EXAMPLES),
        "",
        "The flags most people need:",
        *(line for entry in shown for line in _flag_help(entry)),
        "",
        f"Next: {command('mpq-report', 'output')} makes tables and pictures of what has run.",
        "--help_all lists every flag; each has a --no_ form if it is a switch, and is a key of --config FILE.yaml.",
        "If a flag is given twice, the last value counts.",
    ]
    return "\n".join(lines)


def every_flag() -> str:
    """Return the text of --help_all: every flag with its meaning, choices and default, by group."""
    lines: list[str] = []
    for group in GROUPS:
        lines += [
            f"{group._argument_group_name}:",
            *(line for entry in fields(group) for line in _flag_help(entry)),
            "",
        ]
    return "\n".join(lines).rstrip()


def _flag_help(entry: Field) -> Iterator[str]:
    """Yield the lines that describe one flag, wrapped to the terminal's width."""
    names = ", ".join([name_of(entry), *entry.metadata.get("aliases", ())])
    if entry.default is True:
        names = f"--no_{entry.name}"
    text = f"switch off: {entry.metadata['help']}" if entry.default is True else entry.metadata["help"]
    if "choices" in entry.metadata:
        text += f" [{', '.join(entry.metadata['choices'])}]"
    if not isinstance(entry.default, bool) and entry.default is not None:
        text += f" (default: {entry.default})"
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    yield from textwrap.wrap(text, width, initial_indent=f"  {names:24} ", subsequent_indent=" " * 27)

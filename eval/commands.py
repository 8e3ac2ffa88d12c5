"""Formats commands for messages such that they work in the user's shell and working directory.

Uses the standard library alone, because it also reports missing packages.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "mpq-search": ("eval_parallel.py",),
    "mpq-run": ("eval/eval_run.py",),
    "mpq-report": ("eval/eval_parse.py",),
    "mpq-export": ("-m", "eval.export"),
    "mpq-latency": ("-m", "eval.latency"),
    "mpq-sensitivity": ("-m", "eval.sensitivity"),
}
"""console command -> arguments of `python` that do the same in a checkout"""
NEEDED = (
    *("accelerate", "datasets", "filelock", "huggingface_hub", "jinja2", "markupsafe", "matplotlib", "numpy"),
    *("omegaconf", "optuna", "pandas", "PIL", "plotly", "psutil", "pyarrow", "yaml", "ray", "rich", "rouge_score"),
    *("safetensors", "sklearn", "scipy", "tensorboard", "tensorboardX", "timm", "tokenizers", "torch", "torchvision"),
    "transformers",
)
"""import names of the required packages"""
OLDEST_PYTHON = (3, 11)
WRONG_INPUT = 2
"""exit code for errors that the user can fix"""


def command(name: str, *arguments: str | Path) -> str:
    """Format one of `COMMANDS` with its arguments as a line for a shell.

    Uses the console command if this program was started by one, or is not in a checkout; else `python` and a script.
    """
    words = [str(word) for word in arguments]
    started_by = Path(sys.argv[0])
    if started_by.stem in COMMANDS or not (ROOT / "pyproject.toml").is_file():
        return shlex.join([installed(name), *words])
    script = list(COMMANDS[name])
    here = Path.cwd() == ROOT
    if script[0] != "-m" and not here:
        script[0] = str(ROOT / script[0])
    line = shlex.join([python(), *script, *(word if here else _absolute(word) for word in words)])
    return line if here or script[0] != "-m" else f"cd {shlex.quote(str(ROOT))} && {line}"


def again(*arguments: str | Path) -> str:
    """Format the running program (one of `COMMANDS`, or the user's script) with other arguments for a shell."""
    started = Path(sys.argv[0]).resolve()
    scripts = {str(ROOT / script[-1]): name for name, script in COMMANDS.items()} | {name: name for name in COMMANDS}
    name = scripts.get(str(started), scripts.get(started.stem))
    if name is not None:
        return command(name, *arguments)
    return shlex.join([python(), str(started), *(str(word) for word in arguments)])


def installed(name: str) -> str:
    """Return a program of this environment, such as `tensorboard`: its name if it is on PATH, else its path."""
    return name if shutil.which(name) else _near(Path(sys.executable).with_name(name))


def require_packages() -> None:
    """Exit with one line on how to install, if Python is too old or packages are missing.

    Scripts call this before other imports, so that users see that line instead of a traceback.
    """
    python = shlex.quote(sys.executable or "python3")
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        _stop(f"Python {oldest} or later is needed, {python} is {sys.version.split()[0]}: {_set_up()}")
    if missing := _missing(NEEDED):
        rest = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        _stop(f"{', '.join(missing[:3])}{rest} not installed for {python}: {_set_up()}")


def _missing(modules: Iterable[str]) -> list[str]:
    """Return those of `modules` that are not installed."""
    return [name for name in modules if find_spec(name) is None]


def _set_up() -> str:
    """Return how to activate the environment if there is one, else how to create it."""
    activate = ROOT / ".venv" / "bin" / "activate"
    if activate.is_file():
        return f"run '. {_near(activate)}' first, then the same command with python"
    if (ROOT / "requirements.txt").is_file():
        venv, pins = _near(ROOT / ".venv"), _near(ROOT / "requirements.txt")
        return f"run 'python3 -m venv {venv} && {venv}/bin/python -m pip install -c {pins} -e {_near(ROOT)}'"
    return "install this package again with pip, its dependencies included"


def _stop(line: str) -> None:
    print(line, file=sys.stderr)
    sys.exit(WRONG_INPUT)


def python() -> str:
    """Return the command of this interpreter: `python` if that is it on PATH, else its path."""
    found = shutil.which("python")
    return "python" if found and Path(found).absolute() == Path(sys.executable).absolute() else _near(sys.executable)


def _near(path: str | Path) -> str:
    """Return `path` relative to the working directory if it is inside, else unchanged."""
    path, here = Path(path), Path.cwd()
    return os.path.relpath(path, here) if path.is_relative_to(here) else str(path)


def _absolute(word: str) -> str:
    """Make a word absolute if it is an existing path."""
    return str(Path(word).absolute()) if not word.startswith("-") and Path(word).exists() else word

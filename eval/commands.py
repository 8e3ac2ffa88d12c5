"""The commands as a user can type them: what this says to run next exists where the user stands.

Needs nothing but the standard library: it also tells those who have nothing else installed what to do about it.
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
"""console command -> what `python` runs instead in a checkout"""
NEEDED = (
    *("accelerate", "datasets", "filelock", "huggingface_hub", "jinja2", "markupsafe", "matplotlib", "numpy"),
    *("omegaconf", "optuna", "pandas", "PIL", "psutil", "pyarrow", "yaml", "ray", "rich", "rouge_score", "safetensors"),
    *("sklearn", "scipy", "tensorboard", "tensorboardX", "timm", "tokenizers", "torch", "torchvision", "transformers"),
)
"""what the packages import, by the names they import it by"""
OLDEST_PYTHON = (3, 11)
WRONG_INPUT = 2
"""exit code of everything that the user can mend"""


def command(name: str, *arguments: str | Path) -> str:
    """One of `COMMANDS` with its arguments, as a line for a shell.

    The console command where this program was started by one, or stands in no checkout; else `python` with a script.
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


def example_of(name: str, arguments: str) -> str:
    """The last line of a command's --help."""
    return f"for example: {command(name)} {arguments}"


def again(*arguments: str | Path) -> str:
    """What was started, with other arguments, as a line for a shell: one of `COMMANDS`, or a script that calls us."""
    started = Path(sys.argv[0]).resolve()
    scripts = {str(ROOT / script[-1]): name for name, script in COMMANDS.items()} | {name: name for name in COMMANDS}
    name = scripts.get(str(started), scripts.get(started.stem))
    if name is not None:
        return command(name, *arguments)
    return shlex.join([python(), str(started), *(str(word) for word in arguments)])


def installed(name: str) -> str:
    """A program of this Python's environment, such as `tensorboard`, as a shell finds it: by its path if need be."""
    return name if shutil.which(name) else _near(Path(sys.executable).with_name(name))


def require_packages() -> None:
    """End the program, with one line that says what to do, where this Python is too old or has no packages for us.

    Scripts call it before they import anything else: a traceback would be all there is to read.
    """
    python = shlex.quote(sys.executable or "python3")
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        _stop(f"Python {oldest} or later is needed, {python} is {sys.version.split()[0]}: {_set_up()}")
    if missing := _missing(NEEDED):
        rest = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        _stop(f"{', '.join(missing[:3])}{rest} not installed for {python}: {_set_up()}")


def _missing(modules: Iterable[str]) -> list[str]:
    """Those of `modules` that this Python cannot find."""
    return [name for name in modules if find_spec(name) is None]


def _set_up() -> str:
    """How to get an environment, or how to use the one that there is."""
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
    """The word for this interpreter: `python` where a shell would find it by that."""
    found = shutil.which("python")
    return "python" if found and Path(found).absolute() == Path(sys.executable).absolute() else _near(sys.executable)


def _near(path: str | Path) -> str:
    """`path` from where the user stands, if it is below that; else as it is."""
    path, here = Path(path), Path.cwd()
    return os.path.relpath(path, here) if path.is_relative_to(here) else str(path)


def _absolute(word: str) -> str:
    """A path that exists from any folder; any other word as it is."""
    return str(Path(word).absolute()) if not word.startswith("-") and Path(word).exists() else word

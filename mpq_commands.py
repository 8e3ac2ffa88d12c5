"""Where the installed commands begin: `mpq-search`, `mpq-run`, `mpq-report` and the others of pyproject.toml.

No other package has this module's name, but those of ours are common words: before one of them is imported, this sees
to it that Python would find ours. It needs the standard library alone.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PACKAGES = ("quant", "cost", "policy", "trainer", "eval")


def search() -> None:
    """`mpq-search`: one run or a grid of runs."""
    start("eval_parallel")


def run() -> None:
    """`mpq-run`: one run in this process."""
    start("eval.eval_run")


def report() -> None:
    """`mpq-report`: finished runs as tables, pictures and one page."""
    start("eval.eval_parse")


def export() -> None:
    """`mpq-export`: a finished run as a model for deployment."""
    start("eval.export.__main__")


def latency() -> None:
    """`mpq-latency`: a finished run's latencies on ONNX Runtime."""
    start("eval.latency")


def sensitivity() -> None:
    """`mpq-sensitivity`: what each layer's formats do, without training."""
    start("eval.sensitivity")


def start(module: str) -> None:
    """Run `module.main` with the words of the command line, and exit: 2, after one line, where it cannot start."""
    for name in PACKAGES:
        if (found := place_of(name)) != ROOT / name:
            print(
                f"Python finds another package '{name}', {found or 'of no file'}, before ours, {ROOT / name}: "
                "take that one off PYTHONPATH, or install this project into an environment of its own",
                file=sys.stderr,
            )
            sys.exit(2)
    import_module("eval.commands").require_packages()
    import_module("eval.config.parser").entry(import_module(module).main)


def place_of(package: str) -> Path | None:
    """The folder of the package, or the file of the module, that Python would import under this name."""
    try:
        spec = find_spec(package)
    except ValueError:  # a module that somebody made by hand
        return None
    if spec is None or spec.origin is None:
        return None
    found = Path(spec.origin).resolve()
    return found.parent if found.name == "__init__.py" else found

"""Entry points of the installed commands: `mpq-search`, `mpq-run`, `mpq-report` and the others of pyproject.toml.

The packages of this project have common names (`eval`, `policy`) that other packages on the path of a user may share.
This module has a unique name, imports only the standard library, and checks that Python finds our packages before it
imports one of them.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PACKAGES = ("quant", "cost", "policy", "trainer", "eval")


def search() -> None:
    """`mpq-search`: execute one run or a grid of runs."""
    start("eval_parallel")


def run() -> None:
    """`mpq-run`: execute one run in this process."""
    start("eval.eval_run")


def report() -> None:
    """`mpq-report`: summarize finished runs as tables, figures and an HTML page."""
    start("eval.eval_parse")


def export() -> None:
    """`mpq-export`: export the model of a finished run for deployment."""
    start("eval.export.__main__")


def latency() -> None:
    """`mpq-latency`: measure the latencies of a finished run on ONNX Runtime."""
    start("eval.latency")


def sensitivity() -> None:
    """`mpq-sensitivity`: measure the sensitivity of each layer to each format, without training."""
    start("eval.sensitivity")


def start(module: str) -> None:
    """Run `main` of a module with the command line and exit; exit code 2 if another package shadows one of ours."""
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
    """Return the folder of the package, or the file of the module, that Python would import under this name."""
    try:
        spec = find_spec(package)
    except ValueError:  # a module in sys.modules without a spec
        return None
    if spec is None or spec.origin is None:
        return None
    found = Path(spec.origin).resolve()
    return found.parent if found.name == "__init__.py" else found

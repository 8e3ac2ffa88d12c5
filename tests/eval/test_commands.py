"""Commands in messages work in the user's directory; outside of the environment, one line says what to do."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eval import commands

ROOT = Path(__file__).parents[2]
PACKAGES = ("quant", "cost", "policy", "trainer", "eval")
EXTRAS = {
    "gguf",
    "executorch",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "ml_dtypes",
    "torchao",
    "compressed_tensors",
    "wandb",
}
"""optional packages, imported only for the flags that need them"""
SCRIPTS = [
    *(["eval_parallel.py"], ["eval/eval_run.py"], ["eval/eval_parse.py"]),
    *(["-m", f"{name}"] for name in ("eval.export", "eval.latency", "eval.sensitivity")),
]


def imported() -> set[str]:
    files = [ROOT / "eval_parallel.py", *(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))]
    found = set()
    for node in (node for path in files for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name.split(".")[0] for name in found} - set(sys.stdlib_module_names) - {*PACKAGES, "eval_parallel"}


def test_all_imported_packages_are_checked_for():
    assert imported() - EXTRAS <= set(commands.NEEDED)
    assert not commands._missing(commands.NEEDED)


@pytest.mark.parametrize("script", SCRIPTS, ids=" ".join)
def test_outside_the_environment_one_line_says_what_to_do(script):
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # Without `site` no installed package is found.
    ended = subprocess.run([sys.executable, "-S", *script], cwd=ROOT, env=bare, capture_output=True, text=True)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert "not installed for" in ended.stderr and "run '" in ended.stderr


def test_an_older_python_is_named(monkeypatch, capsys):
    monkeypatch.setattr(commands, "OLDEST_PYTHON", (99, 1))
    with pytest.raises(SystemExit) as left:
        commands.require_packages()
    assert left.value.code == 2
    assert "Python 99.1 or later is needed" in capsys.readouterr().err


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_commands_stand_where_they_are_said_to(name):
    script = commands.COMMANDS[name]
    place = ROOT / (script[0] if script[0] != "-m" else script[1].replace(".", "/"))
    assert (place / "__main__.py" if place.is_dir() else place.with_suffix(".py")).is_file()


def test_a_command_fits_the_place_and_the_way_this_was_started(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["eval_parallel.py"])
    monkeypatch.chdir(ROOT)
    assert commands.command("mpq-report", "output").endswith(" eval/eval_parse.py output")
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    assert f" {ROOT}/eval/eval_parse.py " in commands.command("mpq-report", "run")
    assert commands.command("mpq-export", "run").startswith(f"cd {ROOT} && ")
    assert commands.command("mpq-export", "run").endswith(f" -m eval.export {tmp_path}/run")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "bin" / "mpq-search")])
    assert commands.command("mpq-report", "run").endswith("mpq-report run")
    assert "eval_parse" not in commands.command("mpq-report", "run")

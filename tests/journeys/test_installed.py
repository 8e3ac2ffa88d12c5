"""Installed into an environment of its own: the commands from another folder, beside packages of the same names."""

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.documents import ROOT, blocks

UV = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
COMMANDS = ("mpq-search", "mpq-run", "mpq-report", "mpq-export", "mpq-latency", "mpq-sensitivity")
RUN = "--task digits --model convnet --from_scratch --device cpu --max_train_samples 200 --quiet"


def copy_of_the_tree(folder: Path) -> Path:
    """The files of this checkout as they are now: building leaves folders behind in the source."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def uv(*words: str | Path) -> str:
    """What uv says; skips where the registry does not answer."""
    done = subprocess.run([str(UV), *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode and any(
        sign in done.stderr for sign in ("error sending request", "dns error", "Failed to fetch")
    ):
        pytest.skip("the package registry does not answer")
    assert done.returncode == 0, done.stderr
    return done.stderr


def environment_of(folder: Path) -> Path:
    """An environment that knows the tested versions of the dependencies, and nothing of this checkout."""
    uv("venv", "--python", sys.executable, folder)
    site = next((folder / "lib").glob("python*")) / "site-packages"
    (site / "tested.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return folder / "bin"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    if UV is None:
        pytest.skip("uv is not installed")
    return copy_of_the_tree(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def installed(source, tmp_path_factory) -> Path:
    """The folder of programs of an environment with `pip install .`."""
    programs = environment_of(tmp_path_factory.mktemp("installed") / "venv")
    uv("pip", "install", "--no-deps", "--python", programs / "python", source)
    return programs


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A folder of a project that has packages of our names."""
    for name in ("policy", "eval", "quant"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('not the one of the commands')")
    return tmp_path


def shell(programs: Path) -> dict[str, str]:
    """The environment of a shell in which these programs are found by name."""
    return {"PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', '')}", "PYTHONPATH": "", "VIRTUAL_ENV": ""}


def test_a_run_its_report_and_its_export_in_a_folder_with_packages_of_our_names(installed, elsewhere, command):
    env = shell(installed)

    def here(line, **settings):
        return command([installed / line.split()[0], *line.split()[1:]], cwd=elsewhere, env=env, **settings)

    launched = here(f"mpq-search {RUN} --search --max_steps 8 --seed 0 --run_id one --cpus_per_trial 1")
    run = elsewhere / "output" / "digits" / "default" / "one"
    record = json.loads((run / "result.json").read_text())
    assert record["status"] == "finished" and record["commit"] is None
    assert record["versions"]["mpq-search"] == "0.1.0"
    (told,) = [line for line in launched.out.splitlines() if line.startswith("Tables and figures: ")]
    assert told == f"Tables and figures: mpq-report {run.parent}"
    here(f"{told.partition(': ')[2]} --no_plots --html {elsewhere}/page.html")
    assert "<table" in (elsewhere / "page.html").read_text()
    here(f"mpq-export {run} --format packed --no_evaluate")
    assert list((run / "export" / "packed").glob("*.safetensors"))


def test_what_is_wrong_is_one_line_of_every_command(installed, elsewhere, command):
    for name in COMMANDS:
        ended = command([installed / name, "--no_such_flag"], cwd=elsewhere, env=shell(installed), code=2)
        assert len(ended.err.strip().splitlines()) == 1 and "Traceback" not in ended.err, name
    shadowed = {**shell(installed), "PYTHONPATH": str(elsewhere)}
    ended = command([installed / "mpq-report", "output"], cwd=elsewhere, env=shadowed, code=2)
    assert len(ended.err.strip().splitlines()) == 1
    assert f"another package 'quant', {elsewhere / 'quant'}" in ended.err


def test_every_documented_name_can_be_imported(installed, elsewhere, command):
    found = [node for block in blocks("python") for node in ast.walk(ast.parse(block.text))]
    lines = {ast.unparse(node) for node in found if isinstance(node, ast.Import | ast.ImportFrom)}
    assert "from eval import load_model" in lines
    files = (
        "from eval.report.html import page; from quant.kernels.native import SOURCE; assert SOURCE.is_file(), SOURCE"
    )
    command([installed / "python", "-P", "-c", "\n".join([*sorted(lines), files])], cwd=elsewhere, env=shell(installed))


def test_an_editable_installation_runs_the_code_as_it_stands(source, tmp_path, elsewhere, command):
    programs = environment_of(tmp_path / "venv")
    uv("pip", "install", "--no-deps", "--python", programs / "python", "--editable", source)
    line = "import eval.config.parser, policy.space, eval_parallel as it; print(it.__file__)"
    ended = command([programs / "python", "-P", "-c", line], cwd=elsewhere, env=shell(programs))
    assert Path(ended.last_line).parent == source
    ended = command([programs / "mpq-report", "nowhere"], cwd=elsewhere, env=shell(programs), code=2)
    assert "DIR" in ended.err and "nowhere" in ended.err


def test_all_that_it_depends_on_is_to_be_had(source, tmp_path):
    """In an environment that knows nothing: what would be installed, at the tested versions, extras and all."""
    uv("venv", "--python", sys.executable, tmp_path / "bare")
    python, everything = tmp_path / "bare" / "bin" / "python", f"{source}[export,tracking,bench,docs,dev]"
    told = uv("pip", "install", "--dry-run", "--python", python, "-c", source / "requirements.txt", everything)
    assert "torch==2" in told and "onnxruntime==" in told and "mpq-search" in told

"""What `pip install .` puts into an environment is all that the packages need: modules, other files, dependencies."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mpq_commands

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOOLS = PROJECT["tool"]["setuptools"]
REQUIRED = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
EXTRAS = {
    name: [Requirement(line) for line in lines]
    for name, lines in PROJECT["project"]["optional-dependencies"].items()
}  # fmt: skip
OF_AN_EXTRA = {
    **dict.fromkeys(
        ("compressed_tensors", "gguf", "ml_dtypes", "onnx", "onnxruntime", "onnxscript", "torchao"), "export"
    ),
    "executorch": "executorch",
    "wandb": "tracking",
}
"""what is imported where single flags ask for it alone -> the extra that brings it"""


def sources() -> list[Path]:
    modules = [ROOT / f"{name}.py" for name in TOOLS["py-modules"]]
    return [*modules, *(path for name in mpq_commands.PACKAGES for path in sorted((ROOT / name).rglob("*.py")))]


def imported(path: Path) -> Iterator[str]:
    """Top-level names that a file imports, wherever in it, but those of Python and ours."""
    for node in ast.walk(ast.parse(path.read_text())):
        found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
        names = {name.partition(".")[0] for name in found}
        yield from names - {*sys.stdlib_module_names, *mpq_commands.PACKAGES, *TOOLS["py-modules"]}


def names(requirements: list[Requirement]) -> set[str]:
    return {canonicalize_name(one.name) for one in requirements}


def test_every_import_is_of_a_declared_dependency():
    owners = packages_distributions()
    for path in sources():
        for name in imported(path):
            if name in OF_AN_EXTRA:
                assert canonicalize_name(name) in names(EXTRAS[OF_AN_EXTRA[name]]), f"{path}: {name}"
            else:
                assert {canonicalize_name(owner) for owner in owners[name]} & names(REQUIRED), f"{path}: {name}"


def test_every_requirement_is_a_range_that_holds_its_tested_version():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    tested = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    declared = [*REQUIRED, *(one for extra in EXTRAS.values() for one in extra)]
    for requirement in declared:
        assert str(requirement.specifier).startswith((">=", "<")), requirement
        assert requirement.specifier.contains(tested[canonicalize_name(requirement.name)]), requirement
    assert len(tested) == len(pins) and tested.keys() == names(declared)


def test_every_file_of_a_package_is_installed():
    assert TOOLS["packages"]["find"] == {"include": [f"{name}*" for name in mpq_commands.PACKAGES], "namespaces": False}
    given = {
        path
        for package, patterns in TOOLS["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    files = [path for name in mpq_commands.PACKAGES for path in (ROOT / name).rglob("*")]
    files = [path for path in files if path.is_file() and "__pycache__" not in path.parts]
    assert given and all(path in given or path.suffix == ".py" for path in files)
    assert all((path.parent / "__init__.py").is_file() for path in files), "a folder that setuptools would leave out"


def test_every_console_command_is_one_that_messages_name():
    from eval.commands import COMMANDS

    targets = PROJECT["project"]["scripts"]
    assert targets.keys() == COMMANDS.keys()
    for target in targets.values():
        module, _, function = target.partition(":")
        assert module == "mpq_commands" and callable(getattr(mpq_commands, function))


@pytest.mark.parametrize("kind", ["package", "module"])
def test_a_foreign_package_of_one_of_our_names_is_told_of_in_one_line(tmp_path, monkeypatch, capsys, kind):
    foreign = tmp_path / ("policy/__init__.py" if kind == "package" else "policy.py")
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_text("raise RuntimeError")
    monkeypatch.delitem(sys.modules, "policy", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as ended:
        mpq_commands.start("eval.eval_parse")
    told = capsys.readouterr().err
    where = foreign.parent if kind == "package" else foreign
    assert ended.value.code == 2 and told.count("\n") == 1
    assert f"another package 'policy', {where}, before ours" in told

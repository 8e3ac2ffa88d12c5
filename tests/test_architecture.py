"""The shape of the tree: imports go one way and in no circle, folders stay small, nothing is stored as a pickle."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ("quant", "cost", "policy", "trainer", "eval", "eval_parallel")
"""an import may only go to the left"""
TORCH_FREE = ("quant.formats", "eval.config.parser", "eval.eval_run", "eval.eval_parse", "eval_parallel")
"""flags are checked, and reports made, without the seconds that importing torch takes"""


def imported_modules(source: str, package: str = "") -> Iterator[str]:
    """Dotted names of every module that `source` imports, at any depth; relative ones resolved against `package`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: -(node.level - 1) or None] if node.level else []
            yield ".".join([*parents, *([node.module] if node.module else [])])


def wrong_way(source: str, package: str) -> list[str]:
    """The imports of `source` that go to the right in ORDER."""
    rank = ORDER.index(package.split(".")[0])
    return [name for name in imported_modules(source, package) if name.split(".")[0] in ORDER[rank + 1 :]]


def source_files() -> list[Path]:
    folders = [path for name in ORDER for path in sorted((ROOT / name).rglob("*.py"))]
    return [*folders, *(path for name in ORDER if (path := ROOT / f"{name}.py").exists())]


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way_and_need_no_pickle(path):
    source = path.read_text()
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1]) or path.stem
    assert not wrong_way(source, package)
    assert not {"pickle", "dill", "cloudpickle", "joblib"} & {name.split(".")[0] for name in imported_modules(source)}


def test_the_rule_sees_what_it_forbids():
    assert wrong_way("def f():\n    from policy.solve import solve_assignment", "quant") == ["policy.solve"]
    assert wrong_way("import quant.formats, eval_parallel", "eval") == ["eval_parallel"]
    assert not wrong_way("from . import formats\nfrom quant import errors", "quant")
    assert list(imported_modules("from ..solve import x", "policy.sub")) == ["policy.solve"]


LOOKING = {"importlib.util", "importlib.metadata"}
"""modules that look for a package without importing it"""


def detours(source: str) -> list[str]:
    """What `source` could import modules with whose names stand in strings, unseen by the other rules."""
    named = [name for name in imported_modules(source) if name.split(".")[0] in ("runpy", "importlib")]
    return [name for name in named if name not in LOOKING] + (["__import__"] if "__import__(" in source else [])


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_is_imported_past_these_rules(path):
    if path != ROOT / "quant" / "lazy.py":  # public and earlier names of our own packages, checked by the next test
        assert not detours(path.read_text())


def test_the_names_that_packages_offer_are_of_their_own_modules():
    for package in ORDER[:-1]:
        tree = ast.parse((ROOT / package / "__init__.py").read_text())
        named = [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        modules = [text for text in named if text.split(".")[0] in ORDER and "." in text]
        assert modules and all(text.split(".")[0] == package for text in modules)


def import_graph() -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports anywhere: at the top, in functions, for type checkers."""
    modules = {module_name(path): path for path in source_files()}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {f"{node.module}.{alias.name}" for alias in node.names} & modules.keys() or {node.module}
        graph[name] = (found & modules.keys()) - {name}
    return graph


def module_name(path: Path) -> str:
    """'quant.kernels' for quant/kernels/__init__.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def circles(graph: dict[str, set[str]]) -> list[str]:
    """The modules that import themselves by way of others; Python's own topological sort names one circle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_file_imports_itself_by_way_of_others():
    assert not circles(import_graph())


def test_a_circle_and_a_detour_are_seen():
    assert set(circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}
    assert detours("import runpy\nfrom importlib import import_module\nimport importlib.util") == ["runpy", "importlib"]
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


MOST_FILES = 20


def test_no_folder_holds_more_files_than_can_be_read_at_a_glance():
    folders = [path for name in ORDER[:-1] for path in [ROOT / name, *(ROOT / name).rglob("*/")]]
    assert {str(f.relative_to(ROOT)): n for f in folders if (n := len(list(f.glob("*.py")))) > MOST_FILES} == {}


def test_tests_mirror_the_packages():
    """Every folder of tests below tests/PACKAGE is the folder of a package, by the same name."""
    for name in ORDER[:-1]:
        for folder in (ROOT / "tests" / name).rglob("*/"):
            if folder.name != "__pycache__":
                assert (ROOT / folder.relative_to(ROOT / "tests")).is_dir(), folder


@pytest.mark.parametrize("name", TORCH_FREE)
def test_importing_needs_no_torch(name):
    code = f"import sys, {name}; print(*sorted({{'torch', 'transformers', 'ray'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


LOADERS = {"from_pretrained", "from_config", "load_dataset", "load_dataset_builder", "load_metric"}
"""what transformers and datasets read a model or data with, and may find code beside it"""


def loaders_that_may_run_code(source: str) -> list[str]:
    """Where `source` names a loader (called, or handed on to `from_anywhere`) without `trust_remote_code=False`."""
    tree = ast.parse(source)
    guarded: set[ast.AST] = set()
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        given = {word.arg: getattr(word.value, "value", None) for word in call.keywords}
        if given.get("trust_remote_code") is False:
            guarded.update((call.func, *call.args))
    named = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in LOADERS)
    return [f"line {node.lineno}: {ast.unparse(node)}" for node in named if node not in guarded]


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_loader_runs_code_that_a_model_brings(path):
    assert not loaders_that_may_run_code(path.read_text())


def test_the_guard_sees_loaders_called_and_handed_on():
    assert loaders_that_may_run_code("AutoConfig.from_pretrained(folder)") == ["line 1: AutoConfig.from_pretrained"]
    assert loaders_that_may_run_code("load(AutoConfig.from_pretrained, folder, trust_remote_code=None)")
    assert loaders_that_may_run_code("f(trust_remote_code=False)(Auto.from_config(settings))")
    assert not loaders_that_may_run_code("load(AutoConfig.from_pretrained, folder, trust_remote_code=False)")
    assert not loaders_that_may_run_code("AutoModel.from_config(settings, trust_remote_code=False)")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout, which knows the files that are kept")
def test_no_data_or_weights_are_kept():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    kept = [ROOT / name for name in listed.split("\0") if name]
    assert len(kept) > 100
    assert not [path.name for path in kept if path.is_file() and path.stat().st_size > 2**20]

"""The shape of the tree: imports go one way, and nothing we write or read is a pickle."""

import ast
import subprocess
import sys
from collections.abc import Iterator
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

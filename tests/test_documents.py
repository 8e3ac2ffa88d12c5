"""Checks that what the documents name exists: files, links, flags, make targets, modules.

tests/journeys/test_documents.py runs their commands and programs.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from eval.commands import COMMANDS
from eval.config.parser import make_parser, read_flags
from tests.documents import DOCUMENTS, ROOT, blocks, headings, inline_code, links, notebooks, shell_lines

FOREIGN = {
    "--help": "all of ours",
    "--nproc_per_node": "torchrun",
    "--logdir": "tensorboard",
    "--generate": "ray get-auth-token",
    **dict.fromkeys(("--address", "--min-nodes", "--nodes", "--ntasks", "--ip-address"), "ray symmetric-run, srun"),
    **dict.fromkeys(("--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--exclusive"), "sbatch"),
}
"""flags of other programs in our documents -> whose"""
CHROMIUM = shutil.which("chromium")
LAUNCHES = ("eval_parallel.py", "eval/eval_run.py", "mpq-search", "mpq-run")


def flags_of_a_run() -> set[str]:
    return set(make_parser()._option_string_actions)


def flags_of(file: Path) -> set[str]:
    """The flags of a command with a parser of its own."""
    text = file.read_text()
    switches = [f"--{form}{name}" for name in re.findall(r'add_switch\("(\w+)"', text) for form in ("", "no_")]
    return {*re.findall(r'"(--\w+)"', text), *switches}


def file_of_module(name: str) -> Path:
    """What `python -m name` runs."""
    path = ROOT / name.replace(".", "/")
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def test_every_flag_in_a_document_is_one():
    ours = flags_of_a_run().union(*(flags_of(path) for path in (ROOT / "eval").rglob("*.py")))
    ours |= set().union(*(flags_of(path) for path in (ROOT / "benchmarks").glob("*.py")))
    for document in DOCUMENTS:
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", document.read_text()):
            assert flag in ours or flag in FOREIGN, f"{document.name}: {flag}"
    assert not {flag for flag in FOREIGN if flag != "--help"} & ours


@pytest.mark.parametrize("line", shell_lines(), ids=lambda line: f"{line.name} {' '.join(line.words)[:60]}")
def test_every_command_line_has_flags_of_its_own_command(line):
    """A flag of another command does not count, such as `mpq-report --max_steps 3`."""
    words = list(line.words)
    places = [at for at, word in enumerate(words) if word.endswith(LAUNCHES)]
    if places:
        given = [word for word in words[places[0] + 1 :] if word != "..."]
        assert {"--config", "--resume", "--resolve", "--help"} & set(given) or read_flags(given).task
    for name, script in COMMANDS.items():
        if not {name, script[-1]} & set(words) or name in ("mpq-search", "mpq-run"):
            continue
        known = flags_of(ROOT / script[0] if script[0] != "-m" else file_of_module(script[1]))
        known |= flags_of_a_run() if name == "mpq-sensitivity" else {"--help"}
        assert {word for word in words if word.startswith("--")} <= known


def test_the_kubernetes_job_starts_a_launch_of_ours():
    (manifest,) = (block for block in blocks("yaml") if block.text.startswith("apiVersion"))
    command = yaml.safe_load(manifest.text)["spec"]["entrypoint"].split()
    assert command[0] == "python" and command[1].endswith("/eval_parallel.py")
    assert read_flags(command[2:]).task == "mrpc"


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "benchmarks" / "RESULTS.md"], ids=lambda path: path.name)
def test_every_relative_link_leads_to_a_file_and_a_heading(document):
    for link in links(document):
        if not link.startswith(("http:", "https:")):
            path, _, anchor = link.partition("#")
            target = (document.parent / path).resolve() if path else document
            assert target.exists(), f"{document.name}: {link}"
            assert not anchor or anchor in headings(target), f"{document.name}: {link}"


def test_the_readme_is_read_in_a_sitting():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_notebooks_are_kept_without_outputs():
    found = [path for path in (ROOT / "docs").rglob("*.ipynb")]
    assert len(found) >= 2
    for path in found:
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        assert not any(cell["outputs"] or cell["execution_count"] for cell in cells), path.name


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material", reason="the extra 'docs' is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


def test_the_site_holds_every_page_and_loads_nothing_from_a_network(site):
    pages = [path.relative_to(ROOT / "docs").with_suffix(".html") for path in DOCUMENTS[2:] + list(notebooks())]
    index = json.loads((site / "search" / "search_index.json").read_text())
    searched = {entry["location"].partition("#")[0] for entry in index["docs"]}
    for page in (*pages, Path("benchmarks/RESULTS.html"), Path("CONTRIBUTING.html")):
        html = (site / page).read_text()
        assert not re.findall(r"<(?:script|link|img|iframe)[^>]*https?://[^>]*>", html), page
        assert str(page) in searched
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert not [str(path) for path in DOCUMENTS[2:] if f"{path.relative_to(ROOT / 'docs')}\n" not in navigation]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_search_works_in_a_page_opened_as_a_file(site):
    page = f"{(site / 'index.html').as_uri()}?q=knapsack"
    browser = [CHROMIUM, "--headless", "--no-sandbox", "--virtual-time-budget=10000", "--dump-dom", page]
    shown = subprocess.run(browser, capture_output=True, text=True, timeout=120, check=False).stdout
    assert re.search(r"[1-9]\d* matching documents", shown)


def looks_like_a_file_of_ours(text: str) -> bool:
    folders = [path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "." and path.name != "output"]
    return bool(
        re.fullmatch(rf"(?:{'|'.join(map(re.escape, folders))})/[\w./*-]*|[\w-]+\.(?:py|md|toml)|\.ci/\w+", text)
    )


def test_every_file_in_a_document_exists():
    named = [(document, word) for document, text in inline_code() for word in text.split() if "output" not in word]
    named += [(ROOT / line.name.split(":")[0], word) for line in shell_lines() for word in line.words]
    checked = 0
    for document, word in named:
        if looks_like_a_file_of_ours(word) and word.rstrip("/").split("/")[-1] not in WRITTEN_BY_RUNS:
            found = list(ROOT.glob(word)) or list(document.parent.glob(word))
            assert found, f"{document.name}: {word}"
            checked += 1
    assert checked > 20


def test_every_path_in_the_texts_for_developers_exists():
    """Also where a path is a part of a table's cell or of a picture."""
    found = 0
    for document in (ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md"):
        for path in re.findall(r"(?<![\w/.])(?:[a-z_]+/)+(?:[\w.-]+\.\w+)?", document.read_text()):
            folder, _, _ = path.partition("/")
            if (ROOT / folder).is_dir():
                assert (ROOT / path).exists(), f"{document.name}: {path}"
                found += 1
    assert found > 60


def test_names_that_the_texts_for_developers_place_in_a_file_are_there():
    found = 0
    for document in (ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md"):
        for name, path in re.findall(r"`(\w+)`\s(?:in|of)\s`([\w/.]+\.py)`", document.read_text()):
            defined = rf"^ *(?:def|class) {name}\b|^{name}\b.* = |^ *{name}: "
            assert re.search(defined, (ROOT / path).read_text(), re.MULTILINE), f"{document.name}: {name} in {path}"
            found += 1
    assert found >= 12


def messages() -> str:
    """Every string of the packages, with placeholders cut out: what an error message is made of."""
    parts = []
    for path in (
        file for name in ("quant", "cost", "policy", "trainer", "eval") for file in (ROOT / name).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts.append(node.value)
    return "\n".join([*parts, (ROOT / "mpq_commands.py").read_text()])


def test_troubleshooting_quotes_messages_that_there_are():
    ours = messages()
    lines = (ROOT / "docs" / "troubleshooting.md").read_text().splitlines()
    quoted = [code for line in lines if line.startswith("| ") for code in re.findall("`([^`]+)`", line.split(" | ")[0])]
    assert len(quoted) > 90
    for part in (part.strip() for code in quoted for part in code.split("...")):
        assert part in ours, part


WRITTEN_BY_RUNS = {"README.md"}
"""also a file that our commands write"""


def test_every_make_target_and_module_in_a_document_exists():
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        text = document.read_text()
        for target in re.findall(r"(?:`|^ *)make ([a-z][\w-]*)", text, re.MULTILINE):
            assert target in targets, f"{document.name}: make {target}"
        for module in re.findall(r"python -m ([a-z_]+(?:\.[a-z_0-9]+)+)", text):
            assert file_of_module(module).is_file(), f"{document.name}: {module}"
    assert subprocess.run(["make", "-n", "help"], cwd=ROOT, capture_output=True, check=False).returncode == 0

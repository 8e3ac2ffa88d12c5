"""Reads README.md, CONTRIBUTING.md and docs/: their fenced blocks, command lines, inline code, headings and links."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELLS = ("", "sh", "bash", "console")
"""languages of a block of command lines; one without a language is such a block"""
BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        """Where it stands."""
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """The blocks of all documents in one of `languages`."""
    return [block for document in DOCUMENTS for block in _blocks(document) if block.language in languages]


def _blocks(document: Path) -> Iterator[Block]:
    text = document.read_text()
    for found in BLOCK.finditer(text):
        yield Block(document, text.count("\n", 0, found.start()) + 2, found["language"], found["text"])


def headings(document: Path) -> set[str]:
    """The anchors of a document: its headings as GitHub and MkDocs make names of them."""
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def links(document: Path) -> list[str]:
    """Targets of the links and pictures of a document."""
    return re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", document.read_text()))


def notebooks() -> dict[Path, list[str]]:
    """The programs of each notebook, cell by cell."""
    found = {path: json.loads(path.read_text()) for path in sorted((ROOT / "docs").rglob("*.ipynb"))}
    return {
        path: ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
        for path, book in found.items()
    }


@dataclass(frozen=True)
class Line:
    """A command line of a block, continued lines joined, without its comment."""

    name: str
    words: tuple[str, ...]


def shell_lines() -> list[Line]:
    """All command lines of all documents; of a script for a job manager, its lines."""
    lines = []
    for block in blocks(*SHELLS):
        if re.match(r"[\w/]+:\n|.* <- ", block.text):  # a listing
            continue
        for command in block.text.replace("\\\n", " ").splitlines():
            if words := shlex.split(command.removeprefix("$ "), comments=True):
                lines.append(Line(block.name, tuple(words)))
    return lines


def inline_code() -> list[tuple[Path, str]]:
    """(document, text) of everything between backticks outside blocks, and what links lead to."""
    found = []
    for document in DOCUMENTS:
        prose = BLOCK.sub("", document.read_text())
        found += [(document, text) for text in re.findall(r"`([^`\n]+)`", prose)]
        found += [(document, target) for target in re.findall(r"\]\(([^)#]+)\)", prose)]
    return found

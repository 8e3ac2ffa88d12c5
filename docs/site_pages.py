"""MkDocs hook: pages of the site that are not files of docs/.

Adds the repository's RESULTS.md, SPEED.md, CONTRIBUTING.md and CHANGELOG.md, and a page for each notebook. Links are
written so that they work on GitHub; here they are changed to lead to these pages.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
FROM_THE_ROOT = ("benchmarks/RESULTS.md", "benchmarks/SPEED.md", "CONTRIBUTING.md", "CHANGELOG.md")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages to MkDocs' files."""
    for name in FROM_THE_ROOT:
        text = re.sub(r"\]\((?:\.\./)?docs/", "](../" if "/" in name else "](", (ROOT / name).read_text())
        files.append(File.generated(config, name, content=text))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        text = as_markdown(json.loads(notebook.content_string), Path(notebook.src_uri).name)
        files.append(File.generated(config, notebook.src_uri.removesuffix(".ipynb") + ".md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **others: Any) -> str:
    """Lead links from docs/ to files of the repository to the pages made of them."""
    for name in FROM_THE_ROOT:
        markdown = markdown.replace(f"](../{name}", f"]({name}")
    return markdown


def as_markdown(notebook: dict[str, Any], name: str) -> str:
    """A notebook's texts and programs."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join([*parts, f"Run it yourself: [{name}]({name})", ""])

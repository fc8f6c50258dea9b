"""MkDocs hooks: the site also has README.md, the notebook, and the files to which pages link.

The pages are written to be read in the repository, too. There a link leads to a file outside of
``docs/``; on the site this file is below ``repository/``.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OUTSIDE = "repository"
# The target of a Markdown link, or of a picture in HTML.
TARGET = re.compile(r'(\]\(|(?:src|srcset|href)=")(?!https?:|mailto:|data:|#)([^)"#\s]+)')


def on_files(files: Files, config: Any) -> Files:
    """Add the front page, the notebook as a page, and whatever pages link to."""
    pages = {"index.md": (ROOT / "README.md", (ROOT / "README.md").read_text(encoding="utf-8"))}
    notebook = ROOT / "docs" / "quickstart.ipynb"
    pages["quickstart.md"] = (notebook, as_markdown(json.loads(notebook.read_text("utf-8"))))
    for file in list(files.documentation_pages()):
        source = Path(file.abs_src_path)
        pages[file.src_uri] = (source, source.read_text(encoding="utf-8"))
        files.remove(file)
    while pages:
        uri, (source, text) = pages.popitem()
        text, linked = moved(text, uri, source)
        files.append(File.generated(config, uri, content=text))
        for target, path in linked.items():
            if files.get_file_from_path(target) or target in pages:
                continue
            if path.suffix == ".md":
                pages[target] = (path, path.read_text(encoding="utf-8"))
            else:
                files.append(File.generated(config, target, abs_src_path=str(path)))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name things in the way of Sphinx; on the site only the name is of interest."""
    return re.sub(r":(?:class|func|meth|mod|data|attr):(?=<code>)", "", html)


def moved(text: str, uri: str, source: Path) -> tuple[str, dict[str, Path]]:
    """The page with links as on the site, and the files outside of ``docs/`` among their targets.

    Args:
        text: its Markdown.
        uri: its place on the site.
        source: its file in the repository, from which its links start.
    """
    outside: dict[str, Path] = {}

    def replaced(match: re.Match[str]) -> str:
        path = Path(posixpath.normpath(source.parent / match[2]))
        if not path.is_relative_to(ROOT) or not path.is_file():
            return match[0]  # mkdocs build --strict complains
        inside = place(path)
        if inside.startswith(f"{OUTSIDE}/"):
            outside[inside] = path
        return match[1] + posixpath.relpath(inside, posixpath.dirname(uri) or ".")

    return TARGET.sub(replaced, text), outside


def place(path: Path) -> str:
    """Where a file of the repository is on the site."""
    name = path.relative_to(ROOT).as_posix()
    if name == "README.md":
        return "index.md"
    if name == "docs/quickstart.ipynb":
        return "quickstart.md"
    return name.removeprefix("docs/") if name.startswith("docs/") else f"{OUTSIDE}/{name}"


def as_markdown(notebook: dict[str, Any]) -> str:
    """A notebook with its outputs."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            shown = "".join(output.get("text", data.get("text/plain", [])))
            if "image/png" in data:
                parts.append(f"![Output](data:image/png;base64,{''.join(data['image/png'])})")
            elif shown:
                parts.append(f"```text\n{shown.rstrip()}\n```")
    return "\n\n".join(parts)

"""MkDocs hook: add the documents and pictures that lie outside docs/ and the diagrams' program to the site.

A relative link in a document is one between files of the repository, so that it works on a code host. Here each is
turned into a link between pages of the site. A file that is no page, for instance a source file, loses its link.

Diagrams are Mermaid source. The theme would fetch mermaid.js from elsewhere when a page is opened, unless the page has
loaded it already: so that the site works without a network, pages with a diagram load a copy of the package mermaidx.
"""

from __future__ import annotations

import importlib.util
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# README.md is the first page; everything else keeps its path in the repository, and docs/ is the site's root.
BENCHMARKS = [f"benchmarks/{path.name}" for path in sorted((ROOT / "benchmarks").glob("*.md"))]
OUTSIDE = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *BENCHMARKS]
PAGES = {path: "index.md" if path == "README.md" else path for path in OUTSIDE}
PICTURES = [f"benchmarks/{path.name}" for path in sorted((ROOT / "benchmarks").glob("*.svg"))]
MERMAID = "assets/mermaid.min.js"
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures from outside docs/, and mermaid.js."""
    for path, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text(encoding="utf-8")))
    for path in PICTURES:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    package = importlib.util.find_spec("mermaidx")
    if package is None or package.origin is None:
        raise PluginError("mermaidx is not installed: install requirements-docs.txt")
    program = Path(package.origin).parent / "assets" / "mermaid.js"
    files.append(File.generated(config, MERMAID, abs_src_path=str(program)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links between files into links between pages."""
    here = page.file.src_uri
    source = next((path for path, name in PAGES.items() if name == here), f"docs/{here}")

    def replace(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if (ROOT / path).is_dir():
            path = posixpath.join(path, "README.md")
        name = PAGES.get(path) or path.removeprefix("docs/")
        if files.get_file_from_path(name) is None:
            if (ROOT / path).exists() and not image:
                return text
            return match.group()  # leads nowhere: mkdocs will say so
        return f"{image}[{text}]({posixpath.relpath(name, posixpath.dirname(here) or '.')}{anchor or ''})"

    return _LINK.sub(replace, markdown)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Load mermaid.js where the page has diagrams."""
    diagrams = page.markdown.count("```mermaid")
    if output.count('<pre class="mermaid">') != diagrams:
        raise PluginError(f"{page.file.src_uri} would show its diagrams as text: see custom_fences in mkdocs.yml")
    if not diagrams:
        return output
    address = posixpath.relpath(MERMAID, posixpath.dirname(page.file.dest_uri) or ".")
    return output.replace("</head>", f'<script src="{address}"></script></head>', 1)

"""What mkdocs needs beside the pages: the README as the front page, and files outside of docs/ that pages link.

A page's links are right where it stands in the repository. In the site, ``docs/`` is the root: links that lead out of
it are cut, and what they lead to is put there.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[\w-]+)?\))")


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the pages of the root, and the files that pages link outside of docs/."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for folder, kinds in (("benchmarks/results", "*.*"), ("examples", "*.py")):
        for path in sorted((ROOT / folder).glob(kinds)):
            files.append(File.generated(config, f"{folder}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links as they are in the repository into links of the site."""
    there = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    here = posixpath.dirname(page.file.src_uri)
    back = {f"docs/{name}": name for name in PAGES} | {source: name for name, source in PAGES.items()}

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(there), link[2]))
        target = "docs/evidence.md" if target == "benchmarks/results" else target
        target = back.get(target, target.removeprefix("docs/"))
        return f"{link[1]}{posixpath.relpath(target, here or '.')}{link[3]}"

    return LINK.sub(moved, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name things as Sphinx does, which mkdocstrings leaves in the text."""
    return re.sub(r":(?:class|func|meth|attr|mod):(?=<code>)", "", html)

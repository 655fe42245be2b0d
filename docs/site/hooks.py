"""What MkDocs does beside its settings (mkdocs.yml).

Pages link to files of the checkout that lie outside `docs/`: examples, results, pictures of results. GitHub follows
such links; here each of these files becomes a part of the site, below `source/`, so that the site is whole without a
repository. Paths of pages in docstrings (docs/...) become links, too.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
SOURCE = "source"
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(?=[#)])")


def origin(uri: str) -> Path:
    """Where in the checkout a page of the site comes from."""
    path = Path(uri)
    return ROOT / path.relative_to(SOURCE) if path.parts[0] == SOURCE else DOCS / path


def target(link: str, uri: str) -> Path:
    """The file that a link in a page means."""
    return Path(os.path.normpath(origin(uri).parent / link))


def place(path: Path) -> str:
    """Where in the site a file of the checkout is: a page, or the file itself."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    uri = f"{SOURCE}/{path.relative_to(ROOT).as_posix()}"
    return f"{uri}.md" if path.suffix == ".py" else uri


def content(path: Path) -> str | bytes:
    if path.suffix == ".py":
        code = path.read_text()
        return f"---\nsearch:\n  exclude: true\n---\n# {path.relative_to(ROOT)}\n\n```python\n{code}```\n"
    return path.read_text() if path.suffix == ".md" else path.read_bytes()


def present(nav: list[Any]) -> list[Any]:
    """The navigation without pages that are not there.

    A misspelt name shows all the same: its page is missing in the navigation then, which is an error.
    """
    kept = []
    for entry in nav:
        ((title, what),) = entry.items()
        if isinstance(what, list):
            kept.append({title: present(what)})
        elif (DOCS / what).exists():
            kept.append(entry)
    return kept


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.nav = present(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what pages link to outside `docs/`, and what these link to in turn."""
    left = [(file.src_uri, file.content_string) for file in files.documentation_pages()]
    while left:
        uri, text = left.pop()
        for link in LINK.findall(text):
            path = target(link, uri)
            if path.is_relative_to(DOCS) or not path.is_file() or files.get_file_from_path(place(path)):
                continue  # a link that leads nowhere is left for MkDocs to report
            made = content(path)
            files.append(File.generated(config, place(path), content=made, inclusion=InclusionLevel.NOT_IN_NAV))
            if path.suffix == ".md":
                left.append((place(path), str(made)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links to files of the checkout, as links to where they are in the site. The first page has no columns."""
    here = Path(page.file.src_uri).parent
    if page.is_homepage:
        page.meta["hide"] = ["navigation", "toc"]

    def moved(link: re.Match[str]) -> str:
        path = target(link[1], page.file.src_uri)
        return os.path.relpath(place(path), here) if path.is_relative_to(ROOT) else link[1]

    return LINK.sub(moved, markdown)


def on_page_content(html: str, page: Page, files: Files, **_: Any) -> str:
    """In the reference, names of pages as links to them."""
    if not page.file.src_uri.startswith("reference/"):
        return html

    def linked(name: re.Match[str]) -> str:
        file = files.get_file_from_path(name[1])
        return f'<a href="{file.url_relative_to(page.file)}">{name[0]}</a>' if file else name[0]

    return re.sub(r"\bdocs/([\w/-]+\.md)\b", linked, html)

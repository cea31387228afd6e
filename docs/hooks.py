"""What mkdocs does besides: files that stand outside of docs/, formulas, and a look at the API pages.

The pages are written for a reader on a code host, who can follow a link to any file of the repository. On the
site README.md is the home page, the changelog and the guide for contributors are pages too, and a link to any
other file leads to a page with its text.
"""

import html
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import griffe
import latex2mathml.converter
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
FROM_ROOT = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[)#])")
FENCED = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)
LANGUAGES = {".py": "python", ".toml": "toml", ".yml": "yaml", ".md": "markdown"}
PUBLIC = ("gc_optax", "gc_optax.nnx", "gc_optax.keras")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages whose text is not in docs/."""
    check_api_pages()
    for name, page in FROM_ROOT.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    pages = [file for file in files if file.src_uri.endswith(".md")]
    linked = {path for file in pages for _, path in linked_files(file.src_uri, file.content_string)}
    for path in sorted(linked):
        if page := source_page(path):
            files.append(File.generated(config, page, content=show_source(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Leads the links to files of the repository to the pages that have them."""
    here = page.file.src_uri
    leads = {
        link: os.path.relpath(site_path(path), os.path.dirname(here) or ".")
        for link, path in linked_files(here, markdown)
    }
    parts = FENCED.split(markdown)
    parts[::2] = [LINK.sub(lambda link: leads.get(link[0], link[0]), text) for text in parts[::2]]
    return "".join(parts)


def on_page_content(content: str, **_: Any) -> str:
    """Writes formulas as MathML, which browsers show without a script."""

    def convert(found: re.Match[str]) -> str:
        display = "inline" if found["open"] == r"\(" else "block"
        return latex2mathml.converter.convert(html.unescape(found["formula"]), display=display)

    formulas = r'<(?P<tag>span|div) class="arithmatex">(?P<open>\\[([])(?P<formula>.*?)\\[)\]]</(?P=tag)>'
    return re.sub(formulas, convert, content, flags=re.DOTALL)


def linked_files(page: str, markdown: str) -> Iterator[tuple[str, pathlib.Path]]:
    """The links of a page that lead to files of the repository, as they are written, and the files."""
    names = {page: name for name, page in FROM_ROOT.items()}
    folder = (ROOT / names[page] if page in names else DOCS / page).parent
    for link in LINK.findall(markdown):
        path = (folder / link).resolve()
        if path.is_file() and path.is_relative_to(ROOT):
            yield link, path


def source_page(path: pathlib.Path) -> str | None:
    """The page that is made to show a file; none for what the site has anyway."""
    inside = path.is_relative_to(DOCS) or str(path.relative_to(ROOT)) in FROM_ROOT
    return None if inside else f"source/{path.relative_to(ROOT)}.md"


def site_path(path: pathlib.Path) -> str:
    """Where a file of the repository is on the site."""
    return source_page(path) or FROM_ROOT.get(str(path.relative_to(ROOT))) or str(path.relative_to(DOCS))


def show_source(path: pathlib.Path) -> str:
    """A page with the text of a file."""
    name, language = path.relative_to(ROOT), LANGUAGES.get(path.suffix, "text")
    text = path.read_text().rstrip("\n")
    return (
        f"---\ntitle: {name}\nsearch:\n  exclude: true\nhide: [toc]\n---\n\n"
        f"# `{name}`\n\n`````{language}\n{text}\n`````\n"
    )


def check_api_pages() -> None:
    """Fails for a public name that has no docstring, or that no page of docs/api shows."""
    shown = re.findall(r"^::: (\S+)", "\n".join(p.read_text() for p in (DOCS / "api").glob("*.md")), re.M)
    for member in public_members():
        if member.path not in shown:
            raise PluginError(f"no page of docs/api has `::: {member.path}`")
        if not member.has_docstring:
            raise PluginError(f"{member.path} has no docstring")


def public_members() -> Iterator[griffe.Object | griffe.Alias]:
    """What is the API: the public names of each module."""
    for module in PUBLIC:
        members = griffe.load(module, search_paths=[ROOT], resolve_aliases=True).members.values()
        yield from (member for member in members if member.is_public and member.path not in PUBLIC)

"""What docs/hooks.py makes of the pages; `make docs` builds the whole site, and fails for a broken link."""

import importlib.util
import pathlib
from types import SimpleNamespace

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("mkdocs", reason="what builds the site comes with the extra docs")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page(name):
    return SimpleNamespace(file=SimpleNamespace(src_uri=name))


@pytest.mark.parametrize(
    ("name", "link", "leads_to"),
    [
        ("index.md", "docs/axes.md#without-a-model", "axes.md#without-a-model"),
        ("index.md", "docs/gallery/quickstart.png", "gallery/quickstart.png"),
        ("index.md", "CHANGELOG.md", "changelog.md"),
        ("index.md", "LICENSE", "source/LICENSE.md"),
        ("axes.md", "../README.md#use", "index.md#use"),
        ("axes.md", "cost.md", "cost.md"),
        ("axes.md", "../tests/docs/test_site.py", "source/tests/docs/test_site.py.md"),
        ("api/index.md", "../pods.md", "../pods.md"),
        ("api/index.md", "../../examples/quickstart.py", "../source/examples/quickstart.py.md"),
        ("axes.md", "https://arxiv.org/abs/2004.01461", "https://arxiv.org/abs/2004.01461"),
        ("axes.md", "no_such_page.md", "no_such_page.md"),
        ("axes.md", "../../outside.md", "../../outside.md"),
    ],
)
def test_a_link_leads_to_where_the_site_has_the_file(hooks, name, link, leads_to):
    text = f"See [this]({link}), `x[0](y)`."
    assert hooks.on_page_markdown(text, page=page(name)) == f"See [this]({leads_to}), `x[0](y)`."


def test_a_source_page_has_the_whole_file(hooks):
    path = ROOT / "examples" / "quickstart.py"
    shown = hooks.show_source(path)
    assert "# `examples/quickstart.py`\n" in shown
    assert shown.endswith(f"`````python\n{path.read_text()}`````\n")


def test_formulas_become_mathml(hooks):
    html = r'<p>a <span class="arithmatex">\(x &lt; \eta\)</span> <div class="arithmatex">\[y\]</div></p>'
    shown = hooks.on_page_content(html)
    assert shown.startswith("<p>a <math ")
    assert shown.endswith("</math></p>")
    assert shown.count('display="inline"') == shown.count('display="block"') == 1
    assert "<mi>&#x003B7;</mi>" in shown
    assert "arithmatex" not in shown


def test_what_looks_like_a_link_in_code_stays(hooks):
    code = "```python\nf[0](../README.md)\n```\n"
    assert hooks.on_page_markdown(code + "[a](../README.md)", page=page("axes.md")) == code + "[a](index.md)"


def test_every_public_name_has_its_place_among_the_api_pages(hooks, monkeypatch, tmp_path):
    names = [member.path for member in hooks.public_members()]
    expected = {"gc_optax.centralize", "gc_optax.infer_axes", "gc_optax.optimizers"}
    expected |= {"gc_optax.nnx.infer_axes", "gc_optax.keras.centralized", "gc_optax.keras.infer_axes"}
    assert expected < set(names)
    assert not [name for name in names if "._" in name]
    hooks.check_api_pages()
    (tmp_path / "api").mkdir()
    (tmp_path / "api" / "one.md").write_text("".join(f"::: {name}\n" for name in names[1:]))
    monkeypatch.setattr(hooks, "DOCS", tmp_path)
    with pytest.raises(Exception, match=f"no page of docs/api has `::: {names[0]}`"):
        hooks.check_api_pages()


def test_a_public_name_without_a_docstring_is_refused(hooks, monkeypatch):
    bare = SimpleNamespace(path="gc_optax.centralize", has_docstring=False)
    monkeypatch.setattr(hooks, "public_members", lambda: iter([bare]))
    with pytest.raises(Exception, match=r"gc_optax\.centralize has no docstring"):
        hooks.check_api_pages()


def test_no_page_loads_a_script_from_elsewhere():
    settings = (ROOT / "mkdocs.yml").read_text()
    assert "polyfills: [iframe-worker.js]" in settings  # or the plugin `offline` adds an address
    assert (ROOT / "docs" / "iframe-worker.js").exists()

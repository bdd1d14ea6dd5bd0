"""The site is built without a warning, and no link in it is dead.

    pytest -m site tests/test_site.py     # builds it, minutes; needs ".[docs]"
"""
import sys
from importlib import import_module
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / ".ci"))
site = import_module("make_site")
NAMES = {"guidance": "parallel_rescale.method.guidance"}


def cell(source, **more): return nbformat.v4.new_code_cell(source, **more)


def test_directives_go_and_hidden_cells_are_folded_or_gone():
    assert site.shown(cell("#| export\nx = 1"), True).source == "x = 1"
    assert site.shown(cell("#| default_exp a.b"), False) is None
    assert site.shown(cell("#| hide\nimport os"), True).metadata["tags"] == ["hide-input"]
    assert site.shown(cell("#| hide\nimport os"), False) is None       # before the title
    assert site.shown(cell("#| hide\nclean_up()"), True) is None
    assert site.shown(cell("#| echo: false\nshow()"), True).metadata["tags"] == ["remove-input"]


def test_what_only_colab_needs_is_folded_and_its_badge_gone():
    folded = site.shown(cell('import sys\nif "google.colab" in sys.modules: pass'), True)
    assert folded.metadata["tags"] == ["hide-input"]
    badge = "[![Open in Colab](https://a.b/c.svg)](https://a.b/d.ipynb)"
    assert site.prose(f"# A\n\n{badge}\n\nB", "tutorials") == "# A\n\nB"


def test_progress_bars_and_the_word_on_the_device_are_not_shown():
    bar = nbformat.v4.new_output("display_data", {site.WIDGET: {"model_id": "1"}})
    device = nbformat.v4.new_output("stream", text="this chapter runs on: cpu\n")
    picture = nbformat.v4.new_output("display_data", {"image/png": ""})
    assert site.shown(cell("draw()", outputs=[bar, device, picture]), True).outputs == [picture]


@pytest.mark.parametrize("link, followed", [
    ("06_rules.ipynb", "06_rules.ipynb"), ("../index.ipynb", "../index.ipynb"), ("#here", "#here"),
    ("https://arxiv.org", "https://arxiv.org"), ("06_rules.ipynb#Try-it!", "06_rules.ipynb#try-it"),
    ("../../LICENSE", f"{site.REPOSITORY}/LICENSE")])
def test_links_out_of_the_notebooks_lead_to_the_repository(link, followed):
    assert site.from_site(link, "1_method") == followed


def test_names_of_the_package_lead_to_the_reference_but_not_in_code_or_links(monkeypatch):
    monkeypatch.setattr(site, "public_names", lambda: NAMES)
    link = "`guidance <parallel_rescale.method.guidance>`"
    assert site.with_references("see `guidance`") == f"see {{py:obj}}{link}"
    for text in ("`other`", "[`guidance`](x.ipynb)", "```\n`guidance`\n```", "# `guidance`", "`guidance(x)`"):
        assert site.with_references(text) == text
    assert site.in_rst("a_b * `guidance`s") == rf"a\_b \* :py:obj:{link}\ s"


def test_every_notebook_has_a_place_in_the_contents():
    listed = [name for part in site.PARTS for name in site.chapters(part)]
    all_names = {p.relative_to(site.NBS).with_suffix("").as_posix() for p in site.NBS.rglob("*.ipynb")
                 if ".ipynb_checkpoints" not in p.parts}
    assert len(listed) == len(set(listed)) and set(listed) == all_names - {"index"}


def test_a_dead_link_is_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#yes">1</a><a href="b.html#no">2</a><img src="c.png">')
    (tmp_path / "b.html").write_text('<p id="yes">')
    assert list(site.dead_links(tmp_path)) == [("a.html", "b.html#no"), ("a.html", "c.png")]


@pytest.mark.site
def test_the_site_is_built_and_no_link_is_dead(tmp_path):
    for needed in ("myst_nb", "sphinx_book_theme", "sphinx-mathjax-offline"): pytest.importorskip(needed)
    pages = site.build(tmp_path)
    assert list(site.dead_links(pages)) == []
    text = (pages / "1_method" / "06_rules.html").read_text(encoding="utf-8")
    assert "#| " not in text and "colab" in text and "theme" in text
    reference = (pages / "reference" / "method.html").read_text(encoding="utf-8")
    assert "parallel_rescale.method.rules.CFG" in reference

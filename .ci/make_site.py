"""The book as a site: `python .ci/make_site.py` writes _docs/html from nbs/ and the docstrings.

No cell is run: the outputs that are stored in the notebooks are shown. Cells marked `#| hide`, and Colab's,
are folded where they import what the chapter uses, and left out otherwise; links that lead out of nbs/ lead
to the repository; a public name in backticks leads to the reference. Sphinx takes every warning for an
error, so a dead link in the text is one; `dead_links` looks for those that Sphinx does not see.
"""
import inspect
import re
import shutil
import sys
from configparser import ConfigParser
from functools import cache
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlparse

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS, PACKAGE, BUILD = ROOT / "nbs", ROOT / "parallel_rescale", ROOT / "_docs"
CONFIG = ConfigParser(delimiters=["="])
CONFIG.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = CONFIG["DEFAULT"]
REPOSITORY = f"{SETTINGS['git_url']}/blob/{SETTINGS['branch']}"
WIDGET = "application/vnd.jupyter.widget-view+json"
CLI = "parallel_rescale.use.cli"          # its reference is what the commands say of themselves
PARTS = ["tutorials", "1_method", "2_machine", "3_subject", "4_world", "5_evidence", "6_use", "0_tools"]


# --- the order of the chapters ------------------------------------------------------------------

def chapters(part):
    "Names of the notebooks of a part, from nbs/, in the order of their numbers or of the index."
    names = [f"{part}/{path.stem}" for path in sorted((NBS / part).glob("*.ipynb"))]
    index = (NBS / "index.ipynb").read_text(encoding="utf-8")
    return names if part[0].isdigit() else sorted(names, key=lambda n: (index.rfind(f"({n}.ipynb)"), n))


def part_title(part):
    "What the index calls a part, in the heading of its rows: '1 · The method'."
    index = (NBS / "index.ipynb").read_text(encoding="utf-8")
    heads = re.findall(r"^\s*\"\| \*\*(.+?)\*\* \|", index, flags=re.M)
    number, _, word = part.rpartition("_")
    fallback = {"tutorials": "Tours", "tools": "Tools"}.get(word, f"{number} · The {word}")
    return next((head for head in heads if number != "0" and head.startswith(f"{number} ")), fallback)


def toctree(caption, names):
    return "\n".join(["```{toctree}", ":hidden:", ":maxdepth: 1", f":caption: {caption}", "", *names, "```"])


def contents():
    "The tables of contents of the side bar: the parts, and the reference."
    parts = [toctree(part_title(part), chapters(part)) for part in PARTS if chapters(part)]
    return "\n\n".join([*parts, toctree("Reference", ["reference/index"])])


# --- the reference ------------------------------------------------------------------------------

def modules():
    "Names of the public modules and the chapter each comes from, part by part."
    for path in sorted(NBS.rglob("*.ipynb"), key=lambda p: (p.parent.name, p.name)):
        found = re.search(r"#\| default_exp ([\w.]+)", path.read_text(encoding="utf-8"))
        if found: yield f"parallel_rescale.{found[1]}", path.relative_to(NBS).with_suffix("").as_posix()


@cache
def public_names():
    "Name -> its full name, for the functions and classes of the reference that only one module has."
    found = {}
    for module, _ in modules():
        for name in getattr(import_module(module), "__all__", []):
            thing = getattr(import_module(module), name)
            shown = module != CLI and inspect.isroutine(thing) or inspect.isclass(thing)
            if shown and thing.__doc__: found.setdefault(name, []).append(f"{module}.{name}")
    return {name: homes[0] for name, homes in found.items() if len(homes) == 1}


def reference(source):
    "Write the reference's pages: one of each part, with its modules."
    folder = source / "reference"
    folder.mkdir()
    found, pages = list(modules()), []
    for part in [p.rpartition("_")[2] for p in PARTS if p != "tutorials"]:
        inside = [(m, chapter) for m, chapter in found if m.split(".")[1] == part]
        if not inside: continue
        sections = [f"# {part.capitalize()}",
                    f"`parallel_rescale.{part}`: what the chapters of this part export.\n"]
        for module, chapter in inside:
            sections += [f"## {module.rpartition('.')[2]}\n\nExplained in {{doc}}`/{chapter}`.\n",
                         commands() if module == CLI else
                         f"```{{eval-rst}}\n.. automodule:: {module}\n   :members:\n```\n"]
        (folder / f"{part}.md").write_text("\n".join(sections), encoding="utf-8")
        pages.append(part)
    text = f"# Reference\n\n{TOP_LEVEL}\n\n{top_level()}\n\n" + toctree("Reference", pages)
    (folder / "index.md").write_text(text.replace(":caption: Reference\n", ""), encoding="utf-8")


def commands():
    "The help of every command, as the shell shows it."
    from typer.main import get_command
    from typer.testing import CliRunner
    app = import_module(CLI).app
    plain = {"COLUMNS": "96", "TERM": "dumb", "NO_COLOR": "1"}
    pages = []
    for words in ([], *([name] for name in get_command(app).commands)):
        said = CliRunner().invoke(app, [*words, "--help"], env=plain, prog_name="parallel-rescale").output
        pages.append(f"### {' '.join(['parallel-rescale', *words])}\n\n```text\n{said.strip()}\n```\n")
    return "\n".join(pages)


TOP_LEVEL = """Every public name, with shapes, ranges and sources as its docstring gives them; all of it is
exported from the chapters, which say why. These names can be imported from `parallel_rescale` itself:"""


def top_level():
    package = import_module("parallel_rescale")
    rows = ["| name | module |", "| --- | --- |"]
    for module, names in package._PUBLIC.items():
        links = ", ".join(role(name) if name in public_names() else f"`{name}`" for name in names)
        rows.append(f"| {links} | [{module}]({module.split('.')[0]}.md) |")
    return "\n".join(rows)


def role(name): return f"{{py:obj}}`{name} <{public_names()[name]}>`"


def in_rst(text):
    "A docstring's line as reStructuredText: code is code, or a link; nothing else is mark-up."
    parts = re.split(r"(``?[^`]+``?)", text)
    for i, part in enumerate(parts):
        if i % 2 == 0:
            parts[i] = re.sub(r"([\\*_|])", r"\\\1", part)
            continue
        code = part.strip("`")
        known = public_names().get(code.removesuffix("()"))
        parts[i] = f":py:obj:`{code} <{known}>`" if known else f"``{code}``"
        if i + 1 < len(parts) and parts[i + 1][:1].isalnum(): parts[i] += "\\ "
    return "".join(parts)


def comments(thing):
    "Parameter -> the comment beside it in the signature (nbdev's docments)."
    from fastcore.docments import docments
    try: found = docments(thing)
    except Exception: return {}
    return {name: " ".join(text.split()) for name, text in found.items() if text}


def docstring(app, what, name, thing, options, lines):
    "Sphinx asks for a docstring: ours, with what the signature's comments say of the parameters."
    lines[:] = [in_rst(line) for line in lines]
    if what not in ("function", "method", "class"): return
    said = comments(thing)
    returned = said.pop("return", None)
    fields = [f":param {name}: {in_rst(text)}" for name, text in said.items()]
    if returned: fields.append(f":returns: {in_rst(returned)}")
    if fields: lines += ["", *fields, ""]


# --- the chapters -------------------------------------------------------------------------------

def directives(code): return re.findall(r"^#\|\s*(.+?)\s*$", code, flags=re.M)


def shown(cell, titled):
    "The cell as the site shows it, or None; `titled`: the chapter's title stands before it."
    if cell.cell_type != "code": return cell
    marks = directives(cell.source)
    cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
    cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})
                    and not o.get("text", "").startswith(("this chapter runs on:", "Still open:"))]
    if not cell.source or (set(marks) & {"hide", "hide_input"} and not titled): return None
    if "hide" in marks or '"google.colab" in sys.modules' in cell.source:
        if not re.search(r"^(from|import) ", cell.source, flags=re.M): return None
        cell.metadata["tags"], cell.outputs = ["hide-input"], []
    if "echo: false" in marks: cell.metadata["tags"] = ["remove-input"]
    return cell


def from_site(target, folder):
    "A link of a notebook in nbs/`folder`, as the site follows it."
    if re.match(r"[a-z]+:|#|/", target): return target
    path, mark, anchor = target.partition("#")
    place = (NBS / folder / path).resolve()
    inside = NBS in place.parents and "exports" not in place.parts
    anchor = re.sub(r"[^\w-]", "", anchor).lower()
    return path + mark + anchor if inside else f"{REPOSITORY}/{place.relative_to(ROOT).as_posix()}"


def outside_code(text, change):
    "Text with `change` done to all that is neither code, nor mathematics, nor a link."
    kept = r"(```.*?```|\$\$.*?\$\$|\[[^\]\n]*\]\([^)\n]*\)|\$[^$\n]+\$|^#.*?$|<[^>\n]+>)"
    parts = re.split(kept, text, flags=re.S | re.M)
    return "".join(part if i % 2 else change(part) for i, part in enumerate(parts))


def with_references(text):
    "Text whose names of the package, in backticks, lead to the reference."
    def link(match): return role(match[2]) if match[2] in public_names() else match[0]
    return outside_code(text, lambda t: re.sub(r"(?<![`}])(`)(\w+)`(?!`)", link, t))


def prose(text, folder):
    text = re.sub(r"\[!\[Open in Colab\].*?\)\]\(.*?\)\n*", "", text)      # every page has that button
    text = re.sub(r"(\]\()([^)\s]+)", lambda m: m[1] + from_site(m[2], folder), text)
    text = re.sub(r"(src=\")([^\"]+)", lambda m: m[1] + from_site(m[2], folder), text)
    return with_references(text)


def chapter(path):
    "The notebook at `path`, as the site shows it."
    book = nbformat.read(path, as_version=4)
    folder, cells, titled = path.parent.relative_to(NBS), [], False
    for cell in book.cells:
        if cell.cell_type == "markdown":
            titled = titled or bool(re.search(r"^# ", cell.source, flags=re.M))
            cell.source = prose(cell.source, folder)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/markdown" in data: data["text/markdown"] = prose(data["text/markdown"], folder)
        if kept := shown(cell, titled): cells.append(kept)
    book.cells = cells
    book.metadata = nbformat.from_dict({"kernelspec": {"name": "python3", "display_name": "python3"},
                                        "language_info": {"name": "python"}})
    return book


def write_source(source):
    "All that Sphinx reads."
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    for path in sorted(NBS.rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts: continue
        target, book = source / path.relative_to(NBS), chapter(path)
        if path == NBS / "index.ipynb": book.cells.append(nbformat.v4.new_markdown_cell(contents()))
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(book, target)
    if (NBS / "images").is_dir(): shutil.copytree(NBS / "images", source / "images")
    shutil.copytree(ROOT / ".ci" / "site", source / "_static")
    reference(source)


# --- the site -----------------------------------------------------------------------------------

def settings():
    "Sphinx's configuration."
    theme = {
        "repository_url": SETTINGS["git_url"], "repository_branch": SETTINGS["branch"], "path_to_docs": "nbs",
        "use_repository_button": True, "use_issues_button": True, "use_source_button": True,
        "launch_buttons": {"colab_url": "https://colab.research.google.com"},
        "show_toc_level": 2, "show_navbar_depth": 1, "navbar_start": [], "navbar_center": [],
        "navbar_end": [], "navbar_persistent": [], "home_page_in_toc": True,
        "pygments_light_style": "a11y-light",
        "pygments_dark_style": "a11y-dark"}
    return {
        "project": SETTINGS["title"], "author": SETTINGS["author"], "copyright": SETTINGS["copyright"],
        "version": SETTINGS["version"], "release": SETTINGS["version"], "language": "en",
        "extensions": ["myst_nb", "sphinx.ext.autodoc", "sphinx-mathjax-offline", "make_site"],
        "html_theme": "sphinx_book_theme", "html_title": SETTINGS["title"], "html_theme_options": theme,
        "html_baseurl": f"{SETTINGS['doc_host']}{SETTINGS['doc_baseurl']}/",
        "html_static_path": ["_static"], "html_css_files": ["site.css"], "html_show_sphinx": False,
        "nb_execution_mode": "off", "nb_code_prompt_show": "Show the set-up",
        "nb_code_prompt_hide": "Hide the set-up", "nb_merge_streams": True,
        "nb_render_markdown_format": "myst",
        "myst_enable_extensions": ["dollarmath", "amsmath", "deflist"], "myst_heading_anchors": 3,
        "autodoc_member_order": "bysource", "autodoc_typehints": "signature", "add_module_names": False,
        "autodoc_preserve_defaults": True, "suppress_warnings": ["misc.highlighting_failure"],
        "nitpicky": True, "nitpick_ignore_regex": [(r"py:.*", r"(?!parallel_rescale\.).*")],
        "toc_object_entries_show_parents": "hide"}


def setup(app):
    app.connect("autodoc-process-docstring", docstring)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def build(folder=BUILD, strict=True):
    "Build the site; the folder of its pages. Every warning is an error where `strict`."
    from sphinx.application import Sphinx
    sys.path[:0] = [str(ROOT), str(ROOT / ".ci")]
    source, pages = Path(folder) / "source", Path(folder) / "html"
    shutil.rmtree(pages, ignore_errors=True)
    write_source(source)
    app = Sphinx(source, None, pages, Path(folder) / "doctrees", "html", confoverrides=settings(),
                 freshenv=True, warningiserror=strict)
    app.build(force_all=True)
    if app.statuscode: raise SystemExit("the site was built with warnings; they stand above")
    (pages / ".nojekyll").touch()
    return pages


class _Page(HTMLParser):
    "What a page links to, and the marks in it that can be linked to."
    def __init__(self, text):
        super().__init__()
        self.links, self.marks = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("href", "src") and value: self.links.append(value)
            if name == "id" or (name == "name" and tag == "a"): self.marks.add(value)


def dead_links(pages):
    "(page, link) for every link within the site that leads nowhere, anchors included."
    paths = [path for path in sorted(Path(pages).rglob("*.html")) if "_static" not in path.parts]
    found = {path: _Page(path.read_text(encoding="utf-8")) for path in paths}
    for path, page in found.items():
        for link in page.links:
            parts = urlparse(link)
            if parts.scheme or parts.netloc: continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            mark = unquote(parts.fragment)
            if not target.exists() or (mark and target in found and mark not in found[target].marks):
                yield path.relative_to(pages).as_posix(), link


if __name__ == "__main__":
    pages = build()
    dead = list(dead_links(pages))
    if dead: raise SystemExit("\n".join(f"{page}: {link} leads nowhere" for page, link in dead))
    print(f"{len(list(pages.rglob('*.html')))} pages in {pages}; every link within the site leads somewhere")

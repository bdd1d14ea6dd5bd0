"""README.md from nbs/index.ipynb: `python .ci/make_readme.py`.

Cells marked `#| hide` are left out, of those marked `#| echo: false` only what they show remains, progress bars go, links are made to work from the root of the repository, and pictures that
a cell has drawn are kept as files in nbs/images.
"""
import posixpath
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import TagRemovePreprocessor

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS, IMAGES = "nbs", "nbs/images"
WIDGET = "application/vnd.jupyter.widget-view+json"


def visible(cell):
    "The cell without its `#|` directives, or None if one of them is `hide`."
    directives = re.findall(r"^#\|\s*(.+?)\s*$", cell.source, flags=re.M) if cell.cell_type == "code" else []
    if "hide" in directives: return None
    if cell.cell_type == "code": cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
    if "echo: false" in directives: cell.metadata["tags"] = ["no-source"]
    if directives: cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    return cell


def from_root(target):
    "A link of the notebook, seen from the root of the repository."
    outside = re.match(r"[a-z]+:|#|/", target)
    return target if outside or target.startswith(IMAGES) else posixpath.normpath(posixpath.join(NOTEBOOKS, target))


def make_readme(root=ROOT):
    "(text of README.md, {path of a picture: its bytes}) for the index notebook under `root`"
    notebook = nbformat.read(Path(root, NOTEBOOKS, "index.ipynb"), as_version=4)
    notebook.metadata["language_info"] = {"name": "python"}  # for the fences of code
    notebook.cells = [cell for cell in map(visible, notebook.cells) if cell]
    resources = {"unique_key": "index", "output_files_dir": IMAGES}
    sources = TagRemovePreprocessor(remove_input_tags={"no-source"}, enabled=True)
    text, resources = MarkdownExporter(preprocessors=[sources]).from_notebook_node(notebook, resources)
    text = re.sub(r"(\]\()([^)\s]+)", lambda m: m[1] + from_root(m[2]), text)
    text = re.sub(r"(src=\")([^\"]+)", lambda m: m[1] + from_root(m[2]), text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", resources["outputs"]


if __name__ == "__main__":
    text, pictures = make_readme()
    for old in Path(ROOT, IMAGES).glob("index_*.png"): old.unlink()     # of cells that have moved
    for path, data in pictures.items():
        Path(ROOT, path).parent.mkdir(parents=True, exist_ok=True)
        Path(ROOT, path).write_bytes(data)
    Path(ROOT, "README.md").write_text(text, encoding="utf-8")
    print(f"README.md written, with {len(pictures)} picture(s) of the notebook's cells")

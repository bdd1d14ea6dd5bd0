"""The house keeps its measures: short lines, small functions and rooms, imports downward, and a test beside each export."""
import ast
import json
import re
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, NBS = ROOT / "parallel_rescale", ROOT / "nbs"
PARTS = ["tools", "method", "machine", "subject", "world", "evidence", "use"]        # each imports from itself and those before
CORE = PARTS[:4]                                                                  # never imports the world
FOLDERS = {part: NBS / f"{i}_{part}" for i, part in enumerate(PARTS)}
LONGEST_LINE, LONGEST_FUNCTION, LONGEST_MODULE = 110, 40, 300

MODULES = sorted(p for part in PARTS for p in (PACKAGE / part).glob("[!_]*.py"))
CHAPTERS = [p for part in PARTS for p in sorted(FOLDERS[part].glob("*.ipynb"))]
name = lambda path: str(path.relative_to(PACKAGE if PACKAGE in path.parents else NBS))


def cells(path):
    "(kind, source) of a notebook's cells; kind is 'export', 'code' or 'markdown'."
    def kind(c, s): return "export" if re.search(r"^#\|\s*export\b", s, re.M) else c["cell_type"]
    return [(kind(c, s), s) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] for s in ["".join(c["source"])]]


def parsed(source): return ast.parse("\n".join(line for line in source.splitlines() if not re.match(r"\s*[%!]", line)))


def functions(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): yield node.name, node.end_lineno - node.lineno + 1


def p90(values): return sorted(values)[int(.9 * (len(values) - 1))]


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_a_module_is_a_small_room(path):
    # nbdev writes the list of names itself, in lines of its own length
    lines = re.sub(r"^# %% auto.*?(?=^# %%)", "", path.read_text(encoding="utf-8"), flags=re.M | re.S).splitlines()
    assert len(lines) <= LONGEST_MODULE
    assert [(i, len(line)) for i, line in enumerate(lines, 1) if len(line) > LONGEST_LINE] == []
    assert [(f, n) for f, n in functions(path) if n > LONGEST_FUNCTION] == []


@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_lines_of_a_chapter_are_short(path):
    assert [line for kind, s in cells(path) if kind != "markdown" for line in s.splitlines() if len(line) > LONGEST_LINE] == []


def test_functions_and_cells_are_short():
    lengths = [n for p in MODULES for _, n in functions(p)]
    sizes = [len(s.splitlines()) - 1 for p in CHAPTERS for kind, s in cells(p) if kind == "export"]
    assert (median(lengths) <= 6, p90(lengths) <= 15) == (True, True), (median(lengths), p90(lengths))
    assert (median(sizes) <= 8, p90(sizes) <= 20) == (True, True), (median(sizes), p90(sizes))


def imported(path):
    "Modules of this package that a module imports anywhere in it, as part/module."
    part = path.parent.name
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (a.name.removeprefix("parallel_rescale.") for a in node.names if a.name.startswith("parallel_rescale."))
        elif isinstance(node, ast.ImportFrom) and node.level: yield [part, ""][node.level - 1] + f".{node.module or ''}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("parallel_rescale"):
            yield node.module.removeprefix("parallel_rescale.")


# asked when they are called: what a tool draws, by the rules' colours; every rule and scorer, by name
WHEN_CALLED = {("plot", "method"), ("exercises", "method")}


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_lead_downward(path):
    part = path.parent.name
    allowed = set(PARTS[:PARTS.index(part) + 1])
    parts = {m.lstrip(".").partition(".")[0] for m in imported(path)} - {"parallel_rescale", "", "method"} | {
        "method" for m in imported(path) if m.lstrip(".").startswith("method") and (path.stem, "method") not in WHEN_CALLED}
    assert parts & set(PARTS) <= allowed
    if part in CORE: assert "world" not in parts


@pytest.mark.parametrize("part", PARTS)
def test_chapters_of_a_part_are_numbered_without_gaps(part):
    numbers = [int(p.name[:2]) for p in sorted(FOLDERS[part].glob("*.ipynb"))]
    assert numbers == list(range(1, len(numbers) + 1))


def exports_and_tests(path):
    "(name, whether the code cells that follow its export, before the next export, use it) of a chapter's public functions and classes."
    all_cells = [(kind, s) for kind, s in cells(path) if kind != "markdown" and "#| default_exp" not in s]
    for i, (kind, s) in enumerate(all_cells):
        if kind != "export": continue
        rest = all_cells[i + 1:]
        while rest and rest[0][0] == "export": rest = rest[1:]
        after = []
        while rest and rest[0][0] != "export": after.append(rest.pop(0)[1])
        for node in parsed(s).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                yield node.name, any(re.search(rf"\b{node.name}\b", text) for text in after)


@pytest.mark.parametrize("part", PARTS)
def test_what_is_exported_is_tested_in_the_next_cells(part):
    found = [(p.stem, *x) for p in sorted(FOLDERS[part].glob("*.ipynb")) for x in exports_and_tests(p)]
    lacking = [f"{chapter}: {export}" for chapter, export, tested in found if not tested]
    assert len(lacking) <= .1 * len(found), lacking


@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_a_chapter_asks_shows_and_leads_on(path):
    texts = [s for kind, s in cells(path) if kind == "markdown"]
    assert re.match(r"# .+\n\n> .+", texts[0]), "a chapter opens with its title and one sentence"
    assert "?" in "\n".join(texts[:3]), "and with its question"
    assert "You need: " in "\n".join(texts), "it says what it builds on"
    assert "## What we have" in "\n".join(texts[-3:]), "it sums up"
    assert re.search(r"\bNext\b.*\]\([^)]+\.ipynb\)", "\n".join(texts[-3:])), "it ends with where to go next"
    outputs = [o for c in json.loads(path.read_text(encoding="utf-8"))["cells"] for o in c.get("outputs", [])]
    assert any(k.startswith("image/") for o in outputs for k in o.get("data", {})), "it shows a figure"
    exercises = [s for kind, s in cells(path) if s.startswith("%%exercise")]
    assert 2 <= len(exercises) <= 4, f"{len(exercises)} exercises"


def test_every_chapter_and_tour_opens_on_colab_by_the_same_cell():
    opened = {p.relative_to(NBS).as_posix(): ["".join(c["source"]) for c in json.loads(p.read_text(encoding="utf-8"))["cells"] if c.get("id") == "colab"]
              for p in sorted(NBS.rglob("*.ipynb")) if p.name != "index.ipynb" and ".ipynb_checkpoints" not in p.parts}
    assert {name for name, found in opened.items() if len(found) != 1} == set() and len({found[0] for found in opened.values()}) == 1

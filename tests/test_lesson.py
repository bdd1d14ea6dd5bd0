"The student's version of the lesson is the lesson without what is folded, and without outputs; its parts fit into their minutes."
import re
import sys
from importlib import import_module
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / ".ci"))
made = import_module("student_version")


def lesson(): return nbformat.read(made.LESSON, as_version=4)


def test_students_get_the_tasks_and_not_the_solutions():
    whole, theirs = lesson(), made.student_version(lesson())
    def exercises(book): return [c.source for c in book.cells if c.source.startswith("%%exercise")]
    text = "\n".join(c.source for c in theirs.cells)
    assert "<summary>Solution" in "\n".join(c.source for c in whole.cells)
    assert "<details>" not in text and "<summary>" not in text
    assert exercises(theirs) == exercises(whole) != []
    assert text.count("**Predict") == 3 and not any(c.get("outputs") for c in theirs.cells)
    nbformat.validate(theirs)


def test_the_parts_fill_ninety_minutes():
    table = [c.source for c in lesson().cells if "| part | minutes |" in c.source][0]
    rows = [row.split("|") for row in table.splitlines() if row.startswith("| ") and "·" in row or "what we" in row]
    assert sum(int(row[2]) for row in rows) == 90


def test_each_part_holds_its_tasks_its_words_and_its_machine():
    cells = lesson().cells
    text = re.sub(r"<details>.*?</details>", "", "\n\n".join(c.source for c in cells if c.cell_type == "markdown"), flags=re.S)
    machine = dict(re.findall(r"'(\d) · [^']*': '(\d+) s'", next(o.text for c in reversed(cells) for o in c.get("outputs", []) if "text" in o)))
    parts = re.findall(r"^## (\d) · .*?\((\d+) minutes\)(.*?)(?=^## )", text, flags=re.S | re.M)
    assert [number for number, *_ in parts] == list("12345") and set(machine) == set("124")
    for number, minutes, words in parts:
        tasks = sum(map(int, re.findall(r"\((\d+) minutes?\b", words)))
        assert tasks + len(words.split()) / 150 + int(machine.get(number, 0)) / 60 <= int(minutes), number

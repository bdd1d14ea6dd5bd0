"The student's version of the lesson is the lesson without what is folded, and without outputs."
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

"""A notebook for students: `python .ci/student_version.py [notebook] [target]`.

What stands folded in <details> (solutions, and what is for the teacher) is taken out, and so are all stored
outputs; everything else is the same file. Default: the lesson, to runs/the_lesson_student.ipynb.
"""
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
LESSON, TARGET = ROOT / "nbs/tutorials/the_lesson.ipynb", ROOT / "runs/the_lesson_student.ipynb"
FOLDED = re.compile(r"<details>.*?</details>\s*", re.S)


def student_version(book):
    "The notebook without what is folded, and without outputs."
    for cell in book.cells:
        if cell.cell_type == "code": cell.outputs, cell.execution_count = [], None
        else: cell.source = FOLDED.sub("", cell.source).strip()
    book.cells = [cell for cell in book.cells if cell.source]
    return book


if __name__ == "__main__":
    source, target = [*map(Path, sys.argv[1:]), *(LESSON, TARGET)[len(sys.argv) - 1:]]
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(student_version(nbformat.read(source, as_version=4)), target)
    print(f"{target} written")

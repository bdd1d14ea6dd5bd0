"What a reader meets in JupyterLab."
import json
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parents[2] / "nbs"
OPEN = "Still open: put your answer"
CHAPTERS = ["1_method/01_classifier_free.ipynb", "1_method/05_guidance.ipynb", "4_world/01_toy.ipynb"]
WRONG = "%%exercise\nanswer = 6\nassert answer == 7"
RIGHT = "%%exercise\nanswer = 7\nassert answer == 7"


def stored(path):
    "(pictures among the stored outputs, exercises) of a notebook."
    cells = json.loads((NBS / path).read_text(encoding="utf-8"))["cells"]
    cells = [c for c in cells if c["cell_type"] == "code"]
    outputs = [o for c in cells for o in c["outputs"]]
    pictures = sum(any(m.startswith("image/") for m in o.get("data", {})) for o in outputs)
    return pictures, sum("".join(c["source"]).startswith("%%exercise") for c in cells)


@pytest.mark.parametrize("path", CHAPTERS)
def test_run_all_passes_the_open_exercises_and_draws_every_figure(open_notebook, path):
    book = open_notebook(path)
    book.run_all()
    pictures, exercises = stored(path)
    assert book.errors() == []
    assert book.figures() >= pictures > 0
    said = book.panel.locator(".jp-OutputArea-output", has_text=OPEN)
    assert said.count() == exercises > 0
    said.first.scroll_into_view_if_needed()
    book.picture(f"exercise-{Path(path).stem}")


def test_an_exercise_says_what_it_expected_and_when_it_is_solved(open_notebook):
    book = open_notebook(CHAPTERS[0])
    book.write(book.cell("chapter_device"),
               "from parallel_rescale.tools.exercises import know_exercises\nknow_exercises()")
    cell = book.cell("%%exercise")
    book.write(cell, WRONG)
    assert "This should hold:\n    answer == 7\nbut here answer = 6" in cell.inner_text().replace("\xa0", " ")
    book.picture("exercise-wrong")
    book.write(cell, RIGHT)
    assert "Solved." in cell.inner_text() and book.errors() == []


def test_the_first_tour_runs_to_its_end(open_notebook):
    path = "tutorials/personalisation.ipynb"
    book = open_notebook(path)
    book.run_all(900)
    assert book.errors() == []
    assert book.figures() >= stored(path)[0] > 0
    book.panel.locator(".jp-OutputArea-output img").nth(1).scroll_into_view_if_needed()
    book.picture("first-tour")
    last = book.panel.locator(".jp-CodeCell").last.locator(".jp-InputPrompt").inner_text()
    assert last.strip("[]: \n").isdigit(), "the last cell was run"

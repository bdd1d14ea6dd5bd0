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


EXPLORER = "6_use/09_explorer.ipynb"
OPENED = "from parallel_rescale.use.explorer import explore\nexplorer = explore(steps=8)\nexplorer"
needs_explorer = pytest.mark.skipif(not (NBS / EXPLORER).exists(), reason="this checkout has no explorer")


class Opened:
    "An explorer on the page."
    def __init__(self, book):
        self.book, self.page = book, book.page
        book.write(book.panel.locator(".jp-CodeCell").nth(2), OPENED)
        self.root = book.panel.locator(".pr-explorer").first
        self.root.wait_for(timeout=240_000)
        self.painted()

    def part(self, name): return self.root.locator(f".pr-{name}")

    def picture(self, side=0): return self.part(f"picture-{side}").locator("img").first.get_attribute("src")

    def says(self): return self.part("message").inner_text()

    def slide(self, name, *keys):
        "Press keys on a slider, as ipywidgets 8 and 7 draw it."
        slider = self.part(name).first
        slider.locator('[role="slider"], .ui-slider-handle').first.focus()
        for key in keys: self.page.keyboard.press(key)

    def painted(self, words="Painted in", seconds=240):
        "Until the explorer says so."
        self.part("message").get_by_text(words).first.wait_for(timeout=seconds * 1000)

    def changes(self, act, side=0, seconds=240):
        "Do something; the picture must become another."
        before = self.picture(side)
        act()
        self.page.wait_for_function(
            """([root, side, before]) => {
                const say = root.querySelector('.pr-message').textContent
                const now = root.querySelector(`.pr-picture-${side} img`).src
                return now !== before && say.includes('Painted in') && now.length > 200 }""",
            arg=[self.root.element_handle(), side, before], timeout=seconds * 1000, polling=200)
        assert self.picture(side) != before


@needs_explorer
def test_the_explorer_paints_anew_when_a_control_moves_and_can_be_stopped(open_notebook):
    book = open_notebook(EXPLORER)
    opened = Opened(book)
    book.picture("explorer-opened")
    opened.changes(lambda: opened.slide("field-consistency", *8 * ["ArrowLeft"]))
    rule = opened.part("rule-1").locator("select").first
    opened.changes(lambda: rule.select_option(index=1), side=1)         # 0 is: no second rule
    book.picture("explorer-another-rule")
    opened.slide("steps", "End")                                        # as many as there may be
    opened.part("stop").first.click()
    opened.painted("Stopped")
    assert book.errors() == [] and opened.picture()
    book.picture("explorer-stopped")
    book.write(book.panel.locator(".jp-CodeCell").nth(3), "explorer.settings, explorer.image is not None")
    assert "True" in book.panel.locator(".jp-CodeCell").nth(3).inner_text()


EXPLAINERS = "6_use/10_explainers.ipynb"
DRAGGED = "from parallel_rescale.use.explainers import explainer\ndrawing = explainer('projection')\ndrawing"


@pytest.mark.skipif(not (NBS / EXPLAINERS).exists(), reason="this checkout has no explainers")
def test_an_explainer_follows_the_hand_and_python_the_explainer(open_notebook):
    book = open_notebook(EXPLAINERS)
    book.write(book.panel.locator(".jp-CodeCell").nth(2), DRAGGED)
    drawing = book.panel.locator(".jp-OutputArea-output svg, .jp-OutputArea-output canvas").first
    drawing.wait_for(timeout=60_000)
    handle = book.panel.locator('.jp-OutputArea-output svg [tabindex="0"]').first
    before = drawing.inner_html()
    box = handle.bounding_box()
    book.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    book.page.mouse.down()
    book.page.mouse.move(box["x"] + 60, box["y"] - 40, steps=6)
    book.page.mouse.up()
    assert drawing.inner_html() != before
    book.picture("explainer-dragged")
    cell = book.panel.locator(".jp-CodeCell").nth(3)
    book.write(cell, "print('moved', drawing.g_text != [1.8, .5] or drawing.g_cons != [-1.5, 1.8])")
    assert "moved True" in cell.inner_text()


@pytest.mark.skipif(not (NBS / EXPLAINERS).exists(), reason="this checkout has no explainers")
def test_the_toy_flows_as_a_slider_is_dragged(open_notebook):
    book = open_notebook(EXPLAINERS)
    book.write(book.panel.locator(".jp-CodeCell").nth(2), "from parallel_rescale.use.explainers import explainer\ntoy = explainer('toy')\ntoy")
    output = book.panel.locator(".jp-OutputArea-output").filter(has=book.page.locator("canvas")).first
    canvas, slider = output.locator("canvas").first, output.locator('input[type="range"]').nth(2)
    slider.scroll_into_view_if_needed()
    painted = "canvas => canvas.toDataURL()"
    before, told = canvas.evaluate(painted), output.locator(".pr-told").inner_text()
    box = slider.bounding_box()
    height = box["y"] + box["height"] / 2
    value = float(slider.input_value()) / .95
    book.page.mouse.move(box["x"] + 8 + value * (box["width"] - 16), height)
    book.page.mouse.down()
    book.page.mouse.move(box["x"] + box["width"] - 4, height, steps=8)
    book.page.mouse.up()
    book.page.wait_for_timeout(800)
    assert canvas.evaluate(painted) != before and output.locator(".pr-told").inner_text() != told
    book.picture("toy-dragged")
    cell = book.panel.locator(".jp-CodeCell").nth(3)
    book.write(cell, "print('leak is', round(toy.leak, 2))")
    assert "leak is 0.9" in cell.inner_text()
    book.write(cell, "toy.rule = 'parallel_rescale'")                    # and the other way round
    assert output.locator('input[value="parallel_rescale"]').is_checked()

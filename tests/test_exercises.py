"Every exercise waits while it is open, and is solved by its own solution."
import ast
import dis
import json
import re
import sys
from pathlib import Path
from types import CodeType, ModuleType

import pytest

from parallel_rescale.evidence.recorded import RECORDED
from parallel_rescale.tools.exercises import attempt, is_open
from parallel_rescale.method.registry import known_rules

NBS = Path(__file__).parents[1] / "nbs"
# a training each, whose solutions are words; and one on the results of the whole tutorial, which has a test of its own
LONG = {("13_finetune.ipynb", "c100"), ("13_finetune.ipynb", "c102"), ("reproduction.ipynb", "c044")}


def cells(path): return [(c["id"], c["cell_type"], "".join(c["source"])) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]
def exercises(path): return [i for i, (_, kind, source) in enumerate(cells(path)) if kind == "code" and source.startswith("%%exercise")]
WITH = [p for p in sorted(NBS.rglob("*.ipynb")) if p.name != "04_exercises.ipynb" and exercises(p)]


def plain(source):
    "A cell's Python, or nothing where it is a shell's."
    lines = [line for line in source.splitlines() if not line.startswith(("%", "!"))]
    return "\n".join(lines)


def codes(code):
    "A code object and those of the functions and comprehensions in it."
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType): yield from codes(inner)


def used(source): return {i.argval for c in codes(compile(source, "cell", "exec")) for i in dis.get_instructions(c) if i.opname in ("LOAD_NAME", "LOAD_GLOBAL")}


def made(source):
    "The names that a cell gives a meaning, or whose parts it sets."
    parts = {n.value.id for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.Subscript, ast.Attribute))
             and not isinstance(n.ctx, ast.Load) and isinstance(n.value, ast.Name)}
    return parts | {i.argval for i in dis.get_instructions(compile(source, "cell", "exec")) if i.opname == "STORE_NAME"}


def needed(sources, wanted):
    "The cells, of those before an exercise, from which the names that it uses come; in their order."
    chosen = {i for i, source in enumerate(sources) if source.startswith(("#| hide", "#| export"))}   # what registers itself has no name to find it by
    while True:
        wanted = wanted.union(*(used(sources[i]) for i in chosen))
        more = {i for i, source in enumerate(sources) if made(source) & wanted} - chosen
        if not more: return sorted(chosen)
        chosen |= more


def solved(source, solution):
    "An exercise with its solution in the place of the first statement that waits for an answer; the others that wait are left out."
    body = [ast.unparse(s) for s in ast.parse(source).body]
    first = next(i for i, s in enumerate(body) if is_open(s))
    return "\n".join([*body[:first], solution, *(s for s in body[first:] if not is_open(s))])


@pytest.mark.parametrize("path", WITH, ids=lambda p: p.stem)
def test_an_exercise_waits_while_it_is_open(path):
    found = cells(path)
    for i in exercises(path):
        names = {}
        assert attempt(plain(found[i][2]), names).startswith("Still open") and not names
        assert "<details>" in found[i + 1][2], f"{path.name}: exercise {found[i][0]} has no solution"


SLOW = {"reading_a_run.ipynb", "12_several.ipynb", "06_guider.ipynb", "06_denoiser.ipynb", "10_previews.ipynb", "03_consistency.ipynb", "09_step.ipynb", "01_demo.ipynb",
        "09_family.ipynb", "14_flow_matching.ipynb", "09_explorer.ipynb", "04_parallel_rescaling.ipynb", "11_rivals.ipynb", "02_pictures.ipynb"}   # half a minute each
ON_TABLES = {"08_evidence.ipynb", "09_family.ipynb", "personalisation.ipynb"}    # … and those that read recorded tables


@pytest.mark.parametrize("path", [pytest.param(p, marks=[pytest.mark.slow] * (p.name in SLOW)) for p in WITH], ids=lambda p: p.stem)
def test_every_exercise_is_solved_by_its_solution(path, monkeypatch, tmp_path):
    if path.name in ON_TABLES and not list(RECORDED.glob("*.csv")): pytest.skip("no table is recorded for this model yet")
    import matplotlib
    matplotlib.use("Agg")
    monkeypatch.setattr(sys.modules["parallel_rescale.method.guidance"], "RULES", dict(known_rules()))
    monkeypatch.chdir(tmp_path)
    main = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)     # a rule of a notebook may take the place of its module's
    main.get_ipython = lambda: None                        # what runs as a script does not run in a notebook
    found, names, done = cells(path), vars(main), set()
    for i in exercises(path):
        if (path.name, found[i][0]) in LONG: continue
        solution = re.search(r"```python\n(.*?)```", found[i + 1][2], re.S)
        assert solution, f"{path.name}: the solution of {found[i][0]} has no code"
        whole = solved(plain(found[i][2]), solution[1])
        # tables of the repository lie where they lie, and not beside the temporary folder
        before = [plain(s).replace("../../benchmarks/", f"{NBS.parent}/benchmarks/") if kind == "code" and not s.startswith(("%%exercise", "#| eval: false")) else "" for _, kind, s in found[:i]]
        for k in needed(before, used(whole)):
            if k not in done: exec(before[k], names)
            done.add(k)
        said = attempt(whole, names, lambda value: None)
        assert said == ("Solved." if re.search("^assert", found[i][2], re.M) else ""), f"{path.name} {found[i][0]}: {said}"

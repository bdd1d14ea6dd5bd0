"What was measured: the recorded tables (11), the script that makes them, and that the prose says what the tables say."
import ast
import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from parallel_rescale import ConsistencyGuidance, RULES
from parallel_rescale.evidence import recorded as module
from parallel_rescale.evidence.questions import Steered
from parallel_rescale.evidence.recorded import made, of_another, record, RECORDED, recorded
from parallel_rescale.evidence.scorers import asked_of
from parallel_rescale.evidence.world_scorers import ASKED
from parallel_rescale.world.scenes import SUBJECTS

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "evidence.py"
TABLES = [p.stem for p in sorted(RECORDED.glob("*.csv"))]
SCORED = [name for name in TABLES if name not in ("ratio", "two_subjects", "failures")]
CHAPTERS = ["nbs/5_evidence/08_evidence.ipynb", "nbs/5_evidence/09_family.ipynb", "nbs/index.ipynb"]
PAPERS_OWN = {"0.6457", "0.6517", "0.6833", "0.6776"}


@pytest.fixture
def evidence(tmp_path, monkeypatch):
    "The script as a module, with one way of training (a single step), one subject, and its tables in a temporary folder."
    spec = importlib.util.spec_from_file_location("evidence_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "evidence_script", module)                     # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DATA", tmp_path)
    monkeypatch.setattr(module, "WAYS", {"short": dict(max_train_steps=1)})
    monkeypatch.setattr("parallel_rescale.subject.previews.SAMPLE_STEPS", 1)
    return module


@pytest.mark.parametrize("name", SCORED)
def test_recorded_tables_hold_together(name):
    table = recorded(name, kind=None)
    families = set(table.family.str.partition(", ")[0])
    assert set(table.kind) == {"photo", "stylised"} and set(table.subject) <= set(SUBJECTS) and families - {"truth"} <= set(RULES)
    assert not table.duplicated(["trained", "regime", "subject", "rule", "kind"]).any()
    cells = table.groupby(["trained", "regime", "rule", "kind"]).subject.nunique()
    assert cells.nunique() == 1 and cells.iloc[0] >= 4                              # every rule was drawn for every subject
    asked = {name for text in made(name)["prompts"] for name in asked_of(text)}
    assert asked == {name for name in ASKED if name in table}                       # what was asked was scored, and nothing else
    assert table[[*asked, "class", "alignment"]].stack().dropna().between(0, 1).all() and table.pictures.min() > 0
    assert table.loc[table.kind == "stylised", ["style", "alignment", "identity", "oracle", "leak"]].notna().all().all()


@pytest.mark.parametrize("name", TABLES)
def test_recorded_tables_are_of_this_edition(name):
    "Of this package's model, judge and world. If this fails, the note beside the table names the command that makes it anew."
    assert of_another(name) == [] and made(name)["commit"] and made(name)["command"].startswith("python benchmarks/")


def test_a_table_of_another_edition_is_read_with_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RECORDED", tmp_path)
    record(pd.DataFrame([dict(rule="CFG 3", kind="photo", identity=.5)]), "mine", tmp_path, command="python make_it.py", seeds=1)
    assert recorded("mine", "photo").identity.tolist() == [.5] and made("mine", tmp_path)["seeds"] == 1
    note = made("mine", tmp_path)
    (tmp_path / "mine.json").write_text(json.dumps(note | dict(world="flat", judge="deaf")))
    with pytest.warns(UserWarning, match="another judge, world.*python make_it.py makes it anew"): recorded("mine", None)
    (tmp_path / "mine.json").unlink()
    with pytest.warns(UserWarning, match="another model, judge, world"): recorded("mine", None)


def test_asking_for_what_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RECORDED", tmp_path)
    with pytest.raises(ValueError, match="no recorded tables"): recorded("regimes")
    row = dict(rule="CFG 3", kind="stylised", trained="dco", identity=.5)
    record(pd.DataFrame([row]), "regimes", tmp_path, command="python make_it.py", seeds=1)
    with pytest.raises(ValueError, match="Did you mean 'regimes'"): recorded("regime")
    with pytest.raises(ValueError, match="kind"): recorded("regimes", "cubist")
    with pytest.raises(ValueError, match="trained"): recorded("regimes", trained="by heart")


def cells_of(path): return json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]


def shown(outputs):
    "The texts and tables that a cell shows, by their longest form."
    bundles = [o.get("data", {}) for o in outputs]
    return ["".join(b.get("text/markdown", b.get("text/plain", []))) for b in bundles if "image/png" not in b and "image/jpeg" not in b]


@pytest.mark.parametrize("path", CHAPTERS)
def test_numbers_of_the_evidence_stand_in_tables_and_not_in_prose(path):
    "A measured number is written by a cell that reads it from a recorded table; in prose it could go stale."
    texts = ["".join(c["source"]) for c in cells_of(path) if c["cell_type"] == "markdown"]
    if path.endswith("index.ipynb"): texts = [t for t in texts if "measured" in t]
    found = {n for text in texts for n in re.findall(r"(?<![\w./])[+−-]?\d?\.\d{2,}(?![\d.]*[\w/])", re.sub(r"`[^`]*`|\]\([^)]*\)|arXiv \S+|Python [\d.]+", "", text))}
    assert found - PAPERS_OWN == set()


@pytest.mark.skipif(not TABLES, reason="no table is recorded for this model yet")
@pytest.mark.parametrize("path", CHAPTERS)
def test_recorded_tables_say_what_the_chapters_show(path, monkeypatch):
    "Runs the cells that read the recorded tables, and compares what they show with what is stored in the chapter."
    import matplotlib
    matplotlib.use("Agg")
    monkeypatch.chdir((ROOT / path).parent)
    from IPython.display import Markdown
    said, names = [], dict(display=lambda value: said.append(value), __name__="chapter")
    compared = 0
    for cell in cells_of(path):
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or path.endswith("index.ipynb") and not re.search("recorded|says", source): continue
        if source.startswith("%%exercise") or re.search(r"^#\|\s*eval:\s*false", source, re.M): continue
        said.clear()
        tree = ast.parse(source.replace("notebook_style()", ""))
        tail = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, path, "exec"), names)
        if tail is not None: said.append(eval(compile(ast.Expression(tail.value), path, "eval"), names))
        new = [s.data for s in said if isinstance(s, Markdown)]
        if new: assert new == [text for text in shown(cell["outputs"]) if text], (path, cell["id"])
        compared += len(new)
    assert compared >= (1 if path.endswith("index.ipynb") else 5)


def test_the_experiments_are_well_formed(evidence):
    from parallel_rescale.evidence.questions import named_rules
    for name, e in evidence.EXPERIMENTS.items():
        assert len(named_rules(e.rules())) >= (1 if name == "ratio" else 3) and set(e.names) <= set(SUBJECTS) and e.steps >= 20, name
        assert all(evidence.split(way)[1] in evidence.SETS for way in e.ways), name
        assert evidence.counted(name)["pictures"] == len(e.ways) * len(e.names) * len(e.prompts) * evidence.counted(name)["rules"]
    counts = Counter(rule.name for rule in evidence.regimes().values() if rule != "truth")
    assert {n for f, n in counts.items() if f not in ("consistency", "parallel_rescale")} == {3}    # areas are compared between as many settings
    asks = [asked_of(p.text) for p in evidence.ASKS]
    assert sum(p.kind == "photo" for p in evidence.ASKS) * 2 == len(asks) and all(len(wants) >= 3 and wants.get("place") != "brick" and wants.get("accessory") != "scarf" for wants in asks)
    assert sum("place" in wants for wants in asks) * 2 >= len(asks)


def test_references_of_a_way_share_what_its_name_says(evidence):
    same, named, outfit = (evidence.references_of("mocha_the_cup", f"short; {s}") for s in ("same place", "same place, named", "same outfit, named"))
    assert {c for _, c in same} == {"a photo of a {subject}"} and all("brick wall" in c for _, c in named) and all("wearing a scarf" in c for _, c in outfit)
    assert evidence.split("dco; same place, named") == ("dco", "same place, named") and evidence.split("dco") == ("dco", "varied")


def test_an_experiment_from_teaching_to_its_table(evidence, tmp_path, monkeypatch):
    plain = ConsistencyGuidance(3., 2.)
    rules = {"consistency 3/2": plain, "consistency 3/2, judge backward": Steered(plain, backward=3, rate=5.)}
    monkeypatch.setattr(evidence, "EXPERIMENTS", {"small": evidence.Experiment(["short; same place"], ["pixel_the_cat"], lambda: rules, evidence.ASKS[:5:2], steps=2)})
    work = tmp_path / "work"
    for cell in evidence.cells(["small"]): evidence.fill(work, *cell)
    evidence.tabulate(work, "small")
    table = pd.read_csv(tmp_path / "small.csv")
    assert set(table.family) == {"consistency", "consistency, judge backward"}
    met = table.groupby("rule").alignment.mean()
    assert met["consistency 3/2, judge backward"] > met["consistency 3/2"] + .03                     # it was asked, and says so
    assert table.pictures.sum() == 2 * 3 and set(table.trained) == {"short"} and set(table.regime) == {"same place"}
    assert table.shared_place.between(0, 1).all()
    note = made("small", tmp_path)
    assert of_another("small", tmp_path) == [] and note["pictures"] == 6 and len(note["prompts"]) == 3
    assert note["made_on"][f"cpu, {evidence.DTYPE}"]["cells"] == 1 and note["made_on"][f"cpu, {evidence.DTYPE}"]["seconds_a_picture"] > 0


def test_p_of_a_taught_subject_beside_that_of_another_class(evidence, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "ASKS", evidence.ASKS[3:5])
    monkeypatch.setattr(evidence, "EXPERIMENTS", {"ratio": evidence.Experiment(["short; varied"], ["pixel_the_cat"], evidence.EXPERIMENTS["ratio"].rules, rows=evidence.ratio_rows)})
    for cell in evidence.cells(["ratio"]): evidence.fill(tmp_path / "work", *cell)
    evidence.tabulate(tmp_path / "work", "ratio")
    ratio = pd.read_csv(tmp_path / "ratio.csv")
    assert len(ratio) == 2 * 2 * 20 and of_another("ratio", tmp_path) == [] and ratio.parallel_share.between(0, 1).all() and ratio.cosine.between(-1, 1).all()
    assert set(ratio.direction) == {"subject", "another class"}


def test_a_second_judge_that_was_stopped_half_way_is_none(evidence, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "SECOND", tmp_path / "runs" / "second judge")
    monkeypatch.setattr(evidence, "render_stage", lambda work, recipe, seed: (None, None, None))
    stops = iter([True, False])
    def stage(work, recipe, *_, seed):
        (work / "judge.safetensors").write_text("as far as it came")                    # a stage writes it on the way
        if next(stops): raise KeyboardInterrupt
    monkeypatch.setattr(evidence, "judge_stage", stage)
    with pytest.raises(KeyboardInterrupt): evidence.train_second_judge()
    assert not (evidence.SECOND / "judge.safetensors").exists()
    for _ in range(2): evidence.train_second_judge()                                    # once it is there, it is not trained again
    assert (evidence.SECOND / "judge.safetensors").exists()


def test_several_processes_share_the_cells(evidence, tmp_path, monkeypatch):
    "What another process is about is left alone, what is done stays, and only subjects that are complete come into the table."
    asked = []
    def rows(work, experiment, way, name):
        asked.append((way, name))
        return pd.DataFrame([dict(subject=name, rule="CFG 3", kind="photo", identity=.5)])
    monkeypatch.setattr(evidence, "EXPERIMENTS", {name: evidence.Experiment(ways, ["pixel_the_cat", "mocha_the_cup"], lambda: [], rows=rows)
                                                  for name, ways in (("a", ["dco", "dco; same place"]), ("b", ["dco; varied"]))})
    todo = evidence.cells(["a", "b"])
    assert [c[0] for c in todo] == ["a", "b", "a", "b", "a", "a"]                   # what needs one taught subject follows each other: "dco" is "dco; varied"
    taken = evidence.cell(tmp_path, *todo[0])
    with evidence.locked(taken.with_name(f"{taken.name}.lock")) as mine:
        assert mine
        for cell in todo: evidence.fill(tmp_path, *cell)
    assert len(asked) == 5 and (todo[0][1], todo[0][2]) not in [a for a in asked if a[0] == "dco"]
    evidence.tabulate(tmp_path, "a")
    assert pd.read_csv(tmp_path / "a.csv").subject.unique().tolist() == ["mocha_the_cup"] and made("a", tmp_path)["subjects"] == 1
    for cell in todo: evidence.fill(tmp_path, *cell)
    assert len(asked) == 6
    evidence.tabulate(tmp_path, "a")
    assert pd.read_csv(tmp_path / "a.csv").subject.nunique() == 2 and "kept" not in made("a", tmp_path)
    monkeypatch.setattr(evidence, "EXPERIMENTS", {"a": evidence.Experiment(["dco"], ["inky_the_octopus"], lambda: [], rows=rows)})
    evidence.fill(tmp_path / "elsewhere", "a", "dco", "inky_the_octopus")
    evidence.tabulate(tmp_path / "elsewhere", "a")                                  # without the other subjects' cells
    table, note = pd.read_csv(tmp_path / "a.csv"), made("a", tmp_path)
    assert table.subject.nunique() == 3 and note["subjects"] == 3 and note["kept"]["subjects"] == 2
    monkeypatch.setattr(evidence, "of_another", lambda *_: ["model"])               # what another model made goes
    evidence.tabulate(tmp_path / "elsewhere", "a")
    assert pd.read_csv(tmp_path / "a.csv").subject.unique().tolist() == ["inky_the_octopus"] and "kept" not in made("a", tmp_path)

"What was measured: the recorded tables (11), and the script that makes them."
import importlib.util
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from parallel_rescale import ConsistencyGuidance, RULES
from parallel_rescale.evidence import RECORDED, recorded
from parallel_rescale.world import SUBJECTS

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "evidence.py"
SCORED = [p.stem for p in sorted(RECORDED.glob("*.csv")) if p.stem not in ("ratio", "two_subjects", "failures")]


@pytest.fixture
def evidence(tmp_path, monkeypatch):
    "The script as a module, with one way of training (a single step), one subject, and its tables in a temporary folder."
    spec = importlib.util.spec_from_file_location("evidence_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DATA", tmp_path)
    monkeypatch.setattr(module, "WAYS", {"short": dict(max_train_steps=1)})
    return module


@pytest.mark.parametrize("name", SCORED)
def test_recorded_tables_hold_together(name):
    table = recorded(name, kind=None)
    assert set(table.kind) == {"photo", "stylised"} and set(table.subject) <= set(SUBJECTS) and set(table.family) - {"truth"} <= set(RULES)
    assert not table.duplicated(["trained", "subject", "rule", "kind"]).any()
    cells = table.groupby(["trained", "rule", "kind"]).subject.nunique()
    assert cells.nunique() == 1 and cells.iloc[0] >= 4                              # every rule was drawn for every subject
    assert table[["style", "class", "background"]].stack().between(0, 1).all() and table.pictures.min() > 0
    assert table.loc[table.kind == "stylised", ["style", "identity", "oracle", "leak"]].notna().all().all()


def test_asking_for_what_is_not_there():
    with pytest.raises(ValueError, match="Did you mean 'family'"): recorded("familly")
    with pytest.raises(ValueError, match="kind"): recorded("family", "cubist")


def test_the_experiments_are_well_formed(evidence):
    from parallel_rescale.grid import named_rules
    for name, (ways, names, rules, seeds, steps) in evidence.EXPERIMENTS.items():
        made = rules()
        labels = named_rules(made if isinstance(made, dict) else ["truth", *made])
        assert len(labels) >= 3 and set(names) <= set(SUBJECTS) and seeds >= 1 and steps >= 20, name
    assert set(Counter(rule.name for rule in evidence.family()).values()) == {5}    # areas are compared between as many settings


def test_an_experiment_from_teaching_to_its_table(evidence, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "EXPERIMENTS", {"small": (["short"], ["pixel_the_cat"], lambda: [ConsistencyGuidance(3., 2.)], 1, 2)})
    evidence.run(tmp_path / "work", "small")
    table = pd.read_csv(tmp_path / "small.csv")
    assert table.pictures.sum() == 40 and set(table.rule) == {"true renders", "consistency 3/2"} and set(table.trained) == {"short"}
    monkeypatch.setattr(evidence, "THREE", ["short"])
    monkeypatch.setattr(evidence, "EIGHT", ["pixel_the_cat"])
    evidence.ratio(tmp_path / "work")
    ratio = pd.read_csv(tmp_path / "ratio.csv")
    assert len(ratio) == 2 * 20 and ratio.parallel_share.between(0, 1).all() and ratio.cosine.between(-1, 1).all()

"""The tables of rules and models are made from the rules and from the names of the tests, not by hand."""
import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from parallel_rescale import CFG

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def features():
    sys.path.insert(0, str(ROOT / ".ci"))
    try: return import_module("make_features")
    finally: sys.path.pop(0)


def test_the_tables_are_up_to_date(features):
    cells = json.loads((ROOT / features.INDEX).read_text(encoding="utf-8"))["cells"]
    text = next(t for c in cells if features.START in (t := "".join(c["source"])))
    assert features.marked(text, features.block()) == text, "run python .ci/make_features.py, nbdev_clean and python .ci/make_readme.py"


def test_a_model_is_in_the_table_where_tests_run_it(features):
    made = [("test_every_rule_runs", ["sana", "cfg"]), ("test_every_rule_runs", ["sana", "apg"]), ("test_cfg_equals_stock", ["sana", "None", "1"]),
            ("test_cfg_equals_stock_in_other_tasks", ["sdxl", "inpaint"]), ("test_every_rule_runs_in_other_tasks", ["sdxl", "inpaint"]), ("test_every_rule_runs", ["sdxl", "cfg"]), ("test_something_else", ["z_image"]),
            ("test_every_subject_has_its_own_lora", ["sdxl"]), ("test_the_stock_pipeline_loads_it_and_paints_something_else", ["flux"])]
    sdxl, sana = features.model_rows(made)
    assert list(sdxl.values()) == ["SDXL", "1", "", "1 ✓", "✓", ""] and list(sana.values()) == ["Sana", "2 ✓", "", "", "", ""]


def test_every_rule_of_the_package_is_in_the_table_with_its_source(features):
    rows = features.rule_rows()
    assert len(rows) > 20 and {"`cfg`", "`parallel_rescale`"} <= {row["name"] for row in rows}
    assert {row["rule"] for row in rows if not row["source"]} <= {"skip layer", "orthogonal only", "weak LoRA", "negative style"}


def test_memory_is_that_of_the_recorded_table(features):
    rows = {row["name"]: row for row in features.rule_rows()}
    assert rows["`cfg`"]["memory"] < rows["`consistency`"]["memory"] < rows["`autolora`"]["memory"] and {row["calls"] for row in rows.values() if "universal" not in row["name"]} == {"1"}
    said = "".join("".join(c["source"]) for c in json.loads((ROOT / "nbs/2_machine/12_universal.ipynb").read_text(encoding="utf-8"))["cells"] if c["id"] == "u034m")
    for how, (_, whole) in features.counted("A step under universal guidance").items(): assert whole in said, how


def test_memory_is_counted_as_the_script_counts_it(monkeypatch):
    "One line of the recorded table, again; the other lines take the script minutes."
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    memory = import_module("memory")
    with torch.device("meta"): unet = memory.UNet2DConditionModel(**memory.UNET).half().eval()
    calls, most = memory.guided_step(unet, CFG(adapter=0), side=512)
    assert calls == 1 and f"| 2 | {most / memory.GIB:.2f} |" in (ROOT / "benchmarks/memory.md").read_text(encoding="utf-8")

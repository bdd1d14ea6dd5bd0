"The script that goes on with painter and judge on a GPU, in small and on the CPU, where it takes plain steps."
import importlib.util
import json
import math
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[1] / "training" / "on_gpu.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("on_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SHARD", 4)
    return module


@pytest.fixture
def shards(script, tmp_path):
    script.render_shards((tmp_path, 2026, 0, 1, math.inf, 3))
    assert len(list(tmp_path.glob("shard*.npz"))) == 3
    return tmp_path


@pytest.mark.parametrize("name", ["painter", "judge"])
def test_a_network_goes_on_from_its_stored_weights(script, shards, name):
    before = load_file(SCRIPT.parent / f"{name}.safetensors")
    torch.manual_seed(0)
    getattr(script, name)(shards, 3, "cpu", 32, 8, 1e-4)
    after, log = load_file(shards / f"{name}.safetensors"), json.loads((shards / f"{name}.json").read_text())
    assert after.keys() == before.keys() and all(after[k].shape == before[k].shape and after[k].isfinite().all() for k in after)
    learned = [k for k in after if k.endswith("weight") and after[k].ndim > 1]
    moved = [(after[k].float() - before[k].float()).norm() / before[k].float().norm() for k in learned]
    assert 0 < max(moved) < .1 and log[-1]["step"] > 0                        # it began there, and did something
    assert 0 < log[-1].get("held_out", log[-1].get("accuracy", {}).get("place", 0)) <= 1


def test_rendering_ends_at_its_time(script, tmp_path):
    script.render_shards((tmp_path, 2026, 0, 1, time.time() - 1, 3))
    assert not list(tmp_path.iterdir())

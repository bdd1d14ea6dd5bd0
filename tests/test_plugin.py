"""A package that adds a rule, from its source to the command line: built and installed by pip into a folder of its own."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from importlib.metadata import PackageNotFoundError, version

import pytest

try: built = int(version("setuptools").partition(".")[0]) >= 77 and bool(version("pip"))
except PackageNotFoundError: built = False
pytestmark = pytest.mark.skipif(not built, reason="needs pip, and setuptools from 77 on")
ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = ROOT / "nbs" / "tutorials" / "your_own_rule.ipynb"
SUBJECT = ROOT / "parallel_rescale" / "data" / "subject_pixel"


def tutorial_texts():
    "PROJECT and MODULE, as the tutorial writes them."
    cells = ["".join(c["source"]) for c in json.loads(TUTORIAL.read_text(encoding="utf-8"))["cells"]]
    source = next(s for s in cells if s.startswith("PROJECT = "))
    names = {}
    exec(source[:source.index("work = ")], names)
    return names["PROJECT"], names["MODULE"], next(s for s in cells if "class Leash(SubjectGuidance)" in s)


def python(*command, site, cwd):
    path = os.pathsep.join(map(str, [site, ROOT]))
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=cwd,
                          env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


def install(tmp_path, project, module):
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    (source / "pyproject.toml").write_text(project, encoding="utf-8")
    (source / "leash_rule.py").write_text(module, encoding="utf-8")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--disable-pip-version-check",
                    "--target", site, source], check=True, capture_output=True)
    return site


def test_the_tutorials_package_is_the_tutorials_rule():
    _, module, cell = tutorial_texts()
    def body(text): return re.sub(r"\s*#.*", "", text[text.index("class Leash"):]).split()
    assert body(module) == body(cell)


def test_an_installed_plugin_is_known_everywhere(tmp_path):
    project, module, _ = tutorial_texts()
    site = install(tmp_path, project, module)
    said, errors = python("-W", "error::UserWarning:parallel_rescale", "-c", "from parallel_rescale.method.registry import known_rules, rule; "
                          "print('leash' in known_rules(), rule('leash:length=0.25').label)", site=site, cwd=tmp_path)
    assert said.strip() == "True leash 7.5/3/0.25" and "not loaded" not in errors
    python("-m", "parallel_rescale.use.cli", "sample", SUBJECT, "a {subject}", "--rule", "leash:text=3", "--steps", "2", site=site, cwd=tmp_path)
    assert (tmp_path / "sample.png").stat().st_size > 0


@pytest.mark.slow
def test_a_plugin_that_fails_is_one_warning(tmp_path):
    project, _, _ = tutorial_texts()
    site = install(tmp_path, project, "import a_module_that_is_not_there\n")
    said, errors = python("-c", "from parallel_rescale.method.registry import known_rules; print(len(known_rules()) > 20, 'leash' in known_rules())",
                          site=site, cwd=tmp_path)
    assert said.strip() == "True False"
    assert errors.count("were not loaded") == 1 and "a_module_that_is_not_there" in errors and "leash-rule" in errors
    # in a shell, too, it is one line, and the command does its work
    _, errors = python("-m", "parallel_rescale.use.cli", "sample", SUBJECT, "a {subject}", "--rule", "cfg", "--steps", "2", site=site, cwd=tmp_path)
    assert (tmp_path / "sample.png").is_file() and errors.count("were not loaded") == 1

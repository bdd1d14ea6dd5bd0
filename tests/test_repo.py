"""The repository keeps its promises: made files are up to date, the package is light, nothing of one machine is in it."""
import base64
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ConfigParser(delimiters=["="])
CONFIG.read(ROOT / "settings.ini", encoding="utf-8")
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
MODULES = sorted(".".join(path.relative_to(ROOT / "parallel_rescale").with_suffix("").parts)
                 for path in (ROOT / "parallel_rescale").rglob("[!_]*.py"))
FIGURE_BYTES = 150_000


def run(*command, cwd=ROOT):
    environment = {key: value for key, value in os.environ.items() if key != "IN_TEST"}  # nbdev sets it, and then exports nothing
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(code): return run(sys.executable, "-c", code)


def files_of_the_repository():
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of the repository's files, to be exported, cleaned and built in."
    folder = tmp_path_factory.mktemp("copy")
    for path in files_of_the_repository():
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return folder


def differing(copy, suffix, folder):
    "Names of the files under `folder` that are not the same here and in the copy."
    names = {path.relative_to(base) for base in (ROOT, copy) for path in (base / folder).rglob(f"*{suffix}")
             if ".ipynb_checkpoints" not in path.parts}
    def text(path): return path.read_text(encoding="utf-8") if path.exists() else None
    return sorted(str(name) for name in names if text(ROOT / name) != text(copy / name))


def test_modules_are_what_the_notebooks_export(copy):
    for path in (copy / "parallel_rescale").rglob("*.py"):
        if path.name != "__init__.py": path.unlink()  # a module without a notebook would otherwise go unnoticed
    python(f"import os; os.chdir({str(copy)!r}); from nbdev.doclinks import nbdev_export; nbdev_export()")
    assert differing(copy, ".py", "parallel_rescale") == [], "run nbdev_export"


def test_notebooks_are_clean(copy):
    python(f"import os; os.chdir({str(copy)!r}); from nbdev.clean import nbdev_clean; nbdev_clean()")
    assert differing(copy, ".ipynb", "nbs") == [], "run nbdev_clean"


def test_readme_is_made_from_the_index():
    sys.path.insert(0, str(ROOT / ".ci"))
    try: text, pictures = import_module("make_readme").make_readme()
    finally: sys.path.pop(0)
    assert (ROOT / "README.md").read_text(encoding="utf-8") == text, "run python .ci/make_readme.py"
    for path, data in pictures.items(): assert (ROOT / path).read_bytes() == data, "run python .ci/make_readme.py"


def test_readme_has_two_commands_near_its_top():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^```bash\n(.*?)\n```$", text, flags=re.M | re.S)
    assert len(commands) == 2 and not any("\n" in command for command in commands)
    assert commands[0].endswith("parallel-rescale demo") and "nbdev_test" in commands[1] and "pytest" in commands[1]
    assert all("-c constraints.txt" in command for command in commands)
    assert text.index(commands[1]) < len(text) / 2


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = [t.partition("#")[0] for t in re.findall(r"\]\(([^)\s]+)", text) if not re.match(r"https?:|#", t)]
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_every_notebook_is_linked_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [path.stem for path in NOTEBOOKS if path.stem != "index" and f"]({path.relative_to(ROOT).as_posix()})" not in text] == []


def constraints():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_constraints_pin_every_requirement_within_its_bounds():
    pinned = {}
    for pin in constraints():
        (spec,) = pin.specifier
        assert spec.operator == "==" and "*" not in spec.version and "+" not in spec.version, pin
        pinned.setdefault(canonicalize_name(pin.name), []).append(spec.version)
    for key in ("requirements", "dev_requirements", "notebook_requirements", "docs_requirements", "browser_requirements",
                "ray_requirements"):
        for requirement in map(Requirement, CONFIG["DEFAULT"][key].split()):
            versions = pinned.get(canonicalize_name(requirement.name))
            assert versions, f"constraints.txt does not pin {requirement.name}"
            assert all(requirement.specifier.contains(version) for version in versions), (str(requirement), versions)


def test_requirements_are_bounds_and_not_pins():
    for key in CONFIG["DEFAULT"]:
        if key.endswith("requirements"): assert "==" not in CONFIG["DEFAULT"][key], key


def test_every_public_name_can_be_imported():
    package = import_module("parallel_rescale")
    asked = """cfg project consistency_ratio normalize_ratio parallel_rescale Branch Guidance TINY_SDXL CFG ConsistencyGuidance
               ParallelRescale OrthogonalOnly AutoGuidance PersonalizationGuidance interval every SubjectPipeline finetune""".split()
    assert set(asked) <= set(package.__all__) <= set(dir(package))
    for name in package.__all__: assert not isinstance(getattr(package, name), type(sys)), name
    with pytest.raises(AttributeError, match="no_such_name"): package.no_such_name


@pytest.mark.parametrize("first", [
    "import parallel_rescale.method.classifier_free",
    "from parallel_rescale.method.classifier_free import cfg",
    "from parallel_rescale import cfg",
    "from parallel_rescale import CFG, parallel_rescale",
    "from parallel_rescale import *",
    "import importlib; importlib.import_module('parallel_rescale.method.classifier_free')",
])
def test_a_function_is_never_hidden_by_the_module_of_its_name(first):
    python(f"{first}\nfrom parallel_rescale import cfg, parallel_rescale\nimport parallel_rescale as package, sys\n"
           "assert cfg is package.cfg is sys.modules['parallel_rescale.method.classifier_free'].cfg and callable(cfg)\n"
           "assert parallel_rescale.__name__ == 'parallel_rescale' and callable(parallel_rescale)\n"
           "from parallel_rescale.method.classifier_free import cfg as again; assert again is cfg")


def test_importing_the_package_is_cheap():
    python("import sys, time, torch, diffusers\nbefore, start = set(sys.modules), time.process_time()\n"
           "import parallel_rescale\nspent = time.process_time() - start\n"
           "assert spent < 0.3, spent\n"
           "assert not {name for name in set(sys.modules) - before if name.startswith('parallel_rescale.')}")


def test_no_module_imports_plotting_widgets_or_jupyter_and_none_has_something_to_say():
    heavy = ["matplotlib", "IPython", "ipywidgets", "jupyter_core", "ipykernel", "nbdev", "fastcore", "pytest"]
    said = python(f"import contextlib, importlib, io, sys\nwith contextlib.redirect_stderr(io.StringIO()) as said:\n"
                  f"    for name in {MODULES}: importlib.import_module('parallel_rescale.' + name)\n"
                  f"loaded = [name for name in {heavy} if name in sys.modules]\nassert not loaded, loaded\nprint(said.getvalue())")
    assert said.strip() == ""                                                       # it would be a reader's first output, in red


def test_nothing_of_one_machine_is_in_the_repository():
    local = re.compile(rb"(?<![\w.:/}])/(work|root|home|tmp|Users|opt)/\w")
    found = [f"{path.relative_to(ROOT)}: {match[0].decode()}" for path in files_of_the_repository()
             if path.suffix in {".ipynb", ".py", ".md", ".txt", ".ini", ".toml", ".json", ".yml", ".csv", ""}
             for match in local.finditer(path.read_bytes())]
    assert found == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_figures_in_notebooks_are_small(path):
    book = json.loads(path.read_text(encoding="utf-8"))
    assert "widgets" not in book["metadata"]                                        # the state of bars that nobody sees
    texts = ["".join(o["data"].get("text/plain", "")) for c in book["cells"] for o in c.get("outputs", []) if o["output_type"] == "display_data"]
    assert not [t for t in texts if re.search(r"\d+%\|.*\| \d+/\d+ \[", t)], "a progress bar that stands still for good: clear it before the chapter is stored"
    bundles = [output.get("data", {}) for cell in book["cells"] for output in cell.get("outputs", [])]
    pictures = [base64.b64decode("".join(data)) for bundle in bundles for kind, data in bundle.items() if kind in ("image/png", "image/jpeg")]
    assert all(len(picture) < FIGURE_BYTES for picture in pictures), [len(picture) for picture in pictures]


def test_the_built_wheel_holds_the_package_and_the_embedded_model(copy, tmp_path):
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, cwd=copy)  # the source archive, and the wheel from it
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(ZipFile(wheel).namelist())
    data = {str(path.relative_to(ROOT)) for folder in ("tiny_sdxl", "data") for path in (ROOT / "parallel_rescale" / folder).rglob("*") if path.is_file()}
    assert data <= inside and "parallel_rescale/tiny_sdxl/model_index.json" in inside
    assert {f"parallel_rescale/{name.replace('.', '/')}.py" for name in MODULES} <= inside
    assert not any(name.startswith(("tests/", "nbs/", "benchmarks/")) for name in inside)

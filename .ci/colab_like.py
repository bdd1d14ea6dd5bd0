"""An environment like stock Colab's, the wheel of this checkout in it, and the first tour run there.

    python .ci/colab_like.py                                  # Python 3.13, PyPI's torch: about 3 GB to fetch
    python .ci/colab_like.py --python 3.11 --pin torch==2.13.0 --find-links /path/to/wheels

The wheel is installed without constraints, and what Colab had must still be there in its own version
afterwards. `--pin` takes the place of a version below; needs uv.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
# what a fresh Colab runtime had in August 2026; pandas, matplotlib and the like come with it in any version
COLAB = ["torch==2.11.0", "diffusers==0.39.0", "transformers==5.15.0", "peft==0.20.0", "accelerate==1.14.0",
         "torchao==0.10.0", "ipywidgets==7.7.1", "jupyterlab_widgets<3", "anywidget==0.9.21"]
ALSO = ["ipykernel", "nbclient", "pandas", "matplotlib", "scipy", "fastcore<2"]
TORCHAO = ["--no-deps", "-U", "torchao>=0.16"]             # the tours' own first cell does this on Colab
TOUR = "nbs/tutorials/personalisation.ipynb"
RUN = """import sys, time, nbformat
from nbclient import NotebookClient
book, start = nbformat.read(sys.argv[1], 4), time.perf_counter()
NotebookClient(book, timeout=1800, kernel_name="python3").execute()
print(f"{sum(c.cell_type == 'code' for c in book.cells)} cells in {time.perf_counter() - start:.0f} s")
nbformat.write(book, sys.argv[1])"""


def name_of(requirement): return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def pinned(pins):
    "Colab's versions, with those of `pins` in their places."
    mine = {name_of(pin): pin for pin in pins}
    return [mine.pop(name_of(r), r) for r in COLAB] + [*mine.values()]


def call(*command, **more):
    print("$", *command, flush=True)
    return subprocess.run([str(c) for c in command], check=True, text=True, **more)


def versions(python):
    listed = call("uv", "pip", "list", "--python", python, "--format", "json", stdout=subprocess.PIPE).stdout
    return {p["name"].lower().replace("_", "-"): p["version"] for p in json.loads(listed)}


def environment(folder, python, wanted, links):
    "Make the environment; (its Python, a function that installs into it)."
    call("uv", "venv", "--quiet", "--clear", "--python", python, folder)
    inside = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    def install(*what): call("uv", "pip", "install", "--quiet", "--python", inside, *links, *what)
    install(*wanted, *ALSO)
    return inside, install


def run_tour(python, folder):
    "Run the first tour in `folder`, beside the tables that it reads."
    for name in ("nbs/tutorials", "benchmarks"): shutil.copytree(ROOT / name, folder / name)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONPATH", "JUPYTER"))}
    paths = {"IPYTHONDIR": str(folder / "ipython"), "JUPYTER_DATA_DIR": str(folder / "jupyter")}
    call(python, "-c", RUN, folder / TOUR, cwd=(folder / TOUR).parent, env=clean | paths)


def main(folder, python, pins, links):
    wanted, links = pinned(pins), [f"--find-links={link}" for link in links]
    inside, install = environment(folder / "colab", python, wanted, links)
    call("uv", "build", "--quiet", "--wheel", "--out-dir", folder / "dist", ROOT)
    before = versions(inside)
    start = time.perf_counter()
    install(*(folder / "dist").glob("*.whl"))
    seconds, after = time.perf_counter() - start, versions(inside)
    changed = {n: (before[n], after.get(n)) for n in map(name_of, wanted) if before[n] != after.get(n)}
    if changed: raise SystemExit(f"the package changed what Colab had: {changed}")
    print(f"wheel installed in {seconds:.0f} s beside", {n: after[n] for n in map(name_of, wanted)})
    install(*TORCHAO)
    run_tour(inside, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to make it; default: a temporary folder")
    parser.add_argument("--python", default="3.13")
    parser.add_argument("--pin", action="append", default=[], help="a requirement in the place of Colab's")
    parser.add_argument("--find-links", action="append", default=[])
    asked = parser.parse_args()
    if not shutil.which("uv"): sys.exit("colab_like needs uv: pip install uv")
    with TemporaryDirectory() as temporary:
        main(asked.folder or Path(temporary), asked.python, asked.pin, asked.find_links)

"""JupyterLab on loopback, and a headless Chromium that drives it.

    pytest -m browser tests/browser                               # needs ".[browser]" and a Chromium
    LAB_PYTHON=/path/to/python pytest -m browser tests/browser    # JupyterLab and kernel of that Python

LAB_PYTHON may have ipywidgets 7, as Colab has. Chromium is CHROMIUM, or one on the PATH, or Playwright's own.
Screenshots go to _proc/browser."""
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHOTS = ROOT / "_proc" / "browser"
PYTHON = os.environ.get("LAB_PYTHON", sys.executable)
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
           --disable-component-update --disable-sync""".split()
# every cell stays in the page, whether it is in sight or not
SETTINGS = {"notebook-extension/tracker": '{"windowingMode": "none"}',
            "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}'}


def runs(python, code): return subprocess.run([python, "-c", code], capture_output=True, text=True)


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents: item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def versions():
    "Versions of what LAB_PYTHON has; the tests are skipped where something is missing."
    found = runs(PYTHON, "import jupyterlab, parallel_rescale, ipywidgets as i; print(i.__version__)")
    if found.returncode: pytest.skip(f"{PYTHON}: {found.stderr.strip().splitlines()[-1]}")
    return {"ipywidgets": found.stdout.strip()}


@pytest.fixture(scope="session")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    with api.sync_playwright() as playwright:
        try: browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        except api.Error as error: pytest.skip(f"no Chromium: {error.message.splitlines()[0]}")
        yield browser
        browser.close()


def copy_of_the_book(folder):
    "The notebooks and the tables that they read, to be run and changed."
    unwanted = shutil.ignore_patterns(".ipynb_checkpoints", "runs", "*.tmp")
    for name in ("nbs", "benchmarks"): shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    for name, text in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def wait_for_server(url, process, log, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try: return urllib.request.urlopen(url, timeout=5).close()
        except OSError: time.sleep(.3)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="session")
def lab(versions, tmp_path_factory):
    "JupyterLab over a copy of the book: (address, token, folder)."
    folder, token = tmp_path_factory.mktemp("lab"), secrets.token_hex(16)
    copy_of_the_book(folder)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"), "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "IPYTHONDIR": str(folder / "ipython"), "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces")}
    log = folder / "lab.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [PYTHON, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
             f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}",
             "--ServerApp.port_retries=0", "--LabApp.extension_manager=readonly", "--LabApp.news_url=None"],
            cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
        try:
            wait_for_server(f"http://127.0.0.1:{port}/api?token={token}", process, log)
            yield f"http://127.0.0.1:{port}", token, folder
        finally:
            process.terminate()
            try: process.wait(20)
            except subprocess.TimeoutExpired: process.kill()


class Notebook:
    "A notebook that is open in JupyterLab."
    def __init__(self, page, shot):
        self.page, self.shot = page, shot
        self.panel = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")

    def menu(self, name, entry):
        self.page.locator(".lm-MenuBar-itemLabel", has_text=name).first.click()
        self.page.locator(".lm-Menu-itemLabel").get_by_text(entry, exact=True).click()

    def wait(self, seconds=600):
        "Until no cell is running or waiting."
        self.page.wait_for_function(
            "() => ![...document.querySelectorAll('.jp-InputPrompt')].some(p => p.textContent.includes('*'))",
            timeout=seconds * 1000, polling=500)

    def run_all(self, seconds=600):
        self.menu("Run", "Run All Cells")
        self.page.wait_for_timeout(1500)                                # the cells are queued
        self.wait(seconds)

    def begin(self):
        "The kernel is up (each notebook that is opened has one of its own), and no stored output is left."
        asks = self.page.locator(".jp-Dialog", has_text="Select Kernel")    # where the server has not told yet what kernels there are
        end = time.monotonic() + 240
        while "| Idle" not in (told := self.page.locator("#jp-main-statusbar").inner_text()):
            assert time.monotonic() < end, told
            if asks.is_visible(): asks.locator(".jp-mod-accept").click()
            self.page.wait_for_timeout(300)
        self.menu("Edit", "Clear Outputs of All Cells")
        self.page.wait_for_function("() => !document.querySelector('.jp-CodeCell .jp-OutputArea-output')", timeout=30_000)

    def errors(self):
        return self.panel.locator('[data-mime-type="application/vnd.jupyter.error"]').all_inner_texts()

    def figures(self):
        "Pictures among the outputs that were really drawn."
        return self.panel.locator(".jp-OutputArea-output img").evaluate_all(
            "all => all.filter(i => i.complete && i.naturalWidth > 20).length")

    def cell(self, text): return self.panel.locator(".jp-CodeCell").filter(has_text=text).first

    def write(self, cell, source):
        "Put `source` in a cell and run it."
        cell.locator(".cm-content").click()
        self.page.keyboard.press("Control+A")
        self.page.keyboard.insert_text(source)
        self.page.keyboard.press("Control+Enter")
        self.page.wait_for_timeout(500)
        self.wait(300)

    def picture(self, name, **more): return self.page.screenshot(path=self.shot(name), **more)


@pytest.fixture
def open_notebook(browser, lab, versions, request):
    "open_notebook(path below nbs/) -> Notebook with a fresh kernel."
    address, token, folder = lab
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    SHOTS.mkdir(parents=True, exist_ok=True)
    def shot(name): return SHOTS / f"{name}-ipywidgets{versions['ipywidgets'].split('.')[0]}.png"

    def opened(path):
        page = context.new_page()
        page.goto(f"{address}/lab/tree/nbs/{path}?token={token}&reset")
        book = Notebook(page, shot)
        book.panel.locator(".jp-Cell").first.wait_for(timeout=90_000)
        book.begin()
        return book

    yield opened
    for page in context.pages: page.screenshot(path=shot(f"last-{request.node.name}"[:80].replace("/", "-")))
    context.close()
    for session in _sessions(address, token): _end(address, token, session)


def _sessions(address, token):
    import json
    with urllib.request.urlopen(f"{address}/api/sessions?token={token}") as answer: return json.load(answer)


def _end(address, token, session):
    request = urllib.request.Request(f"{address}/api/sessions/{session['id']}?token={token}", method="DELETE")
    urllib.request.urlopen(request).close()

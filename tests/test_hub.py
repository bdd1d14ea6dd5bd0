"""The Hub: what is sent when a subject is pushed, by huggingface_hub's own client to a stand-in on this machine."""
import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SUBJECT = ROOT / "parallel_rescale" / "data" / "subject_pixel"


@pytest.fixture
def hub():
    "A stand-in for the Hub: takes repositories and commits, and keeps what it was sent."
    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_): pass

        def answer(self, data, code=200):
            body = json.dumps(data).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            if server.refuses: return self.answer({"error": "not found"}, 404)       # the client looks whether it is there already
            self.answer({"name": "me", "siblings": [], "sha": "0" * 40, "id": "me/pixel"})

        def do_POST(self):
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}"
            server.seen.append((self.path, self.headers.get("Authorization")))
            if self.path.endswith("/repos/create"):
                server.repo = json.loads(sent)
                if server.refuses: return self.answer({"error": "this token may not write"}, 403)
                return self.answer({"url": f"{server.url}/me/pixel", "name": "me/pixel"})
            if "/preupload/" in self.path:
                return self.answer({"files": [dict(path=f["path"], uploadMode="regular", shouldIgnore=False) for f in json.loads(sent)["files"]]})
            if "/commit/" in self.path:
                lines = [json.loads(line) for line in sent.splitlines()]
                server.commit = lines[0]["value"]
                server.files = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines[1:] if line["key"] == "file"}
                return self.answer({"commitUrl": f"{server.url}/me/pixel/commit/1", "commitOid": "1" * 40, "success": True})
            self.answer({})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.seen, server.files, server.refuses = f"http://127.0.0.1:{server.server_port}", [], {}, False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()


def run(hub, tmp_path, *command):
    "In a process of its own, for the client reads the Hub's address once."
    env = os.environ | dict(HF_ENDPOINT=hub.url, HF_TOKEN="hf_not_a_token", HF_HOME=str(tmp_path / "home"), PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1",
                            HF_HUB_DISABLE_XET="1", NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
    env.pop("HF_HUB_OFFLINE", None)
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=env, cwd=tmp_path)


def test_a_subject_is_pushed_with_its_card(hub, tmp_path):
    code = f"from parallel_rescale.subject.finetuning import push_to_hub; print(push_to_hub({str(SUBJECT)!r}, 'me/pixel'))"
    done = run(hub, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.url}/me/pixel" and "private" in (hub.repo.get("visibility"), hub.repo.get("private") and "private")
    assert {"README.md", "subject.json", "pytorch_lora_weights.safetensors", "learned_embeds.safetensors", "samples/grid.png"} <= set(hub.files)
    assert hub.files["pytorch_lora_weights.safetensors"] == (SUBJECT / "pytorch_lora_weights.safetensors").read_bytes()
    assert hub.commit["summary"] == "<pixel>, a cat" and all(auth == "Bearer hf_not_a_token" for _, auth in hub.seen)


def photographs(folder):
    from PIL import Image

    from parallel_rescale.world.tinyworld import reference_set
    folder.mkdir()
    for i, (pixels, _) in enumerate(reference_set("pixel_the_cat", "{subject}")[:2]): Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


FINETUNE = ["-m", "parallel_rescale.use.cli", "finetune", "photos", "--class-noun", "cat", "--token", "<pix>", "--output", "out",
            "--max-train-steps", "1", "--train-batch-size", "1", "--push-to-hub", "me/pixel"]


def test_fine_tuning_from_a_shell_pushes_its_result_alone(hub, tmp_path):
    photographs(tmp_path / "photos")
    done = run(hub, tmp_path, *FINETUNE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"README.md", "subject.json", "pytorch_lora_weights.safetensors", "samples/grid.png"} <= set(hub.files)
    assert not any("checkpoint" in name or "photos" in name or "log" in name for name in hub.files)
    card = hub.files["README.md"].decode()
    assert card.startswith('---\nlibrary_name: "diffusers"') and '"url": "samples/grid.png"' in card


def test_a_token_that_may_not_write_is_found_out_before_any_work(hub, tmp_path):
    photographs(tmp_path / "photos")
    hub.refuses = True
    done = run(hub, tmp_path, *FINETUNE)
    assert done.returncode == 2 and "push_to_hub: no repository 'me/pixel'" in done.stderr and not (tmp_path / "out").exists()

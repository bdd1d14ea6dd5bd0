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
            if "/auth-check" in self.path: return self.answer({}, 403 if server.read_only and self.path.endswith("/write") else 200)
            self.answer({"name": "me", "siblings": [], "sha": "0" * 40, "id": "me/pixel", "private": server.private})

        def do_POST(self):
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}"
            server.seen.append((self.path, self.headers.get("Authorization")))
            if self.path.endswith("/repos/create"):
                server.repo = json.loads(sent)
                if server.read_only: return self.answer({"error": "no write permission on the namespace"}, 403)
                if not server.private: return self.answer({"error": "it is there already", "url": f"{server.url}/me/pixel"}, 409)
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
    server.read_only, server.private, server.repo = False, True, None
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

    from parallel_rescale.world.pictures import reference_set
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


@pytest.mark.slow
def test_a_token_that_may_not_write_is_found_out_before_any_work(hub, tmp_path):
    photographs(tmp_path / "photos")
    hub.refuses = True
    done = run(hub, tmp_path, *FINETUNE)
    assert done.returncode == 2 and "push_to_hub: no repository 'me/pixel'" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("state,words", [pytest.param(dict(read_only=True), "no repository 'me/pixel' can be had on the Hub", id="a token that reads"),
                                         pytest.param(dict(private=False), "'me/pixel' is public on the Hub", id="a public one", marks=pytest.mark.slow)])
def test_a_repository_that_is_there_is_looked_at_before_any_work(hub, tmp_path, state, words):
    "The client calls it a success to make a repository that exists, whoever asks and however public it is."
    photographs(tmp_path / "photos")
    vars(hub).update(state)
    done = run(hub, tmp_path, *FINETUNE)
    assert done.returncode == 2 and words in done.stderr and not (tmp_path / "out").exists() and not hub.files


def test_pictures_that_are_not_there_leave_no_repository(hub, tmp_path):
    done = run(hub, tmp_path, *FINETUNE)
    assert done.returncode == 2 and "photos" in done.stderr and hub.repo is None and not hub.seen


def test_a_client_that_cannot_ask_tries():
    from parallel_rescale.subject.finetuning import check_writing

    class Old:
        calls = []
        def auth_check(self, repo_id): raise AssertionError("reads only")
        def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id): self.calls.append(("put", repo_id, path_in_repo))
        def delete_file(self, path_in_repo, repo_id): self.calls.append(("delete", repo_id, path_in_repo))
    check_writing(Old(), "me/pixel")
    assert Old.calls == [("put", "me/pixel", ".write-check"), ("delete", "me/pixel", ".write-check")]

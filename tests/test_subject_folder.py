"The folder of a saved subject: what is written can be read, by us and by stock diffusers."
import importlib.util
import json
import os
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open

from parallel_rescale.machine.prompts import base_prompt, derive_base, subject_prompt
from parallel_rescale.machine.saved_subject import base_signature, check_base, check_torchao, load_tokens
from parallel_rescale.machine.saved_subject import LORA_FILE, model_card, save_adapter, save_tokens, Subject
from parallel_rescale.machine.saved_subject import SUBJECT_FILE, TOKENS_FILE
from parallel_rescale.tools.embedded import TINY_SDXL, load_tiny_sdxl


def make_subject(folder, token="<dog>", class_noun="dog", seed=0, lora=True, rows=1, alpha=8):
    "A random subject: rank 4 with alpha 8 (so that a reader who takes alpha = rank for granted fails), `rows` token embeddings."
    pipe = load_tiny_sdxl(device="cpu")
    g = torch.Generator().manual_seed(seed)
    if lora:
        pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=alpha, target_modules=["to_q", "to_k", "to_v", "to_out.0", "time_emb_proj"]))
        for key, p in pipe.unet.named_parameters():
            if "lora_" in key: p.data = torch.randn(p.shape, generator=g) * (.1 if "lora_A" in key else .05)
        save_adapter(pipe.unet, folder)
    if rows: save_tokens(folder, token, torch.randn(rows, 64, generator=g), torch.randn(rows, 64, generator=g))
    return Subject(token, class_noun, TINY_SDXL, settings={"rank": 4}, signature=base_signature(pipe.unet)).save(folder)


def test_round_trip(tmp_path):
    made = make_subject(tmp_path / "deep" / "dog", rows=2)
    assert Subject.load(made.folder) == made and made.versions["diffusers"]
    tokens, clip_l, clip_g = load_tokens(made.folder)
    assert tokens == ["<dog>"] and clip_l.shape == clip_g.shape == (2, 64)
    assert sorted(p.name for p in (tmp_path / "deep" / "dog").iterdir()) == ["README.md", LORA_FILE, SUBJECT_FILE, TOKENS_FILE][:1] + sorted([LORA_FILE, SUBJECT_FILE, TOKENS_FILE])
    card = (tmp_path / "deep" / "dog" / "README.md").read_text()
    assert "<dog>" in card and "load_lora_weights" in card and "rank" in card
    made.save(made.folder, pictures=["sample-0.png"])                       # its own card may be written again
    assert "sample-0.png" in (tmp_path / "deep" / "dog" / "README.md").read_text()


def test_the_embedded_model_travels(tmp_path):
    made = make_subject(tmp_path, lora=False)
    assert json.loads((tmp_path / SUBJECT_FILE).read_text())["base"] == "tiny_sdxl"   # no path of this machine
    assert TINY_SDXL not in model_card(made) and Subject.load(tmp_path).base == TINY_SDXL


def test_formats_of_the_ecosystem(tmp_path):
    make_subject(tmp_path)
    with safe_open(tmp_path / LORA_FILE, "pt") as f:
        assert all(k.startswith("unet.") for k in f.keys()) and json.loads(f.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 8
    with safe_open(tmp_path / TOKENS_FILE, "pt") as f:
        assert set(f.keys()) == {"clip_l", "clip_g"} and json.loads(f.metadata()["tokens"]) == ["<dog>"]


def test_an_adapter_by_another_name(tmp_path):
    pipe = load_tiny_sdxl(device="cpu")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="mine")
    save_adapter(pipe.unet, tmp_path, "mine")
    with safe_open(tmp_path / LORA_FILE, "pt") as f: assert not any("mine" in k for k in f.keys())
    with pytest.raises(ValueError, match="'default'.*mine"): save_adapter(pipe.unet, tmp_path)


def break_it(folder, how):
    note = folder / SUBJECT_FILE
    if how == "no folder": return folder / "nowhere"
    if how == "no note": note.unlink()
    if how == "not json": note.write_text("{")
    if how == "no token": note.write_text(json.dumps({k: v for k, v in json.loads(note.read_text()).items() if k != "token"}))
    if how == "no weights": (folder / LORA_FILE).unlink(), (folder / TOKENS_FILE).unlink()
    if how == "pickle": (folder / LORA_FILE).rename(folder / "pytorch_lora_weights.bin"), (folder / TOKENS_FILE).unlink()
    if how == "truncated": (folder / LORA_FILE).write_bytes((folder / LORA_FILE).read_bytes()[:500])
    if how == "truncated tokens": (folder / TOKENS_FILE).write_bytes(b"\0" * 10)
    return folder


@pytest.mark.parametrize("how, says", {"no folder": "nowhere", "no note": "subject.json.*finetune", "not json": "not valid JSON", "no token": "'token'",
                                       "no weights": "neither", "pickle": "pickle", "truncated": LORA_FILE, "truncated tokens": TOKENS_FILE}.items())
def test_a_broken_folder_is_named(tmp_path, how, says):
    make_subject(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=says): Subject.load(break_it(tmp_path, how))


def test_a_card_of_others_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("# My thesis")
    with pytest.raises(FileExistsError, match="README.md"): Subject("<dog>", "dog").save(tmp_path)
    assert not (tmp_path / SUBJECT_FILE).exists()


def test_bad_subjects():
    for kwargs in (dict(token="", class_noun="dog"), dict(token="<dog>", class_noun=" "), dict(token="<dog>", class_noun=None), dict(token="<dog>", class_noun="dog", base="")):
        with pytest.raises(ValueError, match="Subject"): Subject(**kwargs)


def test_bases_are_compared_by_their_sizes(tmp_path):
    unet = load_tiny_sdxl(device="cpu").unet
    fits = Subject("<dog>", "dog", "/moved/elsewhere", "here", signature=base_signature(unet))
    check_base(fits, unet, "tiny")
    check_base(replace(fits, signature={}), unet, "tiny")                   # written by an older version: nothing to compare
    other = replace(fits, base="stabilityai/stable-diffusion-xl-base-1.0", signature=fits.signature | {"cross_attention_dim": 2048})
    with pytest.raises(ValueError, match="stabilityai/stable-diffusion-xl-base-1.0.*tiny.*cross_attention_dim is 2048 there and 128 here"): check_base(other, unet, "tiny")


@pytest.mark.parametrize("prompt, token, noun, base", [
    ("a <dog> on a <dog>", "<dog>", "dog", "a dog on a dog"), ("A <o>", "<o>", "owl", "An owl"), ("an <o>", "<o>", "Cat", "a Cat"),
    ("sks", "sks", "dog", "dog"), ("asks a sks", "sks", "dog", "asks a dog"), ("a sks dog runs", "sks", "dog", "a dog runs"), ("a sks dogs", "sks", "dog", "a dog dogs"),
    ("a <a+b> (x)", "<a+b>", "c\\d", "a c\\d (x)"), ("a <s0><s1> here", "<s0><s1>", "cat", "a cat here"), ("nothing", "<x>", "cat", "nothing"),
    ("the <x>'s hat", "<x>", "owl", "the owl's hat"), ("banana <x>", "<x>", "owl", "banana owl")])
def test_derive_base(prompt, token, noun, base): assert derive_base(prompt, token, noun) == base


def test_placeholders():
    assert subject_prompt("a {subject}, {subject}", "<x>") == "a <x>, <x>" and base_prompt("a {subject} by a {subject}", "owl") == "an owl by an owl"


def modes(folder):
    return {p.name: oct(p.stat().st_mode & 0o777) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_others_may_read_what_the_umask_lets_them(tmp_path, umask):
    before = os.umask(umask)
    try: make_subject(tmp_path / "dog")
    finally: os.umask(before)
    assert len(modes(tmp_path / "dog")) == 4 and set(modes(tmp_path / "dog").values()) == {oct(0o666 & ~umask)}


@pytest.fixture
def old_torchao(monkeypatch):
    "torchao 0.10, as PEFT looks for it: a module that can be found, and a version in its metadata."
    import importlib.metadata as metadata
    from peft.import_utils import is_torchao_available
    find, version = importlib.util.find_spec, metadata.version
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: "found" if name == "torchao" else find(name, *a))
    monkeypatch.setattr(metadata, "version", lambda name: "0.10.0" if name == "torchao" else version(name))
    is_torchao_available.cache_clear()
    yield
    is_torchao_available.cache_clear()


def test_an_old_torchao_is_named_with_its_cure(old_torchao):
    with pytest.raises(ImportError, match=r'0\.10\.0.*pip install --no-deps -U "torchao>=0\.16"'): check_torchao()


def test_any_other_torchao_is_fine(monkeypatch):
    from peft import import_utils
    for answer in (True, False):
        monkeypatch.setattr(import_utils, "is_torchao_available", lambda: answer)
        check_torchao()


def test_how_the_base_was_loaded_is_known_and_on_the_card(tmp_path):
    made = Subject("<dog>", "dog", "some/sdxl", settings=dict(variant="fp16", revision="v1", vae="some/vae", rank=4))
    assert made.base_options == dict(variant="fp16", revision="v1") and made.vae == "some/vae"
    card = model_card(made)
    assert card.count('from_pretrained("some/vae", torch_dtype=dtype)') == 2 and "AutoencoderKL, StableDiffusionXLPipeline" in card
    assert 'from_pretrained("some/sdxl", variant="fp16", revision="v1", vae=vae, torch_dtype=dtype)' in card
    assert 'from_pretrained(subject.base, variant="fp16", revision="v1", vae=vae, torch_dtype=dtype)' in card
    plain = model_card(Subject("<dog>", "dog", "some/sdxl"))
    assert "vae" not in plain and 'from_pretrained("some/sdxl", torch_dtype=dtype)' in plain


@pytest.mark.parametrize("signature,precision", [({}, "float16 if"), (dict(num_layers=19), "bfloat16")], ids=["unet", "transformer"])
def test_the_card_never_loads_a_large_model_in_float32(signature, precision):
    card = model_card(Subject("<inky>", "octopus", "some/base", signature=signature))
    assert card.count(f"dtype = torch.{precision}") == card.count(", torch_dtype=dtype)") == 2 and "An octopus that" in card
    for block in card.split("```python")[1:]: compile(block.split("```")[0], "card", "exec")

"Scores, grids and intervals: the instruments order what they must, a grid is drawn once and never lost, and an interval keeps its promise."
import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from parallel_rescale.evidence import world_scorers
from parallel_rescale.evidence.reports import axes_of, report, worst
from parallel_rescale.evidence.statistics import compare_rules, curve_gap, hypervolume, hypervolumes, interval
from parallel_rescale.evidence.statistics import levels, matched, mean_interval, metrics_of
from parallel_rescale.evidence.statistics import paired_differences, plot_tradeoff, summarize
from parallel_rescale.evidence.statistics import tradeoff_points
from parallel_rescale.evidence.evaluation import evaluate, room_for, share, Worker
from parallel_rescale.evidence.questions import as_cases, case, named_rules, noise_seed, prompt_data
from parallel_rescale.evidence.questions import prompt_set, PROMPT_SETS, Truth
from parallel_rescale.evidence.store import split_jobs, done_jobs, load_scores, make_plan, MANIFEST, open_results
from parallel_rescale.evidence.store import PARTS, image_name, save_result, SCORES, throughput
from parallel_rescale.method.guidance import RULES
from parallel_rescale.method.rules import CFG, ConsistencyGuidance, ParallelRescale
from parallel_rescale.world.judge import judge_images, load_judge
from parallel_rescale.evidence.scorers import asked_of, ClipScorer, DinoScorer, known_metrics, Prompt, References, score
from parallel_rescale.evidence.scorers import known_scorers, scorer, SiglipScorer
from parallel_rescale.evidence.world_scorers import appearance, APPEARANCE, ASKED, JudgeScorer, LeakScorer
from parallel_rescale.evidence.world_scorers import OracleScorer, SharedScorer, true_images, true_scene, whitening
from parallel_rescale.machine.saved_subject import Subject, base_signature, save_adapter
from parallel_rescale.tools.embedded import TINY_SDXL
from parallel_rescale.world.captions import caption
from parallel_rescale.world.painting import render
from parallel_rescale.world.pictures import attributes, reference_set
from parallel_rescale.world.scenes import ACCESSORIES, ATTRIBUTES, CLASSES, PLACES, random_instance, random_pose, Scene, STYLES, SUBJECTS

CAT = References("pixel_the_cat", "cat", tuple(Image.fromarray(p) for p, _ in reference_set("pixel_the_cat")))
SNOW = [Prompt("a pencil sketch of a {subject} in the snow"), Prompt("a photo of a {subject} in the snow")]


def pictures(n=4, size=64, seed=0):
    return [Image.fromarray(p) for p in np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), np.uint8)]


def brightness(images, prompts, references): return {"brightness": [np.asarray(i).mean() / 255 for i in images]}


def forget():
    for known in (world_scorers._truth, world_scorers.ruler): known.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def few_truths():
    "Two true renders of a prompt are enough to test with."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world_scorers, "true_images", lambda name, asked, n=2, seed=2026: true_images(name, asked, n, seed))
        forget()
        yield
    forget()


@pytest.fixture
def trained_judge():
    shown = np.concatenate([true_images("taxi_the_car", dict(style=s, place="grass"), 2) for s in STYLES])
    found = judge_images(load_judge(), shown)["style"].argmax(1).view(-1, 2)
    if (found == torch.arange(len(STYLES))[:, None]).float().mean() < .8: pytest.skip("the judge in the package is untrained")


# ---------------------------------------------------------------- the protocol of scores


def test_protocol():
    found = score([brightness], pictures(3), SNOW[0], CAT)
    assert found["brightness"].shape == (3,) and found["brightness"].dtype == float
    assert score(brightness, [np.asarray(p) for p in pictures(3)], SNOW[0], CAT)["brightness"].tolist() == found["brightness"].tolist()
    with pytest.raises(ValueError, match="got 1 for 3"): score(brightness, pictures(3), SNOW[:1], CAT)
    with pytest.raises(ValueError, match="shape"): score(lambda *_: {"x": np.zeros((3, 2))}, pictures(3), SNOW[0], CAT)
    with pytest.raises(ValueError, match="two scorers"): score([brightness, brightness], pictures(3), SNOW[0], CAT)


@pytest.mark.parametrize("bad,says", [(dict(text="a cat"), "{subject}"), (dict(text=None), "{subject}"), (dict(text="{subject}", kind=1), "kind")])
def test_bad_prompts(bad, says):
    with pytest.raises(ValueError, match=says): Prompt(**bad)


def test_what_a_prompt_asks_is_read_from_its_text():
    for text, wants, kind in (("a photo of a red {subject} wearing a crown on the beach", dict(style="photo", colour="red", accessory="crown", place="beach"), "photo"),
                              ("a neon sign of a {subject} crying next to a car", dict(style="neon", doing="crying", other="car"), "stylised"), ("a {subject}", {}, "photo")):
        assert asked_of(text) == wants and Prompt(text).kind == kind
    assert Prompt("a blueprint of a {subject}", "mine").kind == "mine"
    rng = np.random.default_rng(0)
    for name in ("tinyworld", "dreambench", "hard", "places"):
        for p in prompt_set(name):                                          # a true picture shows what was asked, and names it again
            scene = true_scene(SUBJECTS["mocha_the_cup"], asked_of(p.text), rng)
            assert asked_of(p.text).items() <= attributes(scene).items() and asked_of(p.text).items() <= asked_of(caption(scene, "{subject}")).items(), p.text


def test_scorers_by_name():
    assert {type(scorer(n)) for n in known_scorers()} == set(known_scorers().values())
    assert scorer(brightness) is brightness and repr(scorer("dino:a/b")) == "dino:a/b" and repr(scorer("judge")) == "judge"
    assert scorer("clip", "cuda:1").device == "cuda:1"
    for bad, says in (("clpi", "clip"), ("judge:x", "no model")):
        with pytest.raises(ValueError, match=says): scorer(bad)
    for name in known_scorers(): assert repr(pickle.loads(pickle.dumps(scorer(name)))) == repr(scorer(name))


# ---------------------------------------------------------------- pretrained encoders, tiny and random


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    "Folders with a tiny CLIP, SigLIP and DINOv2 of random weights."
    import transformers as t
    root = tmp_path_factory.mktemp("encoders")
    tokenizer = t.CLIPTokenizer.from_pretrained(TINY_SDXL, subfolder="tokenizer")
    small = dict(hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2)
    text = dict(**small, vocab_size=len(tokenizer), max_position_embeddings=16, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    vision, processor = dict(**small, image_size=32, patch_size=8), t.CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))
    torch.manual_seed(0)
    models = dict(clip=t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)),
                  siglip=t.SiglipModel(t.SiglipConfig(text_config=text, vision_config=vision)),
                  dino=t.Dinov2Model(t.Dinov2Config(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, image_size=32, patch_size=8)))
    for name, model in models.items():
        for part in (model, processor, tokenizer): part.save_pretrained(root / name)
    return {name: str(root / name) for name in models}


@pytest.mark.parametrize("name,columns", [("clip", {"clip_text", "clip_score", "clip_image"}), ("siglip", {"siglip_text", "siglip_image"}), ("dino", {"dino"})])
def test_encoders(encoders, name, columns):
    made = scorer(f"{name}:{encoders[name]}", "cpu")
    images = pictures(5)
    long = Prompt("a {subject} " + "on the beach " * 30)                    # more than the encoder reads
    found = score(made, images, [SNOW[0], SNOW[1], long, SNOW[0], SNOW[0]], CAT)
    assert set(found) == columns and all(np.isfinite(v).all() and (np.abs(v) <= 2.5).all() for v in found.values())
    alone = [score(made, images[i:i + 1], [SNOW[0], SNOW[1], long, SNOW[0], SNOW[0]][i], CAT) for i in range(5)]
    for k in columns: np.testing.assert_allclose([a[k][0] for a in alone], found[k], atol=1e-5)
    own = References("x", "cat", (images[0],))
    to_self, other = score(made, images[:2], SNOW[0], own)[{"clip": "clip_image", "siglip": "siglip_image", "dino": "dino"}[name]]
    assert to_self == pytest.approx(1, abs=1e-5) and other < to_self
    nobody = score(made, images[:1], SNOW[0], References("x", "cat"))
    assert sum(np.isnan(v).all() for v in nobody.values()) == 1             # the picture score; the text scores stay
    again = pickle.loads(pickle.dumps(made))
    np.testing.assert_allclose(next(iter(score(again, images[:1], SNOW[0], CAT).values())), next(iter(alone[0].values())), atol=1e-6)
    big = [i.resize((80, 50)) for i in images[:2]]
    assert all(np.isfinite(v).all() for v in score(made, big, SNOW[0], CAT).values())


def test_text_score_reads_the_base_prompt(encoders):
    clip, images = ClipScorer(encoders["clip"], "cpu"), pictures(2)
    dog = References("pixel_the_cat", "dog")
    a, b = (score(clip, images, SNOW[0], r)["clip_text"] for r in (References("x", "cat"), dog))
    assert not np.allclose(a, b)
    np.testing.assert_allclose(score(clip, images, SNOW[0], CAT)["clip_score"], 2.5 * np.maximum(a, 0), atol=1e-6)


@pytest.mark.parametrize("kind", [ClipScorer, DinoScorer, SiglipScorer])
def test_missing_weights_say_how_to_get_them(kind, tmp_path):
    with pytest.raises(ValueError, match="hf download"): score(kind(tmp_path / "nowhere" / "at" / "all"), pictures(1), SNOW[0], CAT)
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="dinov2")))
    with pytest.raises(ValueError, match="safetensors"): score(kind(tmp_path), pictures(1), SNOW[0], CAT)


# ---------------------------------------------------------------- TinyWorld's instruments


def ladder(name, wants, seed):
    "The truth, another of the class, another class, nothing worn, the subject as a photo; in one pose."
    rng = np.random.default_rng([seed, 3])
    pose, subject = random_pose(rng), SUBJECTS[name]
    other = next(i for i in SUBJECTS.values() if i.cls != subject.cls)
    scenes = (subject, {}), (random_instance(rng, subject.cls), {}), (other, {}), (subject, dict(accessory="none")), (subject, dict(style="photo"))
    return [Image.fromarray(render(Scene(i, **(wants | wrong), pose=pose, seed=seed))) for i, wrong in scenes]


def climb(scorers, names=("pixel_the_cat", "herbie_the_car")):
    "Scores [ladders, 5]."
    rows = []
    for name in names:
        who = References(name, SUBJECTS[name].cls, tuple(Image.fromarray(p) for p, _ in reference_set(name)))
        for k, style in enumerate(STYLES[1:]):
            wants = dict(style=style, place=PLACES[(k + len(name)) % len(PLACES)], accessory=ACCESSORIES[1 + k % 7])
            rows.append(score(scorers, ladder(name, wants, 100 + k), Prompt(caption(Scene(SUBJECTS[name], **wants), "{subject}")), who))
    return {key: np.stack([r[key] for r in rows]) for key in rows[0]}


def test_the_trained_judge_orders_the_ladder(trained_judge):
    found = climb([JudgeScorer(), OracleScorer(), LeakScorer()])
    truth, other, wrong, bare, photo = range(5)
    def above(name, a, b, right, gap, sign=1):
        gaps = sign * (found[name][:, a] - found[name][:, b])
        gaps = gaps[~np.isnan(gaps)]
        assert (gaps > 0).mean() >= right and gaps.mean() >= gap, (name, a, b, gaps)
    above("style", truth, photo, 1, .8), above("accessory", truth, bare, .9, .6), above("alignment", truth, bare, .9, .2)
    above("identity", truth, other, .85, .2), above("identity", truth, wrong, .9, .4)
    above("identity_photo", truth, other, .8, .15)
    above("class", truth, wrong, 1, .8), above("class", other, wrong, 1, .8)
    above("oracle", truth, other, .85, .5, -1), above("oracle", truth, bare, .85, .2, -1), above("oracle", truth, photo, .9, .3, -1), above("oracle", truth, wrong, 1, 1, -1)
    assert found["oracle"][:, other].mean() < found["oracle"][:, wrong].mean()
    above("leak", truth, photo, 1, .7, -1), above("leak_photo", truth, photo, 1, .8, -1)


def test_judge_probabilities_and_gaps(monkeypatch):
    "A judge that says what we tell it: the scorer picks the right numbers."
    def says(**values): # for each attribute the values of two pictures
        logits = {name: torch.full((2, len(known)), -20.) for name, known in ATTRIBUTES.items()}
        for name, chosen in values.items():
            for i, value in enumerate(chosen): logits[name][i, ATTRIBUTES[name].index(value)] = 20
        return logits
    logits, unit = says(style=("sketch", "neon"), place=("snow", "snow"), cls=("cat", "fish"), colour=("red", "none")), torch.nn.functional.normalize(torch.eye(2, 64), dim=1)
    monkeypatch.setattr(world_scorers, "judge_images", lambda judge, images: {k: v[:len(images)] for k, v in logits.items()} |
                        dict(identity=unit[:1].expand(len(images), -1) if len(images) > 2 else unit, features=unit, vector=unit))
    who = References("not in TinyWorld", "cat", CAT.images)
    found = score(JudgeScorer(), pictures(2), Prompt("a pencil sketch of a red {subject} in the snow"), who)
    for name, values in dict(style=[1, 0], colour=[1, 0], place=[1, 1], alignment=[1, 1 / 3]).items(): assert found[name].round(3).tolist() == pytest.approx(values, abs=1e-3), name
    assert found["class"].round(3).tolist() == [1, 0] and found["identity_photo"].tolist() == [1, 0] and np.isnan(found["identity"]).all()
    assert all(np.isnan(found[k]).all() for k in ASKED if k not in ("style", "colour", "place"))
    unasked = score(JudgeScorer(), pictures(2), Prompt("a {subject}"), References("x", "spaceship"))
    assert all(np.isnan(unasked[k]).all() for k in (*ASKED, "class", "alignment", "identity", "identity_photo"))


def test_what_references_share_is_scored_where_it_was_not_asked(trained_judge):
    def shown(**options): return References("taxi_the_car", "car", tuple(Image.fromarray(p) for p, _ in reference_set("taxi_the_car", **options)))
    wall, scarf = (Image.fromarray(true_images("taxi_the_car", wants, 1, seed=9)[0]) for wants in (dict(place="brick"), dict(place="beach", accessory="scarf")))
    asks = [Prompt("a photo of a {subject} on the beach"), Prompt("a photo of a {subject} in front of a brick wall"), Prompt("a {subject} wearing a scarf")]
    place = score(SharedScorer(), [wall] * 3, asks, shown(regime="same place"))
    assert place["shared_place"][0] > .8 < place["shared_place"][2] and np.isnan(place["shared_place"][1]) and np.isnan(place["shared_accessory"]).all()
    worn = score(SharedScorer(), [scarf, wall, scarf], asks, shown(regime="same outfit"))
    assert worn["shared_accessory"][0] > .6 > .2 > worn["shared_accessory"][1] and np.isnan(worn["shared_accessory"][2]) and np.isnan(worn["shared_place"]).all()
    assert all(np.isnan(v).all() for v in score(SharedScorer(), [wall] * 3, asks, shown()).values())


def look(judge, images):
    "A stand-in for the judge that describes pictures by a few of their own pixels."
    x = torch.nn.functional.adaptive_avg_pool2d(world_scorers.as_tensor(images), 3).flatten(1)
    return {name: x[:, :len(known)] for name, known in ATTRIBUTES.items()} | dict(features=x, identity=torch.nn.functional.normalize(x, dim=1), vector=x[:, :5])


@pytest.fixture
def seeing(monkeypatch):
    "With that stand-in, and four true renders a prompt, what the oracle and the leak score do can be checked without training."
    monkeypatch.setattr(world_scorers, "judge_images", look)
    monkeypatch.setattr(world_scorers, "true_images", lambda name, asked, n=4, seed=2026: true_images(name, asked, n, seed))
    forget()
    yield
    forget()


def test_oracle_without_training(seeing):
    asks = Prompt("a watercolor painting of a {subject} at night")
    def seen_in(**wants): return [Image.fromarray(p) for p in true_images("pixel_the_cat", dict(style="watercolor", place="night") | wants, 6, seed=5)]
    true, place, style, paint = (score(OracleScorer(), seen_in(**w), asks, CAT)["oracle"] for w in ({}, dict(place="beach"), dict(style="neon"), dict(colour="green")))
    assert .4 < true.mean() < 2 and place.mean() > 1.5 * true.mean() and style.mean() > 1.5 * true.mean() and paint.mean() > true.mean()
    anywhere = score(OracleScorer(), seen_in(), Prompt("a watercolor painting of a {subject}"), CAT)["oracle"]
    assert np.isfinite(anywhere).all() and np.isfinite(score(OracleScorer(), seen_in()[:1], Prompt("a {subject}"), CAT)["oracle"]).all()


def test_whitening():
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(4, 4))
    truth = rng.normal(size=(64, 16, 4)) @ mix + rng.normal(size=(64, 1, 4)) * 10
    d = ((whitening(truth) @ (truth - truth.mean(1, keepdims=True)).reshape(-1, 4).T) ** 2).mean()
    assert .6 < d < 1.4                                                    # a typical deviation is about 1, whatever the scale


def test_appearance_knows_colour_and_texture():
    flat, noise = [Image.new("RGB", (64, 64), c) for c in ("gray", "red")], pictures(1)
    grey, red, rough = appearance(flat + noise)
    of = dict(zip(APPEARANCE, range(len(APPEARANCE))))
    assert grey[of["saturation"]] == 0 < red[of["saturation"]] and grey[of["colourfulness"]] == 0 < red[of["colourfulness"]]
    assert grey[of["flat share"]] == 1 and rough[of["flat share"]] < .1 and rough[of["fine detail"]] > .05 > grey[of["fine detail"]]
    assert appearance([np.asarray(f) for f in flat]).tolist() == appearance(flat).tolist()


@pytest.mark.parametrize("style", STYLES[1:])
def test_leak_follows_what_is_mixed_in(style, seeing):
    asks, found = Prompt(caption(Scene(SUBJECTS["pixel_the_cat"], style, "grass"), "{subject}")), []
    for seed in range(4):
        a, b = (true_images("pixel_the_cat", dict(style=s, place="grass"), 1, seed=seed)[0].astype(float) for s in (style, "photo"))
        mixed = [Image.fromarray(((1 - t) * a + t * b).astype(np.uint8)) for t in (0, .5, 1)]
        found.append(score(LeakScorer(), mixed, asks, CAT)["leak"])
    low, middle, high = np.mean(found, 0)
    assert low < middle < high and abs(low) < .35 and abs(high - 1) < .35
    assert np.isnan(score(LeakScorer(), mixed, Prompt("a photo of a {subject}"), CAT)["leak"]).all()


def test_tinyworld_scorers_say_what_they_cannot_do():
    with pytest.raises(ValueError, match="64×64 pictures, got 32×32"): score(JudgeScorer(), pictures(1, 32), SNOW[0], CAT)
    for s in (OracleScorer(), LeakScorer()):
        with pytest.raises(ValueError, match="unknown TinyWorld subject"): score(s, pictures(1), SNOW[0], References("my dog", "dog"))


def test_every_score_has_a_name_and_a_direction():
    assert all(len(v) == 2 and v[1] in (1, -1) for v in known_metrics().values())
    found = score([scorer(n) for n in ("judge", "oracle", "leak", "shared")], pictures(1), SNOW[0], CAT)
    assert set(found) <= set(known_metrics())


# ---------------------------------------------------------------- prompts and cases


def test_prompt_sets():
    sets = {n: prompt_set(n) for n in PROMPT_SETS}
    assert {n: len(s) for n, s in sets.items()} == dict(hard=25, dreambench=25, tinyworld=55, places=10, stylised=20, dreambench_object=25, dreambench_live=25)
    for prompts in sets.values(): assert len({p.text for p in prompts}) == len(prompts) and all(p.kind for p in prompts)
    assert all(len(asked_of(p.text)) >= 3 for p in sets["hard"]) and all(asked_of(p.text).get("place") not in (None, "brick") for p in sets["places"])
    data = prompt_data()["dreambench"]
    assert len(data["class_nouns"]) == 30 and set(data["live_subjects"]) <= set(data["class_nouns"]) and "google/dreambooth" in data["source"]
    assert sets["dreambench_object"][:10] == sets["dreambench_live"][:10] and sets["dreambench_live"][12].text == "a {subject} wearing a rainbow scarf"


def test_prompts_from_files(tmp_path):
    (tmp_path / "a.txt").write_text("# mine\n\na {subject} on the moon\n{subject} asleep\n")
    assert [p.text for p in prompt_set(tmp_path / "a.txt")] == ["a {subject} on the moon", "{subject} asleep"]
    (tmp_path / "b.json").write_text(json.dumps(["a {subject}", dict(text="a {subject} asleep", kind="doings")]))
    assert [p.kind for p in prompt_set(str(tmp_path / "b.json"))] == ["photo", "doings"]
    (tmp_path / "c.txt").write_text("a cat\n")
    (tmp_path / "d.json").write_text("[{}]")
    (tmp_path / "f.json").write_text('[{"text": "a {subject}", "style": "neon"}]')
    for bad, says in (("c.txt", "subject"), ("d.json", "d.json"), ("e.txt", "no file"), ("f.json", "style")):
        with pytest.raises(ValueError, match=says): prompt_set(tmp_path / bad)
    with pytest.raises(ValueError, match="Did you mean"): prompt_set("tinywold")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Two saved subjects with random adapters, and their cases by TinyWorld's names."
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig
    root, made = tmp_path_factory.mktemp("subjects"), {}
    unet = UNet2DConditionModel.from_pretrained(TINY_SDXL, subfolder="unet", torch_dtype=torch.float32)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    for i, (name, noun) in enumerate((("pixel", "cat"), ("bolt", "robot"))):
        g = torch.Generator().manual_seed(i)
        for key, p in unet.named_parameters():
            if "lora_" in key: p.data = .08 * torch.randn(p.shape, generator=g)
        save_adapter(unet, root / name)
        made[f"{name}_the_{noun}"] = Subject(f"<{name}>", noun, folder=str(root / name), signature=base_signature(unet)).save().folder
    return made


@pytest.fixture(scope="module")
def cases(folders): return as_cases([(folder, name) for name, folder in folders.items()])


def test_cases(folders, cases):
    assert [c.references.name for c in cases] == list(folders) and all(len(c.references.images) == 4 and c.style_prompt == "a photo of a {subject}" for c in cases)
    plain = case(folders["pixel_the_cat"], pictures(3))
    assert plain.references.name == "pixel" and len(plain.references.images) == 3 and case(folders["pixel_the_cat"]).references.images == ()
    named = as_cases({"a": (folders["pixel_the_cat"], "pixel_the_cat"), "b": folders["bolt_the_robot"], "c": cases[0]})
    assert [c.references.name for c in named] == ["a", "b", "c"]
    for bad, says in (([], "none"), ([folders["pixel_the_cat"]] * 2, "twice"), (["/no/such/folder"], "no folder"), ([(folders["pixel_the_cat"], "/no/pictures")], "no")):
        with pytest.raises((ValueError, OSError), match=says): as_cases(bad)


def test_named_rules():
    assert list(named_rules({"mine": "cfg", "theirs": CFG(3)})) == ["mine", "theirs"]
    assert list(named_rules(["style_contrast:text=3", "truth"])) == ["style contrast 3/3", "true renders"]
    same = named_rules(["style_contrast:whole=false", "style_contrast"])          # one label, two rules
    assert len(same) == 2 and all("StyleContrast" in n for n in same)
    for bad, says in (([], "none"), (["cfg", "cfg"], "twice"), ([None], "expected a rule"), (["cgf"], "cfg")):
        with pytest.raises(ValueError, match=says): named_rules(bad)


# ---------------------------------------------------------------- the grid


def test_noise_is_paired_and_fixed_for_ever():
    assert noise_seed(0, "pixel_the_cat", "a {subject}") == 897642315
    found = {noise_seed(s, n, p.text) for s in range(4) for n in SUBJECTS for p in prompt_set("tinyworld")}
    assert len(found) == 4 * 12 * 55 and all(0 <= n < 2**31 for n in found)


def test_plan_covers_the_grid_once():
    jobs = split_jobs(["a", "b", "c"], ["x", "y"], 5, [0, 7], 4)
    cells = [(j.subject, j.rule, *c) for j in jobs for c in j.cells]
    assert len(cells) == len(set(cells)) == 3 * 2 * 5 * 2 and [j.index for j in jobs] == list(range(len(jobs)))
    assert max(len(j.cells) for j in jobs) == 4 and [j.rule for j in jobs[:4]] == ["x", "y", "x", "y"]
    shares = [share(jobs, i, 3) for i in range(3)]
    assert sorted(j.index for s in shares for j in s) == list(range(len(jobs))) and max(map(len, shares)) - min(map(len, shares)) <= 1


SMALL = dict(prompts=SNOW, rules=["consistency:text=5", "style_contrast:text=5"], seeds=2, scorers=[brightness], steps=2, batch_size=3, progress=False, threads=1, device="cpu")


@pytest.fixture(scope="module")
def whole(cases, tmp_path_factory):
    "A small evaluation, done in one go: (table, folder)."
    folder = tmp_path_factory.mktemp("whole") / "results"
    return evaluate(cases, **SMALL, images="png", output=folder), folder


def test_the_grid_is_complete_and_paired(whole, cases):
    table, folder = whole
    assert len(table) == 2 * 2 * 2 * 2 and not table.duplicated(["subject", "rule", "prompt", "seed"]).any()
    assert (table.groupby(["subject", "prompt", "seed"]).noise.nunique() == 1).all() and table.noise.nunique() == 8
    assert table.brightness.notna().all() and set(table.family) == {"consistency", "style_contrast"} and set(table.kind) == {"stylised", "photo"}
    saved = pd.read_csv(folder / SCORES)
    assert saved.brightness.tolist() == table.brightness.tolist()              # to the last bit
    for row in table.itertuples():
        picture = Image.open(folder / image_name(row.subject, row.rule, row.prompt, row.seed, "png"))
        assert picture.size == (64, 64) and np.asarray(picture).mean() / 255 == row.brightness
    assert not [p for p in folder.rglob(".*") if p.is_file()]                   # no temporary file is left
    speed = throughput(folder)
    assert speed["pictures"] == 16 and speed["per_second"] > 0 and 0 <= speed["scoring_share"] < 1


def test_a_cell_is_what_the_pipeline_draws(whole, cases):
    "Whoever has the noise seed of a row gets its picture."
    from parallel_rescale.machine.pipeline import SubjectPipeline
    table, folder = whole
    job = split_jobs([c.references.name for c in cases], list(table.rule.unique()), 2, [0, 1], 3)[0]
    rows = table[(table.subject == job.subject) & (table.rule == job.rule)].head(3)
    pipe = SubjectPipeline.from_pretrained(TINY_SDXL, torch_dtype=torch.float32).load_subject(cases[0].folder)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe([t.replace("{subject}", "<pixel>") for t in rows.text], guidance=ConsistencyGuidance(5., 3.), num_inference_steps=2,
                 generator=[torch.Generator().manual_seed(n) for n in rows.noise]).images
    assert np.abs(np.array([np.asarray(d).mean() / 255 for d in drawn]) - rows.brightness).max() < 1e-4


class Stops:
    "A scorer that is interrupted at its n-th call."
    def __init__(self, at): self.at, self.calls = at, 0
    def __repr__(self): return repr(brightness)
    def __call__(self, *args):
        self.calls += 1
        if self.calls == self.at: raise KeyboardInterrupt
        return brightness(*args)


def test_interrupted_and_gone_on(whole, cases, tmp_path):
    table, folder = whole
    first, output = Stops(3), tmp_path / "r"
    with pytest.raises(KeyboardInterrupt): evaluate(cases, **SMALL | dict(scorers=[first]), images="png", output=output)
    assert len(done_jobs(output)) == 2 and len(load_scores(output)) == 6
    (output / PARTS / ".000002.json.99").write_text("{half")                    # what a crash in the middle of writing leaves
    kept = {p: p.stat().st_mtime_ns for p in (output / PARTS).glob("0*.json")}
    again = Stops(0)
    evaluate(cases, **SMALL | dict(scorers=[again]), images="png", output=output)
    assert again.calls == 8 - 2 and all(p.stat().st_mtime_ns == t for p, t in kept.items())   # nothing twice
    assert (output / SCORES).read_bytes() == (folder / SCORES).read_bytes()                    # nothing lost, and the same to the last bit
    third = Stops(0)
    assert len(evaluate(cases, **SMALL | dict(scorers=[third]), images="png", output=output)) == 16 and third.calls == 0


@pytest.mark.cuda
@pytest.mark.parametrize("dtype,unit", [("bfloat16", 2.0**-9), ("float16", 2.0**-12)])
def test_an_evaluation_in_half_precision(whole, cases, dtype, unit, tmp_path):
    "The brightness of a picture is a mean over its pixels, in which roundings (some ten a pixel, see test_pipeline) do not add up."
    table = evaluate(cases, **SMALL | dict(device=None, seeds=1, rules=SMALL["rules"][:1]), dtype=dtype, output=tmp_path / "half")     # few: most CPUs emulate it
    paired = table.merge(whole[0], on=["subject", "rule", "prompt", "seed", "noise"], suffixes=("", "_whole"))
    assert len(paired) == len(table) == len(whole[0]) // 4 and np.isfinite(table.brightness).all()
    drawn = [torch.randn(5120, generator=torch.Generator().manual_seed(0), dtype=d).float() for d in (torch.float32, getattr(torch, dtype))]
    if (drawn[0] - drawn[1]).abs().max() > 16 * unit: return                    # a torch that draws other noise in half precision
    assert 0 < (paired.brightness - paired.brightness_whole).abs().max() < 20 * unit * max(1, whole[0].brightness.abs().max())


@pytest.mark.parametrize("change,says", [(dict(steps=3), "num_inference_steps"), (dict(seeds=3), "seeds"), (dict(rules=["consistency:text=6", "style_contrast:text=5"]), "rules differ"),
                                         (dict(prompts=SNOW[:1]), "prompts"), (dict(scorers=["judge"]), "scorers"), (dict(batch_size=2), "batch_size"),
                                         (dict(negative_prompt="a photo"), "negative_prompt"), (dict(images=None), "images")])
def test_two_manifests_are_never_mixed(whole, cases, change, says):
    _, folder = whole
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match=f"(?s)another evaluation.*{says}"): evaluate(cases, **SMALL | dict(images="png") | change, output=folder)
    assert sorted(folder.rglob("*")) == before


def test_other_weights_are_another_evaluation_and_other_versions_a_warning(whole, cases, tmp_path):
    _, folder = whole
    with pytest.raises(ValueError, match="subjects differ in pixel_the_cat"):
        other = replace(cases[0], folder=cases[1].folder)
        open_results(folder, make_plan([other, cases[1]], **{k: v for k, v in SMALL.items() if k != "progress"}, images="png").manifest())
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["versions"]["torch"] = "0.1"
    with pytest.warns(UserWarning, match="other versions.*torch"): open_results(folder, manifest)
    (tmp_path / "x").mkdir(); (tmp_path / "x" / "diary.txt").write_text("dear diary")
    with pytest.raises(ValueError, match="something else"): open_results(tmp_path / "x", manifest)
    with pytest.raises(ValueError, match="no results folder"): load_scores(tmp_path)
    with pytest.raises(ValueError, match="no picture has been scored"): load_scores(open_results(tmp_path / "new", manifest))


def test_tinyworlds_scorers_refuse_other_sizes_before_anything_is_drawn(cases, tmp_path):
    for scorer in ("judge", "oracle", "leak", "shared"):
        with pytest.raises(ValueError, match=f"scorers: '{scorer}'.*64×64.*128×64"): make_plan(cases, scorers=scorer, width=128)
    with pytest.raises(ValueError, match="scorers: 'judge'"): evaluate(cases, height=256, output=tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_folders_can_be_read_together(whole, cases, tmp_path):
    table, folder = whole
    more = tmp_path / "more"
    open_results(more, json.loads((folder / MANIFEST).read_text()))
    row = table.iloc[0].to_dict() | dict(rule="another")
    save_result(more, dict(job=0, rows=[row], pictures={}, sampling=1., scoring=0.))
    assert len(load_scores(folder, more)) == 17
    with pytest.raises(ValueError, match="occur twice"): load_scores(folder, folder)


@pytest.mark.parametrize("bad,says", [(dict(seeds=0), "seeds"), (dict(seeds=[1, 1]), "seeds"), (dict(steps=0), "steps"), (dict(batch_size=1.5), "batch_size"), (dict(images="gif"), "images"),
                                      (dict(scorers=["jugde"]), "judge"), (dict(rules=["cgf"]), "cfg"), (dict(prompts="nowhere.txt"), "no file"), (dict(dtype="int8"), "dtype")])
def test_bad_arguments_are_found_before_any_work(cases, tmp_path, bad, says):
    with pytest.raises(ValueError, match=says): evaluate(cases, **SMALL | bad, output=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_truths_are_drawn_by_the_renderer(cases):
    p = make_plan(cases[:1], SNOW, ["truth", "truth_vae"], 1, [brightness], device="cpu")
    worker = Worker(p)
    sharp, rebuilt = (worker.generate(cases[0], r, SNOW, [3, 4]) for r in p.rules.values())
    assert [i.size for i in sharp + rebuilt] == [(64, 64)] * 4 and np.asarray(sharp[0]).tolist() == np.asarray(Truth().generate("pixel_the_cat", SNOW, [3, 4])[0]).tolist()
    assert len(Truth().generate("pixel_the_cat", [Prompt("a {subject}"), Prompt("an origami {subject}")], [0, 1])) == 2
    with pytest.raises(ValueError, match="TinyWorld subject"): make_plan({"mine": cases[0]}, SNOW, ["truth"], 1, [brightness])


def test_every_rule_of_the_family_can_be_evaluated(cases, tmp_path):
    ours = {n: c() for n, c in RULES.items() if c.__module__.startswith("parallel_rescale.")}      # other tests make rules too
    table = evaluate(cases[:1], SNOW[:1], ours | {"base": CFG(adapter=0)}, 1, [brightness], tmp_path / "r", steps=1, progress=False, device="cpu")
    assert set(table.rule) == {*ours, "base"} and table.brightness.between(0, 1).all()


# ---------------------------------------------------------------- many workers

SCRIPT = """
import os, sys
from pathlib import Path
from parallel_rescale.evidence.evaluation import evaluate
from tests_scorer import brightness
subjects = dict(zip(sys.argv[2::3], zip(sys.argv[3::3], sys.argv[4::3])))
from parallel_rescale.evidence.scorers import Prompt
prompts = [Prompt("a pencil sketch of a {subject} in the snow"), Prompt("a photo of a {subject} in the snow")]
evaluate(subjects, prompts, ["consistency:text=5", "style_contrast:text=5"], 2, [brightness], sys.argv[1], steps=2, batch_size=3, progress=False, threads=1)
Path(f"process{os.environ['RANK']}of{os.environ['WORLD_SIZE']}").touch()
"""


@pytest.mark.slow
def test_accelerate_processes_give_the_same(whole, folders, tmp_path):
    "Started as `accelerate launch` starts processes with GPUs; with --cpu it starts but one."
    (tmp_path / "run.py").write_text(SCRIPT)
    (tmp_path / "tests_scorer.py").write_text("import numpy as np\ndef brightness(images, prompts, references): return {'brightness': [np.asarray(i).mean() / 255 for i in images]}\n")
    names = [a for n, f in folders.items() for a in (n, f, n)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "run.py", str(tmp_path / "r"), *names]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(p.name for p in tmp_path.glob("process*")) == ["process0of2", "process1of2"]
    assert (tmp_path / "r" / SCORES).read_bytes() == (whole[1] / SCORES).read_bytes()


class KillsOneWorker:
    "A scorer that kills its own process, once, in the middle of the grid."
    def __init__(self, flag): self.flag = str(flag)
    def __repr__(self): return repr(brightness)
    def __call__(self, images, prompts, references):
        try: os.close(os.open(self.flag, os.O_CREAT | os.O_EXCL))
        except FileExistsError: return {"brightness": [np.asarray(i).mean() / 255 for i in images]}
        os.kill(os.getpid(), signal.SIGKILL)


class Fails:
    def __repr__(self): return "fails"
    def __call__(self, *args): raise ValueError("a scorer of the user's own has a bug")


class Missing(Fails):
    @property
    def loaded(self): raise ValueError("an encoder is missing")


@pytest.fixture
def ray():
    "Ray, for whose workers this file, which they cannot import, is part of what they are sent."
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield ray
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    ray.shutdown()


def test_ray_gives_the_same_and_survives_a_killed_worker(whole, cases, tmp_path, ray):
    flag, two = tmp_path / "flag", dict(ray=True, workers=2, cpus_per_worker=.5)
    evaluate(cases, **SMALL | dict(scorers=[KillsOneWorker(flag)]), output=tmp_path / "r", **two)
    assert flag.exists() and (tmp_path / "r" / SCORES).read_bytes() == (whole[1] / SCORES).read_bytes()
    assert not ray.is_initialized()                                           # what it started, it stopped
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    for bad, says in ((Fails(), "a bug"), (Missing(), "encoder is missing")):
        with pytest.raises(ValueError, match=says): evaluate(cases, **SMALL | dict(scorers=[bad]), output=tmp_path / says, **two)
    assert ray.is_initialized() and not list((tmp_path / says).rglob("0*.json"))


def test_room_for_workers():
    assert room_for(dict(CPU=8., GPU=2.), 1, 1) == 2 and room_for(dict(CPU=8.), 2, 0) == 4 and room_for(dict(CPU=1.), .5, 0) == 2
    for resources, cpus, gpus in ((dict(CPU=2.), 64, 0), (dict(CPU=2.), 1, 1), ({}, 1, 0)):
        with pytest.raises(ValueError, match="a worker needs"): room_for(resources, cpus, gpus)


def test_without_ray_there_is_one_clear_error(cases, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"parallel_rescale\[ray\]"): evaluate(cases, **SMALL, output=tmp_path / "r", ray=True)


# ---------------------------------------------------------------- reading the table


def made_up(n_subjects=12, gain=.05, seed=0, scales=(1., 2., 3.), nan=False):
    rng, rows = np.random.default_rng(seed), []
    for s in range(n_subjects):
        easy = rng.normal(0, .2)
        for p in range(4):
            for k in range(3):
                shared = rng.normal(0, .2)
                for family, extra in (("consistency", 0.), ("parallel_rescale", gain)):
                    for scale in scales:
                        rows.append(dict(subject=f"s{s}", rule=f"{family} {scale:g}", family=family, prompt=p, text=f"{{subject}} {p}", kind="photo" if p == 3 else "stylised",
                                         seed=k, noise=k, alignment=1 - .05 * scale + .01 * rng.normal(), weather=np.nan,
                                         identity=.3 + .1 * scale + easy + extra + shared + .01 * rng.normal(), leak=np.nan if nan or p == 3 else .1 * scale))
    return pd.DataFrame(rows)


TABLE = made_up()


def test_summarize():
    found = summarize(TABLE)
    assert set(found.metric) == {"alignment", "identity", "leak"} and set(found.subjects) == {12}
    row = found.query("rule == 'consistency 2' and metric == 'identity'").iloc[0]
    part = TABLE[TABLE.rule == "consistency 2"]
    assert row["mean"] == pytest.approx(part.groupby("subject").identity.mean().mean()) and row.low < row["mean"] < row.high and row.pictures == len(part)
    assert found.query("metric == 'leak'").pictures.max() == 12 * 9            # pictures without a score do not count
    assert summarize(made_up(nan=True), "leak")["mean"].isna().all()
    one = summarize(TABLE[TABLE.subject == "s0"], "identity")
    assert one["mean"].notna().all() and one.low.isna().all() and set(one.subjects) == {1}
    with pytest.raises(ValueError, match="identity"): summarize(TABLE, "identitty")


def test_the_subject_is_the_unit():
    "A hundred times the pictures of the same subjects do not narrow the interval; more subjects do."
    few, many = TABLE, pd.concat([TABLE.assign(seed=TABLE.seed + 3 * i) for i in range(20)])
    width = lambda t: (lambda r: r.high - r.low)(summarize(t, "identity").iloc[0])
    assert width(many) == pytest.approx(width(few)) and width(made_up(48)) < .7 * width(few)


def test_pairing_finds_what_means_cannot():
    summary = summarize(TABLE, "identity").set_index("rule")
    a, b = summary.loc["consistency 2"], summary.loc["parallel_rescale 2"]
    assert a.high > b.low                                                      # the intervals of the means overlap
    row = compare_rules(TABLE, "consistency 2", "identity", ["parallel_rescale 2"]).iloc[0]
    assert row.clear and abs(row.difference - .05) < .01 and row.pairs == 12 * 12 and row.subjects == 12
    back = compare_rules(TABLE, "parallel_rescale 2", "identity", ["consistency 2"]).iloc[0]
    assert back.difference == pytest.approx(-row.difference) and back.low == pytest.approx(-row.high, abs=.01)
    gaps = paired_differences(TABLE.drop(TABLE.index[TABLE.rule == "consistency 2"][:1]), "identity", "parallel_rescale 2", "consistency 2")
    assert gaps.pairs.sum() == 12 * 12 - 1                                     # a picture without its partner does not count
    with pytest.raises(ValueError, match="unknown rule"): compare_rules(TABLE, "consistency 9")


def test_interval_keeps_its_promise():
    rng = np.random.default_rng(0)
    held = np.mean([low <= 0 <= high for _, low, high in (mean_interval(rng.normal(size=12)) for _ in range(300))])
    assert .9 < held < .99
    assert levels(12)[0] < levels(100)[0] < .025 and levels(10**6)[0] == pytest.approx(.025, abs=1e-4)
    assert mean_interval([1.]) == (1., pytest.approx(np.nan, nan_ok=True), pytest.approx(np.nan, nan_ok=True)) and np.isnan(mean_interval([np.nan])[0])
    values = rng.normal(size=(12, 3))
    estimate, low, high = interval(lambda mean: mean, values)
    assert np.allclose(estimate, values.mean(0)) and (low < estimate).all() and (estimate < high).all()
    assert np.allclose([low[0], high[0]], mean_interval(values[:, 0])[1:])


def test_front_and_hypervolume():
    points = np.array([[.9, .1], [.5, .5], [.1, .9], [.4, .4], [.9, .1]])
    assert hypervolume(points) == pytest.approx(.1 * .9 + .4 * .5 + .4 * .1)
    assert hypervolume(points, (.5, .5)) == 0 and hypervolume(points[:1]) == pytest.approx(.09)
    rng = np.random.default_rng(0)
    cloud = rng.random((30, 2))
    grid = (np.stack(np.meshgrid(*[np.arange(200) / 200 + .0025] * 2), -1).reshape(-1, 1, 2) <= cloud[None]).all(-1).any(1).mean()
    assert hypervolume(cloud) == pytest.approx(grid, abs=.01)                  # counted cell by cell
    dominated = [(cloud > point).all(1).any() for point in cloud]
    assert hypervolume(cloud) == pytest.approx(hypervolume(cloud[~np.array(dominated)]))


def test_hypervolumes_and_matched_find_the_better_family():
    found = hypervolumes(TABLE).set_index("family")
    assert found.loc["parallel_rescale", "difference_low"] > 0 and found.loc["consistency", "difference"] == 0 and set(found.settings) == {3}
    gap = matched(TABLE, "parallel_rescale", "consistency")
    assert gap["low"] > 0 and abs(gap["difference"] - .05) < .01 and gap["subjects"] == 12
    none = matched(made_up(gain=0.), "parallel_rescale", "consistency")
    assert abs(none["difference"]) < .01
    # where less is better, the axis is turned round
    better = TABLE.assign(leak=np.where(TABLE.family == "consistency", .5, .2))
    assert hypervolumes(better, "leak", "identity", reference=(1., 0.)).set_index("family").loc["parallel_rescale", "difference_low"] > 0
    assert np.isnan(curve_gap(np.array([[0., 1], [1, 1]]), np.array([[2., 1], [3, 1]])))
    with pytest.raises(ValueError, match="one setting"): matched(TABLE[TABLE.rule != "consistency 1"][lambda t: t.rule != "consistency 2"], "consistency", "parallel_rescale")
    with pytest.raises(ValueError, match="no pictures yet"): tradeoff_points(TABLE[(TABLE.subject != "s0") | (TABLE.rule != "consistency 1")], "alignment", "identity")


def test_worst_looks_at_the_bad_end():
    assert worst(TABLE, "identity", 5).identity.max() <= TABLE.identity.nsmallest(5).max()
    assert worst(TABLE, "leak", 5).leak.min() >= TABLE.leak.nlargest(5).min()


def test_axes():
    assert axes_of(TABLE) == ("alignment", "identity") and axes_of(TABLE.assign(alignment=np.nan)) is None
    assert axes_of(pd.DataFrame(dict(clip_text=[.2], dino=[.5], prompt=[0]))) == ("clip_text", "dino") and set(metrics_of(TABLE)) == {"alignment", "identity", "weather", "leak"}


def test_report(whole, tmp_path):
    folder = open_results(tmp_path / "r", json.loads((whole[1] / MANIFEST).read_text()) | dict(rules={r: r for r in TABLE.rule.unique()}, families=TABLE.set_index("rule").family.to_dict()))
    save_result(folder, dict(job=0, rows=TABLE.astype(object).where(TABLE.notna(), None).to_dict("records"), pictures={}, sampling=2., scoring=1.))
    text = report(folder).read_text()
    for expected in ("12 subjects × 4 prompts × 3 seeds × 6 rules: 864 pictures", "Scores under stylised prompts", "Difference from consistency 1", "hypervolume", "Worst identity", "`tiny_sdxl`"):
        assert expected in text, expected
    assert (folder / "tradeoff.png").stat().st_size > 5000


def test_report_of_a_real_run(whole):
    _, folder = whole
    text = report(folder).read_text()
    assert "16 pictures of 16" in text and (folder / "pictures.png").is_file() and "brightness" in text


def test_tradeoff_plot():
    import matplotlib
    matplotlib.use("agg")
    truth = TABLE[TABLE.rule == "consistency 1"].assign(rule="true renders", family="truth")
    axes = plot_tradeoff(pd.concat([TABLE, truth]))
    labels = [t.get_text() for t in axes.get_legend().get_texts()]
    assert labels == ["consistency", "parallel rescaling", "true renders"] and axes.get_xlabel() == "text alignment"


def test_two_functions_are_two_evaluations_and_rows_are_not(cases):
    from parallel_rescale import ConsistencyGuidance
    def manifest(scale, **more): return make_plan(cases, ["a {subject}"], {"r": ConsistencyGuidance(scale, 1.)}, seeds=1, steps=2, **more).manifest()
    assert manifest(lambda p: 1 + p) != manifest(lambda p: 2 + p) and manifest(lambda p: 1 + p) == manifest(lambda q: 1 + q)
    assert manifest(3.) == manifest(3., max_rows=2)                       # how a call is cut changes no picture
    with pytest.raises(ValueError, match="max_rows"): manifest(3., max_rows=0)


def test_rows_in_one_call_change_no_score(cases, tmp_path):
    options = dict(prompts=["a photo of a {subject}", "a sketch of a {subject}"], rules=["parallel_rescale:text=3,consistency=2"], seeds=1, steps=2, progress=False)
    whole, cut = (evaluate(cases[:1], **options, max_rows=n, output=tmp_path / str(n)) for n in (None, 3))
    assert np.allclose(whole["class"], cut["class"], atol=1e-3)


# how the base is loaded, and truths in half precision

def test_an_evaluation_loads_the_base_as_its_subjects_were_made(cases, tmp_path):
    def made_with(name, **settings):
        import shutil
        shutil.copytree(cases[0].folder, tmp_path / name)
        note = json.loads((tmp_path / name / "subject.json").read_text())
        (tmp_path / name / "subject.json").write_text(json.dumps(note | dict(settings=note["settings"] | settings)))
        return replace(cases[0], folder=str(tmp_path / name), references=References(name, "cat"))
    own, fixed = made_with("own"), made_with("fixed", vae="some/vae", variant="fp16")
    how = lambda *chosen, **more: make_plan(list(chosen), SNOW, ["cfg"], 1, [brightness], device="cpu", **more).loading
    assert how(own) == {} and how(fixed) == dict(vae="some/vae", variant="fp16")
    assert how(fixed, base=Subject.load(fixed.folder).base) == how(fixed)                   # named, it is still the subject's own
    for order in ((own, fixed), (fixed, own)):
        with pytest.raises(ValueError, match="was loaded in different ways"): how(*order)
    assert how(own, fixed, vae="one/vae", variant="fp16") == dict(vae="one/vae", variant="fp16")
    assert how(fixed, base="another/sdxl") == {}


def test_a_truth_through_the_vae_in_half_precision_is_not_black(cases):
    "A decoder whose numbers are too large for fp16 on the way, as SDXL's are."
    from parallel_rescale.evidence.questions import through_vae
    from parallel_rescale.tools.embedded import load_tiny_sdxl
    vae = load_tiny_sdxl().vae
    images = np.stack([np.asarray(p) for p in Truth().generate("pixel_the_cat", SNOW, [3, 4])])
    exact = through_vae(images, vae)
    vae.decoder.conv_in.weight.data *= 3e4; vae.decoder.conv_in.bias.data *= 3e4
    large = through_vae(images, vae)
    halved = through_vae(images, vae.half())
    assert exact.mean() > 20 and large.mean() > 20 and np.abs(halved.astype(int) - large).mean() < 1


def test_a_revision_is_asked_for_before_loading(monkeypatch):
    from parallel_rescale.evidence import store
    asked = []
    monkeypatch.setattr(store, "native_resolution", lambda base, config=None, revision=None: asked.append(revision) or 64)
    store.check_size("judge", "some/sdxl", {}, "v1")
    assert asked == ["v1"]

"""Reference images and captions: every way they lie on people's disks, and one clear error for every way they are broken."""
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from parallel_rescale.subject.backgrounds import check_references, reference_table
from parallel_rescale.subject.references import as_references, crop_square, from_dco_json
from parallel_rescale.subject.references import load_references, open_image, Reference
from parallel_rescale.subject.references import to_rgb

RED = (200, 30, 40)


def save(path, size=(40, 30), color=RED, mode="RGB", **kwargs):
    Image.new("RGB", size, color).convert(mode, palette=Image.Palette.ADAPTIVE).save(path, **kwargs)
    return path


@pytest.fixture
def folder(tmp_path):
    for name in ("02.png", "01.jpg", "10.WEBP"): save(tmp_path / name)
    return tmp_path


def test_plain_folder_is_sorted_and_filtered(folder):
    for name in (".DS_Store", "._01.jpg", "notes.md", "Thumbs.db"): (folder / name).write_bytes(b"x")
    (folder / "sub.png").mkdir()
    found = load_references(folder)
    assert [Path(r.path).name for r in found] == ["01.jpg", "02.png", "10.WEBP"]
    assert {r.caption for r in found} == {"a photo of a {subject}"}
    assert all(r.image.mode == "RGB" and r.image.size == (40, 30) for r in found)
    assert load_references(str(folder), caption="my {subject}")[0].caption == "my {subject}"


@pytest.mark.parametrize("column", ["text", "prompt", "caption"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_imagefolder_metadata(folder, column, kind):
    rows = [("02.png", "a {subject}, asleep"), ("01.jpg", "a {subject} in the snow")]
    if kind == "jsonl": text = "\n".join(json.dumps({"file_name": f, column: t}) for f, t in rows) + "\n\n"
    else: text = f"file_name,{column}\n" + "\n".join(f'{f},"{t}"' for f, t in rows)
    (folder / f"metadata.{kind}").write_text(text, encoding="utf-8-sig")
    with pytest.warns(UserWarning, match="10.WEBP"): found = load_references(folder)
    assert [(Path(r.path).name, r.caption) for r in found] == rows


def test_sidecars_before_the_template(folder):
    (folder / "01.txt").write_text(" a {subject}\n on the beach \n", encoding="utf-8-sig")
    (folder / "02.caption").write_text("a {subject} at night")
    assert [r.caption for r in load_references(folder, caption="the {subject}")] == ["a {subject} on the beach", "a {subject} at night", "the {subject}"]


def test_dco_json(folder):
    entry = dict(images=["data/01.jpg", "data/02.png"], prompts=["a <dog>  on grass", "one <dog>"], base_prompts=["a dog on grass", "one dog"],
                 inserting_tokens=["<dog>"], initializer_tokens=["dog"], identifier="<dog>")
    entry["class"] = "dog"
    plain = {"images": ["01.jpg"], "prompts": ["a photo of sks dog"], "identifier": "sks dog", "class": "dog"}
    style = plain | {"class": "sks dog"}
    file = folder / "config.json"
    file.write_text(json.dumps(dict(full_ti=entry, dreambooth=plain, style=style)))
    found, identifier, noun = from_dco_json(file, "full_ti")
    assert (identifier, noun) == ("<dog>", "dog") and [r.caption for r in found] == ["a {subject} on grass", "one {subject}"]
    assert from_dco_json(file, "dreambooth", root=folder)[0][0].caption == "a photo of {subject}"
    for name, words in ((None, "expected one of full_ti"), ("nope", "nope"), ("style", "no subject")):
        with pytest.raises(ValueError, match=words): from_dco_json(file, name)
    for change, words in ((dict(base_prompts=["a dog on grass", "two dogs"]), "two dogs"), (dict(prompts=["a <dog>"]), "one length"),
                          (dict(images=["x.jpg", "02.png"]), "x.jpg"), (dict(prompts=["a dog", "a <dog>"]), "{subject}")):
        file.write_text(json.dumps(dict(a=entry | change)))
        with pytest.raises(ValueError, match=words): from_dco_json(file)
    with pytest.raises(ValueError, match="missing.json"): from_dco_json(folder / "missing.json")


def test_in_memory():
    array, picture = np.zeros((8, 9, 3), np.uint8), Image.new("L", (5, 5), 255)
    found = as_references([(array, "a {subject} here"), picture, Reference(picture, "an old {subject}", "x.png")], caption="my {subject}")
    assert [r.caption for r in found] == ["a {subject} here", "my {subject}", "an old {subject}"]
    assert [r.image.size for r in found] == [(9, 8), (5, 5), (5, 5)] and found[2].path == "x.png"
    assert all(r.image.mode == "RGB" for r in found)
    for bad, words in (([], "empty"), (picture, "one image"), ([3], r"images\[0\]: got 3"), ([(array, "a cat")], r"images\[0\].*no {subject}"),
                       ([np.zeros((3, 8, 8), np.float32)], "float32")):
        with pytest.raises(ValueError, match=words): as_references(bad)


# pictures

@pytest.mark.parametrize("mode,suffix", [("RGB", "png"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("CMYK", "tif"), ("YCbCr", "jpg"), ("P", "gif")])
def test_every_colour_mode(tmp_path, mode, suffix):
    image = open_image(save(tmp_path / f"a.{suffix}", mode=mode))
    assert image.mode == "RGB" and np.abs(np.asarray(image, int) - RED).max() < 12


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grey_modes(tmp_path, mode):
    image = open_image(save(tmp_path / "a.png", color=(255,) * 3, mode=mode))
    assert image.mode == "RGB" and np.asarray(image).min() == 255


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    assert np.abs(np.asarray(open_image(tmp_path / "a.png"))[..., 0] - ramp / 257).max() <= 1
    dark = np.full((8, 8), 200, np.uint16)                                     # all of it dark: still dark
    Image.fromarray(dark).save(tmp_path / "b.tif")
    assert np.asarray(open_image(tmp_path / "b.tif")).max() == 1
    assert np.asarray(to_rgb(Image.fromarray(np.full((4, 4), .5, np.float32)))).max() == 128


def test_transparency_becomes_white(tmp_path):
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert np.asarray(to_rgb(clear)).min() == 255
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0] * 256)
    palette.save(tmp_path / "p.png", transparency=0)
    assert np.asarray(open_image(tmp_path / "p.png")).min() == 255


@pytest.mark.parametrize("orientation,corner", [(1, (0, 0)), (3, (29, 39)), (6, (0, 29)), (8, (39, 0))])
def test_exif_orientation(tmp_path, orientation, corner):
    pixels = np.full((30, 40, 3), 255, np.uint8)
    pixels[:6, :6] = 0                                                         # a dark top left corner, as the sensor saw it
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = open_image(tmp_path / "a.jpg")
    assert image.size == ((40, 30) if orientation in (1, 3) else (30, 40))
    assert np.asarray(image)[corner].max() < 60


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (7, 3), (1, 1), (500, 20), (64, 64)])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_any_size_is_cut_to_a_square(size, crop):
    image, (top, left) = crop_square(Image.new("RGB", size, RED), 32, crop, np.random.default_rng(0))
    assert image.size == (32, 32) and top >= 0 and left >= 0
    if size[0] == size[1]: assert (top, left) == (0, 0)


def test_crops(folder):
    a = [r.image.tobytes() for r in load_references(folder, resolution=16, crop="random", seed=1)]
    assert a == [r.image.tobytes() for r in load_references(folder, resolution=16, crop="random", seed=1)]
    with pytest.raises(ValueError, match="centre"): load_references(folder, resolution=16, crop="centre")


# errors

def test_folder_errors(tmp_path):
    with pytest.raises(ValueError, match="does not exist"): load_references(tmp_path / "no")
    with pytest.raises(ValueError, match="no image in"): load_references(tmp_path)
    (tmp_path / "a.heic").write_bytes(b"x")
    with pytest.raises(ValueError, match="HEIC"): load_references(tmp_path)
    with pytest.raises(ValueError, match="is a file"): load_references(save(tmp_path / "a.png"))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "tif", "bmp"])
def test_unreadable_images_are_named(tmp_path, suffix):
    rng = np.random.default_rng(0)
    good = tmp_path / f"broken.{suffix}"
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(good)
    whole = good.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not an image"):
        good.write_bytes(content)
        with pytest.raises(ValueError, match=f"broken.{suffix}"): load_references(tmp_path)


def test_caption_errors(folder):
    (folder / "02.txt").write_text("a photo of my dog on a sofa")
    with pytest.raises(ValueError, match=r"02.png.*no {subject}.*my {subject} on a sofa"): load_references(folder, class_noun="dog")
    (folder / "02.txt").write_text("")
    with pytest.raises(ValueError, match="02.png"): load_references(folder)
    with pytest.raises(ValueError, match="caption: .*no {subject}"): load_references(folder, caption="a photo of a dog")


@pytest.mark.parametrize("line,words", [
    ("{broken", "line 2: not JSON"), ('"text"', "expected an object"), ('{"text": "a {subject}"}', "file_name"),
    ('{"file_name": "01.jpg"}', "expected 'file_name' and one of"), ('{"file_name": "no.jpg", "text": "a {subject}"}', "no image 'no.jpg'"),
    ('{"file_name": "01.jpg", "text": "a dog"}', "no {subject}"), ('{"file_name": "01.jpg", "text": null}', "None")])
def test_metadata_errors(folder, line, words):
    (folder / "metadata.jsonl").write_text('{"file_name": "02.png", "text": "a {subject}"}\n' + line)
    with pytest.raises(ValueError, match=words): load_references(folder)


def test_reference_table(folder):
    table = reference_table(load_references(folder, caption="a very long caption of a {subject} " * 9), "<dog>", "dog")
    assert table.mode == "RGB" and table.width == 720 and table.height > 3 * 96


def owner(regime, **options):
    from parallel_rescale.world.pictures import reference_set
    return reference_set("pixel_the_cat", "{subject}", regime, **options)


def test_a_shared_background_that_no_caption_names_is_said_before_training(tmp_path, capsys, monkeypatch):
    from parallel_rescale import finetune
    monkeypatch.setattr("parallel_rescale.subject.previews.SAMPLE_STEPS", 1)
    options = dict(class_noun="cat", token="<pixel>", max_train_steps=1, train_batch_size=1, overwrite=True)
    for images, said in ((owner("same place", named=False), True), (owner("same place"), False), (owner("varied"), False)):
        finetune(images, output=tmp_path / "subject", **options)
        assert ("note: all 4 pictures look alike behind the subject" in capsys.readouterr().out) == said


def test_the_check_of_references_over_the_world():
    from parallel_rescale.world.pictures import reference_set
    from parallel_rescale.world.scenes import PLACES, SUBJECTS
    for name in SUBJECTS:
        for place in PLACES[1:]:                                        # plain grounds come in many colours
            assert check_references(as_references(reference_set(name, "{subject}", "same place", named=False, place=place))), (name, place)
        assert check_references(as_references(reference_set(name, "{subject}"))) is None


def test_the_check_of_references_bears_exposure_crops_and_odd_sets():
    wall = [picture for picture, _ in owner("same place", named=False)]
    darker = [Image.fromarray((picture * f).astype(np.uint8)) for picture, f in zip(wall, (1, .95, .9, .97))]
    assert check_references(as_references(darker)) and check_references(as_references([p.resize((640, 480)) for p in darker]))
    assert check_references(as_references(darker[:2])) is None          # two pictures say little
    assert check_references(as_references(darker, caption="a photo of a {subject} at home")) is None


def test_the_check_of_references_on_real_photos():
    photos = Path(__file__).resolve().parents[2] / "shared" / "dreambooth"
    if not photos.is_dir(): pytest.skip("the photos of DreamBooth's benchmark are not here")
    found = {folder.name for folder in photos.iterdir() if folder.is_dir() and check_references(as_references(folder))}
    assert found == {"berry_bowl", "cat", "dog6", "red_cartoon", "pink_sunglasses"}


def test_the_table_of_references_carries_the_note():
    silent, named = (reference_table(as_references(owner("same place", named=n)), "<pixel>", "cat") for n in (False, True))
    assert silent.height > named.height and silent.width == named.width


def test_prior_preservation_without_a_word_of_its_own_is_warned_of():
    from parallel_rescale.subject.defaults import resolve
    from parallel_rescale.subject.settings import Settings
    given = Settings(class_noun="cat", token="<pixel>", output="x", loss="dreambooth", prior_loss_weight=1.0)
    with pytest.warns(UserWarning, match="train_text_encoder_ti=True tells them apart"): resolve(given)

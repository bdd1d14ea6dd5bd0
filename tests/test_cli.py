"""The command line: what each command writes, what it refuses, and how it says so."""
import inspect
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from parallel_rescale.use import cli
from parallel_rescale.world.pictures import reference_set

STEPS = ["--steps", "2"]


def run(*arguments): return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def ok(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def refused(*arguments):
    "The one line that a faulty call ends with."
    result = run(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    line = result.output.strip().splitlines()[-1]
    assert line.startswith("error: ") and "Traceback" not in result.output
    return line


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i, (picture, caption) in enumerate(reference_set("pixel_the_cat", "{subject}")):
        Image.fromarray(picture).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


@pytest.fixture(scope="module")
def subject(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("subjects") / "pixel"
    output = ok("finetune", photos, "--class-noun", "cat", "--token", "<pixel>", "--output", folder, "--max-train-steps", 2, "--train-batch-size", 2)
    assert "0.png: a photo of a <pixel> on a plain background | a photo of a cat on a plain background" in output
    assert str(folder) in output
    return folder


def test_help_is_there_at_once():
    code = "import sys, parallel_rescale.use.cli as cli\ntry: cli.app(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "finetune", "sample", "compare", "evaluate", "info", "train-tiny"):
        assert command in done.stdout
        assert "--debug" in ok(command, "--help")


def test_finetune_offers_what_the_function_takes():
    from parallel_rescale import finetune
    options, arguments = (set(inspect.signature(f).parameters) for f in (cli.finetune, finetune))
    assert options - arguments == {"debug", "instance_data_dir"}
    assert arguments - options == {"target_modules", "max_grad_norm"}


def test_finetune_reads_the_names_of_diffusers_scripts(photos, tmp_path):
    given = ["--instance_data_dir", photos, "--class_noun", "cat", "--token", "<pixel>", "--output_dir", tmp_path / "out"]
    assert "rank=-1" in refused("finetune", *given, "--rank", "-1")
    assert "no/such/model" in refused("finetune", *given, "--pretrained_model_name_or_path", "no/such/model")
    assert "images: expected one folder" in refused("finetune", photos, *given)
    assert "images: expected one folder" in refused("finetune", *given[2:])


def test_a_subject_is_not_trained_over(subject, photos):
    again = ["finetune", photos, "--class-noun", "cat", "--token", "<pixel>", "--output", subject, "--max-train-steps", 1]
    assert "--overwrite" in refused(*again)


def test_info_says_what_a_folder_holds(subject):
    facts = json.loads(ok("info", subject, "--json"))
    assert facts["token"] == "<pixel>" and facts["class noun"] == "cat" and "embedded" in facts["base"] and facts["max_train_steps"] == 2
    assert "rank 8" in facts["pytorch_lora_weights.safetensors"]
    table = ok("info", subject)
    assert "<pixel>" in table and "max_train_steps" in table


def test_sample_writes_pictures_that_depend_on_their_seed_alone(subject, tmp_path):
    ok("sample", subject, "a photo of a <pixel>", "--output", tmp_path / "one.png", "--seed", 4, *STEPS)
    ok("sample", subject, "a photo of a {subject}", "--output", tmp_path / "two.png", "--seed", 3, "--num-images", 2, *STEPS)
    one, three, four = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("one.png", "two_3.png", "two_4.png"))
    assert one.shape == (64, 64, 3)
    assert abs(one - four).max() <= 1 < abs(one - three).max()


def test_sample_takes_the_pipelines_options(subject, tmp_path):
    picture = tmp_path / "new" / "folder" / "picture.webp"
    ok("sample", subject, "a photo of a <pixel>", "--rule", "cfg:scale=3", "--negative-prompt", "a sketch", "--base-prompt", "a photo of a dog",
       "--width", 80, "--height", 64, "--max-rows", 2, "--output", picture, *STEPS)
    assert Image.open(picture).size == (80, 64)
    assert "--overwrite" in refused("sample", subject, "a <pixel>", "--output", picture, *STEPS)
    ok("sample", subject, "a <pixel>", "--output", picture, "--overwrite", *STEPS)


def test_compare_draws_a_column_for_each_rule(subject, tmp_path):
    narrow, wide = tmp_path / "narrow.png", tmp_path / "wide.png"
    ok("compare", subject, "a watercolor painting of a <pixel>", "--rule", "cfg", "--num-seeds", 2, "--output", narrow, *STEPS)
    ok("compare", subject, "a watercolor painting of a <pixel>", "--rule", "cfg", "--rule", "parallel_rescale:text=5,every=2", "--num-seeds", 2, "--output", wide, *STEPS)
    assert Image.open(wide).width > Image.open(narrow).width >= 128
    assert Image.open(narrow).height >= 256


@pytest.mark.parametrize("arguments, expected", [
    (["--rule", "paralel_rescale"], "parallel_rescale"),
    (["--rule", "cfg:scale=nan"], "scale"),
    (["--rule", "cfg:size=3"], "scale"),
    (["--output", "picture.pgn"], ".png"),
    (["--seed", "-1"], "seed"),
    (["--dtype", "float23"], "float32"),
    (["--base", "no/such/folder/anywhere"], "no/such/folder/anywhere"),
])
def test_faults_in_arguments_of_sample(subject, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert expected in refused("sample", subject, "a photo of a <pixel>", *STEPS, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_faults_in_folders(tmp_path, photos):
    options = ["--class-noun", "cat", "--token", "<pixel>", "--output", tmp_path / "out"]
    assert "does not exist" in refused("finetune", tmp_path / "nowhere", *options)
    (tmp_path / "empty").mkdir()
    assert "no image" in refused("finetune", tmp_path / "empty", *options)
    assert "subject.json" in refused("info", tmp_path)
    assert "subject.json" in refused("sample", photos, "a <pixel>", "--output", tmp_path / "x.png")
    assert "pixel_the_cat" in refused("demo", "--subject", "pixel_the_cet", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_debug_shows_where_an_error_comes_from(tmp_path):
    assert isinstance(run("info", tmp_path, "--debug").exception, FileNotFoundError)


def test_an_interrupted_command_ends_quietly(subject, monkeypatch):
    def interrupt(*_): raise KeyboardInterrupt
    monkeypatch.setattr(cli, "describe_subject", interrupt)
    result = run("info", subject)
    assert result.exit_code == 130 and result.output.strip() == "interrupted"


def test_a_fault_of_the_program_is_one_line_too(subject, monkeypatch):
    monkeypatch.setattr(cli, "describe_subject", lambda folder: {}["nothing"])
    assert "KeyError" in refused("info", subject) and "--debug" in refused("info", subject)


@pytest.mark.slow                                # .ci/run runs the demo itself
def test_demo_compares_the_rules(tmp_path):
    from parallel_rescale.use.demo import DEMO_PROMPTS, DEMO_RULES
    folder = tmp_path / "demo"
    arguments = ["demo", "--output", folder, "--subject", "inky_the_octopus", "--num-seeds", 1, "--max-train-steps", 2, *STEPS]
    output = ok(*arguments)
    assert str(folder / "report.md") in output
    figures = {f"{kind}_{place}.png" for kind in ("grid", "references") for place in ("same_place", "varied")}
    assert {path.name for path in folder.iterdir()} == figures | {"grid.png", "worst.png", "consistency_p.png", "report.md", "same_place", "varied"}
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert "<inky>, an octopus" in report and "| max_train_steps | 2 |" in report
    for name in ("the truth", *(rule.label for rule in DEMO_RULES)): assert report.count(f"| {name} | ") == 2
    grid = Image.open(folder / "grid_same_place.png")
    assert grid.width > 6 * 128 and grid.height > len(DEMO_PROMPTS) * 128
    assert "--overwrite" in refused(*arguments)
    ok(*arguments, "--overwrite")
    for place in ("same_place", "varied"): assert json.loads(ok("info", folder / place, "--json"))["class noun"] == "octopus"


def test_a_prompt_without_the_subject_is_warned_of(subject, tmp_path):
    output = ok("sample", subject, "a photo of a cat", "--output", tmp_path / "cat.png", *STEPS)
    assert any(line.startswith("warning: ") and "<pixel>" in line for line in output.splitlines())


def test_evaluate_scores_and_reports(subject, tmp_path):
    (tmp_path / "prompts.txt").write_text("a photo of a {subject} on the beach\na pencil sketch of a {subject}\n")
    arguments = ["evaluate", f"{subject}=pixel_the_cat", "--prompts", tmp_path / "prompts.txt", "--rule", "cfg", "--rule", "parallel_rescale",
                 "--num-seeds", 1, "--output", tmp_path / "results", *STEPS]
    output = ok(*arguments)
    assert str(tmp_path / "results" / "report.md") in output and "parallel rescaling 7.5/3" in output
    assert ok(*arguments).splitlines()[-1] == output.splitlines()[-1]  # nothing is left to do
    assert "holds" in refused(*arguments, "--num-seeds", 2)

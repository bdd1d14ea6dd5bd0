"The explorer and the explainers without a browser: controls are moved from Python, JavaScript is run by node."
import copy, gc, html.parser, json, shutil, subprocess, time, weakref
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np, pytest, torch

pytest.importorskip("ipywidgets")
import ipywidgets as w
from parallel_rescale.machine.guide import load_subject
from parallel_rescale.method.guidance import Branch, Guidance
from parallel_rescale.method.rules import CFG, ConsistencyGuidance, OrthogonalOnly, ParallelRescale
from parallel_rescale.subject.adapters import decode
from parallel_rescale.tools.embedded import load_tiny_sdxl
from parallel_rescale.tools.util import PACKAGE
from parallel_rescale.use import explainers
from parallel_rescale.use.controls import NO_RULE
from parallel_rescale.use.explorer import explore
from parallel_rescale.use.story import paint, Settings, open_pipeline
from parallel_rescale.world.toy import toy_scores, toy_sigmas
from tiny_pipelines import tiny

LONG = 300        # seconds: how long a busy machine may take


@pytest.fixture(scope="module")
def pipe(): return open_pipeline()[0]


@pytest.fixture
def explorer(pipe):
    made = explore(pipe, steps=4).wait(LONG)
    yield made
    made.stop()
    made.wait(LONG)


def pixels(image): return np.asarray(image).tolist()
def inside(widget): return [widget, *(x for child in getattr(widget, "children", ()) for x in inside(child))]
def classes(explorer): return {name for x in inside(explorer.widget) for name in x._dom_classes}


def test_it_opens_with_two_rules_on_the_same_noise_and_tells_of_both(explorer):
    assert explorer.settings == Settings(steps=4) and len(explorer.images) == 2
    assert [p.rule for p in explorer.painted] == list(explorer.settings.rules)
    for side, picture in enumerate(explorer.screen.pictures):
        assert "data:image/png;base64," in picture.value and 'alt="Picture by' in picture.value and "place night" in picture.value and "the judge sees a" in picture.value
    shown = 2 + sum(len(p.previews) + 1 for p in explorer.painted)          # charts; previews and pictures
    assert explorer.screen.charts.value.count("<img") == shown and explorer.screen.maps.value.count("<img") == 2
    assert "Painted in" in explorer.screen.message.value and repr(explorer).startswith("Explorer(")


def test_a_slider_moves_its_own_picture_and_leaves_the_other(explorer):
    first, second = explorer.painted
    explorer.asking.rules[1].controls["consistency"].value = 1.
    explorer.wait(LONG)
    assert explorer.painted[0] is first and explorer.painted[1].rule == ParallelRescale(5., 1.)
    assert pixels(explorer.images[1]) != pixels(second.image)


@pytest.mark.parametrize("name, value", [("seed", 1), ("steps", 3), ("prompt", "a {subject} at night"), ("style", "neon"), ("place", "city"), ("beside it", "ball")])
def test_every_control_changes_the_picture(explorer, name, value):
    before = pixels(explorer.image)
    explorer.asking.plain[name].value = value
    assert pixels(explorer.wait(LONG).image) != before


def test_a_button_draws_from_another_noise(explorer):
    explorer.asking.another.click()
    assert explorer.wait(LONG).settings.seed == 1 == explorer.shown.seed


def test_the_lists_write_the_prompt_and_the_prompt_moves_the_lists(explorer):
    lists = explorer.asking.lists
    explorer.asking.prompt.value = "a photo of a <pixel> on the beach"
    lists["style"].value = "watercolor"
    assert explorer.settings.prompt == "a watercolor painting of a <pixel> on the beach"
    lists["beside it"].value = "robot"
    lists["accessory"].value = "bow tie"
    assert explorer.settings.prompt == "a watercolor painting of a <pixel> wearing a bow tie next to a robot on the beach"
    explorer.asking.prompt.value = "a green <pixel> asleep at night in the rain with a ball on the left"
    shown = {name: made.value for name, made in lists.items() if made.value}
    assert shown == {"place": "night", "weather": "rain", "colour": "green", "doing": "asleep", "beside it": "ball"}
    lists["weather"].value = ""
    assert explorer.settings.prompt == "a photo of a green <pixel> asleep with a ball on the left at night", "the side stays"
    lists["beside it"].value = ""
    assert explorer.settings.prompt == "a photo of a green <pixel> asleep at night"


@pytest.mark.parametrize("name, value, says", [
    ("prompt", "  ", "prompt: expected a text such as"), ("seed", -1, "seed: expected a whole number from 0"),
])
def test_bad_input_gives_one_message_and_keeps_the_pictures(explorer, name, value, says):
    before = [pixels(im) for im in explorer.images]
    explorer.asking.plain[name].value = value
    explorer.wait(LONG)
    message = explorer.screen.message.value
    assert says in message and 'role="alert"' in message and message.count("<div") == 1
    assert [pixels(im) for im in explorer.images] == before and "the last good picture" in explorer.screen.pictures[0].value
    explorer.change(**{name: getattr(Settings(), name)}).wait(LONG)
    assert "role=\"status\"" in explorer.screen.message.value


def test_a_rule_says_what_it_cannot_take(explorer):
    explorer.asking.rules[0].names.value = "skip_layer"
    explorer.asking.rules[0].controls["layers"].value = "no_such_block"
    explorer.wait(LONG)
    assert "pr-error" in explorer.screen.message.value and "no_such_block" in explorer.screen.message.value


@dataclass(frozen=True, repr=False)
class _Broken(Guidance):
    name = "broken"
    branches = (Branch("null"), Branch("base"), Branch("subject", 1.))
    def combine(self, null, base, subject): raise RuntimeError("this rule is <broken>")


def test_what_goes_wrong_while_painting_becomes_a_message(explorer):
    before = explorer.image
    explorer.change(rules=_Broken()).wait(LONG)
    assert "this rule is &lt;broken&gt;" in explorer.screen.message.value and explorer.image is before
    explorer.change(rules=CFG(3.), steps=2).wait(LONG)
    assert explorer.painted[0].rule == CFG(3.) and "has no p" in explorer.screen.charts.value


def test_stop_gives_up_and_the_last_pictures_come_back(explorer):
    before = explorer.images
    explorer.change(steps=1000)
    while "step" not in explorer.screen.pictures[0].value: time.sleep(.01)
    explorer.stop()
    explorer.wait(LONG)
    assert "Stopped" in explorer.screen.message.value and explorer.images == before
    assert all("the last good picture" in p.value for p in explorer.screen.pictures)
    assert "step" not in vars(explorer.pipe.scheduler), "nothing stays behind in the pipeline"


def test_a_new_wish_stops_the_one_under_way(explorer):
    explorer.change(steps=1000)
    began = time.perf_counter()
    for seed in range(5): explorer.change(steps=3, seed=seed)
    assert time.perf_counter() - began < 5, "asking never waits for a picture"
    explorer.wait(LONG)
    assert explorer.shown == Settings(steps=3, seed=4) and len(explorer.painted[0].record) == 3


def test_the_code_makes_the_same_picture_to_the_bit(explorer):
    explorer.change(prompt="a pencil sketch of a {subject} in the city", seed=7,
                    rules=(ParallelRescale(3., 2.5, ratio="center"), OrthogonalOnly(3., 1.)))
    explorer.asking.rules[0].controls["gain"].value = .35
    explorer.wait(LONG)
    for code, image in zip(explorer.codes, explorer.images):
        names = {"pipe": explorer.pipe}
        exec(code, names)
        assert pixels(names["image"]) == pixels(image)
    assert "gain=0.35" in explorer.code and explorer.code == explorer.codes[0]


def test_the_code_of_the_packaged_subject_needs_nothing_else():
    explorer = explore(steps=2, rules=ParallelRescale(5., 3.)).wait(LONG)
    exec(explorer.code, names := {})
    assert pixels(names["image"]) == pixels(explorer.image)


def test_a_prompt_without_the_subject_is_painted_and_says_so(explorer):
    explorer.change(prompt="a photo of a cat in the snow").wait(LONG)
    assert "identity cannot show" in explorer.screen.message.value


def test_it_explores_pipelines_of_diffusers_and_models_without_a_subject():
    plain = load_tiny_sdxl(device="cpu")
    alone = explore(plain, steps=2).wait(LONG)
    assert alone.settings.rules == (CFG(5., adapter=0),) and len(alone.images) == 1
    load_subject(plain, PACKAGE / "data" / "subject_pixel")
    guided = explore(plain, steps=2, rules=(ParallelRescale(3., 3.), CFG(3.))).wait(LONG)
    exec(guided.code, names := {"pipe": plain})
    assert "with guide(pipe, " in guided.code and pixels(names["image"]) == pixels(guided.image)


def test_a_picture_is_shown_before_it_is_finished(pipe):
    explorer, seen = explore(pipe, steps=3).wait(LONG), []
    explorer.screen.pictures[0].observe(lambda change: seen.append(change.new), "value")
    explorer.change(seed=9, steps=6).wait(LONG)
    assert sum("of 6</div>" in text for text in seen) >= 4 and "step 1 of 6" in seen[0]


def test_every_control_has_a_label_and_everything_its_class(explorer):
    for control in inside(explorer.widget):
        if hasattr(control, "value") and not isinstance(control, w.HTML) or isinstance(control, w.Button):
            assert control.description.strip(), control
    assert {f"pr-{name}" for name in """explorer controls prompt style place weather accessory colour doing beside-it seed another steps stop rule rule-0 rule-1
        field-text field-consistency field-ratio field-gain field-whole screen message picture picture-0 picture-1 step map charts
        code""".split()} <= classes(explorer)


def test_comparing_can_be_switched_off_and_on(explorer):
    explorer.asking.rules[1].names.value = NO_RULE
    assert explorer.asking.rules[1].names.label == "no second rule", "no blank line"
    assert len(explorer.wait(LONG).images) == 1 and explorer.screen.pictures[1].value == ""
    explorer.asking.rules[1].names.value = "orthogonal_only"
    assert explorer.wait(LONG).settings.rules == (ConsistencyGuidance(5., 2.), OrthogonalOnly())


def test_two_explorers_share_a_pipeline_one_after_the_other(pipe):
    rules, asked = ParallelRescale(5., 3.), [(0, 6), (1, 5)]
    alone = [paint(pipe, Settings().prompt, rules, seed, steps).image for seed, steps in asked]
    both = [explore(pipe, rules=rules, seed=seed, steps=steps) for seed, steps in asked]
    for explorer, image in zip(both, alone): assert pixels(explorer.wait(LONG).image) == pixels(image)
    assert "step" not in vars(pipe.scheduler)


def test_whoever_waits_for_a_pipeline_may_be_stopped(pipe):
    first = explore(pipe, rules=CFG(3.), steps=1000)
    while "step" not in first.screen.pictures[0].value: time.sleep(.01)
    second = explore(pipe, rules=CFG(3.), steps=2)
    second.stop()
    second.wait(LONG)
    assert second.images == [] and not first.latest.idle
    first.close()


def test_closed_it_lets_go_of_the_pipeline_and_of_every_widget():
    import ipywidgets.widgets.widget as known
    own, before = load_tiny_sdxl(device="cpu"), set(known._instances)
    explorer, gone = explore(own, rules=CFG(3., adapter=0), steps=2).wait(LONG), weakref.ref(own)
    explorer.change(rules=(CFG(2., adapter=0),)).wait(LONG)
    image, code = explorer.image, explorer.code
    explorer.close()
    del own
    gc.collect()
    assert gone() is None and set(known._instances) == before
    assert explorer.image is image and explorer.code == code
    with pytest.raises(ValueError, match="is closed"): explorer.change(steps=3)


def test_another_s_patch_of_the_scheduler_outlives_a_picture(pipe):
    pipe.scheduler.step = patched = pipe.scheduler.step
    try:
        paint(pipe, "a {subject}", CFG(3.), steps=1)
        assert vars(pipe.scheduler)["step"] is patched
    finally: del pipe.scheduler.step


@pytest.mark.parametrize("name", ["flux1", "chroma"])
def test_pictures_that_come_as_tokens_are_previewed(name):
    flux = tiny(name).pipe
    flux.default_sample_size = 16
    made = paint(flux, "a cat", CFG(3., adapter=0), steps=2)
    assert [im.size for im in made.previews.values()] == [made.image.size] * 2 == [(32, 32)] * 2
    # after the last step the sampler's x is the picture's latents
    assert np.abs(np.subtract(made.previews[1], made.image, dtype=float)).max() <= 1


@pytest.mark.parametrize("name", ["flux2_dev", "qwen_image"])
def test_latents_that_cannot_be_previewed_are_refused_before_any_work(name):
    other = tiny(name).pipe
    for call in (explore, lambda p: paint(p, "a cat", CFG(3.))):
        with pytest.raises(ValueError, match=f"{type(other).__name__} has no scaling_factor"): call(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_vae_that_rests_elsewhere_decodes_where_its_hook_takes_it(pipe, dtype):
    """As under diffusers' CPU offload, where `vae.device` is the CPU: here weights rest on "meta"."""
    vae, latents = copy.deepcopy(pipe.vae).to(dtype), torch.randn(1, pipe.vae.config.latent_channels, 8, 8)
    expected, state = decode(vae, latents), vae.state_dict()
    vae.to("meta")
    def fetch(module): module.to_empty(device="cpu").load_state_dict(state)
    vae._hf_hook = SimpleNamespace(execution_device="cpu", pre_forward=fetch)
    assert vae.device.type == "meta" and torch.equal(decode(vae, latents), expected)
    assert vae.dtype == dtype


def test_settings_that_cannot_be_painted_are_refused_before_any_work(pipe):
    for wrong, says in ((dict(steps=0), "steps: "), (dict(prompt=""), "prompt: "), (dict(rules=3), "not iterable|rules: ")):
        with pytest.raises((ValueError, TypeError), match=says): explore(pipe, **wrong)
    with pytest.raises(ValueError, match="pipe_or_subject: expected"): explore(3)


# ---------------------------------------------------------------- explainers

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


def in_javascript(tmp_path, name, expression):
    (tmp_path / "it.mjs").write_text(explainers.explainer_source(name), encoding="utf-8")
    (tmp_path / "ask.mjs").write_text(f'import * as it from "./it.mjs";\nconsole.log(JSON.stringify({expression}));', encoding="utf-8")
    return json.loads(subprocess.check_output([shutil.which("node"), tmp_path / "ask.mjs"]))


@needs_node
def test_the_projection_in_javascript_is_the_package_s(tmp_path):
    random = torch.Generator().manual_seed(0)
    cases = [[*torch.randn(2, 2, generator=random).tolist(), *torch.rand(3, generator=random).tolist()] for _ in range(40)]
    cases += [[[0., 0.], [1., 2.], 0., 1., 1.], [[1e-20, 0.], [1., 2.], 0., 1., 1.], [[1., 1.], [1., 2.], .5, 0., 1.]]
    theirs = in_javascript(tmp_path, "projection", f"{json.dumps(cases)}.map(([t, c, m, s, k]) => it.rescaled(c, t, m, s, k))")
    for found, (text, cons, mean, std, gain) in zip(theirs, cases):
        ours = explainers.projection_at(text, cons, mean, std, gain)
        for name in ("p", "parallel", "orthogonal", "direction"): assert found[name] == pytest.approx(ours[name], abs=1e-9), name
        assert found["pHat"] == pytest.approx(ours["p_hat"], abs=1e-9)


@needs_node
@pytest.mark.parametrize("rule", explainers.TOY_RULES)
@pytest.mark.parametrize("text, consistency, leak", [(3., 3., .6), (7.5, 1., .95), (2., 4., .1), (1., 0., 0.)])
def test_the_toy_in_javascript_goes_the_package_s_way(tmp_path, rule, text, consistency, leak):
    values = explainers.explainer_values("toy", rule=rule, text=text, consistency=consistency, leak=leak)
    ours, sigmas = explainers.toy_points(**values), toy_sigmas().tolist()
    predicted = (ours[1:] - ours[:-1]).flatten(1) / torch.tensor(sigmas).double().diff()[:, None]
    asked = json.dumps(dict(text=text, consistency=consistency, leak=leak))
    # step by step from Python's own points: a rule that overshoots drives roundings apart over a whole run
    theirs = in_javascript(tmp_path, "toy", f"{ours[:-1].flatten(1).tolist()}.map((x, i) => Array.from(it.guided("
                                            f"it.toyWorld({leak}), '{rule}', {asked}, x, {sigmas}[i])))")
    far = (torch.tensor(theirs, dtype=torch.float64) - predicted).abs().amax(1) / predicted.abs().amax(1)
    assert far.max() < 1e-4, far


@needs_node
@pytest.mark.parametrize("rule", explainers.TOY_RULES)
def test_the_toy_in_javascript_ends_where_the_package_s_does(tmp_path, rule):
    values = explainers.explainer_values("toy", rule=rule)
    asked = json.dumps({name: values[name] for name in ("text", "consistency", "leak")})
    path, scores = in_javascript(tmp_path, "toy", f"(path => [path.map(x => Array.from(x)), it.toyScores(path.at(-1))])"
                                                  f"(it.toySample('{rule}', {asked}, {values['noise']}))")
    ours = explainers.toy_points(**values)
    assert torch.allclose(torch.tensor(path, dtype=torch.float64), ours.flatten(1), atol=2e-3, rtol=2e-3)
    assert scores == pytest.approx(toy_scores(ours), abs=.01)


@needs_node
def test_a_page_without_a_kernel_has_a_model_of_its_own(tmp_path):
    said = in_javascript(tmp_path, "toy", "(m => { const heard = []; m.on('change:leak', () => heard.push(m.get('leak'))); "
                                          "it.tell(m, {leak: .5}); return heard; })(it.still({leak: .1}))")
    assert said == [.5]


@pytest.mark.parametrize("name", explainers.FIRST)
def test_the_fragment_for_a_page_holds_all_it_needs(name):
    found = []
    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes): found.append((tag, dict(attributes)))
    Reader().feed(explainers.explainer_html(name))
    assert [tag for tag, _ in found] == ["div", "noscript", "script"] and found[2][1] == {"type": "module"}
    assert json.loads(found[0][1]["data-values"]) == explainers.explainer_values(name)
    assert found[0][1]["data-explainer"] == name


def test_the_colours_in_javascript_are_the_rules_own():
    from parallel_rescale import RULES
    source = explainers.explainer_source("toy")
    for name in explainers.TOY_RULES: assert f'{name}: "{RULES[name].color}"' in source


def test_the_widgets_of_the_explainers_can_be_read_and_set():
    pytest.importorskip("anywidget")
    toy = explainers.explainer("toy", leak=.2)
    toy.rule = "parallel_rescale"
    assert (toy.leak, toy.rule, toy.text) == (.2, "parallel_rescale", 3.) and len(toy.noise) == 512
    with pytest.raises(Exception, match="apg"): toy.rule = "apg"
    projection = explainers.explainer("projection", g_text=[1, 0])
    assert projection.g_text == [1., 0.] and isinstance(projection, explainers._widget_class("projection"))

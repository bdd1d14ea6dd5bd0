"""The tables of rules and models in nbs/index.ipynb: `python .ci/make_features.py`, then make_readme.

Rules and their costs come from the rules themselves and from benchmarks/memory.md, where calls and memory are counted; what runs
where comes from the names of the tests that run it.
"""
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INDEX, TESTS = "nbs/index.ipynb", [f"tests/test_{name}.py" for name in (
    "borders", "guider", "flow_matching", "finetune")]
START, END = "<!-- features: made by .ci/make_features.py -->", "<!-- /features -->"
# as they are called in the tests, in the order of the table
MODELS = dict(sdxl="SDXL", sd15="SD 1.5", sd3="SD 3 and 3.5", flux1="FLUX.1", flux2_dev="FLUX.2 dev", flux2_klein="FLUX.2 klein",
              chroma="Chroma", qwen_image="Qwen-Image", z_image="Z-Image", sana="Sana")
# test → (task; None: it stands in brackets behind the name, model; None: likewise)
EQUAL = {"test_cfg_is_the_stock_pipelines_own": ("from text", None), "test_cfg_equals_stock": ("from text", None),
         "test_cfg_is_diffusers_own_bit_for_bit": ("from text", "sdxl"), "test_cfg_equals_stock_in_other_tasks": (None, None)}
# tests of which each runs all rules that run from text
ALL = "test_every_rule_runs_in_other_tasks"
TASKS = ["from text", "img2img", "inpaint"]
# test → (column, the word in its brackets or None → model)
MORE = {"test_every_subject_has_its_own_lora": ("several subjects", {name: name for name in MODELS}),
        "test_stock_diffusers_loads_the_same_model": ("fine-tuned", {None: "sdxl"}),
        "test_the_stock_pipeline_loads_it_and_paints_something_else": ("fine-tuned", dict(sd3="sd3", flux="flux1", z_image="z_image"))}


def tested(root=ROOT) -> list:
    "(test, the words in its brackets) of the tests of all architectures."
    done = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *TESTS],
                          cwd=root, capture_output=True, text=True)
    if done.returncode: raise RuntimeError(done.stdout + done.stderr)
    return [(m[1], re.split("-", m[2] or "")) for m in re.finditer(r"::(\w+)(?:\[(.*)\])?$", done.stdout, re.M)]


def source_of(kind) -> str:
    "Where a rule comes from, by its docstring."
    said = " ".join(kind.__doc__.split())
    if "this project's" in said: return "this project"
    if paper := re.search(r"arXiv (\d{4}\.\d{5})", said): return f"[{paper[1]}](https://arxiv.org/abs/{paper[1]})"
    authors = re.search(r"\((\w+ & \w+ \d{4})\)", said)
    return authors[1] if authors else ""


def counted(heading: str, root=ROOT) -> dict:
    "First column → the others, of the table under a heading of benchmarks/memory.md."
    page = (root / "benchmarks/memory.md").read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.split(f"## {heading}")[1].split("##")[0].splitlines() if line.startswith("|")]
    return {name.strip("`"): values for name, *values in lines[2:]}


def steered_rows() -> list:
    "Universal guidance is a wrapper: what parallel rescaling costs under it."
    from parallel_rescale.method.registry import costs
    from parallel_rescale.method.rules import ParallelRescale
    c, memory = costs(ParallelRescale()), counted("A step under universal guidance")
    def row(how, further, gradient):
        return {"rule": f"universal guidance, {how}, around parallel rescaling", "name": f"`universal(…, {how}=)`", "predictions a step": c["predictions"],
                "of them by θ": c["adapted"], "calls": f"1, and a gradient through {gradient}", "memory": memory[how][1], "asks further for": further,
                "source": "[2302.07121](https://arxiv.org/abs/2302.07121)"}
    return [row("backward", "a loss of the picture", "the decoder"), row("forward", "a loss of the picture", "decoder and denoiser")]


def rule_rows() -> list:
    "A row for each rule of the package: what a step of it asks for; the cheapest first."
    from parallel_rescale.method.registry import costs, known_rules
    rows, memory = [], counted("A step of each rule")
    for name, kind in known_rules().items():
        if not kind.__module__.startswith("parallel_rescale."): continue        # plug-ins have pages of their own
        c = costs(kind())
        further = [f"prompt `{p}`" for p in c["prompts"] if p not in ("null", "base", "subject")] + ["another attention"] * bool(c["attention"])
        if name not in memory: raise SystemExit(f"benchmarks/memory.md does not know the rule {name!r}: run python benchmarks/memory.py")
        calls, most, *_ = memory[name]
        rows.append({"rule": kind.title, "name": f"`{name}`", "predictions a step": c["predictions"], "of them by θ": c["adapted"], "calls": calls, "memory": most,
                     "asks further for": ", ".join(further), "source": source_of(kind)})
    return sorted(rows, key=lambda row: (row["predictions a step"], row["rule"].lower())) + steered_rows()


def model_rows(tests: list) -> list:
    "A row for each model: for each task how many rules run in it, and a ✓ where CFG is the stock pipeline's own."
    from parallel_rescale.method.registry import known_rules
    rules, rows = set(known_rules()), []
    for model, title in MODELS.items():
        ran = {w for test, words in tests for w in words if test == "test_every_rule_runs" and model in words} & rules
        equal = {task or word for test, words in tests if test in EQUAL for task, of in [EQUAL[test]]
                 if (of or model) == model and (of or model in words) for word in words if task or word in TASKS}
        more = {column for test, words in tests if test in MORE for column, of in [MORE[test]]
                if model in [of.get(None), *(of.get(w) for w in words)]}
        runs = {t for t in TASKS if t == "from text" or any(test == ALL and {model, t} <= set(words) for test, words in tests)}
        if ran or equal:
            rows.append({"model": title, **{t: " ".join([str(len(ran))] * (t in runs and bool(ran)) + ["✓"] * (t in equal)) for t in TASKS},
                         **{column: "✓" * (column in more) for column in ("several subjects", "fine-tuned")}})
    return rows


def weights(root=ROOT) -> str:
    "What SDXL's weights take, as benchmarks/memory.md has it."
    return re.search(r"together ([\d.]+)\.", (root / "benchmarks/memory.md").read_text(encoding="utf-8"))[1]


def spread(values) -> str:
    "The least and the most of some numbers that stand in a table."
    low, *_, high = sorted(set(values)) * 2
    return low if low == high else f"{low} to {high}"


def table(rows) -> str:
    "Rows as a table of Markdown."
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(map(str, row.values())) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def block(tests=None) -> str:
    "What stands between the marks."
    tests = tested() if tests is None else tests
    return "\n\n".join([
        START, "What a step of each rule asks of the network, at its default scales; θ is the personalised model. *Calls*: with `guide` and "
        "`SubjectPipeline` all predictions come from one call (as a [diffusers guider](6_use/06_guider.ipynb): one call each); `every(rule, k)` asks in "
        "full on every k-th step only. *Memory*: GiB of activations of that step for one picture of 1024² at SDXL's size in fp16, beside "
        f"{weights()} of weights. "
        "Tensors alive at once were counted ([`benchmarks/memory.md`](../benchmarks/memory.md), which has other sizes too; a fine-tuning step on a card agrees), and kernels borrow one or two GiB more. "
        f"`max_rows=1` gives each prediction a call of its own and takes {spread(row[3] for row in counted('A step of each rule').values())} whatever the rule. "
        "[Universal guidance](2_machine/12_universal.ipynb) keeps what its gradient needs, most of it the decoder's, in float32.",
        table(rule_rows()),
        "What the tests run on tiny models of random weights (SDXL: with the embedded model's text encoders). *From text*, *img2img* and *inpaint*: how many of the rules run, in one call a step; "
        "✓ where the rule CFG gives the stock pipeline's own guidance (FLUX.2 dev has none; empty: diffusers has no such pipeline with CFG for this model). "
        "*Several subjects*: a LoRA each, in one call. *Fine-tuned*: by DCO and DreamBooth, into a file that the stock pipeline loads; words are learned for SDXL alone.",
        table(model_rows(tests)), END])


def marked(text: str, new: str) -> str:
    "A text with the marked block replaced."
    return text[:text.index(START)] + new + text[text.index(END) + len(END):]


if __name__ == "__main__":
    path = ROOT / INDEX
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cell = next(c for c in notebook["cells"] if START in "".join(c["source"]))
    cell["source"] = marked("".join(cell["source"]), block()).splitlines(keepends=True)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{INDEX}: tables of rules and models written")

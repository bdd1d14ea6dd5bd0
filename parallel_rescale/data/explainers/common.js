// What the explainers share. Each is one ES module: this file, and its own after it. No kernel, no network.

export const COLORS = {cfg: "#0072B2", consistency: "#D55E00", parallel_rescale: "#009E73", orthogonal_only: "#56B4E9"};

const STYLE = `
.pr-explainer { font: 14px/1.45 system-ui, sans-serif; max-width: 860px; color: inherit; }
.pr-explainer .pr-both { display: flex; flex-wrap: wrap; gap: 6px 26px; align-items: flex-start; }
.pr-explainer .pr-plane { flex: 1 1 400px; min-width: 270px; max-width: 480px; }
.pr-explainer .pr-side { flex: 1 1 250px; min-width: 250px; }
.pr-explainer svg, .pr-explainer canvas { display: block; width: 100%; height: auto; }
.pr-explainer .pr-slider { display: grid; grid-template-columns: 1fr 3.4em; gap: 0 8px; margin: 0 0 7px 0; }
.pr-explainer .pr-slider input { grid-column: 1 / 3; width: 100%; margin: 0; accent-color: #0072B2; }
.pr-explainer output { text-align: right; font-variant-numeric: tabular-nums; }
.pr-explainer .pr-handle { cursor: grab; touch-action: none; }
.pr-explainer :focus-visible { outline: 3px solid #E69F00; outline-offset: 2px; }
.pr-explainer .pr-handle:focus-visible { outline: none; stroke: #E69F00; stroke-width: 4; }
.pr-explainer .pr-choice { border: 0; padding: 0; margin: 0 0 9px 0; }
.pr-explainer .pr-choice legend { padding: 0; font-size: inherit; }
.pr-explainer .pr-choice label { display: flex; gap: 7px; align-items: center; }
.pr-explainer .pr-patch { width: 12px; height: 12px; border-radius: 3px; }
.pr-explainer button { font: inherit; padding: 3px 14px; margin: 2px 0 8px 0; }
.pr-explainer .pr-told { min-height: 4.4em; margin: 8px 0 0 0; }
`;

export function element(tag, attributes = {}, parent = null, text = null) {
  const svg = ["svg", "g", "line", "path", "circle", "text", "rect"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== null) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

// A plane to draw in on the left, controls on the right.
export function frame(el) {
  el.classList.add("pr-explainer");
  element("style", {}, el, STYLE);
  const both = element("div", {class: "pr-both"}, el);
  return [element("div", {class: "pr-plane"}, both), element("div", {class: "pr-side"}, both)];
}

export function tell(model, values) {
  for (const [name, value] of Object.entries(values)) model.set(name, value);
  model.save_changes();
}

export function slider(model, name, label, [low, high, step], parent) {
  const box = element("label", {class: `pr-slider pr-set-${name}`}, parent);
  element("span", {}, box, label);
  const shown = element("output", {}, box);
  const input = element("input", {type: "range", min: low, max: high, step, "aria-label": label}, box);
  const show = () => { input.value = model.get(name); shown.textContent = model.get(name).toFixed(2); };
  input.addEventListener("input", () => tell(model, {[name]: Number(input.value)}));
  model.on(`change:${name}`, show);
  show();
}

// Draw now and after every change, at most once a frame.
export function follow(model, names, draw) {
  let asked = false;
  const soon = () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => { asked = false; draw(); });
  };
  for (const name of names) model.on(`change:${name}`, soon);
  draw();
}

// What a page without a kernel has for a model.
export function still(values) {
  const heard = {};
  return {
    get: name => values[name],
    set(name, value) { values[name] = value; for (const f of heard[`change:${name}`] || []) f(); },
    on(event, f) { (heard[event] ||= []).push(f); },
    off() {},
    save_changes() {},
  };
}

export function mountAll(name, render) {
  for (const el of document.querySelectorAll(`[data-explainer="${name}"]:not([data-alive])`)) {
    el.dataset.alive = "yes";
    el.replaceChildren();
    render({model: still(JSON.parse(el.dataset.values)), el});
  }
}

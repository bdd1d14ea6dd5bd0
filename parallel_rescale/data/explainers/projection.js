// The projection at one location: g_cons split along and across g_text, and what parallel rescaling makes of it.

export const dot = (a, b) => a[0] * b[0] + a[1] * b[1];

// p, g_parallel and g_orthogonal, as `project` and `coefficient` of the package have them
export function split(cons, text) {
  const square = dot(text, text);
  const p = square < 1e-36 ? 0 : dot(cons, text) / square;
  const parallel = [p * text[0], p * text[1]];
  return {p, parallel, orthogonal: [cons[0] - parallel[0], cons[1] - parallel[1]]};
}

// p-hat from the mean and spread of p over all locations, and g_PR = gain * p-hat * g_text + g_orthogonal
export function rescaled(cons, text, mean, std, gain) {
  const parts = split(cons, text);
  const pHat = std <= 1e-6 ? 0 : (parts.p - mean) / std;
  const along = gain * pHat;
  const direction = [along * text[0] + parts.orthogonal[0], along * text[1] + parts.orthogonal[1]];
  return {...parts, pHat, direction};
}

const UNIT = 58, [WIDTH, HEIGHT] = [460, 430], CENTRE = [WIDTH / 2, 215], REACH = 3.6;
const at = v => [CENTRE[0] + UNIT * v[0], CENTRE[1] - UNIT * v[1]];
const number = x => (Object.is(Math.round(100 * x), -0) ? 0 : x).toFixed(2).replace("-", "−");

function arrow(parent, color, {width = 4, dashes = "", marker = true} = {}) {
  const group = element("g", {}, parent);
  const line = element("line", {stroke: color, "stroke-width": width, "stroke-dasharray": dashes}, group);
  const head = element("path", {fill: color}, group);
  return (from, to) => {
    const [[x, y], [u, v]] = [at(from), at(to)], length = Math.hypot(u - x, v - y);
    const [a, b] = length ? [(u - x) / length, (v - y) / length] : [0, 0], back = Math.min(length, 13);
    const [end, side] = [[u - back * a, v - back * b], .45 * back];
    for (const [name, value] of [["x1", x], ["y1", y], ["x2", marker ? end[0] : u], ["y2", marker ? end[1] : v]])
      line.setAttribute(name, value);
    head.setAttribute("d", marker ? `M${u} ${v}L${end[0] - side * b} ${end[1] + side * a}` +
                                    `L${end[0] + side * b} ${end[1] - side * a}Z` : "");
  };
}

function handle(svg, model, name, color, label) {
  const spot = element("circle", {r: 13, fill: color, "fill-opacity": .28, stroke: color, "stroke-width": 2,
                                  class: `pr-handle pr-drag-${name}`, tabindex: 0, role: "application",
                                  "aria-label": `${label}: drag it, or move it with the arrow keys`}, svg);
  const put = v => tell(model, {[name]: v.map(x => Math.max(-REACH, Math.min(REACH, Math.round(100 * x) / 100)))});
  const drag = event => {
    const box = svg.getBoundingClientRect(), scale = WIDTH / box.width;
    put([((event.clientX - box.left) * scale - CENTRE[0]) / UNIT, (CENTRE[1] - (event.clientY - box.top) * scale) / UNIT]);
  };
  spot.addEventListener("pointerdown", event => { spot.setPointerCapture(event.pointerId); event.preventDefault(); spot.focus(); });
  spot.addEventListener("pointermove", event => { if (spot.hasPointerCapture(event.pointerId)) drag(event); });
  const moves = {ArrowLeft: [-.1, 0], ArrowRight: [.1, 0], ArrowUp: [0, .1], ArrowDown: [0, -.1]};
  spot.addEventListener("keydown", event => {
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    put(model.get(name).map((x, i) => x + move[i]));
  });
  return v => { [spot.cx.baseVal.value, spot.cy.baseVal.value] = at(v); };
}

function label(svg, text, color) {
  const made = element("text", {fill: color, "font-size": 15, "font-weight": 600, "text-anchor": "middle"}, svg, text);
  return (v, towards = v, push = .62) => {
    const length = Math.hypot(...towards) || 1, [x, y] = at(v.map((c, i) => c + push * towards[i] / length));
    made.setAttribute("x", Math.max(24, Math.min(WIDTH - 24, x)));
    made.setAttribute("y", Math.max(14, Math.min(HEIGHT - 6, y + 5)));
  };
}

// Where p stands among all locations, and p-hat below it.
function numberLine(parent) {
  const svg = element("svg", {viewBox: "0 0 300 104", role: "img", "aria-label": "p among all locations"}, parent);
  const x = p => 150 + 44 * Math.max(-3.2, Math.min(3.2, p));
  const band = element("rect", {y: 16, height: 20, fill: "currentColor", "fill-opacity": .17}, svg);
  for (const [y, name] of [[26, "p"], [76, "p̂"]]) {
    element("line", {x1: 8, x2: 292, y1: y, y2: y, stroke: "currentColor", "stroke-opacity": .5}, svg);
    element("text", {x: 2, y: y - 6, "font-size": 13, fill: "currentColor"}, svg, name);
    for (const tick of [-3, -2, -1, 0, 1, 2, 3]) {
      element("line", {x1: x(tick), x2: x(tick), y1: y - 3, y2: y + 3, stroke: "currentColor", "stroke-opacity": .5}, svg);
      element("text", {x: x(tick), y: y + 20, "font-size": 11.5, "text-anchor": "middle", fill: "currentColor"}, svg, String(tick).replace("-", "−"));
    }
  }
  const spots = [[26, COLORS.consistency], [76, COLORS.parallel_rescale]].map(([cy, fill]) => element("circle", {cy, r: 7, fill}, svg));
  return (p, pHat, mean, std) => {
    spots[0].setAttribute("cx", x(p));
    spots[1].setAttribute("cx", x(pHat));
    band.setAttribute("x", x(mean - std));
    band.setAttribute("width", Math.max(2, x(mean + std) - x(mean - std)));
  };
}

export function said({p, pHat}) {
  const way = p < -.05 ? "against the prompt" : p > .05 ? "for the prompt" : "neither for nor against the prompt";
  const than = p < -.05 ? (pHat < 0 ? "more against it" : "less against it") : (pHat < 0 ? "less for it" : "more for it");
  const then = pHat < -.05 ? `${than} than at most locations, so rescaling makes it speak against the prompt`
    : pHat > .05 ? `${than} than at most locations, so rescaling lets it speak for the prompt`
    : "as at most locations, so rescaling leaves the part along the text out";
  return `Here the subject pulls ${way}: p = ${number(p)}. That is ${then}: p̂ = ${number(pHat)}.`;
}

function render({model, el}) {
  const [plane, side] = frame(el);
  const svg = element("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "group", "aria-label": "The pushes at one location, as arrows"}, plane);
  for (const [a, b] of [[[-REACH, 0], [REACH, 0]], [[0, -REACH], [0, REACH]]]) {
    const [[x1, y1], [x2, y2]] = [at(a), at(b)];
    element("line", {x1, y1, x2, y2, stroke: "currentColor", "stroke-opacity": .18}, svg);
  }
  const guide = element("line", {stroke: COLORS.cfg, "stroke-opacity": .35, "stroke-dasharray": "2 5", "stroke-width": 2}, svg);
  const arrows = {
    orthogonal: arrow(svg, "#777", {width: 2.5, dashes: "3 4"}), parallel: arrow(svg, COLORS.consistency, {width: 7, dashes: "7 4"}),
    text: arrow(svg, COLORS.cfg), cons: arrow(svg, COLORS.consistency), direction: arrow(svg, COLORS.parallel_rescale, {width: 5})};
  const labels = {text: label(svg, "g_text", COLORS.cfg), cons: label(svg, "g_cons", COLORS.consistency),
                  parallel: label(svg, "g_∥", COLORS.consistency), orthogonal: label(svg, "g_⊥", "#777"),
                  direction: label(svg, "g_PR", COLORS.parallel_rescale)};
  const handles = {g_text: handle(svg, model, "g_text", COLORS.cfg, "The text's push g_text"),
                   g_cons: handle(svg, model, "g_cons", COLORS.consistency, "The subject's push g_cons")};
  slider(model, "mean", "mean of p over all locations", [-2, 2, .05], side);
  slider(model, "std", "spread of p over all locations", [.1, 2, .05], side);
  slider(model, "gain", "gain k", [0, 2, .05], side);
  const line = numberLine(side), told = element("p", {class: "pr-told", "aria-live": "polite"}, side);
  follow(model, ["g_text", "g_cons", "mean", "std", "gain"], () => {
    const [text, cons, mean, std, gain] = ["g_text", "g_cons", "mean", "std", "gain"].map(name => model.get(name));
    const found = rescaled(cons, text, mean, std, gain), length = Math.hypot(...text) || 1;
    const far = text.map(c => 3.6 * c / length), [[x1, y1], [x2, y2]] = [at(far.map(c => -c)), at(far)];
    for (const [name, value] of Object.entries({x1, y1, x2, y2})) guide.setAttribute(name, value);
    arrows.text([0, 0], text); arrows.cons([0, 0], cons); arrows.parallel([0, 0], found.parallel);
    arrows.orthogonal(found.parallel, cons); arrows.direction([0, 0], found.direction);
    labels.text(text); labels.cons(cons); labels.direction(found.direction);
    labels.parallel(found.parallel.map(c => .6 * c), found.orthogonal.map(c => -c), .33);
    labels.orthogonal(found.parallel.map((c, i) => .5 * (c + cons[i])), found.parallel, .33);
    handles.g_text(text); handles.g_cons(cons);
    line(found.p, found.pHat, mean, std);
    told.textContent = said(found);
  });
}

export default {render};

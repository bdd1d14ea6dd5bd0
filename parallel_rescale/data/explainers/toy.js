// The toy: points in the plane, exact scores, and a rule that carries noise to a picture. See nbs/4_world/01_toy.ipynb.

const [PHOTO, SKETCH] = [-2, 2], SUBJECT_AT = 2, LOG_2PI = 1.8378770664;

const mixture = (means, stds, weights) => {
  const sum = weights.reduce((a, b) => a + b);
  return means.map((mean, k) => ({mean, variance: stds[k].map(s => s * s), weight: weights[k] / sum, log: Math.log(weights[k] / sum)}));
};

// The package's `toy_world`: (prompt, adapter scale) → mixture
export function toyWorld(leak) {
  const [world, prompted, ours] = [[.6, 1.2], [.45, 1.2], [.3, .25]];
  const flat = [[PHOTO, 0], [SKETCH, 0]], high = [[PHOTO, SUBJECT_AT], [SKETCH, SUBJECT_AT]];
  return {
    null0: mixture(flat, [world, world], [1, 1]), base0: mixture(flat, [prompted, prompted], [.05, .95]),
    subject1: mixture(high, [ours, ours], [leak, 1 - leak]),
    null1: mixture([...flat, high[0]], [world, world, ours], [1, 1, 1]),
  };
}

// ε(x) = (x − E[x₀|x])/σ at the points x, flat: [x…, y…]
export function noisePrediction(parts, x, sigma) {
  const n = x.length / 2, out = new Float64Array(2 * n), logs = new Float64Array(parts.length);
  for (let i = 0; i < n; i++) {
    const here = [x[i], x[n + i]];
    parts.forEach((part, k) => {
      let square = 0;
      for (const d of [0, 1]) {
        const variance = part.variance[d] + sigma * sigma;
        square += (here[d] - part.mean[d]) ** 2 / variance + Math.log(variance);
      }
      logs[k] = part.log - .5 * square - LOG_2PI;
    });
    const top = Math.max(...logs), shares = Array.from(logs, l => Math.exp(l - top)), sum = shares.reduce((a, b) => a + b);
    for (const d of [0, 1]) {
      let guess = 0;
      parts.forEach((part, k) => {
        const variance = part.variance[d] + sigma * sigma;
        guess += shares[k] / sum * (part.mean[d] + (1 - sigma * sigma / variance) * (here[d] - part.mean[d]));
      });
      out[d * n + i] = (here[d] - guess) / sigma;
    }
  }
  return out;
}

const combined = (f, ...arrays) => Float64Array.from(arrays[0], (_, i) => f(...arrays.map(a => a[i])));

// p at each point, and p-hat: p less its mean, over its spread, over all points of the picture
export function ratios(cons, text) {
  const n = cons.length / 2, p = Float64Array.from({length: n}, (_, i) => {
    const square = text[i] ** 2 + text[n + i] ** 2;
    return square < 1e-36 ? 0 : (cons[i] * text[i] + cons[n + i] * text[n + i]) / square;
  });
  const mean = p.reduce((a, b) => a + b) / n, std = Math.sqrt(p.reduce((a, b) => a + (b - mean) ** 2, 0) / n);
  const flat = std <= 1e-6 * p.reduce((a, b) => Math.max(a, Math.abs(b)), 0);
  return {p, pHat: p.map(v => flat ? 0 : (v - mean) / std)};
}

const direction = {
  consistency: cons => cons,
  parallel_rescale: (cons, text, {p, pHat}) => cons.map((c, i) => c + (pHat[i % p.length] - p[i % p.length]) * text[i]),
  orthogonal_only: (cons, text, {p}) => cons.map((c, i) => c - p[i % p.length] * text[i]),
};

// The guided prediction of a rule at the points x
export function guided(world, rule, scales, x, sigma) {
  if (rule === "cfg") {
    const [null1, subject1] = [noisePrediction(world.null1, x, sigma), noisePrediction(world.subject1, x, sigma)];
    return combined((a, b) => a + scales.text * (b - a), null1, subject1);
  }
  const [null0, base0, subject1] = ["null0", "base0", "subject1"].map(name => noisePrediction(world[name], x, sigma));
  const [text, cons] = [combined((a, b) => b - a, null0, base0), combined((a, b) => b - a, base0, subject1)];
  const way = direction[rule](cons, text, ratios(cons, text));
  return combined((a, t, w) => a + scales.text * t + scales.consistency * w, null0, text, way);
}

// Karras et al.'s noise levels, the last is 0
export function toySigmas(steps = 24, low = .02, high = 10) {
  const [a, b] = [high ** (1 / 7), low ** (1 / 7)];
  return [...Array.from({length: steps}, (_, i) => (a + i / (steps - 1) * (b - a)) ** 7), 0];
}

// The points after each step of Euler's method: the first are noise × the largest σ
export function toySample(rule, {text, consistency, leak}, noise, steps = 24) {
  const sigmas = toySigmas(steps), world = toyWorld(leak), path = [Float64Array.from(noise, z => z * sigmas[0])];
  for (let i = 0; i < steps; i++) {
    const x = path[i], e = guided(world, rule, {text, consistency}, x, sigmas[i]);
    path.push(x.map((v, j) => v + (sigmas[i + 1] - sigmas[i]) * e[j]));
  }
  return path;
}

// Shares of the points: sketches, at our cat's height, both
export function toyScores(x) {
  const n = x.length / 2, share = f => Array.from({length: n}, (_, i) => f(x[i], x[n + i])).filter(Boolean).length / n;
  return {text: share(u => u > 0), identity: share((u, v) => Math.abs(v - SUBJECT_AT) < .75),
          both: share((u, v) => Math.hypot(u - SKETCH, v - SUBJECT_AT) < .75)};
}

const RULES = {cfg: "CFG", consistency: "consistency", parallel_rescale: "parallel rescaling", orthogonal_only: "orthogonal only"};
const [LEFT, RIGHT, LOW, HIGH, SCALE] = [-4.5, 4.5, -2.6, 4.5, 52], [WIDTH, HEIGHT] = [(RIGHT - LEFT) * SCALE, (HIGH - LOW) * SCALE];

function ellipse(ink, [mx, my], [sx, sy], color, alpha) {
  ink.fillStyle = ink.strokeStyle = color;
  for (const [size, part] of [[2, .10], [1, .18]]) {
    ink.globalAlpha = alpha * part;
    ink.beginPath();
    ink.ellipse((mx - LEFT) * SCALE, (HIGH - my) * SCALE, size * sx * SCALE, size * sy * SCALE, 0, 0, 2 * Math.PI);
    ink.fill();
    ink.globalAlpha = alpha * .5;
    ink.stroke();
  }
  ink.globalAlpha = 1;
}

function star(ink, u, v, color) {
  ink.beginPath();
  for (let i = 0; i < 10; i++) {
    const [r, a] = [i % 2 ? 5 : 11, Math.PI * (i / 5 - .5)];
    ink.lineTo((u - LEFT) * SCALE + r * Math.cos(a), (HIGH - v) * SCALE + r * Math.sin(a));
  }
  ink.closePath();
  ink.fillStyle = color; ink.strokeStyle = "white"; ink.lineWidth = 1.5;
  ink.fill(); ink.stroke();
}

function paintWorld(ink, leak, foreground) {
  ink.clearRect(0, 0, WIDTH, HEIGHT);
  for (const x of [PHOTO, SKETCH]) ellipse(ink, [x, 0], [.6, 1.2], "#888888", 1);
  ellipse(ink, [PHOTO, SUBJECT_AT], [.3, .25], COLORS.consistency, .3 + 1.7 * leak);
  ellipse(ink, [SKETCH, SUBJECT_AT], [.3, .25], COLORS.consistency, .3 + 1.7 * (1 - leak));
  ink.font = "13px system-ui, sans-serif"; ink.textAlign = "center"; ink.fillStyle = foreground;
  const name = (text, x, y) => ink.fillText(text, (x - LEFT) * SCALE, (HIGH - y) * SCALE);
  name("photos", PHOTO, -2.45); name("sketches (asked for)", SKETCH, -2.45);
  name("our cat, photographed", PHOTO, 3.05); name("our cat, sketched", SKETCH, 3.05);
}

function paintPoints(ink, path, time, color) {
  const n = path[0].length / 2, i = Math.min(Math.floor(time), path.length - 2), part = time - i;
  const place = (j, d) => path[i][d * n + j] + part * (path[i + 1][d * n + j] - path[i][d * n + j]);
  const dot = (u, v) => [(u - LEFT) * SCALE, (HIGH - v) * SCALE];
  ink.strokeStyle = ink.fillStyle = color; ink.lineWidth = 1; ink.globalAlpha = .35;
  for (let j = 0; j < n; j += 8) {
    ink.beginPath();
    for (let s = 0; s <= i; s++) ink.lineTo(...dot(path[s][j], path[s][n + j]));
    ink.lineTo(...dot(place(j, 0), place(j, 1)));
    ink.stroke();
  }
  ink.globalAlpha = .6;
  for (let j = 0; j < n; j++) { ink.beginPath(); ink.arc(...dot(place(j, 0), place(j, 1)), 3.4, 0, 7); ink.fill(); }
  ink.globalAlpha = 1;
}

function choice(model, parent) {
  const box = element("fieldset", {class: "pr-choice pr-set-rule"}, parent), group = `pr-rule-${Math.random()}`;
  element("legend", {}, box, "rule");
  const inputs = Object.entries(RULES).map(([name, title]) => {
    const row = element("label", {}, box), input = element("input", {type: "radio", name: group, value: name}, row);
    element("span", {class: "pr-patch", style: `background:${COLORS[name]}`}, row);
    element("span", {}, row, title);
    input.addEventListener("change", () => tell(model, {rule: name}));
    return input;
  });
  const show = () => { for (const input of inputs) input.checked = input.value === model.get("rule"); };
  model.on("change:rule", show);
  show();
}

function render({model, el}) {
  const [plane, side] = frame(el), dense = Math.min(3, window.devicePixelRatio || 1);
  const canvas = element("canvas", {width: WIDTH * dense, height: HEIGHT * dense, role: "img"}, plane), ink = canvas.getContext("2d");
  ink.scale(dense, dense);
  choice(model, side);
  slider(model, "text", "text ω_text", [0, 12, .1], side);
  slider(model, "consistency", "consistency ω_cons", [0, 8, .1], side);
  slider(model, "leak", "leak: photos among its sketches", [0, .95, .01], side);
  const play = element("button", {type: "button", class: "pr-play"}, side, "play from noise");
  const told = element("p", {class: "pr-told", "aria-live": "polite"}, side);
  const calm = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
  let path = null, shown = null, time = 24, running = 0;
  const ease = (from, to, share) => to.map((x, s) => x.map((v, j) => from[s][j] + share * (v - from[s][j])));
  const paint = () => {
    paintWorld(ink, model.get("leak"), getComputedStyle(el).color);
    paintPoints(ink, shown, time, COLORS[model.get("rule")]);
    star(ink, SKETCH, SUBJECT_AT, "#DDAA33");
  };
  const animate = (milliseconds, frameAt) => {
    const mine = ++running, begun = performance.now();
    const next = now => {
      if (mine !== running || !el.isConnected) return;
      const share = calm ? 1 : Math.min(1, Math.max(0, now - begun) / milliseconds);
      frameAt(share);
      paint();
      if (share < 1) requestAnimationFrame(next);
    };
    requestAnimationFrame(next);
  };
  play.addEventListener("click", () => { shown = path; animate(2600, share => { time = 24 * share; }); });
  follow(model, ["rule", "text", "consistency", "leak", "noise"], () => {
    const before = shown;
    path = toySample(model.get("rule"), {text: model.get("text"), consistency: model.get("consistency"), leak: model.get("leak")}, model.get("noise"));
    const {text, identity, both} = toyScores(path[24]), percent = x => `${Math.round(100 * x)} %`;
    told.textContent = `${percent(text)} are sketches, ${percent(identity)} are our cat, ${percent(both)} are both: at the star.`;
    canvas.setAttribute("aria-label", `Points of ${RULES[model.get("rule")]}: ${told.textContent}`);
    time = 24;
    if (!before || before[0].length !== path[0].length) { shown = path; paint(); }
    else animate(220, share => { shown = share < 1 ? ease(before, path, share) : path; });
  });
}

export default {render};

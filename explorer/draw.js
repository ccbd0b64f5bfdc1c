// Pictures: the plane with target, particles and arrows, and two curves.  Colours of toy/plots.py.
"use strict";

const REAL = "#0072B2",
  FAKE = "#D55E00",
  FIRST = "#009E73",
  GRADIENT = "#AA3377",
  INK = "#1b1f24";
const SOFT = "#57606a",
  LINE = "#d8dee4",
  EXTENT = 1.3;

/** Canvas ready to draw on in CSS pixels: {c, w, h}. */
function prepared(canvas) {
  const ratio = window.devicePixelRatio || 1,
    w = canvas.clientWidth,
    h = canvas.clientHeight;
  if (canvas.width !== Math.round(w * ratio) || canvas.height !== Math.round(h * ratio)) {
    canvas.width = Math.round(w * ratio);
    canvas.height = Math.round(h * ratio);
  }
  const c = canvas.getContext("2d");
  c.setTransform(ratio, 0, 0, ratio, 0, 0);
  c.clearRect(0, 0, w, h);
  const rem = parseFloat(getComputedStyle(document.documentElement).fontSize);
  c.font = `${Math.round(0.82 * rem)}px system-ui, "DejaVu Sans", sans-serif`;
  return { c, w, h, rem };
}

/** From data to pixels and back, on a square of side w that shows [-extent, extent]^2. */
const to_pixel = (v, axis, w, extent) => ((axis ? extent - v : v + extent) * w) / (2 * extent);
const to_data = (p, axis, w, extent) =>
  axis ? extent - (p * 2 * extent) / w : (p * 2 * extent) / w - extent;

/** So many modes that each is drawn small. */
const crowded = (modes) => modes.length > 30;

let heat = { key: "", canvas: null };

/** The clean density of the modes, in shades of REAL; made again only when they change. */
function density(modes, extent) {
  const key = JSON.stringify([modes, extent]);
  if (heat.key === key) return heat.canvas;
  const size = crowded(modes) ? 110 : 170,
    p = noised(mixture(modes), 0.015);
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = size;
  const c = canvas.getContext("2d"),
    image = c.createImageData(size, size);
  const value = Float64Array.from({ length: size * size }, (_, k) =>
    Math.exp(
      log_prob(
        p,
        to_data((k % size) + 0.5, 0, size, extent),
        to_data(Math.floor(k / size) + 0.5, 1, size, extent),
      ),
    ),
  );
  const top = value.reduce((a, b) => Math.max(a, b), 0);
  value.forEach((v, k) => image.data.set([0, 114, 178, 175 * Math.sqrt(v / top)], 4 * k));
  c.putImageData(image, 0, 0);
  heat = { key, canvas };
  return canvas;
}

/** Arrows from (x, y) by (u, v) in pixels, all in one colour: [x, y, u, v, ...]. */
function draw_arrows(c, list, colour, width, dash = []) {
  c.strokeStyle = c.fillStyle = colour;
  c.lineWidth = width;
  c.setLineDash(dash);
  c.beginPath();
  for (let k = 0; k < list.length; k += 4) {
    c.moveTo(list[k], list[k + 1]);
    c.lineTo(list[k] + list[k + 2], list[k + 1] + list[k + 3]);
  }
  c.stroke();
  c.setLineDash([]);
  c.beginPath();
  for (let k = 0; k < list.length; k += 4) {
    const [x, y, u, v] = list.slice(k, k + 4),
      length = Math.hypot(u, v);
    if (length < 2) continue;
    const head = Math.min(3.2 * width + 2, 0.8 * length) / length,
      a = u * head,
      b = v * head;
    c.moveTo(x + u + a * 0.3, y + v + b * 0.3);
    c.lineTo(x + u - a - b * 0.55, y + v - b + a * 0.55);
    c.lineTo(x + u - a + b * 0.55, y + v - b - a * 0.55);
  }
  c.fill();
}

/** The power of two that makes the 75th percentile of arrows (2 N) about `want` long. */
function zoom_of(arrows, want) {
  const lengths = [];
  for (let k = 0; k < arrows.length; k += 2) lengths.push(Math.hypot(arrows[k], arrows[k + 1]));
  lengths.sort((a, b) => a - b);
  const typical = lengths[Math.floor(0.75 * lengths.length)] || 0;
  return typical > 0 ? 2 ** Math.max(-6, Math.min(14, Math.floor(Math.log2(want / typical)))) : 1;
}

/** Arrows [x, y, u, v] in pixels from points and vectors (2 N) in data units; `most`: longest. */
function in_pixels(points, vectors, factor, most, w, extent) {
  const list = [],
    unit = w / (2 * extent);
  for (let k = 0; k < points.length; k += 2) {
    const scale =
      factor *
      Math.min(1, most / Math.max(1e-300, factor * Math.hypot(vectors[k], vectors[k + 1])));
    list.push(
      to_pixel(points[k], 0, w, extent),
      to_pixel(points[k + 1], 1, w, extent),
      scale * vectors[k] * unit,
      -scale * vectors[k + 1] * unit,
    );
  }
  return list;
}

function circles(c, points, radius, w, extent) {
  c.beginPath();
  for (let k = 0; k < points.length; k += 2) {
    const x = to_pixel(points[k], 0, w, extent),
      y = to_pixel(points[k + 1], 1, w, extent);
    c.moveTo(x + radius, y);
    c.arc(x, y, radius, 0, 7);
  }
}

/** Scores of teacher and fake on a lattice of 17 x 17 points at the slider's sigma. */
function field(world, seen, extent) {
  const points = [],
    real = [],
    fake = [],
    sigma = sigmas(world.cfg)[0];
  const at_real = noised(seen.teacher, sigma, seen.settings.cond),
    at_fake = noised(seen.fake, sigma);
  const r = answer(),
    f = answer(),
    s = [0, 0];
  for (let k = 0; k < 289; k++) {
    const xt = [k % 17, Math.floor(k / 17)].map((v) => ((v - 8) * extent) / 8.5);
    denoise(at_real, ...xt, r);
    denoise(at_fake, ...xt, f);
    points.push(...xt);
    score(r.d, xt, sigma, s);
    real.push(...s);
    score(f.d, xt, sigma, s);
    fake.push(...s);
  }
  return { points, real, fake, gap: real.map((v, k) => v - fake[k]), sigma };
}

/** What the arrows are: [[name, colour, dash, points, vectors], ...] and a word on their length. */
function arrow_layers(world, seen, extent) {
  const { cfg, x } = world,
    down = (part) => part.map((v) => -cfg.rate * v);
  const sum = seen.a.map((v, k) => -cfg.rate * (v + seen.b[k]));
  const names = {
    sid: ["direct", "through the Jacobians"],
    dmd2: ["distribution matching", "GAN"],
    decoupled: ["matching", "augmentation"],
  }[cfg.method];
  if (cfg.arrows === "moves" || (cfg.arrows === "parts" && !names))
    return { unit: sum, word: "steps", layers: [["the move", GRADIENT, [], x, sum]] };
  if (cfg.arrows === "parts")
    return {
      unit: sum,
      word: "steps",
      layers: [
        ["their sum", GRADIENT, [], x, sum],
        [names[0], FIRST, [], x, down(seen.a)],
        [names[1], INK, [4, 3], x, down(seen.b)],
      ],
    };
  if (cfg.arrows === "none") return { unit: [], word: "steps", layers: [] };
  const { points, real, fake, gap } = field(world, seen, extent);
  if (cfg.arrows === "scores")
    return {
      unit: [...real, ...fake],
      word: "x score",
      layers: [
        ["score_real", REAL, [], points, real],
        ["score_fake", FAKE, [4, 3], points, fake],
      ],
    };
  return {
    unit: gap,
    word: "x score",
    layers: [["score_real - score_fake", GRADIENT, [], points, gap]],
  };
}

/** The plane: target, modes, particles, arrows, the chosen particle. */
function draw_plane(canvas, world, seen, extent) {
  const { c, w, rem } = prepared(canvas),
    { cfg, modes, x } = world,
    k = w / (2 * extent);
  c.imageSmoothingEnabled = true;
  c.drawImage(density(modes, extent), 0, 0, w, w);
  c.strokeStyle = "rgba(27,31,36,.08)";
  c.lineWidth = 1;
  c.beginPath();
  for (const v of [-1, 0, 1]) {
    c.moveTo(to_pixel(v, 0, w, extent), 0);
    c.lineTo(to_pixel(v, 0, w, extent), w);
    c.moveTo(0, to_pixel(v, 1, w, extent));
    c.lineTo(w, to_pixel(v, 1, w, extent));
  }
  c.stroke();
  draw_modes(c, cfg, modes, w, extent);
  const before = late(world);
  if (before !== x) {
    // those whom the fake score knows
    circles(c, before, 3, w, extent);
    c.strokeStyle = "rgba(213,94,0,.45)";
    c.stroke();
  }
  circles(c, x, Math.max(3, cfg.h * k), w, extent);
  c.fillStyle = "rgba(213,94,0,.07)";
  c.fill();
  const { unit, word, layers } = arrow_layers(world, seen, extent),
    cell = (2 * extent) / 17;
  const factor = zoom_of(unit, word === "steps" ? 0.15 : 1.1 * cell);
  const size =
    word === "steps"
      ? `arrows: ${factor} x one step`
      : `arrows: ${factor.toPrecision(2)} x the score`;
  const legend = () =>
    draw_legend(
      c,
      [
        ...layers.map((l) => [l[0], l[1]]),
        ...(before === x ? [] : [["what the fake score knows", FAKE]]),
      ],
      size,
      rem,
    );
  if (word === "steps") legend();                  // points and their arrows lie over it
  for (const [name, colour, dash, points, vectors] of layers)
    draw_arrows(
      c,
      in_pixels(points, vectors, factor, word === "steps" ? 0.35 : 1.5 * cell, w, extent),
      colour,
      Math.max(1.2, w / 480) * (name === "their sum" ? 2 : 1),
      dash,
    );
  circles(c, x, Math.max(2.2, w / 260), w, extent);
  c.fillStyle = FAKE;
  c.fill();
  if (word !== "steps") legend();
  if (cfg.particle >= 0) draw_probe(c, world, seen, w, extent);
}

function draw_modes(c, cfg, modes, w, extent) {
  const total = modes.reduce((sum, mode) => sum + mode.weight, 0),
    many = crowded(modes);
  modes.forEach((mode, m) => {
    const x = to_pixel(mode.x, 0, w, extent),
      y = to_pixel(mode.y, 1, w, extent);
    const chosen = m === cfg.mode,
      radius = Math.max(many ? 2 : 9, (2 * mode.std * w) / (2 * extent));
    c.strokeStyle = REAL;
    c.globalAlpha = chosen ? 1 : many ? 0.15 : 0.6;
    c.lineWidth = chosen ? 3 : 1.5;
    c.setLineDash(mode.label === 1 ? [5, 4] : []); // class 1 is dashed
    c.beginPath();
    c.arc(x, y, radius, 0, 7);
    c.stroke();
    c.setLineDash([]);
    if (!many && modes.length <= 12) {
      c.globalAlpha = 0.9;
      c.fillStyle = REAL;
      c.textAlign = "center";
      const away = Math.hypot(x - w / 2, y - w / 2),
        beside = (14 * Math.abs(x - w / 2)) / away,
        far = (radius + 20 + beside) / away; // outwards; the text is wider than high
      const [u, v] = away > 10 ? [far * (x - w / 2), far * (y - w / 2)] : [0, -radius - 20];
      c.fillText(`${+((100 * mode.weight) / total).toPrecision(3)} %`, x + u, y + v + 5);
    }
    c.globalAlpha = 1;
  });
}

/** The chosen particle: x to xt, and from there to both denoisers' answers. */
function draw_probe(c, world, seen, w, extent) {
  const look = inspect(world, seen, world.cfg.particle);
  const at = (p) => [to_pixel(p[0], 0, w, extent), to_pixel(p[1], 1, w, extent)];
  const [x, y] = at(look.x),
    [a, b] = at(look.xt);
  c.strokeStyle = INK;
  c.lineWidth = 2;
  c.setLineDash([2, 3]);
  c.beginPath();
  c.moveTo(x, y);
  c.lineTo(a, b);
  c.stroke();
  c.setLineDash([]);
  c.beginPath();
  c.arc(x, y, 8, 0, 7);
  for (const s of [-1, 1]) {
    c.moveTo(a - 6, b - 6 * s);
    c.lineTo(a + 6, b + 6 * s);
  }
  c.stroke();
  for (const [d, colour] of [
    [look.real.d, REAL],
    [look.fake.d, FAKE],
  ]) {
    const [u, v] = at(d);
    c.strokeStyle = c.fillStyle = colour;
    c.beginPath();
    c.moveTo(a, b);
    c.lineTo(u, v);
    c.stroke();
    c.fillRect(u - 6, v - 6, 12, 12);
    c.strokeStyle = "#fff";
    c.strokeRect(u - 6, v - 6, 12, 12);
  }
}

function draw_legend(c, entries, note, rem) {
  const line = 1.25 * rem,
    wide = Math.max(...[...entries.map((e) => e[0]), note].map((t) => c.measureText(t).width));
  c.fillStyle = "rgba(255,255,255,.82)";
  c.fillRect(6, 6, wide + 2.1 * rem, line * (entries.length + 1) + 8);
  c.textAlign = "left";
  entries.forEach(([name, colour], k) => {
    const y = 6 + line * (k + 0.85);
    c.fillStyle = colour;
    c.fillRect(12, y - 0.38 * rem, 0.9 * rem, 0.22 * rem);
    c.fillStyle = INK;
    c.fillText(name, 12 + 1.2 * rem, y);
  });
  c.fillStyle = SOFT;
  c.fillText(note, 12, 6 + line * (entries.length + 0.85));
}

/** Loss and KL of history {step, loss, kl, kl_teacher} side by side; the KL has a log axis. */
function draw_curves(canvas, history, skew) {
  const { c, w, h, rem } = prepared(canvas),
    half = (w - rem) / 2;
  const log = (list) => list.map((v) => Math.log10(Math.max(1e-3, v)));
  panel(
    c,
    0,
    half,
    h,
    rem,
    "loss that the method prints",
    history.step,
    [[history.loss, GRADIENT, []]],
    (v) => (Math.abs(v) >= 1e-3 ? `${+v.toPrecision(2)}` : v ? v.toExponential(0) : "0"),
  );
  const lines = [[log(history.kl), FAKE, []]];
  if (skew) lines.push([log(history.kl_teacher), REAL, [5, 4]]);
  panel(
    c,
    half + rem,
    half,
    h,
    rem,
    skew ? "true KL to data, to teacher (dashed)" : "true KL (log axis)",
    history.step,
    lines,
    (v) => `${+(10 ** v).toPrecision(2)}`,
  );
}

function panel(c, left, w, h, rem, title, steps, lines, name) {
  const all = lines.flatMap((l) => l[0]).sort((a, b) => a - b),
    low = all[0]; // a spike is cut:
  const high = all[Math.ceil(0.98 * (all.length - 1))],
    span = high - low || 1; // 2 % of the values
  const x0 = left + 3.2 * rem,
    x1 = left + w - 4,
    y0 = h - 1.3 * rem,
    y1 = 1.7 * rem;
  const last = Math.max(1, steps[steps.length - 1] || 1),
    first = steps[0] || 0;
  c.fillStyle = INK;
  c.textAlign = "left";
  c.fillText(title, left, rem);
  c.strokeStyle = LINE;
  c.lineWidth = 1;
  c.strokeRect(x0, y1, x1 - x0, y0 - y1);
  if (!all.length) return;
  c.fillStyle = SOFT;
  c.textAlign = "right";
  c.fillText(name(high), x0 - 5, y1 + 0.6 * rem);
  c.fillText(name(low), x0 - 5, y0);
  c.fillText(`step ${steps[steps.length - 1]}`, x1, h - 0.2 * rem);
  for (const [values, colour, dash] of lines) {
    c.strokeStyle = colour;
    c.lineWidth = 2;
    c.setLineDash(dash);
    c.beginPath();
    values.forEach((v, k) =>
      c.lineTo(
        x0 + ((x1 - x0) * (steps[k] - first)) / Math.max(1, last - first),
        y0 - (y0 - y1) * Math.min(1, 0.05 + (0.9 * (v - low)) / span),
      ),
    );
    c.stroke();
    c.setLineDash([]);
  }
}

// What the page is about at a moment, one step of it, and the link that keeps it.  No drawing here.
//
// A world is {cfg, modes, x, past, step}: settings, the target's modes, the particles (2 N,
// float32), where they were before each of the last steps, and the number of steps taken.
"use strict";

const M = typeof module !== "undefined" ? require("./math.js") : nano;
const S = typeof module !== "undefined" ? require("./shapes.js") : { SHAPES, skewed };

const DEFAULTS = {
  shape: "ring8", skew: 0,                                   // target
  n: 300, start: "blob", seed: 1, h: 0.04,                   // generator
  method: "dmd", alpha: 1, normalise: true, divergence: "kl", w_gan: 0.05, cond: -1, guidance: 3,
  matching: true,
  spread: false, sigma: 0.3, low: 0.05, high: 1, draws: 4,   // noise
  delay: 0, rate: 0.03,                                      // late fake score, length of a step
  arrows: "moves", mode: 0, particle: -1,                    // what is drawn and chosen
};
const RATES = { dmd: 0.03, diff_instruct: 0.1, sid: 0.05, gan: 0.02, dmd2: 0.03, f_distill: 0.03,
  decoupled: 0.03 };                               // a good length of step by method
const LONGEST = 0.2;                               // no particle moves farther in one step
const MOST_LATE = 40;

/** A few hundred points to start from (2 N), which follow from the seed. */
function starting_points(cfg, modes) {
  const z = M.normals(4 * cfg.seed, 0, 2 * cfg.n);
  const place = { blob: [0, 0, 0.12], wide: [0, 0, 0.5], left: [-0.9, 0, 0.1],
    mode: [modes[0].x, modes[0].y, modes[0].std] }[cfg.start];
  if (place) return Float32Array.from(z, (v, k) => place[k % 2] + place[2] * v);
  const total = modes.reduce((sum, mode) => sum + mode.weight, 0);        // "target": its samples
  return Float32Array.from(z, (v, k) => {
    let left = total * (Math.floor(k / 2) + 0.5) / cfg.n, m = 0;
    while (m < modes.length - 1 && left > modes[m].weight) left -= modes[m++].weight;
    const spare = Math.sqrt(Math.max(0, modes[m].std ** 2 - cfg.h ** 2));  // the kernel adds h
    return (k % 2 ? modes[m].y : modes[m].x) + spare * v;
  });
}

function new_world(changes = {}, modes = null) {
  const cfg = { ...DEFAULTS, ...changes };
  if (!("rate" in changes)) cfg.rate = RATES[cfg.method];
  const own = modes || S.SHAPES[cfg.shape]();
  return { cfg, modes: own, x: starting_points(cfg, own), past: [], step: 0 };
}

/** The particles the fake score knows: those of cfg.delay steps ago, or the oldest there are. */
function late(world) {
  const { past, x, cfg } = world, n = Math.min(cfg.delay, past.length);
  return n ? past[past.length - n] : x;
}

/** The noise level of each draw.  Draw j + draws / 2 has that of j, and minus its noise. */
function sigmas(cfg) {
  const half = cfg.draws / 2;
  return Float64Array.from({ length: cfg.draws }, (_, j) =>
    cfg.spread ? M.karras((j % half + 0.5) / half, cfg.low, cfg.high) : cfg.sigma);
}

/** Everything the page shows of a world: gradients, loss, KLs.  See gradients() in math.js. */
function evaluate(world) {
  const { cfg, modes, x, step } = world, count = 2 * cfg.n * cfg.draws;
  const data = M.mixture(modes);
  const teacher = cfg.skew ? M.mixture(S.skewed(modes, cfg.skew)) : data;
  const has_class = modes.some((mode) => (mode.label || 0) === cfg.cond);
  const settings = { ...cfg, cond: has_class ? cfg.cond : -1 };
  const fake = M.kernels(late(world), cfg.h);
  const own = M.antithetic(4 * cfg.seed + 1, step, count);
  const noise = M.antithetic(4 * cfg.seed + 2, step, count);
  const seen = M.gradients(x, teacher, data, fake, own, noise, sigmas(cfg), settings);
  const fixed = M.antithetic(4 * cfg.seed + 3, 0, 4 * cfg.n);
  seen.kl = M.kl(x, data, fixed, cfg.h, settings.cond);
  seen.kl_teacher = cfg.skew ? M.kl(x, teacher, fixed, cfg.h, settings.cond) : seen.kl;
  return Object.assign(seen, { teacher, data, fake, own, noise, settings });
}

/** One particle as the first draw sees it: x, xt, and all answers there. */
function inspect(world, seen, i) {
  const { cfg, x } = world, sigma = sigmas(cfg)[0], look = M.new_look();
  M.sample_at(look, x, i, seen.own, seen.noise, i, cfg.h, sigma);
  M.look_at(seen.teacher, seen.data, seen.fake, sigma, seen.settings)(look);
  return look;
}

/** Every particle goes rate times the gradient down, at most LONGEST. */
function take_step(world, seen) {
  const { x, cfg } = world, moved = new Float32Array(x.length);
  for (let i = 0; i < x.length; i += 2) {
    let u = -cfg.rate * (seen.a[i] + seen.b[i]), v = -cfg.rate * (seen.a[i + 1] + seen.b[i + 1]);
    const shorter = Math.min(1, LONGEST / Math.hypot(u, v));
    if (shorter < 1) [u, v] = [u * shorter, v * shorter];
    moved[i] = x[i] + u;
    moved[i + 1] = x[i + 1] + v;
  }
  world.past.push(x);
  if (world.past.length > MOST_LATE) world.past.shift();
  world.x = moved;
  world.step += 1;
}

// ---- the link.  Settings that differ from DEFAULTS, edited modes, and particles that have moved

const to_text = (floats) => btoa(String.fromCharCode(...new Uint8Array(floats.buffer)))
  .replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
const from_text = (text) => new Float32Array(Uint8Array.from(
  atob(text.replaceAll("-", "+").replaceAll("_", "/")), (c) => c.charCodeAt(0)).buffer);

/** "shape=two&alpha=1.2...": all that new_world needs to make this world again, to the last bit. */
function to_link(world) {
  const { cfg, modes } = world, words = [];
  for (const name in DEFAULTS) if (cfg[name] !== DEFAULTS[name]) words.push(`${name}=${cfg[name]}`);
  const one = (mode) => [mode.x, mode.y, mode.std, mode.weight, mode.label].join(",");
  const written = (list) => list.map(one).join(";");
  if (written(modes) !== written(S.SHAPES[cfg.shape]())) words.push(`modes=${written(modes)}`);
  if (cfg.rate === DEFAULTS.rate && cfg.rate !== RATES[cfg.method]) words.push(`rate=${cfg.rate}`);
  const untouched = starting_points(cfg, modes);
  if (world.step || untouched.some((v, k) => v !== world.x[k])) {
    words.push(`step=${world.step}`, `x=${to_text(world.x)}`);
    const known = world.past.slice(world.past.length - Math.min(cfg.delay, world.past.length));
    if (known.length) words.push(`past=${known.map(to_text).join(".")}`);
  }
  return words.join("&");
}

const ALLOWED = { shape: Object.keys(S.SHAPES), method: Object.keys(RATES), cond: ["-1", "0", "1"],
  divergence: Object.keys(M.WEIGHTS), start: ["blob", "wide", "left", "mode", "target"],
  arrows: ["moves", "parts", "scores", "gap", "none"] };
const LIMITS = { n: [20, 500, 1], draws: [2, 64, 2], delay: [0, MOST_LATE, 1], seed: [0, 1e6, 1],
  particle: [-1, 499, 1], mode: [0, 999, 1], h: [0.01, 0.5], sigma: [0.02, 10], low: [0.02, 10],
  high: [0.02, 10], skew: [0, 0.9], rate: [1e-4, 1], w_gan: [0, 10], alpha: [-10, 10],
  guidance: [0, 20] };                             // least, most, and the unit of whole numbers

/** The world of a link.  What it does not know, or cannot use, it leaves at its default. */
function from_link(text) {
  const words = new URLSearchParams(text.replace(/^#/, "")), changes = {};
  for (const [name, value] of words) {
    const usual = DEFAULTS[name], number = parseFloat(value);
    if (typeof usual === "number" && Number.isFinite(number)) changes[name] = number;
    if (typeof usual === "boolean") changes[name] = value === "true";
    if (typeof usual === "string") changes[name] = value;
  }
  for (const name in ALLOWED) if (!ALLOWED[name].includes(`${changes[name]}`)) delete changes[name];
  for (const name in LIMITS) if (name in changes) {
    const [least, most, whole] = LIMITS[name];
    const value = Math.min(most, Math.max(least, changes[name]));
    changes[name] = whole ? whole * Math.round(value / whole) : value;
  }
  const modes = (words.get("modes") || "").split(";").map((one) => one.split(",").map(Number))
    .filter((m) => m.length === 5 && m.every(Number.isFinite) && m[2] > 0 && m[3] > 0)
    .map(([x, y, std, weight, label]) => ({ x, y, std, weight, label }));
  const world = new_world(changes, modes.length ? modes : null), { cfg } = world;
  cfg.mode = Math.min(cfg.mode, world.modes.length - 1);
  cfg.particle = Math.min(cfg.particle, cfg.n - 1);
  try {
    const x = words.has("x") ? from_text(words.get("x")) : world.x;
    if (x.length === world.x.length && x.every(Number.isFinite)) {
      world.x = x;
      world.step = Math.max(0, parseInt(words.get("step") || "0", 10) || 0);
      const past = words.has("past") ? words.get("past").split(".").map(from_text) : [];
      world.past = past.filter((p) => p.length === x.length && p.every(Number.isFinite));
    }
  } catch {
    world.past = [];                               // a link that was cut off: start afresh
  }
  return world;
}

const explorer_state = { DEFAULTS, RATES, MOST_LATE, LONGEST, new_world, late, sigmas, evaluate,
  inspect, take_step, to_link, from_link };
if (typeof module !== "undefined") module.exports = explorer_state;

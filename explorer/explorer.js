// The page: controls, keys, pointer, the loop.  The maths is in math.js, the world in state.js.
"use strict";

const $ = (id) => document.getElementById(id);

// ---- the world and what has been seen of it

let world = from_link(location.hash),
  seen = null,
  extent = EXTENT,
  playing = false,
  dirty = true;
let curve = { step: [], loss: [], kl: [], kl_teacher: [] },
  frames = [],
  milliseconds = 0;

function forget() {
  curve = { step: [], loss: [], kl: [], kl_teacher: [] };
  extent = EXTENT;
}

function show(next) {
  world = next;
  seen = null;
  forget();
  refresh();
}

/** Start again with some settings changed; the modes stay. */
function restart(changes = {}) {
  show(new_world({ ...world.cfg, ...changes }, world.modes));
}

function set(key, value) {
  const { cfg, modes } = world;
  if (OF_MODE.includes(key)) {
    world.modes = modes.map((mode, m) => (m === cfg.mode ? { ...mode, [key]: value } : mode));
  } else if (key === "shape") {
    return show(new_world({ ...cfg, shape: value, mode: 0 }));
  } else if (RESTARTS.includes(key)) {
    return restart({ [key]: value, particle: -1 });
  } else {
    cfg[key] = value;
    if (key === "method") {
      cfg.rate = RATES[value];
      if (value === "decoupled" && cfg.cond < 0) cfg.cond = 0;
    }
    if (key === "low") cfg.high = Math.max(cfg.high, value);
    if (key === "high") cfg.low = Math.min(cfg.low, value);
  }
  refresh();
}

const value_of = (key) =>
  OF_MODE.includes(key) ? world.modes[world.cfg.mode][key] : world.cfg[key];

function refresh() {
  world.cfg.mode = Math.min(Math.max(0, world.cfg.mode), world.modes.length - 1);
  for (const update of controls) update();
  dirty = true;
}

// ---- controls

const controls = [];

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const name in attributes) made.setAttribute(name, attributes[name]);
  made.append(...children);
  return made;
}

function build_control([key, name, sentence, kind, ...rest]) {
  const when = typeof rest[rest.length - 1] === "function" ? rest.pop() : () => true,
    [detail] = rest;
  const output = element("output", { for: key });
  const input =
    kind === "select"
      ? element(
          "select",
          { id: key, "aria-describedby": `${key}-says` },
          ...Object.keys(detail).map((v) => element("option", { value: v }, detail[v])),
        )
      : element("input", {
          id: key,
          type: kind === "check" ? "checkbox" : "range",
          "aria-describedby": `${key}-says`,
        });
  const [low, high, step] =
    kind === "log"
      ? [Math.log(detail[0]), Math.log(detail[1]), 0.001]
      : Array.isArray(detail)
        ? detail
        : [];
  if (kind === "range" || kind === "log") Object.assign(input, { min: low, max: high, step });
  const row = element("div", { class: "row" }, element("label", { for: key }, name));
  row.append(...(kind === "range" || kind === "log" ? [output, input] : [input]));
  const box = element(
    "div",
    { class: "control" },
    row,
    element("small", { id: `${key}-says` }, sentence),
  );
  input.addEventListener("input", () => {
    if (kind === "check") return set(key, input.checked);
    if (kind === "log") return set(key, +Math.exp(input.valueAsNumber).toPrecision(3));
    if (kind === "range") return set(key, input.valueAsNumber);
    set(key, Number.isFinite(+input.value) ? +input.value : input.value);
  });
  controls.push(() => {
    const value = value_of(key);
    box.hidden = !when(world);
    if (kind === "check") input.checked = value;
    else if (kind === "log") input.value = Math.log(value);
    else input.value = value;
    output.textContent = key === "delay" ? `${value} steps` : `${value}`;
  });
  return box;
}

function build() {
  for (const title in CONTROLS) {
    const group = element(
      "fieldset",
      {},
      element("legend", {}, title),
      ...CONTROLS[title].map(build_control),
    );
    if (title === "Target") {
      const add = element("button", { id: "add" }, "Add a mode"),
        remove = element("button", { id: "remove" }, "Remove it");
      add.onclick = () => add_mode(0, 0);
      remove.onclick = remove_mode;
      group.append(element("div", { class: "buttons" }, add, remove));
    }
    $("panel").append(group);
  }
  for (const [name, link, words] of TRY) {
    const chip = element("a", { href: `#${link}` }, name);
    chip.onclick = (event) => {
      event.preventDefault();
      history.replaceState(null, "", `#${link}`);
      for (const other of document.querySelectorAll("#try a"))
        other.removeAttribute("aria-current");
      chip.setAttribute("aria-current", "true");
      show(from_link(link));
      say(words);
      play(true);
    };
    $("try").append(chip);
  }
}

function say(words) {
  $("told").textContent = words;
}

// ---- the loop

function play(on = !playing) {
  playing = on;
  frames = [];
  $("play").textContent = on ? "Pause" : "Play";
  $("play").setAttribute("aria-pressed", on);
  dirty = true;
}

function look() {
  const start = performance.now();
  seen = evaluate(world);
  milliseconds = milliseconds
    ? 0.9 * milliseconds + 0.1 * (performance.now() - start)
    : performance.now() - start;
  const outside = world.x.filter((v) => Math.abs(v) > extent).length;
  if (outside > 0.05 * world.x.length && extent < 100) extent *= 2;      // the view follows
}

function once() {
  if (!seen || (dirty && !playing)) look();        // while playing, what was seen last is enough
  take_step(world, seen);
  look();
  const now = { step: world.step, ...seen };
  for (const key in curve) curve[key].push(now[key]);
  if (curve.step.length > 800)
    for (const key in curve) curve[key] = curve[key].filter((_, k) => k % 2 === 0);
}

function frame(now) {
  if (playing) {
    frames.push(now);
    if (frames.length > 61) frames.shift();
    once();
  } else if (dirty || !seen) look();
  if (playing || dirty) paint();
  dirty = false;
  requestAnimationFrame(frame);
}

const digits = (v) =>
  Math.abs(v) >= 1e4 || (v && Math.abs(v) < 1e-3) ? v.toExponential(2) : `${+v.toPrecision(4)}`;
const vector = (v) => `(${digits(v[0])}, ${digits(v[1])})`;

function table(id, rows) {
  $(id).replaceChildren(
    ...rows.map(([name, value, key]) =>
      element(
        "tr",
        {},
        element("th", { scope: "row" }, name),
        element("td", key ? { id: key } : {}, value),
      ),
    ),
  );
}

/** The share of points to which no other mode is nearer than mode m. */
function share_of(m) {
  const { modes, x, cfg } = world,
    far = (mode, i) => (mode.x - x[2 * i]) ** 2 + (mode.y - x[2 * i + 1]) ** 2;
  let count = 0;
  for (let i = 0; i < cfg.n; i++)
    if (modes.every((mode) => far(modes[m], i) <= far(mode, i))) count += 1;
  return count / cfg.n;
}

function paint() {
  const { cfg } = world;
  draw_plane($("plane"), world, seen, extent);
  draw_curves($("curves"), curve, cfg.skew);
  const rows = [
    ["step", `${world.step}`, "n-step"],
    ["loss", digits(seen.loss), "n-loss"],
    ["mean |d_real - d_fake|^2", digits(seen.mesm), "n-mesm"],
    ["true KL to the data", digits(seen.kl), "n-kl"],
    ["points at the chosen mode", `${Math.round(100 * share_of(cfg.mode))} %`, "n-share"],
  ];
  if (cfg.skew) rows.push(["true KL to the teacher", digits(seen.kl_teacher), "n-kl-teacher"]);
  table("rows", rows);
  $("probe").hidden = cfg.particle < 0;
  if (cfg.particle >= 0) table("probe-rows", probe_rows(inspect(world, seen, cfg.particle)));
  const rate =
    frames.length > 10 ? (1000 * (frames.length - 1)) / (frames[frames.length - 1] - frames[0]) : 0;
  $("speed").textContent =
    `${milliseconds.toFixed(1)} ms a step${rate ? `, ${rate.toFixed(0)} frames a second` : ""}`;
  const mode = world.modes[cfg.mode];
  $("plane").setAttribute(
    "aria-label",
    `${world.modes.length} modes, ${cfg.n} points. Mode ${cfg.mode + 1} at ` +
      `${vector([mode.x, mode.y])}. True KL ${digits(seen.kl)}.`,
  );
}

function probe_rows(look) {
  const { cfg } = world,
    i = cfg.particle,
    r = Math.exp(look.logit),
    out = [0, 0];
  const scores = [look.real, look.fake].map((a) => {
    score(a.d, look.xt, look.sigma, out);
    return vector(out);
  });
  return [
    ["x", vector(look.x)],
    ["xt = x + sigma noise", vector(look.xt)],
    ["d_real", vector(look.real.d)],
    ["d_fake", vector(look.fake.d)],
    ["score_real", scores[0]],
    ["score_fake", scores[1]],
    ["r = p_real / p_fake", digits(r)],
    [`h(r), ${cfg.divergence}`, digits(WEIGHTS[cfg.divergence](r))],
    [
      "its gradient (mean)",
      vector([seen.a[2 * i] + seen.b[2 * i], seen.a[2 * i + 1] + seen.b[2 * i + 1]]),
    ],
  ];
}

// ---- pointer and keys

let held = -1,
  last_tap = 0;

const place = (event) => {
  const box = $("plane").getBoundingClientRect(),
    w = $("plane").clientWidth;
  const at = [
    event.clientX - box.left - $("plane").clientLeft,
    event.clientY - box.top - $("plane").clientTop,
  ];
  return { w, at, data: [to_data(at[0], 0, w, extent), to_data(at[1], 1, w, extent)] };
};

/** The nearest of points [[x, y], ...] to pixel `at`, if within reach: its index, or -1. */
function nearest(points, { at, w }, reach) {
  const far = points.map(([x, y]) =>
    Math.hypot(to_pixel(x, 0, w, extent) - at[0], to_pixel(y, 1, w, extent) - at[1]),
  );
  const k = far.indexOf(Math.min(...far));
  return far[k] <= reach ? k : -1;
}

function move_mode(x, y) {
  world.modes = world.modes.map((mode, m) => (m === world.cfg.mode ? { ...mode, x, y } : mode));
  refresh();
}

function add_mode(x, y) {
  world.modes = [
    ...world.modes,
    { x, y, std: world.modes[world.cfg.mode].std, weight: 1, label: 0 },
  ];
  world.cfg.mode = world.modes.length - 1;
  refresh();
}

function remove_mode() {
  if (world.modes.length > 1) world.modes = world.modes.filter((_, m) => m !== world.cfg.mode);
  refresh();
}

function listen() {
  const plane = $("plane");
  plane.addEventListener("pointerdown", (event) => {
    const where = place(event),
      reach = event.pointerType === "touch" ? 30 : 18,
      again = event.timeStamp - last_tap < 350;
    last_tap = event.timeStamp;
    const mode = nearest(
      world.modes.map((m) => [m.x, m.y]),
      where,
      crowded(world.modes) ? reach / 2 : reach,
    );
    if (mode >= 0) {
      held = mode;
      world.cfg.mode = mode;
      plane.setPointerCapture(event.pointerId);
    } else {
      const points = Array.from({ length: world.cfg.n }, (_, i) => [
        world.x[2 * i],
        world.x[2 * i + 1],
      ]);
      world.cfg.particle = nearest(points, where, reach);
      if (again && world.cfg.particle < 0) add_mode(...where.data);
    }
    refresh();
  });
  plane.addEventListener("pointermove", (event) => {
    if (held >= 0) move_mode(...place(event).data);
  });
  for (const end of ["pointerup", "pointercancel"]) plane.addEventListener(end, () => (held = -1));
  document.addEventListener("keydown", (event) => {
    const tag = event.target.tagName,
      quiet = ["INPUT", "SELECT"].includes(tag) || $("keys").open;
    if (quiet || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === " " && ["BUTTON", "A"].includes(tag)) return; // the button's own
    if (key_pressed(event.key, event.shiftKey ? 0.1 : 0.02)) event.preventDefault();
  });
  $("play").onclick = () => play();
  $("once").onclick = () => {
    once();
    paint();
  };
  $("reset").onclick = () => restart();
  $("share").onclick = share;
  $("help").onclick = () => $("keys").showModal();
  window.addEventListener("hashchange", () => show(from_link(location.hash)));
  window.addEventListener("resize", () => (dirty = true));
}

/** Do what a key says; false if it says nothing. */
function key_pressed(key, far) {
  const { cfg, modes } = world,
    mode = modes[cfg.mode],
    count = modes.length;
  const moves = {
    ArrowLeft: [-far, 0],
    ArrowRight: [far, 0],
    ArrowUp: [0, far],
    ArrowDown: [0, -far],
  };
  const to = (name, value) => () => set(name, value);
  const actions = {
    " ": () => play(),
    s: $("once").onclick,
    r: $("reset").onclick,
    l: share,
    "?": $("help").onclick,
    "[": to("mode", (cfg.mode + count - 1) % count),
    "]": to("mode", (cfg.mode + 1) % count),
    "+": to("weight", +(mode.weight * 1.25).toPrecision(3)),
    "-": to("weight", +(mode.weight / 1.25).toPrecision(3)),
    ".": to("std", +(mode.std * 1.25).toPrecision(3)),
    ",": to("std", +(mode.std / 1.25).toPrecision(3)),
    a: () => add_mode(0, 0),
    Delete: remove_mode,
    n: to("particle", (cfg.particle + 1) % cfg.n),
    Escape: to("particle", -1),
  };
  const action = actions[key.length === 1 ? key.toLowerCase() : key];
  if (key in moves) move_mode(mode.x + moves[key][0], mode.y + moves[key][1]);
  else if (action) action();
  return key in moves || Boolean(action);
}

function share() {
  const link = `#${to_link(world)}`;
  history.replaceState(null, "", link);
  if (navigator.clipboard) navigator.clipboard.writeText(location.href).catch(() => {});
  const size = (link.length / 1000).toFixed(1);
  say(`The address now holds everything you see (${size} kB). Copy it, or bookmark it.`);
}

build();
listen();
refresh();
requestAnimationFrame(frame);

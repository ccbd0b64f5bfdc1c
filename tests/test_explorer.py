"""The explorer: its maths against the package, wrong maths rejected, its world in node, the page in a browser with real input.

Tests of the maths and the world need node, tests of the page Debian's chromium; without them they are skipped.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from browser import CHROMIUM, Page

ROOT = Path(__file__).parents[1]
HOME = ROOT / "explorer"
URL = (HOME / "index.html").as_uri()
NODE = shutil.which("node") or shutil.which("nodejs")
needs_node = pytest.mark.skipif(not NODE, reason="node is not installed: the explorer's maths is not compared")
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed: the explorer's page is not tried")


def node(script):
    """The JSON value of a function's body in node, with math.js as M, state.js as S."""
    top = f"const M = require({str(HOME / 'math.js')!r}), S = require({str(HOME / 'state.js')!r}), "
    top += f"{{ SHAPES }} = require({str(HOME / 'shapes.js')!r});"
    done = subprocess.run([NODE, "-e", f"{top} console.log(JSON.stringify((() => {{ {script} }})()))"],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ---- the maths


def same(found, want, where=""):
    if isinstance(want, dict):
        assert found.keys() == want.keys(), where
        for name in want:
            same(found[name], want[name], f"{where}/{name}")
    elif isinstance(want, list):
        assert len(found) == len(want), where
        for k, (f, w) in enumerate(zip(found, want)):
            same(f, w, f"{where}[{k}]")
    else:
        assert found == (pytest.approx(want, rel=1e-9, abs=1e-9) if isinstance(want, float) else want), where


def test_the_golden_file_is_what_the_package_says(monkeypatch):
    """golden.json is golden.py's, to 1e-9: whoever changes a loss writes it again."""
    monkeypatch.syspath_prepend(str(HOME))
    import golden

    same(golden.golden(), json.loads(golden.FILE.read_text()))
    assert golden.FILE.stat().st_size < 60 * 1024


def compared(maths):
    return subprocess.run([NODE, str(HOME / "check.js"), str(maths)], capture_output=True, text=True, timeout=60)


@needs_node
def test_the_maths_is_the_package_s():
    """Every function of math.js within 1e-6 of the golden points."""
    done = compared(HOME / "math.js")
    assert done.returncode == 0 and "all within 1e-6" in done.stdout, done.stdout + done.stderr


MUTANTS = {
    "DMD's sign": ("out[k] = (d_fake[k] - d_real[k]) / size", "out[k] = (d_real[k] - d_fake[k]) / size"),
    "DMD without its normaliser": ("const size = normalise ? normaliser(x, d_real) : 1;\n  for", "const size = 1;\n  for"),
    "the normaliser sums": ("Math.abs(x[1] - d_real[1])) / 2)", "Math.abs(x[1] - d_real[1])))"),
    "alpha at the wrong gap": ("gap * (d_real[k] - x[k] - alpha * gap)", "gap * (alpha * (d_real[k] - x[k]) - gap)"),
    "alpha once, not twice": ("x[0] - 2 * alpha * gap0", "x[0] - alpha * gap0"),
    "no Jacobian of the fake score": ("((J[0] - F[0]) * v0 + cross", "(J[0] * v0 + cross"),
    "no Jacobian at the gap": ("+ J[0] * gap0 + J[1] * gap1", ""),
    "no off-diagonal Jacobian": ("out.J[1] = uv / total - u * v / s2", "out.J[1] = 0"),
    "h(r) upside down": ("kl: (r) => r,", "kl: (r) => 1 / r,"),
    "js and sf exchanged": ("js: (r) => r / (r + 1)", "js: (r) => 1 / (r + 1)"),
    "w where w - 1 belongs": ("-(w - 1) * (d_cond[k]", "-w * (d_cond[k]"),
    "guidance the other way": ("cond.d[k] - uncond.d[k]);\n  for", "uncond.d[k] - cond.d[k]);\n  for"),
    "the saturating GAN loss": ("1 / (1 + Math.exp(Math.min(700, logit)))", "1 / (1 + Math.exp(-logit))"),
    "sigma for its square in the score": ("out[k] = (d[k] - xt[k]) / (sigma * sigma)", "out[k] = (d[k] - xt[k]) / sigma"),
    "kernels of no width": ("var: new Float64Array(n).fill(h * h)", "var: new Float64Array(n).fill(1e-9)"),
    "r is not centred": ("group[i] /= centre", "group[i] /= 1"),
    "the KL backwards": ("log_prob(fake, a, b) - log_prob(target, a, b)", "log_prob(target, a, b) - log_prob(fake, a, b)"),
    "the cut-off is too early": ("const LEAST = -40", "const LEAST = -4"),
    "the GAN sees the teacher": ("gan_gradient(look.data.d, look.fake.d, look.logit, look.sigma, a)",
                                 "gan_gradient(look.real.d, look.fake.d, look.logit, look.sigma, a)"),
}


@needs_node
@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_maths_is_rejected(name, tmp_path):
    right, (old, new) = (HOME / "math.js").read_text(), MUTANTS[name]
    assert right.count(old) == 1, f"{name}: in math.js {right.count(old)} times"
    wrong = tmp_path / "math.js"
    wrong.write_text(right.replace(old, new))
    done = compared(wrong)
    assert done.returncode == 1 and "above 1e-6" in done.stdout, done.stdout + done.stderr


CFG = """const cfg = { ...S.DEFAULTS, h: 0.1 };
const field = (x, teacher, changes, sigmas, z) => { const c = { ...cfg, ...changes }; return M.gradients(x, teacher, teacher,
  M.kernels(x, c.h), z, z.map((v, k) => z[(k + 2) % z.length]), sigmas, c); };
const size = (v) => Math.max(...v.map(Math.abs)), x = M.normals(1, 1, 12), z = M.antithetic(1, 2, 48);
const modes = (x, std) => [...Array(x.length / 2).keys()].map((i) =>
  ({ x: x[2 * i], y: x[2 * i + 1], std, weight: 1, label: i % 2 }));
"""


@needs_node
@pytest.mark.parametrize("method", ["dmd", "diff_instruct", "sid", "gan", "dmd2", "f_distill"])
def test_nothing_moves_a_student_that_is_the_teacher(method):
    """The particles' kernels are the target itself: every gradient is 0, for SiD in both parts' sum."""
    worst = node(f"""{CFG} const found = field(x, M.mixture(modes(x, 0.1)), {{ method: {method!r}, alpha: 1.2 }},
        [0.3, 1, 0.3, 1], z); return Math.max(size(found.a), found.mesm);""")
    assert worst < 1e-12


@needs_node
def test_dmd_s_gradient_is_that_of_the_kl():
    """One particle, one mode: grad KL(N(x, h^2 + s^2) || N(mu, std^2 + s^2)) = (x - mu) / (std^2 + s^2) = g / s^2."""
    found = node(f"""{CFG} const one = M.mixture([{{ x: 0.3, y: -0.2, std: 0.1, weight: 1, label: 0 }}]);
        const g = field(Float64Array.of(1, 0.5), one, {{ method: "diff_instruct" }}, [0.7, 0.7, 0.7, 0.7], z.slice(0, 8)
            .map((v, k) => (k < 4 ? v : -z[k - 4])));
        return [...g.a].map((v) => v / 0.49);""")
    assert found == pytest.approx([0.7 / 0.5, 0.7 / 0.5], rel=1e-9)


@needs_node
def test_sid_s_direct_part_is_dmd_for_every_alpha():
    found = node(f"""{CFG} const teacher = M.mixture(SHAPES.ring8());
        const at = (changes) => field(x, teacher, changes, [0.3, 1, 0.3, 1], z);
        const dmd = at({{ method: "dmd" }}).a;
        return [-1, 0, 0.5, 1, 2].map((alpha) => size(at({{ method: "sid", alpha }}).a.map((v, k) => v - dmd[k])));""")
    assert max(found) < 1e-12


@needs_node
def test_the_jacobian_is_the_denoiser_s_derivative():
    """Central differences, and the gap to them falls with their step's square: 1e-6."""
    worst = node("""const p = M.noised(M.mixture(SHAPES.grid25()), 0.3), o = M.answer(), q = M.answer(), e = 1e-4; let worst = 0;
        const z = M.normals(3, 3, 40);
        for (let i = 0; i < 40; i += 2) {
          M.denoise(p, z[i], z[i + 1], o);
          const J = [...o.J], by = (k) => { const s = [z[i], z[i + 1]]; s[k] += e; M.denoise(p, ...s, o); s[k] -= 2 * e;
            M.denoise(p, ...s, q); return [0, 1].map((m) => (o.d[m] - q.d[m]) / (2 * e)); };
          const [a, b] = [by(0), by(1)];
          for (const off of [a[0] - J[0], a[1] - J[1], b[0] - J[1], b[1] - J[2]]) worst = Math.max(worst, Math.abs(off)); }
        return worst;""")
    assert worst < 1e-6


@needs_node
def test_the_faster_exponential_is_the_exponential():
    """Between -41 and 0, to 1e-15 of itself."""
    assert node("""let worst = 0; for (let v = -40.99; v <= 0; v += 1e-4)
        worst = Math.max(worst, Math.abs(M.exp_below_0(v) / Math.exp(v) - 1)); return worst;""") < 1e-15


@needs_node
def test_the_split_is_exact():
    """Matching plus augmentation is DMD's guided gradient, up to their normaliser; at w = 1 augmentation is 0."""
    found = node(f"""{CFG} const teacher = M.mixture(SHAPES.ring8()), s = [0.5, 0.5, 0.5, 0.5];
        const off = field(x, teacher, {{ method: "decoupled", cond: 1, guidance: 1 }}, s, z);
        const real = M.answer(), cond = M.answer(), fake = M.answer(), g = M.answer();
        const out = [0, 0], parts = [0, 0], xt = [0.2, 0.1];
        M.denoise(M.noised(teacher, 0.5), ...xt, real); M.denoise(M.noised(teacher, 0.5, 1), ...xt, cond);
        M.denoise(M.noised(M.kernels(x, 0.1), 0.5), ...xt, fake); M.guided(real, cond, 4, g);
        const m = M.normaliser(xt, cond.d);
        M.augmentation_gradient(xt, cond.d, real.d, 4, parts);
        M.dmd_gradient(xt, cond.d, fake.d, true, out);
        return [size(off.b), ...[0, 1].map((k) => out[k] + parts[k] - (fake.d[k] - g.d[k]) / m)];""")
    assert max(map(abs, found)) < 1e-12


@needs_node
def test_random_numbers_stay_what_they_were():
    """A link made today shows the same picture later; and they are unit normals."""
    first, mean, square, half = node("""const z = M.normals(4, 7, 20000), a = M.antithetic(4, 7, 8);
        return [[...M.normals(5, 1, 4)], z.reduce((s, v) => s + v, 0) / 2e4, z.reduce((s, v) => s + v * v, 0) / 2e4,
                a[0] + a[4] + a[3] + a[7]];""")
    assert first == pytest.approx(FIRST, rel=1e-12)
    assert abs(mean) < 0.03 and abs(square - 1) < 0.04 and half == 0


FIRST = [-0.3167466254184001, 0.7212206232527376, -0.4023410010473552, -1.7254412911155894]


# ---- the world


@needs_node
@pytest.mark.parametrize("link, least", [("", 10), ("method=diff_instruct&rate=0.3", 5), ("method=sid", 20),
                                         ("method=gan&start=wide", 1.5), ("method=f_distill&divergence=js", 5),
                                         ("shape=spirals&spread=true&draws=8", 1.5),
                                         ("method=dmd2", 10)])
def test_play_lowers_the_kl(link, least):
    """At delay 0, by the factor `least` in 100 steps."""
    before, after = node(f"""const w = S.from_link("n=80&{link}"); let seen = S.evaluate(w); const kl = seen.kl;
        for (let s = 0; s < 100; s++) {{ S.take_step(w, seen); seen = S.evaluate(w); }} return [kl, seen.kl];""")
    assert after < before / least


@needs_node
@pytest.mark.parametrize("delay", [0, 1, 7])
def test_a_late_fake_score_knows_the_particles_of_n_steps_ago(delay):
    same_, fresh = node(f"""const w = S.from_link("n=20&delay={delay}"), all = [];
        for (let s = 0; s < 12; s++) {{ all.push(w.x); S.take_step(w, S.evaluate(w)); }}
        all.push(w.x); const known = S.late(w), seen = S.evaluate(w).fake.mean;
        return [known === all[12 - {delay}] && seen.every((v, k) => v === known[k]),
                S.late(S.from_link("n=20&delay=7")).length === 40];""")
    assert same_ and fresh


@needs_node
def test_a_late_fake_score_makes_the_student_swing():
    """One mode at 0, a student from the left: on time it comes and rests, late it goes far beyond, again and again."""
    on_time, late = node("""return [0, 12].map((delay) => { const w = S.from_link(
          `shape=one&start=left&rate=0.1&sigma=0.6&n=40&delay=${delay}`), mean = [];
        for (let s = 0; s < 120; s++) { S.take_step(w, S.evaluate(w));
          mean.push(w.x.reduce((t, v, k) => t + (k % 2 ? 0 : v), 0) / 40); }
        return mean; });""")
    assert max(map(abs, on_time[60:])) < 0.1
    assert max(late[60:]) > 0.4 and min(late[60:]) < -0.4


EXPERIMENTS = """const text = require("fs").readFileSync(require.resolve("HOME/controls.js"), "utf8");
const TRY = new Function(text + "; return TRY;")();
const world = (name, more = "") => S.from_link(TRY.find((t) => t[0] === name)[1] + more);
const right = (w) => w.x.filter((v, k) => k % 2 === 0 && v > 0).length / w.cfg.n, far = (w) => Math.max(...w.x.map(Math.abs));
const play = (w, steps) => { let seen = S.evaluate(w);
  for (let s = 0; s < steps; s++) { S.take_step(w, seen); seen = S.evaluate(w); } return seen; };
""".replace("HOME", str(HOME))


@needs_node
def test_experiments_show_what_their_words_say():
    """The numbers of docs/explorer.md's table, or earlier ones of the same runs."""
    found = node(EXPERIMENTS + """const a = world("The loss says nothing"), a1 = play(a, 100), a2 = play(a, 100);
        const sid = world("SiD at alpha 1.2"), c1 = S.evaluate(sid), c2 = play(sid, 50);
        const off = play(world("Normaliser off"), 50), on = play(world("Normaliser off", "&normalise=true"), 50);
        const fill = ["kl", "rkl", "neyman"].map((h) => { const w = world("Covers or seeks", "&divergence=" + h);
          play(w, 50); return right(w); });
        const wrong = world("Wrong teacher"), before = right(wrong); play(wrong, 200); const copied = right(wrong);
        Object.assign(wrong.cfg, { method: "gan", rate: S.RATES.gan }); play(wrong, 500); const repaired = right(wrong);
        const away = world("Guidance never stops"); play(away, 200); const gone = far(away);
        away.cfg.matching = true; play(away, 100);
        return { loss: [a1.loss, a2.loss], kl: [a1.kl, a2.kl], sid: [c1.loss, c2.loss, c1.kl, c2.kl],
                 off: off.kl, on: on.kl, fill, share: [before, copied, repaired], far: [gone, far(away)] };""")
    assert max(found["loss"]) < 0.1 and found["kl"][1] < 0.8 * found["kl"][0]
    assert found["sid"][0] < found["sid"][1] < 0 and found["sid"][3] < found["sid"][2] / 5
    assert found["on"] < found["off"] / 2
    assert found["fill"][0] > found["fill"][1] > found["fill"][2]
    assert found["share"] == [0.5, pytest.approx(0.22, abs=0.04), pytest.approx(0.5, abs=0.04)]
    assert found["far"][0] > 2.5 and found["far"][1] < 1.6


WORLDS = ["", "method=sid&alpha=1.2&normalise=false&draws=6", "shape=checkerboard&n=60&delay=3&seed=9",
          "method=decoupled&cond=1&guidance=2.5&matching=false", "spread=true&low=0.07&high=2.3&h=0.031&rate=0.0123&skew=0.3"]


@needs_node
@pytest.mark.parametrize("link", WORLDS)
def test_a_link_keeps_the_whole_world(link):
    """Bit for bit: settings, edited modes, particles and the past; then both go on alike."""
    same_, size = node(f"""const a = S.from_link({link!r});
        a.modes = a.modes.map((m, k) => (k ? m : {{ ...m, x: 0.1 + 0.2, weight: 1 / 3 }}));
        for (let s = 0; s < 6; s++) S.take_step(a, S.evaluate(a));
        const text = S.to_link(a), b = S.from_link("#" + text), past = (w) => (w.cfg.delay ? w.past.slice(-w.cfg.delay) : []);
        const plain = (w) => JSON.stringify([w.cfg, w.modes, [...w.x], w.step, past(w).map((p) => [...p])]);
        const now = plain(a) === plain(b) && S.to_link(b) === text;
        for (let s = 0; s < 4; s++) for (const w of [a, b]) S.take_step(w, S.evaluate(w));
        return [now && [...a.x].every((v, k) => v === b.x[k]) && S.evaluate(a).kl === S.evaluate(b).kl, text.length];""")
    assert same_ and size < 20000


@needs_node
@pytest.mark.parametrize("link", ["", "method=toString", "start=nowhere", "x=!!!&step=4",
                                  "method=nothing&alpha=x&n=1e9&draws=3&modes=1,2;a,b,c,d,e",
                                  "shape=__proto__",
                                  "modes=0,0,-1,1,0", "h=0&sigma=-3", "delay=1e9", "n=NaN&past=AAAA",
                                  "particle=1e9&mode=77&skew=2&arrows=x&cond=5&rate=-1&low=5&high=0.1", "step=3&x=AAAA&past=.."])
def test_a_broken_link_opens_something(link):
    kl = node(f"""const w = S.from_link({link!r}); const seen = S.evaluate(w); S.take_step(w, seen); return S.evaluate(w).kl;""")
    assert kl is not None and 0 < kl < 1e6


# ---- the page


@pytest.fixture(scope="module")
def page():
    """One browser; each test opens the page afresh."""
    with Page(URL) as one:
        yield one


def opened(page, link="", width=1280, height=800, touch=False):
    page.events.clear()
    page.resize(width, height, touch)
    page.open(f"{URL}#{link}" if link else URL)
    page.until("seen !== null && !dirty")
    return page


def read(page, name):
    """A number as the page shows it."""
    return float(page.js(f"document.getElementById('n-{name}').textContent").rstrip("%"))


def pixel(page, x, y):
    """Where data coordinates are in the window."""
    page.js("$('plane').scrollIntoView({block: 'nearest'})")
    return page.js(f"""(() => {{ const p = $("plane"), b = p.getBoundingClientRect(), w = p.clientWidth, e = p.clientLeft;
        return [b.x + e + to_pixel({x}, 0, w, extent), b.y + e + to_pixel({y}, 1, w, extent)]; }})()""")


def settle(page):
    page.until("!dirty")


@needs_browser
def test_the_page_opens_from_a_file_and_asks_for_nothing_else(page):
    page.call("Network.enable")
    opened(page)
    asked = {e["params"]["request"]["url"].split("#")[0] for e in page.events if e["method"] == "Network.requestWillBeSent"}
    page.call("Network.disable")
    names = {url.rsplit("/", 1)[1] for url in asked if url != "about:blank"}
    assert asked - {"about:blank"} == {(HOME / name).as_uri() for name in names}
    assert names == {"index.html", "math.js", "shapes.js", "state.js", "draw.js", "controls.js", "explorer.js"}
    assert page.errors() == [] and read(page, "kl") > 10


@needs_browser
@pytest.mark.parametrize("touch, size", [(False, (1280, 800)), (False, (1920, 1080)), (True, (390, 844)), (True, (360, 640))])
def test_a_mode_is_dragged_to_where_one_lets_go(page, touch, size):
    """Within a pixel, with the mouse and with a finger; the others stay, and nothing is wider than the window."""
    opened(page, "", *size, touch=touch)
    before = page.js("world.modes.map((m) => [m.x, m.y])")
    page.drag(pixel(page, *before[2]), pixel(page, 0.31, 0.12), touch)
    settle(page)
    after = page.js("world.modes.map((m) => [m.x, m.y])")
    one = page.js("2 * extent / $('plane').clientWidth")
    assert after[2] == pytest.approx([0.31, 0.12], abs=one)
    assert [m for k, m in enumerate(after) if k != 2] == [m for k, m in enumerate(before) if k != 2]
    assert page.js("world.cfg.mode") == 2 and page.js("document.documentElement.scrollWidth") <= size[0]
    assert page.errors() == []


@needs_browser
def test_play_by_key_lowers_the_kl_and_says_how_long_a_step_takes(page, record_property):
    opened(page)
    first = read(page, "kl")
    page.key(" ")
    page.until("world.step >= 90")
    words = page.js("$('speed').textContent")
    page.key(" ")
    steps = page.js("world.step")
    assert page.js("playing") is False and read(page, "kl") < first / 5
    took, rate = map(float, re.fullmatch(r"([\d.]+) ms a step, ([\d.]+) frames a second", words).groups())
    assert 0 < took and 0 < rate
    record_property("speed", words)
    print(f"300 points, 8 modes: {words}")
    page.key("s")
    settle(page)
    assert page.js("world.step") == steps + 1 and read(page, "step") == steps + 1
    page.key("r")
    settle(page)
    assert read(page, "step") == 0 and read(page, "kl") == first
    assert page.errors() == []


@needs_browser
def test_alpha_and_delay_are_sliders(page):
    """By keys on the focused slider: the gradients on the page change as math.js says they do."""
    opened(page, "method=sid&n=60")
    seen = "Array.from(seen.a, (v, k) => v + seen.b[k])"
    before, loss = page.js(seen), read(page, "loss")
    page.js("$('alpha').focus()")
    for _ in range(4):
        page.key("ArrowRight")
    settle(page)
    assert page.js("world.cfg.alpha") == 1.2 and page.js("$('alpha').parentElement.querySelector('output').textContent") == "1.2"
    assert read(page, "loss") != loss and page.js(seen) != before
    page.js("$('delay').focus()")
    for _ in range(5):
        page.key("ArrowRight")
    for _ in range(8):
        page.js("once()")
    settle(page)
    assert page.js("world.cfg.delay") == 5 and page.js("late(world) === world.past[world.past.length - 5]")
    assert page.js("seen.fake.mean.every((v, k) => v === late(world)[k])")
    assert page.errors() == []


@needs_browser
def test_keys_move_weigh_widen_add_and_remove_the_chosen_mode(page):
    opened(page)
    mode = "[world.cfg.mode, world.modes.length, world.modes[world.cfg.mode].x, world.modes[world.cfg.mode].weight]"
    page.key("]")
    x = page.js("world.modes[1].x")
    page.key("ArrowLeft")
    page.key("+")
    page.key(".")
    assert page.js(mode) == [1, 8, pytest.approx(x - 0.02, abs=1e-12), 1.25] and page.js("world.modes[1].std") == 0.0625
    page.key("a")
    assert page.js(mode) == [8, 9, 0, 1]
    page.key("Delete")
    assert page.js(mode)[:2] == [7, 8]
    page.key("n")
    settle(page)
    rows = page.js("Array.from(document.querySelectorAll('#probe-rows th'), (e) => e.textContent)")
    assert {"x", "d_real", "d_fake", "score_real", "score_fake"} <= set(rows) and page.js("world.cfg.particle") == 0
    page.key("Escape")
    settle(page)
    assert page.js("$('probe').hidden")
    page.key("?")
    assert page.js("$('keys').open")
    page.click("#keys button")
    assert not page.js("$('keys').open") and page.errors() == []


@needs_browser
def test_the_link_button_keeps_everything_in_the_address(page):
    """Dragged, played, late: the page that the address opens shows the same numbers to the last bit, and goes on alike."""
    opened(page, "method=sid&delay=4&n=50&draws=8")
    page.drag(pixel(page, 0.7036, 0), pixel(page, 0.2, 0.9))
    for _ in range(7):
        page.js("once()")
    page.click("#share")
    settle(page)
    state = """JSON.stringify([world.cfg, world.modes, [...world.x], world.step, [...late(world)], [...seen.a], [...seen.b],
                               seen.loss, seen.kl])"""
    address, before = page.js("location.href"), page.js(state)
    page.open(address)
    page.until("seen !== null && !dirty")
    assert page.js(state) == before and page.js("world.step") == 7
    assert page.errors() == []


@needs_browser
def test_each_experiment_opens_and_moves(page):
    """They play at once, their words are shown, and their settings are what the link says."""
    opened(page)
    for k in range(page.js("TRY.length")):
        page.click(f"#try a:nth-of-type({k + 1})")
        page.until("world.step >= 3")
        assert page.js(f"playing && $('told').textContent === TRY[{k}][2]")
        assert page.js(f"TRY[{k}][1].split('&').every((w) => String(world.cfg[w.split('=')[0]]) === w.split('=')[1])")
    page.js("play(false)")
    assert page.errors() == []


@needs_browser
def test_every_control_has_a_name_and_a_sentence(page):
    opened(page, "spread=false")
    bare = page.js("""Array.from(document.querySelectorAll("input, select")).filter((e) =>
        !e.labels.length || !e.labels[0].textContent ||
        !/^[A-Z0-9].*\\.$/.test(document.getElementById(e.getAttribute("aria-describedby")).textContent)).map((e) => e.id)""")
    unnamed = page.js("Array.from(document.querySelectorAll('button')).filter((e) => !(e.ariaLabel || e.textContent)).length")
    assert bare == [] and unnamed == 0


@needs_browser
def test_every_picture_is_drawn_and_its_colours_are_the_notebooks(page):
    """All kinds of arrows, with a late fake score and a chosen point; no exception, and something on the canvas."""
    from toy.plots import FAKE, GRADIENT, REAL, TEACHER

    assert page.js("[REAL, FAKE, FIRST, GRADIENT]") == [REAL, FAKE, TEACHER, GRADIENT]
    for arrows in ("moves", "parts", "scores", "gap", "none"):
        opened(page, f"method=decoupled&cond=0&delay=3&arrows={arrows}&particle=4&n=40&skew=0.5")
        for _ in range(4):
            page.js("once()")
        page.js("paint()")
        inks = page.js("""(() => { const c = $("plane"), d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
            return new Set(new Uint32Array(d.buffer)).size; })()""")
        assert inks > 100 and page.errors() == [], arrows


@pytest.mark.parametrize("name", [path.name for path in sorted(HOME.glob("*.js"))] + ["golden.py"])
def test_lines_of_the_explorer_are_short(name):
    lines = (HOME / name).read_text().splitlines()
    assert [line for line in lines if len(line) > 100 or "\t" in line] == [] and len(lines) <= 450
    assert all(line.isascii() for line in lines)

"""Race the methods on a 2D mixture whose score is known exactly: one table and three pictures.

    python -m toy [--target ring8] [--methods NAME,NAME] [--seeds 5]

samples.png  the target, the teacher and the one-step students of seed 0
field.png    real score, fake score and their difference early in the training of the first method;
             DMD moves samples along the difference
samples.gif  the students' samples while they train
"""

import math
from pathlib import Path

import torch
from tqdm import tqdm

from nano_dmd.compare import as_text, compare, folder_names, parse_row
from nano_dmd.denoiser import heun, score
from nano_dmd.engine.build import set_learning_rates
from nano_dmd.engine.config import as_number, number, parser, resolve
from nano_dmd.engine.files import UserError, command
from nano_dmd.engine.machine import pick_device
from nano_dmd.engine.prepare import prepare
from nano_dmd.engine.runs import load_run
from nano_dmd.methods import METHODS, train_step
from nano_dmd.plot import MISSING, have_matplotlib, save_figure
from toy.mixtures import MIXTURES
from toy.plots import (FAKE, REAL, TEACHER, field_figure, lattice, movie_frames, samples_figure,
                       save_movie)

COLUMNS = {
    "sw2": "sliced 2-Wasserstein distance to the target over that of true samples (1 = perfect)",
    "modes": "modes that hold more than a quarter of their share",
    "in3": "share of samples within 3 std of a mode",
    "weight_error": "largest relative error of a mode's share",
    "CPU s": "seconds of distillation, teacher and pairs not included"}
EARLY = 60                                         # updates before field.png: soon the scores agree


def config(row):
    """The Config behind a row of compare, "method --flag value ...".  raises UserError."""
    return resolve(parse_row("toy", row))


def watch(cfg, moments):
    """Train as nano_dmd.train does; yield (updates done, Nets) at each of moments, ascending."""
    _, nets, opts, draw = prepare(cfg, pick_device(cfg.device))
    with tqdm(total=moments[-1], desc=f"{cfg.method} for the pictures") as bar:
        for start, stop in zip([0, *moments], moments):
            for step in range(start, stop):
                set_learning_rates(opts, step, cfg)
                train_step(nets, opts, draw, cfg, step)
                bar.update()
            yield stop, nets


@torch.no_grad()
def sample(generator, n):
    """(n, 2) samples on the CPU, from the same noise whatever the generator."""
    rng, k = torch.Generator().manual_seed(0), len(generator.sigmas)
    z = torch.randn(k, n, 2, generator=rng).to(next(generator.parameters()).device)
    return generator(z).cpu()


def draw_samples(path, target, folders, result, n=5000):
    """Write samples.png.  folders {method: run folder}; result is compare's, for the titles."""
    def title(name, calls):
        sw2, in3 = result[name]["sw2"][0], result[name]["in3"][0]
        return f"{name}, {calls} network call{'s' * (calls > 1)}\nsw2 {sw2:.2f}, in3 {in3:.3f}"

    mixture, rng = MIXTURES[target](), torch.Generator().manual_seed(0)
    panels = [(f"{target}\ntrue samples", mixture.sample(n, rng)[0], REAL),
              (title("teacher", 35), heun(mixture, torch.randn(n, 2, generator=rng)), TEACHER)]
    for method, folder in folders.items():
        generator = load_run(folder)[2]
        panels.append((title(method, len(generator.sigmas)), sample(generator, n), FAKE))
    save_figure(samples_figure(panels), path)


def draw_field(path, cfg, sigmas):
    """Scores of a generator that has only begun to train."""
    [(step, nets)] = watch(cfg, [min(EARLY, cfg.steps)])
    points, scores = lattice().to(pick_device(cfg.device)), {}
    for sigma in sigmas:
        level = points.new_full(points.shape[:1], sigma)
        scores[sigma] = [score(d, points, level).detach().cpu() for d in (nets.real, nets.fake)]
    fig = field_figure(sample(nets.generator, 2000), points.cpu(), scores)
    fig.suptitle(f"after {step} updates of {cfg.method}: dots are generator samples, DMD moves "
                 "them along real - fake\narrows are faint where noised samples hardly ever come")
    save_figure(fig, path)


def moments_of(steps, n=40):
    """0 and n - 1 log-spaced numbers of updates from 10 to steps; fewer if steps are few."""
    first = min(10, steps)                         # nothing moves before
    return sorted({0, *(round(first * (steps / first) ** (i / (n - 2))) for i in range(n - 1))})


def draw_movie(path, target, configs, n=1500):
    """Write samples.gif: samples of each averaged generator from the same noise while it trains."""
    when, movie = moments_of(max(cfg.steps for cfg in configs.values())), {}
    for method, cfg in configs.items():
        times = [min(m, cfg.steps) for m in when]
        seen = {step: sample(nets.ema, n) for step, nets in watch(cfg, sorted(set(times)))}
        movie[method] = [(m, seen[m]) for m in times]
    true = MIXTURES[target]().sample(n, torch.Generator().manual_seed(0))[0]
    save_movie(path, list(movie_frames(true, movie)))


def noise_levels(text):
    """'0.1,0.3' -> [0.1, 0.3], all finite and positive.  raises UserError."""
    try:
        values = [as_number(v.strip(), float) for v in text.split(",")]
    except ValueError:
        values = [0.0]
    if not all(0 < v < math.inf for v in values):
        raise UserError(f"--sigma must be positive numbers, comma separated, got {text!r}")
    return values


def rows_of(args):
    """{method: its row of compare}.  raises UserError for the first value that cannot work."""
    if args.target not in MIXTURES:
        raise UserError(f"no target {args.target!r}: choose from {', '.join(MIXTURES)}")
    methods = [m.strip() for m in args.methods.split(",")]
    if wrong := [m for m in methods if m not in METHODS]:
        raise UserError(f"no method {wrong[0]!r}: choose from {', '.join(METHODS)}")
    if "teacher" in parse_row("toy", f"{methods[0]} {args.flags}"):
        raise UserError("--teacher cannot stand in --flags: the teacher is that of --target")
    steps = f"--steps {args.steps}" if args.steps else ""
    flags = " ".join(f"--teacher toy:{args.target} {steps} {args.flags}".split())
    rows = {method: f"{method} {flags}" for method in methods}
    for row in rows.values():
        config(row)
    return rows


def explained(result, seeds):
    """What compare found, the columns that matter here, and what they mean."""
    shown = {name: {k: v[k] for k in COLUMNS if k in v} for name, v in result.items()}
    lines = [as_text(shown), "", f"mean (standard deviation) over seeds; seeds: {seeds}"]
    return "\n".join(lines + [f"{k}: {v}" for k, v in COLUMNS.items()])


def main(argv=None):
    p = parser("python -m toy", __doc__)
    p.add_argument("--target", default="ring8", help=" | ".join(MIXTURES))
    p.add_argument("--methods", default=",".join([*METHODS][:3]), help=" | ".join(METHODS))
    p.add_argument("--seeds", type=number(1, 10**6), default=5, help="runs per method")
    p.add_argument("--steps", type=number(0, 10**9), default=0, help="updates; 0 = the preset's")
    p.add_argument("--flags", default="", help='flags of nano_dmd.train: --flags="--batch 256"')
    p.add_argument("--jobs", type=number(1, 1000), default=1, help="runs side by side")
    p.add_argument("--sigma", default="0.1,0.3,1", help="noise levels of field.png, data units")
    p.add_argument("--out", default="", help="folder of runs and pictures; empty = runs/toy-TARGET")
    p.add_argument("--no-pictures", action="store_true", help="the table alone")
    args = p.parse_args(argv)
    rows, sigmas = rows_of(args), noise_levels(args.sigma)
    out = Path(args.out or f"runs/toy-{args.target}")
    print(f"{', '.join(rows)}: {args.seeds} seeds each, in {out}/, finished ones kept", flush=True)
    result = compare("toy", list(rows.values()), args.seeds, out, args.jobs)
    result = {m: result[row] for m, row in rows.items()} | {"teacher": result["teacher"]}
    print(explained(result, args.seeds), flush=True)
    if args.no_pictures:
        return
    if not have_matplotlib():
        print(MISSING)
        return
    names, configs = folder_names(rows.values()), {m: config(row) for m, row in rows.items()}
    folders = {m: out / names[row] / "0" for m, row in rows.items()}
    draw_samples(out / "samples.png", args.target, folders, result)
    draw_field(out / "field.png", next(iter(configs.values())), sigmas)
    draw_movie(out / "samples.gif", args.target, configs)
    print(f"samples.png, field.png and samples.gif are in {out}/")


if __name__ == "__main__":
    command(main)

"""Race the methods on a 2D mixture whose score is known exactly: one table and three pictures.

    python -m toy [--target ring8] [--methods dmd,dmd2,sid] [--seeds 5]

samples.png  the target, the teacher and the one-step students of seed 0
field.png    real score, fake score and their difference, along which DMD moves samples, early in training
samples.gif  the students' samples while they train
"""

import math
from pathlib import Path

import torch
from tqdm import tqdm

from nano_dmd.engine.machine import pick_device, use_threads
from nano_dmd.engine.files import UserError, command
from nano_dmd.compare import as_text, compare, folder_names, parse_row
from nano_dmd.engine.runs import load_run
from nano_dmd.plot import MISSING, have_matplotlib, save_figure
from nano_dmd.engine.config import METHOD_NAMES, as_number, number, parser, resolve
from nano_dmd.denoiser import score
from nano_dmd.denoiser import heun
from nano_dmd.engine.build import prepare, set_learning_rates
from nano_dmd.methods import train_step
from toy.mixtures import MIXTURES
from toy.plots import FAKE, REAL, TEACHER, field_figure, lattice, movie_frames, samples_figure, save_movie

COLUMNS = {"sw2": "sliced 2-Wasserstein distance to the target over that of fresh true samples (1 = indistinguishable)",
           "modes": "modes that hold more than a quarter of their share",
           "in3": "share of samples within 3 std of a mode",
           "weight_error": "largest relative error of a mode's share",
           "CPU s": "seconds of distillation, teacher and pairs not included"}
EARLY = 60                                                        # updates before field.png: soon the scores agree


def config(row):
    """The Config behind a row of compare, "method --flag value ...", or a UserError."""
    return resolve(parse_row("toy", row))


def watch(cfg, moments):
    """Train as nano_dmd.train does and yield (updates done, Nets) at each of moments, ascending."""
    device = pick_device(cfg.device)
    use_threads(cfg.threads, device)
    _, nets, opts, draw = prepare(cfg, device)
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
    z = torch.randn(len(generator.sigmas), n, 2, generator=torch.Generator().manual_seed(0))
    return generator(z.to(next(generator.parameters()).device)).cpu()


def draw_samples(path, target, folders, result, n=5000):
    """folders {method: run folder}; result as compare returns it, for the titles."""
    def title(name, calls):
        sw2, in3 = result[name]["sw2"][0], result[name]["in3"][0]
        return f"{name}, {calls} network call{'s' * (calls > 1)}\nsw2 {sw2:.2f}, in3 {in3:.3f}"

    runs = {method: load_run(folder) for method, folder in folders.items()}
    mixture, rng = MIXTURES[target](), torch.Generator().manual_seed(0)
    panels = [(f"{target}\ntrue samples", mixture.sample(n, rng)[0], REAL),
              (title("teacher", 35), heun(mixture, torch.randn(n, 2, generator=rng)), TEACHER)]
    panels += [(title(method, len(g.sigmas)), sample(g, n), FAKE) for method, (_, _, g) in runs.items()]
    save_figure(samples_figure(panels), path)


def draw_field(path, cfg, sigmas):
    """Scores of a generator that has only begun to train."""
    [(step, nets)] = watch(cfg, [min(EARLY, cfg.steps)])
    points, scores = lattice().to(pick_device(cfg.device)), {}
    for sigma in sigmas:
        level = points.new_full(points.shape[:1], sigma)
        scores[sigma] = [score(d, points, level).detach().cpu() for d in (nets.real, nets.fake)]
    fig = field_figure(sample(nets.generator, 2000), points.cpu(), scores)
    fig.suptitle(f"after {step} updates of {cfg.method}: dots are generator samples, DMD moves them along real - fake\n"
                 "arrows are faint where samples plus noise hardly ever come")
    save_figure(fig, path)


def moments(steps, n=40):
    """0 and n - 1 log-spaced numbers of updates from 10 to steps (nothing moves before); fewer if steps are few."""
    first = min(10, steps)
    return sorted({0, *(round(first * (steps / first) ** (i / (n - 2))) for i in range(n - 1))})


def draw_movie(path, target, configs, n=1500):
    """The same noise through the averaged generator of every method {name: Config} while it trains."""
    when, movie = moments(max(cfg.steps for cfg in configs.values())), {}
    for method, cfg in configs.items():
        seen = {step: sample(nets.ema, n) for step, nets in watch(cfg, sorted({min(m, cfg.steps) for m in when}))}
        movie[method] = [(min(m, cfg.steps), seen[min(m, cfg.steps)]) for m in when]
    true = MIXTURES[target]().sample(n, torch.Generator().manual_seed(0))[0]
    save_movie(path, list(movie_frames(true, movie)))


def noise_levels(text):
    """'0.1,0.3' -> [0.1, 0.3], all finite and positive."""
    try:
        values = [as_number(v.strip(), float) for v in text.split(",")]
    except ValueError:
        values = [0.0]
    if not all(0 < v < math.inf for v in values):
        raise UserError(f"--sigma must be positive numbers, comma separated, got {text!r}")
    return values


def rows(args):
    """{method: its row of compare} and the flags they share; raises UserError for the first value that cannot work."""
    if args.target not in MIXTURES:
        raise UserError(f"no target {args.target!r}: choose from {', '.join(MIXTURES)}")
    if "teacher" in parse_row("toy", f"dmd {args.flags}"):
        raise UserError("--teacher cannot stand in --flags: the teacher is that of --target")
    steps = f"--steps {args.steps}" if args.steps else ""
    flags = " ".join(f"--teacher toy:{args.target} {steps} {args.flags}".split())
    result = {method: f"{method} {flags}" for method in map(str.strip, args.methods.split(","))}
    for method, row in result.items():
        if method not in METHOD_NAMES:
            raise UserError(f"no method {method!r}: choose from {', '.join(METHOD_NAMES)}")
        config(row)
    return result, flags


def table(result, seeds):
    """What compare found, the columns that matter here, and what they mean."""
    lines = [as_text({name: {k: values[k] for k in COLUMNS if k in values} for name, values in result.items()}),
             "", f"mean (standard deviation) over seeds; seeds: {seeds}", *[f"{k}: {v}" for k, v in COLUMNS.items()]]
    return "\n".join(lines)


def main(argv=None):
    p = parser("python -m toy", __doc__)
    p.add_argument("--target", default="ring8", help=" | ".join(MIXTURES))
    p.add_argument("--methods", default="dmd,dmd2,sid", help=f"any of {', '.join(METHOD_NAMES)}, comma separated")
    p.add_argument("--seeds", type=number(1, 10**6), default=5, help="runs per method, seeds 0, 1, ...")
    p.add_argument("--steps", type=number(0, 10**9), default=0, help="generator updates of every method; 0 = the preset's")
    p.add_argument("--flags", default="", help='more flags of nano_dmd.train for every method: --flags="--batch 256"')
    p.add_argument("--jobs", type=number(1, 1000), default=1, help="runs side by side, each in its own process")
    p.add_argument("--sigma", default="0.1,0.3,1", help="noise levels of field.png, comma separated, data units")
    p.add_argument("--out", default="", help="folder of runs, table and pictures; empty = runs/toy-TARGET")
    p.add_argument("--no-pictures", action="store_true", help="the table alone")
    args = p.parse_args(argv)
    (row, flags), sigmas, out = rows(args), noise_levels(args.sigma), Path(args.out or f"runs/toy-{args.target}")
    print(f"{', '.join(row)}: {args.seeds} seeds each, in {out}/; runs that are there already are kept", flush=True)
    names, result = folder_names(row.values()), compare("toy", list(row.values()), args.seeds, out, args.jobs)
    result = {method: result[row[method]] for method in row} | {"teacher": result["teacher"]}
    print(table(result, args.seeds), flush=True)
    if args.no_pictures:
        return
    if not have_matplotlib():
        print(MISSING)
        return
    draw_samples(out / "samples.png", args.target, {m: out / names[r] / "0" for m, r in row.items()}, result)
    draw_field(out / "field.png", config(f"dmd2 {flags}"), sigmas)
    draw_movie(out / "samples.gif", args.target, {m: config(r) for m, r in row.items()})
    print(f"samples.png, field.png and samples.gif are in {out}/")


if __name__ == "__main__":
    command(main)

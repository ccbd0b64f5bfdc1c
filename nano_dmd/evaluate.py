"""Is the student any good?  Several numbers, because each one alone can be fooled.

    python -m nano_dmd.evaluate RUN [--metric fd]

digits  fd        Frechet distance of pixels to the training images (a Gaussian per class does well)
        feat_fd   the same on the 64 features of a small classifier trained on every second image
        precision, recall   share of samples in the data's 5-NN balls; of data in the samples' balls
        accuracy  share of samples whose class by 3 nearest neighbours is the class asked for
        nearest   mean L2 distance to the nearest training image (0 = copies)
images  fixed_fd, fixed_precision, fixed_recall   stand-ins without a download; they are no FID
        fid, isc, kid, precision, recall   on Inception features, if --metric asks for one
2D      sw2       sliced 2-Wasserstein distance over that of fresh true samples (1 = perfect)
        in3       share within 3 std of a mode (true samples .989 in 2D)
        modes     modes that hold more than a quarter of their share
        weight_error   largest relative error of a mode's share
not text  pairing   correlation with the teacher's ODE answer to the same noise (1 = a copy)
text    fid, clip   see metrics/text.py
"""

from statistics import stdev

import torch
from tqdm import tqdm

from nano_dmd.denoiser import heun
from nano_dmd.engine import find, machine
from nano_dmd.engine.config import number, parser
from nano_dmd.engine.files import UserError, command
from nano_dmd.engine.runs import load_run
from nano_dmd.metrics import images, inception, points, sets, text
from nano_dmd.teachers.data import load_data

DIGITS = ("fd", "feat_fd", "precision", "recall", "accuracy", "nearest")
IMAGES = ("fixed_fd", "fixed_precision", "fixed_recall")
POINTS = ("sw2", "in3", "modes", "weight_error")


def measure(sample, data, draws=5, k=1, n=2000):
    """Mean metrics of sample(z (k, B, *S), cond) -> x over several draws; noise from fixed seeds.

    A draw is 50,000 points in 2D, one sample per digit with its label (per second digit of mnist),
    or n of other images.
    """
    found = []
    for seed in range(1000, 1000 + draws):
        rng = torch.Generator().manual_seed(seed)
        if data.kind == "points":
            z = torch.randn(k, 50_000, *data.shape, generator=rng).to(data.means.device)
            found.append(points.mixture_metrics(sets.in_batches(sample, z, None, 10_000), data))
        elif images.is_digits(data):
            cond = data.labels[:: max(1, len(data) // 2000)]
            z = torch.randn(k, len(cond), *data.shape, generator=rng).to(data.device)
            found.append(images.digit_metrics(sets.in_batches(sample, z, cond, 600), cond, data))
        else:
            seeds = range(seed * n, (seed + 1) * n)
            what = data.shape, data.classes, k, data.device
            made = images.generate(sample, seeds, *what, show=False)
            found.append(images.standin_metrics(made, data, n))
    return sets.average(found)


def quick(net, data, n):
    """The student's metrics from one draw: cheap enough while training.

    {} without data, and for images from text: their metrics need captions, see main.
    """
    return measure(net, data, 1, len(net.sigmas), n) if data and data.kind != "text" else {}


@torch.no_grad()
def milliseconds(sample, teacher, device, k=1, batch=64, repeats=5):
    """Median milliseconds to make one batch, after two to warm up; fewer after ten seconds."""
    z = torch.randn(k, batch, *teacher.shape, device=device)
    cond = torch.zeros(batch, dtype=torch.long, device=device) if teacher.classes else None
    return 1000 * machine.median_seconds(lambda: sample(z, cond), device, repeats, limit=10)


@torch.no_grad()
def pairing(generator, real, shape, classes, n=500):
    """Correlation of G(z) and the teacher's Heun answer to z, class means taken away; a float."""
    rng, device = torch.Generator().manual_seed(7), next(generator.parameters()).device
    z = torch.randn(len(generator.sigmas), n, *shape, generator=rng).to(device)
    groups = min(max(classes, 1), 50)
    group = torch.arange(n, device=device) % groups
    cond = group if classes else None
    teacher = sets.in_batches(lambda z, cond: heun(real, z[0], cond), z, cond, 100)
    pair = torch.stack([sets.in_batches(generator, z, cond, 100), teacher]).flatten(2).double()
    for i in range(groups):
        pair[:, group == i] -= pair[:, group == i].mean(1, keepdim=True)
    a, b = pair                                                   # (n, D) each
    return ((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()).item()


def report_rows(generator, teacher, data, cfg, draws=5):
    """{"real halves", "teacher", cfg.method: {metric: number}}, NFE (network calls) and speed.

    Without data, speeds alone.  draws: sets of student samples.  The teacher is guided as in cfg.
    """
    device, k = next(generator.parameters()).device, len(generator.sigmas)
    real, n = find.guided_by(teacher, cfg), cfg.eval_images
    result = {}
    calls = teacher.calls * (2 if cfg.guidance != 1 else 1)
    if data and data.kind == "images" and len(data) > 1:
        result["real halves"] = images.split_halves(data, n)

    def row(sample, k, calls, draws):
        found = measure(sample, data, draws, k, n) if data else {}
        speed = 64_000 / milliseconds(sample, teacher, device, k)
        return found | {"NFE": calls, "samples/s": speed}

    result["teacher"] = row(lambda z, cond: heun(real, z[0], cond), 1, calls, 1)
    result["teacher"]["seconds"] = teacher.recipe["seconds"] or None           # if trained here
    student = result[cfg.method] = row(generator, k, k, draws)
    student["speed-up"] = student["samples/s"] / result["teacher"]["samples/s"]
    student["pairing"] = pairing(generator, real, teacher.shape, teacher.classes)
    return result


@torch.no_grad()
def latency(nets, batch, calls, repeats):
    """Seconds for one sample by (the student, the teacher: one guided call times its calls)."""
    z, cond = batch.z[:, :1], None if batch.cond is None else batch.cond[:1]
    sigma = z.new_ones(1)
    guided = machine.median_seconds(lambda: nets.real(z[0], sigma, cond), z.device, repeats)
    student = machine.median_seconds(lambda: nets.ema(z, cond), z.device, repeats)
    return student, calls * guided


@torch.no_grad()
def latent_rows(nets, draw, cfg):
    """{"teacher", method: {metric: number}} of text to image: latency, statistics of latents."""
    batch, calls = draw(), draw.teacher.calls
    x, (student, slow) = nets.ema(batch.z, batch.cond), latency(nets, batch, calls, 3)
    calls *= 2 if cfg.guidance != 1 else 1
    return {"teacher": {"NFE": calls, "ms per image": 1000 * slow},
            cfg.method: {"NFE": len(batch.z), "ms per image": 1000 * student,
                         "speed-up": slow / student, "latent mean": x.mean().item(),
                         "latent std": x.std().item()}}


def inception_rows(cfg, teacher, generator, args, wanted, device):
    """{method: mean, "spread": std} of Inception metrics over args.repeats sets of args.n images.

    Set r comes from the seeds r n, r n + 1, ...
    """
    reference = args.reference or cfg.data or teacher.data
    if not reference:
        raise UserError(f"the data set of {args.run} is not known: give --reference")
    if not reference.endswith(".npz"):
        reference = load_data(reference, device)
    found = []
    for r in range(args.repeats):
        made = images.generate(generator, range(r * args.n, (r + 1) * args.n), teacher.shape,
                               teacher.classes, len(generator.sigmas), device, args.batch)
        found.append(inception.inception_metrics(made, reference, wanted, device,
                                                 args.inception_weights))
    rows = {cfg.method: sets.average(found)}
    if args.repeats > 1:
        values = {m: [f[m] for f in found] for m in wanted}
        rows["spread"] = {m: None if None in v else stdev(v) for m, v in values.items()}
    return rows


def text_rows(cfg, teacher, generator, args, wanted, device):
    """{method: metrics} of args.n images of a student, prompts in turn; image i has seed i."""
    from nano_dmd.teachers.prompts import read_prompts

    if not teacher.decode:
        raise UserError(f"students of {cfg.teacher} cannot be measured: it has no decoder")
    path = args.prompts or cfg.prompts
    prompts = read_prompts(teacher.recipe["source"], path, cfg.encode, device)

    @torch.no_grad()
    def one(seed):
        rng, k = torch.Generator().manual_seed(seed), len(generator.sigmas)
        z = torch.randn(k, 1, *teacher.shape, generator=rng).to(device)
        cond = prompts[torch.tensor([seed % len(prompts)])].to(device)
        return teacher.decode(generator(z, cond))

    captions = [prompts.texts[i % len(prompts)] for i in range(args.n)]
    made = (one(seed) for seed in tqdm(range(args.n), "images"))
    return {cfg.method: text.text_metrics(made, captions, wanted, args.reference, device,
                                          args.inception_weights, args.clip_model)}


def wanted_metrics(asked, teacher, data_name):
    """(names in --metric, how they are measured: "text", "inception" or "own").  raises UserError.

    precision and recall of digits compare pixels, or Inception features if fid is asked for too.
    """
    wanted = [name.strip() for name in asked.split(",")] if asked is not None else []
    own = DIGITS if data_name in images.SHIPPED else {"points": POINTS}.get(teacher.kind, IMAGES)
    pictures = teacher.kind == "images" and teacher.shape[0] in (1, 3)
    if teacher.kind == "text":
        how, known = "text", ("fid", "clip")
    elif pictures and set(wanted) & set(inception.METRICS) - set(own):
        how, known = "inception", inception.METRICS
    else:
        how, known = "own", (*own, "NFE", "samples/s", "pairing")
    wrong = [name for name in wanted if name not in known]
    if how == "text" and not wanted:
        wrong = ["--metric"]
    if wrong:
        more = f", or together {', '.join(inception.METRICS)}" if pictures and how == "own" else ""
        raise UserError(f"no metric {wrong[0]!r} here, or not in one call with the others: choose "
                        f"from {', '.join(known)}{more}")
    return [name for name in known if name in wanted], how


def main(argv=None):
    p = parser("python -m nano_dmd.evaluate", __doc__)
    p.add_argument("run", help="a run folder")
    p.add_argument("--metric", help="these metrics alone, comma separated")
    p.add_argument("--draws", type=number(1, 10**6), default=5, help="sets of samples")
    p.add_argument("--n", type=number(2, 10**9), default=50_000, help="samples, for fid")
    p.add_argument("--repeats", type=number(1, 10**6), default=1, help="sets of --n, for a spread")
    p.add_argument("--batch", type=number(1, 10**6), default=250, help="samples made at once")
    p.add_argument("--reference", help="for Inception: .npz of EDM's fid-refs, or a data set")
    p.add_argument("--inception-weights", help="torch-fidelity's file (default: downloaded once)")
    p.add_argument("--prompts", help="text: captions, one to a line (default: the run's)")
    p.add_argument("--clip-model", default=text.CLIP, help="for clip: hub name or folder")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda")
    args = p.parse_args(argv)
    device = machine.pick_device(args.device)
    cfg, teacher, generator = load_run(args.run, device)
    wanted, how = wanted_metrics(args.metric, teacher, cfg.data or teacher.data)
    if how == "own" and args.reference:
        raise UserError(f"--reference is for --metric {','.join(inception.METRICS)}: leave it out")
    if how == "own":
        data = find.find_data(cfg, teacher, device)
        found = report_rows(generator, teacher, data, cfg, draws=args.draws)
    else:
        rows = inception_rows if how == "inception" else text_rows
        found = rows(cfg, teacher, generator, args, wanted, device)
    if wrong := [name for name in wanted if name not in found[cfg.method]]:
        raise UserError(f"{wrong[0]} cannot be measured, as the data of {args.run} is not known: "
                        "give --data when training")
    if wanted:
        found = {row: {m: v[m] for m in wanted if m in v} for row, v in found.items()}
    print(sets.table({row: v for row, v in found.items() if v}))


if __name__ == "__main__":
    command(main)

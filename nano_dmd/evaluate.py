"""Is the student any good?  Several numbers, because each one alone can be fooled.

    python -m nano_dmd.evaluate RUN [--metric fd]

images  fd        Frechet distance of pixels to the training images (class-conditional Gaussians do well here)
        feat_fd   the same on the 64 features of a small classifier trained on every second image
        precision, recall   share of samples inside the data's 5-NN balls, and of data inside the samples'
        accuracy  3-nearest-neighbour class of a sample is the class asked for (class means get 1.00)
        nearest   mean L2 distance to the nearest training image (0 = copies)
others  fixed_fd, fixed_precision, fixed_recall   stand-ins without a download, not comparable with FID; and, when
        asked for by --metric, fid, isc, kid, precision, recall on Inception features: see fid.py
2D      sw2       sliced 2-Wasserstein distance over that of fresh true samples (1 = indistinguishable)
        in3       share within 3 std of a mode (true samples .989 in 2D)
        modes     modes that hold more than a quarter of their share; weight_error  largest relative error of a mode's share
"""

from statistics import stdev

import torch
from tqdm import tqdm

from nano_dmd.denoiser import heun
from nano_dmd.engine.config import number, parser
from nano_dmd.engine.files import UserError, command
from nano_dmd.engine.find import find_data
from nano_dmd.engine.machine import median_seconds, pick_device
from nano_dmd.engine.runs import load_run
from nano_dmd.metrics import text as text_metrics
from nano_dmd.metrics.images import (digit_classifier, generate, image_metrics, is_digits,
                                     split_halves, standin_metrics)
from nano_dmd.metrics.inception import METRICS, inception_metrics
from nano_dmd.metrics.points import mixture_metrics
from nano_dmd.metrics.sets import average, in_batches, table
from nano_dmd.teachers.data import load_data


def measure(sample, data, draws=5, k=1, images=2000):
    """Mean metrics of sample(z (k, B, *S), cond) -> x over several draws; the noise comes from fixed seeds.

    Digits: as many samples as the data set has, with its labels.  2D: 50,000 points a draw.  Other images: `images`.
    """
    rows, device = [], data.means.device if hasattr(data, "means") else data.device
    for seed in range(1000, 1000 + draws):
        rng = torch.Generator().manual_seed(seed)
        if hasattr(data, "means"):
            z = torch.randn(k, 50_000, *data.shape, generator=rng).to(device)
            rows.append(mixture_metrics(in_batches(sample, z, None, 10_000), data))
        elif is_digits(data):
            z = torch.randn(k, *data.x.shape, generator=rng).to(device)
            x = in_batches(sample, z, data.labels, 600)
            rows.append(image_metrics(x, data.labels, data, digit_classifier(data)))
        else:
            seeds = range(seed * images, (seed + 1) * images)
            made = generate(sample, seeds, data.shape, data.classes, k, device, show=False)
            rows.append(standin_metrics(made, data, images))
    return average(rows)


@torch.no_grad()
def milliseconds(sample, shape, classes, device, k=1, batch=64, repeats=5):
    """Median milliseconds to make one batch."""
    z, cond = torch.randn(k, batch, *shape, device=device), torch.zeros(batch, dtype=torch.long, device=device)
    return 1000 * median_seconds(lambda: sample(z, cond if classes else None), device, repeats)


def rows(generator, teacher, data, label, draws=5, images=2000):
    """{"real halves", "teacher", label: {metric: number}} with network calls, samples/s, speed-up
    and, for a teacher trained here, the seconds of that.  Without data, a table of speeds alone.

    draws  sample sets to average the student's metrics over, for small data; images  size of a set for large data
    """
    device, k = next(generator.parameters()).device, len(generator.sigmas)
    samplers = {"teacher": (lambda z, cond: heun(teacher.denoiser, z[0], cond), 1, 35, 1), label: (generator, k, k, draws)}
    result = {"real halves": split_halves(data, images)} if hasattr(data, "pixels") and len(data) > 1 else {}
    for name, (sample, k, calls, repeats) in samplers.items():
        ms = milliseconds(sample, teacher.shape, teacher.classes, device, k)
        found = measure(sample, data, repeats, k, images) if data else {}
        result[name] = found | {"NFE": calls, "samples/s": 64_000 / ms}
    result["teacher"]["seconds"] = teacher.recipe["seconds"] or None
    result[label]["speed-up"] = result[label]["samples/s"] / result["teacher"]["samples/s"]
    return result

TEACHER_STEPS = 50                                                # of a usual Stable Diffusion sampler, one guided call each


@torch.no_grad()
def latency(nets, batch, repeats):
    """Seconds for one image: (the student, the teacher it replaces, TEACHER_STEPS times one guided call, measured)."""
    z, cond, sigma = batch.z[:, :1], batch.cond[:1], batch.z.new_ones(1)
    guided = median_seconds(lambda: nets.real(z[0], sigma, cond), z.device, repeats)
    return median_seconds(lambda: nets.ema(z, cond), z.device, repeats), TEACHER_STEPS * guided


@torch.no_grad()
def latent_rows(nets, teacher, draw, cfg):
    """{"teacher", method: {metric: number}} of Stable Diffusion: latency, and the statistics of the latents.

    For FID and CLIP score see --metric.
    """
    batch = draw()
    (student, slow), x = latency(nets, batch, 3), nets.ema(batch.z, batch.cond)
    calls = TEACHER_STEPS * (2 if cfg.guidance != 1 else 1)
    return {"teacher": {"NFE": calls, "ms per image": 1000 * slow},
            cfg.method: {"NFE": len(batch.z), "ms per image": 1000 * student, "latent mean": x.mean().item(),
                         "latent std": x.std().item(), "speed-up": slow / student}}


def quick(generator, data, images):
    """The student's metrics alone, from one set of samples: cheap enough to take while training.  {} without data."""
    return measure(generator, data, 1, len(generator.sigmas), images) if data else {}


def inception_rows(cfg, teacher, generator, args, wanted, device):
    """{method: mean, "spread": standard deviation} of metrics on Inception features over args.repeats sets of args.n images.

    Set r comes from seeds r n, r n + 1, ...; see py.
    """
    reference = args.reference or cfg.data or teacher.data
    if not reference:
        raise UserError(f"the data set of {args.run} is not known: name one, or an .npz of EDM's, with --reference")
    reference, found = reference if reference.endswith(".npz") else load_data(reference, device), []
    for r in range(args.repeats):
        made = generate(generator, range(r * args.n, (r + 1) * args.n), teacher.shape, teacher.classes,
                            len(generator.sigmas), device, args.batch)
        found.append(inception_metrics(made, reference, wanted, device, args.inception_weights))
    values = {m: [f[m] for f in found] for m in wanted}
    spread = {"spread": {m: None if None in v else stdev(v) for m, v in values.items()}} if args.repeats > 1 else {}
    return {cfg.method: average(found)} | spread


def text_rows(cfg, teacher, generator, args, wanted, device):
    """{method: {metric: number}} of a Stable Diffusion student on args.n prompts in turn; seed = number of the image.

    See text_metrics.py.
    """
    from nano_dmd.teachers.text_to_image import read_prompts

    if not teacher.decode:
        raise UserError(f"students of {cfg.teacher} cannot be measured: it has no decoder")
    prompts = read_prompts(teacher.recipe["source"], args.prompts or cfg.prompts)

    def one(seed):
        rng = torch.Generator().manual_seed(seed)
        z = torch.randn(len(generator.sigmas), 1, *teacher.shape, generator=rng).to(device)
        return teacher.decode(generator(z, prompts[torch.tensor([seed % len(prompts)])].to(device)))

    captions = [prompts.texts[i % len(prompts)] for i in range(args.n)]
    with torch.no_grad():
        images = (one(seed) for seed in tqdm(range(args.n), "images"))
        return {cfg.method: text_metrics.measure(images, captions, wanted, args.reference, device, args.inception_weights,
                                                 args.clip_model)}

DIGITS = ("fd", "feat_fd", "precision", "recall", "accuracy", "nearest")

OTHERS = ("fixed_fd", "fixed_precision", "fixed_recall")

POINTS = ("sw2", "in3", "modes", "weight_error")


def wanted_metrics(text, teacher, data_name):
    """(the names in --metric, where they are measured: "text", "inception" or "own").  raises UserError for unknown names.

    For digits, precision and recall mean their own; asked for together with fid, they mean those on Inception features.
    """
    wanted = [name.strip() for name in text.split(",")] if text is not None else []
    own = POINTS if len(teacher.shape) == 1 else DIGITS if data_name == "digits" else OTHERS
    if teacher.kind == "text":
        kind, known = "text", ("fid", "clip")
    elif set(wanted) & set(METRICS) - set(own) and teacher.shape[0] in (1, 3) and own is not POINTS:
        kind, known = "inception", METRICS
    else:
        kind, known = "own", (*own, "NFE", "samples/s")
    wrong = [name for name in wanted if name not in known]
    if kind == "text" and (wrong or not wanted):
        raise UserError(f"text-to-image students are measured by --metric fid,clip or one of them, got {text!r}")
    if wrong:
        more = f", or among themselves: {', '.join(METRICS)}" if kind == "own" and own is not POINTS else ""
        raise UserError(f"no metric {wrong[0]!r} here, or not in one call with the others: choose from {', '.join(known)}{more}")
    return [name for name in known if name in wanted], kind


def main(argv=None):
    p = parser("python -m nano_dmd.evaluate", __doc__)
    p.add_argument("run", help="a run folder")
    p.add_argument("--metric", help=f"print these metrics alone, e.g. sw2; or some of {','.join(METRICS)} (Inception)")
    p.add_argument("--draws", type=number(1, 10**6), default=5, help="independent sample sets to average over")
    p.add_argument("--n", type=number(2, 10**9), default=50_000,
                   help="samples for metrics on Inception features; papers use 50000")
    p.add_argument("--repeats", type=number(1, 10**6), default=1,
                   help="sets of --n samples for those metrics; several give a spread")
    p.add_argument("--batch", type=number(1, 10**6), default=250, help="samples made at once for those metrics")
    p.add_argument("--reference", help="for those metrics: an .npz of EDM's fid-refs, or a data set (default: the run's)")
    p.add_argument("--inception-weights", help="torch-fidelity's Inception weights (default: downloaded once)")
    p.add_argument("--prompts", help="fid and clip of Stable Diffusion students: captions, one to a line (default: the run's)")
    p.add_argument("--clip-model", default=text_metrics.CLIP, help="for clip: hub name or folder")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda")
    args = p.parse_args(argv)
    device = pick_device(args.device)
    cfg, teacher, generator = load_run(args.run, device)
    wanted, kind = wanted_metrics(args.metric, teacher, cfg.data or teacher.data)
    if kind == "own" and args.reference:
        raise UserError(f"--reference is for metrics on Inception features, {', '.join(METRICS)}: give one by --metric, or "
                        "leave it out")
    if kind != "own":
        found = {"inception": inception_rows, "text": text_rows}[kind](cfg, teacher, generator, args, wanted, device)
    else:
        found = rows(generator, teacher, find_data(cfg, teacher, device), cfg.method, args.draws, cfg.eval_images)
    if wrong := [name for name in wanted if name not in found[cfg.method]]:
        raise UserError(f"{wrong[0]} cannot be measured, as the data of {args.run} is not known: give it by --data when training")
    if wanted:
        found = {row: {m: v[m] for m in wanted if m in v} for row, v in found.items() if set(wanted) & v.keys()}
    print(table(found))


if __name__ == "__main__":
    command(main)

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

import functools
import time
from pathlib import Path
from statistics import stdev

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from nano_dmd import fid, text_metrics
from nano_dmd.assemble import find_data, is_latent, pick_device
from nano_dmd.cache import cached, digest
from nano_dmd.checkpoint import UserError, command, load_tensors, load_weights, save_tensors
from nano_dmd.data import TensorData, load_data
from nano_dmd.generator import Generator
from nano_dmd.noise import forked
from nano_dmd.presets import number, parser, read_config
from nano_dmd.teacher import fast_bf16, heun, load_teacher


def frechet(x, y):
    """Frechet distance of Gaussians fitted to two samples (N, D), (M, D)."""
    return fid.frechet(*fid.moments(x), *fid.moments(y))


def coverage(of, by, k=5):
    """Share of the rows of `of` that lie in the k-nearest-neighbour ball of some row of `by` (Kynkaanniemi 2019).

    None where `by` has not so many neighbours, or `of` is empty.
    """
    if len(by) <= k or not len(of):
        return None
    radius = torch.cdist(by, by).kthvalue(k + 1, dim=1).values                        # own distance 0 comes first
    return (torch.cdist(of, by) <= radius).any(1).float().mean().item()


def projections(x, directions=48):
    """Points (N, 2) projected on fixed directions and sorted along each: (directions, N)."""
    angle = torch.arange(directions, device=x.device) * torch.pi / directions
    along = torch.stack([angle.cos(), angle.sin()], 1) @ x.T
    return torch.from_numpy(np.sort(along.cpu().numpy(), 1))      # on a CPU ten times as fast as torch's sort


def sliced_w2(a, b):
    """Sliced 2-Wasserstein distance of two equally large 2D samples, from their projections."""
    return (a - b).square().mean().sqrt().item()


@functools.lru_cache(maxsize=4)
def reference(mixture, n):
    """(projections of n points with every component's share exact, mean sliced W2 of n fresh true samples to them)."""
    k = torch.repeat_interleave(torch.arange(len(mixture.means)), (mixture.weights.cpu() * n).round().int())[:n]
    k = torch.cat([k, k.new_zeros(n - len(k))]).to(mixture.means.device)
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(1)).to(mixture.means)
    exact, rng = projections(mixture.means[k] + mixture.std[k, None] * noise), torch.Generator().manual_seed(2)
    return exact, sum(sliced_w2(projections(mixture.sample(n, rng)[0]), exact) for _ in range(8)) / 8


class Classifier(nn.Module):
    """A small CNN for 8x8 digits; features() is the space of feat_fd."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1),
                                  nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64), nn.ReLU())
        self.out = nn.Linear(64, 10)

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.out(self.body(x))


def digit_classifier(data):
    """The classifier behind feat_fd, trained once on the even-numbered images (2 s) and cached; fixed seed."""
    def make(path):
        with forked(data.device), torch.enable_grad():
            torch.manual_seed(0)
            net, x, labels = Classifier(), data.x[::2].cpu(), data.labels[::2].cpu()
            opt = torch.optim.Adam(net.parameters(), lr=2e-3)
            for _ in range(300):
                index = torch.randint(len(x), (128,))
                loss = F.cross_entropy(net(x[index] + 0.1 * torch.randn_like(x[index])), labels[index])
                opt.zero_grad()
                loss.backward()
                opt.step()
        save_tensors(path, net.state_dict())

    made_of = [digest(v.cpu().numpy().tobytes()) for v in (data.x, data.labels)]
    net, path = Classifier(), cached("classifier-digits", made_of, make, ".safetensors")
    load_weights(net, load_tensors(path), f"{path} (delete it to have it made again)")
    return net.to(data.device).eval()


@torch.no_grad()
def image_metrics(x, labels, data, classifier):
    """All image metrics of samples x (N, C, H, W) asked for as classes labels (N,) against a TensorData."""
    flat, real = x.flatten(1), data.x.flatten(1)
    distance, index = torch.cdist(flat, real).topk(3, largest=False)
    votes = data.labels[index].mode(1).values
    return dict(fd=frechet(flat, real), feat_fd=frechet(classifier.features(x), classifier.features(data.x)),
                precision=coverage(flat, real), recall=coverage(real, flat),
                accuracy=(votes == labels).float().mean().item(), nearest=distance[:, 0].mean().item())


@torch.no_grad()
def split_halves(data, n=2000):
    """The same metrics for real data: one half against the other.  Half the sample doubles the bias of a Frechet distance."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    a, b = order[: len(order) // 2], order[len(order) // 2 :]
    if not is_digits(data):
        return fid.standin_metrics(*[TensorData(data.pixels[half[:n].sort().values]) for half in (a, b)], n)
    return image_metrics(data.x[a], data.labels[a], TensorData(data.x[b], data.labels[b]), digit_classifier(data))


def is_digits(data):
    """The shipped digits have metrics of their own; other images, also of 8x8 pixels, share fid.standin_metrics."""
    return getattr(data, "name", "") == "digits" and data.classes == 10


@torch.no_grad()
def mixture_metrics(x, mixture):
    """All 2D metrics of samples x (N, 2) against a Mixture."""
    exact, floor = reference(mixture, len(x))
    distance, mode = (torch.cdist(x, mixture.means) / mixture.std).min(1)
    inside, count = distance <= 3, len(mixture.means)
    found = torch.bincount(mode[inside], minlength=count) / len(x)
    share = torch.bincount(mode, minlength=count) / len(x)
    return dict(sw2=sliced_w2(projections(x), exact) / floor, in3=inside.float().mean().item(),
                modes=int((found > mixture.weights / 4).sum()),
                weight_error=(share / mixture.weights - 1).abs().max().item())


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
            made = fid.generate(sample, seeds, data.shape, data.classes, k, device, show=False)
            rows.append(fid.standin_metrics(made, data, images))
    return average(rows)


def average(rows):
    """The mean of each number over rows {name: number}; None where a row could not tell."""
    columns = {name: [r[name] for r in rows] for name in rows[0]}
    return {name: None if None in v else sum(v) / len(v) for name, v in columns.items()}


@torch.no_grad()
def in_batches(sample, z, cond, size):
    """sample(z (k, N, *S), cond) in parts of size."""
    return torch.cat([sample(z[:, i : i + size], None if cond is None else cond[i : i + size])
                      for i in range(0, z.shape[1], size)])


@torch.no_grad()
def milliseconds(sample, shape, classes, device, k=1, batch=64, repeats=5):
    """Median milliseconds to make one batch."""
    z, cond = torch.randn(k, batch, *shape, device=device), torch.zeros(batch, dtype=torch.long, device=device)
    return 1000 * median_seconds(lambda: sample(z, cond if classes else None), device, repeats)


def median_seconds(function, device, repeats):
    """Median wall time of one call, after two calls to warm up."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[repeats // 2]


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


def table(rows):
    """Rows {label: {column: number}} as text, columns in order of first appearance."""
    columns = list(dict.fromkeys(c for row in rows.values() for c in row))
    lines = [[""] + columns] + [[label] + [show(row.get(c)) for c in columns] for label, row in rows.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
                     for line in lines)


def show(value):
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:d}" if isinstance(value, int) else f"{value:.3g}"


def load_run(folder, device="cpu"):
    """(Config, Teacher, EMA Generator) of a run folder.  raises UserError if it is not one."""
    folder = Path(folder)
    cfg, teacher = read_config(folder), load_teacher(str(folder), device)
    generator = Generator(teacher.net, cfg.sigma_list(), cfg.lora_generator, cfg.unit_noise)
    load_weights(generator, load_tensors(folder / "generator.safetensors"), folder / "generator.safetensors")
    generator.net.bf16 = teacher.net.bf16 = cfg.bf16 and fast_bf16(device)
    if cfg.teacher.startswith("toy:"):
        teacher = teacher._replace(denoiser=load_data(cfg.teacher, device))
    return cfg, teacher, generator.requires_grad_(False)


def inception_rows(cfg, teacher, generator, args, wanted, device):
    """{method: mean, "spread": standard deviation} of metrics on Inception features over args.repeats sets of args.n images.

    Set r comes from seeds r n, r n + 1, ...; see fid.py.
    """
    reference = args.reference or cfg.data or teacher.data
    if not reference:
        raise UserError(f"the data set of {args.run} is not known: name one, or an .npz of EDM's, with --reference")
    reference, found = reference if reference.endswith(".npz") else load_data(reference, device), []
    for r in range(args.repeats):
        made = fid.generate(generator, range(r * args.n, (r + 1) * args.n), teacher.shape, teacher.classes,
                            len(generator.sigmas), device, args.batch)
        found.append(fid.inception_metrics(made, reference, wanted, device, args.inception_weights))
    values = {m: [f[m] for f in found] for m in wanted}
    spread = {"spread": {m: None if None in v else stdev(v) for m, v in values.items()}} if args.repeats > 1 else {}
    return {cfg.method: average(found)} | spread


def text_rows(cfg, teacher, generator, args, wanted, device):
    """{method: {metric: number}} of a Stable Diffusion student on args.n prompts in turn; seed = number of the image.

    See text_metrics.py.
    """
    from nano_dmd.stable_diffusion import read_prompts

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
    if is_latent(teacher):
        kind, known = "text", ("fid", "clip")
    elif set(wanted) & set(fid.METRICS) - set(own) and teacher.shape[0] in (1, 3) and own is not POINTS:
        kind, known = "inception", fid.METRICS
    else:
        kind, known = "own", (*own, "NFE", "samples/s")
    wrong = [name for name in wanted if name not in known]
    if kind == "text" and (wrong or not wanted):
        raise UserError(f"text-to-image students are measured by --metric fid,clip or one of them, got {text!r}")
    if wrong:
        more = f", or among themselves: {', '.join(fid.METRICS)}" if kind == "own" and own is not POINTS else ""
        raise UserError(f"no metric {wrong[0]!r} here, or not in one call with the others: choose from {', '.join(known)}{more}")
    return [name for name in known if name in wanted], kind


def main(argv=None):
    p = parser("python -m nano_dmd.evaluate", __doc__)
    p.add_argument("run", help="a run folder")
    p.add_argument("--metric", help=f"print these metrics alone, e.g. sw2; or some of {','.join(fid.METRICS)} (Inception)")
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
        raise UserError(f"--reference is for metrics on Inception features, {', '.join(fid.METRICS)}: give one by --metric, or "
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

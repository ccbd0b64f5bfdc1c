"""Metrics of images without a download: digits have their own, others stand-ins for FID."""

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from nano_dmd.engine.cache import cached, digest
from nano_dmd.engine.files import load_tensors, load_weights, save_tensors
from nano_dmd.engine.machine import forked
from nano_dmd.metrics.sets import coverage, frechet
from nano_dmd.teachers.data import SHIPPED, TensorData, to_float


def to_uint8(x):
    """[-1, 1] -> 0..255 as EDM rounds (generate.py:297); the inverse of data.to_float."""
    return (x * 127.5 + 128).clip(0, 255).to(torch.uint8)


@torch.no_grad()
def generate(sample, seeds, shape, classes=0, k=1, device="cpu", batch=250, show=True):
    """Yields uint8 batches (B, *shape) of sample(z, cond) -> x, one image for each of seeds.

    z (k, B, *shape) is unit noise, a slice for each of the generator's k steps.  Noise and class of
    an image come from a CPU generator of its own.  So batch size and device do not matter.
    """
    for start in tqdm(range(0, len(seeds), batch), "samples", disable=not show):
        streams = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch]]
        z = torch.stack([torch.randn(k, *shape, generator=g) for g in streams], 1).to(device)
        cond = None
        if classes:
            labels = [torch.randint(classes, (), generator=g) for g in streams]
            cond = torch.stack(labels).to(device)
        yield to_uint8(sample(z, cond).float())


def batches(images, n=None, size=250):
    """uint8 batches (B, C, H, W) of a data set, or of n of its images; other iterables as is."""
    if not isinstance(images, TensorData):
        return images
    order, rng = torch.arange(len(images)), torch.Generator().manual_seed(0)
    if n is not None:
        order = torch.randperm(len(images), generator=rng)[:n]    # always the same n
    return (to_uint8(images.images(index)) for index in order.split(size))


class Classifier(nn.Module):
    """A small CNN for digits of side x side pixels; features() is the space of feat_fd."""

    def __init__(self, side=8):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(), nn.Flatten(), nn.Linear(16 * side**2, 64), nn.ReLU())
        self.out = nn.Linear(64, 10)

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.out(self.body(x))


def digit_classifier(data):
    """The Classifier behind feat_fd, trained once on the even-numbered images (2 s); fixed seed."""
    def make(path):
        with forked(data.device), torch.enable_grad():
            torch.manual_seed(0)
            net = Classifier(data.shape[-1])
            x, labels = data.x[::2].cpu(), data.labels[::2].cpu()
            opt = torch.optim.Adam(net.parameters(), lr=2e-3)
            for _ in range(300):
                index = torch.randint(len(x), (128,))
                noisy = x[index] + 0.1 * torch.randn_like(x[index])
                opt.zero_grad()
                F.cross_entropy(net(noisy), labels[index]).backward()
                opt.step()
        save_tensors(path, net.state_dict())

    made_of = [digest(v.cpu().numpy().tobytes()) for v in (data.x, data.labels)]
    net = Classifier(data.shape[-1])
    path = cached(f"classifier-{data.name}", made_of, make, ".safetensors")
    load_weights(net, load_tensors(path), f"{path} (delete it to have it made again)")
    return net.to(data.device).eval()


@torch.no_grad()
def digit_metrics(x, labels, data, classifier=None):
    """All metrics of samples x (N, 1, H, W), asked for as classes labels (N,)."""
    flat, real = x.flatten(1), data.x.flatten(1)
    classifier = classifier or digit_classifier(data)
    distance, index = torch.cdist(flat, real).topk(3, largest=False)
    votes = data.labels[index].mode(1).values
    return dict(fd=frechet(flat, real),
                feat_fd=frechet(classifier.features(x), classifier.features(data.x)),
                precision=coverage(flat, real), recall=coverage(real, flat),
                accuracy=(votes == labels).float().mean().item(),
                nearest=distance[:, 0].mean().item())


def fixed_features(x):
    """(B, 256 + 16 C) features of images x (B, C, H, W) in [-1, 1], from filters of a fixed seed.

    Texture: 16 random 5x5 filters of sum 0 on the image and on its half-size copy; in each quadrant
    the root mean of positive and of negative answers.  Colour: 4x4 averages.  On 2,000 CIFAR-10
    images the Frechet distance rises by 20 of its standard deviations between real subsets when 5
    of 10 classes are lost, by 18 for a blur of half a pixel, by 19 for noise of 0.1.
    """
    rng = torch.Generator().manual_seed(0)
    filters = torch.randn(16, x.shape[1], 5, 5, generator=rng).flatten(1)
    filters = F.normalize(filters - filters.mean(1, keepdim=True)).view(16, -1, 5, 5).to(x)
    answers = [F.conv2d(v, filters, padding=2) for v in (x, F.avg_pool2d(x, 2))]
    halves = [sign.relu() for a in answers for sign in (a, -a)]
    texture = [F.adaptive_avg_pool2d(half, 2).sqrt() for half in halves]
    return torch.cat([v.flatten(1) for v in (*texture, 0.25 * F.adaptive_avg_pool2d(x, 4))], 1)


@torch.no_grad()
def standin_metrics(images, data, n=10_000):
    """{fixed_fd, fixed_precision, fixed_recall} of images against a data set, n of each.

    They compare runs with each other; published FID, precision and recall are other numbers.
    """
    sets = [torch.cat([fixed_features(to_float(b)) for b in batches(v, n)]) for v in (images, data)]
    n = min(n, *map(len, sets))                    # distance and balls depend on n
    fake, real = sets[0][:n].to(sets[1]), sets[1][:n]
    return dict(fixed_fd=frechet(fake, real), fixed_precision=coverage(fake, real),
                fixed_recall=coverage(real, fake))


def is_digits(data):
    """Whether data is the shipped digits with classes.  Others, also of 8x8, get stand-ins."""
    return data.name in SHIPPED and data.classes == 10


@torch.no_grad()
def split_halves(data, n=2000):
    """The same metrics of one half of real data against the other: what sampling alone does."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    a, b = order[: len(order) // 2], order[len(order) // 2 :]
    if is_digits(data):
        other = TensorData(data.x[b], data.labels[b])
        return digit_metrics(data.x[a], data.labels[a], other, digit_classifier(data))
    return standin_metrics(*[TensorData(data.pixels[half[:n].sort().values]) for half in (a, b)], n)

"""TODO."""

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from nano_dmd.engine.cache import cached, digest
from nano_dmd.engine.files import load_tensors, load_weights, save_tensors
from nano_dmd.engine.machine import forked
from nano_dmd.metrics.sets import coverage, frechet, frechet_of_moments, moments
from nano_dmd.teachers.data import TensorData, to_float


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
        return standin_metrics(*[TensorData(data.pixels[half[:n].sort().values]) for half in (a, b)], n)
    return image_metrics(data.x[a], data.labels[a], TensorData(data.x[b], data.labels[b]), digit_classifier(data))


def is_digits(data):
    """The shipped digits have metrics of their own; other images, also of 8x8 pixels, share fid.standin_metrics."""
    return getattr(data, "name", "") == "digits" and data.classes == 10


def to_uint8(x):
    """[-1, 1] -> 0..255 as EDM rounds (generate.py:297); the inverse of data.to_float."""
    return (x * 127.5 + 128).clip(0, 255).to(torch.uint8)


@torch.no_grad()
def generate(sample, seeds, shape, classes=0, k=1, device="cpu", batch=250, show=True):
    """Yields uint8 batches (B, *shape) of sample(z, cond) -> x, one image for each of seeds, e.g. range(50_000).

    z (k, B, *shape) is unit noise, a slice for each of the generator's k steps. Noise and, after it, class of an image
    come from a CPU generator of its own: batch and device do not matter, and seeds[r::n] splits the work among n.
    """
    for start in tqdm(range(0, len(seeds), batch), "samples", disable=not show):
        streams = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch]]
        z = torch.stack([torch.randn(k, *shape, generator=g) for g in streams], 1).to(device)
        cond = torch.stack([torch.randint(classes, (), generator=g) for g in streams]).to(device) if classes else None
        yield to_uint8(sample(z, cond).float())


def batches(images, n=None, size=250):
    """uint8 batches (B, C, H, W) of a data set, or of n images of it, always the same; or of an iterable of such batches."""
    if not hasattr(images, "images"):
        return images
    rng = torch.Generator().manual_seed(0)
    order = torch.arange(len(images)) if n is None else torch.randperm(len(images), generator=rng)[:n]
    return (to_uint8(images.images(index)) for index in order.split(size))


def fixed_features(x):
    """(B, 16 * 16 + 16 C) features of images x (B, C, H, W) in [-1, 1]; fixed by a seed on the CPU, so the same everywhere.

    Texture: the answers of 16 random 5x5 filters of sum 0 to the image and to its half-size copy, above and below zero
    apart; the root of their mean in each quadrant. Colour: 4x4 averages.
    Why these: on 2,000 CIFAR-10 images the Frechet distance moves by 20 standard deviations between real subsets when 5 of
    10 classes are lost, 18 for a blur of half a pixel, 19 for noise of 0.1, 102 upside down. Average colours alone see
    neither blur nor noise; random networks of two or three layers, averaged over the image, tell classes apart less well.
    """
    filters = torch.randn(16, x.shape[1], 5, 5, generator=torch.Generator().manual_seed(0)).flatten(1)
    filters = F.normalize(filters - filters.mean(1, keepdim=True)).view(16, -1, 5, 5).to(x)
    answers = [F.conv2d(v, filters, padding=2) for v in (x, F.avg_pool2d(x, 2))]
    texture = [F.adaptive_avg_pool2d(sign.relu(), 2).sqrt() for a in answers for sign in (a, -a)]
    return torch.cat([v.flatten(1) for v in (*texture, 0.25 * F.adaptive_avg_pool2d(x, 4))], 1)


@torch.no_grad()
def standin_metrics(images, data, n=10_000):
    """{fixed_fd, fixed_precision, fixed_recall} of images (as for inception_metrics) against a data set, n of each.

    Only for comparing runs with each other: not comparable with published FID, precision or recall. Texture is shared
    among classes, so recall hardly falls when some are lost (CIFAR-10: .88 with 5 of 10, .91 with all); fixed_fd tells.
    """
    fake, real = [torch.cat([fixed_features(to_float(b)) for b in batches(v, n)])[:n] for v in (images, data)]
    n = min(len(fake), len(real))                                 # the Frechet distance and the balls depend on n
    fake, real = fake[:n].to(real), real[:n]
    return dict(fixed_fd=frechet_of_moments(*moments(fake), *moments(real)), fixed_precision=coverage(fake, real),
                fixed_recall=coverage(real, fake))

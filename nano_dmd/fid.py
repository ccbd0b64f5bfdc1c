"""How good are natural images?  Distances between sets of images in a space of features.

fid        Frechet distance of Inception features.  Published numbers are 50,000 samples against the training images
isc        inception score: how sure a classifier is of each image, and how unsure of all together; needs no reference
kid        unbiased kernel distance of the same features, for small sets
precision, recall   share of samples in the data's 3-NN balls of these features, and of data in the samples'
fixed_fd, fixed_precision, fixed_recall   the same ideas on fixed_features, which need no download and are no FID

Inception is torch-fidelity's port of the 2015-12-05 graph, which EDM and SiD measure with, so that EDM's reference
files (https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/) serve as they are.
"""

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from nano_dmd.checkpoint import UserError, first_line
from nano_dmd.data import to_float

METRICS = ("fid", "isc", "kid", "precision", "recall")


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


def moments(features):
    """Mean (D,) and covariance (D, D) of features (N, D), float64."""
    x = features.double()
    return x.mean(0), x.T.cov() if len(x) > 1 else x.new_full((x.shape[1],) * 2, torch.nan)


def frechet(mean_x, cov_x, mean_y, cov_y):
    """|mean difference|^2 + tr(Cx + Cy - 2 (Cx Cy)^(1/2)), float64.

    None where a set is too small to have a covariance.
    Differs: EDM takes the root of the product with scipy.linalg.sqrtm; symmetric eigenvalues are faster, and real.
    """
    if not (cov_x.isfinite().all() and cov_y.isfinite().all()):
        return None
    value, vector = torch.linalg.eigh(cov_x)
    root = (vector * value.clamp(min=0).sqrt()) @ vector.T
    cross = torch.linalg.eigvalsh(root @ cov_y @ root).clamp(min=0).sqrt().sum()
    return ((mean_x - mean_y).square().sum() + cov_x.trace() + cov_y.trace() - 2 * cross).item()


def load_inception(weights=None, device="cpu"):
    """torch-fidelity's Inception; weights: its .pth file (default: downloaded once into torch's cache).

    torch-fidelity would unpickle whatever the file holds: we read it, tensors only, and hand them over.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    except ImportError as e:
        raise UserError(f'these metrics need torch-fidelity ({first_line(e)}): pip install "nano_dmd[eval]"') from e
    try:
        tensors = (torch.load(weights, "cpu", weights_only=True) if weights else
                   torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, map_location="cpu", check_hash=True, weights_only=True))
        torch.save(tensors, buffer := io.BytesIO())
        buffer.seek(0)
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], buffer)
    except Exception as e:                                        # network, pickle and load_state_dict share no base class
        what = f"{weights} does not hold Inception's weights" if weights else "cannot download Inception's weights"
        raise UserError(f"{what} ({first_line(e)}); get {URL_INCEPTION_V3} and name it with --inception-weights") from e
    return net.to(device)


def batches(images, n=None, size=250):
    """uint8 batches (B, C, H, W) of a data set, or of n images of it, always the same; or of an iterable of such batches."""
    if not hasattr(images, "images"):
        return images
    rng = torch.Generator().manual_seed(0)
    order = torch.arange(len(images)) if n is None else torch.randperm(len(images), generator=rng)[:n]
    return (to_uint8(images.images(index)) for index in order.split(size))


@torch.no_grad()
def inception_features(net, images, device="cpu"):
    """[features (N, 2048), logits without bias (N, 1008)] on the CPU, of what batches() takes; grey becomes RGB."""
    parts = (part.to(device).expand(-1, 3, -1, -1) for b in batches(images) for part in b.split(100))
    return [torch.cat(v) for v in zip(*([v.cpu() for v in net(part)] for part in parts))]


def read_moments(path):
    """(mean, covariance) of a reference .npz in EDM's format: mu (2048,) and sigma (2048, 2048)."""
    try:
        with np.load(path, allow_pickle=False) as f:
            mu, sigma = (torch.from_numpy(f[name]).double() for name in ("mu", "sigma"))
    except Exception as e:                                        # not there, no zip, pickled objects, other names
        raise UserError(f"cannot read mu and sigma in {path} ({first_line(e)}); it must be a .npz of EDM's fid-refs") from e
    if mu.shape != (2048,) or sigma.shape != (2048, 2048):
        raise UserError(f"{path} must hold mu (2048,) and sigma (2048, 2048), got {tuple(mu.shape)} and {tuple(sigma.shape)}")
    return mu, sigma


def inception_metrics(images, reference, metrics=None, device="cpu", weights=None):
    """{metric: number} of images, by default all of METRICS that the reference allows.

    images, reference: data sets, or iterables of uint8 batches (B, C, H, W); reference may also be an .npz of EDM's, which
    allows fid and isc, or None, which allows isc.  raises UserError for a metric not allowed, a bad file, no network.
    """
    given = isinstance(reference, (str, Path))
    allowed = ("isc",) if reference is None else ("fid", "isc") if given else METRICS
    metrics = metrics or allowed
    if wrong := [m for m in metrics if m not in allowed]:
        raise UserError(f"no metric {wrong[0]!r} with {reference if given else 'such a'} reference; use {', '.join(allowed)}")
    known, net = read_moments(reference) if given else None, load_inception(weights, device)
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, logits = inception_features(net, images, device)
    y = inception_features(net, reference, device)[0] if allowed == METRICS else None
    result = {}
    if "fid" in metrics:
        result["fid"] = frechet(*moments(x), *(known or moments(y)))
    if "isc" in metrics:
        result["isc"] = isc_features_to_metric(logits, splits=min(10, len(x)))["inception_score_mean"]
    size = min(1000, len(x), 0 if y is None else len(y))
    if "kid" in metrics and size > 1:
        result["kid"] = kid_features_to_metric(x, y, kid_subset_size=size, verbose=False)["kernel_inception_distance_mean"]
    if {"precision", "recall"} & set(metrics) and size > 3:       # it looks for the third-nearest neighbour
        result |= prc_features_to_metric(x.to(device), y.to(device), save_cpu_ram=True, verbose=False)
    return {m: result.get(m) for m in metrics}                    # None: too few images to tell


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
    from nano_dmd.evaluate import coverage                        # here, because evaluate imports this file

    fake, real = [torch.cat([fixed_features(to_float(b)) for b in batches(v, n)])[:n] for v in (images, data)]
    n = min(len(fake), len(real))                                 # the Frechet distance and the balls depend on n
    fake, real = fake[:n].to(real), real[:n]
    return dict(fixed_fd=frechet(*moments(fake), *moments(real)), fixed_precision=coverage(fake, real),
                fixed_recall=coverage(real, fake))

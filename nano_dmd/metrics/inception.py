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

from nano_dmd.engine.files import UserError, first_line
from nano_dmd.metrics.images import batches
from nano_dmd.metrics.sets import frechet_of_moments, moments

METRICS = ("fid", "isc", "kid", "precision", "recall")


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
        result["fid"] = frechet_of_moments(*moments(x), *(known or moments(y)))
    if "isc" in metrics:
        result["isc"] = isc_features_to_metric(logits, splits=min(10, len(x)))["inception_score_mean"]
    size = min(1000, len(x), 0 if y is None else len(y))
    if "kid" in metrics and size > 1:
        result["kid"] = kid_features_to_metric(x, y, kid_subset_size=size, verbose=False)["kernel_inception_distance_mean"]
    if {"precision", "recall"} & set(metrics) and size > 3:       # it looks for the third-nearest neighbour
        result |= prc_features_to_metric(x.to(device), y.to(device), save_cpu_ram=True, verbose=False)
    return {m: result.get(m) for m in metrics}                    # None: too few images to tell

"""FID and its kin, on the features of the Inception network that everybody uses.

Inception is torch-fidelity's port of the 2015-12-05 graph, which EDM and SiD measure with. So EDM's
reference files (https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/) serve as they are.
"""

import io
from pathlib import Path

import numpy as np
import torch

from nano_dmd.engine.files import UserError, blame, first_line
from nano_dmd.metrics.images import batches
from nano_dmd.metrics.sets import gaussian_distance, moments

METRICS = ("fid", "isc", "kid", "precision", "recall")


def load_inception(weights=None, device="cpu"):
    """torch-fidelity's Inception; weights: its .pth file (default: downloaded once by torch).

    torch-fidelity would unpickle what the file holds.  So we read tensors only, and hand them over.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (URL_INCEPTION_V3,
                                                                  FeatureExtractorInceptionV3)
    except ImportError as e:
        raise UserError(f"these metrics need torch-fidelity ({first_line(e)}): "
                        'pip install "nano_dmd[eval]"') from e
    what = f"{weights} does not hold" if weights else "cannot download"
    with blame(f"{what} Inception's weights", f"get {URL_INCEPTION_V3}, give --inception-weights"):
        if weights:
            tensors = torch.load(weights, "cpu", weights_only=True)
        else:
            tensors = torch.hub.load_state_dict_from_url(
                URL_INCEPTION_V3, map_location="cpu", check_hash=True, weights_only=True)
        torch.save(tensors, buffer := io.BytesIO())
        buffer.seek(0)
        outputs = ["2048", "logits_unbiased"]
        return FeatureExtractorInceptionV3("inception-v3-compat", outputs, buffer).to(device)


@torch.no_grad()
def inception_features(net, images, device="cpu"):
    """[features (N, 2048), logits without bias (N, 1008)] of what batches() takes."""
    parts = (part for b in batches(images) for part in b.split(100))
    answers = (net(part.to(device).expand(-1, 3, -1, -1)) for part in parts)   # grey becomes RGB
    return [torch.cat(v) for v in zip(*([v.cpu() for v in answer] for answer in answers))]


def read_moments(path):
    """(mean, covariance) of a reference .npz in EDM's format: mu (2048,) and sigma (2048, 2048)."""
    with blame(f"cannot read mu and sigma in {path}", "it must be a .npz of EDM's fid-refs"):
        with np.load(path, allow_pickle=False) as f:
            mu, sigma = (torch.from_numpy(f[name]).double() for name in ("mu", "sigma"))
        if mu.shape != (2048,) or sigma.shape != (2048, 2048):
            raise ValueError(f"their shapes are {tuple(mu.shape)} and {tuple(sigma.shape)}")
        return mu, sigma


def inception_metrics(images, reference, metrics=None, device="cpu", weights=None):
    """{metric: number} of images, by default all of METRICS that the reference allows.

    images, reference  data sets, or iterables of uint8 batches (B, C, H, W); reference may also be
    an .npz of EDM's (allows fid, isc) or None (allows isc).  raises UserError
    """
    given = isinstance(reference, (str, Path))
    allowed = ("isc",) if reference is None else ("fid", "isc") if given else METRICS
    metrics = metrics or allowed
    if wrong := [m for m in metrics if m not in allowed]:
        raise UserError(f"no metric {wrong[0]!r} with this reference; use {', '.join(allowed)}")
    known, net = read_moments(reference) if given else None, load_inception(weights, device)
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, logits = inception_features(net, images, device)
    y = inception_features(net, reference, device)[0] if allowed == METRICS else None
    size, result = min(1000, len(x), 0 if y is None else len(y)), {}
    if "fid" in metrics:
        result["fid"] = gaussian_distance(*moments(x), *(known or moments(y)))
    if "isc" in metrics:
        found = isc_features_to_metric(logits, splits=min(10, len(x)))
        result["isc"] = found["inception_score_mean"]
    if "kid" in metrics and size > 1:
        found = kid_features_to_metric(x, y, kid_subset_size=size, verbose=False)
        result["kid"] = found["kernel_inception_distance_mean"]
    if {"precision", "recall"} & set(metrics) and size > 3:       # by third-nearest neighbours
        result |= prc_features_to_metric(x.to(device), y.to(device), save_cpu_ram=True,
                                         verbose=False)
    return {m: result.get(m) for m in metrics}     # None: too few images to tell

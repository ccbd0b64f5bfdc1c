"""Metrics of 2D samples against an exact mixture."""

import functools

import numpy as np
import torch


def projections(x, directions=48):
    """Points (N, 2) projected on fixed directions and sorted along each: (directions, N)."""
    angle = torch.arange(directions, device=x.device) * torch.pi / directions
    along = torch.stack([angle.cos(), angle.sin()], 1) @ x.T
    return torch.from_numpy(np.sort(along.cpu().numpy(), 1))  # 10 times as fast as torch's


def sliced_w2(a, b):
    """Sliced 2-Wasserstein distance of two equally large samples, from their projections."""
    return (a - b).square().mean().sqrt().item()


@functools.lru_cache(maxsize=4)
def true_sample(mixture, n):
    """(projections of n points with exact shares, mean sliced W2 of n true points to them)."""
    count = (mixture.weights.cpu() * n).round().int()
    k = torch.repeat_interleave(torch.arange(len(mixture.means)), count)[:n]
    k = torch.cat([k, k.new_zeros(n - len(k))]).to(mixture.means.device)
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(1)).to(mixture.means)
    exact = projections(mixture.means[k] + mixture.std[k, None] * noise)
    rng = torch.Generator().manual_seed(2)
    floor = [sliced_w2(projections(mixture.sample(n, rng)[0]), exact) for _ in range(8)]
    return exact, sum(floor) / 8


@torch.no_grad()
def mixture_metrics(x, mixture):
    """{sw2, in3, modes, weight_error} of samples x (N, 2) against a Mixture, see evaluate.py."""
    exact, floor = true_sample(mixture, len(x))
    distance, mode = (torch.cdist(x, mixture.means) / mixture.std).min(1)
    inside, count = distance <= 3, len(mixture.means)
    found = torch.bincount(mode[inside], minlength=count) / len(x)
    share = torch.bincount(mode, minlength=count) / len(x)
    return dict(sw2=sliced_w2(projections(x), exact) / floor, in3=inside.float().mean().item(),
                modes=int((found > mixture.weights / 4).sum()),
                weight_error=(share / mixture.weights - 1).abs().max().item())

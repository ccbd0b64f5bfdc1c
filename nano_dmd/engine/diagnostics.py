"""Numbers that mean something while a distillation runs (the loss values do not).

    mesm       w |d_real - d_fake|^2 at fixed noise levels, >= 0: how far the critic thinks the generator is
    fake_loss  the fake score's denoising loss on fresh samples at the same levels: how good the critic is
    grad       root mean square gradient at x of each generator loss, unweighted: how to balance weights
    x_std, spread  overall std of the samples, and std across the batch (collapse shows in spread)
"""

import math
from dataclasses import replace

import torch

from nano_dmd.engine.machine import forked
from nano_dmd.noise import add_noise

LEVELS = (0.05, 0.15, 0.5, 1.5, 5.0)                              # sigma, data units


def gaps(x, nets, cond):
    """(mesm, fake_loss), a list over LEVELS each, EDM-weighted; x (B, *S) fresh samples without a graph."""
    mesm, fake_loss = [], []
    for level in LEVELS:
        sigma = x.new_full(x.shape[:1], level)
        xt = add_noise(x, sigma, torch.randn_like(x))
        d_real, d_fake, w = nets.real(xt, sigma, cond), nets.fake(xt, sigma, cond), 1 / level**2 + 1 / nets.sigma_data**2
        mesm.append(w * (d_real - d_fake).square().mean())
        fake_loss.append(w * (d_fake - x).square().mean())
    return mesm, fake_loss


def gradient_norms(x, terms, nets, batch, cfg):
    """{loss name: N * rms gradient at the samples}, N = x.numel(): comparable between terms and batch sizes.

    The regression loss looks at the generator's answers to the pairs, so those are its samples.
    """
    norms = {}
    for weight, loss in terms:
        if getattr(cfg, weight):
            leaf = nets.generator(batch.pair_z, batch.pair_cond) if loss.__name__ == "regression_loss" else x
            leaf = leaf.detach().clone().requires_grad_()
            value = loss(leaf, replace(nets, generator=lambda z, cond: leaf), batch, cfg)
            norms[loss.__name__] = torch.autograd.grad(value, leaf)[0].square().mean().sqrt() * x.numel()
    return norms


def diagnose(terms, nets, batch, cfg):
    """All of the above as plain numbers.  Draws from a forked random stream: training does not notice."""
    batch = replace(batch, seen={})
    with forked(batch.z.device):
        with torch.no_grad():
            x = nets.generator(batch.z, batch.cond, batch.step, batch.start)
            mesm, fake_loss = gaps(x, nets, batch.cond)
        norms = gradient_norms(x, terms, nets, batch, cfg)
    spread = x.std(0).mean() if len(x) > 1 else None              # one sample has none
    return to_floats(dict(x_mean=x.mean(), x_std=x.std(), spread=spread, mesm=mesm, fake_loss=fake_loss, grad=norms))


def to_floats(obj):
    """Tensors to floats with five digits, through dicts and lists; None stays None, and what is not finite becomes it."""
    if isinstance(obj, dict):
        return {k: to_floats(v) for k, v in obj.items()}
    if isinstance(obj, list):
        return [to_floats(v) for v in obj]
    return None if obj is None or not math.isfinite(obj) else float(f"{float(obj):.5g}")


def by_level(seen):
    """{loss name: mean loss in each of the len(LEVELS) + 1 bins between LEVELS}, None where no sample fell."""
    def binned(sigma, loss):
        bins = torch.bucketize(sigma, torch.tensor(LEVELS, device=sigma.device))
        return [loss[bins == b].mean() if (bins == b).any() else None for b in range(len(LEVELS) + 1)]

    return to_floats({name: binned(sigma, loss) for name, (sigma, loss) in seen.items() if sigma is not None})

"""Numbers that mean something while a distillation runs (the loss values do not).

    mesm       w |d_real - d_fake|^2 at fixed noise levels, >= 0: how far the critic thinks G is off
    fake_loss  the denoising loss on fresh samples at the same levels: how good the fake score is
               (tdm and phased fit a step's own interval of noise alone: read both inside it)
    grad       rms gradient at the samples of each generator loss: how to balance weights
    x_std, spread  std of the samples, and std across the batch (a collapse shows in spread)
"""

from dataclasses import replace

import torch

from nano_dmd.denoiser import edm_weight
from nano_dmd.engine.files import plain
from nano_dmd.engine.machine import forked
from nano_dmd.methods import METHODS
from nano_dmd.noise import add_noise

LEVELS = (0.05, 0.15, 0.5, 1.5, 5.0)               # sigma, data units


def at_levels(x, nets, cond, noise=None):
    """Yield (sigma, xt, d_real, d_fake) of samples x (B, *S) at each of LEVELS; sigma is a float.

    noise  (B, *S) for all levels; None: a new one for each
    """
    for level in LEVELS:
        sigma = x.new_full(x.shape[:1], level)
        xt = add_noise(x, sigma, torch.randn_like(x) if noise is None else noise)
        yield level, xt, nets.real(xt, sigma, cond), nets.fake(xt, sigma, cond)


def gaps(x, nets, cond):
    """(mesm, fake_loss), a list over LEVELS each, EDM-weighted; x (B, *S) has no graph."""
    mesm, fake_loss = [], []
    for level, _, d_real, d_fake in at_levels(x, nets, cond):
        w = edm_weight(level, nets.sigma_data)
        mesm.append(w * (d_real - d_fake).square().mean())
        fake_loss.append(w * (d_fake - x).square().mean())
    return mesm, fake_loss


def gradient_norms(x, nets, batch, cfg):
    """{loss name: N * rms gradient at the samples}, N = x.numel(): comparable between batch sizes.

    The samples are x.  A loss that calls the generator itself (regression) has that call's output.
    """
    norms = {}
    for weight, loss in METHODS[cfg.method].generator:
        if not getattr(cfg, weight):
            continue
        leaves = [x.clone().requires_grad_()]

        def generator(*args):
            leaves.append(nets.generator(*args).detach().requires_grad_())
            return leaves[-1]

        shown = replace(nets, fake=nets.slow_fake, generator=generator)
        value = loss(leaves[0], shown, batch, cfg).mean()
        found = torch.autograd.grad(value, leaves, allow_unused=True)
        squares = [g.square().mean() for g in found if g is not None]
        norms[loss.__name__] = sum(squares).sqrt() * x.numel()
    return norms


def diagnose(nets, batch, cfg):
    """All of the above as plain numbers.  Its random draws do not change the training."""
    batch = replace(batch, seen={}, alone=True)
    with forked(batch.z.device):
        with torch.no_grad():
            batch.xt, x = nets.generator.path(batch.z, batch.cond, batch.step, batch.start)
            mesm, fake_loss = gaps(x, nets, batch.cond)
        norms = gradient_norms(x, nets, batch, cfg)
    spread = x.std(0).mean() if len(x) > 1 else None              # one sample has none
    return plain(dict(x_mean=x.mean(), x_std=x.std(), spread=spread, mesm=mesm,
                      fake_loss=fake_loss, grad=norms))


def by_level(seen):
    """{loss name: mean in each of the len(LEVELS) + 1 bins between LEVELS}, None if empty."""
    means = {}
    for name, (sigma, values) in seen.items():
        if sigma is not None:
            bins = torch.bucketize(sigma, torch.tensor(LEVELS, device=sigma.device))
            picked = [values[bins == b] for b in range(len(LEVELS) + 1)]
            means[name] = [v.mean() if len(v) else None for v in picked]
    return plain(means)

"""Distribution matching distillation: move generated samples along the gradient of a KL divergence.

    grad_theta KL(p_fake || p_real) = E[ (s_fake(xt) - s_real(xt)) dx/dtheta ],    x = G(z), xt = x + sigma noise

Both scores come from denoisers, s = (D(xt) - xt) / sigma^2, so the bracket is (d_fake - d_real) / sigma^2.
DMD (Yin et al., CVPR 2024) eq. 7-8; DMD1 adds a regression to noise-image pairs (eq. 9), DMD2 drops it.
The value of the loss says nothing about progress, not even its sign: look at the gap by sigma instead.
"""

import torch

from nano_dmd.noise import add_noise, draw_noise, draw_sigma, expand, repeated


def dmd_gradient(x, d_real, d_fake):
    """Per-sample direction that raises KL(p_fake || p_real); descend it.  DMD eq. 7 with the weight of eq. 8.

        g = (d_fake - d_real) / mean_pixels |x - d_real|

    x       (B, *S)  generator output, clean          d_real, d_fake  (B, *S)  x0-predictions at the same xt, sigma
    returns (B, *S)  no graph                         raises ValueError if the shapes differ
    Differs: alpha_t is 1 because xt is variance-exploding; the official code (DMD2 edm_guidance.py:102-108) has no
    alpha_t either, and turns 0/0 into 0 where we keep the denominator above 1e-5 (as SiD does).
    """
    if not x.shape == d_real.shape == d_fake.shape:
        raise ValueError(f"x, d_real and d_fake must agree in shape, got {tuple(x.shape)}, {tuple(d_real.shape)} "
                         f"and {tuple(d_fake.shape)}")
    size = (x - d_real).abs().flatten(1).mean(1).clamp(min=1e-5)                      # (B,)
    return ((d_fake - d_real) / expand(size, x)).detach()


def descend(x, g):
    """0.5 (x - stopgrad(x - g))^2, per element: a loss whose gradient at x is g, and whose value is g^2 / 2."""
    return 0.5 * (x - (x - g).detach()) ** 2


@torch.no_grad()
def predictions(x, sigma, nets, cond):
    """(d_real, d_fake) at one fresh noising of x, without a graph."""
    xt = add_noise(x, sigma, draw_noise(x))
    return nets.real(xt, sigma, cond), nets.fake(xt, sigma, cond)


def dmd_loss(x, nets, batch, cfg):
    """Distribution matching loss.  x (B, *S) carries the generator's graph; d loss / dx = g / x.numel().

    The gradient is descended as it is: neither score is differentiated (SiD does that).
    cfg.dm_sigma is the noise distribution; "timesteps 20..980" of the papers is karras(0.0032,72).
    """
    x, cond = repeated(x, batch.cond, cfg.noisings)
    sigma = draw_sigma(cfg.dm_sigma, len(x), x.device)
    g = dmd_gradient(x, *predictions(x, sigma, nets, cond))
    return batch.mean("dmd_loss", descend(x, g), sigma)


def diff_instruct_loss(x, nets, batch, cfg):
    """Diff-Instruct (Luo et al., NeurIPS 2023): the same direction without DMD's per-sample normaliser."""
    x, cond = repeated(x, batch.cond, cfg.noisings)
    sigma = draw_sigma(cfg.dm_sigma, len(x), x.device)
    d_real, d_fake = predictions(x, sigma, nets, cond)
    return batch.mean("diff_instruct_loss", descend(x, d_fake - d_real), sigma)


def regression_loss(x, nets, batch, cfg):
    """DMD1's anchor (eq. 9): the generator's answer to a noise should be the teacher's.  One-step generators only.

    In mean squared error, or in LPIPS as in the paper (cfg.reg_loss): .12 FID better on CIFAR-10 there (appendix I).
    """
    y = nets.generator(batch.pair_z, batch.pair_cond)
    distance = nets.lpips(y, batch.pair_x)[:, None] if cfg.reg_loss == "lpips" else (y - batch.pair_x) ** 2
    return batch.mean("regression_loss", distance, None)

"""Distribution matching distillation: move generated samples along the gradient of a KL divergence.

    grad_theta KL(p_fake || p_real) = E[ (s_fake(xt) - s_real(xt)) dx/dtheta ]

with x = G(z) and xt = x + sigma * noise: the KL of noised samples, averaged over sigma. Both scores
come from denoisers, s = (D(xt) - xt) / sigma^2, so the bracket is (d_fake - d_real) / sigma^2. DMD
gives each sample the weight sigma^2 / mean |x - d_real| (Yin et al., CVPR 2024, eq. 7-8). DMD1 adds
a regression to noise-image pairs (eq. 9). DMD2 drops it. The value of this loss is g^2 / 2 and says
nothing about progress. Watch mesm in the log of a run instead: the mean of |d_real - d_fake|^2.
"""

import torch

from nano_dmd.fake_score import predictions
from nano_dmd.noise import expand, repeated, same_shape
from nano_dmd.real_score import normaliser


def dmd_gradient(x, d_real, d_fake):
    """Direction that raises KL(p_fake || p_real); descend it.  DMD eq. 7, weight of eq. 8.

        g = (d_fake - d_real) / mean_pixels |x - d_real|

    x       (B, *S)  generator output, clean
    d_real, d_fake  (B, *S)  x0-predictions at the same xt and sigma
    returns (B, *S)  without a graph.  raises ValueError if the shapes differ
    Differs: the paper has a factor alpha_t. Here it is 1, because xt is variance-exploding. The
    official code (DMD2 edm_guidance.py:102-108) has no alpha_t either.
    """
    same_shape(x, d_real, d_fake)
    return ((d_fake - d_real) / expand(normaliser(x, d_real), x)).detach()


def descend(x, g):
    """0.5 (x - stopgrad(x - g))^2, per element.  Its gradient at x is g, its value is g^2 / 2."""
    return 0.5 * (x - (x - g).detach()) ** 2


def dmd_loss(x, nets, batch, cfg):
    """Distribution matching loss of x (B, *S), which has a graph; returns (n B,), n = cfg.noisings.

    The gradient g is descended as it is. Neither score is differentiated (SiD does that).
    cfg.dm_sigma is the distribution of sigma, see noise.draw_sigma.
    """
    x, cond = repeated(x, batch.cond, cfg.noisings)
    with torch.no_grad():
        _, _, d_real, d_fake = predictions(x, cond, nets, batch, cfg)
    return descend(x, dmd_gradient(x, d_real, d_fake)).flatten(1).mean(1)


def diff_instruct_loss(x, nets, batch, cfg):
    """Diff-Instruct (Luo et al., NeurIPS 2023): dmd_loss without the normaliser; same shapes."""
    x, cond = repeated(x, batch.cond, cfg.noisings)
    with torch.no_grad():
        _, _, d_real, d_fake = predictions(x, cond, nets, batch, cfg)
    return descend(x, d_fake - d_real).flatten(1).mean(1)


def regression_loss(x, nets, batch, cfg):
    """DMD1's regression (eq. 9): G(z) should be the teacher's sample from z; returns (B,).

    Squared error, or LPIPS as in the paper (cfg.reg_loss; .12 FID better on CIFAR-10, appendix I).
    For generators of one step.
    """
    y = nets.generator(batch.pair_z, batch.pair_cond)
    if cfg.reg_loss == "lpips":
        return nets.lpips(y, batch.pair_x)
    return ((y - batch.pair_x) ** 2).flatten(1).mean(1)

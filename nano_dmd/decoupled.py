"""Decoupled DMD (arXiv 2511.22677): guidance and distribution matching are two forces.

With a guided teacher d_real = d_uncond + w (d_cond - d_uncond), DMD's bracket splits exactly:

    d_fake - d_real = (d_fake - d_cond)  -  (w - 1) (d_cond - d_uncond)
                       matching              augmentation

Matching stops where the generator's distribution is the teacher's, unguided. Augmentation climbs
log p(cond | xt) and never looks at the fake score: it does not ask whether x looks like data. The
paper calls it the engine of text-to-image students, and matching their shield. As two losses they
can use different noise levels. Matching uses all. Augmentation uses only levels below that of the
step's input.
"""

from dataclasses import replace

import torch

from nano_dmd.dmd_loss import descend, dmd_loss
from nano_dmd.noise import add_noise, expand, interval, repeated, same_shape
from nano_dmd.real_score import normaliser


def augmentation_gradient(x, d_cond, d_uncond, w):
    """-(w - 1) (d_cond - d_uncond) / mean_pixels |x - d_cond|; descend it.  Paper eq. 6.

    x, d_cond, d_uncond (B, *S): samples, and predictions at one xt with and without the condition
    returns (B, *S) without a graph; zero at w = 1.  raises ValueError if the shapes differ
    Differs: CDM (losses.py:17-115) has w where w - 1 belongs, and bounds the denominator at .1.
    """
    same_shape(x, d_cond, d_uncond)
    return (-(w - 1) * (d_cond - d_uncond) / expand(normaliser(x, d_cond), x)).detach()


def matching_loss(x, nets, batch, cfg):
    """dmd_loss with the unguided teacher; returns (n B,), n = cfg.noisings."""
    return dmd_loss(x, replace(nets, real=nets.real.denoiser), batch, cfg)


def augmentation_loss(x, nets, batch, cfg):
    """Descend augmentation_gradient; w = cfg.guidance.  Returns (n B,), n = cfg.noisings.

    sigma is karras(cfg.least_sigma,s), s the noise level of the step that made x.  Differs: the
    sources draw the timestep uniformly, AaronCaoZJ/DMDs from 20 of 1000 on.
    """
    x, cond = repeated(x, batch.cond, cfg.noisings)
    sigma, noise = batch.noising(interval(0, batch.level, cfg.least_sigma), x)
    xt, real = add_noise(x, sigma, noise), nets.real.denoiser
    with torch.no_grad():
        d_cond, d_uncond = real(xt, sigma, cond), real(xt, sigma, None)
    g = augmentation_gradient(x, d_cond, d_uncond, cfg.guidance)
    return descend(x, g).flatten(1).mean(1)

"""SiDA (arXiv 2410.14919): SiD, and a discriminator that has no weights of its own.

The logit at a place of the picture is the mean over the channels of the fake score's features
there. The fake score's encoder learns both, to denoise and to tell real from fake. At the same xt,
SiD's loss gets an adversarial term, both with the same normaliser.
"""

import torch.nn.functional as F

from nano_dmd.denoiser import edm_weight
from nano_dmd.fake_score import predictions
from nano_dmd.gan import R1_STEP
from nano_dmd.noise import add_noise, repeated
from nano_dmd.real_score import normaliser
from nano_dmd.sid_loss import sid_integrand


def encoder_logits(fake, xt, sigma, cond):
    """(B, places): mean over channels of fake's features, (B, C) or (B, C, H, W).

    Features that end in a ReLU make logits >= 0.  Such a logit can say "real", but never "fake".
    """
    return fake.features(xt, sigma, cond).float().mean(1).reshape(len(xt), -1)


def sida_loss(x, nets, batch, cfg):
    """SiD's loss + cfg.w_gan softplus(-logits) / mean_pixels |x - d_real|: (n B,).

    sida_loss.py:67-72 of the official branch, in means over pixels: published weight 1e-4.
    Differs: there all samples share the batch's mean of 1 / mean |x - d_real| in the second term;
    here each has its own, as in SiD's.  cfg.w_gan is relative to SiD's term: w_sid scales both.
    """
    x, cond = repeated(x, batch.cond, cfg.noisings)
    xt, sigma, d_real, d_fake = predictions(x, cond, nets, batch, cfg)
    loss = sid_integrand(x, d_real, d_fake, cfg.alpha, cfg.normalise).flatten(1).mean(1)
    if cfg.w_gan:
        logits = encoder_logits(nets.fake, xt, sigma, cond).clamp(-10, 10)
        size = normaliser(x, d_real) if cfg.normalise else 1.0
        loss = loss + cfg.w_gan * F.softplus(-logits).mean(1) / size
    return loss


def sida_critic_loss(x, nets, batch, cfg):
    """Half the logistic loss of both kinds of sample, weighted as denoising_loss is; returns (B,).

    The real sample has the sigma and the noise of the generated one.  That makes the difference of
    the two gradients less noisy: at logit 0 and x = real they cancel exactly.  cfg.w_r1 adds
    approximate R1, as in gan.py.  sida_loss.py:118-123: published weight 1 / pixels.
    Differs: there all samples share the batch's mean weight, and denoising has this noise and these
    labels, too.  The weight is heavy-tailed either way: the means of 32 samples are 39 to 561 (5 to
    95 percent).  Per sample, half of it lies below sigma = .017.
    """
    sigma, noise = batch.noising(cfg.critic_sigma, x)
    fake = encoder_logits(nets.fake, add_noise(x, sigma, noise), sigma, batch.cond)
    yt = add_noise(batch.real, sigma, noise)
    real = encoder_logits(nets.fake, yt, sigma, batch.real_cond)
    loss = 0.5 * (F.softplus(fake) + F.softplus(-real))
    if cfg.w_r1:
        yt = yt + R1_STEP * batch.noising(cfg.critic_sigma, batch.real)[1]
        moved = encoder_logits(nets.fake, yt, sigma, batch.real_cond)
        loss = loss + cfg.w_r1 * (real - moved) ** 2
    return edm_weight(sigma, nets.sigma_data) * loss.mean(1)

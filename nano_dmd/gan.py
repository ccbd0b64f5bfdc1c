"""DMD2's GAN term: a small head on the fake score's bottleneck tells noised real from noised fake.

Distribution matching alone inherits the teacher's mistakes; real images can repair them (DMD2
section 4.3). Both kinds of sample are noised before the critic looks. So the two distributions
overlap, and the gradient is informative at every scale.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from nano_dmd.noise import add_noise

R1_STEP = 0.05                                     # how far approximate R1 looks, data units


class Discriminator(nn.Module):
    """Features (B, C) or (B, C, H, W) of the fake score -> one logit per sample (B,).

    As in DMD2: strided 4x4 convolutions with GroupNorm, here until the features are at most 8x8.
    Differs: DMD2 goes on to 4x4; here what is left is flattened for a small MLP.
    """

    def __init__(self, feature_shape, width=128):
        super().__init__()
        channels, *pixels = feature_shape
        layers = []
        while pixels and pixels[0] > 8:
            layers += [nn.Conv2d(channels, channels, 4, stride=2, padding=1)]
            layers += [nn.GroupNorm(math.gcd(32, channels), channels), nn.SiLU()]
            pixels = [n // 2 for n in pixels]
        size = channels * torch.Size(pixels).numel()
        layers += [nn.Flatten(), nn.LayerNorm(size), nn.Linear(size, width), nn.SiLU()]
        self.head = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, features):
        return self.head(features.float())[:, 0]


def generator_logit_loss(logits_fake):
    """Non-saturating loss, mean softplus(-logit) of fake samples.  DMD2 eq. 4; (B,) -> scalar."""
    return F.softplus(-logits_fake).mean()


def critic_logit_loss(logits_real, logits_fake):
    """Logistic loss: mean softplus(fake logit) + mean softplus(-real logit); (B,) -> scalar."""
    return F.softplus(logits_fake).mean() + F.softplus(-logits_real).mean()


def gan_generator_loss(x, nets, batch, cfg):
    """Push x to where the critic sees real data; returns the terms of generator_logit_loss, (B,).

    The gradient flows through the fake score's encoder into x.  Its weights are frozen meanwhile
    (methods.train_step); readers sometimes take that for "no gradient".
    """
    sigma, noise = batch.noising(cfg.gan_sigma, x)
    features = nets.fake.features(add_noise(x, sigma, noise), sigma, batch.cond)
    return F.softplus(-nets.discriminator(features))


def gan_critic_loss(x, nets, batch, cfg):
    """Train head and fake-score encoder to tell batch.real from x.

    Returns the terms of critic_logit_loss, (B,): one generated and one real sample each.
    Noise and sigma are drawn apart for each, then both go through the encoder as one batch.
    """
    sigma, noise = batch.noising(cfg.gan_sigma, x)
    sigma_real, noise_real = batch.noising(cfg.gan_sigma, batch.real)
    xt = torch.cat([add_noise(x, sigma, noise), add_noise(batch.real, sigma_real, noise_real)])
    cond = None if batch.cond is None else torch.cat([batch.cond, batch.real_cond])
    features = nets.fake.features(xt, torch.cat([sigma, sigma_real]), cond)
    logits_fake, logits_real = nets.discriminator(features).chunk(2)
    loss = F.softplus(logits_fake) + F.softplus(-logits_real)
    if cfg.w_r1:                                   # approximate R1 (APT): keep logits flat at data
        moved = xt[len(x) :] + R1_STEP * batch.noising(cfg.gan_sigma, batch.real)[1]
        features = nets.fake.features(moved, sigma_real, batch.real_cond)
        loss = loss + cfg.w_r1 * (logits_real - nets.discriminator(features)) ** 2
    return loss

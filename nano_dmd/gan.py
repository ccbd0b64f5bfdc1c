"""DMD2's GAN term: a small head on the fake score's bottleneck tells noised real from noised generated samples.

It is the only place where real data enters: distribution matching alone inherits the teacher's mistakes,
real images can repair them (DMD2 section 4.3). Both kinds of sample are noised before the critic looks,
so the two distributions overlap and the gradient is informative at every scale.
"""

import torch
import torch.nn.functional as F
from torch import nn

from nano_dmd.noise import add_noise, draw_noise, draw_sigma


class Discriminator(nn.Module):
    """Features (B, C) or (B, C, H, W) of the fake score -> one logit per sample (B,).

    As in DMD2, strided 4x4 convolutions with GroupNorm while the features are larger than 8x8 (there: than 4x4).
    Differs: then everything is flattened into a small MLP.
    """

    def __init__(self, feature_shape, width=128):
        super().__init__()
        channels, *pixels = feature_shape
        layers = []
        while pixels and pixels[0] > 8:
            layers += [nn.Conv2d(channels, channels, 4, stride=2, padding=1), nn.GroupNorm(min(32, channels), channels)]
            layers += [nn.SiLU()]
            pixels = [n // 2 for n in pixels]
        size = channels * torch.Size(pixels).numel()
        mlp = [nn.Flatten(), nn.LayerNorm(size), nn.Linear(size, width), nn.SiLU(), nn.Linear(width, 1)]
        self.head = nn.Sequential(*layers, *mlp)

    def forward(self, features):
        return self.head(features.float())[:, 0]


def generator_logit_loss(logits_fake):
    """Non-saturating generator loss, mean softplus(-D(fake)).  DMD2 eq. 4; logits (B,) -> scalar."""
    return F.softplus(-logits_fake).mean()


def critic_logit_loss(logits_real, logits_fake):
    """Logistic discriminator loss, mean softplus(D(fake)) + mean softplus(-D(real)); logits (B,) each -> scalar."""
    return F.softplus(logits_fake).mean() + F.softplus(-logits_real).mean()


def noised(x, cfg):
    """(xt (B, *S), sigma (B,)): one fresh noising of x (B, *S)."""
    sigma = draw_sigma(cfg.gan_sigma, len(x), x.device)
    return add_noise(x, sigma, draw_noise(x)), sigma


def gan_generator_loss(x, nets, batch, cfg):
    """Push x to where the critic sees real data.  The gradient flows through the fake score's encoder into x;
    its weights are frozen meanwhile (train.train_step), which readers mistake for "no gradient"."""
    xt, sigma = noised(x, cfg)
    logits_fake = nets.discriminator(nets.fake.features(xt, sigma, batch.cond))
    batch.mean("gan_generator_loss", F.softplus(-logits_fake)[:, None], sigma)
    return generator_logit_loss(logits_fake)


def gan_critic_loss(x, nets, batch, cfg):
    """Train head and fake-score encoder to tell batch.real from x.

    Noise and sigma are drawn apart for each, then both go through the encoder as one batch.
    """
    (fake, sigma), (real, sigma_real) = noised(x.detach(), cfg), noised(batch.real, cfg)
    cond = None if batch.cond is None else torch.cat([batch.cond, batch.real_cond])
    features = nets.fake.features(torch.cat([fake, real]), torch.cat([sigma, sigma_real]), cond)
    logits_fake, logits_real = nets.discriminator(features).chunk(2)
    batch.mean("gan_critic_loss", F.softplus(logits_fake)[:, None], sigma)
    return critic_logit_loss(logits_real, logits_fake)

"""The fake score: a trainable copy of the teacher that tracks what the generator makes right now.

It is fitted to generated samples by the same denoising loss that trained the teacher, so that its score
is that of the generator's distribution. When it lags behind the generator, the distribution matching
gradient points the wrong way: hence DMD2's several critic updates per generator update.
"""

import copy

import torch
from torch import nn

from nano_dmd.noise import draw_noise, draw_sigma
from nano_dmd.teacher import edm_loss


class FakeScore(nn.Module):
    """Deep copy of a teacher's EDM network; a Denoiser, and .features for the GAN head.

    Always in eval mode: dropout in a score is noise in the gradient (a bug of several reimplementations).
    """

    def __init__(self, net):
        super().__init__()
        self.net = copy.deepcopy(net).requires_grad_(True).eval()

    def forward(self, x, sigma, cond=None):
        return self.net(x, sigma, cond)

    def features(self, x, sigma, cond=None):
        return self.net.features(x, sigma, cond)

    def train(self, mode=True):
        return self


def denoising_loss(x, nets, batch, cfg):
    """Critic loss: EDM's denoising loss on generated samples x (B, *S), which carry no graph.

    DMD eq. 6, DMD2 edm_guidance.py:127-172, SiD sid_loss.py:58-74; mean over everything.
    cfg.critic_sigma is the noise distribution: lognormal(-1.2,1.2) in SiD, karras(0.002,80) in DMD2.
    """
    sigma = draw_sigma(cfg.critic_sigma, len(x), x.device)
    loss = edm_loss(nets.fake, x.detach(), sigma, draw_noise(x), batch.cond, nets.sigma_data)
    return batch.mean("denoising_loss", loss, sigma)

"""The fake score: a trainable copy of the teacher that tracks what the generator makes now.

It is fitted to generated samples by the same denoising loss that trained the teacher. So its score
is the score of the generator's distribution. When it lags behind the generator, the distribution
matching gradient points the wrong way. Therefore DMD2 updates the critic several times per
generator update.
"""

from torch import nn

from nano_dmd.denoiser import edm_loss, trainable_copy
from nano_dmd.noise import add_noise
from nano_dmd.real_score import guided


class FakeScore(nn.Module):
    """A trainable copy of a teacher's network: a Denoiser, with .features for the GAN head.

    copy      copies net: trainable_copy, or LoRA on the teacher's own weights (engine/lora.py)
    guidance  w in u + w (c - u), as for the teacher; 1 = off; only SiD-LSG sets another w
    Always in eval mode: dropout in a score would be noise in the gradient.  Differs: SiD fits its
    fake score with dropout (sid_training_loop.py:294), and asks it without.
    """

    def __init__(self, net, guidance=1.0, copy=trainable_copy):
        super().__init__()
        self.net, self.guidance = copy(net), guidance
        self.trained = [p for p in self.parameters() if p.requires_grad]

    def requires_grad_(self, on=True):
        """Freeze or unfreeze what is trained.  The shared weights of LoRA stay frozen."""
        for p in self.trained:
            p.requires_grad_(on)
        return self

    def forward(self, x, sigma, cond=None):
        return guided(self.net, x, sigma, cond, self.guidance)

    def features(self, x, sigma, cond=None):
        return self.net.features(x, sigma, cond)

    def train(self, mode=True):
        return self


def predictions(x, cond, nets, batch, cfg):
    """(xt, sigma, d_real, d_fake) at a new noising of x (B, *S), by cfg.dm_sigma; with a graph."""
    sigma, noise = batch.noising(cfg.dm_sigma, x)
    xt = add_noise(x, sigma, noise)
    return xt, sigma, nets.real(xt, sigma, cond), nets.fake(xt, sigma, cond)


def denoising_loss(x, nets, batch, cfg):
    """Critic loss: EDM's denoising loss on samples x (B, *S) without a graph; returns (B,).

    DMD eq. 6, DMD2 edm_guidance.py:127-172, SiD sid_loss.py:58-74; mean over the elements of a
    sample. The weight is 1/sigma^2 + 1/sigma_data^2. For Stable Diffusion the loss is the error in
    eps, as published: nets.sigma_data is infinite (for v-prediction it is 1: the error in v). The
    distribution of sigma is cfg.critic_sigma: lognormal(-1.2,1.2) in SiD, karras(0.002,80) in DMD2.
    """
    sigma, noise = batch.noising(cfg.critic_sigma, x)
    loss = edm_loss(nets.fake, x, sigma, noise, batch.critic_cond, nets.sigma_data)
    return loss.flatten(1).mean(1)

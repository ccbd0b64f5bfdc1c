"""The fake score: a trainable copy of the teacher that tracks what the generator makes right now.

It is fitted to generated samples by the same denoising loss that trained the teacher, so that its score
is that of the generator's distribution. When it lags behind the generator, the distribution matching
gradient points the wrong way: hence DMD2's several critic updates per generator update.
"""

from torch import nn

from nano_dmd.denoiser import edm_loss
from nano_dmd.engine.lora import trainable_copy
from nano_dmd.noise import draw_noise, draw_sigma
from nano_dmd.real_score import guided


class FakeScore(nn.Module):
    """Trainable copy of a teacher's network; a Denoiser, and .features for the GAN head.

    rank      0 = a full copy, else LoRA of that rank on the teacher's own weights (lora.py)
    guidance  w in u + w (c - u) as for the teacher: 1 = off everywhere but in SiD-LSG, which guides both alike
    Always in eval mode: dropout in a score is noise in the gradient (a bug of several reimplementations).
    """

    def __init__(self, net, rank=0, guidance=1.0):
        super().__init__()
        self.net, self.guidance = trainable_copy(net, rank), guidance
        self.trained = [p for p in self.parameters() if p.requires_grad]

    def requires_grad_(self, on=True):
        """Freeze or unfreeze what is trained; a LoRA's shared weights stay frozen."""
        for p in self.trained:
            p.requires_grad_(on)
        return self

    def forward(self, x, sigma, cond=None):
        return guided(self.net, x, sigma, cond, self.guidance)

    def features(self, x, sigma, cond=None):
        return self.net.features(x, sigma, cond)

    def train(self, mode=True):
        return self


def denoising_loss(x, nets, batch, cfg):
    """Critic loss: EDM's denoising loss on generated samples x (B, *S), which carry no graph.

    With nets.sigma_data infinite the weight is 1/sigma^2: the plain error in eps, as published for Stable Diffusion.
    DMD eq. 6, DMD2 edm_guidance.py:127-172, SiD sid_loss.py:58-74; mean over everything.
    cfg.critic_sigma is the noise distribution: lognormal(-1.2,1.2) in SiD, karras(0.002,80) in DMD2.
    """
    sigma = draw_sigma(cfg.critic_sigma, len(x), x.device)
    cond = batch.cond if batch.fake_cond is None else batch.fake_cond
    loss = edm_loss(nets.fake, x.detach(), sigma, draw_noise(x), cond, nets.sigma_data)
    return batch.mean("denoising_loss", loss, sigma)

"""The real score: the teacher, frozen.

"Frozen" means that no weight moves. It does not mean no_grad: SiD and the GAN differentiate through the
network with respect to its input, so requires_grad_(False) is set on the weights and nothing else.

Guidance has one definition here, u + w (c - u), with w = 1 off (diffusers, minRF). Elsewhere the same
picture is called c + w' (c - u) with w' = w - 1 (Ho & Salimans 2022). It acts on x0-predictions, which is
the same as acting on eps- or v-predictions because all three are affine in each other at fixed xt, sigma.
Only the teacher is guided; the fake score tracks the generator as it is (DMD section 3.4), except in SiD-LSG.
"""

from torch import nn


class RealScore(nn.Module):
    """A teacher's Denoiser with frozen weights and, for conditional teachers, guidance."""

    def __init__(self, denoiser, guidance=1.0):
        super().__init__()
        if isinstance(denoiser, nn.Module):
            denoiser.requires_grad_(False).eval()
        self.denoiser, self.guidance = denoiser, guidance

    def forward(self, x, sigma, cond=None):
        return guided(self.denoiser, x, sigma, cond, self.guidance)


def guided(denoiser, x, sigma, cond, w):
    """u + w (c - u) of the predictions with and without cond; one network call where w = 1 or cond is None."""
    d_cond = denoiser(x, sigma, cond)
    if cond is None or w == 1:
        return d_cond
    d_uncond = denoiser(x, sigma, None)
    return d_uncond + w * (d_cond - d_uncond)

"""The real score: the teacher, frozen.

"Frozen" means that no weight moves. It does not mean no_grad: SiD and the GAN differentiate through
the network with respect to its input. So requires_grad_(False) is set on the weights, and nothing
else.

Guidance has one definition here, u + w (c - u), and w = 1 is off (as in diffusers). Ho & Salimans
2022 write c + w' (c - u) for the same thing, w' = w - 1. Guidance acts on x0-predictions. That is
the same as acting on eps- or v-predictions, because all three are affine in each other at fixed xt
and sigma. Only the teacher is guided. The fake score tracks the generator as it is (DMD section
3.4). SiD-LSG (SiD for Stable Diffusion, Zhou et al. 2024) is the exception: it guides both.
"""

from torch import nn

from nano_dmd.noise import same_shape


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
    """u + w (c - u): predictions without and with cond; one call where w = 1 or cond is None."""
    d_cond = denoiser(x, sigma, cond)
    if cond is None or w == 1:
        return d_cond
    d_uncond = denoiser(x, sigma, None)
    return d_uncond + w * (d_cond - d_uncond)


def normaliser(x, d_real):
    """mean_pixels |x - d_real| (B,), without a graph: DMD divides each sample by it (eq. 8).

    At least 1e-5, as in SiD; DMD2's code replaces 0/0 by 0.  raises ValueError if shapes differ
    """
    same_shape(x, d_real)
    return (x - d_real).detach().abs().flatten(1).mean(1).clamp(min=1e-5)

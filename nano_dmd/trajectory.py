"""TDM (arXiv 2503.06674) and Phased DMD (2510.27684): a range of noise for each step.

A student of k steps follows the ODE through the levels s_0 > s_1 > ... > s_k = 0. Step i answers x
to its input, and takes it to x_mid at the level s_{i+1} (ode_step). Backward simulation noises x
itself and asks the scores at every sigma. Here x_mid is noised further, and only the levels between
s_{i+1} and s_i are asked:

    xt = x_mid + sqrt(sigma^2 - s_{i+1}^2) noise,      s_{i+1} < sigma < s_i

What should the fake score predict at such an xt? TDM says x. But x_mid carries noise that x helped
to make: the score of xt is that of x_mid plus fresh noise. Tweedie's formula for that noise alone
gives Phased DMD's target

    D* = xt + sigma^2 / (sigma^2 - s^2) (x_mid - xt),      s = s_{i+1}

At s = 0 both are x.
"""

import torch

from nano_dmd.denoiser import edm_weight
from nano_dmd.dmd_loss import descend, dmd_gradient
from nano_dmd.generator import ode_step
from nano_dmd.noise import expand, interval


def phased_target(xt, x_mid, sigma, s):
    """D* (B, *S) of xt, which is x_mid at level s (float) noised on to sigma (B,) > s."""
    gain = sigma**2 / (sigma**2 - s**2)
    return xt + expand(gain, xt) * (x_mid - xt)


def renoised(x, batch, cfg):
    """(xt, x_mid, sigma (B,)): x taken to the next step's level by the ODE, then noised on."""
    x_mid = ode_step(batch.xt, x, batch.level, batch.next_level)
    between = interval(batch.next_level, batch.level, cfg.least_sigma)
    sigma, noise = batch.noising(between, x)
    return x_mid + expand((sigma**2 - batch.next_level**2).sqrt(), x) * noise, x_mid, sigma


def trajectory_loss(x, nets, batch, cfg):
    """dmd_loss of step batch.step on its own interval of noise; returns (B,).  x has a graph.

    Differs: TDM's loss is a Huber distance of width .001, far below the errors. So it follows the
    sign of each pixel's gradient. That is not the direction of a KL divergence.  The sources draw
    timesteps uniformly, and TDM a step k for each sample; here a batch has one.
    """
    with torch.no_grad():
        xt, _, sigma = renoised(x, batch, cfg)
        d_real, d_fake = nets.real(xt, sigma, batch.cond), nets.fake(xt, sigma, batch.cond)
    return descend(x, dmd_gradient(x, d_real, d_fake)).flatten(1).mean(1)


def trajectory_denoising_loss(x, nets, batch, cfg):
    """TDM's critic: predict x from xt; weighted as denoising_loss is; returns (B,).

    Differs: the official weight is min(1 / sigma^2, 5), times the likelihood of xt's noise,
    tempered by 1 / pixels (train_tdm_demo.py:1100-1185).
    """
    xt, _, sigma = renoised(x, batch, cfg)
    weight = edm_weight(sigma, nets.sigma_data)
    gap = nets.fake(xt, sigma, batch.critic_cond) - x
    return (expand(weight, x) * gap**2).flatten(1).mean(1)


def phased_denoising_loss(x, nets, batch, cfg):
    """Phased DMD's critic: predict phased_target; returns (B,).

    Near s the target is mostly noise, sigma^2 / sqrt(sigma^2 - s^2) of it. The weight makes this
    the error in fresh noise: that of denoising_loss times 1 - s^2 / sigma^2.
    """
    (xt, x_mid, sigma), s = renoised(x, batch, cfg), batch.next_level
    gap = nets.fake(xt, sigma, batch.critic_cond) - phased_target(xt, x_mid, sigma, s)
    weight = edm_weight(sigma, nets.sigma_data) * (1 - s**2 / sigma**2)
    return (expand(weight, x) * gap**2).flatten(1).mean(1)

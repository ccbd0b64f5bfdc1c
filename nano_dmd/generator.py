"""The one-step or few-step generator, backward simulation, and the moving average.

    one step     x = D(sigma_0 z, sigma_0)
    k steps      x_0 = D(sigma_0 z_0, sigma_0),   x_i = D(x_{i-1} + sigma_i z_i, sigma_i)
    ode          the same, but step i keeps the noise that step i - 1 saw, (xt - x) / sigma

Training step i of k needs its input. DMD2 makes it by running the generator's own earlier steps
(backward simulation, section 4.5), so that training sees what sampling will see. Several
reimplementations noise real images instead. They train on inputs that the generator never meets.
"""

import torch
from torch import nn

from nano_dmd.denoiser import lerp, trainable_copy
from nano_dmd.noise import add_noise, expand


class Generator(nn.Module):
    """A copy of the teacher's network, asked at one to a few fixed noise levels.

    net     the teacher's denoiser
    sigmas  noise levels of the steps, descending; the first step starts from sigmas[0] * z
            (80 in DMD2, 2.5 in SiD)
    unit    the first step starts from net.scale(sigmas[0]) z, so that the network sees z itself
    ode     later steps follow the ODE of the samples (ode_step) instead of drawing new noise
    copy    makes what is trained: trainable_copy, or LoRA (engine/lora.py)
    """

    def __init__(self, net, sigmas, unit=False, ode=False, copy=trainable_copy):
        super().__init__()
        self.net, self.sigmas = copy(net), tuple(sigmas)
        self.unit, self.ode = unit, ode

    def noised(self, i, x, z, xt):
        """Input (B, *S) of step i from step i - 1: its answer x and input xt; z is unit noise."""
        if self.ode and xt is not None:
            return ode_step(xt, x, self.sigmas[i - 1], self.sigmas[i])
        sigma = z.new_full(z.shape[:1], self.sigmas[i])
        if i > 0:
            return add_noise(x, sigma, z)
        return expand(self.net.scale(sigma) if self.unit else sigma, z) * z

    def forward(self, z, cond=None, step=None, start=None):
        """x (B, *S), the answer of step `step` (default: the last): path without the input."""
        return self.path(z, cond, step, start)[1]

    def path(self, z, cond=None, step=None, start=None):
        """(xt, x), (B, *S) each: input and answer of a step, after the generator's earlier steps.

        z (k, B, *S) unit noise, one slice per step; cond None | (B, ...).  Only step `step` has a
        graph: it is the one that is trained.  No gradient flows into its input.  start (B, *S),
        clean samples, replaces the earlier steps: how *not* to do it, for comparison.
        """
        step, xt = len(self.sigmas) - 1 if step is None else step, None
        x, first = start, 0 if start is None else step
        for i in range(first, step + 1):
            with torch.set_grad_enabled(i == step and torch.is_grad_enabled()):
                xt = self.noised(i, x, z[i], xt)
                x = self.net(xt, z.new_full(xt.shape[:1], self.sigmas[i]), cond)
        return xt, x


def ode_step(xt, x, sigma, following):
    """From xt at noise level sigma to the level `following`, along the line to x, its denoised.

        x + (following / sigma) (xt - x)

    The step of DDIM, and of Euler on EDM's ODE.  The noise stays (xt - x) / sigma.
    """
    return x + following / sigma * (xt - x)


def update_ema(ema, net, step, half_life):
    """Move ema towards net.  half_life in steps, shorter at the start of a run.

    In a run without an average, ema is net itself.  Then nothing moves.
    SiD's ramp (sid_training_loop.py:346): the half-life is at most 5 percent of the steps so far.
    """
    if ema is not net:
        lerp(ema, net, 1 - 0.5 ** (1 / max(min(half_life, 0.05 * step), 1e-8)))

"""The one-step or few-step generator, backward simulation, and the moving average.

    one step     x = D(sigma_0 z, sigma_0)
    k steps      x_0 = D(sigma_0 z_0, sigma_0),   x_i = D(x_{i-1} + sigma_i z_i, sigma_i)

Training step i of k needs its input x_{i-1} + sigma_i z_i. DMD2 makes it by running the generator's
own earlier steps (backward simulation, section 4.5), so that training sees what sampling will see.
Several reimplementations noise real images instead. They train on inputs that the generator never
meets.
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
    copy    makes what is trained: trainable_copy, or LoRA (engine/lora.py)
    """

    def __init__(self, net, sigmas, unit=False, copy=trainable_copy):
        super().__init__()
        self.net, self.sigmas = copy(net), tuple(sigmas)
        self.unit = unit

    def step(self, i, x, z, cond):
        """x0-prediction (B, *S) of step i from the last estimate x (None at 0) and unit noise z."""
        sigma = z.new_full(z.shape[:1], self.sigmas[i])
        if i > 0:
            return self.net(add_noise(x, sigma, z), sigma, cond)
        start = self.net.scale(sigma) if self.unit else sigma
        return self.net(expand(start, z) * z, sigma, cond)

    def forward(self, z, cond=None, step=None, start=None):
        """x (B, *S) of step `step` (default: the last), after the generator's own earlier steps.

        z (k, B, *S) unit noise, one slice per step; cond None | (B, ...).  Only step `step` has a
        graph: it is the one that is trained.  No gradient flows into its input.  start (B, *S),
        clean samples, replaces the earlier steps: how *not* to do it, for comparison.
        """
        step, x = len(self.sigmas) - 1 if step is None else step, start
        with torch.no_grad():
            for i in range(step if start is None else 0):
                x = self.step(i, x, z[i], cond)
        return self.step(step, x, z[step], cond)


def update_ema(ema, net, step, half_life):
    """Move ema towards net.  half_life in steps, shorter at the start of a run.

    In a run without an average, ema is net itself.  Then nothing moves.
    SiD's ramp (sid_training_loop.py:346): the half-life is at most 5 percent of the steps so far.
    """
    if ema is not net:
        lerp(ema, net, 1 - 0.5 ** (1 / max(min(half_life, 0.05 * step), 1e-8)))

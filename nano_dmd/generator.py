"""The one-step (or few-step) generator, its training input by backward simulation, and its moving average.

    one step     x = D(sigma_0 z, sigma_0)
    k steps      x_0 = D(sigma_0 z_0, sigma_0),   x_i = D(x_{i-1} + sigma_i z_i, sigma_i)

Training step i of k needs its input x_{i-1} + sigma_i z_i. DMD2 makes it by running the generator's own earlier
steps (backward simulation, section 4.5), so that training sees what sampling will see; noising real images
instead, as several reimplementations do, trains on inputs the generator never meets.
"""

import torch
from torch import nn

from nano_dmd.denoiser import lerp
from nano_dmd.engine.lora import trainable_copy
from nano_dmd.noise import add_noise


class Generator(nn.Module):
    """A copy of the teacher's network, asked at one to a few fixed noise levels.

    net     the teacher's denoiser, to copy        sigmas  descending noise levels of the steps; sigmas[0] starts from
                                                           sigmas[0] * z: 80 in DMD2, 2.5 in SiD
    rank    0 = a full copy, else LoRA (lora.py)   unit    the first step starts from sqrt(1 + sigmas[0]^2) z, which a
                                                           variance-preserving network sees as z (Stable Diffusion)
    """

    def __init__(self, net, sigmas, rank=0, unit=False):
        super().__init__()
        self.net, self.sigmas, self.unit = trainable_copy(net, rank), tuple(sigmas), unit

    def step(self, i, x, z, cond):
        """x0-prediction (B, *S) of step i from the previous clean estimate x (None at i = 0) and unit noise z."""
        sigma = z.new_full(z.shape[:1], self.sigmas[i])
        if i == 0:
            return self.net((1 + self.sigmas[0] ** 2) ** 0.5 * z if self.unit else self.sigmas[0] * z, sigma, cond)
        return self.net(add_noise(x, sigma, z), sigma, cond)

    def forward(self, z, cond=None, step=None, start=None):
        """x (B, *S) at generator step `step` (default the last), reached by the generator's own earlier steps.

        z (k, B, *S) unit noise, one slice per step; cond None | (B,).  Only the last step carries a graph: it is
        the one being trained, and the input it is trained on is a sample, not a function to differentiate.
        start (B, *S) replaces the simulation by given clean samples: how *not* to do it, kept for comparison.
        """
        step, x = len(self.sigmas) - 1 if step is None else step, start
        with torch.no_grad():
            for i in range(step if start is None else 0):
                x = self.step(i, x, z[i], cond)
        return self.step(step, x, z[step], cond)


def update_ema(ema, net, step, half_life):
    """Move ema towards net; half_life in steps, shorter at the start so that early samples are not stale.

    A student without an average is its own: then nothing moves.
    SiD's ramp (sid_training_loop.py:346): the half-life never exceeds 5 percent of the steps taken so far.
    """
    if ema is not net:
        lerp(ema, net, 1 - 0.5 ** (1 / max(min(half_life, 0.05 * step), 1e-8)))

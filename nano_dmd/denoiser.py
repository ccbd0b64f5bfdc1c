"""The one contract of this package, and the adapters that make networks fulfil it.

    Denoiser:  D(x, sigma, cond=None) -> E[x0 | x0 + sigma * eps = x, cond]

EDM, eps-, v- and flow networks become Denoisers here alone. An exact mixture is one already.
Every loss is written with D. Tweedie's formula gives the score: (D(x, sigma) - x) / sigma^2.

EDM = Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models".
"""

import copy
from typing import Protocol

import torch
from torch import nn
from tqdm import tqdm

from nano_dmd.noise import add_noise, draw_sigma, expand, karras_sigmas


class Denoiser(Protocol):
    """x (B, *S) float32; sigma (B,) > 0; cond None | (B,) int64 classes | (B, T, C) texts.

    Returns (B, *S), differentiable in x.
    """

    def __call__(self, x, sigma, cond=None): ...


def score(denoiser, x, sigma, cond=None):
    """grad log p(x; sigma) = (D(x, sigma) - x) / sigma^2.  x (B, *S), sigma (B,) -> (B, *S)."""
    return (denoiser(x, sigma, cond) - x) / expand(sigma, x) ** 2


class Adapter(nn.Module):
    """What the adapters share: how a network is asked.  With bf16 it alone runs in bfloat16.

    c_in(sigma)  (B,): the network sees c_in xt
    time(sigma)  (B,): what the network is told about sigma
    Sigma reaches 80 and more, so x is scaled first; everything outside the network stays float32.
    """

    def __init__(self, net, bf16=False):
        super().__init__()
        self.net, self.bf16 = net, bf16

    def _call(self, function, x, sigma, cond):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return function(expand(self.c_in(sigma), x) * x, self.time(sigma), cond).to(x.dtype)

    def scale(self, sigma):
        """(B,): xt of this size is pure noise to the network, which then sees z (Generator)."""
        return 1 / self.c_in(sigma)

    def features(self, x, sigma, cond=None):
        """Bottleneck activations (B, C, ...) of the network, for the GAN head."""
        return self._call(self.net.features, x, sigma, cond)


class EDM(Adapter):
    """EDM (table 1): D = c_skip x + c_out F(c_in x, ln(sigma) / 4); unit variance around F."""

    def __init__(self, net, sigma_data=0.5, bf16=False):
        super().__init__(net, bf16)
        self.sigma_data = sigma_data

    def c_in(self, sigma):
        return (sigma**2 + self.sigma_data**2).rsqrt()

    def time(self, sigma):
        return sigma.log() / 4

    def forward(self, x, sigma, cond=None):
        s, d = expand(sigma, x), self.sigma_data
        norm = (s**2 + d**2).sqrt()
        return (d / norm) ** 2 * x + s * d / norm * self._call(self.net, x, sigma, cond)


class FromEps(Adapter):
    """A variance-preserving eps-prediction network net(x_vp, t, cond) as a Denoiser.

    x_vp = x / sqrt(1 + sigma^2) and x0 = x - sigma * eps.  alphas_cumprod (T,) is the training
    schedule. t is the index of the nearest log-sigma in its table.
    """

    def __init__(self, net, alphas_cumprod, bf16=False):
        super().__init__(net, bf16)
        abar = alphas_cumprod.double()
        self.register_buffer("sigmas", ((1 - abar) / abar).sqrt().float())     # (T,) ascending

    def c_in(self, sigma):
        return (1 + sigma**2).rsqrt()

    def time(self, sigma):
        return (sigma.log()[:, None] - self.sigmas.log()[None]).abs().argmin(1)

    def within(self, x, sigma):
        """x and sigma; above the table's last sigma both are scaled down to it: x is only noise."""
        end = sigma.clamp(max=self.sigmas[-1])
        return expand(end / sigma, x) * x, end

    def forward(self, x, sigma, cond=None):
        x, sigma = self.within(x, sigma)
        return x - expand(sigma, x) * self._call(self.net, x, sigma, cond)

    def features(self, x, sigma, cond=None):
        return super().features(*self.within(x, sigma), cond)


class FromV(FromEps):
    """The same for v-prediction, v = (eps - sigma x0) / sqrt(1 + sigma^2) (Salimans & Ho 2022)."""

    def forward(self, x, sigma, cond=None):
        x, sigma = self.within(x, sigma)
        s = expand(sigma, x)
        norm = (1 + s**2).sqrt()
        return (x / norm - s * self._call(self.net, x, sigma, cond)) / norm


class FromFlow(Adapter):
    """A flow network as a Denoiser: it predicts v = noise - x at x_t = (1 - t) x + t noise.

    x_t = xt / (1 + sigma) and t = sigma / (1 + sigma), so x0 = x_t - t v.
    """

    def c_in(self, sigma):
        return 1 / (1 + sigma)

    def time(self, sigma):
        return sigma / (1 + sigma)

    def forward(self, x, sigma, cond=None):
        s = expand(sigma, x)
        return (x - s * self._call(self.net, x, sigma, cond)) / (1 + s)


@torch.no_grad()
def heun(denoiser, z, cond=None, steps=18, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """EDM's deterministic sampler (algorithm 1): 2 * steps - 1 network evaluations.

    z (B, *S) is unit normal noise; returns x (B, *S) in z's dtype.  float64 between network calls.
    """
    sigmas = [*karras_sigmas(steps, sigma_min, sigma_max, rho).tolist(), 0.0]
    x = z.double() * sigmas[0]

    def slope(x, sigma):                           # dx / dsigma of the probability-flow ODE
        d = denoiser(x.to(z.dtype), z.new_full(z.shape[:1], sigma), cond)
        return (x - d.double()) / sigma

    for sigma, following in zip(sigmas, sigmas[1:]):
        here, step = slope(x, sigma), following - sigma
        euler = x + step * here
        x = euler if following == 0 else x + step * (here + slope(euler, following)) / 2
    return x.to(z.dtype)


def edm_weight(sigma, sigma_data):
    """(sigma^2 + sd^2) / (sigma sd)^2 = 1 / sigma^2 + 1 / sd^2: EDM's and DMD2's weight of errors.

    sigma float or (B,); DMD2 edm_guidance.py:152.
    """
    return 1 / sigma**2 + 1 / sigma_data**2


def edm_loss(denoiser, x, sigma, noise, cond=None, sigma_data=0.5):
    """EDM's denoising loss (eq. 8), per element: w(sigma) (D(x + sigma noise) - x)^2.

    x, noise (B, *S), sigma (B,).
    """
    weight = edm_weight(sigma, sigma_data)
    return expand(weight, x) * (denoiser(add_noise(x, sigma, noise), sigma, cond) - x) ** 2


def train_denoiser(denoiser, draw, recipe, show=True):
    """Fit a denoiser to draw(n) -> (x, cond) by denoising; returns its moving average, frozen.

    recipe  steps, batch, lr, ema (half-life in steps), sigma (noise), sigma_data, label_dropout
    The learning rate warms up for 50 steps and falls linearly to 0 over the second half.
    """
    ema, steps = copy.deepcopy(denoiser), recipe["steps"]
    opt = torch.optim.Adam(denoiser.parameters(), betas=(0.9, 0.99), fused=True)
    bar = tqdm(range(steps), desc="teacher", disable=not show)
    for step in bar:
        opt.param_groups[0]["lr"] = recipe["lr"] * min(1, (step + 1) / 50, 2 * (1 - step / steps))
        x, cond = draw(recipe["batch"])
        if recipe["label_dropout"] and cond is not None:       # -1 = no class: guidance asks for it
            drop = torch.rand(len(cond), device=x.device) < recipe["label_dropout"]
            cond = cond.masked_fill(drop, -1)
        sigma = draw_sigma(recipe["sigma"], len(x), x.device)
        noise = torch.randn(x.shape, device=x.device)
        loss = edm_loss(denoiser, x, sigma, noise, cond, recipe["sigma_data"]).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        half_life = min(recipe["ema"], 1 + 0.1 * step)
        lerp(ema, denoiser, 1 - 0.5 ** (1 / half_life))
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return ema.requires_grad_(False).eval()


@torch.no_grad()
def lerp(slow, fast, weight):
    """Move the parameters of slow towards fast by weight in [0, 1].  Shared ones stay (LoRA)."""
    moving = [(s, f) for s, f in zip(slow.parameters(), fast.parameters()) if s is not f]
    torch._foreach_lerp_(*map(list, zip(*moving)), weight)


def trainable_copy(denoiser):
    """A full copy of a frozen denoiser, to train.  Always in eval mode: dropout would be noise."""
    return copy.deepcopy(denoiser).requires_grad_(True).eval()

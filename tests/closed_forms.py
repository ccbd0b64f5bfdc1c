"""What several tests are built from: numbers, chosen noise, exact denoisers, small networks.

Everything is float64 but for small_net.
"""

import math
from itertools import product
from types import SimpleNamespace

import numpy as np
import torch

from nano_dmd.denoiser import EDM
from nano_dmd.engine.draw import Batch
from nano_dmd.networks import MLP
from nano_dmd.noise import expand
from toy.mixtures import Mixture

EXACT, BITWISE = dict(rtol=1e-12, atol=1e-12), dict(rtol=0, atol=0)
ALPHAS = (-0.5, 0.0, 0.5, 1.0, 1.2)


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


# ---- what a loss is given ---------------------------------------------------------------------------------


class Given(Batch):
    """A Batch whose k-th noising has noise[k], and NaN beyond the last one: a draw nobody asked for.

    Its sigma is the spec itself: here the config holds a tensor (B,).
    """

    def noising(self, spec, x):
        return spec.expand(len(x)), self.noise.pop(0) if self.noise else torch.full_like(x, math.nan)


def given(*noise, **fields):
    """A Given batch of these noises (B, *S); its other fields are None unless they are named."""
    batch = Given(z=None, **fields)
    batch.noise = list(noise)
    return batch


def config(**fields):
    """The Config fields a loss reads; noise levels that a test does not set are NaN, so that using one shows."""
    unset = dict.fromkeys(("dm_sigma", "critic_sigma", "gan_sigma"), tensor(math.nan))
    return SimpleNamespace(**unset | dict(alpha=1.0, normalise=True, reg_loss="l2", noisings=1, w_r1=0.0) | fields)


def curved_nets():
    """Two smooth, nonlinear denoisers in 2D: the exact ones of two different mixtures."""
    real = Mixture([[-0.5, 0.2], [0.4, -0.3], [0.3, 0.6]], [0.3, 0.4, 0.5], [0.5, 0.3, 0.2]).to(torch.float64)
    fake = Mixture([[0.1, 0.1], [-0.3, 0.5]], [0.5, 0.3]).to(torch.float64)
    return SimpleNamespace(real=real, fake=fake, sigma_data=0.5)


def curved_case(n=6):
    """(x with grad, sigma, noise, nets) for tests that need nothing special."""
    x = normal(n, 2, seed=1).requires_grad_()
    return x, torch.linspace(0.2, 1.5, n, dtype=torch.float64), normal(n, 2, seed=2), curved_nets()


def flow_network(denoiser):
    """What a perfect flow network answers at x_t = (1 - t) x0 + t noise: v = E[noise] - E[x0]."""
    def net(x_t, t, cond):
        t = expand(t, x_t)
        x0 = denoiser(x_t / (1 - t), (t / (1 - t)).flatten(), cond)
        return (x_t - (1 - t) * x0) / t - x0

    return net


def small_net(seed=0):
    """A 2D EDM network with random weights (a fresh one answers c_skip x: its last layer starts at zero)."""
    return randomised(EDM(MLP(width=16, depth=2)), 0.3, 100 * seed)


def randomised(net, std, seed=0):
    """net with normal weights of this std: parameter i is drawn with seed + i."""
    for i, p in enumerate(net.parameters()):
        p.data = std * torch.randn(p.shape, generator=rng(seed + i))
    return net


# ---- one-dimensional Gaussians, exactly -------------------------------------------------------------------
# Real data N(0, s^2), generator x = a z, fake score exact for N(0, a^2).  At noise sigma both ideal denoisers are
# linear:
#     d_real = r xt,  r = s^2 / (s^2 + sigma^2)          d_fake = f xt,  f = a^2 / (a^2 + sigma^2)

GAUSSIANS = list(product((0.5, 1.0, 2.0), (0.3, 1.0, 3.5), (0.1, 1.0, 5.0)))          # (s, a, sigma)


def quadrature():
    """z (25, 1), noise (25, 1), weight (25,): E[p(z, noise)] = sum weight p exactly, for degrees up to 9 in each."""
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(5))
    z, noise = torch.cartesian_prod(nodes, nodes).T
    return z[:, None], noise[:, None], torch.outer(weights, weights).flatten() / (2 * math.pi)


def ideal(std):
    """E[x0 | xt] when x0 ~ N(0, std^2)."""
    return lambda xt, sigma, cond=None: std**2 / (std**2 + expand(sigma, xt) ** 2) * xt


def gaussian(loss, s, a, sigma, **fields):
    """(E[loss], dE[loss]/da) of a generator loss at x = a z; the fake score's own a is held."""
    z, noise, weight = quadrature()
    gain = torch.tensor(a, dtype=torch.float64, requires_grad=True)
    nets = SimpleNamespace(real=ideal(s), fake=ideal(a))
    levels = torch.full((len(z),), sigma, dtype=torch.float64)
    value = (weight * loss(gain * z, nets, given(noise), config(dm_sigma=levels, **fields))).sum()
    return value.detach(), torch.autograd.grad(value, gain)[0]


def ratios(s, a, sigma):
    """(r, f)"""
    return s**2 / (s**2 + sigma**2), a**2 / (a**2 + sigma**2)


def derivative(function, a):
    a = torch.tensor(a, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(function(a), a)[0]

"""Gaussian mixtures: all that a diffusion model should learn, in closed form at every noise level.

Adding noise to a mixture of isotropic Gaussians gives a mixture of wider ones, so the noised
density, its score and the ideal denoiser are exact. All sums over components run in log space: 30
standard deviations out, where an untrained generator may put its samples, exp() would underflow and
the score would be 0/0.
"""

import math

import torch


class Mixture:
    """sum_k weight_k N(mean_k, std_k^2 I).  A Denoiser, and a data set.

    means (K, D); std float or (K,); weights (K,) or None for equal ones; labels (K,) int64 classes
    or None.
    """

    def __init__(self, means, std, weights=None, labels=None):
        self.means = torch.as_tensor(means, dtype=torch.float32)
        k = len(self.means)
        self.std = torch.as_tensor(std, dtype=torch.float32).expand(k).clone()
        equal = weights is None
        weights = torch.ones(k) if equal else torch.as_tensor(weights, dtype=torch.float32)
        self.weights, self.labels = weights / weights.sum(), labels
        self.odds = self.weights.cpu()  # stays on the CPU, so that sample never waits for a GPU
        self.shape = tuple(self.means.shape[1:])
        self.classes = 0 if labels is None else int(labels.max()) + 1

    def to(self, target):
        """Move to a device, or convert to a dtype."""
        other = object.__new__(Mixture)
        other.__dict__.update(self.__dict__)
        for name in ("means", "std", "weights"):
            setattr(other, name, getattr(self, name).to(target))
        if isinstance(target, (str, torch.device)) and self.labels is not None:
            other.labels = self.labels.to(target)
        return other

    kind = "points"

    def sample(self, n, generator=None, rows=slice(None)):
        """Some rows of n clean points (n, D) and their labels; the CPU draws, for every device."""
        k = torch.multinomial(self.odds, n, replacement=True, generator=generator)[rows]
        noise = torch.randn(n, *self.shape, generator=generator)[rows]
        k = k.to(self.means.device, non_blocking=True)
        x = self.means[k] + self.std[k, None] * noise.to(self.means, non_blocking=True)
        return x, None if self.labels is None else self.labels[k]

    def _log_terms(self, x, sigma, cond=None):
        """log weight_k + log N(x; mean_k, (std_k^2 + sigma^2) I), and variances, (B, K) each."""
        var = self.std**2 + sigma[:, None] ** 2
        square = ((x[:, None] - self.means) ** 2).sum(2)
        volume = 0.5 * x.shape[1] * (2 * math.pi * var).log()
        terms = self.weights.log() - 0.5 * square / var - volume
        if cond is not None:                                      # -1 = no class, as in networks.py
            other = (self.labels != cond[:, None]) & (cond >= 0)[:, None]
            terms = terms.masked_fill(other, -torch.inf)
        return terms, var

    def log_prob(self, x, sigma=0.0):
        """log density (B,) of x (B, D) after noise sigma, a float or (B,)."""
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        return self._log_terms(x, sigma)[0].logsumexp(1)

    def denoise(self, x, sigma, cond=None):
        """E[x0 | x0 + sigma eps = x, cond]: posterior means, averaged by responsibility."""
        terms, var = self._log_terms(x, sigma, cond)
        share = terms.softmax(1)                                                      # (B, K)
        shrink = self.std**2 / var                                                    # (B, K)
        return (share * (1 - shrink)) @ self.means + (share * shrink).sum(1, keepdim=True) * x

    __call__ = denoise

    def score(self, x, sigma):
        """Gradient of log_prob(x, sigma) with respect to x (B, D); sigma (B,) >= 0."""
        terms, var = self._log_terms(x, sigma)
        return ((terms.softmax(1) / var)[:, :, None] * (self.means - x[:, None])).sum(1)


def ring(weights=None):
    """8 modes on a circle, std 0.05, overall std 0.5 per axis."""
    angle = torch.arange(8) * math.pi / 4
    return Mixture(0.7036 * torch.stack([angle.cos(), angle.sin()], 1), 0.05, weights)


def grid25():
    """5 x 5 modes, std 0.05, overall std 0.5."""
    axis = 0.3518 * torch.arange(-2.0, 3.0)
    return Mixture(torch.cartesian_prod(axis, axis), 0.05)


def spirals():
    """Two interleaved spirals as 2 x 60 components of std 0.03."""
    t = torch.linspace(0.15, 1, 60).sqrt() * 3 * math.pi
    arm = t[:, None] / (3 * math.pi) * torch.stack([t.cos(), t.sin()], 1)
    points = torch.cat([arm, -arm])
    return Mixture(0.5 * points / points.std(), 0.03)


def checkerboard():
    """8 dark squares of a 4 x 4 board, each filled by 16 components of std 0.06."""
    inside = (torch.arange(4.0) + 0.5) / 4
    cell = torch.cartesian_prod(inside, inside)  # (16, 2) in [0, 1]^2
    dark = [(i, j) for i in range(4) for j in range(4) if (i + j) % 2 == 0]
    squares = torch.tensor(dark, dtype=torch.float32)
    points = (squares[:, None] + cell - 2).reshape(-1, 2)
    return Mixture(0.5 * points / points.std(), 0.06)


MIXTURES = {
    "ring8": ring,
    "ring8_skewed": lambda: ring(torch.tensor([1.6, 0.4] * 4)),  # a flawed teacher for the GAN
    "grid25": grid25,
    "spirals": spirals,
    "checkerboard": checkerboard,
}

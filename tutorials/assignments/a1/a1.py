"""A1: scores and the DMD gradient.  The handout is README.md beside this file; test with: pytest test_public.py

Replace each `raise NotImplementedError` by your code.  Keep names and arguments; helpers of your own are welcome, and so
is everything in nano_dmd and toy.  Tensors arrive in float64.

    x (B, *S) points or images       sigma (B,) one noise level per sample       a denoiser is D(x, sigma, cond=None) -> (B, *S)
"""

import math

import torch
from torch.nn.functional import logsigmoid
from torch.special import log_ndtr

from nano_dmd.dmd_loss import descend, dmd_gradient
from nano_dmd.noise import add_noise, expand

# ---- A1.1 the score of a Laplace density ------------------------------------------------------------------


def laplace_log_prob(x, b, sigma):
    """log p_sigma(x) of D independent Laplace coordinates, each with Gaussian noise added (handout, A1.1).

    x (B, D); b float, the scale of exp(-|x0| / b) / (2b); sigma (B,).  returns (B,)
    Asked: exact for every x and sigma, also where p_sigma itself is too small or exp() too large for a float.
    """
    raise NotImplementedError("A1.1 is yours to write")


def laplace_denoise(x, b, sigma):
    """E[x0 | x0 + sigma noise = x] for the same density (handout, A1.1).

    x (B, D); b float; sigma (B,).  returns (B, D)
    Asked: a closed form or autograd, no integral; as exact in the far tails as in the middle.
    """
    raise NotImplementedError("A1.1 is yours to write")


# ---- A1.2 Tweedie for any density -------------------------------------------------------------------------


def denoiser_of(log_prob):
    """The denoiser that belongs to a noised log density, by Tweedie's formula (handout, A1.2).

    log_prob(x (B, *S), sigma (B,)) -> (B,), the log of p_sigma up to a constant, differentiable in x
    returns a function D(x (B, *S), sigma (B,), cond=None) -> (B, *S); cond is ignored
    Asked: D works inside torch.no_grad(), is differentiable in x outside (SiD needs that), and leaves x as it was.
    """
    raise NotImplementedError("A1.2 is yours to write")


def posterior_covariance(denoiser, x, sigma):
    """Cov[x0 | x0 + sigma noise = x], from any exact denoiser that is differentiable in x (handout, A1.2).

    denoiser(x, sigma) -> (B, D); x (B, D); sigma (B,).  returns (B, D, D)
    """
    raise NotImplementedError("A1.2 is yours to write")


# ---- A1.3 the DMD gradient of another divergence ----------------------------------------------------------


def log_weight(log_r, name):
    """log h(r) of an f-divergence, h(r) = r^2 f''(r), r = p_real / p_fake (handout, A1.3).

    log_r (B,); name "reverse_kl", "forward_kl", "js" or "hellinger".  returns (B,)
    Asked: from log r to log h without passing through r, so that log_r = 1000 is no problem.
    """
    raise NotImplementedError("A1.3 is yours to write")


def weighted_gradient(x, d_real, d_fake, log_h):
    """The DMD gradient (eq. 7 with the normaliser of eq. 8) under another divergence's weight (handout, A1.3).

        g = h / mean_batch(h) * (d_fake - d_real) / mean_pixels |x - d_real|

    x, d_real, d_fake (B, *S); log_h (B,).  returns (B, *S) without a graph, whatever the inputs carry
    Asked: finite for log_h = 1000; the mean over pixels is held above 1e-5, as in nano_dmd.
    """
    raise NotImplementedError("A1.3 is yours to write")


# ---- A1.4 a loss with a given gradient --------------------------------------------------------------------


def weighted_loss(x, g, weight):
    """A scalar whose gradient at x is a weighted field; weights by sample, sum over pixels (handout, A1.4).

        value  sum_b weight_b |g_b|^2 / 2 / sum_b weight_b        gradient at x_b  weight_b g_b / sum_b weight_b

    x, g (B, *S); weight (B,) >= 0, not all 0.  returns a scalar; nothing flows into g or weight, even if they carry a graph
    Asked: a sample of weight 0 is left out altogether, even if its g is NaN or infinite; it gets gradient 0.
    """
    raise NotImplementedError("A1.4 is yours to write")


def loss_with_value(x, g, value):
    """A scalar that shows `value` on the progress bar and has gradient g / x.numel() at x (handout, A1.4).

    x, g (B, *S); value a float or a scalar tensor, which may carry a graph.  returns a scalar
    Asked: the value to the last digit, whatever the size of x; nothing flows into g or value.
    """
    raise NotImplementedError("A1.4 is yours to write")


# ---- A1.5 predict, then measure ---------------------------------------------------------------------------


def kl_slopes(a, s, sigma):
    """Closed forms of d/da KL(p_fake || p_real) and d/da KL(p_real || p_fake) (handout, A1.5).

    floats: the generator is x = a z, so p_fake = N(0, a^2 + sigma^2); data N(0, s^2), so p_real = N(0, s^2 + sigma^2)
    returns two floats, reverse KL first
    """
    raise NotImplementedError("A1.5 is yours to write")


def loudest_sigma(a, s, power, name):
    """The noise level at which sigma^power * |d KL / da| is largest (handout, A1.5).

    floats a != s, both > 0, 0 < power < 4; name "reverse_kl" or "forward_kl".  returns a float, in closed form
    """
    raise NotImplementedError("A1.5 is yours to write")


def lowest_sigma(a, s):
    """The noise level above which r = p_real / p_fake has a finite variance under p_fake (handout, A1.5).

    floats a, s > 0.  returns a float, 0 where the variance is finite at every noise level
    """
    raise NotImplementedError("A1.5 is yours to write")


def measured_slope(z, noise, share, a, sigma, real, fake, weight):
    """d/da of an f-divergence between p_fake and p_real at noise level sigma, measured on samples (handout, A1.5).

        sum_n share_n  h(r(xt_n)) (s_fake(xt_n) - s_real(xt_n)) dx_n/da,        x = a z,  xt = x + sigma noise

    z, noise (N, 1); share (N,), the samples' probabilities: 1/N each for Monte Carlo, others in quadrature; a, sigma floats
    real, fake have .denoise(x (N, 1), sigma (N,)) -> (N, 1) and .log_prob(x (N, 1), sigma (N,)) -> (N,), as toy.mixtures
    weight maps log r (N,), r = p_real / p_fake at xt, to h (N,).  returns a scalar tensor
    """
    raise NotImplementedError("A1.5 is yours to write")

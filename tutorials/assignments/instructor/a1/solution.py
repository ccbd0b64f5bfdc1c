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
    ### BEGIN SOLUTION A1.1
    s = expand(sigma, x)
    right, left = log_ndtr(x / s - s / b) - x / b, log_ndtr(-x / s - s / b) + x / b   # (B, D), x0 > 0 and x0 < 0
    return (torch.logaddexp(right, left) + s**2 / (2 * b**2) - math.log(2 * b)).sum(1)
    ### END SOLUTION


def laplace_denoise(x, b, sigma):
    """E[x0 | x0 + sigma noise = x] for the same density (handout, A1.1).

    x (B, D); b float; sigma (B,).  returns (B, D)
    Asked: a closed form or autograd, no integral; as exact in the far tails as in the middle.
    """
    ### BEGIN SOLUTION A1.1
    s = expand(sigma, x)
    log_odds = log_ndtr(-x / s - s / b) - log_ndtr(x / s - s / b) + 2 * x / b         # (B, D), of x0 < 0
    score = torch.tanh(log_odds / 2) / b
    return x + s**2 * score
    ### END SOLUTION


# ---- A1.2 Tweedie for any density -------------------------------------------------------------------------


def denoiser_of(log_prob):
    """The denoiser that belongs to a noised log density, by Tweedie's formula (handout, A1.2).

    log_prob(x (B, *S), sigma (B,)) -> (B,), the log of p_sigma up to a constant, differentiable in x
    returns a function D(x (B, *S), sigma (B,), cond=None) -> (B, *S); cond is ignored
    Asked: D works inside torch.no_grad(), is differentiable in x outside (SiD needs that), and leaves x as it was.
    """
    ### BEGIN SOLUTION A1.2
    def denoiser(x, sigma, cond=None):
        wanted = torch.is_grad_enabled()
        with torch.enable_grad():
            point = x if x.requires_grad else x.detach().requires_grad_()
            score = torch.autograd.grad(log_prob(point, sigma).sum(), point, create_graph=wanted)[0]
        return x + expand(sigma, x) ** 2 * score

    return denoiser
    ### END SOLUTION


def posterior_covariance(denoiser, x, sigma):
    """Cov[x0 | x0 + sigma noise = x], from any exact denoiser that is differentiable in x (handout, A1.2).

    denoiser(x, sigma) -> (B, D); x (B, D); sigma (B,).  returns (B, D, D)
    """
    ### BEGIN SOLUTION A1.2
    x = x.detach().requires_grad_()
    d = denoiser(x, sigma)
    jacobian = torch.stack([torch.autograd.grad(d[:, i].sum(), x, retain_graph=True)[0] for i in range(x.shape[1])], 1)
    return expand(sigma, jacobian) ** 2 * jacobian
    ### END SOLUTION


# ---- A1.3 the DMD gradient of another divergence ----------------------------------------------------------


def log_weight(log_r, name):
    """log h(r) of an f-divergence, h(r) = r^2 f''(r), r = p_real / p_fake (handout, A1.3).

    log_r (B,); name "reverse_kl", "forward_kl", "js" or "hellinger".  returns (B,)
    Asked: from log r to log h without passing through r, so that log_r = 1000 is no problem.
    """
    ### BEGIN SOLUTION A1.3
    return {"reverse_kl": torch.zeros_like(log_r),
            "forward_kl": log_r,
            "js": logsigmoid(log_r) - math.log(2),
            "hellinger": log_r / 2 - math.log(2)}[name]
    ### END SOLUTION


def weighted_gradient(x, d_real, d_fake, log_h):
    """The DMD gradient (eq. 7 with the normaliser of eq. 8) under another divergence's weight (handout, A1.3).

        g = h / mean_batch(h) * (d_fake - d_real) / mean_pixels |x - d_real|

    x, d_real, d_fake (B, *S); log_h (B,).  returns (B, *S) without a graph, whatever the inputs carry
    Asked: finite for log_h = 1000; the mean over pixels is held above 1e-5, as in nano_dmd.
    """
    ### BEGIN SOLUTION A1.3
    weight = len(x) * log_h.detach().softmax(0)                                       # (B,), mean 1
    return expand(weight, x) * dmd_gradient(x, d_real, d_fake)
    ### END SOLUTION


# ---- A1.4 a loss with a given gradient --------------------------------------------------------------------


def weighted_loss(x, g, weight):
    """A scalar whose gradient at x is a weighted field; weights by sample, sum over pixels (handout, A1.4).

        value  sum_b weight_b |g_b|^2 / 2 / sum_b weight_b        gradient at x_b  weight_b g_b / sum_b weight_b

    x, g (B, *S); weight (B,) >= 0, not all 0.  returns a scalar; nothing flows into g or weight, even if they carry a graph
    Asked: a sample of weight 0 is left out altogether, even if its g is NaN or infinite; it gets gradient 0.
    """
    ### BEGIN SOLUTION A1.4
    weight = weight.detach() / weight.detach().sum()
    g = torch.where(expand(weight > 0, x), g, 0.0)                                    # 0 * NaN would be NaN
    return (weight * descend(x, g).flatten(1).sum(1)).sum()
    ### END SOLUTION


def loss_with_value(x, g, value):
    """A scalar that shows `value` on the progress bar and has gradient g / x.numel() at x (handout, A1.4).

    x, g (B, *S); value a float or a scalar tensor, which may carry a graph.  returns a scalar
    Asked: the value to the last digit, whatever the size of x; nothing flows into g or value.
    """
    ### BEGIN SOLUTION A1.4
    pull = (x * g.detach()).mean()
    return torch.as_tensor(value, dtype=x.dtype).detach() + (pull - pull.detach())
    ### END SOLUTION


# ---- A1.5 predict, then measure ---------------------------------------------------------------------------


def kl_slopes(a, s, sigma):
    """Closed forms of d/da KL(p_fake || p_real) and d/da KL(p_real || p_fake) (handout, A1.5).

    floats: the generator is x = a z, so p_fake = N(0, a^2 + sigma^2); data N(0, s^2), so p_real = N(0, s^2 + sigma^2)
    returns two floats, reverse KL first
    """
    ### BEGIN SOLUTION A1.5
    fake, real = a**2 + sigma**2, s**2 + sigma**2
    return a * (1 / real - 1 / fake), a * (fake - real) / fake**2
    ### END SOLUTION


def loudest_sigma(a, s, power, name):
    """The noise level at which sigma^power * |d KL / da| is largest (handout, A1.5).

    floats a != s, both > 0, 0 < power < 4; name "reverse_kl" or "forward_kl".  returns a float, in closed form
    """
    ### BEGIN SOLUTION A1.5
    k = power / 2                                                 # in v = sigma^2:  maximise v^k |slope(v)|
    if name == "forward_kl":                                      # k (a^2 + v) = 2 v
        return a * math.sqrt(k / (2 - k))
    middle, last = (1 - k) * (a**2 + s**2), k * (a * s) ** 2      # (2 - k) v^2 + middle v - last = 0
    return math.sqrt((math.sqrt(middle**2 + 4 * (2 - k) * last) - middle) / (2 * (2 - k)))
    ### END SOLUTION


def lowest_sigma(a, s):
    """The noise level above which r = p_real / p_fake has a finite variance under p_fake (handout, A1.5).

    floats a, s > 0.  returns a float, 0 where the variance is finite at every noise level
    """
    ### BEGIN SOLUTION A1.5
    return math.sqrt(max(0.0, s**2 - 2 * a**2))                   # p_real^2 / p_fake decays where 2 / real > 1 / fake
    ### END SOLUTION


def measured_slope(z, noise, share, a, sigma, real, fake, weight):
    """d/da of an f-divergence between p_fake and p_real at noise level sigma, measured on samples (handout, A1.5).

        sum_n share_n  h(r(xt_n)) (s_fake(xt_n) - s_real(xt_n)) dx_n/da,        x = a z,  xt = x + sigma noise

    z, noise (N, 1); share (N,), the samples' probabilities: 1/N each for Monte Carlo, others in quadrature; a, sigma floats
    real, fake have .denoise(x (N, 1), sigma (N,)) -> (N, 1) and .log_prob(x (N, 1), sigma (N,)) -> (N,), as toy.mixtures
    weight maps log r (N,), r = p_real / p_fake at xt, to h (N,).  returns a scalar tensor
    """
    ### BEGIN SOLUTION A1.5
    sigma = z.new_full(z.shape[:1], sigma)
    xt = add_noise(a * z, sigma, noise)
    h = weight(real.log_prob(xt, sigma) - fake.log_prob(xt, sigma))
    gap = ((fake.denoise(xt, sigma) - real.denoise(xt, sigma)) * z).sum(1) / sigma**2
    return (share * h * gap).sum()
    ### END SOLUTION

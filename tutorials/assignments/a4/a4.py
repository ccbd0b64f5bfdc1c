"""Assignment 4: score identity distillation.  The handout is README.md beside this file.

Everywhere: x clean, noise unit normal, xt = x + sigma * noise, sigma (N,); a Denoiser is called D(xt, sigma) and answers
with its estimate of x. Expectations are sums over nodes: E[g] = weights @ g, with weights (N,) that sum to 1.
"""

import math

import numpy as np
import torch

from nano_dmd.noise import add_noise, expand
from nano_dmd.denoiser import score
from nano_dmd.sid_loss import sid_integrand

# ---- given: tools to try things with --------------------------------------------------------------------------------


def gauss_hermite(n, dim):
    """Nodes z (n^dim, dim) and weights (n^dim,), float64, with weights @ g(z) = E g(z) for z ~ N(0, I).

    Exact where g is a polynomial of degree below 2n in each coordinate. For x = A z + b and its noise, ask for
    2 * D dimensions: the first D are z, the others the noise.
    """
    z, w = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(n))
    weights = torch.cartesian_prod(*[w / w.sum()] * dim).reshape(-1, dim).prod(1)
    return torch.cartesian_prod(*[z] * dim).reshape(-1, dim), weights


def conditional_teacher(s, tau):
    """The exact Denoiser of cond ~ N(0, tau^2 I), x = cond + s * unit noise.  cond (N, D), or None: E[x | xt] alone."""
    def denoise(xt, sigma, cond=None):
        mean, var = (0.0, s**2 + tau**2) if cond is None else (cond, s**2)
        return mean + expand(var / (var + sigma**2), xt) * (xt - mean)
    return denoise


def guided(denoiser, xt, sigma, cond, kappa):
    """Classifier-free guidance u + kappa (c - u); kappa = 1 is none."""
    d_uncond = denoiser(xt, sigma, None)
    return d_uncond + kappa * (denoiser(xt, sigma, cond) - d_uncond)


# ---- A4.1  three identities, and a fake score that lags ----------------------------------------------------------------


def projection_sides(u, fake, x, noise, sigma, weights):
    """Both sides of the score projection identity, at nodes of the generator's samples and of the noise.

        left = E[ u(xt) . s_fake(xt, sigma) ]        right = E[ u(xt) . (x - xt) / sigma^2 ]

    u         vector field, (N, D) -> (N, D)              fake     the Denoiser whose score stands on the left
    x, noise  (N, D)    sigma (N,)                        weights  (N,)
    returns (left, right), two numbers (0-d tensors). Only the left side may ask `fake`; the dot is a sum over D.
    """
    raise NotImplementedError("A4.1 is yours to write")


def value_with_lag(gap, error, alpha, weights):
    """What SiD's loss is worth on average, E[L2 - alpha L1], when the fake score is off by `error`.

    With d* = E[x | xt] of the generator and a network that says d_fake = d* + error:
    gap     (N, D)  d_real - d* at the nodes            error  (N, D)  d_fake - d* at the nodes, a function of xt
    alpha   number                                      weights (N,)
    returns one number (0-d tensor); no normaliser. The clean samples x are not an argument: the projection identity
    has to remove them.
    """
    raise NotImplementedError("A4.1 is yours to write")


def as_game(alpha):
    """The three numbers (c_real, c_fake, c_gap) for which SiD's integrand is, for all x, d_real, d_fake,

        (d_real - d_fake) . ((d_real - x) - alpha (d_real - d_fake))
            = c_real |d_real - x|^2 + c_fake |d_fake - x|^2 + c_gap |d_real - d_fake|^2
    """
    raise NotImplementedError("A4.1 is yours to write")


# ---- A4.2  the Fisher divergence and its whole gradient ----------------------------------------------------------------


def gaussian_denoiser(xt, sigma, mean, scale):
    """E[x | xt] for x ~ N(mean, scale scale^T), differentiable in everything.

    xt (N, D), sigma (N,), mean (D,), scale (D, D); returns (N, D). scale may be singular: a generator that has
    collapsed onto a line still has a denoiser.
    """
    raise NotImplementedError("A4.2 is yours to write")


def mesm(A, b, real, sigma, z, noise, weights, A_fake=None):
    """M = E |d_real(xt) - d_fake(xt)|^2 for the generator x = A z + b, with its own optimal denoiser as d_fake.

    A (D, D), b (D,), z and noise (N, D), sigma and weights (N,), real a Denoiser. |.|^2 is a sum over D.
    A_fake  (D, D): d_fake is the optimal denoiser of A_fake z + b instead (None: of A z + b)
    returns one number (0-d tensor) with the graph of A, and of A_fake if it is given.
    """
    raise NotImplementedError("A4.2 is yours to write")


def mesm_gradient(A, b, real, sigma, z, noise, weights):
    """dM/dA in two parts, (sampling, scores), each (D, D) without a graph; arguments as in mesm.

    sampling  through where M is evaluated: A moves xt, the function d_fake(.) stays what it is
    scores    through the fake score itself: A changes the function d_fake(.), the points xt stay where they are
    """
    raise NotImplementedError("A4.2 is yours to write")


def game_from_parts(sampling, scores, c, k):
    """The expected gradient at A of a generator that plays for

        c (|d_real - x|^2 - |d_fake - x|^2) + k |d_real - d_fake|^2

    from the two parts of dM/dA. The weights of the fake network are held: its d_fake is optimal for the current A and
    does not know that it should move with it. SiD is one pair (c, k) (A4.1). sampling, scores (D, D); returns (D, D).
    """
    raise NotImplementedError("A4.2 is yours to write")


# ---- A4.3  three paths of a gradient, and the coordinates they live in --------------------------------------------------


def path_gradient(x, sigma, noise, real, fake, alpha, paths):
    """Gradient at x of the sum of nano_dmd's sid_integrand (with its normaliser), along some of its paths only.

    paths  any of "direct" (the bare x in the formula), "real" (xt inside the teacher), "fake" (xt inside the fake
           score); a tuple, never empty. The three together are SiD.
    x, noise (B, *S), sigma (B,); returns (B, *S) without a graph. Leaves no .grad behind, on x or on any weight.
    """
    raise NotImplementedError("A4.3 is yours to write")


def sid_in(kind, y_real, y_fake, x, noise, sigma, alpha):
    """SiD's integrand, normaliser included and equal to sid_integrand elementwise, from another network output.

    kind    what both networks predict, at the same xt = x + sigma * noise:
            "eps"   noise
            "v"     (noise - sigma x) / sqrt(1 + sigma^2)         (Salimans & Ho 2022, variance preserving)
            "flow"  noise - x                                     (straight paths, at t = sigma / (1 + sigma))
    y_real, y_fake, x, noise (B, *S), sigma (B,); returns (B, *S), differentiable in y_real and y_fake; the
    normaliser is a constant. Ignore the clamp at 1e-5 that the library has.
    """
    raise NotImplementedError("A4.3 is yours to write")


def detached_factor(kind, sigma, sigma_data=0.5):
    """How much of DMD's gradient is left when the raw network outputs are detached: a factor (B,) per sample.

    Write D(xt, sigma) = c_skip(sigma) xt + c_out(sigma) y, with y the raw output, and the loss in terms of x, noise and
    y. Detaching D itself leaves DMD's gradient for every alpha. Detaching y leaves factor * DMD's gradient.
    kind "x0" (y = D), "eps", "v", "flow" as in sid_in, or "edm" (EDM's table 1, with sigma_data); sigma (B,).
    """
    raise NotImplementedError("A4.3 is yours to write")


# ---- A4.4  where a large alpha leads --------------------------------------------------------------------------------


def sid_slope(a, s, sigma, alpha, own=0.0):
    """d/da of SiD's expected loss in one dimension: data N(0, s^2), fake score optimal for the generator and held there.

    The generator is x = a z + own z', z and z' unit normal: a noise of its own, which a does not reach.
    sigma (K,) noise levels, all equally likely: the mean over them. No normaliser. a, s, alpha, own numbers, a > 0.
    returns one number (0-d tensor). Gradient descent is  a <- a - lr * sid_slope(a, ...).
    """
    raise NotImplementedError("A4.4 is yours to write")


def basin(s, sigma, alpha, own=0.0):
    """(low, high): the scales a > 0 from which SiD at one noise level flows to the data, in the limit of small steps.

    s, sigma, alpha, own numbers, 0 <= own < s, as in sid_slope; alpha may be negative.
    An end without a boundary (no scale a > 0 has slope 0) is 0.0 or math.inf.
    """
    raise NotImplementedError("A4.4 is yours to write")


def converges(slope, a, s, lr, steps):
    """Run a <- a - lr * slope(a) for `steps` steps: does it end within 1 percent of s, or of -s (the same density)?

    slope(a) -> number is any function. Never call it again once |a| has passed 1e6, or is not a number: that start is
    lost. returns True or False
    """
    raise NotImplementedError("A4.4 is yours to write")


def rate(s, sigma, alpha):
    """How fast SiD closes the last bit: the number k with slope = k (a - s) + higher orders, at one noise level."""
    raise NotImplementedError("A4.4 is yours to write")


# ---- A4.5  guidance, long and short ---------------------------------------------------------------------------------


def guided_critic_loss(fake, x, sigma, noise, cond, kappa1, dropped):
    """The fake score's loss with guidance kappa1, mean over everything of |guided eps - noise|^2.

    fake is an x0-denoiser (guide it with `guided`, then convert). x, noise, cond (B, D), sigma (B,).
    dropped  (B,) bool: samples trained without their cond; there the prediction is the unconditional one.
    Gradients reach the weights of fake through both halves of the guidance, and never x.
    """
    raise NotImplementedError("A4.5 is yours to write")


def fake_after_training(e_cond, e_uncond, kappa1, kappa2):
    """What the fake score shows the generator: trained to its optimum with guidance kappa1, asked with guidance kappa2.

    e_cond, e_uncond  E[x | xt, cond] and E[x | xt] of the generator's samples, tensors of one shape
    The network can fit anything, and a fixed share of samples is trained without cond. returns the same shape
    """
    raise NotImplementedError("A4.5 is yours to write")


def lsg_gradient(x, sigma, noise, cond, real, fake, alpha, kappa2, kappa4):
    """SiD's gradient at x (B, D), of the sum of sid_integrand, with guidance kappa4 on the teacher and kappa2 on the fake.

    All paths; the normaliser measures the distance to the guided teacher. Leaves no .grad behind.
    """
    raise NotImplementedError("A4.5 is yours to write")


def long_fixed_point(s, tau, sigma, kappa, own=0.0):
    """(m, a): the generator x = m cond + a z + own z' at which the guided conditional_teacher(s, tau) equals
    E[x | xt, cond] of the generator for every xt and cond, at one noise level. Numbers; own as in sid_slope, and kappa is
    below largest_guidance."""
    raise NotImplementedError("A4.5 is yours to write")


def largest_guidance(s, tau, sigma, own=0.0):
    """The kappa at which the spread a of long_fixed_point reaches 0: above it no generator has the guided score."""
    raise NotImplementedError("A4.5 is yours to write")

"""A6: from f to h.  Write what raises NotImplementedError; README.md beside this file has the maths.

Everywhere: p is the density of real samples, q that of the generator's, r = p / q, t = ln r.  D_f = E_q[f(r)] with
f convex and f(1) = 0; h(r) = r^2 f''(r).  A Gaussian on a line is a pair (mean, variance).  Tensors arrive in float64.
"""

import math

import torch

from nano_dmd.dmd_loss import dmd_gradient
from nano_dmd.f_distill import centred
from nano_dmd.noise import add_noise, expand

# A6.1 From f to h, and back


def weight_of(F, t):
    """h at the log ratios t (B,), where f is given as a function of t:  F(t) = f(exp(t)).  h in F', F'', by autograd.

    F is elementwise and twice differentiable; it may be linear in t, or constant.  returns (B,), without a graph.
    Works inside torch.no_grad() and leaves t as it was.
    """
    raise NotImplementedError("A6.1 is yours to write")


def derivative(y, t):
    """d y.sum() / dt with a graph of its own; 0 where y does not depend on t (given: you may use it)."""
    found = torch.autograd.grad(y.sum(), t, create_graph=True, allow_unused=True)[0] if y.requires_grad else None
    return torch.zeros_like(t) if found is None else found


def f_of(h, r):
    """The f with r^2 f''(r) = h(r), f(1) = 0 and f'(1) = 0, at r (B,), between 0.001 and 1000; without autograd.

    h is elementwise, positive and continuous, and need not be smooth.  returns (B,), to a relative 1e-4
    """
    raise NotImplementedError("A6.1 is yours to write")


def swapped(h):
    """The weight of the divergence with p and q exchanged, D_f(q || p), as a function of the same r = p / q."""
    raise NotImplementedError("A6.1 is yours to write")


def share_slope(F, a, b):
    """dD_f / db where p has the share a in one of two modes that do not overlap, q the share b; the modes are alike.

    F(t) = f(exp(t)), on tensors; a, b floats in (0, 1).  returns a float
    """
    raise NotImplementedError("A6.1 is yours to write")


# A6.2 Two Gaussians of unequal variance:  x = mean + std z


def tilted(k, p, q):
    """(ln E_q[r^k], mean, variance) of the density that is proportional to q r^k.  p, q (mean, variance); k any float.

    returns three floats, in closed form.  raises ValueError where E_q[r^k] is infinite
    """
    raise NotImplementedError("A6.2 is yours to write")


def power_slopes(k, p, q):
    """(dD_f / dmean, dD_f / dstd) of q, for h(r) = r^k, not normalised.  Two floats, in closed form."""
    raise NotImplementedError("A6.2 is yours to write")


def effective_samples(k, p, q, n):
    """n (E_q h)^2 / E_q[h^2] for h = r^k: as many equal samples are n weighted ones worth.  0.0 where E_q[h^2] is infinite."""
    raise NotImplementedError("A6.2 is yours to write")


def slopes(h, real, mean, std):
    """(dD_f / dmean, dD_f / dstd, E_q[h]) for any h and q = N(mean, std^2), by a sum over points.  Three floats, to 1e-5.

    real has .log_prob(x (N, 1)) -> (N,) and .score(x (N, 1), sigma (N,)) -> (N, 1), sigma = 0 for the clean density
    """
    raise NotImplementedError("A6.2 is yours to write")


# A6.3 A ratio from logits


def log_ratio(logits, real_is_one, n_real, n_fake):
    """ln r (B,) from the logits (B,) of a critic that was trained to the optimum of a pooled logistic loss.

    The loss is one mean over n_real real and n_fake generated samples together, each with its label, 0 or 1.
    real_is_one: real samples have the label 1; else generated ones have.  A large logit says "label 1".
    """
    raise NotImplementedError("A6.3 is yours to write")


def place(sigma, low, high, bins):
    """Which of some bins, equally wide in log sigma from low to high, each sigma (B,) is in: (B,) int64, 0 ... bins - 1.

    Each bin holds its lower edge.  Below low is bin 0; high and above is the last one.
    """
    raise NotImplementedError("A6.3 is yours to write")


def running_means(means, ratio, where, rate):
    """The mean ratio of each bin (K,), averaged over batches:  rate * means + (1 - rate) * this batch's.

    means (K,) as they were; ratio (B,); where (B,) int64, the bin of each.  A bin without a sample keeps its mean.
    No graph: the batch is a constant.
    """
    raise NotImplementedError("A6.3 is yours to write")


def weights_of_batch(log_r, where, h, low=0.1, high=20.0):
    """h(r) over its mean (B,): r is cut to [low, high], then divided by its mean in its bin, then weighted.  No graph.

    log_r (B,) of any size; where (B,) int64, the bin of each sample; h elementwise
    """
    raise NotImplementedError("A6.3 is yours to write")


def residual(slope, width):
    """Root mean square error of ln r that is left after centring, where the logit is ln r + slope * ln sigma, r = 1.

    One bin of that width, in ln sigma, with many samples spread evenly over it; nothing is cut.  returns a float
    """
    raise NotImplementedError("A6.3 is yours to write")


# A6.4 The gradient, and p_fake from a batch


def f_gradient(x, sigma, noise, real, fake, logit, h):
    """The direction to descend for x (B, *S), a mean over n noises of each sample:  h / mean(h) times DMD's gradient.

    sigma (n, B), noise (n, B, *S).  real, fake (xt (N, *S), sigma (N,)) -> (N, *S) are denoisers; logit(xt, sigma) -> (N,)
    is ln r.  h elementwise, of r; its mean is over all n B.  DMD's gradient has the normaliser of eq. 8, from each copy of x.
    returns (B, *S) without a graph
    """
    raise NotImplementedError("A6.4 is yours to write")


def leave_one_out(x, xt, sigma):
    """(ln p_fake(xt_i) (B,), E[x0 | xt_i] (B, *S)) where p_fake is the *other* samples of the batch, each N(x_j, sigma_i^2 I).

    x, xt (B, *S), sigma (B,); xt_i came from x_i.  Finite however far away the others are
    """
    raise NotImplementedError("A6.4 is yours to write")


def self_share(n, dim, s, sigma):
    """Which share of the expected kernel density at xt is the sample's own kernel, if it is not left out.  A float.

    n samples of N(0, s^2 I) in dim dimensions, the kernels N(x_j, sigma^2 I), xt_i = x_i + sigma noise.
    share = E[own kernel] / E[sum of all n kernels], finite for dim = 3072, too
    """
    raise NotImplementedError("A6.4 is yours to write")


# A6.5 Name the mistake

VERDICTS = ("right", "wrong sign", "other noise", "one mean", "not normalised", "graph")


def other_noise_correlation(p, q, sigma, other):
    """Correlation of ln r at x + sigma e with ln r at x + other e', x from q, e and e' independent: a float.

    p, q (mean, variance) of the clean densities, on a line, not the same; each ln r is that of the densities noised at its level
    """
    raise NotImplementedError("A6.5 is yours to write")


def diagnose(weigh):
    """One of VERDICTS, from experiments with weigh(x, sigma, noise, logit, h) -> (B,), which may have one mistake.

    Right is r = exp(logit(xt, sigma)) at xt = x + sigma noise, cut to [0.1, 20], divided by its mean in ten bins of log
    sigma (nano_dmd.f_distill.centred); h of that over its mean; no graph.  You choose all arguments (handout, A6.5).
    """
    raise NotImplementedError("A6.5 is yours to write")

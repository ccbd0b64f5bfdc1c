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
    ### BEGIN SOLUTION A6.1
    with torch.enable_grad():
        t = t.detach().clone().requires_grad_()
        slope = derivative(F(t), t)                               # F' = r f'
        bend = derivative(slope, t)                               # F'' = r f' + r^2 f''
    return (bend - slope).detach()
    ### END SOLUTION


def derivative(y, t):
    """d y.sum() / dt with a graph of its own; 0 where y does not depend on t (given: you may use it)."""
    found = torch.autograd.grad(y.sum(), t, create_graph=True, allow_unused=True)[0] if y.requires_grad else None
    return torch.zeros_like(t) if found is None else found


def f_of(h, r):
    """The f with r^2 f''(r) = h(r), f(1) = 0 and f'(1) = 0, at r (B,), between 0.001 and 1000; without autograd.

    h is elementwise, positive and continuous, and need not be smooth.  returns (B,), to a relative 1e-4
    """
    ### BEGIN SOLUTION A6.1
    step = torch.linspace(0, 1, 4001, dtype=r.dtype)
    s = r.log()[:, None] * step                                   # ln u from 0 to ln r: du / u^2 = exp(-s) ds
    u = s.exp()
    return torch.trapezoid((r[:, None] - u) * h(u) / u, s)
    ### END SOLUTION


def swapped(h):
    """The weight of the divergence with p and q exchanged, D_f(q || p), as a function of the same r = p / q."""
    ### BEGIN SOLUTION A6.1
    return lambda r: r * h(1 / r)
    ### END SOLUTION


def share_slope(F, a, b):
    """dD_f / db where p has the share a in one of two modes that do not overlap, q the share b; the modes are alike.

    F(t) = f(exp(t)), on tensors; a, b floats in (0, 1).  returns a float
    """
    ### BEGIN SOLUTION A6.1
    t = torch.tensor([math.log(a / b), math.log((1 - a) / (1 - b))], dtype=torch.float64, requires_grad=True)
    price = F(t) - derivative(F(t), t)                            # d[q f(p / q)] / dq = f - r f'
    return (price[0] - price[1]).item()
    ### END SOLUTION


# A6.2 Two Gaussians of unequal variance:  x = mean + std z


def tilted(k, p, q):
    """(ln E_q[r^k], mean, variance) of the density that is proportional to q r^k.  p, q (mean, variance); k any float.

    returns three floats, in closed form.  raises ValueError where E_q[r^k] is infinite
    """
    ### BEGIN SOLUTION A6.2
    (mp, vp), (mq, vq) = p, q
    precision = k / vp + (1 - k) / vq
    if precision <= 0:
        raise ValueError(f"E_q[r^{k:g}] is infinite")
    mean = (k * mp / vp + (1 - k) * mq / vq) / precision
    square = k * mp**2 / vp + (1 - k) * mq**2 / vq - precision * mean**2
    volume = k * math.log(vp) + (1 - k) * math.log(vq) + math.log(precision)
    return -(square + volume) / 2, mean, 1 / precision
    ### END SOLUTION


def power_slopes(k, p, q):
    """(dD_f / dmean, dD_f / dstd) of q, for h(r) = r^k, not normalised.  Two floats, in closed form."""
    ### BEGIN SOLUTION A6.2
    (mp, vp), (mq, vq) = p, q
    log_size, mean, var = tilted(k, p, q)
    tilt = 1 / vp - 1 / vq                                        # s_q - s_p = tilt x + rest
    rest = mq / vq - mp / vp
    by_std = tilt * (var + mean**2) + rest * mean - mq * (tilt * mean + rest)
    return math.exp(log_size) * (tilt * mean + rest), math.exp(log_size) * by_std / math.sqrt(vq)
    ### END SOLUTION


def effective_samples(k, p, q, n):
    """n (E_q h)^2 / E_q[h^2] for h = r^k: as many equal samples are n weighted ones worth.  0.0 where E_q[h^2] is infinite."""
    ### BEGIN SOLUTION A6.2
    try:
        return n * math.exp(2 * tilted(k, p, q)[0] - tilted(2 * k, p, q)[0])
    except ValueError:
        return 0.0
    ### END SOLUTION


def slopes(h, real, mean, std):
    """(dD_f / dmean, dD_f / dstd, E_q[h]) for any h and q = N(mean, std^2), by a sum over points.  Three floats, to 1e-5.

    real has .log_prob(x (N, 1)) -> (N,) and .score(x (N, 1), sigma (N,)) -> (N, 1), sigma = 0 for the clean density
    """
    ### BEGIN SOLUTION A6.2
    z = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    x = (mean + std * z)[:, None]
    log_q = -z**2 / 2 - math.log(std * math.sqrt(2 * math.pi))
    count = (-z**2 / 2).exp() / math.sqrt(2 * math.pi) * (z[1] - z[0])
    weight = count * h((real.log_prob(x) - log_q).exp())
    gap = -z / std - real.score(x, torch.zeros_like(z))[:, 0]
    return (weight * gap).sum().item(), (weight * gap * z).sum().item(), weight.sum().item()
    ### END SOLUTION


# A6.3 A ratio from logits


def log_ratio(logits, real_is_one, n_real, n_fake):
    """ln r (B,) from the logits (B,) of a critic that was trained to the optimum of a pooled logistic loss.

    The loss is one mean over n_real real and n_fake generated samples together, each with its label, 0 or 1.
    real_is_one: real samples have the label 1; else generated ones have.  A large logit says "label 1".
    """
    ### BEGIN SOLUTION A6.3
    return (logits if real_is_one else -logits) - math.log(n_real / n_fake)
    ### END SOLUTION


def place(sigma, low, high, bins):
    """Which of some bins, equally wide in log sigma from low to high, each sigma (B,) is in: (B,) int64, 0 ... bins - 1.

    Each bin holds its lower edge.  Below low is bin 0; high and above is the last one.
    """
    ### BEGIN SOLUTION A6.3
    edges = torch.linspace(math.log(low), math.log(high), bins + 1, dtype=torch.float64)[1:-1]
    return torch.bucketize(sigma.double().log(), edges, right=True)
    ### END SOLUTION


def running_means(means, ratio, where, rate):
    """The mean ratio of each bin (K,), averaged over batches:  rate * means + (1 - rate) * this batch's.

    means (K,) as they were; ratio (B,); where (B,) int64, the bin of each.  A bin without a sample keeps its mean.
    No graph: the batch is a constant.
    """
    ### BEGIN SOLUTION A6.3
    count = torch.zeros_like(means).index_add(0, where, torch.ones_like(ratio))
    batch = torch.zeros_like(means).index_add(0, where, ratio.detach()) / count.clamp(min=1)
    return torch.where(count > 0, rate * means + (1 - rate) * batch, means)
    ### END SOLUTION


def weights_of_batch(log_r, where, h, low=0.1, high=20.0):
    """h(r) over its mean (B,): r is cut to [low, high], then divided by its mean in its bin, then weighted.  No graph.

    log_r (B,) of any size; where (B,) int64, the bin of each sample; h elementwise
    """
    ### BEGIN SOLUTION A6.3
    ratio = log_r.detach().clamp(math.log(low), math.log(high)).exp()
    means = running_means(torch.ones(int(where.max()) + 1, dtype=ratio.dtype), ratio, where, 0.0)
    weight = h(ratio / means[where])
    return weight / weight.mean()
    ### END SOLUTION


def residual(slope, width):
    """Root mean square error of ln r that is left after centring, where the logit is ln r + slope * ln sigma, r = 1.

    One bin of that width, in ln sigma, with many samples spread evenly over it; nothing is cut.  returns a float
    """
    ### BEGIN SOLUTION A6.3
    rise = abs(slope) * width
    if rise < 1e-9:
        return 0.0
    return math.sqrt(rise**2 / 12 + math.log(math.sinh(rise / 2) / (rise / 2)) ** 2)
    ### END SOLUTION


# A6.4 The gradient, and p_fake from a batch


def f_gradient(x, sigma, noise, real, fake, logit, h):
    """The direction to descend for x (B, *S), a mean over n noises of each sample:  h / mean(h) times DMD's gradient.

    sigma (n, B), noise (n, B, *S).  real, fake (xt (N, *S), sigma (N,)) -> (N, *S) are denoisers; logit(xt, sigma) -> (N,)
    is ln r.  h elementwise, of r; its mean is over all n B.  DMD's gradient has the normaliser of eq. 8, from each copy of x.
    returns (B, *S) without a graph
    """
    ### BEGIN SOLUTION A6.4
    with torch.no_grad():
        many = x.expand(noise.shape).flatten(0, 1)                # (n B, *S)
        level = sigma.flatten()
        xt = add_noise(many, level, noise.flatten(0, 1))
        weight = h(logit(xt, level).exp())
        g = dmd_gradient(many, real(xt, level), fake(xt, level))
        return (expand(weight / weight.mean(), g) * g).view(noise.shape).mean(0)
    ### END SOLUTION


def leave_one_out(x, xt, sigma):
    """(ln p_fake(xt_i) (B,), E[x0 | xt_i] (B, *S)) where p_fake is the *other* samples of the batch, each N(x_j, sigma_i^2 I).

    x, xt (B, *S), sigma (B,); xt_i came from x_i.  Finite however far away the others are
    """
    ### BEGIN SOLUTION A6.4
    flat = x.flatten(1)
    square = (xt.flatten(1)[:, None] - flat).square().sum(2) / (2 * sigma[:, None] ** 2)         # (B, B)
    terms = -square.masked_fill(torch.eye(len(x), dtype=torch.bool), math.inf)
    volume = flat.shape[1] * (sigma.log() + math.log(2 * math.pi) / 2)
    density = terms.logsumexp(1) - math.log(len(x) - 1) - volume
    return density, (terms.softmax(1) @ flat).view(x.shape)
    ### END SOLUTION


def self_share(n, dim, s, sigma):
    """Which share of the expected kernel density at xt is the sample's own kernel, if it is not left out.  A float.

    n samples of N(0, s^2 I) in dim dimensions, the kernels N(x_j, sigma^2 I), xt_i = x_i + sigma noise.
    share = E[own kernel] / E[sum of all n kernels], finite for dim = 3072, too
    """
    ### BEGIN SOLUTION A6.4
    own = -dim / 2 * math.log(sigma**2)                           # both without (4 pi)^(-dim / 2)
    others = math.log(n - 1) - dim / 2 * math.log(s**2 + sigma**2)
    return torch.sigmoid(torch.tensor(own - others, dtype=torch.float64)).item()
    ### END SOLUTION


# A6.5 Name the mistake

VERDICTS = ("right", "wrong sign", "other noise", "one mean", "not normalised", "graph")


def other_noise_correlation(p, q, sigma, other):
    """Correlation of ln r at x + sigma e with ln r at x + other e', x from q, e and e' independent: a float.

    p, q (mean, variance) of the clean densities, on a line, not the same; each ln r is that of the densities noised at its level
    """
    ### BEGIN SOLUTION A6.5
    def parts(level):
        """ln r = const + line u + bow (u^2 - 1) in u = (xt - mean of q) / std of xt."""
        vp, vq = p[1] + level**2, q[1] + level**2
        return math.sqrt(vq) * (p[0] - q[0]) / vp, (1 - vq / vp) / 2

    (line, bow), (line2, bow2) = parts(sigma), parts(other)
    rho = q[1] / math.sqrt((q[1] + sigma**2) * (q[1] + other**2))
    both = line * line2 * rho + 2 * bow * bow2 * rho**2
    return both / math.sqrt((line**2 + 2 * bow**2) * (line2**2 + 2 * bow2**2))
    ### END SOLUTION


def diagnose(weigh):
    """One of VERDICTS, from experiments with weigh(x, sigma, noise, logit, h) -> (B,), which may have one mistake.

    Right is r = exp(logit(xt, sigma)) at xt = x + sigma noise, cut to [0.1, 20], divided by its mean in ten bins of log
    sigma (nano_dmd.f_distill.centred); h of that over its mean; no graph.  You choose all arguments (handout, A6.5).
    """
    ### BEGIN SOLUTION A6.5
    x = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None].requires_grad_()
    sigma = torch.tensor([0.1] * 4 + [10.0] * 4, dtype=torch.float64)
    noise = x.detach().flip(0) + 0.5
    log_r = torch.tensor([-0.5, 0.0, 0.5, 1.0, 0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
    asked = []

    def logit(xt, level):
        asked.append(torch.cat([xt.detach()[:, 0], level.detach()]))
        return log_r + 0 * xt.sum(1)

    got = weigh(x, sigma, noise, logit, lambda r: 2 * r)
    if got.requires_grad:
        return "graph"
    if any((seen - torch.cat([(x + sigma[:, None] * noise)[:, 0], sigma])).abs().max() > 1e-9 for seen in asked):
        return "other noise"
    for verdict, values in (("right", log_r), ("wrong sign", -log_r)):
        want = centred(values.exp().clamp(0.1, 20), sigma)
        if torch.allclose(got, want / want.mean()):
            return verdict
    return "not normalised" if abs(got.mean() - 1) > 1e-6 else "one mean"
    ### END SOLUTION

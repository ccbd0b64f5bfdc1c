"""What A1 is graded by: closed forms, quadrature and autograd in float64, no training and no sampling error."""

import functools
import math

import numpy as np
import torch
from torch.distributions import Normal, kl_divergence

from toy.mixtures import Mixture
from tutorials.assignments.checking import Assignment, close, gradient, holds, tensor


def constants(rng):
    def between(low, high):
        return round(rng.uniform(low, high), 3)

    return dict(
        b=between(0.35, 0.8), sigmas=[between(0.1, 0.4), between(0.5, 1.0), between(1.2, 2.0)], far=between(60, 120),
        means=[between(-1.5, -0.7), between(0.6, 1.4)], stds=[between(0.3, 0.5), between(0.5, 0.8)], share=between(0.25, 0.75),
        sigma=between(0.35, 0.7), a=between(0.5, 0.8), narrow=between(0.1, 0.4), wide=between(1.5, 3.0), s=between(0.7, 1.2),
        powers=[between(0.5, 1.5), 2.0, between(2.5, 3.5)], value=between(1, 9), scale=between(0.3, 3))


A = Assignment("a1", "Scores and the DMD gradient", constants, {
    "A1.1": "the score of a Laplace density", "A1.2": "Tweedie for any density", "A1.3": "the DMD gradient of another divergence",
    "A1.4": "a loss with a given gradient", "A1.5": "predict, then measure"})


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def mixture_1d(c):
    return Mixture([[m] for m in c.means], c.stds, [c.share, 1 - c.share]).to(torch.float64)


def mixture_2d(c):
    (low, high), (narrow, wide) = c.means, c.stds
    means, weights = [[low, 0.2], [high, low / 2], [0.1, high]], [c.share, 1 - c.share, 0.5]
    return Mixture(means, [narrow, wide, c.sigma], weights).to(torch.float64)


# ---- A1.1 -------------------------------------------------------------------------------------------------


@functools.cache
def rule(nodes=200):
    """Gauss-Legendre nodes and weights on [-1, 1]."""
    return [torch.tensor(v) for v in np.polynomial.legendre.leggauss(nodes)]


def half_line(x, b, sigma):
    """Points x0 >= 0 and the log of quadrature weight * Laplace(x0; b) * N(x; x0, sigma^2), where that is not negligible.

    The exponent is a parabola around x - sigma^2/b, or falls from its edge at 0 within sigma^2 / |x - sigma^2/b|.
    """
    peak = x - sigma**2 / b
    low = max(0.0, peak - 14 * sigma)
    high = peak + 14 * sigma if peak > 0 else min(14 * sigma, 60 * sigma**2 / max(-peak, 1e-300))
    t, w = rule()
    x0 = low + (high - low) * (t + 1) / 2
    log_w = (w * (high - low) / 2).log() - math.log(2 * b)
    return x0, log_w - x0 / b - (x - x0) ** 2 / (2 * sigma**2) - math.log(2 * math.pi * sigma**2) / 2


def integrate(x, b, sigma):
    """(log p_sigma(x), E[x0 | x]) of one number x by Gauss-Legendre on both sides of the kink, summed in log space."""
    (right, log_right), (left, log_left) = half_line(x, b, sigma), half_line(-x, b, sigma)
    logs, x0 = torch.cat([log_right, log_left]), torch.cat([right, -left])
    return logs.logsumexp(0), (logs.softmax(0) * x0).sum()


def integrals(x, b, sigma):
    """The same for x (B, D) and sigma (B,): log densities and posterior means, (B, D) each."""
    both = [integrate(v, b, s) for row, s in zip(x.tolist(), sigma.tolist()) for v in row]
    return torch.stack([p for p, _ in both]).reshape(x.shape), torch.stack([m for _, m in both]).reshape(x.shape)


def middle(c, dim):
    """x (12, dim) within a few scales of the kink, sigma (12,)."""
    return 2 * c.b * c.noise(12, dim), vector(*c.sigmas).repeat(4)


@A.check("A1.1", points=5)
def laplace_density(student, c):
    """The log density is that of the convolution integral."""
    x, sigma = middle(c, 1)
    close(student.laplace_log_prob(x, c.b, sigma), integrals(x, c.b, sigma)[0][:, 0], "log p_sigma(x)", rtol=1e-8,
          hint="an error that is the same for every x of one sigma is a missing constant, in b or in sigma")


@A.check("A1.1", points=3)
def laplace_coordinates(student, c):
    """Coordinates are independent, and each sample has its own sigma."""
    x, sigma = middle(c, 3)
    close(student.laplace_log_prob(x, c.b, sigma), integrals(x, c.b, sigma)[0].sum(1), "log p_sigma of a point in 3D", rtol=1e-8,
          hint="the density of independent coordinates is a product")


@A.check("A1.1", points=5)
def laplace_density_far(student, c):
    """The log density stays exact where exp() cannot follow: far out, little noise, much noise."""
    x, sigma = vector(c.far, -c.far, 8.0, 1000, 40 * c.b)[:, None], vector(1, 1, 0.004, 0.02, 20 * c.b)
    close(student.laplace_log_prob(x, c.b, sigma), integrals(x, c.b, sigma)[0][:, 0], "log p_sigma(x) far out", rtol=1e-8,
          hint="stay in log space from the first to the last operation")


@A.check("A1.1", points=6)
def laplace_posterior(student, c):
    """The denoiser is the posterior mean."""
    x, sigma = middle(c, 3)
    close(student.laplace_denoise(x, c.b, sigma), integrals(x, c.b, sigma)[1], "E[x0 | xt]", rtol=1e-7,
          hint="Tweedie's formula, with a noise level for each sample; the prior pulls towards 0")


@A.check("A1.1", points=6)
def laplace_posterior_far(student, c):
    """The denoiser stays exact far out, with little noise and with much noise."""
    x = vector(c.far, -c.far, 8.0, -0.01, 1000, 15 * c.b)[:, None]
    sigma = vector(1, 1, 0.004, 0.004, 0.02, 15 * c.b)
    got = tensor(student.laplace_denoise(x, c.b, sigma), x.shape, "E[x0 | xt] far out")
    close(got, integrals(x, c.b, sigma)[1], "E[x0 | xt] far out", rtol=1e-6,
          hint="far from 0 the right answer is x moved towards 0 by sigma^2 / b, and no 0/0")


# ---- A1.2 -------------------------------------------------------------------------------------------------


def plane(c, n=8):
    """A mixture in 2D with points and noise levels."""
    return mixture_2d(c), 1.3 * c.noise(n, 2), torch.linspace(0.3, 1.6, n, dtype=torch.float64) * c.sigma


@A.check("A1.2", points=6)
def tweedie(student, c):
    """From the log density of a mixture comes its exact denoiser."""
    known, x, sigma = plane(c)
    close(student.denoiser_of(known.log_prob)(x, sigma), known.denoise(x, sigma), "the denoiser", rtol=1e-9,
          hint="x + sigma^2 * score, with the score of each sample alone")


@A.check("A1.2", points=4)
def tweedie_without_graph(student, c):
    """It works on images, inside torch.no_grad(), and leaves x as it was."""
    mean, var = c.noise(2, 3, 3), c.s * (0.5 + c.noise(2, 3, 3) ** 2)
    x, sigma = c.noise(4, 2, 3, 3), vector(0.2, 0.5, 1, 2)

    def log_prob(x, sigma):
        return -((x - mean) ** 2 / (var + sigma[:, None, None, None] ** 2) / 2).flatten(1).sum(1)

    before, square = x.clone(), sigma[:, None, None, None] ** 2
    with torch.no_grad():
        got = student.denoiser_of(log_prob)(x, sigma)
    close(got, (var * x + square * mean) / (var + square), "the denoiser of a Gaussian on images", rtol=1e-9)
    holds(not got.requires_grad, "inside torch.no_grad() the result should carry no graph")
    holds(torch.equal(x, before) and not x.requires_grad and x.grad is None,
          "the caller's x has changed: its values, its requires_grad or its .grad")


@A.check("A1.2", points=4)
def tweedie_twice(student, c):
    """Its result is differentiable in x, through the score too."""
    known, x, sigma = plane(c)
    x, towards = x.requires_grad_(), c.noise(*x.shape)
    got = gradient(student.denoiser_of(known.log_prob)(x, sigma) * towards, x, "the denoiser's result")
    close(got, gradient(known.denoise(x, sigma) * towards, x, ""), "the denoiser's derivative in x", rtol=1e-8,
          hint="if it is the derivative of x alone, the score came without a graph of its own")


@A.check("A1.2", points=6)
def covariance(student, c):
    """The posterior covariance of a mixture, from its denoiser."""
    known, x, sigma = plane(c)
    var, away = known.std**2 + sigma[:, None] ** 2, x[:, None] - known.means          # (B, K), (B, K, 2)
    share = (known.weights.log() - away.square().sum(2) / (2 * var) - var.log()).softmax(1)
    shrink = known.std**2 / var                                   # the posterior: Gaussians share_k N(means_k, shrink_k sigma^2)
    means = known.means + shrink[:, :, None] * away
    off = means - (share[:, :, None] * means).sum(1, keepdim=True)
    within = ((share * shrink).sum(1) * sigma**2)[:, None, None] * torch.eye(2, dtype=torch.float64)
    want = within + torch.einsum("bk,bki,bkj->bij", share, off, off)
    close(student.posterior_covariance(known, x, sigma), want, "Cov[x0 | xt]", rtol=1e-8,
          hint="one Jacobian per sample, entry (i, j) the derivative of output i in input j, and its relation to the covariance")


# ---- A1.3 -------------------------------------------------------------------------------------------------

GRID = torch.linspace(-14, 14, 5601, dtype=torch.float64)


def divergence(name, log_p, log_q):
    """D(p_real, p_fake) by its definition, from log densities on GRID."""
    p, q, log_m = log_p.exp(), log_q.exp(), torch.logaddexp(log_p, log_q) - math.log(2)
    integrand = {"reverse_kl": q * (log_q - log_p), "forward_kl": p * (log_p - log_q),
                 "js": (p * (log_p - log_m) + q * (log_q - log_m)) / 2,
                 "hellinger": ((log_p / 2).exp() - (log_q / 2).exp()) ** 2}[name]
    return torch.trapezoid(integrand, GRID)


def slope(name, real, a, sigma):
    """d/da of that divergence between a mixture and N(0, a^2), both noised: quadrature, then autograd."""
    a = vector(a).requires_grad_()
    log_q = Normal(vector(0), (a**2 + sigma**2).sqrt()).log_prob(GRID)
    return torch.autograd.grad(divergence(name, real.log_prob(GRID[:, None], sigma), log_q), a)[0].squeeze()


def check_weights(student, c, names):
    real, sigma, a = mixture_1d(c), c.sigma, c.a
    var = a**2 + sigma**2
    fake = Normal(vector(0), vector(var).sqrt())
    log_r = real.log_prob(GRID[:, None], sigma) - fake.log_prob(GRID)
    s_real = real.score(GRID[:, None], GRID.new_full(GRID.shape, sigma))[:, 0]
    moved = a * GRID / var                                        # E[dx/da | xt] of x = a z: its posterior mean / a
    for name in names:
        h = tensor(student.log_weight(log_r, name), log_r.shape, f"log_weight(log_r, {name!r})").detach().exp()
        got = torch.trapezoid(fake.log_prob(GRID).exp() * h * (-GRID / var - s_real) * moved, GRID)
        close(got, slope(name, real, a, sigma), f"the derivative of {name} that this weight gives, E[h (s_fake - s_real) dx/da],",
              rtol=1e-6, hint="h(r) = r^2 f''(r) with f of the handout's table and r = p_real / p_fake")


@A.check("A1.3", points=4)
def weights_kl(student, c):
    """Forward and reverse KL: with the weight h, the gradient is the derivative of the divergence."""
    check_weights(student, c, ["reverse_kl", "forward_kl"])


@A.check("A1.3", points=4)
def weights_js(student, c):
    """Jensen-Shannon and Hellinger: the same, constant factors included."""
    check_weights(student, c, ["js", "hellinger"])


@A.check("A1.3", points=3)
def weights_far(student, c):
    """Log weights are finite, and right, at density ratios of exp(+-2000)."""
    log_r = vector(-2000, 2000) + c.scale
    for name in ("reverse_kl", "forward_kl", "js", "hellinger"):
        low, high = tensor(student.log_weight(log_r, name), log_r.shape, f"log_weight(log_r, {name!r}) far out").tolist()
        rise = dict(reverse_kl=0, forward_kl=4000, js=2000 - c.scale, hellinger=2000)[name]    # js levels off at r = 1
        close(high - low, rise, f"the rise of log h between log r = {log_r[0]:g} and {log_r[1]:g} for {name}", rtol=1e-9)


@A.check("A1.3", points=4)
def gradient_normaliser(student, c):
    """With equal weights it is DMD's gradient, normalised image by image, and finite where x = d_real."""
    x, d_real, d_fake = c.noise(3, 2, 4, 4), c.noise(3, 2, 4, 4), c.noise(3, 2, 4, 4)
    x[1], x[2] = 10 * c.scale * x[1], d_real[2]
    want = [(d_fake[i] - d_real[i]) / max((x[i] - d_real[i]).abs().mean().item(), 1e-5) for i in range(3)]
    close(student.weighted_gradient(x, d_real, d_fake, torch.full((3,), c.scale, dtype=torch.float64)), torch.stack(want),
          "g under equal weights", rtol=1e-9, hint="eq. 8 divides each image by its own mean |x - d_real|; h / mean(h) is 1 here")


@A.check("A1.3", points=5)
def gradient_weights(student, c):
    """One weight per sample, with mean 1 over the batch, also for huge ratios; and no graph."""
    x, d_real, d_fake = (c.noise(4, 3) for _ in range(3))
    ratio = vector(1, 2 + c.scale, 0.5, 0)
    log_h = (ratio.log() + 1000).requires_grad_()
    plain = (d_fake - d_real) / (x - d_real).abs().mean(1, keepdim=True)
    got = student.weighted_gradient(x.requires_grad_(), d_real, d_fake.requires_grad_(), log_h)
    close(got, ratio[:, None] / ratio.mean() * plain, "g under weights of exp(1000)", rtol=1e-9,
          hint="each sample has the weight h / mean(h) over the batch, which is finite even where h is not")
    holds(not got.requires_grad, "g is a direction, a constant: it should carry no graph, whatever its inputs carry")


# ---- A1.4 -------------------------------------------------------------------------------------------------


def weighted_case(c):
    """x with grad, g, weights that do not sum to one."""
    return c.noise(4, 2, 3, 3).requires_grad_(), c.scale * c.noise(4, 2, 3, 3), vector(1, c.scale, 0.25, 3)


def holds_constant(loss, *constants):
    """Fail where a gradient other than 0 flows from loss into one of the constants."""
    found = torch.autograd.grad(loss, constants, allow_unused=True)
    holds(all(v is None or not v.any() for v in found), "gradient flows into an input other than x: those are constants here")


@A.check("A1.4", points=4)
def weighted_field(student, c):
    """The gradient at x is the field, weighted by sample; g and weight get none."""
    x, g, weight = weighted_case(c)
    loss = tensor(student.weighted_loss(x, g.requires_grad_(), weight.requires_grad_()), (), "weighted_loss")
    want = (weight / weight.sum())[:, None, None, None] * g
    close(gradient(loss, x, "weighted_loss"), want, "d loss / dx", rtol=1e-9, hint="sum over pixels, weighted mean over samples")
    holds_constant(student.weighted_loss(x, g, weight), g, weight)


@A.check("A1.4", points=3)
def weighted_value(student, c):
    """The value is half the weighted mean of |g|^2."""
    x, g, weight = weighted_case(c)
    want = (weight / weight.sum() * g.flatten(1).square().sum(1)).sum() / 2
    close(student.weighted_loss(x, g, weight), want, "the value", rtol=1e-9)


@A.check("A1.4", points=4)
def weighted_broken(student, c):
    """A sample of weight 0 is left out, even if its g is not finite."""
    x, g, weight = weighted_case(c)
    weight[1], weight[3], g[1, 0, 0, 0], g[3] = 0, 0, math.nan, math.inf
    loss = student.weighted_loss(x, g, weight)
    want = (weight / weight.sum())[:, None, None, None] * g.where(weight[:, None, None, None] > 0, 0)
    close(loss, (want * g.nan_to_num(0, 0, 0)).sum() / 2, "the value without the broken samples", rtol=1e-9,
          hint="0 times NaN is NaN, and 0 times infinity too")
    close(gradient(loss, x, "weighted_loss"), want, "d loss / dx without the broken samples", rtol=1e-9)


@A.check("A1.4", points=4)
def given_value(student, c):
    """loss_with_value: the value to the last digit, the gradient g / x.numel(), nothing into g and value."""
    x, g, _ = weighted_case(c)
    large = (1e9 * x.detach()).requires_grad_()
    value = torch.tensor(c.value, dtype=torch.float64, requires_grad=True)
    loss = student.loss_with_value(large, g.requires_grad_(), value)
    off = abs(tensor(loss, (), "loss_with_value").item() - c.value)
    holds(off <= 1e-14 * c.value, f"at x of size 1e9 the value is off by {off:.1e}: to add a large number and take it off again "
          "costs digits, unless the difference comes first")
    close(gradient(loss, large, "loss_with_value"), g / x.numel(), "d loss / dx", rtol=1e-9)
    holds_constant(student.loss_with_value(x, g, value), g, value)
    close(student.loss_with_value(x, g, c.value), c.value, "the value, given as a float", rtol=1e-14, atol=0)


# ---- A1.5 -------------------------------------------------------------------------------------------------


def gaussian_slopes(name, a, s, sigma):
    """d/da of the KL between N(0, a^2 + sigma^2) and N(0, s^2 + sigma^2), by autograd; sigma (N,)."""
    width = torch.full_like(sigma, a).requires_grad_()
    fake, real = (Normal(torch.zeros_like(sigma), (w**2 + sigma**2).sqrt()) for w in (width, torch.full_like(sigma, s)))
    value = kl_divergence(fake, real) if name == "reverse_kl" else kl_divergence(real, fake)
    return torch.autograd.grad(value.sum(), width)[0]


def check_slopes(student, c, name):
    for a in (c.narrow, c.wide):
        want = gaussian_slopes(name, a, c.s, vector(c.sigma))
        pair = student.kl_slopes(a, c.s, c.sigma)
        holds(isinstance(pair, (tuple, list)) and len(pair) == 2, "kl_slopes should return two floats, reverse KL first")
        close(float(pair[name == "forward_kl"]), want[0], f"d/da of {name} at a = {a}, s = {c.s}, sigma = {c.sigma}", rtol=1e-8,
              hint="the derivative in a, not in a^2, of a KL between variances a^2 + sigma^2 and s^2 + sigma^2")


@A.check("A1.5", points=3)
def slope_reverse(student, c):
    """The slope of the reverse KL, for a generator too narrow and one too wide."""
    check_slopes(student, c, "reverse_kl")


@A.check("A1.5", points=3)
def slope_forward(student, c):
    """The slope of the forward KL, for both."""
    check_slopes(student, c, "forward_kl")


def peak(name, a, s, power):
    """argmax over sigma of sigma^power |slope|, on a grid of log sigma that is refined around the best point."""
    low, high = math.log(min(a, s)) - 6, math.log(max(a, s)) + 6
    for _ in range(5):
        logs = torch.linspace(low, high, 801, dtype=torch.float64)
        best = logs[(power * logs + gaussian_slopes(name, a, s, logs.exp()).abs().log()).argmax()].item()
        low, high = best - (high - low) / 50, best + (high - low) / 50
    return math.exp(best)


@A.check("A1.5", points=5)
def peaks(student, c):
    """The loudest noise level of both, for several powers."""
    for name in ("reverse_kl", "forward_kl"):
        for a in (c.narrow, c.wide):
            for power in c.powers:
                close(float(student.loudest_sigma(a, c.s, power, name)), peak(name, a, c.s, power),
                      f"the loudest sigma of {name} at a = {a}, s = {c.s}, power = {power}", rtol=1e-4,
                      hint="maximise over v = sigma^2; the slope is that of the noised densities")


def decays(a, s, sigma):
    """Does p_real^2 / p_fake fall at a distance?  Its log is a parabola: compare two points."""
    fake, real = (Normal(vector(0), (vector(w) ** 2 + sigma**2).sqrt()) for w in (a, s))
    near, away = (2 * real.log_prob(vector(v)) - fake.log_prob(vector(v)) for v in (0, 1))
    return bool(away < near)


@A.check("A1.5", points=3)
def variance(student, c):
    """The noise level above which the ratio has a finite variance."""
    for a in (c.narrow, 0.9 * c.s, c.wide):
        low, high = 0.0, 10.0                                     # bisection: decays at high, not at low unless everywhere
        for _ in range(0 if decays(a, c.s, 0.0) else 60):
            low, high = (low, (low + high) / 2) if decays(a, c.s, (low + high) / 2) else ((low + high) / 2, high)
        close(float(student.lowest_sigma(a, c.s)), low, f"the lowest sigma at a = {a:g}, s = {c.s}", rtol=1e-5,
              hint="E_fake[r^2] is the integral of p_real^2 / p_fake: when is there one?")


def hermite(n=60):
    """z, noise (n^2, 1) and their probabilities: a Gauss-Hermite rule for two independent unit normals."""
    t, w = np.polynomial.hermite_e.hermegauss(n)
    t, w = torch.tensor(t), torch.tensor(w / w.sum())
    z, noise = torch.cartesian_prod(t, t).split(1, dim=1)
    return z, noise, torch.outer(w, w).flatten()


def check_measured(student, c, name, weight):
    real, fake = mixture_1d(c), Mixture([[0.0]], c.a).to(torch.float64)
    a = fake.std.item()                                           # c.a as a Mixture holds it, rounded to float32
    got = student.measured_slope(*hermite(), a, c.sigma, real, fake, weight)
    close(got, slope(name, real, a, c.sigma), f"the measured slope of {name}", rtol=1e-5, atol=1e-7,
          hint="scores, not denoisers, at xt; r is p_real over p_fake there; share takes the place of 1/N")


@A.check("A1.5", points=6)
def measured(student, c):
    """The measured slope, at quadrature nodes: reverse KL, Jensen-Shannon and Hellinger, to a mixture."""
    check_measured(student, c, "reverse_kl", torch.ones_like)
    check_measured(student, c, "js", lambda log_r: log_r.sigmoid() / 2)
    check_measured(student, c, "hellinger", lambda log_r: (log_r / 2).exp() / 2)

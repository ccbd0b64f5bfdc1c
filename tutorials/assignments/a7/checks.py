"""Checks of assignment 7, in float64: definitions written out sample by sample, Gauss-Hermite sums of linear denoisers, exact
mixtures, torch.distributions, and numerical integration.
"""

import math
from itertools import product

import numpy as np
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from toy.mixtures import Mixture
from tutorials.assignments.checking import Assignment, close, gradient, holds, tensor


def constants(rng):
    u = rng.uniform
    s, tau, sigma = u(0.5, 1.1), u(0.6, 1.2), u(0.4, 1.0)
    match, aug = (sigma, u(1.6, 2.6) * sigma, u(3, 5)), (u(0.2, 0.4) * sigma, u(0.6, 0.9) * sigma)
    return dict(s=s, tau=tau, sigma=sigma, match=match, aug=aug,
                w=u(1.5, 6.0), k=u(1.5, 3.0), m=u(0.6, 1.3), floor=u(0.05, 0.2), lr=u(0.02, 0.1), shift=u(2.0, 5.0),
                t_step=u(0.5, 0.9), least=u(0.01, 0.04), level=u(1.5, 6.0), share=u(0.3, 0.7), shade=u(-0.3, 0.3),
                contrast=u(0.4, 1.5), scale=u(0.3, 3.0))


A = Assignment("a7", "Guidance split out of DMD", constants, {
    "A7.1": "the split, and the classifier in it",
    "A7.2": "the gradient and its normalisers",
    "A7.3": "noise below the level of the step",
    "A7.4": "where the parts come to rest",
    "A7.5": "other coordinates, other people's code"})


# ---- what the checks are built from ---------------------------------------------------------------------------------


def float64(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def classes(c):
    """Three classes in the plane, four blobs, unequal widths and weights; a Denoiser with labels."""
    labels = torch.tensor([0, 1, 1, 2])
    means = [[-0.6, 0.3], [0.5, c.shade], [0.2, 0.9], [-0.1, -0.8]]
    return Mixture(means, [0.3, 0.4, c.s / 2, 0.35], [c.share, 0.4, 0.3, 0.5], labels).to(torch.float64)


def log_odds(known, xt, sigma, cond):
    """log p(cond | xt) of a Mixture at noise sigma, blob by blob from the densities of Normal."""
    rows = []
    for mean, std, weight in zip(known.means, known.std, known.weights):
        rows.append(weight.log() + Normal(mean, (std**2 + sigma[:, None] ** 2).sqrt()).log_prob(xt).sum(1))
    logs, own = torch.stack(rows, 1), known.labels[None] == cond[:, None]
    return logs.masked_fill(~own, -math.inf).logsumexp(1) - logs.logsumexp(1)


def several(c, n=9):
    """Points in the plane, a noise level and a class for each."""
    return 0.8 * c.noise(n, 2), c.sigma * torch.linspace(0.6, 2.5, n, dtype=torch.float64), torch.arange(n) % 3


# ---- A7.1  the split ------------------------------------------------------------------------------------------------


def four(c):
    return [c.noise(5, 2, 3, 3) for _ in range(4)]


def three_parts(student, *args):
    parts = student.split(*args)
    holds(isinstance(parts, (tuple, list)) and len(parts) == 3, "split should return three tensors: matching, augmentation, own")
    return [tensor(p, args[0].shape, what) for p, what in zip(parts, ("matching", "augmentation", "own"))]


@A.check("A7.1", points=3)
def the_parts_add_up(student, c):
    """The three parts sum to the bracket with guidance on both sides, for every w and k."""
    d_cond, d_uncond, f_cond, f_uncond = four(c)
    for w, k in ((1.0, 1.0), (c.w, 1.0), (c.w, c.k), (1.0, 0.0), (0.0, c.k)):
        fake, real = k * f_cond + (1 - k) * f_uncond, w * d_cond + (1 - w) * d_uncond
        close(sum(three_parts(student, d_cond, d_uncond, f_cond, f_uncond, w, k)), fake - real,
              f"the sum of the parts at w = {w:.3g}, k = {k:.3g}", hint="guided fake minus guided teacher")


@A.check("A7.1", points=4)
def each_part_knows_its_own(student, c):
    """Augmentation does not know the fake score, `own` not the teacher, and matching neither w nor k."""
    d_cond, d_uncond, f_cond, f_uncond = four(c)
    other = four(c)
    match, push, own = three_parts(student, d_cond, d_uncond, f_cond, f_uncond, c.w, c.k)
    moved = three_parts(student, d_cond, other[1], f_cond, other[3], 1.0, 0.0)[0]
    close(moved, match, "matching with other d_uncond, f_uncond, w and k")
    close(three_parts(student, d_cond, d_uncond, other[2], other[3], c.w, 0.0)[1], push, "augmentation with another fake score")
    close(three_parts(student, other[0], other[1], f_cond, f_uncond, 0.0, c.k)[2], own, "`own` with another teacher")
    close(three_parts(student, d_cond, d_uncond, d_cond, f_uncond, c.w, c.k)[0], 0 * d_cond, "matching where f_cond = d_cond")
    close(three_parts(student, d_cond, d_uncond, f_cond, f_uncond, 1.0, 1.0)[1], 0 * d_cond, "augmentation at w = 1")
    close(three_parts(student, d_cond, d_uncond, f_cond, f_uncond, c.w, 1.0)[2], 0 * d_cond, "`own` at k = 1")


@A.check("A7.1", points=4)
def augmentation_from_a_classifier(student, c):
    """From the class probabilities of a mixture comes the difference of its denoisers, one sigma per sample."""
    known, (xt, sigma, cond) = classes(c), several(c)
    for w in (0.0, 1.0, c.w):
        got = student.classifier_augmentation(lambda v: log_odds(known, v, sigma, cond), xt, sigma, w)
        close(got, (1 - w) * (known(xt, sigma, cond) - known(xt, sigma)), f"the augmentation at w = {w:.3g}", rtol=1e-8,
              hint="Tweedie's formula for both denoisers, then Bayes' rule; the gradient of each sample's own log p")


@A.check("A7.1", points=3)
def a_good_citizen(student, c):
    """It works on images, inside torch.no_grad(), and leaves xt as it was."""
    xt, tilt, bend = c.noise(3, 2, 4, 4), c.noise(2, 4, 4), c.noise(2, 4, 4)
    sigma, before = float64(0.3, 1.0, c.level), xt.clone()
    with torch.no_grad():
        got = student.classifier_augmentation(lambda v: (tilt * v - bend * v**2).flatten(1).sum(1), xt, sigma, c.w)
    want = torch.stack([(1 - c.w) * sigma[i] ** 2 * (tilt - 2 * bend * xt[i]) for i in range(3)])
    close(got, want, "the augmentation of a quadratic classifier on images", hint="sigma^2, and each image has its own")
    holds(not got.requires_grad, "the result should carry no graph")
    holds(torch.equal(xt, before) and not xt.requires_grad and xt.grad is None,
          "the caller's xt has changed: its values, its requires_grad or its .grad")


@A.check("A7.1", points=4)
def classifier_from_denoisers(student, c):
    """The line integral of the two denoisers' difference is the change of the mixture's own log probability."""
    known, (start, sigma, cond) = classes(c), several(c)
    end = start.flip(0) + 0.3 * c.noise(9, 2)
    want = log_odds(known, end, sigma, cond) - log_odds(known, start, sigma, cond)
    close(student.log_posterior_change(known, start, end, sigma, cond), want, "the change of log p(cond | xt)", atol=1e-7,
          hint="d/dq log p(start + q (end - start)) is the gradient times (end - start); the integral over q is from 0 to 1")
    close(student.log_posterior_change(known, end, start, sigma, cond), -want, "the change on the way back", rtol=1e-6, atol=1e-7)


@A.check("A7.1", points=2)
def classifier_of_prompts(student, c):
    """For prompts that are numbers it is a difference of two parabolas."""
    start, end = 2 * c.noise(2, 7, 1)
    cond, sigma = c.noise(7, 1), c.sigma * torch.linspace(0.4, 2, 7, dtype=torch.float64)
    var, whole = c.s**2 + sigma[:, None] ** 2, c.s**2 + c.tau**2 + sigma[:, None] ** 2

    def denoiser(xt, sigma, cond):
        mean, prior = (0.0, c.s**2 + c.tau**2) if cond is None else (cond, c.s**2)
        return (prior * xt + sigma[:, None] ** 2 * mean) / (prior + sigma[:, None] ** 2)

    log_p = lambda xt: (Normal(cond, var.sqrt()).log_prob(xt) - Normal(0.0, whole.sqrt()).log_prob(xt))[:, 0]
    close(student.log_posterior_change(denoiser, start, end, sigma, cond), log_p(end) - log_p(start),
          "the change of log p(cond | xt) for Gaussian prompts", rtol=1e-6, atol=1e-7)


# ---- A7.2  the gradient and its normalisers -------------------------------------------------------------------------


@A.check("A7.2", points=4)
def own_normaliser(student, c):
    """Each image is divided by its own mean |x - d_cond|, held at the floor; zero at w = 1; no graph."""
    x, d_cond, d_uncond = (c.noise(4, 2, 3, 3) for _ in range(3))
    x[1], x[2] = 10 * c.scale * x[1], d_cond[2]
    for w in (1.0, 0.0, c.w):
        want = [(1 - w) * (d_cond[i] - d_uncond[i]) / max((x[i] - d_cond[i]).abs().mean().item(), c.floor) for i in range(4)]
        got = student.augmentation_step(x.clone().requires_grad_(), d_cond.clone().requires_grad_(), d_uncond, w, c.floor)
        close(got, torch.stack(want), f"the step at w = {w:.3g}", rtol=1e-9, hint="w - 1; one mean per sample, at least floor")
        holds(not got.requires_grad, "the step is a constant: it should carry no graph, whatever its inputs carry")


class Recorder(nn.Module):
    """A conditional Denoiser with a weight, which remembers how it was asked."""

    def __init__(self, known, weight):
        super().__init__()
        self.known, self.weight, self.asked = known, nn.Parameter(float64(weight)[0]), []

    def forward(self, xt, sigma, cond=None):
        self.asked.append((xt.detach().clone(), sigma, cond))
        return self.weight * self.known(xt, sigma, cond)


def training_case(c):
    """x with a graph, a teacher and a fake score with weights, two noisings."""
    x, sigma, cond = several(c)
    x, real, fake = x.requires_grad_(), Recorder(classes(c), 1.0), Recorder(Mixture(
        [[-0.3, 0.2], [0.4, c.shade], [0.1, -0.5]], 0.5, labels=torch.arange(3)).to(torch.float64), 0.9)
    return x, real, fake, cond, (sigma, c.noise(9, 2)), (0.4 * sigma.flip(0), c.noise(9, 2))


def two_steps(c, x, real, fake, cond, above, below, w, floor):
    """The two directions, sample by sample."""
    pulls, pushes = [], []
    for i in range(len(x)):
        (s, n), (l, o), at = *((v[0][i : i + 1], v[1][i]) for v in (above, below)), cond[i : i + 1]
        xa, xb, point = (x[i] + s * n)[None], (x[i] + l * o)[None], x[i].detach()
        c_a, c_b, u_b, f_a = real(xa, s, at)[0], real(xb, l, at)[0], real(xb, l)[0], fake(xa, s, at)[0]
        pulls.append((f_a - c_a).detach() / max((point - c_a).abs().mean().item(), floor))
        pushes.append((1 - w) * (c_b - u_b).detach() / max((point - c_b).abs().mean().item(), floor))
    return torch.stack(pulls), torch.stack(pushes)


@A.check("A7.2", points=5)
def gradient_at_x(student, c):
    """The gradient at x is the sum of both directions, each at its own noise and over its own normaliser."""
    case = training_case(c)
    x, real, fake = case[:3]
    for w, floor in ((c.w, 1e-5), (1.0, 1e-5), (c.w, 0.6)):
        pull, push = two_steps(c, *case, w, floor)
        loss = tensor(student.decoupled_loss(*case, w, floor), (9,), "decoupled_loss")
        close(gradient(loss, x, "decoupled_loss"), (pull + push) / 2, f"d loss.sum() / dx at w = {w:.3g}, floor = {floor:g}",
              hint="the teacher of the matching is not guided; the mean over a sample's pixels, here 2, is in the gradient too")
    loss = student.decoupled_loss(*case, c.w)
    held = torch.autograd.grad(loss.sum(), [real.weight, fake.weight], allow_unused=True) if loss.requires_grad else ()
    holds(all(v is None or not v.any() for v in held), "a gradient flows into the teacher or the fake score")


@A.check("A7.2", points=2)
def value_of_the_loss(student, c):
    """The value is that of two losses added: half the mean square of each direction."""
    case = training_case(c)
    pull, push = two_steps(c, *case, c.w, 1e-5)
    close(student.decoupled_loss(*case, c.w), (pull**2 + push**2).mean(1) / 2, "the value of each sample",
          hint="descend(x, g) twice; the square of a sum is another number")


@A.check("A7.2", points=2)
def who_is_asked_what(student, c):
    """The fake score is asked once, at the matching's noise and with the condition; the teacher never with a guided answer."""
    case = training_case(c)
    x, real, fake, cond, above, below = case
    student.decoupled_loss(*case, c.w)
    points = [x.detach() + sigma[:, None] * noise for sigma, noise in (above, below)]
    holds(len(fake.asked) == 1, f"the fake score was asked {len(fake.asked)} times; augmentation does not need it")
    close(fake.asked[0][0], points[0], "the point where the fake score is asked")
    holds(fake.asked[0][2] is cond or torch.equal(fake.asked[0][2], cond), "the fake score should be told the condition")
    seen = sorted((bool((xt - points[1]).abs().max() < 1e-9), at is None) for xt, _, at in real.asked)
    holds(seen == [(False, False), (True, False), (True, True)], "the teacher should be asked three times: with the condition at "
          "both points, without it at the augmentation's alone")


@A.check("A7.2", points=3)
def ratio_of_the_steps(student, c):
    """step_ratio is the length of one step over the other, measured image by image."""
    x, d_cond, d_uncond, d_fake = (c.noise(6, 2, 3, 3) for _ in range(4))
    for w in (1.0, c.w, 7.0):
        want = []
        for i in range(6):
            guided = w * d_cond[i] + (1 - w) * d_uncond[i]
            whole = (d_fake[i] - guided) / (x[i] - guided).abs().mean()
            parts = (d_fake[i] - d_cond[i] + (1 - w) * (d_cond[i] - d_uncond[i])) / (x[i] - d_cond[i]).abs().mean()
            want.append(parts.norm() / whole.norm())
        close(student.step_ratio(x, d_cond, d_uncond, w), torch.stack(want), f"step_ratio at w = {w:.3g}", rtol=1e-9,
              hint="both steps have the same numerator: what is left is a quotient of normalisers")


@A.check("A7.2", points=4)
def shield(student, c):
    """moment_shield and its gradient are those of the KL between two Gaussians, image by image."""
    x = (c.scale * c.noise(3, 2, 4, 4) + c.shade).requires_grad_()
    want = torch.stack([kl_divergence(Normal(image.mean(), image.var(unbiased=False).sqrt()),
                                      Normal(float64(c.shade / 2)[0], float64(c.contrast)[0].sqrt())) for image in x])
    slope = gradient(want, x, "the KL")
    got = student.moment_shield(x, c.shade / 2, c.contrast)
    close(got, want, "moment_shield", rtol=1e-9, hint=".5 ((v + (a - mean)^2) / var - 1 - ln(v / var))")
    close(gradient(got, x, "moment_shield"), slope, "its gradient", rtol=1e-8)


# ---- A7.3  noise below the level of the step ------------------------------------------------------------------------


def shifted_sigma(t, c):
    """The noise level at time t before the shift: the shift multiplies t / (1 - t)."""
    return c * t / (1 - t)


def time_before(t, c):
    """Bisection: the t with shifted odds equal to those of the time given."""
    low, high = 0.0, 1.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if middle < 1 and shifted_sigma(middle, c) < t / (1 - t) else (low, middle)
    return (low + high) / 2


@A.check("A7.3", points=4)
def shift_and_back(student, c):
    """The shift multiplies sigma = t / (1 - t) by c, and unshift undoes it; floats and tensors."""
    t = torch.linspace(0, 0.98, 50, dtype=torch.float64)
    for factor in (1.0, c.shift, 1 / c.shift):
        got = tensor(student.shift(t, factor), t.shape, "shift(t, c)")
        close(got / (1 - got), shifted_sigma(t, factor), f"the noise level of shift(t, {factor:.3g})")
        close(student.unshift(got, factor), t, f"unshift(shift(t, {factor:.3g}))")
        close(student.unshift(float(c.t_step), factor), time_before(c.t_step, factor), "unshift of a float")


@A.check("A7.3", points=4)
def exploding_levels(student, c):
    """levels_below runs from least to the step's level, uniform in sigma^(1/rho); a last step of little noise works."""
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    for level, rho, low in ((c.level, 7.0, c.least), (c.level, 3.0, c.least), (5 * c.least, 7.0, c.least / 2)):
        got = tensor(student.levels_below(u, level, c.least, rho), u.shape, "levels_below")
        close(got[[0, -1]], float64(low, level), "the first and last level", rtol=1e-9,
              hint="u = 0 is the clean end; least is replaced where it is not below level / 10")
        steps = (got ** (1 / rho)).diff()
        close(steps, steps.mean().expand(10), f"the differences of sigma^(1/{rho:g})", rtol=1e-6)


@A.check("A7.3", points=6)
def flow_levels(student, c):
    """flow_levels_below is uniform in time before the shift, and ends at the step's own level."""
    u = torch.linspace(0, 0.999, 30, dtype=torch.float64)
    for t_step, factor in product((c.t_step, 0.3 * c.t_step), (1.0, c.shift)):
        top = time_before(t_step, factor)
        want = float64(*[shifted_sigma(v * top, factor) for v in u.tolist()])
        close(student.flow_levels_below(u, t_step, factor), want, f"the levels below t = {t_step:.3g} at shift {factor:.3g}",
              hint="unshift the step's time, draw below it, shift what you drew, and only then turn t into sigma")
        last = student.flow_levels_below(float64(1.0), t_step, factor)
        close(last, float64(t_step / (1 - t_step)), "the level at u = 1, that of the step's input")


@A.check("A7.3", points=4)
def share_of_draws(student, c):
    """share_below is the distribution function: counted over evenly spaced draws, and 1 above the step."""
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    for t_step, factor in product((c.t_step, 0.4 * c.t_step), (1.0, c.shift)):
        draws, end = shifted_sigma(u * time_before(t_step, factor), factor), t_step / (1 - t_step)
        sigma = end * float64(0.05, 0.3, 0.7, 0.95, 1.5, 40)
        want = torch.stack([(draws < v).double().mean() for v in sigma])
        close(student.share_below(sigma, t_step, factor), want, f"the share below sigma at shift {factor:.3g}", rtol=0, atol=2e-5,
              hint="which u gives this sigma?")


@A.check("A7.3", points=2)
def after_the_shift(student, c):
    """median_ratio compares the medians of the two ways to draw, counted."""
    u = (torch.arange(100_001, dtype=torch.float64) + 0.5) / 100_001
    for t_step, factor in ((c.t_step, c.shift), (0.3, c.shift), (c.t_step, 1.0)):
        right, wrong = shifted_sigma(u * time_before(t_step, factor), factor), u * t_step / (1 - u * t_step)
        close(float(student.median_ratio(t_step, factor)), right.median() / wrong.median(), "the ratio of the medians", rtol=1e-6,
              hint="the median of a rising function of u is its value at u = 1/2")


# ---- A7.4  where the parts come to rest -----------------------------------------------------------------------------


def affine_posterior(M, a, tau, sigma):
    """(slope, offset) of E[x | xt, cond] = slope xt + offset cond for x = M cond + a z, from covariances."""
    cov = float64([(M * tau) ** 2 + a**2 + sigma**2, M * tau**2], [M * tau**2, tau**2])             # of (xt, cond)
    return torch.linalg.solve(cov, float64((M * tau) ** 2 + a**2, M * tau**2))


def measured(M, a, c, match, aug, w):
    """The two mean gradients in (M, a) from eight points of (cond, z, noise) = (+-tau, +-1, +-1): exact for what is quadratic."""
    cond, z, noise = (v.flatten() for v in torch.meshgrid(*[float64(-1, 1)] * 3, indexing="ij"))
    cond, result = c.tau * cond, []
    for part, levels in (("matching", match), ("augmentation", aug)):
        total = torch.zeros(2, dtype=torch.float64)
        for sigma in levels:
            xt, d_cond = M * cond + a * z + sigma * noise, affine_posterior(1.0, c.s, c.tau, sigma)
            alone = (c.s**2 + c.tau**2) / (c.s**2 + c.tau**2 + sigma**2)
            fake = affine_posterior(M, a, c.tau, sigma)
            gap = (fake[0] - d_cond[0]) * xt + (fake[1] - d_cond[1]) * cond
            push = (d_cond[0] - alone) * xt + d_cond[1] * cond
            g = gap if part == "matching" else (1 - w) * push
            total = total + torch.stack([(g * cond).mean(), (g * z).mean()]) / len(levels)
        result.append(total)
    return result


def largest(c, match, aug):
    """Bisection on w: where the total gradient at a tiny spread changes its sign."""
    low, high = 1.0, 1e4
    for _ in range(60):
        w = (low + high) / 2
        low, high = (w, high) if sum(measured(1.0, 1e-4, c, match, aug, w))[1] < 0 else (low, w)
    return low


def level_pairs(c):
    return (c.match, c.aug), ((c.sigma,), (c.sigma,)), (c.match[:2], (c.aug[0], 3 * c.sigma))


@A.check("A7.4", points=3)
def drift_of_matching(student, c):
    """The mean gradient of the matching part, for three students; it is zero at the data."""
    for (match, aug), (M, a) in product(level_pairs(c), ((1.0, c.s), (0.3, 1.5 * c.s), (c.w, 0.4 * c.s))):
        got, _ = student.drifts(M, a, c.s, c.tau, float64(*match), float64(*aug), c.w)
        close(got, measured(M, a, c, match, aug, c.w)[0], f"(dM, da) of matching at M = {M:.3g}, a = {a:.3g}", atol=1e-9,
              hint="E over cond, z and noise; dx/dM = cond, dx/da = z; the mean over match")


@A.check("A7.4", points=4)
def drift_of_augmentation(student, c):
    """The mean gradient of the augmentation part: it does not depend on match."""
    for (match, aug), (M, a) in product(level_pairs(c), ((1.0, c.s), (0.3, 1.5 * c.s), (c.w, 0.4 * c.s))):
        _, got = student.drifts(M, a, c.s, c.tau, float64(*match), float64(*aug), c.w)
        close(got, measured(M, a, c, match, aug, c.w)[1], f"(dM, da) of augmentation at M = {M:.3g}, a = {a:.3g}", atol=1e-9,
              hint="d_cond - d_uncond is linear in xt and cond; factor w - 1; the mean over aug")


@A.check("A7.4", points=3)
def augmentation_alone(student, c):
    """At augmentation_rest the means no longer move, whatever w is."""
    for match, aug in level_pairs(c):
        M = float(student.augmentation_rest(c.s, c.tau, float64(*aug)))
        holds(M > 1, f"the means go outwards: M should be above 1, got {M:.4g}")
        for w in (1.2, c.w):
            size = measured(0.0, c.s, c, match, aug, w)[1][0].abs()
            close(measured(M, c.s, c, match, aug, w)[1][0] / size, 0.0, f"the gradient in M at M = {M:.4g}", atol=1e-9,
                  hint="the average over aug of the whole gradient is zero, not the average of the places of rest")


@A.check("A7.4", points=2)
def what_is_left_of_the_spread(student, c):
    """spread_after is what the updates themselves leave, one by one."""
    for match, aug in level_pairs(c):
        a = 0.8 * c.s
        for _ in range(40):
            a = a - c.lr * measured(1.0, a, c, match, aug, c.w)[1][1].item()
        close(float(student.spread_after(0.8 * c.s, 40, c.lr, c.s, c.tau, float64(*aug), c.w)), a, "the spread after 40 updates",
              rtol=1e-8, hint="each update multiplies a by the same number")


@A.check("A7.4", points=5)
def both_together(student, c):
    """At both_rest the sum of the gradients is zero; at w = 1 it is the data."""
    for match, aug in level_pairs(c):
        M, a = (float(v) for v in student.both_rest(c.s, c.tau, float64(*match), float64(*aug), 1.0))
        close(float64(M, a), float64(1.0, c.s), "(M, a) without guidance", rtol=1e-6)
        for w in (1 + 0.2 * (largest(c, match, aug) - 1), 1 + 0.8 * (largest(c, match, aug) - 1)):
            M, a = (float(v) for v in student.both_rest(c.s, c.tau, float64(*match), float64(*aug), w))
            holds(a > 0, f"at w = {w:.4g}, below the largest, the spread should be positive, got {a:.4g}")
            match_part, push = measured(M, a, c, match, aug, w)
            close((match_part + push) / push.abs(), float64(0.0, 0.0), f"the gradients in (M, a) at rest, w = {w:.4g}", atol=2e-5,
                  hint="two equations: one is linear in M, the other says what the mean of a^2 / (a^2 + sigma^2) has to be")


@A.check("A7.4", points=2)
def no_spread_left(student, c):
    """Above the largest guidance the spread is exactly 0, and the means still rest."""
    for match, aug in level_pairs(c):
        w = 1.3 * largest(c, match, aug)
        M, a = (float(v) for v in student.both_rest(c.s, c.tau, float64(*match), float64(*aug), w))
        holds(a == 0.0, f"at w = {w:.4g} no spread can answer the push: a should be 0.0, got {a:.4g}")
        parts = measured(M, 1e-6, c, match, aug, w)
        close(sum(parts)[0] / parts[1][0].abs(), 0.0, f"the gradient in M at rest, w = {w:.4g}", atol=1e-6)


@A.check("A7.4", points=2)
def the_largest_guidance(student, c):
    """largest_w is where the gradient at a vanishing spread changes its sign."""
    for match, aug in level_pairs(c):
        got = float(student.largest_w(c.s, c.tau, float64(*match), float64(*aug)))
        close(got, largest(c, match, aug), "largest_w", rtol=1e-5, hint="a^2 / (a^2 + sigma^2) has to fall to 0")


@A.check("A7.4", points=4)
def time_between_two_places(student, c):
    """time_to is the integral of 1 / speed along the way, with the speed of a mixture's own denoisers."""
    two = Mixture([[c.m], [-c.m]], c.s, labels=torch.tensor([0, 1])).to(torch.float64)
    m, s = two.means[0, 0].item(), two.std[0].item()              # as a Mixture holds them, rounded to float32
    t, weights = (torch.tensor(v) for v in np.polynomial.legendre.leggauss(200))
    for sigma, (start, end) in product((c.sigma, c.level), ((-m, 0.0), (0.0, m), (m, 3 * m))):
        x = (start + (t + 1) / 2 * (end - start))[:, None]
        level, first = torch.full((200,), sigma, dtype=torch.float64), torch.zeros(200, dtype=torch.long)
        speed = (c.w - 1) * (two(x, level, first) - two(x, level))[:, 0]
        want = (weights / speed).sum() * (end - start) / 2
        got = float(student.time_to(start, end, m, s, sigma, c.w))
        close(got, want, f"the time from {start:.3g} to {end:.3g} at sigma {sigma:.3g}",
              hint="d_cond - d_uncond = (1 - r) m (1 - tanh(m x / v)); 1 / (1 - tanh y) = (1 + e^(2 y)) / 2")


# ---- A7.5  other coordinates, other people's code -------------------------------------------------------------------


def raw(kind, d, xt, sigma):
    """The network output behind an x0-prediction d: its definition, with x = d and noise = (xt - d) / sigma."""
    rows = []
    for x, point, s in zip(d, xt, sigma.tolist()):
        noise = (point - x) / s
        rows.append({"eps": noise, "v": (noise - s * x) / math.sqrt(1 + s**2), "flow": noise - x, "sit": x - noise}[kind])
    return torch.stack(rows)


def images(c):
    x, noise, d_cond, d_uncond = (c.noise(5, 2, 3, 4) for _ in range(4))
    sigma = c.sigma * torch.linspace(0.2, 4, 5, dtype=torch.float64)
    return x, noise, d_cond, d_uncond, sigma, x + sigma[:, None, None, None] * noise


@A.check("A7.5", points=4)
def augmentation_from_raw_outputs(student, c):
    """The augmentation in x0 is the same from eps, v, flow and SiT outputs, at every noise level."""
    _, _, d_cond, d_uncond, sigma, xt = images(c)
    for kind, w in product(("eps", "v", "flow", "sit"), (1.0, c.w)):
        got = student.augmentation_in(kind, raw(kind, d_cond, xt, sigma), raw(kind, d_uncond, xt, sigma), sigma, w)
        close(got, (1 - w) * (d_cond - d_uncond), f"the augmentation from {kind} at w = {w:.3g}",
              hint="x0 = (something) xt + c_out(sigma) y: in a difference only c_out is left, with its sign")


@A.check("A7.5", points=3)
def normaliser_from_raw_outputs(student, c):
    """mean |x - d_cond| from raw outputs, sample by sample."""
    x, noise, d_cond, _, sigma, xt = images(c)
    want = torch.stack([(a - b).abs().mean() for a, b in zip(x, d_cond)])
    for kind in ("eps", "v", "flow", "sit"):
        close(student.normaliser_in(kind, raw(kind, d_cond, xt, sigma), x, noise, sigma), want, f"the normaliser from {kind}",
              hint="what would the network say if its answer were x? The two outputs differ by (x - d_cond) / c_out")


def box(factor, size, scale, floor):
    """A step whose inside is known; the loop over samples keeps it from looking like anybody's code."""
    def step(x, d_cond, d_uncond, d_fake, w):
        whole, rows = (x - d_cond).abs().mean(), []
        for i in range(len(x)):
            guided = d_uncond[i] + w * (d_cond[i] - d_uncond[i])
            by = {"sample": (x[i] - d_cond[i]).abs().mean(), "guided": (x[i] - guided).abs().mean(), "batch": whole,
                  "none": torch.ones((), dtype=x.dtype)}[size]
            push = (w if factor == "w" else w - 1) * (d_cond[i] - d_uncond[i])
            rows.append(scale * (d_fake[i] - d_cond[i] - push) / by.clamp(min=floor))
        return torch.stack(rows)
    return step


def diagnosed(student, factor, size, scale, floor):
    got = student.diagnose(box(factor, size, scale, floor))
    holds(isinstance(got, (tuple, list)) and len(got) == 2, f"diagnose should return two strings, got {got!r}")
    return tuple(got)


BOXES = list(product(("w", "w - 1"), ("sample", "guided", "batch", "none"), (False, True)))


@A.check("A7.5", points=3)
def which_factor(student, c):
    """diagnose tells w from w - 1, whatever normaliser and constant stand around it."""
    for factor, size, scaled in BOXES:
        got = diagnosed(student, factor, size, *((c.scale, 0.1) if scaled else (1.0, 1e-5)))[0]
        holds(got == factor, f"a step with factor {factor} and normaliser '{size}' was taken for one with factor {got!r}: "
              "at which w is there nothing to add?")


@A.check("A7.5", points=5)
def which_normaliser(student, c):
    """diagnose tells the four normalisers apart, with either factor and any constant."""
    for factor, size, scaled in BOXES:
        got = diagnosed(student, factor, size, *((c.scale, 0.1) if scaled else (1.0, 1e-5)))[1]
        holds(got == size, f"a step with normaliser '{size}' and factor {factor} was taken for one with normaliser {got!r}: "
              "whose step changes when one sample moves away, and when w does?")

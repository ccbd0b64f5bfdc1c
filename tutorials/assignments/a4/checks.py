"""Checks of assignment 4.  Expectations are Gauss-Hermite sums in float64, so that identities hold to rounding.

Right answers come from closed forms of Gaussians, from Stein's identity, from Jacobians and from nano_dmd's own
sid_integrand and dmd_gradient.
"""

import math
from itertools import product
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from nano_dmd.dmd_loss import dmd_gradient
from nano_dmd.noise import add_noise, expand
from nano_dmd.sid_loss import sid_integrand
from toy.mixtures import Mixture
from tutorials.assignments.checking import Assignment, close, gradient, holds, tensor


def constants(rng):
    u = rng.uniform
    s, sigma, tau, wide = u(0.6, 1.3), u(0.5, 1.4), u(0.5, 1.2), u(1.5, 3.0)
    largest = (s**2 + tau**2) * (s**2 + sigma**2) / (sigma * tau) ** 2
    return dict(s=s, sigma=sigma, sigmas=(sigma, u(1.5, 2.5) * sigma), tau=tau, wide=wide, alpha=u(1.15, 1.7),
                share=u(0.3, 0.7), std=u(0.3, 0.6), shift=u(-0.6, 0.6), sigma_data=u(0.2, 0.9),
                kappa=1 + u(0.2, 0.7) * (largest - 1), kappa1=u(1.3, 2.5), kappa2=u(0.5, 4.0), m=u(0.6, 1.4), own=u(0.3, 0.6) * s)


A = Assignment("a4", "Score identity distillation", constants, {
    "A4.1": "three identities, and a fake score that lags",
    "A4.2": "the Fisher divergence and its whole gradient",
    "A4.3": "three paths of a gradient, and the coordinates they live in",
    "A4.4": "where a large alpha leads",
    "A4.5": "guidance, long and short"})


# ---- what the checks are built from ---------------------------------------------------------------------------------


def float64(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def mixture(means, std, weights=None):
    return Mixture(means, std, weights).to(torch.float64)


def grid(n, dim):
    """Gauss-Hermite nodes (n^dim, dim) and weights (n^dim,) of N(0, I)."""
    z, w = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(n))
    table = torch.cartesian_prod(*[torch.arange(n)] * dim).reshape(-1, dim)
    return z[table], (w / w.sum())[table].prod(1)


def repeated(levels, z, weights):
    """The same nodes at each noise level, all levels equally likely: (sigma, z, weights) of length K N."""
    sigma = float64(*levels).repeat_interleave(len(z))
    return sigma, z.repeat(len(levels), 1), weights.repeat(len(levels)) / len(levels)


def mixture_nodes(mix, sigma, n=64):
    """x, noise (N, 1), sigma, weights (N,) for a mixture in one dimension."""
    z, weights = grid(n, 2)
    x = torch.cat([m + s * z[:, :1] for m, s in zip(mix.means, mix.std)])
    weights = torch.cat([w * weights for w in mix.weights])
    return x, z[:, 1:].repeat(len(mix.means), 1), torch.full_like(weights, sigma), weights


def divergence(field, xt):
    """sum_d d field_d / d xt_d at each of (N, D) points."""
    xt = xt.detach().requires_grad_()
    value = field(xt)
    return sum(torch.autograd.grad(value[:, d].sum(), xt, retain_graph=True)[0][:, d] for d in range(xt.shape[1])).detach()


class Posterior:
    """E[x | xt] of N(mean, cov) from precisions: a Denoiser, for invertible cov."""

    def __init__(self, mean, cov):
        self.mean, self.precision = mean, torch.linalg.inv(cov)

    def __call__(self, xt, sigma, cond=None):
        eye = torch.eye(len(self.mean), dtype=xt.dtype)
        total = self.precision + eye / sigma[:, None, None] ** 2                      # (N, D, D)
        right = (self.precision @ self.mean) + xt / sigma[:, None] ** 2
        return torch.einsum("nij,nj->ni", torch.linalg.inv(total), right)


# ---- A4.1  three identities, and a fake score that lags ----------------------------------------------------------------


def plane(c):
    """A Gaussian generator in 2D at two noise levels, and a cubic vector field: five nodes per axis are exact."""
    sigma, z, weights = repeated(c.sigmas, *grid(5, 4))
    fake = mixture([[c.shift, -0.4]], c.std)
    x, turn, bend = fake.means + c.std * z[:, :2], c.noise(2, 2), c.noise(2)
    u = lambda xt: xt @ turn + bend * xt * xt.square().sum(1, keepdim=True)
    return SimpleNamespace(x=x, noise=z[:, 2:], sigma=sigma, weights=weights, fake=fake, u=u,
                           xt=add_noise(x, sigma, z[:, 2:]))


def line(c):
    """A curved case in one dimension: a generator of three modes, and a teacher of two."""
    fake = mixture([[-0.6], [0.5], [c.shift]], [0.4, 0.3, c.std], [0.3, 0.5, 0.2])
    x, noise, sigma, weights = mixture_nodes(fake, c.sigma)
    return SimpleNamespace(x=x, noise=noise, sigma=sigma, weights=weights, fake=fake, xt=add_noise(x, sigma, noise),
                           real=mixture([[-0.9], [0.8]], [0.4, 0.6], [1 - c.share, c.share]))


@A.check("A4.1", points=4)
def both_sides_agree(student, c):
    """For the generator's own score both sides are the same number, in 2D and for a mixture."""
    flat, curved = plane(c), line(c)
    curved.u = lambda xt: torch.tanh(xt - c.shift)
    for case, where in ((flat, "2D"), (curved, "1D")):
        want = -(case.weights @ divergence(case.u, case.xt))         # Stein: E[u . grad log p] = -E[div u]
        left, right = student.projection_sides(case.u, case.fake, case.x, case.noise, case.sigma, case.weights)
        close(left, want, f"left side in {where}", rtol=1e-6, atol=1e-6, hint="E[u . score], a sum over D")
        close(right, want, f"right side in {where}", rtol=1e-6, atol=1e-6, hint="E[u . (x - xt) / sigma^2], a sum over D")


@A.check("A4.1", points=4)
def only_the_left_asks_the_fake(student, c):
    """A wrong fake score moves the left side alone: the right side knows the generator by its samples."""
    case = plane(c)
    wrong = mixture([[0.3, c.shift]], c.std + 0.3)
    left, right = student.projection_sides(case.u, wrong, case.x, case.noise, case.sigma, case.weights)
    log_density = lambda v: wrong.log_prob(v, case.sigma)
    xt = case.xt.clone().requires_grad_()
    own = torch.autograd.grad(log_density(xt).sum(), xt)[0]
    close(left, case.weights @ (case.u(case.xt) * own).sum(1), "left side with another Denoiser as the fake",
          hint="its score is that of the Denoiser given, whatever the samples are")
    close(right, -(case.weights @ divergence(case.u, case.xt)), "right side with a wrong fake score",
          hint="it should not change when `fake` does")


@A.check("A4.1", points=3)
def value_without_lag(student, c):
    """With an optimal fake score the value is (1 - alpha) E|gap|^2, negative above alpha = 1."""
    case = line(c)
    gap = case.real(case.xt, case.sigma) - case.fake(case.xt, case.sigma)
    size = case.weights @ gap.square().sum(1)
    for alpha in (0.0, 0.5, 1.0, c.alpha):
        close(student.value_with_lag(gap, torch.zeros_like(gap), alpha, case.weights), (1 - alpha) * size,
              f"value at alpha {alpha:.3g} with error 0", atol=1e-10)


@A.check("A4.1", points=5)
def value_with_any_lag(student, c):
    """With a fake score that is off by any function of xt, the value is that of SiD's own loss, in 1D and 2D."""
    curved, flat = line(c), plane(c)
    flat.real = mixture([[-0.3, c.shift]], c.std + 0.2)
    errors = {"1D": lambda xt: 0.3 * torch.sin(2 * xt) - 0.1, "2D": lambda xt: 0.2 * xt.flip(1) + 0.1 * c.shift * xt**2}
    for (where, error), case, alpha in product(errors.items(), (curved, flat), (0.0, 0.5, 1.0, c.alpha)):
        if case.x.shape[1] != int(where[0]):
            continue
        d_real, best, e = case.real(case.xt, case.sigma), case.fake(case.xt, case.sigma), error(case.xt)
        want = case.weights @ sid_integrand(case.x, d_real, best + e, alpha, normalise=False).sum(1)
        close(student.value_with_lag(d_real - best, e, alpha, case.weights), want, f"value at alpha {alpha:.3g} in {where}",
              rtol=1e-5, atol=1e-7, hint="put d_fake = d* + error into L2 - alpha L1; E[v(xt) . (d* - x)] = 0 for every v")


@A.check("A4.1", points=4)
def loss_as_a_game(student, c):
    """The three squares add up to SiD's integrand, for every x, d_real, d_fake and alpha."""
    x, d_real, d_fake = (c.noise(50, 3) for _ in range(3))
    squares = [(a - b).square().sum(1) for a, b in ((d_real, x), (d_fake, x), (d_real, d_fake))]
    for alpha in (0.0, 0.5, 1.0, c.alpha):
        numbers = student.as_game(alpha)
        holds(len(numbers) == 3, f"as_game should return three numbers, got {len(numbers)}")
        got = sum(n * square for n, square in zip(numbers, squares))
        want = sid_integrand(x, d_real, d_fake, alpha, normalise=False).sum(1)
        close(got, want, f"sum of the three squares at alpha {alpha:.3g}",
              hint="write d_real - x = (d_real - d_fake) + (d_fake - x) and compare coefficients")


# ---- A4.2  the Fisher divergence and its whole gradient ----------------------------------------------------------------


def ellipses(c):
    """Generator A z + b and a Gaussian teacher in 2D, both tilted, two noise levels; three nodes per axis are exact."""
    sigma, z, weights = repeated(c.sigmas, *grid(3, 4))
    eye = torch.eye(2).double()
    scale, teacher = c.std * c.noise(2, 2) + 0.7 * eye, 0.3 * c.noise(2, 2) + c.s * eye
    b, mean = c.noise(2), c.noise(2)
    return SimpleNamespace(A=scale, b=b, real=Posterior(mean, teacher @ teacher.T), teacher=teacher, mean=mean, sigma=sigma,
                           z=z[:, :2], noise=z[:, 2:], weights=weights, levels=c.sigmas)


def closed_mesm(case, A_samples, A_fake):
    """M from moments: tr (R - F) (A A^T + sigma^2 I) (R - F)^T + |(I - R) (mean - b)|^2, mean over the levels."""
    total, eye = 0, torch.eye(2).double()
    for level in case.levels:
        noise = level**2 * eye
        gains = [scale @ scale.T @ torch.linalg.inv(scale @ scale.T + noise) for scale in (case.teacher, A_fake)]
        lever = gains[0] - gains[1]
        total = total + (lever @ (A_samples @ A_samples.T + noise) @ lever.T).trace()
        total = total + ((eye - gains[0]) @ (case.mean - case.b)).square().sum()
    return total / len(case.levels)


def closed_parts(case):
    """(sampling, scores) of dM/dA by autograd through the moments."""
    first, second = case.A.clone().requires_grad_(), case.A.clone().requires_grad_()
    return torch.autograd.grad(closed_mesm(case, first, second), (first, second))


def arguments(case):
    return case.b, case.real, case.sigma, case.z, case.noise, case.weights


@A.check("A4.2", points=5)
def denoiser_of_a_gaussian(student, c):
    """gaussian_denoiser is the posterior mean, in 2D and 3D, for a full scale matrix and one sigma per row."""
    for dim in (2, 3):
        scale, mean, xt = c.noise(dim, dim), c.noise(dim), c.noise(20, dim)
        sigma = torch.linspace(0.2, 3, 20, dtype=torch.float64)
        close(student.gaussian_denoiser(xt, sigma, mean, scale), Posterior(mean, scale @ scale.T)(xt, sigma),
              f"posterior mean in {dim}D", hint="the covariance is scale scale^T; x and xt are jointly normal")


@A.check("A4.2", points=2)
def denoiser_of_a_line(student, c):
    """... and still right for a generator that has collapsed onto a line."""
    direction, mean, xt = c.noise(2), c.noise(2), c.noise(20, 2)
    sigma = torch.full((20,), c.sigma, dtype=torch.float64)
    length = direction.square().sum()
    along = ((xt - mean) @ direction)[:, None] * direction / (length + c.sigma**2)
    got = student.gaussian_denoiser(xt, sigma, mean, torch.stack([direction, torch.zeros(2).double()], 1))
    close(got, mean + along, "posterior mean for a scale of rank one", hint="which matrix do you invert, and can it be singular?")


@A.check("A4.2", points=4)
def mesm_value(student, c):
    """mesm is the Fisher divergence in closed form, and 0 for every generator with the teacher's distribution."""
    case = ellipses(c)
    close(student.mesm(case.A, *arguments(case)), closed_mesm(case, case.A, case.A), "M", hint="a sum over D, weights @ ...")
    other = 1.3 * case.A.T + 0.1
    close(student.mesm(case.A, *arguments(case), A_fake=other), closed_mesm(case, case.A, other), "M with another A_fake")
    turn = torch.linalg.qr(c.noise(2, 2))[0]
    case.b = case.mean
    got = student.mesm(case.teacher @ turn, *arguments(case))
    close(got, 0.0, "M of a generator with the teacher's mean and covariance", atol=1e-12)


@A.check("A4.2", points=4)
def mesm_is_differentiable(student, c):
    """Autograd through mesm gives the whole dM/dA and dM/db."""
    case = ellipses(c)
    for name in ("A", "b"):
        getattr(case, name).requires_grad_()
        want = gradient(closed_mesm(case, case.A, case.A), getattr(case, name), "M")
        close(gradient(student.mesm(case.A, *arguments(case)), getattr(case, name), "mesm"), want, f"dM/d{name}",
              hint="A and b act on the samples, and on the fake denoiser")
        getattr(case, name).requires_grad_(False)


@A.check("A4.2", points=6)
def two_parts(student, c):
    """The sampling part and the score part are right one by one."""
    case = ellipses(c)
    for got, want, what in zip(student.mesm_gradient(case.A, *arguments(case)), closed_parts(case), ("sampling", "score")):
        close(got, want, f"{what} part", hint="which function of A is held, and which moves?")
        holds(not got.requires_grad, f"the {what} part should carry no graph")


@A.check("A4.2", points=4)
def what_the_game_takes(student, c):
    """The gradient of the game is predicted from the parts, for SiD at three values of alpha and for two other games."""
    case = ellipses(c)
    frozen = Posterior(case.b, case.A @ case.A.T)
    for of, pair in (("SiD at alpha 0", (0.5, 0.5)), ("SiD at alpha 1/2", (0.5, 0.0)),
                     ("SiD at a large alpha", (0.5, 0.5 - c.alpha)), ("a game", (c.share, c.shift)), ("L1 alone", (0.0, c.wide))):
        moving = case.A.clone().requires_grad_()
        x = case.z @ moving.T + case.b
        xt = add_noise(x, case.sigma, case.noise)
        d_real, d_fake = case.real(xt, case.sigma), frozen(xt, case.sigma)
        loss = pair[0] * ((d_real - x) ** 2 - (d_fake - x) ** 2) + pair[1] * (d_real - d_fake) ** 2
        want = torch.autograd.grad(case.weights @ loss.sum(1), moving)[0]
        close(student.game_from_parts(*closed_parts(case), *pair), want,
              f"the gradient of {of}, c = {pair[0]:.3g}, k = {pair[1]:.3g}", atol=1e-10,
              hint="which alpha and which factor of SiD is this game? Which part of its gradient is lost by holding "
              "the fake score?")


# ---- A4.3  three paths of a gradient, and the coordinates they live in --------------------------------------------------


def curved(c, n=6):
    """Two nonlinear denoisers in 2D, samples, noise, and one noise level per sample."""
    real = mixture([[-0.5, 0.2], [0.4, c.shift], [0.3, 0.6]], [0.3, 0.4, c.std], [0.5, 0.3, 0.2])
    fake = mixture([[0.1, c.shift], [-0.3, 0.5]], [0.5, 0.3])
    return c.noise(n, 2), c.sigma * torch.linspace(0.4, 1.5, n, dtype=torch.float64), c.noise(n, 2), real, fake


def jacobians(denoiser, xt, sigma):
    """(B, D, D) of d D_i / d xt_j, sample by sample."""
    one = lambda v, s: denoiser(v[None], s[None])[0]
    return torch.stack([torch.autograd.functional.jacobian(lambda v, s=s: one(v, s), v) for v, s in zip(xt, sigma)])


@A.check("A4.3", points=3)
def direct_path_is_dmd(student, c):
    """The direct path alone is DMD's gradient, for every alpha."""
    x, sigma, noise, real, fake = curved(c)
    xt = add_noise(x, sigma, noise)
    want = dmd_gradient(x, real(xt, sigma), fake(xt, sigma))
    for alpha in (0.0, 1.0, c.alpha):
        got = student.path_gradient(x, sigma, noise, real, fake, alpha, ("direct",))
        close(got, want, f"direct path at alpha {alpha:.3g}", hint="with both answers held, only the bare x of the formula moves")


@A.check("A4.3", points=4)
def each_score_path(student, c):
    """The paths through teacher and fake score are Jacobian-transposed products; all three add up to SiD."""
    x, sigma, noise, real, fake = curved(c)
    xt = add_noise(x, sigma, noise)
    d_real, d_fake = real(xt, sigma), fake(xt, sigma)
    size, gap = (x - d_real).abs().mean(1, keepdim=True), d_real - d_fake
    through = lambda denoiser, v: torch.einsum("bij,bi->bj", jacobians(denoiser, xt, sigma), v / size)
    for alpha in (0.0, c.alpha):
        want = {"real": through(real, (d_real - x) + (1 - 2 * alpha) * gap),
                "fake": through(fake, 2 * alpha * gap - (d_real - x))}
        for path in want:
            got = student.path_gradient(x, sigma, noise, real, fake, alpha, (path,))
            close(got, want[path], f"path through the {path} denoiser at alpha {alpha:.3g}",
                  hint="the normaliser is a constant, and xt moves with x inside this denoiser only")
        total = want["real"] + want["fake"] + dmd_gradient(x, d_real, d_fake)
        close(student.path_gradient(x, sigma, noise, real, fake, alpha, ("direct", "real", "fake")), total, "all three paths")


@A.check("A4.3", points=2)
def leaves_no_trace(student, c):
    """No .grad is left on x or on the weights, and x keeps its requires_grad."""
    x, sigma, noise, real, _ = curved(c)
    layer = nn.Linear(2, 2).double()
    network = lambda xt, sigma, cond=None: layer(xt)
    x.requires_grad_()
    got = tensor(student.path_gradient(x, sigma, noise, real, network, c.alpha, ("direct", "fake")), x.shape, "gradient")
    holds(not got.requires_grad, "the gradient should carry no graph")
    holds(x.grad is None and layer.weight.grad is None, "a .grad was left behind; torch.autograd.grad leaves none")
    holds(x.requires_grad and layer.weight.requires_grad, "requires_grad was switched off on an argument")
    plain = x.detach().clone()
    student.path_gradient(plain, sigma, noise, real, network, c.alpha, ("direct", "fake"))
    holds(not plain.requires_grad and plain.grad is None, "requires_grad was switched on for the caller's x: work on a copy")


def affine(kind, sigma, sigma_data=0.5):
    """(c_skip, c_out) of D(xt, sigma) = c_skip xt + c_out y for each kind of raw output y, each (B,)."""
    var, one = sigma**2, torch.ones_like(sigma)
    return {"x0": (0 * one, one), "eps": (one, -sigma), "v": (1 / (1 + var), -sigma / (1 + var).sqrt()),
            "flow": (1 / (1 + sigma), -sigma / (1 + sigma)),
            "edm": (sigma_data**2 / (var + sigma_data**2), sigma * sigma_data / (var + sigma_data**2).sqrt())}[kind]


def raw(kind, sigma, d, xt):
    """The raw output y behind an x0-prediction d."""
    skip, out = (expand(v, xt) for v in affine(kind, sigma))
    return (d - skip * xt) / out


def in_coordinates(student, c, kind):
    shape, sigma = (5, 2, 3, 4), c.sigma * torch.linspace(0.2, 3, 5, dtype=torch.float64)
    x, noise, d_real, d_fake = (c.noise(*shape) for _ in range(4))
    xt = add_noise(x, sigma, noise)
    for alpha in (0.0, c.alpha):
        y = torch.stack([raw(kind, sigma, d, xt) for d in (d_real, d_fake)]).requires_grad_()
        got = student.sid_in(kind, *y, x, noise, sigma, alpha)
        close(got, sid_integrand(x, d_real, d_fake, alpha), f"the integrand from {kind}-predictions at alpha {alpha:.3g}",
              hint="turn both outputs into x0-predictions at xt, or work out what d_real - d_fake and d_real - x become; "
                   "the mean of the normaliser is per sample")
        skip, out = (expand(v, x) for v in affine(kind, sigma))
        want = gradient(sid_integrand(x, *(skip * xt + out * v for v in y), alpha), y, "sid_integrand")
        close(gradient(got, y, "the integrand"), want, f"its gradient at the {kind}-predictions at alpha {alpha:.3g}",
              hint="no output is detached, and the normaliser is a constant")


@A.check("A4.3", points=2)
def eps_coordinates(student, c):
    """SiD's integrand from eps-predictions, on image-shaped tensors."""
    in_coordinates(student, c, "eps")


@A.check("A4.3", points=3)
def v_coordinates(student, c):
    """SiD's integrand from v-predictions."""
    in_coordinates(student, c, "v")


@A.check("A4.3", points=2)
def flow_coordinates(student, c):
    """SiD's integrand from the velocity of straight paths."""
    in_coordinates(student, c, "flow")


@A.check("A4.3", points=4)
def what_detaching_leaves(student, c):
    """The predicted factor is the measured one, in all five coordinates."""
    x, sigma, noise, real, fake = curved(c)
    x.requires_grad_()
    xt = add_noise(x, sigma, noise)
    with torch.no_grad():
        d_real, d_fake = real(xt, sigma), fake(xt, sigma)
    whole = dmd_gradient(x.detach(), d_real, d_fake)
    for kind in ("x0", "eps", "v", "flow", "edm"):
        skip, _ = affine(kind, sigma, c.sigma_data)
        held = lambda d: d + expand(skip, xt) * (xt - xt.detach())   # its raw output detached: only c_skip xt moves
        measured = torch.autograd.grad(sid_integrand(x, held(d_real), held(d_fake), c.alpha).sum(), x, retain_graph=True)[0]
        factor = tensor(student.detached_factor(kind, sigma, c.sigma_data), sigma.shape, f"factor for {kind}")
        close(expand(factor, x) * whole, measured, f"factor times DMD's gradient for {kind}", atol=1e-10,
              hint="which x are left once the raw outputs no longer depend on it?")


# ---- A4.4  where a large alpha leads --------------------------------------------------------------------------------


def measured_slope(a, s, sigma, alpha, own=0.0):
    """The slope by Gauss-Hermite and autograd through nano_dmd's integrand, at one noise level."""
    z, weights = grid(4, 3)
    scale = torch.tensor(a, dtype=torch.float64, requires_grad=True)
    x, var = scale * z[:, :1] + own * z[:, 2:], a**2 + own**2
    xt = x + sigma * z[:, 1:2]
    d_real, d_fake = s**2 / (s**2 + sigma**2) * xt, var / (var + sigma**2) * xt
    return torch.autograd.grad(weights @ sid_integrand(x, d_real, d_fake, alpha, normalise=False).sum(1), scale)[0].item()


@A.check("A4.4", points=5)
def slope(student, c):
    """The slope is that of SiD's loss with the fake score held, over scales and alphas, with and without noise of its own."""
    levels = (*c.sigmas, c.wide)
    for a, alpha, own in product((0.2 * c.s, c.s, 1.7 * c.s, 6.0 * c.s), (-c.wide, 0.0, 0.5, 1.0, c.alpha), (0.0, c.own)):
        want = float(np.mean([measured_slope(a, c.s, level, alpha, own) for level in levels]))
        close(student.sid_slope(a, c.s, float64(*levels), alpha, own), want,
              f"slope at a = {a:.3g}, alpha {alpha:.3g}, own {own:.3g}", atol=1e-10,
              hint="the fake denoiser f xt has f of the generator's present variance, and f is not differentiated")


def walls(low, high, s, sigma, alpha, own):
    """Slopes point to the data's scale, a^2 + own^2 = s^2, inside (low, high) and away from it just outside."""
    goal = math.sqrt(s**2 - own**2)
    inside = [low * 1.001 if low else 1e-3 * goal, (low + goal) / 2, goal * 0.999, goal * 1.001]
    inside += [(goal + high) / 2, high * 0.999] if high < math.inf else [3 * s, 30 * s]
    for a in inside:
        holds(measured_slope(a, s, sigma, alpha, own) * (a - goal) > 0, f"({low:.4g}, {high:.4g}) at alpha {alpha:.3g}, own "
              f"{own:.3g}: descent from a = {a:.4g} inside it moves away from {goal:.4g}")
    outside = ([low * 0.999] if low else []) + ([high * 1.001] if high < math.inf else [])
    for a in outside:
        holds(measured_slope(a, s, sigma, alpha, own) * (a - goal) < 0, f"({low:.4g}, {high:.4g}) at alpha {alpha:.3g}, own "
              f"{own:.3g}: descent from a = {a:.4g} outside it still moves to {goal:.4g}")


def ends(student, s, sigma, alpha, own):
    low, high = (float(v) for v in student.basin(s, sigma, alpha, own))
    goal = math.sqrt(s**2 - own**2)
    holds(0 <= low < goal < high, f"at alpha {alpha:.3g}, own {own:.3g} the basin ({low:.4g}, {high:.4g}) should hold "
          f"{goal:.4g}, low >= 0")
    walls(low, high, s, sigma, alpha, own)
    return low, high


@A.check("A4.4", points=4)
def basin_above_one(student, c):
    """For alpha > 1 a start too far out is repelled: the boundary is where the slope changes sign."""
    for alpha, own in product((c.alpha, 1.2, 1 + c.wide), (0.0, c.own)):
        low, high = ends(student, c.s, c.sigma, alpha, own)
        holds(low == 0 and high < math.inf, f"at alpha {alpha:.3g} only the outer end is a boundary, got ({low:.4g}, {high:.4g})")


@A.check("A4.4", points=3)
def basin_elsewhere(student, c):
    """From 0 to 1 there is no boundary; a very negative alpha makes small scales collapse, a mildly negative one does not."""
    for alpha in (0.0, 0.5, 1.0, -0.6 * (c.sigma / c.s) ** 2):
        low, high = ends(student, c.s, c.sigma, alpha, c.own)
        holds((low, high) == (0, math.inf), f"at alpha {alpha:.3g} every start a > 0 arrives, got ({low:.4g}, {high:.4g})")
    alpha = -c.wide * (c.sigma / c.s) ** 2
    low, high = ends(student, c.s, c.sigma, alpha, 0.0)
    holds(low > 0 and high == math.inf, f"at alpha {alpha:.3g} only the inner end is a boundary, got ({low:.4g}, {high:.4g})")
    edge = low                                                    # noise of its own wider than that: nothing can collapse
    low, high = ends(student, c.s, c.sigma, alpha, (edge + c.s) / 2)
    holds((low, high) == (0, math.inf), f"with own noise wider than {edge:.4g} every start arrives, got ({low:.4g}, {high:.4g})")


def ends_at(student, expected, what, slope, a, s, lr, steps):
    got = student.converges(slope, a, s, lr, steps)
    holds(isinstance(got, (bool, np.bool_)), f"converges should return True or False, got {type(got).__name__}")
    holds(bool(got) == expected, f"{what}: converges should be {expected}")


@A.check("A4.4", points=2)
def who_arrives(student, c):
    """A run that settles on s or -s converges; one that is too slow, passes by, oscillates or dies at 0 does not."""
    s = c.s
    well, double = lambda a: a - s, lambda a: a * (a * a - s * s)
    ends_at(student, True, "descent into a well", well, 3 * s, s, 0.1, 200)
    ends_at(student, True, "descent to -s, the same density", double, -0.4 * s, s, 0.3 / s**2, 200)
    ends_at(student, False, "a run that is still on its way", well, 3 * s, s, 0.1, 20)
    ends_at(student, False, "a run that passes s and goes on", lambda a: -s / 50, 0.5 * s, s, 1.0, 100)
    ends_at(student, False, "steps so large that a jumps between two values", well, 3 * s, s, 2.0, 200)
    ends_at(student, False, "a generator that collapses to 0", lambda a: a, 0.5 * s, s, 0.1, 200)
    ends_at(student, True, "a start within 1 percent and no steps", well, 1.005 * s, s, 0.1, 0)


@A.check("A4.4", points=2)
def who_is_lost(student, c):
    """A run that blows up is given up in time, and NaN never counts as arrived."""
    def steep(a):
        holds(abs(a) <= 1e6, f"slope was called at a = {a:.3g}, beyond 1e6")
        return -(a**3)
    ends_at(student, False, "a run that blows up", steep, 2.0 * c.s, c.s, 0.5, 500)
    ends_at(student, False, "a slope that is not a number", lambda a: math.nan, c.s, c.s, 0.1, 5)


@A.check("A4.4", points=4)
def last_bit(student, c):
    """The rate near a = s is the derivative of the slope there, for every alpha."""
    step = 1e-4 * c.s
    for sigma, alpha in product((c.sigma, c.wide), (0.0, 0.5, c.alpha)):
        up, down = (measured_slope(c.s + h, c.s, sigma, alpha) for h in (step, -step))
        close(student.rate(c.s, sigma, alpha), (up - down) / (2 * step), f"rate at sigma {sigma:.3g}, alpha {alpha:.3g}",
              rtol=1e-5, hint="differentiate the slope at a = s, where f = r")


# ---- A4.5  guidance, long and short ---------------------------------------------------------------------------------


class Straight(nn.Module):
    """A conditional Denoiser with three weights: p xt + q cond, and w xt without cond."""

    def __init__(self, p, q, w):
        super().__init__()
        self.p, self.q, self.w = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (p, q, w))

    def forward(self, x, sigma, cond=None):
        return self.w * x if cond is None else self.p * x + self.q * cond


def critic_case(c):
    """Eight points of weight 1/8, exact for squares: cond, z, noise are +-1; the second half is trained without cond."""
    points = grid(2, 3)[0].repeat(2, 1)
    cond, z, noise = (points[:, i : i + 1] for i in range(3))
    fake, dropped = Straight(0.5, 0.4 * c.m, c.share), torch.arange(16) >= 8
    x = (c.m * c.tau * cond + c.s * z).requires_grad_()
    return fake, x, torch.full((16,), c.sigma, dtype=torch.float64), noise, c.tau * cond, c.kappa1, dropped


def critic_value(fake, c):
    """The same loss from moments: of (P xt + Q cond - x) / sigma."""
    guided = fake.w + c.kappa1 * (fake.p - fake.w), c.kappa1 * fake.q
    half = [(P * c.sigma) ** 2 + ((P - 1) * c.s) ** 2 + (((P - 1) * c.m + Q) * c.tau) ** 2 for P, Q in (guided, (fake.w, 0))]
    return sum(half) / 2 / c.sigma**2


@A.check("A4.5", points=2)
def critic_loss_value(student, c):
    """The guided critic loss is the error of the noise prediction, without guidance where cond is dropped."""
    case = critic_case(c)
    close(student.guided_critic_loss(*case), critic_value(case[0], c), "critic loss",
          hint="guided x0 to eps is (xt - D) / sigma; dropped samples use the unconditional prediction; mean over everything")


@A.check("A4.5", points=2)
def critic_loss_gradient(student, c):
    """It trains both halves of the guidance, and never moves the samples."""
    case = critic_case(c)
    weights = list(case[0].parameters())
    want = torch.autograd.grad(critic_value(case[0], c), weights)
    loss = student.guided_critic_loss(*case)
    holds(isinstance(loss, torch.Tensor) and loss.requires_grad, "the critic loss carries no graph: its weights cannot learn")
    *got, at_x = torch.autograd.grad(loss, [*weights, case[1]], allow_unused=True)
    for name, g, w in zip(("the conditional half", "cond", "the unconditional half"), got, want):
        holds(g is not None, f"no gradient reaches the weight of {name}")
        close(g, w, f"gradient at the weight of {name}")
    holds(at_x is None or not at_x.any(), "the critic's loss moves the samples: the generator gets no gradient from it")


@A.check("A4.5", points=3)
def trained_then_asked(student, c):
    """The prediction for the trained fake score is what a least-squares fit of the critic's loss finds."""
    share, e_cond = torch.softmax(c.noise(4), 0), c.noise(4, 3)      # four classes, one xt, three pixels
    e_uncond = share @ e_cond
    eye, zero = torch.eye(4).double(), torch.zeros(4, 1).double()    # unknowns: f_uncond, f_1 ... f_4
    for kappa1, kappa2 in ((c.kappa1, c.kappa2), (c.kappa1, c.kappa1), (1.0, c.kappa2), (0.7, 1.0)):
        kept, dropped = torch.cat([zero + 1 - kappa1, kappa1 * eye], 1), torch.cat([zero + 1, 0 * eye], 1)
        rows = torch.cat([(0.9 * share).sqrt()[:, None] * kept, (0.1 * share).sqrt()[:, None] * dropped])
        targets = torch.cat([(0.9 * share).sqrt()[:, None] * e_cond, (0.1 * share).sqrt()[:, None] * e_cond])
        fit = torch.linalg.lstsq(rows, targets).solution
        want = fit[0] + kappa2 * (fit[1:] - fit[0])
        close(student.fake_after_training(e_cond, e_uncond.expand(4, 3), kappa1, kappa2), want,
              f"the fake score's answer for kappa1 {kappa1:.3g}, kappa2 {kappa2:.3g}",
              hint="at the optimum the guided prediction at kappa1 is E[x | xt, cond]: solve for the conditional half")


@A.check("A4.5", points=3)
def guided_sid(student, c):
    """The gradient of SiD with guidance on both sides, for two linear denoisers by hand."""
    real, fake = Straight(c.share, 0.6, 0.8), Straight(0.3, c.m, 0.6)
    x, noise, cond = (c.noise(6, 3) for _ in range(3))
    sigma = c.sigma * torch.linspace(0.5, 1.5, 6, dtype=torch.float64)
    xt = add_noise(x, sigma, noise)
    slopes, answers = [], []
    for net, kappa in ((real, c.kappa1), (fake, c.kappa2)):
        p, q, w = (v.detach() for v in net.parameters())
        slopes.append(w + kappa * (p - w))
        answers.append(slopes[-1] * xt + kappa * q * cond)
    gap, miss = answers[0] - answers[1], answers[0] - x
    plain = x.clone()
    student.lsg_gradient(plain, sigma, noise, cond, real, fake, c.alpha, c.kappa2, c.kappa1)
    holds(not plain.requires_grad and plain.grad is None, "requires_grad was switched on for the caller's x: work on a copy")
    for alpha in (0.5, c.alpha):
        by_hand = (slopes[0] - slopes[1]) * (miss - alpha * gap) + gap * ((slopes[0] - 1) - alpha * (slopes[0] - slopes[1]))
        x.requires_grad_()
        got = student.lsg_gradient(x, sigma, noise, cond, real, fake, alpha, c.kappa2, c.kappa1)
        close(got, by_hand / miss.abs().mean(1, keepdim=True), f"guided SiD at alpha {alpha:.3g}",
              hint="kappa4 guides the teacher, in the normaliser too; kappa2 guides the fake; every path is kept")
    held = [v.grad for net in (real, fake) for v in net.parameters()]
    holds(x.grad is None and not any(g is not None for g in held), "a .grad was left behind; torch.autograd.grad leaves none")


def affine_posterior(m, a, tau, sigma):
    """(slope, offset) of E[x | xt, cond] = slope xt + offset cond for x = m cond + a z, from the covariances of
    (x, xt, cond)."""
    cov = float64([m**2 * tau**2 + a**2 + sigma**2, m * tau**2], [m * tau**2, tau**2])             # of (xt, cond)
    return torch.linalg.solve(cov, float64(m**2 * tau**2 + a**2, m * tau**2))


def guided_teacher(s, tau, sigma, kappa):
    """(slope, offset) of the guided teacher, from the same covariances at m = 1, a = s."""
    with_cond = affine_posterior(1.0, s, tau, sigma)
    without = float64((s**2 + tau**2) / (s**2 + tau**2 + sigma**2), 0.0)
    return without + kappa * (with_cond - without)


@A.check("A4.5", points=3)
def where_long_guidance_leads(student, c):
    """At the fixed point the generator's own posterior is the guided teacher; without guidance it is the data."""
    m, a = student.long_fixed_point(c.s, c.tau, c.sigma, 1.0)
    close(float64(m, a), float64(1.0, c.s), "(m, a) without guidance")
    for share, own in product((0.5, 1.0), (0.0, c.own)):
        kappa = 1 + share * (c.kappa - 1) * (limit(c, own) - 1) / (limit(c, 0.0) - 1)
        m, a = (float(v) for v in student.long_fixed_point(c.s, c.tau, c.sigma, kappa, own))
        holds(a > 0, f"the spread a should be positive, got {a:.4g}")
        close(affine_posterior(m, math.hypot(a, own), c.tau, c.sigma), guided_teacher(c.s, c.tau, c.sigma, kappa),
              f"(slope, offset) of the generator's posterior at kappa {kappa:.3g}, own {own:.3g}",
              hint="write the guided teacher as r xt + h cond, and E[x | xt, cond] of m cond + a z + own z' likewise")


def limit(c, own):
    """The kappa at which the guided teacher's slope is that of a generator with no spread but its own, by bisection."""
    low, high, floor = 1.0, 1e6, affine_posterior(1.0, own, c.tau, c.sigma)[0] if own else 0.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if guided_teacher(c.s, c.tau, c.sigma, middle)[0] > floor else (low, middle)
    return low


@A.check("A4.5", points=2)
def guidance_without_a_generator(student, c):
    """At the largest guidance nothing is left for a: the guided teacher's slope is that of the generator's own noise."""
    for own in (0.0, c.own):
        largest = float(student.largest_guidance(c.s, c.tau, c.sigma, own))
        close(guided_teacher(c.s, c.tau, c.sigma, largest)[0], own**2 / (own**2 + c.sigma**2),
              f"slope of the guided teacher in xt at that kappa, own {own:.3g}", atol=1e-9,
              hint="(a^2 + own^2) / (a^2 + own^2 + sigma^2) has to fall to its value at a = 0")

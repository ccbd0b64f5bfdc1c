"""Every equation of the losses and of the train step is a test.

Three kinds of evidence, all in float64 and to 1e-12 unless a test says otherwise:

  by hand    numbers small enough to check on paper
  calculus   the gradient that reaches x is the one the docstring states, and that finite differences measure
  Gaussians  in one dimension, with real data N(0, s^2) and a generator x = a z, everything is a polynomial in
             (z, noise), so a 5-point Gauss-Hermite rule gives expectations without any sampling error

Each test is a plain function without fixtures: tests/mutants.py calls them on wrong versions of the code.
"""

import copy
import math
from contextlib import ExitStack, contextmanager
from itertools import product
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from nano_dmd.engine.build import build
from nano_dmd.engine.draw import Draw
from nano_dmd.methods import Nets
from nano_dmd.dmd_loss import diff_instruct_loss, dmd_gradient, dmd_loss, regression_loss
from nano_dmd.fake_score import FakeScore, denoising_loss
from nano_dmd.gan import (critic_logit_loss, gan_critic_loss, gan_generator_loss,
                          generator_logit_loss)
from nano_dmd.networks import MLP
from nano_dmd.engine.draw import Batch
from nano_dmd.noise import add_noise, expand
from nano_dmd.engine.config import resolve
from nano_dmd.real_score import RealScore
from nano_dmd.sid_loss import sid_integrand, sid_loss
from nano_dmd.denoiser import EDM, edm_loss
from nano_dmd.teacher import Teacher
from nano_dmd.methods import METHODS, Method, train_step, update
from toy.mixtures import MIXTURES, Mixture

EXACT = dict(rtol=1e-12, atol=1e-12)
ALPHAS = (-0.5, 0.0, 0.5, 1.0, 1.2)


# ---- what the tests are built from ------------------------------------------------------------------------


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


@contextmanager
def draws(*noise):
    """Choose what a loss draws.  Its k-th noise is noise[k] (NaN beyond the last one: a draw nobody asked for), and
    its sigma is cfg.dm_sigma (or critic_sigma, gan_sigma) itself: here the config holds a tensor (B,)."""
    queue = list(noise)

    def next_noise(x):
        return queue.pop(0) if queue else torch.full_like(x, math.nan)

    modules = ("dmd_loss", "sid_loss", "gan", "fake_score")
    with ExitStack() as patches:
        for m in modules:
            patches.enter_context(mock.patch(f"nano_dmd.{m}.draw_noise", next_noise))
            patches.enter_context(mock.patch(f"nano_dmd.{m}.draw_sigma", lambda spec, n, device: spec.expand(n)))
        yield


def config(**fields):
    """The Config fields a loss reads; noise levels that a test does not set are NaN, so that using one shows."""
    unset = dict.fromkeys(("dm_sigma", "critic_sigma", "gan_sigma"), tensor(math.nan))
    return SimpleNamespace(**unset | dict(alpha=1.0, normalise=True, reg_loss="l2", noisings=1) | fields)


def curved_nets():
    """Two smooth, nonlinear denoisers in 2D: the exact ones of two different mixtures, in float64."""
    real = Mixture([[-0.5, 0.2], [0.4, -0.3], [0.3, 0.6]], [0.3, 0.4, 0.5], [0.5, 0.3, 0.2]).to(torch.float64)
    fake = Mixture([[0.1, 0.1], [-0.3, 0.5]], [0.5, 0.3]).to(torch.float64)
    return SimpleNamespace(real=real, fake=fake, sigma_data=0.5)


def curved_case(n=6):
    """(x with grad, sigma, noise, nets) for tests that need nothing special."""
    x = normal(n, 2, seed=1).requires_grad_()
    return x, torch.linspace(0.2, 1.5, n, dtype=torch.float64), normal(n, 2, seed=2), curved_nets()


def assert_raises(error, function, *args):
    with pytest.raises(error):
        function(*args)


# ---- DMD by hand ------------------------------------------------------------------------------------------


def test_dmd_gradient_by_hand():
    """g = (d_fake - d_real) / mean|x - d_real|, one mean per sample.

    sample 0:  x - d_real = (1, -3),  mean 2;   d_fake - d_real = (4, -2)    ->  g = (2, -1)
    sample 1:  x - d_real = (.5, .5), mean .5;  d_fake - d_real = (1, 0)     ->  g = (2, 0)
    """
    x, d_real, d_fake = tensor([1, 0], [2, 2.5]), tensor([0, 3], [1.5, 2]), tensor([4, 1], [2.5, 2])
    assert_close(dmd_gradient(x, d_real, d_fake), tensor([2, -1], [2, 0]), **EXACT)
    assert not dmd_gradient(*(v.requires_grad_() for v in (x, d_real, d_fake))).requires_grad     # a number, no graph


def test_dmd_gradient_of_images():
    """The mean of the normaliser runs over all pixels and channels of one image: (B, C, H, W) as (B, CHW)."""
    x, d_real, d_fake = (normal(3, 2, 4, 5, seed=s) for s in range(3))
    for i in range(3):
        expected = (d_fake[i] - d_real[i]) / (x[i] - d_real[i]).abs().mean()
        assert_close(dmd_gradient(x, d_real, d_fake)[i], expected, **EXACT)


def test_dmd_descends():
    """Descending g moves x away from where only the fakes are: real on the left, fake on the right, x goes left."""
    x = tensor([0.0])
    assert (x - 0.1 * dmd_gradient(x, d_real=tensor([-1.0]), d_fake=tensor([1.0])) < x).all()


def test_dmd_normaliser_is_per_sample():
    """c (x, d_real, d_fake) has the same g for every c > 0, sample by sample: scaling sample 0 changes nothing at all.

    A normaliser shared by the batch (FastVideo) is not this: there, one far-off sample mutes all the others.
    """
    x, d_real, d_fake = (normal(4, 3, seed=s) for s in range(3))
    g, scale = dmd_gradient(x, d_real, d_fake), tensor([100.0], [1], [1], [1])
    scaled = dmd_gradient(scale * x, scale * d_real, scale * d_fake)
    assert_close(scaled, g, **EXACT)
    batch_wide = (d_fake - d_real) / (x - d_real).abs().mean()
    assert (batch_wide - g).abs().max() > 0.1                     # the two definitions really differ here


def test_dmd_normaliser_measures_the_distance_to_the_teacher():
    """|x - d_real| and neither |d_real| (dmd-mnist) nor |x - d_fake|: moving all three by a constant leaves g alone,
    and g is proportional to d_fake - d_real at fixed x and d_real."""
    x, d_real, d_fake = (normal(4, 3, seed=s) for s in range(3))
    g = dmd_gradient(x, d_real, d_fake)
    assert_close(dmd_gradient(x + 7, d_real + 7, d_fake + 7), g, **EXACT)
    assert_close(dmd_gradient(x, d_real, d_real + 5 * (d_fake - d_real)), 5 * g, **EXACT)


def test_normalisers_stay_above_1e_5():
    """x = d_real would divide by zero; the denominator is held at 1e-5 there, in DMD and in SiD."""
    x, d_fake = tensor([1.0, 1.0]), tensor([1.5, 1.0])
    assert_close(dmd_gradient(x, x, d_fake), tensor([0.5 / 1e-5, 0.0]), rtol=1e-12, atol=0)
    # SiD: gap = d_real - d_fake = (-.5, 0), d_real - x = 0, alpha = 1  ->  gap * (0 - gap) / 1e-5 = -.25 / 1e-5
    assert_close(sid_integrand(x, x, d_fake, alpha=1.0), tensor([-0.25 / 1e-5, 0.0]), rtol=1e-12, atol=0)
    assert_close(dmd_gradient(x, x, x), torch.zeros_like(x), rtol=0, atol=0)


def test_nan_is_not_hidden():
    """A NaN in a score reaches the gradient: the loop then stops and names the step.  DMD2 turns it into 0 instead
    (edm_guidance.py:108) and trains on."""
    x, bad = tensor([1.0, 2.0], [3.0, 4.0]), tensor([math.nan, 1.0], [0.0, 0.0])
    assert dmd_gradient(x, bad, x)[0].isnan().all() and dmd_gradient(x, bad, x)[1].isfinite().all()
    assert sid_integrand(x, bad, x, 1.0)[0].isnan().all()


def test_shapes_must_agree():
    """(B, 1) against (B, 3) would broadcast silently."""
    x = normal(4, 3)
    for wrong in (x[:, :1], x[:1], x[None]):
        assert_raises(ValueError, dmd_gradient, x, wrong, x)
        assert_raises(ValueError, dmd_gradient, x, x, wrong)
        assert_raises(ValueError, sid_integrand, x, wrong, x, 1.0)
        assert_raises(ValueError, sid_integrand, x, x, wrong, 1.0)


# ---- the gradients that reach x ---------------------------------------------------------------------------


def test_dmd_loss_gradient_and_value():
    """dmd_loss = mean 0.5 g^2 in value, and its gradient at x is g / N with N = x.numel(): the mean over everything.

    xt = x + sigma noise with one noise for both scores; both are asked at xt and cfg.dm_sigma.
    """
    x, sigma, noise, nets = curved_case()
    batch = Batch(z=None, pair_x=normal(6, 2, seed=5))            # a paired target has no business in the normaliser
    with draws(noise):
        loss = dmd_loss(x, nets, batch, config(dm_sigma=sigma))
    loss.backward()
    xt = x.detach() + sigma[:, None] * noise
    d_real, d_fake = nets.real(xt, sigma), nets.fake(xt, sigma)
    g = (d_fake - d_real) / (x.detach() - d_real).abs().mean(1, keepdim=True)
    assert_close(x.grad, g / x.numel(), **EXACT)
    assert_close(loss.detach(), 0.5 * g.square().mean(), **EXACT)
    assert_close(batch.seen["dmd_loss"], (sigma, 0.5 * g.square().mean(1)), **EXACT)


def test_diff_instruct_loss_gradient():
    """Diff-Instruct is DMD without the normaliser: d loss / dx = (d_fake - d_real) / N."""
    x, sigma, noise, nets = curved_case()
    with draws(noise):
        diff_instruct_loss(x, nets, Batch(z=None), config(dm_sigma=sigma)).backward()
    xt = x.detach() + sigma[:, None] * noise
    assert_close(x.grad, (nets.fake(xt, sigma) - nets.real(xt, sigma)) / x.numel(), **EXACT)


def test_regression_loss_by_hand():
    """mean (G(z) - pair_x)^2 over everything, G asked at the pairs' noise and class; x is not used.

    G(z) = a z with a = 2:  z = (1, 3), pair_x = (1, 5)  ->  residuals (1, 1), loss 1, d loss / da = 2 (1 + 3) / 2 = 4
    """
    a, asked = torch.tensor(2.0, dtype=torch.float64, requires_grad=True), []
    nets = SimpleNamespace(generator=lambda z, cond: asked.append(cond) or a * z[0])
    pair_cond = torch.tensor([3, 4])
    batch = Batch(z=None, cond=torch.tensor([0, 1]), pair_z=tensor([[1.0], [3.0]]), pair_x=tensor([1.0], [5.0]),
                  pair_cond=pair_cond)
    loss = regression_loss(None, nets, batch, config())
    loss.backward()
    assert_close((loss.detach(), a.grad), (tensor(1.0)[0], tensor(4.0)[0]), **EXACT)
    assert asked[0] is pair_cond


def test_regression_loss_by_another_distance():
    """reg_loss "lpips": the mean of nets.lpips(G(z), pair_x), one number per sample; here |difference|, 1 and 3."""
    nets = SimpleNamespace(generator=lambda z, cond: 2 * z[0], lpips=lambda a, b: (a - b).abs()[:, 0])
    batch = Batch(z=None, pair_z=tensor([[1.0], [3.0]]), pair_x=tensor([1.0], [3.0]))
    assert_close(regression_loss(None, nets, batch, config(reg_loss="lpips")), tensor(2.0)[0], **EXACT)
    assert_close(batch.seen["regression_loss"][1], tensor(1.0, 3.0), **EXACT)         # reported sample by sample


def test_denoising_loss_by_hand():
    """mean (1/sigma^2 + 1/sigma_data^2) (D(x + sigma noise) - x)^2, with sigma from cfg.critic_sigma.

    D(xt) = c xt with c = 1, sigma_data = .5:
      x = 1, noise 1, sigma 1:   xt = 2,  residual 1,  weight 5,  loss 5,   d/dc = 2 * 5 * 1 * 2   = 20
      x = 2, noise -1, sigma 2:  xt = 0,  residual -2, weight 4.25, loss 17, d/dc = 0
    mean loss 11, gradient at c 10; and none at x, which the critic must take as given.
    """
    c = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    nets = SimpleNamespace(fake=lambda xt, sigma, cond: c * xt, sigma_data=0.5)
    x, batch = tensor([1.0], [2.0]).requires_grad_(), Batch(z=None)
    with draws(tensor([1.0], [-1.0])):
        loss = denoising_loss(x, nets, batch, config(critic_sigma=tensor(1.0, 2.0)))
    loss.backward()
    assert_close((loss.detach(), c.grad), (tensor(11.0)[0], tensor(10.0)[0]), **EXACT)
    assert_close(batch.seen["denoising_loss"][1], tensor(5.0, 17.0), **EXACT)
    assert x.grad is None


def test_denoising_loss_is_least_at_the_posterior_mean():
    """The denoising loss is minimised by D = E[x | xt]: for x = a z that is f xt, f = a^2 / (a^2 + sigma^2).
    So d loss / dc = 0 at c = f in D = c xt (Gauss-Hermite; weight and sigma_data cancel)."""
    for s, a, sigma in GAUSSIANS:
        z, noise, weight = quadrature()
        c = torch.tensor(a**2 / (a**2 + sigma**2), dtype=torch.float64, requires_grad=True)
        level = torch.full((len(z),), sigma, dtype=torch.float64)
        loss = edm_loss(lambda xt, sigma, cond: c * xt, a * z, level, noise)
        (weight[:, None] * loss).sum().backward()
        assert_close(c.grad, torch.zeros_like(c), rtol=0, atol=1e-11)


def test_edm_loss_weight_undoes_the_preconditioning():
    """The weight is 1 / c_out^2, so the loss of an EDM net is the plain error of the raw network F (EDM eq. 8):

        edm_loss = (F - (x - c_skip xt) / c_out)^2,    c_skip = sd^2 / (sigma^2 + sd^2),  c_out = sigma sd / norm
    """
    x, noise, sigma, sd = normal(5, 3, seed=1), normal(5, 3, seed=2), tensor(0.01, 0.3, 1.0, 5.0, 80.0), 0.7
    denoiser, norm = EDM(lambda x_in, c_noise, cond: x_in.sin(), sd), (sigma[:, None] ** 2 + sd**2).sqrt()
    xt = x + sigma[:, None] * noise
    target = (x - sd**2 / norm**2 * xt) / (sigma[:, None] * sd / norm)
    assert_close(edm_loss(denoiser, x, sigma, noise, None, sd), ((xt / norm).sin() - target) ** 2, rtol=1e-9, atol=1e-9)


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
    """(E[loss], E[dloss/dx dx/da]) of a training loss, fake weights held; dx/da = z because x = a z."""
    z, noise, weight = quadrature()
    x, batch = (a * z).requires_grad_(), Batch(z=None)
    nets = SimpleNamespace(real=ideal(s), fake=ideal(a), sigma_data=1.0)
    with draws(noise):
        loss(x, nets, batch, config(dm_sigma=torch.full((len(x),), sigma, dtype=torch.float64), **fields)).backward()
    value = (weight * batch.seen[loss.__name__][1]).sum()
    return value, (weight * x.numel() * (x.grad * z)[:, 0]).sum()


def ratios(s, a, sigma):
    return s**2 / (s**2 + sigma**2), a**2 / (a**2 + sigma**2)


def derivative(function, a):
    a = torch.tensor(a, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(function(a), a)[0]


def test_dmd_is_the_gradient_of_kl():
    """E[(d_fake - d_real) dx/da] = a (f - r) = sigma^2 d/da KL(N(0, a^2 + sigma^2) || N(0, s^2 + sigma^2)).

    KL(N(0, u) || N(0, v)) = (u/v - 1 - ln(u/v)) / 2.  The factor sigma^2 turns a gap of scores into one of denoisers.
    """
    for s, a, sigma in GAUSSIANS:
        r, f = ratios(s, a, sigma)

        def kl(a):
            ratio = (a**2 + sigma**2) / (s**2 + sigma**2)
            return (ratio - 1 - ratio.log()) / 2

        gradient = gaussian(diff_instruct_loss, s, a, sigma)[1]
        assert_close(gradient, tensor(a * (f - r))[0], **EXACT)
        assert_close(gradient, sigma**2 * derivative(kl, a), **EXACT)


def test_dmd_with_its_normaliser_is_a_reweighted_kl_gradient():
    """g times its own denominator mean|x - d_real| is the unnormalised bracket, so the same identity holds for it."""
    for s, a, sigma in GAUSSIANS:
        r, f = ratios(s, a, sigma)
        z, noise, weight = quadrature()
        x = a * z
        xt = x + sigma * noise
        g = dmd_gradient(x, r * xt, f * xt) * (x - r * xt).abs().clamp(min=1e-5)
        assert_close((weight[:, None] * g * z).sum(), tensor(a * (f - r))[0], **EXACT)


def test_sid_value():
    """E[SiD] = (1 - alpha) MESM, MESM = E[(d_real - d_fake)^2] = (r - f)^2 (a^2 + sigma^2).

    Zero at alpha = 1 and negative above: a falling loss is not progress.
    """
    for (s, a, sigma), alpha in product(GAUSSIANS, ALPHAS):
        r, f = ratios(s, a, sigma)
        mesm = (r - f) ** 2 * (a**2 + sigma**2)
        value = gaussian(sid_loss, s, a, sigma, alpha=alpha, normalise=False)[0]
        assert_close(value, tensor((1 - alpha) * mesm)[0], **EXACT)


def test_sid_gradient():
    """E[dSiD/da], fake weights held and both Jacobians kept, is 2 a (r - f) (r - 1 - alpha (r - f)).

    By hand: SiD = gap ((r xt - x) - alpha gap), gap = (r - f) xt.  Its derivative along da, where dx = dxt = z da, is
    (r - f) z ((r xt - x) - alpha gap) + gap ((r - 1) z - alpha (r - f) z), and E[xt z] = E[x z] = a.
    """
    for (s, a, sigma), alpha in product(GAUSSIANS, ALPHAS):
        r, f = ratios(s, a, sigma)
        gradient = gaussian(sid_loss, s, a, sigma, alpha=alpha, normalise=False)[1]
        assert_close(gradient, tensor(2 * a * (r - f) * (r - 1 - alpha * (r - f)))[0], **EXACT)


def test_sid_gradient_is_two_halves_of_mesm():
    """M(a) = E[(d_real - d_fake)^2] depends on a twice: through the law of xt, and through the fake score f(a).

        dM/da = law + score,    SiD's gradient = score / 2 + (1 - alpha) law

    alpha = 1/2: exactly half of dM/da.   alpha = 1: half of the gradient with the sampling law held fixed.
    """
    for (s, a, sigma), alpha in product(GAUSSIANS, ALPHAS):
        r, f0 = ratios(s, a, sigma)
        law = derivative(lambda a: (r - f0) ** 2 * (a**2 + sigma**2), a)
        score = derivative(lambda b: (r - b**2 / (b**2 + sigma**2)) ** 2 * (a**2 + sigma**2), a)
        full = derivative(lambda a: (r - a**2 / (a**2 + sigma**2)) ** 2 * (a**2 + sigma**2), a)
        gradient = gaussian(sid_loss, s, a, sigma, alpha=alpha, normalise=False)[1]
        assert_close(gradient, score / 2 + (1 - alpha) * law, **EXACT)
        if alpha == 0.5:
            assert_close(gradient, full / 2, **EXACT)
        if alpha == 1.0:
            assert_close(gradient, score / 2, **EXACT)


def test_sid_with_large_alpha_repels_what_starts_far_out():
    """For alpha > 1 descent goes outwards once f > r + (1 - r) / alpha.  s = sigma = 1, alpha = 1.2: f > 11/12, that
    is a > sqrt(11) = 3.317.  At alpha = 1 every a > s is pulled inwards."""
    just_inside, just_outside = 3.31, 3.32
    assert gaussian(sid_loss, 1.0, just_inside, 1.0, alpha=1.2, normalise=False)[1] > 0
    assert gaussian(sid_loss, 1.0, just_outside, 1.0, alpha=1.2, normalise=False)[1] < 0
    assert gaussian(sid_loss, 1.0, just_outside, 1.0, alpha=1.0, normalise=False)[1] > 0


# ---- SiD --------------------------------------------------------------------------------------------------


def test_sid_integrand_by_hand():
    """gap ((d_real - x) - alpha gap) / mean|x - d_real| with gap = d_real - d_fake.

    x = (0, 0), d_real = (1, -3), d_fake = (3, -2):   gap = (-2, -1), d_real - x = (1, -3), mean|.| = 2
      alpha 0:    (-2 * 1, -1 * -3) / 2 = (-1, 1.5)
      alpha 1.2:  (-2 (1 + 2.4), -1 (-3 + 1.2)) / 2 = (-3.4, 0.9)
    """
    x, d_real, d_fake = tensor([0, 0]), tensor([1, -3.0]), tensor([3, -2.0])
    assert_close(sid_integrand(x, d_real, d_fake, 0.0), tensor([-1, 1.5]), **EXACT)
    assert_close(sid_integrand(x, d_real, d_fake, 1.2), tensor([-3.4, 0.9]), **EXACT)
    assert_close(sid_integrand(x, d_real, d_fake, 1.2, normalise=False), tensor([-6.8, 1.8]), **EXACT)


def test_sid_normaliser_is_per_sample():
    """The integrand is of degree 2 and its normaliser of degree 1: c (x, d_real, d_fake) gives c times the integrand,
    for the sample that is scaled and for no other."""
    x, d_real, d_fake = (normal(4, 3, seed=s) for s in range(3))
    scale = tensor([100.0], [1], [1], [1])
    scaled = sid_integrand(scale * x, scale * d_real, scale * d_fake, 1.2)
    assert_close(scaled, scale * sid_integrand(x, d_real, d_fake, 1.2), **EXACT)


def test_sid_loss_value():
    """sid_loss = mean over everything of the integrand at xt = x + sigma noise, sigma from cfg.dm_sigma."""
    x, sigma, noise, nets = curved_case()
    for alpha, normalise in product(ALPHAS, (True, False)):
        with draws(noise):
            loss = sid_loss(x, nets, Batch(z=None), config(dm_sigma=sigma, alpha=alpha, normalise=normalise))
        xt = x + sigma[:, None] * noise
        d_real, d_fake = nets.real(xt, sigma), nets.fake(xt, sigma)
        size = (x - d_real).abs().mean(1, keepdim=True) if normalise else 1.0
        gap = d_real - d_fake
        assert_close(loss, (gap * (d_real - x - alpha * gap) / size).mean(), **EXACT)


def test_sid_gradient_by_finite_differences():
    """The gradient at x runs through x itself and through both denoisers, with the normaliser a constant:

        [L(x + h e) - L(x - h e)] / 2h,    L(x) = mean gap(x) ((d_real(x) - x) - alpha gap(x)) / mean|x0 - d_real(x0)|

    h = 1e-5: truncation and rounding both stay below 1e-9.
    """
    x, sigma, noise, nets = curved_case()
    xt = (x + sigma[:, None] * noise).detach()
    size = (x.detach() - nets.real(xt, sigma)).abs().mean(1, keepdim=True)

    def frozen(x, alpha):
        xt = x + sigma[:, None] * noise
        d_real, d_fake = nets.real(xt, sigma), nets.fake(xt, sigma)
        gap = d_real - d_fake
        return (gap * (d_real - x - alpha * gap) / size).mean()

    for alpha in ALPHAS:
        x.grad = None
        with draws(noise):
            sid_loss(x, nets, Batch(z=None), config(dm_sigma=sigma, alpha=alpha)).backward()
        steps = 1e-5 * torch.eye(x.numel(), dtype=torch.float64).reshape(-1, *x.shape)
        slopes = [(frozen(x.detach() + h, alpha) - frozen(x.detach() - h, alpha)) / 2e-5 for h in steps]
        assert_close(x.grad.flatten(), torch.stack(slopes), rtol=0, atol=1e-9)


def test_sid_without_jacobians_is_dmd():
    """Detach both denoisers and the gradient at x is (d_fake - d_real) / mean|x - d_real| for every alpha: DMD's.
    All of SiD is in the Jacobians of the two networks."""
    d_real, d_fake = normal(5, 3, seed=1), normal(5, 3, seed=2)
    for alpha in ALPHAS:
        x = normal(5, 3).requires_grad_()
        sid_integrand(x, d_real, d_fake, alpha).sum().backward()
        assert_close(x.grad, dmd_gradient(x, d_real, d_fake), **EXACT)


def test_sid_with_jacobians_is_not_dmd():
    """... and with them it is something else, already for two linear denoisers: r = .2, f = .8, sigma = 2, noise = 0,
    x = 1, alpha = 1, no normaliser.  SiD = (r - f) (f - 1) x^2, slope 2 * .12 = .24; DMD's direction is f - r = .6."""
    x, sigma = tensor([1.0]).requires_grad_(), tensor(2.0)
    nets = SimpleNamespace(real=ideal(1.0), fake=ideal(4.0))      # 1/(1 + 4) and 16/(16 + 4)
    with draws(tensor([0.0])):
        sid_loss(x, nets, Batch(z=None), config(dm_sigma=sigma, normalise=False)).backward()
    assert_close(x.grad, tensor([0.24]), **EXACT)


def test_nothing_to_learn_when_fake_is_real():
    """d_fake = d_real: every distribution matching gradient is zero, whatever x is."""
    for loss in (dmd_loss, diff_instruct_loss, sid_loss):
        x, sigma, noise, nets = curved_case()
        nets.fake = nets.real
        with draws(noise):
            value = loss(x, nets, Batch(z=None), config(dm_sigma=sigma))
        value.backward()
        assert_close((value.detach(), x.grad), (torch.zeros_like(value), torch.zeros_like(x)), **EXACT)


def test_every_network_is_asked_for_the_class():
    """Both scores and the fake score's training see batch.cond: a student told its class is matched within it."""
    cond = torch.tensor([1, 0, 2, 1, 0, 2])
    for loss in (dmd_loss, diff_instruct_loss, sid_loss, denoising_loss):
        x, sigma, noise, nets = curved_case()
        asked, both = [], (nets.real, nets.fake)
        nets.real, nets.fake = [lambda xt, sigma, c, f=f: asked.append(c) or f(xt, sigma) for f in both]
        with draws(noise):
            loss(x, nets, Batch(z=None, cond=cond), config(dm_sigma=sigma, critic_sigma=sigma))
        assert len(asked) == (1 if loss is denoising_loss else 2) and all(c is cond for c in asked)


def test_several_noisings_are_the_mean_over_noises():
    """cfg.noisings = 3: value and gradient at x are the means of three losses, each with a third of the same noises; every
    sample keeps its class."""
    for loss in (dmd_loss, diff_instruct_loss, sid_loss):
        x, _, _, nets = curved_case()
        cond, sigma, noise = torch.arange(6), torch.linspace(0.2, 1.5, 18, dtype=torch.float64), normal(18, 2, seed=5)
        real, fake = nets.real, nets.fake
        nets.real = lambda xt, sigma, c: real(xt, sigma) + c[:, None]
        nets.fake = lambda xt, sigma, c: fake(xt, sigma) * c[:, None]

        def gradient(noise, **fields):
            with draws(noise):
                value = loss(x, nets, Batch(z=None, cond=cond), config(**fields))
            return value.detach(), torch.autograd.grad(value, x)[0]

        parts = [gradient(noise[i::3], dm_sigma=sigma[i::3]) for i in range(3)]       # rows 3 j + i belong to sample j
        mean = tuple(sum(part) / 3 for part in zip(*parts))
        assert_close(gradient(noise, dm_sigma=sigma, noisings=3), mean, **EXACT)


def test_every_loss_reports_sigma_and_its_values():
    """batch.seen[name] = (sigma, loss per sample) without a graph: logs bin it by sigma, NaN reports name the sigma.
    The mean over samples is the loss itself; the critic's GAN loss reports its half on generated samples."""
    for loss in (dmd_loss, diff_instruct_loss, sid_loss, denoising_loss, gan_generator_loss, gan_critic_loss):
        x, sigma, noise, nets = curved_case()
        if loss in (gan_generator_loss, gan_critic_loss):
            nets, _ = gan_nets()
        cond = torch.arange(6) if loss in (gan_generator_loss, gan_critic_loss) else None
        batch = Batch(z=None, cond=cond, real=torch.full((6, 2), 9.0, dtype=torch.float64), real_cond=cond)
        with draws(noise, torch.zeros_like(noise)):
            value = loss(x, nets, batch, config(dm_sigma=sigma, critic_sigma=sigma, gan_sigma=sigma))
        seen_sigma, per_sample = batch.seen[loss.__name__]
        assert_close(seen_sigma, sigma, **EXACT)
        assert per_sample.shape == (6,) and not per_sample.requires_grad
        if loss is gan_critic_loss:                               # the real half: tanh is 1 at 9, so its logit is 1 - 2
            value = value - math.log(1 + math.e)
            assert_close(per_sample.mean(), value.detach(), rtol=0, atol=1e-6)
        else:
            assert_close(per_sample.mean(), value.detach(), **EXACT)


# ---- the GAN ----------------------------------------------------------------------------------------------


def test_gan_logit_losses_by_hand():
    """softplus(0) = ln 2, softplus(1) = 1.3132616875182228, softplus(-1) = 0.3132616875182228 (their difference is 1).

    The generator is content (small loss) when its logits are high, the critic when real is high and fake is low.
    """
    up, down, ln2 = 1.3132616875182228, 0.3132616875182228, math.log(2)
    assert_close(generator_logit_loss(tensor(0.0, 1.0)), tensor((ln2 + down) / 2)[0], **EXACT)
    assert_close(generator_logit_loss(tensor(-1.0)), tensor(up)[0], **EXACT)
    assert_close(critic_logit_loss(tensor(1.0), tensor(-1.0)), tensor(2 * down)[0], **EXACT)
    assert_close(critic_logit_loss(tensor(-1.0), tensor(0.0, 0.0)), tensor(up + ln2)[0], **EXACT)


def test_gan_generator_loss_does_not_saturate():
    """d/dlogit mean softplus(-l) = -sigmoid(-l) / B: close to -1 / B exactly when the critic is sure (l << 0)."""
    logits = tensor(-30.0, 0.0, 2.0).requires_grad_()
    generator_logit_loss(logits).backward()
    assert_close(logits.grad, -torch.sigmoid(-logits.detach()) / 3, **EXACT)


def gan_nets():
    """features(xt) = tanh(xt + sigma + cond), logit = features . (1, -2): small enough to differentiate by hand."""
    def features(xt, sigma, cond):
        return (xt + expand(sigma, xt) + expand(cond, xt)).tanh()

    v = tensor(1.0, -2.0)
    return SimpleNamespace(fake=SimpleNamespace(features=features), discriminator=lambda features: features @ v), v


def test_gan_generator_loss_reaches_x_through_the_features():
    """d/dx mean softplus(-v . tanh(y)) = -sigmoid(-logit) / B * v (1 - tanh(y)^2),  y = x + sigma noise + sigma + cond.

    The critic's weights do not move in this update, yet the gradient passes through them (DMD2 issue 75).
    """
    x, sigma, noise, _ = curved_case()
    (nets, v), cond = gan_nets(), torch.arange(6)
    with draws(noise):
        gan_generator_loss(x, nets, Batch(z=None, cond=cond), config(gan_sigma=sigma)).backward()
    h = (x.detach() + sigma[:, None] * (noise + 1) + cond[:, None]).tanh()
    assert_close(x.grad, -torch.sigmoid(-h @ v)[:, None] / 6 * v * (1 - h**2), **EXACT)


def test_gan_critic_loss():
    """mean softplus(D(fake)) + mean softplus(-D(real)), both noised, each with its own noise and its own labels; no
    gradient reaches x."""
    x, sigma, noise, _ = curved_case()
    (nets, v), cond, real_cond = gan_nets(), torch.arange(6), torch.arange(6).flip(0)
    real, real_noise = normal(6, 2, seed=3).requires_grad_(), normal(6, 2, seed=4)
    with draws(noise, real_noise):
        batch = Batch(z=None, cond=cond, real=real, real_cond=real_cond)
        loss = gan_critic_loss(x, nets, batch, config(gan_sigma=sigma))
    loss.backward()
    fake_logit = (x + sigma[:, None] * (noise + 1) + cond[:, None]).tanh() @ v
    real_logit = (real + sigma[:, None] * (real_noise + 1) + real_cond[:, None]).tanh() @ v
    expected = (1 + fake_logit.exp()).log().mean() + (1 + (-real_logit).exp()).log().mean()
    assert_close(loss, expected, **EXACT)
    assert x.grad is None


# ---- who moves, and who does not --------------------------------------------------------------------------


def small_net(seed=0):
    """A 2D EDM network with random weights (a fresh one answers c_skip x: its last layer starts at zero)."""
    net = EDM(MLP(width=16, depth=2))
    for i, p in enumerate(net.parameters()):
        p.data = 0.3 * torch.randn(p.shape, generator=rng(100 * seed + i))
    return net


def small_run(method, **overrides):
    """(nets, opts, draw, cfg) of a tiny 2D run whose teacher is a network, as on images.  The GAN is on in dmd2."""
    gan = dict(w_gan=0.3, w_disc=0.1) if method == "dmd2" else {}
    cfg = resolve(dict(preset="toy", method=method, batch=8, critic_steps=2, ema=20.0) | gan | overrides)
    mixture, net, device = MIXTURES["ring8"](), small_net(), torch.device("cpu")
    teacher = Teacher(net, mixture.shape, mixture.classes, 0.5, "toy:ring8", net)
    pairs = {"z": torch.randn(32, 2, generator=rng(1)), "x": mixture.sample(32, rng(2))[0]}
    nets, opts = build(cfg, teacher, device)
    return nets, opts, Draw(cfg, teacher, mixture, pairs, rng(3), device), cfg


def snapshot(*modules):
    """Copies of all weights, and of all gradients (None where there is none)."""
    parameters = [p for m in modules for p in m.parameters()]
    return [p.detach().clone() for p in parameters], [copy.deepcopy(p.grad) for p in parameters]


def assert_same(before, after):
    """Equal to the bit, and None where it was None."""
    for a, b in zip(before[0] + before[1], after[0] + after[1], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, rtol=0, atol=0)


def moved(before, after):
    return any(not torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))


def spy(opt, when_stepped):
    """Call when_stepped() after each opt.step()."""
    step = opt.step

    def watched():
        step()
        when_stepped()

    opt.step = watched


@pytest.mark.parametrize("method", METHODS)
def test_who_moves(method):
    """Three train steps: critic updates move the critic alone, generator updates the generator alone, and the teacher
    never moves; to the bit, gradients included."""
    nets, opts, draw, cfg = small_run(method)
    critic, teacher = (nets.fake, nets.discriminator), snapshot(nets.real)
    last = {"generator": snapshot(nets.generator), "critic": snapshot(*critic)}

    def teacher_is_frozen():
        assert_same(teacher, snapshot(nets.real))
        assert not any(p.requires_grad for p in nets.real.parameters())

    def critic_stepped():
        teacher_is_frozen()
        assert_same(last["generator"], snapshot(nets.generator))  # weights and gradients of the generator: untouched
        last["critic"] = snapshot(*critic)

    def generator_stepped():
        teacher_is_frozen()
        assert_same(last["critic"], snapshot(*critic))            # nothing leaked into the critic's gradients
        last["generator"] = snapshot(nets.generator)

    spy(opts["critic"], critic_stepped)
    spy(opts["generator"], generator_stepped)
    first = dict(last)
    for step in range(3):
        train_step(nets, opts, draw, cfg, step)
    assert moved(first["generator"], snapshot(nets.generator))
    assert moved(first["critic"], snapshot(*critic)) == bool(METHODS[method].critic)


def test_a_run_starts_the_same_whatever_was_drawn_before():
    """build() seeds torch itself: teacher from the cache or trained just now, the discriminator's weights are equal."""
    first = small_run("dmd2")[0]
    torch.randn(7)
    assert_same(snapshot(first.discriminator), snapshot(small_run("dmd2")[0].discriminator))


def test_build_follows_the_config():
    """Guidance reaches the real score; generator, average and fake score start as the teacher; the average is frozen.
    Each optimiser holds its own side's weights, all of them and no others."""
    nets, opts, _, _ = small_run("dmd2", guidance=3.0)
    assert nets.real.guidance == 3.0
    teacher = snapshot(nets.real.denoiser)[0]
    for module in (nets.generator, nets.ema, nets.fake):
        assert_close(snapshot(module)[0], teacher, rtol=0, atol=0)
    assert not any(p.requires_grad for p in nets.ema.parameters())
    trained = {name: {id(p) for group in opt.param_groups for p in group["params"]} for name, opt in opts.items()}
    assert trained["generator"] == {id(p) for p in nets.generator.parameters()}
    assert trained["critic"] == {id(p) for m in (nets.fake, nets.discriminator) for p in m.parameters()}


def test_data_order_is_independent_of_the_losses():
    """Real data, pairs, classes and steps come from the run's own CPU generator: whatever a loss draws from torch's
    global stream, the next batch holds the same data."""
    batches = []
    for disturbance in (0, 5):
        draw = small_run("dmd2", sigmas="3,1")[2]
        draw.teacher, draw.pairs = draw.teacher._replace(classes=10), draw.pairs | {"cond": torch.arange(32)}
        first = draw()
        torch.randn(disturbance)
        batches.append([first, draw()])
    for a, b in zip(*batches):
        for name in ("cond", "step", "real", "pair_z", "pair_x", "pair_cond"):
            assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0)
        assert a.z.shape == (2, 8, 2) and a.cond.shape == (8,)
    assert not torch.equal(batches[0][1].z, batches[1][1].z)      # the generator's noise is from the global stream
    conds = torch.cat([draw().cond for _ in range(100)])
    assert_close(conds.bincount() / 800, torch.full((10,), 0.1), rtol=0, atol=0.053)  # five standard errors


def test_noise_image_pairs_stay_together():
    """Draw hands out pair_z and pair_x from the same rows: with x = 2 z in the pool, pair_x = 2 pair_z in a batch."""
    _, _, draw, _ = small_run("dmd")
    draw.pairs = {"z": draw.pairs["z"], "x": 2 * draw.pairs["z"]}
    batch = draw()
    assert_close(batch.pair_x, 2 * batch.pair_z[0], rtol=0, atol=0)
    assert batch.pair_z.shape == (1, 8, 2) and len(batch.pair_x.unique(dim=0)) > 1


def test_sid_differentiates_through_frozen_networks():
    """requires_grad_(False) is not no_grad: no gradient lands in either network, and x still feels their Jacobians."""
    real, fake = RealScore(small_net(1)), FakeScore(small_net(2))
    fake.requires_grad_(False)
    nets = SimpleNamespace(real=real, fake=fake)
    x = normal(4, 2).float().requires_grad_()
    with draws(normal(4, 2, seed=1).float()):
        loss = sid_loss(x, nets, Batch(z=None), config(dm_sigma=torch.ones(4)))
    loss.backward()
    assert all(p.grad is None for p in [*real.parameters(), *fake.parameters()])
    with draws(normal(4, 2, seed=1).float()):
        without = x.detach().requires_grad_()
        dmd_loss(without, nets, Batch(z=None), config(dm_sigma=torch.ones(4))).backward()
    assert (x.grad - without.grad).abs().max() > 0.01             # more than the gradient without Jacobians


def test_fake_score_never_has_dropout():
    """A fake score in train mode would put dropout noise into the gradient: train() does not reach its network."""
    fake = FakeScore(EDM(nn.Dropout(0.5)))
    nn.ModuleList([fake]).train()
    assert not any(m.training for m in fake.net.modules())


def test_fake_score_starts_as_the_teacher_and_leaves_it_alone():
    """FakeScore(net) is a copy: the same function at first, with weights of its own."""
    net = small_net()
    fake, x, sigma = FakeScore(net), normal(4, 2).float(), torch.ones(4)
    assert_close(fake(x, sigma), net(x, sigma), rtol=0, atol=0)
    assert not {id(p) for p in net.parameters()} & {id(p) for p in fake.parameters()}
    assert_close(fake.features(x, sigma), net.features(x, sigma), rtol=0, atol=0)


def test_fake_score_hands_the_class_on():
    """The class reaches the network, for its prediction and for its features."""
    class Classes(nn.Module):
        def forward(self, x, c_noise, cond):
            return x + cond[:, None]

        features = forward

    fake, x, sigma, cond = FakeScore(EDM(Classes())), normal(3, 2), tensor(0.5, 0.5, 0.5), torch.tensor([0, 1, 2])
    features = 2**0.5 * x + cond[:, None]                         # sigma = sigma_data = 1/2: c_in = sqrt(2)
    assert_close(fake.features(x, sigma, cond), features, **EXACT)
    assert_close(fake(x, sigma, cond), x / 2 + 0.125**0.5 * features, **EXACT)        # c_skip = 1/2, c_out = sqrt(1/8)


# ---- the train step ---------------------------------------------------------------------------------------


class Scale(nn.Module):
    """x = a z: the smallest generator.  Records each call: the value of a, is a graph built, the other inputs."""

    def __init__(self, a=2.0):
        super().__init__()
        self.a, self.calls = nn.Parameter(torch.tensor(a, dtype=torch.float64)), []

    def forward(self, z, cond=None, step=None, start=None):
        self.calls.append((self.a.item(), torch.is_grad_enabled(), (cond, step, start)))
        return self.a * z[0]


def probe_run(critic_steps=3, lr=0.1, accumulate=1, **fields):
    """A train step whose every event is written down: scalar generator and critic, SGD, losses with known gradients.

    generator losses:  w_dm * mean x  +  w_gan * mean x^2;    critic loss:  c * mean x, which raises c's gradient mean x
    """
    log = []

    def linear(x, nets, batch, cfg):
        log.append(("linear", x.requires_grad, batch))
        return x.mean()

    def square(x, nets, batch, cfg):
        log.append(("square", x.requires_grad, batch))
        return x.square().mean()

    def fit(x, nets, batch, cfg):
        log.append(("fit", x.requires_grad, batch))
        return nets.fake.a * x.detach().mean()

    method = Method(generator=[("w_dm", linear), ("w_gan", square)], critic=[("w_fake", fit)])
    generator, fake = Scale(2.0), Scale(0.0)
    nets = Nets(nn.Identity(), fake, nn.Identity(), generator, copy.deepcopy(generator).requires_grad_(False), 0.5)
    opts = {"generator": torch.optim.SGD(generator.parameters(), lr), "critic": torch.optim.SGD(fake.parameters(), lr)}
    for name, opt in opts.items():
        spy(opt, lambda name=name: log.append((name, None, None)))
    count = iter(range(100))

    def draw():                                                   # batch k has mean z = 1.5 + k
        k = next(count)
        return Batch(tensor([[1.0], [2.0]]) + k, cond=f"cond {k}", step=k, start=f"start {k}")

    cfg = SimpleNamespace(method="probe", critic_steps=critic_steps, accumulate=accumulate, ema=2.0, clip=0.0,
                          **dict(w_dm=1.0, w_gan=1.0, w_fake=1.0) | fields)
    with mock.patch.dict(METHODS, {"probe": method}):
        logs = train_step(nets, opts, draw, cfg)
    return nets, log, logs, next(count)


def test_train_step_order_and_counts():
    """critic_steps critic updates on fresh batches, then one generator update on the last of them."""
    nets, log, _, drawn = probe_run(critic_steps=3)
    assert [name for name, _, _ in log] == ["fit", "critic"] * 3 + ["linear", "square", "generator"]
    batches = [batch for name, _, batch in log if name == "fit"]
    assert drawn == 3 and len({id(b) for b in batches}) == 3
    assert all(batch is batches[-1] for name, _, batch in log if name in ("linear", "square"))


def test_train_step_shows_the_critic_detached_samples():
    """The critic sees numbers, not a graph; the generator losses see the graph; early critic passes build none."""
    nets, log, _, _ = probe_run(critic_steps=3)
    assert [needs for name, needs, _ in log if name == "fit"] == [False] * 3
    assert [needs for name, needs, _ in log if name in ("linear", "square")] == [True, True]
    assert [graph for _, graph, _ in nets.generator.calls] == [False, False, True]
    assert [a for a, _, _ in nets.generator.calls] == [2.0, 2.0, 2.0]                 # the generator stands still


def test_train_step_trains_the_step_of_its_batch():
    """The generator is asked for the batch's own class, step and start: each of a few steps has its turn."""
    nets, _, _, _ = probe_run(critic_steps=3)
    assert [rest for _, _, rest in nets.generator.calls] == [(f"cond {k}", k, f"start {k}") for k in range(3)]


def test_train_step_by_hand():
    """Every number of one step.  a = 2, c = 0, lr .1, batches z = (1, 2), (2, 3), (3, 4):

    critic:     c gradient = mean x = 3, 5, 7                        ->  c = -.1 (3 + 5 + 7) = -1.5
    generator:  d/da [w_dm mean(a z) + w_gan mean(a^2 z^2)] at z = (3, 4), weights .5 and .2
                = .5 * 3.5 + .2 * 2 a * 12.5 = 1.75 + 10 = 11.75     ->  a = 2 - 1.175 = .825
    average:    a long run's weight is 1 - .5^(1/2) at half-life 2   ->  2 + (1 - sqrt(.5)) (.825 - 2)
    logs:       unweighted, before the update: mean x = 7, mean x^2 = 4 * 12.5 = 50, critic's last = c mean x = -.8 * 7
    """
    nets, _, logs, _ = probe_run(critic_steps=3, w_dm=0.5, w_gan=0.2)
    average = 2 + (1 - math.sqrt(0.5)) * (0.825 - 2)
    got = torch.stack([nets.fake.a, nets.generator.a, nets.ema.a]).detach()
    assert_close(got, tensor(-1.5, 0.825, average), **EXACT)
    assert_close([logs[k] for k in ("linear", "square", "fit")], [*tensor(7.0, 50.0, -5.6)], **EXACT)
    assert not any(v.requires_grad for v in logs.values())


def test_train_step_in_parts():
    """accumulate = 2: a batch in two parts, each with its own draw; the gradient is the mean over parts, the same as of
    one batch that holds both.  a = 2, c = 0, lr .1, parts z = (1, 2) (2, 3), critic mean x = 2 * 2 = 4  ->  c = -.4;
    generator at z = (1, 2, 2, 3): w_dm 1 * 2 + w_gan .2 * 2 a * 18/4 = 2 + 3.6  ->  a = 2 - .56.
    """
    nets, log, _, drawn = probe_run(critic_steps=1, accumulate=2, w_gan=0.2)
    assert_close(torch.stack([nets.fake.a, nets.generator.a]).detach(), tensor(-0.4, 1.44), **EXACT)
    assert drawn == 2 and [n for n, _, _ in log] == ["fit", "fit", "critic", *["linear", "square"] * 2, "generator"]
    assert [graph for _, graph, _ in nets.generator.calls] == [False, False, True, True]  # one graph at a time


def test_terms_of_weight_zero_are_not_computed():
    """w_gan = 0 switches the GAN off for real: its loss is never called (and needs no real data); no critic term with a
    weight means no critic update."""
    _, log, logs, _ = probe_run(critic_steps=1, w_gan=0.0)
    assert [name for name, _, _ in log] == ["fit", "critic", "linear", "generator"] and set(logs) == {"fit", "linear"}
    _, log, logs, _ = probe_run(critic_steps=2, w_fake=0.0)
    assert [name for name, _, _ in log] == ["linear", "square", "generator"] and set(logs) == {"linear", "square"}


def update_with(opt, loss, clip=0.0, batches=(None,)):
    """train.update on a method made of one loss."""
    cfg, nets = SimpleNamespace(method="probe", w=1.0, clip=clip), SimpleNamespace(parallel={})
    with mock.patch.dict(METHODS, {"probe": Method(generator=[("w", loss)], critic=[])}):
        update("generator", batches, nets, {"generator": opt}, batches, cfg, {})


def test_updates_do_not_accumulate():
    """Each update starts from no gradient: two updates on loss = 3a move a by lr * 3 twice, not by 3 and then 6."""
    a = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    opt = torch.optim.SGD([a], 0.1)
    for _ in range(2):
        update_with(opt, lambda x, nets, batch, cfg: 3 * a)
    assert_close(a.detach(), tensor(1 - 0.3 - 0.3)[0], **EXACT)


def test_clip_limits_the_norm_over_the_whole_network():
    """Gradient (3, 4) has norm 5; clip = 1 makes it (.6, .8) (torch divides by 5 + 1e-6), clip = 10 leaves it."""
    for clip, expected in ((1.0, tensor(0.6, 0.8)), (10.0, tensor(3.0, 4.0)), (0.0, tensor(3.0, 4.0))):
        a, b = (nn.Parameter(torch.tensor(0.0, dtype=torch.float64)) for _ in range(2))
        update_with(torch.optim.SGD([a, b], 1.0), lambda x, nets, batch, cfg: 3 * a + 4 * b, clip)
        assert_close(-torch.stack([a, b]).detach(), expected, rtol=1e-6, atol=0)


def test_methods_are_what_the_papers_say():
    """DMD: matching + regression.  DMD2: matching + GAN.  SiD: its own loss.  All three fit the fake score by
    denoising; only DMD2's critic has a discriminator."""
    names = {m: ([f.__name__ for _, f in METHODS[m].generator], [f.__name__ for _, f in METHODS[m].critic])
             for m in METHODS}
    assert names["dmd"] == (["dmd_loss", "regression_loss"], ["denoising_loss"])
    assert names["dmd2"] == (["dmd_loss", "gan_generator_loss"], ["denoising_loss", "gan_critic_loss"])
    assert names["sid"] == (["sid_loss"], ["denoising_loss"])
    assert names["diff_instruct"] == (["diff_instruct_loss"], ["denoising_loss"])
    assert names["regression"] == (["regression_loss"], [])


def test_add_noise_is_variance_exploding():
    """xt = x + sigma noise, with x not scaled: x = (1, 2), sigma = (3, 10), noise = (1, -1)  ->  (4, -8)."""
    got = add_noise(tensor([1.0], [2.0]), tensor(3.0, 10.0), tensor([1.0], [-1.0]))
    assert_close(got, tensor([4.0], [-8.0]), rtol=0, atol=0)

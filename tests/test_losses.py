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
from itertools import product
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from closed_forms import (ALPHAS, BITWISE, EXACT, GAUSSIANS, config, curved_case, derivative, flow_network, gaussian, given,
                          ideal, normal, quadrature, ratios, rng, small_net, tensor)
from nano_dmd.denoiser import EDM, FromFlow, edm_loss
from nano_dmd.dmd_loss import diff_instruct_loss, dmd_gradient, dmd_loss, regression_loss
from nano_dmd.engine.build import build
from nano_dmd.engine.config import resolve
from nano_dmd.engine.diagnostics import LEVELS, gaps
from nano_dmd.engine.draw import Batch, Draw
from nano_dmd.engine.files import save_checkpoint
from nano_dmd.engine.runs import state
from nano_dmd.fake_score import FakeScore, denoising_loss
from nano_dmd.gan import critic_logit_loss, gan_critic_loss, gan_generator_loss, generator_logit_loss
from nano_dmd.methods import METHODS, Method, Nets, needs, samples, train_step, update
from nano_dmd.noise import add_noise, draw_sigma, expand
from nano_dmd.real_score import RealScore
from nano_dmd.sid_loss import sid_integrand, sid_loss
from nano_dmd.teacher import Teacher
from nano_dmd.teachers.data import load_data
from toy.mixtures import MIXTURES


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
    assert_close(dmd_gradient(x, x, x), torch.zeros_like(x), **BITWISE)


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
    """dmd_loss = mean 0.5 g^2 over the elements of a sample; the gradient of its mean at x is g / N, N = x.numel().

    xt = x + sigma noise with one noise for both scores; both are asked at xt and cfg.dm_sigma.
    """
    x, sigma, noise, nets = curved_case()
    batch = given(noise, pair_x=normal(6, 2, seed=5))             # a paired target has no business in the normaliser
    loss = dmd_loss(x, nets, batch, config(dm_sigma=sigma))
    loss.mean().backward()
    xt = x.detach() + sigma[:, None] * noise
    d_real, d_fake = nets.real(xt, sigma), nets.fake(xt, sigma)
    g = (d_fake - d_real) / (x.detach() - d_real).abs().mean(1, keepdim=True)
    assert_close(x.grad, g / x.numel(), **EXACT)
    assert_close(loss.detach(), 0.5 * g.square().mean(1), **EXACT)


def test_diff_instruct_loss_gradient():
    """Diff-Instruct is DMD without the normaliser: d loss / dx = (d_fake - d_real) / N."""
    x, sigma, noise, nets = curved_case()
    diff_instruct_loss(x, nets, given(noise), config(dm_sigma=sigma)).mean().backward()
    xt = x.detach() + sigma[:, None] * noise
    assert_close(x.grad, (nets.fake(xt, sigma) - nets.real(xt, sigma)) / x.numel(), **EXACT)


@pytest.mark.parametrize("loss", [dmd_loss, diff_instruct_loss, sid_loss])
def test_a_flow_teacher_gives_the_same_gradient(loss):
    """Both scores asked as flow networks behind FromFlow, v = E[noise] - E[x0]: the gradient at x is that of the exact
    denoisers, SiD's path through both networks included; relative 1e-9 in float64."""
    gradients = []
    for wrap in (lambda net: net, lambda net: FromFlow(flow_network(net))):
        x, sigma, noise, nets = curved_case()
        nets.real, nets.fake = wrap(nets.real), wrap(nets.fake)
        loss(x, nets, given(noise), config(dm_sigma=sigma, alpha=1.2)).mean().backward()
        gradients.append(x.grad)
    assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_regression_loss_by_hand():
    """(G(z) - pair_x)^2, G asked at the pairs' noise and class; x is not used.

    G(z) = a z with a = 2:  z = (1, 3), pair_x = (1, 5)  ->  residuals (1, 1), losses (1, 1), d mean / da = 2 (1 + 3) / 2
    """
    a, asked = torch.tensor(2.0, dtype=torch.float64, requires_grad=True), []
    nets = SimpleNamespace(generator=lambda z, cond: asked.append(cond) or a * z[0])
    pair_cond = torch.tensor([3, 4])
    batch = Batch(z=None, cond=torch.tensor([0, 1]), pair_z=tensor([[1.0], [3.0]]), pair_x=tensor([1.0], [5.0]),
                  pair_cond=pair_cond)
    loss = regression_loss(None, nets, batch, config())
    loss.mean().backward()
    assert_close((loss.detach(), a.grad), (tensor(1.0, 1.0), tensor(4.0)[0]), **EXACT)
    assert asked[0] is pair_cond


def test_regression_loss_by_another_distance():
    """reg_loss "lpips": nets.lpips(G(z), pair_x), one number per sample; here |difference|, 1 and 3."""
    nets = SimpleNamespace(generator=lambda z, cond: 2 * z[0], lpips=lambda a, b: (a - b).abs()[:, 0])
    batch = Batch(z=None, pair_z=tensor([[1.0], [3.0]]), pair_x=tensor([1.0], [3.0]))
    assert_close(regression_loss(None, nets, batch, config(reg_loss="lpips")), tensor(1.0, 3.0), **EXACT)


def test_denoising_loss_by_hand():
    """(1/sigma^2 + 1/sigma_data^2) (D(x + sigma noise) - x)^2, with sigma from cfg.critic_sigma.

    D(xt) = c xt with c = 1, sigma_data = .5:
      x = 1, noise 1, sigma 1:   xt = 2,  residual 1,  weight 5,  loss 5,   d/dc = 2 * 5 * 1 * 2   = 20
      x = 2, noise -1, sigma 2:  xt = 0,  residual -2, weight 4.25, loss 17, d/dc = 0
    The mean loss is 11 and its gradient at c is 10.
    """
    c = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    nets = SimpleNamespace(fake=lambda xt, sigma, cond: c * xt, sigma_data=0.5)
    batch = given(tensor([1.0], [-1.0]))
    loss = denoising_loss(tensor([1.0], [2.0]), nets, batch, config(critic_sigma=tensor(1.0, 2.0)))
    loss.mean().backward()
    assert_close((loss.detach(), c.grad), (tensor(5.0, 17.0), tensor(10.0)[0]), **EXACT)


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


# ---- one-dimensional Gaussians, exactly (closed_forms.py) ---------------------------------------------------


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


def test_logged_gaps_by_hand():
    """mesm = w (d_real - d_fake)^2 and fake_loss = w (d_fake - x)^2 at each level, w = 1/sigma^2 + 1/sd^2.

    d_real = .3, d_fake = -.1, x = .5 and .1, sd = .5: .16 w, and (.36 + .04) / 2 w.
    """
    nets = SimpleNamespace(real=lambda xt, sigma, cond: 0 * xt + 0.3, fake=lambda xt, sigma, cond: 0 * xt - 0.1, sigma_data=0.5)
    for level, mesm, fake_loss in zip(LEVELS, *gaps(tensor([0.5, 0.1]), nets, None), strict=True):
        w = 1 / level**2 + 4
        assert_close(torch.stack([mesm, fake_loss]), tensor(0.16 * w, 0.2 * w), **EXACT)


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
    """sid_loss = mean over a sample of the integrand at xt = x + sigma noise, sigma from cfg.dm_sigma."""
    x, sigma, noise, nets = curved_case()
    for alpha, normalise in product(ALPHAS, (True, False)):
        loss = sid_loss(x, nets, given(noise), config(dm_sigma=sigma, alpha=alpha, normalise=normalise))
        xt = x + sigma[:, None] * noise
        d_real, d_fake = nets.real(xt, sigma), nets.fake(xt, sigma)
        size = (x - d_real).abs().mean(1, keepdim=True) if normalise else 1.0
        gap = d_real - d_fake
        assert_close(loss, (gap * (d_real - x - alpha * gap) / size).mean(1), **EXACT)


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
        sid_loss(x, nets, given(noise), config(dm_sigma=sigma, alpha=alpha)).mean().backward()
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
    sid_loss(x, nets, given(tensor([0.0])), config(dm_sigma=sigma, normalise=False)).mean().backward()
    assert_close(x.grad, tensor([0.24]), **EXACT)


def test_nothing_to_learn_when_fake_is_real():
    """d_fake = d_real: every distribution matching gradient is zero, whatever x is."""
    for loss in (dmd_loss, diff_instruct_loss, sid_loss):
        x, sigma, noise, nets = curved_case()
        nets.fake = nets.real
        value = loss(x, nets, given(noise), config(dm_sigma=sigma))
        value.mean().backward()
        assert_close((value.detach(), x.grad), (torch.zeros_like(value), torch.zeros_like(x)), **EXACT)


def test_every_network_is_asked_for_the_class():
    """Both scores and the fake score's training see batch.cond: a student told its class is matched within it."""
    cond = torch.tensor([1, 0, 2, 1, 0, 2])
    for loss in (dmd_loss, diff_instruct_loss, sid_loss, denoising_loss):
        x, sigma, noise, nets = curved_case()
        asked, both = [], (nets.real, nets.fake)
        nets.real, nets.fake = [lambda xt, sigma, c, f=f: asked.append(c) or f(xt, sigma) for f in both]
        loss(x, nets, given(noise, cond=cond), config(dm_sigma=sigma, critic_sigma=sigma))
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
            value = loss(x, nets, given(noise, cond=cond), config(**fields)).mean()
            return value.detach(), torch.autograd.grad(value, x)[0]

        parts = [gradient(noise[i::3], dm_sigma=sigma[i::3]) for i in range(3)]       # rows 3 j + i belong to sample j
        mean = tuple(sum(part) / 3 for part in zip(*parts))
        assert_close(gradient(noise, dm_sigma=sigma, noisings=3), mean, **EXACT)


def test_every_loss_is_one_value_per_sample():
    """(B,), and sample i alone moves value i: nothing is averaged over the batch before the step does."""
    for loss in (dmd_loss, diff_instruct_loss, sid_loss, denoising_loss, gan_generator_loss, gan_critic_loss):
        x, sigma, noise, nets = curved_case()
        cond, real, on_features = None, normal(6, 2, seed=3), loss in (gan_generator_loss, gan_critic_loss)
        if on_features:
            nets, cond = gan_nets()[0], torch.arange(6)
        batch = given(noise, noise, cond=cond, real=real, real_cond=cond)
        values = loss(x, nets, batch, config(dm_sigma=sigma, critic_sigma=sigma, gan_sigma=sigma))
        assert values.shape == (6,), loss.__name__
        for i in range(6):
            moved_by, = torch.autograd.grad(values[i], x, retain_graph=True)
            assert moved_by.any(1).tolist() == [j == i for j in range(6)], loss.__name__


# ---- what a batch draws and remembers ---------------------------------------------------------------------


def test_a_noising_is_a_sigma_and_a_unit_noise():
    """Batch.noising(spec, x): sigma (B,) of the distribution that spec names, then noise like x."""
    batch, x = Batch(z=None), torch.zeros(3, 1, 4, 4, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sigma, noise = batch.noising("karras(0.002,80)", x)
        torch.manual_seed(0)
        assert_close(sigma, draw_sigma("karras(0.002,80)", 3, "cpu"), **BITWISE)
        assert_close(noise, torch.randn(3, 1, 4, 4, dtype=torch.float64), **BITWISE)


def test_a_batch_remembers_the_noise_levels_of_generated_samples():
    """keep(name, values): the sigmas of the first noising since the last keep, which is that of x in every loss. The
    critic's GAN loss noises real data after that.  A loss without noise has none."""
    batch, x, real, values = Batch(z=None), torch.zeros(3, 2), torch.ones(3, 2), [tensor(1.0, 2.0, 6.0), *normal(2, 3)]
    first, _ = batch.noising("lognormal(0,1)", x)
    batch.noising("lognormal(0,1)", real)
    assert_close(batch.keep("gan_critic_loss", values[0]), tensor(3.0)[0], **EXACT)
    second, _ = batch.noising("lognormal(0,1)", x)
    batch.keep("dmd_loss", values[1])
    batch.keep("regression_loss", values[2])
    assert batch.seen["regression_loss"][0] is None and not torch.equal(first, second)
    assert_close([batch.seen["gan_critic_loss"], batch.seen["dmd_loss"]], [(first, values[0]), (second, values[1])], **BITWISE)
    assert batch.seen["regression_loss"][1] is values[2]


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
    """The mean is generator_logit_loss, and its gradient -sigmoid(-logit) / B * v (1 - tanh(y)^2), where logit =
    v . tanh(y) and y = x + sigma noise + sigma + cond.

    The critic's weights do not move in this update, yet the gradient passes through them (DMD2 issue 75).
    """
    x, sigma, noise, _ = curved_case()
    (nets, v), cond = gan_nets(), torch.arange(6)
    loss = gan_generator_loss(x, nets, given(noise, cond=cond), config(gan_sigma=sigma))
    loss.mean().backward()
    h = (x.detach() + sigma[:, None] * (noise + 1) + cond[:, None]).tanh()
    assert_close(x.grad, -torch.sigmoid(-h @ v)[:, None] / 6 * v * (1 - h**2), **EXACT)
    assert_close(loss.mean(), generator_logit_loss(h @ v), **EXACT)


def test_gan_critic_loss():
    """softplus(D(fake)) + softplus(-D(real)), both noised, each with its own noise and its own labels; the mean is
    critic_logit_loss."""
    x, sigma, noise, _ = curved_case()
    (nets, v), cond, real_cond = gan_nets(), torch.arange(6), torch.arange(6).flip(0)
    real, real_noise = normal(6, 2, seed=3), normal(6, 2, seed=4)
    batch = given(noise, real_noise, cond=cond, real=real, real_cond=real_cond)
    loss = gan_critic_loss(x, nets, batch, config(gan_sigma=sigma))
    fake_logit = (x + sigma[:, None] * (noise + 1) + cond[:, None]).tanh() @ v
    real_logit = (real + sigma[:, None] * (real_noise + 1) + real_cond[:, None]).tanh() @ v
    assert_close(loss, (1 + fake_logit.exp()).log() + (1 + (-real_logit).exp()).log(), **EXACT)
    assert_close(loss.mean(), critic_logit_loss(real_logit, fake_logit), **EXACT)


# ---- who moves, and who does not --------------------------------------------------------------------------


def small_run(method, **overrides):
    """(nets, opts, draw, cfg) of a tiny 2D run whose teacher is a network, as on images.  The GAN is on in dmd2."""
    gan = dict(w_gan=0.3, w_disc=0.1) if method == "dmd2" else {}
    cfg = resolve(dict(preset="toy", method=method, batch=8, critic_steps=2, ema=20.0) | gan | overrides)
    mixture, net, device = MIXTURES["ring8"](), small_net(), torch.device("cpu")
    teacher = Teacher("points", net, mixture.shape, mixture.classes, 0.5, "toy:ring8", net)
    pairs = {"z": torch.randn(32, 2, generator=rng(1)), "x": mixture.sample(32, rng(2))[0]}
    nets, opts = build(cfg, teacher, device)
    return nets, opts, Draw(cfg, teacher, mixture, pairs, rng(3), device), cfg


def snapshot(*modules):
    """Copies of all weights, and of all gradients (None where there is none)."""
    parameters = [p for m in modules for p in m.parameters()]
    return [p.detach().clone() for p in parameters], [copy.deepcopy(p.grad) for p in parameters]


def at_rest(*modules):
    """The same, once the gradients are freed: right after an optimiser's step."""
    weights, gradients = snapshot(*modules)
    return weights, [None] * len(gradients)


def assert_same(before, after):
    """Equal to the bit, and None where it was None."""
    for a, b in zip(before[0] + before[1], after[0] + after[1], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, **BITWISE)


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
    never moves; to the bit, gradients included.  A network's gradients are freed as soon as its optimiser has used them."""
    nets, opts, draw, cfg = small_run(method)
    critic, teacher = (nets.fake, nets.discriminator), snapshot(nets.real)
    last = {"generator": snapshot(nets.generator), "critic": snapshot(*critic)}

    def teacher_is_frozen():
        assert_same(teacher, snapshot(nets.real))
        assert not any(p.requires_grad for p in nets.real.parameters())

    def critic_stepped():
        teacher_is_frozen()
        assert_same(last["generator"], snapshot(nets.generator))  # the generator's weights untouched, its gradients freed
        last["critic"] = at_rest(*critic)

    def generator_stepped():
        teacher_is_frozen()
        assert_same(last["critic"], snapshot(*critic))            # nothing leaked into the critic's gradients
        last["generator"] = at_rest(nets.generator)

    spy(opts["critic"], critic_stepped)
    spy(opts["generator"], generator_stepped)
    first = dict(last)
    for step in range(3):
        train_step(nets, opts, draw, cfg, step)
    assert all(p.grad is None for m in (nets.generator, *critic) for p in m.parameters())
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
        assert_close(snapshot(module)[0], teacher, **BITWISE)
    assert not any(p.requires_grad for p in nets.ema.parameters())
    trained = {name: {id(p) for group in opt.param_groups for p in group["params"]} for name, opt in opts.items()}
    assert trained["generator"] == {id(p) for p in nets.generator.parameters()}
    assert trained["critic"] == {id(p) for m in (nets.fake, nets.discriminator) for p in m.parameters()}


def test_what_a_step_calls_is_compiled():
    """--compile: generator, teacher, fake score and its average, each once; never before the copies are made."""
    with mock.patch("nano_dmd.engine.machine.compile_net") as compile_net:
        nets = small_run("sid", compile=True, ema_critic=5.0)[0]
        called = [call.args[0] for call in compile_net.call_args_list]
        wanted = (nets.generator.net, nets.fake.net, nets.slow_fake.net, nets.real.denoiser)
        assert len(called) == 4 and {id(net) for net in called} == {id(d.net) for d in wanted}
        compile_net.reset_mock()
        small_run("sid", compile=True)
        assert compile_net.call_count == 3


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
            assert_close(getattr(a, name), getattr(b, name), **BITWISE)
        assert a.z.shape == (2, 8, 2) and a.cond.shape == (8,)
    assert not torch.equal(batches[0][1].z, batches[1][1].z)      # the generator's noise is from the global stream
    conds = torch.cat([draw().cond for _ in range(100)])
    assert_close(conds.bincount() / 800, torch.full((10,), 0.1), rtol=0, atol=0.053)  # five standard errors


def test_dropped_labels_are_those_of_the_samples():
    """Without backward simulation the labels are those of the noised data; what the critic is told is them or "no class"."""
    cfg = resolve(dict(preset="digits", method="dmd2", batch=64, w_gan=0.0, w_disc=0.0, sigmas="2.5,1", critic_dropout=0.3,
                       backward_simulation=False))
    data = load_data("digits", "cpu")
    draw = Draw(cfg, Teacher("images", None, data.shape, 10, 0.5, "digits", None), data, None, rng(3), torch.device("cpu"))
    batch = draw()
    kept = batch.fake_cond >= 0
    assert 0 < kept.sum() < 64 and torch.equal(batch.fake_cond[kept], batch.cond[kept])


def test_noise_image_pairs_stay_together():
    """Draw hands out pair_z and pair_x from the same rows: with x = 2 z in the pool, pair_x = 2 pair_z in a batch."""
    _, _, draw, _ = small_run("dmd")
    draw.pairs = {"z": draw.pairs["z"], "x": 2 * draw.pairs["z"]}
    batch = draw()
    assert_close(batch.pair_x, 2 * batch.pair_z[0], **BITWISE)
    assert batch.pair_z.shape == (1, 8, 2) and len(batch.pair_x.unique(dim=0)) > 1


def test_sid_differentiates_through_frozen_networks():
    """requires_grad_(False) is not no_grad: no gradient lands in either network, and x still feels their Jacobians."""
    real, fake = RealScore(small_net(1)), FakeScore(small_net(2))
    fake.requires_grad_(False)
    nets, noise, cfg = SimpleNamespace(real=real, fake=fake), normal(4, 2, seed=1).float(), config(dm_sigma=torch.ones(4))
    x = normal(4, 2).float().requires_grad_()
    sid_loss(x, nets, given(noise), cfg).mean().backward()
    assert all(p.grad is None for p in [*real.parameters(), *fake.parameters()])
    without = x.detach().requires_grad_()
    dmd_loss(without, nets, given(noise), cfg).mean().backward()
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
    assert_close(fake(x, sigma), net(x, sigma), **BITWISE)
    assert not {id(p) for p in net.parameters()} & {id(p) for p in fake.parameters()}
    assert_close(fake.features(x, sigma), net.features(x, sigma), **BITWISE)


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
        return self.path(z, cond, step, start)[1]

    def path(self, z, cond=None, step=None, start=None):
        self.calls.append((self.a.item(), torch.is_grad_enabled(), (cond, step, start)))
        return z[0], self.a * z[0]


def probe_run(critic_steps=3, lr=0.1, accumulate=1, **fields):
    """A train step whose every event is written down: scalar generator and critic, SGD, losses with known gradients.

    generator losses:  w_dm * mean x  +  w_gan * mean x^2;    critic loss:  c * mean x, which raises c's gradient mean x
    """
    log, asked = [], {"linear": [], "fit": []}                    # asked: the fake score's c, as each loss sees it

    def linear(x, nets, batch, cfg):
        log.append(("linear", x.requires_grad, batch))
        asked["linear"].append(nets.fake.a.item())
        return x[:, 0]

    def square(x, nets, batch, cfg):
        log.append(("square", x.requires_grad, batch))
        return x[:, 0] ** 2

    def fit(x, nets, batch, cfg):
        log.append(("fit", x.requires_grad, batch))
        asked["fit"].append(nets.fake.a.item())
        return nets.fake.a * x.detach()[:, 0]

    method = Method(generator=[("w_dm", linear), ("w_gan", square)], critic=[("w_fake", fit)])
    generator, fake = Scale(2.0), Scale(0.0)
    nets = Nets(nn.Identity(), fake, nn.Identity(), generator, copy.deepcopy(generator).requires_grad_(False), 0.5)
    nets.asked, nets.slow_fake = asked, copy.deepcopy(fake).requires_grad_(False) if "ema_critic" in fields else fake
    opts = {"generator": torch.optim.SGD(generator.parameters(), lr), "critic": torch.optim.SGD(fake.parameters(), lr)}
    for name, opt in opts.items():
        spy(opt, lambda name=name: log.append((name, None, None)))
    count = iter(range(100))

    def draw():                                                   # batch k has mean z = 1.5 + k
        k = next(count)
        return Batch(tensor([[1.0], [2.0]]) + k, cond=f"cond {k}", step=k, start=f"start {k}")

    cfg = SimpleNamespace(method="probe", critic_steps=critic_steps, accumulate=accumulate, ema=2.0, clip=0.0,
                          **dict(w_dm=1.0, w_gan=1.0, w_fake=1.0, ema_critic=0.0, ida=0.0) | fields)
    with mock.patch.dict(METHODS, {"probe": method}):
        logs = train_step(nets, opts, draw, cfg, step=10**9)
    return nets, log, logs, next(count)


def test_train_step_order_and_counts():
    """critic_steps critic updates on fresh batches, then one generator update on the last of them."""
    nets, log, _, drawn = probe_run(critic_steps=3)
    assert [name for name, _, _ in log] == ["fit", "critic"] * 3 + ["linear", "square", "generator"]
    batches = [batch for name, _, batch in log if name == "fit"]
    assert drawn == 3 and len({id(b) for b in batches}) == 3
    assert all(batch is batches[-1] for name, _, batch in log if name in ("linear", "square"))


def test_train_step_shows_the_critic_detached_samples():
    """The critic sees numbers, the generator losses see a graph."""
    nets, log, _, _ = probe_run(critic_steps=3)
    assert [needs for name, needs, _ in log if name == "fit"] == [False] * 3
    assert [needs for name, needs, _ in log if name in ("linear", "square")] == [True, True]


def test_one_generator_pass_serves_the_last_critic_update_and_the_generator():
    """A batch each: as many passes as critic updates, all at the same weights.  The generator stands still meanwhile."""
    nets, _, _, _ = probe_run(critic_steps=3)
    assert [a for a, _, _ in nets.generator.calls] == [2.0, 2.0, 2.0]
    assert [graph for _, graph, _ in nets.generator.calls] == [False, False, True]


def test_samples_are_made_once():
    """... or twice: samples without a graph do not serve the generator's update; those with one serve the critic's."""
    nets, batch = SimpleNamespace(generator=Scale()), Batch(tensor([[1.0], [2.0]]))
    without = samples(nets, batch, graph=False)
    assert samples(nets, batch, graph=False) is without and not without.requires_grad
    x = samples(nets, batch, graph=True)
    assert x.requires_grad and samples(nets, batch, graph=True) is samples(nets, batch, graph=False) is x
    assert_close((x.detach(), without), (tensor([2.0], [4.0]),) * 2, **BITWISE)
    assert [graph for _, graph, _ in nets.generator.calls] == [False, True]


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
    batch.seen: the same, sample by sample: x = (6, 8)
    """
    nets, log, logs, _ = probe_run(critic_steps=3, w_dm=0.5, w_gan=0.2)
    average = 2 + (1 - math.sqrt(0.5)) * (0.825 - 2)
    got = torch.stack([nets.fake.a, nets.generator.a, nets.ema.a]).detach()
    assert_close(got, tensor(-1.5, 0.825, average), **EXACT)
    assert_close([logs[k] for k in ("linear", "square", "fit")], [*tensor(7.0, 50.0, -5.6)], **EXACT)
    seen = {"fit": tensor(-4.8, -6.4), "linear": tensor(6.0, 8.0), "square": tensor(36.0, 64.0)}
    batch = log[-2][2]
    assert_close({name: values for name, (_, values) in batch.seen.items()}, seen, **EXACT)
    assert not any(v.requires_grad for v in [*logs.values(), *(values for _, values in batch.seen.values())])


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


def update_with(opt, value, clip=0.0):
    """methods.update on a method made of one loss, value() for every sample."""
    def loss(x, nets, batch, cfg):
        return value().expand(len(x))

    cfg, nets = SimpleNamespace(method="probe", w=1.0, clip=clip), Nets(None, None, None, Scale(), None, 0.5)
    with mock.patch.dict(METHODS, {"probe": Method(generator=[("w", loss)], critic=[])}):
        update("generator", nets, {"generator": opt}, [Batch(tensor([[1.0]]))], cfg, {})


def test_the_fake_score_follows_the_generator():
    """IDA: after the step, c <- c + ida (a - c).  As above c = -1.5 and a = .825: ida .2 gives c = -1.035."""
    nets, _, _, _ = probe_run(critic_steps=3, w_dm=0.5, w_gan=0.2, ida=0.2)
    assert_close(torch.stack([nets.fake.a, nets.generator.a]).detach(), tensor(-1.035, 0.825), **EXACT)


def test_the_generator_is_shown_an_average_of_the_fake_score():
    """ema_critic: its losses see slow_fake, which each critic update moves by 1 - .5^(1 / half-life); the critic's losses
    see the fake score itself.  Half-life 1, c = 0, then -.3, -.8, -1.5 after the updates: averages -.15, -.475, -.9875."""
    nets, _, _, _ = probe_run(critic_steps=3, ema_critic=1.0)
    assert_close(tensor(*nets.asked["fit"]), tensor(0.0, -0.3, -0.8), **EXACT)
    assert_close(tensor(*nets.asked["linear"]), tensor(-0.9875), **EXACT)
    assert_close(torch.stack([nets.fake.a, nets.slow_fake.a]).detach(), tensor(-1.5, -0.9875), **EXACT)


def test_there_is_an_average_of_the_fake_score_only_if_asked():
    """Without one slow_fake is the fake score itself; with one it is frozen, starts equal and is saved and restored."""
    nets = small_run("sid")[0]
    assert nets.slow_fake is nets.fake
    nets = small_run("sid", ema_critic=5.0)[0]
    assert nets.slow_fake is not nets.fake and not any(p.requires_grad for p in nets.slow_fake.parameters())
    assert_same(snapshot(nets.fake), snapshot(nets.slow_fake))


def test_init_begins_where_another_run_ended(tmp_path):
    """--init: generator and its average begin at the saved generator, fake score and its average at the saved fake score."""
    nets, opts, draw, cfg = small_run("dmd2", ema_critic=5.0)
    for step in range(3):
        train_step(nets, opts, draw, cfg, step)
    save_checkpoint(tmp_path / "checkpoint.pt", state(cfg, 3, (0.0, 0.0), nets, opts, draw))
    begun = small_run("dmd2", ema_critic=5.0, init=str(tmp_path))[0]
    weights = lambda *modules: (snapshot(*modules)[0], [])
    assert_same(weights(begun.generator, begun.ema), weights(nets.generator, nets.generator))
    assert_same(weights(begun.fake, begun.slow_fake), weights(nets.fake, nets.fake))
    assert moved(weights(nets.fake), weights(nets.slow_fake))                              # so the test could have failed


def test_updates_do_not_accumulate():
    """Each update starts from no gradient: two updates on loss = 3a move a by lr * 3 twice, not by 3 and then 6."""
    a = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    opt = torch.optim.SGD([a], 0.1)
    for _ in range(2):
        update_with(opt, lambda: 3 * a)
    assert_close(a.detach(), tensor(1 - 0.3 - 0.3)[0], **EXACT)


def test_clip_limits_the_norm_over_the_whole_network():
    """Gradient (3, 4) has norm 5; clip = 1 makes it (.6, .8) (torch divides by 5 + 1e-6), clip = 10 leaves it."""
    for clip, expected in ((1.0, tensor(0.6, 0.8)), (10.0, tensor(3.0, 4.0)), (0.0, tensor(3.0, 4.0))):
        a, b = (nn.Parameter(torch.tensor(0.0, dtype=torch.float64)) for _ in range(2))
        update_with(torch.optim.SGD([a, b], 1.0), lambda: 3 * a + 4 * b, clip)
        assert_close(-torch.stack([a, b]).detach(), expected, rtol=1e-6, atol=0)


def test_methods_are_what_the_papers_say():
    """DMD: matching + regression.  DMD2: matching + GAN.  SiD: its own loss.  All three fit the fake score by
    denoising; only DMD2's critic has a discriminator.  DMD needs noise-image pairs, DMD2 real data."""
    names = {m: ([f.__name__ for _, f in METHODS[m].generator], [f.__name__ for _, f in METHODS[m].critic])
             for m in METHODS}
    assert names["dmd"] == (["dmd_loss", "regression_loss"], ["denoising_loss"])
    assert names["dmd2"] == (["dmd_loss", "gan_generator_loss"], ["denoising_loss", "gan_critic_loss"])
    assert names["sid"] == (["sid_loss"], ["denoising_loss"])
    assert names["diff_instruct"] == (["diff_instruct_loss"], ["denoising_loss"])
    assert names["regression"] == (["regression_loss"], [])
    assert names["f_distill"] == (["f_distill_loss", "gan_generator_loss"], ["denoising_loss", "gan_critic_loss"])
    assert names["decoupled"] == (["matching_loss", "augmentation_loss"], ["denoising_loss"])
    assert names["sim"] == (["sim_loss"], ["denoising_loss"])
    assert names["sida"] == (["sida_loss"], ["denoising_loss", "sida_critic_loss"])
    assert names["real_uid"] == (["real_uid_loss"], ["real_uid_critic_loss"])
    assert names["tdm"] == (["trajectory_loss"], ["trajectory_denoising_loss"])
    assert names["phased"] == (["trajectory_loss"], ["phased_denoising_loss"])
    asked = {m: METHODS[m].needs for m in METHODS if METHODS[m].needs}
    assert asked == {"dmd": ("pairs",), "dmd2": ("real",), "regression": ("pairs",), "f_distill": ("real",),
                     "sida": ("real",), "real_uid": ("real",)}
    assert {m: METHODS[m].knobs for m in METHODS if METHODS[m].knobs} == {
        "f_distill": ("ratio",), "decoupled": ("guidance",), "sida": ("w_disc",), "real_uid": ("uid_a",),
        "tdm": ("ode_steps",), "phased": ("ode_steps",)}


def test_a_batch_brings_what_has_a_weight():
    """DMD2 without GAN needs no real data, DMD without regression no pairs."""
    for method, weights, expected in (("dmd2", (0.1, 0.0), ["real"]), ("dmd2", (0.0, 1.0), []), ("dmd", (0.0, 1.0), ["pairs"]),
                                      ("dmd", (1.0, 0.0), []), ("sid", (1.0, 1.0), [])):
        w_disc, w_reg = weights
        others = dict(w_dm=1.0, w_gan=w_disc, w_sid=1.0, w_fake=1.0)
        assert needs(SimpleNamespace(method=method, w_disc=w_disc, w_reg=w_reg, **others)) == expected


def test_add_noise_is_variance_exploding():
    """xt = x + sigma noise, with x not scaled: x = (1, 2), sigma = (3, 10), noise = (1, -1)  ->  (4, -8)."""
    got = add_noise(tensor([1.0], [2.0]), tensor(3.0, 10.0), tensor([1.0], [-1.0]))
    assert_close(got, tensor([4.0], [-8.0]), **BITWISE)

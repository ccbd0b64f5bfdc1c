"""The methods that grew from DMD, DMD2 and SiD: every equation is a test, as in test_losses.py.

Plain functions in float64, to 1e-12 unless a test says otherwise: tests/mutants.py calls them on wrong versions.
"""

import math
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from closed_forms import BITWISE, EXACT, config, curved_case, given, normal, quadrature, rng, small_net, tensor
from nano_dmd.decoupled import augmentation_gradient, augmentation_loss, matching_loss
from nano_dmd.denoiser import FromFlow
from nano_dmd.dmd_loss import dmd_gradient, dmd_loss
from nano_dmd.engine.draw import Batch
from nano_dmd.f_distill import WEIGHTS, centred, exact_log_ratio, f_distill_loss, sample_weights
from nano_dmd.fake_score import denoising_loss
from nano_dmd.gan import gan_critic_loss
from nano_dmd.generator import Generator, ode_step
from nano_dmd.methods import Nets
from nano_dmd.noise import draw_sigma, expand, interval, parse_sigma
from nano_dmd.real_score import RealScore
from nano_dmd.real_uid import real_uid_critic_loss, real_uid_integrand, real_uid_loss
from nano_dmd.sid_loss import HUBER, sid_integrand, sid_loss, sim_loss
from nano_dmd.sida import encoder_logits, sida_critic_loss, sida_loss
from nano_dmd.trajectory import phased_denoising_loss, phased_target, renoised, trajectory_denoising_loss, trajectory_loss
from toy.mixtures import Mixture


class Asked(Batch):
    """A Batch whose k-th noising is draws[k] = (sigma, noise), whatever is asked; specs says what was."""

    def noising(self, spec, x):
        self.specs.append(spec)
        return self.draws.pop(0)


def asked(*draws, **fields):
    batch = Asked(z=None, **fields)
    batch.draws, batch.specs = list(draws), []
    return batch


def gradient(loss, x, *args):
    return torch.autograd.grad(loss(x, *args).mean(), x)[0]


# ---- f-distill --------------------------------------------------------------------------------------------

F_OF_R = {
    "rkl": lambda r: -r.log(),
    "kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "sf": lambda r: (r + 1) * (0.5 + 0.5 / r).log(),
    "sh": lambda r: (1 - r.sqrt()) ** 2,
    "jf": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: (1 - r) ** 2 / r,
}
# p = N(0, 1), q = N(1, variance 1.5): dD_f / dmean of q, and the same over E_q[h].
GRADIENTS = dict(rkl=(1, 1), sf=(0.67654, 1.14928), js=(0.32346, 0.78637), sh=(0.35826, 0.8), kl=(2 / 3, 2 / 3),
                 jf=(5 / 3, 5 / 6), neyman=(34.1286, 2))


def on_a_line():
    """(points, log p, log q as a function of q's mean, spacing) for integrals that are exact to 1e-9."""
    points = torch.linspace(-30, 32, 400_001, dtype=torch.float64)

    def log_normal(mean, variance):
        return -0.5 * (points - mean) ** 2 / variance - 0.5 * math.log(2 * math.pi * variance)

    return points, log_normal(0.0, 1.0), lambda mean: log_normal(mean, 1.5), (points[1] - points[0]).item()


def test_f_weights_are_the_second_derivatives():
    """h(r) = f''(r) r^2 for every divergence, f'' by automatic differentiation; 1e-10 relative."""
    assert WEIGHTS.keys() == F_OF_R.keys()
    for name, f in F_OF_R.items():
        r = torch.logspace(-1.5, 1.5, 31, dtype=torch.float64, requires_grad=True)
        slope, = torch.autograd.grad(f(r).sum(), r, create_graph=True)
        bend, = torch.autograd.grad(slope.sum(), r)
        assert_close(WEIGHTS[name](r.detach()), bend * r.detach() ** 2, rtol=1e-10, atol=1e-10)


def test_f_gradients_at_unequal_variances():
    """E_q[h(r) (s_q - s_p)] is the derivative of D_f(p || q) along q's mean: the published constants to 1e-4, and a finite
    difference of the divergence itself to 1e-6 relative (1e-3 for Neyman's, whose integrand has heavy tails).

    With equal variances every one of them is 1 after dividing by E_q[h]: such a test would be blind.
    """
    points, log_p, log_q, spacing = on_a_line()
    inside = (points > -18) & (points < 20)
    for name, (plain, normalised) in GRADIENTS.items():
        q, r = log_q(1.0).exp(), (log_p - log_q(1.0)).exp().clamp(min=1e-300)
        gap = -(points - 1.0) / 1.5 + points                      # s_q - s_p
        h = WEIGHTS[name](r)
        ok = inside if name == "neyman" else slice(None)
        got, mean_h = (q * h * gap)[ok].sum() * spacing, (q * h)[ok].sum() * spacing
        assert_close((got, got / mean_h), (tensor(plain)[0], tensor(normalised)[0]), rtol=1e-4, atol=0)

        def divergence(mean):
            ratio = (log_p - log_q(mean)).exp().clamp(min=1e-300)
            return (log_q(mean).exp() * F_OF_R[name](ratio))[ok].sum() * spacing

        slope = (divergence(1.0 + 1e-4) - divergence(1.0 - 1e-4)) / 2e-4
        assert_close(got, slope, rtol=1e-3 if name == "neyman" else 1e-6, atol=0)


def test_sample_weights_by_hand():
    """Two bins far apart in sigma: ratios (1, 3) over their mean 2 are (.5, 1.5), ratios (.5, .5) are (1, 1).
    kl: h = r, whose mean is 1;  rkl: h = 1;  js: h = (1/3, .6, .5, .5) over .48333.  Each sample 16 times: 64 have two bins."""
    logits, sigma = tensor(1.0, 3.0, 0.5, 0.5).log().repeat(16), tensor(0.1, 0.1, 10.0, 10.0).repeat(16)
    assert_close(sample_weights(logits, sigma, "kl"), tensor(0.5, 1.5, 1.0, 1.0).repeat(16), **EXACT)
    assert_close(sample_weights(logits, sigma, "rkl"), tensor(1.0, 1.0, 1.0, 1.0).repeat(16), **EXACT)
    js = tensor(1 / 3, 0.6, 0.5, 0.5).repeat(16)
    assert_close(sample_weights(logits, sigma, "js"), js / js.mean(), **EXACT)


def test_a_small_batch_is_one_bin():
    """Four samples at four sigmas: with a bin for each every r would be 1, and f-distill DMD.  One bin: r over its mean."""
    r = tensor(1.0, 3.0, 0.5, 0.5)
    assert_close(sample_weights(r.log(), tensor(0.1, 0.3, 1.0, 10.0), "kl"), r / 1.25, **EXACT)


def test_ratios_are_clipped_before_they_are_centred():
    """exp(+-12) becomes 20 and .1: at one sigma, r = (20, .1, 1, 1) over the mean 5.525."""
    r = tensor(20.0, 0.1, 1.0, 1.0)
    assert_close(sample_weights(tensor(12.0, -12.0, 0.0, 0.0), tensor(1.0).expand(4), "kl"), r / r.mean(), **EXACT)


def test_bins_are_equally_wide_in_log_sigma():
    """Sigma 1, 2, 4, ... 512 in ten bins: each alone, so every ratio becomes 1.  Bins that are linear in sigma put the first
    six into one.  One sigma for all is one bin."""
    sigma, ratio = 2.0 ** torch.arange(10, dtype=torch.float64), torch.arange(1, 11, dtype=torch.float64)
    assert_close(centred(ratio, sigma, 10), torch.ones(10, dtype=torch.float64), **EXACT)
    assert_close(centred(ratio, torch.ones_like(sigma), 10), ratio / 5.5, **EXACT)
    many = draw_sigma("lognormal(-1.2,1.2)", 1000, "cpu").double()
    values = centred(normal(1000).exp(), many, 10)
    u = (many.log() - many.log().min()) / (many.log().max() - many.log().min())
    place = (10 * u).long().clamp(max=9)
    for b in place.unique():
        assert_close(values[place == b].mean(), tensor(1.0)[0], rtol=1e-9, atol=0)


class Logits:
    """A fake score with features and a discriminator that says exp-linear things about them; remembers what it was asked."""

    def __init__(self, denoise):
        self.denoise, self.features_of = denoise, []

    def __call__(self, xt, sigma, cond=None):
        return self.denoise(xt, sigma, cond)

    def features(self, xt, sigma, cond=None):
        self.features_of.append((xt.detach(), sigma, cond))
        return xt.sin() + expand(sigma, xt)


def f_case(divergence="kl", **fields):
    x, sigma, noise, nets = curved_case()
    nets.fake, nets.discriminator = Logits(nets.fake), lambda h: h @ tensor(1.0, -2.0)[0:2]
    return x, sigma, noise, nets, config(dm_sigma=sigma, divergence=divergence, ratio="critic", **fields)


def test_f_distill_gradient():
    """d loss / dx = h g / N, with g DMD's gradient and h from the logits at the same xt and sigma; the values are
    (h g)^2 / 2 per sample.  By kl, h is r over its mean in ten bins of log sigma; here each sample has a bin of its own or
    shares one (checked through `centred` above)."""
    for divergence in WEIGHTS:
        x, sigma, noise, nets, cfg = f_case(divergence)
        loss = f_distill_loss(x, nets, given(noise), cfg)
        got, = torch.autograd.grad(loss.mean(), x)
        xt = x.detach() + sigma[:, None] * noise
        h = sample_weights(nets.discriminator(nets.fake.features(xt, sigma)), sigma, divergence)
        g = h[:, None] * dmd_gradient(x, nets.real(xt, sigma), nets.fake(xt, sigma))
        assert_close(got, g / x.numel(), **EXACT)
        assert_close(loss.detach(), 0.5 * g.square().mean(1), **EXACT)


def test_f_distill_with_reverse_kl_is_dmd():
    x, sigma, noise, nets, cfg = f_case("rkl")
    assert_close(gradient(f_distill_loss, x, nets, given(noise), cfg), gradient(dmd_loss, x, nets, given(noise), cfg), **EXACT)


def test_the_ratio_belongs_to_the_gradients_own_noise():
    """The discriminator is asked once, at the xt, sigma and class of the two scores."""
    x, sigma, noise, nets, cfg = f_case()
    cond = torch.arange(6)
    both = nets.real, nets.fake.denoise
    nets.real, nets.fake.denoise = [lambda xt, s, c, f=f: f(xt, s) for f in both]
    f_distill_loss(x, nets, given(noise, cond=cond), cfg)
    (xt, level, c), = nets.fake.features_of
    assert_close((xt, level), (x.detach() + sigma[:, None] * noise, sigma), **BITWISE)
    assert c is cond


def test_the_ratio_is_not_differentiated():
    """No gradient reaches the discriminator, and none comes to x through h."""
    x, sigma, noise, nets, cfg = f_case()
    v = tensor(1.0, -2.0).requires_grad_()
    nets.discriminator = lambda h: h @ v
    f_distill_loss(x, nets, given(noise), cfg).mean().backward()
    assert v.grad is None and x.grad is not None


def test_exact_ratio_is_that_of_two_mixtures():
    """ln p_real - ln p_fake, with p_fake the exact mixture of zero std at all samples of the batch, noised: to 1e-10."""
    x, sigma = normal(5, 2), torch.linspace(0.3, 2.0, 5, dtype=torch.float64)
    xt, real = x + sigma[:, None] * normal(5, 2, seed=1), Mixture([[-0.5, 0.0], [0.5, 0.0]], 0.2).to(torch.float64)
    fakes = Mixture([[0.0, 0.0]] * 5, 0.0).to(torch.float64)
    fakes.means, fakes.weights = x, torch.full((5,), 0.2, dtype=torch.float64)
    expected = real.log_prob(xt, sigma) - fakes.log_prob(xt, sigma)
    assert_close(exact_log_ratio(real, x, xt, sigma), expected, rtol=1e-10, atol=1e-10)


def test_exact_ratio_of_the_real_distribution_is_one():
    """x from the teacher's own mixture, 2,000 samples: ln r is 0, mean and std within .03 and .1 at sigma .5."""
    real = Mixture([[-0.5, 0.0], [0.5, 0.0]], 0.2).to(torch.float64)
    x = real.sample(2000, rng(0))[0]
    sigma = torch.full((2000,), 0.5, dtype=torch.float64)
    found = exact_log_ratio(real, x, x + 0.5 * normal(2000, 2, seed=3), sigma)
    assert abs(found.mean().item()) < 0.03 and found.std() < 0.1


def test_exact_ratio_in_the_loss():
    """ratio "exact" asks no discriminator; the gradient is h g / N with h from exact_log_ratio."""
    x, sigma, noise, nets, _ = f_case()
    nets.discriminator, nets.real = None, RealScore(nets.real)
    cfg = config(dm_sigma=sigma, divergence="js", ratio="exact")
    got = gradient(f_distill_loss, x, nets, given(noise), cfg)
    xt = x.detach() + sigma[:, None] * noise
    h = sample_weights(exact_log_ratio(nets.real.denoiser, x.detach(), xt, sigma), sigma, "js")
    g = h[:, None] * dmd_gradient(x, nets.real(xt, sigma), nets.fake(xt, sigma))
    assert_close(got, g / x.numel(), **EXACT)


# ---- decoupled DMD ----------------------------------------------------------------------------------------


def test_decoupled_is_guided_dmd_taken_apart():
    """At one (xt, sigma) and with one normaliser, matching + augmentation = DMD with the guided teacher."""
    x, d_cond, d_uncond, d_fake = (normal(5, 3, seed=s) for s in range(4))
    for w in (0.0, 1.0, 1.75, 7.0):
        guided = d_uncond + w * (d_cond - d_uncond)
        size, whole = ((x - d).abs().mean(1, keepdim=True) for d in (d_cond, guided))
        parts = dmd_gradient(x, d_cond, d_fake) + augmentation_gradient(x, d_cond, d_uncond, w)
        assert_close(parts * size, dmd_gradient(x, guided, d_fake) * whole, **EXACT)


def test_augmentation_gradient_by_hand():
    """w = 3, d_cond - d_uncond = (1, -2), mean|x - d_cond| = mean(|-1|, |3|) = 2: -(3 - 1) (1, -2) / 2 = (-1, 2)."""
    x, d_cond, d_uncond = tensor([0, 3.0]), tensor([1, 0.0]), tensor([0, 2.0])
    assert_close(augmentation_gradient(x, d_cond, d_uncond, 3.0), tensor([-1.0, 2.0]), **EXACT)
    assert_close(augmentation_gradient(x, d_cond, d_uncond, 1.0), tensor([0.0, 0.0]), **EXACT)
    assert_close(augmentation_gradient(x, d_cond, d_cond, 3.0), tensor([0.0, 0.0]), **EXACT)
    with pytest.raises(ValueError):
        augmentation_gradient(x, d_cond, d_uncond[:, :1], 3.0)


def conditional_nets(guidance=3.0):
    """A teacher of two classes under guidance, and a fake score that is told the class."""
    labels = torch.tensor([0, 1, 1])
    real = Mixture([[-0.5, 0.2], [0.4, -0.3], [0.3, 0.6]], [0.3, 0.4, 0.5], [0.5, 0.3, 0.2], labels).to(torch.float64)
    fake = Mixture([[0.1, 0.1], [-0.3, 0.5]], [0.5, 0.3], labels=torch.tensor([0, 1])).to(torch.float64)
    return Nets(RealScore(real, guidance), fake, None, None, None, sigma_data=0.5)


def test_decoupled_losses_have_noise_of_their_own():
    """Matching: the unguided teacher at cfg.dm_sigma.  Augmentation: between cfg.least_sigma and the level of the step that
    made x.  The gradients at x are the two pure functions' over N."""
    nets, cond = conditional_nets(), torch.tensor([0, 1, 1, 0, 1, 0])
    x, sigma, noise, _ = curved_case()
    cfg = config(dm_sigma="lognormal(0,1)", guidance=3.0, least_sigma=0.02)
    batch = asked((sigma, noise), (sigma / 2, noise.flip(0)), cond=cond, level=1.5)
    matching = gradient(matching_loss, x, nets, batch, cfg)
    augmentation = gradient(augmentation_loss, x, nets, batch, cfg)
    assert batch.specs == ["lognormal(0,1)", "karras(0.02,1.5)"]
    xa, xb = x.detach() + sigma[:, None] * noise, x.detach() + sigma[:, None] / 2 * noise.flip(0)
    real = nets.real.denoiser
    expected = dmd_gradient(x, real(xa, sigma, cond), nets.fake(xa, sigma, cond))
    assert_close(matching, expected / x.numel(), **EXACT)
    expected = augmentation_gradient(x, real(xb, sigma / 2, cond), real(xb, sigma / 2), 3.0)
    assert_close(augmentation, expected / x.numel(), **EXACT)


def test_augmentation_does_not_look_at_the_fake_score():
    nets, cond = conditional_nets(), torch.tensor([0, 1, 1, 0, 1, 0])
    x, sigma, noise, _ = curved_case()
    cfg = config(guidance=3.0, least_sigma=0.02)
    nets.fake = None
    assert gradient(augmentation_loss, x, nets, asked((sigma, noise), cond=cond, level=1.5), cfg).abs().max() > 0.01


def test_interval_is_noise_between_two_levels():
    """Uniform in sigma^(1/7), never at the lower level itself (a target would divide by zero), from `least` where that is 0."""
    assert parse_sigma(interval(0, 80.0, 0.02)) == ("karras", 0.02, 80.0)
    assert parse_sigma(interval(0, 0.1, 0.02)) == ("karras", 0.01, 0.1)                  # a last step of little noise
    name, low, high = parse_sigma(interval(0.5, 2.5, 0.02))
    assert (name, high) == ("karras", 2.5) and low == pytest.approx(0.502, rel=1e-12)
    sigma = draw_sigma(interval(0.5, 0.501, 0.02), 10_000, "cpu")
    assert (sigma > 0.5).all() and (sigma <= 0.5011).all()


# ---- SIM and SiDA -----------------------------------------------------------------------------------------


def test_sim_loss_value_and_gradient():
    """mean gap (d_fake - x) / sqrt(mean gap^2 + c^2), at xt = x + sigma noise; the gradient runs through everything, the
    normaliser too: finite differences to 1e-8."""
    x, sigma, noise, nets = curved_case()

    def by_hand(x):
        xt = x + sigma[:, None] * noise
        d_real, d_fake = nets.real(xt, sigma), nets.fake(xt, sigma)
        gap = d_real - d_fake
        return (gap * (d_fake - x)).mean(1) / (gap.square().mean(1) + HUBER**2).sqrt()

    cfg = config(dm_sigma=sigma, alpha=1.2)                       # SiD's alpha and normaliser are not SIM's
    assert_close(sim_loss(x, nets, given(noise), cfg), by_hand(x), **EXACT)
    steps = 1e-5 * torch.eye(x.numel(), dtype=torch.float64).reshape(-1, *x.shape)
    slopes = [(by_hand(x.detach() + h) - by_hand(x.detach() - h)).mean() / 2e-5 for h in steps]
    assert_close(gradient(sim_loss, x, nets, given(noise), cfg).flatten(), torch.stack(slopes), rtol=0, atol=1e-8)


def test_sim_without_the_root_is_sid_at_alpha_one():
    """Times its own normaliser, sample by sample, the value is sid_loss at alpha = 1 without SiD's normaliser."""
    x, sigma, noise, nets = curved_case()
    xt = x + sigma[:, None] * noise
    size = ((nets.real(xt, sigma) - nets.fake(xt, sigma)).square().mean(1) + HUBER**2).sqrt()
    sid = sid_loss(x, nets, given(noise), config(dm_sigma=sigma, alpha=1.0, normalise=False))
    assert_close(size * sim_loss(x, nets, given(noise), config(dm_sigma=sigma)), sid, **EXACT)


class Encoder(nn.Module):
    """A denoiser with spatial features (B, 3, 2): feature c, place p of xt is tanh(w_c xt_p + sigma)."""

    def __init__(self, denoise, w=(1.0, -2.0, 0.5)):
        super().__init__()
        self.denoise, self.w = denoise, nn.Parameter(tensor(*w))

    def forward(self, xt, sigma, cond=None):
        return self.denoise(xt, sigma, cond)

    def features(self, xt, sigma, cond=None):
        shift = 0 if cond is None else cond[:, None, None]
        return (self.w[:, None] * xt[:, None] + sigma[:, None, None] + shift).tanh()


def test_encoder_logits_are_the_mean_over_channels():
    """One logit for each place of the picture: features (B, C, H, W) -> (B, H W), (B, C) -> (B, 1)."""
    maps = normal(2, 3, 4, 5)
    fake = SimpleNamespace(features=lambda xt, sigma, cond: maps)
    got = encoder_logits(fake, maps, None, None)
    assert got.shape == (2, 20)
    assert_close(got, maps.float().mean(1).flatten(1).to(got), rtol=1e-6, atol=1e-6)
    flat = SimpleNamespace(features=lambda xt, sigma, cond: maps[:, :, 0, 0])
    assert encoder_logits(flat, maps, None, None).shape == (2, 1)


def sida_case(**fields):
    x, sigma, noise, nets = curved_case()
    nets.fake = Encoder(nets.fake)
    settings = dict(dm_sigma=sigma, critic_sigma=sigma, alpha=1.0, w_gan=0.3, w_r1=0.0) | fields
    return x, sigma, noise, nets, config(**settings)


def test_sida_without_its_adversary_is_sid():
    """w_gan = 0: sid_loss to the bit, the features never asked."""
    x, sigma, noise, nets, cfg = sida_case(w_gan=0.0)
    nets.fake.features = lambda *args: pytest.fail("asked")
    assert_close(sida_loss(x, nets, given(noise), cfg), sid_loss(x, nets, given(noise), cfg), **BITWISE)


def test_sida_adds_the_generators_gan_at_the_same_xt():
    """Value: SiD + w mean softplus(-logit) / mean|x - d_real|, each sample with its own normaliser.  float32 logits: 1e-6."""
    for normalise in (True, False):
        x, sigma, noise, nets, cfg = sida_case(normalise=normalise)
        xt = x + sigma[:, None] * noise
        logits = nets.fake.features(xt, sigma).mean(1)
        size = (x - nets.real(xt, sigma)).abs().mean(1) if normalise else 1.0
        adversary = (1 + (-logits).exp()).log().mean(1) / size
        expected = sid_loss(x, nets, given(noise), cfg) + 0.3 * adversary
        assert_close(sida_loss(x, nets, given(noise), cfg), expected, rtol=1e-6, atol=1e-6)


def test_sida_of_constant_logits_has_sids_gradient():
    """An encoder that sees no difference pushes nowhere."""
    x, sigma, noise, nets, cfg = sida_case()
    nets.fake.w.data.zero_()
    assert_close(gradient(sida_loss, x, nets, given(noise), cfg), gradient(sid_loss, x, nets, given(noise), cfg), **EXACT)


def test_sida_critic_by_hand():
    """(1/sigma^2 + 4) / 2 (softplus(l_fake) + softplus(-l_real)), mean over places, sigma and noise shared, labels each its
    own; the weight is the sample's own.  float32 logits: 1e-6."""
    x, sigma, noise, nets, cfg = sida_case()
    real, cond, real_cond = normal(6, 2, seed=4), torch.arange(6) / 7, torch.arange(6).flip(0) / 7
    batch = given(noise, cond=cond, real=real, real_cond=real_cond)
    got = sida_critic_loss(x.detach(), nets, batch, cfg)
    fake_logits = nets.fake.features(x.detach() + sigma[:, None] * noise, sigma, cond).mean(1)
    real_logits = nets.fake.features(real + sigma[:, None] * noise, sigma, real_cond).mean(1)
    logistic = (F.softplus(fake_logits) + F.softplus(-real_logits)).mean(1)
    assert_close(got, (1 / sigma**2 + 4) / 2 * logistic, rtol=1e-6, atol=1e-6)


def test_sida_critic_rests_where_fakes_are_real():
    """x = the real samples, noise shared, logits 0: the two halves of the encoder's gradient cancel exactly.  With a noise
    for each they would not."""
    x, sigma, noise, nets, cfg = sida_case()
    with torch.no_grad():
        nets.fake.w.copy_(tensor(0.0, 0.0, 0.0))
    nets.fake.features = lambda xt, s, cond=None: nets.fake.w[:, None] * xt[:, None]     # logits 0, slope xt
    sida_critic_loss(x.detach(), nets, given(noise, real=x.detach()), cfg).mean().backward()
    assert_close(nets.fake.w.grad, torch.zeros(3, dtype=torch.float64), **EXACT)


# ---- RealUID ----------------------------------------------------------------------------------------------

PAIRS = ((1.0, 1.0), (0.92, 0.94), (0.98, 0.96), (0.9, 0.88))


def test_real_uid_without_data_is_twice_sid():
    """a = b = 1: |d_real - x|^2 - |d_fake - x|^2 = 2 SiD at alpha = 1/2, elementwise, no normaliser."""
    x, d_real, d_fake = (normal(4, 3, seed=s) for s in range(3))
    expected = 2 * sid_integrand(x, d_real, d_fake, 0.5, normalise=False)
    assert_close(real_uid_integrand(x, d_real, d_fake, 1.0, 1.0), expected, **EXACT)
    with pytest.raises(ValueError):
        real_uid_integrand(x, d_real, d_fake[:, :1], 1.0, 1.0)


def test_real_uid_integrand_by_hand():
    """a = .8, b = .4: target x / 2 = 1;  d_real = 3, d_fake = 0:  .8 (4 - 1) = 2.4."""
    assert_close(real_uid_integrand(tensor([2.0]), tensor([3.0]), tensor([0.0]), 0.8, 0.4), tensor([2.4]), **EXACT)


def test_real_uid_has_its_zero_at_the_data():
    """Data N(0, 1), x = mu + z, sigma .7, the best tracker for mu held fixed: dL/dmu = 0 at mu = 0 for every (a, b), and the
    constants of an independent computation at mu = -1, 1, 2 to 6e-4 (they have three digits).  Gauss-Hermite, 80 nodes."""
    known = {(1.0, 1.0): (-0.216, 0, 0.216, 0.433), (0.92, 0.94): (-0.210, 0, 0.210, 0.431),
             (0.98, 0.96): (-0.185, 0, 0.185, 0.377), (0.9, 0.88): (-0.157, 0, 0.157, 0.329)}
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(80))
    z, noise = torch.cartesian_prod(nodes, nodes).T
    weight = torch.outer(weights, weights).flatten() / (2 * math.pi)
    variance, shrink = 1 + 0.7**2, 1 / (1 + 0.7**2)
    for a, b in PAIRS:
        for mu, expected in zip((-1.0, 0.0, 1.0, 2.0), known[a, b]):

            def tracker(xt, mu=mu):
                """The best answer to the critic's loss, see real_uid.py."""
                p_fake, p_real = (-(xt - mu) ** 2 / (2 * variance)).exp(), (-(xt**2) / (2 * variance)).exp()
                clean_fake, clean_real = mu + shrink * (xt - mu), shrink * xt
                top = b * p_fake * clean_fake + (1 - b) * p_real * clean_real
                return top / (a * p_fake + (1 - a) * p_real)

            moving = torch.tensor(mu, dtype=torch.float64, requires_grad=True)
            x = moving + z
            xt = x + 0.7 * noise
            loss = (weight * real_uid_integrand(x, shrink * xt, tracker(xt), a, b)).sum()
            slope, = torch.autograd.grad(loss, moving)
            assert_close(slope, tensor(expected)[0], rtol=0, atol=1e-8 if mu == 0 else 6e-4)


def uid_case(a, b, **fields):
    x, sigma, noise, nets = curved_case()
    return x, sigma, noise, nets, config(dm_sigma=sigma, critic_sigma=sigma, uid_a=a, uid_b=b, **fields)


def test_real_uid_loss_value():
    """The integrand's mean over a sample at xt = x + sigma noise, over mean|x - d_real| unless normalise is off."""
    for (a, b), normalise in product(PAIRS, (True, False)):
        x, sigma, noise, nets, cfg = uid_case(a, b, normalise=normalise)
        xt = x + sigma[:, None] * noise
        d_real, d_fake = nets.real(xt, sigma), nets.fake(xt, sigma)
        size = (x - d_real).abs().mean(1) if normalise else 1.0
        expected = (a * (d_real - b / a * x) ** 2 - a * (d_fake - b / a * x) ** 2).mean(1) / size
        assert_close(real_uid_loss(x, nets, given(noise), cfg), expected, **EXACT)
        if (a, b) == (1.0, 1.0):
            sid = sid_loss(x, nets, given(noise), config(dm_sigma=sigma, alpha=0.5, normalise=normalise))
            assert_close(real_uid_loss(x, nets, given(noise), cfg), 2 * sid, **EXACT)


def test_real_uid_critic_by_hand():
    """D(xt) = c xt at c = 1, a = .8, b = .4, sigma = 1, sigma_data = .5 (weight 5), noise 1 for both:
      x = 2, xt = 3, target .5 * 2 = 1, .8 * 4 = 3.2;   y = 1, yt = 2, target .6 / .2 = 3, .2 * 1 = .2:   loss 5 * 3.4 = 17
    """
    nets = SimpleNamespace(fake=lambda xt, sigma, cond: xt, sigma_data=0.5)
    batch, cfg = given(tensor([1.0]), real=tensor([1.0])), config(critic_sigma=tensor(1.0), uid_a=0.8, uid_b=0.4)
    assert_close(real_uid_critic_loss(tensor([2.0]), nets, batch, cfg), tensor(17.0), **EXACT)


def test_real_uid_critic_without_data_is_the_denoising_loss():
    x, sigma, noise, nets, cfg = uid_case(1.0, 1.0)
    assert_close(real_uid_critic_loss(x, nets, given(noise), cfg), denoising_loss(x, nets, given(noise), cfg), **EXACT)


def test_real_uid_critic_is_content_with_the_teacher_where_fakes_are_real():
    """x = y and one noise: the loss is least at D = x for every (a, b), so the tracker becomes the teacher."""
    for a, b in PAIRS[1:]:
        x, sigma, noise, nets, cfg = uid_case(a, b)
        answer = x.detach().clone().requires_grad_()
        nets.fake = lambda xt, sigma, cond: answer
        real_uid_critic_loss(x.detach(), nets, given(noise, real=x.detach()), cfg).mean().backward()
        assert_close(answer.grad, torch.zeros_like(answer), rtol=0, atol=1e-12)


def test_real_uid_critic_is_told_each_samples_class():
    x, sigma, noise, nets, cfg = uid_case(0.9, 0.9)
    seen, (cond, real_cond) = [], torch.arange(12).view(2, 6)
    nets.fake = lambda xt, sigma, c: seen.append(c) or xt
    real_uid_critic_loss(x, nets, given(noise, cond=cond, real=x.detach(), real_cond=real_cond), cfg)
    assert seen[0] is cond and seen[1] is real_cond


# ---- several steps: TDM and phased targets ----------------------------------------------------------------


def test_ode_step_by_hand():
    """xt = 5 at sigma 4, denoised to 1: noise (5 - 1) / 4 = 1, so at sigma 1 it is 1 + 1 = 2, and at 0 it is 1."""
    xt, x = tensor([5.0]), tensor([1.0])
    assert_close(ode_step(xt, x, 4.0, 1.0), tensor([2.0]), **EXACT)
    assert_close(ode_step(xt, x, 4.0, 0.0), x, **EXACT)


def test_ode_generator_is_eulers_method():
    """Generator(ode=True) = Euler on dx/dsigma = (x - D) / sigma through its levels; later noise is not looked at.  As a
    flow network it is Euler on dx/dt = v (FlowMatchEulerDiscreteScheduler, DDIM)."""
    sigmas, z = (4.0, 1.0, 0.25), torch.randn(3, 6, 2, generator=rng(0))
    net = small_net()
    generator = Generator(net, sigmas, ode=True)
    xt = sigmas[0] * z[0]
    for sigma, following in zip(sigmas, (*sigmas[1:], 0.0)):
        slope = (xt - net(xt, torch.full((6,), sigma))) / sigma
        xt = xt + (following - sigma) * slope
    assert_close(generator(z), xt, rtol=1e-5, atol=1e-5)
    assert_close(generator(torch.cat([z[:1], 9 * z[1:]])), generator(z), **BITWISE)

    def velocity(x_t, t, cond):
        return (3 * x_t).sin() + t[:, None]

    flow = Generator(FromFlow(Velocity(velocity)), sigmas, unit=True, ode=True)
    times = [s / (1 + s) for s in sigmas]
    x_t = z[0]
    for t, following in zip(times, (*times[1:], 0.0)):
        x_t = x_t + (following - t) * velocity(x_t, torch.full((6,), t), None)
    assert_close(flow(z), x_t, rtol=1e-5, atol=1e-5)


class Velocity(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x_t, t, cond):
        return self.function(x_t, t, cond)


def test_path_is_the_input_and_the_answer():
    """Generator.path(...) = (xt, x): x is the network's answer to xt at the step's level, as forward gives it."""
    net, z = small_net(), torch.randn(3, 6, 2, generator=rng(0))
    for ode, step in product((False, True), range(3)):
        generator = Generator(net, (4.0, 1.0, 0.25), ode=ode)
        xt, x = generator.path(z, step=step)
        assert not xt.requires_grad and x.requires_grad
        assert_close(x, generator.net(xt, torch.full((6,), generator.sigmas[step])), **BITWISE)
        assert_close(x, generator(z, step=step), **BITWISE)


def trajectory_case(level=2.0, next_level=0.5):
    """x with grad, sigma between the levels, noise, nets, the input xt of the step, config."""
    x, _, noise, nets = curved_case()
    sigma = torch.linspace(next_level + 0.1, level, 6, dtype=torch.float64)
    xt = x.detach() + level * normal(6, 2, seed=3)
    return x, sigma, noise, nets, dict(xt=xt, level=level, next_level=next_level), config(least_sigma=0.02, dm_sigma=sigma,
                                                                                          critic_sigma=sigma)


def test_renoised_by_hand():
    """level 2 -> 1, x = 1, xt = 5: x_mid = 1 + .5 * 4 = 3; sigma = sqrt(5), noise 1: xt = 3 + 2 = 5; asked for between."""
    batch = asked((tensor(5.0).sqrt(), tensor([1.0])), xt=tensor([5.0]), level=2.0, next_level=1.0)
    xt, x_mid, sigma = renoised(tensor([1.0]), batch, config(least_sigma=0.02))
    assert_close((xt, x_mid, sigma), (tensor([5.0]), tensor([3.0]), tensor(5.0).sqrt()), **EXACT)
    assert parse_sigma(batch.specs[0]) == ("karras", pytest.approx(1.001), 2.0)


def test_renoised_noise_has_unit_variance_for_a_perfect_student():
    """x_k = x + s_k n: the noise in xt, (xt - x) / sigma, is s' / sigma n + sqrt(1 - s'^2 / sigma^2) noise: squares sum to 1."""
    x, sigma, _, _, fields, cfg = trajectory_case()
    fields["xt"] = x.detach() + fields["level"] * 1.0                                    # n = 1, no fresh noise
    parts = []
    for noise in (torch.zeros_like(x), torch.ones_like(x)):
        parts.append((renoised(x.detach(), asked((sigma, noise), **fields), cfg)[0] - x.detach()) / sigma[:, None])
    own, fresh = parts[0], parts[1] - parts[0]
    assert_close(own**2 + fresh**2, torch.ones_like(own), **EXACT)


def test_trajectory_loss_gradient():
    """d loss / dx = DMD's gradient at the re-noised xt, over N: nothing flows through x_mid."""
    x, sigma, noise, nets, fields, cfg = trajectory_case()
    got = gradient(trajectory_loss, x, nets, asked((sigma, noise), **fields), cfg)
    x_mid = x.detach() + 0.25 * (fields["xt"] - x.detach())
    xt = x_mid + (sigma**2 - 0.25).sqrt()[:, None] * noise
    assert_close(got, dmd_gradient(x, nets.real(xt, sigma), nets.fake(xt, sigma)) / x.numel(), **EXACT)


def test_trajectory_descends_the_gradient_itself():
    """Ten times the gap between the scores is ten times the step.  TDM's Huber of width .001 would give its sign."""
    x, sigma, noise, nets, fields, cfg = trajectory_case()
    real, fake = nets.real, nets.fake
    once = gradient(trajectory_loss, x, nets, asked((sigma, noise), **fields), cfg)
    nets.fake = lambda xt, s, c=None: real(xt, s) + 10 * (fake(xt, s) - real(xt, s))
    assert_close(gradient(trajectory_loss, x, nets, asked((sigma, noise), **fields), cfg), 10 * once, **EXACT)


def test_one_step_of_the_trajectory_is_dmd():
    """next_level = 0: x_mid is x, and all three losses are DMD's own at the same noise."""
    x, sigma, noise, nets, fields, cfg = trajectory_case(next_level=0.0)
    draw = (sigma, noise)
    assert_close(gradient(trajectory_loss, x, nets, asked(draw, **fields), cfg), gradient(dmd_loss, x, nets, given(noise), cfg),
                 **EXACT)
    expected = denoising_loss(x, nets, given(noise), cfg)
    for loss in (trajectory_denoising_loss, phased_denoising_loss):
        assert_close(loss(x, nets, asked(draw, **fields), cfg), expected, **EXACT)


def test_trajectory_critic_predicts_x():
    """(1/sigma^2 + 4) mean (D(xt) - x)^2 at the re-noised xt."""
    x, sigma, noise, nets, fields, cfg = trajectory_case()
    xt = renoised(x.detach(), asked((sigma, noise), **fields), cfg)[0]
    expected = (1 / sigma**2 + 4) * (nets.fake(xt, sigma) - x).square().mean(1)
    assert_close(trajectory_denoising_loss(x, nets, asked((sigma, noise), **fields), cfg), expected, **EXACT)


def test_trajectory_critics_see_the_dropped_labels():
    """As in denoising_loss: fake_cond where some labels are dropped; the generator's loss sees the labels themselves."""
    x, sigma, noise, nets, fields, cfg = trajectory_case()
    seen, real = [], nets.real
    nets.fake = lambda xt, s, c: seen.append(c) or real(xt, s)
    nets.real = lambda xt, s, c: real(xt, s)
    cond, dropped = torch.arange(6), torch.full((6,), -1)
    for loss, expected in ((trajectory_denoising_loss, dropped), (phased_denoising_loss, dropped), (trajectory_loss, cond)):
        loss(x, nets, asked((sigma, noise), cond=cond, fake_cond=dropped, **fields), cfg)
        assert seen[-1] is expected


def test_phased_target_by_hand():
    """s = 1, sigma = 2: gain 4 / 3.  xt = 6, x_mid = 3: 6 - 4 = 2.  s = 0 gives x_mid itself."""
    assert_close(phased_target(tensor([6.0]), tensor([3.0]), tensor(2.0), 1.0), tensor([2.0]), **EXACT)
    assert_close(phased_target(tensor([6.0]), tensor([3.0]), tensor(2.0), 0.0), tensor([3.0]), **EXACT)


def test_phased_target_is_right_on_average():
    """x ~ N(0, a^2) and x_mid ~ N(0, a^2 + s^2): the regression of D* on xt is the true denoiser a^2 / (a^2 + sigma^2).

    So it is whatever made x_mid.  TDM's target is not: for a student whose x is a function of its input alone, here a
    multiple of x_mid, the slope of x on xt is another.  Gauss-Hermite in x_mid and the fresh noise.
    """
    u, noise, weight = quadrature()
    for a, s, sigma in product((0.5, 1.0, 2.0), (0.3, 1.0), (1.5, 4.0)):
        x_mid, level = (a**2 + s**2) ** 0.5 * u, torch.full((len(u),), sigma, dtype=torch.float64)
        xt = x_mid + (sigma**2 - s**2) ** 0.5 * noise
        slope = lambda target: (weight[:, None] * target * xt).sum() / (weight[:, None] * xt**2).sum()
        right = tensor(a**2 / (a**2 + sigma**2))[0]
        assert_close(slope(phased_target(xt, x_mid, level, s)), right, **EXACT)
        x = a * u                                                  # a deterministic step: x and x_mid are one number
        assert (slope(x) / right - 1).abs() > 0.003


def test_phased_critic_is_the_error_in_fresh_noise():
    """The weight (1/sigma^2 + 4)(1 - s^2/sigma^2) times the target's error: at sigma_data = infinity it is |n_hat - n|^2
    with D = xt - sigma^2 / sqrt(sigma^2 - s^2) n_hat."""
    x, sigma, noise, nets, fields, cfg = trajectory_case()
    xt, x_mid, _ = renoised(x.detach(), asked((sigma, noise), **fields), cfg)
    loss = phased_denoising_loss(x, nets, asked((sigma, noise), **fields), cfg)
    d_star = xt + (sigma**2 / (sigma**2 - 0.25))[:, None] * (x_mid - xt)
    weight = (1 / sigma**2 + 4) * (1 - 0.25 / sigma**2)
    assert_close(loss, weight * (nets.fake(xt, sigma) - d_star).square().mean(1), **EXACT)
    nets.sigma_data = math.inf
    n_hat = (xt - nets.fake(xt, sigma)) * ((sigma**2 - 0.25).sqrt() / sigma**2)[:, None]
    loss = phased_denoising_loss(x, nets, asked((sigma, noise), **fields), cfg)
    assert_close(loss, (n_hat - noise).square().mean(1), **EXACT)


# ---- stabilisers ------------------------------------------------------------------------------------------


def test_approximate_r1_by_hand():
    """+ w (D(yt) - D(yt + .05 n))^2 at noised real samples alone.  D(h) = 10 h, x = 0, y = .1, w = 2: 2 (10 * .05)^2 = .5."""
    nets = SimpleNamespace(fake=SimpleNamespace(features=lambda xt, sigma, cond: xt), discriminator=lambda h: 10 * h[:, 0])
    zero, one = tensor([0.0]), tensor([1.0])

    def loss(w_r1, *noises):
        batch, cfg = given(*noises, real=tensor([0.1])), config(gan_sigma=tensor(1.0), w_r1=w_r1)
        return gan_critic_loss(zero, nets, batch, cfg)

    logistic = math.log(2) + math.log(1 + math.exp(-1))
    assert_close(loss(0.0, zero, zero), tensor(logistic), **EXACT)                        # and no third noise is drawn
    assert_close(loss(2.0, zero, zero, one), tensor(logistic + 0.5), **EXACT)


def test_approximate_r1_in_sidas_critic():
    """The same, at every place of the picture, with the loss's own weight: l = 3 xt / 3, real logits move by .05 each."""
    nets = SimpleNamespace(fake=SimpleNamespace(features=lambda xt, s, c: xt[:, None].repeat(1, 3, 1)), sigma_data=0.5)
    zero = tensor([0.0, 0.0])

    def loss(w_r1, *noises):
        batch, cfg = given(*noises, real=zero), config(critic_sigma=tensor(1.0), w_r1=w_r1)
        return sida_critic_loss(zero, nets, batch, cfg)

    more = loss(2.0, zero, torch.ones_like(zero)) - loss(0.0, zero)
    assert_close(more, tensor(5 * 2 * 0.05**2), rtol=1e-5, atol=1e-7)                    # float32 logits


def test_every_loss_of_the_family_is_one_value_per_sample():
    """(B,), and sample i alone moves value i: what a batch shares, h's mean, carries no gradient."""
    cond, real, (x, sigma, noise, _) = torch.arange(6) % 2, normal(6, 2, seed=4), curved_case()
    nets = conditional_nets()
    nets.fake = Encoder(nets.fake)
    nets.discriminator = lambda features: features.sum((1, 2))
    cfg = config(dm_sigma=sigma, critic_sigma=sigma, w_gan=0.3, divergence="js", ratio="critic", guidance=3.0, uid_a=0.9,
                 uid_b=0.88, least_sigma=0.02)
    losses = [f_distill_loss, matching_loss, augmentation_loss, sim_loss, sida_loss, sida_critic_loss, real_uid_loss,
              real_uid_critic_loss, trajectory_loss, trajectory_denoising_loss, phased_denoising_loss]
    for loss in losses:
        batch = asked((sigma, noise), cond=cond, real=real, real_cond=cond, xt=x.detach() + 2 * noise, level=2.0, next_level=0.1)
        values = loss(x, nets, batch, cfg)
        assert values.shape == (6,), loss.__name__
        for i in range(6):
            moved, = torch.autograd.grad(values[i], x, retain_graph=True)
            assert moved.any(1).tolist() == [j == i for j in range(6)], loss.__name__


def test_several_noisings_of_the_family_are_the_mean_over_noises():
    """cfg.noisings = 3: value and gradient are means of three losses; every sample keeps its class.  With reverse KL for
    f-distill, whose h depends on who is in the batch."""
    for loss in (f_distill_loss, matching_loss, augmentation_loss, sim_loss, sida_loss, real_uid_loss):
        x, _, _, _ = curved_case()
        nets, cond = conditional_nets(), torch.arange(6) % 2
        nets.fake, nets.discriminator = Encoder(nets.fake), lambda features: features.sum((1, 2))
        sigma, noise = torch.linspace(0.2, 1.5, 18, dtype=torch.float64), normal(18, 2, seed=5)

        def both(noisings, rows):
            cfg = config(dm_sigma="", w_gan=0.3, divergence="rkl", ratio="critic", guidance=3.0, uid_a=0.9, uid_b=0.88,
                         least_sigma=0.02, noisings=noisings)
            value = loss(x, nets, asked((sigma[rows], noise[rows]), cond=cond, level=2.0), cfg).mean()
            return value.detach(), torch.autograd.grad(value, x)[0]

        parts = [both(1, slice(i, None, 3)) for i in range(3)]
        assert_close(both(3, slice(None)), tuple(sum(part) / 3 for part in zip(*parts)), rtol=1e-6, atol=1e-8)

"""Teachers: the exact mixture, the adapters that make every network a Denoiser, Heun's sampler, the noise axis.

A Denoiser is right when it equals a posterior mean computed in another way: an integral, a derivative, a closed form.
"""

import math
import re

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from closed_forms import EXACT, flow_network, ideal, normal, randomised, rng, small_net, tensor
from nano_dmd.denoiser import EDM, FromEps, FromFlow, FromV, heun, score
from nano_dmd.generator import Generator
from nano_dmd.networks import MLP, UNet
from nano_dmd.noise import add_noise, draw_sigma, expand, karras, karras_sigmas, parse_sigma
from nano_dmd.real_score import RealScore
from nano_dmd.teacher import make_pairs
from toy.mixtures import MIXTURES, Mixture

F64 = torch.float64


def line():
    """Three unequal components in one dimension, float64 (weights are binary fractions: exact in float32 too)."""
    return Mixture([[-1.0], [0.2], [0.9]], [0.1, 0.3, 0.2], [0.5, 0.25, 0.25]).to(F64)


def plane():
    """Four unequal components in two dimensions with classes 0, 1, 1, 2, float64."""
    means = [[-0.6, 0.1], [0.5, 0.4], [0.2, -0.7], [0.0, 0.3]]
    return Mixture(means, [0.1, 0.3, 0.2, 0.4], [0.375, 0.25, 0.25, 0.125], torch.tensor([0, 1, 1, 2])).to(F64)


# ---- the exact mixture ------------------------------------------------------------------------------------


def test_mixture_denoises_like_the_integral():
    """D(x, sigma) = integral x0 p(x0) N(x; x0, sigma^2) dx0 / integral p(x0) N(x; x0, sigma^2) dx0: Bayes, by brute
    force.  The trapezoid rule converges exponentially for Gaussians: 1e-10 with 40,001 points.
    """
    x0, mixture = torch.linspace(-8, 8, 40_001, dtype=F64), line()
    prior = mixture.log_prob(x0[:, None]).exp()
    for sigma in (0.02, 0.3, 2.0):
        x = torch.linspace(-2, 2, 9, dtype=F64)
        joint = prior * torch.exp(-0.5 * ((x[:, None] - x0) / sigma) ** 2)
        expected = (joint * x0).sum(1) / joint.sum(1)
        got = mixture(x[:, None], torch.full((9,), sigma, dtype=F64))[:, 0]
        assert_close(got, expected, rtol=0, atol=1e-10)


def test_mixture_density_of_one_gaussian():
    """K = 1: log p = -|x - m|^2 / (2 v) - log(2 pi v) in 2D, v = std^2 + sigma^2.  With m = 0, std = 3, sigma = 4 and
    x = (3, 4): v = 25, so log p = -1/2 - log(50 pi)."""
    mixture = Mixture([[0.0, 0.0]], 3.0).to(F64)
    expected = tensor(-0.5 - math.log(50 * math.pi))
    assert_close(mixture.log_prob(tensor([3.0, 4.0]), 4.0), expected, **EXACT)
    assert_close(mixture.log_prob(tensor([3.0, 4.0]), tensor(4.0)), expected, **EXACT)


def test_mixture_density_integrates_to_one():
    """integral p(x; sigma) dx = 1 at every sigma."""
    x = torch.linspace(-30, 30, 60_001, dtype=F64)[:, None]
    for sigma in (0.0, 0.5, 3.0):
        assert_close(torch.trapezoid(line().log_prob(x, sigma).exp(), x[:, 0]), tensor(1.0)[0], rtol=0, atol=1e-10)


def test_mixture_score_is_the_derivative_of_its_density():
    """score = grad log p (autograd), and D = x + sigma^2 score (Tweedie); both to 1e-10, near and far."""
    mixture, sigma = plane(), tensor(0.01, 0.1, 0.5, 2.0, 80.0)
    for scale in (0.5, 5.0):
        x = (scale * normal(5, 2)).requires_grad_()
        gradient, = torch.autograd.grad(mixture.log_prob(x, sigma).sum(), x)
        assert_close(mixture.score(x, sigma), gradient, rtol=1e-10, atol=1e-10)
        assert_close(mixture(x, sigma), x + sigma[:, None] ** 2 * gradient, rtol=1e-10, atol=1e-10)


def test_mixture_is_differentiable():
    """SiD needs dD/dx: autograd of the denoiser equals central differences (h = 1e-6, errors below 1e-8)."""
    x, sigma = normal(4, 2), tensor(0.2, 0.5, 1.0, 3.0)
    jacobian = torch.autograd.functional.jacobian(lambda x: plane()(x, sigma).sum(0), x)          # (2, 4, 2)
    for d in range(2):
        h = torch.zeros(2, dtype=F64)
        h[d] = 1e-6
        slope = (plane()(x + h, sigma) - plane()(x - h, sigma)) / 2e-6                             # (4, 2)
        assert_close(jacobian[:, :, d].T, slope, rtol=0, atol=1e-8)


def test_mixture_is_right_where_exp_would_underflow():
    """float32, 30 standard deviations out (|x| = 15) and at |x| = 1000, for noise as small as 0.02: finite, and equal
    to float64.  EDM2's toy sums exponentials and is 0/0 there.

    Relative tolerance 1e-5: at |x| = 1000 float32 resolves |x - mean|^2 to 0.06, which moves no responsibility unless x
    is on the border between two modes; these directions are not.
    """
    angle = torch.arange(8) * math.pi / 4 + 0.15
    direction = torch.stack([angle.cos(), angle.sin()], 1)
    for radius in (15.0, 1000.0):
        for level in (0.02, 0.5, 5.0):
            x, sigma, exact = radius * direction, torch.full((8,), level), MIXTURES["ring8"]().to(F64)
            for name in ("denoise", "score"):
                got = getattr(MIXTURES["ring8"](), name)(x, sigma)
                assert_close(got.double(), getattr(exact, name)(x.double(), sigma.double()), rtol=1e-5, atol=1e-5)


def test_mixture_samples_have_its_moments():
    """E x = sum w m,  Cov x = sum w (std^2 I + m m^T) - E x E x^T.  200,000 seeded points; five standard errors of the
    mean of something with variance below 1 are 5 / sqrt(n) = 0.011."""
    mixture, n = plane(), 200_000
    x, labels = mixture.sample(n, rng())
    mean = mixture.weights @ mixture.means
    second = torch.einsum("k,ki,kj->ij", mixture.weights, mixture.means, mixture.means)
    cov = second + (mixture.weights @ mixture.std**2) * torch.eye(2, dtype=F64) - torch.outer(mean, mean)
    assert_close(x.mean(0), mean, rtol=0, atol=0.011)
    assert_close(x.T.cov(), cov, rtol=0, atol=0.011)
    assert_close(labels.bincount() / n, torch.tensor([0.375, 0.5, 0.125]), rtol=0, atol=0.011)
    assert x.dtype == F64 and mixture.sample(3)[0].shape == (3, 2)


def test_mixture_sampling_is_seeded():
    """One CPU generator fixes the points; labels are those of the components drawn."""
    a, b = plane().sample(50, rng(7)), plane().sample(50, rng(7))
    assert_close(a, b, rtol=0, atol=0)
    tight = Mixture([[-5.0, 0.0], [5.0, 0.0]], 0.01, labels=torch.tensor([1, 0]))
    x, labels = tight.sample(50, rng(7))
    assert_close(labels, (x[:, 0] < 0).long())


def test_conditional_mixture_is_the_mixture_of_its_class():
    """D(x, sigma, c) is the denoiser of the sub-mixture of class c; -1 and None both mean no class (networks.py)."""
    mixture, x, sigma = plane(), normal(4, 2), tensor(0.1, 0.3, 1.0, 4.0)
    alone = Mixture([[-0.6, 0.1]], 0.1).to(F64), Mixture([[0.5, 0.4], [0.2, -0.7]], [0.3, 0.2]).to(F64)
    for c in (0, 1):
        assert_close(mixture(x, sigma, torch.full((4,), c)), alone[c](x, sigma), **EXACT)
    assert_close(mixture(x, sigma, torch.full((4,), -1)), mixture(x, sigma), **EXACT)
    mixed = mixture(x, sigma, torch.tensor([2, 1, -1, 0]))        # each row its own class
    for i, c in enumerate((2, 1, -1, 0)):
        assert_close(mixed[i], mixture(x, sigma, torch.full((4,), c))[i], **EXACT)


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_have_unit_scale(name):
    """Every mixture has mean 0 and std 0.5 per axis, within 5 percent of 0.5: one sigma_data fits all."""
    m = MIXTURES[name]()
    mean = m.weights @ m.means
    std = (m.weights @ (m.means - mean) ** 2 + m.weights @ m.std**2).sqrt()
    assert_close(mean, torch.zeros(2), rtol=0, atol=0.025)
    assert_close(std, torch.full((2,), 0.5), rtol=0.05, atol=0)
    assert_close(m.weights.sum(), torch.tensor(1.0))


def test_mixtures_look_like_their_names():
    """ring8: 8 means on a circle.  grid25: 5 x 5, equally spaced.  spirals: two arms, radius proportional to the angle,
    one the mirror image of the other.  checkerboard: density on squares of one colour, next to none on the other."""
    ring, grid, spirals, board = (MIXTURES[name]() for name in ("ring8", "grid25", "spirals", "checkerboard"))
    assert_close(ring.means.norm(dim=1), torch.full((8,), 0.7036), rtol=1e-5, atol=0)
    assert_close(ring.weights, torch.full((8,), 1 / 8), rtol=1e-6, atol=0)
    assert_close(MIXTURES["ring8_skewed"]().weights, torch.tensor([0.2, 0.05] * 4), rtol=1e-6, atol=0)
    assert_close(grid.means.unique().diff(), torch.full((4,), 0.3518), rtol=1e-4, atol=0)
    assert len(grid.means.unique(dim=0)) == 25
    arm, mirrored = spirals.means.chunk(2)
    assert_close(mirrored, -arm, rtol=0, atol=0)
    turn = (arm[1:] * arm[:-1]).sum(1) / arm[1:].norm(dim=1) / arm[:-1].norm(dim=1)
    growth = arm.norm(dim=1).diff() / turn.clamp(max=1).acos()   # dr / dangle, a constant on r = c angle
    assert_close(growth, growth.mean().expand(59), rtol=1e-3, atol=0)
    side = 4 * board.means[:, 0].unique().diff()[0]              # 16 columns of components, 4 to a square
    centre = side * torch.cartesian_prod(torch.arange(4) - 1.5, torch.arange(4) - 1.5)
    dark = (torch.cartesian_prod(torch.arange(4), torch.arange(4)).sum(1) % 2 == 0)
    density = board.log_prob(centre).exp()
    assert density[dark].min() > 10 * density[~dark].max()


# ---- eps- and v-prediction --------------------------------------------------------------------------------


def sd_schedule():
    """alphas_cumprod (1000,) of Stable Diffusion 1.5: beta^(1/2) linear from .00085^(1/2) to .012^(1/2)."""
    return (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=F64) ** 2).cumprod(0)


def exact_network(kind, mixture, abar):
    """What a perfect eps-, v- or flow network answers, from the definitions alone: x_vp = alpha x0 + s eps, s^2 = 1 - alpha^2,

        eps = (x_vp - alpha E[x0]) / s,         v = alpha eps - s E[x0],

    and for a flow network see closed_forms.flow_network.
    """
    def net(x_vp, t, cond):
        alpha, s = expand(abar[t].sqrt(), x_vp), expand((1 - abar[t]).sqrt(), x_vp)
        x0 = mixture((x_vp / alpha).to(x_vp.dtype), (s / alpha)[:, 0].to(x_vp.dtype), cond)
        eps = (x_vp - alpha * x0) / s
        return (eps if kind == "eps" else alpha * eps - s * x0).to(x_vp.dtype)

    return net


def adapted(kind, mixture):
    """(the mixture behind an adapter, the noise levels it is asked at)."""
    abar, levels = sd_schedule(), FromEps(None, sd_schedule()).sigmas[::9]
    if kind == "flow":
        return FromFlow(flow_network(mixture)), torch.cat([levels, torch.tensor([99.0, 999.0])])
    return {"eps": FromEps, "v": FromV}[kind](exact_network(kind, mixture, abar), abar), levels


ADAPTERS = ["eps", "v", "flow"]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_reproduce_the_exact_mixture(kind):
    """An exact mixture seen through an eps-, v- or flow network is the mixture again, at every noise level of SD's table: to
    1e-5 in float32, to 1e-6 in float64 (the table itself is kept in float32).  The class reaches the network.  A flow network
    is asked up to sigma 999 too, where its v is a difference of numbers 1000 times as large as x0: 1e-3 in float32."""
    for dtype, tolerance in ((torch.float32, 1e-5), (F64, 1e-6)):
        exact = plane().to(dtype)
        adapter, sigma = adapted(kind, exact)
        sigma, n = sigma.to(dtype), len(sigma)
        cond = torch.arange(n) % 4 - 1
        x = add_noise(exact.sample(n, rng())[0], sigma, normal(n, 2).to(dtype))
        for c in (None, cond):
            wanted, got = exact(x, sigma, c), adapter(x, sigma, c)
            assert_close(got[sigma < 15], wanted[sigma < 15], rtol=0, atol=tolerance)
            assert_close(got, wanted, rtol=0, atol=1e-3 if dtype is torch.float32 else tolerance)


def test_a_flow_network_is_finite_at_every_finite_sigma():
    """The network's own part is bounded: D -> noise - v as t -> 1.  Against float64, v = tanh x: relative 1e-6."""
    net = lambda x, t, cond: torch.tanh(x) + expand(t, x)
    z = normal(4, 2)
    for level in (1e-6, 1e-3, 1.0, 1e3, 1e6, 1e12):
        got = FromFlow(net)((1 + level) * z.float(), torch.full((4,), level))
        assert got.isfinite().all()
        assert_close(got.to(F64), FromFlow(net)((1 + level) * z, torch.full((4,), level, dtype=F64)), rtol=2e-6, atol=2e-6)


def test_a_unit_start_is_z_to_every_network():
    """scale(sigma_0) z is what an adapter hands to its network as z: relative 1e-6, at the levels students start from."""
    z, seen = normal(1, 3, 2).float(), []

    class Network(torch.nn.Module):
        def forward(self, x, t, cond):
            seen.append(x)
            return x

    for net, level in ((EDM(Network()), 80.0), (FromEps(Network(), sd_schedule()), 14.61), (FromFlow(Network()), 999.0)):
        Generator(net, [level], unit=True)(z)
        assert_close(seen[-1], z[0], rtol=1e-6, atol=1e-6)


def test_timesteps_round_trip():
    """sigma -> t -> sigma is the identity on all 1000, also for a sigma computed by another float32 formula: that one
    is a few ulps off, which nearest log-sigma ignores and searchsorted turns into the next timestep."""
    abar, t = sd_schedule(), torch.arange(1000)
    adapter = FromEps(None, abar)
    assert_close(adapter.time(adapter.sigmas), t)
    assert_close(adapter.sigmas, ((1 - abar) / abar).sqrt().float(), rtol=1e-6, atol=0)
    assert_close(adapter.time((1 / abar.float() - 1).sqrt()), t)
    assert_close(adapter.sigmas[[0, 999]], torch.tensor([0.0292, 14.6146]), rtol=2e-3, atol=0)   # the ends of SD's axis


def test_timestep_is_nearest_in_log_sigma():
    """Between two table entries the geometric mean decides; beyond the table its ends answer."""
    adapter = FromEps(None, sd_schedule())
    low, high = adapter.sigmas[:-1], adapter.sigmas[1:]
    t = torch.arange(999)
    assert_close(adapter.time(low**0.51 * high**0.49), t)
    assert_close(adapter.time(low**0.49 * high**0.51), t + 1)
    assert_close(adapter.time(torch.tensor([1e-4, 80.0])), torch.tensor([0, 999]))


# ---- EDM's preconditioning --------------------------------------------------------------------------------


def coefficients(sigma, sd):
    """(c_skip, c_out, c_in, c_noise) of an EDM denoiser, read off by probing it with constant networks at x = 1."""
    one, seen = torch.ones(len(sigma), 1, dtype=F64), []
    c_skip = EDM(lambda x, c_noise, cond: torch.zeros_like(x), sd)(one, sigma)
    c_out = EDM(lambda x, c_noise, cond: seen.append((x, c_noise)) or torch.ones_like(x), sd)(one, sigma) - c_skip
    return c_skip[:, 0], c_out[:, 0], seen[0][0][:, 0], seen[0][1]


def test_edm_coefficients():
    """EDM table 1 at sigma = 3, sd = 4: norm 5, c_skip = 16/25, c_out = 12/5, c_in = 1/5, c_noise = ln(3) / 4."""
    expected = [tensor(16 / 25), tensor(12 / 5), tensor(1 / 5), tensor(math.log(3) / 4)]
    assert_close(list(coefficients(tensor(3.0), 4.0)), expected, **EXACT)


def test_edm_limits():
    """sigma -> 0: D = x, the network has no say.   sigma -> infinity: D = sd * F, the input has none."""
    c_skip, c_out, _, _ = coefficients(tensor(1e-9, 1e9), 0.5)
    assert_close(c_skip, tensor(1.0, 0.0), rtol=0, atol=1e-8)
    assert_close(c_out, tensor(0.0, 0.5), rtol=0, atol=1e-8)


def test_edm_has_unit_variance_inside():
    """For data of variance sd^2 the network's input c_in xt and its target (x - c_skip xt) / c_out have variance 1:

        c_in^2 (sd^2 + sigma^2) = 1,     [(1 - c_skip)^2 sd^2 + c_skip^2 sigma^2] / c_out^2 = 1
    """
    sd, sigma = 0.5, torch.logspace(-3, 2, 30, dtype=F64)
    c_skip, c_out, c_in, _ = coefficients(sigma, sd)
    assert_close(c_in**2 * (sd**2 + sigma**2), torch.ones_like(sigma), **EXACT)
    target = ((1 - c_skip) ** 2 * sd**2 + c_skip**2 * sigma**2) / c_out**2
    assert_close(target, torch.ones_like(sigma), rtol=1e-9, atol=0)


def test_edm_features_see_what_the_network_sees():
    """features(x, sigma) are the network's features at the same scaled input and c_noise as in forward."""
    net, x, sigma, seen = small_net(), normal(3, 2).float(), torch.tensor([0.1, 1.0, 80.0]), []
    net.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    net(x, sigma)
    assert_close(net.features(x, sigma), net.net.features(*seen[0]), rtol=0, atol=0)


def test_edm_hands_the_class_on():
    """The network is asked for the class it was given, in forward and in features."""
    net, x, sigma, cond = random_unet(), normal(3, 1, 8, 8).float(), torch.ones(3), torch.tensor([1, 2, 3])
    for function in (EDM(net), EDM(net).features):
        assert (function(x, sigma, cond) - function(x, sigma)).abs().amax((1, 2, 3)).min() > 0.01
    seen = []
    EDM(lambda x, c_noise, cond: seen.append(cond) or x)(x, sigma, cond)
    assert seen[0] is cond


def test_bf16_runs_inside_the_network_only():
    """bf16=True: F in bfloat16, everything else float32.  With F = 0 (a fresh network) the answer is float32's to the
    bit, at sigma = 80 too; with random weights c_out F agrees to 10 percent of its largest entry (8 bits, several layers)."""
    torch.manual_seed(0)
    for net, x in ((MLP(), normal(4, 2).float()), (UNet(width=8, emb=16), normal(4, 1, 8, 8).float())):
        sigma, cond = torch.tensor([0.01, 0.5, 5.0, 80.0]), torch.tensor([0, 3, -1, 9])
        exact, fast = EDM(net), EDM(net, bf16=True)
        assert_close(fast(x, sigma, cond), exact(x, sigma, cond), rtol=0, atol=0)
        for i, p in enumerate(net.parameters()):
            p.data += 0.1 * torch.randn(p.shape, generator=rng(i))
        a, b, skip = fast(x, sigma, cond), exact(x, sigma, cond), 0.25 / (sigma**2 + 0.25)
        size = (b - expand(skip, x) * x).abs().flatten(1).amax(1)
        assert a.dtype == fast.features(x, sigma, cond).dtype == torch.float32
        assert ((a - b).abs().flatten(1).amax(1) < 0.1 * size).all() and not torch.equal(a, b)


# ---- the networks -----------------------------------------------------------------------------------------


def test_networks_start_at_zero():
    """A fresh network answers 0, so a fresh denoiser is c_skip x: the best linear one for centred data."""
    assert not MLP()(normal(3, 2).float(), torch.zeros(3)).any()
    assert not UNet()(normal(3, 1, 8, 8).float(), torch.zeros(3), torch.tensor([1, -1, 9])).any()
    assert not UNet(channels=3, classes=0)(normal(3, 3, 8, 8).float(), torch.zeros(3)).any()


def test_patches():
    """With patch=2 the inner network sees a quarter of the places, and each pixel of the answer depends on its own input."""
    torch.manual_seed(0)
    net, x = UNet(width=8, emb=16, patch=2), normal(2, 1, 12, 12).float().requires_grad_()
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    assert net.features(x, torch.zeros(2)).shape == (2, 16, 3, 3) and net(x, torch.zeros(2)).shape == x.shape
    for i, j in ((0, 0), (5, 6), (11, 11)):
        slope, = torch.autograd.grad(net(x, torch.zeros(2))[0, 0, i, j], x)
        assert slope[0, 0, i, j].abs() > 1e-4 and not slope[1].any()
    assert UNet(width=8, emb=16).state_dict().keys() == net.state_dict().keys()


@pytest.mark.parametrize("patch", [1, 2])
def test_patches_are_places_of_a_convolution(patch):
    """The first layer is a 3x3 convolution over patches, as pixel_unshuffle lays them out.  Moved input is moved output."""
    torch.manual_seed(0)
    net, x = UNet(width=4, emb=8, patch=patch), normal(1, 1, 96, 96).float()
    w = net.conv_in.weight.view(4, 3, patch, 3, patch).permute(0, 2, 4, 1, 3).reshape(4, patch**2, 3, 3)
    places = torch.nn.functional.conv2d(torch.nn.functional.pixel_unshuffle(x, patch), w, net.conv_in.bias, padding=1)
    assert_close(net.conv_in(x), places, rtol=1e-4, atol=1e-5)
    net.conv_out.weight.data.normal_()
    down = net(x.roll(4, 2), torch.zeros(1))                      # 4 = a place of the half resolution
    assert_close(down[..., 44:56, 42:54], net(x, torch.zeros(1))[..., 40:52, 42:54], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dim, octaves", [(1, 3), (2, 5)])
def test_mlp_sees_octaves(dim, octaves):
    """The first layer gets the point, then sines and cosines of pi/2 2^k of each coordinate and of 1, 2, 4, 8 c_noise."""
    net, x, c, seen = MLP(dim, width=8, octaves=octaves), normal(5, dim).float(), torch.linspace(-1, 1, 5), []
    net.hidden[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net(x, c)
    phases = [math.pi / 2 * 2**k * x[:, d] for d in range(dim) for k in range(octaves)] + [2**k * c for k in range(4)]
    expected = torch.stack([*x.T, *map(torch.sin, phases), *map(torch.cos, phases)], 1)
    assert_close(seen[0], expected, rtol=0, atol=1e-5)


def random_unet():
    return randomised(UNet(width=8, emb=16), 0.2)


def test_no_class_is_minus_one():
    """cond None and cond -1 are the same network; a class, 0 included, is another one; rows do not mix."""
    net, x, c = random_unet(), normal(3, 1, 8, 8).float(), torch.tensor([-0.5, 0.0, 1.0])
    none = net(x, c)
    close = dict(rtol=1e-5, atol=1e-6)                            # convolutions of other batches may round otherwise
    assert_close(net(x, c, torch.full((3,), -1)), none, rtol=0, atol=0)
    mixed = net(x, c, torch.tensor([-1, 4, -1]))
    assert_close(mixed[[0, 2]], none[[0, 2]], **close)
    assert (mixed[1] - none[1]).abs().max() > 0.01
    assert (net(x, c, torch.tensor([0, 0, 0])) - none).abs().amax((1, 2, 3)).min() > 0.01
    assert_close(net(x[1:2], c[1:2], torch.tensor([4])), mixed[1:2], **close)


def test_features_have_the_shape_of_the_bottleneck():
    """MLP (B, width); U-Net (B, 2 width, H/2, W/2).  They depend on the point, the noise level and the class."""
    c, later = torch.zeros(3), torch.ones(3)
    mlp, x = MLP(width=16), normal(3, 2).float()
    assert mlp.features(x, c).shape == (3, 16)
    unet, image, cond = random_unet(), normal(3, 1, 8, 8).float(), torch.tensor([1, 2, 3])
    assert unet.features(image, c, cond).shape == (3, 16, 4, 4)
    for a, b in ((mlp.features(x, c), mlp.features(x, later)), (mlp.features(x, c), mlp.features(-x, c)),
                 (unet.features(image, c), unet.features(image, later)),
                 (unet.features(image, c), unet.features(image, c, cond))):
        assert (a - b).abs().max() > 1e-3


# ---- the real score ---------------------------------------------------------------------------------------


class Counted(nn.Module):
    """A denoiser that remembers the classes it was asked for."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser, self.asked = denoiser, []

    def forward(self, x, sigma, cond=None):
        self.asked.append(cond)
        return self.denoiser(x, sigma, cond)


def test_guidance():
    """u + w (c - u) with c = D(x, sigma, class) and u = D(x, sigma, None): w = 1 is c, w = 0 is u, w = 7.5 is 7.5."""
    mixture, x, sigma, cond = plane(), normal(4, 2), tensor(0.1, 0.3, 1.0, 4.0), torch.tensor([0, 1, 2, 1])
    u, c = mixture(x, sigma), mixture(x, sigma, cond)
    for w in (0.0, 0.5, 1.0, 2.0, 7.5):
        assert_close(RealScore(mixture, w)(x, sigma, cond), u + w * (c - u), **EXACT)
        assert_close(RealScore(mixture, w)(x, sigma), u, **EXACT)


def test_guidance_costs_a_second_call_only_when_it_is_on():
    """w = 1, or no class, asks the teacher once; any other w twice."""
    mixture, x, sigma, cond = plane(), normal(4, 2), tensor(0.1, 0.3, 1.0, 4.0), torch.tensor([0, 1, 2, 1])
    for w, c, calls in ((1.0, cond, 1), (1.0, None, 1), (3.0, None, 1), (3.0, cond, 2)):
        denoiser = Counted(mixture)
        RealScore(denoiser, w)(x, sigma, c)
        assert len(denoiser.asked) == calls


def test_real_score_is_frozen_but_differentiable():
    """No weight of the teacher wants a gradient and it is in eval mode; its input still gets the exact Jacobian."""
    net = small_net().double().train()
    real, x, sigma = RealScore(net), normal(3, 2), tensor(0.3, 1.0, 3.0)
    assert not any(p.requires_grad for p in real.parameters()) and not any(m.training for m in real.denoiser.modules())
    x.requires_grad_()
    gradient, = torch.autograd.grad(real(x, sigma).sum(), x)
    for d in range(2):
        h = torch.zeros(2, dtype=F64)
        h[d] = 1e-6
        slope = ((real(x + h, sigma) - real(x - h, sigma)) / 2e-6).sum(1)
        assert_close(gradient[:, d], slope.detach(), rtol=0, atol=1e-7)


def test_score_is_tweedie():
    """(D(x, sigma) - x) / sigma^2 = grad log p(x; sigma), here against the mixture's closed form."""
    mixture, x, sigma = plane(), normal(4, 2), tensor(0.1, 0.3, 1.0, 4.0)
    assert_close(score(mixture, x, sigma), mixture.score(x, sigma), rtol=1e-10, atol=1e-10)
    cond = torch.tensor([0, 1, 2, 1])
    assert_close(score(mixture, x, sigma, cond), (mixture(x, sigma, cond) - x) / sigma[:, None] ** 2, **EXACT)


# ---- Heun's sampler ---------------------------------------------------------------------------------------


def test_heun_solves_the_ode_of_a_gaussian():
    """For N(0, s^2) the probability-flow ODE dx/dsigma = (x - D) / sigma = sigma x / (s^2 + sigma^2) has the solution
    x(0) = x(sigma_max) s / sqrt(s^2 + sigma_max^2).  Heun gets there slowly on EDM's grid: 18 steps still stretch a
    Gaussian of std 0.5 by 5.53 percent, 64 by 0.37, 256 by 0.021."""
    z, s = normal(5, 3), 0.5
    exact = 80 * z * s / math.sqrt(s**2 + 80**2)
    for steps, stretch in ((18, 0.05527), (64, 0.00366), (256, 0.00021)):
        assert_close(heun(ideal(s), z, steps=steps), (1 + stretch) * exact, rtol=1e-5, atol=0)


def test_heun_is_of_second_order():
    """Twice the steps, a quarter of the error.  The last step, from sigma_min to 0, is D itself whatever the number of
    steps, so the limit is x(sigma_min) s^2 / (s^2 + sigma_min^2): measured against it, ratios within 4 +- 0.4."""
    s, low, high, z = 0.5, 0.002, 80.0, torch.ones(1, 1, dtype=F64)
    limit = high * math.sqrt((s**2 + low**2) / (s**2 + high**2)) * s**2 / (s**2 + low**2)
    errors = [abs(heun(ideal(s), z, steps=n).item() - limit) for n in (64, 128, 256)]
    for coarse, fine in zip(errors, errors[1:]):
        assert 3.6 < coarse / fine < 4.4


def test_heun_calls_the_network_2n_minus_1_times():
    """Twice per step but once in the last; from sigma_max down to sigma_min; classes are handed on."""
    asked, cond = [], torch.tensor([1, 0, 2])

    def denoiser(x, sigma, c):
        asked.append(sigma)
        assert c is cond and x.dtype == sigma.dtype == torch.float32 and sigma.shape == (3,)
        return torch.zeros_like(x)

    x = heun(denoiser, normal(3, 2).float(), cond, steps=7, sigma_min=0.01, sigma_max=20.0)
    grid = karras_sigmas(7, 0.01, 20.0).float()
    assert len(asked) == 2 * 7 - 1 and x.dtype == torch.float32
    assert_close(torch.stack(asked)[:, 0], torch.cat([grid[:1], grid[1:].repeat_interleave(2)]), rtol=1e-6, atol=0)
    asked.clear()
    heun(denoiser, normal(3, 2).float(), cond)
    assert len(asked) == 35                                       # EDM's 18 steps, unless told otherwise


def test_heun_integrates_in_float64():
    """A float32 network, float64 in between: float32 noise gives the float64 run's answer, rounded once, to the bit."""
    mixture, z = MIXTURES["ring8"](), torch.randn(6, 2, generator=rng())

    def in_float32(x, sigma, cond):
        return mixture(x.float(), sigma.float(), cond).double()

    assert_close(heun(mixture, z), heun(in_float32, z.double()).float(), rtol=0, atol=0)


def test_heun_draws_the_mixture():
    """Unit noise through the sampler is the mixture: mean and std of 20,000 seeded points, five standard errors."""
    x = heun(MIXTURES["ring8"](), torch.randn(20_000, 2, generator=rng()))
    assert_close(x.mean(0), torch.zeros(2), rtol=0, atol=5 * 0.5 / math.sqrt(20_000))
    assert_close(x.std(0), torch.full((2,), 0.5), rtol=0, atol=5 * 0.5 / math.sqrt(20_000))
    distance = torch.cdist(x, MIXTURES["ring8"]().means).amin(1)
    assert (distance < 5 * 0.05).float().mean() > 0.99            # and nothing between the modes


def test_pairs_are_heun_answers_in_order():
    """make_pairs in chunks of 4 is heun on everything at once, each noise with its own class."""
    mixture, z, cond = plane(), normal(10, 2), torch.arange(10) % 3
    pairs = make_pairs(mixture, z, cond, batch=4, show=False, steps=8, sigma_max=10.0)
    assert_close(pairs, heun(mixture, z, cond, steps=8, sigma_max=10.0), **EXACT)
    without = make_pairs(mixture, z, batch=4, show=False, steps=8)
    assert_close(without, heun(mixture, z, steps=8), **EXACT)


# ---- the noise axis ---------------------------------------------------------------------------------------


def test_karras_sigmas():
    """sigma_i = (hi^(1/7) + i/(n-1) (lo^(1/7) - hi^(1/7)))^7: descending, both ends exact, float64.

    n = 3's middle is the median of SiD's and DMD2's axis, 2.53 (SiD starts its generator there: "init_sigma 2.5").
    """
    ends = 80 ** (1 / 7), 0.002 ** (1 / 7)
    assert_close(karras_sigmas(3), tensor(80.0, ((ends[0] + ends[1]) / 2) ** 7, 0.002), rtol=1e-12, atol=0)
    assert_close(karras_sigmas(3)[1], tensor(2.5152)[0], rtol=1e-3, atol=0)
    assert_close(karras_sigmas(4, 1.0, 4.0, rho=1.0), tensor(4.0, 3.0, 2.0, 1.0), **EXACT)
    assert karras_sigmas(18).dtype == F64 and (karras_sigmas(18).diff() < 0).all()


def test_timesteps_of_the_papers_on_this_axis():
    """DMD's "t in 20..980 of 1000" is sigma in 0.0032..72 (the Karras table, flipped); SiD's "t_max = 800" is 24.4."""
    table = karras_sigmas(1000).flip(0)
    assert_close(table[[20, 500, 980]], tensor(0.0032, 2.53, 72.05), rtol=0.02, atol=0)
    assert_close(karras(torch.tensor(1 - 0.8, dtype=F64)), tensor(24.41)[0], rtol=1e-3, atol=0)


def kolmogorov_smirnov(u):
    """Largest gap between the distribution of u (n,) and the uniform one on [0, 1]."""
    n, u = len(u), u.double().sort().values
    return torch.maximum((u - torch.arange(n) / n).abs(), (u - torch.arange(1, n + 1) / n).abs()).max().item()


def test_draw_sigma_has_the_distribution_it_names():
    """lognormal(m,s): Phi((ln sigma - m) / s) is uniform.  karras(lo,hi): (sigma^(1/7) - lo^(1/7)) / (hi^(1/7) -
    lo^(1/7)) is uniform.  flow(lo,hi): t = sigma / (1 + sigma) is uniform from lo to hi; shifted by c = 3 as Stable Diffusion 3
    shifts it, t' = c t / (1 + (c - 1) t), a logit-normal t has lognormal(ln 3, 1) sigma.  50,000 seeded draws; chance exceeds a
    Kolmogorov-Smirnov distance of 1.63 / sqrt(n) once in a hundred seeds."""
    n = 50_000
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lognormal = draw_sigma("lognormal(-1.2, 1.4)", n, "cpu")
        warped = draw_sigma("karras(0.0032,72)", n, "cpu")
        flow = draw_sigma("flow(0.02,0.98)", n, "cpu")
        shifted = draw_sigma(f"lognormal({math.log(3)},1)", n, "cpu").double()
    low, high = 0.0032 ** (1 / 7), 72 ** (1 / 7)
    limit = 1.63 / math.sqrt(n)
    assert kolmogorov_smirnov(torch.special.ndtr((lognormal.double().log() + 1.2) / 1.4)) < limit
    assert kolmogorov_smirnov((warped.double() ** (1 / 7) - low) / (high - low)) < limit
    assert kolmogorov_smirnov((flow.double() / (1 + flow.double()) - 0.02) / 0.96) < limit
    t = shifted / (1 + shifted)
    before = t / (3 - 2 * t)                                      # the inverse of the shift
    assert kolmogorov_smirnov(torch.special.ndtr((before / (1 - before)).log())) < limit
    assert 0.0032 * (1 - 1e-5) < warped.min() and warped.max() < 72 * (1 + 1e-5)
    assert lognormal.shape == warped.shape == (n,) and lognormal.dtype == warped.dtype == torch.float32


def test_parse_sigma():
    """Name and two numbers, spaces allowed; everything else is one clear ValueError that quotes the text."""
    assert parse_sigma("lognormal( -1.2 , 1.4 )") == ("lognormal", -1.2, 1.4)
    assert parse_sigma("karras(0.002,80)") == ("karras", 0.002, 80.0)
    assert parse_sigma("sd(20,980)") == ("sd", 20.0, 980.0)
    assert parse_sigma("flow(0.02, 0.98)") == ("flow", 0.02, 0.98)
    wrong = ("", "lognormal", "lognormal(1)", "lognormal(1,2,3)", "uniform(0,1)", "karras(a,b)", "karras(2,1)",
             "karras(0,1)", "karras(1,1)", "lognormal(0,0)", "lognormal(0,-1)", "lognormal(0,inf)", "karras(1,nan)",
             "sd(980,20)", "sd(0.5,9)", "sd(0,1000)", "flow(0,1)", "flow(0.5,1)", "flow(0.9,0.1)", "flow(0.1)")
    for spec in wrong:
        with pytest.raises(ValueError, match=re.escape(repr(spec))):
            parse_sigma(spec)


def test_expand_refuses_what_would_broadcast_silently():
    """(B,) -> (B, 1, ..., 1), and ValueError for anything else: a scalar, one sigma for all, a (B, 1), or one number
    per column, which x (2, 2) would take without a word."""
    assert expand(torch.arange(3), torch.zeros(3, 2)).shape == (3, 1)
    assert expand(torch.arange(3), torch.zeros(3, 1, 8, 8)).shape == (3, 1, 1, 1)
    x = torch.zeros(2, 2)
    for wrong in (torch.tensor(1.0), torch.ones(1), torch.ones(2, 1), torch.ones(1, 2), torch.ones(3)):
        with pytest.raises(ValueError, match="one number per sample"):
            expand(wrong, x)


def test_add_noise_broadcasts_over_samples():
    """Each sample gets its own sigma over all of its pixels."""
    noise, sigma = normal(3, 1, 4, 4), tensor(0.0, 1.0, 10.0)
    got = add_noise(torch.zeros_like(noise), sigma, noise)
    for i in range(3):
        assert_close(got[i], sigma[i] * noise[i], **EXACT)


@pytest.mark.parametrize("adapter", [FromEps, FromV])
def test_beyond_the_table_all_is_noise(adapter):
    """A table that ends at sigma 12.6, asked at 80: the answer is that to the same picture of noise at 12.6, within 1e-12;
    up to the end of the table nothing is scaled, to the bit."""
    abar = (1 - torch.linspace(1e-4, 0.01, 1000, dtype=torch.float64)).cumprod(0)
    denoiser = adapter(lambda x, t, cond: torch.tanh(3 * x) + expand(t / 1000, x), abar)
    end = denoiser.sigmas[-1].double()
    x, sigma = torch.randn(5, 2, dtype=torch.float64), torch.full((5,), 80.0, dtype=torch.float64)
    inside = denoiser(x * end / 80, end.expand(5))
    torch.testing.assert_close(denoiser(x, sigma), inside, rtol=0, atol=1e-12)
    assert torch.equal(denoiser.within(x, end.expand(5))[0], x) and torch.equal(denoiser.within(x, sigma / 8)[0], x)

"""The generator: one step is the denoiser at one noise level; several steps train on what they will see when sampling.

The input of step i is the generator's own earlier output, noised again (backward simulation).  It is a sample, not a
function to differentiate: the gradient of step i passes through step i alone.
"""

import math

import torch
from torch import nn
from torch.testing import assert_close

from closed_forms import BITWISE, rng, small_net, tensor
from nano_dmd.denoiser import lerp
from nano_dmd.engine.config import resolve
from nano_dmd.engine.draw import Draw
from nano_dmd.generator import Generator, update_ema
from nano_dmd.teacher import Teacher
from toy.mixtures import MIXTURES

SIGMAS = (5.0, 1.5, 0.6, 0.2)


def four_steps():
    """A generator of four steps with random weights, and noise z (4, B, 2) for it."""
    return Generator(small_net(), SIGMAS), torch.randn(4, 6, 2, generator=rng())


def calls(generator):
    """The list of (input, sigma) of every network call from now on."""
    seen = []
    generator.net.register_forward_pre_hook(lambda module, inputs: seen.append((inputs[0].detach().clone(), inputs[1])))
    return seen


# ---- sampling ---------------------------------------------------------------------------------------------


def test_one_step_is_the_denoiser_of_pure_noise():
    """x = D(sigma_0 z, sigma_0), to the bit."""
    net, z = small_net(), torch.randn(1, 6, 2, generator=rng())
    assert_close(Generator(net, [2.5])(z), net(2.5 * z[0], torch.full((6,), 2.5)), **BITWISE)


def test_one_step_by_hand():
    """With D(x, sigma) = x / 2: G(z) = 2.5 z / 2."""
    class Half(nn.Module):
        def forward(self, x, sigma, cond=None):
            return x / 2

    assert_close(Generator(Half(), [2.5])(tensor([[4.0]])), tensor([5.0]), **BITWISE)


def test_few_steps_are_denoise_and_noise_again():
    """x_0 = D(sigma_0 z_0, sigma_0),  x_i = D(x_{i-1} + sigma_i z_i, sigma_i), each with noise of its own: the loop one
    writes for inference, to the bit."""
    generator, z = four_steps()
    x = torch.zeros(6, 2)
    for sigma, noise in zip(SIGMAS, z):
        x = generator.net(x + sigma * noise, torch.full((6,), sigma))
    assert_close(generator(z), x, **BITWISE)


def test_the_last_step_is_sampling():
    """forward(step=3) of four is what forward() returns; earlier steps stop earlier and do not look at later noise."""
    generator, z = four_steps()
    assert_close(generator(z, step=3), generator(z), **BITWISE)
    assert_close(generator(z[:2], step=1), generator(z, step=1), **BITWISE)
    assert (generator(z, step=1) - generator(z)).abs().max() > 0.01


def test_the_class_reaches_every_step():
    """cond is the same in all steps."""
    generator, z = four_steps()
    cond, seen = torch.arange(6), []
    generator.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    generator(z, cond)
    assert len(seen) == 4 and all(c is cond for c in seen)


def test_generator_is_a_copy_of_the_teacher():
    """Same function at first, weights of its own, no dropout."""
    net = small_net()
    generator = Generator(net, [1.0])
    assert not {id(p) for p in net.parameters()} & {id(p) for p in generator.parameters()}
    assert all(p.requires_grad for p in generator.parameters())
    assert not any(m.training for m in generator.net.modules())


# ---- training a step --------------------------------------------------------------------------------------


def test_gradient_passes_through_the_last_step_only():
    """The gradient of step k is that of one network call on its input, held fixed: it equals a hand-made chain where
    the input is detached, and differs from backpropagation through all steps."""
    for k in range(4):
        generator, z = four_steps()
        inputs = calls(generator)
        generator(z, step=k).square().sum().backward()
        got = [p.grad.clone() for p in generator.parameters()]
        assert len(inputs) == k + 1

        chain = Generator(small_net(), SIGMAS)
        last_input, sigma = inputs[-1]
        chain.net(last_input, sigma).square().sum().backward()
        assert_close(got, [p.grad for p in chain.parameters()], rtol=1e-6, atol=1e-6)

        through_all, x = Generator(small_net(), SIGMAS), torch.zeros(6, 2)
        for level, noise in list(zip(SIGMAS, z))[: k + 1]:
            x = through_all.net(x + level * noise, torch.full((6,), level))
        x.square().sum().backward()
        gap = max((a - p.grad).abs().max() for a, p in zip(got, through_all.parameters()))
        assert (gap > 0.1) == (k > 0)


def test_start_replaces_the_simulation():
    """start = data: the input of step k is data + sigma_k z_k and nothing else runs; the generator never meets such an
    input when it samples, so the two paths differ."""
    generator, z = four_steps()
    data, inputs = torch.ones(6, 2), calls(generator)
    x = generator(z, step=2, start=data)
    assert len(inputs) == 1
    assert_close(inputs[0][0], data + SIGMAS[2] * z[2], **BITWISE)
    assert (x - generator(z, step=2)).abs().max() > 0.01


def three_steps(data=None, w_gan=0.0, w_disc=0.0, **overrides):
    """(Draw, net) of DMD2 in three steps on real data `data`; without GAN none are needed."""
    cfg = resolve(dict(preset="toy", method="dmd2", sigmas="5,1.5,0.6", w_gan=w_gan, w_disc=w_disc) | overrides)
    net = small_net()
    return Draw(cfg, Teacher("points", net, (2,), 0, 0.5, "toy:ring8", net), data, None, rng(3), torch.device("cpu")), net


def training_inputs(data, **overrides):
    """[(network input, sigma)] of 20 training passes of a three-step generator when the real data are `data`."""
    draw, net = three_steps(data, batch=4, w_gan=0.3, w_disc=0.1, **overrides)
    generator = Generator(net, draw.cfg.sigma_list())
    inputs = calls(generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        batches = [draw() for _ in range(20)]
    for batch in batches:
        generator(batch.z, batch.cond, batch.step, batch.start)
    assert {batch.step for batch in batches} == {0, 1, 2}         # every step gets its turn
    return inputs


def test_training_inputs_do_not_depend_on_real_data():
    """Backward simulation: other real data, the same generator inputs to the bit (the GAN draws real data meanwhile).
    Noising real data instead, as FastGen and DiffSynth do, depends on them."""
    ring, grid = MIXTURES["ring8"](), MIXTURES["grid25"]()
    assert_close(training_inputs(ring), training_inputs(grid), **BITWISE)
    on_data = [training_inputs(data, backward_simulation=False) for data in (ring, grid)]
    assert not all(torch.equal(a, b) for (a, _), (b, _) in zip(*on_data))


def test_training_sees_what_sampling_sees():
    """The inputs of step k in training are those of step k in sampling, given the same noise."""
    generator, z = four_steps()
    inputs = calls(generator)
    generator(z)
    sampling = list(inputs)
    for k in range(4):
        inputs.clear()
        generator(z, step=k)
        assert_close(inputs[-1], sampling[k], **BITWISE)


def test_training_picks_every_step_equally_often():
    """batch.step is uniform over the k steps: 3,000 draws, five standard errors of a share of 1/3 are 0.043."""
    draw, _ = three_steps(batch=1)
    share = torch.tensor([draw().step for _ in range(3000)]).bincount() / 3000
    assert_close(share, torch.full((3,), 1 / 3), rtol=0, atol=0.043)


def test_each_step_has_noise_of_its_own():
    """z is (k, B, *S): k independent unit normals, not one used k times."""
    draw, _ = three_steps(batch=20_000)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        z = draw().z
    assert z.shape == (3, 20_000, 2)
    correlation = z.flatten(1).corrcoef()
    assert_close(correlation, torch.eye(3), rtol=0, atol=5 / math.sqrt(40_000))       # five standard errors


# ---- the average ------------------------------------------------------------------------------------------


def scalar(value):
    net = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(net.weight, value)
    return net


def test_ema_half_life():
    """half_life updates towards a target that stands still halve the distance: 8 -> 4 after 5 updates, 2 after 10."""
    ema, net = scalar(8.0), scalar(0.0)
    for expected in (4.0, 2.0):
        for _ in range(5):
            update_ema(ema, net, step=10**9, half_life=5.0)
        assert_close(ema.weight.detach(), tensor([expected]), rtol=1e-12, atol=0)


def test_ema_by_hand():
    """half-life 1: the average moves half of the way, ema = 3, net = 7 -> 5; the network itself does not move."""
    ema, net = scalar(3.0), scalar(7.0)
    update_ema(ema, net, step=10**9, half_life=1.0)
    assert_close((ema.weight.detach(), net.weight.detach()), (tensor([5.0]), tensor([7.0])), rtol=1e-12, atol=0)


def test_ema_ramp():
    """Early on the half-life is 5 percent of the steps taken: at step 0 the average is the network, at step 40 it moves
    half of a half-life-2 step, 1 - .5^(1/2); from half_life / .05 on it is half_life."""
    for step, weight in ((0, 1.0), (40, 1 - 0.5**0.5), (100, 1 - 0.5 ** (1 / 5)), (1000, 1 - 0.5 ** (1 / 5))):
        ema, net = scalar(0.0), scalar(1.0)
        update_ema(ema, net, step, half_life=5.0)
        assert_close(ema.weight.detach(), tensor([weight]), rtol=1e-12, atol=0)


def test_lerp():
    """lerp(slow, fast, w): slow + w (fast - slow), weights only, fast untouched."""
    slow, fast = scalar(1.0), scalar(5.0)
    lerp(slow, fast, 0.25)
    assert_close((slow.weight.detach(), fast.weight.detach()), (tensor([2.0]), tensor([5.0])), rtol=1e-12, atol=0)

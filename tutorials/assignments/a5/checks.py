"""The checks of A5.  Every want below is a closed form, an exact expectation or an explicit loop, never the solution's way."""

import math
from itertools import product

import torch
from torch import nn

from nano_dmd.generator import Generator
from nano_dmd.noise import expand
from toy.mixtures import Mixture
from tutorials.assignments.checking import Assignment, close, gradient, holds, tensor


def constants(rng):
    k, n, unit = rng.randint(3, 4), rng.randint(3, 7), rng.uniform
    return dict(
        k=k, batch=rng.randint(6, 8), shape=(rng.randint(1, 3), rng.randint(2, 4)),
        mean=[round(unit(0.2, 0.9) * rng.choice((-1, 1)), 3) for _ in range(3)],
        std=[round(unit(0.3, 0.9), 3) for _ in range(3)],
        times=[round((k - i - unit(0.05, 0.6)) / k, 3) for i in range(k)],
        sigmas=[round(3.0 * 0.4**i * unit(0.8, 1.2), 3) for i in range(k)],
        gain=[round(unit(0.3, 0.95), 3) for _ in range(3 * k)],
        shift=[round(unit(-0.5, 0.5), 3) for _ in range(3 * k)],
        n=n, total=n * rng.randint(100, 190) + n // 2, original=rng.randint(35, 49),
        last_beta=round(unit(0.01, 0.02), 4), theta=round(unit(0.6, 1.6), 3),
    )


A = Assignment("a5", "Backward simulation for k steps", constants, {
    "A5.1": "a few-step generator in flow coordinates",
    "A5.2": "backward simulation, each sample at its own step",
    "A5.3": "what training on noised data misses",
    "A5.4": "which noise levels",
    "A5.5": "which step to train, and through how many",
})


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def signs(k):
    """(k, 2^k): all patterns of +-1; k independent unit normals have the same means and second moments, here without error."""
    return doubles(list(product((1, -1), repeat=k))).T


def gaussian_velocity(means, std):
    """The exact flow network of N(means[cond], diag std^2): E[z - x | xt] by regression of z - x on xt; fine at t = 1."""
    def net(xt, t, cond=None):
        holds(tuple(t.shape) == tuple(xt.shape[:1]), "the network wants t of shape (B,), one number per sample")
        holds(cond is not None, "the network was not told the class: pass cond on")
        t, mean, var = t[:, None], means[cond], std**2
        slope = (t - (1 - t) * var) / ((1 - t) ** 2 * var + t**2)
        return slope * (xt - (1 - t) * mean) - mean
    return net


@A.check("A5.1", points=8)
def flow_exact(student, c):
    """from_flow: the exact velocity of a Gaussian per class becomes its exact denoiser, at every sigma."""
    means, sigma, cond = c.noise(3, 3).float().double(), doubles([0.01, 0.3, 1.0, 2.5, 80.0]), torch.tensor([2, 0, 1, 1, 0])
    x = (1 + sigma[:, None] ** 2).sqrt() * c.noise(5, 3)
    got = student.from_flow(gaussian_velocity(means, c.std[0]), x, sigma, cond)
    exact = Mixture(means, c.std[0], labels=torch.arange(3)).to(torch.float64)
    close(tensor(got, (5, 3), "from_flow"), exact.denoise(x, sigma, cond), "from_flow", rtol=1e-5, atol=1e-6,
          hint="divide x = clean + sigma noise by what makes its two coefficients add up to 1: the network wants that, and its t")


@A.check("A5.1", points=6)
def flow_map(student, c):
    """flow_rollout: every estimate is the right linear map of the given noises, from t = 1 or from less."""
    net = lambda xt, t, cond=None: expand(c.gain[0] + c.gain[1] * t, xt) * xt
    for times in ([1.0, *c.times], c.times):
        keep = [1 - t * (c.gain[0] + c.gain[1] * t) for t in times]                   # estimate = keep xt
        z = c.noise(len(times), c.batch, *c.shape).requires_grad_()
        for i in range(len(times)):
            found = gradient(tensor(student.flow_rollout(net, z, times), z.shape, "flow_rollout")[i], z, f"estimate {i}")
            want = [math.prod(keep[m] * (1 - times[m]) for m in range(j + 1, i + 1)) * keep[j] * times[j] for j in range(i + 1)]
            want = doubles(want + [0.0] * (len(times) - i - 1)).reshape(-1, 1, 1, 1).expand_as(z)
            close(found, want, f"times {times}: the weight of a noise in estimate {i}",
                  hint="estimate i is made of the first i + 1 noises, each at its own time")


@A.check("A5.1", points=6)
def flow_moments(student, c):
    """flow_rollout: with the exact network of a Gaussian, mean and variance are right after every step, from t = 1 on."""
    means, std, times, var = c.noise(3, 3), doubles(c.std), [1.0, *c.times], torch.zeros(3, dtype=torch.float64)
    z = signs(len(times))[..., None].expand(-1, -1, 3)
    got = student.flow_rollout(gaussian_velocity(means, std), z, times, torch.full(z.shape[1:2], 2))
    tensor(got, z.shape, "flow_rollout")
    for i, t in enumerate(times):
        close(got[i].mean(0), means[2], f"the mean after step {i}, t = {t}")
        r = (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2)
        var = r**2 * ((1 - t) ** 2 * var + t**2)
        close(got[i].var(0, correction=0), var, f"the variance after step {i}, t = {t}",
              hint="at t = 1 the best estimate is the mean itself; later steps mix in noise of variance t^2")


class Net(nn.Module):
    """A Denoiser with a gain per noise level, bent by tanh, and an offset per class; it keeps a list of its calls."""

    def __init__(self, c):
        super().__init__()
        self.levels, self.calls = c.sigmas, []
        self.gain, self.offset = nn.Parameter(doubles(c.gain[:c.k])), nn.Parameter(doubles(c.shift[:3]))

    def forward(self, xt, sigma, cond=None):
        holds(tuple(sigma.shape) == tuple(xt.shape[:1]), "net wants sigma of shape (B,), one number per row that it is given")
        holds(cond is None or cond.shape == sigma.shape, "net wants one class per row that it is given")
        self.calls.append((len(xt), torch.is_grad_enabled()))
        distance = (sigma[:, None] - doubles(self.levels)).abs().min(1)
        holds(bool((distance.values < 1e-9).all()), f"net was given a sigma that is none of {self.levels}")
        offset = 0 if cond is None else expand(self.offset[cond], xt)
        return expand(self.gain[distance.indices], xt) * xt.tanh() + offset


def mixed(c):
    """Steps 0 ... k - 1 in no order, noise, classes."""
    step = torch.tensor([(5 * b + 2) % 7 % c.k for b in range(c.batch)])
    return c.noise(c.k, c.batch, *c.shape), step, torch.arange(c.batch) % 3


def alone(c, net, z, b, steps, cond):
    """Row b by itself, by the definition: the input of its last step, and the estimate."""
    with torch.no_grad():
        x = torch.zeros_like(z[0, b])
        for i in range(steps + 1):
            xt = x + c.sigmas[i] * z[i, b]
            x = net.gain[i] * xt.tanh() + net.offset[cond[b]]
    return xt, x


@A.check("A5.2", points=6)
def same_steps(student, c):
    """backward_simulate: with all rows at one step it gives what nano_dmd's generator gives."""
    z, _, cond = mixed(c)
    for i, classes in [(i, classes) for i in range(c.k) for classes in (None, cond)]:
        got = student.backward_simulate(Net(c), c.sigmas, z, torch.full((c.batch,), i), classes)
        want = Generator(Net(c), c.sigmas)(z, classes, step=i)
        close(tensor(got, want.shape, "backward_simulate"), want, f"a sample at step {i}", rtol=1e-9,
              hint="earlier steps use sigmas[0] z[0], sigmas[1] z[1] ...; the last one adds its own noise to their estimate")


@A.check("A5.2", points=7)
def own_steps(student, c):
    """backward_simulate: rows at different steps do not disturb each other."""
    (z, step, cond), net = mixed(c), Net(c)
    got = tensor(student.backward_simulate(net, c.sigmas, z, step, cond), z.shape[1:], "backward_simulate")
    for b, i in enumerate(step.tolist()):
        close(got[b], alone(c, net, z, b, i, cond)[1], f"row {b}, whose step is {i} (all: {step.tolist()})", rtol=1e-9,
              hint="it takes noise slices 0 ... step and stops; sigma and class of its last call are its own")


@A.check("A5.2", points=6)
def last_step_gradient(student, c):
    """backward_simulate: the gradient is that of each row's last step, its input held fixed."""
    (z, step, cond), net = mixed(c), Net(c)
    z.requires_grad_()
    x = tensor(student.backward_simulate(net, c.sigmas, z, step, cond), z.shape[1:], "backward_simulate")
    holds(x.requires_grad, "the samples carry no graph: the generator could not learn")
    *found, early = torch.autograd.grad(x.sum(), [net.gain, net.offset, z], allow_unused=True)
    holds(all(f is not None for f in found), "no gradient reaches the network's weights")
    want = torch.zeros_like(net.gain)
    for b, i in enumerate(step.tolist()):
        want[i] += alone(c, net, z, b, i, cond)[0].tanh().sum()
    close(found[0], want, "the gradient of the gain of a level", hint="only rows whose last step is at that level count")
    close(found[1], math.prod(c.shape) * torch.bincount(cond, minlength=3), "the gradient of a class offset",
          hint="it counts once per sample: earlier steps use it too, without a graph")
    holds(early is None or not early[torch.arange(c.k)[:, None] < step].any(),
          "a gradient reaches the noise of an earlier step: its output is a sample, not a function to differentiate")


@A.check("A5.2", points=6)
def calls(student, c):
    """backward_simulate: one call with a graph, and no row goes through a step that it does not need."""
    z, step, cond = mixed(c)
    for steps in (step, torch.zeros_like(step), torch.full_like(step, c.k - 2)):
        net = Net(c)
        student.backward_simulate(net, c.sigmas, z, steps, cond)
        want = [(int((steps > i).sum()), False) for i in range(int(steps.max()))] + [(c.batch, True)]
        holds(net.calls == want, f"steps {steps.tolist()}: net was called with (rows, grad enabled) {net.calls}, expected {want}")


@A.check("A5.3", points=10)
def gap(student, c):
    """input_gap: the distance of the best coupling between noised data and what sampling meets, all dimensions together."""
    mean, std, sigmas, u = doubles(c.mean), doubles(c.std), doubles(c.sigmas), signs(1)[0][:, None]
    gain, shift, x, want = doubles(c.gain).view(-1, 3), doubles(c.shift).view(-1, 3), 0 * signs(c.k)[:1].T, []
    for i, z in enumerate(signs(c.k)):
        used = x + sigmas[i] * z[:, None]
        x = shift[i] + gain[i] * used
        train = mean + (std**2 + sigmas[i] ** 2).sqrt() * u       # one unit normal for both: monotone, so the best coupling
        met = used.mean(0) + used.std(0, correction=0) * u
        want.append(((train - met) ** 2).mean(0).sum().sqrt())
    got = tensor(student.input_gap(mean, std, gain, shift, sigmas), (c.k,), "input_gap")
    close(got[0], want[0], "input_gap at step 0", hint="sampling starts from noise alone, around 0")
    close(got, torch.stack(want), "input_gap at a later step",
          hint="N(m, s^2) to N(n, r^2): (m - n)^2 + (s - r)^2, added over dimensions, then the root; both inputs hold the noise")


@A.check("A5.3", points=10)
def left(student, c):
    """surviving: follow a wrong variance through steps that are right on noised data."""
    std, later = c.std[0], c.sigmas[1:]
    for start in (0.0, 0.3 * std**2, 2 * std**2):
        var = start
        for sigma in later:                                       # gain: std over the spread that training showed
            var = (var + sigma**2) * std**2 / (std**2 + sigma**2)
        close(student.surviving(std, later), (var - std**2) / (start - std**2), f"surviving({std}, {later})", rtol=1e-9,
              hint="what gain makes noised data as wide as data? Apply it to the input that is met")


def schedule(c):
    """betas (T,), linear in the root as Stable Diffusion's are, and sigmas by running the chain (T,)."""
    betas = torch.linspace(0.00085**0.5, c.last_beta**0.5, c.total, dtype=torch.float64) ** 2
    signal, variance, sigmas = 1.0, 0.0, []
    for beta in betas.tolist():
        signal, variance = math.sqrt(1 - beta) * signal, (1 - beta) * variance + beta
        sigmas.append(math.sqrt(variance) / signal)
    return betas, sigmas


@A.check("A5.4", points=5)
def lists(student, c):
    """dmd2_timesteps, lcm_timesteps: the published four-step lists, and those of other T and n."""
    apart = c.total // c.original
    wanted = [
        ("dmd2_timesteps", (1000, 4), [999, 749, 499, 249]),
        ("dmd2_timesteps", (c.total, c.n), list(range(c.total - 1, 0, -(c.total // c.n)))[:c.n]),
        ("lcm_timesteps", (1000, 4), [999, 759, 499, 259]),
        ("lcm_timesteps", (1000, 8), [999, 879, 759, 639, 499, 379, 259, 139]),
        ("lcm_timesteps", (c.total, c.n, c.original),
         [apart * (c.original - math.floor(i * c.original / c.n)) - 1 for i in range(c.n)]),
    ]
    for name, given, want in wanted:
        got = list(getattr(student, name)(*given))
        holds(got == want, f"{name}{given} is {got}, not {want}")


@A.check("A5.4", points=4)
def ratio(student, c):
    """level_ratio: noise over signal after so many steps of the forward chain."""
    betas, sigmas = schedule(c)
    trained = [c.total - 1 - i * (c.total // c.n) for i in range(c.n)]
    used = [max(t - 7 * i, 0) for i, t in enumerate(trained)]
    want = doubles([sigmas[u] / sigmas[t] for u, t in zip(used, trained)])
    close(tensor(student.level_ratio(betas, used, trained), (c.n,), "level_ratio"), want, "level_ratio", rtol=1e-7,
          hint="run the chain: the signal shrinks by sqrt(1 - beta) per step, what has been lost of its square is noise")


@A.check("A5.4", points=3)
def export(student, c):
    """export_timesteps: the nearest in log sigma, on all of the table."""
    betas, sigmas = schedule(c)
    logs, table = [math.log(s) for s in sigmas], list(range(c.total - 1))[::-1]
    for part in (0.0, 0.49, 0.51):                                  # of the way to the next level
        between = [math.exp(logs[t] + part * (logs[t + 1] - logs[t])) for t in table]
        got, want = student.export_timesteps(between, betas, 2.0), [t + round(part) for t in table]
        off = [f"sigma {s:.5g} gives {g}, not {w}" for s, g, w in zip(between, got, want, strict=True) if g != w]
        holds(not off, f"{len(off)} of {len(want)} levels get a wrong timestep; {off[0] if off else ''}")


@A.check("A5.4", points=3)
def refuse(student, c):
    """export_timesteps: an error where the table has nothing near, and not before."""
    betas, sigmas = schedule(c)
    far = (80.0 * sigmas[-1], 1.06 * sigmas[-1], sigmas[0] / 1.06)
    for given in [[s] for s in far] + [[s, sigmas[5]] for s in far] + [[sigmas[c.total // 2], s] for s in far]:
        try:
            got = student.export_timesteps(given, betas)
        except ValueError:
            continue
        raise AssertionError(f"sigmas {given} became timesteps {got} of a table from {sigmas[0]:.3g} to {sigmas[-1]:.4g}: "
                             "raise ValueError where the nearest is more than a factor 1.05 away")
    for t, off, within in ((c.total - 1, 1.04, 1.05), (c.total - 1, 1.2, 1.25), (0, 1 / 1.04, 1.05)):
        sigma = off * sigmas[t]
        got = list(student.export_timesteps([sigma], betas, within))
        holds(got == [t], f"sigma {sigma:.4g} gives {got}, not [{t}], at tolerance {within}")



def chain(gain, sigmas):
    """step(i, x, z_i) of a linear generator, and whether each call of it could build a graph."""
    grads = []

    def step(i, x, z):
        holds((x is None) == (i == 0), "step wants x = None at i = 0, and what the step before made afterwards")
        grads.append(torch.is_grad_enabled())
        return gain[i] * ((0 if x is None else x) + sigmas[i] * z)
    return step, grads


@A.check("A5.5", points=5)
def truncated(student, c):
    """rollout: the same samples whatever is differentiated, and the exact gradient of each step's weight."""
    z = c.noise(c.k, c.batch, *c.shape)
    for through in range(1, c.k + 1):
        gain = doubles(c.gain[:c.k]).requires_grad_()
        x, made, want = student.rollout(chain(gain, c.sigmas)[0], z, through), 0.0, []
        for i, g in enumerate(c.gain[:c.k]):                      # dx / dgain_i: the input of step i, through all later gains
            seen = made + c.sigmas[i] * z[i]
            want.append((seen.sum() * math.prod(c.gain[i + 1 : c.k])).item() if i >= c.k - through else 0.0)
            made = g * seen
        close(tensor(x, z.shape[1:], "rollout"), made, f"the sample, through = {through}", rtol=1e-9)
        close(gradient(x, gain, "rollout"), doubles(want), f"the gradient of a step's gain, through = {through} of {c.k}",
              rtol=1e-9, hint="the last  through  steps count, the others are constants")


@A.check("A5.5", points=4)
def memory(student, c):
    """rollout: earlier steps run under no_grad, and a caller's no_grad holds for all."""
    gain, z = doubles(c.gain[:c.k]).requires_grad_(), c.noise(c.k, c.batch, *c.shape)
    for through in range(1, c.k + 1):
        step, grads = chain(gain, c.sigmas)
        student.rollout(step, z, through)
        holds(grads == [i >= c.k - through for i in range(c.k)], f"through = {through} of {c.k}: grad was on in steps {grads}")
    with torch.no_grad():
        holds(not student.rollout(chain(gain, c.sigmas)[0], z, c.k).requires_grad,
              "under the caller's torch.no_grad() the samples still carry a graph: do not switch gradients on, only off")


def kl(theta, c, fixed):
    """KL of the two-step generator by autograd's own steps; with `fixed`, step 0 is a constant."""
    std, var = c.std[0], 0.0
    for i, sigma in enumerate(c.sigmas[:2]):
        var = (theta * std**2 / (std**2 + sigma**2)) ** 2 * (var + sigma**2)
        var = var.detach() if fixed and i == 0 else var
    return (var / std**2 - 1 - (var / std**2).log()) / 2


@A.check("A5.5", points=7)
def both_gradients(student, c):
    """kl_gradients: through the last step, which is what backward simulation follows, and through both."""
    for value in (c.theta, 1.0, 2.5):
        theta = doubles(value).requires_grad_()
        for got, fixed in zip(student.kl_gradients(value, c.sigmas[:2], c.std[0]), (True, False), strict=True):
            close(got, gradient(kl(theta, c, fixed), theta, "KL"), f"{'last' if fixed else 'full'} at theta = {value}", rtol=1e-9,
                  hint="KL = (V/s^2 - 1 - log(V/s^2)) / 2; " + ("V_0 is fixed" if fixed else "V_0 depends on theta too"))


@A.check("A5.5", points=4)
def selection(student, c):
    """selection_variance: over all choices of a step, each with its probability."""
    g, weight, p = c.noise(c.k, 5), doubles([1.0 / c.k + 0.1 * i for i in range(c.k)]), doubles(c.gain[:c.k])
    p, goal = p / p.sum(), sum(w * row for w, row in zip(weight, g))
    want = sum(q * ((w / q * row - goal) ** 2).sum() for q, w, row in zip(p, weight, g))
    close(student.selection_variance(g, weight, p), want, "selection_variance", rtol=1e-9,
          hint="with probability p_i the estimate is weight_i / p_i times g_i; its mean must be the goal")

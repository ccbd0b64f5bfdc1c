"""The checks of A8.  Every want is Bayes' rule in flow coordinates, an explicit loop, a sum over a grid or a closed form."""

import math

import torch
from torch import nn

from nano_dmd.generator import Generator
from nano_dmd.noise import draw_sigma, parse_sigma
from nano_dmd.trajectory import phased_target
from toy.mixtures import Mixture
from tutorials.assignments.checking import Assignment, close, gradient, holds, tensor


def constants(rng):
    unit = rng.uniform
    t_mid = round(unit(0.2, 0.45), 3)
    return dict(
        std=round(unit(0.3, 0.9), 3), spread=[round(unit(0.4, 1.2), 3) for _ in range(3)], times=rng.choice((250, 500, 1000)),
        mean=round(unit(-1.0, 1.0), 3), width=round(unit(0.6, 1.6), 3), s=round(unit(1.6, 5.0), 3),
        pixels=rng.randint(3, 9) ** 2, more=rng.randint(12, 30) ** 2, sigma_data=round(unit(0.3, 2.0), 3),
        w=round(unit(1.7, 6.0), 3), shape=(rng.randint(1, 2), rng.randint(2, 3)),
        steps=sorted((round(unit(0.1, 0.95), 3) for _ in range(3)), reverse=True), abar=round(unit(0.05, 0.4), 3),
        following=round(unit(0.5, 0.9), 3), t_mid=t_mid, t_in=round(unit(t_mid + 0.2, 0.95), 3), largest=round(unit(20, 200), 1),
    )


A = Assignment("a8", "Write the flow adapter", constants, {
    "A8.1": "the adapter, both ways round",
    "A8.2": "which noise: times and sigmas",
    "A8.3": "the velocity loss, said with denoisers",
    "A8.4": "guidance, and one step in three coordinates",
    "A8.5": "TDM and phased targets in flow time",
})


# ---- what the checks are built from ---------------------------------------------------------------------------------


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def classes(c, dim=2):
    """A mixture of three classes in float64, and its weights' logarithm."""
    return Mixture(2 * c.noise(3, dim), doubles(c.spread), [0.5, 0.3, 0.2], torch.arange(3)).to(torch.float64)


def posterior(data, x_t, t, cond):
    """(E[clean], E[noise]) at x_t = (1 - t) clean + t noise by Bayes' rule over the components; no sigma, right at t = 1."""
    a, b = (1 - t)[:, None, None], t[:, None]
    off, var = x_t[:, None] - a * data.means, ((1 - t)[:, None] * data.std) ** 2 + b**2             # (B, K, D), (B, K)
    log = data.weights.log() - off.square().sum(2) / (2 * var) - off.shape[2] / 2 * var.log()
    if cond is not None:
        log = log.masked_fill(data.labels != cond[:, None], -torch.inf)
    share = log.softmax(1)[..., None]
    clean = data.means + ((1 - t)[:, None] * data.std**2 / var)[..., None] * off
    return (share * clean).sum(1), (share * (b / var)[..., None] * off).sum(1)


def flow_network(data, data_at_one=False, times=1.0, seen=None):
    """The exact velocity network of a mixture in either convention.  seen: a list that gets (x_t, time, cond) of its calls."""
    def net(x_t, time, cond=None):
        holds(tuple(time.shape) == tuple(x_t.shape[:1]), "the network wants its time of shape (B,), one number per sample")
        if seen is not None:
            seen.append((x_t.detach(), time.detach(), cond))
        t = time / times
        clean, noise = posterior(data, x_t, 1 - t if data_at_one else t, cond)
        return clean - noise if data_at_one else noise - clean
    return net


def levels(c):
    return doubles([0.003, 0.2, 1.0, 2.5 * c.std, 30.0, 900.0])


def noised(c, sigma, dim=2):
    """x = clean + sigma noise (B, dim) of c's mixture at sigma (B,)."""
    return c.noise(len(sigma), dim) + sigma[:, None] * c.noise(len(sigma), dim)


# ---- A8.1  the adapter, both ways round -----------------------------------------------------------------------------


@A.check("A8.1", points=7)
def exact_denoiser(student, c):
    """FlowDenoiser: an exact flow network becomes the exact denoiser, in both conventions, with and without a class."""
    data, sigma = classes(c), levels(c)
    x = noised(c, sigma)
    for data_at_one in (False, True):
        for cond in (None, torch.tensor([0, 1, 2, 2, 1, 0])):
            adapter = student.FlowDenoiser(flow_network(data, data_at_one), data_at_one)
            close(tensor(adapter(x, sigma, cond), x.shape, "D"), data.denoise(x, sigma, cond),
                  f"D, {'t = 1 is data' if data_at_one else 't = 1 is noise'}, cond {'given' if cond is not None else 'None'}",
                  rtol=1e-6, atol=1e-6, hint="x / (1 + sigma) is an x_t; solve x_t and the velocity for clean")


@A.check("A8.1", points=5)
def told(student, c):
    """FlowDenoiser: the network sees x / (1 + sigma) and the right time, to seven digits, in float32 from 1e-4 to 1e8."""
    sigma = torch.tensor([1e-4, 0.02, 1.0, 40.0, 1e4, 1e8])
    x = sigma[:, None] * c.noise(6, 2).float()
    for data_at_one, times in ((False, 1.0), (True, 1.0), (False, float(c.times)), (True, float(c.times))):
        seen = []
        student.FlowDenoiser(flow_network(classes(c).to(torch.float32), data_at_one, times, seen), data_at_one, times)(x, sigma)
        holds(len(seen) == 1, f"one answer took {len(seen)} calls of the network, expected one")
        share = sigma.double() / (1 + sigma.double())
        close(seen[0][0], x.double() / (1 + sigma.double())[:, None], "what the network sees", rtol=3e-6, atol=0)
        close(seen[0][1], times * (1 / (1 + sigma.double()) if data_at_one else share),
              f"the time it is told, t = 1 is {'data' if data_at_one else 'noise'}, times = {times:g}", rtol=3e-6, atol=0,
              hint="it is times * t; and 1 minus a number near 1 has lost its digits: compute t and 1 - t directly")


@A.check("A8.1", points=4)
def finite(student, c):
    """FlowDenoiser: finite and right in float32 up to sigma = 1e30, where the best answer is the mean of the data."""
    data, sigma = classes(c), torch.tensor([1e3, 1e10, 1e20, 1e30])
    z = c.noise(4, 2).float()
    for data_at_one in (False, True):
        got = student.FlowDenoiser(flow_network(data.to(torch.float32), data_at_one), data_at_one)(sigma[:, None] * z, sigma)
        t = sigma.double() / (1 + sigma.double())
        want = posterior(data, t[:, None] * z.double(), t, None)
        close(tensor(got, (4, 2), "D at large sigma"), want[0], "D at large sigma, float32", rtol=1e-4, atol=1e-4,
              hint="sigma^2 overflows: scale x down first")


@A.check("A8.1", points=5)
def other_way(student, c):
    """velocity: from the exact denoiser to the exact velocity, at t = 1 too, and never a question above `largest`."""
    data, t = classes(c), doubles([0.01, 0.3, 0.5, 0.9, 1 - 1e-3, 1.0])
    x_t, cond, asked = c.noise(6, 2), torch.tensor([2, 0, 1, 0, 2, 1]), []

    def denoiser(x, sigma, cond=None):
        asked.append(sigma)
        return data.denoise(x, sigma, cond)
    got = tensor(student.velocity(denoiser, x_t, t, cond, largest=c.largest), x_t.shape, "velocity")
    sure = t / (1 - t) < c.largest
    clean, noise = posterior(data, x_t, t, cond)
    close(got[sure], (noise - clean)[sure], "velocity", rtol=1e-6, atol=1e-7, hint="x_t = clean + t velocity")
    end = doubles([c.largest / (1 + c.largest)]).expand(6)
    want = (x_t - posterior(data, x_t, end, cond)[0]) / t[:, None]
    close(got[~sure], want[~sure], "velocity above `largest`", rtol=1e-6, atol=1e-7,
          hint="the estimate of clean is that at `largest`, for the same x_t; t itself stays")
    holds(max(s.max().item() for s in asked) <= c.largest * (1 + 1e-9), f"the denoiser was asked above largest = {c.largest}")


class Linear(nn.Module):
    """A velocity network with a weight per element of time: v = (gain + slope t) x_t."""

    def __init__(self, c):
        super().__init__()
        self.gain, self.slope, self.seen = nn.Parameter(doubles(c.std)), nn.Parameter(doubles(c.mean)), []

    def forward(self, x_t, t, cond=None):
        self.seen.append(x_t.detach())
        return (self.gain + self.slope * t).reshape(-1, *[1] * (x_t.ndim - 1)) * x_t


@A.check("A8.1", points=4)
def as_generator(student, c):
    """FlowDenoiser in nano_dmd's Generator: a unit start, and weights that learn."""
    net, z = Linear(c), c.noise(1, 5, *c.shape)
    made = Generator(student.FlowDenoiser(net), (999.0,), unit=True, copy=lambda same: same)
    x = made(z)
    close(made.net.net.seen[0], z[0], "what the network sees in the first step of Generator(unit=True)", rtol=1e-9,
          hint="scale(sigma) noise is x; the network sees x / (1 + sigma)")
    t = 0.999
    close(x, z[0] * (1 - t * (c.std + c.mean * t)), "the sample", rtol=1e-9)
    holds([p.requires_grad for p in made.parameters()] == [True, True], "the network's weights are not among the generator's")
    close(gradient(x, made.net.net.gain, "the sample"), -t * z.sum(), "the gradient of a weight", rtol=1e-9)


# ---- A8.2  which noise: times and sigmas ----------------------------------------------------------------------------


@A.check("A8.2", points=4)
def shifted(student, c):
    """shift: noise over signal is s times as large; 0 and 1 stay; shifts follow each other by multiplication."""
    t = doubles([0.0, 0.003, 0.2, 0.5, 0.77, 0.999])
    for s in (1.0, c.s, 1 / c.s):
        got = tensor(student.shift(t, s), t.shape, "shift")
        close(got / (1 - got), s * t / (1 - t), f"noise over signal after shift(t, {s:.4g})", rtol=1e-9, hint="it is t / (1 - t)")
        close(student.shift(doubles([1.0]), s), [1.0], "shift at t = 1",
              hint="t / (1 - t) is infinite there: the formula in t is not")


def cdf(q, s, mean=None, std=None):
    """P(sigma <= q): by undoing the shift and asking for the share of times below."""
    u = q / s / (1 + q / s)
    return u if mean is None else 0.5 * (1 + math.erf((math.log(u / (1 - u)) - mean) / std / math.sqrt(2)))


@A.check("A8.2", points=5)
def quantiles(student, c):
    """sigma_quantile: the given share of the draws is below it, for uniform and for logit-normal times."""
    p = doubles([0.05, 0.25, 0.5, 0.9, 0.99])
    for law in ((), (c.mean, c.width)):
        for s in (1.0, c.s):
            got = tensor(student.sigma_quantile(p, s, *law), p.shape, "sigma_quantile")
            close(doubles([cdf(q, s, *law) for q in got.tolist()]), p,
                  f"the share of draws below the quantile, {'logit-normal' if law else 'uniform'} t, s = {s:.4g}", rtol=1e-7,
                  hint="sigma = t / (1 - t) grows with t: quantiles go along; a shift multiplies sigma")


@A.check("A8.2", points=5)
def density(student, c):
    """time_density: the slope of the share of draws below t, and 1 in all."""
    t, h = doubles([0.02, 0.2, 0.5, 0.8, 0.97]), 1e-5
    for s in (1.0, c.s):
        below = lambda v: doubles([cdf(u / (1 - u), s, c.mean, c.width) for u in v.tolist()])
        slope = (below(t + h) - below(t - h)) / (2 * h)
        close(student.time_density(t, s, c.mean, c.width), slope, f"the density of t, s = {s:.4g}", rtol=1e-5, atol=1e-7,
              hint="density of the logit, times the slope 1 / (t (1 - t)) of the logit; where does s come in?")


@A.check("A8.2", points=3)
def spec(student, c):
    """noise_spec: nano_dmd's draw_sigma makes the sigmas of shifted logit-normal times."""
    for s in (1.0, c.s):
        text = student.noise_spec(s, c.mean, c.width)
        name = parse_sigma(text)[0]
        holds(name == "lognormal", f"noise_spec gives {text!r}: which distribution has sigma, if its logarithm is normal?")
        torch.manual_seed(1)
        t = torch.sigmoid(c.mean + c.width * torch.randn(1000).double())
        torch.manual_seed(1)
        close(draw_sigma(text, 1000, "cpu"), s * t / (1 - t), f"sigmas of {text}", rtol=1e-4, atol=0)


@A.check("A8.2", points=3)
def resolution(student, c):
    """resolution_shift: the posterior of a flat image's colour is equally wide at both sizes."""
    s = student.resolution_shift(c.pixels, c.more)
    for t in (0.1, 0.5, 0.9):
        shifted = 1 / (1 + (1 - t) / (s * t))
        widths = [1 / (1 / c.std**2 + n * ((1 - v) / v) ** 2) for n, v in ((c.pixels, t), (c.more, shifted))]
        close(widths[1], widths[0], f"posterior variance of the colour with {c.more} pixels, at shift(t, s)", rtol=1e-9,
              hint="n pixels are n measurements of one number, each with noise sigma")


# ---- A8.3  the velocity loss, said with denoisers -------------------------------------------------------------------


@A.check("A8.3", points=4)
def weight(student, c):
    """x0_weight: two networks at the same x_t, velocities and estimates of clean compared."""
    data, other, sigma = classes(c), classes(c), levels(c)
    x_t, t = c.noise(6, 2), sigma / (1 + sigma)
    (a, b), (e, f) = posterior(data, x_t, t, None), posterior(other, x_t, t, None)
    wanted = ((b - a - f + e) ** 2).sum(1) / ((a - e) ** 2).sum(1)
    close(student.x0_weight(sigma), wanted, "x0_weight", rtol=1e-6, hint="x_t is the same, so t (v - v') = -(D - D')")


class Scaled(nn.Module):
    """A Denoiser with one weight; it counts its calls."""

    def __init__(self, c):
        super().__init__()
        self.gain, self.calls = nn.Parameter(doubles(c.std)), 0

    def forward(self, x, sigma, cond=None):
        self.calls += 1
        holds(cond is not None, "the fake score was not told the class: pass cond on")
        return self.gain * x / (1 + sigma).reshape(-1, *[1] * (x.ndim - 1)) + cond.reshape(-1, *[1] * (x.ndim - 1))


@A.check("A8.3", points=5)
def loss(student, c):
    """velocity_loss: the error of the velocity, sample by sample, with gradients for the fake score alone."""
    sigma = doubles([0.05, 0.7, 3.0, 1000.0])
    x, noise, cond, fake = c.noise(4, *c.shape).requires_grad_(), c.noise(4, *c.shape), torch.arange(4), Scaled(c)
    got = tensor(student.velocity_loss(fake, x, sigma, noise, cond), (4,), "velocity_loss")
    wanted, slopes = [], []
    for i, s in enumerate(sigma.tolist()):                        # one sample at a time: v = (x_t - D) / t
        t = s / (1 + s)
        x_t = ((1 - t) * x[i] + t * noise[i]).detach()
        off = (x_t - c.std * x_t - i) / t - (noise[i] - x[i].detach())
        wanted.append((off**2).mean())
        slopes.append((2 * off * -x_t / t).mean())
    close(got, torch.stack(wanted), "velocity_loss", rtol=1e-8,
          hint="the fake score's velocity is (x_t - D) / t, the target noise - x")
    close(gradient(got, fake.gain, "velocity_loss"), sum(slopes), "the gradient of the fake score's weight", rtol=1e-8)
    reached = torch.autograd.grad(student.velocity_loss(fake, x, sigma, noise, cond).sum(), x, allow_unused=True)[0]
    holds(reached is None or not reached.any(), "a gradient reaches x: in the critic's loss samples are data")
    holds(fake.calls == 2, f"two losses called the fake score {fake.calls} times, expected one call each")


@A.check("A8.3", points=5)
def ratio(student, c):
    """edm_ratio, largest_ratio: against errors of both losses, and against a search over sigma."""
    for sd in (1.0, c.sigma_data):
        sigma = torch.logspace(-4, 4, 200_001, dtype=torch.float64)
        edm = (sigma**2 + sd**2) / (sigma * sd) ** 2              # per squared error of D
        flow = 1 / (sigma / (1 + sigma)) ** 2                     # v = (x_t - D) / t
        close(student.edm_ratio(sigma, sd), flow / edm, f"edm_ratio at sigma_data = {sd}", rtol=1e-9)
        at, most = student.largest_ratio(sd)
        close(at, sigma[(flow / edm).argmax()], f"sigma of the largest ratio, sigma_data = {sd}", rtol=1e-3,
              hint="differentiate the logarithm of the ratio")
        close(most, (flow / edm).max(), f"the largest ratio, sigma_data = {sd}", rtol=1e-7)


@A.check("A8.3", points=6)
def matched(student, c):
    """matched_weight: the expected loss of the flow trainer, for four networks' errors by noise level."""
    u = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000                  # uniform times, each as likely
    t = c.s * u / (1 + (c.s - 1) * u)
    log = torch.linspace(c.mean - 9 * c.width, c.mean + 9 * c.width, 20_001, dtype=torch.float64)
    chance = torch.exp(-(((log - c.mean) / c.width) ** 2) / 2)
    chance = chance / chance.sum()
    got = tensor(student.matched_weight(log.exp(), c.s, c.mean, c.width), log.shape, "matched_weight")
    for center in (-1.0, 0.0, 0.7, 1.5):                          # |D - x|^2 by sigma: a bump, small at both ends
        error = lambda sigma: torch.exp(-4 * (sigma.log() - center) ** 2) * sigma**2
        flow = (error(t / (1 - t)) / t**2).mean()
        close((chance * got * error(log.exp())).sum(), flow, f"the expected loss of errors near sigma = {math.exp(center):.2f}",
              rtol=1e-4, hint="ratio of the two densities of log sigma, times x0_weight")


# ---- A8.4  guidance, and one step in three coordinates --------------------------------------------------------------


@A.check("A8.4", points=4)
def guidance(student, c):
    """guided_denoiser: guidance on velocities is guidance on denoisers, at every sigma."""
    data, sigma, cond = classes(c), levels(c), torch.tensor([0, 1, 2, 2, 1, 0])
    x = noised(c, sigma)
    for w in (0.0, 1.0, c.w):
        with_class, without = data.denoise(x, sigma, cond), data.denoise(x, sigma, None)
        close(student.guided_denoiser(flow_network(data), x, sigma, cond, w), w * with_class + (1 - w) * without,
              f"guided D at w = {w:g}", rtol=1e-6, atol=1e-6, hint="v = u + w (c - u); u is the answer without a class")


@A.check("A8.4", points=3)
def rescaled(student, c):
    """guided_denoiser, rescale: each sample's velocity has the conditional one's norm; it is no longer guidance on D."""
    data, sigma, cond = classes(c), levels(c), torch.tensor([0, 1, 2, 2, 1, 0])
    x = noised(c, sigma)
    got = tensor(student.guided_denoiser(flow_network(data), x, sigma, cond, c.w, rescale=True), x.shape, "rescaled D")
    for i, s in enumerate(sigma.tolist()):
        t, x_t = sigma[i : i + 1] / (1 + s), x[i : i + 1] / (1 + s)
        (a, b), (e, f) = posterior(data, x_t, t, cond[i : i + 1]), posterior(data, x_t, t, None)
        v, norm = (c.w * (b - a) + (1 - c.w) * (f - e))[0], math.dist(b[0].tolist(), a[0].tolist())
        want = x_t[0] - t * v * norm / math.dist(v.tolist(), [0.0, 0.0])
        close(got[i], want, f"rescaled D of sample {i}, sigma = {s:g}", rtol=1e-6, atol=1e-6,
              hint="scale the velocity, not D; one norm per sample, of the conditional velocity")


@A.check("A8.4", points=4)
def steps(student, c):
    """euler: a product for a linear velocity, from t = 1; the ODE generator of nano_dmd for t < 1; classes go along."""
    net, z = Linear(c), c.noise(4, *c.shape)
    for times in ([1.0, *c.steps], c.steps, [1.0]):
        want, end = 1.0, [*times[1:], 0.0]
        for t, following in zip(times, end):
            want *= 1 - (t - following) * (c.std + c.mean * t)
        got = tensor(student.euler(net, z, times), z.shape, f"euler, times {times}")
        close(got, want * z, f"euler, times {times}", rtol=1e-9, hint="z itself is x_t at times[0]; the last step ends at t = 0")
    data, cond, x = classes(c), torch.tensor([0, 2, 1]), c.noise(3, 2)
    inside = data.denoise                                         # the same path, by denoisers and sigmas
    sigmas = [t / (1 - t) for t in c.steps]
    xt = (1 + sigmas[0]) * x
    for sigma, following in zip(sigmas, [*sigmas[1:], 0.0]):
        d = inside(xt, torch.full((3,), sigma, dtype=torch.float64), cond)
        xt = d + following / sigma * (xt - d)
    close(student.euler(flow_network(data), x, c.steps, cond), xt, "euler against the same steps in sigma", rtol=1e-6, atol=1e-7)


@A.check("A8.4", points=4)
def variance_preserving(student, c):
    """flow_time, ddim_step: the same noise level, and the same step as in sigma, in variance-preserving coordinates."""
    abar = doubles([0.9999, c.following, 0.5, c.abar, 0.0047])
    t = tensor(student.flow_time(abar), abar.shape, "flow_time")
    close((t / (1 - t)) ** 2, (1 - abar) / abar, "(t / (1 - t))^2, noise over signal", rtol=1e-8)
    clean, noise = c.noise(4, *c.shape), c.noise(4, *c.shape)
    now, then = doubles([c.abar, 0.2, 0.01, 0.3]), doubles([c.following, 0.6, 1.0, 0.3])
    column = lambda v: v.reshape(4, 1, 1)
    x_vp = column(now.sqrt()) * clean + column((1 - now).sqrt()) * noise
    want = column(then.sqrt()) * clean + column((1 - then).sqrt()) * noise            # a network that knows both
    close(student.ddim_step(x_vp, noise - clean, now, then), want, "ddim_step with a network that is right", rtol=1e-7,
          hint="take x_vp to flow coordinates; x_t and the velocity give clean and noise; put them together at following")
    v = c.noise(4, *c.shape)                                      # and with any other answer: the line in sigma
    sigma, after = ((1 - a).sqrt() / a.sqrt() for a in (now, then))
    xt = x_vp / column(now.sqrt())
    d = (xt - column(sigma) * v) / column(1 + sigma)
    close(student.ddim_step(x_vp, v, now, then), column(then.sqrt()) * (d + column(after / sigma) * (xt - d)),
          "ddim_step against the line in sigma", rtol=1e-7)


# ---- A8.5  TDM and phased targets in flow time ----------------------------------------------------------------------


@A.check("A8.5", points=5)
def fresh_noise(student, c):
    """renoise: clean keeps the factor 1 - t and all noise together the variance t^2, up to t = 1."""
    t = doubles([c.t_mid, c.t_mid + 0.01, c.t_in, 0.999, 1.0])
    ones, zeros = torch.ones(5, *c.shape, dtype=torch.float64), torch.zeros(5, *c.shape, dtype=torch.float64)
    column = lambda v: v.reshape(5, 1, 1).expand_as(ones)
    for start in (c.t_mid, 0.0):
        from_mid, from_noise = student.renoise(ones, start, t, zeros), student.renoise(zeros, start, t, ones)
        tensor(from_mid, ones.shape, "renoise")
        close((1 - start) * from_mid, column(1 - t), f"the factor of clean in x_t, t_mid = {start}", rtol=1e-9,
              hint="x_mid holds (1 - t_mid) clean")
        close((start * from_mid) ** 2 + from_noise**2, column(t**2), f"the variance of all noise in x_t, t_mid = {start}",
              rtol=1e-9, hint="x_mid's own noise, with the factor that x_mid got, and the fresh one")
        holds(bool((from_noise >= 0).all()), "the fresh noise has a negative factor")


@A.check("A8.5", points=6)
def target(student, c):
    """phased_velocity: its mean given x_t is the exact velocity, whatever x_mid is; it is D* of nano_dmd; finite at t = 1."""
    data, count = Mixture([[-1.1], [0.4]], [0.3, 0.6], [0.4, 0.6]).to(torch.float64), 6001
    x_mid = torch.linspace(-9, 9, count, dtype=torch.float64)[:, None]
    for start in (c.t_mid, 0.0):
        level = doubles([start / (1 - start)]).expand(count)
        prior = data.log_prob(x_mid / (1 - start), level)         # x_mid is noised data at t_mid, here in flow coordinates
        for t in (start + 0.3 * (1 - start), 0.9, 1.0):
            for at in (-0.8, 0.1, 1.3):
                keep = (1 - t) / (1 - start)
                likelihood = -((at - keep * x_mid[:, 0]) ** 2) / (2 * (t**2 - (keep * start) ** 2))
                chance = (prior + likelihood).softmax(0)
                x_t = doubles([at]).expand(count)[:, None]
                got = student.phased_velocity(x_t, x_mid, doubles([t]).expand(count), start)
                tensor(got, (count, 1), "phased_velocity")
                clean, noise = posterior(data, x_t[:1], doubles([t]), None)
                close((chance * got[:, 0]).sum(), (noise - clean)[0, 0], f"the mean of the target at x_t = {at}, t = {t:.3f}, "
                      f"t_mid = {start}", rtol=1e-6, atol=1e-7, hint="D* of notebook 15, then v = (x_t - D*) / t")
    t, a, b = doubles([c.t_in, 0.97]), c.noise(2, *c.shape), c.noise(2, *c.shape)
    sigma, s = t / (1 - t), c.t_mid / (1 - c.t_mid)
    column = lambda v: v.reshape(2, 1, 1)
    d = phased_target(column(1 + sigma) * a, (1 + s) * b, sigma, s)
    close(student.phased_velocity(a, b, t, c.t_mid), (a - d) / column(t), "phased_velocity against phased_target", rtol=1e-7)


@A.check("A8.5", points=4)
def between(student, c):
    """draw_between: the unshifted times are uniform, and the ends are the given ones."""
    u = doubles([0.0, 0.1, 0.5, 0.85, 1.0])
    for low, high, s in ((c.t_mid, c.t_in, c.s), (c.t_mid, 1.0, c.s), (0.0, c.t_mid, 1.0)):
        got = tensor(student.draw_between(u, low, high, s), u.shape, "draw_between")
        undone = lambda t: 1 / (1 + s * (1 - t) / t) if t else 0.0            # noise over signal divided by s
        want = [undone(low) + v * (undone(high) - undone(low)) for v in u.tolist()]
        close(doubles([undone(t) for t in got.tolist()]), want, f"the times before the shift, from {low} to {high}, s = {s}",
              rtol=1e-8, hint="undo the shift at both ends, draw there, shift again")


@A.check("A8.5", points=5)
def bias(student, c):
    """tdm_factor: against the regression of the student's own answers, and its limit at t_in = 1."""
    for t_in, t_mid in ((c.t_in, c.t_mid), (0.9999, c.t_mid), (c.t_in, 0.0), (1.0, c.t_mid), (1.0, 0.0)):
        got = student.tdm_factor(c.std, t_in, t_mid)
        far = 1e7 if t_in == 1 else t_in / (1 - t_in)             # t = 1 as a very large sigma
        s = t_mid / (1 - t_mid)
        u, n = doubles([1, 1, -1, -1]), doubles([1, -1, 1, -1])   # independent, unit variance, no sampling error
        x_in, x_mid = math.sqrt(c.std**2 + far**2) * u, math.sqrt(c.std**2 + s**2) * u
        x = (far * x_mid - s * x_in) / (far - s)                  # where the line through both meets sigma = 0
        sigma = s + 0.4 * (min(far, 5.0 + s) - s)
        xt = x_mid + math.sqrt(sigma**2 - s**2) * n
        learned, true = (x * xt).sum() / (xt * xt).sum(), c.std**2 / (c.std**2 + sigma**2)
        close(got, learned / true, f"tdm_factor({c.std}, {t_in}, {t_mid})", rtol=1e-5,
              hint="the line from (sigma, x_in) through x_mid gives x; E[x x_t] / E[x_t^2]; at t = 1 divide by sigma first")

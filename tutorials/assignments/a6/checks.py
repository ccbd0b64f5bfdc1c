"""The checks of A6.  Every want is an integral over a grid, a derivative of the divergence itself or an explicit loop."""

import math

import numpy as np
import torch

from nano_dmd.f_distill import centred
from toy.mixtures import Mixture
from tutorials.assignments.checking import Assignment, close, gradient, holds, tensor


def constants(rng):
    def between(low, high):
        return round(rng.uniform(low, high), 3)

    kinds = ["sign", "fresh noise", "clean x", "one mean", "not normalised", "graph"]
    return dict(
        power=between(0.3, 0.8), high=between(1.2, 1.8), low=between(-0.9, -0.3), add=between(-2, 2), cap=between(5, 20),
        a=between(0.3, 0.7), b=between(0.1, 0.9), p=(between(-0.5, 0.5), between(0.7, 1.0)),
        q=(between(0.6, 1.3), between(1.1, 1.6)), narrow=between(0.3, 0.45), n=rng.randint(100, 900), std=between(0.3, 0.6),
        share=between(0.2, 0.8), n_real=rng.randint(100, 300), n_fake=rng.randint(400, 900), sigma_low=between(0.01, 0.05),
        sigma_high=between(8, 40), bins=rng.randint(5, 12), rate=between(0.3, 0.8), slope=between(0.4, 2.0),
        width=between(0.5, 3), level=between(0.3, 0.8), other=between(1.0, 2.0), dim=rng.randint(2, 6),
        order=rng.sample(kinds, len(kinds)))


A = Assignment("a6", "From f to h", constants, {
    "A6.1": "from f to h, and back", "A6.2": "two Gaussians of unequal variance", "A6.3": "a ratio from logits",
    "A6.4": "the gradient, and p_fake from a batch", "A6.5": "name the mistake"})


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def power(k, add=0.0):
    """f(r) with h(r) = r^k, plus add (r - 1), which no gradient sees."""
    if k == 0:
        return lambda r: -r.log() + add * (r - 1)
    if k == 1:
        return lambda r: r * r.log() + add * (r - 1)
    return lambda r: (r**k - 1 - k * (r - 1)) / (k * (k - 1)) + add * (r - 1)


def js(r):
    return r * r.log() - (r + 1) * ((r + 1) / 2).log()


def of_t(f):
    return lambda t: f(t.exp())


# ---- A6.1 -------------------------------------------------------------------------------------------------


@A.check("A6.1", points=4)
def weight_of_powers(student, c):
    """weight_of: h = r^k and r / (r + 1) from their f, whatever multiple of r - 1 is added to it."""
    t = vector(-3, -1, 0, 0.5, 2, 4)
    for k in (1, c.power, c.low, c.high):
        close(student.weight_of(of_t(power(k, c.add)), t), (k * t).exp(), f"h of the f whose weight is r^{k}", rtol=1e-8,
              hint="F' = r f', so F'' = r f' + r^2 f'': solve for r^2 f''")
    close(student.weight_of(of_t(js), t), t.sigmoid(), "h of Jensen-Shannon", rtol=1e-7)


@A.check("A6.1", points=3)
def weight_of_lines(student, c):
    """weight_of: F linear in t, F constant, inside no_grad, and t is left alone."""
    t = vector(-1, 0.3, 2)
    with torch.no_grad():
        got = student.weight_of(lambda t: -t, t)
        close(got, torch.ones(3), "h of the reverse KL, F(t) = -t", hint="F'' is 0, and autograd may have no graph for it")
        close(student.weight_of(of_t(power(0, c.add)), t), torch.ones(3), "h of -ln r + add (r - 1)", rtol=1e-8)
        close(student.weight_of(lambda t: torch.full_like(t, c.add), t), torch.zeros(3), "h of a constant")
    leaf = t.detach().clone().requires_grad_()
    holds(not student.weight_of(of_t(js), leaf).requires_grad, "h carries a graph: it is a measured weight, a constant")
    holds(leaf.grad is None and not t.requires_grad, "the caller's t has changed: its .grad or its requires_grad")


def clipped_kl(cap):
    """f of h(r) = min(r, cap): r ln r - r + 1 up to cap, then what the integral of cap / u^2 twice gives."""
    def f(r):
        near, far = r * r.log() - r + 1, (cap * math.log(cap) - cap + 1) + math.log(cap) * (r - cap)
        return torch.where(r <= cap, near, far + (r - cap) - cap * (r / cap).log())
    return f


@A.check("A6.1", points=5)
def back_to_f(student, c):
    """f_of: the f of r^k, of r / (r + 1) and of a weight with a corner, on both sides of r = 1."""
    r = vector(0.001, 0.02, 0.7, 1, 1.5, 12, 90, 1000)
    cases = {f"r^{k}": (lambda r, k=k: r**k, lambda r, k=k: power(k)(r) - power_slope(k) * (r - 1))
             for k in (0, 1, c.power, c.high, c.low)}
    cases |= {"r / (r + 1)": (lambda r: r / (r + 1), js), f"min(r, {c.cap})": (lambda r: r.clamp(max=c.cap), clipped_kl(c.cap))}
    for name, (h, f) in cases.items():
        close(student.f_of(h, r), f(r), f"the f of h = {name}", rtol=1e-4, atol=1e-7,
              hint="f(r) = integral from 1 to r of (r - u) h(u) / u^2; ln u is the better variable")


def power_slope(k):
    """f'(1) of power(k)."""
    return {0: -1.0, 1: 1.0}.get(k, 0.0)


@A.check("A6.1", points=3)
def exchanged(student, c):
    """swapped: the weight of r f(1 / r), which is D_f with p and q exchanged."""
    r = vector(0.05, 0.5, 1, 3, 20).requires_grad_()
    powers = [(f"r^{k}", lambda r, k=k: r**k, power(k)) for k in (c.power, c.high, 1)]
    for name, h, f in (*powers, ("r / (r + 1)", lambda r: r / (r + 1), js)):
        once = gradient_of(lambda r: r * f(1 / r), r)
        want = r.detach() ** 2 * torch.autograd.grad(once.sum(), r)[0]
        close(student.swapped(h)(r.detach()), want, f"the swapped weight of {name}", rtol=1e-8,
              hint="differentiate r f(1 / r) twice; the forward KL becomes the reverse one")


def gradient_of(f, r):
    return torch.autograd.grad(f(r).sum(), r, create_graph=True)[0]


@A.check("A6.1", points=5)
def shares(student, c):
    """share_slope: the derivative of the divergence between (a, 1 - a) and (b, 1 - b), also for a mode that is almost lost."""
    for name, f in (("r^0", power(0)), ("r^1", power(1)), (f"r^{c.power}", power(c.power)), ("r / (r + 1)", js)):
        for share in (c.b, c.a, 1e-5):
            b = vector(share).requires_grad_()
            value = b * f(c.a / b) + (1 - b) * f((1 - c.a) / (1 - b))
            close(float(student.share_slope(of_t(f), c.a, share)), gradient(value, b, "D_f")[0],
                  f"dD_f/db of h = {name} at a = {c.a}, b = {share}", rtol=1e-6, atol=1e-9,
                  hint="D_f = b f(a / b) + (1 - b) f((1 - a) / (1 - b)); r depends on b, too")


# ---- A6.2 -------------------------------------------------------------------------------------------------

GRID = torch.linspace(-40, 40, 160_001, dtype=torch.float64)
STEP = 80 / 160_000


def log_normal(x, mean, var):
    return -((x - mean) ** 2) / (2 * var) - (2 * math.pi * torch.as_tensor(var, dtype=torch.float64)).log() / 2


def logs(c, p, q):
    return log_normal(GRID, *p), log_normal(GRID, *q)


@A.check("A6.2", points=4)
def tilted_density(student, c):
    """tilted: size, mean and variance of q r^k, for k = 0, 1, between, below and above."""
    (log_p, log_q), powers = logs(c, c.p, c.q), (0, 1, c.power, 0.5 * c.low, c.high)
    for k in powers:
        mass = (k * log_p + (1 - k) * log_q).exp() * STEP
        size, mean = mass.sum(), (mass * GRID).sum() / mass.sum()
        var = (mass * (GRID - mean) ** 2).sum() / mass.sum()
        got = student.tilted(k, c.p, c.q)
        holds(isinstance(got, (tuple, list)) and len(got) == 3, "tilted should return three floats")
        for value, want, name in zip(got, (size.log(), mean, var), ("ln E_q[r^k]", "the mean", "the variance")):
            close(float(value), want, f"{name} at k = {k}, p = {c.p}, q = {c.q}", rtol=1e-7, atol=1e-9,
                  hint="p^k q^(1 - k): precisions add up with weights k and 1 - k")


@A.check("A6.2", points=2)
def infinite(student, c):
    """tilted: ValueError where the integral is infinite, and not before."""
    p, q = c.p, (c.q[0], c.narrow * c.p[1])
    edge = 1 / (1 - c.narrow)                                     # k / vp + (1 - k) / vq = 0
    for k, finite in ((0.95 * edge, True), (1.05 * edge, False), (2 * edge, False), (-3, True)):
        try:
            student.tilted(k, p, q)
        except ValueError:
            holds(not finite, f"ValueError at k = {k:.3f}, p = {p}, q = {q}, where E_q[r^k] is finite")
        else:
            holds(finite, f"no ValueError at k = {k:.3f}, p = {p}, q = {q}: p^k q^(1 - k) does not fall there")


def divergence_slopes(f, log_p, mean, std):
    """(dD_f / dmean, dD_f / dstd) by autograd of the integral."""
    mean, std = vector(mean)[0].requires_grad_(), vector(std)[0].requires_grad_()
    log_q = log_normal(GRID, mean, std**2)
    inside = log_q.detach() > -300                                # where q is not 0 in float64
    value = (log_q[inside].exp() * f((log_p - log_q)[inside].exp())).sum() * STEP
    return torch.autograd.grad(value, (mean, std))


@A.check("A6.2", points=5)
def slopes_of_powers(student, c):
    """power_slopes: derivatives of the divergence in mean and std, in closed form."""
    for k in (0, 1, c.power, 0.5 * c.low):
        want = divergence_slopes(power(k), logs(c, c.p, c.q)[0], c.q[0], math.sqrt(c.q[1]))
        for got, right, name in zip(student.power_slopes(k, c.p, c.q), want, ("mean", "std"), strict=True):
            close(float(got), right, f"dD_f/d{name} of h = r^{k}, p = {c.p}, q = {c.q}", rtol=1e-6, atol=1e-9,
                  hint="E_q[r^k (s_q - s_p) dx/dtheta]: a line, or a line times z, averaged over the tilted Gaussian")


@A.check("A6.2", points=4)
def worth(student, c):
    """effective_samples: from the first two moments of the weight; 0 where the second is infinite."""
    log_p, log_q = logs(c, c.p, c.q)
    for k in (0, 1, c.power, 0.25 * c.low):
        first, second = ((i * k * log_p + (1 - i * k) * log_q).exp().sum() * STEP for i in (1, 2))
        close(float(student.effective_samples(k, c.p, c.q, c.n)), c.n * first**2 / second,
              f"effective_samples of h = r^{k}, n = {c.n}, p = {c.p}, q = {c.q}", rtol=1e-6)
    close(float(student.effective_samples(1, c.p, (c.q[0], c.narrow * c.p[1]), c.n)), 0.0,
          f"effective_samples where q has {c.narrow} of p's variance", hint="is E_q[r^2] finite there?")


@A.check("A6.2", points=5)
def slopes_of_anything(student, c):
    """slopes: any h, and a p of two modes."""
    real = Mixture([[-1.0], [c.q[0]]], [c.std, 0.9 * c.std], [c.share, 1 - c.share]).to(torch.float64)
    log_p = real.log_prob(GRID[:, None])
    for name, h, f in (("1", torch.ones_like, power(0)), ("r", lambda r: r, power(1)), ("r / (r + 1)", lambda r: r / (r + 1), js),
                       (f"r^{c.power}", lambda r: r**c.power, power(c.power))):
        for mean, std in ((c.p[0], 1.3 * c.std), (0.8, 0.7), (0.2, 1.6)):
            got = student.slopes(h, real, mean, std)
            q = log_normal(GRID, mean, std**2).exp()
            size = (q * h((log_p - log_normal(GRID, mean, std**2)).clamp(-600, 600).exp())).sum() * STEP
            wanted = (*divergence_slopes(f, log_p, mean, std), size)
            for value, want, what in zip(got, wanted, ("dD_f/dmean", "dD_f/dstd", "E_q[h]"), strict=True):
                close(float(value), want, f"{what} of h = {name}, q of mean {mean} and std {std}", rtol=1e-5, atol=1e-6,
                      hint="E_q[h (s_q - s_p) dx/dtheta], with dx/dmean = 1 and dx/dstd = z")


# ---- A6.3 -------------------------------------------------------------------------------------------------


def best_logit(p, q, n_one, n_zero):
    """The logit that minimises n_one p softplus(-l) + n_zero q softplus(l), by bisection of its derivative."""
    low, high = -40.0, 40.0
    for _ in range(80):
        middle = (low + high) / 2
        rises = n_zero * q / (1 + math.exp(-middle)) > n_one * p / (1 + math.exp(middle))
        low, high = (low, middle) if rises else (middle, high)
    return (low + high) / 2


@A.check("A6.3", points=4)
def ratio_of_logits(student, c):
    """log_ratio: the best critic of a pooled loss, with either label for real."""
    points = [(0.7, 0.2), (0.01, 0.5), (1.3, 1.3)]
    want = vector(*(math.log(p / q) for p, q in points))
    for real_is_one in (True, False):
        logits = vector(*(best_logit(p, q, c.n_real, c.n_fake) if real_is_one else best_logit(q, p, c.n_fake, c.n_real)
                          for p, q in points))
        close(student.log_ratio(logits, real_is_one, c.n_real, c.n_fake), want,
              f"ln r with real_is_one = {real_is_one}, {c.n_real} real and {c.n_fake} generated samples", rtol=1e-8,
              hint="at a point the loss is n_real p l_real + n_fake q l_fake over a constant: where is it least?")


@A.check("A6.3", points=4)
def bins_of_sigma(student, c):
    """place: equally wide bins of log sigma, their lower edges, and what lies outside."""
    ratio = (c.sigma_high / c.sigma_low) ** (1 / c.bins)
    sigma, want = [c.sigma_low / 3, c.sigma_high, 5 * c.sigma_high], [0, c.bins - 1, c.bins - 1]
    for b in range(c.bins):
        sigma += [c.sigma_low * ratio**b * f for f in (1 + 1e-9, ratio**0.5, ratio * (1 - 1e-9))]
        want += [b] * 3
    got = student.place(vector(*sigma), c.sigma_low, c.sigma_high, c.bins)
    holds(isinstance(got, torch.Tensor) and got.dtype == torch.int64, "place should return an int64 tensor")
    tensor(got, (len(want),), "place")
    off = [f"sigma {s:.6g} is in bin {g}, not {w}" for s, g, w in zip(sigma, got.tolist(), want) if g != w]
    holds(not off, f"{len(off)} of {len(want)} are wrong, {c.bins} bins from {c.sigma_low} to {c.sigma_high}: {off[:1]}")


def batch(c, size=24):
    """(ln r, bins) where some bins hold no sample and one holds a single one."""
    where = torch.arange(size) % (c.bins - 2)
    where[0] = c.bins - 1
    return c.noise(size), where


@A.check("A6.3", points=5)
def means_over_batches(student, c):
    """running_means: bin by bin; an empty bin keeps what it had, and the batch is a constant."""
    log_r, where = batch(c)
    ratio, means = log_r.exp().requires_grad_(), 1 + 0.3 * c.noise(c.bins) ** 2
    for rate in (c.rate, 0.0):
        want = means.clone()
        for b in range(c.bins):
            members = [ratio[i].item() for i in range(len(ratio)) if where[i] == b]
            if members:
                want[b] = rate * means[b] + (1 - rate) * sum(members) / len(members)
        got = student.running_means(means, ratio, where, rate)
        close(got, want, f"the means at rate {rate}", rtol=1e-9, hint=f"bin {c.bins - 2} is empty here: it has seen nothing new")
        holds(not got.requires_grad, "the means carry a graph of the batch")


def by_hand(log_r, where, h, low, high):
    """cut, divide by the mean of the bin, weigh, divide by the mean."""
    cut = [min(max(math.exp(min(t, 50)), low), high) for t in log_r.tolist()]
    means = {b: np.mean([r for r, at in zip(cut, where.tolist()) if at == b]) for b in set(where.tolist())}
    weight = h(vector(*(r / means[b] for r, b in zip(cut, where.tolist()))))
    return weight / weight.mean()


@A.check("A6.3", points=4)
def weights_by_hand(student, c):
    """weights_of_batch: cut, then centre, then h, then its mean."""
    log_r, where = batch(c)
    log_r[2:6] = vector(5, -6, 900, -900)
    for name, h in (("r", lambda r: r), (f"3 r^{c.power}", lambda r: 3 * r**c.power), ("r / (r + 1)", lambda r: r / (r + 1))):
        for low, high in ((0.1, 20.0), (0.3, c.cap)):
            got = student.weights_of_batch(log_r.clone().requires_grad_(), where, h, low, high)
            close(got, by_hand(log_r, where, h, low, high), f"h = {name}, cut to [{low}, {high}]", rtol=1e-9,
                  hint="the order: cut r, divide by the mean of its bin, h, divide by the mean of h")
            holds(not got.requires_grad, "the weights carry a graph")


@A.check("A6.3", points=3)
def weights_repair(student, c):
    """weights_of_batch: one bias per bin drops out as long as nothing is cut, and a sample alone in its bin has r = 1."""
    log_r, where = batch(c)
    log_r, bias = 0.3 * log_r.tanh(), 0.5 * c.noise(c.bins).tanh()
    h = lambda r: r / (r + 1)
    want = by_hand(log_r, where, h, 0.1, 20.0)
    close(student.weights_of_batch(log_r + bias[where], where, h), want, "the weights under one bias per bin", rtol=1e-9)
    log_r[0] += 1.5                                               # the one that is alone
    close(student.weights_of_batch(log_r, where, h), want, "the weights when the lone sample looks more real", rtol=1e-9)


@A.check("A6.3", points=5)
def what_is_left(student, c):
    """residual: centring subtracts the log of a mean, not the mean of a log."""
    even = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000 - 0.5
    for slope, width in ((c.slope, c.width), (-c.slope, c.width), (c.slope, 6.0), (0.01, c.width)):
        b = slope * width * even
        want = (b - b.exp().mean().log()).square().mean().sqrt()
        close(float(student.residual(slope, width)), want, f"residual({slope}, {width})", rtol=1e-6,
              hint="ln(ratio / mean) has a mean of its own: ln(sinh(a) / a), a half of the rise over the bin")
    close(float(student.residual(0.0, c.width)), 0.0, "residual without a slope")


# ---- A6.4 -------------------------------------------------------------------------------------------------


def scene(c, *shape, n=3, size=4):
    """x, sigma (n, B), noise, two curved denoisers and a logit that looks at xt and sigma."""
    x, noise = c.noise(size, *shape), c.noise(n, size, *shape)
    sigma = c.level * (1 + c.noise(n, size) ** 2)
    gain, towards = c.noise(*shape), c.noise(*shape)

    def level(s, xt):
        return s.reshape(-1, *[1] * len(shape))

    real = lambda xt, s, cond=None: (xt * gain).tanh() / (1 + level(s, xt))
    fake = lambda xt, s, cond=None: xt / (1 + level(s, xt) ** 2) + 0.1 * xt.sin()
    logit = lambda xt, s: (xt * towards).flatten(1).sum(1).tanh() - 0.3 * s.log()
    return x, sigma, noise, real, fake, logit


def alone(case, h, i, b):
    """(h, g) of noising i of sample b by itself."""
    x, sigma, noise, real, fake, logit = case
    one, s = x[b : b + 1], sigma[i, b].reshape(1)
    xt = one + sigma[i, b] * noise[i, b : b + 1]
    d_real, d_fake = real(xt, s), fake(xt, s)
    return h(logit(xt, s).exp()), (d_fake - d_real)[0] / max((one - d_real).abs().mean().item(), 1e-5)


@A.check("A6.4", points=5)
def gradient_by_hand(student, c):
    """f_gradient: each copy at its own noise, its ratio at the same xt, one mean of h; points and images."""
    for shape in ((c.dim,), (2, 3, 3)):
        case = scene(c, *shape)
        for name, h in (("1", torch.ones_like), ("r", lambda r: r), (f"5 r^{c.power}", lambda r: 5 * r**c.power)):
            parts = [[alone(case, h, i, b) for b in range(4)] for i in range(3)]
            mean = sum(weight for row in parts for weight, _ in row) / 12
            want = torch.stack([sum(parts[i][b][0] / mean * parts[i][b][1] for i in range(3)) / 3 for b in range(4)])
            got = student.f_gradient(*case, h)
            close(got, want, f"the gradient under h = {name}, samples of shape {shape}", rtol=1e-8,
                  hint="a mean over the n noises, no sum; the mean of h is over all copies together")


@A.check("A6.4", points=3)
def gradient_is_a_constant(student, c):
    """f_gradient: no graph, and nothing in the networks is differentiated; each is asked at xt and sigma and nowhere else."""
    x, sigma, noise, real, fake, logit = scene(c, c.dim)
    seen, scale = {}, torch.ones((), dtype=torch.float64, requires_grad=True)

    def watched(name, function):
        def call(xt, s, *rest):
            seen.setdefault(name, []).append(torch.cat([xt.detach(), s.detach()[:, None]], 1))
            return scale * function(xt, s, *rest)
        return call

    nets = [watched(name, f) for name, f in (("real", real), ("fake", fake), ("logit", logit))]
    got = student.f_gradient(x.requires_grad_(), sigma, noise, *nets, lambda r: r)
    holds(not tensor(got, x.shape, "f_gradient").requires_grad, "the direction carries a graph")
    level = sigma[:, :, None]
    want = torch.cat([x.detach() + level * noise, level], 2).flatten(0, 1)
    for name, calls in seen.items():
        rows = torch.cat(calls)
        holds(len(rows) == len(want), f"{name} was asked about {len(rows)} noised samples; there are {len(want)}")
        close(rows[rows[:, -1].argsort()], want[want[:, -1].argsort()], f"what {name} was asked, (xt, sigma) by sigma", rtol=1e-9,
              hint="one noised sample per copy for all three; h belongs to the xt of its gradient")


def others(x, xt, sigma, i):
    """ln p_fake(xt_i) from all samples but i, one Gaussian at a time; differentiable in xt_i."""
    terms = []
    for j in range(len(x)):
        if j != i:
            square = (xt - x[j]).square().sum() / (2 * sigma**2)
            terms.append(-square - x[j].numel() / 2 * math.log(2 * math.pi * sigma**2))
    return torch.stack(terms).logsumexp(0) - math.log(len(terms))


def cloud(c, *shape):
    x, sigma = c.noise(5, *shape), c.level + c.noise(5) ** 2
    return x, x + sigma.reshape(-1, *[1] * len(shape)) * c.noise(5, *shape), sigma


@A.check("A6.4", points=4)
def density_of_the_others(student, c):
    """leave_one_out: ln p_fake is that of all samples but its own, each row at its own sigma."""
    for shape in ((c.dim,), (1, 2, 2)):
        x, xt, sigma = cloud(c, *shape)
        got = student.leave_one_out(x, xt, sigma)
        holds(isinstance(got, (tuple, list)) and len(got) == 2, "leave_one_out should return two tensors")
        want = torch.stack([others(x, xt[i], sigma[i].item(), i) for i in range(5)])
        close(got[0], want, f"ln p_fake, samples of shape {shape}", rtol=1e-9,
              hint="a mean over B - 1 Gaussians of variance sigma^2 in all dimensions, with its constant")


@A.check("A6.4", points=4)
def denoiser_of_the_others(student, c):
    """leave_one_out: the denoiser belongs to that density, by Tweedie's formula; also far away from everybody."""
    for shape, far in (((c.dim,), 0.0), ((1, 2, 2), 0.0), ((c.dim,), 300.0)):
        x, xt, sigma = cloud(c, *shape)
        xt = xt + far
        want = []
        for i in range(5):
            point = xt[i].clone().requires_grad_()
            score, = torch.autograd.grad(others(x, point, sigma[i].item(), i), point)
            want.append(xt[i] + sigma[i] ** 2 * score)
        density, denoised = student.leave_one_out(x, xt, sigma)
        tensor(density, (5,), "ln p_fake")
        close(denoised, torch.stack(want), f"E[x0 | xt], samples of shape {shape}, {far:g} away", rtol=1e-6, atol=1e-6,
              hint="the mean of the other samples, weighted by how likely each made xt; stay in log space")


@A.check("A6.4", points=4)
def own_kernel(student, c):
    """self_share: the own kernel against all, in few dimensions and in many."""
    s, sigma, n = c.std, c.level, c.n
    t, w = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(80))
    w = w / w.sum()
    own = w @ (-(t**2) / 2).exp()                                 # each without (2 pi sigma^2)^(-1/2), per dimension
    apart = math.sqrt(2 * s**2 + sigma**2) / sigma * t            # xt_i - x_j in units of sigma
    other = w @ (-(apart**2) / 2).exp()
    for dim in (1, c.dim):
        want = own**dim / (own**dim + (n - 1) * other**dim)
        close(float(student.self_share(n, dim, s, sigma)), want, f"self_share({n}, {dim}, {s}, {sigma})", rtol=1e-5,
              hint="E N(xt; x_j, sigma^2) for another sample: xt - x_j has the variance 2 s^2 + sigma^2")
    close(float(student.self_share(n, 3072, s, sigma)), 1.0, "self_share in 3072 dimensions",
          hint="compare logarithms: the densities themselves are too large for a float")


# ---- A6.5 -------------------------------------------------------------------------------------------------


@A.check("A6.5", points=6)
def correlation(student, c):
    """other_noise_correlation: by quadrature over the sample and two noises."""
    t, w = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(8))          # exact: polynomials of degree 4
    w = w / w.sum()
    z, e, e2 = torch.cartesian_prod(t, t, t).T
    weight = torch.einsum("i,j,k->ijk", w, w, w).flatten()
    for p, q in ((c.p, c.q), (c.p, (c.p[0], c.q[1])), (c.p, (c.q[0], c.p[1]))):
        for sigma, other in ((c.level, c.level), (c.level, c.other), (c.other, 0.0)):
            x, both = q[0] + math.sqrt(q[1]) * z, []
            for level, noise in ((sigma, e), (other, e2)):
                xt = x + level * noise
                log_r = log_normal(xt, p[0], p[1] + level**2) - log_normal(xt, q[0], q[1] + level**2)
                both.append(log_r - weight @ log_r)
            a, b = both
            want = (weight @ (a * b)) / ((weight @ a**2) * (weight @ b**2)).sqrt()
            close(float(student.other_noise_correlation(p, q, sigma, other)), want,
                  f"the correlation for p = {p}, q = {q}, sigma = {sigma}, other = {other}", rtol=1e-7, atol=1e-9,
                  hint="ln r = const + line u + bow (u^2 - 1) in the unit normal u; u and u' have the correlation rho")


def box(kind):
    """An implementation of the weight with one mistake, or none."""
    own = torch.Generator().manual_seed(8_675_309)                # a student who seeds with 0 must not draw the same noise

    def weigh(x, sigma, noise, logit, h):
        spread = sigma.reshape(-1, *[1] * (x.ndim - 1))
        with torch.set_grad_enabled(kind == "graph"):
            fresh = torch.randn(x.shape, generator=own, dtype=x.dtype)
            xt = x + spread * {"fresh noise": fresh, "clean x": 0 * noise}.get(kind, noise)
            log_r = logit(xt, sigma) * (-1 if kind == "sign" else 1)
            ratio = log_r.exp().clamp(0.1, 20)
            ratio = ratio / ratio.mean() if kind == "one mean" else centred(ratio, sigma)
            weight = h(ratio)
            return weight if kind == "not normalised" else weight / weight.mean()
    return weigh


NAMES = {"right": "right", "sign": "wrong sign", "fresh noise": "other noise", "clean x": "other noise", "one mean": "one mean",
         "not normalised": "not normalised", "graph": "graph"}


def named(student, c, *kinds):
    """Fails with a sentence unless each kind, and the right one, is called by its name."""
    for kind in sorted(kinds, key=c.order.index) + ["right"]:
        got = student.diagnose(box(kind))
        holds(got == NAMES[kind], f"an implementation whose verdict is {NAMES[kind]!r} ({kind}) was called {got!r}")


@A.check("A6.5", points=3)
def names_the_sign(student, c):
    """diagnose: the wrong sign, a weight with a graph, and neither."""
    named(student, c, "sign", "graph")


@A.check("A6.5", points=3)
def names_the_noise(student, c):
    """diagnose: a ratio at fresh noise and one at the clean sample, and neither."""
    named(student, c, "fresh noise", "clean x")


@A.check("A6.5", points=3)
def names_the_mean(student, c):
    """diagnose: no bins, no mean of h, and neither."""
    named(student, c, "one mean", "not normalised")

"""The checks of A3: numbers against closed forms, quadrature and autograd, at constants that follow from a seed."""

import math

import torch
import torch.nn.functional as F
from numpy.polynomial.hermite_e import hermegauss
from torch import nn

from tutorials.assignments.checking import Assignment, close, gradient, holds, tensor


def constants(rng):
    return dict(
        size=rng.choice([3, 4, 5]), side=rng.choice([2, 3]), scale=rng.uniform(0.6, 1.4),
        sigmas=[rng.uniform(0.2, 0.6), rng.uniform(0.7, 1.0)],
        smooth=rng.uniform(0.05, 0.3), big=rng.choice([300.0, 2000.0, 10000.0]),                     # A3.1
        components=rng.choice([2, 3]), distance=rng.uniform(2.0, 4.0), std=rng.uniform(0.2, 0.5), accuracy=rng.uniform(0.6, 0.85),
        alpha=rng.uniform(0.2, 0.9),                                                                 # A3.3
        power=rng.uniform(0.3, 0.8), low=rng.uniform(0.2, 0.4), high=rng.uniform(3.0, 5.0), shift=rng.uniform(0.4, 0.9),
        ratio=rng.uniform(2.0, 30.0), teacher=rng.uniform(0.7, 0.9), data=rng.uniform(0.4, 0.6))     # A3.5


A = Assignment("a3", "The discriminator and its losses", constants, {
    "A3.1": "Losses from logits",
    "A3.2": "The optimal logit",
    "A3.3": "Gradient penalties",
    "A3.4": "From logits to f-divergences",
    "A3.5": "The generator's GAN term and its weight"})


def leaf(x):
    return x.detach().clone().requires_grad_()


def number(got, what):
    """A Python number or a tensor () as a float; fails with a sentence otherwise."""
    if not isinstance(got, (int, float)):
        got = tensor(got, (), what)
    holds(math.isfinite(float(got)), f"{what} is {float(got)}")
    return float(got)


def probability(logits):
    return 1 / (1 + (-logits).exp())


@A.check("A3.1", points=4)
def logistic(student, c):
    """The critic's loss is the cross-entropy with labels 1 - smooth and 0, each kind of sample averaged by itself."""
    real, fake = 3 * c.noise(7), 2 * c.noise(4) + 1
    p, q = probability(real), probability(fake)
    for s in (c.smooth, 0.0):
        want = -((1 - s) * p.log() + s * (1 - p).log()).mean() - (1 - q).log().mean()
        close(student.critic_loss(real, fake, s), want, f"critic_loss with 7 real and 4 fake logits at smooth = {s:.3g}",
              hint="only real labels are smoothed; mean over the real ones plus mean over the fake ones")


@A.check("A3.1", points=4)
def stable(student, c):
    """Loss and gradient stay finite and right at huge logits in float32."""
    s, big = c.smooth, c.big
    real, fake = torch.tensor([big, -big, -big], requires_grad=True), torch.tensor([-big, big], requires_grad=True)
    loss = student.critic_loss(real, fake, s)
    hint = "where smaller logits are right, a sigmoid was rounded to 0 or 1 on the way"
    close(loss, (s + 2 * (1 - s)) * big / 3 + big / 2, f"critic_loss at logits of {big:g}", rtol=1e-5, hint=hint)
    got = torch.cat(torch.autograd.grad(loss, (real, fake)))
    want = torch.tensor([s / 3, -(1 - s) / 3, -(1 - s) / 3, 0, 1 / 2])
    close(got, want, f"the gradient of critic_loss at logits of {big:g}", rtol=1e-5, hint=hint)


@A.check("A3.1", points=4)
def smoothed(student, c):
    """The smoothed optimum: where the expected loss is stationary, bounded above, and the log ratio without smoothing."""
    log_ratio, s = 3 * c.noise(9), c.smooth
    got = tensor(student.smoothed_logit(log_ratio, s), (9,), "smoothed_logit")
    r = log_ratio.exp()                                           # p_real dx = r, p_fake dx = 1
    slope = r * (s * probability(got) - (1 - s) * probability(-got)) + probability(got)
    close(slope / (1 + r), torch.zeros(9), "the slope of the expected loss at smoothed_logit", atol=1e-9,
          hint="minimise p_real l_real(D) + p_fake l_fake(D) at one point, D being free there")
    far = torch.tensor([-1000.0, 1000.0], dtype=torch.float64)
    close(student.smoothed_logit(far, s), torch.tensor([math.log(1 - s) - 1000, math.log(1 / s - 1)], dtype=torch.float64),
          "smoothed_logit at log ratios of -1000 and 1000", hint="stay in log space")
    close(student.smoothed_logit(log_ratio, 0.0), log_ratio, "smoothed_logit without smoothing")


@A.check("A3.1", points=3)
def hinge(student, c):
    """Hinge: values and gradients of both losses inside and beyond the margin."""
    real = torch.tensor([c.scale + 1, 0.5, -c.scale], dtype=torch.float64, requires_grad=True)
    fake = torch.tensor([-c.scale - 1, c.smooth, c.scale + 1, -0.5], dtype=torch.float64, requires_grad=True)
    generator, critic = student.hinge_losses(real, fake)
    close(critic, (0.5 + 1 + c.scale) / 3 + (1 + c.smooth + c.scale + 2 + 0.5) / 4, "the critic's hinge loss",
          hint="samples beyond the margin cost nothing")
    close(generator, -(c.smooth - 0.5) / 4, "the generator's hinge loss", hint="it has no margin")
    want = torch.tensor([0, -1 / 3, -1 / 3, 0, 1 / 4, 1 / 4, 1 / 4])
    close(torch.cat(torch.autograd.grad(critic, (real, fake))), want, "the gradient of the critic's hinge loss")
    got = gradient(generator, fake, "the generator's hinge loss")
    close(got, -torch.ones(4) / 4, "the gradient of the generator's hinge loss",
          hint="it pulls at every sample equally, wherever the sample is")


def random_mixture(c, k):
    """(weights, means, covariances) in the plane, none of them narrow."""
    factor = c.scale * (torch.eye(2, dtype=torch.float64) + 0.3 * c.noise(k, 2, 2).clamp(-1, 1))
    return c.noise(k).softmax(0), c.scale * c.noise(k, 2), factor @ factor.mT + 0.5 * c.scale**2 * torch.eye(2).double()


def clean_density(x, weights, means, covariances):
    """Density (N,) of points x (N, 2), from inverse and determinant."""
    gap = x[:, None] - means
    square = torch.einsum("nki,kij,nkj->nk", gap, covariances.inverse(), gap)
    return ((-square / 2).exp() / (2 * math.pi * covariances.det().sqrt())) @ weights


def quadrature(n):
    """Nodes (n,) and weights of the unit normal, float64."""
    nodes, weights = (torch.tensor(v, dtype=torch.float64) for v in hermegauss(n))
    return nodes, weights / weights.sum()


@A.check("A3.2", points=6)
def log_ratio_of_noised_mixtures(student, c):
    """The logit is the log ratio of the densities after noise: the clean ones averaged over x - sigma n."""
    real, fake = random_mixture(c, c.components), random_mixture(c, 5 - c.components)
    x, sigma = c.scale * c.noise(4, 2), c.scale * torch.tensor(c.sigmas * 2, dtype=torch.float64)
    nodes, weights = quadrature(48)
    n, w = torch.cartesian_prod(nodes, nodes), (weights[:, None] * weights).flatten()
    density = torch.tensor([[w @ clean_density(x[b] - sigma[b] * n, *m) for m in (real, fake)] for b in range(4)])
    close(student.optimal_logit(x, sigma, real, fake), density[:, 0].log() - density[:, 1].log(), "optimal_logit",
          rtol=1e-5, atol=1e-6, hint="independent noise adds sigma^2 I to each covariance, its own sigma for each row")


@A.check("A3.2", points=4)
def far_out(student, c):
    """The logit is exact where both densities underflow, and it counts the noise of every dimension."""
    d, s0, s1 = 3, c.scale, 1.5 * c.scale
    eye, one = torch.eye(d, dtype=torch.float64)[None], torch.ones(1, dtype=torch.float64)
    mean = c.noise(2, 1, d)
    x, sigma = 80 * c.scale * F.normalize(c.noise(3, d)), torch.tensor([*c.sigmas, 1.0], dtype=torch.float64)
    var = [s**2 + sigma**2 for s in (s0, s1)]
    want = sum(sign * (-(x - m).square().sum(1) / (2 * v) - d / 2 * v.log()) for sign, m, v in zip((1, -1), mean, var))
    got = student.optimal_logit(x, sigma, (one, mean[0], s0**2 * eye), (one, mean[1], s1**2 * eye))
    close(got, want, "optimal_logit 80 standard deviations out", hint="densities are 0 there, log densities are not")


@A.check("A3.2", points=4)
def gan_is_a_weighted_score_difference(student, c):
    """The generator's gradient at the optimal logit equals autograd's, on images."""
    shape = (3, 1, c.side, c.side)
    xt, mean = leaf(c.noise(*shape)), [0.5 * c.noise(*shape[1:]) for _ in range(2)]
    sigma = torch.tensor([c.sigmas[0], c.sigmas[1], 2 * c.sigmas[1]], dtype=torch.float64)
    s = sigma[:, None, None, None]
    var = [v + s**2 for v in (c.scale**2, 0.25)]
    log_p, log_q = (((-(xt - m) ** 2 / (2 * v) - v.log() / 2).flatten(1).sum(1)) for m, v in zip(mean, var))
    want = gradient(F.softplus(log_q - log_p), xt, "the loss")
    d_real, d_fake = (m + (v - s**2) / v * (xt.detach() - m) for m, v in zip(mean, var))
    close(student.gan_gradient(d_real, d_fake, sigma, (log_p - log_q).detach()), want, "gan_gradient",
          hint="the gradient of the optimal logit is a difference of two scores")


@A.check("A3.2", points=2)
def sure_critic(student, c):
    """Where the critic is sure, gan_gradient is the whole score difference on one side and nothing on the other."""
    d_real, d_fake, sigma = c.noise(2, 5), c.noise(2, 5), torch.tensor(c.sigmas, dtype=torch.float64)
    got = student.gan_gradient(d_real, d_fake, sigma, torch.tensor([-1000.0, 1000.0], dtype=torch.float64))
    want = torch.stack([(d_fake[0] - d_real[0]) / c.sigmas[0] ** 2, torch.zeros(5)])
    close(got, want, "gan_gradient at logits -1000 and 1000", hint="samples that look fake are pulled hardest")


@A.check("A3.2", points=4)
def overlap(student, c):
    """At the noise level asked for, the best critic is right that often, by integrating over its samples."""
    sigma = number(student.noise_for_accuracy(c.distance, c.std, c.accuracy), "noise_for_accuracy")
    holds(sigma > 0, f"noise_for_accuracy is {sigma:.4g} where clean samples are told apart better than asked for")
    total = math.hypot(c.std, sigma)
    x = torch.linspace(0, c.distance / 2 + 10 * total, 20_001, dtype=torch.float64)   # the side of the one mean, at distance / 2
    density = (-(x - c.distance / 2) ** 2 / (2 * total**2)).exp() / (total * math.sqrt(2 * math.pi))
    close(torch.trapezoid(density, x).item(), c.accuracy, f"at sigma = {sigma:.4g} the share that the best critic gets right",
          hint="project on the line through both means: two Gaussians, and a threshold half-way")
    close(student.noise_for_accuracy(c.distance, 20 * c.distance, c.accuracy), 0.0, "noise_for_accuracy for hopelessly wide data",
          hint="clean samples overlap too much already")


class Quadratic(nn.Module):
    """logit(x) = x' A x / 2 + b' x + offset on flattened x, with weights A, b."""

    def __init__(self, matrix, b):
        super().__init__()
        self.matrix, self.b = nn.Parameter(matrix), nn.Parameter(b)

    def forward(self, x):
        x = x.flatten(1)
        return 0.5 * ((x @ self.matrix) * x).sum(1) + x @ self.b + 0.3


def quadratic(c, d, curved=True):
    matrix = c.noise(d, d)
    return Quadratic((matrix + matrix.T) / 2 * curved, c.noise(d))


@A.check("A3.3", points=4)
def penalty_value(student, c):
    """The gradient penalty is the mean over samples of the squared L2 norm, on images."""
    net, x = quadratic(c, c.side**2), c.noise(5, 1, c.side, c.side)
    want = (x.flatten(1) @ net.matrix + net.b).square().sum(1).mean()
    close(student.gradient_penalty(net, x), want, f"gradient_penalty of 5 samples of {c.side**2} pixels",
          hint="squares are summed over the pixels of a sample and averaged over samples")


@A.check("A3.3", points=4)
def penalty_trains(student, c):
    """The penalty's gradient reaches the critic's weights, and nothing else: x stays as it was."""
    net, base = quadratic(c, 4), leaf(c.noise(3, 4))
    x = 2 * base                                                  # as a generator's sample: it carries a graph
    value = student.gradient_penalty(net, x)
    slope = x.detach() @ net.matrix + net.b
    got = torch.autograd.grad(value, net.b, allow_unused=True)[0] if value.requires_grad else None
    holds(got is not None, "no gradient of gradient_penalty reaches the critic's weights: the inner one needs a graph too")
    close(got, 2 * slope.mean(0), "the gradient of gradient_penalty with respect to b of the logit b' x")
    again = student.gradient_penalty(net, x)
    reached = torch.autograd.grad(again, base, allow_unused=True)[0]
    holds(reached is None, "the penalty sends a gradient into x; it is the critic's business alone")
    plain = c.noise(3, 4)
    student.gradient_penalty(net, plain)
    holds(not plain.requires_grad and plain.grad is None, "gradient_penalty changed the caller's x (requires_grad or .grad)")
    holds(all(p.grad is None for p in net.parameters()), "gradient_penalty left a .grad on the critic's weights")


@A.check("A3.3", points=4)
def differences_of_a_linear_logit(student, c):
    """For a linear logit both difference penalties are the squared directional slope, for every alpha."""
    net, x, noise = quadratic(c, 4, curved=False), c.noise(6, 4), c.noise(6, 4)
    want = (noise @ net.b).square().mean()
    for name in ("difference_penalty", "central_penalty"):
        for alpha in (c.alpha, 3 * c.alpha):
            got = getattr(student, name)(net, x, noise, alpha)
            close(got, want, f"{name} of a linear logit at alpha = {alpha:.3g}", hint="it must not depend on alpha there")


@A.check("A3.3", points=4)
def differences_of_a_quadratic_logit(student, c):
    """For a quadratic logit the one-sided difference sees curvature and the central one does not."""
    d = c.side + 1
    net, x0 = quadratic(c, d), c.noise(1, d)
    noise, x = math.sqrt(d) * torch.eye(d, dtype=torch.float64), x0.expand(d, d)   # noise n' n / d = I exactly
    slope = (x0 @ net.matrix + net.b)[0]
    close(student.central_penalty(net, x, noise, c.alpha), slope.square().sum(), "central_penalty of a quadratic logit")
    along = math.sqrt(d) * slope + c.alpha * d * net.matrix.diagonal() / 2
    close(student.difference_penalty(net, x, noise, c.alpha), along.square().mean(), "difference_penalty of a quadratic logit",
          hint="only the first point moves by alpha noise")


@A.check("A3.3", points=4)
def bias(student, c):
    """The bias is the expected difference penalty less the gradient penalty, by quadrature over the noise."""
    net, x = quadratic(c, 2), c.noise(1, 2)
    nodes, weights = quadrature(6)                                # exact for polynomials of degree 11; this one has 4
    n, w = torch.cartesian_prod(nodes, nodes), (weights[:, None] * weights).flatten()
    with torch.no_grad():
        for alpha in (c.alpha, 2 * c.alpha):
            expected = w @ ((net(x + alpha * n) - net(x)) / alpha).square()
            want = expected - (x @ net.matrix + net.b).square().sum()
            close(student.difference_bias(net.matrix.detach(), alpha), want, f"difference_bias at alpha = {alpha:.3g}",
                  hint="E (n' A n)^2 for unit normal n has a squared trace and a trace of a square")


DIVERGENCES = {                                                   # name: (f, h); f-distill's table, up to affine terms
    "reverse KL": (lambda r: -r.log(), lambda r: 1 + 0 * r),
    "forward KL": (lambda r: r * r.log(), lambda r: r),
    "Jensen-Shannon": (lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(), lambda r: r / (1 + r)),
    "softened reverse KL": (lambda r: (r + 1) * ((r + 1) / r).log(), lambda r: 1 / (1 + r)),
    "squared Hellinger": (lambda r: 4 * (1 - r.sqrt()), lambda r: r.sqrt()),
}


def alpha_divergence(a):
    return lambda r: r**a / (a * (a - 1))                         # h(r) = r^a


@A.check("A3.4", points=5)
def table(student, c):
    """h(r) = r^2 f''(r) for five divergences and one that is not in the table."""
    logits = torch.linspace(math.log(c.low), math.log(c.high), 7, dtype=torch.float64)
    divergences = DIVERGENCES | {f"r^{c.power:.3g}": (alpha_divergence(c.power), lambda r: r**c.power)}
    for name, (f, h) in divergences.items():
        close(student.f_weight(logits, f), h(logits.exp()), f"f_weight of {name}",
              hint="the logit is log(p_real / p_fake); differentiate f twice")


@A.check("A3.4", points=3)
def cut(student, c):
    """The ratio is cut to [low, high] before it is weighted, whatever the logit."""
    logits = torch.tensor([-1000.0, math.log(c.low) - 0.1, 0.0, math.log(c.high) + 0.1, 1000.0], dtype=torch.float64)
    r = torch.tensor([c.low, c.low, 1.0, c.high, c.high], dtype=torch.float64)
    f = alpha_divergence(c.power + 1)
    close(student.f_weight(logits, f, c.low, c.high), r ** (c.power + 1), "f_weight with the ratio cut",
          hint="cut the ratio, not the logit and not h")


@A.check("A3.4", points=4)
def weight_makes_the_divergence(student, c):
    """E[h (s_fake - s_real) dx/dshift] is the derivative of the f-divergence with respect to the generator's shift."""
    n, w = quadrature(32)
    s_real = 1.3
    for name, (f, _) in DIVERGENCES.items():
        shift = torch.tensor(c.shift, dtype=torch.float64, requires_grad=True)
        log_ratio = (n**2 - ((shift + n) / s_real) ** 2) / 2 - math.log(s_real)      # at x = shift + n, fake N(shift, 1)
        want = gradient(w @ f(log_ratio.exp()), shift, "the divergence")
        x = (shift + n).detach()
        h = tensor(student.f_weight(log_ratio.detach(), f, 0.0, math.inf), x.shape, "f_weight")
        close(w @ (h * (-n + x / s_real**2)), want, f"E[h (s_fake - s_real)] for {name}", rtol=1e-5, atol=1e-7,
              hint="with the right h it is the derivative of the divergence")


@A.check("A3.4", points=2)
def no_gradient_through_the_ratio(student, c):
    """The weight is a constant: no gradient flows into the critic through the ratio."""
    logits = leaf(c.noise(4))
    got = tensor(student.f_weight(logits, alpha_divergence(c.power)), (4,), "f_weight")
    holds(not got.requires_grad, "f_weight carries a graph: the generator would learn to change the weight instead of x")
    holds(logits.grad is None, "f_weight left a .grad on the logits")


@A.check("A3.4", points=6)
def weighted_gradient(student, c):
    """The gradient of the loss at x is DMD's, weighted per sample by h / mean(h), and nothing else gets one."""
    shape = (5, 1, c.side, c.side)
    x, d_real, d_fake, logits = (leaf(c.scale * c.noise(*s)) for s in (shape, shape, shape, (5,)))
    h = logits.detach().exp().clamp(c.low, c.high) ** c.power
    size = (x - d_real).detach().abs().flatten(1).mean(1)
    want = ((h / h.mean() / size)[:, None, None, None] * (d_fake - d_real)).detach() / x.numel()
    loss = student.f_distill_loss(x, d_real, d_fake, logits, alpha_divergence(c.power), c.low, c.high)
    tensor(loss, (), "f_distill_loss")
    got = torch.autograd.grad(loss, (x, d_real, d_fake, logits), allow_unused=True)
    holds(got[0] is not None, "no gradient of f_distill_loss reaches x")
    close(got[0], want, "the gradient of f_distill_loss at x", hint="one weight per sample, of mean 1 over the batch")
    holds(got[1:] == (None, None, None), "f_distill_loss sends a gradient into d_real, d_fake or the logits")


class Encoder(nn.Module):
    """A small fake score with features: tanh(x W / (1 + sigma) + embedding of the class)."""

    def __init__(self, c, pixels, width=4):
        super().__init__()
        self.weight, self.embed = nn.Parameter(0.5 * c.noise(width, pixels)), nn.Parameter(c.noise(3, width))
        self.embed.requires_grad_(False)                          # a part that was frozen before

    def features(self, x, sigma, cond=None):
        found = x.flatten(1) @ self.weight.T / (1 + sigma)[:, None]
        return (found if cond is None else found + self.embed[cond]).tanh()


class Head(nn.Module):
    def __init__(self, c, width=4):
        super().__init__()
        self.weight = nn.Parameter(2 * c.noise(width))

    def forward(self, features):
        return features @ self.weight


def game(c):
    """(fake, discriminator, z, theta, sigma, noise, cond); the generator is x = theta * z."""
    fake, head = Encoder(c, c.side**2), Head(c)
    z, noise = c.noise(c.size, 1, c.side, c.side), c.noise(c.size, 1, c.side, c.side)
    sigma = torch.linspace(c.sigmas[0], c.sigmas[1], c.size, dtype=torch.float64)
    return fake, head, z, torch.tensor(c.scale, dtype=torch.float64, requires_grad=True), sigma, noise, torch.arange(c.size) % 3


@A.check("A3.5", points=6)
def gan_reaches_the_generator(student, c):
    """The GAN term's value, and its gradient through the features into x and into the generator's weight."""
    fake, head, z, theta, sigma, noise, cond = game(c)
    for labels in (cond, None):
        flat = (theta * z + sigma[:, None, None, None] * noise).flatten(1) @ fake.weight.detach().T / (1 + sigma)[:, None]
        logits = (flat if labels is None else flat + fake.embed[labels]).tanh() @ head.weight.detach()
        want = (1 + (-logits).exp()).log().mean()
        got = student.gan_term(theta * z, sigma, noise, fake, head, labels)
        close(got, want.detach(), "gan_term", hint="xt = x + sigma noise, features and head, then the non-saturating loss")
        close(gradient(got, theta, "gan_term"), gradient(want, theta, ""), "the gradient of gan_term in the generator's weight",
              hint="it flows through the frozen network")


@A.check("A3.5", points=3)
def weights_take_nothing(student, c):
    """The GAN term leaves no gradient in the critic's weights, and their flags as they were, also after an error."""
    fake, head, z, theta, sigma, noise, cond = game(c)
    parameters = [*fake.parameters(), *head.parameters()]
    before = [p.requires_grad for p in parameters]
    head.weight.grad = torch.ones_like(head.weight)               # what a critic step may have left
    student.gan_term(theta * z, sigma, noise, fake, head, cond).backward()
    holds(fake.weight.grad is None and bool((head.weight.grad == 1).all()),
          "gan_term's backward changed a .grad of the critic: freeze the weights while the term is computed")
    holds([p.requires_grad for p in parameters] == before, "gan_term changed a requires_grad flag of the critic for good")
    try:
        student.gan_term(theta * z, sigma, noise, fake, head, cond + 100)            # no such class
    except IndexError:
        pass
    holds([p.requires_grad for p in parameters] == before, "after an error inside the network, gan_term leaves flags changed")


@A.check("A3.5", points=3)
def flags(student, c):
    """frozen: off inside, as before outside, for several modules with mixed flags and after an error."""
    modules = [Encoder(c, 4), Head(c), Head(c).requires_grad_(False)]
    parameters = [p for m in modules for p in m.parameters()]
    before = [p.requires_grad for p in parameters]
    with student.frozen(*modules):
        inside = [p.requires_grad for p in parameters]
    holds(not any(inside), "a weight still takes gradients inside frozen")
    holds([p.requires_grad for p in parameters] == before, "after frozen a flag is not what it was; some were off before")
    try:
        with student.frozen(*modules):
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    else:
        raise AssertionError("frozen swallowed the error of its block")
    holds([p.requires_grad for p in parameters] == before, "an error in the block leaves the weights frozen")


@A.check("A3.5", points=4)
def balanced(student, c):
    """The balance weight makes the gradient norms at x equal and leaves both terms usable."""
    base = leaf(c.noise(c.size, 1, c.side, c.side))
    x = c.scale * base
    reference, term = (x**2).mean() / c.ratio, x.sin().sum() * c.ratio
    w = student.balance(reference, term, x)
    holds(not (isinstance(w, torch.Tensor) and w.requires_grad), "the balance weight carries a graph; it is a constant")
    holds(base.grad is None, "balance left a .grad behind: it asks for gradients, it does not accumulate them")
    a, b = 2 * x.detach() / x.numel() / c.ratio, x.detach().cos() * c.ratio
    close(w, a.square().sum().sqrt() / b.square().sum().sqrt(), "balance", hint="w times the norm of term's gradient = the norm "
          "of reference's; one L2 norm over the whole batch")
    total = gradient(reference + float(w) * term, base, "reference + w term")
    close(total, c.scale * (a + float(w) * b), "the gradient of reference + w term")


@A.check("A3.5", points=2)
def limited(student, c):
    """The balance weight stays below its limit when the critic is nearly or exactly flat."""
    x = leaf(c.noise(4, 3))
    for size, limit in ((1e-9, 10 * c.ratio), (0.0, c.ratio)):
        close(student.balance((x**2).sum(), size * x.sum(), x, limit), limit, f"balance against a gradient of size {size:g}")


def settles(weight, teacher, data):
    """Where KL(generator | teacher) + weight * GAN leaves the share of mode one, by integration and bisection.

    Modes N(1, .1^2) and N(-1, .1^2).  d/dshare of the mean of a function over the generator's samples is the difference
    of its means over the two modes; the critic is optimal and stands still, as in a generator step.
    """
    grid = torch.linspace(-1.9, 1.9, 4001, dtype=torch.float64)
    one, two = ((-(grid - m) ** 2 / 0.02).exp() / (0.1 * math.sqrt(2 * math.pi)) for m in (1, -1))

    def slope(share):
        q, t, d = (s * one + (1 - s) * two for s in (share, teacher, data))
        per_sample = (q / t).log() + weight * F.softplus((q / d).log())
        return torch.trapezoid((one - two) * per_sample, grid)

    low, high = 1e-6, 1 - 1e-6
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return low


@A.check("A3.5", points=7)
def half_way(student, c):
    """Trained with the predicted weight, a generator of two modes ends half-way between teacher and data."""
    for teacher, data in ((c.teacher, c.data), (1 - c.teacher, 1 - c.data)):
        w = number(student.halving_weight(teacher, data), "halving_weight")
        holds(w > 0, f"halving_weight is {w:.4g}: a weight is positive, whichever of teacher and data is larger")
        close(settles(w, teacher, data), (teacher + data) / 2, f"with weight {w:.4g}, teacher {teacher:.3f} and data {data:.3f} "
              "the measured share of mode one", rtol=1e-5,
              hint="the critic stands still in the generator's step; set the sum of both slopes to 0")

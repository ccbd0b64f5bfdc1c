"""The checks of A2.  Every want below is a closed form, an exact expectation or an explicit loop, never the solution's way."""

import math
from itertools import zip_longest

import torch
from torch import nn

from nano_dmd.noise import add_noise, expand
from nano_dmd.denoiser import EDM, edm_loss
from toy.mixtures import Mixture
from tutorials.assignments.checking import Assignment, close, gradient, holds, tensor


def constants(rng):
    return dict(
        sigma_data=round(rng.uniform(0.3, 0.9), 3),
        a=round(rng.uniform(0.5, 2.0), 3),
        levels=[round(math.exp(rng.uniform(-2.5, 2.0)), 3) for _ in range(5)],
        shape=(rng.randint(1, 3), rng.randint(2, 4), rng.randint(2, 4)),
        n=rng.randint(5, 30),
        critic_steps=rng.randint(2, 5),
        lr_critic=round(rng.uniform(0.05, 0.2), 3),
        lr_generator=round(rng.uniform(0.05, 0.2), 3),
        std=round(rng.uniform(0.4, 1.5), 3),
        dim=rng.randint(2, 60),
        k=round(rng.uniform(0.01, 0.08), 4),
        h=round(rng.uniform(0.1, 0.5), 4),
        velocity=round(rng.uniform(0.5, 3.0), 3),
        updates=rng.randint(3, 9),
        half_life=rng.randint(200, 900),
        batches=[rng.randint(20, 300) for _ in range(6)],
    )


A = Assignment("a2", "Fake score, TTUR and the train step", constants, {
    "A2.1": "the weight a critic is trained with",
    "A2.2": "the best critic with one parameter",
    "A2.3": "the train step",
    "A2.4": "a critic that runs after its generator",
    "A2.5": "an average that owes nothing to its start",
})


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


# A2.1


def images(c):
    """x, noise (B, *S), sigma (B,), cond (B,) with as many images as levels."""
    sigma = doubles(c.levels)
    return 0.5 * c.noise(len(sigma), *c.shape), c.noise(len(sigma), *c.shape), sigma, torch.arange(len(sigma)) % 3


def same_loss(student, c, kind, to_x, target):
    """weight * (output - target)^2 has to be EDM's weighted (to_x(output) - x)^2, whatever the output."""
    x, noise, sigma, _ = images(c)
    s, xt, output = expand(sigma, x), add_noise(x, sigma, noise), c.noise(*x.shape)
    weight = tensor(student.output_weight(kind, sigma, c.sigma_data), sigma.shape, f"output_weight({kind!r})")
    want = edm_loss(lambda xt, sigma, cond: to_x(output, xt, s), x, sigma, noise, sigma_data=c.sigma_data)
    close(expand(weight, x) * (output - target(x, noise, s)) ** 2, want, f"the weighted loss on {kind}", rtol=1e-9,
          hint="an error in the output is how large an error in D? The loss is quadratic in it")


@A.check("A2.1", points=4)
def eps_weight(student, c):
    """output_weight: squared errors on x and on the noise, weighted, are EDM's loss."""
    same_loss(student, c, "x0", lambda d, xt, s: d, lambda x, noise, s: x)
    same_loss(student, c, "eps", lambda eps, xt, s: xt - s * eps, lambda x, noise, s: noise)


@A.check("A2.1", points=4)
def v_weight(student, c):
    """output_weight: squared errors on v, weighted, are EDM's loss."""
    norm = lambda s: (1 + s**2).sqrt()  # noqa: E731
    same_loss(student, c, "v", lambda v, xt, s: (xt / norm(s) - s * v) / norm(s), lambda x, noise, s: (noise - s * x) / norm(s))


@A.check("A2.1", points=2)
def edm_weight(student, c):
    """output_weight: squared errors on EDM's F, weighted, are EDM's loss."""
    def run(f, xt, s):
        return EDM(lambda x, c_noise, cond: f, c.sigma_data)(xt, s.flatten())

    def target(x, noise, s):                                      # D is affine in F, so two values of F tell the F that gives x
        xt, one = x + s * noise, torch.ones_like(x)
        zero = run(0 * one, xt, s)
        return (x - zero) / (run(one, xt, s) - zero)

    same_loss(student, c, "edm", run, target)


class VNet(nn.Module):
    """A v-prediction network that feels the size of its input, sigma and the class, and keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.scale, self.table = nn.Parameter(doubles(0.7)), nn.Parameter(doubles([0.1, -0.4, 0.6]))
        self.noise = nn.Parameter(doubles(0.2))

    def forward(self, x, sigma, cond=None):
        holds(tuple(sigma.shape) == tuple(x.shape[:1]), "the network wants sigma of shape (B,), one number per sample")
        holds(cond is not None, "the network was not told the class: pass cond on")
        self.input = x.detach()
        return self.scale * x.tanh() + expand(self.table[cond] + self.noise * sigma.log(), x)

    def denoise(self, xt, sigma, cond=None):
        """The same network as a Denoiser."""
        norm = expand((1 + sigma**2).sqrt(), xt)
        return (xt / norm - expand(sigma, xt) * self(xt / norm, sigma, cond)) / norm


@A.check("A2.1", points=5)
def v_loss(student, c):
    """v_critic_loss: its value is EDM's loss of the network's Denoiser, images and classes included."""
    (x, noise, sigma, cond), net = images(c), VNet()
    got = student.v_critic_loss(net, x, sigma, noise, cond, c.sigma_data)
    tensor(got, (), "v_critic_loss")
    close(net.input, add_noise(x, sigma, noise) / expand((1 + sigma**2).sqrt(), x), "the network's input",
          hint="it wants xt / sqrt(1 + sigma^2)")
    close(got, edm_loss(net.denoise, x, sigma, noise, cond, c.sigma_data).mean(), "v_critic_loss", rtol=1e-9,
          hint="each sample has its own weight and its own target v; then a mean over everything")


@A.check("A2.1", points=5)
def v_loss_gradients(student, c):
    """v_critic_loss: the network's gradients are those of EDM's loss, and the samples get none."""
    (x, noise, sigma, cond), net = images(c), VNet()
    x.requires_grad_()
    weights = list(net.parameters())
    found = torch.autograd.grad(student.v_critic_loss(net, x, sigma, noise, cond, c.sigma_data), [*weights, x], allow_unused=True)
    want = torch.autograd.grad(edm_loss(net.denoise, x.detach(), sigma, noise, cond, c.sigma_data).mean(), weights)
    for got, exact in zip(found, want):
        holds(got is not None, "no gradient reaches the network's weights")
        close(got, exact, "a gradient of the network", rtol=1e-8)
    holds(found[-1] is None or not found[-1].any(), "a gradient reaches the samples x: the critic would push its generator; "
          "where does x enter, in xt and where else?")


# A2.2


def exact_design(a, sigma):
    """x, xt (4 L, 1) and the level of each: signs instead of normal draws have the same second moments, without error."""
    z, noise = doubles([1, 1, -1, -1])[:, None], doubles([1, -1, 1, -1])[:, None]
    level = torch.arange(len(sigma)).repeat_interleave(4)
    x = a * z.repeat(len(sigma), 1)
    return x, x + sigma[level, None] * noise.repeat(len(sigma), 1), level


def slope_of_loss(f, x, xt, weight):
    """d/df of the mean weighted loss, and the size of the two terms that cancel in it at the best f."""
    f = doubles(float(f)).requires_grad_()
    loss = (expand(weight, x) * (f * xt - x) ** 2).mean()
    return gradient(loss, f, "the loss"), 2 * (expand(weight, x) * x * xt).mean().abs()


@A.check("A2.2", points=5)
def fit(student, c):
    """fit_linear: nothing is left of the loss's slope at f, with a weight per image."""
    sigma = doubles(c.levels)
    x = c.a * c.noise(len(sigma), *c.shape)
    xt, weight = add_noise(x, sigma, c.noise(*x.shape)), 1 / sigma**2 + 1 / c.sigma_data**2
    f = tensor(student.fit_linear(x, xt, weight), (), "fit_linear")
    slope, size = slope_of_loss(f, x, xt, weight)
    holds(slope.abs() < 1e-9 * size, f"at your f = {f.item():.5g} the loss still has slope {slope.item():.3g}: set the "
          "derivative of the weighted sum to zero; is every image weighted by its own number?")
    close(student.fit_linear(x, xt, 7 * weight), f, "fit_linear with all weights times 7",
          hint="the scale of the weights must not matter")


@A.check("A2.2", points=5)
def population(student, c):
    """best_linear: the exact denoiser where there is one level; the best compromise between several."""
    sigma, weight = doubles(c.levels), 1 / doubles(c.levels) ** 2 + 1 / c.sigma_data**2
    exact = Mixture([[0.0]], std=c.a).to(torch.float64)
    one, point = sigma[:1], doubles([[1.7]])
    f = student.best_linear(c.a, one, weight[:1])
    close(tensor(f, (), "best_linear") * point, exact.denoise(point, one), "D(1.7) at one level", rtol=1e-5)
    f = student.best_linear(c.a, sigma, weight)
    x, xt, level = exact_design(c.a, sigma)
    slope, size = slope_of_loss(tensor(f, (), "best_linear"), x, xt, weight[level])
    holds(slope.abs() < 1e-9 * size, f"{len(sigma)} levels: at your f = {float(f):.5g} the expected loss still has slope "
          f"{slope.item():.3g}; the best f is not an average of the levels' own best f")


def mean_inverse_chi2(n):
    """E[1 / S] of a chi-squared S with n > 2 degrees of freedom, by quadrature in log S."""
    t = torch.linspace(-30, 8, 200_001, dtype=torch.float64)
    log_density = n / 2 * t - t.exp() / 2                         # of log S, up to a constant
    p = (log_density - log_density.max()).exp()
    return ((p * (-t).exp()).sum() / p.sum()).item()


@A.check("A2.2", points=5)
def spread(student, c):
    """fit_spread: f scatters from batch to batch by the noise left in x given xt, over the sum of xt^2."""
    for n in (c.n, 5):
        f = c.a**2 / (c.a**2 + c.levels[0] ** 2)
        left = c.a**2 * (1 - f)                                   # variance of x given xt
        want = math.sqrt(left / (c.a**2 + c.levels[0] ** 2) * mean_inverse_chi2(n))
        close(student.fit_spread(c.a, c.levels[0], n), want, f"fit_spread with n = {n}", rtol=1e-5,
              hint="Var f = Var(x | xt) E[1 / sum xt^2], and E[1 / chi^2_n] = 1 / (n - 2)")


# A2.3


class Scale(nn.Module):
    """generator: x = a z, counting its calls."""

    def __init__(self, a):
        super().__init__()
        self.a, self.calls = nn.Parameter(doubles(a)), 0

    def forward(self, z):
        self.calls += 1
        return self.a * z


class Linear(nn.Module):
    """critic: D = f x, with one weight that is frozen for good."""

    def __init__(self, f):
        super().__init__()
        self.f, self.constant = nn.Parameter(doubles(f)), nn.Parameter(doubles(1.0), requires_grad=False)

    def forward(self, x):
        return self.f * self.constant * x


class Descent:
    """What torch.optim.SGD does, without the second that its import takes; notes each step."""

    def __init__(self, weights, lr, note):
        self.param_groups, self.note = [dict(params=weights, lr=lr)], note

    def zero_grad(self, set_to_none=True):
        for p in self.param_groups[0]["params"]:
            p.grad = None if set_to_none else torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        self.note()
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.sub_(self.param_groups[0]["lr"] * p.grad)


class Bench:
    """A tiny problem whose two losses look at what they are given, and write down what happens in which order.

    critic loss (f - goal)^2 a^2 mean z^2 / 2; generator loss f^2 a^2 mean z^2 / 2.
    """

    goal = 0.3

    def __init__(self, c, look=lambda event, bench, x: None, critic_steps=None):
        self.generator, self.critic, self.look = Scale(c.a), Linear(c.std), look
        self.events, self.zs, self.n = [], [], critic_steps or c.critic_steps
        self.opts = {"critic": Descent([self.critic.f], c.lr_critic, lambda: self.events.append("critic update")),
                     "generator": Descent([self.generator.a], c.lr_generator, lambda: self.events.append("generator update"))}

    def draw(self):
        self.zs.append((1 + 0.2 * len(self.zs)) * doubles([[1.0], [-1.0], [0.5]]))
        return self.zs[-1]

    def critic_loss(self, x, critic):
        self.events.append("critic loss")
        self.look("critic loss", self, x)
        return ((critic(x) - self.goal * x) ** 2).mean() / 2

    def generator_loss(self, x, critic):
        self.events.append("generator loss")
        self.look("generator loss", self, x)
        return (critic(x) ** 2).mean() / 2

    def step(self, student):
        return student.train_step(self.generator, self.critic, self.opts, self.draw, self.critic_loss, self.generator_loss,
                                  self.n)


def which(x, bench):
    """The number of the draw that x was made from by the present generator."""
    return next((i for i, z in enumerate(bench.zs) if x.shape == z.shape and torch.equal(x, bench.generator.a * z)), None)


@A.check("A2.3", points=5)
def order(student, c):
    """train_step: n critic updates, then one generator update; one draw and one generator call for each."""
    for n in (c.critic_steps, 1):
        bench = Bench(c, critic_steps=n)
        bench.step(student)
        want = ["critic loss", "critic update"] * n + ["generator loss", "generator update"]
        for i, (event, right) in enumerate(zip_longest(bench.events, want, fillvalue="nothing"), 1):
            holds(event == right, f"with critic_steps {n}, event {i} of {len(want)} should be '{right}' and was '{event}'")
        holds(len(bench.zs) == n + 1, f"{n + 1} updates draw {n + 1} times, yours drew {len(bench.zs)} times")
        holds(bench.generator.calls == n + 1, f"{n + 1} updates need {n + 1} generator calls, yours made "
              f"{bench.generator.calls}")


@A.check("A2.3", points=5)
def critic_updates(student, c):
    """train_step: the critic learns from fresh samples without a graph."""
    used = []

    def look(event, bench, x):
        if event == "critic loss":
            holds(not x.requires_grad, "critic_loss was given samples with a graph: a critic update must not reach the generator")
            holds(bench.critic.f.requires_grad, "the critic's weights do not require grad while it should learn")
            used.append(which(x, bench))

    bench = Bench(c, look)
    bench.step(student)
    bench.step(student)
    holds(len(used) == 2 * bench.n, f"{bench.n} critic updates per step asked for critic_loss {len(used)} times in two steps")
    holds(None not in used, "critic_loss was given something else than generator(draw()) of the present generator")
    holds(len(set(used)) == len(used), "two critic updates saw the same samples: draw afresh for each")


@A.check("A2.3", points=5)
def generator_update(student, c):
    """train_step: the generator learns through a critic whose weights are frozen, from a draw of its own."""
    seen = {}

    def look(event, bench, x):
        if event == "critic loss":
            seen["critic"] = which(x, bench)
            return
        holds(x.requires_grad, "generator_loss was given samples without a graph: nothing could reach the generator")
        free = [name for name, p in bench.critic.named_parameters() if p.requires_grad]
        holds(not free, f"the critic's weight {', '.join(free)} requires grad in the generator's update: it would collect a "
              "gradient that pulls the critic the generator's way")
        through = gradient(bench.critic(x), x, "critic(x)")
        close(through, (bench.critic.f * bench.critic.constant).expand(x.shape), "d critic(x) / dx",
              hint="frozen weights are not no_grad: the gradient has to flow through")
        holds(which(x.detach(), bench) not in (None, seen.get("critic")), "the generator's update should see generator(draw()) "
              "of a fresh draw, not the critic's last samples")
        seen["generator"] = True

    Bench(c, look).step(student)
    holds("generator" in seen, "generator_loss was never asked for")


@A.check("A2.3", points=5)
def closed_form(student, c):
    """train_step: two steps of plain descent land where pencil and paper do, whatever .grad held before, and say so."""
    bench = Bench(c)
    for p in (bench.generator.a, bench.critic.f):
        p.grad = torch.full_like(p, 5.0)
    a, f, count = c.a, c.std, 0
    for number in (1, 2):
        report = bench.step(student)
        losses = []
        for i in range(c.critic_steps + 1):
            power = (1 + 0.2 * count) ** 2 * (1 + 1 + 0.25) / 3   # mean z^2 of this draw
            count += 1
            if i < c.critic_steps:
                losses.append((f - bench.goal) ** 2 * a**2 * power / 2)
                f -= c.lr_critic * (f - bench.goal) * a**2 * power
            else:
                losses.append(f**2 * a**2 * power / 2)
                a -= c.lr_generator * f**2 * a * power
        close(bench.critic.f, f, f"the critic's weight after step {number}", rtol=1e-9,
              hint="an update: zero gradients, whoever left some, one loss, one step; the generator's loss leaves it none")
        close(bench.generator.a, a, f"the generator's weight after step {number}", rtol=1e-9,
              hint="an update starts from zero gradients, and the generator sees the critic after all of its updates")
        holds(isinstance(report, dict) and set(report) == {"critic", "generator"},
              "train_step should return {'critic': [float, ...], 'generator': float}")
        values = [*report["critic"], report["generator"]]
        holds(all(isinstance(v, float) for v in values), "the losses returned should be floats: a tensor keeps its graph alive")
        close(doubles(values), doubles(losses), f"a loss returned by step {number}", rtol=1e-9,
              hint="one per update, in order, its value before its update")


@A.check("A2.3", points=5)
def as_found(student, c):
    """train_step: weights require grad where they did before, and what was frozen for good stays so throughout."""
    def look(event, bench, x):
        holds(not bench.critic.constant.requires_grad, f"a weight that was frozen for good requires grad at a {event}: thaw only "
              "what you froze")

    bench = Bench(c, look)
    for number in (1, 2):
        bench.step(student)
        look("step's end", bench, None)
        holds(bench.critic.f.requires_grad, "the critic's trainable weights stay frozen after the step: leave them as you found "
              "them")
        holds(bench.generator.a.requires_grad, "the generator's weights are frozen after the step")


# A2.4


@A.check("A2.4", points=7)
def rate(student, c):
    """critic_rate: it is the share of the gap that one descent step on the exact loss closes."""
    sigma = doubles(c.levels)
    weight = 1 / sigma**2 + 1 / c.sigma_data**2
    mean, critic = c.noise(c.dim), c.noise(c.dim).requires_grad_()
    x, xt, level = exact_design(c.std, sigma)
    s = sigma[level, None]
    x, xt, r = mean + x, mean + xt, c.std**2 / (c.std**2 + s**2)
    loss = (weight[level, None] * (critic + r * (xt - critic) - x) ** 2).mean()
    left = (critic - c.lr_critic * gradient(loss, critic, "the loss") - mean) / (critic - mean)
    close(student.critic_rate(c.lr_critic, sigma, c.std, weight, c.dim), 1 - left.detach()[0], "critic_rate",
          hint="c enters D with the factor 1 - r; the error D - x has c in it too; the loss is a mean over everything")


@A.check("A2.4", points=6)
def lag(student, c):
    """steady_lag: it is where the lag of an explicit loop settles."""
    for n in (1, c.critic_steps):
        m, critic = 0.0, 0.0
        for _ in range(6000):
            m += c.velocity
            for _ in range(n):
                critic += c.k * (m - critic)
        close(student.steady_lag(c.velocity, c.k, n), m - critic, f"steady_lag with {n} critic updates", rtol=1e-7,
              hint="the lag settles where one step, critic's and generator's part, leaves it as it is; look before m moves")


def one_step(m, critic, h, k, n):
    for _ in range(n):
        critic -= k * (critic - m)
    return m - h * critic, critic


def chase(h, k, n):
    """The 2x2 matrix of one step on (m - goal, c - goal), from what a step makes of the two unit vectors."""
    return doubles([one_step(1.0, 0.0, h, k, n), one_step(0.0, 1.0, h, k, n)]).T


def discriminant(h, k, n):
    matrix = chase(h, k, n)
    return (matrix.trace() ** 2 - 4 * matrix.det()).item()


@A.check("A2.4", points=7)
def chasing(student, c):
    """swing: decay and period are those of the step's matrix, where it oscillates and where it does not."""
    for n in (1, c.critic_steps, 600):
        values = torch.linalg.eigvals(chase(c.h, c.k, n))
        decay, period = student.swing(c.h, c.k, n)
        close(decay, values.abs().max(), f"the decay with {n} critic updates", rtol=1e-6,
              hint="what is the determinant of one step? If the eigenvalues are real, the larger one stays")
        if discriminant(c.h, c.k, n) < 0:
            close(period, 2 * math.pi / values.angle().abs().max(), f"the period with {n} critic updates", rtol=1e-6,
                  hint="a complex eigenvalue turns by its angle in each step")
        else:
            holds(period == math.inf, f"with {n} critic updates both eigenvalues are real: the period is math.inf, not {period}")


@A.check("A2.4", points=5)
def fewest(student, c):
    """fewest_updates: no oscillation there, and still one with an update less."""
    for h, k in ((c.h, c.k), (c.h / 2, 2 * c.k), ((1 + c.h) / 2, c.k / 10)):
        n = student.fewest_updates(h, k)
        holds(isinstance(n, int) and n >= 1, f"fewest_updates should be an int of at least 1, got {n!r}")
        holds(discriminant(h, k, n) >= 0, f"with {n} critic updates (h = {h:.4g}, k = {k:.4g}) the pair still oscillates")
        holds(n == 1 or discriminant(h, k, n - 1) < 0, f"{n - 1} critic updates are enough already (h = {h:.4g}, k = {k:.4g})")


# A2.5


def shares(batches, half_life):
    """What each update should have in the average: the integral of 2^(-age / half_life) over its images, by midpoints."""
    later = [sum(batches[i + 1:]) for i in range(len(batches))]
    parts = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    worth = torch.stack([b * (0.5 ** ((age + b * parts) / half_life)).mean() for age, b in zip(later, batches)])
    return worth / worth.sum()


@A.check("A2.5", points=5)
def weights(student, c):
    """ema_weight: repeated with batches of different size, each update's share is what its images count."""
    share, seen = doubles([0.0] * len(c.batches)), 0
    for i, batch in enumerate(c.batches):
        seen += batch
        weight = float(student.ema_weight(batch, seen, c.half_life))
        holds(i > 0 or abs(weight - 1) < 1e-12, f"the first update's weight is {weight:.6g}: the start is no image of the "
              "generator and should be forgotten at once")
        share = (1 - weight) * share
        share[i] += weight
    close(share, shares(c.batches, c.half_life), "an update's share of the average", rtol=1e-5,
          hint="integrate 2^(-age / half_life) over the batch, and divide by the integral over all images seen")


class Small(nn.Module):
    """Two weights, a buffer of floats and one of integers."""

    def __init__(self, number):
        super().__init__()
        self.weight = nn.Parameter(doubles([number, -number]))
        self.bias = nn.Parameter(doubles(3 * number))
        self.register_buffer("mean", doubles([number + 1]))
        self.register_buffer("count", torch.tensor(int(10 * number)))


@A.check("A2.5", points=5, writes=True)
def module_average(student, c):
    """update_average: parameters move in place by the weight, buffers are copied, net stays, no graph."""
    average, seen, kept = Small(9.0), 0, doubles([0.0] * len(c.batches))
    before = list(average.parameters())
    for i, batch in enumerate(c.batches, 1):
        net, seen = Small(float(i)), seen + batch
        student.update_average(average, net, batch, seen, c.half_life)
        close(net.weight, doubles([i, -i]), "net's weight afterwards", hint="only the average moves")
        kept[i - 1] = i
        want = (shares(c.batches[:i], c.half_life) * kept[:i]).sum()
        close(average.weight, torch.stack([want, -want]), f"average.weight after {i} updates", rtol=1e-5)
        close(average.bias, 3 * want, f"average.bias after {i} updates", rtol=1e-5)
        close(average.mean, doubles([i + 1.0]), f"the buffer average.mean after {i} updates", hint="buffers are copied")
        holds(int(average.count) == 10 * i, "an integer buffer of the average is not net's: buffers are copied")
    holds(all(p is q for p, q in zip(before, average.parameters())), "the average's parameters were replaced: move them in place")
    holds(all(p.requires_grad and p.is_leaf for p in average.parameters()),
          "the average carries a graph, or its weights no longer require grad")


@A.check("A2.5", points=5)
def age(student, c):
    """average_age: early and late, it is the mean over the updates in the average of the images seen since."""
    batch = c.batches[0]
    for updates in (1, 2, c.updates, 100):
        share = shares([batch] * updates, c.half_life)
        ages = batch * torch.arange(updates - 1, -1, -1, dtype=torch.float64)
        close(student.average_age(batch, updates, c.half_life), (share * ages).sum(), f"average_age after {updates} updates",
              rtol=1e-5, hint="sum the ages 0, batch, 2 batch ... each times its share: a geometric series that ends")

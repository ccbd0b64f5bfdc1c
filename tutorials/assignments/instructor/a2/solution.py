"""A2: fake score, TTUR and the train step.  Write what raises NotImplementedError; README.md has the maths.

Vocabulary as in nano_dmd: x clean (B, *S), xt = x + sigma noise, sigma (B,), d = D(xt, sigma) an x0-prediction.
"""

import math

import torch

from nano_dmd.noise import add_noise, expand

# A2.1 One loss, four things a network may predict


def output_weight(kind, sigma, sigma_data):
    """Weight (B,) on a network's own squared error (prediction - target)^2 that makes it EDM's weighted x0 loss.

        EDM's:  (1/sigma^2 + 1/sigma_data^2) (D(xt) - x)^2         (EDM eq. 8)

    kind   "x0"   the network predicts x itself
           "eps"  it predicts noise,  D = xt - sigma eps
           "v"    it predicts v = (noise - sigma x) / norm,  D = (xt / norm - sigma v) / norm,  norm = sqrt(1 + sigma^2)
           "edm"  it is the F of EDM's table 1,  D = c_skip xt + c_out F,  c_out = sigma sigma_data / sqrt(sigma^2 + sigma_data^2)
    sigma  (B,) > 0        sigma_data  float
    """
    ### BEGIN SOLUTION A2.1
    slope = {                                                     # |dD / d output|: the error in x per error in the output
        "x0": torch.ones_like(sigma),
        "eps": sigma,
        "v": sigma / (1 + sigma**2).sqrt(),
        "edm": sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt(),
    }[kind]
    return slope**2 * (1 / sigma**2 + 1 / sigma_data**2)          # eps: 1 + (sigma/sd)^2; edm: 1; v: 1 if sigma_data = 1
    ### END SOLUTION


def v_critic_loss(net, x, sigma, noise, cond, sigma_data):
    """Denoising loss (scalar, mean over everything) of a v-predicting critic, equal to EDM's loss of its Denoiser.

    net         net(x_vp, sigma, cond) -> v (B, *S),  x_vp = xt / sqrt(1 + sigma^2)
    x           (B, *S) generated samples: they may carry the generator's graph, and no gradient may reach it
    sigma (B,), noise (B, *S), cond None | (B,), sigma_data float
    Compute the error on v itself: going through D loses digits at small sigma.
    """
    ### BEGIN SOLUTION A2.1
    x, s = x.detach(), expand(sigma, x)
    norm = (1 + s**2).sqrt()
    v = net(add_noise(x, sigma, noise) / norm, sigma, cond)
    target = (noise - s * x) / norm
    return (expand(output_weight("v", sigma, sigma_data), x) * (v - target) ** 2).mean()
    ### END SOLUTION


# A2.2 The best critic with one parameter: D(xt) = f xt


def fit_linear(x, xt, weight):
    """The f (scalar tensor) that minimises the mean of weight_i (f xt_i - x_i)^2 over a batch.

    x, xt (B, *S); weight (B,), one number per sample, not necessarily normalised
    """
    ### BEGIN SOLUTION A2.2
    w = expand(weight, x)
    return (w * x * xt).sum() / (w * xt**2).sum()
    ### END SOLUTION


def best_linear(a, sigma, weight):
    """What fit_linear tends to on infinitely many samples x = a z, z unit normal, sigma drawn from L equally likely levels.

    a float; sigma, weight (L,), weight[i] belongs to sigma[i]; returns the one f (scalar tensor) that serves all levels.
    """
    ### BEGIN SOLUTION A2.2
    return (weight * a**2).sum() / (weight * (a**2 + sigma**2)).sum()
    ### END SOLUTION


def fit_spread(a, sigma, n):
    """Standard deviation (float) of fit_linear's f from batch to batch: n > 2 numbers in a batch, x = a z, one level sigma."""
    ### BEGIN SOLUTION A2.2
    f = a**2 / (a**2 + sigma**2)
    return math.sqrt(f * (1 - f) / (n - 2))
    ### END SOLUTION


# A2.3 The train step


def train_step(generator, critic, opts, draw, critic_loss, generator_loss, critic_steps):
    """critic_steps critic updates, then one generator update.  Returns {"critic": [float, ...], "generator": float}.

    generator       module, generator(z) -> x            critic  module; some of its weights may be frozen for good
    opts            {"critic": optimiser, "generator": optimiser}; an update is one backward and one opts[...].step()
    draw            draw() -> z, different each time; every update draws afresh, so critic_steps + 1 draws
    critic_loss     critic_loss(x, critic) -> scalar, wants x without a graph
    generator_loss  generator_loss(x, critic) -> scalar, differentiable in x, also through critic

    Every update starts from zero gradients, whatever the step found in .grad.  In a critic update no gradient reaches
    the generator.  In the generator's update no weight of the critic requires grad, and a gradient still flows
    through the critic into x.  Afterwards each weight requires grad exactly where it did before the step.
    Returned is the value of each loss before its update, the critic's in order.
    """
    ### BEGIN SOLUTION A2.3
    def update(which, loss):
        opts[which].zero_grad()
        loss.backward()
        opts[which].step()
        return loss.item()

    losses = []
    for _ in range(critic_steps):
        with torch.no_grad():
            x = generator(draw())
        losses.append(update("critic", critic_loss(x, critic)))

    trainable = [p for p in critic.parameters() if p.requires_grad]                   # not those frozen for good
    for p in trainable:
        p.requires_grad_(False)
    moved = update("generator", generator_loss(generator(draw()), critic))
    for p in trainable:
        p.requires_grad_(True)
    return {"critic": losses, "generator": moved}
    ### END SOLUTION


# A2.4 A critic that runs after its generator


def critic_rate(lr, sigma, std, weight, dim):
    """Share k (float) of the gap c - m that one gradient descent step of the critic closes:  c - m  ->  (1 - k) (c - m).

    The generator makes x ~ N(m, std^2 I) in dim dimensions, the critic is right about std and has one parameter c (dim,):
        D(xt) = c + r (xt - c),  r = std^2 / (std^2 + sigma^2);  loss = mean over everything of weight (D(xt) - x)^2
    lr float; sigma, weight (L,): L equally likely noise levels and their weights.  Infinitely many samples, plain descent.
    """
    ### BEGIN SOLUTION A2.4
    keep = sigma**2 / (std**2 + sigma**2)                         # 1 - r;  E[D - x] = (1 - r) (c - m),  dD / dc = 1 - r
    return (2 * lr / dim * (weight * keep**2).mean()).item()
    ### END SOLUTION


def steady_lag(velocity, k, n):
    """What the lag m - c settles at (float), seen by the generator: after the critic's n updates, before m moves on.

    Each step: n critic updates, c - m -> (1 - k) (c - m) each; then m -> m + velocity.
    """
    ### BEGIN SOLUTION A2.4
    q = (1 - k) ** n                                              # lag -> q (lag + velocity)
    return velocity * q / (1 - q)
    ### END SOLUTION


def swing(h, k, n):
    """(decay, period) of generator and critic chasing each other; floats, period in steps, math.inf without oscillation.

    Each step: n critic updates as above; then m -> m - h (c - goal).  The distance from rest shrinks by the
    factor decay per step in the long run (of two real factors, the larger one).  0 < h < 1, 0 < k < 1.
    """
    ### BEGIN SOLUTION A2.4
    q = (1 - k) ** n
    half = (1 + q - h * (1 - q)) / 2                              # eigenvalues: l^2 - 2 half l + q = 0
    if half**2 >= q:
        return half + math.sqrt(half**2 - q), math.inf
    return math.sqrt(q), 2 * math.pi / math.acos(half / math.sqrt(q))
    ### END SOLUTION


def fewest_updates(h, k):
    """The smallest number n (int) of critic updates per generator update at which nothing oscillates.  0 < h, k < 1."""
    ### BEGIN SOLUTION A2.4
    return math.ceil(4 * math.atanh(h) / -math.log1p(-k))         # sqrt(q) <= (1 - h) / (1 + h); small h, k: n k = 4 h
    ### END SOLUTION


# A2.5 An average that owes nothing to its start


def ema_weight(batch, seen, half_life):
    """Weight (float) of the newest weights in the update  average <- (1 - weight) average + weight newest.

    Every image counts 2^(-age / half_life), age = how many images came after it, as an integral over the age; an
    update counts what its images count, and the average divides by what all images so far count.
    batch  images of this update        seen  images of all updates so far, this one included        half_life  images
    """
    ### BEGIN SOLUTION A2.5
    return (1 - 0.5 ** (batch / half_life)) / (1 - 0.5 ** (seen / half_life))
    ### END SOLUTION


def update_average(average, net, batch, seen, half_life):
    """Move the module average towards net in place: parameters by ema_weight, buffers copied.  Nothing is returned.

    Differs from nano_dmd.generator.update_ema: no ramp but the division above, images instead of steps, and buffers.
    """
    ### BEGIN SOLUTION A2.5
    weight = ema_weight(batch, seen, half_life)
    with torch.no_grad():
        for slow, fast in zip(average.parameters(), net.parameters()):
            slow.lerp_(fast, weight)
        for slow, fast in zip(average.buffers(), net.buffers()):
            slow.copy_(fast)
    ### END SOLUTION


def average_age(batch, updates, half_life):
    """Mean age in images (float) of the weights in the average after so many updates of equal batches.

    The weights of an update are as old as the number of images seen since that update: those of the newest have age 0.
    A generator whose weights move by v per image is v times this age ahead of its average: a lag, as in A2.4.
    """
    ### BEGIN SOLUTION A2.5
    b = 0.5 ** (batch / half_life)
    return batch * (b / (1 - b) - updates * b**updates / (1 - b**updates))
    ### END SOLUTION

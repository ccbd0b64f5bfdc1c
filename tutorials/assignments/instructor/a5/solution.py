"""A5: backward simulation for k steps.  Write what raises NotImplementedError; README.md has the maths.

Vocabulary as in nano_dmd: x clean (B, *S), z (k, B, *S) unit noise, one slice per step, sigma (B,), cond None | (B,).
Steps count from 0; step 0 starts from noise alone.
"""

import math

import torch

from nano_dmd.noise import add_noise, expand

# A5.1 A few-step generator in flow-matching coordinates:  xt = (1 - t) x + t z,  the network predicts z - x


def from_flow(net, x, sigma, cond=None):
    """D(x, sigma) (B, *S) of a flow network: what nano_dmd calls a Denoiser.

    x (B, *S) is clean + sigma noise, sigma (B,) > 0; net(xt, t, cond) -> velocity (B, *S) at xt = (1 - t) clean + t noise,
    t (B,).  Find the t at which a multiple of x is such an xt.
    """
    ### BEGIN SOLUTION A5.1
    t = sigma / (1 + sigma)                                       # sigma = t / (1 - t)
    xt = x / expand(1 + sigma, x)                                 # 1 - t = 1 / (1 + sigma)
    return xt - expand(t, x) * net(xt, t, cond)                   # xt - t (z - x) = x
    ### END SOLUTION


def flow_rollout(net, z, times, cond=None):
    """All clean estimates (k, B, *S) of a k-step generator, in the order they are made; differentiable in z.

    The input of step i > 0 is (1 - times[i]) x + times[i] z[i] with the x of the step before.  Step 0 takes
    times[0] z[0].  times k floats, descending, times[0] <= 1; net as above.
    At t = 1 sigma would be infinite: stay in t, do not go through from_flow.
    """
    ### BEGIN SOLUTION A5.1
    x, estimates = torch.zeros_like(z[0]), []
    for t, noise in zip(times, z):
        xt = (1 - t) * x + t * noise
        x = xt - t * net(xt, noise.new_full(noise.shape[:1], t), cond)
        estimates.append(x)
    return torch.stack(estimates)
    ### END SOLUTION


# A5.2 Backward simulation, each sample at a step of its own


def backward_simulate(net, sigmas, z, step, cond=None):
    """Samples (B, *S) to train a k-step generator on: row b is its estimate at step step[b], reached by its earlier steps.

    A step is  x <- net(x + sigmas[i] z[i], sigma, cond),  from x = 0; net is a Denoiser, sigmas k floats, step (B,) int64.
    A row's last step carries a graph and nothing before it does.  One call of net with a graph, for all rows together, each
    at its own sigma.  Before it, under no_grad, at most one call per step, with the rows that need that step and no others.
    (DMD2 has one step for the whole batch: nano_dmd.generator.Generator.)
    """
    ### BEGIN SOLUTION A5.2
    levels, x = z.new_tensor(sigmas), torch.zeros_like(z[0])
    with torch.no_grad():
        for i in range(int(step.max())):
            rows = step > i
            sigma = levels[i].expand(int(rows.sum()))
            x[rows] = net(add_noise(x[rows], sigma, z[i, rows]), sigma, None if cond is None else cond[rows])
    noise = z[step, torch.arange(len(step))]                      # each row's own slice
    return net(add_noise(x, levels[step], noise), levels[step], cond)
    ### END SOLUTION


# A5.3 How far training inputs are from what sampling meets.  Data N(mean, diag std^2), mean and std (D,)


def input_gap(mean, std, gain, shift, sigmas):
    """Wasserstein-2 distance (k,) between the input of a step when data is noised, and when sampling, for each step.

    Sampling is affine:  x_i = shift[i] + gain[i] (x_{i-1} + sigmas[i] z_i)  from x = 0 before step 0; gain, shift (k, D),
    sigmas (k,).  The input of step i is  x_{i-1} + sigmas[i] z_i  there, and  data + sigmas[i] z_i  with data, at step 0 too.
    """
    ### BEGIN SOLUTION A5.3
    made, var, gaps = torch.zeros_like(mean), torch.zeros_like(mean), []
    for g, c, sigma in zip(gain, shift, sigmas):
        var = var + sigma**2                                      # of the input that is met; its mean is made
        gaps.append((mean - made) ** 2 + ((std**2 + sigma**2).sqrt() - var.sqrt()) ** 2)
        made, var = c + g * made, g**2 * var
    return torch.stack(gaps).sum(1).sqrt()
    ### END SOLUTION


def surviving(std, sigmas):
    """Share (float) of step 0's error in variance, var_0 - std^2, that is left after all later steps.  One dimension.

    Each later step is linear with a positive gain and was trained on noised data until what it makes of *that* is distributed
    as the data.  std float; sigmas floats, those of the later steps only.
    """
    ### BEGIN SOLUTION A5.3
    return math.prod(std**2 / (std**2 + sigma**2) for sigma in sigmas)     # var -> std^2 (var + sigma^2) / (std^2 + sigma^2)
    ### END SOLUTION


# A5.4 Which noise levels?  A training schedule is betas (T,), increasing; timesteps are 0 .. T - 1


def dmd2_timesteps(total, n):
    """DMD2's n descending timesteps (list of int):  the first n of  range(total - 1, 0, -(total // n))."""
    ### BEGIN SOLUTION A5.4
    return [total - 1 - i * (total // n) for i in range(n)]
    ### END SOLUTION


def lcm_timesteps(total, n, original=50):
    """The n descending timesteps (list of int) that diffusers' LCMScheduler picks when it is given none.  n <= original.

    Of  original  evenly spaced ones, c - 1, 2 c - 1, ... with c = total // original, in descending order, the one at
    index floor(i original / n), i = 0 ... n - 1, counted from 0.
    """
    ### BEGIN SOLUTION A5.4
    spaced = [i * (total // original) - 1 for i in range(original, 0, -1)]
    return [spaced[i * original // n] for i in range(n)]
    ### END SOLUTION


def level_ratio(betas, used, trained):
    """sigma at the timesteps used over sigma at those trained, (n,) in the dtype of betas; used, trained lists of n ints.

    xt = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise, for t = 0 ... T - 1 from clean x; sigma is noise over signal.
    """
    ### BEGIN SOLUTION A5.4
    kept = (1 - betas).cumprod(0)
    sigma = ((1 - kept) / kept).sqrt()
    return sigma[used] / sigma[trained]
    ### END SOLUTION


def export_timesteps(sigmas, betas, tolerance=1.05):
    """The timesteps (list of int), nearest in log sigma, of a generator trained at sigmas (floats), for a scheduler.

    raises ValueError where a sigma is more than the factor tolerance away from its nearest, above or below.
    """
    ### BEGIN SOLUTION A5.4
    kept = (1 - betas.double()).cumprod(0)
    distance = (torch.tensor(sigmas, dtype=torch.float64).log()[:, None] - ((1 - kept) / kept).log() / 2).abs()
    nearest = distance.min(1)
    if (nearest.values > math.log(tolerance)).any():
        raise ValueError(f"the schedule has nothing near sigma = {sigmas[nearest.values.argmax()]:g}")
    return nearest.indices.tolist()
    ### END SOLUTION


# A5.5 Which step to train, and through how many to differentiate


def rollout(step, z, through):
    """x after all k steps, with a graph through the last  through  of them, 1 <= through <= k.

    step(i, x, z_i) -> x, with x None at i = 0; z (k, B, *S).  Earlier steps run under no_grad, to save their memory.
    Called under torch.no_grad() nothing carries a graph.
    """
    ### BEGIN SOLUTION A5.5
    x, first = None, len(z) - through
    with torch.no_grad():
        for i in range(first):
            x = step(i, x, z[i])
    for i in range(first, len(z)):
        x = step(i, x, z[i])
    return x
    ### END SOLUTION


def kl_gradients(theta, sigmas, std):
    """(last, full): two floats, dKL/dtheta by the last step alone, step 0's output held fixed, and through both steps.

    x_i = theta r_i (x_{i-1} + sigmas[i] z_i),  r_i = std^2 / (std^2 + sigmas[i]^2),  two steps, from x = 0;
    KL = KL(N(0, V_1) || N(0, std^2)) of what step 1 makes.
    """
    ### BEGIN SOLUTION A5.5
    r0, r1 = (std**2 / (std**2 + sigma**2) for sigma in sigmas)
    v0 = (theta * r0 * sigmas[0]) ** 2
    v1 = (theta * r1) ** 2 * (v0 + sigmas[1] ** 2)
    slope = (1 / std**2 - 1 / v1) / 2                             # dKL / dV_1
    last = slope * 2 * v1 / theta
    return last, last + slope * (theta * r1) ** 2 * 2 * v0 / theta
    ### END SOLUTION


def selection_variance(g, weight, p):
    """Variance E|estimate - goal|^2 (scalar tensor) of training one random step at a time, i with probability p_i.

    g (k, P) gradients of the k steps' losses; goal = sum_i weight_i g_i; the estimate makes up for p, so that its mean is
    the goal.  weight, p (k,) positive, p sums to 1.
    """
    ### BEGIN SOLUTION A5.5
    g = weight[:, None] * g
    return ((g**2).sum(1) / p).sum() - (g.sum(0) ** 2).sum()
    ### END SOLUTION

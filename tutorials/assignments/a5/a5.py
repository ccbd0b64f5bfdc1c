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
    raise NotImplementedError("A5.1 is yours to write")


def flow_rollout(net, z, times, cond=None):
    """All clean estimates (k, B, *S) of a k-step generator, in the order they are made; differentiable in z.

    The input of step i > 0 is (1 - times[i]) x + times[i] z[i] with the x of the step before.  Step 0 takes
    times[0] z[0].  times k floats, descending, times[0] <= 1; net as above.
    At t = 1 sigma would be infinite: stay in t, do not go through from_flow.
    """
    raise NotImplementedError("A5.1 is yours to write")


# A5.2 Backward simulation, each sample at a step of its own


def backward_simulate(net, sigmas, z, step, cond=None):
    """Samples (B, *S) to train a k-step generator on: row b is its estimate at step step[b], reached by its earlier steps.

    A step is  x <- net(x + sigmas[i] z[i], sigma, cond),  from x = 0; net is a Denoiser, sigmas k floats, step (B,) int64.
    A row's last step carries a graph and nothing before it does.  One call of net with a graph, for all rows together, each
    at its own sigma.  Before it, under no_grad, at most one call per step, with the rows that need that step and no others.
    (DMD2 has one step for the whole batch: nano_dmd.generator.Generator.)
    """
    raise NotImplementedError("A5.2 is yours to write")


# A5.3 How far training inputs are from what sampling meets.  Data N(mean, diag std^2), mean and std (D,)


def input_gap(mean, std, gain, shift, sigmas):
    """Wasserstein-2 distance (k,) between the input of a step when data is noised, and when sampling, for each step.

    Sampling is affine:  x_i = shift[i] + gain[i] (x_{i-1} + sigmas[i] z_i)  from x = 0 before step 0; gain, shift (k, D),
    sigmas (k,).  The input of step i is  x_{i-1} + sigmas[i] z_i  there, and  data + sigmas[i] z_i  with data, at step 0 too.
    """
    raise NotImplementedError("A5.3 is yours to write")


def surviving(std, sigmas):
    """Share (float) of step 0's error in variance, var_0 - std^2, that is left after all later steps.  One dimension.

    Each later step is linear with a positive gain and was trained on noised data until what it makes of *that* is distributed
    as the data.  std float; sigmas floats, those of the later steps only.
    """
    raise NotImplementedError("A5.3 is yours to write")


# A5.4 Which noise levels?  A training schedule is betas (T,), increasing; timesteps are 0 .. T - 1


def dmd2_timesteps(total, n):
    """DMD2's n descending timesteps (list of int):  the first n of  range(total - 1, 0, -(total // n))."""
    raise NotImplementedError("A5.4 is yours to write")


def lcm_timesteps(total, n, original=50):
    """The n descending timesteps (list of int) that diffusers' LCMScheduler picks when it is given none.  n <= original.

    Of  original  evenly spaced ones, c - 1, 2 c - 1, ... with c = total // original, in descending order, the one at
    index floor(i original / n), i = 0 ... n - 1, counted from 0.
    """
    raise NotImplementedError("A5.4 is yours to write")


def level_ratio(betas, used, trained):
    """sigma at the timesteps used over sigma at those trained, (n,) in the dtype of betas; used, trained lists of n ints.

    xt = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise, for t = 0 ... T - 1 from clean x; sigma is noise over signal.
    """
    raise NotImplementedError("A5.4 is yours to write")


def export_timesteps(sigmas, betas, tolerance=1.05):
    """The timesteps (list of int), nearest in log sigma, of a generator trained at sigmas (floats), for a scheduler.

    raises ValueError where a sigma is more than the factor tolerance away from its nearest, above or below.
    """
    raise NotImplementedError("A5.4 is yours to write")


# A5.5 Which step to train, and through how many to differentiate


def rollout(step, z, through):
    """x after all k steps, with a graph through the last  through  of them, 1 <= through <= k.

    step(i, x, z_i) -> x, with x None at i = 0; z (k, B, *S).  Earlier steps run under no_grad, to save their memory.
    Called under torch.no_grad() nothing carries a graph.
    """
    raise NotImplementedError("A5.5 is yours to write")


def kl_gradients(theta, sigmas, std):
    """(last, full): two floats, dKL/dtheta by the last step alone, step 0's output held fixed, and through both steps.

    x_i = theta r_i (x_{i-1} + sigmas[i] z_i),  r_i = std^2 / (std^2 + sigmas[i]^2),  two steps, from x = 0;
    KL = KL(N(0, V_1) || N(0, std^2)) of what step 1 makes.
    """
    raise NotImplementedError("A5.5 is yours to write")


def selection_variance(g, weight, p):
    """Variance E|estimate - goal|^2 (scalar tensor) of training one random step at a time, i with probability p_i.

    g (k, P) gradients of the k steps' losses; goal = sum_i weight_i g_i; the estimate makes up for p, so that its mean is
    the goal.  weight, p (k,) positive, p sums to 1.
    """
    raise NotImplementedError("A5.5 is yours to write")

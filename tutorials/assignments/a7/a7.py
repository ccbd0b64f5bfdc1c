"""Assignment 7: guidance split out of DMD.  The handout is README.md beside this file.

Everywhere: x clean, noise unit normal, xt = x + sigma * noise, sigma (B,). The teacher answers d_cond with and d_uncond
without the condition, the fake score d_fake (or f_cond, f_uncond); all estimate x, all are asked at one xt and sigma.
"""

import math

import numpy as np
import torch

from nano_dmd.dmd_loss import descend
from nano_dmd.noise import add_noise, expand

# ---- given: three implementations to try `diagnose` on --------------------------------------------------------------


def implementation_1(x, d_cond, d_uncond, d_fake, w):
    """A step of decoupled DMD, both parts at one xt.  x and the answers (B, *S); returns (B, *S) to descend."""
    size = (x - d_cond).abs().flatten(1).mean(1).clamp(min=1e-5)
    return 2 * (d_fake - d_cond - (w - 1) * (d_cond - d_uncond)) / expand(size, x)


def implementation_2(x, d_cond, d_uncond, d_fake, w):
    push = d_cond - d_uncond
    size = (x - d_cond).abs().flatten(1).mean(1).clamp(min=0.1)
    return (d_fake - d_cond) / expand(size, x) - w * push / expand(size, x)


def implementation_3(x, d_cond, d_uncond, d_fake, w):
    guided = d_uncond + w * (d_cond - d_uncond)
    return (d_fake - guided) / (x - d_cond).abs().mean().clamp(min=1e-5)


# ---- A7.1  the split ------------------------------------------------------------------------------------------------


def split(d_cond, d_uncond, f_cond, f_uncond, w, k):
    """The bracket of DMD in three parts, when the teacher has guidance w and the fake score guidance k.

        f_uncond + k (f_cond - f_uncond) - d_uncond - w (d_cond - d_uncond) = matching + augmentation + own

    matching      does not depend on w or k, and is zero where the two conditional answers agree
    augmentation  knows the teacher alone       own  knows the fake score alone
    all (B, *S), w and k numbers; returns the three parts, (B, *S) each. At k = 1, as in DMD, `own` is zero.
    """
    raise NotImplementedError("A7.1 is yours to write")


def classifier_augmentation(log_posterior, xt, sigma, w):
    """The augmentation -(w - 1)(d_cond - d_uncond), from a classifier and no denoiser.

    log_posterior  maps xt (B, *S) to log p(c | xt) (B,), up to a number per sample that does not depend on xt
    xt (B, *S), sigma (B,), w a number; returns (B, *S) without a graph
    Asked: it works inside torch.no_grad(), and the caller's xt stays as it was (values, requires_grad, .grad).
    """
    raise NotImplementedError("A7.1 is yours to write")


def log_posterior_change(denoiser, start, end, sigma, cond):
    """log p(cond | end) - log p(cond | start), as a teacher sees it: the other direction, from denoisers alone.

    denoiser(xt (B, D), sigma (B,), cond (B,) | None) -> (B, D); start, end (B, D) two noised points per sample
    returns (B,). Asked: accurate to 1e-6. An integral along the line from start to end; about 60 Gauss-Legendre nodes do.
    """
    raise NotImplementedError("A7.1 is yours to write")


# ---- A7.2  the gradient and its normalisers -------------------------------------------------------------------------


def augmentation_step(x, d_cond, d_uncond, w, floor):
    """-(w - 1)(d_cond - d_uncond) / mean_pixels |x - d_cond|; the mean, one per sample, is held at or above floor.

    x, d_cond, d_uncond (B, *S); w, floor numbers. returns (B, *S) without a graph, whatever the inputs carry
    """
    raise NotImplementedError("A7.2 is yours to write")


def decoupled_loss(x, real, fake, cond, for_matching, for_augmentation, w, floor=1e-5):
    """Decoupled DMD's two losses, added: nano_dmd's descend(x, g), the mean over the pixels, once for each part.

    x (B, *S) with a graph; real and fake Denoisers, called (xt, sigma, cond) or (xt, sigma, None)
    for_matching, for_augmentation  (sigma (B,), noise (B, *S)): the two parts are noised on their own
    The normaliser is mean |x - d_cond| of that part's own d_cond, at least `floor`.
    returns (B,); nothing flows into the networks, and x gets the two gradients.
    Asked: real is called three times, fake once.
    """
    raise NotImplementedError("A7.2 is yours to write")


def step_ratio(x, d_cond, d_uncond, w):
    """How many times as long the step of the split is as that of guided DMD, at one xt: (B,).

    Guided DMD divides by mean |x - d_real| with the guided d_real, the split divides both parts by mean |x - d_cond|.
    """
    raise NotImplementedError("A7.2 is yours to write")


def moment_shield(x, mean, var):
    """KL( N(a, v) || N(mean, var) ) with a and v the mean and the variance of all numbers of one image: (B,).

    A shield without a fake score: it keeps brightness and contrast, and nothing else. x (B, *S); mean, var numbers.
    v is the biased variance (divided by the number of pixels). Differentiable in x.
    """
    raise NotImplementedError("A7.2 is yours to write")


# ---- A7.3  noise below the level of the step ------------------------------------------------------------------------


def shift(t, c):
    """Stable Diffusion 3's time shift of flow times t in [0, 1): c t / (1 + (c - 1) t). Tensors or floats; c > 0."""
    raise NotImplementedError("A7.3 is yours to write")


def unshift(t, c):
    """The inverse: unshift(shift(t, c), c) = t."""
    raise NotImplementedError("A7.3 is yours to write")


def levels_below(u, level, least, rho=7.0):
    """Noise levels for augmentation, variance exploding: sigma^(1/rho) uniform from least (u = 0) to level (u = 1).

    u (N,) in [0, 1]; level, the noise level of the input of the step that made x, and least are numbers. returns (N,)
    Asked: where least is not below level / 10, level / 10 takes its place (a last step of little noise).
    """
    raise NotImplementedError("A7.3 is yours to write")


def flow_levels_below(u, t_step, c):
    """The same for a flow teacher with time shift c: sigma (N,) for u (N,) in [0, 1).

    t_step, a number, is the time of the step's input as the network is told it: after the shift. The time of the
    augmentation is uniform below it *before* the shift (u = 0 is clean, u = 1 is t_step), and is then shifted.
    """
    raise NotImplementedError("A7.3 is yours to write")


def share_below(sigma, t_step, c):
    """The share of flow_levels_below(u uniform in [0, 1), t_step, c) below each sigma (N,): (N,) in [0, 1]."""
    raise NotImplementedError("A7.3 is yours to write")


def median_ratio(t_step, c):
    """How many times as noisy the right median is as that of a code which draws *after* the shift, uniform in
    (0, t_step): median sigma of flow_levels_below over that code's. Floats; returns a float."""
    raise NotImplementedError("A7.3 is yours to write")


# ---- A7.4  where the parts come to rest -----------------------------------------------------------------------------
# Prompts are numbers, cond ~ N(0, tau^2), and the data of a prompt are x = cond + s * unit noise. The student makes
# x = M cond + a z with z ~ N(0, 1), and its fake score is exact. No normaliser. match (K,), aug (L,): noise levels,
# all equally likely, independent for the two parts.


def drifts(M, a, s, tau, match, aug, w):
    """The mean gradients (matching, augmentation) at (M, a), each a (2,) tensor: E[g dx/dM], E[g dx/da].

    The student descends them:  (M, a)  <-  (M, a) - lr * (matching + augmentation). Floats; match, aug tensors.
    """
    raise NotImplementedError("A7.4 is yours to write")


def augmentation_rest(s, tau, aug):
    """The M at which augmentation alone stops moving the means, a float. (Its spread goes to 0 meanwhile.)"""
    raise NotImplementedError("A7.4 is yours to write")


def spread_after(a, updates, lr, s, tau, aug, w):
    """The spread that augmentation alone leaves of a, after that many updates with learning rate lr: a float."""
    raise NotImplementedError("A7.4 is yours to write")


def both_rest(s, tau, match, aug, w):
    """(M, a), floats: where both parts together come to rest, w >= 1. a is 0.0 where no spread can answer the push.

    Asked: a to a relative 1e-6. One noise level for matching has a closed form; several need a search (a rises with
    what it has to answer).
    """
    raise NotImplementedError("A7.4 is yours to write")


def largest_w(s, tau, match, aug):
    """The guidance at which the spread of both_rest reaches 0, a float."""
    raise NotImplementedError("A7.4 is yours to write")


def time_to(start, end, m, s, sigma, w):
    """Two classes instead of prompts: data N(m, s^2) and N(-m, s^2), equally likely; a sample of class +m.

    How long augmentation alone takes to move it from start to end > start, at one noise level: the time of the flow
        dx/dt = (w - 1)(d_cond - d_uncond)   at xt = x
    which is lr times the number of updates. Floats, w > 1; returns a float. The integral has a closed form.
    """
    raise NotImplementedError("A7.4 is yours to write")


# ---- A7.5  other coordinates, other people's code -------------------------------------------------------------------


def augmentation_in(kind, y_cond, y_uncond, sigma, w):
    """The augmentation -(w - 1)(d_cond - d_uncond) in x0, from two raw network outputs at one xt.

    kind    what the network predicts: "eps" noise; "v" (noise - sigma x) / sqrt(1 + sigma^2); "flow" noise - x;
            "sit" x - noise (flow with time running the other way)
    y_cond, y_uncond (B, *S), sigma (B,), w a number; returns (B, *S)
    """
    raise NotImplementedError("A7.5 is yours to write")


def normaliser_in(kind, y_cond, x, noise, sigma):
    """mean_pixels |x - d_cond| (B,), from the raw conditional output at xt = x + sigma noise; kinds as above."""
    raise NotImplementedError("A7.5 is yours to write")


def diagnose(step):
    """What is inside a step of decoupled DMD, from calls alone: (factor, size), two strings.

    step(x, d_cond, d_uncond, d_fake, w) -> (B, *S) is a positive constant times matching + augmentation, both at one xt,
    over one kind of normaliser, which is held above some floor (at most .1). Its code is not to be read.
    factor  "w - 1" or "w": what multiplies d_cond - d_uncond
    size    "sample": mean |x - d_cond|, each sample its own; "guided": the same with the guided answer in place of
            d_cond; "batch": one mean |x - d_cond| for the whole batch; "none": no normaliser
    """
    raise NotImplementedError("A7.5 is yours to write")

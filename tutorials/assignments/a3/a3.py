"""A3: the discriminator and its losses.  Replace each NotImplementedError; README.md beside this file has the maths.

Shapes: samples (B, *S), noise levels sigma (B,), logits (B,), one per sample.  A logit is large where a sample looks
real.  You may use torch, everything in nano_dmd, and within a task your own other functions.
"""

import math
from contextlib import contextmanager
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch.distributions import MultivariateNormal

from nano_dmd.dmd_loss import descend, dmd_gradient
from nano_dmd.gan import generator_logit_loss
from nano_dmd.noise import add_noise, expand


def critic_loss(logits_real, logits_fake, smooth=0.0):
    """Logistic loss of the critic with one-sided label smoothing: real samples are labelled 1 - smooth, fake ones 0.

        - mean_real [(1 - s) log S(D) + s log(1 - S(D))] - mean_fake log(1 - S(D)),    S(D) = 1 / (1 + exp(-D))

    logits_real (B,), logits_fake (F,), F need not be B; 0 <= smooth < 1/2
    returns a scalar; it and its gradient are finite and right for logits of any size, in float32 too
    """
    raise NotImplementedError("A3.1 is yours to write")


def smoothed_logit(log_ratio, smooth):
    """The logit at which the expected critic_loss is least, where log(p_real / p_fake) is log_ratio.

    log_ratio (B,) of any size; 0 <= smooth < 1/2.  returns (B,), which is log_ratio itself for smooth = 0
    """
    raise NotImplementedError("A3.1 is yours to write")


def hinge_losses(logits_real, logits_fake):
    """(generator's loss, critic's loss) of the hinge GAN, two scalars.

    The critic wants D >= 1 on real and D <= -1 on fake samples, pays for what is missing, and does not care how far
    beyond they are. The generator raises the mean logit of its samples, wherever they are.
    logits_real (B,), logits_fake (F,), F need not be B
    """
    raise NotImplementedError("A3.1 is yours to write")


def optimal_logit(x, sigma, real, fake):
    """log p_real(x; sigma) - log p_fake(x; sigma): the best critic's logit at noised points.

    x (B, D) noised points; sigma (B,) the noise level of each
    real, fake  clean Gaussian mixtures: (weights (K,) of sum 1, means (K, D), covariances (K, D, D)), each its own K
    returns (B,); exact also where both densities are too small for a float64
    """
    raise NotImplementedError("A3.2 is yours to write")


def gan_gradient(d_real, d_fake, sigma, logits):
    """Per-sample gradient of softplus(-D(xt)) with respect to xt when D is the optimal logit of the noised densities.

    d_real, d_fake (B, *S)  E[x | xt] under the real data and under the generator     sigma (B,)     logits (B,) = D(xt)
    returns (B, *S); finite for logits of any size
    """
    raise NotImplementedError("A3.2 is yours to write")


def noise_for_accuracy(distance, std, accuracy):
    """The noise level at which the best critic is right about a share `accuracy` of its samples.

    Half of them come from N(a, std^2 I), half from N(b, std^2 I) with |a - b| = distance, all noised with sigma.
    floats, 1/2 < accuracy < 1.  returns sigma, a float; 0.0 where even clean samples are not told apart so well
    """
    raise NotImplementedError("A3.2 is yours to write")


def gradient_penalty(logit, x):
    """mean over samples of |d logit(x_b) / d x_b|^2: R1 if x are real samples, R2 if they are generated ones.

    logit  maps (B, *S) to (B,), each sample for itself        x (B, *S), which may carry a graph and may not
    returns a scalar to train the weights of logit with; x gets no gradient from it and is left as it is
    """
    raise NotImplementedError("A3.3 is yours to write")


def difference_penalty(logit, x, noise, alpha):
    """Mean of [(logit(x + alpha noise) - logit(x)) / alpha]^2, R1 without a second derivative.

    x, noise (B, *S), noise unit normal; alpha a float > 0.  returns a scalar
    """
    raise NotImplementedError("A3.3 is yours to write")


def central_penalty(logit, x, noise, alpha):
    """The same with the central difference, from x - alpha noise to x + alpha noise; returns a scalar."""
    raise NotImplementedError("A3.3 is yours to write")


def difference_bias(hessian, alpha):
    """E_noise[difference_penalty] - gradient_penalty for a quadratic logit x' A x / 2 + b' x + c.

    hessian (D, D) = A, symmetric; alpha a float.  returns a float, or a tensor ()
    """
    raise NotImplementedError("A3.3 is yours to write")


def f_weight(logits, f, low=0.1, high=20.0):
    """h(r) = r^2 f''(r) at the ratio r = p_real / p_fake that the logits tell, r first cut to [low, high].

    low = 0 and high = inf cut nothing.

    logits (B,) of any size; f a convex function of tensors, elementwise, twice differentiable (f'' not constant 0)
    returns (B,), without a graph
    """
    raise NotImplementedError("A3.4 is yours to write")


def f_distill_loss(x, d_real, d_fake, logits, f, low=0.1, high=20.0):
    """A scalar whose gradient at x is  h_b / mean(h) * g_b / x.numel(),  h = f_weight, g = DMD's gradient.

    x, d_real, d_fake (B, *S); logits (B,).  Nothing but x gets a gradient.
    """
    raise NotImplementedError("A3.4 is yours to write")


@contextmanager
def frozen(*modules):
    """`with frozen(a, b):` no weight of the modules takes a gradient inside; after it every flag is what it was before,
    whichever that was, also when the block ends with an error."""
    raise NotImplementedError("A3.5 is yours to write")


def gan_term(x, sigma, noise, fake, discriminator, cond=None):
    """Non-saturating generator loss of x + sigma noise, through weights that are frozen meanwhile.

    x, noise (B, *S), sigma (B,), cond None | (B,).  The logits are discriminator(fake.features(xt, sigma, cond)).
    returns a scalar whose gradient reaches x, and what x was made from, but no weight of fake and discriminator, even
    if backward() is called later; their flags are left as they were
    """
    raise NotImplementedError("A3.5 is yours to write")


def balance(reference, term, x, limit=1e4):
    """The weight w at which w * term pulls at x as hard as reference does: equal L2 norms of the gradients at x (B, *S).

    reference, term  scalars with a graph to x; both can be differentiated again afterwards
    returns w as a float or a tensor () without a graph, at most limit; nothing gets a .grad
    """
    raise NotImplementedError("A3.5 is yours to write")


def halving_weight(teacher, data):
    """The weight of the GAN term with which the generator's share of mode one settles half-way from teacher to data.

    teacher, data  shares of mode one in the teacher and in the real data, floats in (0, 1), different
    returns the weight w of the GAN term in  KL(generator | teacher) + w * GAN, a float
    """
    raise NotImplementedError("A3.5 is yours to write")

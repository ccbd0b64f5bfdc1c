"""A8: write the flow adapter.  Write what raises NotImplementedError; README.md has the maths.

Vocabulary as in nano_dmd: clean (B, *S), noise (B, *S) unit normal, x = clean + sigma noise, sigma (B,), cond None | (B,).
In flow coordinates: x_t = (1 - t) clean + t noise, t (B,), velocity = noise - clean.  Only A8.1 also knows SiT's convention.
"""

import math

import torch
from torch import nn

from nano_dmd.noise import add_noise, expand

# A8.1 The adapter, both ways round


class FlowDenoiser(nn.Module):
    """A flow network as a Denoiser:  D(x, sigma, cond=None) -> (B, *S),  x (B, *S) = clean + sigma noise, sigma (B,) > 0.

    net(x_t, time, cond) -> velocity (B, *S)
    data_at_one  False: x_t = (1 - t) clean + t noise, velocity = noise - clean   (Stable Diffusion 3, SANA, FLUX)
                 True:  x_t = t clean + (1 - t) noise, velocity = clean - noise   (SiT)
    times        the network is told  time = times * t  (B,); diffusers' networks want 1000
    """

    def __init__(self, net, data_at_one=False, times=1.0):
        super().__init__()
        self.net, self.data_at_one, self.times = net, data_at_one, times

    def forward(self, x, sigma, cond=None):
        """In float32 right, and so is the time that the network is told, for sigma from 1e-4 to 1e30."""
        raise NotImplementedError("A8.1 is yours to write")

    def scale(self, sigma):
        """(B,): the factor with which unit noise must come in as x, so that the network sees unit noise (Generator, unit)."""
        raise NotImplementedError("A8.1 is yours to write")


def velocity(denoiser, x_t, t, cond=None, largest=1e4):
    """The other way round: the velocity noise - clean (B, *S) of a Denoiser, at x_t (B, *S), t (B,) in (0, 1].

    The denoiser is never asked at a sigma above `largest`.  Where x_t belongs to a larger one (at t = 1 it is infinite), ask
    it about the same x_t as if sigma were `largest`: its answer is the estimate of clean.
    """
    raise NotImplementedError("A8.1 is yours to write")


# A8.2 Which noise?  Times and sigmas


def shift(t, s):
    """The time shift (N,) of t (N,) in [0, 1]: the time at which noise over signal is s times what it is at t.  Fine at t = 1."""
    raise NotImplementedError("A8.2 is yours to write")


def sigma_quantile(p, s, mean=None, std=None):
    """The p-quantiles (N,) of sigma, p (N,) in (0, 1), when t is drawn and then shifted by s.

    mean, std None: t is uniform in (0, 1).  Else t is logit-normal: log(t / (1 - t)) is N(mean, std^2).
    """
    raise NotImplementedError("A8.2 is yours to write")


def time_density(t, s, mean, std):
    """Density (N,) at t (N,) in (0, 1) of logit-normal(mean, std) times that were shifted by s."""
    raise NotImplementedError("A8.2 is yours to write")


def noise_spec(s, mean, std):
    """The same distribution as nano_dmd.noise.draw_sigma wants it: a string, right to six digits."""
    raise NotImplementedError("A8.2 is yours to write")


def resolution_shift(pixels, more):
    """The shift (float) for images of `more` pixels, from times that are right for `pixels` pixels (Stable Diffusion 3).

    An image has one colour everywhere.  Its posterior, given all its pixels of x_t, is to be the same at both sizes.
    """
    raise NotImplementedError("A8.2 is yours to write")


# A8.3 The velocity loss, said with denoisers


def x0_weight(sigma):
    """w (N,):  |v - v'|^2 = w |D - D'|^2  for two networks at the same x_t; sigma (N,) > 0."""
    raise NotImplementedError("A8.3 is yours to write")


def velocity_loss(fake, x, sigma, noise, cond=None):
    """|velocity of fake - (noise - x)|^2, mean over each sample's elements, (B,).  fake is a Denoiser, called once.

    x, noise (B, *S), sigma (B,).  Gradients reach the weights of fake and never x.
    """
    raise NotImplementedError("A8.3 is yours to write")


def edm_ratio(sigma, sigma_data):
    """Weight (N,) of the velocity loss over the weight of nano_dmd.denoiser.edm_loss, both as weights of |D - x|^2."""
    raise NotImplementedError("A8.3 is yours to write")


def largest_ratio(sigma_data):
    """(sigma, ratio), floats: where edm_ratio is largest, and how large it is there.  In closed form, no search."""
    raise NotImplementedError("A8.3 is yours to write")


def matched_weight(sigma, s, mean, std):
    """Weight (N,) of |D - x|^2 for a trainer who draws sigma (N,) from lognormal(mean, std).

    Its expected loss is to be that of a flow trainer: velocity loss, t uniform in (0, 1) and then shifted by s.
    """
    raise NotImplementedError("A8.3 is yours to write")


# A8.4 Guidance, and one step in three coordinates


def guided_denoiser(net, x, sigma, cond, w, rescale=False):
    """D (B, *S) of a flow network with guidance on its velocity:  v = u + w (c - u),  u asked with cond None.

    net(x_t, t, cond); x (B, *S) = clean + sigma noise.  rescale: v is then scaled, sample by sample, to the norm of c.
    """
    raise NotImplementedError("A8.4 is yours to write")


def euler(net, z, times, cond=None):
    """Euler's method on  dx_t / dt = v,  from unit noise z (B, *S) at times[0] to t = 0; returns the sample (B, *S).

    times k floats, descending, 1 >= times[0]: where net(x_t, t, cond) is asked.  The network sees z itself first.
    """
    raise NotImplementedError("A8.4 is yours to write")


def flow_time(abar):
    """Flow time t (N,) of the noise level of a variance-preserving schedule:  sqrt(abar) clean + sqrt(1 - abar) noise."""
    raise NotImplementedError("A8.4 is yours to write")


def ddim_step(x_vp, velocity, abar, following):
    """DDIM's step from abar to following, (B,) each, of a sample (B, *S) in variance-preserving coordinates.

    velocity (B, *S) is what a flow network answers at the same noise level, to the same sample in flow coordinates.
    Returns the sample at following, in variance-preserving coordinates.  following may be 1: clean.
    """
    raise NotImplementedError("A8.4 is yours to write")


# A8.5 TDM and Phased DMD in flow time.  A step ends at t_mid; fresh noise takes its x_mid on to a t above t_mid


def renoise(x_mid, t_mid, t, noise):
    """x_t (B, *S) at t (B,), from x_mid (B, *S) at t_mid < 1 (float), t_mid <= t <= 1, with fresh noise (B, *S).

    If x_mid is (1 - t_mid) clean + t_mid noise_1, then x_t is (1 - t) clean + t noise_2, with noise_2 of unit variance.
    """
    raise NotImplementedError("A8.5 is yours to write")


def phased_velocity(x_t, x_mid, t, t_mid):
    """Phased DMD's target (B, *S) for a fake score that predicts a velocity: its mean, given x_t, is the velocity of x_t.

    x_t = renoise(x_mid, t_mid, t, noise);  t (B,) in (t_mid, 1], t_mid (float) in [0, 1).  Finite at t = 1.
    """
    raise NotImplementedError("A8.5 is yours to write")


def draw_between(u, low, high, s):
    """Times (N,) between low and high that are uniform *before* a shift by s; u (N,) uniform in (0, 1).

    low, high (floats) in [0, 1] are shifted times already.  Increasing in u; u = 0 gives low.
    """
    raise NotImplementedError("A8.5 is yours to write")


def tdm_factor(std, t_in, t_mid):
    """Slope of TDM's fake score over the slope of the true denoiser (float), between t_in and t_mid.  Fine at t_in = 1.

    One dimension, data N(0, std^2), a perfect student: a multiple that takes the noised data at t_in to those at t_mid.
    TDM's fake score is the regression of the student's answer x on x_t;  t_in, t_mid floats, 0 <= t_mid < t_in <= 1.
    """
    raise NotImplementedError("A8.5 is yours to write")

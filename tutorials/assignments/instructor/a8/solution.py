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
        ### BEGIN SOLUTION A8.1
        signal, share = 1 / (1 + sigma), sigma / (1 + sigma)      # of clean and of noise in x_t; 1 - share would lose digits
        x_t = x * expand(signal, x)
        v = self.net(x_t, self.times * (signal if self.data_at_one else share), cond)
        return x_t - expand(share, x) * (-v if self.data_at_one else v)
        ### END SOLUTION

    def scale(self, sigma):
        """(B,): the factor with which unit noise must come in as x, so that the network sees unit noise (Generator, unit)."""
        ### BEGIN SOLUTION A8.1
        return 1 + sigma
        ### END SOLUTION


def velocity(denoiser, x_t, t, cond=None, largest=1e4):
    """The other way round: the velocity noise - clean (B, *S) of a Denoiser, at x_t (B, *S), t (B,) in (0, 1].

    The denoiser is never asked at a sigma above `largest`.  Where x_t belongs to a larger one (at t = 1 it is infinite), ask
    it about the same x_t as if sigma were `largest`: its answer is the estimate of clean.
    """
    ### BEGIN SOLUTION A8.1
    sigma = (t / (1 - t)).clamp(max=largest)
    clean = denoiser(expand(1 + sigma, x_t) * x_t, sigma, cond)
    return (x_t - clean) / expand(t, x_t)
    ### END SOLUTION


# A8.2 Which noise?  Times and sigmas


def shift(t, s):
    """The time shift (N,) of t (N,) in [0, 1]: the time at which noise over signal is s times what it is at t.  Fine at t = 1."""
    ### BEGIN SOLUTION A8.2
    return s * t / (1 + (s - 1) * t)
    ### END SOLUTION


def sigma_quantile(p, s, mean=None, std=None):
    """The p-quantiles (N,) of sigma, p (N,) in (0, 1), when t is drawn and then shifted by s.

    mean, std None: t is uniform in (0, 1).  Else t is logit-normal: log(t / (1 - t)) is N(mean, std^2).
    """
    ### BEGIN SOLUTION A8.2
    return s * (p / (1 - p) if mean is None else torch.exp(mean + std * torch.special.ndtri(p)))
    ### END SOLUTION


def time_density(t, s, mean, std):
    """Density (N,) at t (N,) in (0, 1) of logit-normal(mean, std) times that were shifted by s."""
    ### BEGIN SOLUTION A8.2
    off = (torch.logit(t) - mean - math.log(s)) / std             # a shift by s adds log s to the logit
    return torch.exp(-(off**2) / 2) / (math.sqrt(2 * math.pi) * std * t * (1 - t))
    ### END SOLUTION


def noise_spec(s, mean, std):
    """The same distribution as nano_dmd.noise.draw_sigma wants it: a string, right to six digits."""
    ### BEGIN SOLUTION A8.2
    return f"lognormal({mean + math.log(s):.8f},{std:.8f})"
    ### END SOLUTION


def resolution_shift(pixels, more):
    """The shift (float) for images of `more` pixels, from times that are right for `pixels` pixels (Stable Diffusion 3).

    An image has one colour everywhere.  Its posterior, given all its pixels of x_t, is to be the same at both sizes.
    """
    ### BEGIN SOLUTION A8.2
    return math.sqrt(more / pixels)                               # the mean of the pixels has noise sigma / sqrt(pixels)
    ### END SOLUTION


# A8.3 The velocity loss, said with denoisers


def x0_weight(sigma):
    """w (N,):  |v - v'|^2 = w |D - D'|^2  for two networks at the same x_t; sigma (N,) > 0."""
    ### BEGIN SOLUTION A8.3
    return (1 + 1 / sigma) ** 2
    ### END SOLUTION


def velocity_loss(fake, x, sigma, noise, cond=None):
    """|velocity of fake - (noise - x)|^2, mean over each sample's elements, (B,).  fake is a Denoiser, called once.

    x, noise (B, *S), sigma (B,).  Gradients reach the weights of fake and never x.
    """
    ### BEGIN SOLUTION A8.3
    x = x.detach()
    off = fake(add_noise(x, sigma, noise), sigma, cond) - x       # velocities differ by (1 + sigma) / sigma of this
    return (expand((1 + 1 / sigma) ** 2, x) * off**2).flatten(1).mean(1)
    ### END SOLUTION


def edm_ratio(sigma, sigma_data):
    """Weight (N,) of the velocity loss over the weight of nano_dmd.denoiser.edm_loss, both as weights of |D - x|^2."""
    ### BEGIN SOLUTION A8.3
    return (1 + 1 / sigma) ** 2 / (1 / sigma**2 + 1 / sigma_data**2)
    ### END SOLUTION


def largest_ratio(sigma_data):
    """(sigma, ratio), floats: where edm_ratio is largest, and how large it is there.  In closed form, no search."""
    ### BEGIN SOLUTION A8.3
    return sigma_data**2, 1 + sigma_data**2
    ### END SOLUTION


def matched_weight(sigma, s, mean, std):
    """Weight (N,) of |D - x|^2 for a trainer who draws sigma (N,) from lognormal(mean, std).

    Its expected loss is to be that of a flow trainer: velocity loss, t uniform in (0, 1) and then shifted by s.
    """
    ### BEGIN SOLUTION A8.3
    u = sigma / s                                                 # log u has the density of a logistic variable
    wanted = u / (1 + u) ** 2
    drawn = torch.exp(-(((sigma.log() - mean) / std) ** 2) / 2) / (math.sqrt(2 * math.pi) * std)
    return (1 + 1 / sigma) ** 2 * wanted / drawn
    ### END SOLUTION


# A8.4 Guidance, and one step in three coordinates


def guided_denoiser(net, x, sigma, cond, w, rescale=False):
    """D (B, *S) of a flow network with guidance on its velocity:  v = u + w (c - u),  u asked with cond None.

    net(x_t, t, cond); x (B, *S) = clean + sigma noise.  rescale: v is then scaled, sample by sample, to the norm of c.
    """
    ### BEGIN SOLUTION A8.4
    t, x_t = sigma / (1 + sigma), x / expand(1 + sigma, x)
    c, u = net(x_t, t, cond), net(x_t, t, None)
    v = u + w * (c - u)
    if rescale:
        v = v * expand(c.flatten(1).norm(dim=1) / v.flatten(1).norm(dim=1), v)
    return x_t - expand(t, x) * v
    ### END SOLUTION


def euler(net, z, times, cond=None):
    """Euler's method on  dx_t / dt = v,  from unit noise z (B, *S) at times[0] to t = 0; returns the sample (B, *S).

    times k floats, descending, 1 >= times[0]: where net(x_t, t, cond) is asked.  The network sees z itself first.
    """
    ### BEGIN SOLUTION A8.4
    x_t = z
    for t, following in zip(times, (*times[1:], 0.0)):
        x_t = x_t + (following - t) * net(x_t, z.new_full(z.shape[:1], t), cond)
    return x_t
    ### END SOLUTION


def flow_time(abar):
    """Flow time t (N,) of the noise level of a variance-preserving schedule:  sqrt(abar) clean + sqrt(1 - abar) noise."""
    ### BEGIN SOLUTION A8.4
    return (1 - abar).sqrt() / (abar.sqrt() + (1 - abar).sqrt())
    ### END SOLUTION


def ddim_step(x_vp, velocity, abar, following):
    """DDIM's step from abar to following, (B,) each, of a sample (B, *S) in variance-preserving coordinates.

    velocity (B, *S) is what a flow network answers at the same noise level, to the same sample in flow coordinates.
    Returns the sample at following, in variance-preserving coordinates.  following may be 1: clean.
    """
    ### BEGIN SOLUTION A8.4
    a, b = expand(abar.sqrt(), x_vp), expand((1 - abar).sqrt(), x_vp)
    x_t, t = x_vp / (a + b), b / (a + b)
    clean = x_t - t * velocity
    noise = clean + velocity
    return expand(following.sqrt(), x_vp) * clean + expand((1 - following).sqrt(), x_vp) * noise
    ### END SOLUTION


# A8.5 TDM and Phased DMD in flow time.  A step ends at t_mid; fresh noise takes its x_mid on to a t above t_mid


def renoise(x_mid, t_mid, t, noise):
    """x_t (B, *S) at t (B,), from x_mid (B, *S) at t_mid < 1 (float), t_mid <= t <= 1, with fresh noise (B, *S).

    If x_mid is (1 - t_mid) clean + t_mid noise_1, then x_t is (1 - t) clean + t noise_2, with noise_2 of unit variance.
    """
    ### BEGIN SOLUTION A8.5
    keep = (1 - t) / (1 - t_mid)                                  # of x_mid, so that clean has the factor 1 - t
    return expand(keep, x_mid) * x_mid + expand((t**2 - (keep * t_mid) ** 2).sqrt(), x_mid) * noise
    ### END SOLUTION


def phased_velocity(x_t, x_mid, t, t_mid):
    """Phased DMD's target (B, *S) for a fake score that predicts a velocity: its mean, given x_t, is the velocity of x_t.

    x_t = renoise(x_mid, t_mid, t, noise);  t (B,) in (t_mid, 1], t_mid (float) in [0, 1).  Finite at t = 1.
    """
    ### BEGIN SOLUTION A8.5
    t = expand(t, x_t)
    keep = (1 - t) / (1 - t_mid)
    fresh = t**2 - (keep * t_mid) ** 2                            # variance of the fresh noise in x_t
    clean = (t**2 * x_mid - keep * t_mid**2 * x_t) / (fresh * (1 - t_mid))            # D*, with 1 - t cancelled
    return (x_t - clean) / t
    ### END SOLUTION


def draw_between(u, low, high, s):
    """Times (N,) between low and high that are uniform *before* a shift by s; u (N,) uniform in (0, 1).

    low, high (floats) in [0, 1] are shifted times already.  Increasing in u; u = 0 gives low.
    """
    ### BEGIN SOLUTION A8.5
    a, b = (end / (s - (s - 1) * end) for end in (low, high))     # the shift back
    before = a + u * (b - a)
    return s * before / (1 + (s - 1) * before)
    ### END SOLUTION


def tdm_factor(std, t_in, t_mid):
    """Slope of TDM's fake score over the slope of the true denoiser (float), between t_in and t_mid.  Fine at t_in = 1.

    One dimension, data N(0, std^2), a perfect student: a multiple that takes the noised data at t_in to those at t_mid.
    TDM's fake score is the regression of the student's answer x on x_t;  t_in, t_mid floats, 0 <= t_mid < t_in <= 1.
    """
    ### BEGIN SOLUTION A8.5
    s, inverse = t_mid / (1 - t_mid), (1 - t_in) / t_in           # sigma at the end, and 1 / sigma at the beginning: 0 at t = 1
    mid, start = math.hypot(std, s), math.hypot(std * inverse, 1)       # std at the end; std / sigma at the beginning
    return mid * (mid - s * start) / (1 - s * inverse) / std**2
    ### END SOLUTION

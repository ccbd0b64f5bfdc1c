"""The noise axis: what happens to a clean sample before a denoiser sees it.

Noise is variance-exploding everywhere in this package:

    xt = x + sigma * noise,    x in data units (images in [-1, 1]),    noise ~ N(0, I)

One number, sigma, says how noisy xt is. No alpha_t appears in any loss. A network that was trained
with another convention (eps- or v-prediction) is converted once, by an adapter in denoiser.py.

Limit: alpha_t = 0 (flow matching at t = 1, zero-SNR schedules) means sigma = infinity. Scores are
asked at finite sigma only. A generator scales its own input, so it can start from pure noise.
"""

import functools
import re

import torch


def expand(v, x):
    """Reshape v (B,) to (B, 1, ..., 1), so that it broadcasts against x (B, *S).

    raises ValueError unless v is exactly (B,).  With 2D data and B = 2, another (2,) would
    broadcast without a complaint.
    """
    if v.shape != x.shape[:1]:
        want, got = (x.shape[0],), tuple(v.shape)
        raise ValueError(f"expected one number per sample, shape {want}, got {got}")
    return v.reshape(-1, *[1] * (x.ndim - 1))


def same_shape(*tensors):
    """raises ValueError unless all shapes are equal: (B, 1) and (B, 3) would broadcast."""
    if len({t.shape for t in tensors}) > 1:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise ValueError(f"samples and predictions must agree in shape, got {shapes}")


def add_noise(x, sigma, noise):
    """x + sigma * noise.  x, noise (B, *S); sigma (B,) in data units; returns xt (B, *S)."""
    return x + expand(sigma, x) * noise


def repeated(x, cond, n):
    """x (B, *S) and cond None | (B, ...), every sample n times in a row: (n B, ...) each.

    A loss that noises each copy has n B values, and its mean is over n noises (cfg.noisings).
    """
    if n == 1:                                     # no copy: it would lose channels_last
        return x, cond
    return x.repeat_interleave(n, 0), None if cond is None else cond.repeat_interleave(n, 0)


def karras(u, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """Warp u in [0, 1] to a noise level: 0 -> sigma_max, 1 -> sigma_min.  EDM eq. 5."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + u * (low - high)) ** rho


def karras_sigmas(n, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """The (n,) noise levels of EDM's sampler, descending; float64, since Heun adds them up."""
    return karras(torch.linspace(0, 1, n, dtype=torch.float64), sigma_min, sigma_max, rho)


@functools.lru_cache(maxsize=8)
def sd_sigmas(device="cpu"):
    """The (1000,) noise levels of Stable Diffusion 1 and 2, .0292 to 14.61, by timestep.

    sqrt((1 - abar) / abar) of the "scaled linear" schedule: sqrt(beta) rises linearly.
    """
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - beta).cumprod(0)
    return ((1 - abar) / abar).sqrt().float().to(device)


def parse_sigma(spec):
    """'karras(low,high)' -> ('karras', low, high), and so on.  raises ValueError."""
    match = re.fullmatch(r"(lognormal|karras|sd|flow)\(([^,]+),([^,]+)\)", spec.replace(" ", ""))
    try:
        name = match[1]
        a, b = float(match[2]), float(match[3])
    except (TypeError, ValueError):
        raise ValueError("noise must read lognormal(mean,std), karras(low,high), sd(first,last) or "
                         f"flow(low,high), got {spec!r}") from None
    if name == "sd" and not (0 <= a <= b <= 999 and a == int(a) and b == int(b)):
        raise ValueError(f"noise {spec!r} needs whole timesteps, 0 <= first <= last <= 999")
    if name == "lognormal" and not (-20 <= a <= 20 and 0 < b <= 20):
        raise ValueError(f"noise {spec!r} needs -20 <= mean <= 20 and 0 < std <= 20")
    if name == "karras" and not 1e-6 <= a < b <= 1e6:
        raise ValueError(f"noise {spec!r} needs 1e-6 <= low < high <= 1e6")
    if name == "flow" and not 0 < a < b < 1:
        raise ValueError(f"noise {spec!r} needs 0 < low < high < 1")
    return name, a, b


def interval(low, high, least):
    """A spec of the noise between two levels, uniform in sigma^(1/7).  `least` replaces a low of 0.

    It starts slightly above low. At low itself a target over sigma^2 - low^2 would be infinite.
    """
    low = low + (high - low) / 1000 if low else min(least, high / 10)
    return f"karras({low},{high})"


def draw_sigma(spec, n, device):
    """(n,) random noise levels, float32.

    lognormal(m,s)  ln sigma ~ N(m, s^2): EDM's training distribution has m = -1.2, s = 1.2
    sd(first,last)  timestep uniform from first to last, on sd_sigmas: "20..980" is sd(20,980)
    karras(lo,hi)   sigma^(1/7) uniform between lo and hi: DMD's "uniform timestep 20..980 of 1000"
                    is karras(0.0032,72), SiD's "t_max = 800" is karras(0.002,24.4)
    flow(lo,hi)     flow matching's time t uniform between lo and hi: sigma = t / (1 - t).
                    Logit-normal(m, s) t is lognormal(m,s).  A time shift c multiplies sigma by c,
                    which makes it lognormal(m + ln c,s)
    """
    name, a, b = parse_sigma(spec)
    if name == "lognormal":
        return torch.exp(a + b * torch.randn(n, device=device))
    if name == "sd":
        return sd_sigmas(str(device))[torch.randint(int(a), int(b) + 1, (n,), device=device)]
    u = torch.rand(n, device=device)
    if name == "flow":
        t = a + (b - a) * u
        return t / (1 - t)
    return karras(u, a, b)

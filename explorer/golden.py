"""Writes golden.json: what the package says at some points, in float64, for math.js to reproduce.

    python explorer/golden.py            # from the repository's root
    node explorer/check.js               # compares math.js with it, to 1e-6
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F

from nano_dmd.decoupled import augmentation_gradient
from nano_dmd.denoiser import score
from nano_dmd.dmd_loss import descend, dmd_gradient
from nano_dmd.f_distill import WEIGHTS, sample_weights
from nano_dmd.gan import generator_logit_loss
from nano_dmd.noise import add_noise, expand, karras_sigmas
from nano_dmd.real_score import guided, normaliser
from nano_dmd.sid_loss import sid_integrand
from toy.mixtures import MIXTURES, Mixture

FILE = Path(__file__).parent / "golden.json"
CASES = [("ring8", 0.1), ("ring8_skewed", 0.8), ("grid25", 0.05), ("spirals", 0.2),
         ("checkerboard", 2.5)]
ALPHAS = (0.0, 0.5, 1.2)
WIDTH, GUIDANCE, W_GAN = 0.0625, 2.5, 0.25             # a width that float32 has exactly
METHODS = ("dmd", "diff_instruct", "sid", "gan", "dmd2", "f_distill", "decoupled")


def double(means, std, weights=None):
    """A mixture in float64; every other mode is of class 1."""
    return Mixture(means, std, weights, labels=torch.arange(len(means)) % 2).to(torch.float64)


def shape(name):
    plain = MIXTURES[name]()
    return double(plain.means, plain.std, plain.weights)


def normal(generator, *size):
    """Unit normals that are float32 numbers: a mixture takes no others as means."""
    return torch.randn(*size, generator=generator).double()


def sid_parts(x, sigma, noise, real, fake, alpha, normalise):
    """sid_integrand summed over pixels (B,), its gradient's part at fixed xt, and through xt."""
    x = x.clone().requires_grad_(True)
    xt = add_noise(x, sigma, noise)
    d_real, d_fake = real(xt, sigma), fake(xt, sigma)
    value = sid_integrand(x, d_real, d_fake, alpha, normalise).sum(1)
    total, = torch.autograd.grad(value.sum(), x, retain_graph=True)
    fixed = sid_integrand(x, d_real.detach(), d_fake.detach(), alpha, normalise).sum()
    direct, = torch.autograd.grad(fixed, x)
    return value.detach(), direct, total - direct


def gan_parts(x, sigma, noise, real, fake):
    """The best discriminator's logit (B,), the generator's loss (B,), and its gradient."""
    x = x.clone().requires_grad_(True)
    xt = add_noise(x, sigma, noise)
    logit = real.log_prob(xt, sigma) - fake.log_prob(xt, sigma)
    g, = torch.autograd.grad(len(x) * generator_logit_loss(logit), x)
    return logit.detach(), F.softplus(-logit).detach(), g


def jacobian(denoiser, xt, sigma):
    """(B, 3): xx, xy, yy of dD / dxt, which is symmetric."""
    rows = []
    for one, level in zip(xt, sigma):
        J = torch.autograd.functional.jacobian(lambda v: denoiser(v[None], level[None])[0], one)
        rows.append(torch.stack([J[0, 0], J[0, 1], J[1, 1]]))
    return torch.stack(rows)


def point_case(name, level, generator):
    """All one-sample quantities of four samples, on a shape at one noise level."""
    real, n = shape(name), 4
    particles = 0.5 * normal(generator, 12, 2)
    own, noise = normal(generator, n, 2), normal(generator, n, 2)
    fake, sigma = double(particles, WIDTH), torch.full((n,), level, dtype=torch.float64)
    x = particles[:n] + WIDTH * own
    xt, ones = add_noise(x, sigma, noise), torch.ones(n, dtype=torch.long)
    d_real, d_fake, d_cond = real(xt, sigma), fake(xt, sigma), real(xt, sigma, ones)
    logit, gan_loss, gan = gan_parts(x, sigma, noise, real, fake)
    sid = {f"{alpha} {normalise}": sid_parts(x, sigma, noise, real, fake, alpha, normalise)
           for alpha in ALPHAS for normalise in (True, False)}
    return dict(
        shape=name, sigma=level, particles=particles, x=x, xt=xt, d_real=d_real, d_fake=d_fake,
        d_cond=d_cond, d_guided=guided(real, xt, sigma, ones, GUIDANCE),
        score_real=real.score(xt, sigma), score_fake=score(fake, xt, sigma),
        J_real=jacobian(real, xt, sigma), J_fake=jacobian(fake, xt, sigma),
        log_real=real.log_prob(xt, sigma), log_fake=fake.log_prob(xt, sigma),
        normaliser=normaliser(x, d_real), dmd=dmd_gradient(x, d_real, d_fake),
        diff_instruct=d_fake - d_real, sid=sid, logit=logit, gan_loss=gan_loss, gan=gan,
        augmentation=augmentation_gradient(x, d_cond, d_real, GUIDANCE),
        weights={h: WEIGHTS[h](logit.clamp(-5, 5).exp()) for h in WEIGHTS})


def descended(x, g):
    """What a loss with the gradient g (B, 2) prints: (B,)."""
    return descend(x, g).mean(1)


def losses(method, x, sigma, noise, real, data, fake):
    """Two parts of a method's gradient, (B, 2) each, and its value, (B,): losses of the package."""
    xt, nothing = add_noise(x, sigma, noise), torch.zeros_like(x)
    d_real, d_fake = real(xt, sigma), fake(xt, sigma)
    if method == "sid":
        integrand, direct, path = sid_parts(x, sigma, noise, real, fake, 1.2, True)
        return direct, path, integrand / 2
    if method == "decoupled":
        d_cond = real(xt, sigma, torch.ones(len(x), dtype=torch.long))
        match = dmd_gradient(x, d_cond, d_fake)
        augment = augmentation_gradient(x, d_cond, d_real, GUIDANCE)
        return match, augment, descended(x, match) + descended(x, augment)
    logit, gan_loss, gan = gan_parts(x, sigma, noise, data, fake)
    if method == "gan":
        return gan, nothing, gan_loss
    g = d_fake - d_real if method == "diff_instruct" else dmd_gradient(x, d_real, d_fake)
    if method == "f_distill":
        g = expand(sample_weights(logit, sigma, "js"), x) * g
    if method == "dmd2":
        return g, W_GAN * gan, descended(x, g) + W_GAN * gan_loss
    return g, nothing, descended(x, g)


def batch_case(generator):
    """gradients() of math.js: 32 particles, two noise levels, the mean over both, every method."""
    real, data, n = shape("ring8_skewed"), shape("ring8"), 32
    particles = 0.5 * normal(generator, n, 2)
    own, noise = normal(generator, 2 * n, 2), normal(generator, 2 * n, 2)
    sigma = torch.tensor([0.25, 1.0]).double().repeat_interleave(n)
    x, fake, found = particles.repeat(2, 1) + WIDTH * own, double(particles, WIDTH), {}
    for method in METHODS:
        a, b, value = losses(method, x, sigma, noise, real, data, fake)
        a, b = (part.reshape(2, n, 2).mean(0) for part in (a, b))
        found[method] = dict(a=a, b=b if b.any() else [], loss=value.mean())
    return dict(particles=particles, own=own, noise=noise, sigmas=[0.25, 1.0], methods=found)


def kl_case(generator):
    """The mean of ln p_fake - ln p_real at the generator's samples, two for each particle."""
    real, particles = shape("grid25"), 0.5 * normal(generator, 16, 2)
    own = normal(generator, 32, 2)
    y = particles.repeat(2, 1) + WIDTH * own
    value = (double(particles, WIDTH).log_prob(y) - real.log_prob(y)).mean()
    return dict(shape="grid25", particles=particles, own=own, kl=value.item())


def rounded(value):
    """Tensors as flat lists, and 13 digits of every number."""
    if isinstance(value, torch.Tensor):
        value = value.flatten().tolist() if value.ndim else value.item()
    if isinstance(value, dict):
        return {name: rounded(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    return float(f"{value:.13g}") if isinstance(value, float) else value


def golden():
    """Everything that golden.json holds, as lists and numbers."""
    generator = torch.Generator().manual_seed(0)
    plain = {name: make() for name, make in MIXTURES.items()}
    shapes = {name: dict(means=mixture.means, std=mixture.std[0], weights=mixture.weights)
              for name, mixture in plain.items()}
    return rounded(dict(
        about="written by explorer/golden.py", width=WIDTH, guidance=GUIDANCE, w_gan=W_GAN,
        shapes=shapes, karras=karras_sigmas(5, 0.05, 2.0),
        points=[point_case(name, level, generator) for name, level in CASES],
        batch=batch_case(generator), kl=kl_case(generator)))


if __name__ == "__main__":
    FILE.write_text(json.dumps(golden(), separators=(",", ":")).replace('},"', '},\n"') + "\n")
    print(f"{FILE.name}: {FILE.stat().st_size} bytes")

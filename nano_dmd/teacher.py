"""Teachers: the diffusion models to be distilled, all behind one signature.

    Denoiser:  D(x, sigma, cond=None) -> E[x0 | x0 + sigma * eps = x, cond]

An exact mixture, an EDM network and eps- or v-prediction networks all become this, here and nowhere
else; every loss is written in it. The score follows by Tweedie's formula, (D(x, sigma) - x) / sigma^2.

EDM = Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models".
"""

import copy
import hashlib
import json
import time
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import nn
from tqdm import tqdm

from nano_dmd.checkpoint import UserError, cache_dir, load_tensors, load_weights, read_json, save_tensors, write_json
from nano_dmd.data import load_data
from nano_dmd.networks import MLP, UNet
from nano_dmd.noise import add_noise, draw_sigma, expand, karras_sigmas


class Denoiser(Protocol):
    """x (B, *S) float32; sigma (B,) > 0; cond None | (B,) int64.  Returns (B, *S), differentiable in x."""

    def __call__(self, x, sigma, cond=None): ...


class EDM(nn.Module):
    """EDM's preconditioning (table 1): the network always sees unit variance and predicts unit variance.

    D(x, sigma) = c_skip x + c_out F(c_in x, ln(sigma) / 4).  With bf16, F alone runs in bfloat16: sigma
    reaches 80, so x is scaled first and everything outside F stays float32.
    """

    def __init__(self, net, sigma_data=0.5, bf16=False):
        super().__init__()
        self.net, self.sigma_data, self.bf16 = net, sigma_data, bf16

    def _call(self, function, x, sigma, cond):
        c_in = (sigma**2 + self.sigma_data**2).rsqrt()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return function(expand(c_in, x) * x, sigma.log() / 4, cond).to(x.dtype)

    def forward(self, x, sigma, cond=None):
        s, d = expand(sigma, x), self.sigma_data
        norm = (s**2 + d**2).sqrt()
        return (d / norm) ** 2 * x + s * d / norm * self._call(self.net, x, sigma, cond)

    def features(self, x, sigma, cond=None):
        """Bottleneck activations (B, C, ...) of the network, for the GAN head."""
        return self._call(self.net.features, x, sigma, cond)


class FromEps(nn.Module):
    """A variance-preserving eps-prediction network net(x_vp, t, cond) as a Denoiser.

    x_vp = x / sqrt(1 + sigma^2) and x0 = x - sigma * eps.  alphas_cumprod (T,) is the training schedule;
    sigma -> t is the nearest log-sigma of its table (searchsorted is off by one on 200 of SD's 1000).
    """

    def __init__(self, net, alphas_cumprod):
        super().__init__()
        self.net = net
        abar = alphas_cumprod.double()
        self.register_buffer("sigmas", ((1 - abar) / abar).sqrt().float())            # (T,) ascending

    def timestep(self, sigma):
        """(B,) sigma -> (B,) int64 index of the nearest log-sigma."""
        return (sigma.log()[:, None] - self.sigmas.log()[None]).abs().argmin(1)

    def forward(self, x, sigma, cond=None):
        s = expand(sigma, x)
        return x - s * self.net(x / (1 + s**2).sqrt(), self.timestep(sigma), cond)


class FromV(FromEps):
    """The same for v-prediction, v = alpha eps - sqrt(1 - alpha^2) x0 (Salimans & Ho 2022)."""

    def forward(self, x, sigma, cond=None):
        s = expand(sigma, x)
        return (x / (1 + s**2).sqrt() - s * self.net(x / (1 + s**2).sqrt(), self.timestep(sigma), cond)) / (1 + s**2).sqrt()


@torch.no_grad()
def heun(denoiser, z, cond=None, steps=18, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """EDM's deterministic sampler (algorithm 1): 2 * steps - 1 network evaluations.

    z (B, *S) is unit normal noise; returns x (B, *S) in z's dtype; float64 between network calls.
    """
    sigmas = [*karras_sigmas(steps, sigma_min, sigma_max, rho).tolist(), 0.0]
    x = z.double() * sigmas[0]

    def slope(x, sigma):                                          # dx / dsigma of the probability-flow ODE
        d = denoiser(x.to(z.dtype), z.new_full(z.shape[:1], sigma), cond)
        return (x - d.double()) / sigma

    for sigma, following in zip(sigmas, sigmas[1:]):
        here = slope(x, sigma)
        x_euler = x + (following - sigma) * here
        x = x_euler if following == 0 else x + (following - sigma) * (here + slope(x_euler, following)) / 2
    return x.to(z.dtype)


def edm_loss(denoiser, x, sigma, noise, cond=None, sigma_data=0.5):
    """EDM's denoising loss (eq. 8), per element:  (sigma^2 + sd^2) / (sigma sd)^2 * (D(x + sigma noise) - x)^2.

    x, noise (B, *S), sigma (B,).  DMD2's critic weight 1/sigma^2 + 1/sd^2 (edm_guidance.py:152) is the same.
    """
    weight = 1 / sigma**2 + 1 / sigma_data**2
    return expand(weight, x) * (denoiser(add_noise(x, sigma, noise), sigma, cond) - x) ** 2


class Teacher(NamedTuple):
    """denoiser: what the real score asks; net: the EDM network students start from (None for an exact mixture)."""

    denoiser: Denoiser
    shape: tuple                    # (*S) of one sample
    classes: int                    # 0 = unconditional
    sigma_data: float
    data: str                       # name of the data set it was trained on
    net: EDM | None = None
    recipe: dict | None = None      # how net was trained: a RECIPES entry plus data, seed and seconds


NETWORKS = {"mlp": MLP, "unet": UNet}

# How a teacher is trained when nobody has one: steps x batch images, Adam lr, ema half-life in steps.
RECIPES = {
    "toy": dict(network="mlp", args={}, sigma_data=0.5, bf16=False, sigma="lognormal(-1.2,1.4)",
                steps=2500, batch=1024, lr=2e-3, ema=100, label_dropout=0.0),
    "digits": dict(network="unet", args=dict(channels=1, classes=10), sigma_data=0.75, bf16=True,
                   sigma="lognormal(-1.2,1.2)", steps=1200, batch=128, lr=3e-3, ema=100, label_dropout=0.0),
}


def build_edm(recipe):
    return EDM(NETWORKS[recipe["network"]](**recipe["args"]), recipe["sigma_data"], recipe["bf16"])


def train_teacher(denoiser, draw, recipe, show=True):
    """Fit an EDM denoiser to draw(n) -> (x, cond) by denoising; returns the averaged copy (EMA).

    The learning rate warms up for 50 steps and falls linearly to 0 over the second half.
    """
    ema, steps = copy.deepcopy(denoiser), recipe["steps"]
    opt = torch.optim.Adam(denoiser.parameters(), betas=(0.9, 0.99), fused=True)
    bar = tqdm(range(steps), desc="teacher", disable=not show)
    for step in bar:
        opt.param_groups[0]["lr"] = recipe["lr"] * min(1, (step + 1) / 50, 2 * (1 - step / steps))
        x, cond = draw(recipe["batch"])
        if recipe["label_dropout"] and cond is not None:          # -1 = no class, what guidance asks for
            cond = cond.masked_fill(torch.rand(len(cond), device=x.device) < recipe["label_dropout"], -1)
        sigma = draw_sigma(recipe["sigma"], len(x), x.device)
        loss = edm_loss(denoiser, x, sigma, torch.randn_like(x), cond, recipe["sigma_data"]).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        lerp(ema, denoiser, 1 - 0.5 ** (1 / min(recipe["ema"], 1 + 0.1 * step)))
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return ema.requires_grad_(False).eval()


@torch.no_grad()
def lerp(slow, fast, weight):
    """Move every parameter of slow towards fast by weight in [0, 1] (buffers are constants here)."""
    torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), weight)


def fit_or_load(name, data_name, recipe, device, seed=0, show=True):
    """(EDM network, seconds) trained on a data set, from the cache if the same recipe was trained before."""
    recipe = dict(recipe, data=data_name, seed=seed)
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:10]
    folder = cache_dir() / f"teacher-{name.replace(':', '-')}-{key}"
    if not (folder / "teacher.safetensors").exists():
        start = time.process_time(), time.perf_counter()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net, data = build_edm(recipe).to(device), load_data(data_name, device)
            rng = torch.Generator().manual_seed(seed)
            net = train_teacher(net, lambda n: data.sample(n, rng), recipe, show)
        save_teacher(folder, net, dict(recipe, cpu_seconds=round(time.process_time() - start[0], 1),
                                         seconds=round(time.perf_counter() - start[1], 1)))
    return read_teacher(folder, device)


def weights_digest(net):
    """Ten hex digits that name these weights, for cache keys."""
    data = b"".join(p.detach().cpu().numpy().tobytes() for p in net.parameters())
    return hashlib.sha256(data).hexdigest()[:10]


def save_teacher(folder, net, recipe):
    """Make folder one that load_teacher takes.  recipe: a RECIPES entry plus data, seed and seconds."""
    write_json(Path(folder) / "teacher.json", recipe)
    save_tensors(Path(folder) / "teacher.safetensors", net.state_dict())


def read_teacher(folder, device):
    recipe, path = read_json(Path(folder) / "teacher.json"), Path(folder) / "teacher.safetensors"
    try:
        numbers = {k: float(recipe[k]) for k in ("sigma_data", "seconds", "cpu_seconds")}
        recipe = dict(recipe, data=str(recipe["data"]), **numbers)
        net = build_edm(recipe).to(device)
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{folder}/teacher.json does not describe a teacher ({type(e).__name__}: {e})") from e
    load_weights(net, load_tensors(path), path)
    return net.requires_grad_(False).eval(), recipe


def load_teacher(name, device="cpu", steps=0, seed=0, show=True):
    """A Teacher by name.

    toy:NAME   exact mixture, see toy.mixtures.MIXTURES; its score has no error at any sigma
    digits     trained here on the shipped digits (40 s on two cores), then kept in the cache
    a folder   of a previous run, or of the cache: teacher.json and teacher.safetensors

    steps, seed override the training recipe.  raises UserError if there is no such teacher.
    """
    if name.startswith("toy:"):
        mixture = load_data(name, device)
        return Teacher(mixture, mixture.shape, mixture.classes, RECIPES["toy"]["sigma_data"], name)
    if name in RECIPES and name != "toy":
        recipe = dict(RECIPES[name], **({"steps": steps} if steps else {}))
        net, recipe = fit_or_load(name, name, recipe, device, seed, show)
    elif (Path(name) / "teacher.json").is_file():
        net, recipe = read_teacher(name, device)
    else:
        raise UserError(f"no teacher {name!r}: use toy:NAME, {', '.join(r for r in RECIPES if r != 'toy')}, "
                        "or the folder of a run that trained one")
    data = load_data(recipe["data"], device)
    return Teacher(net, data.shape, data.classes, recipe["sigma_data"], recipe["data"], net, recipe)


def make_pairs(denoiser, z, cond=None, batch=500, show=True, **heun_args):
    """DMD's regression targets: x (N, *S), the Heun answer of the teacher to each unit noise z (N, *S)."""
    chunks = tqdm(range(0, len(z), batch), desc="pairs", disable=not show)
    x = [heun(denoiser, z[i : i + batch], None if cond is None else cond[i : i + batch], **heun_args) for i in chunks]
    return torch.cat(x)

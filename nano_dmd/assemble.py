"""What a run needs around its steps: device, nets, optimisers, data, pictures of progress, and its saved state."""

import copy
import hashlib
import os
import platform
import sys
from dataclasses import asdict, dataclass, field
from typing import Callable

import torch
from torch import nn

from nano_dmd import pictures
from nano_dmd.checkpoint import UserError, cache_dir, first_line, load_tensors, load_weights, save_tensors
from nano_dmd.data import load_data
from nano_dmd.diagnostics import LEVELS, to_floats
from nano_dmd.dmd_loss import dmd_gradient
from nano_dmd.fake_score import FakeScore
from nano_dmd.gan import Discriminator
from nano_dmd.generator import Generator
from nano_dmd.noise import PROCESS, Batch, add_noise, rows
from nano_dmd.real_score import RealScore
from nano_dmd.teacher import heun, load_teacher, make_pairs
from nano_dmd.tracking import tracker
from nano_dmd.zoo import RECIPES, fit_or_load, weights_digest


@dataclass
class Nets:
    """real is frozen; the critic is fake + discriminator; ema is the generator people sample from.

    parallel holds {"critic", "generator"}: DDP where several processes share a batch, else nothing.
    """

    real: nn.Module
    fake: nn.Module
    discriminator: nn.Module
    generator: nn.Module
    ema: nn.Module
    sigma_data: float
    lpips: Callable | None = None
    parallel: dict = field(default_factory=dict)


def pick_device(name):
    """'auto' -> cuda if there is one; 'cuda' -> under torchrun, this process's own.

    raises UserError for a device this machine lacks.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index)
            torch.cuda.set_device(device)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as e:      # torch raises any of them, by kind of device
        raise UserError(f"no device {name!r} on this machine ({first_line(e)}); try --device cpu") from e
    return device


def find_teacher(cfg, device):
    """The Teacher, with a network to start students from: an exact mixture gets one fitted to it."""
    teacher = load_teacher(cfg.teacher, device, cfg.teacher_steps, cfg.teacher_seed, cfg.data)
    if teacher.net is None:
        steps = {"steps": cfg.teacher_steps} if cfg.teacher_steps else {}
        net, recipe = fit_or_load(cfg.teacher, cfg.teacher, RECIPES["toy"] | steps, device, cfg.teacher_seed)
        teacher = teacher._replace(net=net, recipe=recipe)
    return teacher


def find_data(cfg, teacher, device, needed=False, data=None):
    """Real data that fits the teacher: what cfg.data says, else what the teacher was trained on here, else None.

    needed  a published teacher's data is looked for as well; data  what cfg.data names, if it is loaded already
    raises UserError if there is none, or it does not fit
    """
    name = cfg.data or (teacher.data if needed or teacher.recipe["seconds"] else "")
    if not name and needed:
        raise UserError(f"{cfg.method} with these settings needs real data, and that of {cfg.teacher} is not known: give --data")
    data = data or (load_data(name, device, cfg.flip) if name else None)
    if data and data.classes and not teacher.classes and data.shape == teacher.shape:
        data = data.unlabelled()
    if data and (data.shape, data.classes) != (teacher.shape, teacher.classes):
        raise UserError(f"--data {name} has samples of shape {data.shape} in {data.classes} classes, "
                        f"--teacher {cfg.teacher} makes {teacher.shape} in {teacher.classes}")
    return data


def cached_pairs(cfg, teacher, device):
    """{"z", "x"[, "cond"]} noise-image pairs of this teacher, from the cache if they were made before."""
    source = weights_digest(teacher.net) if teacher.denoiser is teacher.net else cfg.teacher
    key = hashlib.sha256(f"{cfg.pairs} {cfg.pair_steps} {cfg.pair_sigma} {source}".encode()).hexdigest()[:10]
    path = cache_dir() / f"pairs-{key}.safetensors"
    if not path.exists():
        rng = torch.Generator().manual_seed(0)
        z = torch.randn(cfg.pairs, *teacher.shape, generator=rng).to(device)
        cond = torch.randint(teacher.classes, (cfg.pairs,), generator=rng).to(device) if teacher.classes else None
        batch = 10_000 if len(teacher.shape) == 1 else 500
        x = make_pairs(teacher.denoiser, z, cond, batch, steps=cfg.pair_steps, sigma_max=cfg.pair_sigma)
        save_tensors(path, {"z": z, "x": x} | ({"cond": cond} if teacher.classes else {}))
    return {k: v.to(device) for k, v in load_tensors(path).items()}


def build(cfg, teacher, device):
    """(Nets, {"generator", "critic"} optimisers) of a fresh run."""
    torch.manual_seed(cfg.seed)                                   # from here on, cached teacher or not is the same
    generator, fake = Generator(teacher.net, cfg.sigma_list()), FakeScore(teacher.net)
    for net in (generator.net, fake.net, teacher.net):
        tune(net, cfg)
    z, cond = torch.zeros(2, *teacher.shape, device=device), torch.zeros(2, dtype=torch.long, device=device)
    features = fake.features(z, z.new_ones(2), cond if teacher.classes else None)
    discriminator = Discriminator(features.shape[1:]).to(device)
    nets = Nets(RealScore(teacher.denoiser, cfg.guidance), fake, discriminator, generator,
                copy.deepcopy(generator).requires_grad_(False), teacher.sigma_data)
    if cfg.reg_loss == "lpips" and cfg.method in ("dmd", "regression"):
        from nano_dmd.hub import lpips

        nets.lpips = lpips(device)
    adam = dict(betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay, fused=True)
    opts = {"generator": torch.optim.AdamW(generator.parameters(), **adam),
            "critic": torch.optim.AdamW([*fake.parameters(), *discriminator.parameters()], **adam)}
    return nets, opts


def tune(denoiser, cfg):
    """Speed and memory of one network, by cfg: precision, recomputation, compilation (in place: names stay)."""
    denoiser.bf16 = cfg.bf16
    if cfg.checkpointing:
        if not hasattr(denoiser.net, "checkpointing"):
            raise UserError(f"--checkpointing: {type(denoiser.net).__name__} cannot recompute activations; leave it out")
        denoiser.net.checkpointing = True
    if cfg.compile:
        denoiser.net.compile()


class Draw:
    """draw() -> Batch, this process's part of it; draw.latest is the last one.

    Indices, classes and steps come from the CPU generator rng, so that what the losses draw (torch's global
    stream) never changes the order of the data.
    """

    def __init__(self, cfg, teacher, data, pairs, rng, device):
        self.cfg, self.teacher, self.data, self.pairs, self.rng, self.device = cfg, teacher, data, pairs, rng, device
        self.k, self.latest = len(cfg.sigma_list()), None

    def integers(self, high, n):
        return rows(lambda n: torch.randint(high, (n,), generator=self.rng), n).to(self.device, non_blocking=True)

    def real(self, n):
        """n samples of the data and their labels."""
        if hasattr(self.data, "images"):                          # draws jointly, reads only its own rows
            return self.data.sample(n, self.rng)
        return [None if v is None else rows(lambda _: v, n) for v in self.data.sample(PROCESS["count"] * n, self.rng)]

    def __call__(self):
        cfg, classes, n = self.cfg, self.teacher.classes, self.cfg.batch // (PROCESS["count"] * self.cfg.accumulate)
        z = rows(lambda n: torch.randn(n, self.k, *self.teacher.shape, device=self.device), n).transpose(0, 1)
        batch = self.latest = Batch(z, self.integers(classes, n) if classes else None)
        if self.k > 1:
            batch.step = int(torch.randint(self.k, (), generator=self.rng))
            if not cfg.backward_simulation:
                batch.start, batch.cond = self.real(n)
        if cfg.w_disc and cfg.method == "dmd2":
            batch.real, batch.real_cond = self.real(n)
        if self.pairs:
            index = self.integers(len(self.pairs["z"]), n)
            batch.pair_z, batch.pair_x = self.pairs["z"][index][None], self.pairs["x"][index]
            batch.pair_cond = self.pairs["cond"][index] if classes else None
        return batch


class Peek:
    """Fixed noise, the teacher's answer to it, and pictures and numbers of the generator's answer over time."""

    def __init__(self, teacher, cfg, out, device, columns=8):
        rng, classes = torch.Generator().manual_seed(0), min(teacher.classes, 16)
        n = 20_000 if len(teacher.shape) == 1 else (classes or columns) * columns
        self.z = torch.randn(len(cfg.sigma_list()), n, *teacher.shape, generator=rng).to(device)
        self.cond = torch.arange(classes, device=device).repeat_interleave(columns) if classes else None
        self.columns, self.teacher, self.send = columns, heun(teacher.denoiser, self.z[0], self.cond), tracker(cfg, out)
        self.reference = to_floats(dict(x_std=self.teacher.std(), spread=self.teacher.std(0).mean()))

    @torch.no_grad()
    def save(self, generator, path, beside_teacher=False):
        panels = [self.teacher] * beside_teacher + [generator(self.z, self.cond)]
        pictures.save_picture(path, *[pictures.tile(x, self.columns) for x in panels])


    @torch.no_grad()
    def save_scores(self, nets, path, n=3):
        """x, xt, d_real, d_fake and DMD's gradient for n samples at each of diagnostics.LEVELS; images only."""
        if self.z.ndim == 3:                                      # points
            return
        z, cond = self.z[:, :: self.columns][:, :n], None if self.cond is None else self.cond[:: self.columns][:n]
        x = nets.generator(z, cond)
        noise, seen = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x), []
        for level in LEVELS:
            sigma = x.new_full(x.shape[:1], level)
            xt = add_noise(x, sigma, noise)
            d_real, d_fake = nets.real(xt, sigma, cond), nets.fake(xt, sigma, cond)
            seen.append((x, xt, d_real, d_fake, dmd_gradient(x, d_real, d_fake)))
        pictures.save_picture(path, pictures.score_grid(seen))


def state(cfg, step, seconds, nets, opts, rng):
    """Everything a resumed run needs to go on to the bit.  All processes share one random state, so one saves it."""
    modules = {name: getattr(nets, name).state_dict() for name in ("fake", "discriminator", "generator", "ema")}
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return dict(config=asdict(cfg), step=step, seconds=list(seconds), nets=modules, processes=PROCESS["count"],
                rng=[torch.get_rng_state(), cuda, rng.get_state()],
                opts={name: opt.state_dict() for name, opt in opts.items()})


def restore(saved, nets, opts, rng, path):
    """The inverse of state(): (step, seconds, processes); raises UserError naming the first thing that does not fit."""
    try:
        for name, tensors in saved["nets"].items():
            load_weights(getattr(nets, name), tensors, path)
        for name, tensors in saved["opts"].items():
            opts[name].load_state_dict(tensors)
        cpu, cuda, data = saved["rng"]
        rng.set_state(data.cpu())
        torch.set_rng_state(cpu.cpu())
        if torch.cuda.is_available() and cuda:
            torch.cuda.set_rng_state(cuda[0].cpu())
        return saved["step"], saved["seconds"], saved["processes"]
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as e:
        raise UserError(f"checkpoint {path} is not one of this version ({type(e).__name__}: {first_line(e)})") from e


def machine(device):
    """What a measurement was made on, and the peak memory of this process there: allocated on a GPU, else resident."""
    if device.type == "cuda":
        peak, name = torch.cuda.max_memory_allocated(device) / 2**20, torch.cuda.get_device_name(device)
    else:
        import resource                                           # Unix only

        unit = 2**20 if sys.platform == "darwin" else 2**10       # bytes there, KiB elsewhere
        peak, name = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, platform.processor() or platform.machine()
    return dict(peak_memory_mib=round(peak), device=name, threads=torch.get_num_threads(), torch=torch.__version__,
                python=platform.python_version())

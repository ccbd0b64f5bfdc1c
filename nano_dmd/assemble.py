"""What a run needs around its steps: device, nets, optimisers, data, pictures of progress, and its saved state."""

import os
import platform
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Callable

import torch
from torch import nn

from nano_dmd import pictures
from nano_dmd.cache import cached, digest, sources
from nano_dmd.checkpoint import (UserError, first_line, load_checkpoint, load_tensors, load_weights, note, own_state,
                                 save_tensors)
from nano_dmd.data import load_data, look_up, resident
from nano_dmd.diagnostics import LEVELS, to_floats
from nano_dmd.dmd_loss import dmd_gradient
from nano_dmd.fake_score import FakeScore
from nano_dmd.gan import Discriminator
from nano_dmd.generator import Generator
from nano_dmd.lora import sharing_copy
from nano_dmd.noise import PROCESS, Batch, add_noise, expand, rows
from nano_dmd.parallel import whole
from nano_dmd.presets import Config, same_run
from nano_dmd.real_score import RealScore
from nano_dmd.schema import wrong_tensors
from nano_dmd.teacher import fast_bf16, heun, load_teacher, make_pairs
from nano_dmd.tracking import tracker
from nano_dmd.zoo import RECIPES, compile_net, fit_or_load, weights_digest


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

    raises UserError for a device that this machine lacks or that cannot do what is needed.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index)
            torch.cuda.set_device(device)
        if device.type == "cpu" and device.index:
            raise RuntimeError("there is one CPU")
        torch.empty(1, dtype=torch.float64, device=device).cpu()  # heun integrates in float64, which Apple's mps has not
    except (RuntimeError, AssertionError, ImportError, TypeError) as e:               # any of them, by kind of device
        raise UserError(f"no device {name!r} to use on this machine ({first_line(e)}); try --device cpu") from e
    return device


def use_threads(count, device):
    """Set the number of CPU threads (0 = torch's choice), with a hint where they will wait: threads of a small network wait for
    each other, and with one core busy elsewhere two of them took 3 times as long as one (LOG.md)."""
    if count:
        torch.set_num_threads(count)
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    load = 0.0
    with suppress(AttributeError, OSError):                       # Windows has none
        load = os.getloadavg()[0]
    if device.type == "cpu" and threads > 1 and load + threads > cores + 0.5:
        print(f"other programs use {load:.1f} of {cores} cores: --threads 1 may be several times faster than {threads}",
              file=sys.stderr, flush=True)


def find_teacher(cfg, device, resumed=""):
    """The Teacher, with a network to start students from: an exact mixture gets one fitted to it.

    resumed  the folder of a run, whose teacher it is then, whatever became of the data it was trained on
    """
    if resumed:
        teacher = load_teacher(str(resumed), device)
        return teacher._replace(denoiser=load_data(cfg.teacher, device)) if cfg.teacher.startswith("toy:") else teacher
    teacher = load_teacher(cfg.teacher, device, cfg.teacher_steps, cfg.teacher_seed, cfg.data, compile=cfg.compile)
    if teacher.net is None:
        check_guidance(cfg, teacher.classes, RECIPES["toy"])
        steps = {"steps": cfg.teacher_steps} if cfg.teacher_steps else {}
        net, recipe = fit_or_load(cfg.teacher, cfg.teacher, RECIPES["toy"] | steps, device, cfg.teacher_seed, compile=cfg.compile)
        teacher = teacher._replace(net=net, recipe=recipe)
    check_guidance(cfg, teacher.classes, teacher.recipe)
    return teacher


def find_data(cfg, teacher, device, needed=False, data=None):
    """Real data that fits the teacher: what cfg.data says, else what the teacher was trained on here, else None.

    needed  a published teacher's data is looked for as well; data  what cfg.data names, if it is loaded already
    raises UserError if there is none, or it does not fit
    """
    name = cfg.data or (teacher.data if needed or teacher.recipe["seconds"] else "")
    if not name and needed:
        raise UserError(f"{cfg.method} with these settings needs real data, and that of {cfg.teacher} is not known: give --data")
    if name and is_latent(teacher):
        from nano_dmd.stable_diffusion import Latents

        return Latents(teacher.recipe["source"], name, teacher.shape, device)
    data = data or (load_data(name, device, cfg.flip) if name else None)
    if data and data.classes and not teacher.classes and data.shape == teacher.shape:
        data = data.unlabelled()
    if data and (data.shape, data.classes) != (teacher.shape, teacher.classes):
        raise UserError(f"--data {name} has samples of shape {data.shape} in {data.classes} classes, "
                        f"--teacher {cfg.teacher} makes {teacher.shape} in {teacher.classes}")
    return data


def is_latent(teacher):
    """Stable Diffusion: x are latents, cond are text embeddings."""
    return "source" in (teacher.recipe or {})


def find_prompts(cfg, teacher):
    """The Prompts to train on, None for a teacher without text.  raises UserError if there are none but should be."""
    if not is_latent(teacher):
        return None
    from nano_dmd.stable_diffusion import read_prompts

    if not cfg.prompts:
        raise UserError(f"{cfg.teacher} listens to text: give a file with one prompt to a line, --prompts FILE")
    prompts, shape = read_prompts(teacher.recipe["source"], cfg.prompts), teacher.net.net.empty.shape[1:]
    if prompts.table.shape[1:] != shape:
        raise UserError(f"the embeddings in the cache are {prompts.table.shape[1:]} each, not {tuple(shape)}: "
                        "python -m nano_dmd.cache --clear text")
    return prompts


def check_guidance(cfg, classes, recipe):
    """Guidance and dropped labels need a teacher that can be asked without a class.  raises UserError where it cannot; says so
    where it can, but was never taught to."""
    asked = [n for n in ("guidance", "fake_guidance", "critic_dropout") if getattr(cfg, n) != getattr(Config, n)]
    if not asked or "source" in recipe:                           # a pipeline with text knows the empty prompt
        return
    if not classes or recipe["network"] == "diffusers":
        raise UserError(f"--{asked[0]} {getattr(cfg, asked[0])} needs a teacher that knows classes and can be asked without one: "
                        f"{cfg.teacher} {'must be told a class' if classes else 'has no classes'}; leave it out")
    if not recipe.get("label_dropout"):
        note(f"{cfg.teacher} was not trained here to be asked without a class, so what --{asked[0]} compares with may be poor")


def cached_pairs(cfg, teacher, device, prompts=None):
    """{"z", "x"[, "cond"]} noise-image pairs of the guided teacher, from the cache if they were made before.

    cond is a class, or the number of a prompt, and stays on the CPU, where Draw looks it up.
    """
    kinds = len(prompts) if prompts else teacher.classes
    made_of = dict(pairs=cfg.pairs, steps=cfg.pair_steps, sigma_min=teacher.sigmas[0], sigma_max=cfg.pair_sigma, kinds=kinds,
                   shape=teacher.shape, teacher=cfg.teacher, guidance=cfg.guidance, **teacher_digest(cfg, teacher, prompts))

    def make(path):
        rng = torch.Generator().manual_seed(0)
        z = torch.randn(cfg.pairs, *teacher.shape, generator=rng).to(device)
        cond = torch.randint(kinds, (cfg.pairs,), generator=rng).to(device) if kinds else None
        batch = 10_000 if len(teacher.shape) == 1 else 8 if prompts else 500
        args = dict(steps=cfg.pair_steps, sigma_min=teacher.sigmas[0], sigma_max=cfg.pair_sigma)
        x = make_pairs(guided_by(teacher, cfg, prompts), z, cond, batch, **args)
        save_tensors(path, {"z": z, "x": x} | ({"cond": cond} if kinds else {}))

    path, images = cached("pairs", made_of, make, ".safetensors"), (torch.float32, (cfg.pairs, *teacher.shape))
    wanted = dict(z=images, x=images) | (dict(cond=(torch.int64, (cfg.pairs,))) if kinds else {})
    pairs = load_tensors(path, wanted)
    if kinds and not ((pairs["cond"] >= 0) & (pairs["cond"] < kinds)).all():
        raise UserError(f"{path} is damaged: a class or prompt is not among {kinds}; delete it to have it made again")
    return {k: v if k == "cond" else resident(v, device) for k, v in pairs.items()}


def teacher_digest(cfg, teacher, prompts):
    """What the teacher's answers depend on: a pipeline's files, prompts and guidance; else all numbers it computes with."""
    if prompts:
        from nano_dmd.stable_diffusion import RANDOM, hub

        source = teacher.recipe["source"]
        return dict(files=source if source in RANDOM else hub.version(source), texts=digest(prompts.texts))
    if teacher.denoiser is teacher.net:
        args = digest([teacher.recipe["network"], teacher.recipe["args"]])
        return dict(weights=weights_digest(teacher.net), args=args, sigma_data=teacher.sigma_data)
    mixture = load_data(cfg.teacher)
    return dict(mixture=[v.tolist() for v in (mixture.means, mixture.std, mixture.weights)])


def guided_by(teacher, cfg, prompts=None):
    """The teacher as pairs and pictures of text ask it: guided; for text cond is the number of a prompt."""
    real = teacher.denoiser if cfg.guidance == 1 else RealScore(teacher.denoiser, cfg.guidance)
    if not prompts:
        return real
    return lambda x, sigma, cond: real(x, sigma, prompts[cond].to(x.device))


def build(cfg, teacher, device):
    """(Nets, {"generator", "critic"} optimisers) of a fresh run."""
    torch.manual_seed(cfg.seed)                                   # from here on, cached teacher or not is the same
    generator = Generator(teacher.net, cfg.sigma_list(), cfg.lora_generator, cfg.unit_noise)
    fake = FakeScore(teacher.net, cfg.lora_critic, cfg.fake_guidance)
    for net in (generator.net, fake.net, teacher.net):
        tune(net, cfg, device)
    if cfg.half_frozen and fast_bf16(device):                     # in place: copies that share these weights follow
        halve(teacher.net)
    z, cond = torch.zeros(2, *teacher.shape, device=device), torch.zeros(2, dtype=torch.long, device=device)
    with torch.no_grad():
        features = fake.features(z, z.new_ones(2), cond if teacher.classes else None)
    # drawn without GAN too, or the same seed would start another run; but not 10 M weights of it
    discriminator = nn.Identity() if is_latent(teacher) and not cfg.w_disc else Discriminator(features.shape[1:]).to(device)
    ema = sharing_copy(generator).requires_grad_(False) if cfg.ema else generator
    for net in (generator.net, fake.net, teacher.net) if cfg.compile else ():
        compile_net(net.net)
    nets = Nets(RealScore(teacher.denoiser, cfg.guidance), fake, discriminator, generator, ema, teacher.sigma_data)
    if cfg.reg_loss == "lpips" and cfg.method in ("dmd", "regression"):
        nets.lpips = perceptual_distance(cfg, teacher, device)
    if cfg.init:
        begin_from(cfg.init, nets, device)
    if cfg.offload_teacher and isinstance(teacher.denoiser, nn.Module):               # not a formula
        lend(teacher.denoiser, device)
    opts = {"generator": optimiser(generator.parameters(), cfg),
            "critic": optimiser([*fake.parameters(), *discriminator.parameters()], cfg)}
    return nets, opts


def perceptual_distance(cfg, teacher, device):
    """LPIPS of x (B, *S), or of the images of x where these are latents."""
    from nano_dmd.hub import lpips
    from nano_dmd.stable_diffusion import differentiable_decoder

    latent = is_latent(teacher)
    return lpips(device, differentiable_decoder(cfg.lpips_decoder, teacher.recipe["source"], device) if latent else None)


def begin_from(folder, nets, device):
    """Load generator and fake score of another run of the same networks (its checkpoint.pt)."""
    path = Path(folder) / "checkpoint.pt"
    saved = load_checkpoint(path, device)["nets"]
    for name in ("generator", "fake", "ema"):
        load_weights(getattr(nets, name), saved.get("generator" if name == "ema" else name, {}), path)


def optimiser(parameters, cfg):
    """AdamW on what is trained among them; its two moments take 8 bytes a weight, 2 with cfg.adam8bit (bitsandbytes)."""
    args = dict(betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay)
    trained = [p for p in parameters if p.requires_grad]
    if not cfg.adam8bit:
        return torch.optim.AdamW(trained, **args, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except (ImportError, RuntimeError) as e:
        raise UserError(f'--adam8bit needs bitsandbytes ({first_line(e)}): pip install "nano_dmd[sd]", or leave it out') from e
    return AdamW8bit(trained, **args)


def halve(denoiser):
    """Keep a frozen network's weights in bfloat16; the adapter's noise table stays float32."""
    for p in denoiser.net.parameters():
        p.data = p.data.bfloat16()


def lend(denoiser, device):
    """Keep a frozen denoiser's weights in the host's memory; device has them during each call, so no gradient may pass."""
    home = {p: p.data.cpu() for p in denoiser.parameters()}
    if torch.device(device).type == "cuda":
        home = {p: data.pin_memory() for p, data in home.items()}                     # twice as fast to copy

    def come(*_):
        for p in home:
            p.data = home[p].to(device, non_blocking=True)

    def go(*_):
        for p in home:
            p.data = home[p]

    go()
    denoiser.register_forward_pre_hook(come)
    denoiser.register_forward_hook(go, always_call=True)


def tune(denoiser, cfg, device):
    """Speed and memory of one network, by cfg: precision and recomputation."""
    denoiser.bf16 = cfg.bf16 and fast_bf16(device)
    if cfg.checkpointing:
        if not hasattr(denoiser.net, "checkpointing"):
            raise UserError(f"--checkpointing: {type(denoiser.net).__name__} cannot recompute activations; leave it out")
        denoiser.net.checkpointing = True


class Draw:
    """draw() -> Batch, this process's part of it; draw.latest is the last one.

    Indices, classes and steps come from the CPU generator rng, so that what the losses draw (torch's global
    stream) never changes the order of the data.
    """

    def __init__(self, cfg, teacher, data, pairs, rng, device, prompts=None):
        self.cfg, self.teacher, self.data, self.pairs, self.rng, self.device = cfg, teacher, data, pairs, rng, device
        self.prompts, self.sources = prompts, sources(cfg)       # once: a large folder takes seconds to look through
        self.k, self.latest = len(cfg.sigma_list()), None

    def integers(self, high, n):
        """On the CPU: to look something up there, the device need not be waited for."""
        return rows(lambda n: torch.randint(high, (n,), generator=self.rng), n)

    def real(self, n):
        """n samples of the data and their labels."""
        if hasattr(self.data, "images"):                          # draws jointly, reads only its own rows
            return self.data.sample(n, self.rng)
        return [None if v is None else rows(lambda _: v, n) for v in self.data.sample(PROCESS["count"] * n, self.rng)]

    def cond(self, index):
        """What the networks are told: the class itself, or the embeddings of that prompt."""
        return (self.prompts[index] if self.prompts else index).to(self.device, non_blocking=True)

    def dropped(self, cond, n):
        """cond (n, ...) with a share cfg.critic_dropout replaced by "no class" or the empty prompt."""
        drop = rows(lambda n: torch.rand(n, generator=self.rng) < self.cfg.critic_dropout, n)
        empty = self.teacher.net.net.empty.to(cond) if self.prompts else torch.full_like(cond, -1)
        return torch.where(expand(drop.to(self.device, non_blocking=True), cond), empty, cond)

    def __call__(self):
        cfg, classes, n = self.cfg, self.teacher.classes, self.cfg.batch // (PROCESS["count"] * self.cfg.accumulate)
        z = rows(lambda n: torch.randn(n, self.k, *self.teacher.shape, device=self.device), n).transpose(0, 1)
        kinds = len(self.prompts) if self.prompts else classes
        batch = self.latest = Batch(z, self.cond(self.integers(kinds, n)) if kinds else None)
        if cfg.critic_dropout and kinds:
            batch.fake_cond = self.dropped(batch.cond, n)
        if self.k > 1:
            batch.step = int(torch.randint(self.k, (), generator=self.rng))
            if not cfg.backward_simulation:
                batch.start, batch.cond = self.real(n)
        if cfg.w_disc and cfg.method == "dmd2":
            batch.real, batch.real_cond = self.real(n)
        if self.pairs:
            index = self.integers(len(self.pairs["z"]), n)
            batch.pair_cond = self.cond(self.pairs["cond"][index]) if "cond" in self.pairs else None
            z, batch.pair_x = (look_up(self.pairs[name], index, self.device) for name in ("z", "x"))
            batch.pair_z = z[None]
        return batch


class Peek:
    """Fixed noise, the teacher's answer to it, and pictures and numbers of the generator's answer over time.

    Where weights are sharded no process can look alone: all do the same, and the first `writes`.
    """

    def __init__(self, teacher, cfg, out, device, columns=8, prompts=None, writes=True, step=0):
        self.writes = writes
        rng, classes = torch.Generator().manual_seed(0), min(teacher.classes, 16)
        n = 20_000 if len(teacher.shape) == 1 else columns // 2 if prompts else (classes or columns) * columns
        self.z = torch.randn(len(cfg.sigma_list()), n, *teacher.shape, generator=rng).to(device)
        self.cond = torch.arange(classes, device=device).repeat_interleave(columns) if classes else None
        self.columns, self.decode = n if prompts else columns, teacher.decode
        self.send = tracker(cfg, out, step) if writes else None
        if prompts:                                               # the first four, one sample each
            index = torch.arange(n, device=device) % len(prompts)
            sample = guided_by(teacher, cfg, prompts)
            self.cond = prompts[index].to(device)
            self.teacher = heun(sample, self.z[0], index, sigma_min=teacher.sigmas[0], sigma_max=teacher.sigmas[1])
        else:
            self.teacher = heun(teacher.denoiser, self.z[0], self.cond)
        self.reference = to_floats(dict(x_std=self.teacher.std(), spread=self.teacher.std(0).mean()))

    @torch.no_grad()
    def save(self, generator, path, beside_teacher=False):
        panels = [self.teacher] * beside_teacher + [generator(self.z, self.cond)]
        if self.writes:
            pictures.save_picture(path, *[self.tile(x) for x in panels])

    def tile(self, x):
        """One picture of samples, decoded where the teacher can."""
        if self.decode:
            return pictures.tile(self.decode(x), self.columns, scale=1)
        return pictures.tile(x, self.columns)

    @torch.no_grad()
    def save_scores(self, nets, path, n=3):
        """x, xt, d_real, d_fake and DMD's gradient for n samples at each of diagnostics.LEVELS; three channels of latents."""
        if self.z.ndim == 3:                                      # points
            return
        z, cond = self.z[:, :: self.columns][:, :n], None if self.cond is None else self.cond[:: self.columns][:n]
        x = nets.generator(z, cond)
        noise, seen = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x), []
        for level in LEVELS:
            sigma = x.new_full(x.shape[:1], level)
            xt = add_noise(x, sigma, noise)
            d_real, d_fake = nets.real(xt, sigma, cond), nets.fake(xt, sigma, cond)
            seen.append([v[:, :3] for v in (x, xt, d_real, d_fake, dmd_gradient(x, d_real, d_fake))])
        if self.writes:
            grid = pictures.score_grid(seen, scale=max(1, 64 // x.shape[-1]))
            rows, columns = [f"sigma {level}" for level in LEVELS], pictures.SHOWN * len(x)
            pictures.save_picture(path, pictures.labelled(grid, rows, columns))


class Clock:
    """[CPU, wall] seconds since the start, those of the earlier parts of a resumed run included."""

    def __init__(self, before=(0.0, 0.0)):
        self.zero = before[0] - time.process_time(), before[1] - time.perf_counter()

    def read(self):
        return [round(self.zero[0] + time.process_time(), 3), round(self.zero[1] + time.perf_counter(), 3)]


def state(cfg, step, seconds, nets, opts, rng, read):
    """Everything a resumed run needs to go on to the bit.  All processes share one random state, so one saves it.

    read  the fingerprints of what the run reads, cache.sources
    """
    modules = {name: own_state(getattr(nets, name)) for name in ("fake", "discriminator", "generator", "ema")}
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return dict(config=asdict(cfg), step=step, seconds=list(seconds), nets=whole(modules), processes=PROCESS["count"],
                rng=[torch.get_rng_state(), cuda, rng.get_state()],
                opts=whole({name: opt.state_dict() for name, opt in opts.items()}), sources=read)


def restore(saved, cfg, nets, opts, rng, path, read):
    """The inverse of state(): (step, seconds, processes); raises UserError naming the first thing that does not fit.

    Of the optimisers only the moments are taken: their settings follow from cfg, and must be the same.
    """
    try:
        if difference := same_run(cfg, Config(**saved["config"])):
            raise ValueError("it is of a run with {} {!r:.40}, not {!r:.40}".format(*(difference[i] for i in (0, 2, 1))))
        for name, v in read.items():
            if saved.get("sources", {}).get(name, v) != v:
                note(f"--{name} is not as it was when this run was started: what follows is another run than it would have been")
        if not 0 < saved["step"] <= cfg.steps or saved["processes"] < 1 or not saved["opts"].keys() == opts.keys():
            raise ValueError(f"step {saved['step']} of {cfg.steps}, optimisers {sorted(saved['opts'])}")
        for name in ("fake", "discriminator", "generator", "ema"):
            load_weights(getattr(nets, name), saved["nets"][name], path)
        for name, opt in opts.items():
            groups = opt.state_dict()["param_groups"]
            if problem := wrong_moments(saved["opts"][name], groups, opt, cfg):
                raise ValueError(f"the optimiser of the {name}: {problem}")
            opt.load_state_dict({"state": saved["opts"][name]["state"], "param_groups": groups})
        cpu, cuda, data = saved["rng"]
        rng.set_state(data.cpu())
        torch.set_rng_state(cpu.cpu())
        if torch.cuda.is_available() and cuda:
            torch.cuda.set_rng_state(cuda[0].cpu())
        return saved["step"], saved["seconds"], saved["processes"]
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as e:
        raise UserError(f"checkpoint {path} is not one of this version ({type(e).__name__}: {first_line(e)})") from e


def wrong_moments(saved, groups, opt, cfg):
    """What is wrong with an optimiser's saved state_dict, "" if nothing is.  groups: its own settings, which follow from cfg;
    another version of torch may have one more or less."""
    settings, weights = saved["param_groups"][0] if saved["param_groups"] else {}, opt.param_groups[0]["params"]
    for name in groups[0].keys() - {"lr"}:
        missing = name in ("params", "betas", "eps", "weight_decay") and name not in settings
        if missing or settings.get(name, groups[0][name]) != groups[0][name]:
            return f"{name} is {settings.get(name)!r:.40}, not {groups[0][name]!r:.40}"
    for index, found in saved["state"].items():
        if index not in groups[0]["params"] or not isinstance(found, dict):
            return f"there is no weight {index!r:.40}"
        if not cfg.adam8bit:                                      # bitsandbytes has formats of its own
            moments = dict.fromkeys(("exp_avg", "exp_avg_sq"), (torch.float32, tuple(weights[index].shape)))
            if problem := wrong_tensors(found, {"step": (torch.float32, ())} | moments):
                return problem
    return ""


def machine(device):
    """What a measurement was made on, and the peak memory of this process there: allocated on a GPU, else resident."""
    if device.type == "cuda":
        peak, name = torch.cuda.max_memory_allocated(device) / 2**20, torch.cuda.get_device_name(device)
    else:
        peak, name = None, platform.processor() or platform.machine()
        with suppress(ImportError):                               # Windows has no such module
            import resource

            unit = 2**20 if sys.platform == "darwin" else 2**10   # bytes there, KiB elsewhere
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return dict(peak_memory_mib=peak and round(peak), device=name, threads=torch.get_num_threads(), torch=torch.__version__,
                python=platform.python_version())

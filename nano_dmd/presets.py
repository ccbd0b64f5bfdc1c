"""Config (every knob, with its unit and default) and PRESETS (one line each).

Order of precedence: the defaults below < PRESETS[preset] < PRESETS[preset-method] < the command line.
"""

import argparse
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from nano_dmd.checkpoint import UserError, read_json
from nano_dmd.noise import parse_sigma


def knob(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    preset: str = knob("digits", "name of a line in PRESETS")
    method: str = knob("dmd", "dmd | dmd2 | sid | diff_instruct | regression")
    out: str = knob("", "run folder; empty = runs/PRESET-METHOD")
    seed: int = knob(0, "everything drawn in the run follows from it")
    device: str = knob("auto", "auto | cpu | cuda | cuda:1 ...; auto takes CUDA if there is one")
    threads: int = knob(0, "CPU threads; 0 = torch's choice")
    bf16: bool = knob(False, "run the networks (not x, not the losses) in bfloat16")

    teacher: str = knob("digits", "toy:NAME | digits | folder of a run that trained a teacher")
    teacher_steps: int = knob(0, "updates when training the teacher; 0 = its recipe's")
    teacher_seed: int = knob(0, "seed of the teacher's training")
    data: str = knob("", "real data for the GAN and the metrics; empty = what the teacher was trained on")
    guidance: float = knob(1.0, "teacher guidance w in u + w (c - u); 1 = off")
    pairs: int = knob(4000, "noise-image pairs for the regression loss, images")
    pair_steps: int = knob(18, "Heun steps per pair; network calls = 2 n - 1")
    pair_sigma: float = knob(80.0, "noise level the pairs are integrated from, data units")
    control: bool = knob(False, "dmd: also train a student by regression alone, the number to beat")

    steps: int = knob(400, "generator updates")
    batch: int = knob(64, "samples per update")
    critic_steps: int = knob(1, "critic updates per generator update (TTUR)")
    lr_generator: float = knob(1e-3, "Adam learning rate of the generator")
    lr_critic: float = knob(1e-3, "Adam learning rate of fake score and discriminator")
    beta1: float = knob(0.0, "Adam beta1; momentum lets generator and critic chase each other")
    beta2: float = knob(0.99, "Adam beta2")
    warmup: int = knob(30, "generator updates of linear learning rate warm-up")
    decay_from: float = knob(0.5, "fraction of the run after which both rates fall linearly to 0; 1 = constant")
    clip: float = knob(10.0, "gradient norm limit, L2 over a whole network; 0 = off")
    ema: float = knob(50.0, "half-life of the generator average, generator updates")

    sigmas: str = knob("2.5", "generator's noise levels, descending, comma separated: one number = one step")
    backward_simulation: bool = knob(True, "train later steps on the generator's own output, not on noised data")
    dm_sigma: str = knob("karras(0.0032,72)", "noise of the generator losses: karras(low,high) or lognormal(mean,std)")
    critic_sigma: str = knob("lognormal(-1.2,1.2)", "noise of the denoising loss")
    gan_sigma: str = knob("lognormal(-1.2,1.2)", "noise of the GAN losses")
    alpha: float = knob(1.0, "SiD's alpha: 0.5 is unbiased, 1.0-1.2 works best")
    normalise: bool = knob(True, "SiD: divide each sample's loss by mean |x - d_real|")

    w_dm: float = knob(1.0, "weight of the distribution matching loss")
    w_reg: float = knob(1.0, "weight of the regression loss")
    w_gan: float = knob(0.0, "weight of the generator's GAN loss; 0 = GAN off")
    w_sid: float = knob(1.0, "weight of the SiD loss")
    w_fake: float = knob(1.0, "weight of the critic's denoising loss")
    w_disc: float = knob(0.0, "weight of the discriminator loss; 0 = GAN off")

    log_every: int = knob(25, "generator updates between lines of log.jsonl")
    sample_every: int = knob(50, "generator updates between grids in samples/")
    save_every: int = knob(100, "generator updates between checkpoints")

    def sigma_list(self):
        """The generator's noise levels as floats, descending."""
        return [float(s) for s in self.sigmas.split(",")]


# fmt: off
PRESETS = {
    # 2D, exact score, one CPU thread.  Shared by all methods, then what differs.
    "toy":               dict(teacher="toy:ring8", method="dmd2", sigmas="1", batch=512, threads=1, steps=6000, lr_generator=2e-3, lr_critic=1e-3, warmup=100, decay_from=0.0, clip=0, ema=500, dm_sigma="lognormal(-1.4,1.2)", critic_sigma="lognormal(-1.2,1.4)", gan_sigma="lognormal(-1.4,1.2)", log_every=100, sample_every=250, save_every=1000, pairs=100_000, pair_steps=64, pair_sigma=20),
    "toy-dmd":           dict(),
    "toy-dmd2":          dict(steps=6800, critic_steps=2, lr_critic=3e-3),
    "toy-sid":           dict(steps=9000, normalise=False, lr_critic=2e-3, beta2=0.999, dm_sigma="lognormal(-1.8,1.2)"),
    "toy-diff_instruct": dict(),
    "toy-regression":    dict(),
    # 8x8 digits, two CPU cores: about a minute each.
    "digits":               dict(bf16=True, sigmas="2.5", dm_sigma="lognormal(-0.8,1.2)", gan_sigma="lognormal(-0.5,1.2)"),
    "digits-dmd":           dict(steps=500, lr_generator=1.5e-3, lr_critic=1.5e-3, control=True),
    "digits-dmd2":          dict(steps=400, critic_steps=2, w_gan=0.1, w_disc=0.03),
    "digits-sid":           dict(steps=900, lr_generator=5e-4, lr_critic=1.5e-3),
    "digits-diff_instruct": dict(steps=600),
    "digits-regression":    dict(steps=500, lr_generator=1.5e-3),
}
# fmt: on


def resolve(overrides):
    """Config from a dict of command-line values; raises UserError with one sentence about the first bad one."""
    name = overrides.get("preset", Config.preset)
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}: choose from {', '.join(PRESETS)}")
    base, _, suffix = name.partition("-")
    method = overrides.get("method", suffix or PRESETS[base].get("method", Config.method))
    cfg = Config(**{**PRESETS[base], **PRESETS.get(f"{base}-{method}", {}), **overrides, "preset": name, "method": method})
    cfg.out = cfg.out or f"runs/{base}-{cfg.method}"
    validate(cfg)
    return cfg


# What a resumed run may change without ceasing to be the same run.
RESUMABLE = {"out", "device", "threads", "log_every", "sample_every", "save_every"}


def read_config(folder):
    """The Config of a run folder.  raises UserError if config.json is missing, broken or of another version."""
    path = Path(folder) / "config.json"
    try:
        cfg = Config(**read_json(path))
        validate(cfg)
    except (TypeError, AttributeError) as e:
        raise UserError(f"{path} is not of this version: {e}") from e
    return cfg


def resolve_resumed(overrides):
    """The Config a run was started with, plus the few overrides that do not change its result."""
    out = overrides.get("out") or resolve(overrides).out
    cfg = read_config(out)
    for name, value in overrides.items():
        if name not in RESUMABLE and value != getattr(cfg, name):
            raise UserError(f"--{name} was {getattr(cfg, name)} when {out} was started and cannot become {value}: "
                            "leave it out, or start a new run")
    cfg = replace(cfg, **overrides | {"out": out})
    validate(cfg)
    return cfg


def free_folder(out):
    """out-2, out-3 ...: the first that holds no run."""
    return next(f"{out}-{i}" for i in range(2, 10**6) if not (Path(f"{out}-{i}") / "checkpoint.pt").exists())


METHOD_NAMES = ("dmd", "dmd2", "sid", "diff_instruct", "regression")
LEAST = dict(steps=1, batch=1, critic_steps=1, log_every=1, sample_every=1, save_every=1, pairs=1, pair_steps=2, warmup=0,
             threads=0, teacher_steps=0, clip=0, ema=0, beta1=0, beta2=0, decay_from=0, seed=0, teacher_seed=0,
             w_dm=0, w_reg=0, w_gan=0, w_sid=0, w_fake=0, w_disc=0)


def validate(cfg):
    """Raise UserError for the first value that cannot work, before anything is written."""
    if cfg.method not in METHOD_NAMES:
        raise UserError(f"unknown method {cfg.method!r}: choose from {', '.join(METHOD_NAMES)}")
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if isinstance(value, (int, float)) and not abs(value) < 2**63:
            raise UserError(f"--{f.name} must be a finite number below 2^63, got {value}")
        if value < LEAST.get(f.name, value):
            raise UserError(f"--{f.name} must be at least {LEAST[f.name]}, got {value}")
    for name in ("lr_generator", "lr_critic", "pair_sigma"):
        if getattr(cfg, name) <= 0:
            raise UserError(f"--{name} must be positive, got {getattr(cfg, name)}")
    for name in ("beta1", "beta2"):
        if getattr(cfg, name) >= 1:
            raise UserError(f"--{name} must be below 1, got {getattr(cfg, name)}")
    for name in ("dm_sigma", "critic_sigma", "gan_sigma"):
        try:
            finite = all(map(math.isfinite, parse_sigma(getattr(cfg, name))[1:]))
        except ValueError as e:
            raise UserError(f"--{name}: {e}") from e
        if not finite:
            raise UserError(f"--{name} needs finite numbers, got {getattr(cfg, name)!r}")
    try:
        sigmas = cfg.sigma_list()
    except ValueError:
        sigmas = [math.nan]
    if not all(0 < s < math.inf for s in sigmas) or sigmas != sorted(set(sigmas), reverse=True):
        raise UserError(f"--sigmas must be positive numbers, descending, comma separated; got {cfg.sigmas!r}")
    if len(sigmas) > 1 and cfg.method in ("dmd", "regression") and cfg.w_reg:
        raise UserError("the regression loss needs a one-step generator: give one number in --sigmas, or use dmd2 or sid")
    if bool(cfg.w_gan) != bool(cfg.w_disc):
        raise UserError(f"--w_gan {cfg.w_gan} and --w_disc {cfg.w_disc} must both be 0 or both be positive")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; --help lists every option")


def parser(prog, description):
    return Parser(prog=prog, description=description, allow_abbrev=False,
                  formatter_class=argparse.RawDescriptionHelpFormatter)


def add_config_flags(parser):
    """One --flag per Config field; a flag that is not given does not appear in the parsed namespace."""
    for f in fields(Config):
        flag, text = f"--{f.name}", f"{f.metadata['help']} (default: {f.default!r})"
        if f.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            parser.add_argument(flag, type=f.type, default=argparse.SUPPRESS, metavar=f.type.__name__, help=text)


def describe(cfg):
    """The resolved config, one field per line, a star where it is not the default."""
    return "\n".join(f"{'*' if v != getattr(Config, k) else ' '} {k:20} {v}" for k, v in asdict(cfg).items())

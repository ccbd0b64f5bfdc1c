"""Config: every knob with its unit, default and range, and how a command line becomes a Config.

The later wins: defaults below, PRESETS[preset], PRESETS[preset-method], the command line.
"""

import argparse
import math
import os
import re
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

from nano_dmd.engine.files import UserError, blame, read_json
from nano_dmd.engine.schema import WORDS, mismatch, shown
from nano_dmd.f_distill import WEIGHTS
from nano_dmd.methods import METHODS, needs
from nano_dmd.noise import parse_sigma, sd_sigmas
from nano_dmd.presets import PRESETS


def knob(default, help, low=None, high=None, choices=()):
    """A field of Config: its meaning and, for a number, the least and largest sensible value."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


MANY, TINY = 10**9, 1e-12


@dataclass
class Config:
    preset: str = knob("digits", "a name in presets.py")
    method: str = knob([*METHODS][0], " | ".join(METHODS))
    out: str = knob("", "run folder; empty = runs/PRESET-METHOD")
    seed: int = knob(0, "seed of everything drawn in training (pairs: a fixed seed)", 0, 2**63 - 1)
    steps: int = knob(400, "generator updates", 1, MANY)
    init: str = knob("", "run folder to start generator and fake score from: DMD2's second stage")
    control: bool = knob(False, "methods with pairs: also train by regression alone (one process)")

    teacher: str = knob("digits", "toy:NAME | flow:NAME | digits | mnist | edm:NAME | FILE.pkl "
                                  "| hub name | folder")
    revision: str = knob("", "branch, tag or commit of a teacher on the hub")
    teacher_steps: int = knob(0, "updates when training the teacher; 0 = its recipe's", 0, MANY)
    teacher_seed: int = knob(0, "seed of the teacher's training", 0, 2**63 - 1)
    data: str = knob("", "digits | mnist | cifar10 | toy:NAME | folder | .zip; empty: teacher's")
    flip: bool = knob(False, "mirror real images at random")
    prompts: str = knob("", "text to image: text file, one prompt to a line")
    encode: str = knob("cache", "prompts: all before the training, or each batch online, its "
                                "encoder on the device always or for a visit",
                       choices=("cache", "online", "visit"))
    guidance: float = knob(1.0, "teacher guidance w in u + w (c - u); 1 = off", -100, 100)
    pairs: int = knob(4000, "noise-image pairs for the regression loss", 1, 10**8)
    pair_steps: int = knob(18, "Heun steps per pair; network calls = 2 n - 1", 2, 10**4)
    pair_sigma: float = knob(80.0, "noise level the pairs start from, data units", 0.05, 1e4)

    w_dm: float = knob(1.0, "weight of the distribution matching loss", 0, MANY)
    w_aug: float = knob(1.0, "weight of the guidance augmentation loss", 0, MANY)
    w_reg: float = knob(1.0, "weight of the regression loss", 0, MANY)
    w_gan: float = knob(0.0, "weight of the generator's GAN loss (SiDA: times w_sid); 0 = off", 0,
                        MANY)
    w_sid: float = knob(1.0, "weight of the loss of SiD and its relatives", 0, MANY)
    w_fake: float = knob(1.0, "weight of the critic's denoising loss", 0, MANY)
    w_disc: float = knob(0.0, "weight of the discriminator loss; 0 = GAN off", 0, MANY)
    w_r1: float = knob(0.0, "weight of approximate R1 in the discriminator's loss", 0, MANY)
    critic_steps: int = knob(1, "critic updates per generator update (TTUR)", 1, 1000)
    alpha: float = knob(1.0, "SiD's alpha: 0.5 is unbiased, SiD takes 1.0 or 1.2", -100, 100)
    normalise: bool = knob(True, "SiD, SiDA, RealUID: divide by mean |x - d_real|")
    fake_guidance: float = knob(1.0, "guidance of the fake score, for SiD-LSG; 1 = off", -100, 100)
    critic_dropout: float = knob(0.0, "share of labels dropped in the denoising loss", 0, 1)
    divergence: str = knob("js", "f-distill: the f-divergence", choices=tuple(WEIGHTS))
    ratio: str = knob("critic", "f-distill: p_real / p_fake by the critic, or exact (toy:NAME)",
                      choices=("critic", "exact"))
    uid_a: float = knob(0.98, "RealUID's a: share of generated samples for the critic; 1 = all",
                        0.01, 1)
    uid_b: float = knob(0.96, "RealUID's b; b / a is .98 or 1.02 in the paper", 0.01, 10)
    ida: float = knob(0.0, "share of G mixed into the fake score after each step; 0 = off", 0, 1)
    reg_loss: str = knob("l2", "distance of the regression loss", choices=("l2", "lpips"))
    lpips_decoder: str = knob("madebyollin/taesd", "decodes latents for lpips: a TAESD, or vae")

    sigmas: str = knob("2.5", "noise levels of the generator's steps, descending, comma separated; "
                              "t999 = Stable Diffusion's timestep 999, f0.75 = flow time .75")
    unit_noise: bool = knob(False, "the first step sees unit noise (latents), not sigma z")
    ode_steps: bool = knob(False, "later steps follow the ODE; off: they draw new noise")
    backward_simulation: bool = knob(True, "train later steps on G's own output, not on data")
    dm_sigma: str = knob("karras(0.0032,72)", "noise of the dm and sid losses: karras(low,high), "
                                              "lognormal(mean,std), sd(first,last), flow(low,high)")
    noisings: int = knob(1, "noisings of each sample in the dm and sid losses", 1, 1000)
    critic_sigma: str = knob("lognormal(-1.2,1.2)", "noise of the denoising loss")
    gan_sigma: str = knob("lognormal(-1.2,1.2)", "noise of the GAN losses")
    least_sigma: float = knob(0.02, "least noise of augmentation, tdm and phased", 1e-5, 1e4)

    batch: int = knob(64, "samples per update, over all processes", 1, 10**6)
    lr_generator: float = knob(1e-3, "Adam's rate for the generator", TINY, 10)
    lr_critic: float = knob(1e-3, "Adam's rate for fake score and discriminator", TINY, 10)
    beta1: float = knob(0.0, "Adam's beta1; above 0, G and critic may circle", 0, 0.999999)
    beta2: float = knob(0.99, "Adam's beta2", 0, 0.999999)
    weight_decay: float = knob(0.0, "AdamW's weight decay", 0, 10)
    warmup: int = knob(30, "updates of linear warm-up of the rates", 0, MANY)
    decay_from: float = knob(0.5, "part of the run after which rates fall to 0; 1 = never", 0, 1)
    clip: float = knob(10.0, "limit of the gradient's norm, over one optimiser; 0 = off", 0, MANY)
    ema: float = knob(50.0, "half-life of the generator's average, updates; 0 = none", 0, MANY)
    ema_critic: float = knob(0.0, "half-life of an average of the fake score for the generator's "
                                  "losses (not of the head), critic updates; 0 = none", 0, MANY)

    device: str = knob("auto", "auto | cpu | cuda | cuda:1 ...")
    threads: int = knob(0, "CPU threads; 0 = torch's choice", 0, 1024)
    bf16: bool = knob(False, "networks compute in bfloat16, where that is fast")
    tf32: bool = knob(True, "allow TensorFloat-32 products on CUDA")
    compile: bool = knob(False, "torch.compile the steps: minutes at the start, faster on CUDA")
    accumulate: int = knob(1, "parts of a batch, one after the other, to fit into memory", 1, 10**6)
    checkpointing: bool = knob(False, "recompute activations in backward: less memory, slower")
    shard: bool = knob(False, "several processes: split weights and moments among them (FSDP2)")
    lora_generator: int = knob(0, "rank of a LoRA student; 0 = train a full copy", 0, 4096)
    lora_critic: int = knob(0, "the same for the fake score", 0, 4096)
    half_frozen: bool = knob(False, "keep the teacher's weights in bfloat16 (needs --bf16)")
    offload_teacher: bool = knob(False, "keep teacher weights in host memory between calls")
    adam8bit: bool = knob(False, "moments in 8 bits, by bitsandbytes")

    log_every: int = knob(25, "updates between lines of log.jsonl", 1, MANY)
    sample_every: int = knob(50, "updates between grids in samples/", 1, MANY)
    save_every: int = knob(100, "updates between checkpoints", 1, MANY)
    eval_every: int = knob(0, "updates between metrics, on logged steps; 0 = at the end", 0, MANY)
    eval_images: int = knob(2000, "samples for the metrics of large data sets", 2, 10**6)
    log_to: str = knob("", "also log to tensorboard or wandb", choices=("", "tensorboard", "wandb"))

    def sigma_list(self):
        """The generator's noise levels as floats, descending.  raises ValueError."""
        table, sigmas = sd_sigmas(), []
        for s in map(str.strip, self.sigmas.split(",")):
            step = re.fullmatch(r"t(\d{1,3})", s, re.ASCII)
            t = as_number(s[1:], float) if s[:1] == "f" else 0
            if step:
                sigmas.append(table[int(step[1])].item())
            else:
                sigmas.append(t / (1 - t) if 0 < t < 1 else as_number(s, float))
        right = len(sigmas) <= 64 and all(1e-4 <= s <= 1e4 for s in sigmas)
        if not right or sigmas != sorted(set(sigmas), reverse=True):
            raise ValueError("give at most 64 numbers from 1e-4 to 1e4, descending, by commas")
        return sigmas


# Each group of --help begins with the field named here.
GROUPS = dict(preset="what to run", teacher="teacher and data", w_dm="method", sigmas="noise",
              batch="optimiser", device="memory and speed", log_every="logging")
# What a resumed run may change without ceasing to be the same run.
RESUMABLE = {"out", "device", "threads", "log_every", "sample_every", "save_every", "eval_every",
             "eval_images", "log_to"}
PLACES = ("data", "prompts", "teacher", "init", "lpips_decoder")        # may name a file or folder
OWN_NAMES = set("digits mnist cifar10 cifar10-test cifar10-small cifar10-scratch vae".split())


def split(name):
    """'cifar10-uncond-sid' -> ('cifar10-uncond', 'sid'); without a method (NAME, '')."""
    base, _, suffix = name.rpartition("-")
    return (base, suffix) if suffix in METHODS else (name, "")


def resolve(given):
    """Config from a dict of command-line values.  raises UserError about the first bad one."""
    name = given.get("preset", Config.preset)
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}: choose from {', '.join(PRESETS)}")
    base, suffix = split(name)
    method = given.get("method", suffix or PRESETS[base].get("method", Config.method))
    values = PRESETS[base] | PRESETS.get(f"{base}-{method}", {}) | anchored(given)
    cfg = Config(**values | {"preset": name, "method": method})
    cfg.out = cfg.out or f"runs/{base}-{cfg.method}"
    validate(cfg)
    return cfg


def anchored(values):
    """The same settings with absolute paths, which mean the same from another folder."""
    def absolute(name, v):
        place = name in PLACES and v and v not in OWN_NAMES and os.path.exists(v)
        return os.path.abspath(v) if place else v

    return {name: absolute(name, v) for name, v in values.items()}


def read_config(folder):
    """The Config of a run folder.  raises UserError."""
    path = Path(folder) / "config.json"
    values, names = read_json(path, {}), {f.name for f in fields(Config)}
    for name in sorted(names ^ values.keys()):
        state = "missing" if name in names else "unknown"
        raise UserError(f"{path} is not of this version: {name:.40} is {state}; use the version "
                        "that made this run, or train it again")
    cfg = Config(**values)
    try:
        validate(cfg)
    except UserError as e:
        raise UserError(f"{path} is damaged: {e}") from e
    return cfg


def same_run(cfg, other):
    """The first setting that makes two runs differ, (name, value, other's), or None."""
    a, b = anchored(asdict(cfg)), anchored(asdict(other))
    return next(((k, a[k], b[k]) for k in a if k not in RESUMABLE and a[k] != b[k]), None)


def resolve_resumed(given):
    """The Config a run was started with, plus the few settings that do not change its result."""
    out = given.get("out") or resolve(given).out
    cfg = read_config(out)
    if difference := same_run(cfg, replace(cfg, **given)):
        name, was, wanted = difference
        raise UserError(f"--{name} was {was} when {out} was started and cannot become {wanted}: "
                        "leave it out, or start a new run")
    cfg = replace(cfg, **{k: v for k, v in given.items() if k in RESUMABLE} | {"out": out})
    validate(cfg)
    return cfg


def free_folder(out):
    """out-2, out-3 ...: the first that holds no run."""
    names = (f"{out}-{i}" for i in range(2, 10**6))
    return next(name for name in names if not (Path(name) / "checkpoint.pt").exists())


def problem_of(f, value):
    """What is wrong with the value of a field of Config, "" if nothing is."""
    if mismatch(value, f.type):
        return f"must be {WORDS[f.type]}, got {shown(value)}"
    low, high = f.metadata["low"], f.metadata["high"]
    choices = tuple(METHODS) if f.name == "method" else f.metadata["choices"]
    if choices and value not in choices:
        return f"must be one of {', '.join(filter(None, choices))}, got {value!r:.80}"
    if low is not None and not low <= value <= high:
        return f"must be at {f'least {low}' if value < low else f'most {high}'}, got {value}"
    place = f.name in (*PLACES, "out")
    return unwritable_text(value, 255 if place else 10**5) if f.type is str else ""


def unwritable_text(value, longest=10**5):
    """Why a text cannot become a path, or be saved as UTF-8; "" if it can."""
    if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
        return f"is {value!r:.80}, which is not UTF-8 text"
    long = any(len(v.encode()) > longest for v in value.split("/"))
    return f"holds a name of over {longest} bytes" if long else ""


def validate(cfg):
    """Raise UserError for the first value that cannot work, before anything is written."""
    for f in fields(cfg):
        if problem := problem_of(f, getattr(cfg, f.name)):
            raise UserError(f"--{f.name} {problem}")
    for name in ("dm_sigma", "critic_sigma", "gan_sigma"):
        with blame(f"--{name}"):
            parse_sigma(getattr(cfg, name))
    with blame(f"--sigmas, got {cfg.sigmas!r:.80}"):
        several = len(cfg.sigma_list()) > 1
    if several and "pairs" in needs(cfg):
        raise UserError("the regression loss needs a one-step generator: give one number in "
                        "--sigmas, or --w_reg 0, or another method")
    if cfg.half_frozen and not cfg.bf16:
        raise UserError("--half_frozen needs --bf16: give both or neither")
    if cfg.offload_teacher and (cfg.lora_generator or cfg.lora_critic or cfg.shard):
        raise UserError("--offload_teacher does not go with LoRA or --shard: leave it out")
    if cfg.adam8bit and cfg.shard:
        raise UserError("--adam8bit does not go with --shard: leave one out")
    validate_method(cfg)


def validate_method(cfg):
    """Raise UserError for settings of losses that do not go together."""
    knobs = METHODS[cfg.method].knobs
    by_critic = "ratio" in knobs and cfg.ratio == "critic"        # it may do without w_gan
    weights = [weight for weight, _ in METHODS[cfg.method].generator]
    uses_disc = "w_disc" in [weight for weight, _ in METHODS[cfg.method].critic] and cfg.w_disc
    rules = {
        f"nothing to minimise: give one of {', '.join('--' + w for w in weights)} a weight":
            not any(getattr(cfg, weight) for weight in weights),
        f"--w_gan {cfg.w_gan} and --w_disc {cfg.w_disc}: give both, or 0 to both":
            bool(cfg.w_gan) != bool(cfg.w_disc) and not (by_critic and cfg.w_disc),
        "--w_disc 0: this method reads p_real / p_fake off its discriminator, give --w_disc, or "
        "--ratio exact with a teacher toy:NAME": by_critic and not cfg.w_disc,
        f"--ratio exact needs a teacher toy:NAME, not {cfg.teacher!r:.80}":
            "ratio" in knobs and not by_critic and not cfg.teacher.startswith("toy:"),
        "--w_disc 0: this method is nothing without its discriminator, give --w_disc and --w_gan":
            "w_disc" in knobs and not cfg.w_disc,
        f"--w_r1 {cfg.w_r1}: there is no discriminator here, leave it out":
            cfg.w_r1 and not uses_disc,
        "--guidance 1 leaves nothing to augment: give --guidance, or --w_aug 0":
            "guidance" in knobs and cfg.w_aug and cfg.guidance == 1,
        "this method trains steps of the ODE: give --ode_steps, two or more --sigmas, --noisings 1":
            "ode_steps" in knobs and not (cfg.ode_steps and len(cfg.sigma_list()) > 1
                                          and cfg.noisings == 1),
        f"--uid_b {cfg.uid_b}: with --uid_a 1 the critic sees no real data; give 1":
            "uid_a" in knobs and cfg.uid_a == 1 and cfg.uid_b != 1,
        "--critic_dropout: this method compares samples of one label, leave it out":
            "uid_a" in knobs and cfg.critic_dropout,
        "--ida mixes whole networks: leave it or LoRA out":
            cfg.ida and (cfg.lora_generator or cfg.lora_critic),
    }
    for complaint, broken in rules.items():
        if broken:
            raise UserError(complaint)


def as_number(text, kind):
    """'12' or '1e-5' as an int or a float.  raises ValueError, also for Python's '1_000'."""
    pattern = r"[+-]?\d{1,30}"
    if kind is float:
        pattern = r"[+-]?(\d{1,30}\.?\d*|\.\d+)(e[+-]?\d{1,4})?|[+-]?inf|nan"
    if not re.fullmatch(pattern, text, re.ASCII | re.IGNORECASE):
        raise ValueError(f"{text!r:.80} is not {'a whole' if kind is int else 'a'} number")
    return kind(text)


def number(low, high, kind=int):
    """The argparse type of a number in a range."""
    def parse(text):
        try:
            value = as_number(text, kind)
        except ValueError as e:
            raise argparse.ArgumentTypeError(str(e)) from None
        if value < low or value > high:
            bound = f"least {low}" if value < low else f"most {high}"
            raise argparse.ArgumentTypeError(f"must be at {bound}, got {text}")
        return value

    return parse


def writable_text(value):
    """The argparse type of every other argument."""
    if problem := unwritable_text(value):
        raise argparse.ArgumentTypeError(problem)
    return value


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are UserErrors."""

    def __init__(self, **args):
        style = partial(argparse.RawDescriptionHelpFormatter, max_help_position=26, width=110)
        super().__init__(allow_abbrev=False, formatter_class=style, **args)
        self.register("type", None, writable_text)

    def error(self, message):
        raise UserError(f"{message}; --help lists every option")


def parser(prog, description, help=True):
    return Parser(prog=prog, description=description, add_help=help)


def add_config_flags(parser):
    """One --flag per Config field, in groups; a flag that is not given is not in the namespace."""
    parser.usage = f"{parser.prog} [--knob value ...]"
    for f in fields(Config):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        words = f"{f.metadata['help']} (default: {f.default!r})"
        kind = None if f.type is str else number(-math.inf, math.inf, f.type)  # validate: ranges
        how = dict(type=kind, metavar=f.type.__name__)
        if f.type is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=words, **how)


def describe(cfg, names=None):
    """The config, or some of it, one field to a line; a star where it is not the default."""
    shown = {k: v for k, v in asdict(cfg).items() if names is None or k in names}
    return "\n".join(f"{' *'[v != getattr(Config, k)]} {k:20} {v}" for k, v in shown.items())

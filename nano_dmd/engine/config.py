"""Config (every knob, with its unit and default) and PRESETS (one line each).

Order of precedence: the defaults below < PRESETS[preset] < PRESETS[preset-method] < the command line.
"""

import argparse
import math
import os
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from nano_dmd.engine.files import UserError, read_json
from nano_dmd.engine.schema import WORDS, mismatch, shown
from nano_dmd.noise import parse_sigma, sd_sigmas
from nano_dmd.presets import PRESETS


def knob(default, help, low=None, high=None, choices=()):
    """A field of Config: its meaning and, for a number, the least and the largest value that can be meant."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))

MANY, TINY = 10**9, 1e-12

METHOD_NAMES = ("dmd", "dmd2", "sid", "diff_instruct", "regression")


@dataclass
class Config:
    preset: str = knob("digits", "name of a line in PRESETS")
    method: str = knob("dmd", "dmd | dmd2 | sid | diff_instruct | regression", choices=METHOD_NAMES)
    out: str = knob("", "run folder; empty = runs/PRESET-METHOD")
    seed: int = knob(0, "everything drawn in the run follows from it", 0, 2**63 - 1)
    device: str = knob("auto", "auto | cpu | cuda | cuda:1 ...; auto takes CUDA if there is one")
    threads: int = knob(0, "CPU threads; 0 = torch's choice", 0, 1024)
    bf16: bool = knob(False, "run the networks (not x, not the losses) in bfloat16, where the device can")
    tf32: bool = knob(True, "allow TensorFloat-32 matrix products and convolutions on CUDA")
    shard: bool = knob(False, "several processes: split weights and optimiser state among them (FSDP2); LoRA stays whole")
    compile: bool = knob(False, "torch.compile the steps, of a teacher trained here too: minutes at the start, faster on CUDA")
    checkpointing: bool = knob(False, "recompute activations in backward: less memory, one more forward (EDM, Stable Diffusion)")

    teacher: str = knob("digits", "toy:NAME | digits | edm:NAME | FILE.pkl | hub name or folder | a run's folder")
    teacher_steps: int = knob(0, "updates when training the teacher; 0 = its recipe's", 0, MANY)
    teacher_seed: int = knob(0, "seed of the teacher's training", 0, 2**63 - 1)
    data: str = knob("", "digits | toy:NAME | cifar10 | folder of images | EDM's .zip; empty = the teacher's own")
    flip: bool = knob(False, "mirror real images at random")
    prompts: str = knob("", "Stable Diffusion: text file, one prompt to a line")
    guidance: float = knob(1.0, "teacher guidance w in u + w (c - u); 1 = off", -100, 100)
    fake_guidance: float = knob(1.0, "the same for the fake score, trained and asked; 1 = off (on in SiD-LSG alone)", -100, 100)
    critic_dropout: float = knob(0.0, "share of labels or prompts dropped in the denoising loss; fake_guidance needs some", 0, 1)
    pairs: int = knob(4000, "noise-image pairs for the regression loss, images", 1, 10**8)
    pair_steps: int = knob(18, "Heun steps per pair; network calls = 2 n - 1", 2, 10**4)
    pair_sigma: float = knob(80.0, "noise level the pairs are integrated from, data units", 0.05, 1e4)
    control: bool = knob(False, "dmd: also train a student by regression alone, the number to beat")

    steps: int = knob(400, "generator updates", 1, MANY)
    batch: int = knob(64, "samples per update, over all processes", 1, 10**6)
    accumulate: int = knob(1, "parts a batch is worked off in, one after the other, to fit into memory", 1, 10**6)
    critic_steps: int = knob(1, "critic updates per generator update (TTUR)", 1, 1000)
    lr_generator: float = knob(1e-3, "Adam learning rate of the generator", TINY, 10)
    lr_critic: float = knob(1e-3, "Adam learning rate of fake score and discriminator", TINY, 10)
    beta1: float = knob(0.0, "Adam beta1; momentum lets generator and critic chase each other", 0, 0.999999)
    beta2: float = knob(0.99, "Adam beta2", 0, 0.999999)
    weight_decay: float = knob(0.0, "AdamW weight decay", 0, 10)
    warmup: int = knob(30, "generator updates of linear learning rate warm-up", 0, MANY)
    decay_from: float = knob(0.5, "fraction of the run after which both rates fall linearly to 0; 1 = constant", 0, 1)
    clip: float = knob(10.0, "gradient norm limit, L2 over a whole network; 0 = off", 0, MANY)
    ema: float = knob(50.0, "half-life of the generator average, generator updates", 0, MANY)

    init: str = knob("", "run folder whose generator and fake score to start from: DMD2's second stage")
    lora_generator: int = knob(0, "rank of a LoRA student on the teacher's frozen weights; 0 = train a full copy", 0, 4096)
    lora_critic: int = knob(0, "the same for the fake score", 0, 4096)
    half_frozen: bool = knob(False, "keep the teacher's weights in bfloat16 (needs --bf16)")
    offload_teacher: bool = knob(False, "teacher's weights stay in the host's memory and visit the device (not sid, not LoRA)")
    adam8bit: bool = knob(False, "optimiser state in 8 bits, by bitsandbytes")

    sigmas: str = knob("2.5", "generator's noise levels, descending, comma separated: one = one step; t999 = SD's timestep 999")
    unit_noise: bool = knob(False, "the first step sees unit-variance noise (Stable Diffusion), not sigma z scaled")
    backward_simulation: bool = knob(True, "train later steps on the generator's own output, not on noised data")
    dm_sigma: str = knob("karras(0.0032,72)", "noise of the generator losses: karras(low,high) or lognormal(mean,std)")
    noisings: int = knob(1, "noisings of each sample in the dm and sid losses: several opinions on one pass of the generator",
                         1, 1000)
    critic_sigma: str = knob("lognormal(-1.2,1.2)", "noise of the denoising loss")
    gan_sigma: str = knob("lognormal(-1.2,1.2)", "noise of the GAN losses")
    alpha: float = knob(1.0, "SiD's alpha: 0.5 is unbiased, 1.0-1.2 works best", -100, 100)
    normalise: bool = knob(True, "SiD: divide each sample's loss by mean |x - d_real|")

    w_dm: float = knob(1.0, "weight of the distribution matching loss", 0, MANY)
    w_reg: float = knob(1.0, "weight of the regression loss", 0, MANY)
    reg_loss: str = knob("l2", "l2 | lpips (as in the DMD paper; needs the eval extra and its VGG weights)",
                         choices=("l2", "lpips"))
    lpips_decoder: str = knob("madebyollin/taesd", "what makes images of latents for lpips: a TAESD, or vae = the teacher's own")
    w_gan: float = knob(0.0, "weight of the generator's GAN loss; 0 = GAN off", 0, MANY)
    w_sid: float = knob(1.0, "weight of the SiD loss", 0, MANY)
    w_fake: float = knob(1.0, "weight of the critic's denoising loss", 0, MANY)
    w_disc: float = knob(0.0, "weight of the discriminator loss; 0 = GAN off", 0, MANY)

    log_every: int = knob(25, "generator updates between lines of log.jsonl", 1, MANY)
    sample_every: int = knob(50, "generator updates between grids in samples/", 1, MANY)
    save_every: int = knob(100, "generator updates between checkpoints", 1, MANY)
    eval_every: int = knob(0, "generator updates between metrics in log.jsonl; 0 = only at the end", 0, MANY)
    eval_images: int = knob(2000, "samples for those metrics, and for the final ones of large data sets", 2, 10**6)
    log_to: str = knob("", "also send log.jsonl's numbers to tensorboard or wandb", choices=("", "tensorboard", "wandb"))

    def sigma_list(self):
        """The generator's noise levels as floats, descending.  raises ValueError for anything else."""
        table, sigmas = sd_sigmas(), []
        for s in map(str.strip, self.sigmas.split(",")):
            step = re.fullmatch(r"t(\d{1,3})", s, re.ASCII)
            sigmas.append(table[int(step[1])].item() if step else as_number(s, float))
        if not (len(sigmas) <= 64 and all(1e-4 <= s <= 1e4 for s in sigmas)) or sigmas != sorted(set(sigmas), reverse=True):
            raise ValueError("at most 64 numbers from 1e-4 to 1e4, descending")
        return sigmas


def split(name):
    """'cifar10-uncond-sid' -> ('cifar10-uncond', 'sid'); 'cifar10-uncond' -> ('cifar10-uncond', '')."""
    base, _, suffix = name.rpartition("-")
    return (base, suffix) if suffix in METHOD_NAMES else (name, "")


def resolve(overrides):
    """Config from a dict of command-line values; raises UserError with one sentence about the first bad one."""
    name = overrides.get("preset", Config.preset)
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}: choose from {', '.join(PRESETS)}")
    overrides, (base, suffix) = anchored(overrides), split(name)
    method = overrides.get("method", suffix or PRESETS[base].get("method", Config.method))
    cfg = Config(**{**PRESETS[base], **PRESETS.get(f"{base}-{method}", {}), **overrides, "preset": name, "method": method})
    cfg.out = cfg.out or f"runs/{base}-{cfg.method}"
    validate(cfg)
    return cfg

# What a resumed run may change without ceasing to be the same run.
RESUMABLE = {"out", "device", "threads", "log_every", "sample_every", "save_every", "eval_every", "eval_images", "log_to"}

PLACES = ("data", "prompts", "teacher", "init", "lpips_decoder")    # settings that may name a file or folder

OWN_NAMES = {"digits", "cifar10", "cifar10-test", "cifar10-small", "cifar10-scratch", "vae"}


def anchored(values):
    """The same settings with absolute paths: seen from another folder, a relative one could mean something else."""
    return {name: os.path.abspath(v) if name in PLACES and v and v not in OWN_NAMES and os.path.exists(v) else v
            for name, v in values.items()}


def read_config(folder):
    """The Config of a run folder.  raises UserError if config.json is missing, broken or of another version."""
    path = Path(folder) / "config.json"
    values, names = read_json(path, {}), {f.name for f in fields(Config)}
    for name in sorted(names ^ values.keys()):
        raise UserError(f"{path} is not of this version: {name:.40} is {'missing' if name in names else 'unknown'}; use the "
                        "version that made this run, or train it again")
    cfg = Config(**values)
    try:
        validate(cfg)
    except UserError as e:
        raise UserError(f"{path} is damaged: {e}") from e
    return cfg


def same_run(cfg, other):
    """The first setting in which two runs differ and that matters to their result, as (name, value, other's), else None."""
    a, b = anchored(asdict(cfg)), anchored(asdict(other))
    return next(((k, a[k], b[k]) for k in a if k not in RESUMABLE and a[k] != b[k]), None)


def resolve_resumed(overrides):
    """The Config a run was started with, plus the few overrides that do not change its result."""
    out = overrides.get("out") or resolve(overrides).out
    cfg = read_config(out)
    if difference := same_run(cfg, replace(cfg, **overrides)):
        name, was, wanted = difference
        raise UserError(f"--{name} was {was} when {out} was started and cannot become {wanted}: "
                        "leave it out, or start a new run")
    cfg = replace(cfg, **{k: v for k, v in overrides.items() if k in RESUMABLE} | {"out": out})
    validate(cfg)
    return cfg


def free_folder(out):
    """out-2, out-3 ...: the first that holds no run."""
    return next(f"{out}-{i}" for i in range(2, 10**6) if not (Path(f"{out}-{i}") / "checkpoint.pt").exists())


def problem_of(f, value):
    """What is wrong with the value of a field of Config, "" if nothing is."""
    if mismatch(value, f.type):
        return f"must be {WORDS[f.type]}, got {shown(value)}"
    low, high, choices = f.metadata["low"], f.metadata["high"], f.metadata["choices"]
    if choices and value not in choices:
        return f"must be one of {', '.join(filter(None, choices))}, got {value!r:.80}"
    if low is not None and not low <= value <= high:
        return f"must be at least {low}, got {value}" if value < low else f"must be at most {high}, got {value}"
    return unwritable_text(value, 255 if f.name in (*PLACES, "out") else 10**5) if f.type is str else ""


def unwritable_text(value, longest=10**5):
    """Why a text from the command line or a file cannot be used, "" if it can: it may become a path, or be saved as UTF-8."""
    if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
        return f"is {value!r:.80}, which is not UTF-8 text"
    return f"holds a name of over {longest} bytes" if any(len(v.encode()) > longest for v in value.split("/")) else ""


def validate(cfg):
    """Raise UserError for the first value that cannot work, before anything is written."""
    for f in fields(cfg):
        if problem := problem_of(f, getattr(cfg, f.name)):
            raise UserError(f"--{f.name} {problem}")
    for name in ("dm_sigma", "critic_sigma", "gan_sigma"):
        try:
            parse_sigma(getattr(cfg, name))
        except ValueError as e:
            raise UserError(f"--{name}: {e}") from e
    try:
        sigmas = cfg.sigma_list()
    except ValueError:
        raise UserError("--sigmas must be at most 64 numbers from 1e-4 to 1e4, descending, comma separated; "
                        f"got {cfg.sigmas!r:.80}") from None
    if len(sigmas) > 1 and cfg.method in ("dmd", "regression") and cfg.w_reg:
        raise UserError("the regression loss needs a one-step generator: give one number in --sigmas, or use dmd2 or sid")
    if cfg.half_frozen and not cfg.bf16:
        raise UserError("--half_frozen keeps weights in bfloat16, which only --bf16 computes with: give both or neither")
    if cfg.offload_teacher and (cfg.method == "sid" or cfg.lora_generator or cfg.lora_critic or cfg.shard):
        raise UserError("--offload_teacher takes the teacher off the device between its calls, but sid differentiates through "
                        "it, LoRA computes with its weights and --shard has split them: leave it out")
    if bool(cfg.w_gan) != bool(cfg.w_disc):
        raise UserError(f"--w_gan {cfg.w_gan} and --w_disc {cfg.w_disc} must both be 0 or both be positive")


def as_number(text, kind):
    """'12' or '1e-5' as an int or a float.  Python would also read '1_000' and digits of other scripts: here, typos."""
    pattern = r"[+-]?\d{1,30}" if kind is int else r"[+-]?(\d{1,30}\.?\d*|\.\d+)(e[+-]?\d{1,4})?|[+-]?inf|nan"
    if not re.fullmatch(pattern, text, re.ASCII | re.IGNORECASE):
        raise ValueError(f"{text!r:.80} is not {'a whole' if kind is int else 'a'} number")
    return kind(text)


def number(low, high, kind=int):
    """The type of an argument of a command line: a number in a range."""
    def parse(text):
        try:
            value = as_number(text, kind)
        except ValueError as e:
            raise argparse.ArgumentTypeError(str(e)) from None
        if value < low or value > high:
            raise argparse.ArgumentTypeError(f"must be at {f'least {low}' if value < low else f'most {high}'}, got {text}")
        return value

    return parse


def text(value):
    """The type of every other argument: text that can be saved and can stand in a path."""
    if problem := unwritable_text(value):
        raise argparse.ArgumentTypeError(problem)
    return value


class Parser(argparse.ArgumentParser):
    def __init__(self, **args):
        super().__init__(**args)
        self.register("type", None, text)

    def error(self, message):
        raise UserError(f"{message}; --help lists every option")


def parser(prog, description, help=True):
    return Parser(prog=prog, description=description, allow_abbrev=False, add_help=help,
                  formatter_class=argparse.RawDescriptionHelpFormatter)


def add_config_flags(parser):
    """One --flag per Config field; a flag that is not given does not appear in the parsed namespace."""
    for f in fields(Config):
        flag, words = f"--{f.name}", f"{f.metadata['help']} (default: {f.default!r})"
        if f.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=words)
        else:
            kind = None if f.type is str else number(-math.inf, math.inf, f.type)     # validate() knows the ranges
            parser.add_argument(flag, type=kind, default=argparse.SUPPRESS, metavar=f.type.__name__, help=words)


def describe(cfg):
    """The resolved config, one field per line, a star where it is not the default."""
    return "\n".join(f"{'*' if v != getattr(Config, k) else ' '} {k:20} {v}" for k, v in asdict(cfg).items())

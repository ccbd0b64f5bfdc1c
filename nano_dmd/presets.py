"""Config (every knob, with its unit and default) and PRESETS (one line each).

Order of precedence: the defaults below < PRESETS[preset] < PRESETS[preset-method] < the command line.
"""

import argparse
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from nano_dmd.checkpoint import UserError, read_json
from nano_dmd.noise import parse_sigma, sd_sigmas


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
    bf16: bool = knob(False, "run the networks (not x, not the losses) in bfloat16, where the device can")
    tf32: bool = knob(True, "allow TensorFloat-32 matrix products and convolutions on CUDA")
    shard: bool = knob(False, "several processes: split weights and optimiser state among them (FSDP2); LoRA stays whole")
    compile: bool = knob(False, "torch.compile the steps, of a teacher trained here too: minutes at the start, faster on CUDA")
    checkpointing: bool = knob(False, "recompute activations in backward: less memory, one more forward (EDM, Stable Diffusion)")

    teacher: str = knob("digits", "toy:NAME | digits | edm:NAME | FILE.pkl | hub name or folder | a run's folder")
    teacher_steps: int = knob(0, "updates when training the teacher; 0 = its recipe's")
    teacher_seed: int = knob(0, "seed of the teacher's training")
    data: str = knob("", "digits | toy:NAME | cifar10 | folder of images | EDM's .zip; empty = the teacher's own")
    flip: bool = knob(False, "mirror real images at random")
    prompts: str = knob("", "Stable Diffusion: text file, one prompt to a line")
    guidance: float = knob(1.0, "teacher guidance w in u + w (c - u); 1 = off")
    fake_guidance: float = knob(1.0, "the same for the fake score, trained and asked; 1 = off (on in SiD-LSG alone)")
    critic_dropout: float = knob(0.0, "share of labels or prompts dropped in the denoising loss; fake_guidance needs some")
    pairs: int = knob(4000, "noise-image pairs for the regression loss, images")
    pair_steps: int = knob(18, "Heun steps per pair; network calls = 2 n - 1")
    pair_sigma: float = knob(80.0, "noise level the pairs are integrated from, data units")
    control: bool = knob(False, "dmd: also train a student by regression alone, the number to beat")

    steps: int = knob(400, "generator updates")
    batch: int = knob(64, "samples per update, over all processes")
    accumulate: int = knob(1, "parts a batch is worked off in, one after the other, to fit into memory")
    critic_steps: int = knob(1, "critic updates per generator update (TTUR)")
    lr_generator: float = knob(1e-3, "Adam learning rate of the generator")
    lr_critic: float = knob(1e-3, "Adam learning rate of fake score and discriminator")
    beta1: float = knob(0.0, "Adam beta1; momentum lets generator and critic chase each other")
    beta2: float = knob(0.99, "Adam beta2")
    weight_decay: float = knob(0.0, "AdamW weight decay")
    warmup: int = knob(30, "generator updates of linear learning rate warm-up")
    decay_from: float = knob(0.5, "fraction of the run after which both rates fall linearly to 0; 1 = constant")
    clip: float = knob(10.0, "gradient norm limit, L2 over a whole network; 0 = off")
    ema: float = knob(50.0, "half-life of the generator average, generator updates")

    init: str = knob("", "run folder whose generator and fake score to start from: DMD2's second stage")
    lora_generator: int = knob(0, "rank of a LoRA student on the teacher's frozen weights; 0 = train a full copy")
    lora_critic: int = knob(0, "the same for the fake score")
    half_frozen: bool = knob(False, "keep the teacher's weights in bfloat16 (needs --bf16)")
    offload_teacher: bool = knob(False, "teacher's weights stay in the host's memory and visit the device (not sid, not LoRA)")
    adam8bit: bool = knob(False, "optimiser state in 8 bits, by bitsandbytes")

    sigmas: str = knob("2.5", "generator's noise levels, descending, comma separated: one = one step; t999 = SD's timestep 999")
    unit_noise: bool = knob(False, "the first step sees unit-variance noise (Stable Diffusion), not sigma z scaled")
    backward_simulation: bool = knob(True, "train later steps on the generator's own output, not on noised data")
    dm_sigma: str = knob("karras(0.0032,72)", "noise of the generator losses: karras(low,high) or lognormal(mean,std)")
    noisings: int = knob(1, "noisings of each sample in the dm and sid losses: several opinions on one pass of the generator")
    critic_sigma: str = knob("lognormal(-1.2,1.2)", "noise of the denoising loss")
    gan_sigma: str = knob("lognormal(-1.2,1.2)", "noise of the GAN losses")
    alpha: float = knob(1.0, "SiD's alpha: 0.5 is unbiased, 1.0-1.2 works best")
    normalise: bool = knob(True, "SiD: divide each sample's loss by mean |x - d_real|")

    w_dm: float = knob(1.0, "weight of the distribution matching loss")
    w_reg: float = knob(1.0, "weight of the regression loss")
    reg_loss: str = knob("l2", "l2 | lpips (as in the DMD paper; needs the eval extra and its VGG weights)")
    lpips_decoder: str = knob("madebyollin/taesd", "what makes images of latents for lpips: a TAESD, or vae = the teacher's own")
    w_gan: float = knob(0.0, "weight of the generator's GAN loss; 0 = GAN off")
    w_sid: float = knob(1.0, "weight of the SiD loss")
    w_fake: float = knob(1.0, "weight of the critic's denoising loss")
    w_disc: float = knob(0.0, "weight of the discriminator loss; 0 = GAN off")

    log_every: int = knob(25, "generator updates between lines of log.jsonl")
    sample_every: int = knob(50, "generator updates between grids in samples/")
    save_every: int = knob(100, "generator updates between checkpoints")
    eval_every: int = knob(0, "generator updates between metrics in log.jsonl; 0 = only at the end")
    eval_images: int = knob(2000, "samples for those metrics, and for the final ones of large data sets")
    log_to: str = knob("", "also send log.jsonl's numbers to tensorboard or wandb")

    def sigma_list(self):
        """The generator's noise levels as floats, descending."""
        return [sd_sigmas()[int(s[1:])].item() if s.strip().startswith("t") else float(s) for s in self.sigmas.split(",")]


# Published settings in our conventions.  D1 = DMD paper appendix B; D2 = DMD2 experiments/imagenet/*.sh and
# main/edm/train_edm.py; S = SiD run_sid.sh; F = FastGen config_dmd2_cifar10.py (DMD2 has no CIFAR-10 recipe).
# Both papers' "uniform t" becomes a karras(low,high); SiD sums pixels and scales by 100, we take means: hence w_sid = 100 CHW,
# w_fake = CHW (Adam divides a constant out, except against its eps); EMA half-lives in images become updates.
SID = dict(sigmas="2.5", dm_sigma="karras(0.002,24.4)", beta2=0.999, clip=0, warmup=0, alpha=1.2)
DMD = dict(sigmas="80", dm_sigma="karras(0.0032,72)", critic_sigma="karras(0.002,80)", gan_sigma="karras(0.002,80)", beta1=0.9,
           beta2=0.999, weight_decay=0.01, clip=10, warmup=500, ema=0)
SD = dict(teacher="stable-diffusion-v1-5/stable-diffusion-v1-5", bf16=True, half_frozen=True, checkpointing=True, decay_from=1.0,
          beta1=0.9, beta2=0.999, weight_decay=0.01, clip=10, warmup=500, ema=0, sigmas="t999", unit_noise=True,
          dm_sigma="sd(20,980)", critic_sigma="sd(0,999)", gan_sigma="sd(0,999)", lr_generator=1e-5, lr_critic=1e-5,
          pair_sigma=14.6, log_every=20, sample_every=100, save_every=200)
LARGE = dict(bf16=True, decay_from=1.0, log_every=100, sample_every=1000, save_every=2000)

# fmt: off
PRESETS = {
    # 2D, exact score, one CPU thread.  Shared by all methods, then what differs.
    "toy":               dict(teacher="toy:ring8", method="dmd2", sigmas="1", bf16=True, batch=1024, threads=1, steps=9000, lr_generator=1e-3, lr_critic=2e-3, warmup=100, decay_from=0.0, clip=0, ema=300, dm_sigma="lognormal(-1.4,1.2)", critic_sigma="lognormal(-1.2,1.4)", gan_sigma="lognormal(-1.4,1.2)", log_every=100, sample_every=250, save_every=1000, pairs=100_000, pair_steps=64, pair_sigma=20),
    "toy-dmd":           dict(steps=6000, lr_generator=2e-3),
    "toy-dmd2":          dict(),
    "toy-sid":           dict(steps=8500, batch=768, noisings=2, lr_generator=1.3e-3, decay_from=0.2, ema=500, alpha=0.5, normalise=False, beta2=0.999, dm_sigma="lognormal(-1.8,1.6)"),
    "toy-diff_instruct": dict(lr_generator=2e-3),
    "toy-regression":    dict(steps=6000, lr_generator=2e-3),
    # 8x8 digits, two CPU cores: about a minute each.
    "digits":               dict(bf16=True, sigmas="2.5", dm_sigma="lognormal(-0.8,1.2)", gan_sigma="lognormal(-0.5,1.2)"),
    "digits-dmd":           dict(steps=500, lr_generator=1.5e-3, lr_critic=1.5e-3, control=True),
    "digits-dmd2":          dict(steps=400, critic_steps=2, w_gan=0.1, w_disc=0.03),
    "digits-sid":           dict(steps=900, lr_generator=5e-4, lr_critic=1.5e-3),
    "digits-diff_instruct": dict(steps=600),
    "digits-regression":    dict(steps=500, lr_generator=1.5e-3),
    # CIFAR-10 from EDM's published teachers, at the papers' settings: days on one GPU (README).
    "cifar10":             dict(LARGE, teacher="edm:cifar10-cond", method="sid"),
    "cifar10-dmd":         dict(DMD, steps=300_000, batch=392, lr_generator=5e-5, lr_critic=5e-5, w_reg=0.25, reg_loss="lpips", pairs=100_000),                                             # D1 B.1
    "cifar10-dmd2":        dict(DMD, steps=20_000, batch=2048, lr_generator=1e-4, lr_critic=1e-4, critic_steps=5, w_gan=1e-3, w_disc=1e-2, flip=True, ema=500),                             # F; its "100k iterations" are ours times 5
    "cifar10-sid":         dict(SID, steps=3_125_000, batch=256, lr_generator=1e-5, lr_critic=1e-5, w_sid=307_200, w_fake=3072, ema=1953),                                                  # S:49-71, 800 M images
    "cifar10-diff_instruct": dict(SID, dm_sigma="lognormal(-1.2,1.2)", sigmas="1", steps=390_000, batch=128, lr_generator=1e-5, lr_critic=1e-5, w_dm=3072, w_fake=3072, ema=3906),          # its README.md:44-51
    "cifar10-uncond":      dict(LARGE, teacher="edm:cifar10-uncond", method="sid"),
    "cifar10-uncond-dmd":  dict(DMD, steps=300_000, batch=392, lr_generator=5e-5, lr_critic=5e-5, w_reg=0.5, reg_loss="lpips", pairs=500_000),                                              # D1 B.1
    "cifar10-uncond-dmd2": dict(DMD, steps=20_000, batch=2048, lr_generator=1e-4, lr_critic=1e-4, critic_steps=5, w_gan=1e-3, w_disc=1e-2, flip=True, ema=500),                             # F, which is conditional
    "cifar10-uncond-sid":  dict(SID, steps=1_953_125, batch=256, lr_generator=1e-5, lr_critic=1e-5, w_sid=307_200, w_fake=3072, ema=1953),                                                  # S:20-45, 500 M images
    "imagenet64":          dict(LARGE, teacher="edm:imagenet64", method="dmd2"),
    "imagenet64-dmd":      dict(DMD, steps=350_000, batch=336, lr_generator=2e-6, lr_critic=2e-6, w_reg=0.25, reg_loss="lpips", pairs=25_000, pair_steps=256),                              # D1 B.2
    "imagenet64-dmd2":     dict(DMD, steps=40_000, batch=280, lr_generator=2e-6, lr_critic=2e-6, critic_steps=5, w_gan=3e-3, w_disc=1e-2),                                                  # D2: 200k critic updates
    "imagenet64-sid":      dict(SID, steps=122_070, batch=8192, lr_generator=4e-6, lr_critic=4e-6, w_sid=1_228_800, w_fake=12_288, ema=244),                                                # S:73-98, 1000 M images
    "ffhq64":              dict(LARGE, teacher="edm:ffhq64", method="sid"),
    "ffhq64-sid":          dict(SID, steps=976_562, batch=512, lr_generator=1e-5, lr_critic=1e-5, w_sid=1_228_800, w_fake=12_288, ema=977),                                                 # S:100-125; Differs: generator beta1 .9 there
    "afhqv2-64":           dict(LARGE, teacher="edm:afhqv2-64", method="sid"),
    "afhqv2-64-sid":       dict(SID, steps=976_562, batch=512, lr_generator=5e-6, lr_critic=5e-6, alpha=1.0, w_sid=1_228_800, w_fake=12_288, ema=977),                                      # S:127-151
    # Stable Diffusion 1.5: --prompts FILE; the published batch on one GPU by --accumulate.
    # D2 = DMD2 experiments/sdv1.5/*.sh; L = SiD-LSG run_sid.sh.
    "sd15":                dict(SD, method="dmd2"),
    "sd15-dmd":            dict(steps=20_000, batch=2304, guidance=3.0, w_reg=0.25, pairs=500_000, pair_steps=26),                                                                          # D1 B.3; Differs: L2 on latents (--reg_loss lpips is the paper's, on TAESD's images), Heun (PNDM 50)
    "sd15-dmd2":           dict(steps=4000, batch=2048, guidance=1.75, critic_steps=10),                                                                                                    # D2 stage 1: 40k critic updates
    "sd15-sid":            dict(steps=19_531, batch=512, sigmas="t625", unit_noise=False, guidance=1.5, fake_guidance=1.5, critic_dropout=0.1, dm_sigma="sd(20,979)", critic_sigma="sd(20,979)", alpha=1.0, beta1=0.0, weight_decay=0.0, clip=0, warmup=0, lr_generator=1e-6, lr_critic=1e-6, ema=98, w_sid=16_384, w_fake=16_384),      # L:61-88, 10 M images
    "sd15-dmd2-gan":       dict(SD, method="dmd2", steps=500, batch=2048, guidance=1.75, critic_steps=10, w_gan=1e-3, w_disc=1e-2, lr_generator=5e-7, lr_critic=5e-7),                       # D2 stage 2: 5k critic updates on --init RUN of stage 1
    "sd15-dmd2-4step":     dict(SD, method="dmd2", sigmas="t999,t749,t499,t249", steps=4000, batch=2048, guidance=1.75, critic_steps=10),                                                   # D2, which does several steps for SDXL alone
    # CIFAR-10 from a teacher of one's own.  scratch: one H100 or H200, about a lecture; small: a CPU, to see every part work.
    "cifar10-scratch":      dict(LARGE, teacher="cifar10-scratch", method="dmd2", compile=True, sigmas="2.5", dm_sigma="lognormal(-0.8,1.4)", gan_sigma="lognormal(-0.5,1.2)", batch=256, warmup=100, decay_from=0.5, ema=200, flip=True, log_every=50, sample_every=250, save_every=500, pairs=50_000),
    "cifar10-scratch-dmd":  dict(steps=5000, lr_generator=2e-4, lr_critic=2e-4),
    "cifar10-scratch-dmd2": dict(steps=4000, lr_generator=1e-4, lr_critic=2e-4, critic_steps=2, w_gan=0.03, w_disc=0.03),
    "cifar10-scratch-sid":  dict(steps=6000, lr_generator=1e-4, lr_critic=2e-4),
    "cifar10-small":        dict(teacher="cifar10-small", method="dmd", bf16=True, sigmas="2.5", dm_sigma="lognormal(-0.8,1.4)", gan_sigma="lognormal(-0.5,1.2)", batch=32, steps=300, sample_every=100, save_every=100, pairs=1500, eval_images=1000),
    "cifar10-small-dmd":    dict(control=True),
    "cifar10-small-dmd2":   dict(critic_steps=2, steps=200, lr_generator=2e-4, w_gan=0.1, w_disc=0.03),
    "cifar10-small-sid":    dict(lr_generator=1e-4, lr_critic=1e-3),
}
# fmt: on


def split(name):
    """'cifar10-uncond-sid' -> ('cifar10-uncond', 'sid'); 'cifar10-uncond' -> ('cifar10-uncond', '')."""
    base, _, suffix = name.rpartition("-")
    return (base, suffix) if suffix in METHOD_NAMES else (name, "")


def resolve(overrides):
    """Config from a dict of command-line values; raises UserError with one sentence about the first bad one."""
    name = overrides.get("preset", Config.preset)
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}: choose from {', '.join(PRESETS)}")
    base, suffix = split(name)
    method = overrides.get("method", suffix or PRESETS[base].get("method", Config.method))
    cfg = Config(**{**PRESETS[base], **PRESETS.get(f"{base}-{method}", {}), **overrides, "preset": name, "method": method})
    cfg.out = cfg.out or f"runs/{base}-{cfg.method}"
    validate(cfg)
    return cfg


# What a resumed run may change without ceasing to be the same run.
RESUMABLE = {"out", "device", "threads", "log_every", "sample_every", "save_every", "eval_every", "eval_images", "log_to"}


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
             w_dm=0, w_reg=0, w_gan=0, w_sid=0, w_fake=0, w_disc=0, accumulate=1, weight_decay=0, eval_every=0, eval_images=2,
            lora_generator=0, lora_critic=0, critic_dropout=0, noisings=1)
CHOICES = dict(method=METHOD_NAMES, reg_loss=("l2", "lpips"), log_to=("", "tensorboard", "wandb"))


def validate(cfg):
    """Raise UserError for the first value that cannot work, before anything is written."""
    for name, choices in CHOICES.items():
        if getattr(cfg, name) not in choices:
            raise UserError(f"unknown {name} {getattr(cfg, name)!r}: choose from {', '.join(filter(None, choices))}")
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
    except (ValueError, IndexError):
        sigmas = [math.nan]
    if not all(0 < s < math.inf for s in sigmas) or sigmas != sorted(set(sigmas), reverse=True):
        raise UserError(f"--sigmas must be positive numbers, descending, comma separated; got {cfg.sigmas!r}")
    if len(sigmas) > 1 and cfg.method in ("dmd", "regression") and cfg.w_reg:
        raise UserError("the regression loss needs a one-step generator: give one number in --sigmas, or use dmd2 or sid")
    if cfg.half_frozen and not cfg.bf16:
        raise UserError("--half_frozen keeps weights in bfloat16, which only --bf16 computes with: give both or neither")
    if cfg.offload_teacher and (cfg.method == "sid" or cfg.lora_generator or cfg.lora_critic or cfg.shard):
        raise UserError("--offload_teacher takes the teacher off the device between its calls, but sid differentiates through "
                        "it, LoRA computes with its weights and --shard has split them: leave it out")
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

"""Networks and optimisers of a run, by its Config."""

from functools import partial
from pathlib import Path

import torch
from torch import nn

from nano_dmd.engine import machine
from nano_dmd.engine.files import UserError, first_line, load_checkpoint, load_weights
from nano_dmd.engine.lora import lora_copy, sharing_copy
from nano_dmd.fake_score import FakeScore
from nano_dmd.gan import Discriminator
from nano_dmd.generator import Generator
from nano_dmd.methods import Nets, needs
from nano_dmd.real_score import RealScore


def student(cfg, teacher):
    """The Generator of a run before its first step: a copy of the teacher's network, or LoRA."""
    return Generator(teacher.net, cfg.sigma_list(), cfg.unit_noise, cfg.ode_steps,
                     copy=partial(lora_copy, rank=cfg.lora_generator))


def build(cfg, teacher, device):
    """(Nets, {"generator", "critic"} optimisers) of a fresh run."""
    torch.manual_seed(cfg.seed)  # the same run, whether the teacher was cached or not
    generator = student(cfg, teacher)
    fake = FakeScore(teacher.net, cfg.fake_guidance, copy=partial(lora_copy, rank=cfg.lora_critic))
    for net in (generator.net, fake.net, teacher.net):
        tune(net, cfg, device)
    if cfg.half_frozen and machine.fast_bf16(device):  # in place: sharing copies follow
        for p in teacher.net.net.parameters():
            p.data = p.data.bfloat16()             # the adapter's noise table stays float32
    discriminator = head(fake, teacher, cfg, device)
    ema = sharing_copy(generator).requires_grad_(False) if cfg.ema else generator
    slow_fake = sharing_copy(fake).requires_grad_(False) if cfg.ema_critic else fake
    for net in {generator.net, fake.net, slow_fake.net, teacher.net} if cfg.compile else ():
        machine.compile_net(net.net)
    real = RealScore(teacher.denoiser, cfg.guidance)
    nets = Nets(real, fake, discriminator, generator, ema, teacher.sigma_data, slow_fake)
    if cfg.reg_loss == "lpips" and "pairs" in needs(cfg):
        nets.lpips = perceptual_distance(cfg, teacher, device)
    if cfg.init:
        begin_from(cfg.init, nets, device)
    if cfg.offload_teacher and isinstance(teacher.denoiser, nn.Module):        # not a formula
        offload(teacher.denoiser, device)
    critic = [*fake.parameters(), *discriminator.parameters()]
    return nets, {"generator": optimiser(generator.parameters(), cfg),
                  "critic": optimiser(critic, cfg)}


def tune(denoiser, cfg, device):
    """Speed and memory of one network, by cfg: precision and recomputation."""
    denoiser.bf16 = cfg.bf16 and machine.fast_bf16(device)
    if cfg.checkpointing:
        if not hasattr(denoiser.net, "checkpointing"):
            raise UserError(f"--checkpointing: {type(denoiser.net).__name__} cannot recompute "
                            "activations; leave it out")
        denoiser.net.checkpointing = True


def head(fake, teacher, cfg, device):
    """The Discriminator.  Without GAN a small one is made too, so a seed draws the same run."""
    if teacher.kind == "text" and not cfg.w_disc:  # 10 M weights for nothing
        return nn.Identity()
    z = torch.zeros(2, *teacher.shape, device=device)
    labels = torch.zeros(2, dtype=torch.long, device=device) if teacher.classes else None
    with torch.no_grad():
        features = fake.features(z, z.new_ones(2), labels)
    return Discriminator(features.shape[1:]).to(device)


def perceptual_distance(cfg, teacher, device):
    """distance(x, y) -> (B,): LPIPS of x, y (B, *S), of the decoded images if they are latents."""
    from nano_dmd.teachers.diffusers_unet import lpips
    from nano_dmd.teachers.latents import differentiable_decoder

    if teacher.kind != "text":
        return lpips(device)
    source = teacher.recipe["source"]
    return lpips(device, differentiable_decoder(cfg.lpips_decoder, source, device))


def begin_from(folder, nets, device):
    """Load generator and fake score of another run of the same networks (its checkpoint.pt)."""
    path = Path(folder) / "checkpoint.pt"
    saved = load_checkpoint(path, device)["nets"]
    for name, net in (("generator", nets.generator), ("generator", nets.ema), ("fake", nets.fake),
                      ("fake", nets.slow_fake)):
        load_weights(net, saved.get(name, {}), path)


def offload(denoiser, device):
    """Keep a frozen denoiser's weights in the host's memory; device has them during each call."""
    home = {p: p.data.cpu() for p in denoiser.parameters()}
    if torch.device(device).type == "cuda":
        home = {p: data.pin_memory() for p, data in home.items()}  # twice as fast to copy

    def fetch(module, args):
        if torch.is_grad_enabled() and args[0].requires_grad:
            raise UserError("--offload_teacher: this method differentiates through the teacher, so "
                            "its weights must stay on the device: leave it out")
        for p in home:
            p.data = home[p].to(device, non_blocking=True)

    def release(*_):
        for p in home:
            p.data = home[p]

    release()
    denoiser.register_forward_pre_hook(fetch)
    denoiser.register_forward_hook(release, always_call=True)


def optimiser(parameters, cfg):
    """AdamW on parameters that require grad.  Moments: 8 bytes a weight, 2 with cfg.adam8bit."""
    args = dict(betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay)
    trained = [p for p in parameters if p.requires_grad]
    if not cfg.adam8bit:
        return torch.optim.AdamW(trained, **args, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except (ImportError, RuntimeError) as e:
        raise UserError(f"--adam8bit needs bitsandbytes ({first_line(e)}): "
                        'pip install "nano_dmd[sd]", or leave it out') from e
    return AdamW8bit(trained, **args)


def set_learning_rates(opts, step, cfg):
    """Linear warm-up over cfg.warmup steps; after cfg.decay_from of the run, linear decay to 0."""
    left = (1 - step / cfg.steps) / (1 - cfg.decay_from) if cfg.decay_from < 1 else 1.0
    factor = min(1.0, left, (step + 1) / cfg.warmup if cfg.warmup else 1.0)
    for name, opt in opts.items():
        opt.param_groups[0]["lr"] = getattr(cfg, f"lr_{name}") * factor

"""What a run needs around its steps: device, nets, optimisers, data, pictures of progress, and its saved state."""

from pathlib import Path

import torch
from torch import nn

from nano_dmd.engine.draw import Draw
from nano_dmd.engine.files import UserError, first_line, load_checkpoint, load_weights
from nano_dmd.engine.find import (cached_pairs, check_guidance, find_data, find_prompts,
                                  find_teacher)
from nano_dmd.engine.lora import sharing_copy
from nano_dmd.engine.machine import compile_net, fast_bf16
from nano_dmd.engine.parallel import first_then_others
from nano_dmd.fake_score import FakeScore
from nano_dmd.gan import Discriminator
from nano_dmd.generator import Generator
from nano_dmd.methods import METHODS, Nets
from nano_dmd.real_score import RealScore
from nano_dmd.teachers.data import load_data
from nano_dmd.teachers.zoo import RECIPES


def learning_rate(step, cfg):
    """Factor on both rates: linear warm-up, then linear decay to 0 from cfg.decay_from of the run."""
    left = (1 - step / cfg.steps) / (1 - cfg.decay_from) if cfg.decay_from < 1 else 1.0
    return min(1.0, left, (step + 1) / cfg.warmup if cfg.warmup else 1.0)


def set_learning_rates(opts, step, cfg):
    for name, opt in opts.items():
        opt.param_groups[0]["lr"] = getattr(cfg, f"lr_{name}") * learning_rate(step, cfg)


def prepare(cfg, device, resumed=""):
    """(Teacher, Nets, optimisers, Draw) of a run before its first step.  raises UserError where cfg does not fit together."""
    weights = [w for w, _ in METHODS[cfg.method].generator]
    if not any(getattr(cfg, w) for w in weights):
        raise UserError(f"{cfg.method} has nothing to minimise: give one of {', '.join('--' + w for w in weights)} a weight")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.tf32
    data = load_data(cfg.data, device, cfg.flip) if cfg.data and not cfg.prompts else None      # a typo shows early
    if data and not data.classes and cfg.teacher in RECIPES:      # before minutes or hours of training it
        check_guidance(cfg, 0, {})
    teacher = first_then_others(lambda: find_teacher(cfg, device, resumed))
    prompts = first_then_others(lambda: find_prompts(cfg, teacher))
    data = first_then_others(lambda: find_data(cfg, teacher, device, needs_data(cfg), data))
    regress = cfg.w_reg and "w_reg" in weights
    pairs = first_then_others(lambda: cached_pairs(cfg, teacher, device, prompts)) if regress else None
    nets, opts = build(cfg, teacher, device)
    return teacher, nets, opts, Draw(cfg, teacher, data, pairs, torch.Generator().manual_seed(cfg.seed), device, prompts)


def needs_data(cfg):
    """Only the GAN looks at real data, and the comparison with forward-noised inputs."""
    return (cfg.method == "dmd2" and cfg.w_disc > 0) or (len(cfg.sigma_list()) > 1 and not cfg.backward_simulation)


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
    discriminator = nn.Identity() if teacher.kind == "text" and not cfg.w_disc else Discriminator(features.shape[1:]).to(device)
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
    from nano_dmd.teachers.diffusers_unet import lpips
    from nano_dmd.teachers.text_to_image import differentiable_decoder

    latent = teacher.kind == "text"
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

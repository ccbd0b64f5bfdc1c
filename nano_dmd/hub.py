"""What other libraries bring: diffusers' image models as teachers, and the perceptual distance of DMD's regression."""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from nano_dmd.checkpoint import UserError, cache_dir, first_line
from nano_dmd.teacher import FromEps, FromV
from nano_dmd.zoo import save_teacher


class DiffusersUNet(nn.Module):
    """A UNet2DModel under our signature net(x_vp, t, cond); None and -1 are not known to it as "no class"."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x, t, cond=None):
        return self.unet(x, t, class_labels=cond).sample

    def features(self, x, t, cond=None):
        """The activations (B, C, h, w) between encoder and decoder: the first half of UNet2DModel.forward."""
        unet = self.unet
        emb = unet.time_embedding(unet.time_proj(t).to(x.dtype))
        if unet.class_embedding is not None:
            emb = emb + unet.class_embedding(cond)
        h = unet.conv_in(x)
        for block in unet.down_blocks:
            h = block(hidden_states=h, temb=emb)[0]
        return unet.mid_block(h, emb)


def denoiser_from_config(unet, alphas_cumprod, prediction_type):
    """The untrained Denoiser that fetch_diffusers recorded: UNet2DModel's config, the noise table, epsilon or v_prediction."""
    from diffusers import UNet2DModel

    kinds = {"epsilon": FromEps, "v_prediction": FromV}
    return kinds[prediction_type](DiffusersUNet(UNet2DModel.from_config(unet)), torch.tensor(alphas_cumprod, dtype=torch.float64))


def fetch_diffusers(name):
    """The cached teacher folder of a pipeline, downloaded once by huggingface_hub into its own cache.

    raises UserError if there is no such pipeline, or none that can be a teacher
    """
    folder = cache_dir() / f"teacher-diffusers-{hashlib.sha256(name.encode()).hexdigest()[:10]}"
    if Path(name).is_dir() or not (folder / "teacher.safetensors").exists():          # a local folder may have changed
        convert(name, folder)
    return folder


def convert(name, folder):
    """Make folder one that load_teacher takes, from a diffusers pipeline (hub name or folder)."""
    from diffusers import DDPMScheduler, UNet2DModel

    unet, scheduler = part(UNet2DModel, name, "unet"), part(DDPMScheduler, name, "scheduler")
    config, kind = dict(unet.config), scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise UserError(f"{name} predicts {kind!r}: teachers here predict epsilon or v_prediction")
    if config["in_channels"] != config["out_channels"] or not isinstance(config["sample_size"], int):
        raise UserError(f"{name} maps {config['in_channels']} channels of {config['sample_size']} pixels to "
                        f"{config['out_channels']}: not a model of square images")
    args = dict(unet={k: v for k, v in config.items() if not k.startswith("_")}, prediction_type=kind,
                alphas_cumprod=scheduler.alphas_cumprod.double().tolist())
    shape = [config["in_channels"], config["sample_size"], config["sample_size"]]
    denoiser = denoiser_from_config(**args)
    denoiser.net.unet.load_state_dict(unet.state_dict())
    save_teacher(folder, denoiser, dict(network="diffusers", args=args, sigma_data=0.5, bf16=False, shape=shape, data="",
                                        classes=config.get("num_class_embeds") or 0, seconds=0, cpu_seconds=0))


def part(kind, name, subfolder, wanted="diffusers pipeline with a UNet2DModel"):
    """kind.from_pretrained of a pipeline's subfolder, or of a bare model's own folder; raises UserError asking for a `wanted`."""
    problems = []
    for where in ({"subfolder": subfolder}, {}):
        try:
            return kind.from_pretrained(name, **where)
        except Exception as e:                                    # hub, network, json, weights: no common base class
            problems.append(first_line(e))
    raise UserError(f"cannot load the {subfolder} of {name}: {problems[0]}; give a {wanted}, on the hub (needs a network "
                    "the first time) or as a local folder")


def lpips(device, decode=None):
    """distance(a, b) -> (B,): LPIPS with VGG, as DMD measures its regression (appendix B), by the same library, piq.

    Of images in [-1, 1], bilinearly upsampled to 224 pixels; or of latents, at the size of the images that decode makes of
    them.  raises UserError if piq or its weights are missing.
    """
    try:
        import piq

        distance = piq.LPIPS(reduction="none").to(device).requires_grad_(False)
    except ImportError as e:
        raise UserError(f'--reg_loss lpips needs piq ({e}): pip install "nano_dmd[eval]", or use --reg_loss l2') from e
    except OSError as e:                                          # the weights are downloaded once, 528 MB
        raise UserError(f"--reg_loss lpips cannot download VGG's weights ({first_line(e)}): put vgg16-397923af.pth and "
                        f"lpips_weights.pt into {torch.hub.get_dir()}/checkpoints, or use --reg_loss l2") from e

    def seen(x):
        if decode:
            return (decode(x) + 1) / 2
        return F.interpolate((x + 1) / 2, size=(224, 224), mode="bilinear", antialias=False)

    return lambda a, b: distance(seen(a), seen(b))

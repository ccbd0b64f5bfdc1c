"""Pixel models of diffusers as teachers, and what its schedulers say; and piq's LPIPS."""

import torch
import torch.nn.functional as F
from torch import nn

from nano_dmd.denoiser import FromEps, FromV
from nano_dmd.engine.files import UserError, blame, first_line
from nano_dmd.teachers import hub

# Schedulers of models that predict eps or v at timesteps of a variance-preserving table.
SCHEDULERS = (
    "DDPM", "DDIM", "PNDM", "DDPMParallel", "DDIMParallel", "LMSDiscrete", "EulerDiscrete",
    "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete",
    "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep")
PIXEL_PIPELINES = ("", "DDPMPipeline", "DDIMPipeline", "PNDMPipeline")  # "" = a model without one
PREDICTS = {"epsilon": FromEps, "v_prediction": FromV}


class DiffusersUNet(nn.Module):
    """A UNet2DModel as net(x_vp, t, cond); None and -1 do not mean "no class" to it."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x, t, cond=None):
        return self.unet(x, t, class_labels=cond).sample

    def features(self, x, t, cond=None):
        """The activations (B, C, h, w) of the middle block; the forward ends there."""
        middle = self.unet.mid_block or self.unet.down_blocks[-1]
        return outputs_of(middle, lambda: self.forward(x, t, cond))[0]


class Reached(Exception):
    """Ends a forward."""


@torch.compiler.disable                            # a compiled forward does not see a new hook
def outputs_of(block, forward):
    """[what block returns] in the course of forward(), which goes no further."""
    found = []

    def stop(module, inputs, output):
        found.extend(output if isinstance(output, tuple) else [output])
        raise Reached

    handle = block.register_forward_hook(stop)
    try:
        forward()
    except Reached:
        pass
    finally:
        handle.remove()
    return found


def denoiser_from_config(unet, alphas_cumprod, prediction_type):
    """The untrained Denoiser of a recipe: UNet2DModel's config, noise table, what it predicts."""
    from diffusers import UNet2DModel

    net = DiffusersUNet(UNet2DModel.from_config(unet))
    return PREDICTS[prediction_type](net, torch.tensor(alphas_cumprod, dtype=torch.float64))


def pixel_teacher(name):
    """(Denoiser, recipe) of a diffusers pipeline in pixels, for zoo.save_teacher.

    raises UserError if there is no such pipeline, or none that can be a teacher
    """
    from diffusers import UNet2DModel

    index = hub.index_of(name)
    kind = index.get("_class_name", "")
    others = [k for k, v in index.items() if k not in ("unet", "scheduler")
              and isinstance(v, (list, tuple)) and any(v)]
    if kind not in PIXEL_PIPELINES or others:
        what = " with ".join([kind, *others])
        raise UserError(f"{name} is a {what}: teachers here are DDPM, DDIM or PNDM pipelines with "
                        "a UNet2DModel in pixels, Stable Diffusion 1, 2, XL and 3, SANA and PRX")
    scheduler, unet = noise_table(name), hub.part(UNet2DModel, name, "unet")
    config, side = dict(unet.config), square(unet.config["sample_size"])
    halved = [getattr(b, "downsamplers", None) or getattr(b, "resnet_down", None)
              for b in unet.down_blocks]
    fits = 0 < side <= 4096 and side % 2 ** sum(map(bool, halved)) == 0
    if config["in_channels"] != config["out_channels"] or not fits:
        raise UserError(f"{name} maps {config['in_channels']} channels of {config['sample_size']} "
                        f"pixels to {config['out_channels']}: not a model of square images")
    if config["time_embedding_type"] == "fourier" or config["class_embed_type"]:
        raise UserError(f"{name} has time_embedding_type {config['time_embedding_type']} and "
                        f"class_embed_type {config['class_embed_type']}: not supported")
    args = dict(unet={k: v for k, v in config.items() if not k.startswith("_")},
                alphas_cumprod=scheduler.alphas_cumprod.double().tolist(),
                prediction_type=scheduler.config.prediction_type)
    denoiser = PREDICTS[args["prediction_type"]](DiffusersUNet(unet), scheduler.alphas_cumprod)
    if denoiser.sigmas[-1] < 5:                    # samples begin with pure noise
        raise UserError(f"the noise of {name} ends at sigma {denoiser.sigmas[-1]:.3g}, where "
                        "images still show: it cannot be a teacher here")
    return denoiser, dict(network="diffusers", args=args, sigma_data=0.5, bf16=False, data="",
                          shape=[config["in_channels"], side, side], seconds=0, cpu_seconds=0,
                          classes=config.get("num_class_embeds") or 0)


def square(size):
    """Pixels a side by diffusers' sample_size, a number or a pair of equal ones; 0 if neither."""
    sides = set(size) if isinstance(size, (list, tuple)) else {size}
    return sides.pop() if len(sides) == 1 and all(type(n) is int and n > 0 for n in sides) else 0


def noise_table(name):
    """The scheduler of a pipeline, which has alphas_cumprod.

    raises UserError unless its class and settings say that the network predicts eps or v at the
    timesteps of that table.  Under another scheduler the same inputs mean something else.
    """
    import diffusers

    config = hub.component_config(name, "scheduler")
    kind = str(config.get("_class_name", "")).removesuffix("Scheduler")
    odd = [k for k in ("use_flow_sigmas", "rescale_betas_zero_snr") if config.get(k)]
    if config.get("timestep_type", "discrete") != "discrete":
        odd.append("timestep_type")
    predicted = config.get("prediction_type", "epsilon")
    if kind not in SCHEDULERS or odd or predicted not in PREDICTS:
        raise UserError(f"{name} predicts {predicted!r} and is sampled by {kind or 'no '}Scheduler "
                        f"{' '.join(odd)}: teachers here predict epsilon or v_prediction at the "
                        "timesteps of a DDPM, DDIM, PNDM or other variance-preserving schedule")
    with blame(f"cannot use the scheduler of {name}"):
        scheduler = getattr(diffusers, f"{kind}Scheduler").from_config(config)
        abar = scheduler.alphas_cumprod
        if not ((abar > 0) & (abar < 1)).all() or not (abar.diff() < 0).all():
            raise ValueError("its noise does not rise from little to much: no teacher")
    return scheduler


def lpips(device, decode=None):
    """distance(a, b) -> (B,): piq's LPIPS with VGG, as in DMD's regression (appendix B).

    a and b are images (B, 3, H, W) in [-1, 1], upsampled to 224 pixels.  With decode they are
    latents, and its images keep their size.  raises UserError if piq or its weights are missing
    """
    try:
        import piq

        distance = piq.LPIPS(reduction="none").to(device).requires_grad_(False)
    except ImportError as e:
        raise UserError(f'--reg_loss lpips needs piq ({e}): pip install "nano_dmd[eval]", or use '
                        "--reg_loss l2") from e
    except OSError as e:                           # the weights are downloaded once, 528 MB
        place = f"{torch.hub.get_dir()}/checkpoints"
        raise UserError(f"--reg_loss lpips cannot download its weights ({first_line(e)}): put "
                        f"vgg16-397923af.pth and lpips_weights.pt into {place}, or use l2") from e

    def seen(x):
        if decode:
            return (decode(x) + 1) / 2
        return F.interpolate((x + 1) / 2, size=(224, 224), mode="bilinear", antialias=False)

    return lambda a, b: distance(seen(a), seen(b))

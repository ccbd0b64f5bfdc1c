"""Pixel models of diffusers as teachers, safe loading of its pipelines; and piq's LPIPS."""

import functools
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from nano_dmd.denoiser import FromEps, FromV
from nano_dmd.engine.cache import fingerprint
from nano_dmd.engine.files import UserError, blame, first_line, read_json

# Schedulers of models that predict eps or v at timesteps of a variance-preserving table.
SCHEDULERS = (
    "DDPM", "DDIM", "PNDM", "DDPMParallel", "DDIMParallel", "LMSDiscrete", "EulerDiscrete",
    "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete",
    "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep")
PIPELINES = ("", "DDPMPipeline", "DDIMPipeline", "PNDMPipeline")  # "" = a model without one
PREDICTS = {"epsilon": FromEps, "v_prediction": FromV}


@functools.lru_cache
def on_the_hub(name):
    """(name or folder of its copy, commit) of a model on the hub; the hub is asked once.

    raises UserError if the hub does not give it and there is no copy here
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        return name, HfApi().model_info(name, timeout=10).sha
    except Exception as e:                         # network, name, permission: no common base class
        for file in ("model_index.json", "config.json"):
            copy = try_to_load_from_cache(name, file)
            if isinstance(copy, str):
                return str(Path(copy).parent), Path(copy).parent.name
        raise UserError(f"no model {name} in a folder here, and the hub does not give it "
                        f"({first_line(e)}): check the name, or give a pipeline's folder") from e


def source(name):
    """The arguments of from_pretrained for a folder or a hub name."""
    if Path(name).is_dir():
        return dict(pretrained_model_name_or_path=name)
    place, commit = on_the_hub(name)
    revision = {"revision": commit} if place == name else {}
    return dict(pretrained_model_name_or_path=place, **revision)


def version(name, *parts):
    """What changes when (parts of) a model does: a fingerprint of its files, or its commit."""
    if not Path(name).is_dir():
        return on_the_hub(name)[1]
    folders = [os.path.join(name, p) for p in parts if os.path.isdir(os.path.join(name, p))]
    return fingerprint(*(folders or [name]))


def index_of(name):
    """model_index.json of a pipeline, {} for a model without one."""
    if Path(name).is_dir():
        path = Path(name) / "model_index.json"
        return read_json(path, {"_class_name": str}) if path.is_file() else {}
    place = source(name)                           # complains before a slow import
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.load_config(**place)
    except OSError:                                # the hub has the model, this file is not in it
        return {}


class DiffusersUNet(nn.Module):
    """A UNet2DModel as net(x_vp, t, cond); None and -1 do not mean "no class" to it."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x, t, cond=None):
        return self.unet(x, t, class_labels=cond).sample

    def features(self, x, t, cond=None):
        """The activations (B, C, h, w) of the middle: the first half of UNet2DModel.forward."""
        unet = self.unet
        emb = unet.time_embedding(unet.time_proj(t).to(x.dtype))
        if unet.class_embedding is not None:
            emb = emb + unet.class_embedding(cond)
        skip = 2 * x - 1 if unet.config.center_input_sample else x
        h = unet.conv_in(skip)
        for block in unet.down_blocks:
            if hasattr(block, "skip_conv"):        # of NCSN++
                h, _, skip = block(hidden_states=h, temb=emb, skip_sample=skip)
            else:
                h = block(hidden_states=h, temb=emb)[0]
        return h if unet.mid_block is None else unet.mid_block(h, emb)


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

    index = index_of(name)
    kind = index.get("_class_name", "")
    others = [k for k, v in index.items() if k not in ("unet", "scheduler")
              and isinstance(v, (list, tuple)) and any(v)]
    if kind not in PIPELINES or others:
        what = " with ".join([kind, *others])
        raise UserError(f"{name} is a {what}: teachers here are DDPM, DDIM or PNDM pipelines with "
                        "a UNet2DModel in pixels, or Stable Diffusion 1 and 2")
    scheduler, unet = noise_table(name), part(UNet2DModel, name, "unet")
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
    denoiser = denoiser_from_config(**args)
    if denoiser.sigmas[-1] < 5:                    # samples begin with pure noise
        raise UserError(f"the noise of {name} ends at sigma {denoiser.sigmas[-1]:.3g}, where "
                        "images still show: it cannot be a teacher here")
    denoiser.net.unet.load_state_dict(unet.state_dict())
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

    config = None
    with blame(f"cannot load the scheduler of {name}", "it says what the network predicts"):
        for where in ({"subfolder": "scheduler"}, {}):
            try:
                config = config or diffusers.DDPMScheduler.load_config(**source(name), **where)
            except Exception as e:
                problem = e
        if config is None:
            raise problem
        if not isinstance(config, dict):
            raise ValueError("its config is no table")
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


def part(kind, name, subfolder, wanted="diffusers pipeline with a UNet2DModel"):
    """kind.from_pretrained of a pipeline's subfolder, or of a bare model's own folder.

    A network is returned in float32, complete and finite.  If only the variant "fp16" is there, it
    is read.  raises UserError that asks for a `wanted`
    """
    network, problems = issubclass(kind, nn.Module), []
    for variant in (None, "fp16") if network else (None,):
        for where in ({"subfolder": subfolder}, {}):
            more = dict(variant=variant, output_loading_info=True) if network else {}
            try:
                declared = None
                if hasattr(kind, "load_config"):
                    declared = kind.load_config(**source(name), **where).get("_class_name")
                if declared not in (None, kind.__name__):
                    raise UserError(f"the {subfolder} of {name} is a {declared}: give a {wanted}")
                found = kind.from_pretrained(**source(name), **where, **more)
            except UserError:
                raise
            except Exception as e:                 # hub, network, json, weights
                problems.append(first_line(e))
                continue
            return complete(*found, f"the {subfolder} of {name}") if network else found
    raise UserError(f"cannot load the {subfolder} of {name}: {problems[0]}; give a {wanted}, on "
                    "the hub (needs a network the first time) or as a local folder")


def complete(model, info, what):
    """A network just read, in float32.  raises UserError unless all weights came, finite."""
    absent = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    ours = type(model).__module__.startswith("diffusers")
    strange = sorted(map(str, info["unexpected_keys"])) if ours else []
    if absent or strange:
        why = ", ".join([f"no {n}" for n in absent[:1]] + [f"an unknown {n}" for n in strange[:1]])
        if strange and strange[0].startswith(("module.", "_orig_mod.")):
            why += ", so a wrapped network was saved: save the one inside"
        kind = type(model).__name__
        raise UserError(f"{what} is no {kind} as its config describes: it has {why}")
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            raise UserError(f"{what} is damaged: {name} holds a number that is not finite")
    return model.float()


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

"""Models that paint what a prompt says: Stable Diffusion 1, 2, XL and 3, SANA and PRX as teachers.

    latents  x = VAE encoder of an image, scaled to about unit variance: (4, 64, 64) for 512 pixels
    noise    xt = x + sigma noise; FromEps, FromV or FromFlow scales it for the network
    cond     (B, T, C) embeddings of the prompts (prompts.py); None = the empty prompt
"""

import os

import torch

from nano_dmd.denoiser import FromFlow
from nano_dmd.engine.files import UserError
from nano_dmd.engine.machine import forked
from nano_dmd.noise import sd_sigmas
from nano_dmd.teachers import hub
from nano_dmd.teachers.diffusers_unet import PREDICTS, noise_table, square
from nano_dmd.teachers.latents import decoder, load_vae, pixels
from nano_dmd.teachers.prompts import empty_prompt
from nano_dmd.teachers.text_networks import KINDS, RANDOM, TextNet

PIPELINES = {                                      # what a pipeline's network is
    "StableDiffusionPipeline": "UNet2DConditionModel",
    "StableDiffusionImg2ImgPipeline": "UNet2DConditionModel",
    "StableDiffusionXLPipeline": "UNet2DConditionModel",
    "SanaPipeline": "SanaTransformer2DModel",
    "PRXPipeline": "PRXTransformer2DModel",
    "StableDiffusion3Pipeline": "SD3Transformer2DModel",
}
# Settings of networks that ask for more than a prompt.
OTHERS = ("encoder_hid_dim", "encoder_hid_dim_type", "class_embed_type", "num_class_embeds",
          "time_cond_proj_dim", "center_input_sample", "guidance_embeds", "resolution_embeds")
FLOW_SIGMAS = 0.002, 200.0                         # t from .002 to .995, for Heun


def load(name, device):
    """The fields of a Teacher in a diffusers folder, on the hub or of RANDOM.  raises UserError."""
    read = random_parts if name in RANDOM else read_parts
    network, predicts, sigmas, side, decode = read(name, device)
    net = TextNet(network, empty_prompt(name))
    widths = [width(network.config), net.empty.shape[2]]
    if widths[0] != widths[1]:
        raise UserError(f"the text_encoder of {name} gives {widths[1]} numbers a token, its "
                        f"{net.kind.part} takes {widths[0]}: they are not of one model")
    if predicts == "flow":
        denoiser, ends = FromFlow(net), FLOW_SIGMAS
    else:
        denoiser = PREDICTS[predicts](net, 1 / (1 + sigmas.double() ** 2))
        ends = sigmas[0].item(), sigmas[-1].item()
    denoiser = denoiser.to(device).requires_grad_(False).eval()
    shape = (network.config.in_channels, side, side)
    recipe = dict(network="text", shape=list(shape), classes=0, data="", seconds=0, cpu_seconds=0,
                  source=os.path.abspath(name) if os.path.isdir(name) else name,
                  version=name if name in RANDOM else hub.version(name))
    # The published losses are plain errors in eps, v or the flow's v: weights 1/sigma^2,
    # 1/sigma^2 + 1 and (1/sigma + 1)^2 in x0.  Differs: the last is 1/sigma^2 + 1 here, too.
    sigma_data = {"epsilon": float("inf"), "v_prediction": 1.0, "flow": 1.0}[predicts]
    return dict(kind="text", denoiser=denoiser, net=denoiser, shape=shape, classes=0, data="",
                sigma_data=sigma_data, recipe=recipe, decode=decode, sigmas=ends,
                calls=net.kind.steps)


def width(config):
    """Numbers a token, by the config of a network."""
    names = "caption_channels", "cross_attention_dim", "joint_attention_dim", "context_in_dim"
    return next(config[n] for n in names if config.get(n))


def random_parts(name, device):
    """What read_parts gives, for one of RANDOM: it has no decoder."""
    import diffusers

    kind, args, _ = RANDOM[name]
    with forked(device):
        torch.manual_seed(0)
        network = getattr(diffusers, kind)(**args)
    predicts = "epsilon" if KINDS[kind].part == "unet" else "flow"
    return network, predicts, sd_sigmas(), network.config.sample_size, None


def read_parts(name, device):
    """(network, what it predicts, its noise levels, latents a side, decode) of a pipeline.

    Predicts "epsilon", "v_prediction" or "flow", which has no table of noise levels
    """
    index = hub.index_of(name)
    kind = PIPELINES.get(index.get("_class_name", ""))
    if not kind:
        found = index.get("_class_name")
        raise UserError(f"{name} is {f'a {found}' if found else 'no pipeline that listens to text'}"
                        f": supported are {', '.join(PIPELINES)}")
    part = KINDS[kind].part
    config = hub.component_config(name, part)      # looked at before gigabytes are loaded
    vae_config = hub.component_config(name, "vae")
    whole = index.get("default_sample_size")       # PRX's, in pixels
    size = config.get("sample_size") or type(whole) is int and whole // pixels(vae_config)
    side, channels = square(size), config.get("in_channels", 4)
    odd = [k for k in OTHERS if config.get(k)]
    if config.get("addition_embed_type") not in (None, "text_time"):
        odd.append("addition_embed_type")
    if odd or channels != config.get("out_channels", channels) or not side:
        odd += [f"{k} {config.get(k)}" for k in ("in_channels", "out_channels", "sample_size")]
        why = "asks for more than a prompt" if side else "is no model of square images"
        raise UserError(f"{name} {why}: its {part} has {', '.join(odd)}")
    if vae_config.get("latent_channels", 4) != channels:
        raise UserError(f"the vae of {name} has {vae_config.get('latent_channels')} channels, its "
                        f"{part} {channels}: they are not of one model")
    predicts, sigmas = prediction(name, part)
    network = hub.component(name, part, (kind,))
    return network, predicts, sigmas, side, decoder(load_vae(name), device)


def prediction(name, part):
    """(what a network predicts, its (1000,) noise levels or None), by the pipeline's scheduler."""
    if part == "transformer":
        config = hub.component_config(name, "scheduler")
        flow = str(config.get("_class_name")).startswith("FlowMatch")
        if not flow and config.get("prediction_type") != "flow_prediction":
            raise UserError(f"{name} is sampled by {config.get('_class_name')}, which does not say "
                            "that its transformer predicts a flow")
        return "flow", None
    scheduler = noise_table(name)
    abar = scheduler.alphas_cumprod.double()
    sigmas = ((1 - abar) / abar).sqrt()
    if sigmas.shape != (1000,) or not torch.allclose(sigmas, sd_sigmas().double(), rtol=1e-3):
        raise UserError(f"{name} has another noise schedule than Stable Diffusion 1, 2 and XL: "
                        "sd(first,last) would not fit it")
    return scheduler.config.prediction_type, sigmas

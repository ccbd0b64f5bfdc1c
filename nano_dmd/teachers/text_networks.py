"""Networks of diffusers that are told by text what to show, as net(x, t, cond).

    x (B, C, h, w)   latents, scaled by the adapter (denoiser.py)
    t (B,)           a U-Net's timestep 0 .. 999, a flow transformer's time in (0, 1)
    cond (B, T, C)   an embedding per token.  Models with a mask (SANA, PRX) find it in the rows of
                     zeros: padding.  Models that want one more vector for the whole prompt (SDXL,
                     Stable Diffusion 3) find it in an extra last row, filled up with zeros.

KINDS has a row for each class.  A new one is a row: what its forward takes, and names of its parts.
"""

from typing import Callable, NamedTuple

import torch
from torch import nn

from nano_dmd.teachers.diffusers_unet import outputs_of


class Kind(NamedTuple):
    part: str                       # its name in a pipeline
    arguments: Callable             # (TextNet, t, text) -> what forward takes beside x
    middle: Callable                # network -> the block whose output the GAN head sees
    lora: list                      # names of the layers that LoRA updates
    steps: int                      # of the pipeline's own sampler, two network calls each
    call: str = ""                  # how its pipeline is called for a flow student (export.py)


def unet(net, t, text):
    if not net.pooled:
        return dict(timestep=t, encoder_hidden_states=text)
    added = dict(text_embeds=text[:, -1, : net.pooled], time_ids=net.sizes.expand(len(text), -1))
    return dict(timestep=t, encoder_hidden_states=text[:, :-1], added_cond_kwargs=added)


def sana(net, t, text):
    return dict(timestep=1000 * net.network.config.timestep_scale * t, encoder_hidden_states=text,
                encoder_attention_mask=(text != 0).any(-1).float())


def prx(net, t, text):  # multiplies t by 1000 itself; the mask must be bool
    return dict(timestep=t, encoder_hidden_states=text, attention_mask=(text != 0).any(-1))


def sd3(net, t, text):
    return dict(timestep=1000 * t, encoder_hidden_states=text[:, :-1],
                pooled_projections=text[:, -1, : net.pooled])


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
KINDS = {
    "UNet2DConditionModel": Kind(                  # layers: DMD2 sd_unified_model.py:44-69
        "unet", unet, lambda net: net.mid_block,
        [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
         "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"], 50),
    "SanaTransformer2DModel": Kind(
        "transformer", sana, lambda net: halfway(net.transformer_blocks),
        [*ATTENTION, "conv_inverted", "conv_point"], 20,
        "sigmas={times}, guidance_scale=1, height={side}, width={side}"),
    "PRXTransformer2DModel": Kind(                 # its pipeline takes timesteps=, but no sigmas=
        "transformer", prx, lambda net: halfway(net.blocks),
        ["img_qkv_proj", "txt_kv_proj", "to_out.0", "gate_proj", "up_proj", "down_proj"], 28,
        "timesteps={timesteps}, guidance_scale=1"),
    "SD3Transformer2DModel": Kind(
        "transformer", sd3, lambda net: halfway(net.transformer_blocks),
        [*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"], 28,
        "sigmas={times}, guidance_scale=0"),
}


def halfway(blocks):
    return blocks[len(blocks) // 2 - 1]


def sizes_of(side):
    """SDXL's (1, 6): size of the original image, corner of the crop, size of the crop; in pixels.

    Every prompt is asked for an uncropped image, as in DMD2 (sd_unified_model.py:113).
    """
    return torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32)


class TextNet(nn.Module):
    """One of KINDS as net(x, t, cond).  empty (1, T, C), the empty prompt, stands for cond None."""

    def __init__(self, network, empty):
        super().__init__()
        config = network.config
        self.kind = KINDS[type(network).__name__]
        setattr(self, self.kind.part, network)     # so its weights have diffusers' names
        self.pooled = config.get("pooled_projection_dim") or 0    # numbers for the whole prompt
        if config.get("addition_embed_type") == "text_time":      # SDXL
            times = 6 * config.addition_time_embed_dim
            self.pooled = config.projection_class_embeddings_input_dim - times
            self.register_buffer("sizes", sizes_of(8 * config.sample_size), persistent=False)
        self.register_buffer("empty", empty)

    @property
    def network(self):
        return getattr(self, self.kind.part)

    def forward(self, x, t, cond=None):
        text = self.empty.expand(len(x), -1, -1) if cond is None else cond
        return self.network(x, **self.kind.arguments(self, t, text)).sample

    def features(self, x, t, cond=None):
        """The activations (B, C, h, w) of the middle block; the forward ends there."""
        h = outputs_of(self.kind.middle(self.network), lambda: self.forward(x, t, cond))[-1]
        side = round(h.shape[1] ** 0.5)            # a transformer's are tokens (B, h w, C)
        return h if h.ndim == 4 else h.transpose(1, 2).unflatten(2, (side, side))

    @property
    def checkpointing(self):
        return self.network.is_gradient_checkpointing

    @checkpointing.setter
    def checkpointing(self, on):
        if on:
            self.network.enable_gradient_checkpointing()
        else:
            self.network.disable_gradient_checkpointing()


# Networks with random weights.  Those of published size are for speed and memory, tiny for tests.
SDXL = dict(
    sample_size=128, cross_attention_dim=2048, block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20),
    use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816)
SANA_ARGS = dict(
    num_attention_heads=36, num_layers=28, num_cross_attention_heads=16,
    cross_attention_head_dim=72, cross_attention_dim=1152)
RANDOM = {                                         # name: (class, arguments, shape of a prompt)
    "random:sd15": ("UNet2DConditionModel", dict(sample_size=64, cross_attention_dim=768),
                    (77, 768)),
    "random:sdxl": ("UNet2DConditionModel", SDXL, (78, 2048)),
    "random:sdxl-512": ("UNet2DConditionModel", SDXL | dict(sample_size=64), (78, 2048)),
    "random:sana": ("SanaTransformer2DModel", SANA_ARGS, (300, 2304)),
    "random:sana-512": ("SanaTransformer2DModel", SANA_ARGS | dict(sample_size=16), (300, 2304)),
    "random:tiny-flow": ("SanaTransformer2DModel", dict(
        in_channels=4, out_channels=4, sample_size=8, num_attention_heads=2, attention_head_dim=16,
        num_layers=4, num_cross_attention_heads=2, cross_attention_head_dim=16,
        cross_attention_dim=32, caption_channels=32), (77, 32)),
    "random:tiny": ("UNet2DConditionModel", dict(
        sample_size=8, cross_attention_dim=32, block_out_channels=(32, 64), layers_per_block=1,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")), (77, 32)),
}

"""Networks that are told by text what to show."""

from torch import nn

# U-Nets with random weights: of Stable Diffusion's size, for speed and memory; tiny, for tests.
RANDOM = {
    "random:sd15": dict(sample_size=64, cross_attention_dim=768),
    "random:tiny": dict(
        sample_size=8, cross_attention_dim=32, block_out_channels=(32, 64), layers_per_block=1,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
}


class TextUNet(nn.Module):
    """A UNet2DConditionModel as net(x_vp, t, cond); empty (1, T, C) stands for cond None."""

    def __init__(self, unet, empty):
        super().__init__()
        self.unet = unet
        self.register_buffer("empty", empty)

    def text(self, cond, x):
        return self.empty.to(x.dtype).expand(len(x), -1, -1) if cond is None else cond

    def forward(self, x, t, cond=None):
        return self.unet(x, t, encoder_hidden_states=self.text(cond, x)).sample

    def features(self, x, t, cond=None):
        """The activations (B, C, h, w) of the middle: half of UNet2DConditionModel.forward."""
        unet, text = self.unet, {"encoder_hidden_states": self.text(cond, x)}
        emb, h = unet.time_embedding(unet.get_time_embed(x, t)), unet.conv_in(x)
        for block in unet.down_blocks:
            more = text if getattr(block, "has_cross_attention", False) else {}
            h = block(hidden_states=h, temb=emb, **more)[0]
        return h if unet.mid_block is None else unet.mid_block(h, emb, **text)

    @property
    def checkpointing(self):
        return self.unet.is_gradient_checkpointing

    @checkpointing.setter
    def checkpointing(self, on):
        if on:
            self.unet.enable_gradient_checkpointing()
        else:
            self.unet.disable_gradient_checkpointing()

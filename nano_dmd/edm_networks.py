"""EDM's two U-Nets for photographs, with the parameter names of the published checkpoints, so that those load as they are.

    SongUNet       DDPM++ and NCSN++ (Song et al. 2021): CIFAR-10, FFHQ, AFHQv2
    DhariwalUNet   ADM (Dhariwal & Nichol 2021): ImageNet-64

Both have the raw signature of networks.py, net(x, c_noise, cond) -> (B, C, H, W) and net.features; teacher.EDM wraps them.
cond is None or (B,) int64; None and -1 both mean "no class" (zeros in place of the one-hot label, as in EDM).
Differs: attention is F.scaled_dot_product_attention, and augmentation labels are always "not augmented".
"""

import inspect
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nano_dmd.checkpoint import UserError
from nano_dmd.edm_blocks import ADM, SONG, Block, NoiseEmbedding, Resample, group_norm, one_hot


class UNet(nn.Module):
    """What the two have in common; each adds embed(c_noise, cond) -> (B, E) and head() -> (norm, convolution).

    shape (C, H, W) of an image, classes (0 for none).  Set checkpointing = True to recompute every block in the backward
    pass: less memory, more time, the same gradients.
    """

    def build(self, shape, channels, mults, blocks, attended, style):
        """Fill enc and dec.  mults: width / channels of every resolution, finest first; attended: sizes with attention."""
        self.shape, self.checkpointing, emb = shape, False, 4 * channels
        self.enc, self.dec, width, aux, skips = nn.ModuleDict(), nn.ModuleDict(), channels, shape[0], [channels]
        levels = [(shape[-1] >> i, mult * channels) for i, mult in enumerate(mults)]
        for size, cout in levels:
            name = f"{size}x{size}"
            if size == shape[-1]:
                self.enc[f"{name}_conv"] = nn.Conv2d(shape[0], width, 3, padding=1)
            else:
                self.enc[f"{name}_down"] = Block(width, width, emb, style, "down")
                skips.append(width)                               # widths of the encoder's outputs, for the decoder
                if style.residual:
                    conv, aux = nn.Conv2d(aux, width, 3), width
                    self.enc[f"{name}_aux_residual"] = Resample("down", style.taps, conv, late=True)
            for j in range(blocks):
                self.enc[f"{name}_block{j}"] = Block(width, cout, emb, style, attention=size in attended)
                width = cout
                skips.append(width)
        for size, cout in reversed(levels):
            name = f"{size}x{size}"
            if size == levels[-1][0]:
                self.dec[f"{name}_in0"] = Block(width, width, emb, style, attention=True)
                self.dec[f"{name}_in1"] = Block(width, width, emb, style)
            else:
                self.dec[f"{name}_up"] = Block(width, width, emb, style, "up")
            for j in range(blocks + 1):
                attention = size in attended and (j == blocks or not style.attend_last)
                self.dec[f"{name}_block{j}"] = Block(width + skips.pop(), cout, emb, style, attention=attention)
                width = cout

    def embed_noise(self, c_noise):
        """map_augment is there because the checkpoints have it: always fed zeros, "not augmented", it adds nothing, and its
        gradient is 0 rather than None, which DistributedDataParallel would not accept."""
        emb = self.map_noise(c_noise)
        return emb + self.map_augment(emb.new_zeros(1, self.map_augment.in_features)) if self.map_augment else emb

    def run(self, block, x, emb):
        recompute = self.checkpointing and torch.is_grad_enabled()
        return checkpoint(block, x, emb, use_reentrant=False) if recompute else block(x, emb)

    def encode(self, x, emb):
        """Every encoder output, finest first; the last is the bottleneck (B, C, h, w)."""
        aux, skips = x.contiguous(memory_format=torch.channels_last), []
        for name, block in self.enc.items():
            if "aux" in name:
                skips[-1] = aux = (skips[-1] + block(aux)) * math.sqrt(0.5)
            else:
                skips.append(self.run(block, skips[-1], emb) if skips else block(aux))
        return skips

    def features(self, x, c_noise, cond=None):
        return self.encode(x, self.embed(c_noise, cond))[-1]

    def forward(self, x, c_noise, cond=None):
        emb = self.embed(c_noise, cond)                                               # (B, E)
        skips = self.encode(x, emb)
        h = skips[-1]
        for name, block in self.dec.items():
            if "aux" not in name:
                h = self.run(block, torch.cat([h, skips.pop()], 1) if "block" in name else h, emb)
        norm, conv = self.head()
        return conv(F.silu(norm(h)))                                                  # (B, C, H, W)


class SongUNet(UNet):
    """DDPM++ (the defaults), or NCSN++: embedding_type fourier, encoder_type residual, channel_mult_noise 2,
    resample_filter (1, 3, 3, 1).  Arguments are EDM's own, so that a checkpoint's record of them rebuilds it.
    """

    def __init__(self, img_resolution, img_channels, label_dim=0, augment_dim=0, model_channels=128, channel_mult=(1, 2, 2, 2),
                 num_blocks=4, attn_resolutions=(16,), dropout=0.1, embedding_type="positional", channel_mult_noise=1,
                 encoder_type="standard", decoder_type="standard", resample_filter=(1, 1)):
        super().__init__()
        self.classes, noise, emb = label_dim, channel_mult_noise * model_channels, 4 * model_channels
        self.map_noise = NoiseEmbedding(noise, fourier=embedding_type == "fourier")
        self.map_label = nn.Linear(label_dim, noise) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, noise, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = nn.Linear(noise, emb), nn.Linear(emb, emb)
        style = SONG._replace(taps=tuple(resample_filter), residual=encoder_type == "residual", dropout=dropout)
        shape, width = (img_channels, img_resolution, img_resolution), model_channels * channel_mult[0]
        self.build(shape, model_channels, channel_mult, num_blocks, attn_resolutions, style)
        self.dec[f"{img_resolution}x{img_resolution}_aux_norm"] = group_norm(width, style)
        self.dec[f"{img_resolution}x{img_resolution}_aux_conv"] = nn.Conv2d(width, img_channels, 3, padding=1)
        for name, m in self.named_modules():                      # every residual branch starts at almost nothing
            if getattr(m, "weight", None) is not None and m.weight.ndim > 1:
                small = name.endswith(("conv1", "proj", "aux_conv"))
                nn.init.xavier_uniform_(m.weight, gain=1e-5 if small else math.sqrt(0.2) if name.endswith("qkv") else 1.0)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        self.to(memory_format=torch.channels_last)

    def embed(self, c_noise, cond):
        emb = self.embed_noise(c_noise)
        if self.classes:                                          # inputs of variance 1; "no class" leaves the bias
            emb = emb + self.map_label(one_hot(cond, self.classes, emb) * math.sqrt(self.classes))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def head(self):
        return list(self.dec.values())[-2:]


class DhariwalUNet(UNet):
    """ADM: norms scaled and shifted by the embedding, attention at several resolutions, the class added late."""

    def __init__(self, img_resolution, img_channels, label_dim=0, augment_dim=0, model_channels=192, channel_mult=(1, 2, 3, 4),
                 num_blocks=3, attn_resolutions=(32, 16, 8), dropout=0.1):
        super().__init__()
        self.classes, emb = label_dim, 4 * model_channels
        self.map_noise = NoiseEmbedding(model_channels, adm=True)
        self.map_augment = nn.Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = nn.Linear(model_channels, emb), nn.Linear(emb, emb)
        self.map_label = nn.Linear(label_dim, emb, bias=False) if label_dim else None
        style, width = ADM._replace(dropout=dropout), model_channels * channel_mult[0]
        shape = (img_channels, img_resolution, img_resolution)
        self.build(shape, model_channels, channel_mult, num_blocks, attn_resolutions, style)
        self.out_norm = group_norm(width, style)
        self.out_conv = nn.Conv2d(width, img_channels, 3, padding=1)
        for name, m in self.named_modules():                      # else torch's own: uniform in +-1 / sqrt(fan in)
            if name.endswith(("conv1", "proj", "out_conv")):      # every residual branch starts at nothing
                nn.init.zeros_(m.weight)
                nn.init.zeros_(m.bias)
            elif name == "map_label":
                nn.init.normal_(m.weight)
        self.to(memory_format=torch.channels_last)

    def embed(self, c_noise, cond):
        emb = self.map_layer1(F.silu(self.map_layer0(self.embed_noise(c_noise))))
        if self.classes:
            emb = emb + self.map_label(one_hot(cond, self.classes, emb))
        return F.silu(emb)

    def head(self):
        return self.out_norm, self.out_conv


MODELS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
CHOICES = {"embedding_type": ["positional", "fourier"], "encoder_type": ["standard", "residual"],
           "decoder_type": ["standard"], "resample_filter": [[1, 1], [1, 3, 3, 1]]}
LIMITS = {"img_resolution": (1, 1024), "img_channels": (1, 64), "label_dim": (0, 10**6), "augment_dim": (0, 64),
          "model_channels": (4, 2048), "channel_mult": (1, 64), "channel_mult_noise": (1, 16), "num_blocks": (1, 16),
          "attn_resolutions": (1, 1024)}


def fits(name, value):
    """Whether an argument read from a file can be one of a network: LIMITS are whole numbers, or lists of them."""
    if name in CHOICES:
        return (list(value) if isinstance(value, tuple) else value) in CHOICES[name]
    if name == "dropout":
        return isinstance(value, (int, float)) and 0 <= value < 1
    low, high = LIMITS[name]
    values = value if name in ("channel_mult", "attn_resolutions") else [value]
    return isinstance(values, (list, tuple)) and all(type(v) is int and low <= v <= high for v in values)


def edm_network(model_type="", use_fp16=False, sigma_min=0.0, sigma_max=math.inf, sigma_data=0.5, **args):
    """The network of EDM's recorded keyword arguments.  raises UserError naming the argument that does not fit.

    Of those of the preconditioner, sigma_data is for teacher.EDM, whose bf16 stands in for use_fp16, and the range of
    sigma only bounds samplers.
    """
    if model_type not in MODELS:
        raise UserError(f"no network {model_type!r}: model_type must be {' or '.join(MODELS)}")
    if type(sigma_data) not in (int, float) or not 0 < sigma_data < math.inf:
        raise UserError(f"{model_type} needs sigma_data > 0, the standard deviation of its data, got {sigma_data!r:.40}")
    known = inspect.signature(MODELS[model_type]).parameters
    for name, value in args.items():
        if name not in known:
            raise UserError(f"{model_type} has no argument {name!r:.40} (= {value!r:.40}); it takes {', '.join(known)}")
        if not fits(name, value):
            raise UserError(f"{model_type} cannot be built with {name} = {value!r:.40}")
    for name in ("img_resolution", "img_channels"):
        if name not in args:
            raise UserError(f"{model_type} needs {name}: it describes the images")
    levels = len(args.get("channel_mult", known["channel_mult"].default))
    if not levels or args["img_resolution"] % 2 ** (levels - 1):
        raise UserError(f"{model_type} cannot halve img_resolution = {args['img_resolution']} for {levels} channel_mult")
    return MODELS[model_type](**args)

"""EDM's two U-Nets for photographs, with the parameter names of the published checkpoints.

    SongUNet       DDPM++ and NCSN++ (Song et al. 2021): CIFAR-10, FFHQ, AFHQv2
    DhariwalUNet   ADM (Dhariwal & Nichol 2021): ImageNet-64

Karras et al. 2022, appendix F.1, says what EDM changed. Both have the raw signature of networks.py,
net(x, c_noise, cond) -> (B, C, H, W), and net.features; denoiser.EDM wraps them. cond is None or
(B,) int64; None and -1 both mean "no class" (zeros in place of the one-hot label, as in EDM). The
numbers agree with EDM's own on tests/golden.
Differs: attention is F.scaled_dot_product_attention; samples are always "not augmented".
"""

import inspect
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nano_dmd.engine.files import UserError
from nano_dmd.networks import one_hot, zeroed


class Style(NamedTuple):
    """What sets the networks apart."""

    eps: float                      # of the group norms
    gain: float                     # of every residual sum; sqrt(1/2) keeps the variance at 1
    adaptive: bool                  # the embedding scales and shifts, or only shifts
    skip_conv: bool                 # a 1x1 convolution on the shortcut of resampling blocks too
    head_channels: int              # channels of an attention head, 0 for one head
    attend_last: bool               # in the decoder, only a resolution's last block has attention
    taps: tuple = (1, 1)            # resampling filter along one axis: this box, or (1, 3, 3, 1)
    residual: bool = False          # a second path from the image to every resolution (NCSN++)
    dropout: float = 0.0


SONG = Style(1e-6, math.sqrt(0.5), False, skip_conv=True, head_channels=0, attend_last=True)
ADM = Style(1e-5, 1.0, True, skip_conv=False, head_channels=64, attend_last=False)


class Resample(nn.Module):
    """Halve ("down") or double ("up") the resolution of x (B, C, H, W), then convolve if asked.

    late: convolve first, with padding for the filter too (NCSN++'s image path).
    """

    def __init__(self, how, taps, conv=None, late=False):
        super().__init__()
        self.how, self.late = how, late
        self.reach, taps = len(taps) // 2 - 1, torch.tensor(taps, dtype=torch.float32)
        self.weight, self.bias = (conv.weight, conv.bias) if conv else (None, None)
        self.register_buffer("resample_filter", (taps.outer(taps) / taps.sum() ** 2)[None, None])

    def resample(self, x, padding):
        channels, down = x.shape[1], self.how == "down"
        if self.resample_filter.shape[-1] == 2:    # the box: the same numbers, faster
            return F.avg_pool2d(x, 2) if down else F.interpolate(x, scale_factor=2.0)
        kernel = self.resample_filter.to(x.dtype).expand(channels, 1, -1, -1)
        how = dict(stride=2, padding=padding, groups=channels)
        return F.conv2d(x, kernel, **how) if down else F.conv_transpose2d(x, 4 * kernel, **how)

    def forward(self, x):
        if self.late:
            return self.resample(F.conv2d(x, self.weight, self.bias, padding=1 + self.reach), 0)
        x = self.resample(x, self.reach)
        if self.weight is None:
            return x
        return F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


def convolution(cin, cout, kernel, how, taps):
    conv = nn.Conv2d(cin, cout, kernel, padding=kernel // 2)
    return Resample(how, taps, conv) if how else conv


def group_norm(channels, style):
    return nn.GroupNorm(min(32, channels // 4), channels, style.eps)


def attend(qkv, heads):
    """Self-attention over pixels, (B, 3C, H, W) -> (B, C, H, W).

    Channel 3c + j of a head is component c of its q, k or v for j = 0, 1 or 2.
    """
    b, c, h, w = qkv.shape
    qkv = qkv.permute(0, 2, 3, 1).reshape(b, h * w, heads, c // (3 * heads), 3)
    q, k, v = qkv.permute(4, 0, 2, 1, 3).contiguous()             # (B, heads, HW, C/heads) each
    a = F.scaled_dot_product_attention(q, k, v)
    return a.transpose(1, 2).reshape(b, h, w, c // 3).permute(0, 3, 1, 2)


class EDMBlock(nn.Module):
    """Residual block: two convolutions modulated by emb (B, E); resampling, attention if asked."""

    def __init__(self, cin, cout, emb, style, how=None, attention=False):
        super().__init__()
        size = style.head_channels or cout
        if attention and cout % size:
            raise ValueError(f"{cout} channels do not split into attention heads of {size}")
        self.style, self.heads = style, attention and cout // size
        self.norm0 = group_norm(cin, style)
        self.conv0 = convolution(cin, cout, 3, how, style.taps)
        self.affine = nn.Linear(emb, 2 * cout if style.adaptive else cout)
        self.norm1 = group_norm(cout, style)
        self.conv1 = nn.Conv2d(cout, cout, 3, padding=1)
        if cin != cout or how and style.skip_conv:
            self.skip = convolution(cin, cout, 1, how, style.taps)
        else:
            self.skip = Resample(how, style.taps) if how else nn.Identity()
        if attention:
            self.norm2 = group_norm(cout, style)
            self.qkv = nn.Conv2d(cout, 3 * cout, 1)
            self.proj = nn.Conv2d(cout, cout, 1)

    def forward(self, x, emb):
        h = self.conv0(F.silu(self.norm0(x)))
        m = self.affine(emb)[:, :, None, None]     # (B, C or 2C, 1, 1)
        if self.style.adaptive:
            scale, shift = m.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm1(h), 1 + scale)
        else:
            h = self.norm1(h + m)
        h = self.conv1(F.dropout(F.silu(h), self.style.dropout, self.training))
        x = (h + self.skip(x)) * self.style.gain
        if self.heads:
            a = self.proj(attend(self.qkv(self.norm2(x)), self.heads))
            x = (x + a) * self.style.gain
        return x


class NoiseEmbedding(nn.Module):
    """c_noise (B,) -> sines and cosines (B, channels); frequencies random, or from 1 to 1/10000.

    ADM's frequencies end one step before 1/10000, and its cosines come first.
    """

    def __init__(self, channels, fourier=False, adm=False):
        super().__init__()
        self.half, self.adm = channels // 2, adm
        self.register_buffer("freqs", 16 * torch.randn(self.half) if fourier else None)

    def forward(self, c_noise):
        if self.freqs is None:
            steps = self.half if self.adm else self.half - 1
            freqs = 10000 ** -(torch.arange(self.half, device=c_noise.device) / steps)
        else:
            freqs = 2 * math.pi * self.freqs
        phase = c_noise[:, None] * freqs
        waves = phase.sin(), phase.cos()
        return torch.cat(waves[::-1] if self.adm else waves, 1)


class EDMUNet(nn.Module):
    """What the two have in common.  Each adds embed(c_noise, cond) -> (B, E) and head() -> modules.

    shape (C, H, W) of an image, classes (0 for none).  checkpointing = True recomputes every block
    in the backward pass: less memory, more time, the same gradients.
    """

    def build(self, shape, channels, mults, blocks, attended, style):
        """Fill enc and dec.  mults: width / channels of every resolution, finest first."""
        self.shape, self.checkpointing = shape, False
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        emb, width = 4 * channels, channels
        aux, skips = shape[0], [channels]
        levels = [(shape[-1] >> i, mult * channels) for i, mult in enumerate(mults)]
        for size, cout in levels:
            name = f"{size}x{size}"
            if size == shape[-1]:
                self.enc[f"{name}_conv"] = nn.Conv2d(shape[0], width, 3, padding=1)
            else:
                self.enc[f"{name}_down"] = EDMBlock(width, width, emb, style, "down")
                skips.append(width)  # widths of the encoder's outputs, for the decoder
                if style.residual:
                    conv, aux = nn.Conv2d(aux, width, 3), width
                    self.enc[f"{name}_aux_residual"] = Resample("down", style.taps, conv, late=True)
            for j in range(blocks):
                block = EDMBlock(width, cout, emb, style, attention=size in attended)
                self.enc[f"{name}_block{j}"], width = block, cout
                skips.append(width)
        for size, cout in reversed(levels):
            name = f"{size}x{size}"
            if size == levels[-1][0]:
                self.dec[f"{name}_in0"] = EDMBlock(width, width, emb, style, attention=True)
                self.dec[f"{name}_in1"] = EDMBlock(width, width, emb, style)
            else:
                self.dec[f"{name}_up"] = EDMBlock(width, width, emb, style, "up")
            for j in range(blocks + 1):
                attention = size in attended and (j == blocks or not style.attend_last)
                block = EDMBlock(width + skips.pop(), cout, emb, style, attention=attention)
                self.dec[f"{name}_block{j}"], width = block, cout

    def embed_noise(self, c_noise):
        """map_augment is there because checkpoints have it.  Its input is 0, "not augmented".

        So its gradient is 0.  A gradient of None would stop DistributedDataParallel.
        """
        emb = self.map_noise(c_noise)
        if self.map_augment:
            emb = emb + self.map_augment(emb.new_zeros(1, self.map_augment.in_features))
        return emb

    def run(self, block, x, emb):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, emb, use_reentrant=False)
        return block(x, emb)

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
        emb = self.embed(c_noise, cond)            # (B, E)
        skips = self.encode(x, emb)
        h = skips[-1]
        for name, block in self.dec.items():
            if "aux" not in name:
                h = torch.cat([h, skips.pop()], 1) if "block" in name else h
                h = self.run(block, h, emb)
        norm, conv = self.head()
        return conv(F.silu(norm(h)))               # (B, C, H, W)


class SongUNet(EDMUNet):
    """DDPM++ (the defaults), or NCSN++: embedding_type fourier, encoder_type residual,
    channel_mult_noise 2, resample_filter (1, 3, 3, 1).  Arguments are EDM's own.
    """

    def __init__(self, img_resolution, img_channels, label_dim=0, augment_dim=0, model_channels=128,
                 channel_mult=(1, 2, 2, 2), num_blocks=4, attn_resolutions=(16,), dropout=0.1,
                 embedding_type="positional", channel_mult_noise=1, encoder_type="standard",
                 decoder_type="standard", resample_filter=(1, 1)):
        super().__init__()
        noise, emb = channel_mult_noise * model_channels, 4 * model_channels
        self.classes = label_dim
        self.map_noise = NoiseEmbedding(noise, fourier=embedding_type == "fourier")
        self.map_label = nn.Linear(label_dim, noise) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, noise, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = nn.Linear(noise, emb), nn.Linear(emb, emb)
        style = SONG._replace(taps=tuple(resample_filter), residual=encoder_type == "residual",
                              dropout=dropout)
        shape = (img_channels, img_resolution, img_resolution)
        width = model_channels * channel_mult[0]
        self.build(shape, model_channels, channel_mult, num_blocks, attn_resolutions, style)
        name = f"{img_resolution}x{img_resolution}_aux"
        self.dec[f"{name}_norm"] = group_norm(width, style)
        self.dec[f"{name}_conv"] = nn.Conv2d(width, img_channels, 3, padding=1)
        for name, m in self.named_modules():       # every residual branch starts at almost nothing
            if getattr(m, "weight", None) is not None and m.weight.ndim > 1:
                small = name.endswith(("conv1", "proj", "aux_conv"))
                gain = 1e-5 if small else math.sqrt(0.2) if name.endswith("qkv") else 1.0
                nn.init.xavier_uniform_(m.weight, gain=gain)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        self.to(memory_format=torch.channels_last)

    def embed(self, c_noise, cond):
        emb = self.embed_noise(c_noise)
        if self.classes:  # inputs of variance 1; "no class" leaves the bias
            emb = emb + self.map_label(one_hot(cond, self.classes, emb) * math.sqrt(self.classes))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def head(self):
        return list(self.dec.values())[-2:]


class DhariwalUNet(EDMUNet):
    """ADM: norms scaled and shifted by the embedding, more attention, the class added late."""

    def __init__(self, img_resolution, img_channels, label_dim=0, augment_dim=0, model_channels=192,
                 channel_mult=(1, 2, 3, 4), num_blocks=3, attn_resolutions=(32, 16, 8),
                 dropout=0.1):
        super().__init__()
        self.classes, emb = label_dim, 4 * model_channels
        self.map_noise = NoiseEmbedding(model_channels, adm=True)
        self.map_augment = None
        if augment_dim:
            self.map_augment = nn.Linear(augment_dim, model_channels, bias=False)
        self.map_layer0, self.map_layer1 = nn.Linear(model_channels, emb), nn.Linear(emb, emb)
        self.map_label = nn.Linear(label_dim, emb, bias=False) if label_dim else None
        style, width = ADM._replace(dropout=dropout), model_channels * channel_mult[0]
        shape = (img_channels, img_resolution, img_resolution)
        self.build(shape, model_channels, channel_mult, num_blocks, attn_resolutions, style)
        self.out_norm = group_norm(width, style)
        self.out_conv = nn.Conv2d(width, img_channels, 3, padding=1)
        for name, m in self.named_modules():       # else torch's own: uniform in +-1 / sqrt(fan in)
            if name.endswith(("conv1", "proj", "out_conv")):
                zeroed(m)                          # every residual branch starts at nothing
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
LIMITS = {"img_resolution": (1, 1024), "img_channels": (1, 64), "label_dim": (0, 10**6),
          "augment_dim": (0, 64), "model_channels": (4, 2048), "channel_mult": (1, 64),
          "channel_mult_noise": (1, 16), "num_blocks": (1, 16), "attn_resolutions": (1, 1024)}


def fits(name, value):
    """Whether a value read from a file may be the argument `name`, by CHOICES and LIMITS."""
    if name in CHOICES:
        return (list(value) if isinstance(value, tuple) else value) in CHOICES[name]
    if name == "dropout":
        return isinstance(value, (int, float)) and 0 <= value < 1
    low, high = LIMITS[name]
    values = value if name in ("channel_mult", "attn_resolutions") else [value]
    if not isinstance(values, (list, tuple)) or not all(type(v) is int for v in values):
        return False
    halved = name == "model_channels"              # into sines and cosines of the noise level
    return all(low <= v <= high for v in values) and not (halved and value % 2)


def edm_network(model_type="", use_fp16=False, sigma_min=0.0, sigma_max=math.inf, sigma_data=0.5,
                **args):
    """The network of EDM's recorded keyword arguments.  raises UserError naming what does not fit.

    sigma_data is for denoiser.EDM, whose bf16 stands in for use_fp16; the range of sigma is unused.
    """
    if model_type not in MODELS:
        raise UserError(f"no network {model_type!r}: model_type must be {' or '.join(MODELS)}")
    if type(sigma_data) not in (int, float) or not 0 < sigma_data < math.inf:
        raise UserError(f"{model_type} needs sigma_data > 0, got {sigma_data!r:.40}")
    known = inspect.signature(MODELS[model_type]).parameters
    for name, value in args.items():
        if name not in known:
            raise UserError(f"{model_type} has no argument {name!r:.40} (= {value!r:.40})")
        if not fits(name, value):
            raise UserError(f"{model_type} cannot be built with {name} = {value!r:.40}")
    for name in ("img_resolution", "img_channels"):
        if name not in args:
            raise UserError(f"{model_type} needs {name}: it describes the images")
    levels = len(args.get("channel_mult", known["channel_mult"].default))
    if not levels or args["img_resolution"] % 2 ** (levels - 1):
        raise UserError(f"{model_type} cannot halve img_resolution = {args['img_resolution']} for "
                        f"{levels} channel_mult")
    return MODELS[model_type](**args)

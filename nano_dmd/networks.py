"""The two small networks one reads first: an MLP for points in 2D and a U-Net for small images.

Both have the raw signature that denoiser.EDM wraps,

    net(x, c_noise, cond) -> (B, *S)    x scaled to unit variance, c_noise (B,) = ln(sigma) / 4

and net.features(x, c_noise, cond) -> (B, C, ...), the activations the GAN head looks at.
cond is None or (B,) int64; None and -1 both mean "no class" (EDM feeds zeros there, and so do we).
"""

import torch
import torch.nn.functional as F
from torch import nn


def zeroed(layer):
    """The layer with weights and bias 0: what it feeds starts as if it were not there."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def one_hot(cond, classes, emb):
    """(B, classes) rows of zeros and a one in emb's dtype; all zeros for "no class"."""
    if cond is None:
        return emb.new_zeros(len(emb), classes)
    return (F.one_hot(cond.clamp(min=0), classes) * (cond >= 0)[:, None]).to(emb.dtype)


class MLP(nn.Module):
    """Points in R^dim: sines and cosines of the point and of c_noise, then ReLU layers; no cond.

    ReLU makes the boundaries between modes sharper than SiLU (on ring8 the share of samples within
    3 std of a mode is .96, not .87). Each further octave of the sines does so too. The fastest sine
    has period 4 / 2^(octaves - 1), in units of the data's std.
    """

    def __init__(self, dim=2, width=128, depth=3, octaves=3):
        super().__init__()
        freqs = torch.zeros(dim + 1, octaves * dim + 4)           # (x, c_noise) @ freqs = phases
        for d in range(dim):
            freqs[d, octaves * d : octaves * (d + 1)] = torch.pi / 2 * 2.0 ** torch.arange(octaves)
        freqs[dim, octaves * dim :] = torch.tensor([1.0, 2.0, 4.0, 8.0])
        self.register_buffer("freqs", freqs)
        widths = [dim + 2 * freqs.shape[1]] + [width] * depth
        layers = [[nn.Linear(a, b), nn.ReLU()] for a, b in zip(widths, widths[1:])]
        self.hidden = nn.Sequential(*sum(layers, []))
        self.out = zeroed(nn.Linear(width, dim))

    def features(self, x, c_noise, cond=None):
        phase = torch.cat([x, c_noise[:, None]], 1) @ self.freqs
        return self.hidden(torch.cat([x, phase.sin(), phase.cos()], 1))              # (B, width)

    def forward(self, x, c_noise, cond=None):
        return self.out(self.features(x, c_noise, cond))


class Block(nn.Module):
    """Residual block; noise level and class give a scale and a shift per channel."""

    def __init__(self, channels, emb):
        super().__init__()
        self.conv0 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv1 = zeroed(nn.Conv2d(channels, channels, 3, padding=1))
        self.modulate = nn.Linear(emb, 2 * channels)

    def forward(self, x, emb):
        scale, shift = self.modulate(emb)[:, :, None, None].chunk(2, dim=1)  # (B, C, 1, 1) each
        h = self.conv0(F.silu(channel_norm(x)))
        h = torch.addcmul(shift, channel_norm(h), 1 + scale)
        return x + self.conv1(F.silu(h))


def channel_norm(x):
    """LayerNorm over the channels of each pixel, x (B, C, H, W); no copy in channels_last."""
    return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2)


class UNet(nn.Module):
    """Class-conditional U-Net for small images: full resolution, half resolution, and back.

    With patch=2 it works on squares of 2x2 pixels: a quarter of the work.
    """

    def __init__(self, channels=1, classes=10, width=32, emb=128, patch=1):
        super().__init__()
        self.classes, self.patch = classes, patch
        self.register_buffer("freqs", torch.exp(torch.linspace(-1.0, 3.0, 16)))
        self.embed_noise = nn.Linear(32, emb)
        self.embed_class = nn.Linear(max(classes, 1), emb, bias=False)
        self.embed_out = nn.Linear(emb, emb)
        self.conv_in = nn.Conv2d(channels, width, 3 * patch, stride=patch, padding=patch)
        self.enc = Block(width, emb)
        self.down = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.enc_half = Block(2 * width, emb)
        self.mid = Block(2 * width, emb)
        self.dec_half = Block(2 * width, emb)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.join = nn.Conv2d(2 * width, width, 1)
        self.dec = Block(width, emb)
        self.conv_out = zeroed(nn.Conv2d(width, channels * patch**2, 3, padding=1))
        self.to(memory_format=torch.channels_last)

    def embed(self, c_noise, cond):
        phase = c_noise[:, None] * self.freqs
        emb = self.embed_noise(torch.cat([phase.sin(), phase.cos()], 1))
        emb = emb + self.embed_class(one_hot(cond, max(self.classes, 1), emb))
        return F.silu(self.embed_out(F.silu(emb)))

    def encode(self, x, emb):
        skip = self.enc(self.conv_in(x.contiguous(memory_format=torch.channels_last)), emb)
        return skip, self.mid(self.enc_half(self.down(skip), emb), emb)

    def features(self, x, c_noise, cond=None):
        return self.encode(x, self.embed(c_noise, cond))[1]  # (B, 2 width, H/2, W/2)

    def forward(self, x, c_noise, cond=None):
        emb = self.embed(c_noise, cond)
        skip, h = self.encode(x, emb)
        h = self.up(self.dec_half(h, emb))
        h = self.dec(self.join(torch.cat([h, skip], 1)), emb)
        return F.pixel_shuffle(self.conv_out(F.silu(channel_norm(h))), self.patch)

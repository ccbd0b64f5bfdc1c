"""The parts of EDM's U-Nets (edm_networks.py): resampling, attention, the residual block, and the noise embedding.

Parameter and buffer names are those of the published checkpoints. Formulas: Song et al. 2021 (DDPM++, NCSN++), Dhariwal &
Nichol 2021 (ADM), Karras et al. 2022 appendix F.1 for what EDM changed; the numbers agree with EDM's own on tests/golden.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Style(NamedTuple):
    """What sets the networks apart."""

    eps: float                      # of the group norms
    gain: float                     # of every residual sum; sqrt(1/2) keeps the variance at 1
    adaptive: bool                  # the embedding scales and shifts, or only shifts
    skip_conv: bool                 # a 1x1 convolution on the shortcut of resampling blocks too
    head_channels: int              # channels of an attention head, 0 for one head
    attend_last: bool               # in the decoder, only the last block of a resolution has attention
    taps: tuple = (1, 1)            # resampling filter along one axis: this box, or (1, 3, 3, 1)
    residual: bool = False          # a second path from the image to every resolution (NCSN++)
    dropout: float = 0.0


SONG = Style(1e-6, math.sqrt(0.5), adaptive=False, skip_conv=True, head_channels=0, attend_last=True)
ADM = Style(1e-5, 1.0, adaptive=True, skip_conv=False, head_channels=64, attend_last=False)


class Resample(nn.Module):
    """Halve ("down") or double ("up") the resolution of x (B, C, H, W), then convolve where weights are given.

    late: convolve first, up to where the filter reaches outside the image (NCSN++'s path from the image).
    """

    def __init__(self, how, taps, conv=None, late=False):
        super().__init__()
        self.how, self.late, self.reach, taps = how, late, len(taps) // 2 - 1, torch.tensor(taps, dtype=torch.float32)
        self.weight, self.bias = (conv.weight, conv.bias) if conv else (None, None)
        self.register_buffer("resample_filter", (taps.outer(taps) / taps.sum() ** 2)[None, None])

    def resample(self, x, padding):
        channels, down = x.shape[1], self.how == "down"
        if self.resample_filter.shape[-1] == 2:                   # the box: the same numbers, faster
            return F.avg_pool2d(x, 2) if down else F.interpolate(x, scale_factor=2.0)
        kernel = self.resample_filter.to(x.dtype).expand(channels, 1, -1, -1)
        if down:
            return F.conv2d(x, kernel, stride=2, padding=padding, groups=channels)
        return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=channels)

    def forward(self, x):
        if self.late:
            return self.resample(F.conv2d(x, self.weight, self.bias, padding=1 + self.reach), 0)
        x = self.resample(x, self.reach)
        return x if self.weight is None else F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


def convolution(cin, cout, kernel, how, taps):
    conv = nn.Conv2d(cin, cout, kernel, padding=kernel // 2)
    return Resample(how, taps, conv) if how else conv


def group_norm(channels, style):
    return nn.GroupNorm(min(32, channels // 4), channels, style.eps)


def attend(qkv, heads):
    """Self-attention over pixels, (B, 3C, H, W) -> (B, C, H, W).

    q, k and v are interleaved: channel 3c + j of a head is component c of its q, k or v for j = 0, 1 or 2.
    """
    b, c, h, w = qkv.shape
    qkv = qkv.permute(0, 2, 3, 1).reshape(b, h * w, heads, c // (3 * heads), 3)
    q, k, v = qkv.permute(4, 0, 2, 1, 3).contiguous()                                 # (B, heads, HW, C/heads) each
    a = F.scaled_dot_product_attention(q, k, v)
    return a.transpose(1, 2).reshape(b, h, w, c // 3).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Residual block: two convolutions modulated by emb (B, E); resampling and attention where asked for."""

    def __init__(self, cin, cout, emb, style, how=None, attention=False):
        super().__init__()
        if attention and style.head_channels and cout % style.head_channels:
            raise ValueError(f"{cout} channels do not split into attention heads of {style.head_channels}")
        self.style, self.heads = style, attention and (cout // style.head_channels if style.head_channels else 1)
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
        m = self.affine(emb)[:, :, None, None]                                        # (B, C or 2C, 1, 1)
        if self.style.adaptive:
            scale, shift = m.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm1(h), 1 + scale)
        else:
            h = self.norm1(h + m)
        h = self.conv1(F.dropout(F.silu(h), self.style.dropout, self.training))
        x = (h + self.skip(x)) * self.style.gain
        if self.heads:
            x = (x + self.proj(attend(self.qkv(self.norm2(x)), self.heads))) * self.style.gain
        return x


class NoiseEmbedding(nn.Module):
    """c_noise (B,) -> sines and cosines (B, channels): random frequencies (fourier), or 1 down to 1/10000.

    ADM stops one step short of 1/10000 and puts the cosines first.
    """

    def __init__(self, channels, fourier=False, adm=False):
        super().__init__()
        self.half, self.adm = channels // 2, adm
        self.register_buffer("freqs", 16 * torch.randn(self.half) if fourier else None)

    def forward(self, c_noise):
        if self.freqs is None:
            freqs = 10000 ** -(torch.arange(self.half, device=c_noise.device) / (self.half if self.adm else self.half - 1))
        else:
            freqs = 2 * math.pi * self.freqs
        phase = c_noise[:, None] * freqs
        return torch.cat([phase.cos(), phase.sin()] if self.adm else [phase.sin(), phase.cos()], 1)


def one_hot(cond, classes, emb):
    """(B, classes) rows of zeros and a one in emb's dtype; all zeros for "no class"."""
    if cond is None:
        return emb.new_zeros(len(emb), classes)
    return (F.one_hot(cond.clamp(min=0), classes) * (cond >= 0)[:, None]).to(emb.dtype)

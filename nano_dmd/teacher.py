"""TODO."""

from typing import Callable, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from nano_dmd.denoiser import Denoiser, heun


class Teacher(NamedTuple):
    """denoiser: what the real score asks; net: the Denoiser students start from (None for an exact mixture)."""

    kind: str                       # "points" | "images" | "text": latents of a pipeline, told by prompts
    denoiser: Denoiser
    shape: tuple                    # (*S) of one sample
    classes: int                    # 0 = unconditional
    sigma_data: float
    data: str                       # name of the data set it was trained on, "" if that is not known
    net: nn.Module | None = None
    recipe: dict | None = None      # how net was made: what zoo.save_teacher writes
    sigmas: tuple = (0.002, 80.0)   # noise levels between which Heun samples
    decode: Callable | None = None  # latents (B, *S) -> images (B, 3, H, W) in [-1, 1]; None where x is what one looks at


def load_teacher(name, device="cpu", steps=0, seed=0, data="", show=True, compile=False):
    """A Teacher by name.

    toy:NAME        exact mixture, see toy.mixtures.MIXTURES; its score has no error at any sigma
    digits          trained here on the shipped digits (40 s on two cores), then kept in the cache; likewise every
                    other name in zoo.RECIPES, on the data set `data` if one is given
    edm:NAME        EDM's published weights, cifar10-cond and others (edm_checkpoint.PUBLISHED), downloaded once
    FILE.pkl        weights in EDM's format; nothing in the file is executed
    a folder        of a previous run, of the cache, or of a diffusers pipeline with a UNet2DModel
    OWNER/MODEL     such a pipeline on the hub, google/ddpm-cifar10-32 for example

    steps, seed override the training recipe, compile speeds it up.  raises UserError if there is no such teacher.
    """
    from nano_dmd.teachers.zoo import find                                 # files and downloads: not on the reading path

    return Teacher(**find(name, device, steps, seed, data, show, compile))


def make_pairs(denoiser, z, cond=None, batch=500, show=True, **heun_args):
    """DMD's regression targets: x (N, *S), the Heun answer of the teacher to each unit noise z (N, *S)."""
    chunks = tqdm(range(0, len(z), batch), desc="pairs", disable=not show)
    x = [heun(denoiser, z[i : i + batch], None if cond is None else cond[i : i + batch], **heun_args) for i in chunks]
    return torch.cat(x)

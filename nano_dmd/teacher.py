"""Teachers: the diffusion models to distil, by name; and their noise-image pairs.

This file is the front door to nano_dmd/teachers, which builds, reads and downloads networks.
"""

from typing import Callable, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from nano_dmd.denoiser import Denoiser, heun


class Teacher(NamedTuple):
    """A diffusion model: what the real score asks, and what students start from."""

    kind: str  # "points" | "images" | "text" (latents; cond comes from prompts)
    denoiser: Denoiser              # asked by the real score
    shape: tuple                    # (*S) of one sample
    classes: int                    # 0 = unconditional
    sigma_data: float               # std of the data, for the weight of the denoising loss
    data: str  # name of the data set it was trained on, "" if that is not known
    net: nn.Module | None = None    # a Denoiser students start from; None for an exact mixture
    recipe: dict | None = None      # how net was made (teachers/zoo.py)
    sigmas: tuple = (0.002, 80.0)   # noise levels between which Heun samples
    decode: Callable | None = None  # latents (B, *S) -> images (B, 3, H, W) in [-1, 1]
    calls: int = 35                 # of its usual sampler for one sample: 18 Heun steps


def load_teacher(name, device="cpu", **options):
    """A Teacher by name.

    toy:NAME        exact mixture, see toy.mixtures.MIXTURES; its score has no error at any sigma
    digits, mnist   trained here on shipped digits (40 s, 2 min on two cores), kept in the cache
    cifar10-small, cifar10-scratch   likewise, on the data set `data` (default CIFAR-10)
    edm:NAME        EDM's published weights, downloaded once (edm_checkpoint.PUBLISHED)
    FILE.pkl        weights in EDM's format; nothing in the file is executed
    a folder        of a previous run, of the cache, or of a diffusers pipeline
    OWNER/MODEL     a diffusers pipeline on the hub, google/ddpm-cifar10-32 or Stable Diffusion
    random:NAME     sd15, sdxl, sana, cifar10 ... with random weights, to measure speed and memory
    flow:NAME       a flow network trained here on a mixture, instead of the exact one

    options  revision: of OWNER/MODEL; others are for a teacher that is trained here (zoo.find)
    raises UserError if there is no such teacher.
    """
    from nano_dmd.teachers.zoo import find         # files and downloads: not on the reading path

    return Teacher(**find(name, device, **options))


def make_pairs(denoiser, z, cond=None, batch=500, show=True, embed=lambda cond: cond, **heun_args):
    """DMD's regression targets: x (N, *S), answers to unit noise z (N, *S) and embed(cond)."""
    answers = []
    for i in tqdm(range(0, len(z), batch), desc="pairs", disable=not show):
        some = None if cond is None else embed(cond[i : i + batch])
        answers.append(heun(denoiser, z[i : i + batch], some, **heun_args))
    return torch.cat(answers)

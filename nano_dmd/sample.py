"""Draw samples from a finished run: numbers as .npy, pictures as .png.

    python -m nano_dmd.sample RUN --n 64 --out grid.png [--class 3 | --prompt "a red cube"]
"""

import io
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from nano_dmd.engine import pictures
from nano_dmd.engine.config import number, parser
from nano_dmd.engine.files import UserError, command, write_atomic
from nano_dmd.engine.find import find_prompts
from nano_dmd.engine.machine import pick_device
from nano_dmd.engine.runs import load_run
from nano_dmd.metrics.sets import in_batches


def sample(folder, n, label=None, seed=0, device="cpu", prompt=None):
    """(n, *S) samples of the averaged generator on the CPU; classes in turn unless label picks one.

    A Stable Diffusion student draws images of prompt, else of its training prompts in turn.
    """
    cfg, teacher, generator = load_run(folder, device)
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(len(generator.sigmas), n, *teacher.shape, generator=rng).to(device)
    if teacher.kind == "text":
        if label is not None:
            raise UserError(f"--class {label}: {folder} is told by prompts, give --prompt")
        return sample_text(cfg, teacher, generator, z, prompt)
    if prompt is not None:
        raise UserError(f"--prompt: {folder} is no student of Stable Diffusion; leave it out")
    if label is not None and not 0 <= label < teacher.classes:
        raise UserError(f"--class {label}: this run has {teacher.classes} classes, counted from 0")
    cond = None
    if teacher.classes:
        every = torch.arange(n) % teacher.classes
        cond = (every if label is None else torch.full((n,), label)).to(device)
    return in_batches(generator, z, cond, 500).cpu()


@torch.no_grad()
def sample_text(cfg, teacher, generator, z, prompt=None):
    """(n, 3, H, W) images in [-1, 1] of z (k, n, *S), one by one; latents without a decoder."""
    from nano_dmd.teachers.prompts import Prompts

    n, prompts = z.shape[1], find_prompts(cfg, teacher, z.device) if prompt is None else None
    prompts = prompts or Prompts(teacher.recipe["source"], [prompt])
    x = []
    for i in tqdm(range(n), "sampling", disable=n < 8):
        cond = prompts[torch.tensor([i % len(prompts)])].to(z.device)
        x.append(generator(z[:, i : i + 1], cond))
    x = torch.cat(x)
    return (teacher.decode(x) if teacher.decode else x).cpu()


def main(argv=None):
    p = parser("python -m nano_dmd.sample", __doc__)
    p.add_argument("run", help="a run folder")
    p.add_argument("--n", type=number(1, 10**7), default=64, help="number of samples")
    p.add_argument("--out", default="samples.png", help=".png for people, .npy for numbers")
    p.add_argument("--class", dest="label", type=number(0, 10**6), help="one class alone")
    p.add_argument("--prompt", help="for text to image (default: the prompts of the training)")
    p.add_argument("--seed", type=number(0, 2**63 - 1), default=0, help="same seed, same samples")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda")
    args = p.parse_args(argv)
    kind = Path(args.out).suffix
    if kind not in (".png", ".npy"):
        raise UserError(f"--out {args.out}: the name must end in .png or .npy")
    x = sample(args.run, args.n, args.label, args.seed, pick_device(args.device), args.prompt)
    if not x.isfinite().all():
        raise UserError(f"{args.run} makes samples that are not finite: its weights are damaged, "
                        "or its training diverged")
    if kind == ".png":
        scale = 1 if x.shape[-1] > 64 else 4
        pictures.save_picture(args.out, pictures.tile(x, min(10, args.n), scale))
    else:
        buffer = io.BytesIO()
        np.save(buffer, x.numpy())
        write_atomic(args.out, buffer.getvalue())
    print(f"{args.n} samples in {args.out}")


if __name__ == "__main__":
    command(main)

"""Pictures for people: PNG grids of images, density maps of 2D points."""

import io

import torch
import torch.nn.functional as F

from nano_dmd.engine.files import write_atomic

SCORES = ("x", "xt", "d_real", "d_fake", "gradient")              # pictures of score_grid


def density(x, size=256, extent=1.2):
    """2D points (N, 2) -> (3, size, size) in [0, 1]: white paper, dark where samples are dense."""
    x = x.detach().float().cpu()
    counts = torch.histogramdd(x, [size, size], range=[-extent, extent] * 2).hist.T.flip(0)
    ink = 1 - torch.exp(-counts * (size * size / 40) / max(len(x), 1))
    return 1 - ink * torch.tensor([0.9, 0.65, 0.2])[:, None, None]


def tile(x, columns, scale=4):
    """Images (N, C, H, W) in [-1, 1], or points (N, 2), -> one picture (3, H', W') in [0, 1].

    Of more than three channels (latents) three are shown; two channels are red and green.
    """
    if x.ndim == 2:
        return density(x)
    if x.shape[1] == 2:
        x = F.pad(x, (0, 0, 0, 0, 0, 1), value=-1.0)
    from torchvision.utils import make_grid        # here: at the top it slows --help down

    images = (x[:, :3].detach().float().cpu().clamp(-1, 1) + 1) / 2
    grid = make_grid(images, columns, padding=1, pad_value=0.5)
    return grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def score_grid(rows, scale=4):
    """What the scores see, a row per noise level: [(x, xt, d_real, d_fake, g), ...] -> picture.

    Each is (n, C, H, W); the five pictures of a sample stand side by side.  xt is shown over its
    own range, the gradient g around grey, over three of its standard deviations.
    """
    def five(x, xt, d_real, d_fake, g):
        xt = xt / xt.abs().amax((1, 2, 3), keepdim=True)
        g = g / (3 * g.std((1, 2, 3), keepdim=True) + 1e-12)
        return torch.stack([x, xt, d_real, d_fake, g], 1).flatten(0, 1)        # (5 n, C, H, W)

    return tile(torch.cat([five(*row) for row in rows]), len(SCORES) * len(rows[0][0]), scale)


def labelled(picture, rows, columns, left=64, top=20):
    """picture (3, H, W) with a name beside each of its rows and above each of its columns."""
    from PIL import ImageDraw
    from torchvision.transforms.functional import to_tensor

    height, width = picture.shape[1] / len(rows), picture.shape[2] / len(columns)
    image = to_pil(F.pad(picture, (left, 0, top, 0), value=1.0))
    draw = ImageDraw.Draw(image)
    for i, name in enumerate(rows):
        draw.text((4, top + (i + 0.5) * height - 6), name, "black")
    for i, name in enumerate(columns):
        draw.text((left + i * width + 4, 4), name, "black")
    return to_tensor(image)


def save_picture(path, *panels):
    """Write (3, H, W) panels side by side, a white gap between them."""
    gap = torch.ones(3, panels[0].shape[1], 12)
    wide = torch.cat([p for panel in panels for p in (panel, gap)][:-1], 2)
    buffer = io.BytesIO()
    to_pil(wide).save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())


def to_pil(picture):
    """A PIL image of (3, H, W) in [0, 1], rounded to the nearest of 256 levels."""
    from PIL import Image

    return Image.fromarray((picture.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())

"""Drawings of 2D points and vector fields: plot_x(ax, ...), and whole figures made of them.

The same axes and colours in every picture: REAL for the target and its score, FAKE for the student
and its score, TEACHER for what the teacher samples in many steps, GRADIENT for the direction in
which DMD moves samples.
"""

import io

import numpy as np
import torch

from nano_dmd.engine.files import write_atomic
from nano_dmd.plot import figure

# safe for colour-blind readers
REAL, FAKE = "#0072B2", "#D55E00"
TEACHER, GRADIENT = "#009E73", "#AA3377"
EXTENT = 1.25  # data units; every mixture has std about 0.5 per axis


def plot_plane(ax, title=""):
    """The axes that all toy pictures share."""
    ax.set(xlim=(-EXTENT, EXTENT), ylim=(-EXTENT, EXTENT), xticks=(-1, 0, 1), yticks=(-1, 0, 1),
           xlabel="x[0]", ylabel="x[1]", aspect="equal", title=title)


def plot_points(ax, x, colour, alpha=0.35, size=3):
    """Points x (N, 2)."""
    ax.scatter(*x.detach().cpu().numpy().T, s=size, c=colour, alpha=alpha, linewidths=0)


def lattice(n=21):
    """(n * n, 2) points that fill the axes, half a cell away from their border."""
    axis = (torch.arange(n) + 0.5) * (2 * EXTENT / n) - EXTENT
    return torch.cartesian_prod(axis, axis)


def visits(points, x, sigma):
    """How often x + sigma * noise comes near each of points (N, 2), in (0, 1]; x (M, 2) samples."""
    log_density = (-torch.cdist(points, x).square() / (2 * sigma**2)).logsumexp(1)
    return (log_density - log_density.max()).exp()                # (N,)


def typical_length(arrows, weight):
    """95th percentile of the lengths of those arrows (N, 2) whose weight (N,) is at least 0.1."""
    return arrows[weight >= 0.1].norm(dim=1).quantile(0.95).item()


def plot_field(ax, points, arrows, colour, unit, weight):
    """Arrows (N, 2) from points (N, 2) of a lattice, faint where weight (N,) is small.

    A length of unit is drawn 1.6 cells long; arrows longer than that are cut there.
    """
    from matplotlib.colors import to_rgba_array

    arrows = arrows * (unit / arrows.norm(dim=1, keepdim=True).clamp(min=unit))
    cell, alpha = 2 * EXTENT / len(points) ** 0.5, (0.15 + 2 * weight).clamp(max=1)
    ax.quiver(*points.numpy().T, *arrows.numpy().T, color=to_rgba_array(colour, alpha.numpy()),
              angles="xy", scale_units="xy", scale=unit / (1.6 * cell), width=0.005, headwidth=4,
              headlength=4.5)


def samples_figure(panels):
    """One scatter plot per (title, x (N, 2), colour)."""
    fig, axes = figure(1, len(panels), 3.1 * len(panels), 3.5)
    for ax, (title, x, colour) in zip(axes.flat, panels):
        plot_plane(ax, title)
        plot_points(ax, x, colour)
    return fig


def field_figure(x, points, scores):
    """A row per noise level: real score, fake score, their difference.

    x (M, 2) generator samples; scores {sigma: (real, fake)}, each (N, 2). Arrows are faint where
    noised samples hardly ever come, as no method looks there. Both scores of a row share one scale;
    the difference, which is smaller, has its own.
    """
    fig, axes = figure(len(scores), 3, 12, 0.4 + 4.1 * len(scores))
    for line, (sigma, (real, fake)) in zip(axes, scores.items()):
        weight = visits(points, x, sigma)
        unit = typical_length(torch.cat([real, fake]), weight.repeat(2))
        small = typical_length(real - fake, weight)
        panels = [("real score", real, REAL, unit), ("fake score", fake, FAKE, unit),
                  (f"real - fake (arrows x {unit / small:.2g})", real - fake, GRADIENT, small)]
        for ax, (title, arrows, colour, length) in zip(line, panels):
            plot_plane(ax, f"{title}, sigma {sigma:g}")
            plot_points(ax, x, FAKE, alpha=0.25)
            plot_field(ax, points, arrows, colour, length, weight)
    return fig


def movie_frames(true, movie):
    """PIL images of movie {method: [(updates, x (N, 2)), ...]}, side by side over true (M, 2)."""
    fig, axes = figure(1, len(movie), 2.6 * len(movie), 2.8)
    for moment in zip(*movie.values()):
        for ax, method, (updates, x) in zip(axes.flat, movie, moment):
            ax.clear()
            plot_plane(ax, f"{method}, {updates} updates")
            plot_points(ax, true, REAL, alpha=0.15)
            plot_points(ax, x, FAKE, alpha=0.6)
        yield to_image(fig)
        fig.set_layout_engine("none")  # the axes stay where the first frame put them


def to_image(fig):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def palette(steps=12):
    """The colours of movie_frames as a PIL palette: from white to REAL, to FAKE and to black."""
    from matplotlib.colors import to_rgb
    from PIL import Image

    inks = np.array([to_rgb(colour) for colour in (REAL, FAKE, "black")])[:, None]    # (3, 1, 3)
    shades = 1 - np.linspace(0, 1, steps)[:, None] * (1 - inks)  # (3, steps, 3)
    image = Image.new("P", (1, 1))
    image.putpalette((255 * shades).round().astype(np.uint8).tobytes())
    return image


def save_movie(path, frames, milliseconds=150, pause=2500):
    """Write PIL images as an endless GIF that rests on the last one."""
    colours = palette()
    images = [frame.quantize(palette=colours, dither=0) for frame in frames]
    write_atomic(path, gif(images, milliseconds, pause))


def gif(images, milliseconds, pause):
    """The bytes of an endless GIF of PIL images in palette mode; rests on the last one."""
    first, *rest = images
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=rest, loop=0, optimize=True,
               duration=[milliseconds] * len(rest) + [pause])
    return buffer.getvalue()

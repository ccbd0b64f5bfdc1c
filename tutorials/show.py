"""What the notebooks share: colours, axes, animations, and a check of the reader's answer.

One colour each, in every figure: REAL the target and its score, FAKE the student and its score, TEACHER what the
teacher samples in many steps, GRADIENT the direction in which a method moves samples.
"""

import base64
import os

import matplotlib.pyplot as plt
import torch
from IPython.display import HTML

from toy.plots import (FAKE, GRADIENT, REAL, TEACHER, gif, lattice, plot_field, plot_plane, plot_points, to_image,  # noqa: F401
                       typical_length, visits)
from tutorials.answers import reply

DPI = float(os.environ.get("NANO_DMD_DPI", 72))                   # tutorials.slides asks for more
plt.rcParams.update({"figure.dpi": DPI, "axes.grid": True, "grid.alpha": 0.3, "figure.constrained_layout.use": True,
                     "axes.titlesize": 11, "legend.fontsize": 9})


def panels(columns=1, rows=1, width=4.4, height=3.2):
    """(figure, list of axes), a panel of width x height inches each."""
    fig, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    return fig, list(axes.flat)


def curve(ax, x, y, label, colour, **style):
    """A line through tensors or lists x, y (N,)."""
    ax.plot(torch.as_tensor(x).detach().numpy(), torch.as_tensor(y).detach().numpy(), color=colour, label=label, **style)


def arrows(ax, x, step, colour, y=0.0, label=None):
    """Arrows on a line, from x (N,) to x + step (N,), at height y: what a method does to 1-D samples."""
    x, step = torch.as_tensor(x).detach().numpy(), torch.as_tensor(step).detach().numpy()
    ax.quiver(x, 0 * x + y, step, 0 * step, color=colour, angles="xy", scale_units="xy", scale=1, width=0.006, label=label)


def label(ax, title="", x="x", y="", legend=True):
    """Names for the axes and a legend for the curves: no figure goes without."""
    ax.set(title=title, xlabel=x, ylabel=y)
    if legend and ax.get_legend_handles_labels()[0]:
        ax.legend()


def movie(draw, frames, columns=1, milliseconds=150, width=3.4, height=3.2):
    """A GIF: draw(axes, frame) paints each of `frames` on a list of cleared axes; rests on the last one.

    It is an <img> of HTML: nbconvert keeps that in its html and slides, and drops a bare image/gif.
    """
    fig, axes = panels(columns, width=width, height=height)
    fig.set_dpi(72)                                               # on slides, too: a GIF is large
    images = []
    for frame in frames:
        for ax in axes:
            ax.clear()
        draw(axes, frame)
        images.append(to_image(fig).quantize(48))
    plt.close(fig)
    data = base64.b64encode(gif(images, milliseconds, pause=1500)).decode()
    return HTML(f'<img alt="animation" src="data:image/gif;base64,{data}">')


def check(key, answer):
    """Say whether an answer to question `key` ("03.1", "03.E") is right, or what it overlooks; None is "not answered yet"."""
    print(reply(key, answer))

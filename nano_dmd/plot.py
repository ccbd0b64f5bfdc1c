"""Draw the diagnostics of one or several runs from their log.jsonl, finished or still running.

    python -m nano_dmd.plot RUN [RUN ...] [--out FILE]

What to look for: the gap between real and fake score falls at every noise level (mesm). The fake
score keeps up with the generator (fake_loss stays flat). No loss term drowns the others
(gradients). Std and spread stay near the teacher's. Colours are quantities, line styles are runs.
"""

import importlib.util
import io
import textwrap
from pathlib import Path

from nano_dmd.engine.config import parser
from nano_dmd.engine.diagnostics import LEVELS
from nano_dmd.engine.files import UserError, command, parse_json, read_lines, write_atomic
from nano_dmd.engine.schema import mismatch

MISSING = 'pictures need matplotlib: pip install -e ".[tutorials]"'
FORMATS = (".png", ".pdf", ".svg", ".jpg")
# safe for colour-blind readers
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))          # one per run


def have_matplotlib():
    return importlib.util.find_spec("matplotlib") is not None


def figure(rows, columns, width, height):
    """(Figure, axes (rows, columns)); width, height in inches.  Without pyplot: nothing global."""
    if not have_matplotlib():
        raise UserError(MISSING)
    from matplotlib.figure import Figure

    fig = Figure((width, height), dpi=100, layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False)


def save_figure(fig, path):
    """Write a figure in the format that the name of the file says."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format=Path(path).suffix.lower()[1:])
    write_atomic(path, buffer.getvalue())


def comparison(result, metrics, references):
    """{row: {metric: (mean, spread)}} as one panel a metric: dots, error bars, teacher dashed.

    references  rows that are no student's
    """
    rows = [row for row in result if row not in references]
    fig, axes = figure(1, len(metrics), 2.5 + 2.6 * len(metrics), 1.2 + 0.4 * len(rows))
    for ax, metric in zip(axes[0], metrics):
        mean, spread = zip(*(result[row][metric] for row in rows))
        ax.errorbar(mean, range(len(rows)), xerr=spread, fmt="o", color=COLOURS[1], capsize=3)
        teacher = result.get("teacher", {}).get(metric, (None,))[0]
        if teacher is not None:
            ax.axvline(teacher, color=COLOURS[2], ls="--", label="teacher")
            ax.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
        ax.set(xlabel=metric, yticks=range(len(rows)), ylim=(len(rows) - 0.5, -0.5), yticklabels=[])
        ax.grid(alpha=0.3)
    axes[0][0].set_yticks(range(len(rows)), [textwrap.fill(row, 44) for row in rows], fontsize=8)
    return fig


NUMBER = (float, None)
PER_LEVEL = [NUMBER] * len(LEVELS)
LOG = dict(step=int, x_mean=NUMBER, x_std=NUMBER, spread=NUMBER, mesm=PER_LEVEL,
           fake_loss=PER_LEVEL, grad={str: NUMBER})


def read_log(folder):
    """The lines of folder/log.jsonl as dicts.  raises UserError if there is none to draw."""
    path = Path(folder) / "log.jsonl"
    if not path.is_file():
        raise UserError(f"no log.jsonl in {folder}; is this a run folder?")
    what = f"{path}, line {{}}: it is damaged, cut the file back to its whole lines"
    numbered = read_lines(path)
    lines = [parse_json(line, what.format(i)) for i, line in numbered]
    if not lines:
        raise UserError(f"{path} is empty; wait for the first --log_every steps of the run")
    for (i, _), line in zip(numbered, lines):
        if problem := mismatch(line, LOG) or mismatch(line.get("teacher", {}), {str: NUMBER}):
            raise UserError(f"{path} is no log of this version, or damaged in line {i}: {problem}")
    return lines


def curve(ax, lines, value, style, colour, label, width=1.5):
    """value(line of the log) over generator updates."""
    marker = "." if len(lines) == 1 else ""
    ax.plot([r["step"] for r in lines], [value(r) for r in lines], ls=style, color=colour,
            label=label, lw=width, marker=marker)


def log_scale(ax):
    """Make the y axis logarithmic, after drawing; ticks read 0.02, also within one decade."""
    from matplotlib.ticker import LogLocator

    if ax.dataLim.ymax <= 0:                       # all zero: a fake score that nothing trains
        return
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")


def plot_levels(ax, logs, key):
    """One curve per noise level, light = little noise."""
    from matplotlib import colormaps

    for lines, style in zip(logs, STYLES):
        for i, level in enumerate(LEVELS):
            shade = colormaps["viridis"](0.9 * (1 - i / (len(LEVELS) - 1)))
            curve(ax, lines, lambda r: r[key][i], style, shade, f"sigma {level:g}")
    log_scale(ax)
    ax.set_ylabel("w(sigma) x squared error")


def plot_gradients(ax, logs):
    """Root mean square gradient at the samples of each unweighted generator loss."""
    names = list(dict.fromkeys(name for lines in logs for name in lines[0]["grad"]))
    for lines, style in zip(logs, STYLES):
        for name in lines[0]["grad"]:
            colour = COLOURS[names.index(name) % len(COLOURS)]
            curve(ax, lines, lambda r: r["grad"].get(name), style, colour, name)
    log_scale(ax)
    ax.set_ylabel("rms gradient x number of elements")


def plot_moments(ax, logs):
    """Mean, std and spread across the batch of the samples; thin lines: the teacher's."""
    widths = dict(x_mean=1.5, x_std=4, spread=1.5)                # two curves may coincide
    for lines, style in zip(logs, STYLES):
        for (name, width), colour in zip(widths.items(), COLOURS):
            curve(ax, lines, lambda r: r[name], style, colour, name, width)
            usual = lines[-1].get("teacher", {}).get(name)
            if usual is not None:
                ax.axhline(usual, color=colour, lw=0.8, alpha=0.6, label=f"{name} of the teacher")
    ax.set_ylabel("data units")


def diagnostics(folders):
    """A Figure of four panels for up to five run folders."""
    if len(folders) > len(STYLES):
        raise UserError(f"at most {len(STYLES)} runs fit in one figure, got {len(folders)}")
    logs = [read_log(folder) for folder in folders]
    fig, axes = figure(2, 2, 12, 9)
    from matplotlib.lines import Line2D

    plot_levels(axes[0, 0], logs, "mesm")
    plot_levels(axes[0, 1], logs, "fake_loss")
    plot_gradients(axes[1, 0], logs)
    plot_moments(axes[1, 1], logs)
    titles = ("mesm: gap between real and fake score", "fake_loss: does the fake score keep up?",
              "gradient of each loss at the samples", "samples: exploding or collapsing?")
    for ax, title in zip(axes.flat, titles):
        ax.set(title=title, xlabel="generator updates")
        ax.margins(y=0.2)                          # room for the legend
        ax.grid(alpha=0.3)
        handles, labels = ax.get_legend_handles_labels()
        once = dict(zip(reversed(labels), reversed(handles)))     # one entry, however many runs
        if once:
            ax.legend(list(once.values())[::-1], list(once)[::-1], ncols=2, fontsize=8)
    names = [f"{folder} ({lines[-1]['step']} updates)" for folder, lines in zip(folders, logs)]
    handles = [Line2D([], [], ls=style, color="k") for style in STYLES[: len(names)]]
    fig.legend(handles, names, loc="outside upper center", ncols=3, frameon=False)
    return fig


def plot_run(folder):
    """Write folder/diagnostics.png of a run; returns its path."""
    path = Path(folder) / "diagnostics.png"
    save_figure(diagnostics([folder]), path)
    return path


def main(argv=None):
    p = parser("python -m nano_dmd.plot", __doc__)
    p.add_argument("runs", nargs="+", metavar="RUN", help="run folders, at most five")
    p.add_argument("--out", default="", help=f"picture to write ({', '.join(FORMATS)}); empty = "
                                             "diagnostics.png, in RUN if there is only one")
    args = p.parse_args(argv)
    if args.out and not args.out.lower().endswith(FORMATS):
        raise UserError(f"--out {args.out}: the name must end in {', '.join(FORMATS)}")
    path = Path(args.runs[0] if len(args.runs) == 1 else "") / "diagnostics.png"
    save_figure(diagnostics(args.runs), args.out or path)
    print(f"diagnostics of {', '.join(args.runs)} in {args.out or path}")


if __name__ == "__main__":
    command(main)

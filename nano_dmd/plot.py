"""Draw the diagnostics of one or several runs from their log.jsonl, finished or still running.

    python -m nano_dmd.plot RUN [RUN ...] [--out FILE]

What to look for: the gap between real and fake score falls at every noise level (mesm); the fake score keeps up
with the generator (fake_loss stays flat); no loss term drowns the others (gradient at the samples); std and spread
stay near the teacher's. Colours are quantities, line styles are runs.
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

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")          # safe for colour-blind readers

STYLES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))                              # one per run

BINS = [f"< {LEVELS[0]:g}", *[f"{a:g} to {b:g}" for a, b in zip(LEVELS, LEVELS[1:])], f"> {LEVELS[-1]:g}"]


def have_matplotlib():
    return importlib.util.find_spec("matplotlib") is not None


def figure(rows, columns, width, height):
    """(Figure, axes (rows, columns)); width, height in inches. Without pyplot, so nothing global is touched."""
    if not have_matplotlib():
        raise UserError(MISSING)
    from matplotlib.figure import Figure

    fig = Figure((width, height), dpi=100, layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False)

FORMATS = (".png", ".pdf", ".svg", ".jpg")


def save_figure(fig, path):
    """Write a figure in the format that the name of the file says."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format=Path(path).suffix.lower()[1:])
    write_atomic(path, buffer.getvalue())


def comparison(result, metrics):
    """What compare found, {row: {metric: (mean, spread)}}, as one panel a metric: dots, error bars, teacher dashed."""
    rows = [row for row in result if row not in ("teacher", "real halves")]
    fig, axes = figure(1, len(metrics), 2.5 + 2.6 * len(metrics), 1.2 + 0.4 * len(rows))
    for ax, metric in zip(axes[0], metrics):
        mean, spread = zip(*(result[row][metric] for row in rows))
        ax.errorbar(mean, range(len(rows)), xerr=spread, fmt="o", color=COLOURS[1], capsize=3)
        if result.get("teacher", {}).get(metric, (None,))[0] is not None:
            ax.axvline(result["teacher"][metric][0], color=COLOURS[2], ls="--", label="teacher")
            ax.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)     # above: hides no dot
        ax.set(xlabel=metric, yticks=range(len(rows)), ylim=(len(rows) - 0.5, -0.5), yticklabels=[""] * len(rows))
        ax.grid(alpha=0.3)
    axes[0][0].set_yticklabels([textwrap.fill(row, 44) for row in rows], fontsize=8)
    return fig

NUMBER = (float, None)

LOG = dict(step=int, x_mean=NUMBER, x_std=NUMBER, spread=NUMBER, mesm=[NUMBER] * len(LEVELS), fake_loss=[NUMBER] * len(LEVELS),
           grad={str: NUMBER}, by_sigma={str: [NUMBER] * len(BINS)})


def read_log(folder):
    """The lines of folder/log.jsonl as dicts.  raises UserError if there is none to draw."""
    path = Path(folder) / "log.jsonl"
    if not path.is_file():
        raise UserError(f"no log.jsonl in {folder}; is this a run folder?")
    lines = [parse_json(line, f"{path}, line {i}: it is damaged, cut the file back to its whole lines")
             for i, line in read_lines(path)]
    if not lines:
        raise UserError(f"{path} is empty; wait for the first --log_every steps of the run")
    for i, line in enumerate(lines, 1):
        problem = mismatch(line, LOG) or mismatch({k: v for k, v in line.items() if k in losses([line])}, {str: NUMBER})
        if problem := problem or mismatch(line.get("teacher", {}), {str: NUMBER}):
            raise UserError(f"{path} is no log of this version, or damaged in line {i}: {problem}")
    return lines


def losses(lines):
    """Names of the training losses in a log, in order of first appearance."""
    return [k for k in lines[0] if k.endswith("_loss") and k not in LOG]


def colour_of(logs):
    """{loss name: colour}, the same in every panel."""
    names = dict.fromkeys(name for lines in logs for name in losses(lines))
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def curve(ax, lines, value, style, colour, label, width=1.5):
    """value(line of the log) over generator updates."""
    ax.plot([r["step"] for r in lines], [value(r) for r in lines], ls=style, color=colour, label=label, lw=width,
            marker="." if len(lines) == 1 else "")
    ax.set_xlabel("generator updates")


def log_scale(ax):
    """Logarithmic y axis of what is drawn already, with ticks that read 0.02 also where it spans one decade."""
    from matplotlib.ticker import LogLocator

    if ax.dataLim.ymax <= 0:                                      # all zero: a fake score that nothing trains
        return
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")


def plot_levels(ax, logs, key):
    """One curve per noise level, light = little noise, over generator updates; log scale."""
    from matplotlib import colormaps

    for lines, style in zip(logs, STYLES):
        for i, level in enumerate(LEVELS):
            shade = colormaps["viridis"](0.9 * (1 - i / (len(LEVELS) - 1)))
            curve(ax, lines, lambda r: r[key][i], style, shade, f"sigma {level:g}")
    log_scale(ax)
    ax.set_ylabel("w(sigma) x squared error")


def plot_gradients(ax, logs):
    """Root mean square gradient at the samples of each unweighted generator loss."""
    colours = colour_of(logs)
    for lines, style in zip(logs, STYLES):
        for name in lines[0]["grad"]:
            curve(ax, lines, lambda r: r["grad"].get(name), style, colours.get(name, "k"), name)
    log_scale(ax)
    ax.set_ylabel("rms gradient x number of elements")


def plot_moments(ax, logs):
    """Mean, std and spread across the batch of the samples; thin lines: the teacher's, where the log has them."""
    for lines, style in zip(logs, STYLES):
        for name, colour, width in zip(("x_mean", "x_std", "spread"), COLOURS, (1.5, 4, 1.5)):        # two may coincide
            curve(ax, lines, lambda r: r[name], style, colour, name, width)
            if name in lines[-1].get("teacher", {}):
                ax.axhline(lines[-1]["teacher"][name], color=colour, lw=0.8, alpha=0.6, label=f"{name} of the teacher")
    ax.set_ylabel("data units")


def plot_losses(ax, logs):
    """The training losses, unweighted; symmetric log scale, since SiD's are negative as a rule."""
    colours = colour_of(logs)
    for lines, style in zip(logs, STYLES):
        for name in losses(lines):
            curve(ax, lines, lambda r: r.get(name), style, colours[name], name)
    ax.set_yscale("symlog", linthresh=1e-3)
    ax.set_ylabel("loss, unweighted")


def plot_bins(ax, logs):
    """The last line's losses in each bin of noise levels."""
    colours = colour_of(logs)
    for lines, style in zip(logs, STYLES):
        for name, values in lines[-1]["by_sigma"].items():
            shown = [(i, v) for i, v in enumerate(values) if v is not None]
            ax.plot(*zip(*shown), ls=style, marker="o", ms=4, color=colours.get(name, "k"), label=name)
    ax.set_yscale("symlog", linthresh=1e-3)
    ax.set_xticks(range(len(BINS)), BINS, rotation=20)
    ax.set(xlabel="sigma", ylabel="loss, unweighted")


def legend(ax, title=None):
    """One entry per label, however many runs share it."""
    handles, labels = ax.get_legend_handles_labels()
    first = dict(zip(reversed(labels), reversed(handles)))
    if first:
        names = list(dict.fromkeys(labels))
        ax.legend([first[n] for n in names], names, title=title, ncols=2 + (len(names) == 5), fontsize=8,
                  title_fontsize=8, alignment="left", framealpha=0.7)


def diagnostics(folders):
    """A Figure of six panels for up to five run folders."""
    if len(folders) > len(STYLES):
        raise UserError(f"at most {len(STYLES)} runs fit in one figure, got {len(folders)}")
    logs = [read_log(folder) for folder in folders]
    fig, axes = figure(2, 3, 16, 9)
    from matplotlib.lines import Line2D

    panels = [("mesm: gap between real and fake score", None, lambda ax: plot_levels(ax, logs, "mesm")),
              ("fake_loss: does the fake score keep up?", None, lambda ax: plot_levels(ax, logs, "fake_loss")),
              ("gradient of each loss at the samples", None, lambda ax: plot_gradients(ax, logs)),
              ("samples: exploding or collapsing?", None, lambda ax: plot_moments(ax, logs)),
              ("losses", "values of DMD and SiD losses are not progress", lambda ax: plot_losses(ax, logs)),
              ("losses by noise level, last line of the log", None, lambda ax: plot_bins(ax, logs))]
    for ax, (title, note, draw) in zip(axes.flat, panels):
        draw(ax)
        ax.set_title(title)
        ax.margins(y=0.2)                                         # room for the legend
        ax.grid(alpha=0.3)
        legend(ax, note)
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
    p.add_argument("--out", default="",
                   help="picture to write (.png, .pdf, .svg, .jpg); empty = diagnostics.png, in RUN if there is only one")
    args = p.parse_args(argv)
    if args.out and not args.out.lower().endswith(FORMATS):
        raise UserError(f"--out {args.out}: the name must end in {', '.join(FORMATS)}")
    path = args.out or (Path(args.runs[0]) / "diagnostics.png" if len(args.runs) == 1 else "diagnostics.png")
    save_figure(diagnostics(args.runs), path)
    print(f"diagnostics of {', '.join(args.runs)} in {path}")


if __name__ == "__main__":
    command(main)

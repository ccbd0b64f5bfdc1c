"""One figure of several comparisons: how much of the teacher's pairs of noise and sample does each method keep?

    python -m tutorials.copying docs/copying.png "ring, 2=runs/family" "digits, 64=runs/family-digits"

Each argument names a data set and the folder of its nano_dmd.compare. A line is a method, a dot the mean over seeds, a bar its
standard deviation. Flags of a row do not matter: the first row of a method counts.
"""

from pathlib import Path

from nano_dmd.engine.config import parser
from nano_dmd.engine.files import UserError, command, read_json
from nano_dmd.plot import COLOURS, FORMATS, STYLES, figure, save_figure


def picture(name):
    """The Path of a picture to write.  raises UserError for a name that says no kind of picture."""
    if not name.lower().endswith(FORMATS):
        raise UserError(f"cannot write a picture {name}: its name must end in {', '.join(FORMATS)}")
    return Path(name)


def pairings(folder):
    """{method: (mean, spread)} of a comparison's folder.  raises UserError if it has none."""
    found = {}
    for row, values in read_json(Path(folder) / "compare.json", {str: {str: [(float, None)]}}).items():
        if values.get("pairing", [None])[0] is not None:
            found.setdefault(row.split()[0], values["pairing"])
    if not found:
        raise UserError(f"{folder} has no pairing of a student: run nano_dmd.compare into it")
    return found


def draw(names, columns):
    """The figure: names of the data sets, and the pairings of each."""
    fig, axes = figure(1, 1, 7, 4.5)
    ax = axes[0][0]
    methods = list(dict.fromkeys(m for found in columns for m in found))
    for i, method in enumerate(methods):
        x, values = zip(*((j, found[method]) for j, found in enumerate(columns) if method in found))
        shift = 0.012 * (i - len(methods) / 2)      # bars side by side
        ax.errorbar([j + shift for j in x], *zip(*values), marker="o", capsize=2, label=method,
                    color=COLOURS[i % len(COLOURS)], ls=STYLES[i // len(COLOURS)])
    ax.set(xticks=range(len(names)), xticklabels=names, ylabel="correlation with the teacher's answer to the same noise")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return fig


def main(argv=None):
    p = parser("python -m tutorials.copying", __doc__)
    p.add_argument("picture", type=picture, help="file to write: " + ", ".join(FORMATS))
    p.add_argument("sets", nargs="+", metavar="NAME=FOLDER", help="a data set and its folder of nano_dmd.compare")
    args = p.parse_args(argv)
    if wrong := [s for s in args.sets if "=" not in s]:
        raise UserError(f"expected NAME=FOLDER, got {wrong[0]!r}")
    names, folders = zip(*(s.split("=", 1) for s in args.sets))
    save_figure(draw(names, [pairings(f) for f in folders]), args.picture)
    print(f"wrote {args.picture}")


if __name__ == "__main__":
    command(main)

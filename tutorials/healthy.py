"""Healthy or sick?  The numbers of log.jsonl in good runs, and in runs that are ill on purpose.

    python -m tutorials.healthy docs/healthy.png --out runs/healthy          trains eight students of digits, 9 minutes
    python -m tutorials.healthy FILE.png --preset mnist --out FOLDER         the same of mnist, 30 minutes
    python -m tutorials.healthy docs/methods.png --runs runs/family          the runs of a comparison instead, a row a method

In the first figure a row is an illness of `dmd2`: orange is the sick run, the grey band holds three good ones. A run that
is in the folder already is not trained again. In the second each thin line is a seed, and a column has one scale.
"""

import math
from pathlib import Path

import torch.nn.functional as F
from PIL import Image

from nano_dmd import train
from nano_dmd.dmd_loss import dmd_loss
from nano_dmd.engine.config import parser
from nano_dmd.engine.files import UserError, command
from nano_dmd.methods import METHODS
from nano_dmd.networks import Block
from nano_dmd.plot import COLOURS, FORMATS, MISSING, figure, have_matplotlib, read_log, save_figure
from tutorials.copying import picture

GOOD = "--method dmd2 --critic_steps 2 --steps 400 --w_gan 0 --w_disc 0 --log_every 10"
SICK = {
    "generator's rate x 20": "--lr_generator 2e-2",
    "critic's rate x .01": "--lr_critic 1e-5 --critic_steps 1",
    "sign of the gradient": "--method climbing",
    "dropout in the fake score": "--method shaky",
    "guidance 6": "--guidance 6"}
SHOWN = {
    "mesm, sigma .15": lambda r: r["mesm"][1] or math.nan, "fake_loss, sigma .15": lambda r: r["fake_loss"][1],
    "gradient": lambda r: next(iter(r["grad"].values()), None), "x_std": lambda r: r["x_std"], "spread": lambda r: r["spread"]}


def climbing_loss(x, nets, batch, cfg):
    """DMD's gradient with the wrong sign."""
    return -dmd_loss(x, nets, batch, cfg)


def shaky_loss(x, nets, batch, cfg):
    """DMD's loss with dropout of .13 in each block of the fake score, as if it had been left in train mode."""
    blocks = [m for m in nets.fake.modules() if isinstance(m, Block)]
    hooks = [m.register_forward_hook(lambda block, inputs, out: F.dropout(out, 0.13)) for m in blocks]
    loss = dmd_loss(x, nets, batch, cfg)
    for hook in hooks:
        hook.remove()
    return loss


def logs_of(out, preset):
    """({illness: [lines of its log]}, [lines of three good runs' logs]); trains what is not in the folder."""
    good = f"--preset {preset} {GOOD}".split()
    for name, loss in (("climbing", climbing_loss), ("shaky", shaky_loss)):
        METHODS[name] = METHODS["dmd2"]._replace(generator=[("w_dm", loss)])
    runs = {f"good-{seed}": f"--seed {seed}" for seed in range(3)} | SICK
    for name, flags in runs.items():
        if not (out / name / "report.json").exists():
            begun = (out / name / "checkpoint.pt").exists()
            train.main([*(["--resume"] if begun else good + flags.split()), "--out", str(out / name)])
    return {name: [read_log(out / name)] for name in SICK}, [read_log(out / f"good-{seed}") for seed in range(3)]


def draw(rows, good=()):
    """The figure: a row of panels for each list of logs, a column for each number; `good` logs make the band."""
    fig, axes = figure(len(rows), len(SHOWN), 13, 0.6 + (1.7 if good else 1.3) * len(rows))
    for line_of_axes, (name, logs) in zip(axes, rows.items()):
        for ax, top, (what, value) in zip(line_of_axes, axes[0], SHOWN.items()):
            found = [[value(r) for r in lines] for lines in good]
            if found:
                ax.fill_between([r["step"] for r in good[0]], *[[f(v) for v in zip(*found)] for f in (min, max)], color="0.75")
            elif ax is not top:
                ax.sharey(top)
            for log in logs:
                ax.plot([r["step"] for r in log], [value(r) for r in log], color=COLOURS[1], lw=1.2 if good else 0.7)
            if all(math.isnan(value(r)) for log in logs for r in log):
                ax.text(0.5, 0.5, "no critic", ha="center", transform=ax.transAxes)
            known = logs[0][0].get("teacher", {}).get(what)
            if known is not None:
                ax.axhline(known, color=COLOURS[2], ls="--", lw=1)
            ax.set(title=what if ax is top else "", yscale="linear" if what in ("x_std", "spread") else "log")
            ax.tick_params(labelsize=7, which="both")
        line_of_axes[0].set_ylabel(name, fontsize=9)
    return fig


def main(argv=None):
    p = parser("python -m tutorials.healthy", __doc__)
    p.add_argument("picture", type=picture, help="file to write: " + ", ".join(FORMATS))
    p.add_argument("--out", type=Path, help="folder of the runs (default: runs/healthy, runs/healthy-mnist)")
    p.add_argument("--preset", choices=("digits", "mnist"), default="digits", help="what to train on (default: digits)")
    p.add_argument("--runs", type=Path, help="a folder of nano_dmd.compare: draw its runs, all seeds")
    args = p.parse_args(argv)
    if not have_matplotlib():
        raise UserError(MISSING)
    if args.runs:
        runs = sorted(log.parent for log in args.runs.glob("*/*/log.jsonl"))
        if not runs:
            raise UserError(f"no runs in {args.runs}: run nano_dmd.compare into it")
        names = sorted({folder.parent.name for folder in runs})
        found = {name: [read_log(f) for f in runs if f.parent.name == name] for name in names}, []
    else:
        found = logs_of(args.out or Path("runs", "healthy" + "-mnist" * (args.preset == "mnist")), args.preset)
    save_figure(draw(*found), args.picture)
    if args.picture.suffix.lower() == ".png":      # 64 colours are a quarter of the size; median cut would lose the rare green
        few = Image.open(args.picture).convert("RGB").quantize(64, Image.Quantize.FASTOCTREE)
        few.save(args.picture, optimize=True)
    print(f"wrote {args.picture}")


if __name__ == "__main__":
    command(main)

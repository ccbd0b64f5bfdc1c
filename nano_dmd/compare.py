"""Several settings, several seeds, one table with mean and spread.

    python -m nano_dmd.compare --preset digits --seeds 5 dmd regression sid "dmd2 --w_gan 0 --w_disc 0"

Each row is a method, perhaps with flags of nano_dmd.train. Runs live in --out/ROW/SEED; a finished one is not
run again, so an interrupted comparison goes on where it stopped. --jobs runs that many side by side.
"""

import json
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev

from tqdm import tqdm

from nano_dmd.checkpoint import UserError, command, read_json, write_atomic
from nano_dmd.evaluate import table
from nano_dmd.plot import comparison, have_matplotlib, save_figure
from nano_dmd.presets import add_config_flags, parser, resolve


REFERENCES = ("teacher", "real halves")                           # rows of every report that are not a student's


def run_once(flags, folder):
    """The report of one training run in a process of its own, or of the earlier one found in folder."""
    if not (folder / "report.json").exists():
        resume = ["--resume", "--out", str(folder)] if (folder / "checkpoint.pt").exists() else [*flags, "--out", str(folder)]
        done = subprocess.run([sys.executable, "-m", "nano_dmd.train", *resume], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{' '.join(flags)} failed: {done.stderr.strip().splitlines()[-1]}")
    return read_json(folder / "report.json")


def compare(preset, rows, seeds, out, jobs=1, first=0):
    """{row: {metric: (mean, spread)}}, spread = standard deviation over seeds; writes compare.json, .txt and .png."""
    try:
        out, flags = Path(out), {row: ["--preset", preset, "--no-control", "--method", *shlex.split(row)] for row in rows}
    except ValueError as e:                                       # a quote that is never closed
        raise UserError(f"cannot read the rows {rows}: {e}") from e
    for row in rows:                                              # complain about a typo before hours of work, not after
        p = parser("compare", "")
        add_config_flags(p)
        resolve(vars(p.parse_args(flags[row])))
    folder = {row: out / folder_name(row) for row in rows}
    with ThreadPoolExecutor(jobs) as pool:
        alone = pool.submit(run_once, [*flags[rows[0]], "--seed", str(first)], folder[rows[0]] / str(first))
        alone.result()                                            # trains the teacher once, for everybody
        futures = {(row, s): pool.submit(run_once, [*flags[row], "--seed", str(s)], folder[row] / str(s))
                   for s in range(first, first + seeds) for row in rows}
        for _ in tqdm(as_completed(futures.values()), total=len(futures), desc="runs"):
            pass
        reports = {row: [futures[row, s].result() for s in range(first, first + seeds)] for row in rows}
    result = {row: summary(found) for row, found in reports.items()}
    for name, values in reports[rows[0]][0]["rows"].items():
        if name in REFERENCES:
            result[name] = {k: (v, 0.0) for k, v in values.items() if k in result[rows[0]]}
    write_atomic(out / "compare.json", json.dumps(result, indent=1).encode())
    write_atomic(out / "compare.txt", (as_text(shorten(result)) + "\n").encode())
    if have_matplotlib():
        known = ("fd", "recall", "sw2", "in3", "weight_error", "fixed_fd", "fixed_recall", "CPU s")
        shown = [m for m in known if all(m in result[row] for row in rows)][:3]
        save_figure(comparison(shorten(result), shown), out / "compare.png")
    return result


def shorten(result):
    """The same result, with the flags that all rows share left out of their names."""
    parts = {row: [row] if row in REFERENCES else re.split(" (?=--)", row) for row in result}
    shared = set.intersection(*(set(p[1:]) for row, p in parts.items() if row not in REFERENCES))
    return {" ".join(p for p in parts[row] if p not in shared): values for row, values in result.items()}


def folder_name(row):
    return re.sub(r"[^\w.]+", "-", row).strip("-")


def summary(reports):
    """Mean and spread of every metric of the student, and of the CPU and wall seconds of its distillation."""
    students = [list(r["rows"].values())[-1] for r in reports]
    values = {k: [s[k] for s in students] for k in students[0] if k not in ("NFE", "samples/s", "speed-up", "seconds")}
    values |= {"CPU s": [r["cpu_seconds"] for r in reports], "s": [r["seconds"] for r in reports]}
    return {k: (mean(v), stdev(v) if len(v) > 1 else 0.0) for k, v in values.items()}


def as_text(result):
    return table({row: {k: f"{m:.3g} ({s:.2g})" if s else f"{m:.3g}" for k, (m, s) in values.items()}
                  for row, values in result.items()})


def main(argv=None):
    p = parser("python -m nano_dmd.compare", __doc__)
    p.add_argument("rows", nargs="+", help='a method, or a quoted "method --flag value ..."')
    p.add_argument("--preset", default="digits", help="a line of PRESETS")
    p.add_argument("--seeds", type=int, default=5, help="runs per row")
    p.add_argument("--first_seed", type=int, default=0, help="of those runs; take others than the ones settings were tuned on")
    p.add_argument("--jobs", type=int, default=1, help="runs side by side, each in its own process")
    p.add_argument("--out", default="runs/compare", help="folder of the runs and the table")
    args = p.parse_args(argv)
    if args.seeds < 1 or args.jobs < 1 or args.first_seed < 0:
        raise UserError(f"--seeds and --jobs must be at least 1 and --first_seed at least 0, got {args.seeds}, {args.jobs} "
                        f"and {args.first_seed}")
    print(as_text(shorten(compare(args.preset, args.rows, args.seeds, args.out, args.jobs, args.first_seed))))


if __name__ == "__main__":
    command(main)

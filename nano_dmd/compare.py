"""Several settings, several seeds, one table with mean and spread.

    python -m nano_dmd.compare --preset digits --seeds 5 METHOD METHOD "METHOD --w_gan 0 --w_disc 0"

Each row is a method, perhaps with flags of nano_dmd.train. Runs live in --out/ROW/SEED. A finished
one with the same settings is not run again, so an interrupted comparison goes on where it stopped.
"""

import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev

from tqdm import tqdm

from nano_dmd.engine import config
from nano_dmd.engine.cache import digest, sources
from nano_dmd.engine.files import (UserError, command, last_words, read_json, write_atomic,
                                   write_json)
from nano_dmd.metrics.sets import table
from nano_dmd.plot import comparison, have_matplotlib, save_figure

REFERENCES = ("teacher", "real halves")             # rows of a report that are no student's
ROW = {str: (float, None)}
PLOTTED = ("fd", "recall", "sw2", "in3", "weight_error", "fixed_fd", "fixed_recall", "pairing",
           "CPU s")


def parse_row(preset, row):
    """What a row changes: "NAME --batch 8" -> {"preset": ..., "method": "NAME", "batch": 8}."""
    try:
        method, *flags = shlex.split(row) or [""]
    except ValueError as e:                        # a quote that is never closed
        raise UserError(f"cannot read the row {row!r}: {e}") from e
    p = config.parser("compare", "", help=False)
    config.add_config_flags(p)
    given = vars(p.parse_args(flags))
    if taken := [n for n in ("preset", "method", "seed", "out", "control") if n in given]:
        raise UserError(f"--{taken[0]} cannot stand in the row {row!r}: give --preset, --seeds or "
                        "--out for all rows")
    return dict(given, preset=preset, method=method, control=False)


def run_once(settings, folder):
    """The report of one run in a process of its own, or of the earlier one in folder.

    raises UserError if folder holds another run, or the run fails
    """
    wanted = config.resolve(settings | {"out": str(folder)})
    other = f"{folder} holds a run {{}}: choose another --out, or delete that folder"
    there = [n for n in ("config.json", "checkpoint.pt", "report.json") if (folder / n).exists()]
    if there and (difference := config.same_run(config.read_config(folder), wanted)):
        name, found, asked = difference
        raise UserError(other.format(f"with {name} {found}, not {asked}"))
    if "report.json" not in there:
        resume = ["--resume", "--out", str(folder)]
        flags = resume if "checkpoint.pt" in there else flags_of(wanted, settings)
        train = [sys.executable, "-m", "nano_dmd.train", *flags]
        done = subprocess.run(train, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"the run in {folder} {last_words(done)}")
    rows = {wanted.method: ROW, str: ROW}
    report = read_json(folder / "report.json", dict(rows=rows, cpu_seconds=float, seconds=float))
    for name, v in sources(wanted).items():
        if report.get("sources", {}).get(name, v) != v:
            raise UserError(other.format(f"on another --{name} of that name"))
    return report


def flags_of(cfg, settings):
    """The command line of a run: its settings, as nano_dmd.train reads them."""
    flags = {name: getattr(cfg, name) for name in (*settings, "out")}
    return [f"--{'' if v else 'no-'}{name}" if isinstance(v, bool) else f"--{name}={v}"
            for name, v in flags.items()]


def teacher_of(cfg):
    """The settings that decide who the teacher is.  An exact mixture is not trained."""
    trained = () if cfg.teacher.startswith("toy:") else (cfg.teacher_steps, cfg.teacher_seed)
    return cfg.teacher, cfg.data, *trained


def compare(preset, rows, seeds, out, jobs=1, first=0):
    """{row: {metric: (mean, std over seeds)}}; writes compare.json, .txt and .png."""
    out, rows = Path(out), list(dict.fromkeys(rows))
    settings = {row: parse_row(preset, row) for row in rows}
    configs = [config.resolve(settings[row]) for row in rows]  # typos show before hours of work
    names = folder_names(rows)

    def run(row, seed):
        return run_once(settings[row] | {"seed": seed}, out / names[row] / str(seed))

    with ThreadPoolExecutor(jobs) as pool:
        pool.submit(run, rows[0], first).result()  # trains the teacher once, for everybody
        pairs = [(row, seed) for seed in range(first, first + seeds) for row in rows]
        futures = {pair: pool.submit(run, *pair) for pair in pairs}
        try:
            for future in tqdm(as_completed(futures.values()), total=len(futures), desc="runs"):
                future.result()
        finally:                                   # after Ctrl-C too: what waits does not start
            pool.shutdown(cancel_futures=True)
    reports = {row: [futures[pair].result() for pair in pairs if pair[0] == row] for row in rows}
    result = {row: summary(found, settings[row]["method"]) for row, found in reports.items()}
    if len(set(map(teacher_of, configs))) == 1:
        for name, values in reports[rows[0]][0]["rows"].items():
            if name in REFERENCES:
                result[name] = {k: (v, 0.0) for k, v in values.items() if k in result[rows[0]]}
    write_json(out / "compare.json", result)
    write_atomic(out / "compare.txt", (as_text(shorten(result)) + "\n").encode())
    if have_matplotlib():
        students = [v for name, v in result.items() if name not in REFERENCES]
        known = [m for m in PLOTTED if all(v.get(m, (None,))[0] is not None for v in students)][:3]
        save_figure(comparison(shorten(result), known, REFERENCES), out / "compare.png")
    return result


def shorten(result):
    """The same result, without the flags that all rows share in their names."""
    parts = {row: [row] if row in REFERENCES else re.split(" (?=--)", row) for row in result}
    shared = set.intersection(*(set(p[1:]) for row, p in parts.items() if row not in REFERENCES))
    names = {row: " ".join(p for p in parts[row] if p not in shared) for row in result}
    if len(set(names.values())) < len(names):      # rows that differ in the order of flags alone
        return result
    return {names[row]: values for row, values in result.items()}


def folder_names(rows):
    """{row: the name of its folder}, different also where a file system ignores case."""
    plain = {row: re.sub(r"[^\w.]+", "-", row, flags=re.ASCII)[:100].strip("-.") for row in rows}
    taken = [name.casefold() for name in plain.values()]

    def clear(row):
        return taken.count(plain[row].casefold()) == 1 and len(row) <= 100 and row.isascii()

    return {row: name if clear(row) else f"{name}-{digest(row)}" for row, name in plain.items()}


def summary(reports, method):
    """{metric: (mean, spread)} of the student, and of CPU and wall seconds of its training."""
    students = [r["rows"][method] for r in reports]
    speeds = ("NFE", "samples/s", "speed-up", "seconds")
    values = {k: [s.get(k) for s in students] for k in students[0] if k not in speeds}
    values |= {"CPU s": [r["cpu_seconds"] for r in reports], "s": [r["seconds"] for r in reports]}
    spread = {k: stdev(v) if len(v) > 1 and None not in v else 0.0 for k, v in values.items()}
    return {k: (None if None in v else mean(v), spread[k]) for k, v in values.items()}


def as_text(result):
    """What compare found, as a table of "mean (spread)"."""
    def entry(m, s):
        return None if m is None else f"{m:.3g} ({s:.2g})" if s else f"{m:.3g}"

    return table({row: {k: entry(*v) for k, v in values.items()} for row, values in result.items()})


def main(argv=None):
    p = config.parser("python -m nano_dmd.compare", __doc__)
    p.add_argument("rows", nargs="+", help='a method, or a quoted "METHOD --flag value ..."')
    p.add_argument("--preset", default="digits", help="a name in presets.py")
    p.add_argument("--seeds", type=config.number(1, 10**6), default=5, help="runs per row")
    p.add_argument("--first_seed", type=config.number(0, 2**62), default=0,
                   help="seed of the first run; choose seeds that no setting was tuned on")
    p.add_argument("--jobs", type=config.number(1, 1000), default=1, help="runs side by side")
    p.add_argument("--out", default="", help="folder; empty = runs/compare-PRESET")
    args = p.parse_args(argv)
    out = args.out or f"runs/compare-{args.preset}"
    result = compare(args.preset, args.rows, args.seeds, out, args.jobs, args.first_seed)
    print(as_text(shorten(result)))


if __name__ == "__main__":
    command(main)

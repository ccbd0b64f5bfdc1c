"""Several settings, several seeds, one table with mean and spread.

    python -m nano_dmd.compare --preset digits --seeds 5 dmd regression sid "dmd2 --w_gan 0 --w_disc 0"

Each row is a method, perhaps with flags of nano_dmd.train. Runs live in --out/ROW/SEED; a finished one with the same
settings is not run again, so an interrupted comparison goes on where it stopped. --jobs runs that many side by side.
"""

import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev

from tqdm import tqdm

from nano_dmd.engine.cache import digest, sources
from nano_dmd.engine.config import add_config_flags, number, parser, read_config, resolve, same_run
from nano_dmd.engine.files import UserError, command, read_json, write_atomic, write_json
from nano_dmd.metrics.sets import table
from nano_dmd.plot import comparison, have_matplotlib, save_figure

REFERENCES = ("teacher", "real halves")                           # rows of every report that are not a student's

REPORT = dict(rows={str: {str: (float, None)}}, cpu_seconds=float, seconds=float)


def parse_row(preset, row):
    """What a row changes, {setting: value}: "sid --batch 8" -> {"preset": ..., "method": "sid", "batch": 8}."""
    try:
        method, *flags = shlex.split(row) or [""]
    except ValueError as e:                                       # a quote that is never closed
        raise UserError(f"cannot read the row {row!r}: {e}") from e
    p = parser("compare", "", help=False)
    add_config_flags(p)
    given = vars(p.parse_args(flags))
    if taken := [name for name in ("preset", "method", "seed", "out", "control") if name in given]:
        raise UserError(f"--{taken[0]} cannot stand in the row {row!r}: a row is a method and what it changes; the preset is "
                        "--preset, seeds are --seeds and --first_seed, folders are --out")
    return dict(given, preset=preset, method=method, control=False)


def run_once(settings, folder):
    """The report of one training run in a process of its own, or of the earlier one found in folder.

    raises UserError if folder holds another run, or the run fails
    """
    wanted = resolve(settings | {"out": str(folder)})
    there = any((folder / name).exists() for name in ("config.json", "checkpoint.pt", "report.json"))
    if there and (difference := same_run(read_config(folder), wanted)):
        name, found, asked = difference
        raise UserError(f"{folder} holds a run with {name} {found}, not {asked}: choose another --out, or delete that folder")
    if not (folder / "report.json").exists():
        flags = ["--resume", "--out", str(folder)] if (folder / "checkpoint.pt").exists() else flags_of(wanted, settings)
        done = subprocess.run([sys.executable, "-m", "nano_dmd.train", *flags], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"the run in {folder} {last_words(done)}")
    report = read_json(folder / "report.json", REPORT)
    if changed := [name for name, v in sources(wanted).items() if report.get("sources", {}).get(name, v) != v]:
        raise UserError(f"{folder} holds a run on another --{changed[0]} of that name: choose another --out, or delete it")
    if wanted.method not in report["rows"]:
        raise UserError(f"{folder / 'report.json'} is damaged: it has no row {wanted.method}")
    return report


def flags_of(cfg, settings):
    """The command line of a run: its settings, as nano_dmd.train reads them."""
    def words(name, value):
        return [f"--{'no-' * (not value)}{name}"] if isinstance(value, bool) else [f"--{name}={value}"]

    return [w for name in (*settings, "out") for w in words(name, getattr(cfg, name))]


def last_words(done):
    """Why a process ended without success: its own sentence if it had one, the signal that killed it, or its exit code."""
    lines = done.stderr.strip().splitlines() or ["it said nothing"]
    if done.returncode < 0:
        number = -done.returncode
        name = next((s.name for s in signal.Signals if s.value == number), "unknown")
        return f"was killed by signal {number} ({name}){': the memory may have been full' * (name == 'SIGKILL')}"
    said = [line for line in lines if line.startswith("error: ")]
    return f"failed: {said[-1]}" if said else f"ended with exit code {done.returncode}: {lines[-1]:.200}"


def teacher_of(cfg):
    """The settings that decide who the teacher is.  An exact mixture is not trained, so its name is enough."""
    return cfg.teacher, cfg.data, *(() if cfg.teacher.startswith("toy:") else (cfg.teacher_steps, cfg.teacher_seed))


def compare(preset, rows, seeds, out, jobs=1, first=0):
    """{row: {metric: (mean, spread)}}, spread = standard deviation over seeds; writes compare.json, .txt and .png."""
    out, rows = Path(out), list(dict.fromkeys(rows))
    settings = {row: parse_row(preset, row) for row in rows}
    configs = [resolve(settings[row]) for row in rows]            # complain about a typo before hours of work, not after
    names, numbers = folder_names(rows), range(first, first + seeds)
    folder = {row: out / names[row] for row in rows}

    def run(row, seed):
        return run_once(settings[row] | {"seed": seed}, folder[row] / str(seed))

    with ThreadPoolExecutor(jobs) as pool:
        pool.submit(run, rows[0], first).result()                 # trains the teacher once, for everybody
        futures = {(row, s): pool.submit(run, row, s) for s in numbers for row in rows}
        try:
            for future in tqdm(as_completed(futures.values()), total=len(futures), desc="runs"):
                future.result()
        except UserError:
            pool.shutdown(cancel_futures=True)
            raise
        reports = {row: [futures[row, s].result() for s in numbers] for row in rows}
    result = {row: summary(found, settings[row]["method"]) for row, found in reports.items()}
    for name, values in reports[rows[0]][0]["rows"].items() if len(set(map(teacher_of, configs))) == 1 else ():
        if name in REFERENCES:
            result[name] = {k: (v, 0.0) for k, v in values.items() if k in result[rows[0]]}
    write_json(out / "compare.json", result)
    write_atomic(out / "compare.txt", (as_text(shorten(result)) + "\n").encode())
    if have_matplotlib():
        known = ("fd", "recall", "sw2", "in3", "weight_error", "fixed_fd", "fixed_recall", "CPU s")
        shown = [m for m in known if all(m in v and v[m][0] is not None for v in result.values() if "CPU s" in v)][:3]
        save_figure(comparison(shorten(result), shown), out / "compare.png")
    return result


def shorten(result):
    """The same result, with the flags that all rows share left out of their names."""
    parts = {row: [row] if row in REFERENCES else re.split(" (?=--)", row) for row in result}
    shared = set.intersection(*(set(p[1:]) for row, p in parts.items() if row not in REFERENCES))
    short = {" ".join(p for p in parts[row] if p not in shared): values for row, values in result.items()}
    return short if len(short) == len(result) else result         # two rows may differ in the order of their flags alone


def folder_names(rows):
    """{row: the name of its folder}, different for different rows also where a file system ignores case."""
    plain = {row: re.sub(r"[^\w.]+", "-", row, flags=re.ASCII)[:100].strip("-.") for row in rows}
    taken = [name.casefold() for name in plain.values()]
    clear = {row: taken.count(name.casefold()) == 1 and len(row) <= 100 and row.isascii() for row, name in plain.items()}
    return {row: name if clear[row] else f"{name}-{digest(row)}" for row, name in plain.items()}


def summary(reports, method):
    """Mean and spread of every metric of the student, and of the CPU and wall seconds of its distillation."""
    students = [r["rows"][method] for r in reports]
    values = {k: [s.get(k) for s in students] for k in students[0] if k not in ("NFE", "samples/s", "speed-up", "seconds")}
    values |= {"CPU s": [r["cpu_seconds"] for r in reports], "s": [r["seconds"] for r in reports]}
    return {k: (None, 0.0) if None in v else (mean(v), stdev(v) if len(v) > 1 else 0.0) for k, v in values.items()}


def as_text(result):
    return table({row: {k: f"{m:.3g} ({s:.2g})" if s else m if m is None else f"{m:.3g}" for k, (m, s) in values.items()}
                  for row, values in result.items()})


def main(argv=None):
    p = parser("python -m nano_dmd.compare", __doc__)
    p.add_argument("rows", nargs="+", help='a method, or a quoted "method --flag value ..."')
    p.add_argument("--preset", default="digits", help="a line of PRESETS")
    p.add_argument("--seeds", type=number(1, 10**6), default=5, help="runs per row")
    p.add_argument("--first_seed", type=number(0, 2**62), default=0,
                   help="of those runs; take others than the ones settings were tuned on")
    p.add_argument("--jobs", type=number(1, 1000), default=1, help="runs side by side, each in its own process")
    p.add_argument("--out", default="", help="folder of the runs and the table; empty = runs/compare-PRESET")
    args = p.parse_args(argv)
    args.out = args.out or f"runs/compare-{args.preset}"
    print(as_text(shorten(compare(args.preset, args.rows, args.seeds, args.out, args.jobs, args.first_seed))))


if __name__ == "__main__":
    command(main)

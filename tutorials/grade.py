"""Grade submissions: marks per task on the screen, and Gradescope's results.json.

    python -m tutorials.grade DIR                        DIR holds a1.py, a2.py, ...: public checks
    python -m tutorials.grade DIR --seed 31415 --out results.json      hidden checks: the same at other constants

Student code never runs in this process (assignments/isolated.py).
"""

import time
from pathlib import Path

from nano_dmd.engine.config import number, parser
from nano_dmd.engine.files import UserError, command, write_json
from tutorials.assignments.checking import PUBLIC_SEED
from tutorials.assignments.isolated import assignment, run_task
from tutorials.assignments.stubs import NAMES


def grade(name, path, seed):
    """[{number, name, score, max_score, output}] per task of one assignment's file."""
    known = assignment(name)
    return [grade_task(known, task, path, seed) for task in known.tasks]


def grade_task(known, task, path, seed):
    answers, printed = run_task(known.name, task, path, seed)
    score, lines = 0, []
    for check, why in zip(known.of(task), answers):
        score += check.points if why is None else 0
        lines.append(f"{'passed' if why is None else 'FAILED'} ({check.points:g}) {check.title}")
        lines += [f"    {why}"] if why else []
    if printed:
        lines.append(f"printed: {printed}")
    return dict(number=task, name=f"{task} {known.tasks[task]}", score=score, max_score=known.points(task),
                output="\n".join(lines))


def find(folder, names):
    """{assignment: its file}; raises UserError where there is nothing to grade."""
    if not Path(folder).is_dir():
        raise UserError(f"no folder {folder}; give one that holds a1.py or another assignment's file")
    if unknown := set(names) - set(NAMES):
        raise UserError(f"no assignment {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    files = {name: Path(folder, f"{name}.py").resolve() for name in names}
    return {name: path for name, path in files.items() if path.is_file()}


def results(tests, seconds, hidden):
    """Gradescope's format; hidden: students see the marks of a task and not what failed."""
    shown = [dict(t, status="passed" if t["score"] == t["max_score"] else "failed", visibility="visible",
                  output="hidden test: see the public ones for what is asked" if hidden else t["output"]) for t in tests]
    return dict(score=sum(t["score"] for t in tests), execution_time=round(seconds), visibility="visible",
                stdout_visibility="hidden", tests=shown)


def main(argv=None):
    p = parser("python -m tutorials.grade", __doc__)
    p.add_argument("folder", metavar="DIR")
    p.add_argument("--assignments", default="", help="a1,a3 for example; a missing file scores 0 (default: all files in DIR)")
    p.add_argument("--seed", type=number(0, 2**63 - 1), default=PUBLIC_SEED,
                   help="of the constants; 0 is public, choose another and keep it")
    p.add_argument("--out", help="write results.json there, for Gradescope")
    p.add_argument("--terse", action="store_true", help="results.json does not say what failed")
    args = p.parse_args(argv)
    names = list(dict.fromkeys(n.strip() for n in args.assignments.split(",") if n.strip()))
    if args.out is not None and not args.out.endswith(".json"):
        raise UserError(f"--out {args.out!r}: give a name that ends in .json")
    files, start = find(args.folder, names or NAMES), time.perf_counter()
    if not files and not names:
        raise UserError(f"nothing to grade in {args.folder}: no {', '.join(f'{n}.py' for n in NAMES)}")
    tests = []
    for name in names or files:
        known = assignment(name)
        missing = [dict(number=t, name=f"{t} {title}", score=0, max_score=known.points(t), output=f"{name}.py is missing")
                   for t, title in known.tasks.items()]
        tests += grade(name, files[name], args.seed) if name in files else missing
        total = [t for t in tests if t["number"].lower().startswith(name)]
        print("\n".join(f"{t['score']:5g} / {t['max_score']:<3g} {t['name']}\n" + indent(t["output"]) for t in total))
        print(f"{sum(t['score'] for t in total):5g} / {sum(t['max_score'] for t in total):<3g} {assignment(name).title}\n")
    if args.out:
        write_json(args.out, results(tests, time.perf_counter() - start, args.terse))


def indent(text):
    return "\n".join("            " + line for line in text.splitlines())


if __name__ == "__main__":
    command(main)

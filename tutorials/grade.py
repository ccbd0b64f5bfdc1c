"""Grade submissions: marks per task on the screen, Gradescope's results.json, and a table of a whole class.

    python -m tutorials.grade DIR                        DIR holds a1.py, a2.py, ...: public checks
    python -m tutorials.grade DIR --seed-file seed --out results.json  hidden checks: the same at other constants
    python -m tutorials.grade DIR --seed-file seed --csv grades.csv    DIR holds a folder for each student

Student code never runs in this process (assignments/isolated.py), and no submission can stop the others' grading.
"""

import argparse
import ast
import csv
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
    try:
        answers, printed = run_task(known.name, task, path, seed)
    except Exception as e:                                        # the grader's own fault, or something new to break it with
        answers, printed = [f"the grader failed here, tell the staff ({type(e).__name__}: {e})"[:300]] * len(known.of(task)), ""
    score, lines = 0, []
    for check, why in zip(known.of(task), answers):
        score += check.points if why is None else 0
        lines.append(f"{'passed' if why is None else 'FAILED'} ({check.points:g}) {check.title}")
        lines += [f"    {why}"] if why else []
    if printed:
        lines.append(f"printed: {printed}")
    return dict(number=task, name=f"{task} {known.tasks[task]}", score=score, max_score=known.points(task),
                output="\n".join(lines))


ODD_IMPORTS = {"tutorials", "instructor", "remote", "child", "ctypes", "subprocess", "socket", "signal", "multiprocessing",
               "importlib", "inspect", "gc", "pickle", "builtins"}
ODD_NAMES = {"exec", "eval", "compile", "open", "__import__", "globals", "vars"}
ODD_ATTRIBUTES = {"fork", "kill", "killpg", "system", "_exit", "setsid", "_getframe", "settrace", "__globals__", "__subclasses__",
                  "__closure__", "__code__", "__dict__", "__reduce__"}


def suspicious(path):
    """Lines that no assignment needs, for a person to look at: ["line 3: ctypes", ...].  No proof, and easily hidden from."""
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ["cannot be parsed"]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            found |= {(node.lineno, part) for name in names for part in name.split(".") if part in ODD_IMPORTS}
        elif isinstance(node, ast.Name) and node.id in ODD_NAMES:
            found.add((node.lineno, node.id))
        elif isinstance(node, ast.Attribute) and node.attr in ODD_ATTRIBUTES:
            found.add((node.lineno, node.attr))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "/proc" in node.value:
            found.add((node.lineno, "/proc"))
    return [f"line {line}: {name}" for line, name in sorted(found)[:20]]


def find(folder, names):
    """{assignment: its file}; raises UserError where there is nothing to grade."""
    if not Path(folder).is_dir():
        raise UserError(f"no folder {folder}; give one that holds a1.py or another assignment's file")
    if unknown := set(names) - set(NAMES):
        raise UserError(f"no assignment {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    files = {name: Path(folder).resolve() / f"{name}.py" for name in names}
    return {name: path for name, path in files.items() if path.is_file() and not path.is_symlink()}     # a link may lead anywhere


def results(tests, seconds, hidden, odd=()):
    """Gradescope's format; hidden: students see the marks of a task and not what failed.  odd: for the staff's eyes."""
    shown = [dict(t, status="passed" if t["score"] == t["max_score"] else "failed", visibility="visible",
                  output="hidden test: see the public ones for what is asked" if hidden else t["output"]) for t in tests]
    if odd:
        shown.append(dict(number="staff", name="look at these lines", score=0, max_score=0, output="\n".join(odd),
                          status="passed", visibility="hidden"))
    return dict(score=sum(t["score"] for t in tests), execution_time=round(seconds), visibility="visible",
                stdout_visibility="hidden", tests=shown)


def marks(folder, names, seed):
    """{assignment: its tasks' marks} of one submission; a missing file scores 0.  And what is odd in its files."""
    files, found, odd = find(folder, names), {}, []
    for name in names:
        known = assignment(name)
        missing = [dict(number=t, name=f"{t} {title}", score=0, max_score=known.points(t), output=f"{name}.py is missing")
                   for t, title in known.tasks.items()]
        found[name] = grade(name, files[name], seed) if name in files else missing
        odd += [f"{name}.py {line}" for line in suspicious(files[name])] if name in files else []
    return found, odd


def table(folder, names, seed, out):
    """grades.csv of all folders in `folder`: student, marks per task, total, note."""
    students = sorted(p for p in Path(folder).iterdir() if p.is_dir() and p.name[0] != ".")
    if not students:
        raise UserError(f"{folder} holds no folders; --csv wants one for each student")
    tasks = [task for name in names for task in assignment(name).tasks]
    with open(out, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["student", *tasks, "total", "note"])
        for student in students:
            found, odd = marks(student, names, seed)
            score = {t["number"]: t["score"] for tests in found.values() for t in tests}
            missing = [f"{name}.py is missing" for name in names if name not in find(student, names)]
            row = [f"{score[task]:g}" for task in tasks]
            writer.writerow([student.name, *row, f"{sum(score.values()):g}", "; ".join([*missing, *odd])])
            file.flush()                                          # an interrupted run keeps what it has
            print(f"{sum(score.values()):5g}  {student.name}" + (f"  (look: {'; '.join(odd)})" if odd else ""))


def secret(args):
    """The seed: of a file, so that it stands on no command line, which every process may read."""
    if args.seed_file is None:
        return args.seed
    try:
        return number(0, 2**63 - 1)(Path(args.seed_file).read_text().strip())
    except (OSError, ValueError, argparse.ArgumentTypeError) as e:
        raise UserError(f"--seed-file {args.seed_file}: no file with one whole number") from e


def main(argv=None):
    p = parser("python -m tutorials.grade", __doc__)
    p.add_argument("folder", metavar="DIR")
    p.add_argument("--assignments", default="", help="a1,a3 for example; a missing file scores 0 (default: all files in DIR)")
    p.add_argument("--seed", type=number(0, 2**63 - 1), default=PUBLIC_SEED,
                   help="of the constants; 0 is public, choose another and keep it")
    p.add_argument("--seed-file", metavar="FILE", help="the seed is in this file")
    p.add_argument("--out", help="write results.json there, for Gradescope")
    p.add_argument("--csv", help="DIR holds a folder for each student: write their marks there")
    p.add_argument("--terse", action="store_true", help="results.json does not say what failed")
    args = p.parse_args(argv)
    names = list(dict.fromkeys(n.strip() for n in args.assignments.split(",") if n.strip()))
    for flag, given, end in (("--out", args.out, ".json"), ("--csv", args.csv, ".csv")):
        if given is not None and not given.endswith(end):
            raise UserError(f"{flag} {given!r}: give a name that ends in {end}")
    files, start, seed = find(args.folder, names or NAMES), time.perf_counter(), secret(args)
    if args.csv:
        return table(args.folder, names or NAMES, seed, args.csv)
    if not files and not names:
        raise UserError(f"nothing to grade in {args.folder}: no {', '.join(f'{n}.py' for n in NAMES)}")
    found, odd = marks(args.folder, names or list(files), seed)
    for name, tests in found.items():
        print("\n".join(f"{t['score']:5g} / {t['max_score']:<3g} {t['name']}\n" + indent(t["output"]) for t in tests))
        print(f"{sum(t['score'] for t in tests):5g} / {sum(t['max_score'] for t in tests):<3g} {assignment(name).title}\n")
    if odd:
        print("look at these lines, which no assignment needs: " + "; ".join(odd))
    if args.out:
        write_json(args.out, results(sum(found.values(), []), time.perf_counter() - start, args.terse, odd))


def indent(text):
    return "\n".join("            " + line for line in text.splitlines())


if __name__ == "__main__":
    command(main)

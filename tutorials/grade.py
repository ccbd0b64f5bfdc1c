"""Grade submissions: marks per task on the screen, Gradescope's results.json, and a table of a whole class.

    python -m tutorials.grade DIR                        DIR holds a1.py, a2.py, ...: public checks
    python -m tutorials.grade DIR --seed-file seed --out results.json  hidden checks: the same at other constants
    python -m tutorials.grade DIR --seed-file seed --csv grades.csv    DIR holds a folder for each student

The last one also writes grades_feedback/ beside grades.csv: a text for each student with what the checks said.

Student code never runs in this process (assignments/isolated.py), and no submission can stop the others' grading.
"""

import argparse
import ast
import csv
import time
from pathlib import Path

from nano_dmd.engine.config import number, parser
from nano_dmd.engine.files import UserError, command, note, write_atomic, write_json
from tutorials.assignments.checking import PUBLIC_SEED
from tutorials.assignments.isolated import LARGEST_FILE, Fault, assignment, plain, run_task
from tutorials.assignments.stubs import NAMES, PUBLIC

GRADER = 0.7                                                      # of the marks; the rubric in instructor/README.md has the rest


def grade(name, path, seed):
    """[{number, name, score, max_score, output, fault}] per task of one assignment's file."""
    known = assignment(name)
    return [grade_task(known, task, path, seed) for task in known.tasks]


def unread(known, task, why, printed=""):
    """The marks of a task whose file was not found, not taken or did not load."""
    return dict(number=task, name=f"{task} {known.tasks[task]}", score=0, max_score=known.points(task),
                output=plain(why) + f"\nprinted: {plain(printed)}" * bool(printed), fault=plain(why))


def grade_task(known, task, path, seed):
    try:
        answers, printed = run_task(known.name, task, path, seed)
    except Exception as e:                                        # the grader's own fault, or something new to break it with
        said = f"{known.name}.py was not graded: the grader failed here, tell the staff ({type(e).__name__}: {e})"
        return unread(known, task, " ".join(said.split())[:300])
    if isinstance(answers[0], Fault):
        return unread(known, task, answers[0], printed)
    score, lines = 0, []
    for check, why in zip(known.of(task), answers):
        score += check.points if why is None else 0
        lines.append(f"{'passed' if why is None else 'FAILED'} ({check.points:g}) {check.title}")
        lines += [f"    {why}"] if why else []
    if printed:
        lines.append(f"printed: {printed}")
    return dict(number=task, name=f"{task} {known.tasks[task]}", score=score, max_score=known.points(task),
                output="\n".join(plain(line) for line in lines), fault=None)


ODD_IMPORTS = {"tutorials", "instructor", "remote", "child", "ctypes", "subprocess", "socket", "signal", "multiprocessing",
               "importlib", "inspect", "gc", "pickle", "builtins"}
ODD_NAMES = {"exec", "eval", "compile", "open", "__import__", "globals", "vars"}
ODD_ATTRIBUTES = {"fork", "kill", "killpg", "system", "_exit", "setsid", "_getframe", "settrace", "__globals__", "__subclasses__",
                  "__closure__", "__code__", "__dict__", "__reduce__"}


# What the library has and a task asks for: an import of it earns marks, so a person should see it.
IN_LIBRARY = {"a1": {"WEIGHTS": "A1.3"}, "a3": {"critic_logit_loss": "A3.1", "WEIGHTS": "A3.4"}, "a5": {"FromFlow": "A5.1"},
              "a7": {"augmentation_gradient": "A7.2"}, "a8": {"FromFlow": "A8.1", "ode_step": "A8.4", "guided": "A8.4"}}


def suspicious(path):
    """Lines that no assignment needs, for a person to look at: ["line 3: ctypes", ...].  No proof, and easily hidden from."""
    solved = IN_LIBRARY.get(Path(path).stem, {})
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError):
        return []                                                 # it did not load, or was not graded: that is said
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            found |= {(node.lineno, part) for name in names for part in name.split(".") if part in ODD_IMPORTS}
            if names[0].startswith("nano_dmd"):
                found |= {(node.lineno, f"{n} answers {solved[n]}") for n in names if n in solved}
                found |= {(node.lineno, f"{names[0]}.*") for n in names if n == "*"}
        elif isinstance(node, ast.Name) and node.id in ODD_NAMES:
            found.add((node.lineno, node.id))
        elif isinstance(node, ast.Attribute) and node.attr in ODD_ATTRIBUTES:
            found.add((node.lineno, node.attr))
        elif isinstance(node, ast.Attribute) and node.attr in solved:
            found.add((node.lineno, f"{node.attr} answers {solved[node.attr]}"))
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


def inside(folder, most=2000, deep=10):
    """Files of a submission's folder, relative; without caches, hidden files and what a hand-out puts there.

    Not endless: the first `most` folders, `deep` levels down.
    """
    found, todo = [], [Path(folder)]
    for at in todo:                                               # todo grows meanwhile
        for p in sorted(at.iterdir()):
            if p.name.startswith((".", "__")):
                continue
            if not p.is_dir() or p.is_symlink():
                found.append(str(p.relative_to(folder)))
            elif len(todo) < most and len(p.relative_to(folder).parts) < deep:
                todo.append(p)
    known = {file.format(name=name) for name in NAMES for file in PUBLIC}
    return [p for p in found if p not in known]


def missing(folder, names, held):
    """One sentence: why there is no NAME.py to grade, from the files `held` there instead."""
    wanted, why = [f"{name}.py" for name in names], ""
    if any(Path(folder, file).is_symlink() for file in wanted):
        why = "it is a link, and links are not followed"
    elif nested := [h for h in held if Path(h).name in wanted]:
        wanted, why = [Path(nested[0]).name], f"it lies in {nested[0]}, so move it up"
    elif packed := [h for h in held if h.lower().endswith((".zip", ".rar", ".7z", ".tar", ".gz", ".tgz"))]:
        why = f"{packed[0]} is not unpacked"
    elif held:
        why = f"there is {', '.join(held[:3])}; rename what is meant"
    elif not any(Path(folder).glob("*")):
        why = "the folder is empty"
    return ", ".join(wanted) + (" is missing" if len(wanted) == 1 else " are missing") + f": {why}" * bool(why)


def others(held, name):
    """Files that may be meant instead of the NAME.py that was graded: a sentence in a list, or none."""
    alike = [h for h in held if Path(h).stem.lower().startswith(name) and h.lower().endswith((".py", ".ipynb", ".zip"))]
    return [f"{name}.py was graded, and there is {', '.join(alike[:3])}"] * bool(alike)


def visible(task, hidden):
    """What the student reads about a task; hidden: not what failed, but that the file was not found or did not load."""
    return (task["fault"] or "hidden test: see the public ones for what is asked") if hidden else task["output"]


def results(tests, seconds, hidden, odd=()):
    """Gradescope's format; hidden: students see the marks of a task and not what failed.  odd: for the staff's eyes."""
    shown = [dict(t, status="passed" if t["score"] == t["max_score"] else "failed", visibility="visible",
                  output=visible(t, hidden)) for t in tests]
    for t in shown:
        del t["fault"]                                            # Gradescope does not know it
    if odd:
        shown.append(dict(number="staff", name="look at what no assignment needs", score=0, max_score=0, output="\n".join(odd),
                          status="passed", visibility="hidden"))
    return dict(score=sum(t["score"] for t in tests), execution_time=round(seconds), visibility="visible",
                stdout_visibility="hidden", tests=shown)


def marks(folder, names, seed):
    """{assignment: its tasks' marks} of one submission; a missing file scores 0.  And what is odd in its files."""
    files, held, found, odd = find(folder, names), inside(folder), {}, []
    for name in names:
        path, known = files.get(name), assignment(name)
        if path and (size := path.stat().st_size) < LARGEST_FILE:
            found[name] = grade(name, path, seed)
            odd += [f"{name}.py {line}" for line in suspicious(path)] + others(held, name)
        else:
            why = f"{name}.py was not graded: it has {size / 2**20:.1f} MiB, 1 is the most" if path else missing(
                folder, [name], held)
            found[name] = [unread(known, task, why) for task in known.tasks]
    return found, odd


def as_text(found, hidden=False):
    """The marks of one submission for reading: each task with what its checks said, and each assignment's sum."""
    lines, told = [], set()
    for name, tests in found.items():
        for t in tests:
            lines += [f"{t['score']:5g} / {t['max_score']:<3g} {t['name']}"]
            lines += [indent(visible(t, hidden))] * (t["fault"] not in told)            # a fault of the file: once, not per task
            told |= {t["fault"]} - {None}
        total, full = (sum(t[key] for t in tests) for key in ("score", "max_score"))
        lines += [f"{total:5g} / {full:<3g} {assignment(name).title}", ""]
    return "\n".join(lines)


def table(folder, names, seed, out, hidden):
    """grades.csv of all folders in `folder`: student, marks per task, total, marks, note; and a text for each student."""
    if Path(folder).resolve() in Path(out).resolve().parents:
        raise UserError(f"--csv {out} lies in {folder}, among the submissions; give a place outside it")
    held = sorted(p for p in Path(folder).iterdir() if not p.name.startswith((".", "__")))
    if not any(p.is_dir() for p in held):
        raise UserError(f"{folder} holds no folders; --csv wants one for each student, with the file directly in it")
    names = names or sorted({name for p in held if p.is_dir() for name in find(p, NAMES)})
    if not names:
        raise UserError(f"no folder in {folder} has a file to grade; name what was due: --assignments a1 for example")
    tasks = [task for name in names for task in assignment(name).tasks]
    feedback = Path(out).with_name(Path(out).stem + "_feedback")
    feedback.mkdir(parents=True, exist_ok=True)
    with open(out, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["student", *tasks, "total", "marks", "note"])
        for student in held:
            try:
                row, notes = graded(student, names, seed, feedback, hidden)
            except Exception as e:                                # no submission stops the others' grading
                row, notes = None, [f"not graded: the grader failed here, tell the staff ({type(e).__name__}: {e})"[:300]]
            row = row or [*[""] * len(tasks), "-", ""]
            name, said = (plain(text).replace("\n", "\\n") for text in (student.name, "; ".join(notes)))
            writer.writerow(["'" * (name[0] in "=+-@") + name, *row, said])               # ' : no formula of a spreadsheet
            file.flush()                                          # an interrupted run keeps what it has
            print(f"{row[-2]:>5}  {name}" + f"  ({said})" * bool(said))
    print(f"{out} has the marks, {feedback}/ a text for each student")


def graded(student, names, seed, feedback, hidden):
    """(the numbers of one row of grades.csv, or None; its notes); writes the student's text."""
    if student.is_symlink() or not student.is_dir():
        return None, ["not graded: this is " + ("a link" if student.is_symlink() else "no folder; unpack or move it into one")]
    found, odd = marks(student, names, seed)
    tests = sum(found.values(), [])
    write_atomic(feedback / f"{student.name}.txt", as_text(found, hidden).encode())
    total = sum(t["score"] for t in tests)
    faults = dict.fromkeys(t["fault"] for t in tests if t["fault"])
    return [*(f"{t['score']:g}" for t in tests), f"{total:g}", f"{GRADER * total:g}"], [*faults, *odd]


def seed_of(path):
    """The hidden seed in a file, so that it stands on no command line, which every process may read."""
    try:
        return number(1, 2**63 - 1)(Path(path).read_text(encoding="utf-8").strip())
    except (OSError, ValueError, argparse.ArgumentTypeError) as e:
        raise UserError(f"--seed-file {path}: {getattr(e, 'strerror', None) or e}; "
                        f"it must hold one whole number above 0, for 0 has the public constants") from e


def main(argv=None):
    p = parser("python -m tutorials.grade", __doc__)
    p.add_argument("folder", metavar="DIR")
    p.add_argument("--assignments", default="", help="a1,a3 for example; a missing file scores 0 (default: those in DIR)")
    seed = p.add_mutually_exclusive_group()
    seed.add_argument("--seed", type=number(0, 2**63 - 1), default=PUBLIC_SEED,
                      help="of the constants; 0 is public, choose another and keep it")
    seed.add_argument("--seed-file", metavar="FILE", help="the seed is in this file")
    to = p.add_mutually_exclusive_group()
    to.add_argument("--out", help="write results.json there, for Gradescope")
    to.add_argument("--csv", help="DIR holds a folder for each student: write their marks there, and texts for them beside it")
    p.add_argument("--terse", action="store_true", help="results.json and the texts do not say which checks failed")
    args = p.parse_args(argv)
    names = list(dict.fromkeys(n.strip() for n in args.assignments.split(",") if n.strip()))
    for flag, given, end in (("--out", args.out, ".json"), ("--csv", args.csv, ".csv")):
        if given is not None and not given.endswith(end):
            raise UserError(f"{flag} {given!r}: give a name that ends in {end}")
    if args.terse and not (args.out or args.csv):
        raise UserError("--terse is about what students read: it needs --out or --csv")
    start, seed = time.perf_counter(), args.seed if args.seed_file is None else seed_of(args.seed_file)
    files = find(args.folder, names or NAMES)
    if seed == PUBLIC_SEED and (args.csv or args.out):
        note("these marks are for the public constants, which students know; --seed-file takes others")
    if args.csv:
        return table(args.folder, names, seed, args.csv, args.terse)
    if not files and not names:
        raise UserError(f"nothing to grade in {args.folder}: {plain(missing(args.folder, NAMES, inside(args.folder)))} "
                        "(folders of a whole class need --csv)")
    found, odd = marks(args.folder, names or list(files), seed)
    print(as_text(found))
    if odd:
        print("look at what no assignment needs: " + "; ".join(odd))
    if args.out:
        write_json(args.out, results(sum(found.values(), []), time.perf_counter() - start, args.terse, odd))


def indent(text):
    return "\n".join("            " + line for line in text.splitlines())


if __name__ == "__main__":
    command(main)

"""The course kit: a hand-out for students, and an autograder for Gradescope.

    python -m tutorials.course --to DIR [--assignments a1,a3]            a new folder with everything that students need
    python -m tutorials.course --to DIR [--assignments a3] --update      bring what has changed since, keep students' work
    python -m tutorials.course --autograder a1.zip [--seed-file seed]    what Gradescope asks for
    python -m tutorials.course --try a1                                  the solution must earn 100 marks here

A hand-out is a folder without history and without solutions: library, grader, and for each assignment its text, starter,
public tests and the notebooks before it.  A whole class is graded by python -m tutorials.grade FOLDER --csv grades.csv.
"""

import re
import secrets
import zipfile
from pathlib import Path

from nano_dmd.engine.cache import digest
from nano_dmd.engine.config import number, parser
from nano_dmd.engine.files import UserError, command, read_json, write_atomic, write_json
from tutorials import grade
from tutorials.assignments.stubs import HERE, NAMES, PUBLIC, SOLUTIONS

ROOT = HERE.parents[1]
MANIFEST = ".handout.json"                                        # {file: the digest of what was handed out}
COMMON = ("LICENSE", "nano_dmd/**/*.py", "nano_dmd/assets/*", "toy/*.py", "tutorials/__init__.py", "tutorials/grade.py",
          "tutorials/assignments/*.py")

NOTEBOOKS = {"a1": ("00", "01"), "a2": ("02", "03"), "a3": ("04",), "a4": ("06",), "a5": ("05",), "a6": ("12",),
             "a7": ("08", "11", "13"), "a8": ("11", "15")}              # of the week plan in instructor/README.md

START = """# Assignments

Install once, in this folder. Without a GPU, take the small torch first:

    pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu
    pip install -e ".[tutorials]" pytest

Read the notebooks in `tutorials/` first: `jupyter lab tutorials`. They check your predictions and exercises; no marks depend on
that. Their outputs are in the files: predict before you scroll. Links to files that are not here (docs/, tests, other
notebooks) lead nowhere. Notebooks 08 and 11, if you have them, also want `pip install -e ".[sd]"`.

Then, for each assignment, `{name}` for example: read `README.md` in its folder, write your code into `{name}.py`, and look
how far you are:

    cd {name}                            # here, too, run scripts of your own
    pytest test_public.py                # all tests; -k {upper}_2 runs one task
    python -m tutorials.grade .          # your points at the public constants, up to 100

You are graded by the same checks at other constants. The grader runs your code in a process of its own, without network
and without other files. A function that a task gives you is then asked through that process: torch.autograd works through
it as usual, torch.func (vmap, jvp) does not. Work on copies of your arguments; never change them in place.

You may import what `nano_dmd` has. Where it has a task's answer (h(r) of A1.3), write your own: such an import is reported.

Hand in `{name}.py` itself, with this name and in no folder, and one PDF with your predictions, your figure and your report.
"""

SETUP = """#!/usr/bin/env bash
# Gradescope runs this once, when it builds the image.
set -euo pipefail
base="${AUTOGRADER:-/autograder}"
cd "$base/source"
if [ ! -x "$base/env/bin/python" ]; then
    apt-get update && apt-get install -y python3 python3-pip python3-venv
    python3 -m venv "$base/env"
    "$base/env/bin/pip" install torch --index-url https://download.pytorch.org/whl/cpu
    "$base/env/bin/pip" install numpy safetensors tqdm matplotlib
fi
"$base/env/bin/python" -m tutorials.course --try NAMES            # the build fails where the solution does not earn 100
rm -r tutorials/assignments/instructor                            # from here on there is nothing to be found
chmod 600 seed
"""

RUN = """#!/usr/bin/env bash
# Gradescope runs this for each submission.
base="${AUTOGRADER:-/autograder}"
mkdir -p "$base/results"
rm -f "$base/results/results.json"
cd "$base/source"
"$base/env/bin/python" -m tutorials.grade "$base/submission" --assignments NAMES --seed-file seed \\
    --out "$base/results/results.json" --terse
if [ ! -f "$base/results/results.json" ]; then
    echo '{"score": 0, "output": "The grader itself failed. Please tell the course staff."}' > "$base/results/results.json"
fi
"""


def pyproject():
    """The library's, without what only its own tests need."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.split(r"^\[tool\.pytest", text, flags=re.M)[0].replace('readme = "README.md"\n', "")


def library():
    """{file: bytes} of library and grader: no solutions, no checks."""
    found = {str(p.relative_to(ROOT)): p.read_bytes() for pattern in COMMON for p in sorted(ROOT.glob(pattern)) if p.is_file()}
    return found | {"pyproject.toml": pyproject().encode()}


def checks(name):
    return {f"tutorials/assignments/{name}/{file}": (HERE / name / file).read_bytes() for file in ("__init__.py", "checks.py")}


def folder(name):
    """{file: bytes} of what a student sees of an assignment."""
    return {f"{name}/{file}": (HERE / name / file).read_bytes() for file in (f.format(name=name) for f in PUBLIC)}


def notebooks(name):
    """{file: bytes} of the notebooks before an assignment, and of what they import.  Their answers are no assignment's."""
    found = [p for number in NOTEBOOKS[name] for p in (ROOT / "tutorials").glob(f"{number}_*.ipynb")]
    return {f"tutorials/{p.name}": p.read_bytes() for p in [*found, ROOT / "tutorials/show.py", ROOT / "tutorials/answers.py"]}


# ---- the hand-out


def hand_out(to, names, update):
    """Write the files of a hand-out below `to`, and nothing else.  Returns what was done, a line for each file or kind."""
    files = {}
    for name in names:
        files |= folder(name) | checks(name) | notebooks(name)
    manifest = read_manifest(to) if update else {}
    if not update and to.exists():
        raise UserError(f"{to} exists already; give a new folder, or --update to bring a hand-out up to date")
    if not update or set(names) >= {n for n in NAMES if f"{n}/README.md" in manifest}:
        files |= library() | {"README.md": START.format(name=names[0], upper=names[0].upper()).encode()}
    said = [bring(to, name, content, manifest) for name, content in sorted(files.items())]
    write_json(to / MANIFEST, manifest)
    return [line for line in said if line]


def read_manifest(to):
    try:
        return read_json(to / MANIFEST, {str: str})
    except (OSError, UserError) as e:
        raise UserError(f"{to} has no readable {MANIFEST}: --update is for a folder that --to has made") from e


def bring(to, name, content, manifest):
    """Write one file, unless somebody has changed it since it was handed out; a line to print, or None."""
    path, new = to / name, digest(content)
    if not all(p.resolve().is_relative_to(to.resolve()) for p in (path, path.with_name(path.name + ".new"))):
        return f"left     {name}: it leads out of {to}"
    if path.exists() and path.is_file() and (now := digest(path.read_bytes())) != manifest.get(name) and now != new:
        if manifest.get(name) == new:
            return None                                           # a student's work, and nothing new to bring
        write_atomic(path.with_name(path.name + ".new"), content)
        return f"left     {name}: it has been changed; the new version is {name}.new"
    known, before = manifest.get(name), path.exists()
    manifest[name] = new
    if before and known == new:
        return None
    write_atomic(path, content)
    return f"{'updated' if before else 'new':8} {name}"


# ---- the autograder


def solutions(name):
    if not SOLUTIONS.is_dir():
        raise UserError(f"there is no {SOLUTIONS.name}/ here: an autograder is made where the solutions are")
    files = [SOLUTIONS / "__init__.py", *sorted((SOLUTIONS / name).glob("*.py"))]
    return {str(p.relative_to(ROOT)): p.read_bytes() for p in files}


def autograder(to, names, seed):
    """Write Gradescope's zip: setup.sh and run_autograder on top, library, grader, checks, solutions and the seed."""
    files = library() | {"tutorials/course.py": Path(__file__).read_bytes(), "seed": f"{seed}\n".encode()}
    for name in names:
        files |= folder(name) | checks(name) | solutions(name)
        files |= {f"tutorials/assignments/{name}/{name}.py": (HERE / name / f"{name}.py").read_bytes()}
    for name, text in (("setup.sh", SETUP), ("run_autograder", RUN)):
        files[name] = text.replace("NAMES", ",".join(names)).encode()
    with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in sorted(files.items()):
            info = zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0))
            info.external_attr = (0o755 if name in ("setup.sh", "run_autograder") else 0o644) << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            packed.writestr(info, content)


def attempt(names, seed):
    """Grade the solutions: a grader that does not give them full marks is not set up."""
    for name in names:
        path = SOLUTIONS / name / "solution.py"
        if not path.is_file():
            raise UserError(f"there is no solution of {name} here")
        found = grade.grade(name, path, seed)
        if lost := [f"{t['number']}: {t['output']}" for t in found if t["score"] < t["max_score"]]:
            raise UserError(f"the solution of {name} loses marks here; {lost[0]}")
        print(f"{name}: the solution earns {sum(t['score'] for t in found):g} of 100")


def chosen(text, otherwise):
    names = list(dict.fromkeys(n.strip() for n in text.split(",") if n.strip())) or otherwise
    if unknown := set(names) - set(NAMES):
        raise UserError(f"no assignment {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    return names


def main(argv=None):
    p = parser("python -m tutorials.course", __doc__)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--to", metavar="DIR", help="the folder of the hand-out")
    what.add_argument("--autograder", metavar="ZIP", help="a name such as a1.zip")
    what.add_argument("--try", dest="attempt", metavar="NAMES", help="grade the solutions of a1,a3 for example")
    p.add_argument("--assignments", default="", help="a1,a3 for example (default: all; for a1.zip: a1)")
    p.add_argument("--update", action="store_true", help="DIR is a hand-out already")
    seed = p.add_mutually_exclusive_group()
    seed.add_argument("--seed", type=number(1, 2**63 - 1), help="of the autograder's constants (default: drawn at random)")
    seed.add_argument("--seed-file", metavar="FILE", help="the autograder's seed is in this file, as for tutorials.grade")
    args = p.parse_args(argv)
    for flag, given, goes in (("--update", args.update, args.to), ("--assignments", args.assignments, args.attempt is None),
                              ("--seed", args.seed, args.autograder), ("--seed-file", args.seed_file, args.autograder)):
        if given and not goes:
            raise UserError(f"{flag} does nothing here: --update goes with --to, a seed with --autograder, and --try takes names")
    if args.attempt is not None:
        return attempt(chosen(args.attempt, list(NAMES)), 20260101)
    if args.to:
        to = Path(args.to)
        held = read_manifest(to) if args.update else {f"{n}/README.md": "" for n in NAMES}
        known = [n for n in NAMES if f"{n}/README.md" in held]
        said = hand_out(to, chosen(args.assignments, known), args.update)
        print("\n".join(said) if args.update else f"{to}: {len(said)} files" if said else "")
        return print("nothing has changed") if args.update and not said else None
    if not args.autograder.endswith(".zip"):
        raise UserError(f"--autograder {args.autograder!r}: give a name that ends in .zip")
    if Path(args.autograder).exists():
        raise UserError(f"{args.autograder} exists already; give a new name")
    guess = Path(args.autograder).stem
    names = chosen(args.assignments, [guess] if guess in NAMES else [])
    if not names:
        raise UserError(f"which assignment is {args.autograder}? Call it a1.zip, or say --assignments a1")
    seed = grade.seed_of(args.seed_file) if args.seed_file is not None else args.seed or secrets.randbelow(2**62) + 1
    autograder(args.autograder, names, seed)
    print(f"{args.autograder}: {', '.join(names)}; its seed is in the file `seed` inside. Keep the zip from students.")


if __name__ == "__main__":
    command(main)

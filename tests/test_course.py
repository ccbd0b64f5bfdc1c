"""The course kit: what students get, what Gradescope gets, and submissions that want marks for nothing."""

import contextlib
import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch

from nano_dmd.engine.files import UserError, note
from test_assignments import needs_solutions, solution
from tutorials import course, grade
from tutorials.assignments import isolated, stubs
from tutorials.assignments.isolated import Fault, assignment, plain, run_task

ROOT = Path(__file__).parents[1]
SEED = 31415926535


# ---- the hand-out


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def handed(tmp_path):
    course.main(["--to", str(tmp_path / "course"), "--assignments", "a1,a3"])
    return tmp_path / "course"


def environment(path):
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


@needs_solutions
def test_a_hand_out_holds_no_solutions(handed):
    """No instructor/, no text of a solution, no other assignment, no history."""
    found = files(handed)
    assert not [name for name in found if "instructor" in name or "solution" in name or ".git" in name]
    assert {name[:2] for name in found if name[:1] == "a"} == {"a1", "a3"}
    secret = [line.strip() for name in stubs.NAMES for region in stubs.REGION.finditer(solution(name))
              for line in region[0].splitlines()[1:-1] if len(line.strip()) > 45]
    everything = "\n".join(text.decode() for name, text in found.items() if name.startswith(("a1", "a3", "tutorials")))
    assert len(secret) > 100 and not [line for line in secret if line in everything]


@needs_solutions
def test_the_week_plan_counts_right():
    """Words and lines to 7 %, and the minutes that follow from them by the plan's rule, to ten."""
    rows = re.findall(r"^\| \d \| ([\d, ]+) \|[^|]*\| A(\d) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$",
                      (course.HERE / "instructor" / "README.md").read_text(), re.M)
    assert len(rows) == 8
    for numbers, week, *plan in rows:
        assert tuple(numbers.split(", ")) == course.NOTEBOOKS[f"a{week}"]
        paths = [next((course.ROOT / "tutorials").glob(f"{number}_*.ipynb")) for number in numbers.split(", ")]
        cells = [cell for path in paths for cell in json.loads(path.read_text())["cells"]]
        texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        solved = re.findall(r"### BEGIN SOLUTION.*?\n(.*?)### END", solution(f"a{week}"), re.S)
        words = sum(len(t.split()) for t in [*texts, (course.HERE / f"a{week}" / "README.md").read_text()])
        read, write = (sum(bool(line.strip()) for t in part for line in t.splitlines()) for part in (code, solved))
        assert [int(v) for v in plan[:3]] == pytest.approx([words, read, write], rel=0.07)
        assert abs(int(plan[3]) - (words / 100 + read / 10 + 2 * write + 30)) < 10


def test_a_hand_out_needs_nothing_else(handed):
    """Its public tests and its grader run from it alone, in a process that does not know this repository."""
    for argv, said in ((["-m", "pytest", "-q", "-p", "no:cacheprovider", "test_public.py", "-k", "A1_4"], "not done yet: A1.4"),
                       (["-m", "tutorials.grade", "."], "0 / 100")):
        done = subprocess.run([sys.executable, *argv], cwd=handed / "a1", env=environment(handed), capture_output=True, text=True)
        assert said in done.stdout and "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr


def test_handing_out_changes_nothing_here(tmp_path, monkeypatch):
    """A student's work in the repository's own a1.py stays, whichever command copies (it was overwritten once)."""
    work = stubs.HERE / "a1" / "a1.py"
    copy = tmp_path / "assignments"
    shutil.copytree(stubs.HERE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(course, "HERE", copy), monkeypatch.setattr(stubs, "SOLUTIONS", copy / "instructor")
    (copy / "a1" / "a1.py").write_text(work.read_text() + "# my work\n")
    before = files(copy)
    course.main(["--to", str(tmp_path / "one")])
    assert files(copy) == before
    shutil.rmtree(copy / "instructor", ignore_errors=True)        # a FileNotFoundError once
    with pytest.raises(UserError, match="starters are written from solutions"):
        stubs.main([])


def test_work_is_not_overwritten(handed, tmp_path):
    with pytest.raises(UserError, match="exists already"):
        course.main(["--to", str(handed)])
    with pytest.raises(UserError, match="--update is for a folder that --to has made"):
        course.main(["--to", str(tmp_path / "nowhere"), "--update"])
    assert not (tmp_path / "nowhere").exists()


def test_a_late_change_of_one_assignment(handed, monkeypatch, capsys):
    """Unchanged files are brought up to date; a student's own stays, with the new version beside it; a3 is not touched."""
    folder = course.folder
    (handed / "a1" / "a1.py").write_text("mine\n")
    monkeypatch.setattr(course, "folder", lambda name: {k: v + b"\n# late\n" for k, v in folder(name).items()})
    before = files(handed)
    course.main(["--to", str(handed), "--assignments", "a1", "--update"])
    after, printed = files(handed), capsys.readouterr().out
    changed = {k for k in after if after[k] != before.get(k)}
    assert changed == {"a1/README.md", "a1/test_public.py", "a1/a1.py.new", ".handout.json"}
    assert after["a1/a1.py"] == b"mine\n" and after["a1/a1.py.new"].endswith(b"# late\n")
    assert "updated  a1/README.md" in printed and "left     a1/a1.py: it has been changed" in printed
    course.main(["--to", str(handed), "--update"])                # all that it holds
    assert files(handed)["a3/README.md"].endswith(b"# late\n") and (handed / "a1" / "a1.py").read_text() == "mine\n"
    assert not (handed / "a2").exists()


def test_an_update_stays_inside(handed, tmp_path):
    """A link in the folder does not lead the update out of it."""
    outside = tmp_path / "outside.md"
    outside.write_text("not yours")
    (handed / "a1" / "README.md").unlink()
    (handed / "a1" / "README.md").symlink_to(outside)
    course.main(["--to", str(handed), "--update"])
    assert outside.read_text() == "not yours"


@pytest.mark.parametrize("argv, said", [
    (["--to", "x", "--assignments", "a9"], "no assignment a9"), (["--autograder", "a1.tar"], "ends in .zip"),
    (["--autograder", "week1.zip"], "which assignment is week1.zip"), (["--try", "b1"], "no assignment b1"),
    (["--try", "a1", "--update"], "--update does nothing here"), (["--to", "x", "--seed", "3"], "--seed does nothing here"),
    (["--try", "a1", "--assignments", "a2"], "--assignments does nothing here"),
    (["--to", "x", "--seed-file", "s"], "--seed-file does nothing here"),
    (["--autograder", "a1.zip", "--seed-file", "none"], "--seed-file none: No such file"),
    (["--autograder", "a1.zip", "--seed", "0"], "must be at least 1")])
def test_bad_input_is_one_sentence(argv, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        course.main(argv)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "0", "1 2", "\xe9", None])
def test_seed_of_a_file(text, tmp_path):
    """The seed may come from a file; what is no number above 0 is one sentence.  0 was taken once, which is public."""
    if text is not None:
        (tmp_path / "seed").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="it must hold one whole number above 0"):
        grade.main([str(tmp_path), "--assignments", "a1", "--seed-file", str(tmp_path / "seed")])


@needs_solutions
def test_the_autograder_takes_the_seed_of_the_class(tmp_path):
    (tmp_path / "seed").write_text(f"{SEED}\n")
    course.main(["--autograder", str(tmp_path / "a1.zip"), "--seed-file", str(tmp_path / "seed")])
    with zipfile.ZipFile(tmp_path / "a1.zip") as packed:
        assert int(packed.read("seed")) == SEED


# ---- the texts agree


def rubric():
    return {k: int(v) for k, v in re.findall(r"^\| ([a-z][a-z ]+) \| (\d+) \|", read("instructor/README.md"), re.M)}


def read(name):
    return (stubs.HERE / name).read_text(encoding="utf-8")


@needs_solutions
def test_a_hand_out_has_the_notebooks_of_its_week(handed):
    """Those of the week plan, with what they import: answers of notebooks earn no marks."""
    assert {p.name[:2] for p in handed.glob("tutorials/*.ipynb")} == {"00", "01", "04"}
    assert (handed / "tutorials" / "show.py").is_file() and (handed / "tutorials" / "answers.py").is_file()
    weeks = re.findall(r"^\| \d \| (.*?) \|.*\| A(\d) \|", read("instructor/README.md"), re.M)
    assert {f"a{n}": tuple(re.findall(r"\d\d", before)) for before, n in weeks} == course.NOTEBOOKS
    table = re.findall(r"^\| \[A(\d)\].*\| ([\d, ]+) \| about", read("README.md").replace("| 3 hours", "| about 3 hours"), re.M)
    assert {f"a{n}" for n, _ in table} == set(stubs.NAMES)
    assert all(set(before.split(", ")) <= set(course.NOTEBOOKS[f"a{n}"]) for n, before in table)


@needs_solutions
@pytest.mark.parametrize("name", stubs.NAMES)
def test_hand_outs_agree_with_the_rubric(name):
    """What is marked is not called ungraded, and the marks are the rubric's; they were said to be none once."""
    text, marks = read(f"{name}/README.md"), rubric()
    assert not re.search(r"ungraded|not graded", text) and sum(marks.values()) == 100
    said = " ".join(text.split())
    assert f"The grader prints up to 100 points. They make {marks['grader']} of 100 marks." in said
    assert re.findall(r"by hand: (\d+) for the predictions .*?, (\d+) for the figure, (\d+) for the report or discussion, "
                      r"(\d+) for ten minutes of questions", said) == [tuple(str(n) for n in list(marks.values())[1:])]
    assert grade.GRADER == marks["grader"] / 100


def test_one_way_to_install():
    """Every hand-out sends to the README above it, which has the line in the hand-out and in the repository."""
    blocks = {re.search(r"Install once, .*?```bash\n.*?```\n", read(f"{name}/README.md"), re.S)[0].replace(name.upper(), "A?")
              for name in stubs.NAMES}
    assert len(blocks) == 1 and "[../README.md](../README.md)" in blocks.pop()
    assert not [name for name in stubs.NAMES if "pip install" in read(f"{name}/README.md")]
    line = 'pip install -e ".[tutorials]" pytest'
    assert line in course.START and line in read("README.md") and "\ntutorials = [" in course.pyproject()


# ---- Gradescope's zip


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory):
    """A fresh virtual environment with what setup.sh installs, as links to the packages here, and nothing else."""
    env = tmp_path_factory.mktemp("gradescope") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    site, = env.glob("lib/python*/site-packages")
    here = Path(torch.__file__).parents[1]
    for name in ("torch", "torchgen", "functorch", "numpy", "numpy.libs", "safetensors", "tqdm", "typing_extensions.py", "sympy",
                 "mpmath", "networkx", "jinja2", "markupsafe", "filelock", "fsspec", "nvidia", "triton", "setuptools"):
        if (here / name).exists():
            (site / name).symlink_to(here / name)
    return env.parent


@pytest.mark.slow
@needs_solutions
def test_gradescope(empty_environment, tmp_path):
    """setup.sh tries the solution and removes it; run_autograder writes results.json for work, for none, and for a cheat."""
    base = empty_environment
    course.main(["--autograder", str(tmp_path / "a1.zip")])
    with zipfile.ZipFile(tmp_path / "a1.zip") as packed:
        assert {"setup.sh", "run_autograder", "seed"} <= set(packed.namelist())
        assert all(packed.getinfo(n).external_attr >> 16 == 0o755 for n in ("setup.sh", "run_autograder"))
        packed.extractall(base / "source")
    env = {"PATH": os.environ["PATH"], "AUTOGRADER": str(base), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", base / "source" / "setup.sh"], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "the solution earns 100" in done.stdout, done.stdout + done.stderr
    assert not list((base / "source").rglob("solution.py"))
    for text, score in ((solution("a1"), 100), (None, 0), ("from tutorials.assignments.instructor.a1.solution import *", 0)):
        shutil.rmtree(base / "submission", ignore_errors=True)
        (base / "submission").mkdir()
        if text:
            (base / "submission" / "a1.py").write_text(text)
        subprocess.run(["bash", base / "source" / "run_autograder"], env=env, capture_output=True, text=True, cwd=tmp_path)
        found = json.loads((base / "results" / "results.json").read_text())
        assert found["score"] == score and found["stdout_visibility"] == "hidden", found
        assert {t["number"] for t in found["tests"]} - {"staff"} == set(assignment("a1").tasks)
        assert all(t["visibility"] == "hidden" and t["max_score"] == 0 for t in found["tests"] if t["number"] == "staff")
    assert any("tutorials" in t["output"] for t in found["tests"] if t["number"] == "staff")


# ---- submissions that want marks for nothing


FRAME = b'{"done": null, "graph": [], "state": {}, "new": [], "rng": null, "fault": null}'
SOCKETS = """import os, stat, struct
def sockets():
    for fd in range(3, 200):
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                yield fd
        except OSError:
            pass
"""
CHEATS = {
    "imports the solution": "from tutorials.assignments.instructor.a1.solution import *",
    "runs the solution's file": f"exec(open({str(stubs.SOLUTIONS / 'a1' / 'solution.py')!r}).read())",
    "looks for the solution from the grader's folder": """
import os, glob
for root in [f"/proc/{os.getppid()}/cwd", "/proc/1/cwd", "..", "../..", "/tmp", "/"]:
    for path in glob.glob(root + "/**/instructor/a1/solution.py", recursive=True)[:1]:
        exec(open(path).read())""",
    "reads the library's environment for a way out": """
import sys, nano_dmd
from pathlib import Path
for p in [*sys.path, str(Path(nano_dmd.__file__).parents[1])]:
    if Path(p, "tutorials/assignments/instructor/a1/solution.py").exists():
        exec(Path(p, "tutorials/assignments/instructor/a1/solution.py").read_text())""",
    "replaces the checks": """
import sys, types
for name in ("tutorials", "tutorials.assignments", "tutorials.assignments.checking", "tutorials.assignments.a1.checks"):
    sys.modules[name] = types.ModuleType(name)
import tutorials.assignments.checking as c
c.close = c.holds = c.tensor = lambda *a, **k: None
def __getattr__(name):
    return lambda *a, **k: None""",
    "replaces its side of the protocol": """
import remote
remote.Peer.answer = lambda self, got: dict(done=None, graph=[], node=0)
def __getattr__(name):
    return lambda *a, **k: None""",
    "answers before it is asked": SOCKETS + f"""
for fd in sockets():
    for _ in range(500):
        os.write(fd, struct.pack(">Q", {len(FRAME)}) + {FRAME!r})""",
    "garbage on the socket": SOCKETS + "for fd in sockets(): os.write(fd, os.urandom(4000))",
    "no JSON on the socket": SOCKETS + "for fd in sockets(): os.write(fd, struct.pack('>Q', 9) + b'{not json')",
    "deep JSON on the socket": SOCKETS + "for fd in sockets(): os.write(fd, struct.pack('>Q', 100_000) + b'[' * 100_000)",
    "a message without an end": SOCKETS + "for fd in sockets(): os.write(fd, struct.pack('>Q', 2**62) + b'x')",
    "a tensor of 8 TB": """
import remote
remote.Peer.answer = lambda self, got: dict(done={"tensor": ["float64", [10**6, 10**6], ""]}, graph=[], node=0)""",
    "asks the grader for what is private": """
import remote
def answer(self, got):
    for key in ("p0", "p1", "p2", "c0"):
        for name in ("__globals__", "__class__", "checks", "_peer"):
            self.send(dict(do="get", on=key, name=name))
            self.receive()
    return dict(done=None, graph=[], node=0)
remote.Peer.answer = answer""",
    "os._exit": "import os; os._exit(0)",
    "SystemExit": "raise SystemExit(0)",
    "BaseException": "raise BaseException('nobody catches me')",
    "an endless loop at import": "while True: pass",
    "a memory bomb": "x = [bytearray(10**9) for _ in range(200)]",
    "huge output": "import sys\nwhile True: sys.stdout.write('x' * 10**6)",
    "writes a neighbour's file": "open(NEIGHBOUR, 'w').write('raise SystemExit')",
    "removes a neighbour's file": "import os; os.remove(NEIGHBOUR)",
    "kills the grader": "import os, signal\nfor p in (os.getppid(), GRADER): os.kill(p, signal.SIGKILL)",
    "reads the seed": """
import glob, os
for pid in [os.getppid(), GRADER, "self", *range(1, 300)]:
    for name in ("cmdline", "environ", "mem"):
        try:
            print(pid, name, open(f"/proc/{pid}/{name}", "rb").read(10**6))
        except (OSError, OverflowError):
            pass""",
    "replaces torch's comparisons": """
import torch
torch.allclose = torch.equal = torch.Tensor.__eq__ = torch.Tensor.isfinite = lambda *a, **k: True
torch.Tensor.abs = lambda self: torch.zeros(())
def __getattr__(name):
    return lambda *a, **k: torch.zeros(12)""",
    "equals everything": """
class Yes(float):
    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = lambda *a: True
    __hash__ = None
    shape = property(lambda self: Yes())
def __getattr__(name):
    return lambda *a, **k: Yes()""",
    "makes the question easy": """
import torch
def __getattr__(name):
    def answer(*given, **named):
        for t in given:
            if isinstance(t, torch.Tensor):
                t.data.zero_()
        return given[0]
    return answer""",
    "a pickle": "class P:\n    def __reduce__(self): return (exit, ())\ndef __getattr__(name): return lambda *a, **k: P()",
}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(isolated, "SECONDS", 2)


WALLED = ("runs the solution's file", "looks for the solution from the grader's folder", "writes a neighbour's file",
          "removes a neighbour's file", "kills the grader", "reads the seed", "reads the library's environment for a way out")


@pytest.mark.parametrize("kind, kernel", [(kind, True) for kind in CHEATS] + [(kind, False) for kind in WALLED])
def test_a_cheat_gets_nothing_and_harms_nobody(kind, kernel, tmp_path, quick, monkeypatch):
    """No marks, no end of the grader, the neighbour's file as it was, the seed not seen."""
    monkeypatch.setattr(isolated, "KERNEL", kernel)
    neighbour = tmp_path / "neighbour" / "a1.py"
    for path in (neighbour, tmp_path / "cheat" / "a1.py"):
        path.parent.mkdir()
    neighbour.write_text("honest = 1\n")
    (tmp_path / "cheat" / "a1.py").write_text(f"NEIGHBOUR, GRADER = {str(neighbour)!r}, {os.getpid()}\n{CHEATS[kind]}\n")
    for task in list(assignment("a1").tasks)[::3]:
        answers, printed = run_task("a1", task, tmp_path / "cheat" / "a1.py", SEED)
        assert len(answers) == len(assignment("a1").of(task)) and all(answers), answers
        assert str(SEED) not in printed
    assert neighbour.read_text() == "honest = 1\n"


DAEMON = """
import os, sys, time
if not os.fork():
    os.setsid()
    if not os.fork():
        print("still here:", os.getpid(), flush=True)
        while True:
            time.sleep(1)
time.sleep(0.5)
"""


def test_what_a_task_leaves_running_is_ended(tmp_path, quick):
    """A process in a session of its own too."""
    (tmp_path / "a1.py").write_text(DAEMON)
    _, printed = run_task("a1", "A1.4", tmp_path / "a1.py", SEED)
    pid = int(printed.split("still here:")[1].split()[0])
    with pytest.raises(ProcessLookupError):
        for _ in range(50):
            os.kill(pid, 0)
            time.sleep(0.02)


@needs_solutions
def test_a_class_with_cheats_is_graded_to_the_end(tmp_path, quick, monkeypatch, capsys):
    """grades.csv: who works gets the marks, in whatever company; odd lines are in the note."""
    monkeypatch.setattr(isolated, "SECONDS", 4)
    for i, kind in enumerate(("no JSON on the socket", "os._exit", "kills the grader", "imports the solution")):
        (tmp_path / "class" / f"cheat{i}").mkdir(parents=True)
        (tmp_path / "class" / f"cheat{i}" / "a1.py").write_text(f"NEIGHBOUR, GRADER = '', {os.getpid()}\n{CHEATS[kind]}\n")
    surrogate = "raise ValueError('\\ud800')"                     # json brings it across, no file takes it
    for name, text in (("empty", None), ("work", solution("a1")), ("syntax", "def f(:\n"), ("surrogate", surrogate)):
        (tmp_path / "class" / name).mkdir()
        if text:
            (tmp_path / "class" / name / "a1.py").write_text(text)
    (tmp_path / "seed").write_text(f"{SEED}\n")
    grade.main([str(tmp_path / "class"), "--assignments", "a1", "--seed-file", str(tmp_path / "seed"),
                "--csv", str(tmp_path / "grades.csv")])
    rows = {row["student"]: row for row in csv.DictReader((tmp_path / "grades.csv").open(encoding="utf-8"))}
    assert {name: float(row["total"]) for name, row in rows.items()} == {
        "cheat0": 0, "cheat1": 0, "cheat2": 0, "cheat3": 0, "empty": 0, "work": 100, "syntax": 0, "surrogate": 0}
    assert rows["syntax"]["note"].startswith("a1.py does not load: SyntaxError at a1.py line 1")
    assert rows["cheat1"]["note"].startswith("a1.py does not load: the code ended the whole process")
    assert "No module named 'tutorials'" in rows["cheat3"]["note"] and "ValueError" in rows["surrogate"]["note"]
    assert rows["work"]["marks"] == "70" and rows["work"]["total"] == "100"
    assert rows["empty"]["note"] == "a1.py is missing: the folder is empty" and rows["work"]["note"] == ""
    assert rows["work"]["A1.1"] == "25" and str(SEED) not in capsys.readouterr().out


def test_a_link_is_no_submission(tmp_path):
    """It could lead to the solution, or to a neighbour's file; so could a helper's."""
    (tmp_path / "other.py").write_text("SECRET = 1\n")
    (tmp_path / "me").mkdir()
    (tmp_path / "me" / "a1.py").symlink_to(tmp_path / "other.py")
    assert grade.find(tmp_path / "me", ["a1"]) == {}
    (tmp_path / "me" / "a1.py").unlink()
    (tmp_path / "me" / "a1.py").write_text("from helper import *\n")
    (tmp_path / "me" / "helper.py").symlink_to(tmp_path / "other.py")
    (tmp_path / "me" / "folder.py").mkdir()
    answers, _ = run_task("a1", "A1.4", tmp_path / "me" / "a1.py", SEED)
    assert all("No module named 'helper'" in why for why in answers)


ANSWERS = {"A1.1": ["Laplace is wrong at the seed's constants", None], "A1.2": [None, None]}


@pytest.fixture
def asked(monkeypatch):
    """Checks answer at once: what is tested is what happens around them."""
    note.cache_clear()                                            # it says a thing once
    def answers(name, task, path, seed):
        if "broken" in path.read_text():
            said = Fault("a1.py does not load: SyntaxError at a1.py line 1: invalid syntax")
            return [said] * len(assignment(name).of(task)), ""
        return [*ANSWERS.get(task, []), *[None] * len(assignment(name).of(task))][:len(assignment(name).of(task))], ""
    monkeypatch.setattr(grade, "run_task", answers)


def graded(folder, *flags):
    """{student: row} of a class."""
    out = folder.parent / "grades.csv"
    grade.main([str(folder), "--assignments", "a1", "--seed", str(SEED), "--csv", str(out), *flags])
    return {row["student"]: row for row in csv.DictReader(out.open(encoding="utf-8"))}


def test_submissions_that_went_wrong(tmp_path, asked, capsys):
    """Each mistake is one sentence in the note and on the screen; others are graded; nobody gets 0 without a word."""
    held = {"work": ["a1.py"], "nested": ["sub/a1.py"], "named": ["A1_final.py"], "notebook": ["a1.ipynb"], "zip": ["anna.zip"],
            "two": ["a1.py", "a1 (1).py"], "helper": ["a1.py", "tools.py", "README.md"], "empty": [], "other": ["a2.py"],
            "broken": ["a1.py"], "folder": ["a1.py/x.py"]}
    for student, names in held.items():
        (tmp_path / "class" / student).mkdir(parents=True)
        for path in (tmp_path / "class" / student / name for name in names):
            path.parent.mkdir(exist_ok=True)
            path.write_text("broken" if student == "broken" else "")
    (tmp_path / "class" / "loose.zip").write_text("")
    (tmp_path / "class" / "link").mkdir()
    (tmp_path / "class" / "link" / "a1.py").symlink_to(tmp_path / "class" / "work" / "a1.py")
    rows, printed = graded(tmp_path / "class"), capsys.readouterr().out
    missing = "a1.py is missing: "
    assert {name: row["note"] for name, row in rows.items()} == {
        "work": "", "nested": missing + "it lies in sub/a1.py, so move it up", "zip": missing + "anna.zip is not unpacked",
        "named": missing + "there is A1_final.py; rename what is meant",
        "link": missing + "it is a link, and links are not followed",
        "notebook": missing + "there is a1.ipynb; rename what is meant", "two": "a1.py was graded, and there is a1 (1).py",
        "helper": "", "empty": missing + "the folder is empty", "other": "a1.py is missing",
        "broken": "a1.py does not load: SyntaxError at a1.py line 1: invalid syntax", "folder": missing + "there is a1.py/x.py; "
        "rename what is meant", "loose.zip": "not graded: this is no folder; unpack or move it into one"}
    assert all(row["total"] not in ("0", "") or row["note"] for row in rows.values()) and float(rows["two"]["total"]) > 80
    assert all(f"  {name}" + f"  ({row['note']})" * bool(row["note"]) in printed for name, row in rows.items())


def test_strange_folders_stop_nobody(tmp_path, asked, capsys):
    """Names and trees that broke the run once: each gets its row, the others their marks, and the screen no control codes."""
    folder = tmp_path / "class"
    for student in ("zoe", "=HYPERLINK(1)", "x\n  100  bob", "ctrl\x1b[31m", "deep", "big", "latin", "n" * 245):
        (folder / student).mkdir(parents=True)
        (folder / student / "a1.py").write_text("")
    (folder / "latin" / "a1.py").unlink()
    os.close(os.open(os.fsencode(folder / "latin") + b"/L\xf6sung.py", os.O_CREAT | os.O_WRONLY))      # a zip of Windows
    (folder / "big" / "a1.py").write_text("x = 1\n" * 200_000)
    home = os.open(folder / "deep", os.O_RDONLY)
    for _ in range(1500):                                         # deeper than Python's stack, and than a path may be long
        os.mkdir("d", dir_fd=home)
        home, old = os.open("d", os.O_RDONLY, dir_fd=home), home
        os.close(old)
    os.close(home)
    (folder / "loop").symlink_to("loop")
    (folder / "friend").symlink_to("zoe")
    (folder / "__MACOSX").mkdir()
    rows, printed = graded(folder), capsys.readouterr().out
    assert set(rows) == {"zoe", "'=HYPERLINK(1)", "x\\n  100  bob", "ctrl\\x1b[31m", "deep", "big", "latin", "n" * 245, "loop",
                         "friend"}
    assert float(rows["zoe"]["total"]) > 80 and rows["zoe"]["total"] == rows["deep"]["total"] == rows["ctrl\\x1b[31m"]["total"]
    assert rows["big"]["note"] == "a1.py was not graded: it has 1.1 MiB, 1 is the most" and rows["big"]["total"] == "0"
    assert rows["friend"]["note"] == rows["loop"]["note"] == "not graded: this is a link" and rows["friend"]["marks"] == ""
    assert rows["latin"]["note"] == r"a1.py is missing: there is L\udcf6sung.py; rename what is meant"
    assert rows["n" * 245]["note"].startswith("not graded: the grader failed here") and "\x1b" not in printed
    subprocess.run(["rm", "-rf", "--", folder], check=True)


def test_marks_lie_outside_the_class(tmp_path):
    """Else the next run grades the table of this one."""
    (tmp_path / "anna").mkdir()
    for out in (tmp_path / "grades.csv", tmp_path / "new" / "grades.csv"):
        with pytest.raises(UserError, match="among the submissions; give a place outside it"):
            grade.main([str(tmp_path), "--assignments", "a1", "--csv", str(out)])
    assert [p.name for p in tmp_path.iterdir()] == ["anna"]


def test_a_student_cannot_write_what_only_the_grader_says(tmp_path):
    """A message that looks like a file that did not load would have shown the hidden constants in a terse text."""
    (tmp_path / "eve").mkdir()
    (tmp_path / "eve" / "a1.py").write_text(
        "def __getattr__(name):\n    def f(*args, **more):\n"
        "        raise AssertionError('a1.py does not load: ' + repr(args) + 'x' * 10**6 + '\\x1b[31m')\n    return f\n")
    grade.main([str(tmp_path), "--assignments", "a1", "--seed", str(SEED), "--csv", str(tmp_path.parent / "g.csv"), "--terse"])
    text = (tmp_path.parent / "g_feedback" / "eve.txt").read_text()
    assert "does not load" not in text and "tensor" not in text and "hidden test" in text
    found, _ = grade.marks(tmp_path / "eve", ["a1"], SEED)
    assert all(len(t["output"]) < 20_000 and "\x1b" not in t["output"] and t["fault"] is None for t in found["a1"])
    loud = grade.unread(assignment("a1"), "A1.1", "a1.py does not load", "hello")
    assert loud["fault"] == "a1.py does not load" and loud["output"] == loud["fault"] + "\nprinted: hello"
    assert plain("a\nb\x1b\udcf6") == "a\nb\\x1b\\udcf6"


@needs_solutions
def test_a_gradient_passes_two_functions_of_the_student(tmp_path, monkeypatch):
    """A task's function calls one of the student's on what another has answered: its gradient was lost between the two."""
    checks = isolated.import_module("tutorials.assignments.a6.checks")
    monkeypatch.setattr(checks, "box", lambda kind: lambda x, sigma, noise, logit, h: h(logit(x + noise, sigma) ** 2))
    (tmp_path / "a6.py").write_text("""
import torch
def diagnose(weigh):
    x, noise, sigma = torch.ones(2, 1).double().requires_grad_(), torch.ones(2, 1).double(), torch.ones(2).double()
    out = weigh(x, sigma, noise, lambda xt, level: 2 * xt.sum(1), lambda r: 3 * r)                  # 12 (x + noise)^2
    raise AssertionError(str(torch.autograd.grad(out.sum(), x, allow_unused=True)[0]))
""")
    answers, _ = run_task("a6", "A6.5", tmp_path / "a6.py", SEED)
    assert "tensor([[48.],\n        [48.]], dtype=torch.float64)" in answers


@pytest.mark.parametrize("speed", ["drops", "flood"])
def test_no_drip_and_no_flood_hold_the_grader(speed):
    """The deadline is that of the whole conversation: not of each byte, and not of those who are never silent."""
    ours, theirs = socket.socketpair()
    stop = threading.Event()

    def talk():
        with contextlib.suppress(OSError):
            while not stop.wait(0.2 if speed == "drops" else 0):
                theirs.sendall(b"\0" if speed == "drops" else b"\0" * 8)
    with ours, theirs:
        line, begun = isolated.Line(ours, time.monotonic() + 1), time.monotonic()
        theirs.sendall((10**6).to_bytes(8, "big") if speed == "drops" else b"")
        thread = threading.Thread(target=talk, daemon=True)
        thread.start()
        with pytest.raises(isolated.Broken, match="late"):
            while True:
                line.receive()
        stop.set()
    assert line.late and time.monotonic() - begun < 30            # a second, with room for a busy machine


def test_a_deep_folder_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(isolated.tempfile, "tempdir", str(tmp_path))
    with isolated.folder_for_task() as work:
        deep = "import os\nfor _ in range(1500):\n    os.mkdir('d'); os.chdir('d')"
        subprocess.run([sys.executable, "-c", deep], cwd=work, check=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="Landlock is Linux's")
def test_an_older_kernel_stops_no_signals_so_python_does(tmp_path):
    """Landlock knows signals since version 6: before, the audit hook is there, too."""
    code = """
import ctypes, os, sys
from tutorials.assignments import child
class Old:
    def __init__(self, *args, **more):
        self.libc = REAL(*args, **more)
        self.prctl = self.libc.prctl
    def syscall(self, number, *args):
        answer = self.libc.syscall(number, *args)
        return min(4, answer) if args == (None, 0, 1) else answer
REAL, child.ctypes.CDLL = ctypes.CDLL, Old
child.guard(sys.argv[1], sys.path)
try:
    os.kill(os.getppid(), 0)
except PermissionError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "os.kill is not for submissions\n", done.stderr


def test_without_names_a_class_is_graded_in_what_it_handed_in(tmp_path, asked, capsys):
    """No student is told that seven other assignments are missing; nothing at all is one sentence."""
    for path in ("work/a1.py", "nested/sub/a1.py"):
        (tmp_path / "class" / path).parent.mkdir(parents=True)
        (tmp_path / "class" / path).write_text("")
    grade.main([str(tmp_path / "class"), "--seed", str(SEED), "--csv", str(tmp_path / "grades.csv")])
    rows = list(csv.DictReader((tmp_path / "grades.csv").open(encoding="utf-8")))
    assert [row["note"] for row in rows] == ["a1.py is missing: it lies in sub/a1.py, so move it up", ""]
    assert list(rows[0]) == ["student", *assignment("a1").tasks, "total", "marks", "note"]
    assert "are missing" in grade.missing(tmp_path, ["a1", "a2"], [])
    with pytest.raises(UserError, match=r"a1\.py is missing: it lies in sub/a1\.py, so move it up"):
        grade.main([str(tmp_path / "class" / "nested"), "--seed", str(SEED)])
    (tmp_path / "class" / "work" / "a1.py").unlink()
    with pytest.raises(UserError, match="no folder in .* has a file to grade; name what was due"):
        grade.main([str(tmp_path / "class"), "--seed", str(SEED), "--csv", str(tmp_path / "grades.csv")])


@pytest.mark.parametrize("flags", [(), ("--terse",)])
def test_each_student_gets_a_text(flags, tmp_path, asked):
    """What the checks said, or with --terse the marks alone; why a file does not load in any case, and never the seed."""
    for student in ("work", "broken", "none"):
        (tmp_path / "class" / student).mkdir(parents=True)
        if student != "none":
            (tmp_path / "class" / student / "a1.py").write_text("from nano_dmd.f_distill import WEIGHTS\n# " + student)
    rows = graded(tmp_path / "class", *flags)
    texts = {p.stem: p.read_text(encoding="utf-8") for p in (tmp_path / "grades_feedback").iterdir()}
    assert set(texts) == set(rows) and not any(str(SEED) in text or "WEIGHTS" in text for text in texts.values())
    assert ("Laplace is wrong" in texts["work"]) == (not flags) and f"{rows['work']['total']} / 100" in texts["work"]
    assert "SyntaxError at a1.py line 1" in texts["broken"] and "a1.py is missing: the folder is empty" in texts["none"]
    assert "WEIGHTS answers A1.3" in rows["work"]["note"]
    assert graded(tmp_path / "class", *flags) == rows             # again, over what is there


def test_terse_says_why_a_file_does_not_load(tmp_path, asked, capsys):
    (tmp_path / "a1.py").write_text("broken")
    grade.main([str(tmp_path), "--assignments", "a1,a2", "--out", str(tmp_path / "results.json"), "--terse"])
    said = {t["output"] for t in json.loads((tmp_path / "results.json").read_text())["tests"]}
    assert said == {"a1.py does not load: SyntaxError at a1.py line 1: invalid syntax", "a2.py is missing"}
    assert "public constants, which students know" in capsys.readouterr().err


@pytest.mark.parametrize("flags, said", [
    (["--csv", "g.csv", "--out", "r.json"], "not allowed with"), (["--terse"], "--terse is about what students read"),
    (["--seed", "3", "--seed-file", "seed"], "not allowed with"), (["--csv", "g.csv"], "holds no folders"),
    ([], "so move it up")])
def test_flags_that_would_do_nothing(flags, said, tmp_path, monkeypatch):
    """One sentence, and nothing is written; --out was forgotten beside --csv once."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "class").mkdir()
    if not flags:
        (tmp_path / "class" / "anna").mkdir()
        (tmp_path / "class" / "anna" / "a1.py").write_text("")
    with pytest.raises(UserError, match=said):
        grade.main(["class", *flags])
    assert [p.name for p in tmp_path.iterdir()] == ["class"]


@pytest.mark.parametrize("line", ["from nano_dmd.f_distill import WEIGHTS as w", "from nano_dmd.f_distill import *",
                                  "from nano_dmd import f_distill\nh = f_distill.WEIGHTS"])
def test_the_librarys_answer_is_reported(line, tmp_path):
    """h(r) of A1.3 stands in the package: importing it earned marks, and nobody was told."""
    (tmp_path / "a1.py").write_text(line)
    assert any("WEIGHTS answers A1.3" in said or "f_distill.*" in said for said in grade.suspicious(tmp_path / "a1.py"))
    (tmp_path / "a1.py").write_text("from nano_dmd.dmd_loss import descend\nWEIGHTS = 3")
    assert grade.suspicious(tmp_path / "a1.py") == []


@needs_solutions
def test_the_list_of_the_librarys_answers():
    """Every name is there, belongs to a task, and stands in the lecturer's notes."""
    source = "\n".join(p.read_text() for p in (ROOT / "nano_dmd").glob("*.py"))
    for name, tasks in grade.IN_LIBRARY.items():
        for word, task in tasks.items():
            assert re.search(rf"^(def |class )?{word}\b", source, re.M) and task in assignment(name).tasks
            assert re.search(rf"`{word}`( and `\w+`)? \([^)]*{task}", read("instructor/README.md")), word


@needs_solutions
def test_no_solution_looks_odd(tmp_path):
    """What is reported to the staff does not point at honest work."""
    for name in stubs.NAMES:
        (tmp_path / f"{name}.py").write_text(solution(name))
        assert grade.suspicious(tmp_path / f"{name}.py") == []


def test_a_fault_of_the_grader_costs_one_task(tmp_path, monkeypatch):
    """An error that nobody foresaw ends as a mark and a sentence."""
    def broken(*args):
        raise RuntimeError("unforeseen")
    monkeypatch.setattr(grade, "run_task", broken)
    (tmp_path / "a1.py").write_text("")
    found = grade.grade("a1", tmp_path / "a1.py", 0)
    assert [t["score"] for t in found] == [0] * 5 and "the grader failed here" in found[0]["output"]

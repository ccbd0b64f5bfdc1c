"""The grader marks right what is right and wrong what is wrong: solutions, stubs, wrong answers, and code that runs amok."""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from nano_dmd.engine.files import UserError
from tutorials import grade
from tutorials.assignments import stubs
from tutorials.assignments.checking import close, gradient, tensor
from tutorials.assignments.isolated import assignment

ROOT = Path(__file__).parents[1]
HIDDEN = 271828
SOLVED = stubs.SOLUTIONS.is_dir()                                 # not in a hand-out or a students' fork
needs_solutions = pytest.mark.skipif(not SOLVED, reason="tutorials/assignments/instructor/ is not in this tree")


def solution(name):
    return import_module("tutorials.assignments.instructor").solution(name)


def answer(name, mistake):
    return import_module("tutorials.assignments.instructor").answer(name, mistake)


def wrong(name):
    return import_module(f"tutorials.assignments.instructor.{name}.wrong").WRONG if SOLVED else []


WRONG = [(name, w) for name in stubs.NAMES for w in wrong(name)]


def marks(folder, name, text, seed):
    """{task: (score, max_score, output)} of a submission with this text."""
    path = folder / f"{name}.py"
    path.write_text(text)
    return {t["number"]: (t["score"], t["max_score"], t["output"]) for t in grade.grade(name, path, seed)}


@needs_solutions
@pytest.mark.parametrize("name", stubs.NAMES)
def test_starter_is_generated(name):
    """python -m tutorials.assignments.stubs would change nothing."""
    assert (stubs.HERE / name / f"{name}.py").read_text() == stubs.starter(solution(name))


@needs_solutions
@pytest.mark.parametrize("name", stubs.NAMES)
@pytest.mark.parametrize("seed", [0, HIDDEN])
def test_solution_earns_full_marks(name, seed, tmp_path):
    found = marks(tmp_path, name, solution(name), seed)
    assert {task: output for task, (score, full, output) in found.items() if score < full} == {}
    assert sum(full for _, full, _ in found.values()) == 100


@needs_solutions
@pytest.mark.parametrize("name", stubs.NAMES)
def test_starter_earns_nothing_and_says_why(name, tmp_path):
    """Every check of every task names the task that is not done yet."""
    for task, (score, _, output) in marks(tmp_path, name, stubs.starter(solution(name)), 0).items():
        assert score == 0
        assert output.count(f"not done yet: {task} ") == len(assignment(name).of(task)), output


@needs_solutions
@pytest.mark.parametrize("name", stubs.NAMES)
def test_there_are_enough_wrong_answers(name):
    assert len(wrong(name)) >= 12 and len({w.name for w in wrong(name)}) == len(wrong(name))
    assert set().union(*(w.broken for w in wrong(name))) == set(assignment(name).tasks)


# Each costs half a second: every eighth runs by default, the others with the slow tests.
SOME = [pytest.param(n, w, id=f"{n}: {w.name}", marks=[pytest.mark.slow] * bool(i % 8)) for i, (n, w) in enumerate(WRONG)]


@needs_solutions
@pytest.mark.parametrize("name, mistake", SOME)
def test_wrong_answer_loses_its_task_alone(name, mistake, tmp_path):
    found = marks(tmp_path, name, answer(name, mistake), HIDDEN)
    assert {task for task, (score, full, _) in found.items() if score < full} == mistake.broken
    if mistake.public_passes:
        assert all(score == full for score, full, _ in marks(tmp_path, name, answer(name, mistake), 0).values())


@pytest.mark.parametrize("name", stubs.NAMES)
def test_handout_states_the_points(name):
    """The table of tasks in README.md: numbers and points are the grader's."""
    text = (stubs.HERE / name / "README.md").read_text()
    table = dict(re.findall(rf"^\| ({name.upper()}\.\d) \|[^|]*\| (\d+) \|", text, re.M))
    assert table == {task: f"{assignment(name).points(task):g}" for task in assignment(name).tasks}


@needs_solutions
def test_public_tests_run_where_students_work(tmp_path):
    """pytest in a copied folder: the starters fail every test with a sentence, the solutions pass all."""
    for name in stubs.NAMES:                       # all in one process: it takes seconds to start
        (tmp_path / f"test_{name}.py").write_text((stubs.HERE / name / "test_public.py").read_text())
    for make, status, word in ((stubs.starter, 1, "failed"), (lambda text: text, 0, "passed")):
        for name in stubs.NAMES:
            (tmp_path / f"{name}.py").write_text(make(solution(name)))
        pytest_main = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(pytest_main, cwd=tmp_path, env=environment(), capture_output=True, text=True)
        assert done.returncode == status and "Traceback" not in done.stdout, done.stdout
        assert re.fullmatch(rf"\d\d+ {word} in [\d.]+s( \(.*\))?", done.stdout.splitlines()[-1]), done.stdout
        missing = {name for name in stubs.NAMES if f"not done yet: {name.upper()}." in done.stdout}
        assert missing == (set(stubs.NAMES) if status else set()) and ("not done yet" in done.stdout) == bool(status)


def environment():
    import os

    return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


HOSTILE = {
    "endless loop": ("while True:\n        pass", "stopped after 20 s"),
    "sleep is an endless loop too": ("import time\n    time.sleep(10_000)", "no answer in 6 s"),
    "exit": ("exit()", "the code called exit()"),
    "os._exit": ("import os\n    os._exit(0)", "ended the whole process"),
    "crash": ("import ctypes\n    ctypes.string_at(0)", "ended the whole process"),
    "memory": ("x = bytearray(10**11)", "MemoryError"),
    "recursion": ("def f():\n        return f()\n    f()", "RecursionError"),
    "flood": ("import os\n    while True:\n        os.write(1, b'x' * 10_000)", "OSError"),
    "wrong type": ("return 'a string'", "FAILED"),
    "nothing": ("return None", "FAILED"),
}


@needs_solutions
@pytest.mark.parametrize("kind", HOSTILE)
def test_code_that_runs_amok_costs_its_task_alone(kind, tmp_path, monkeypatch):
    """The other tasks keep their marks, and the student reads what happened."""
    code, said = HOSTILE[kind]
    if said.startswith(("stopped", "no answer")):
        monkeypatch.setattr("tutorials.assignments.isolated.SECONDS", 2)
        said = said.replace("20 s", "2 s")
    name, first = "a1", next(iter(assignment("a1").tasks))
    found = marks(tmp_path, name, hostile(name, first, code), 0)
    assert {task for task, (score, full, _) in found.items() if score < full} == {first}
    assert said in found[first][2]


def hostile(name, task, code):
    """The solution of the assignment with every region of one task replaced by this code."""
    region = re.compile(rf"^( *)### BEGIN SOLUTION {re.escape(task)}\n.*?^ *### END SOLUTION\n", re.M | re.S)
    return region.sub(lambda m: m[1] + code + "\n", solution(name))


@pytest.mark.parametrize("text, said", [
    ("def f(:\n", "SyntaxError at a1.py line 1"), ("import torchh\n", "ModuleNotFoundError at a1.py line 1"),
    ("x = 1\n\nraise ValueError('mine')\n", "ValueError at a1.py line 3: mine"), ("", "AttributeError")])
def test_a_file_that_does_not_load_scores_nothing(text, said, tmp_path):
    for score, _, output in marks(tmp_path, "a1", text, 0).values():
        assert score == 0 and said in output


def test_results_for_gradescope(tmp_path, capsys):
    """The documented fields; a mark per task; hidden checks do not say what failed."""
    (tmp_path / "a1.py").write_text((stubs.HERE / "a1" / "a1.py").read_text())
    grade.main([str(tmp_path), "--assignments", "a1,a2", "--seed", "5", "--out", str(tmp_path / "results.json"), "--terse"])
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["score"] == 0 and found["visibility"] == "visible" and found["stdout_visibility"] == "hidden"
    assert [t["number"] for t in found["tests"]] == [*assignment("a1").tasks, *assignment("a2").tasks]
    for t in found["tests"]:
        assert set(t) == {"number", "name", "score", "max_score", "output", "status", "visibility"} and t["status"] == "failed"
        assert "not done yet" not in t["output"]
    printed = capsys.readouterr().out
    assert "a2.py is missing" in printed and "not done yet: A1.1" in printed


@pytest.mark.parametrize("argv, said", [(["no/such/folder"], "no folder"), ([".", "--assignments", "a9"], "no assignment a9")])
def test_grader_complains_in_one_sentence(argv, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        grade.main(argv)
    with pytest.raises(UserError, match="nothing to grade"):
        grade.main([str(tmp_path)])


def test_comparisons_explain_themselves():
    import torch

    for got, said in ((3, "should have shape"), ("x", "should be a tensor, got str"),
                      (torch.tensor([1.0, float("nan")]), "finite"),
                      (torch.tensor([1.0, 2.5]), "what is 2.5 where 2 is right; a hint"),
                      (torch.tensor([1.0, 2.5]), r"relative error 0.25, in float32\)"),
                      (torch.tensor([1.0, 2 - 3e-6], dtype=torch.float64),
                       r"what is 1.999997 where 2 is right; a hint \(relative error 1.5e-06\)")):
        with pytest.raises(AssertionError, match=said):
            close(got, torch.tensor([1.0, 2.0]), "what", hint="a hint")
    close(2.0, 2, "number")
    assert tensor(torch.ones(2), (2,), "t").sum() == 2
    with pytest.raises(AssertionError, match="no gradient reaches it"):
        gradient(torch.ones(2), torch.ones(2, requires_grad=True), "the loss")

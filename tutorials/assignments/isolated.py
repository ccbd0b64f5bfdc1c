"""Run one task of a submission in a process of its own, with limits: what goes wrong there costs that task alone.

An endless loop, exit(), a full memory or a flood of output ends the child; the checks that had passed keep their points.
This guards against accidents, not against attack: run the grader itself where a submission may do no harm (Gradescope's
container, an account without rights).
"""

import contextlib
import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from importlib import import_module
from pathlib import Path

import torch

OUTPUT = 200_000                                                  # bytes that a task may print
SECONDS = None                                                    # replaces every assignment's own limit, for tests


def load(path):
    """The module in a file, without leaving bytecode beside it."""
    sys.dont_write_bytecode = True
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    return module


def assignment(name):
    return import_module(f"tutorials.assignments.{name}.checks").A


def explain(error, path):
    """One or two lines that a student can act on."""
    if isinstance(error, NotImplementedError):
        return f"not done yet: {error}"
    if isinstance(error, AssertionError):
        return str(error) or "an assertion without a message failed"
    if isinstance(error, SystemExit):
        return "the code called exit(); a function returns its result instead"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    line = getattr(error, "lineno", None) or (lines and lines[-1])
    where = f" at {path.name} line {line}" if line else ""
    return f"{type(error).__name__}{where}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"


def run_check(check, student, constants, path):
    """None, or why the check failed."""
    try:
        torch.manual_seed(0)
        check.run(student, constants)
    except BaseException as e:                                    # SystemExit and KeyboardInterrupt of the student's too
        return explain(e, path)


def limit(seconds, mebibytes):
    """CPU time, memory on top of what this process holds already, and printed output."""
    import resource                                               # Unix only

    held = int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE") if sys.platform == "linux" else 0
    limits = {resource.RLIMIT_CPU: seconds, resource.RLIMIT_FSIZE: OUTPUT}
    if held:
        limits[resource.RLIMIT_DATA] = held + mebibytes * 2**20
    for which, value in limits.items():
        resource.setrlimit(which, (value, value))


def child(name, task, path, seed, seconds, sender, printed):
    """Send JSON, never a pickled object of the student's: None or a message per check, in order."""
    os.setsid()                                                   # its children end with it
    out = os.open(printed, os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    torch.set_num_threads(1)
    path, known = Path(path), assignment(name)
    sender.send_bytes(b"here")
    limit(seconds, known.mebibytes)
    try:
        student = load(path)
    except BaseException as e:
        student, broken = None, explain(e, path)
    for check in known.of(task):
        why = broken if student is None else run_check(check, student, known.constants(seed), path)
        sender.send_bytes(json.dumps(why and why[:2000]).encode())
    os._exit(0)                                                   # no atexit of the student's


def context():
    """Processes that start from one with torch loaded, where the system can fork; else fresh ones."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([__name__])
    return found


def run_task(name, task, path, seed):
    """([None or message per check of the task], what the code printed)."""
    known = assignment(name)
    seconds = SECONDS or known.seconds
    with tempfile.NamedTemporaryFile("w+", errors="replace") as printed:
        receiver, sender = context().Pipe(duplex=False)
        process = context().Process(target=child, args=(name, task, str(path), seed, seconds, sender, printed.name), daemon=True)
        process.start()
        sender.close()
        answers, ended = receive(receiver, process, len(known.of(task)), seconds)
        answers += [ended] * (len(known.of(task)) - len(answers))
        return answers, printed.read(2000)


def receive(receiver, process, expected, seconds):
    """(answers so far, why there are no more)."""
    answers, late = [], False
    try:
        receiver.recv_bytes()                                     # the child is there; its first start loads torch
    except EOFError as e:                                         # before any code of the student's ran
        raise RuntimeError("the grader could not start a process for the task; run it from a file or with -m") from e
    with contextlib.suppress(EOFError, OSError):
        deadline = time.monotonic() + 3 * seconds                 # wall time: a busy machine is not the student's fault
        while len(answers) < expected and not late:
            late = not receiver.poll(max(0, deadline - time.monotonic()))
            if not late:
                answers.append(json.loads(receiver.recv_bytes(10_000)))
    if late or len(answers) == expected:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    process.join()
    if late or process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL):
        return answers, f"stopped after {seconds} s of computing: is there a loop without an end?"
    return answers, f"the code ended the whole process (exit status {process.exitcode}): functions return, they do not exit"

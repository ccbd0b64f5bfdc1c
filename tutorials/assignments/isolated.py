"""Run one task of a submission: its functions in a process of their own (child.py), the checks here.

The checks call the student's functions through remote.py, which brings back plain data.  So an answer can be forged only
by sending the right value.  An endless loop, exit(), a full memory or garbage on the socket ends the task: the checks
that had passed keep their points.  What a determined cheat can still do is said in instructor/README.md.
"""

import atexit
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

import torch

from tutorials.assignments.child import load, read_exactly                            # noqa: F401, load is for public.py
from tutorials.assignments.remote import LARGEST, Broken, Peer, Remote, describe

HERE = Path(__file__).parent
LIBRARY = ("nano_dmd", "toy", "tutorials/assignments/child.py", "tutorials/assignments/remote.py")
OUTPUT = 200_000                                                  # bytes that a task may print, and of a file it may write
LARGEST_FILE = 2**20                                              # bytes of a file of a submission
SECONDS = None                                                    # replaces every assignment's own limit, for tests
KERNEL = True                                                     # False: Python's own wall alone, for tests


def assignment(name):
    return import_module(f"tutorials.assignments.{name}.checks").A


class Fault(str):
    """Why a whole file scores nothing.  The type says who wrote the text: a student can write the same words."""


def plain(text):
    """A student's text for screens and files: no control characters, no lone surrogates, not endless."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text[:2000])


def explain(error, path):
    """One or two lines that a student can act on."""
    kind, text, line = describe(error, str(path))
    if isinstance(error, NotImplementedError):
        return plain(f"not done yet: {error}")
    if isinstance(error, AssertionError):
        return plain(str(error)) or "an assertion without a message failed"
    if kind == "SystemExit":
        return "the code called exit(); a function returns its result instead"
    where = f" at {path.name} line {line}" if line else ""
    text = (text.strip() or "no message").splitlines()[0].removesuffix(f" ({path.name}, line {line})")      # a SyntaxError's
    return plain(f"{kind}{where}: {text[:200]}")


# ---- the process that forks a child for each task


class Helper:
    """Started once, with torch loaded and a copy of the library: no path of it leads to the solutions."""

    def __init__(self):
        self.library = tempfile.mkdtemp(prefix="library")
        for name in LIBRARY:
            source, to = HERE.parents[1] / name, Path(self.library, Path(name).name)
            if source.is_dir():
                shutil.copytree(source, to, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, to)
        packages = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
        self.control, theirs = socket.socketpair()
        environment = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")}
        command = [sys.executable, "-I", "-S", f"{self.library}/child.py", str(theirs.fileno()), self.library, *packages]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, cwd=self.library,
                                        stdin=subprocess.DEVNULL, start_new_session=True)
        theirs.close()
        if self.control.recv(4) != b"here":
            raise RuntimeError("the grader could not start a process for the submissions")
        interpreter = [f"{p}/{d}" for p in {sys.prefix, sys.base_prefix} for d in ("lib", "lib64", "DLLs", "Lib")]
        packages += [str(Path(torch.__file__).resolve().parents[1])]                   # where a link leads
        self.readable = [self.library, *packages, *interpreter, *READABLE]

    def begin(self, task, channel, output):
        socket.send_fds(self.control, [json.dumps(task | dict(readable=self.readable)).encode()], [channel.fileno(), output])

    def over(self):
        """Kill what the task has left; its status, None where that is not known."""
        with contextlib.suppress(OSError, ValueError):
            self.control.sendall(b"x")
            self.control.settimeout(60)
            status = int(self.control.makefile("rb").readline())
            return None if status < 0 else os.waitstatus_to_exitcode(status)
        self.close()                                              # the helper itself is gone

    def close(self):
        global helper
        helper = None
        self.control.close()
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.library, ignore_errors=True)


READABLE = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/usr/share", "/etc/localtime", "/etc/fonts",
            "/dev/urandom", "/proc/cpuinfo", "/sys/devices/system/cpu", "/System", "/Library")
helper = None


def started():
    global helper
    if helper is None:
        helper = Helper()
        atexit.register(helper.close)
    return helper


# ---- one task


class Line:
    """The grader's end of the socket: messages with a length before them, until the deadline."""

    def __init__(self, channel, deadline):
        self.channel, self.deadline, self.late = channel, deadline, False

    @contextlib.contextmanager
    def watched(self):
        try:
            if (left := self.deadline - time.monotonic()) <= 0:
                raise TimeoutError
            self.channel.settimeout(left)
            yield
        except TimeoutError as e:
            self.late = True
            raise Broken("late") from e
        except (OSError, EOFError) as e:
            raise Broken("gone") from e

    def send(self, message):
        with self.watched():
            self.channel.sendall(len(message).to_bytes(8, "big") + message)

    def recv(self, count):
        """Some bytes.  Each call has its own timeout: a drop now and then must not hold the grader."""
        with self.watched():
            if part := self.channel.recv(count):
                return part
            raise EOFError

    def receive(self):
        length = int.from_bytes(read_exactly(self, 8), "big")
        if length > LARGEST:
            raise Broken(f"what came from the code's process is no message ({length} bytes)")
        return read_exactly(self, length)


def run_task(name, task, path, seed):
    """([None or message per check of the task], what the code printed)."""
    known, path = assignment(name), Path(path)
    seconds = SECONDS or known.seconds
    with folder_for_task() as work, tempfile.NamedTemporaryFile("w+", errors="replace") as printed:
        for file in dict.fromkeys([path, *sorted(path.parent.glob("*.py"))[:100]]):     # a submission may have helpers
            if file.is_file() and not file.is_symlink() and file.stat().st_size < LARGEST_FILE:
                shutil.copy(file, work)
        ours, theirs = socket.socketpair()
        output, at = os.open(printed.name, os.O_WRONLY | os.O_APPEND), started()
        with ours:
            at.begin(dict(work=work, path=f"{work}/{path.name}", seconds=seconds, mebibytes=known.mebibytes, output=OUTPUT,
                          kernel=KERNEL), theirs, output)
            theirs.close(), os.close(output)
            line = Line(ours, time.monotonic() + 3 * seconds)     # wall time: a busy machine is not the student's fault
            answers, why, loaded = judge(known, task, path, seed, line)
        status = at.over()
        if line.late:
            why = (f"no answer in {3 * seconds} s: is there a loop without an end, or was this machine too busy? "
                   f"Then grade again")
        elif status in (-signal.SIGXCPU, -signal.SIGKILL) and why == "gone":
            why = f"stopped after {seconds} s of computing: is there a loop without an end?"
        elif why in ("gone", "late"):
            why = f"the code ended the whole process (exit status {status}): functions return, they do not exit"
        why = why if loaded else Fault(f"{path.name} does not load: {why}")
        return answers + [why] * (len(known.of(task)) - len(answers)), printed.read(2000)


@contextlib.contextmanager
def folder_for_task():
    """A folder that is gone afterwards, however deep the student's code has made it: Python's own rmtree is recursive."""
    work = tempfile.mkdtemp(prefix="task")
    try:
        yield work
    finally:
        subprocess.run(["rm", "-rf", "--", work], stderr=subprocess.DEVNULL)


def judge(known, task, path, seed, line):
    """([None or why it failed, per check], why there are no more, whether the submission loaded)."""
    peer, answers, loaded = Peer("p", line.send, line.receive), [], False
    try:
        try:
            peer.result(peer.ask(dict(do="load")), [])
        except Exception as e:
            if isinstance(e, Broken):
                raise
            return answers, explain(e, path), loaded
        student, loaded = peer.remember("c0", Remote(peer, "c0")), True
        for check in known.of(task):
            peer.send(dict(do="clear"))
            peer.clear()
            answers.append(run_check(check, student, known.constants(seed), path, peer))
    except Broken as e:
        return answers, str(e), loaded
    return answers, None, loaded


def run_check(check, student, constants, path, peer):
    """None, or why the check failed."""
    peer.writes = check.writes
    try:
        torch.manual_seed(0)
        check.run(student, constants)
    except Broken:
        raise
    except Exception as e:
        return explain(e, path)

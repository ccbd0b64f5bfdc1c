"""The process that runs a submission.  It has the library and the submission; no checks, no solutions, no seed.

    python -I -S child.py FD PATH...       started by isolated.py; FD is its control socket, PATH... go on sys.path

It loads torch once, then forks for each task.  The fork shuts itself in (guard), loads the submission and answers calls
through a socket of its own.  When the task is over, everything that it has started is killed, whatever its session.
"""

import builtins
import contextlib
import ctypes
import importlib.util
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

LINUX = sys.platform == "linux"


def read_exactly(channel, count):
    parts = []
    while count:
        part = channel.recv(min(count, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def load(path):
    """The module in a file, without leaving bytecode beside it."""
    sys.dont_write_bytecode = True
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


# ---- walls


def limit(seconds, mebibytes, output):
    """CPU time, memory on top of what this process holds already, and size of files."""
    limits = {resource.RLIMIT_CPU: seconds, resource.RLIMIT_FSIZE: output, resource.RLIMIT_CORE: 0}
    if LINUX:
        held = int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
        limits[resource.RLIMIT_DATA] = held + mebibytes * 2**20
    for which, value in limits.items():
        resource.setrlimit(which, (value, value))


def guard(work, readable, kernel=True):
    """Files: read those below `readable` and write below `work`, nothing else.  Signals to other processes: none.

    By the kernel (Landlock), for everything that this process will ever start: files since Linux 5.13, signals since 6.12.
    Before that by Python's audit hook, too, which holds against Python code alone.
    """
    readable = [p for p in readable if os.path.exists(p)]
    if not (LINUX and kernel and landlock(work, readable)):
        audit(work, readable)


def landlock(work, readable):
    """True if the kernel does all of it.  Numbers: linux/landlock.h."""
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(444, None, 0, 1)
    if version < 1:
        return False
    files = (1 << (13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16)) - 1
    net, scoped = 3 if version >= 4 else 0, 3 if version >= 6 else 0
    ruleset = (ctypes.c_uint64 * 3)(files, net, scoped)
    rules = libc.syscall(444, ruleset, 8 if version < 4 else 16 if version < 6 else 24, 0)
    for path, rights in [(work, files), (os.devnull, 2 | 4)] + [(p, 1 | 4 | 8 if os.path.isdir(p) else 4) for p in readable]:
        fd = os.open(path, os.O_PATH)
        rule = rights.to_bytes(8, sys.byteorder) + fd.to_bytes(4, sys.byteorder)
        libc.syscall(445, rules, 1, rule, 0)
        os.close(fd)
    libc.prctl(38, 1, 0, 0, 0)                                    # no new privileges
    done = libc.syscall(446, rules, 0) == 0
    os.close(rules)
    return done and version >= 6


def audit(work, readable):
    inside, below = (os.path.realpath(work), os.devnull), tuple(os.path.realpath(p) for p in readable)

    def hook(event, args):
        if event in ("os.kill", "os.killpg", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "ctypes.dlopen"):
            raise PermissionError(f"{event} is not for submissions")
        if event in ("open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.mkdir", "os.chmod", "os.symlink",
                     "os.link", "os.truncate"):
            for path in [a for a in args[:2] if isinstance(a, (str, bytes)) and (event != "open" or a is args[0])]:
                where = os.path.realpath(os.fsdecode(path))
                reads = event in ("os.listdir", "os.scandir") or event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR)
                if not any(where == p or where.startswith(p + os.sep) for p in inside + below * reads):
                    raise PermissionError(f"{event} of {where} is not for submissions")
    sys.addaudithook(hook)


# ---- one task


def serve(channel, task):
    """Answer the grader's calls until it hangs up.  The first asks for the submission itself."""
    from remote import LARGEST, Peer

    def receive():
        return read_exactly(channel, int.from_bytes(read_exactly(channel, 8), "big"))

    def send(message):
        if len(message) > LARGEST:
            message = json.dumps(dict(raised=["ValueError", "the result is too large", None], state={}, new=[], rng=None,
                                      fault=None)).encode()
        channel.sendall(len(message).to_bytes(8, "big") + message)

    peer = Peer("c", send, receive, task["path"])
    first = peer.receive()
    try:
        peer.remember("c0", load(Path(task["path"])))
        peer.send(dict(done=None, graph=[]))
    except BaseException as e:
        peer.send(peer.failed(e))
        return
    while first:
        got = peer.receive()
        if got["do"] == "clear":
            peer.clear()
        else:
            peer.send(peer.answer(got))


def child(channel, output, task):
    os.setsid()
    os.chdir(task["work"])
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0), os.dup2(output, 1), os.dup2(output, 2)
    sys.stdout.reconfigure(line_buffering=True)                   # what is printed before a kill is not lost
    builtins.exit = builtins.quit = sys.exit                      # they come with site, which -S leaves out
    os.environ.update(HOME=task["work"], TMPDIR=task["work"])
    limit(task["seconds"], task["mebibytes"], task["output"])
    guard(task["work"], task["readable"], task["kernel"])
    serve(channel, task)


# ---- the process that forks


def descendants(of):
    """Process ids below a process, from /proc."""
    below = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            pid, rest = stat.read_text().split(" ", 1)
            below.setdefault(int(rest.rsplit(")", 1)[1].split()[1]), []).append(int(pid))
    found, todo = [], [of]
    while todo:
        new = below.get(todo.pop(), [])
        found += new
        todo += new
    return found


def end(pid):
    """Kill a task and all that it has left; returns its status.  Orphans come to this process (subreaper)."""
    status = None
    for _ in range(200):
        for p in [pid, *(descendants(os.getpid()) if LINUX else ())]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(p, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while (got := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                status = got[1] if got[0] == pid else status
            time.sleep(0.01)
            continue
        break
    return status


def main(control, paths):
    sys.path += paths
    import torch
    import torch.fx.experimental.symbolic_shapes                  # autograd asks for it: half a second, once for all forks

    import remote                                                 # noqa: F401
    if LINUX:
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)                   # orphans of the tasks become children of this process
    torch.set_num_threads(1)
    control = socket.socket(fileno=control)
    control.sendall(b"here")
    while True:
        message, fds, _, _ = socket.recv_fds(control, 1 << 16, 2)
        if not message:
            return
        channel, output = fds
        pid = os.fork()
        if not pid:
            control.close()
            try:
                child(socket.socket(fileno=channel), output, json.loads(message))
            except (EOFError, OSError):
                pass                                              # the grader has hung up
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)                                       # no atexit of the student's
        os.close(channel), os.close(output)
        over = control.recv(1)                                    # the grader says so, or is no more
        status = end(pid)
        if not over:
            return
        control.sendall(b"%d\n" % (-1 if status is None else status))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])

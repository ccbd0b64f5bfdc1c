"""The machine: device, threads, precision, random streams, clocks."""

import ctypes
import functools
import os
import platform
import statistics
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import torch

from nano_dmd.engine.files import blame


def pick_device(name):
    """'auto' -> cuda if there is one; 'cuda' -> under torchrun, this process's own.

    raises UserError for a device that this machine lacks or that cannot do what is needed.
    """
    with blame(f"no device {name!r} to use on this machine", "try --device cpu"):
        best = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(best if name == "auto" else name)
        if device.type == "cuda":
            own = int(os.environ.get("LOCAL_RANK", 0))
            device = torch.device("cuda", own if device.index is None else device.index)
            torch.cuda.set_device(device)
        if device.type == "cpu" and device.index:
            raise RuntimeError("there is one CPU")
        torch.empty(1, dtype=torch.float64, device=device).cpu()  # for heun; mps has no float64
    return device


def fast_bf16(device):
    """Whether bfloat16 is fast there: yes on GPUs.  Many CPUs emulate it, 10 to 60 times slower.

    Intel's without AMX compute in it, but at less than half the speed of float32 (docs/log.md).
    """
    known = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    slow = "GenuineIntel" in cpu() and "amx_bf16" not in cpu()
    return torch.device(device).type != "cpu" or known and not slow


@functools.lru_cache
def cpu():
    """What Linux says about the CPU; "" elsewhere."""
    with suppress(OSError):
        return Path("/proc/cpuinfo").read_text()
    return ""


def keep_freed_memory():
    """Let Linux's C library keep the memory that a step frees, for the next step (docs/log.md).

    By default it gives this memory back to the system.  The system clears it before every new use,
    which takes time.  On other systems nothing changes.
    """
    with suppress(AttributeError, TypeError):      # macOS, Windows
        for setting, size in (-3, 2**25), (-1, 2**28):     # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(setting, size)


def forked(device):
    """A context after which the random streams of CPU and device are as they were before it.

    torch's default would fork on every GPU, and so set up all eight from each of eight processes.
    """
    device = torch.device(device)
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def compile_net(net):
    """torch.compile a network in place, and its features.  One graph per batch size."""
    net.compile(dynamic=False)
    net.features = torch.compile(net.features, dynamic=False)


def compiled(on, *, asked):
    """A context in which networks run compiled or not, if compiling was asked for at all.

    Steps run compiled.  Pictures and metrics do not: they come in many batch sizes, and after eight
    graphs torch gives up.
    """
    return torch.compiler.set_stance("default" if on else "force_eager") if asked else nullcontext()


class Clock:
    """[CPU, wall] seconds since the start, those of the earlier parts of a resumed run included."""

    def __init__(self, before=(0.0, 0.0)):
        self.zero = before[0] - time.process_time(), before[1] - time.perf_counter()

    def read(self):
        now = time.process_time(), time.perf_counter()
        return [round(zero + t, 3) for zero, t in zip(self.zero, now)]


def median_seconds(function, device, repeats, limit=float("inf")):
    """Median wall time of one call, after two to warm up; fewer calls after limit seconds."""
    times = []
    while len(times) < repeats + 2 and (len(times) < 3 or sum(times[2:]) < limit):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def matmul_flops(device, bf16):
    """Operations per second of a large matrix product: the machine's practical peak."""
    n = 8192 if device.type == "cuda" else 1536
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    return 2 * n**3 / median_seconds(lambda: a @ a, device, repeats=10)


def about(device):
    """What a measurement was made on, and this process's peak memory: on the GPU, else resident."""
    peak, name = None, platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    else:
        with suppress(ImportError):                # Windows has no such module
            import resource

            unit = 2**20 if sys.platform == "darwin" else 2**10   # bytes there, KiB elsewhere
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return dict(peak_memory_mib=peak and round(peak), device=name, threads=torch.get_num_threads(),
                torch=torch.__version__, python=platform.python_version())

"""TODO."""

import os
import platform
import sys
import time
from contextlib import nullcontext, suppress

import torch

from nano_dmd.engine.files import UserError, first_line


def forked(device):
    """A context whose random draws, on the CPU and on device, leave no trace: afterwards all goes on as if it had not been.

    By its own choice torch would fork on every GPU there is, and so set up all eight from each of eight processes.
    """
    device = torch.device(device)
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def fast_bf16(device):
    """Whether bfloat16 is faster than float32 there: a CPU without instructions for it (AVX2, most laptops) emulates it,
    10 to 60 times slower than float32 in the layers tried (LOG.md)."""
    mkldnn = torch.backends.mkldnn.is_available()
    return torch.device(device).type != "cpu" or (mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def median_seconds(function, device, repeats):
    """Median wall time of one call, after two calls to warm up."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[repeats // 2]


def pick_device(name):
    """'auto' -> cuda if there is one; 'cuda' -> under torchrun, this process's own.

    raises UserError for a device that this machine lacks or that cannot do what is needed.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index)
            torch.cuda.set_device(device)
        if device.type == "cpu" and device.index:
            raise RuntimeError("there is one CPU")
        torch.empty(1, dtype=torch.float64, device=device).cpu()  # heun integrates in float64, which Apple's mps has not
    except (RuntimeError, AssertionError, ImportError, TypeError) as e:               # any of them, by kind of device
        raise UserError(f"no device {name!r} to use on this machine ({first_line(e)}); try --device cpu") from e
    return device


def use_threads(count, device):
    """Set the number of CPU threads (0 = torch's choice), with a hint where they will wait: threads of a small network wait for
    each other, and with one core busy elsewhere two of them took 3 times as long as one (LOG.md)."""
    if count:
        torch.set_num_threads(count)
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    load = 0.0
    with suppress(AttributeError, OSError):                       # Windows has none
        load = os.getloadavg()[0]
    if device.type == "cpu" and threads > 1 and load + threads > cores + 0.5:
        print(f"other programs use {load:.1f} of {cores} cores: --threads 1 may be several times faster than {threads}",
              file=sys.stderr, flush=True)


class Clock:
    """[CPU, wall] seconds since the start, those of the earlier parts of a resumed run included."""

    def __init__(self, before=(0.0, 0.0)):
        self.zero = before[0] - time.process_time(), before[1] - time.perf_counter()

    def read(self):
        return [round(self.zero[0] + time.process_time(), 3), round(self.zero[1] + time.perf_counter(), 3)]


def machine(device):
    """What a measurement was made on, and the peak memory of this process there: allocated on a GPU, else resident."""
    if device.type == "cuda":
        peak, name = torch.cuda.max_memory_allocated(device) / 2**20, torch.cuda.get_device_name(device)
    else:
        peak, name = None, platform.processor() or platform.machine()
        with suppress(ImportError):                               # Windows has no such module
            import resource

            unit = 2**20 if sys.platform == "darwin" else 2**10   # bytes there, KiB elsewhere
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return dict(peak_memory_mib=peak and round(peak), device=name, threads=torch.get_num_threads(), torch=torch.__version__,
                python=platform.python_version())


def compile_net(net):
    """torch.compile a network in place, its features too, where the GAN looks in; each batch size becomes a graph of its own."""
    net.compile(dynamic=False)
    net.features = torch.compile(net.features, dynamic=False)


def compiled(on, *, asked):
    """A context in which networks run compiled or not, if compiling was asked for at all.

    Steps run compiled, all else (pictures, metrics) as it is: it comes in sizes of its own, each of which would have to be
    compiled, and after eight kinds of call torch gives up and runs everything as it is.
    """
    return torch.compiler.set_stance("default" if on else "force_eager") if asked else nullcontext()

"""What every test gets: one thread, a cache of its own, tiny runs that skip the final evaluation, and a device to be tried."""

import contextlib
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipelines import PROMPTS
from nano_dmd import evaluate, methods, train
from nano_dmd.engine import files, prepare, progress
from nano_dmd.engine.config import resolve
from nano_dmd.teachers import zoo

META = torch.device("meta")
TOY = ["--preset", "toy", "--device", "cpu", "--teacher_steps", "50", "--batch", "32"]


def pytest_terminal_summary(terminalreporter):
    """A program that is missing leaves tests out: say so once, at the end."""
    reasons = {str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", [])}
    for reason in sorted(reason for reason in reasons if "is not installed:" in reason):
        terminalreporter.write_line(reason)


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory):
    """The user's cache is neither used nor touched, by child processes neither."""
    torch.set_num_threads(1)
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANO_DMD_CACHE", str(cache))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield cache


@pytest.fixture(autouse=True)
def notes_are_said_again():
    """A process says each note once; to a test that looks for it, somebody else's test was another process."""
    files.note.cache_clear()


@pytest.fixture
def quick(monkeypatch):
    """Runs without final evaluation, diagrams and the teacher's answer for the pictures: no weight depends on them."""
    monkeypatch.setattr(train, "have_matplotlib", lambda: False)
    monkeypatch.setattr(evaluate, "report_rows", lambda net, teacher, data, cfg: {
        "teacher": {"NFE": 35, "seconds": 1.0}, cfg.method: {"NFE": len(net.sigmas)}})
    monkeypatch.setattr(progress, "heun", lambda denoiser, z, cond=None, **levels: 0.5 * z)


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory):
    """A finished run folder (SiD on ring8, 20 steps), complete but for the metrics, which are made up: read it only."""
    out = tmp_path_factory.mktemp("runs") / "toy-sid"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "measure", lambda sample, data, draws=5, k=1, n=0: {"sw2": 1.0, "modes": 8})
        train.main([*TOY, "--method", "sid", "--steps", "20", "--seed", "3", "--out", str(out),
                    "--log_every", "5", "--sample_every", "10", "--save_every", "10"])
    return out


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    """A text file of four prompts, with blank lines."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n\n".join(PROMPTS) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of four images of noise with captions beside them: read it only."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i, text in enumerate(PROMPTS):
        Image.fromarray(rng.integers(0, 255, (80, 70, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(text)
    return str(folder)


@pytest.fixture
def fast(monkeypatch):
    """The teacher's answer, for pictures and metrics, in two Heun steps; no speeds, no diagrams."""
    heun = progress.heun
    for module in (progress, evaluate):
        monkeypatch.setattr(module, "heun", lambda *args, **kwargs: heun(*args, **{**kwargs, "steps": 2}))
    monkeypatch.setattr(evaluate, "milliseconds", lambda *args: 1.0)
    monkeypatch.setattr(train, "have_matplotlib", lambda: False)


@pytest.fixture
def piq(monkeypatch):
    """The perceptual distance without its 528 MB of weights: mean squares of images in [0, 1]."""

    class LPIPS(torch.nn.Module):
        def __init__(self, reduction):
            super().__init__()

        def forward(self, a, b):
            return (a - b).square().flatten(1).mean(1)

    monkeypatch.setitem(sys.modules, "piq", SimpleNamespace(LPIPS=LPIPS))


class OneDevice(TorchDispatchMode):
    """Raises where an operation meets two devices, as on a GPU, and where a copy to the device waits for all work there.

    Numbers (no dimensions) may cross.
    """

    waits = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, copy = kwargs or {}, func._opname in ("_to_copy", "copy_")
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim]
        places = {t.device for t in tensors} | ({torch.device(kwargs["device"])} if copy and kwargs.get("device") else set())
        if tensors and len(places) > 1 and not copy:
            raise RuntimeError(f"{func} meets {[(str(t.device), tuple(t.shape)) for t in tensors]}")
        if tensors and len(places) > 1 and not (self.waits or kwargs.get("non_blocking") or True in args[2:]):
            raise RuntimeError(f"a copy of {tuple(tensors[0].shape)} waits for the device: non_blocking=True")
        return func(*args, **kwargs)


@pytest.fixture
def one_device(monkeypatch):
    """A context that is OneDevice, on a torch without what the meta device lacks: fused optimisers and autocast."""
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        monkeypatch.setattr(torch.optim, kind.__name__, lambda params, fused, kind=kind, **args: kind(params, **args))
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    return OneDevice()


@pytest.fixture
def step_on_meta(monkeypatch, one_device):
    """function(overrides): the logs of a train_step, the second, on torch's meta device."""
    monkeypatch.setattr(zoo, "weights_digest", lambda net: "the same for both")

    def function(overrides):
        cfg = resolve(dict(steps=5, batch=8, teacher_steps=2, pairs=8, pair_steps=2) | overrides)
        prepare.prepare(cfg, torch.device("cpu"))                   # leaves teacher and pairs in the cache
        warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")
        with one_device:
            one_device.waits = True
            _, nets, opts, draw = prepare.prepare(cfg, META)
            methods.train_step(nets, opts, draw, cfg, 2)            # tables are copied to the device once
            one_device.waits = False
            return methods.train_step(nets, opts, draw, cfg, 3)

    return function

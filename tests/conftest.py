"""What every test gets: one thread, a cache of its own, and tiny runs that skip the final evaluation."""

import pytest
import torch

from nano_dmd import assemble, evaluate, train

TOY = ["--preset", "toy", "--device", "cpu", "--teacher_steps", "50", "--batch", "32"]


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory):
    """The user's cache is neither used nor touched, by child processes neither."""
    torch.set_num_threads(1)
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANO_DMD_CACHE", str(cache))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield cache


@pytest.fixture
def quick(monkeypatch):
    """Runs without final evaluation, diagrams and the teacher's answer for the pictures: no weight depends on them."""
    monkeypatch.setattr(train, "have_matplotlib", lambda: False)
    monkeypatch.setattr(evaluate, "rows", lambda net, teacher, data, label, images: {
        "teacher": {"NFE": 35, "seconds": 1.0}, label: {"NFE": len(net.sigmas)}})
    monkeypatch.setattr(assemble, "heun", lambda denoiser, z, cond=None: 0.5 * z)


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory):
    """A finished run folder (SiD on ring8, 20 steps), complete but for the metrics, which are made up: read it only."""
    out = tmp_path_factory.mktemp("runs") / "toy-sid"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "measure", lambda sample, data, draws=5, k=1, images=0: {"sw2": 1.0, "modes": 8})
        train.main([*TOY, "--method", "sid", "--steps", "20", "--seed", "3", "--out", str(out),
                    "--log_every", "5", "--sample_every", "10", "--save_every", "10"])
    return out

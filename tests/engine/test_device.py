"""What an accelerator would meet, tried on a machine without one.

torch's meta device computes shapes and holds no numbers: reading one back, for which a GPU would have to finish all its
work first, is an error there. So a step that runs on it (conftest.step_on_meta) never waits for the device.
"""

import platform
import subprocess
import sys

import pytest
import torch
from test_hub import pipeline

from nano_dmd import evaluate, methods, train
from nano_dmd.metrics.images import digit_classifier
from nano_dmd.teachers import data, zoo
from nano_dmd.engine.machine import forked
from nano_dmd.denoiser import train_denoiser
from nano_dmd.teacher import load_teacher

EDM_ARGS = dict(model_type="SongUNet", img_resolution=8, img_channels=1, label_dim=10, model_channels=16, channel_mult=[1, 2],
                num_blocks=1, attn_resolutions=[4])
GAN = dict(w_gan=0.1, w_disc=0.1)
CASES = [*(dict(preset="digits", method=m) for m in methods.METHODS), *(dict(preset="toy", method=m) for m in methods.METHODS),
         dict(preset="digits", method="dmd2", sigmas="80,0.4", accumulate=2, critic_dropout=0.2, noisings=2),
         dict(preset="digits", method="dmd2", sigmas="80,0.4", backward_simulation=False),
         dict(preset="toy", method="dmd2", **GAN)]


def test_what_is_watched_for_is_noticed(one_device):
    """Two devices in one operation, a copy to the device that waits, a number read back; numbers themselves may cross."""
    there, here = torch.ones(2, device="meta"), torch.ones(2)
    with one_device:
        assert (there + torch.tensor(2.0)).is_meta and here.to("meta", non_blocking=True).is_meta
        for wrong in (lambda: there + here, lambda: here.to("meta"), lambda: there.copy_(here), lambda: there.sum().item(),
                      lambda: there.cpu(), lambda: bool((there > 0).any()), lambda: there[there > 0]):
            with pytest.raises((RuntimeError, NotImplementedError)):
                wrong()


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case.values())))
def test_a_step_keeps_to_its_device_and_never_waits_for_it(case, step_on_meta):
    logs = step_on_meta(case)
    assert logs and all(value.device.type == "meta" for value in logs.values())


@pytest.mark.parametrize("method", ["dmd2", "sid"])
def test_so_does_a_step_of_edms_networks(method, step_on_meta, monkeypatch):
    monkeypatch.setitem(zoo.RECIPES, "digits", zoo.RECIPES["digits"] | dict(network="edm", args=EDM_ARGS))
    step_on_meta(dict(preset="digits", method=method, flip=True, guidance=2.0, checkpointing=True))


@pytest.mark.parametrize("method", ["dmd", "dmd2"])
def test_so_does_a_step_on_data_too_large_for_it(method, step_on_meta, monkeypatch):
    """Pairs and images stay in the host's memory; the rows that a step looks at travel."""
    monkeypatch.setattr(data, "RESIDENT", 0)
    step_on_meta(dict(preset="digits", method=method))


def test_so_does_a_step_of_diffusers_networks(step_on_meta, tmp_path):
    pipeline(tmp_path)
    step_on_meta(dict(preset="digits", teacher=str(tmp_path), method="dmd2", data="digits", **GAN))


def test_so_does_the_training_of_a_teacher(one_device, monkeypatch):
    """But for the bar, which reads the loss every 50th update."""
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda self: 0.0 if self.is_meta else item(self))
    recipe = dict(zoo.RECIPES["digits"], steps=2, batch=4, label_dropout=0.1)
    net, digits = zoo.untrained(recipe, "meta").to("meta"), data.load_digits("meta")
    with one_device:
        ema = train_denoiser(net, lambda n: digits.sample(n, torch.Generator()), recipe, show=False)
    assert all(p.device.type == "meta" for p in ema.parameters())


def test_random_streams_of_other_devices_are_left_alone(monkeypatch, tmp_path, quick):
    """torch's own default for fork_rng is every GPU, on each of which every process would then take memory."""
    asked, fork = [], torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices=None: (asked.append(devices), fork([]))[1])
    monkeypatch.setenv("NANO_DMD_CACHE", str(tmp_path))
    train.main(["--preset", "digits", "--method", "sid", "--device", "cpu", "--teacher_steps", "1", "--steps", "1",
                "--batch", "2", "--out", str(tmp_path / "run")])
    digit_classifier(data.load_digits())
    load_teacher("random:tiny")
    assert len(asked) == 4 and all(devices == [] for devices in asked)                # teacher, diagnostics, classifier, weights
    forked("cuda:3")
    assert asked[-1] == [torch.device("cuda:3")]


def test_forked_leaves_no_trace():
    before = torch.random.get_rng_state()
    with forked("cpu"):
        torch.manual_seed(5)
        torch.randn(3)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's setting")
def test_freed_memory_is_kept():
    """Pages that the system clears while blocks are used and freed, over and over: thousands, then none."""
    code = """
import resource, torch
from nano_dmd.engine.machine import keep_freed_memory
def pages():
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for mib in [8] * 10 + [4] * 10 + [2] * 10:
        blocks = [torch.ones(mib * 2**18) for _ in range(12)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start
before = pages()
keep_freed_memory()
pages()
print(before, pages())"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 1000 and after < 100

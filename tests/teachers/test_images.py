"""Image scale: a run on a folder of images from end to end, and what makes it fast leaves its result alone."""

import functools
import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import to_pil_image

from nano_dmd import evaluate, methods, sample, train
from nano_dmd.engine import pictures, progress
from nano_dmd.teachers import diffusers_unet, zoo
from nano_dmd.engine.files import UserError, load_tensors, read_json
from nano_dmd.dmd_loss import dmd_gradient
from nano_dmd.teachers.edm_networks import edm_network
from nano_dmd.noise import karras_sigmas, parse_sigma
from nano_dmd.engine.config import resolve
from nano_dmd.presets import PRESETS
from nano_dmd.sid_loss import sid_integrand
from nano_dmd.denoiser import EDM
from nano_dmd.engine import machine
from nano_dmd.engine.machine import fast_bf16
from nano_dmd.engine.progress import flatten

ARGS = dict(model_type="SongUNet", img_resolution=16, img_channels=3, label_dim=2, model_channels=16, channel_mult=[1, 2],
            num_blocks=1, attn_resolutions=[8])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """24 images of 16x16 pixels in two class folders: smooth red-ish and blue-ish fields."""
    root, rng = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    for i in range(24):
        x = nn.functional.interpolate(torch.rand(1, 3, 4, 4, generator=rng), size=16, mode="bilinear")[0]
        x[2 * (i % 2)] *= 0.3
        (root / str(i % 2)).mkdir(exist_ok=True)
        to_pil_image(x).save(root / str(i % 2) / f"{i}.png")
    return root


@pytest.fixture
def flags(images, tmp_path, monkeypatch):
    """train's command line for a 2-step dmd2 with GAN on those images, tiny enough for seconds."""
    monkeypatch.setitem(zoo.RECIPES["cifar10-small"], "network", "edm")
    monkeypatch.setitem(zoo.RECIPES["cifar10-small"], "args", ARGS)
    return ["--preset", "cifar10-small", "--method", "dmd2", "--data", str(images), "--device", "cpu", "--teacher_steps", "20",
            "--steps", "4", "--batch", "4", "--critic_steps", "1", "--sigmas", "2.5,0.5", "--flip", "--eval_every", "2",
            "--eval_images", "8", "--log_every", "2", "--no-bf16", "--out", str(tmp_path / "run")]


def test_a_run_on_a_folder_of_images(flags, tmp_path, fast):
    """Teacher, student with GAN and two steps, metrics while training, final table, pictures, samples and evaluation."""
    train.main(flags)
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [set(line["metrics"]) for line in lines] == [{"fixed_fd", "fixed_precision", "fixed_recall"}] * 2
    rows = read_json(run / "report.json")["rows"]
    assert list(rows) == ["real halves", "teacher", "dmd2"] and rows["dmd2"]["NFE"] == 2
    assert all(np.isfinite(row["fixed_fd"]) and row["fixed_fd"] > 0 for row in rows.values())
    assert read_json(run / "teacher.json")["shape"] == [3, 16, 16]
    with Image.open(run / "scores" / "000004.png") as picture:    # 5 noise levels of 2 samples (2 classes) of 5 images
        assert picture.size == (64 + 4 * (10 * 17 + 1), 20 + 4 * (5 * 17 + 1))
    sample.main([str(run), "--n", "6", "--class", "1", "--out", str(tmp_path / "x.npy"), "--device", "cpu"])
    assert np.load(tmp_path / "x.npy").shape == (6, 3, 16, 16)


def test_score_grid_shows_what_it_says():
    """One pixel per image, one sample, two noise levels: x, xt over its largest value, d_real, d_fake, g over 3 std."""
    def image(*values):
        return torch.tensor(values).view(1, 1, 1, 2)

    row = image(0.5, -0.5), image(4.0, -2.0), image(0.0, 1.0), image(-1.0, 0.0), image(1.0, -1.0)
    grid = pictures.score_grid([row, row], scale=1)               # (3, H, W) in [0, 1], one grey pixel between images
    shown = torch.stack([grid[0, 1, 3 * i + 1 : 3 * i + 3] for i in range(5)])
    std = 2**0.5                                                  # of (1, -1), unbiased
    expected = torch.tensor([[0.5, -0.5], [1.0, -0.5], [0.0, 1.0], [-1.0, 0.0], [1 / (3 * std), -1 / (3 * std)]])
    torch.testing.assert_close(2 * shown - 1, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(grid[:, 1], grid[:, 3])


def test_labelled_writes_beside_rows_and_above_columns():
    """The picture itself is untouched, each name is in its own field and nowhere else, and no two look alike."""
    picture = torch.rand(3, 80, 120).mul(255).round() / 255
    out = pictures.labelled(picture, ["0.05", "0.5"], ["x", "xt", "d_real"], left=50, top=20)
    assert out.shape == (3, 100, 170)
    torch.testing.assert_close(out[:, 20:, 50:], picture)
    ink = out.mean(0) < 0.5
    fields = [ink[20:60, :50], ink[60:, :50], ink[:20, 50:90], ink[:20, 90:130], ink[:20, 130:]]
    assert all(field.sum() > 5 for field in fields) and not ink[:20, :50].any()
    assert not torch.equal(fields[0], fields[1]) and not torch.equal(fields[2], fields[3])


def test_evaluate_with_inception(flags, images, tmp_path, monkeypatch, capsys, quick):
    """evaluate --metric fid,kid hands n images of the run, and the data, to inception_metrics, and prints what it says."""
    train.main(flags)
    seen = {}

    def metrics(made, reference, wanted, device, weights):
        seen.update(images=torch.cat(list(made)), reference=reference, wanted=wanted, weights=weights)
        return {"fid": 12.5, "kid": 0.25}

    monkeypatch.setattr(evaluate.inception, "inception_metrics", metrics)
    argv = [str(tmp_path / "run"), "--metric", "kid,fid", "--n", "7", "--batch", "3", "--inception-weights", "w.pth",
            "--device", "cpu"]
    evaluate.main(argv)
    assert "12.5" in capsys.readouterr().out and seen["wanted"] == ["fid", "kid"] and seen["weights"] == "w.pth"
    assert seen["images"].shape == (7, 3, 16, 16) and seen["images"].dtype == torch.uint8 and len(seen["reference"]) == 24
    first = seen["images"]
    evaluate.main([*argv, "--reference", "stats.npz", "--repeats", "2"])
    assert seen["reference"] == "stats.npz" and "spread" in capsys.readouterr().out
    assert len(seen["images"]) == 7 and not torch.equal(seen["images"], first)        # the second set has its own seeds
    assert str(images) == read_json(tmp_path / "run" / "config.json")["data"]


def trained(flags, out, *more):
    train.main([*flags, "--out", str(out), *more])
    return load_tensors(out / "generator.safetensors")


def largest_difference(a, b):
    return max((a[k] - b[k]).abs().max().item() for k in a)


def test_recomputing_activations_changes_nothing(flags, tmp_path, quick):
    """--checkpointing: the same weights to 1e-6 after 4 updates."""
    plain, again = trained(flags, tmp_path / "a"), trained(flags, tmp_path / "b", "--checkpointing")
    assert largest_difference(plain, again) <= 1e-6
    with pytest.raises(UserError, match="MLP cannot recompute"):
        train.main(["--preset", "toy", "--teacher_steps", "5", "--checkpointing", "--device", "cpu",
                    "--out", str(tmp_path / "c")])


TINY = ["--device", "cpu", "--teacher_steps", "5", "--batch", "32", "--steps", "3"]


@pytest.mark.slow
def test_compiled_and_eager_agree(tmp_path, quick, monkeypatch):
    """--compile: the same weights to 1e-4 after 5 updates of the teacher and 3 of the student, of size lr = 2e-3 (fused
    kernels round differently)."""
    monkeypatch.setenv("NANO_DMD_CACHE", str(tmp_path / "cache a"))
    plain = trained([*TINY, "--preset", "toy-sid"], tmp_path / "a")
    monkeypatch.setenv("NANO_DMD_CACHE", str(tmp_path / "cache b"))
    compiled = trained([*TINY, "--preset", "toy-sid"], tmp_path / "b", "--compile")
    assert plain.keys() == compiled.keys() and largest_difference(plain, compiled) <= 1e-4


@pytest.mark.slow
def test_steps_are_compiled_and_nothing_else(tmp_path, monkeypatch):
    """The teacher's training, batch 128, and the student's, batch 32, its way into the GAN (twice 32) included; pictures of 80
    and 30 digits, diagnostics and metrics run as they are."""
    graphs = []

    def backend(graph, inputs):
        graphs.append({x.shape[0] for x in inputs if isinstance(x, torch.Tensor) and x.shape[1:] == (1, 8, 8)})
        return graph.forward

    monkeypatch.setenv("NANO_DMD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(train, "have_matplotlib", lambda: False)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    trained([*TINY, "--preset", "digits-dmd2"], tmp_path / "run", "--compile", "--log_every", "1", "--sample_every", "1")
    torch._dynamo.reset()
    assert set.union(*graphs) == {128, 32, 64} and len(graphs) <= 8


def test_bfloat16_is_not_emulated(quick, tmp_path, monkeypatch, capsys):
    """On a CPU without instructions for it a bf16 run is the float32 run to the bit, and says so; on CUDA it is not asked."""
    flags = ["--preset", "digits", "--method", "sid", "--device", "cpu", "--teacher_steps", "2", "--steps", "2", "--batch", "4"]

    def weights(name, *more):
        train.main([*flags, *more, "--out", str(tmp_path / name)])
        return load_tensors(tmp_path / name / "generator.safetensors")

    def differ(a, b):
        return any(not torch.equal(a[k], b[k]) for k in a)

    can = fast_bf16("cpu")
    exact, asked = weights("float32", "--no-bf16"), weights("bfloat16")
    assert differ(exact, asked) == can and ("slow on this CPU" in capsys.readouterr().out) != can
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not fast_bf16("cpu") and fast_bf16("cuda")
    monkeypatch.setenv("NANO_DMD_CACHE", str(tmp_path / "cache"))
    exact = weights("old cpu float32", "--no-bf16")
    assert not differ(exact, weights("old cpu bfloat16")) and "slow on this CPU" in capsys.readouterr().out


@pytest.mark.parametrize("says, fast", [
    ("GenuineIntel avx512_bf16", False), ("GenuineIntel avx512_bf16 amx_bf16", True), ("AuthenticAMD avx512_bf16", True),
    ("", True)])
def test_bfloat16_that_is_slower_than_float32(says, fast, monkeypatch):
    """Intel's without AMX: matrix products ran at 50 GFLOP/s in bfloat16, at 132 in float32 (a thread, n = 1024)."""
    monkeypatch.setattr(machine, "cpu", lambda: says)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert fast_bf16("cpu") == fast and fast_bf16("cuda")


def test_bf16_gradients():
    """The DMD and SiD gradients at x with bfloat16 networks point where float32's do: cosine above .998 (DMD) and .98 (SiD,
    which differentiates through both networks), norms within 5 %, on a real and a fake network that differ by 12.5 %."""
    torch.manual_seed(0)
    real, fake = (EDM(edm_network(**ARGS)).eval() for _ in range(2))
    with torch.no_grad():
        for p, q in zip(real.parameters(), fake.parameters()):
            q.copy_(0.875 * p.add_(0.03 * torch.randn_like(p)))
    x, cond, sigma = torch.randn(8, 3, 16, 16).mul(0.5), torch.arange(8) % 2, torch.linspace(0.1, 5, 8)
    noise = torch.randn_like(x)

    def gradients(bf16):
        real.bf16 = fake.bf16 = bf16
        leaf = x.clone().requires_grad_()
        xt = leaf + sigma[:, None, None, None] * noise
        d_real, d_fake = real(xt, sigma, cond), fake(xt, sigma, cond)
        sid_integrand(leaf, d_real, d_fake, 1.2).sum().backward()
        return dmd_gradient(x, d_real, d_fake), leaf.grad

    for full, half, cosine in zip(gradients(False), gradients(True), (0.998, 0.98)):
        assert full.dtype == half.dtype == torch.float32
        assert nn.functional.cosine_similarity(full.flatten(), half.flatten(), 0) > cosine
        assert half.norm() / full.norm() == pytest.approx(1, abs=0.05)


# ---- published settings


def test_noise_ranges_are_the_published_ones():
    """"Timesteps 20..980" on EDM's 1000-entry table (facts of DMD2) is karras(0.0032,72); SiD's tmax = 800 ends at 24.4."""
    table = karras_sigmas(1000).flip(0)
    for preset, index in (("cifar10-dmd", (20, 980)), ("imagenet64-dmd2", (20, 980))):
        _, low, high = parse_sigma(resolve(dict(preset=preset)).dm_sigma)
        assert table[list(index)].tolist() == pytest.approx([low, high], rel=0.01)
    t = torch.tensor(0.8, dtype=torch.float64)                                        # SiD sid_loss.py:27-33
    sigma = (80 ** (1 / 7) + (1 - t) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert parse_sigma(resolve(dict(preset="cifar10-sid")).dm_sigma)[2] == pytest.approx(sigma.item(), rel=1e-3)


@pytest.mark.parametrize("name", [n for n in PRESETS if n.endswith("64-sid") or n.startswith("cifar10") and n.endswith("d-sid")
                                  or n == "cifar10-sid"])
def test_sid_weights_undo_our_means(name):
    """SiD sums pixels and scales its generator loss by 100: weight 100 CHW on our mean, and CHW on the critic's."""
    cfg = resolve(dict(preset=name))
    size = 3 * (64 if "64" in name else 32) ** 2
    assert (cfg.w_sid, cfg.w_fake) == (100 * size, size)


def test_sample_counts_and_averages_are_the_published_ones():
    """steps * batch in millions of images, and the average's half-life in images: SiD run_sid.sh, DMD appendix B."""
    for name, millions, half_life in (("cifar10-sid", 800, 0.5), ("cifar10-uncond-sid", 500, 0.5), ("imagenet64-sid", 1000, 2),
                                      ("ffhq64-sid", 500, 0.5), ("afhqv2-64-sid", 500, 0.5), ("cifar10-dmd", 117.6, 0)):
        cfg = resolve(dict(preset=name))
        assert cfg.steps * cfg.batch / 1e6 == pytest.approx(millions, rel=1e-3), name
        assert cfg.ema * cfg.batch / 1e6 == pytest.approx(half_life, rel=5e-3), name


# ---- things from elsewhere, asked for by name


def test_flatten():
    record = {"step": 3, "grad": {"dmd_loss": 2.0}, "mesm": [1.0, None]}
    assert flatten(record) == {"step": 3, "grad/dmd_loss": 2.0, "mesm/0": 1.0}


def test_tensorboard_gets_the_numbers_of_the_log(flags, tmp_path, monkeypatch, quick):
    sent = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            assert purge_step == 1 and folder == tmp_path / "run" / "tensorboard"

        def add_scalar(self, name, value, step):
            sent.append((step, name, value))

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    train.main([*flags, "--log_to", "tensorboard"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert sent == [(line["step"], name, value) for line in lines for name, value in flatten(line).items()]


def test_wandb_gets_the_numbers_of_the_log(flags, tmp_path, monkeypatch, quick):
    sent = []
    run = types.SimpleNamespace(log=lambda record, step: sent.append((step, record)))
    begun = []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **k: begun.append(k) or run))
    train.main([*flags, "--log_to", "wandb"])
    assert [step for step, _ in sent] == [2, 4] and "grad/dmd_loss" in sent[0][1]
    train.main(["--resume", "--out", str(tmp_path / "run")])      # the same run there
    assert begun[0]["id"] == begun[1]["id"] and begun[1]["resume"] == "allow" and len(begun[0]["id"]) == 16
    progress.tracker(resolve(dict(log_to="wandb")), tmp_path / "run")                 # a new run in an old folder is another
    assert begun[2]["id"] != begun[0]["id"]


def test_tensorboard_after_a_resume_begins_behind_the_checkpoint(flags, tmp_path, monkeypatch, quick):
    """Killed after the checkpoint of step 2, resumed: what was sent after it is dropped there (purge_step) and sent again."""
    begun = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            begun.append(purge_step)

        add_scalar = flush = lambda self, *args: None

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    step, real = [], methods.train_step

    def killed(*args):
        step.append(1)
        if len(step) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train.main([*flags, "--log_to", "tensorboard", "--save_every", "2"])
    train.main(["--resume", "--out", str(tmp_path / "run")])
    assert begun == [1, 3]


def test_a_missing_tracker_is_a_sentence(flags, monkeypatch, quick):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--log_to wandb needs a package .*pip install wandb"):
        train.main([*flags, "--log_to", "wandb"])


def test_lpips(monkeypatch):
    """hub.lpips: images in [-1, 1] reach piq at 224 pixels in [0, 1], one distance per image, differentiable in the first."""
    class LPIPS(nn.Module):
        def __init__(self, reduction):
            super().__init__()
            assert reduction == "none"

        def forward(self, a, b):
            assert a.shape[2:] == b.shape[2:] == (224, 224) and a.min() >= 0 and b.max() <= 1
            return (a - b).square().flatten(1).mean(1)

    monkeypatch.setitem(sys.modules, "piq", types.SimpleNamespace(LPIPS=LPIPS))
    a, b = -torch.ones(3, 3, 16, 16, requires_grad=True), torch.zeros(3, 3, 16, 16)
    distance = diffusers_unet.lpips("cpu")(a, b)
    torch.testing.assert_close(distance, torch.full((3,), 0.25))                      # (0 - 1/2)^2
    assert torch.autograd.grad(distance.sum(), a)[0].abs().sum() > 0


@pytest.mark.parametrize("error, message", [(OSError("no route"), "cannot download its"), (ImportError("no piq"), "needs piq")])
def test_lpips_that_cannot_be_had(error, message, monkeypatch):
    def fail(**k):
        raise error

    monkeypatch.setitem(sys.modules, "piq", types.SimpleNamespace(LPIPS=fail))
    with pytest.raises(UserError, match=message):
        diffusers_unet.lpips("cpu")

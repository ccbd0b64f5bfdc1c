"""The command lines: a mistake costs one sentence and exit code 2, and touches nothing; a run leaves what it promises.

Without these a user meets tracebacks, overwritten runs, and typos that show after an hour of training.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from nano_dmd import compare, evaluate, fake_score, methods, sid_loss, train
from nano_dmd.engine import draw, files, progress
from nano_dmd.engine.files import command, load_checkpoint, load_tensors, read_json
from nano_dmd.teachers.edm_networks import edm_network
from nano_dmd.engine.config import Config, resolve, split
from nano_dmd.presets import PRESETS
from nano_dmd.denoiser import EDM, heun
from nano_dmd.teachers import zoo
from nano_dmd.teachers.zoo import RECIPES, save_teacher

TOY = ["--preset", "toy", "--method", "sid", "--device", "cpu", "--teacher_steps", "50", "--batch", "32",
       "--steps", "12", "--log_every", "2", "--sample_every", "4", "--save_every", "3", "--warmup", "0", "--out", "out"]
CLI = [sys.executable, "-m", "nano_dmd.train"]
ROOT = Path(__file__).parents[1]


def snapshot(folder):
    """{path: hash of the content} of everything below a folder."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
            for p in Path(folder).rglob("*")}


def exit_code(main, argv):
    with pytest.raises(SystemExit) as stop:
        command(lambda: main(argv))
    return stop.value.code


@pytest.fixture
def complain(tmp_path, monkeypatch, capfd):
    """complain(argv, main) -> the one sentence on stderr; nothing in the working folder or the cache may change."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "train", lambda *a: pytest.fail("the training was started"))
    monkeypatch.setattr(zoo, "train_denoiser", lambda *a: pytest.fail("the training of a teacher was started"))

    def run(argv, main=train.main):
        folders = tmp_path, files.cache_dir()
        before = [snapshot(folder) for folder in folders]
        assert exit_code(main, argv) == 2
        err = capfd.readouterr().err
        assert re.fullmatch(r"error: [^\n]+\n", err), err
        assert [snapshot(folder) for folder in folders] == before
        return err

    return run


# ---- mistakes

MISTAKES = [
    (["--preset", "nope"], "unknown preset 'nope'"),
    (["--preset", "toy-nope"], "unknown preset 'toy-nope'"),
    (["--method", "gan"], f"--method must be one of {', '.join(methods.METHODS)}, got 'gan'"),
    (["--nope", "1"], "--nope"),
    (["--meth", "sid"], "--meth"),                                                    # no abbreviations
    (["--batchsize", "3"], "--batchsize"),
    (["sid"], "sid"),
    (["--steps"], "--steps"),
    (["--steps", "many"], "'many'"),
    (["--steps", "1.5"], "'1.5'"),
    (["--lr_generator", "fast"], "'fast'"),
    (["--bf16", "yes"], "yes"),
    *[([f"--{name}", "0"], f"--{name} must be at least 1, got 0")
      for name in ("batch", "steps", "critic_steps", "log_every", "sample_every", "save_every", "pairs")],
    *[([f"--{name}", "-1"], f"--{name} must be at least")
      for name in ("batch", "steps", "seed", "threads", "warmup", "ema", "clip", "teacher_steps", "decay_from", "beta1",
                   "w_dm", "w_reg", "w_gan", "w_sid", "w_fake", "w_disc")],
    (["--pair_steps", "1"], "--pair_steps must be at least 2"),
    (["--beta2", "1"], "--beta2 must be at most 0.999999"),
    *[([f"--lr_generator={x}"], f"--lr_generator must be a finite number, got {x}") for x in ("nan", "inf", "-inf")],
    *[([f"--{f.name}", "nan"], f"--{f.name} must be a finite") for f in fields(Config) if f.type is float],
    *[([f"--{f.name}={word}"], f"--{f.name} must be at {which}") for f in fields(Config) if f.type in (int, float)
      for which, word in (("most", f"{2 * f.metadata['high'] + 1:.0f}"), ("least", f"{f.metadata['low'] - 1:.0f}"))],
    (["--lr_critic", "0"], "--lr_critic must be at least 1e-12, got 0"),
    (["--lr_generator", "1_000"], "'1_000' is not a number"),
    (["--batch", "\u0661\u0662"], "is not a whole number"),                           # twelve, in Arabic digits
    (["--batch", "5" * 5000], "is not a whole number"),
    (["--data", "A" * 5000], "--data holds a name of over 255 bytes"),
    (["--out", "a\0b"], "--out: is 'a\\x00b', which is not UTF-8 text"),
    (["--teacher", "\udcff"], "--teacher: is '\\udcff', which is not UTF-8 text"),
    (["--data", "/dev/zero"], "no data set '/dev/zero'"),
    (["--sigmas", ",".join(map(str, range(100, 0, -1)))], "at most 64 numbers"),
    *[([f"--{name}", x], f"--{name}") for name in ("dm_sigma", "critic_sigma", "gan_sigma") for x in (
        "", "lognormal", "lognormal(0)", "lognormal(a,b)", "lognormal(0,0)", "lognormal(0,-1)", "lognormal(nan,1)",
        "lognormal(inf,1)", "lognormal(0,inf)", "karras(2,1)", "karras(0,1)", "karras(nan,1)", "uniform(0,1)",
        "karras(1e-320,1)")],
    *[(["--sigmas", x], f"got '{x}'") for x in (
        "1,2", "1,1", "0", "-1", "", "1,", "a", "nan", "inf", "inf,1", "2;1", "t-1", "t", "t1000", "1e300")],
    (["--sigmas", "2,1"], "one-step"),                                                # dmd regresses to pairs
    (["--method", "sid", "--w_gan", "1"], "give both, or 0 to both"),
    (["--method", "sid", "--w_sid", "0"], "nothing to minimise: give one of --w_sid"),
    (["--method", "regression", "--w_reg", "0", "--dry-run"], "--w_reg"),
    (["--method", "f_distill", "--w_gan", "0", "--w_disc", "0"], "--w_disc 0: this method reads p_real / p_fake off its"),
    (["--method", "f_distill", "--ratio", "exact"], "--ratio exact needs a teacher toy:NAME, not 'digits'"),
    (["--method", "f_distill", "--w_disc", "0"], "--w_gan 0.1 and --w_disc 0.0: give both"),
    (["--method", "f_distill", "--divergence", "tv"], "--divergence must be one of rkl, kl, js, sf, sh, jf, neyman, got 'tv'"),
    (["--method", "tdm", "--no-ode_steps"], "trains steps of the ODE: give --ode_steps, two or more"),
    (["--method", "phased", "--noisings", "2"], "--sigmas, --noisings 1"),
    (["--method", "phased", "--sigmas", "2.5"], "two or more --sigmas"),
    (["--method", "real_uid", "--critic_dropout", ".1"], "--critic_dropout: this method compares samples of one label"),
    (["--method", "decoupled", "--guidance", "1"], "--guidance 1 leaves nothing to augment"),
    (["--method", "sida", "--w_gan", "0", "--w_disc", "0"], "nothing without its discriminator"),
    (["--method", "sid", "--w_r1", "1"], "--w_r1 1.0: there is no discriminator here"),
    (["--method", "real_uid", "--uid_a", "1"], "--uid_b 0.94: with --uid_a 1 the critic sees no real data; give 1"),
    (["--preset", "sd15-dmd2", "--ida", ".01", "--lora_critic", "4"], "--ida mixes whole networks"),
    (["--teacher", "nope"], "no teacher 'nope'"),
    (["--teacher", "toy"], "no teacher 'toy'"),
    (["--teacher", "toy:nope"], "no mixture 'toy:nope'"),
    (["--teacher", "toy:"], "no mixture 'toy:'"),
    (["--data", "nope"], "no data set 'nope'"),
    (["--data", "toy:nope"], "no mixture 'toy:nope'"),
    *[(["--device", x], f"no device {x!r}") for x in ("nonsense", "meta", "cpu:99", "cuda:99", "hpu", "cuda:x", "")],
    (["--out", "two\nlines/file", "--device", "nonsense\nthing"], "nonsense"),
    (["--resume"], "cannot read runs/digits-dmd/config.json"),
    (["--resume", "--out", "nowhere"], "cannot read nowhere/config.json"),
]


@pytest.mark.parametrize("argv, text", MISTAKES, ids=[" ".join(argv)[:50].replace("\n", " ") for argv, _ in MISTAKES])
def test_mistakes(complain, argv, text):
    assert text in complain(argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the test wants to be absent")
def test_no_cuda(complain):
    assert "no device 'cuda'" in complain(["--device", "cuda"])


def test_device_without_float64(complain, monkeypatch):
    """What Apple's GPU says, and when: it is there, but has no float64."""
    def empty(*size, dtype=None, device=None):
        if dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
        return torch.zeros(*size)

    monkeypatch.setattr(torch, "empty", empty)
    text = complain(["--device", "mps"])
    assert "no device 'mps' to use on this machine: Cannot convert a MPS Tensor to float64" in text and "--device cpu" in text


def test_data_of_another_shape(complain, toy_run):
    """The GAN would compare digits with points; the mismatch is named before anything is written."""
    text = complain(TOY + ["--data", "digits"])                   # toy_run has trained the teacher
    assert "--data digits has (1, 8, 8) samples in 10 classes, --teacher toy:ring8 makes (2,) in 0" in text


@pytest.mark.parametrize("flags", [["--reg_loss", "lpips"], ["--flip"]], ids=" ".join)
def test_flags_for_images(complain, toy_run, flags):
    """A distance of pictures and a mirror mean nothing to points."""
    assert f"{flags[0]}" in complain([*TOY, *flags])


def test_unwritable_folder(complain, tmp_path):
    """Even root cannot make a folder below a file."""
    (tmp_path / "file").write_text("mine")
    assert "cannot write to file/run: " in complain(["--preset", "toy", "--out", "file/run"])
    assert "cannot write to file: " in complain(["--preset", "toy", "--out", "file"])


@pytest.fixture
def finished(toy_run, tmp_path):
    """A copy of a finished run in ./run."""
    shutil.copytree(toy_run, tmp_path / "run")
    return tmp_path / "run"


def test_existing_run_is_not_overwritten(complain, finished):
    assert "run already holds a run: add --resume" in complain(["--preset", "toy", "--out", "run"])


@pytest.mark.parametrize("argv", [["--method", "dmd"], ["--steps", "21"], ["--seed", "4"], ["--preset", "digits"],
                                  ["--lr_critic", "1"], ["--no-bf16"], ["--sigmas", "2"]], ids=" ".join)
def test_resume_with_a_changed_flag(complain, finished, argv):
    text = complain(["--resume", "--out", "run", *argv])
    assert f"{argv[0].replace('--no-', '--')} was" in text and "when run was started" in text


@pytest.mark.parametrize("content", [
    "[]", "3", '{"nope": 1}', '{"steps": "many"}', '{"sigmas": 2}', '{"steps": 0}', "{"])
def test_resume_of_a_broken_config(complain, finished, content):
    (finished / "config.json").write_text(content)
    complain(["--resume", "--out", "run"])


def test_resume_of_a_broken_checkpoint(complain, finished):
    path = finished / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-1])
    assert "checkpoint run/checkpoint.pt is corrupt" in complain(["--resume", "--out", "run"])
    path.unlink()
    assert "no checkpoint at run/checkpoint.pt; start without --resume" in complain(["--resume", "--out", "run"])


def test_true_processes(tmp_path):
    """The same through a shell: exit code 2 and one line; a dry run prints the config and leaves nothing."""
    def shell(*argv):
        return subprocess.run([*CLI, *argv], cwd=tmp_path, capture_output=True, text=True, env=environment())

    done = shell("--steps", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --steps must be at least 1, got 0\n"
    done = shell("--preset", "toy", "--seed", "5", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "") and "* seed                 5\n" in done.stdout
    assert list(tmp_path.iterdir()) == []


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT)}


# ---- the other command lines


@pytest.mark.parametrize("argv, text", [
    ([], "run"), (["nowhere"], "nowhere/config.json"), (["run", "--device", "nonsense"], "no device 'nonsense'"),
    (["run", "--draws", "many"], "'many'"), (["run", "--metric", "fid"], "choose from sw2"),
    (["run", "--draws", "0"], "--draws"),
], ids=str)
def test_evaluate_mistakes(complain, finished, monkeypatch, argv, text):
    monkeypatch.setattr(evaluate, "measure", lambda sample, data, draws=5, k=1, n=0: {"sw2": sum([1.0] * draws) / draws})
    monkeypatch.setattr(evaluate, "milliseconds", lambda *a: 1.0)
    assert text in complain(argv, evaluate.main)


@pytest.mark.parametrize("name, content", [
    ("config.json", b"{}["), ("config.json", b"[]"), ("config.json", b'{"nope": 1}'), ("generator.safetensors", None),
    ("generator.safetensors", b"x" * 100), ("teacher.json", None), ("teacher.safetensors", b"")], ids=str)
def test_evaluate_a_broken_run(complain, finished, name, content):
    (finished / name).unlink() if content is None else (finished / name).write_bytes(content)
    complain(["run"], evaluate.main)


@pytest.mark.parametrize("argv, text", [
    ([], "rows"), (["sid", "--seeds", "0"], "--seeds"), (["sid", "--jobs", "0"], "--jobs"),
    (["gan"], "--method must be one of"), (["sid --help"], "--help"), (["--", "sid --seed 4"], "--seed cannot stand in the row"),
    (["sid", "sid --method dmd"], "--method cannot stand"), (["sid --preset digits"], "--preset cannot stand"),
    (["sid --out x"], "--out cannot stand"), (["sid --resume"], "--resume"),
    (["sid", "dmd --nope 1"], "--nope"), (["sid", "dmd --steps 0"], "--steps"),
    (["sid", 'dmd --data "x'], "quot"),
    (["sid", "--preset", "nope"], "unknown preset"), (["sid", "--seeds", "few"], "'few'"),
], ids=str)
def test_compare_mistakes(complain, monkeypatch, argv, text):
    """A typo in the last row shows before the first row is trained."""
    monkeypatch.setattr(compare.subprocess, "run", lambda *a, **k: pytest.fail("a run was started"))
    assert text in complain(argv, compare.main)


def test_compare_reports_a_failing_run(complain, monkeypatch):
    failed = subprocess.CompletedProcess([], 2, "", "bar 10%\nerror: sid_loss is nan at step 8")
    monkeypatch.setattr(compare.subprocess, "run", lambda *a, **k: failed)
    assert "error: sid_loss is nan at step 8" in complain(["sid"], compare.main)


# ---- help, presets and precedence


def test_help_explains_every_field(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    assert exit_code(train.main, ["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for f in fields(Config):
        assert f"--{f.name}" in text and f"{f.metadata['help']} (default: {f.default!r})" in text
    assert "--resume" in text and "--dry-run" in text


def test_config_is_flat_and_explained():
    for f in fields(Config):
        assert f.type in (str, int, float, bool) and isinstance(f.default, f.type) and len(f.metadata["help"]) > 5


def test_precedence(monkeypatch):
    """Defaults < the preset < the method's line of the preset < the command line."""
    monkeypatch.setitem(PRESETS, "mine", dict(method="dmd2", batch=7, steps=5))
    monkeypatch.setitem(PRESETS, "mine-sid", dict(steps=9))
    for given, expected in [
            ({}, ("dmd2", 7, 5, 0)), (dict(seed=1), ("dmd2", 7, 5, 1)), (dict(method="sid"), ("sid", 7, 9, 0)),
            (dict(method="sid", steps=3, batch=2), ("sid", 2, 3, 0))]:
        cfg = resolve(dict(preset="mine", **given))
        assert (cfg.method, cfg.batch, cfg.steps, cfg.seed) == expected
        assert cfg.out == f"runs/mine-{cfg.method}"
    assert resolve({}) == resolve(dict(preset="digits", method="dmd"))


def test_a_line_of_presets_is_preset_and_method():
    """digits-dmd2 --method sid is digits with sid, without the critic steps and weights that dmd2 wants."""
    def same(a, b):
        assert asdict(resolve(a)) | {"preset": ""} == asdict(resolve(b)) | {"preset": ""}

    same(dict(preset="toy-sid"), dict(preset="toy", method="sid"))
    same(dict(preset="digits-dmd2", method="sid"), dict(preset="digits", method="sid"))


def test_default_folder_never_overwrites(tmp_path, monkeypatch, quick):
    """The same command twice makes two runs, unless --out says where."""
    monkeypatch.chdir(tmp_path)
    argv = [*TOY[:-2], "--steps", "1"]
    train.main(argv)
    first = snapshot("runs/toy-sid")
    train.main(argv)
    assert snapshot("runs/toy-sid") == first and read_json("runs/toy-sid-2/config.json")["out"] == "runs/toy-sid-2"


TINY_EDM = dict(model_type="SongUNet", img_channels=3, model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[16])


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory):
    """What presets name and this machine lacks: {preset base: flags} with tiny networks for the published weights, of the
    same resolution and classes, and a few images in folders for CIFAR-10."""
    root, flags = tmp_path_factory.mktemp("stand-ins"), {}
    images = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for i, pixels in enumerate(images):
        (root / f"cifar10/{i % 10}").mkdir(parents=True, exist_ok=True)
        to_pil_image(pixels).save(root / f"cifar10/{i % 10}/{i}.png")
    for base, size, classes in (("cifar10", 32, 10), ("cifar10-uncond", 32, 0), ("imagenet64", 64, 1000), ("ffhq64", 64, 0),
                                ("afhqv2-64", 64, 0)):
        args = dict(TINY_EDM, img_resolution=size, label_dim=classes)
        save_teacher(root / base, EDM(edm_network(**args)), dict(
            network="edm", args=args, sigma_data=0.5, bf16=False, shape=[3, size, size], classes=classes, data="",
            seconds=0, cpu_seconds=0))
        flags[base] = ["--teacher", str(root / base), "--reg_loss", "l2"]
    for base in ("cifar10", "cifar10-uncond", "cifar10-scratch", "cifar10-small"):
        flags[base] = [*flags.get(base, ["--no-compile"]), "--data", str(root / "cifar10")]
    (root / "prompts.txt").write_text("a red cube\nfog\n")
    for base, teacher in (("sdxl", "random:tiny"), ("sana", "random:tiny-flow")):
        flags[base] = ["--teacher", teacher, "--prompts", str(root / "prompts.txt"), "--w_gan", "0", "--w_disc", "0",
                       "--reg_loss", "l2"]
    return flags


def thousand_classes(folder):
    """A folder of one grey image of 64 x 64 pixels in each of 1000 class folders."""
    for i in range(1000):
        (folder / f"{i:03}").mkdir(parents=True)
        to_pil_image(torch.full((3, 64, 64), i % 256, dtype=torch.uint8)).save(folder / f"{i:03}/0.png")
    return folder


# Of lines that are much like others one runs by default.
SLOW = ("imagenet64", "cifar10-scratch", "cifar10-uncond", "ffhq64", "afhqv2-64", "mnist-", "sdxl-", "sana-")
NAMES = [n for n in PRESETS if not n.startswith("sd15")]          # those: test_stable_diffusion.py


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * n.startswith(SLOW)) for n in NAMES])
def test_every_preset_line_runs(name, tmp_path, monkeypatch, quick, capsys, stand_ins):
    """Each line of PRESETS, and so each method at each scale: --dry-run writes nothing, then one real update."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(RECIPES["cifar10-scratch"], "args", dict(TINY_EDM, img_resolution=32, label_dim=10))
    cfg, argv = resolve(dict(preset=name)), ["--preset", name, "--out", "out"]
    train.main([*argv, "--dry-run"])
    assert list(tmp_path.iterdir()) == [] and f"preset               {name}\n" in capsys.readouterr().out
    large = cfg.preset.startswith(("cifar10", "imagenet64", "ffhq64", "afhqv2"))
    if cfg.w_disc and split(name)[0] == "imagenet64":
        argv += ["--data", str(thousand_classes(tmp_path / "classes")), "--eval_images", "8"]
    sizes = {"--batch": "2", "--teacher_steps": "2", "--pairs": "4"} if large else {
        "--batch": "8", "--teacher_steps": "20", "--pairs": "50"}
    base = "sdxl" if name.startswith("sdxl") else split(name)[0]
    train.main([*argv, *stand_ins.get(base, []), *sum(map(list, sizes.items()), []), "--steps", "1",
                "--pair_steps", "2", "--threads", "1", "--device", "cpu"])
    report = read_json("out/report.json")
    assert cfg.method in report["rows"] and load_checkpoint("out/checkpoint.pt")["step"] == 1


# ---- what a run leaves

LOG_KEYS = {"step", "critic_updates", "seconds", "sid_loss", "denoising_loss", "x_mean", "x_std", "spread", "mesm",
            "fake_loss", "grad", "by_sigma"}
REPORT_KEYS = {"rows", "cpu_seconds", "seconds", "teacher_cpu_seconds", "peak_memory_mib", "device", "threads", "torch",
               "python"}


def strict_json(text):
    """json.loads that refuses NaN and Infinity, which other readers do not know."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_log(toy_run):
    lines = [strict_json(line) for line in (toy_run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20] == [line["critic_updates"] for line in lines]
    for line in lines:
        assert set(line) >= LOG_KEYS and len(line["mesm"]) == len(line["fake_loss"]) == 5
        assert set(line["by_sigma"]) == {"sid_loss", "denoising_loss"} and set(line["grad"]) == {"sid_loss"}
        assert all(len(bins) == 6 for bins in line["by_sigma"].values())
    for cpu_or_wall in (0, 1):
        seconds = [line["seconds"][cpu_or_wall] for line in lines]
        assert seconds == sorted(seconds)


def test_run_folder(toy_run):
    """No more than this without matplotlib, and a picture of the diagnostics with it."""
    assert {p.name for p in toy_run.iterdir()} - {"diagnostics.png"} == {
        "config.json", "log.jsonl", "samples", "samples.png", "generator.safetensors", "checkpoint.pt", "report.json",
        "teacher.json", "teacher.safetensors"}
    assert sorted(p.name for p in (toy_run / "samples").iterdir()) == ["000010.png", "000020.png"]
    for path, width in ((toy_run / "samples" / "000010.png", 256), (toy_run / "samples.png", 2 * 256 + 12)):
        with Image.open(path) as image:
            image.load()
            assert image.size == (width, 256)


def test_config_json_is_the_resolved_config(toy_run):
    flags = dict(preset="toy", method="sid", device="cpu", teacher_steps=50, batch=32, steps=20, log_every=5,
                 sample_every=10, save_every=10, seed=3, out=str(toy_run))
    assert read_json(toy_run / "config.json") == asdict(resolve(flags))


def test_report(toy_run):
    report = strict_json((toy_run / "report.json").read_text())
    assert set(report) >= REPORT_KEYS and list(report["rows"]) == ["teacher", "sid"]
    assert set(report["rows"]["sid"]) >= {"sw2", "modes", "NFE", "samples/s", "speed-up"}
    assert report["threads"] == 1 and report["torch"] == torch.__version__ and report["device"]
    assert 0 < report["cpu_seconds"] < 60 and 0 < report["teacher_cpu_seconds"] < 60 and report["peak_memory_mib"] > 50


def test_generator_file_is_the_average(toy_run):
    saved, ema = load_checkpoint(toy_run / "checkpoint.pt"), load_tensors(toy_run / "generator.safetensors")
    torch.testing.assert_close(ema, dict(saved["nets"]["ema"]), rtol=0, atol=0)
    assert saved["step"] == 20 and saved["config"]["seed"] == 3


# ---- what can go wrong while a run runs


@pytest.fixture
def last_words(tmp_path, monkeypatch, capfd, quick):
    """last_words(argv, code) -> the last line on stderr of a training that ends with that exit code."""
    monkeypatch.chdir(tmp_path)

    def run(argv, code=2):
        assert exit_code(train.main, argv) == code
        err = capfd.readouterr().err
        assert "Traceback" not in err and err.endswith("\n")
        return err.split("\n")[-2]

    return run


def at_step(monkeypatch, number, action):
    """Call action() right before generator update `number`, counted from 1."""
    real = methods.train_step

    def step(nets, opts, draw, cfg, step):
        if step + 1 == number:
            action()
        return real(nets, opts, draw, cfg, step)

    monkeypatch.setattr(train, "train_step", step)


def fail(error):
    def action(*args):
        raise error

    return action


def is_good(step):
    """The checkpoint in ./out loads, is from that step, and every weight in it is a number."""
    saved = load_checkpoint("out/checkpoint.pt")
    assert saved["step"] == step and not list(Path("out").glob(".*"))
    assert all(t.isfinite().all() for net in saved["nets"].values() for t in net.values())


def test_full_disk(last_words, monkeypatch):
    """The new checkpoint does not fit: one sentence, the old one intact, and the run goes on once there is room."""
    with monkeypatch.context() as patch:
        full = fail(OSError(errno.ENOSPC, "No space left on device"))
        at_step(patch, 7, lambda: patch.setattr(files.os, "fsync", full))
        patch.setattr(files.os, "fsync", lambda fd: None)
        patch.setattr(progress, "append_line", lambda *a: None)
        text = last_words([*TOY, "--sample_every", "50"])
        assert text.startswith("error: cannot write out/checkpoint.pt: No space left on device; free some space")
    is_good(6)
    train.main(["--resume", "--out", "out"])
    is_good(12)


def test_full_gpu(last_words, monkeypatch):
    at_step(monkeypatch, 4, fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore words.")))
    text = last_words(TOY)
    assert text.startswith("error: out of memory (CUDA out of memory. Tried to allocate 2 GiB.); try a smaller --batch")
    assert "--accumulate" in text and "--checkpointing" in text and "--adam8bit" in text
    is_good(3)


def test_full_memory(last_words, monkeypatch):
    """A CPU's allocator raises a plain RuntimeError; 4 petabytes are more than any machine can map."""
    monkeypatch.setattr(train, "train_step", lambda *a: torch.empty(2**50))
    assert re.match("error: out of memory .*; try a smaller --batch", last_words(TOY))


def test_torch_compile_that_does_not_work(last_words, monkeypatch):
    from torch._inductor.exc import InvalidCxxCompiler

    at_step(monkeypatch, 2, fail(InvalidCxxCompiler()))
    assert re.match("error: torch.compile does not work here .*; add --no-compile", last_words(TOY))


def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path, quick):
    """Only mistakes and full machines become sentences."""
    monkeypatch.chdir(tmp_path)
    at_step(monkeypatch, 2, fail(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        command(lambda: train.main(TOY))


def test_interrupt(last_words, monkeypatch):
    at_step(monkeypatch, 5, fail(KeyboardInterrupt()))
    assert "--resume" in last_words(TOY, code=130)
    is_good(3)


def poison(monkeypatch, step, module, name, value):
    """From generator update `step` on, sample 5 of module.name's answer is value; returns {spec: the levels first drawn}."""
    real, draw_sigma, drawn = getattr(module, name), draw.draw_sigma, {}

    def poisoned(*args, **kwargs):
        result = real(*args, **kwargs)
        return torch.cat([result[:5], result[5:6] * value, result[6:]])

    def remember(spec, *args):
        sigma = draw_sigma(spec, *args)
        drawn.setdefault(spec, sigma)
        return sigma

    monkeypatch.setattr(draw, "draw_sigma", remember)
    at_step(monkeypatch, step, lambda: (drawn.clear(), monkeypatch.setattr(module, name, poisoned)))
    return drawn


@pytest.mark.parametrize("step, kept", [(8, 6), (7, 6), (12, 9)])
@pytest.mark.parametrize("loss, noise, module, name, value", [
    ("sid_loss", "dm_sigma", sid_loss, "sid_integrand", math.nan),
    ("denoising_loss", "critic_sigma", fake_score, "edm_loss", math.inf)])
def test_nan(last_words, monkeypatch, step, kept, loss, noise, module, name, value):
    """It stops with the step, the loss and the sigma; the checkpoint is from before, and the run can go on from it."""
    with monkeypatch.context() as patch:
        drawn = poison(patch, step, module, name, value)
        text = last_words(TOY)
    sigma = drawn[getattr(resolve(dict(preset="toy", method="sid")), noise)][5]
    assert re.match(rf"error: {loss} is (nan|inf) at step {step} \(sigma {sigma:.4g}\); the last good", text)
    is_good(kept)
    assert not Path("out/report.json").exists() and not Path("out/generator.safetensors").exists()
    assert max(json.loads(line)["step"] for line in open("out/log.jsonl")) < step
    train.main(["--resume", "--out", "out"])
    is_good(12)


@pytest.mark.parametrize("step", [6, 9, 12])
def test_nan_gradient_of_a_finite_loss(last_words, monkeypatch, step):
    """sqrt at 0 has the value 0 and no gradient: the loss looks fine, the weights are gone, nothing may be saved."""
    real = sid_loss.sid_integrand
    bad = lambda x, *args: real(x, *args) + (x - x.detach()).abs().sqrt()             # noqa: E731
    at_step(monkeypatch, step, lambda: monkeypatch.setattr(sid_loss, "sid_integrand", bad))
    assert re.match(f"error: a weight of generator is not finite after step {step}; the last good", last_words(TOY))
    is_good(step - 3)


@pytest.mark.parametrize("scale, word", [(0.001, "explode"), (100.0, "collapse")])
def test_warnings(monkeypatch, tmp_path, quick, capfd, scale, word):
    """Samples far from the teacher's spread are announced while there is time to stop."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "heun", lambda denoiser, z, cond=None: scale * z)
    train.main(TOY)
    out = capfd.readouterr().out
    assert f"WARNING: samples {word}: " in out and ", teacher " in out
    assert len(re.findall("WARNING", out)) == 6                   # one per line of the log, of one kind


def test_no_warning_without_reason(monkeypatch, tmp_path, quick, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "heun", heun)
    train.main(TOY)
    assert "WARNING" not in capfd.readouterr().out

"""SDXL, SANA, PRX and Stable Diffusion 3 without downloads: what diffusers' own pipelines compute, we compute."""

import atexit
import functools
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, LCMScheduler
from PIL import Image
from torch.testing import assert_close

from pipelines import PROMPTS, RUN, pipeline, slow, stopped_and_resumed
from nano_dmd import export, sample, train
from nano_dmd.denoiser import FromEps, FromFlow
from nano_dmd.engine import runs
from nano_dmd.engine.config import resolve
from nano_dmd.engine.files import UserError, load_tensors
from nano_dmd.engine.lora import lora_copy
from nano_dmd.generator import Generator
from nano_dmd.noise import expand, sd_sigmas
from nano_dmd.real_score import RealScore
from nano_dmd.teacher import load_teacher
from nano_dmd.teachers.captions import captioned
from nano_dmd.teachers.latents import Latents
from nano_dmd.teachers.prompts import Prompts, TextEncoder
from nano_dmd.teachers.text_networks import KINDS, RANDOM

KINDS_HERE = ["sdxl", "sana", "prx", "sd3"]
FLOWS = KINDS_HERE[1:]


@functools.cache
def tiny(kind):
    """The folder of a tiny complete pipeline, made once."""
    place = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return pipeline(kind, Path(place))


@pytest.fixture
def pipes():
    return tiny


def unrounded(name, texts, empty=False):
    """Embeddings in float32 instead of float16: so equalities hold to rounding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "half", lambda t: t.float())
        return TextEncoder(name, "cpu")(texts, empty)


def asked(kind, name, prompt, z, level, w):
    """x0 by diffusers' own pipeline: one guided step of it from the noise z, at a timestep (sdxl) or flow time."""
    pipe = DiffusionPipeline.from_pretrained(name)
    pipe.set_progress_bar_config(disable=True)
    how = {"sdxl": dict(timesteps=[level]), "prx": dict(timesteps=[1000 * level], use_resolution_binning=False),
           "sana": dict(sigmas=[level], height=32, width=32, use_resolution_binning=False), "sd3": dict(sigmas=[level])}[kind]
    if kind == "sdxl":
        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    else:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return pipe(prompt, latents=z, guidance_scale=w, output_type="latent", **how).images


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS_HERE)
def test_the_guided_teacher_is_the_pipeline(kind, pipes):
    """u + w (c - u) of our network, our prompts and our empty prompt is one guided step of diffusers' pipeline from words to
    x0, to 1e-5: text encoders, templates, masks, pooled vectors, sizes, time and the empty prompt all agree."""
    name, teacher = pipes(kind), load_teacher(pipes(kind))
    teacher.net.net.empty = unrounded(name, [""], empty=True)
    z = torch.randn(1, *teacher.shape, generator=torch.Generator().manual_seed(1))
    level = 749 if kind == "sdxl" else 0.7
    sigma = sd_sigmas()[[749]] if kind == "sdxl" else torch.tensor([0.7 / 0.3])
    got = RealScore(teacher.denoiser, 5.0)(expand(teacher.net.scale(sigma), z) * z, sigma, unrounded(name, ["a red cube"]))
    expected = asked(kind, name, "a red cube", z, level, 5.0)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS_HERE)
def test_a_teacher_is_what_its_folder_says(kind, pipes, monkeypatch):
    """Kind of adapter, shape, noise levels, sampler steps; the decoder's images are the pipeline's; one latent at a time."""
    teacher = load_teacher(pipes(kind))
    assert type(teacher.net) is (FromEps if kind == "sdxl" else FromFlow) and teacher.shape == (4, 8, 8)
    assert teacher.sigma_data == (float("inf") if kind == "sdxl" else 1.0)
    assert teacher.calls == {"sdxl": 50, "sana": 20, "prx": 28, "sd3": 28}[kind]
    if kind == "sdxl":
        abar = DDPMScheduler.from_pretrained(pipes(kind), subfolder="scheduler").alphas_cumprod.double()
        assert_close(teacher.denoiser.sigmas.double(), ((1 - abar) / abar).sqrt(), rtol=1e-5, atol=0)
        assert_close(teacher.denoiser.sigmas, sd_sigmas(), rtol=1e-4, atol=0)
    pipe, x = DiffusionPipeline.from_pretrained(pipes(kind)), torch.randn(2, 4, 8, 8)
    config, seen = pipe.vae.config, []
    decode = pipe.vae.decode
    expected = decode(x / config.scaling_factor + (config.get("shift_factor") or 0)).sample.clamp(-1, 1)
    monkeypatch.setattr(type(pipe.vae), "decode", lambda vae, z: seen.append(len(z)) or decode(z))
    assert_close(teacher.decode(x), expected, rtol=1e-4, atol=1e-5)
    assert seen == [1, 1]


@pytest.mark.slow
def test_prx_loads_in_a_process_of_its_own():
    """Its text encoder is a class of diffusers that appears in transformers only after an import."""
    code = f"from nano_dmd.teacher import load_teacher; print(load_teacher({tiny('prx')!r}).shape)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("(4, 8, 8)"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdxl", "sana"])
def test_features_of_a_compiled_network(kind, pipes):
    """A hook that comes after compilation is seen: the same features, whichever is asked first."""
    teacher = load_teacher(pipes(kind))
    x, sigma, text = torch.randn(2, 4, 8, 8), torch.tensor([0.5, 3.0]), Prompts(pipes(kind), PROMPTS)[torch.arange(2)]
    with torch.no_grad():
        wanted = teacher.net.features(x, sigma, text)
        teacher.net.net.compile(backend="eager", dynamic=False)
        teacher.net(x, sigma, text)
        assert_close(teacher.net.features(x, sigma, text), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS_HERE)
def test_features_are_the_middle_block(kind, checkpointing, pipes):
    """To the bit what the middle block answers in a whole forward; so is the gradient at x; later blocks do not run."""
    teacher, seen = load_teacher(pipes(kind)), []
    net = teacher.net.net
    net.checkpointing = checkpointing
    middle = net.kind.middle(net.network)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    sigma, text = torch.tensor([0.5, 3.0]), Prompts(pipes(kind), PROMPTS)[torch.arange(2)]
    handle = middle.register_forward_hook(lambda module, inputs, output: seen.append(output))
    teacher.net(x, sigma, text)
    handle.remove()
    wanted = seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][-1]
    wanted = wanted if wanted.ndim == 4 else wanted.transpose(1, 2).reshape(2, -1, 8, 8)
    last = [m for m in net.network.modules() if not list(m.children())][-1]
    last.register_forward_hook(lambda *_: pytest.fail("the forward went on"))
    got = teacher.net.features(x, sigma, text)
    assert_close(got, wanted, rtol=0, atol=0)
    weight = torch.randn(got.shape)
    gradients = [torch.autograd.grad((v * weight).sum(), x)[0] for v in (got, wanted)]
    assert_close(*gradients, rtol=0, atol=0)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("kind", KINDS_HERE)
def test_a_dropped_prompt_is_the_empty_one(kind, pipes):
    """cond None is the empty prompt, with its own mask: another number of rows than the prompt's, and the same answer."""
    teacher = load_teacher(pipes(kind))
    empty, x, sigma = teacher.net.net.empty, torch.randn(2, 4, 8, 8), torch.tensor([0.5, 3.0])
    text = Prompts(pipes(kind), PROMPTS)[torch.arange(2)]
    mixed = torch.where(torch.tensor([True, False])[:, None, None], empty, text)
    with torch.no_grad():
        got, none, told = (teacher.net(x, sigma, c) for c in (mixed, None, text))
    assert_close(got, torch.stack([none[0], told[1]]), rtol=1e-5, atol=1e-6)
    assert (none - told).abs().amax((1, 2, 3)).min() > 1e-4
    assert (kind == "sdxl") == (not empty.any())                  # zeros for SDXL, "" encoded for the others
    rows = [(v != 0).any(-1).sum(-1) for v in (empty, text)]
    assert (rows[0] < rows[1]).all() if kind in ("sana", "prx") else True


# ---- prompts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encode", ["online", "visit"])
@pytest.mark.parametrize("kind", KINDS_HERE)
def test_prompts_online_are_those_of_the_cache(kind, encode, pipes, prompts):
    """To the rounding of float16; other batches do not matter."""
    cached = Prompts(pipes(kind), PROMPTS)[torch.tensor([2, 0, 1])]
    online = Prompts(pipes(kind), PROMPTS, encode)[torch.tensor([2, 0, 1])]
    assert online.dtype == torch.float32
    assert_close(online, cached, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("encode", ["online", "visit"])
def test_a_run_with_prompts_online(encode, pipes, prompts, tmp_path, fast):
    """The same draws as with the cache: the same student up to the rounding of the embeddings; resumed to the bit."""
    argv = ["--preset", "sana-sid", "--teacher", pipes("sana"), "--prompts", prompts, *RUN, "--no-bf16", "--no-half_frozen"]
    stopped_and_resumed([*argv, "--encode", encode], tmp_path)
    train.main([*argv, "--out", str(tmp_path / "cached")])
    a, b = (load_tensors(tmp_path / out / "generator.safetensors") for out in ("whole", "cached"))
    start = dict(load_teacher(pipes("sana")).net.state_dict())
    moved = max((a[k] - start[k.removeprefix("net.")]).abs().max() for k in a)
    assert max((a[k] - b[k]).abs().max() for k in a) < 0.1 * moved


def test_millions_of_prompts_stay_on_the_disk(tmp_path):
    """200,000 lines: the texts are not in memory, only where they begin and end; the last one is found."""
    from nano_dmd.engine.files import Lines

    path = tmp_path / "many.txt"
    path.write_text("".join(f"prompt number {i} \n\n" for i in range(200_000)))
    lines = Lines(path)
    assert (len(lines), lines[199_999], lines.numbers[199_999]) == (200_000, "prompt number 199999", 399_999)
    held = sum(v.itemsize * len(v) for v in (lines.starts, lines.ends, lines.numbers))
    assert held == 200_000 * 24 and not any(isinstance(v, (list, bytes)) for v in vars(lines).values())
    with open(path, "a") as f:                     # other lines would be read without a word
        f.write("one more\n")
    with pytest.raises(UserError, match="many.txt was changed while it was in use"):
        lines[0]


# ---- training, sampling, export ---------------------------------------------------------------------------


LORA = ["--lora_generator", "2", "--lora_critic", "2"]
RUNS = [
    ("sdxl-dmd2-lora", "sdxl", LORA), ("sana-sid", "sana", []), ("sana-sid", "prx", LORA),
    ("sana-dmd2", "sana", ["--w_gan", "0.03", "--w_disc", "0.03"]),
]
MORE = [
    ("sdxl-dmd2-4step", "sdxl", []), ("sdxl-dmd2", "sdxl", []), ("sdxl-regression", "sdxl", []), ("sana-sid", "sd3", LORA),
    ("sana-dmd2", "sana", LORA), ("sana-dmd2", "prx", ["--w_gan", "0.03", "--w_disc", "0.03"]),
    ("sana-dmd2", "sd3", ["--w_gan", "0.03", "--w_disc", "0.03"]),
]


def test_every_line_of_the_presets_is_tried():
    known = {name for name in train.PRESETS if name.startswith(("sdxl-", "sana-"))}
    assert known == {preset for preset, _, _ in RUNS + MORE}


@pytest.mark.parametrize("preset, kind, extra", RUNS + slow(MORE))
def test_presets_train_resume_and_report(preset, kind, extra, pipes, prompts, photos, tmp_path, fast, piq):
    """Every preset takes real steps and resumes to the bit; the picture is decoded; LoRA runs hold low-rank weights alone."""
    argv = ["--preset", preset, "--teacher", pipes(kind), "--prompts", prompts, *RUN, *extra]
    argv += ["--lpips_decoder", "vae"] if preset == "sdxl-regression" else []
    argv += ["--data", photos] if "dmd2" in preset and (kind == "sdxl" or "--w_gan" in extra) else []
    whole = stopped_and_resumed(argv, tmp_path)
    assert all("lora_" in k for k in whole) == ("--lora_generator" in extra)
    start = load_teacher(pipes(kind)).net.state_dict()
    assert any("lora_B" in k and whole[k].any() if "--lora_generator" in extra else
               not torch.equal(whole[k], start[k.removeprefix("net.")]) for k in whole)
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert report["rows"]["teacher"]["NFE"] == {"sdxl": 100, "sana": 40, "prx": 56, "sd3": 56}[kind]
    assert np.isfinite(list(report["rows"].values())[-1]["latent std"])
    assert Image.open(tmp_path / "whole" / "samples.png").size[1] == (32 if kind == "sana" else 64) + 2


@pytest.mark.slow
@pytest.mark.parametrize("preset, kind, flags", [
    ("sdxl-dmd2-4step", "sdxl", {}), ("sana-sid", "sana", {}), ("sana-sid", "prx", {}), ("sana-dmd2", "sd3", {}),
    ("sana-dmd2", "sana", dict(w_gan=0.1, w_disc=0.1, lora_critic=2, lora_generator=2))])
def test_a_step_keeps_to_its_device_and_never_waits_for_it(preset, kind, flags, pipes, prompts, photos, step_on_meta):
    gan = kind == "sdxl" or "w_gan" in flags
    step_on_meta(dict(preset=preset, teacher=pipes(kind), prompts=prompts, data=photos if gan else "", batch=4, critic_steps=2,
                      half_frozen=False) | flags)


def test_the_one_step_pair_of_sdxl(pipes, prompts, photos, tmp_path, fast, piq):
    """sdxl-regression, then sdxl-dmd2 from --init: the first student's weights, at timestep 399 from unit noise."""
    common = ["--teacher", pipes("sdxl"), "--prompts", prompts, *RUN, "--lpips_decoder", "vae"]
    train.main(["--preset", "sdxl-regression", *common, "--out", str(tmp_path / "first")])
    train.main(["--preset", "sdxl-dmd2", *common, "--data", photos, "--init", str(tmp_path / "first"), "--steps", "1",
                "--lr_generator", "1e-12", "--out", str(tmp_path / "second")])
    first, second = (load_tensors(tmp_path / name / "generator.safetensors") for name in ("first", "second"))
    assert all((first[k] - second[k]).abs().max() < 1e-6 for k in first)
    generator = runs.load_run(tmp_path / "second")[2]
    assert generator.unit and generator.sigmas == (sd_sigmas()[399].item(),)


EXPORTS = [("sdxl-dmd2-4step", "sdxl", LORA), ("sdxl-dmd2-4step", "sdxl", ["--ode_steps"]), ("sana-sid", "sana", LORA),
           ("sana-sid", "sana", ["--ode_steps"]), ("sana-sid", "prx", ["--ode_steps"]), ("sana-sid", "sd3", LORA)]
MORE_EXPORTS = [("sdxl-dmd2-4step", "sdxl", []), ("sdxl-dmd2", "sdxl", []), ("sana-sid", "sana", []),
                ("sana-dmd2", "sana", ["--sigmas", "f0.999"]), ("sana-sid", "prx", LORA),
                ("sana-sid", "sd3", ["--sigmas", "f0.999,f0.9,f0.75,f0.5"])]


@pytest.mark.parametrize("preset, kind, extra", EXPORTS + slow(MORE_EXPORTS))
def test_exported_pipeline_samples_as_the_generator(preset, kind, extra, pipes, prompts, photos, tmp_path, fast):
    """The call that the model card shows, from words, with the same noise: the same latents to 1e-4, after save and load."""
    run, to = str(tmp_path / "run"), str(tmp_path / "pipe")
    argv = ["--preset", preset, "--teacher", pipes(kind), "--prompts", prompts, *RUN, "--no-bf16", "--no-half_frozen", *extra]
    train.main([*argv, *(["--data", photos] if kind == "sdxl" else []), "--out", run])
    call = export.export(run, to)
    assert call in (Path(to) / "README.md").read_text()
    generator = runs.load_run(run)[2]
    text, k = unrounded(pipes(kind), ["fog"]), len(generator.sigmas)
    z, rng = torch.randn(k, 1, 4, 8, 8, generator=torch.Generator().manual_seed(5)), torch.Generator().manual_seed(7)
    z[1:] = torch.stack([torch.randn(1, 4, 8, 8, generator=rng) for _ in range(1, k)]) if k > 1 else z[1:]
    with torch.no_grad():
        expected = generator(z, text)
    pipe = DiffusionPipeline.from_pretrained(to)
    pipe.set_progress_bar_config(disable=True)
    given = eval(f"dict({call})") | (dict(use_resolution_binning=False) if kind in ("sana", "prx") else {})
    torch.manual_seed(7)                           # PRX and Stable Diffusion 3 draw from the global stream
    own = {} if kind in ("prx", "sd3") else dict(generator=torch.Generator().manual_seed(7))
    got = pipe("fog", latents=z[0], output_type="latent", **given, **own).images
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    if "--lora_generator" in extra and kind != "prx":             # diffusers has no LoRA loader for PRX
        base = DiffusionPipeline.from_pretrained(pipes(kind), scheduler=pipe.scheduler)
        base.set_progress_bar_config(disable=True)
        plain = base("fog", latents=z[0], output_type="latent", **given, **seeded(own)).images
        base.load_lora_weights(to, weight_name="pytorch_lora_weights.safetensors")
        loaded = base("fog", latents=z[0], output_type="latent", **given, **seeded(own)).images
        assert (loaded - expected).abs().max() < 1e-4 * expected.abs().max() < (plain - expected).abs().max()


def test_the_flow_scheduler_steps_as_the_generator():
    """Without a pipeline: four steps of the exported scheduler on some v(x, t), the same noise, are Generator's: 1e-5."""
    class Network(torch.nn.Module):
        def forward(self, x, t, cond):
            return torch.tanh(x) + expand(t, x)

    cfg = resolve(dict(preset="sana-sid"))
    steps, call = export.scheduler(cfg, KINDS["SanaTransformer2DModel"], None, 512)
    assert call == "sigmas=[0.999, 0.75, 0.5, 0.25], guidance_scale=1, height=512, width=512"
    generator = Generator(FromFlow(Network()), cfg.sigma_list(), unit=True)
    z = torch.randn(4, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    rng, x = torch.Generator().manual_seed(1), z[0]
    z[1:] = torch.stack([torch.randn(2, 4, 8, 8, generator=rng) for _ in range(3)])
    steps.set_timesteps(sigmas=[0.999, 0.75, 0.5, 0.25])
    rng = torch.Generator().manual_seed(1)
    for time in steps.timesteps:
        v = Network()(x, time.expand(2) / 1000, None)
        x = steps.step(v, time, x, generator=rng, return_dict=False)[0]
    assert_close(x, generator(z), rtol=1e-5, atol=1e-5)


def seeded(own):
    torch.manual_seed(7)
    return {name: torch.Generator().manual_seed(7) for name in own}


def test_flow_students_that_cannot_be_exported(pipes, prompts, tmp_path, fast):
    run = str(tmp_path / "run")
    train.main(["--preset", "sana-sid", "--teacher", pipes("sana"), "--prompts", prompts, *RUN, "--no-unit_noise", "--out", run])
    with pytest.raises(UserError, match="train with --unit_noise"):
        export.main([run, "--to", str(tmp_path / "x")])


def test_sample_paints_a_prompt(pipes, prompts, tmp_path, fast):
    run = str(tmp_path / "run")
    train.main(["--preset", "sana-sid", "--teacher", pipes("sana"), "--prompts", prompts, *RUN, "--out", run])
    x = sample.sample(run, 2, prompt="a red cube")
    assert x.shape == (2, 3, 32, 32) and torch.equal(x, sample.sample(run, 2, prompt="a red cube"))
    assert not torch.equal(x, sample.sample(run, 2, prompt="fog"))


@pytest.mark.parametrize("kind", FLOWS)
def test_lora_starts_as_the_teacher(kind, pipes):
    """Equal before training, the frozen weights shared; every target of the row is there."""
    teacher = load_teacher(pipes(kind))
    twin = lora_copy(teacher.net, 2)
    x, sigma, text = torch.randn(2, 4, 8, 8), torch.tensor([0.5, 3.0]), Prompts(pipes(kind), PROMPTS)[torch.arange(2)]
    assert_close(twin(x, sigma, text), teacher.net(x, sigma, text), rtol=0, atol=0)
    held = {p.data_ptr() for p in teacher.net.parameters()}
    assert {p.data_ptr() for n, p in twin.named_parameters() if "lora_" not in n} <= held
    trained = [n for n, p in twin.named_parameters() if p.requires_grad]
    assert all("lora_" in n for n in trained)
    assert all(any(f".{target}.lora_A" in n for n in trained) for target in twin.net.kind.lora)


# ---- real images ------------------------------------------------------------------------------------------


def shard(path, members):
    """A .tar of (name, bytes)."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(photos, tmp_path):
    """The photos in two shards, captions as text and as json, and files that are neither."""
    image = [Path(photos, f"{i}.png").read_bytes() for i in range(4)]
    (tmp_path / "shards").mkdir()
    shard(tmp_path / "shards" / "b.tar", [("x/2.png", image[2]), ("x/2.json", json.dumps({"caption": "fog"}).encode()),
                                          ("x/3.png", image[3]), ("x/3.txt", b"two dogs\n"), ("x/3.cls", b"7")])
    shard(tmp_path / "shards" / "a.tar", [("0.txt", b"a red cube"), ("0.png", image[0]), ("1.png", image[1]),
                                          ("1.txt", b"a cat on\n a mat")])
    return str(tmp_path / "shards")


@pytest.mark.parametrize("kind", ["sdxl", "sana", "sd3"])
def test_shards_are_the_folder(kind, pipes, photos, shards):
    """The same images and captions, in order of the shards; the same draws of latents as from the folder, to the bit."""
    assert captioned(shards)[1] == PROMPTS == captioned(photos)[1]
    device = torch.device("cpu")
    a, b = (Latents(pipes(kind), place, (4, 8, 8), device) for place in (photos, shards))
    for x, y in zip(*(v.sample(8, torch.Generator().manual_seed(0)) for v in (a, b))):
        assert_close(x, y, rtol=0, atol=0)
    one = Latents(pipes(kind), f"{shards}/a.tar", (4, 8, 8), device)
    assert len(one) == 2


def test_what_is_left_out_of_shards_is_said(shards, capsys):
    """A second image of one key, and a file that is neither image nor caption (x/3.cls)."""
    image = Path(shards, "more.png")
    Image.new("RGB", (64, 64)).save(image)
    shard(Path(shards, "c.tar"), [("4.png", image.read_bytes()), ("4.jpg", b"x"), ("4.v2.png", b"x"), ("4.txt", b"fog")])
    places, captions = captioned(shards)
    assert len(places) == 5 and captions == [*PROMPTS, "fog"] and places[4].read() == image.read_bytes()
    assert "3 files in these shards are left out, x/3.cls for example" in capsys.readouterr().err


@torch.no_grad()
def test_latents_of_sana_and_sd3(pipes, photos):
    """AutoencoderDC's latent times its scale, without spread; Stable Diffusion 3's shifted, then scaled: to float16."""
    from nano_dmd.teachers.data import middle_square

    for kind in ("sana", "sd3"):
        vae = DiffusionPipeline.from_pretrained(pipes(kind)).vae
        side = 32 if kind == "sana" else 64
        image = torch.from_numpy(middle_square(f"{photos}/0.png", side)).permute(2, 0, 1)[None] / 127.5 - 1
        found = vae.encode(image)
        wanted = found.latent if kind == "sana" else found.latent_dist.mean - 0.0609
        mean, log_variance = torch.from_numpy(
            Latents(pipes(kind), photos, (4, 8, 8), torch.device("cpu")).tables[0][:1].astype(np.float32)).chunk(2, 1)
        assert_close(mean, wanted * vae.config.scaling_factor, rtol=2e-3, atol=2e-3)
        if kind == "sana":
            assert (log_variance < -29).all()
        else:
            assert_close(log_variance, found.latent_dist.logvar + 2 * np.log(1.5305), rtol=2e-3, atol=2e-3)


def test_a_stopped_encoding_goes_on(pipes, photos, tmp_path, monkeypatch):
    """Entries of the cache of one image each: after a stop at the third, only the last two are encoded; a changed image alone."""
    from nano_dmd.teachers import latents

    monkeypatch.setenv("NANO_DMD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(latents, "CHUNK", 1)
    shutil.copytree(photos, tmp_path / "photos")
    seen, real = [], latents.vae_moments

    def moments(images, *args):
        seen.append(images[0].path.name)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(images, *args)

    monkeypatch.setattr(latents, "vae_moments", moments)
    where = pipes("sdxl"), str(tmp_path / "photos"), (4, 8, 8), torch.device("cpu")
    with pytest.raises(KeyboardInterrupt):
        Latents(*where)
    found = Latents(*where)
    assert seen == ["0.png", "1.png", "2.png", "2.png", "3.png"]
    assert_close(found.sample(4, torch.Generator().manual_seed(0))[0],
                 Latents(*where).sample(4, torch.Generator().manual_seed(0))[0], rtol=0, atol=0)
    Image.new("RGB", (64, 64)).save(tmp_path / "photos" / "1.png")
    Latents(*where)
    assert seen[5:] == ["1.png"]


def test_shards_that_cannot_be_read(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match="cannot read .*a.tar.*give uncompressed"):
        captioned(str(tmp_path / "a.tar"))
    shard(tmp_path / "a.tar", [("0.txt", b"fog")])
    with pytest.raises(UserError, match="no images in"):
        captioned(str(tmp_path))
    shard(tmp_path / "a.tar", [("0.png", b"x"), ("1.png", b"x"), ("1.json", b'{"words": 3}')])
    with pytest.raises(UserError, match="2 of 2 images have no caption, .*a.tar, byte 512"):
        captioned(str(tmp_path))
    shard(tmp_path / "a.tar", [("0.png", b"x"), ("0.json", b"{")])
    with pytest.raises(UserError, match="cannot read 0.json in"):
        captioned(str(tmp_path))
    shard(tmp_path / "a.tar", [("0.png", b"x"), ("0.txt", b"\xff")])
    with pytest.raises(UserError, match="0.txt in .*a.tar is not UTF-8 text"):
        captioned(str(tmp_path))
    for members in ((("0.json", b'{"width": 3}'), ("0.txt", b"fog")), (("0.txt", b"fog"), ("0.json", b'{"width": 3}'))):
        shard(tmp_path / "a.tar", [("0.png", b""), *members])     # as img2dataset writes them; an empty image is empty
        (image,), (caption,) = captioned(str(tmp_path))
        assert caption == "fog" and image.read() == b""


# ---- what is refused, and random networks -----------------------------------------------------------------


def spoil(folder, name, value, file="config.json"):
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | {name: value}))


@pytest.mark.parametrize("kind, spoiling, said", [
    ("sana", lambda f: spoil(f / "transformer", "guidance_embeds", True), "guidance_embeds"),
    ("sana", lambda f: spoil(f / "scheduler", "prediction_type", "epsilon", "scheduler_config.json"), "does not say"),
    ("sana", lambda f: spoil(f, "_class_name", "SanaSprintPipeline", "model_index.json"), "is a SanaSprintPipeline"),
    ("sdxl", lambda f: spoil(f / "unet", "addition_embed_type", "image"), "addition_embed_type"),
    ("sdxl", lambda f: shutil.rmtree(f / "text_encoder_2"), "text_encoder_2"),
    ("sdxl", lambda f: shutil.rmtree(f / "unet"), "has no unet/config.json"),
    ("sd3", lambda f: spoil(f, "text_encoder_3", ["os", "system"], "model_index.json"), "is 'system': no text encoder"),
    ("sd3", lambda f: spoil(f, "text_encoder_3", [None, None], "model_index.json"), "the tokenizer of .* its text_encoder 0"),
    ("sdxl", lambda f: spoil(f, "text_encoder", 5, "model_index.json"), "its text_encoder 0"),
    ("sdxl", lambda f: spoil(f, "vae", ["diffusers"], "model_index.json"), "the vae of .* is missing"),
    ("prx", lambda f: spoil(f, "default_sample_size", "large", "model_index.json"), "no model of square images"),
    ("sdxl", lambda f: spoil(f, "vae", ["diffusers", "AutoencoderTiny"], "model_index.json"), "AutoencoderKL or AutoencoderDC"),
    ("sdxl", lambda f: pickle(f / "unet"), "cannot load the unet of .* a pickle .* could run code"),
    ("sdxl", lambda f: pickle(f / "text_encoder"), "cannot load the text_encoder of .* a pickle .* could run code")])
def test_what_is_no_teacher_is_a_sentence(kind, spoiling, said, pipes, tmp_path, monkeypatch):
    monkeypatch.setenv("NANO_DMD_CACHE", str(tmp_path / "cache"))
    shutil.copytree(pipes(kind), tmp_path / "x")
    spoiling(tmp_path / "x")
    with pytest.raises(UserError, match=said):
        load_teacher(str(tmp_path / "x"))


def pickle(folder):
    """The weights as a pickle alone."""
    file = next(folder.glob("*.safetensors"))
    torch.save({}, folder / {"model": "pytorch_model.bin"}.get(file.stem, f"{file.stem}.bin"))
    file.unlink()


def test_random_networks_have_the_published_sizes():
    """Weights in billions, counted without memory: SD1.5 .860, SDXL 2.567, SANA .592 (facts of the papers and model cards)."""
    import diffusers

    for name, billions in (("sd15", 0.860), ("sdxl", 2.567), ("sdxl-512", 2.567), ("sana", 0.592), ("sana-512", 0.592)):
        kind, args, shape = RANDOM[f"random:{name}"]
        with torch.device("meta"):
            network = getattr(diffusers, kind)(**args)
        assert sum(p.numel() for p in network.parameters()) / 1e9 == pytest.approx(billions, abs=6e-4), name
        assert kind in KINDS

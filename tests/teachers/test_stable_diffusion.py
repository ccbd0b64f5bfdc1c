"""Stable Diffusion without downloads: a tiny complete pipeline on disk; bench measures the published size."""

import json
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from pipelines import PROMPTS, RUN, clip, clip_tokenizer, kl, slow, stopped_and_resumed
from nano_dmd import evaluate, export, sample, train
from nano_dmd.engine import build, prepare, progress, runs
from nano_dmd.metrics import text
from nano_dmd.engine.config import resolve
from nano_dmd.engine.files import UserError, load_tensors
from nano_dmd.fake_score import FakeScore, denoising_loss
from nano_dmd.gan import Discriminator
from nano_dmd.generator import Generator
from nano_dmd.teachers.diffusers_unet import lpips
from nano_dmd.engine.lora import lora_copy, sharing_copy
from nano_dmd.networks import MLP
from nano_dmd.engine.draw import Batch
from nano_dmd.noise import draw_sigma, sd_sigmas
from nano_dmd.real_score import RealScore
from nano_dmd.teachers.text_networks import RANDOM
from nano_dmd.teachers.captions import captioned
from nano_dmd.teachers.latents import Latents, differentiable_decoder
from nano_dmd.teachers.prompts import Prompts, read_prompts
from nano_dmd.teachers.text_to_image import load
from nano_dmd.denoiser import EDM
from nano_dmd.teacher import load_teacher

SCHEDULE = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
)


def pipeline(folder, prediction="epsilon"):
    """Write a complete Stable Diffusion with random weights and 8x8 latents (64 pixels)."""
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    words, count = clip_tokenizer(folder / "made")
    unet = UNet2DConditionModel(**RANDOM["random:tiny"][1])
    StableDiffusionPipeline(
        kl(4, scaling_factor=0.18215), clip(CLIPTextModel, count), words, unet,
        DDIMScheduler(**SCHEDULE, prediction_type=prediction), None, None, requires_safety_checker=False
    ).save_pretrained(folder / "sd")
    return str(folder / "sd")


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return pipeline(tmp_path_factory.mktemp("sd"))


def test_noise_levels_are_the_published_schedule():
    """The table equals diffusers' DDIMScheduler to 1e-6; facts: abar at 20, 249, 499, 749, 980, 999; sigma(625) = 2.5017."""
    abar = DDIMScheduler(**SCHEDULE).alphas_cumprod.double()
    torch.testing.assert_close(sd_sigmas().double(), ((1 - abar) / abar).sqrt(), rtol=1e-4, atol=0)
    known = {20: 0.98131, 249: 0.67543, 499: 0.27767, 749: 0.05662, 980: 0.005844, 999: 0.0046601}
    for t, value in known.items():
        assert 1 / (1 + sd_sigmas()[t].item() ** 2) == pytest.approx(value, rel=1e-4)
    assert sd_sigmas()[625].item() == pytest.approx(2.5017, abs=1e-4)


def test_timesteps_are_drawn_uniformly_with_both_ends():
    torch.manual_seed(0)
    drawn = draw_sigma("sd(20,23)", 4000, torch.device("cpu"))
    values, counts = drawn.unique(return_counts=True)
    assert values.tolist() == sd_sigmas()[20:24].tolist()
    assert (counts - 1000).abs().max() < 5 * (4000 * 3 / 16) ** 0.5  # five standard deviations


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_denoiser_is_diffusers_x0_at_every_timestep(prediction, tmp_path):
    """D(x, sigma_t) = DDIMScheduler's pred_original_sample at x / sqrt(1 + sigma_t^2), all 1000 t, relative 1e-5."""
    name = pipeline(tmp_path, prediction)
    teacher, unet = load_teacher(name), UNet2DConditionModel.from_pretrained(name, subfolder="unet").eval()
    assert (teacher.shape, teacher.classes) == ((4, 8, 8), 0)
    assert teacher.sigma_data == {"epsilon": float("inf"), "v_prediction": 1.0}[prediction]
    scheduler = DDIMScheduler.from_pretrained(name, subfolder="scheduler")
    scheduler.set_timesteps(1000)
    text, t = Prompts(name, ["fog"])[torch.zeros(1, dtype=torch.long)], torch.arange(1000)
    x = torch.randn(1000, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    sigma = teacher.denoiser.sigmas
    xt = sigma[:, None, None, None] * x
    x_vp = xt / (1 + sigma**2).sqrt()[:, None, None, None]
    out = unet(x_vp, t, encoder_hidden_states=text.expand(1000, -1, -1)).sample
    expected = torch.cat([scheduler.step(out[i : i + 1], i, x_vp[i : i + 1]).pred_original_sample for i in range(1000)])
    got = teacher.denoiser(xt, sigma, text.expand(1000, -1, -1))
    assert ((got - expected).flatten(1).abs().amax(1) / (1 + expected.flatten(1).abs().amax(1) + sigma)).max() < 1e-5


@torch.no_grad()
def test_guidance_is_the_pipelines(sd):
    """RealScore(w): eps = eps_empty + w (eps_text - eps_empty), as StableDiffusionPipeline combines them; to 1e-5."""
    teacher, unet = load_teacher(sd), UNet2DConditionModel.from_pretrained(sd, subfolder="unet").eval()
    pipe = StableDiffusionPipeline.from_pretrained(sd)
    text, empty = pipe.encode_prompt("a red cube", "cpu", 1, True, "")
    sigma, x = teacher.denoiser.sigmas[[300]], torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    x_vp = x / (1 + sigma**2).sqrt()
    with_text, without = (unet(x_vp, 300, encoder_hidden_states=e).sample for e in (text, empty))
    expected = x - sigma * (without + 7.5 * (with_text - without))
    got = RealScore(teacher.denoiser, 7.5)(x, sigma, text)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=2e-3)  # the empty prompt is cached in float16
    teacher.net.net.empty = empty
    torch.testing.assert_close(RealScore(teacher.denoiser, 7.5)(x, sigma, text), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_features_are_the_bottleneck(sd):
    """features() is what the U-Net's own forward hands from its middle block to its decoder, exactly."""
    teacher, seen = load_teacher(sd), []
    teacher.net.net.unet.mid_block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x, sigma, text = torch.randn(3, 4, 8, 8), sd_sigmas()[[5, 500, 999]], Prompts(sd, PROMPTS)[torch.arange(3)]
    teacher.net(x, sigma, text)
    torch.testing.assert_close(teacher.net.features(x, sigma, text), seen[0], rtol=0, atol=0)


def test_prompts_are_encoded_once(sd, monkeypatch):
    """The embeddings are the pipeline's, in float16; a second look reads the file and loads no encoder."""
    found = Prompts(sd, PROMPTS)[torch.tensor([2, 0])]
    pipe = StableDiffusionPipeline.from_pretrained(sd)
    for row, text in zip(found, ("fog", "a red cube")):
        expected = pipe.encode_prompt(text, "cpu", 1, False)[0][0]
        torch.testing.assert_close(row, expected, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr("nano_dmd.teachers.prompts.rows", lambda *_: pytest.fail("encoded again"))
    assert torch.equal(Prompts(sd, PROMPTS)[torch.tensor([2, 0])], found)


def test_a_long_prompt_is_cut_with_a_warning(sd, capsys):
    Prompts(sd, ["short", "x" * 100])
    assert "WARNING: 1 of 2 prompts are longer than 77 tokens" in capsys.readouterr().out


def test_lora_critic_starts_as_the_teacher_and_never_changes_it(sd):
    """Exactly equal before training; afterwards only low-rank weights have moved, the teacher's not by one bit."""
    teacher = load_teacher(sd)
    before = {k: v.clone() for k, v in teacher.net.state_dict().items()}
    fake = FakeScore(teacher.net, copy=partial(lora_copy, rank=4))
    x, sigma, text = torch.randn(2, 4, 8, 8), sd_sigmas()[[100, 900]], Prompts(sd, PROMPTS)[torch.arange(2)]
    torch.testing.assert_close(fake(x, sigma, text), teacher.net(x, sigma, text), rtol=0, atol=0)
    assert all("lora_" in n for n, p in fake.named_parameters() if p.requires_grad) and fake.trained
    held = {p.data_ptr() for p in teacher.net.parameters()}
    assert {p.data_ptr() for n, p in fake.named_parameters() if "lora_" not in n} <= held  # shared, not copied
    opt = torch.optim.Adam(fake.trained, 1e-2)
    for _ in range(3):
        opt.zero_grad()
        (fake(x, sigma, text) - x).square().mean().backward()
        opt.step()
    assert (fake(x, sigma, text) - teacher.net(x, sigma, text)).abs().max() > 1e-4
    assert all(torch.equal(before[k], v) for k, v in teacher.net.state_dict().items())
    fake.requires_grad_(False)
    assert not any(p.requires_grad for p in fake.parameters())
    fake.requires_grad_(True)
    assert all(("lora_" in n) == p.requires_grad for n, p in fake.named_parameters())


@pytest.mark.parametrize("which", ["teacher then fake", "fake then teacher"])
def test_checkpointing_meets_the_right_network(which, sd):
    """With LoRA on shared weights and recomputation in backward, the gradient at x through both is the one without: 1e-6."""
    text, x0 = Prompts(sd, PROMPTS)[torch.arange(2)], torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        teacher = load_teacher(sd)
        fake = FakeScore(teacher.net, copy=partial(lora_copy, rank=4))
        for p in fake.trained:
            p.data += 0.05 * torch.randn_like(p)
        for net in (teacher.net, fake.net):
            net.net.checkpointing = checkpointing
            assert net.net.checkpointing == checkpointing
        x, sigma = x0.clone().requires_grad_(), sd_sigmas()[[300, 700]]
        nets = (teacher.net, fake) if which.startswith("teacher") else (fake, teacher.net)
        a, b = (net(x, sigma, text) for net in nets)
        (a * b.detach() + 2 * b).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_a_sharing_copy_copies_only_what_is_trained(sd):
    teacher = load_teacher(sd)
    student = Generator(teacher.net, [sd_sigmas()[999].item()], unit=True, copy=partial(lora_copy, rank=4))
    twin = sharing_copy(student)
    for (name, a), b in zip(student.named_parameters(), twin.parameters()):
        assert (a is b) == ("lora_" not in name), name


@torch.no_grad()
def test_first_step_sees_unit_noise(sd):
    """The student at t 999 is x0 = (z - sqrt(1 - abar) eps(z, 999)) / sqrt(abar): the network sees z itself, relative 1e-5."""
    teacher, unet = load_teacher(sd), UNet2DConditionModel.from_pretrained(sd, subfolder="unet").eval()
    z, text = torch.randn(1, 2, 4, 8, 8), Prompts(sd, PROMPTS)[torch.arange(2)]
    abar = DDIMScheduler(**SCHEDULE).alphas_cumprod[999]
    eps = unet(z[0], 999, encoder_hidden_states=text).sample
    expected = (z[0] - (1 - abar).sqrt() * eps) / abar.sqrt()
    got = Generator(teacher.net, [sd_sigmas()[999].item()], unit=True)(z, text)
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("w", [1.0, 1.5])
@pytest.mark.parametrize("dropped", [False, True])
def test_critic_loss_is_the_plain_error_of_eps(w, dropped, sd):
    """mean |eps_u + w (eps_c - eps_u) - noise|^2 (DMD2 sd_guidance.py:257-310; w: SiD-LSG), with the dropped prompts where
    there are any, to 1e-4; its gradient reaches the fake score."""
    teacher, unet = load_teacher(sd), UNet2DConditionModel.from_pretrained(sd, subfolder="unet").eval()
    text, empty = Prompts(sd, PROMPTS)[torch.arange(4)], teacher.net.net.empty
    nets = SimpleNamespace(fake=FakeScore(teacher.net, guidance=w), sigma_data=teacher.sigma_data)
    x, cfg = torch.randn(4, 4, 8, 8), SimpleNamespace(critic_sigma="sd(0,999)")
    seen = torch.cat([text[:2], empty.expand(2, -1, -1)]) if dropped else text
    torch.manual_seed(1)
    loss = denoising_loss(x, nets, Batch(x[None], text, fake_cond=seen if dropped else None), cfg).mean()
    torch.manual_seed(1)
    sigma = draw_sigma(cfg.critic_sigma, 4, x.device)
    noise, s = torch.randn(x.shape), sigma[:, None, None, None]
    t, x_vp = (sd_sigmas()[None] - sigma[:, None]).abs().argmin(1), (x + s * noise) / (1 + s**2).sqrt()
    with torch.no_grad():
        c, u = (unet(x_vp, t, encoder_hidden_states=e).sample for e in (seen, empty.expand(4, -1, -1)))
    assert loss.item() == pytest.approx((u + w * (c - u) - noise).square().mean().item(), rel=1e-4)
    loss.backward()
    assert all(p.grad is not None for p in nets.fake.net.net.unet.conv_in.parameters())
    assert all(p.grad is None for p in teacher.net.parameters())


def test_prompts_are_dropped_for_the_critic_alone(sd, prompts):
    """A share critic_dropout of fake_cond is the empty prompt (5 standard deviations), the rest what cond is; cond keeps all."""
    cfg = resolve(dict(preset="sd15-sid", teacher=sd, prompts=prompts, batch=4000, device="cpu", critic_dropout=0.3))
    teacher, _, _, draw = prepare.prepare(cfg, torch.device("cpu"))
    batch = draw()
    empty = (batch.fake_cond == teacher.net.net.empty).flatten(1).all(1)
    assert abs(empty.sum() - 1200) < 5 * (4000 * 0.3 * 0.7) ** 0.5
    assert torch.equal(batch.fake_cond[~empty], batch.cond[~empty])
    assert not (batch.cond == teacher.net.net.empty).flatten(1).all(1).any()
    draw.cfg.critic_dropout = 0.0
    assert draw().fake_cond is None


def test_latents_are_the_vaes(sd, photos):
    """Mean and spread of the draws are the encoder's, scaled; the caption comes along; a second look reads the file."""
    found = Latents(sd, photos, (4, 8, 8), torch.device("cpu"))
    assert len(found) == 4 and found.classes == 0
    vae = AutoencoderKL.from_pretrained(sd, subfolder="vae").eval()
    from PIL import ImageOps

    image = ImageOps.fit(Image.open(f"{photos}/0.png").convert("RGB"), (64, 64), Image.Resampling.LANCZOS)
    with torch.no_grad():
        expected = vae.encode(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1).latent_dist
    rng = torch.Generator().manual_seed(0)
    x, text = found.sample(4000, rng)
    first = (text == Prompts(sd, PROMPTS)[torch.tensor([0])]).flatten(1).all(1)
    assert 850 < first.sum() < 1150
    std = 0.18215 * expected.std[0]
    assert ((x[first].mean(0) - 0.18215 * expected.mean[0]).abs() < 6 * std / first.sum() ** 0.5 + 1e-3).all()
    torch.testing.assert_close(x[first].std(0), std, rtol=0.15, atol=1e-3)


OPTIONS = {
    "full": [],
    "critic": ["--lora_critic", "2"],
    "both": ["--lora_critic", "2", "--lora_generator", "2"],
    "8bit": ["--adam8bit"],
    "offload": ["--offload_teacher"],
    "lpips": ["--reg_loss", "lpips", "--lpips_decoder", "vae"],
}
PRESETS = [
    ("sd15-dmd", "lpips"),
    ("sd15-dmd2", "full"),
    ("sd15-dmd2", "8bit"),
    ("sd15-dmd2", "offload"),
    ("sd15-dmd2-gan", "critic"),
    ("sd15-f_distill-4step", "full"),
    ("sd15-dmd2-4step", "both"),
]
MORE = [
    ("sd15-dmd", "full"),
    ("sd15-dmd2", "critic"),
    ("sd15-dmd2", "both"),
    ("sd15-f_distill", "critic"),
    ("sd15-decoupled-4step", "both"),
    ("sd15-sid", "critic"),
]


def test_every_line_of_the_presets_is_tried():
    """A line without a method's name is the base of others, or complete."""
    assert {n for n in train.PRESETS if n.startswith("sd15")} - {"sd15"} == {name for name, _ in PRESETS + MORE}


@pytest.mark.parametrize("preset, option", PRESETS + slow(MORE))
def test_presets_train_resume_and_report(preset, option, sd, prompts, photos, tmp_path, fast, piq):
    """Every preset takes real steps; stopped in the middle and resumed it ends bit for bit where one run ends."""
    argv = ["--preset", preset, "--teacher", sd, "--prompts", prompts, *RUN, *OPTIONS[option]]
    argv += ["--data", photos, "--eval_every", "1"] if preset.endswith("gan") or "f_distill" in preset else []
    whole = stopped_and_resumed(argv, tmp_path)
    assert all("lora_" in k for k in whole) == (option == "both")
    assert not (tmp_path / "whole" / "teacher.safetensors").exists()  # 3.4 GB at real size
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert report["rows"]["teacher"]["NFE"] == 100 and np.isfinite(list(report["rows"].values())[-1]["latent std"])
    assert Image.open(tmp_path / "whole" / "samples.png").size[1] == 64 + 2  # decoded by the VAE
    shown = Image.open(next((tmp_path / "whole" / "scores").iterdir()))          # five pictures of one 8 x 8 latent, eightfold
    assert shown.size == (64 + 8 * (5 * 9 + 1), 20 + 8 * (5 * 9 + 1))
    moved = runs.load_run(tmp_path / "whole")[2].net.net.unet.state_dict()
    start = UNet2DConditionModel.from_pretrained(sd, subfolder="unet").state_dict()
    assert any(not torch.equal(start[k], moved[k]) for k in start if k in moved) or option == "both"
    check_option(option, argv, tmp_path, whole)


def check_option(option, argv, tmp_path, whole):
    """8bit: moments of large weights take a byte each.  offload: the same numbers as without."""
    if option == "8bit":
        moments = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)["opts"]["generator"]["state"].values()
        firsts = [m.get("__bnb_optimizer_quant_state__", m)["state1"] for m in moments]
        assert all((m.dtype == torch.uint8) == (m.numel() >= 4096) for m in firsts) and max(m.numel() for m in firsts) >= 4096
    if option == "offload":
        train.main([*argv, "--no-offload_teacher", "--out", str(tmp_path / "resident")])
        resident = load_tensors(tmp_path / "resident" / "generator.safetensors")
        assert all(torch.equal(whole[k], resident[k]) for k in whole)


@pytest.mark.slow
@pytest.mark.parametrize("preset, option", [p for p in PRESETS + MORE if p[1] in ("full", "critic", "both")])
def test_a_step_keeps_to_its_device_and_never_waits_for_it(preset, option, sd, prompts, photos, step_on_meta):
    flags = {name[2:]: int(rank) for name, rank in zip(OPTIONS[option][::2], OPTIONS[option][1::2])}
    real = preset.endswith("gan") or "f_distill" in preset
    step_on_meta(dict(preset=preset, teacher=sd, prompts=prompts, data=photos if real else "", batch=4, critic_steps=2,
                      half_frozen=False) | flags)


def test_an_offloaded_teacher_visits_the_device(monkeypatch):
    """During a call its weights are copies on the device (here clones); before and after, also after a call that fails, they
    are those at home."""
    net, where = EDM(MLP()).requires_grad_(False), []
    home = [p.data_ptr() for p in net.parameters()]
    net.net.out.register_forward_hook(lambda module, *_: where.append(module.weight.data_ptr()))
    expected = net(torch.ones(3, 2), torch.ones(3))
    build.offload(net, "cpu")
    assert where.pop() in home
    monkeypatch.setattr(torch.Tensor, "to", lambda t, target, non_blocking=False: t.clone())
    assert torch.equal(net(torch.ones(3, 2), torch.ones(3)), expected) and where[0] not in home
    with pytest.raises(RuntimeError):
        net(torch.ones(3, 5), torch.ones(3))
    assert [p.data_ptr() for p in net.parameters()] == home


def test_lpips_of_latents(sd, tmp_path, piq):
    """The distance of the images that "vae" or a TAESD makes of two latents, at their own size; its gradient reaches the first
    latent and no weight."""
    torch.manual_seed(0)
    AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4).save_pretrained(tmp_path / "taesd")
    a, b = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 4, 8, 8)
    vae = AutoencoderKL.from_pretrained(sd, subfolder="vae").eval()
    tiny = AutoencoderTiny.from_pretrained(tmp_path / "taesd").eval()
    for name, decode in (("vae", lambda x: vae.decode(x / 0.18215)), (str(tmp_path / "taesd"), tiny.decode)):
        distance = lpips("cpu", differentiable_decoder(name, sd, "cpu"))(a, b)
        expected = ((decode(a).sample - decode(b).sample) / 2).square().flatten(1).mean(1)
        torch.testing.assert_close(distance, expected)
        assert torch.autograd.grad(distance.sum(), a)[0].abs().min() > 0
    with pytest.raises(UserError, match="no model nowhere"):
        differentiable_decoder("nowhere", sd, "cpu")


def test_second_stage_starts_from_the_first(sd, prompts, photos, tmp_path, fast):
    """--init RUN: generator and fake score begin with that run's weights."""
    common = ["--teacher", sd, "--prompts", prompts, *RUN]
    train.main(["--preset", "sd15-dmd2", *common, "--out", str(tmp_path / "first")])
    cfg = resolve(
        {
            "preset": "sd15-dmd2-gan",
            "teacher": sd,
            "prompts": prompts,
            "data": photos,
            "batch": 4,
            "init": str(tmp_path / "first"),
        }
    )
    _, nets, _, _ = prepare.prepare(cfg, torch.device("cpu"))
    saved = torch.load(tmp_path / "first" / "checkpoint.pt", weights_only=True)["nets"]
    for name in ("generator", "fake"):
        assert all(torch.equal(v, getattr(nets, name).state_dict()[k]) for k, v in saved[name].items())
    assert all(torch.equal(v, nets.ema.state_dict()[k]) for k, v in saved["generator"].items())


@pytest.mark.parametrize("preset, extra, steps", [
    ("sd15-dmd2", ["--lora_generator", "2", "--lora_critic", "2"], 1),
    ("sd15-dmd2-4step", ["--sigmas", "t900,t400"], 2),
    ("sd15-sid", [], 1),
] + slow([("sd15-dmd2", [], 1), ("sd15-dmd2-4step", [], 4)]))
def test_exported_pipeline_samples_as_the_generator(preset, extra, steps, sd, prompts, tmp_path, fast):
    """Plain DiffusionPipeline(num_inference_steps=k, guidance_scale=0), same noise: the same latents to 1e-4."""
    run, to = str(tmp_path / "run"), str(tmp_path / "pipe")
    train.main(
        ["--preset", preset, "--teacher", sd, "--prompts", prompts, *RUN, "--no-bf16", "--no-half_frozen", *extra, "--out", run]
    )
    export.main([run, "--to", to])
    _, teacher, generator = runs.load_run(run)
    z, text = torch.randn(steps, 2, 4, 8, 8, generator=torch.Generator().manual_seed(5)), Prompts(sd, PROMPTS)[torch.arange(2)]
    rng = torch.Generator().manual_seed(7)
    z[1:] = torch.stack([torch.randn(2, 4, 8, 8, generator=rng) for _ in range(steps - 1)]) if steps > 1 else z[1:]
    with torch.no_grad():
        expected = generator(z, text)
    given = dict(timesteps=[900, 400]) if extra[:1] == ["--sigmas"] else dict(num_inference_steps=steps)
    pipe = DiffusionPipeline.from_pretrained(to)
    pipe.set_progress_bar_config(disable=True)
    got = pipe(
        prompt_embeds=text,
        latents=z[0],
        guidance_scale=0,
        output_type="latent",
        generator=torch.Generator().manual_seed(7),
        **given,
    ).images
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    card = (tmp_path / "pipe" / "README.md").read_text()
    assert f"base_model: {sd}" in card and "guidance_scale=0" in card
    assert ("timesteps=[900, 400]" in card) == ("timesteps" in given)


def test_lora_student_is_loaded_by_diffusers(sd, prompts, tmp_path, fast):
    """pytorch_lora_weights.safetensors on the base model gives the student's latents to 1e-4."""
    run, to = str(tmp_path / "run"), str(tmp_path / "pipe")
    train.main(
        [
            "--preset",
            "sd15-dmd2",
            "--teacher",
            sd,
            "--prompts",
            prompts,
            *RUN,
            "--no-bf16",
            "--no-half_frozen",
            "--lora_generator",
            "2",
            "--lora_critic",
            "2",
            "--out",
            run,
        ]
    )
    export.main([run, "--to", to])
    _, _, generator = runs.load_run(run)
    z, text = torch.randn(1, 2, 4, 8, 8), Prompts(sd, PROMPTS)[torch.arange(2)]
    with torch.no_grad():
        expected = generator(z, text)
    pipe = DiffusionPipeline.from_pretrained(sd, scheduler=DiffusionPipeline.from_pretrained(to).scheduler)
    pipe.load_lora_weights(to, weight_name="pytorch_lora_weights.safetensors")
    got = pipe(prompt_embeds=text, latents=z[0], guidance_scale=0, output_type="latent", num_inference_steps=1).images
    with torch.no_grad():
        base = Generator(load_teacher(sd).net, [sd_sigmas()[999].item()], unit=True)(z, text)
    assert (expected - base).abs().max() > 1e-2 * expected.abs().max()  # it is not the base model's answer
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


def test_discriminator_takes_large_bottlenecks():
    """12x12 features (768 pixels) are strided down once; one logit per sample."""
    assert Discriminator((32, 12, 12))(torch.randn(3, 32, 12, 12)).shape == (3,)
    assert Discriminator((32, 8, 8))(torch.randn(3, 32, 8, 8)).shape == (3,)
    assert Discriminator((48, 12, 12))(torch.randn(3, 48, 12, 12)).shape == (3,)      # no multiple of 32: 16 groups
    inputs = {n: next(m.in_features for m in Discriminator((32, n, n)).head if hasattr(m, "in_features")) for n in (8, 12, 32)}
    assert inputs == {8: 32 * 64, 12: 32 * 36, 32: 32 * 64}


def bad_folder(tmp_path, sd):
    import shutil

    shutil.copytree(sd, tmp_path / "xl")
    config = json.loads((tmp_path / "xl/unet/config.json").read_text()) | dict(in_channels=9)
    (tmp_path / "xl/unet/config.json").write_text(json.dumps(config))
    return str(tmp_path / "xl")


def test_mistakes_get_one_sentence(sd, prompts, photos, tmp_path, fast):
    empty, no_captions = tmp_path / "empty.txt", tmp_path / "photos"
    empty.write_text("\n \n")
    no_captions.mkdir()
    Image.new("RGB", (64, 64)).save(no_captions / "a.png")
    device = torch.device("cpu")

    def complain(argv, said):
        with pytest.raises(UserError, match=said):
            train.main([*argv, *RUN, "--out", str(tmp_path / "out")])

    complain(["--preset", "sd15-dmd2", "--teacher", sd], "listens to text")
    complain(["--preset", "sd15-dmd2", "--teacher", sd, "--prompts", str(empty)], "no prompt in")
    complain(["--preset", "sd15-dmd2", "--teacher", sd, "--prompts", "nowhere.txt"], "cannot read .*nowhere.txt")
    complain(["--preset", "sd15-dmd2", "--teacher", str(tmp_path / "missing"), "--prompts", prompts], "no teacher")
    complain(["--preset", "sd15-dmd2-gan", "--teacher", sd, "--prompts", prompts], "needs real data")
    complain(
        ["--preset", "sd15-dmd2-gan", "--teacher", sd, "--prompts", prompts, "--data", str(no_captions)],
        "1 of 1 images have no caption",
    )
    complain(
        ["--preset", "sd15-dmd2-gan", "--teacher", sd, "--prompts", prompts, "--data", str(tmp_path / "nothing")],
        "cannot look into .*nothing",
    )
    complain(["--preset", "sd15-dmd2", "--teacher", sd, "--prompts", prompts, "--no-bf16"], "half_frozen")
    complain(["--preset", "sd15-sid", "--offload_teacher", "--teacher", "random:tiny", "--prompts", prompts, "--batch", "2",
              "--device", "cpu", "--out", str(tmp_path / "offload")], "this method differentiates through the teacher")
    complain(["--preset", "sd15-dmd2", "--lora_critic", "2", "--offload_teacher"], "does not go with LoRA")
    complain(["--preset", "sd15-dmd2", "--adam8bit", "--shard"], "--adam8bit does not go with --shard")
    complain(["--preset", "sd15-dmd2-gan", "--teacher", sd, "--prompts", prompts, "--data", photos, "--flip"], "--flip: latents")
    (no_captions / "a.txt").write_text("fog")
    (no_captions / "b.png").write_bytes(b"no image")
    (no_captions / "b.txt").write_text("fog")
    flags = ["--preset", "sd15-dmd2-gan", "--teacher", sd, "--prompts", prompts]
    complain([*flags, "--data", str(no_captions)], "cannot read the image")
    complain(["--preset", "sd15-dmd2", "--sigmas", "t1000", "--teacher", sd, "--prompts", prompts], "sigmas")
    complain(["--preset", "sd15-dmd2", "--dm_sigma", "sd(20,1000)"], "whole timesteps")
    complain(["--preset", "digits", "--lora_critic", "2", "--teacher_steps", "2"], "LoRA is for networks that are told by text")
    with pytest.raises(UserError, match="asks for more than a prompt"):
        load(bad_folder(tmp_path, sd), device)
    with pytest.raises(UserError, match="is no pipeline that listens to text"):
        load(str(tmp_path), device)
    assert captioned(photos)[1] == PROMPTS
    assert [*read_prompts("random:tiny", prompts).texts] == PROMPTS


def test_export_mistakes(sd, prompts, toy_run, tmp_path, fast):
    with pytest.raises(UserError, match="only those of a text-to-image pipeline"):
        export.main([str(toy_run), "--to", str(tmp_path / "x")])
    run = str(tmp_path / "run")
    train.main(["--preset", "sd15-dmd2", "--teacher", sd, "--prompts", prompts, *RUN, "--sigmas", "3.0", "--out", run])
    with pytest.raises(UserError, match="no timestep of Stable Diffusion"):
        export.main([run, "--to", str(tmp_path / "x")])
    run = str(tmp_path / "ode")
    train.main(["--preset", "sd15-dmd2", "--teacher", sd, "--prompts", prompts, *RUN, "--sigmas", "t999,t600", "--ode_steps",
                "--out", run])
    with pytest.raises(UserError, match=r"must be DDIM's, \[999, 499\], not \[999, 600\]"):
        export.main([run, "--to", str(tmp_path / "x")])
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match="exists already"):
        export.main([run, "--to", str(tmp_path / "x")])


def clip_model(folder, words):
    """A tiny CLIPModel on disk, with its tokenizer and image processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    torch.manual_seed(1)
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = CLIPTextConfig(vocab_size=words, bos_token_id=words - 2, eos_token_id=words - 1, pad_token_id=words - 1, **small)
    CLIPModel(
        CLIPConfig(
            text_config=text.to_dict(),
            vision_config=CLIPVisionConfig(image_size=32, patch_size=8, **small).to_dict(),
            projection_dim=8,
        )
    ).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def test_clip_score_is_the_mean_cosine(tmp_path):
    """Against the model asked directly for each pair, prefix included: 1e-5; batches do not matter."""
    from transformers import CLIPImageProcessor, CLIPModel

    words, count = clip_tokenizer(tmp_path / "clip")
    name = clip_model(tmp_path / "clip", count)
    images, captions = torch.rand(3, 3, 40, 40) * 2 - 1, ["fog", "a red cube", "two dogs"]
    model, processor = CLIPModel.from_pretrained(name).eval(), CLIPImageProcessor.from_pretrained(name)
    cosines = []
    for x, caption in zip(images, captions):
        array = ((x + 1) / 2 * 255).round().byte().permute(1, 2, 0).numpy()
        with torch.no_grad():
            found = model(
                pixel_values=processor(Image.fromarray(array), return_tensors="pt").pixel_values,
                **words(["A photo depicts " + caption], return_tensors="pt"),
            )
        cosines.append(torch.cosine_similarity(found.image_embeds, found.text_embeds).item())
    score = text.ClipScore(name, torch.device("cpu"))
    score.add(images[:1], captions[:1])
    score.add(images[1:], captions[1:])
    assert score.mean() == pytest.approx(np.mean(cosines), abs=1e-5)


def test_evaluate_measures_a_student(sd, prompts, photos, tmp_path, fast, monkeypatch, capsys):
    """--metric fid,clip end to end: as many images as asked for, resized to 256, beside real ones likewise."""
    words, count = clip_tokenizer(tmp_path / "clip")
    name, run = clip_model(tmp_path / "clip", count), str(tmp_path / "run")
    train.main(["--preset", "sd15-dmd2", "--teacher", sd, "--prompts", prompts, *RUN, "--out", run])
    seen = []

    def inception(images, reference, wanted, device, weights):
        seen.extend([torch.cat(list(images)), torch.cat(list(reference))])
        return {"fid": 12.5}

    monkeypatch.setattr("nano_dmd.metrics.text.inception_metrics", inception)
    evaluate.main([run, "--metric", "fid,clip", "--n", "5", "--reference", photos, "--clip-model", name, "--device", "cpu"])
    assert [(v.shape, v.dtype) for v in seen] == [((5, 3, 256, 256), torch.uint8), ((4, 3, 256, 256), torch.uint8)]
    out = capsys.readouterr().out
    assert "12.5" in out and "clip" in out

    for argv, said in (
        ([], "choose from fid, clip"),
        (["--metric", "sw2"], "choose from fid, clip"),
        (["--metric", "fid"], "give --reference"),
        (["--metric", "fid", "--reference", str(tmp_path / "clip")], "no images in"),
        (["--metric", "clip", "--clip-model", str(tmp_path)], "cannot load the CLIP model"),
    ):
        with pytest.raises(UserError, match=said):
            evaluate.main([run, "--n", "2", "--device", "cpu", *argv])


def test_fid_complains_before_the_first_image(photos, monkeypatch):
    """30,000 images take hours: what FID needs is asked for first."""
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    images = (pytest.fail("an image was made") for _ in range(2))
    with pytest.raises(UserError, match="need torch-fidelity"):
        text.text_metrics(images, ["fog", "snow"], ["fid"], photos, torch.device("cpu"))


def test_sample_paints_a_prompt(sd, prompts, toy_run, tmp_path, fast):
    """One prompt, or those trained on in turn; same seed, same picture; PNG of the decoded size."""
    run = str(tmp_path / "run")
    train.main(["--preset", "sd15-dmd2-4step", "--teacher", sd, "--prompts", prompts, *RUN, "--out", run])
    x = sample.sample(run, 2, prompt="a red cube")
    assert x.shape == (2, 3, 64, 64) and x.abs().max() <= 1
    assert torch.equal(x, sample.sample(run, 2, prompt="a red cube")) and not torch.equal(x, sample.sample(run, 2, prompt="fog"))
    sample.main([run, "--n", "3", "--out", str(tmp_path / "x.png"), "--device", "cpu"])
    assert Image.open(tmp_path / "x.png").size == (4 * (3 * 65 + 1), 4 * 66)
    with pytest.raises(UserError, match="no student of Stable Diffusion"):
        sample.sample(str(toy_run), 2, prompt="fog")


# ---- embeddings, latents and captions are those of what is there


def test_embeddings_are_those_of_the_encoder_that_is_there(sd, tmp_path, monkeypatch):
    """The same relative name in two projects, and another encoder saved at the same path: encoded anew each time."""
    monkeypatch.setenv("NANO_DMD_CACHE", str(tmp_path / "cache"))
    seen = []

    def encode(place):
        monkeypatch.chdir(tmp_path / place)
        seen.append(Prompts("sd", ["fog"])[torch.tensor([0])])

    for place in "ab":
        shutil.copytree(sd, tmp_path / place / "sd")
    encode("a")
    file = tmp_path / "b" / "sd" / "text_encoder" / "model.safetensors"
    save_file({k: 2 * v for k, v in load_file(file).items()}, file, {"format": "pt"})
    encode("b")
    shutil.copytree(file.parent, tmp_path / "a" / "sd" / "text_encoder", dirs_exist_ok=True)
    encode("a")
    assert not torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"hello"])
def test_tables_that_were_cut_are_a_sentence(damage, sd, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("NANO_DMD_CACHE", str(tmp_path / "cache"))
    device = torch.device("cpu")
    Latents(sd, photos, (4, 8, 8), device)
    for name in ("text", "latents"):
        path, = (tmp_path / "cache").glob(f"{name}-*.npy")
        whole = path.read_bytes()
        for content in (damage, whole[: len(whole) // 2]):
            path.write_bytes(content)
            with pytest.raises(UserError, match=f"cannot read .*{name}-.*delete it to have it made again"):
                Latents(sd, photos, (4, 8, 8), device)
        np.save(path, np.zeros((2, 3), np.float16))
        with pytest.raises(UserError, match="it holds float16 of shape"):
            Latents(sd, photos, (4, 8, 8), device)
        path.write_bytes(whole)


def test_a_tokenizer_without_a_length_has_that_of_the_encoder(sd, tmp_path, monkeypatch):
    monkeypatch.setenv("NANO_DMD_CACHE", str(tmp_path / "cache"))
    shutil.copytree(sd, tmp_path / "sd")
    path = tmp_path / "sd" / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["model_max_length"]
    path.write_text(json.dumps(config))
    index = torch.arange(2)
    torch.testing.assert_close(Prompts(str(tmp_path / "sd"), ["fog", "x" * 200])[index], Prompts(sd, ["fog", "x" * 200])[index])


def row(i, **more):
    return json.dumps({"file_name": f"{i}.png", "text": f"caption {i}"} | more)


LINE = "metadata.jsonl, line 2: "
METADATA = {
    "a blank line": (f"{row(0)}\n\n{row(1)}\n\n", None), "a BOM": (f"\ufeff{row(0)}\n{row(1)}", None),
    "U+2028": (f"{row(0)}\r\n{row(1, more='a' + chr(0x2028))}", None),
    "backslashes": (f"{row(0)}\n" + row(1, file_name=".\\1.png"), None),
    "prompt": ('{"file_name": "0.png", "prompt": "caption 0"}\n{"file_name": "1.png", "caption": "caption 1"}', None),
    "a comma": (f"{row(0)}\n{row(1)},", "line 2: Extra data"), "a list": (f"{row(0)}\n[1]", LINE + "it is a list, not a table"),
    "no file_name": (f'{row(0)}\n{{"text": "x"}}', LINE + "it has no file_name"),
    "no text": (f'{row(0)}\n{{"file_name": "1.png"}}', "has no text"),
    "a number": (f"{row(0)}\n{row(1, text=3)}", LINE + "it.text is 3, not a text"), "texts": (f"{row(0)}\n{row(1, text=['x'])}",
    "not a text"),
    "deep": (f"{row(0)}\n" + "[" * 10**5, "metadata.jsonl, line 2"), "one missing": (row(0), "1 of 2 images have no caption"),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_as_people_and_tools_write_it(case, tmp_path):
    content, said = METADATA[case]
    for i in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    (tmp_path / "metadata.jsonl").write_bytes(content.encode())
    if said is None:
        assert captioned(tmp_path)[1] == ["caption 0", "caption 1"]
        return
    with pytest.raises(UserError, match=said):
        captioned(tmp_path)


def test_captions_of_images_that_are_not_there_are_counted(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text(f"{row(0)}\n{row(1)}")
    assert captioned(tmp_path)[1] == ["caption 0"]
    assert "captions for 1 images that are not there, 1.png" in capsys.readouterr().err


def test_prompts_with_a_mark_are_the_same_prompts(tmp_path):
    (tmp_path / "plain.txt").write_bytes(b"a red cube\nfog\n")
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbfa red cube\r\nfog\r\n")
    plain, windows = (read_prompts("random:tiny", tmp_path / f"{n}.txt") for n in ("plain", "windows"))
    assert [*windows.texts] == ["a red cube", "fog"] and torch.equal(plain[torch.arange(2)], windows[torch.arange(2)])
    (tmp_path / "latin.txt").write_bytes(b"fog\ncaf\xe9\n")
    with pytest.raises(UserError, match="latin.txt, line 2, is not UTF-8 text"):
        read_prompts("random:tiny", tmp_path / "latin.txt")


def test_a_class_is_no_prompt(sd, prompts, tmp_path, fast):
    run = str(tmp_path / "run")
    train.main(["--preset", "sd15-dmd2", "--teacher", sd, "--prompts", prompts, *RUN, "--out", run])
    with pytest.raises(UserError, match="--class 3: .* told by prompts, give --prompt"):
        sample.main([run, "--class", "3", "--out", str(tmp_path / "x.png"), "--device", "cpu"])


@pytest.mark.parametrize("part, change, said", [
    ("vae", lambda folder: AutoencoderTiny().save_pretrained(folder), "the vae of .* is a AutoencoderTiny"),
    ("vae", lambda folder: spoil(folder, "latent_channels", 16), "the vae of .* has 16 channels, its unet 4"),
    ("unet", lambda folder: spoil(folder, "encoder_hid_dim", 32), "encoder_hid_dim"),
    ("unet", lambda folder: spoil(folder, "time_cond_proj_dim", 32), "time_cond_proj_dim"),
    ("unet", lambda folder: spoil(folder, "sample_size", [8, 16]), r"sample_size \[8, 16\]"),
    ("text_encoder", lambda folder: cut(folder), "the text_encoder of .* describes: it has no")])
def test_parts_of_another_model_are_refused_before_training(part, change, said, sd, tmp_path):
    shutil.copytree(sd, tmp_path / "sd")
    shutil.rmtree(tmp_path / "sd" / part) if part == "vae" and "Tiny" in str(change.__code__.co_names) else None
    change(tmp_path / "sd" / part)
    with pytest.raises(UserError, match=said):
        load_teacher(str(tmp_path / "sd"))


def spoil(folder, name, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: value}))


def cut(folder):
    file = next(folder.glob("*.safetensors"))
    save_file(dict(list({k: v.clone() for k, v in load_file(file).items()}.items())[1:]), file, {"format": "pt"})


def test_a_square_as_a_pair_is_a_square(sd, tmp_path):
    shutil.copytree(sd, tmp_path / "sd")
    spoil(tmp_path / "sd" / "unet", "sample_size", [8, 8])
    assert load_teacher(str(tmp_path / "sd")).shape == (4, 8, 8)


def test_a_run_knows_when_its_pipeline_changed(sd, prompts, tmp_path, fast, capsys):
    """A student of LoRA weights on another base would be another student: a word is said."""
    shutil.copytree(sd, tmp_path / "sd")
    run = str(tmp_path / "run")
    train.main(["--preset", "sd15-dmd2", "--teacher", str(tmp_path / "sd"), "--prompts", prompts, *RUN, "--out", run])
    load_teacher(run)
    assert "is not as it was" not in capsys.readouterr().err
    file = tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: 2 * v for k, v in load_file(file).items()}, file, {"format": "pt"})
    load_teacher(run)
    assert f"sd is not as it was when {run} was made" in capsys.readouterr().err


@pytest.mark.parametrize("spoiling, said", [
    (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer"),
    (lambda f: [p.unlink() for p in (f / "tokenizer").iterdir() if p.name != "tokenizer_config.json"],
    "the tokenizer of .* knows"),
    (lambda f: spoil(f / "vae", "latents_mean", [0.1] * 4), "is not supported: it has latents_mean"),
    (lambda f: spoil(f / "vae", "scaling_factor", 0), "scaling_factor 0"),
    (lambda f: wide(f / "text_encoder"), "gives 64 numbers a token, its unet takes 32")])
def test_parts_that_do_not_belong_together(spoiling, said, sd, tmp_path, monkeypatch):
    """An empty tokenizer, a VAE of another model, a text encoder of another width: a sentence, and no embeddings of nothing."""
    monkeypatch.setenv("NANO_DMD_CACHE", str(tmp_path / "cache"))
    shutil.copytree(sd, tmp_path / "sd")
    spoiling(tmp_path / "sd")
    with pytest.raises(UserError, match=said):
        load_teacher(str(tmp_path / "sd"))


def wide(folder):
    from transformers import CLIPTextConfig, CLIPTextModel

    old = CLIPTextConfig.from_pretrained(folder)
    CLIPTextModel(CLIPTextConfig(**old.to_dict() | dict(hidden_size=64))).save_pretrained(folder)


def test_tables_of_no_numbers_are_a_sentence(sd, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("NANO_DMD_CACHE", str(tmp_path / "cache"))
    found = Latents(sd, photos, (4, 8, 8), torch.device("cpu"))
    for name, ask in (("text", lambda: found.prompts[torch.tensor([0])]), ("latents", lambda: found.sample(2,
        torch.Generator()))):
        path, = (tmp_path / "cache").glob(f"{name}-*.npy")
        np.save(path, np.load(path) * np.float16(np.nan))
        found = Latents(sd, photos, (4, 8, 8), torch.device("cpu"))
        with pytest.raises(UserError, match="numbers that are not finite"):
            ask()


def test_a_file_listed_twice_and_an_empty_caption(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text(row(0, text=" "))
    assert captioned(tmp_path)[1] == [""] and "1 captions" in capsys.readouterr().err
    (tmp_path / "metadata.jsonl").write_text(f"{row(0)}\n{row(0)}")
    with pytest.raises(UserError, match="line 2: 0.png has a caption already"):
        captioned(tmp_path)

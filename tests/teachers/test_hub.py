"""diffusers models as teachers: read from the folders diffusers writes, equal to diffusers' own arithmetic."""

import json
import shutil
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from nano_dmd import train
from nano_dmd.teachers import hub
from nano_dmd.engine.files import UserError
from nano_dmd.engine.runs import load_run
from nano_dmd.teachers.diffusers_unet import DiffusersUNet
from nano_dmd.teachers.zoo import save_teacher
from nano_dmd.teacher import load_teacher

SMALL = dict(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
             down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))


def pipeline(folder, prediction="epsilon", **changes):
    """A tiny DDPM pipeline with random weights, saved by diffusers; returns its U-Net."""
    torch.manual_seed(0)
    unet = UNet2DModel(**SMALL | changes).eval()
    DDPMPipeline(unet, DDPMScheduler(prediction_type=prediction)).save_pretrained(folder)
    return unet


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_denoiser_is_diffusers_x0_at_every_timestep(prediction, tmp_path):
    """D(x, sigma_t) = the x0 that DDIMScheduler.step predicts from x / sqrt(1 + sigma_t^2), for all 1000 t: relative
    error below 1e-5 of the largest entry (float32, and sigma up to 157 is divided back out)."""
    unet, teacher = pipeline(tmp_path, prediction), load_teacher(str(tmp_path))
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(1000)
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert (teacher.shape, teacher.classes, teacher.data) == ((1, 8, 8), 0, "")
    for t in range(0, 1000, 37):
        sigma = teacher.denoiser.sigmas[t]
        xt = sigma * x
        x_vp = xt / (1 + sigma**2).sqrt()
        expected = scheduler.step(unet(x_vp, t).sample, t, x_vp).pred_original_sample
        got = teacher.denoiser(xt, sigma[None])
        assert (got - expected).abs().max() <= 1e-5 * (1 + sigma) * (1 + expected.abs().max()), t


@torch.no_grad()
def test_features_are_the_bottleneck(tmp_path):
    """features() is what UNet2DModel's own forward hands from its middle block to its decoder, classes included."""
    unet = pipeline(tmp_path, num_class_embeds=4)
    seen = []
    unet.mid_block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x, t, cond = torch.randn(3, 1, 8, 8), torch.tensor([3, 500, 999]), torch.tensor([0, 3, 1])
    unet(x, t, class_labels=cond)
    torch.testing.assert_close(DiffusersUNet(unet).features(x, t, cond), seen[0], rtol=0, atol=0)
    assert load_teacher(str(tmp_path)).classes == 4


@pytest.mark.parametrize("method, changes", [("dmd", {}), ("dmd2", {}), ("sid", {}), ("sid", dict(num_class_embeds=3))])
def test_a_diffusers_model_is_distilled(method, changes, tmp_path, quick):
    """The same train step as everywhere else; data-free, so no data set need be known."""
    pipeline(tmp_path / "model", **changes)
    train.main(["--preset", "digits", "--method", method, "--teacher", str(tmp_path / "model"), "--out", str(tmp_path / "run"),
                "--device", "cpu", "--steps", "2", "--batch", "4", "--pairs", "4", "--pair_steps", "2", "--no-control",
                "--w_gan", "0", "--w_disc", "0"])
    cfg, teacher, generator = load_run(tmp_path / "run")
    cond = torch.tensor([0, 2]) if changes else None
    assert generator(torch.randn(1, 2, 1, 8, 8), cond).shape == (2, 1, 8, 8) and cfg.method == method


def test_the_gan_needs_data_by_name(tmp_path, quick):
    pipeline(tmp_path / "model")
    with pytest.raises(UserError, match="needs real data.*give --data"):
        train.main(["--preset", "digits", "--method", "dmd2", "--teacher", str(tmp_path / "model"),
                    "--out", str(tmp_path / "run"), "--device", "cpu"])


def test_a_folder_that_changes_is_read_again(tmp_path):
    """A local pipeline is pixel_teacher anew each time: its files may have changed; one from the hub is pixel_teacher once."""
    unet = pipeline(tmp_path)
    first = load_teacher(str(tmp_path)).net.state_dict()
    with torch.no_grad():
        unet.conv_in.weight.mul_(2)
    unet.save_pretrained(tmp_path / "unet")
    again = load_teacher(str(tmp_path)).net.state_dict()
    torch.testing.assert_close(again["net.unet.conv_in.weight"], 2 * first["net.unet.conv_in.weight"])


def test_models_that_cannot_be_teachers(tmp_path, monkeypatch):
    """One sentence each: x0-prediction, an inpainting model, a folder without weights, a hub name without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)             # or it tries for 40 s
    pipeline(tmp_path / "sample", "sample")
    pipeline(tmp_path / "inpaint", in_channels=3)
    pipeline(tmp_path / "empty")
    (tmp_path / "empty" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    for name, message in {tmp_path / "sample": "predicts 'sample'", tmp_path / "inpaint": "maps 3 channels",
                          tmp_path / "empty": "cannot load the unet of", "nobody/nothing": "no model nobody/nothing"}.items():
        with pytest.raises(UserError, match=message):
            load_teacher(str(name))


def test_a_teacher_file_that_lies(tmp_path):
    """teacher.json with another table or another prediction type: a UserError, not a wrong teacher."""
    pipeline(tmp_path / "model")
    save_teacher(tmp_path / "copy", *(lambda t: (t.net, t.recipe))(load_teacher(str(tmp_path / "model"))))
    recipe = json.loads((tmp_path / "copy" / "teacher.json").read_text())
    for broken in (dict(recipe["args"], prediction_type="flow"), dict(recipe["args"], alphas_cumprod=[0.5, 0.4])):
        (tmp_path / "copy" / "teacher.json").write_text(json.dumps(dict(recipe, args=broken)))
        with pytest.raises(UserError, match="teacher"):
            load_teacher(str(tmp_path / "copy"))


# ---- somebody else's model is what it says it is, or refused


def said_of(folder):
    """The class of the denoiser that is loaded, or the one sentence."""
    try:
        return type(load_teacher(str(folder)).denoiser).__name__
    except UserError as e:
        return str(e)


SCHEDULERS = {"DDIMScheduler": "FromEps", "PNDMScheduler": "FromEps", "EulerDiscreteScheduler": "FromEps",
              "HeunDiscreteScheduler": "FromEps", "DPMSolverMultistepScheduler": "FromEps", "UniPCMultistepScheduler": "FromEps",
              **dict.fromkeys(["ScoreSdeVeScheduler", "ScoreSdeVpScheduler", "KarrasVeScheduler", "EDMEulerScheduler",
                               "EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "LCMScheduler",
                               "TCDScheduler",
                               "CMStochasticIterativeScheduler"], "teachers here predict epsilon or v_prediction")}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_class_of_the_scheduler_decides(name, tmp_path):
    """What is sampled by timesteps of a variance-preserving table is a teacher, with the defaults of that class; no other is."""
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    pipeline(tmp_path)
    scheduler = getattr(diffusers, name)()
    scheduler.save_pretrained(tmp_path / "scheduler")
    assert SCHEDULERS[name] in said_of(tmp_path)
    if SCHEDULERS[name] == "FromEps":                             # Heun's default betas are not DDPM's
        abar = scheduler.alphas_cumprod.double()
        torch.testing.assert_close(load_teacher(str(tmp_path)).net.sigmas, ((1 - abar) / abar).sqrt().float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("settings", [dict(rescale_betas_zero_snr=True), dict(prediction_type="sample"),
                                      dict(trained_betas=[0.5, 1.0]), dict(trained_betas=[0.1, -0.1]),
                                      dict(num_train_timesteps=50)])
def test_schedules_that_do_not_fit_are_refused(settings, tmp_path):
    pipeline(tmp_path)
    config = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | settings))
    assert "teacher" in said_of(tmp_path)


def test_a_model_without_its_scheduler_is_refused(tmp_path):
    pipeline(tmp_path)
    shutil.rmtree(tmp_path / "scheduler")
    assert "has no scheduler/scheduler_config.json" in said_of(tmp_path)


@pytest.mark.parametrize("changes, said", [
    (dict(_class_name="LDMPipeline", vqvae=["diffusers", "VQModel"]), "is a LDMPipeline with vqvae"),
    (dict(_class_name="KarrasVePipeline"), "KarrasVe"), (dict(vae=["diffusers", "AutoencoderKL"]), "DDPMPipeline with vae"),
    (dict(_class_name="ConsistencyModelPipeline"), "Consistency"),
    (dict(_class_name="StableDiffusionInpaintPipeline"), "is a StableDiffusionInpaintPipeline: supported are Stable")])
def test_the_class_of_the_pipeline_decides(changes, said, tmp_path):
    """Latent, variance-exploding and consistency pipelines hold a UNet2DModel too."""
    pipeline(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | changes))
    assert said in said_of(tmp_path)


@pytest.mark.parametrize("changes, said", [
    (dict(class_embed_type="timestep"), "class_embed_type timestep"), (dict(class_embed_type="identity"),
    "class_embed_type identity"),
    (dict(time_embedding_type="fourier"), "time_embedding_type fourier"), (dict(sample_size=[8, 16]),
    "not a model of square images"),
    (dict(sample_size=7), "not a model of square images"), (dict(sample_size=10**6), "not a model of square images"),
    (dict(sample_size=None), "not a model of square images"), (dict(sample_size=[8, 8]), "FromEps")])
def test_networks_of_another_build(changes, said, tmp_path):
    pipeline(tmp_path, **changes)
    assert said in said_of(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("changes", [
    dict(mid_block_type=None), dict(center_input_sample=True),
    dict(down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"), up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
         norm_num_groups=None, block_out_channels=(32, 64), in_channels=3, out_channels=3)], ids=["no middle block", "centred",
         "skip blocks"])
def test_features_of_networks_of_another_build(changes, tmp_path):
    """What the decoder's first block is given, bit for bit."""
    unet, seen = pipeline(tmp_path, **changes), []
    unet.up_blocks[0].register_forward_pre_hook(lambda module, inputs, more: seen.append((*inputs, *more.values())[0]),
                                                with_kwargs=True)
    x, t = torch.randn(2, unet.config.in_channels, 8, 8), torch.tensor([3, 500])
    unet(x, t)
    torch.testing.assert_close(DiffusersUNet(unet).features(x, t), seen[0], rtol=0, atol=0)


@pytest.mark.parametrize("change, said", [
    (lambda t: {f"module.{k}": v for k, v in t.items()}, "no conv_in.bias, an unknown module.conv_in.bias, so a wrapped"),
    (lambda t: {f"_orig_mod.{k}": v for k, v in t.items()}, "_orig_mod.conv_in.bias, so a wrapped network was saved"),
    (lambda t: dict(list(t.items())[1:]), "it has no "), (lambda t: t | {"more": torch.zeros(1)}, "it has an unknown more"),
    (lambda t: {k: v.fill_(torch.nan) for k, v in t.items()}, "holds a number that is not finite")])
def test_weights_are_all_there_and_no_others(change, said, tmp_path):
    """Never a layer of random numbers, never a traceback."""
    pipeline(tmp_path)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)                                     # read whole before the file is written again
    save_file(change({k: v.clone() for k, v in tensors.items()}), file, {"format": "pt"})
    assert said in said_of(tmp_path)


def test_half_precision_files_alone_are_taken(tmp_path):
    """NAME.fp16.safetensors, as half of the hub has: the same network, in float32, to half's rounding (2^-11)."""
    unet = pipeline(tmp_path)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: v.half() for k, v in load_file(file).items()}, file.with_suffix(".fp16.safetensors"), {"format": "pt"})
    file.unlink()
    found = load_teacher(str(tmp_path)).net.net.unet
    for a, b in zip(found.parameters(), unet.parameters()):
        assert a.dtype == torch.float32 and ((a - b).abs() <= 2**-11 * b.abs() + 1e-7).all()


def test_guidance_needs_a_teacher_with_no_class(tmp_path, capsys, quick):
    """A class-conditional UNet2DModel must be told a class, and an unconditional one has none to leave out; the digits' network
    can be asked, and a word says that it was never taught to."""
    flags = ["--preset", "digits", "--method", "sid", "--device", "cpu", "--steps", "1", "--batch", "2", "--teacher_steps", "1"]
    for name, changes, said in (("classes", dict(num_class_embeds=3), "must be told a class"), ("none", {}, "has no classes")):
        pipeline(tmp_path / name, **changes)
        for option in (["--guidance", "2"], ["--fake_guidance", "2"], ["--critic_dropout", "0.5"]):
            with pytest.raises(UserError, match=f"{option[0]} {float(option[1])} needs a teacher.*{said}"):
                train.main([*flags, "--teacher", str(tmp_path / name), *option, "--out", str(tmp_path / "run")])
    train.main([*flags, "--guidance", "2", "--out", str(tmp_path / "run")])
    assert "note: digits was trained with classes alone" in capsys.readouterr().err


def cached_model(root, name="owner/model", commit="a" * 40, ref="main"):
    """A model as an earlier download leaves it in the hub's cache; returns its U-Net."""
    place = root / f"models--{name.replace('/', '--')}"
    unet = pipeline(place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / ref).write_text(commit)
    return unet


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """The hub's cache in a folder, and nobody to answer; returns what is asked for."""
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", lambda *_, **__: pytest.fail("asked again"))
    hub.on_the_hub.cache_clear()
    yield asked
    hub.on_the_hub.cache_clear()


def test_without_a_network_the_copy_is_used(tmp_path, monkeypatch, no_network):
    """OWNER/MODEL beside a folder OWNER; the commit is the version; without a network the copy of an earlier call serves, a
    revision's for a revision, and without a copy there is one sentence at once."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    with pytest.raises(UserError, match="no model owner/model in a folder here or in .*, and the hub .*folder"):
        load_teacher("owner/model")
    assert len(no_network) == 1
    unet = cached_model(tmp_path)
    teacher = load_teacher("owner/model")
    torch.testing.assert_close(teacher.net.net.unet.conv_in.weight, unet.conv_in.weight)
    assert hub.version("owner/model") == "a" * 40
    with pytest.raises(UserError, match="no model owner/model@v2"):
        load_teacher("owner/model", revision="v2")
    cached_model(tmp_path / "other", ref="v2")
    shutil.copytree(tmp_path / "other" / "models--owner--model", tmp_path / "models--owner--other")
    load_teacher("owner/other", revision="v2")


def test_files_that_are_no_tables(tmp_path):
    pipeline(tmp_path / "a")
    pipeline(tmp_path / "b")
    (tmp_path / "a" / "scheduler" / "scheduler_config.json").write_text("[]")
    assert "scheduler_config.json, it is damaged" in said_of(tmp_path / "a")
    index = json.loads((tmp_path / "b" / "model_index.json").read_text())
    (tmp_path / "b" / "model_index.json").write_text(json.dumps(index | {"_class_name": ["DDPMPipeline"]}))
    assert "_class_name is a list" in said_of(tmp_path / "b")
    (tmp_path / "b" / "model_index.json").write_text(json.dumps(index | {"vqvae": [None, None]}))
    assert said_of(tmp_path / "b") == "FromEps"
    config = json.loads((tmp_path / "b" / "unet" / "config.json").read_text())
    (tmp_path / "b" / "unet" / "config.json").write_text(json.dumps(config | {"_class_name": "UNet1DModel"}))
    assert "the unet of" in (said := said_of(tmp_path / "b")) and "is a UNet1DModel" in said


class Refusal(OSError):
    """What the hub's client raises: an error with the answer it got."""

    def __init__(self, status):
        super().__init__(f"{status} Client Error")
        self.response = SimpleNamespace(status_code=status)


@pytest.mark.parametrize("error, said", [
    (Refusal(401), "401 Client Error.*if it is gated, accept its terms at huggingface.co/owner/gated and log in by .*HF_TOKEN"),
    (Refusal(403), "accept its terms"), (Refusal(404), "check the name and --revision"),
    (TimeoutError("timed out"), "timed out.*without a network give --teacher the pipeline's folder")])
def test_what_the_hub_refuses(error, said, monkeypatch):
    """The sentence fits the reason; the revision is asked for, and is part of the name."""
    asked = []

    def answer(self, repo_id, revision, timeout):
        asked.append((repo_id, revision))
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", answer)
    hub.on_the_hub.cache_clear()
    with pytest.raises(UserError, match=said):
        load_teacher("owner/gated", revision="v2")
    assert asked == [("owner/gated", "v2")]


def test_offline_means_that_nobody_is_asked(monkeypatch, no_network, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        load_teacher("owner/model")
    cached_model(tmp_path)
    hub.on_the_hub.cache_clear()
    load_teacher("owner/model")
    assert no_network == []


def test_a_revision_is_of_a_model_on_the_hub(tmp_path):
    for name in ("digits", "toy:ring8", str(tmp_path)):
        with pytest.raises(UserError, match="--revision v2 is for models on the hub"):
            load_teacher(name, revision="v2")


def test_parts_come_from_the_commit_that_was_asked_for(monkeypatch, tmp_path):
    """Files of OWNER/MODEL@REVISION are those of its commit; a gated model whose files are refused is a sentence, not a model
    without a pipeline."""
    seen, folder = [], tmp_path / "abc"
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')

    def download(repo_id, filename, revision, **more):
        seen.append((repo_id, filename, revision))
        return folder / filename

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    hub.on_the_hub.cache_clear()
    assert hub.index_of("owner/model@v2") == {"_class_name": "SanaPipeline"}
    assert seen == [("owner/model", "model_index.json", "v2"), ("owner/model", "model_index.json", "abc")]
    assert hub.version("owner/model@v2") == "abc"
    assert hub.locations("owner/model@v2", "unet")[0] == dict(
        pretrained_model_name_or_path="owner/model", revision="abc", subfolder="unet")

    def refuse(*args, **kwargs):
        raise Refusal(403)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(UserError, match="the hub does not give owner/model@v2 .403.*accept its terms"):
        hub.index_of("owner/model@v2")
    hub.on_the_hub.cache_clear()

"""diffusers models as teachers: read from the folders diffusers writes, equal to diffusers' own arithmetic."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from nano_dmd import train
from nano_dmd.checkpoint import UserError
from nano_dmd.evaluate import load_run
from nano_dmd.hub import DiffusersUNet
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
    """A local pipeline is converted anew each time: its files may have changed; one from the hub is converted once."""
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
                          tmp_path / "empty": "cannot load the unet of", "nobody/nothing": "cannot load the unet of"}.items():
        with pytest.raises(UserError, match=message):
            load_teacher(str(name))


def test_a_teacher_file_that_lies(tmp_path):
    """teacher.json with another table or another prediction type: a UserError, not a wrong teacher."""
    pipeline(tmp_path / "model")
    train.save_teacher(tmp_path / "copy", *(lambda t: (t.net, t.recipe))(load_teacher(str(tmp_path / "model"))))
    recipe = json.loads((tmp_path / "copy" / "teacher.json").read_text())
    for broken in (dict(recipe["args"], prediction_type="flow"), dict(recipe["args"], alphas_cumprod=[0.5, 0.4])):
        (tmp_path / "copy" / "teacher.json").write_text(json.dumps(dict(recipe, args=broken)))
        with pytest.raises(UserError, match="teacher"):
            load_teacher(str(tmp_path / "copy"))

"""Where teachers come from: trained here, read from a folder, downloaded and converted.  Infrastructure.

A teacher at rest is a folder with teacher.json, which says how to build the network, and teacher.safetensors.
"""

import hashlib
import json
import re
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from nano_dmd.checkpoint import UserError, cache_dir, load_tensors, load_weights, read_json, save_tensors, write_json
from nano_dmd.data import load_data
from nano_dmd.networks import MLP, UNet
from nano_dmd.noise import forked
from nano_dmd.teacher import EDM, Teacher, fast_bf16, train_teacher

SMALL_EDM = dict(model_type="SongUNet", img_resolution=32, img_channels=3, label_dim=10, model_channels=64,
                 channel_mult=[2, 2, 2], num_blocks=2, attn_resolutions=[16], dropout=0.0)

# How a teacher is trained when nobody has one: steps x batch images, Adam lr, ema half-life in steps.
# data "" = what --data says, CIFAR-10 without it.
# fmt: off
RECIPES = {
    "toy":             dict(network="mlp", args=dict(octaves=5), data="", sigma_data=0.5, bf16=True,
                            sigma="lognormal(-1.2,1.4)", steps=4000, batch=1024, lr=2e-3, ema=100, label_dropout=0.0),
    "digits":          dict(network="unet", args=dict(channels=1, classes=10), data="digits", sigma_data=0.75, bf16=True,
                            sigma="lognormal(-1.2,1.2)", steps=1200, batch=128, lr=3e-3, ema=100, label_dropout=0.0),
    "cifar10-small":   dict(network="unet", args=dict(channels=3, classes=10), data="", sigma_data=0.5, bf16=True,
                            sigma="lognormal(-1.2,1.2)", steps=1000, batch=64, lr=2e-3, ema=100, label_dropout=0.0),
    "cifar10-scratch": dict(network="edm", args=SMALL_EDM, data="", sigma_data=0.5, bf16=True,
                            sigma="lognormal(-1.2,1.2)", steps=20_000, batch=512, lr=1e-3, ema=1000, label_dropout=0.0),
}
# fmt: on


def build(recipe, device="cpu"):
    """The untrained Denoiser of a recipe, in a precision fit for device.

    raises KeyError, TypeError or ValueError if it does not describe one
    """
    kind, args, bf16 = recipe["network"], recipe["args"], recipe["bf16"] and fast_bf16(device)
    if kind == "diffusers":
        from nano_dmd.hub import denoiser_from_config

        return denoiser_from_config(**args)
    if kind == "edm":
        from nano_dmd.edm_networks import edm_network

        return EDM(edm_network(**args), recipe["sigma_data"], bf16)
    return EDM({"mlp": MLP, "unet": UNet}[kind](**args), recipe["sigma_data"], bf16)


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


def fit_or_load(name, data_name, recipe, device, seed=0, show=True, compile=False):
    """(network, recipe) trained on a data set, from the cache if the same recipe was trained before."""
    recipe = dict(recipe, data=data_name, seed=seed)
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:10]
    folder = cache_dir() / f"teacher-{re.sub('[^a-z0-9]+', '-', name)}-{key}"
    if not (folder / "teacher.safetensors").exists():
        start = time.process_time(), time.perf_counter()
        data = load_data(data_name, device)
        with forked(device), compiled(True, asked=compile):
            torch.manual_seed(seed)
            net, rng = build(recipe, device).to(device), torch.Generator().manual_seed(seed)
            if compile:
                compile_net(net.net)
            net = train_teacher(net, lambda n: data.sample(n, rng), recipe, show)
        save_teacher(folder, net, dict(recipe, shape=list(data.shape), classes=data.classes,
                                       cpu_seconds=round(time.process_time() - start[0], 1),
                                       seconds=round(time.perf_counter() - start[1], 1)))
    return read_teacher(folder, device)


def save_teacher(folder, net, recipe):
    """Make folder one that load_teacher takes.

    recipe: network, args, sigma_data, bf16 to build it; shape, classes, data, seconds, cpu_seconds to know about it
    """
    write_json(Path(folder) / "teacher.json", recipe)
    if "source" not in recipe:                                    # Stable Diffusion stays where it is: 3.4 GB
        save_tensors(Path(folder) / "teacher.safetensors", net.state_dict())


def read_teacher(folder, device):
    """The inverse of save_teacher: (network, recipe).  raises UserError for a folder that is not one or is broken."""
    recipe, path = read_json(Path(folder) / "teacher.json"), Path(folder) / "teacher.safetensors"
    try:
        numbers = {k: float(recipe[k]) for k in ("sigma_data", "seconds", "cpu_seconds")}
        recipe = dict(recipe, data=str(recipe["data"]), shape=[int(n) for n in recipe["shape"]],
                      classes=int(recipe["classes"]), **numbers)
        net = build(recipe, device).to(device)
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{folder}/teacher.json does not describe a teacher ({type(e).__name__}: {e})") from e
    load_weights(net, load_tensors(path), path)
    return net.requires_grad_(False).eval(), recipe


def weights_digest(net):
    """Ten hex digits that name these weights, for cache keys."""
    data = b"".join(p.detach().cpu().numpy().tobytes() for p in net.parameters())
    return hashlib.sha256(data).hexdigest()[:10]


def find(name, device, steps, seed, data, show, compile):
    """See teacher.load_teacher."""
    if name.startswith("toy:"):
        mixture = load_data(name, device)
        return Teacher(mixture, mixture.shape, mixture.classes, RECIPES["toy"]["sigma_data"], name)
    if source := stable_diffusion_of(name):
        from nano_dmd.stable_diffusion import load

        return load(source, device)
    if name in RECIPES and name != "toy":
        recipe = dict(RECIPES[name], **({"steps": steps} if steps else {}))
        net, recipe = fit_or_load(name, recipe["data"] or data or "cifar10", recipe, device, seed, show, compile)
    else:
        net, recipe = read_teacher(folder_of(name), device)
    return Teacher(net, tuple(recipe["shape"]), recipe["classes"], recipe["sigma_data"], recipe["data"], net, recipe)


def stable_diffusion_of(name):
    """The Stable Diffusion pipeline that a name, a folder or a run's folder stands for, "" if it stands for none."""
    if (Path(name) / "teacher.json").is_file():
        return read_json(Path(name) / "teacher.json").get("source", "")
    if name in RECIPES or name.startswith(("edm:", "toy:")) or name.endswith(".pkl"):
        return ""
    from nano_dmd.stable_diffusion import RANDOM, pipeline_class

    found = name in RANDOM or may_be_pipeline(name) and pipeline_class(name).startswith("StableDiffusion")
    return name if found else ""


def folder_of(name):
    """The folder with teacher.json for a folder, an EDM name or file, or a diffusers pipeline."""
    path = Path(name)
    if (path / "teacher.json").is_file():
        return path
    if name.startswith("edm:") or path.suffix == ".pkl":
        from nano_dmd.edm_checkpoint import convert, fetch_edm, sha256

        file = fetch_edm(name) if name.startswith("edm:") else path
        if not file.is_file():
            raise UserError(f"no file {name}: give an EDM .pkl, or a name like edm:cifar10-cond to have it downloaded")
        folder = cache_dir() / f"teacher-edm-{sha256(file)[:10]}"
        if not (folder / "teacher.safetensors").exists():         # the only metrics of others' data are CIFAR-10's
            convert(file, folder, data="cifar10" if "cifar10" in file.name else "")
        return folder
    if may_be_pipeline(name) or "UNet2DModel" in text_of(path / "config.json"):
        from nano_dmd.hub import fetch_diffusers

        return fetch_diffusers(name)
    raise UserError(f"no teacher {name!r}: use toy:NAME, {', '.join(r for r in RECIPES if r != 'toy')}, edm:NAME, a .pkl of "
                    "EDM's, the folder of a run that trained one, or a diffusers pipeline with a UNet2DModel")


def may_be_pipeline(name):
    """A folder with a diffusers pipeline, or a name that the hub could know: runs/typo is not OWNER/MODEL."""
    on_the_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).parent.is_dir()
    return bool(on_the_hub) or (Path(name) / "model_index.json").is_file()


def text_of(path):
    return path.read_text(errors="replace") if path.is_file() else ""

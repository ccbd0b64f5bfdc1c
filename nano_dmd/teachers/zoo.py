"""Where teachers come from: trained here, read from a folder, downloaded and converted.  Infrastructure.

A teacher at rest is a folder with teacher.json, which says how to build the network, and teacher.safetensors.
"""

import hashlib
import re
import time
from pathlib import Path

import torch

from nano_dmd.denoiser import EDM, train_teacher
from nano_dmd.engine.cache import cached
from nano_dmd.engine.files import (UserError, load_tensors, load_weights, note, read_bytes,
                                   read_json, save_tensors, write_json)
from nano_dmd.engine.machine import compile_net, compiled, fast_bf16, forked
from nano_dmd.networks import MLP, UNet
from nano_dmd.teachers.data import MOST_CLASSES, identity, load_data

SMALL_EDM = dict(model_type="SongUNet", img_resolution=32, img_channels=3, label_dim=10, model_channels=64,
                 channel_mult=[2, 2, 2], num_blocks=2, attn_resolutions=[16], dropout=0.0)

# How a teacher is trained when nobody has one: steps x batch images, Adam lr, ema half-life in steps.
# data "" = what --data says, CIFAR-10 without it; the network gets the channels and classes of the data.
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


def build(recipe, device="cpu"):
    """The untrained Denoiser of a recipe, in a precision fit for device.

    raises KeyError, TypeError or ValueError if it does not describe one
    """
    kind, args, bf16 = recipe["network"], recipe["args"], recipe["bf16"] and fast_bf16(device)
    if kind == "diffusers":
        from nano_dmd.teachers.diffusers_unet import denoiser_from_config

        return denoiser_from_config(**args)
    if kind == "edm":
        from nano_dmd.teachers.edm_networks import edm_network

        return EDM(edm_network(**args), recipe["sigma_data"], bf16)
    return EDM({"mlp": MLP, "unet": UNet}[kind](**args), recipe["sigma_data"], bf16)


def fitted(recipe, data):
    """The recipe with a network for images of this data's size, channels and classes.  raises UserError if there is none."""
    if recipe["network"] == "mlp":
        return recipe
    channels, side, _ = data.shape
    levels = {"unet": 1, "edm": len(SMALL_EDM["channel_mult"]) - 1}[recipe["network"]]
    if side % 2**levels:
        raise UserError(f"the images of {data.name} have {side} pixels a side: this teacher needs a multiple of {2**levels}")
    sizes = {"unet": dict(channels=channels, classes=data.classes),
             "edm": dict(img_resolution=side, img_channels=channels, label_dim=data.classes)}
    return dict(recipe, args=recipe["args"] | sizes[recipe["network"]])


def fit_or_load(name, data_name, recipe, device, seed=0, show=True, compile=False):
    """(network, recipe) trained on a data set, from the cache if the same recipe was trained on the same data before."""
    where = identity(data_name)
    recipe = dict(recipe, data=data_name if isinstance(where, str) else where[0], seed=seed)

    def make(folder):
        start = time.process_time(), time.perf_counter()
        data = load_data(data_name, device)
        with forked(device), compiled(True, asked=compile):
            torch.manual_seed(seed)
            found = fitted(recipe, data)
            net, rng = build(found, device).to(device), torch.Generator().manual_seed(seed)
            if compile:
                compile_net(net.net)
            net = train_teacher(net, lambda n: data.sample(n, rng), found, show)
        save_teacher(folder, net, dict(found, shape=list(data.shape), classes=data.classes,
                                       cpu_seconds=round(time.process_time() - start[0], 1),
                                       seconds=round(time.perf_counter() - start[1], 1)))

    return read_teacher(kept(re.sub("[^a-z0-9]+", "-", name), dict(recipe, files=where), make), device)


def kept(name, made_of, make):
    """The cached folder of a teacher; make(folder) writes it."""
    return cached(f"teacher-{name}", made_of, make, parts=("teacher.json", "teacher.safetensors"))


def save_teacher(folder, net, recipe):
    """Make folder one that load_teacher takes.

    recipe: network, args, sigma_data, bf16 to build it; shape, classes, data, seconds, cpu_seconds to know about it
    """
    write_json(Path(folder) / "teacher.json", recipe)
    if "source" not in recipe:                                    # Stable Diffusion stays where it is: 3.4 GB
        save_tensors(Path(folder) / "teacher.safetensors", net.state_dict())

TEACHER = dict(network=str, args=dict, sigma_data=float, bf16=bool, shape=[int], classes=int, data=str, seconds=float,
               cpu_seconds=float)

SMALL = dict(dim=(1, 4096), width=(1, 8192), depth=(1, 64), octaves=(1, 16), channels=(1, 64), classes=(0, MOST_CLASSES),
             emb=(1, 8192))                                       # arguments of networks.py


def read_teacher(folder, device):
    """The inverse of save_teacher: (network, recipe).  raises UserError for a folder that is not one or is broken."""
    recipe, path = read_json(Path(folder) / "teacher.json", TEACHER), Path(folder) / "teacher.safetensors"
    try:
        if problem := nonsense(recipe):
            raise ValueError(problem)
        net = build(recipe, device).to(device)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, ZeroDivisionError, NotImplementedError) as e:
        raise UserError(f"{folder}/teacher.json does not describe a teacher ({type(e).__name__}: {e})") from e
    load_weights(net, load_tensors(path), path)
    return net.requires_grad_(False).eval(), recipe


def nonsense(recipe):
    """What is impossible in a recipe, "" if nothing is.  Checked before memory is taken for the network."""
    args, shape, classes = recipe["args"], recipe["shape"], recipe["classes"]
    if not 1e-6 <= recipe["sigma_data"] <= 1e6 or not 0 <= classes <= MOST_CLASSES:
        return f"sigma_data {recipe['sigma_data']}, {classes} classes"
    if recipe["network"] in ("mlp", "unet"):
        for name, value in args.items():
            if type(value) is not int or not SMALL[name][0] <= value <= SMALL[name][1]:
                return f"{name} is {value!r:.40}"
    square = len(shape) == 3 and 1 <= shape[1] == shape[2] <= 4096
    fits = {"mlp": lambda: shape == [args.get("dim", 2)],
            "unet": lambda: square and shape[1] % 2 == 0 and shape[0] == args.get("channels", 1),
            "edm": lambda: shape == [args["img_channels"]] + 2 * [args["img_resolution"]],
            "diffusers": lambda: square and shape[0] == args["unet"]["in_channels"]}
    known = {"mlp": lambda: 0, "unet": lambda: args.get("classes", 10), "edm": lambda: args.get("label_dim", 0),
             "diffusers": lambda: args["unet"].get("num_class_embeds") or 0}
    right = fits[recipe["network"]]() and classes == known[recipe["network"]]()
    return "" if right else f"shape {shape}, {classes} classes do not fit the network's arguments"


def weights_digest(net):
    """Ten hex digits that name what a network computes, for cache keys: its weights, tables and constants."""
    found = hashlib.sha256(repr((type(net).__name__, getattr(net, "sigma_data", None), getattr(net, "bf16", None))).encode())
    for name, t in net.state_dict().items():
        found.update(f"{name} {tuple(t.shape)} {t.dtype}".encode())
        found.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:10]


def find(name, device, steps, seed, data, show, compile):
    """The fields of a Teacher, as a dict.  See teacher.load_teacher."""
    if name.startswith("toy:"):
        mixture = load_data(name, device)
        return dict(kind="points", denoiser=mixture, shape=mixture.shape, classes=mixture.classes,
                    sigma_data=RECIPES["toy"]["sigma_data"], data=name)
    if source := stable_diffusion_of(name):
        from nano_dmd.teachers.text_to_image import load

        teacher, before = load(source, device), {} if source == name else read_json(Path(name) / "teacher.json")
        if before.get("version", "") not in ("", teacher["recipe"]["version"]):
            note(f"{source} is not as it was when {name} was made: its files were changed, or copied")
        return teacher
    if name in RECIPES and name != "toy":
        recipe = dict(RECIPES[name], **({"steps": steps} if steps else {}))
        net, recipe = fit_or_load(name, recipe["data"] or data or "cifar10", recipe, device, seed, show, compile)
    else:
        net, recipe = read_teacher(folder_of(name), device)
    return dict(kind="points" if recipe["network"] == "mlp" else "images", denoiser=net, net=net, recipe=recipe,
                shape=tuple(recipe["shape"]), **{k: recipe[k] for k in ("classes", "sigma_data", "data")})


def stable_diffusion_of(name):
    """The Stable Diffusion pipeline that a name, a folder or a run's folder stands for, "" if it stands for none."""
    if (Path(name) / "teacher.json").is_file():
        recipe = read_json(Path(name) / "teacher.json", {})
        return read_json(Path(name) / "teacher.json", {"source": str})["source"] if "source" in recipe else ""
    from nano_dmd.teachers.diffusers_unet import index_of
    from nano_dmd.teachers.text_networks import RANDOM

    if name in RANDOM or is_pipeline(name) and index_of(name).get("_class_name", "").startswith("StableDiffusion"):
        return name
    return ""


def folder_of(name):
    """The folder with teacher.json for a folder, an EDM name or file, or a diffusers pipeline."""
    path = Path(name)
    if (path / "teacher.json").is_file():
        return path
    if name.startswith("edm:") or path.suffix == ".pkl":
        from nano_dmd.teachers.edm_checkpoint import converted, fetch_edm, sha256

        file = fetch_edm(name) if name.startswith("edm:") else path
        if not file.is_file():
            raise UserError(f"no file {name}: give an EDM .pkl, or a name like edm:cifar10-cond to have it downloaded")
        data = "cifar10" if "cifar10" in file.name else ""        # the only metrics of others' data are CIFAR-10's
        return kept("edm", [sha256(file), data], lambda folder: save_teacher(folder, *converted(file, data)))
    if is_pipeline(name):
        from nano_dmd.teachers.diffusers_unet import converted, version

        return kept("diffusers", [name, version(name)], lambda folder: save_teacher(folder, *converted(name)))
    raise UserError(f"no teacher {name!r:.200}: use toy:NAME, {', '.join(r for r in RECIPES if r != 'toy')}, edm:NAME, a .pkl of "
                    "EDM's, the folder of a run that trained one, or a diffusers pipeline with a UNet2DModel")

MODEL_FILES = ("model_index.json", "config.json")


def is_pipeline(name):
    """A folder with a diffusers pipeline or model; else a name that could be one on the hub, OWNER/MODEL."""
    if name in RECIPES or name.startswith(("edm:", "toy:")) or name.endswith(".pkl"):
        return False
    if Path(name).is_dir():
        return any(b"_class_name" in read_bytes(file) for file in Path(name).glob("*.json") if file.name in MODEL_FILES)
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.ASCII))

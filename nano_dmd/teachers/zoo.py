"""Where teachers come from: trained here, read from a folder, or converted from others' files.

A saved teacher is a folder: teacher.json says how to build it, teacher.safetensors has the weights.
"""

import hashlib
import re
import time
from pathlib import Path

import torch

from nano_dmd import networks
from nano_dmd.denoiser import EDM, FromFlow, train_denoiser
from nano_dmd.engine import files, machine
from nano_dmd.engine.cache import cached
from nano_dmd.teachers import diffusers_unet, hub
from nano_dmd.teachers import edm_checkpoint as edm
from nano_dmd.teachers import text_to_image as text
from nano_dmd.teachers.data import MOST_CLASSES, identity, load_data
from nano_dmd.teachers.edm_networks import edm_network

SMALL_EDM = dict(model_type="SongUNet", img_resolution=32, img_channels=3, label_dim=10,
                 model_channels=64, channel_mult=[2, 2, 2], num_blocks=2, attn_resolutions=[16],
                 dropout=0.0)

# How teachers are trained here: steps x batch samples, Adam lr, ema half-life in steps. data "" =
# what --data says, else CIFAR-10 (toy: the mixture); it decides the network's channels and classes.
TOY = dict(network="mlp", args=dict(octaves=5), data="", sigma_data=0.5, bf16=True,
           sigma="lognormal(-1.2,1.4)", steps=4000, batch=1024, lr=2e-3, ema=100, label_dropout=0.0)
RECIPES = {
    "toy": TOY, "flow": dict(TOY, flow=True),
    "digits": dict(network="unet", args=dict(channels=1, classes=10), data="digits",
                   sigma_data=0.75, bf16=True, sigma="lognormal(-1.2,1.2)", steps=1200,
                   batch=128, lr=3e-3, ema=100, label_dropout=0.0),
    "mnist": dict(network="unet", args=dict(channels=1, classes=10, patch=2), data="mnist",
                  sigma_data=0.6, bf16=True, sigma="lognormal(-1.0,1.4)", steps=1500,
                  batch=128, lr=3e-3, ema=100, label_dropout=0.0),
    "cifar10-small": dict(network="unet", args=dict(channels=3, classes=10), data="",
                          sigma_data=0.5, bf16=True, sigma="lognormal(-1.2,1.2)", steps=1000,
                          batch=64, lr=2e-3, ema=100, label_dropout=0.0),
    "cifar10-scratch": dict(network="edm", args=SMALL_EDM, data="", sigma_data=0.5, bf16=True,
                            sigma="lognormal(-1.2,1.2)", steps=20_000, batch=512, lr=1e-3, ema=1000,
                            label_dropout=0.0),
}

# EDM's published networks, and a small one, with random weights: to measure speed and memory.
RANDOM_EDM = {
    "random:small": dict(SMALL_EDM, model_channels=16, num_blocks=1),
    "random:cifar10": dict(
        SMALL_EDM, model_channels=128, num_blocks=4, augment_dim=9, dropout=0.13),
    "random:imagenet64": dict(
        model_type="DhariwalUNet", img_resolution=64, img_channels=3, label_dim=1000)}


def find(name, device, steps=0, seed=0, data="", show=True, compile=False, revision=""):
    """The fields of a Teacher, as a dict.  See teacher.load_teacher.

    steps, seed override the recipe of a teacher trained here; compile makes its training faster
    """
    if revision:                                   # from here on part of its name
        if "/" not in name or Path(name).exists():
            raise files.UserError(f"--revision {revision} is for models on the hub, OWNER/MODEL, "
                                  f"and {name} is none")
        name = f"{name}@{revision}"
    if name.startswith("toy:"):
        mixture = load_data(name, device)
        return dict(kind="points", denoiser=mixture, shape=mixture.shape, classes=mixture.classes,
                    sigma_data=RECIPES["toy"]["sigma_data"], data=name)
    if source := text_pipeline_of(name):
        teacher = text.load(source, device)
        before = {} if source == name else files.read_json(Path(name) / "teacher.json")
        if before.get("version", "") not in ("", teacher["recipe"]["version"]):
            files.note(f"{source} is not as it was when {name} was made: its files changed")
        return teacher
    if name.startswith("flow:"):
        what = "flow", name.replace("flow:", "toy:"), RECIPES["flow"]
        net, recipe = fit_or_load(*what, device, steps, seed, show, compile)
    elif name in RECIPES and name not in ("toy", "flow"):
        data = RECIPES[name]["data"] or data or "cifar10"
        net, recipe = fit_or_load(name, data, RECIPES[name], device, steps, seed, show, compile)
    elif name in RANDOM_EDM:
        net, recipe = random_teacher(RANDOM_EDM[name], device)
    else:
        net, recipe = read_teacher(folder_of(name), device)
    kind = "points" if recipe["network"] == "mlp" else "images"
    return dict(kind=kind, denoiser=net, net=net, recipe=recipe, shape=tuple(recipe["shape"]),
                **{k: recipe[k] for k in ("classes", "sigma_data", "data")})


def fit_or_load(name, data_name, recipe, device, steps=0, seed=0, show=True, compile=False):
    """(network, recipe) trained on a data set, or from the cache: same recipe, same data."""
    where = identity(data_name)
    known = data_name if isinstance(where, str) else where[0]
    recipe = dict(recipe, data=known, seed=seed, **({"steps": steps} if steps else {}))

    def make(folder):
        start = time.process_time(), time.perf_counter()
        data = load_data(data_name, device)
        with machine.forked(device), machine.compiled(True, asked=compile):
            torch.manual_seed(seed)
            found = fitted(recipe, data)
            net, rng = untrained(found, device).to(device), torch.Generator().manual_seed(seed)
            if compile:
                machine.compile_net(net.net)
            net = train_denoiser(net, lambda n: data.sample(n, rng), found, show)
        save_teacher(folder, net, dict(found, shape=list(data.shape), classes=data.classes,
                                       cpu_seconds=round(time.process_time() - start[0], 1),
                                       seconds=round(time.perf_counter() - start[1], 1)))

    folder = kept(re.sub("[^a-z0-9]+", "-", name), dict(recipe, files=where), make)
    return read_teacher(folder, device)


def random_teacher(args, device):
    """(network, recipe) of one of RANDOM_EDM, which goes with images of noise."""
    side, classes = args["img_resolution"], args["label_dim"]
    recipe = dict(network="edm", args=args, sigma_data=0.5, bf16=False, shape=[3, side, side],
                  classes=classes, data=f"random:3x{side}:{classes}", seconds=0.0,
                  cpu_seconds=0.0)
    with machine.forked(device):
        torch.manual_seed(0)
        return untrained(recipe).to(device).requires_grad_(False).eval(), recipe


def fitted(recipe, data):
    """The recipe with a network for images of this data's size, channels and classes."""
    if recipe["network"] == "mlp":
        return recipe
    args, (channels, side, _) = recipe["args"], data.shape
    # each level but the first halves; UNet has two
    step = 2 ** (len(args.get("channel_mult", [1, 2])) - 1) * args.get("patch", 1)
    if side % step:
        raise files.UserError(f"the images of {data.name} have {side} pixels a side: this teacher "
                              f"needs a multiple of {step}")
    sizes = {"unet": dict(channels=channels, classes=data.classes),
             "edm": dict(img_resolution=side, img_channels=channels, label_dim=data.classes)}
    return dict(recipe, args=args | sizes[recipe["network"]])


def untrained(recipe, device="cpu"):
    """The Denoiser of a recipe, before its weights.  raises what constructors raise."""
    kind, args = recipe["network"], recipe["args"]
    if kind == "diffusers":
        return diffusers_unet.denoiser_from_config(**args)
    if kind == "edm":
        net = edm_network(**args)
    else:
        net = {"mlp": networks.MLP, "unet": networks.UNet}[kind](**args)
    bf16 = recipe["bf16"] and machine.fast_bf16(device)
    return FromFlow(net, bf16) if recipe.get("flow") else EDM(net, recipe["sigma_data"], bf16)


def kept(name, made_of, make):
    """The cached folder of a teacher; make(folder) writes it."""
    return cached(f"teacher-{name}", made_of, make, parts=("teacher.json", "teacher.safetensors"))


def save_teacher(folder, net, recipe):
    """Make folder one that load_teacher takes.

    recipe  network, args, sigma_data, bf16 to build it; shape, classes, data, seconds, cpu_seconds
    """
    files.write_json(Path(folder) / "teacher.json", recipe)
    if "source" not in recipe:  # a pipeline with text stays where it is: gigabytes
        files.save_tensors(Path(folder) / "teacher.safetensors", net.state_dict())


RECIPE = dict(network=str, args=dict, sigma_data=float, bf16=bool, shape=[int], classes=int,
              data=str, seconds=float, cpu_seconds=float)
MOST = dict(dim=4096, width=8192, depth=64, octaves=16, channels=64, classes=MOST_CLASSES,
            emb=8192, patch=16)


def read_teacher(folder, device):
    """The inverse of save_teacher: (network, recipe).  raises UserError for a damaged folder."""
    recipe = files.read_json(Path(folder) / "teacher.json", RECIPE)
    path = Path(folder) / "teacher.safetensors"
    try:
        if problem := nonsense(recipe):
            raise ValueError(problem)
        net = untrained(recipe, device).to(device)
    except Exception as e:                         # whatever the constructors of networks raise
        raise files.UserError(f"{folder}/teacher.json does not describe a teacher "
                              f"({type(e).__name__}: {e})") from e
    files.load_weights(net, files.load_tensors(path), path)
    return net.requires_grad_(False).eval(), recipe


def nonsense(recipe):
    """What is impossible in a recipe, "" if nothing is.  Asked before memory is taken."""
    kind, args = recipe["network"], recipe["args"]
    shape, classes = recipe["shape"], recipe["classes"]
    if not 1e-6 <= recipe["sigma_data"] <= 1e6 or not 0 <= classes <= MOST_CLASSES:
        return f"sigma_data {recipe['sigma_data']}, {classes} classes"
    for name, value in args.items() if kind in ("mlp", "unet") else ():
        if type(value) is not int or not (0 if name == "classes" else 1) <= value <= MOST[name]:
            return f"{name} is {value!r:.40}"
    if kind == "mlp":
        wanted = [args.get("dim", 2)], 0
    elif kind == "unet":
        wanted = [args.get("channels", 1), shape[-1], shape[-1]], args.get("classes", 10)
    elif kind == "edm":
        side = args["img_resolution"]
        wanted = [args["img_channels"], side, side], args.get("label_dim", 0)
    else:
        known = args["unet"].get("num_class_embeds") or 0
        wanted = [args["unet"]["in_channels"], shape[-1], shape[-1]], known
    sides = set(shape[1:])
    right = (shape, classes) == wanted and all(0 < n <= 4096 for n in sides)
    if not right or kind == "unet" and shape[1] % (2 * args.get("patch", 1)):
        return f"shape {shape}, {classes} classes do not fit the network's arguments"
    return ""


def weights_digest(net):
    """Ten hex digits that name what a network computes: its weights, tables and constants."""
    constants = type(net).__name__, getattr(net, "sigma_data", None), getattr(net, "bf16", None)
    found = hashlib.sha256(repr(constants).encode())
    for name, t in net.state_dict().items():
        found.update(f"{name} {tuple(t.shape)} {t.dtype}".encode())
        found.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:10]


def text_pipeline_of(name):
    """The pipeline with text that a name, a folder or a run's folder stands for, "" if none."""
    path = Path(name) / "teacher.json"
    if path.is_file():
        recipe = files.read_json(path, {})
        return files.read_json(path, {"source": str})["source"] if "source" in recipe else ""
    if name in text.RANDOM:
        return name
    known = hub.index_of(name).get("_class_name", "") if is_pipeline(name) else ""
    return name if known in text.PIPELINES or known.startswith("StableDiffusion") else ""


def folder_of(name):
    """The folder with teacher.json for a folder, an EDM name or file, or a diffusers pipeline."""
    path = Path(name)
    if (path / "teacher.json").is_file():
        return path
    if name.startswith("edm:") or path.suffix == ".pkl":
        file = edm.fetch_edm(name) if name.startswith("edm:") else path
        if not file.is_file():
            raise files.UserError(f"no file {name}: give an EDM .pkl, or a name like "
                                  "edm:cifar10-cond")
        data = "cifar10" if "cifar10" in file.name else ""  # other data have no metrics here
        key = [edm.sha256(file), data]
        return kept("edm", key, lambda folder: save_teacher(folder, *edm.edm_teacher(file, data)))
    if is_pipeline(name):
        key = [name, hub.version(name)]
        make = diffusers_unet.pixel_teacher
        return kept("diffusers", key, lambda folder: save_teacher(folder, *make(name)))
    ours = ", ".join(r for r in RECIPES if r not in ("toy", "flow"))
    raise files.UserError(f"no teacher {name!r:.200}: use toy:NAME, flow:NAME, {ours}, edm:NAME, "
                          "a .pkl of EDM's, the folder of a run, or a diffusers pipeline "
                          "(UNet2DModel, Stable Diffusion, SANA, PRX)")


def is_pipeline(name):
    """A folder with a diffusers model, or a name that could be on the hub, OWNER/MODEL."""
    if name in RECIPES or name.startswith(("edm:", "toy:")) or name.endswith(".pkl"):
        return False
    if Path(name).is_dir():
        paths = [Path(name) / f for f in ("model_index.json", "config.json")]
        return any(p.is_file() and b"_class_name" in files.read_bytes(p) for p in paths)
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", name, re.ASCII))

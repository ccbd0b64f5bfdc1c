"""What a run starts from: teacher, data, prompts and noise-image pairs that fit one another."""

import torch

from nano_dmd.engine import files
from nano_dmd.engine.cache import cached, digest
from nano_dmd.engine.config import Config
from nano_dmd.engine.files import UserError
from nano_dmd.methods import needs
from nano_dmd.real_score import RealScore
from nano_dmd.teacher import load_teacher, make_pairs
from nano_dmd.teachers import zoo
from nano_dmd.teachers.data import load_data, numbers, resident


def find_teacher(cfg, device, resumed=""):
    """The Teacher, with a network to start students from: an exact mixture gets one fitted to it.

    resumed  a run folder: its copy of the teacher is read, and the teacher's data is not needed
    """
    if resumed:
        teacher = load_teacher(str(resumed), device)
        exact = cfg.teacher.startswith("toy:")
        return teacher._replace(denoiser=load_data(cfg.teacher, device)) if exact else teacher
    options = dict(steps=cfg.teacher_steps, seed=cfg.teacher_seed, compile=cfg.compile)
    more = dict(data=cfg.data, revision=cfg.revision)
    teacher = load_teacher(cfg.teacher, device, **more, **options)
    check_guidance(cfg, teacher.classes, teacher.recipe or zoo.RECIPES["toy"])
    if teacher.net is None:
        what = cfg.teacher, cfg.teacher, zoo.RECIPES["toy"], device
        net, recipe = zoo.fit_or_load(*what, **options)
        teacher = teacher._replace(net=net, recipe=recipe)
    return teacher


def find_data(cfg, teacher, device, data=None):
    """Real data that fits the teacher: cfg.data, else the teacher's own data, else None.

    A published teacher's data is loaded only if needed.  data  cfg.data, if it is loaded already.
    raises UserError if needed data is not known, or if data does not fit
    """
    several = len(cfg.sigma_list()) > 1 and not cfg.backward_simulation
    needed = several or "real" in needs(cfg)
    name = cfg.data or (teacher.data if needed or teacher.recipe["seconds"] else "")
    if not name and needed:
        raise UserError(f"{cfg.method} with these settings needs real data, and that of "
                        f"{cfg.teacher} is not known: give --data")
    if name and teacher.kind == "text":
        from nano_dmd.teachers.latents import Latents

        return Latents(teacher.recipe["source"], name, teacher.shape, device, cfg.encode)
    data = data or (load_data(name, device, cfg.flip) if name else None)
    if data and data.classes and not teacher.classes and data.shape == teacher.shape:
        data = data.unlabelled()
    if data and (data.shape, data.classes) != (teacher.shape, teacher.classes):
        raise UserError(f"--data {name} has {data.shape} samples in {data.classes} classes, "
                        f"--teacher {cfg.teacher} makes {teacher.shape} in {teacher.classes}")
    return data


def find_prompts(cfg, teacher, device):
    """The Prompts to train on, None for a teacher without text.  raises UserError."""
    if teacher.kind != "text":
        return None
    from nano_dmd.teachers.prompts import read_prompts

    if cfg.flip:
        raise UserError("--flip: latents of mirrored images are no mirrored latents; leave it out")
    if not cfg.prompts:
        raise UserError(f"{cfg.teacher} listens to text: give --prompts FILE, one prompt to a line")
    prompts = read_prompts(teacher.recipe["source"], cfg.prompts, cfg.encode, device)
    shape, found = teacher.net.net.empty.shape[1:], prompts[torch.zeros(1, dtype=torch.long)].shape
    if found[1:] != shape:
        raise UserError(f"the embeddings in the cache are {tuple(found[1:])} each, not "
                        f"{tuple(shape)}: python -m nano_dmd.engine.cache --clear text")
    return prompts


def check_guidance(cfg, classes, recipe):
    """Guidance and dropped labels need a teacher that can be asked without a class.

    raises UserError for one that cannot; prints a note for one that was not trained to
    """
    names = ("guidance", "fake_guidance", "critic_dropout")
    asked = [f"--{n} {getattr(cfg, n)}" for n in names if getattr(cfg, n) != getattr(Config, n)]
    if not asked or "source" in recipe:            # a pipeline with text knows the empty prompt
        return
    if not classes or recipe["network"] == "diffusers":
        why = "must be told a class" if classes else "has no classes"
        raise UserError(f"{asked[0]} needs a teacher that can be asked with and without a class: "
                        f"{cfg.teacher} {why}; leave it out")
    if not recipe.get("label_dropout"):
        files.note(f"{cfg.teacher} was trained with classes alone: {asked[0]} may be poor")


def cached_pairs(cfg, teacher, device, prompts=None):
    """{"z", "x" (N, *S)[, "cond" (N,)]}: noise-image pairs of the guided teacher, cached.

    cond is a class or the number of a prompt.  It stays on the CPU, where Draw looks it up.
    """
    kinds = len(prompts) if prompts else teacher.classes
    low = teacher.sigmas[0]
    made_of = dict(pairs=cfg.pairs, steps=cfg.pair_steps, sigma_min=low, sigma_max=cfg.pair_sigma,
                   kinds=kinds, shape=teacher.shape, teacher=cfg.teacher, guidance=cfg.guidance,
                   **teacher_digest(cfg, teacher, prompts))

    def embed(index):
        return prompts[index].to(device) if prompts else index

    def make(path):
        rng = torch.Generator().manual_seed(0)
        z = torch.randn(cfg.pairs, *teacher.shape, generator=rng).to(device)
        cond = torch.randint(kinds, (cfg.pairs,), generator=rng).to(device) if kinds else None
        batch = {"points": 10_000, "images": 500, "text": 8}[teacher.kind]
        x = make_pairs(guided_by(teacher, cfg), z, cond, batch, embed=embed, steps=cfg.pair_steps,
                       sigma_min=low, sigma_max=cfg.pair_sigma)
        files.save_tensors(path, {"z": z, "x": x} | ({"cond": cond} if kinds else {}))

    path = cached("pairs", made_of, make, ".safetensors")
    images = torch.float32, (cfg.pairs, *teacher.shape)
    labels = dict(cond=(torch.int64, (cfg.pairs,))) if kinds else {}
    pairs = files.load_tensors(path, dict(z=images, x=images, **labels))
    if kinds and not ((pairs["cond"] >= 0) & (pairs["cond"] < kinds)).all():
        raise UserError(f"{path} is damaged: a class is not among {kinds}; {files.MADE_AGAIN}")
    return {k: v if k == "cond" else resident(v, device) for k, v in pairs.items()}


def teacher_digest(cfg, teacher, prompts):
    """What the teacher's answers depend on: files of a pipeline, numbers of a network."""
    if prompts:
        return dict(files=teacher.recipe["version"], texts=digest([*prompts.texts]))
    if teacher.denoiser is teacher.net:
        args = digest([teacher.recipe["network"], teacher.recipe["args"]])
        weights = zoo.weights_digest(teacher.net)
        return dict(weights=weights, args=args, sigma_data=teacher.sigma_data)
    return dict(mixture=numbers(load_data(cfg.teacher)))


def guided_by(teacher, cfg):
    """The guided teacher as a Denoiser."""
    return teacher.denoiser if cfg.guidance == 1 else RealScore(teacher.denoiser, cfg.guidance)

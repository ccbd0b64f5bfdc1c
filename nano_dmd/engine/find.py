"""TODO."""

import torch

from nano_dmd.engine.cache import cached, digest
from nano_dmd.engine.config import Config
from nano_dmd.engine.files import UserError, load_tensors, note, save_tensors
from nano_dmd.real_score import RealScore
from nano_dmd.teacher import load_teacher, make_pairs
from nano_dmd.teachers.data import load_data, resident
from nano_dmd.teachers.zoo import RECIPES, fit_or_load, weights_digest


def find_teacher(cfg, device, resumed=""):
    """The Teacher, with a network to start students from: an exact mixture gets one fitted to it.

    resumed  the folder of a run, whose teacher it is then, whatever became of the data it was trained on
    """
    if resumed:
        teacher = load_teacher(str(resumed), device)
        return teacher._replace(denoiser=load_data(cfg.teacher, device)) if cfg.teacher.startswith("toy:") else teacher
    teacher = load_teacher(cfg.teacher, device, cfg.teacher_steps, cfg.teacher_seed, cfg.data, compile=cfg.compile)
    if teacher.net is None:
        check_guidance(cfg, teacher.classes, RECIPES["toy"])
        steps = {"steps": cfg.teacher_steps} if cfg.teacher_steps else {}
        net, recipe = fit_or_load(cfg.teacher, cfg.teacher, RECIPES["toy"] | steps, device, cfg.teacher_seed, compile=cfg.compile)
        teacher = teacher._replace(net=net, recipe=recipe)
    check_guidance(cfg, teacher.classes, teacher.recipe)
    return teacher


def find_data(cfg, teacher, device, needed=False, data=None):
    """Real data that fits the teacher: what cfg.data says, else what the teacher was trained on here, else None.

    needed  a published teacher's data is looked for as well; data  what cfg.data names, if it is loaded already
    raises UserError if there is none, or it does not fit
    """
    name = cfg.data or (teacher.data if needed or teacher.recipe["seconds"] else "")
    if not name and needed:
        raise UserError(f"{cfg.method} with these settings needs real data, and that of {cfg.teacher} is not known: give --data")
    if name and teacher.kind == "text":
        from nano_dmd.teachers.text_to_image import Latents

        return Latents(teacher.recipe["source"], name, teacher.shape, device)
    data = data or (load_data(name, device, cfg.flip) if name else None)
    if data and data.classes and not teacher.classes and data.shape == teacher.shape:
        data = data.unlabelled()
    if data and (data.shape, data.classes) != (teacher.shape, teacher.classes):
        raise UserError(f"--data {name} has samples of shape {data.shape} in {data.classes} classes, "
                        f"--teacher {cfg.teacher} makes {teacher.shape} in {teacher.classes}")
    return data


def find_prompts(cfg, teacher):
    """The Prompts to train on, None for a teacher without text.  raises UserError if there are none but should be."""
    if teacher.kind != "text":
        return None
    from nano_dmd.teachers.text_to_image import read_prompts

    if not cfg.prompts:
        raise UserError(f"{cfg.teacher} listens to text: give a file with one prompt to a line, --prompts FILE")
    prompts, shape = read_prompts(teacher.recipe["source"], cfg.prompts), teacher.net.net.empty.shape[1:]
    if prompts.table.shape[1:] != shape:
        raise UserError(f"the embeddings in the cache are {prompts.table.shape[1:]} each, not {tuple(shape)}: "
                        "python -m nano_dmd.engine.cache --clear text")
    return prompts


def check_guidance(cfg, classes, recipe):
    """Guidance and dropped labels need a teacher that can be asked without a class.  raises UserError where it cannot; says so
    where it can, but was never taught to."""
    asked = [n for n in ("guidance", "fake_guidance", "critic_dropout") if getattr(cfg, n) != getattr(Config, n)]
    if not asked or "source" in recipe:                           # a pipeline with text knows the empty prompt
        return
    if not classes or recipe["network"] == "diffusers":
        raise UserError(f"--{asked[0]} {getattr(cfg, asked[0])} needs a teacher that knows classes and can be asked without one: "
                        f"{cfg.teacher} {'must be told a class' if classes else 'has no classes'}; leave it out")
    if not recipe.get("label_dropout"):
        note(f"{cfg.teacher} was not trained here to be asked without a class, so what --{asked[0]} compares with may be poor")


def cached_pairs(cfg, teacher, device, prompts=None):
    """{"z", "x"[, "cond"]} noise-image pairs of the guided teacher, from the cache if they were made before.

    cond is a class, or the number of a prompt, and stays on the CPU, where Draw looks it up.
    """
    kinds = len(prompts) if prompts else teacher.classes
    made_of = dict(pairs=cfg.pairs, steps=cfg.pair_steps, sigma_min=teacher.sigmas[0], sigma_max=cfg.pair_sigma, kinds=kinds,
                   shape=teacher.shape, teacher=cfg.teacher, guidance=cfg.guidance, **teacher_digest(cfg, teacher, prompts))

    def make(path):
        rng = torch.Generator().manual_seed(0)
        z = torch.randn(cfg.pairs, *teacher.shape, generator=rng).to(device)
        cond = torch.randint(kinds, (cfg.pairs,), generator=rng).to(device) if kinds else None
        batch = 10_000 if len(teacher.shape) == 1 else 8 if prompts else 500
        args = dict(steps=cfg.pair_steps, sigma_min=teacher.sigmas[0], sigma_max=cfg.pair_sigma)
        x = make_pairs(guided_by(teacher, cfg, prompts), z, cond, batch, **args)
        save_tensors(path, {"z": z, "x": x} | ({"cond": cond} if kinds else {}))

    path, images = cached("pairs", made_of, make, ".safetensors"), (torch.float32, (cfg.pairs, *teacher.shape))
    wanted = dict(z=images, x=images) | (dict(cond=(torch.int64, (cfg.pairs,))) if kinds else {})
    pairs = load_tensors(path, wanted)
    if kinds and not ((pairs["cond"] >= 0) & (pairs["cond"] < kinds)).all():
        raise UserError(f"{path} is damaged: a class or prompt is not among {kinds}; delete it to have it made again")
    return {k: v if k == "cond" else resident(v, device) for k, v in pairs.items()}


def teacher_digest(cfg, teacher, prompts):
    """What the teacher's answers depend on: a pipeline's files, prompts and guidance; else all numbers it computes with."""
    if prompts:
        from nano_dmd.teachers.text_networks import RANDOM
        from nano_dmd.teachers.text_to_image import hub

        source = teacher.recipe["source"]
        return dict(files=source if source in RANDOM else hub.version(source), texts=digest(prompts.texts))
    if teacher.denoiser is teacher.net:
        args = digest([teacher.recipe["network"], teacher.recipe["args"]])
        return dict(weights=weights_digest(teacher.net), args=args, sigma_data=teacher.sigma_data)
    mixture = load_data(cfg.teacher)
    return dict(mixture=[v.tolist() for v in (mixture.means, mixture.std, mixture.weights)])


def guided_by(teacher, cfg, prompts=None):
    """The teacher as pairs and pictures of text ask it: guided; for text cond is the number of a prompt."""
    real = teacher.denoiser if cfg.guidance == 1 else RealScore(teacher.denoiser, cfg.guidance)
    if not prompts:
        return real
    return lambda x, sigma, cond: real(x, sigma, prompts[cond].to(x.device))

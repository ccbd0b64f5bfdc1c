"""A run on the disk: its folder, its checkpoint, and how both are read again."""

from dataclasses import asdict
from pathlib import Path

import torch

from nano_dmd.engine import files
from nano_dmd.engine.build import student
from nano_dmd.engine.config import Config, read_config, same_run
from nano_dmd.engine.files import UserError, first_line
from nano_dmd.engine.find import find_teacher
from nano_dmd.engine.machine import fast_bf16
from nano_dmd.engine.parallel import gather, place
from nano_dmd.engine.schema import wrong_tensors
from nano_dmd.teachers.zoo import save_teacher

TRAINED = ("fake", "discriminator", "generator", "ema", "slow_fake")


def open_folder(cfg, teacher, device, step, before, processes):
    """What a run folder holds before the first step; says what the user should know by then."""
    out = Path(cfg.out)
    if cfg.bf16 and not fast_bf16(device):
        print("bfloat16 is slow on this CPU: the networks run in float32, which is faster")
    if before != processes:
        print(f"resumed by {processes} processes instead of {before}: the same batches and noise, "
              "but sums in another order, so the result agrees to rounding and not to the bit")
    files.remove_leftovers(out)
    files.write_json(out / "config.json", asdict(cfg))
    save_teacher(out, teacher.net, teacher.recipe)
    files.trim_log(out / "log.jsonl", step)


def state(cfg, step, seconds, nets, opts, draw):
    """Everything a resumed run needs to go on to the bit.  All processes share one random state."""
    modules = {name: getattr(nets, name) for name in TRAINED}
    states = {id(net): net for net in modules.values()}           # without an average, two are one
    states = {key: gather(files.own_state(net)) for key, net in states.items()}
    cuda = [torch.cuda.get_rng_state()] if draw.device.type == "cuda" else []
    return dict(config=asdict(cfg), step=step, seconds=list(seconds), processes=place()[1],
                nets={name: states[id(net)] for name, net in modules.items()},
                opts=gather({k: opt.state_dict() for k, opt in opts.items()}),
                rng=[torch.get_rng_state(), cuda, draw.rng.get_state()], sources=draw.sources)


def restore(saved, cfg, nets, opts, draw, path):
    """The inverse of state(): (step, seconds, processes).  raises UserError.

    Only the moments of the optimisers are loaded.  Their settings follow from cfg and must agree.
    """
    try:
        if difference := same_run(cfg, Config(**saved["config"])):
            name, here, there = difference
            raise ValueError(f"it is of a run with {name} {there!r:.40}, not {here!r:.40}")
        for name, v in draw.sources.items():
            if saved.get("sources", {}).get(name, v) != v:
                files.note(f"--{name} is not as it was when this run was started: what follows is "
                     "another run than it would have been")
        right = 0 < saved["step"] <= cfg.steps and saved["processes"] > 0
        if not right or saved["opts"].keys() != opts.keys():
            known = sorted(saved["opts"])
            raise ValueError(f"step {saved['step']} of {cfg.steps}, optimisers {known}")
        for name in TRAINED:
            files.load_weights(getattr(nets, name), saved["nets"][name], path)
        for name, opt in opts.items():
            groups = opt.state_dict()["param_groups"]
            if problem := wrong_moments(saved["opts"][name], groups[0], opt, cfg):
                raise ValueError(f"the optimiser of the {name}: {problem}")
            opt.load_state_dict({"state": saved["opts"][name]["state"], "param_groups": groups})
            for p, found in opt.state.items():     # in p's memory order, which --shard did not keep
                found |= {k: torch.empty_like(p, dtype=v.dtype).copy_(v) for k, v in found.items()
                          if torch.is_tensor(v) and v.shape == p.shape and v.stride() != p.stride()}
        cpu, cuda, data = saved["rng"]
        draw.rng.set_state(data.cpu())
        torch.set_rng_state(cpu.cpu())
        if draw.device.type == "cuda" and cuda:
            torch.cuda.set_rng_state(cuda[0].cpu())
        return saved["step"], saved["seconds"], saved["processes"]
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as e:
        raise UserError(f"checkpoint {path} is not one of this version ({type(e).__name__}: "
                        f"{first_line(e)})") from e


def wrong_moments(saved, own, opt, cfg):
    """What is wrong with an optimiser's saved state, "" if nothing is.  own: settings by cfg.

    Settings that only another version of torch has are not compared.
    """
    settings = saved["param_groups"][0] if saved["param_groups"] else {}
    for name in own.keys() - {"lr"}:
        missing = name in ("params", "betas", "eps", "weight_decay") and name not in settings
        if missing or settings.get(name, own[name]) != own[name]:
            return f"{name} is {settings.get(name)!r:.40}, not {own[name]!r:.40}"
    for index, found in saved["state"].items():
        if index not in own["params"] or not isinstance(found, dict):
            return f"there is no weight {index!r:.40}"
        if not cfg.adam8bit:                       # bitsandbytes has formats of its own
            like = torch.float32, tuple(opt.param_groups[0]["params"][index].shape)
            wanted = dict(step=(torch.float32, ()), exp_avg=like, exp_avg_sq=like)
            if problem := wrong_tensors(found, wanted):
                return problem
    return ""


def load_run(folder, device="cpu"):
    """(Config, Teacher, averaged Generator) of a run folder.  raises UserError if it is not one."""
    folder = Path(folder)
    cfg = read_config(folder)
    teacher = find_teacher(cfg, device, resumed=folder)
    generator = student(cfg, teacher)
    path = folder / "generator.safetensors"
    files.load_weights(generator, files.load_tensors(path), path)
    generator.net.bf16 = teacher.net.bf16 = cfg.bf16 and fast_bf16(device)
    return cfg, teacher, generator.requires_grad_(False)

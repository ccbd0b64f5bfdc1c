"""TODO."""

from dataclasses import asdict
from pathlib import Path

import torch

from nano_dmd.engine.config import Config, read_config, same_run
from nano_dmd.engine.files import (UserError, first_line, load_tensors, load_weights, note,
                                   own_state, remove_leftovers, trim_log, write_json)
from nano_dmd.engine.machine import fast_bf16
from nano_dmd.engine.parallel import PROCESS, whole
from nano_dmd.engine.schema import wrong_tensors
from nano_dmd.generator import Generator
from nano_dmd.teacher import load_teacher
from nano_dmd.teachers.data import load_data
from nano_dmd.teachers.zoo import save_teacher


def open_folder(cfg, teacher, device, step, before, processes):
    """What the run folder holds before the first step, and what the user should know by then."""
    out = Path(cfg.out)
    if cfg.bf16 and not fast_bf16(device):
        print("bfloat16 is only emulated on this CPU: the networks run in float32, which is faster")
    if before != processes:
        print(f"resumed by {processes} processes instead of {before}: the same batches and noise, but sums in another order, "
              "so the result agrees up to rounding and not to the bit")
    remove_leftovers(out)
    write_json(out / "config.json", asdict(cfg))
    save_teacher(out, teacher.net, teacher.recipe)
    trim_log(out / "log.jsonl", step)


def load_run(folder, device="cpu"):
    """(Config, Teacher, EMA Generator) of a run folder.  raises UserError if it is not one."""
    folder = Path(folder)
    cfg, teacher = read_config(folder), load_teacher(str(folder), device)
    generator = Generator(teacher.net, cfg.sigma_list(), cfg.lora_generator, cfg.unit_noise)
    load_weights(generator, load_tensors(folder / "generator.safetensors"), folder / "generator.safetensors")
    generator.net.bf16 = teacher.net.bf16 = cfg.bf16 and fast_bf16(device)
    if cfg.teacher.startswith("toy:"):
        teacher = teacher._replace(denoiser=load_data(cfg.teacher, device))
    return cfg, teacher, generator.requires_grad_(False)


def state(cfg, step, seconds, nets, opts, rng, read):
    """Everything a resumed run needs to go on to the bit.  All processes share one random state, so one saves it.

    read  the fingerprints of what the run reads, cache.sources
    """
    modules = {name: own_state(getattr(nets, name)) for name in ("fake", "discriminator", "generator", "ema")}
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return dict(config=asdict(cfg), step=step, seconds=list(seconds), nets=whole(modules), processes=PROCESS["count"],
                rng=[torch.get_rng_state(), cuda, rng.get_state()],
                opts=whole({name: opt.state_dict() for name, opt in opts.items()}), sources=read)


def restore(saved, cfg, nets, opts, rng, path, read):
    """The inverse of state(): (step, seconds, processes); raises UserError naming the first thing that does not fit.

    Of the optimisers only the moments are taken: their settings follow from cfg, and must be the same.
    """
    try:
        if difference := same_run(cfg, Config(**saved["config"])):
            raise ValueError("it is of a run with {} {!r:.40}, not {!r:.40}".format(*(difference[i] for i in (0, 2, 1))))
        for name, v in read.items():
            if saved.get("sources", {}).get(name, v) != v:
                note(f"--{name} is not as it was when this run was started: what follows is another run than it would have been")
        if not 0 < saved["step"] <= cfg.steps or saved["processes"] < 1 or not saved["opts"].keys() == opts.keys():
            raise ValueError(f"step {saved['step']} of {cfg.steps}, optimisers {sorted(saved['opts'])}")
        for name in ("fake", "discriminator", "generator", "ema"):
            load_weights(getattr(nets, name), saved["nets"][name], path)
        for name, opt in opts.items():
            groups = opt.state_dict()["param_groups"]
            if problem := wrong_moments(saved["opts"][name], groups, opt, cfg):
                raise ValueError(f"the optimiser of the {name}: {problem}")
            opt.load_state_dict({"state": saved["opts"][name]["state"], "param_groups": groups})
        cpu, cuda, data = saved["rng"]
        rng.set_state(data.cpu())
        torch.set_rng_state(cpu.cpu())
        if torch.cuda.is_available() and cuda:
            torch.cuda.set_rng_state(cuda[0].cpu())
        return saved["step"], saved["seconds"], saved["processes"]
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as e:
        raise UserError(f"checkpoint {path} is not one of this version ({type(e).__name__}: {first_line(e)})") from e


def wrong_moments(saved, groups, opt, cfg):
    """What is wrong with an optimiser's saved state_dict, "" if nothing is.  groups: its own settings, which follow from cfg;
    another version of torch may have one more or less."""
    settings, weights = saved["param_groups"][0] if saved["param_groups"] else {}, opt.param_groups[0]["params"]
    for name in groups[0].keys() - {"lr"}:
        missing = name in ("params", "betas", "eps", "weight_decay") and name not in settings
        if missing or settings.get(name, groups[0][name]) != groups[0][name]:
            return f"{name} is {settings.get(name)!r:.40}, not {groups[0][name]!r:.40}"
    for index, found in saved["state"].items():
        if index not in groups[0]["params"] or not isinstance(found, dict):
            return f"there is no weight {index!r:.40}"
        if not cfg.adam8bit:                                      # bitsandbytes has formats of its own
            moments = dict.fromkeys(("exp_avg", "exp_avg_sq"), (torch.float32, tuple(weights[index].shape)))
            if problem := wrong_tensors(found, {"step": (torch.float32, ())} | moments):
                return problem
    return ""

"""From a Config to everything that a training step needs."""

import torch

from nano_dmd.engine import machine
from nano_dmd.engine.build import build
from nano_dmd.engine.draw import Draw
from nano_dmd.engine.files import UserError
from nano_dmd.engine.find import (cached_pairs, check_guidance, find_data, find_prompts,
                                  find_teacher)
from nano_dmd.engine.parallel import first_then_others
from nano_dmd.methods import needs
from nano_dmd.teachers.data import load_data
from nano_dmd.teachers.zoo import RECIPES


def prepare(cfg, device, resumed=""):
    """(Teacher, Nets, optimisers, Draw) of a run before its first step.

    raises UserError where parts of cfg do not fit together
    """
    machine.keep_freed_memory()
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.tf32
        torch.backends.cudnn.deterministic = True  # a resumed run is the same to the bit
    data = None  # a typo in its name shows before the teacher trains
    if cfg.data and not cfg.prompts:
        data = load_data(cfg.data, device, cfg.flip)
        if not data.classes and cfg.teacher in RECIPES:
            check_guidance(cfg, 0, {})
    teacher = first_then_others(lambda: find_teacher(cfg, device, resumed))
    if teacher.kind == "points" and (cfg.flip or cfg.reg_loss == "lpips"):
        raise UserError("--flip and --reg_loss lpips are for images, and the teacher makes points: "
                        "leave them out")
    prompts = first_then_others(lambda: find_prompts(cfg, teacher, device))
    data = first_then_others(lambda: find_data(cfg, teacher, device, data))
    pairs = None
    if "pairs" in needs(cfg):
        pairs = first_then_others(lambda: cached_pairs(cfg, teacher, device, prompts))
    nets, opts = build(cfg, teacher, device)
    rng = torch.Generator().manual_seed(cfg.seed)
    return teacher, nets, opts, Draw(cfg, teacher, data, pairs, rng, device, prompts)

"""Distil a teacher into a one-step or few-step generator.

    python -m nano_dmd.train --preset digits --method sid --seed 1

The method and the step are in methods.py; this is the loop around them.
"""

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from nano_dmd import evaluate
from nano_dmd.engine import parallel
from nano_dmd.engine.build import set_learning_rates
from nano_dmd.engine.config import (Config, add_config_flags, describe, free_folder, parser,
                                    resolve, resolve_resumed)
from nano_dmd.engine.files import (UserError, check_writable, command, load_checkpoint, own_state,
                                   read_json, save_tensors, write_json)
from nano_dmd.engine.machine import Clock, about, compiled, pick_device
from nano_dmd.engine.prepare import prepare
from nano_dmd.engine.progress import Progress
from nano_dmd.engine.runs import open_folder, restore, state
from nano_dmd.methods import CONTROL, METHODS, needs, train_step
from nano_dmd.metrics.sets import table
from nano_dmd.plot import have_matplotlib, plot_run
from nano_dmd.presets import PRESETS

__all__ = ["METHODS", "PRESETS", "Config", "main", "run", "train", "train_step"]


def train(cfg, nets, opts, draw, progress, step=0, seconds=(0.0, 0.0)):
    """The loop: a step, then every so often a line of the log, a picture, a checkpoint.

    step, seconds  where a resumed run begins.  returns its [CPU, wall] seconds
    """
    clock, history = Clock(seconds), []

    def due(every):
        return done % every == 0 or done == cfg.steps

    for step in progress.bar(step):
        set_learning_rates(opts, step, cfg)
        with compiled(True, asked=cfg.compile):
            logs = train_step(nets, opts, draw, cfg, step)
        done = step + 1
        history.append((done, logs, draw.latest.seen))
        if due(cfg.log_every) or due(cfg.save_every):
            check_finite(history, nets)
            history = []
        if due(cfg.log_every):
            metrics = None
            if cfg.eval_every and due(cfg.eval_every):
                metrics = lambda: evaluate.quick(nets.ema, draw.data, cfg.eval_images)
            progress.log(done, logs, nets, draw, clock.read(), metrics)
        if due(cfg.sample_every):
            progress.picture(nets, done)
        if due(cfg.save_every):
            progress.save(lambda: state(cfg, done, clock.read(), nets, opts, draw))
    return clock.read()


def check_finite(history, nets):
    """Raise UserError at the first loss of history that is not finite; wait for the device once.

    A finite loss can have a gradient that is not.  So the weights are looked at too, before a save.
    """
    advice = "the last good checkpoint is kept: lower the learning rates or try another --seed"
    losses = [v for _, logs, _ in history for v in logs.values()]
    if losses and not torch.stack(losses).isfinite().all():
        for step, logs, seen in history:
            for name, value in logs.items():
                if not value.isfinite():
                    sigma, values = seen[name]
                    worst = (~values.isfinite()).int().argmax()
                    where = "" if sigma is None else f" (sigma {sigma[worst].item():.4g})"
                    raise UserError(f"{name} is {value.item()} at step {step}{where}; {advice}")
    for name in ("fake", "discriminator", "generator"):
        norm = nn.utils.get_total_norm(getattr(nets, name).parameters())
        if not parallel.gather(norm).isfinite():
            last = history[-1][0]
            raise UserError(f"a weight of {name} is not finite after step {last}; {advice}")


def run(cfg, resume=False):
    """Everything from a resolved Config to a finished run folder; returns the report (report.json).

    Under torchrun every process runs this.  The first one writes and returns the report.
    """
    device, out = pick_device(cfg.device), Path(cfg.out)
    rank, processes = parallel.begin(cfg, device)
    check_writable(out)
    path, before = out / "checkpoint.pt", processes
    step, seconds = 0, (0.0, 0.0)
    saved = load_checkpoint(path, device) if resume else None
    own_teacher = out if resume and (out / "teacher.json").is_file() else ""
    teacher, nets, opts, draw = prepare(cfg, device, own_teacher)
    if resume:
        step, seconds, before = restore(saved, cfg, nets, opts, draw, path)
        saved = None                               # weights that nobody needs twice
    if not rank:
        open_folder(cfg, teacher, device, step, before, processes)
    parallel.share(nets, opts, cfg)
    progress = Progress(cfg, teacher, device, out, draw.prompts, rank, step)
    seconds = train(cfg, nets, opts, draw, progress, step, seconds)
    return finish(cfg, teacher, nets, draw, progress, seconds, processes)


def finish(cfg, teacher, nets, draw, progress, seconds, processes):
    """Weights, a last picture and the report of a trained run."""
    if not progress.watches:
        return parallel.close()
    weights = parallel.gather(own_state(nets.ema))
    if not cfg.shard:
        parallel.close()
    if progress.writes:
        save_tensors(progress.out / "generator.safetensors", weights)
    progress.save_samples(nets.ema, progress.out / "samples.png", beside_teacher=True)
    rows = control_row(cfg) if processes == 1 else {}
    if teacher.kind == "text":
        rows |= evaluate.latent_rows(nets, draw, cfg)
    else:
        rows |= evaluate.report_rows(nets.ema, teacher, draw.data, cfg)
    parallel.close()
    if not progress.writes:
        return None
    rows[cfg.method]["seconds"] = seconds[1]
    report = dict(rows=rows, cpu_seconds=seconds[0], seconds=seconds[1], processes=processes,
                  teacher_cpu_seconds=teacher.recipe["cpu_seconds"], sources=draw.sources,
                  **about(pick_device(cfg.device)))
    write_json(progress.out / "report.json", report)
    return report


def control_row(cfg):
    """{name: metrics} of a student trained on the same pairs alone: what the method has to beat."""
    if not cfg.control or cfg.method == CONTROL or "pairs" not in needs(cfg):
        return {}
    out = Path(cfg.out) / "control"
    if not (out / "report.json").exists():
        control = replace(cfg, method=CONTROL, out=str(out), control=False, log_to="")
        run(control, resume=(out / "checkpoint.pt").exists())
    return {f"{CONTROL} only": read_json(out / "report.json")["rows"][CONTROL]}


def main(argv=None):
    """The command line; raises UserError for a mistake of the user's (files.command prints it)."""
    p = parser("python -m nano_dmd.train", __doc__)
    p.add_argument("--resume", action="store_true", help="go on with the run in --out, to the bit")
    p.add_argument("--dry-run", action="store_true", help="print every setting and stop")
    add_config_flags(p)
    given = vars(p.parse_args(argv))
    resume, dry_run = given.pop("resume"), given.pop("dry_run")
    cfg = resolve_resumed(given) if resume else resolve(given)
    if dry_run:
        print(describe(cfg))
        return
    if not resume and (Path(cfg.out) / "checkpoint.pt").exists():
        if "out" in given:
            raise UserError(f"{cfg.out} already holds a run: add --resume to go on with it, or "
                            "choose another --out")
        cfg = replace(cfg, out=free_folder(cfg.out))
    first = os.environ.get("RANK", "0") == "0"
    if first:
        opening = ["preset", "method", "steps", "batch", *given][:6]
        print(f"{describe(cfg, opening)}\n  every setting is in {cfg.out}/config.json", flush=True)
    with compiled(False, asked=cfg.compile):       # but for the steps
        report = run(cfg, resume)
    if not first:
        return
    if have_matplotlib():
        plot_run(cfg.out)
    print(table(report["rows"]))
    print(f"{report['seconds']:.0f} s of distillation ({report['cpu_seconds']:.0f} CPU s); "
          f"pictures and numbers are in {cfg.out}/")


if __name__ == "__main__":
    command(main)
    parallel.exit_cleanly()

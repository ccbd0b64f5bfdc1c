"""Distil a teacher into a one-step generator: METHODS says what is minimised, train_step is the whole algorithm.

    python -m nano_dmd.train --preset digits --method sid --seed 1
"""

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from nano_dmd.engine.build import prepare, set_learning_rates
from nano_dmd.engine.config import (add_config_flags, describe, free_folder, parser, resolve,
                                    resolve_resumed)
from nano_dmd.engine.diagnostics import by_level, diagnose, to_floats
from nano_dmd.engine.files import (UserError, append_line, check_writable, command,
                                   load_checkpoint, own_state, read_json, save_checkpoint,
                                   save_tensors, write_json)
from nano_dmd.engine.machine import Clock, compiled, machine, pick_device, use_threads
from nano_dmd.engine.parallel import end, leave, share, start, whole
from nano_dmd.engine.progress import Peek, report_progress
from nano_dmd.engine.runs import open_folder, restore, state
from nano_dmd.evaluate import latent_rows, quick, rows
from nano_dmd.methods import METHODS, train_step
from nano_dmd.metrics.sets import table
from nano_dmd.plot import have_matplotlib, plot_run


def train(cfg, nets, opts, draw, peek, out, step=0, seconds=(0.0, 0.0)):
    """The loop: train_step, then every so often a line of log.jsonl, a picture, a checkpoint.  Returns the seconds.

    Of several processes the first alone writes; it has a peek, the others have None (or, sharded, one that never writes).
    """
    clock, history, writes = Clock(seconds), [], bool(peek and peek.writes)
    bar = tqdm(range(step, cfg.steps), initial=step, total=cfg.steps, desc=cfg.method, disable=not writes)
    for step in bar:
        set_learning_rates(opts, step, cfg)
        with compiled(True, asked=cfg.compile):
            logs = train_step(nets, opts, draw, cfg, step)
        history.append((step + 1, logs, draw.latest.seen))
        done, last = step + 1, step + 1 == cfg.steps
        log, save = done % cfg.log_every == 0 or last, done % cfg.save_every == 0 or last
        if log or save:
            history = check_finite(history, nets)
        if not peek:
            continue
        if log:
            record = dict(step=done, critic_updates=done * cfg.critic_steps, seconds=clock.read(), teacher=peek.reference,
                          **to_floats(logs), **diagnose(METHODS[cfg.method].generator, nets, draw.latest, cfg),
                          by_sigma=by_level(draw.latest.seen))
            if cfg.eval_every and (done % cfg.eval_every == 0 or last):
                record["metrics"] = quick(nets.ema, draw.data, cfg.eval_images)
            if writes:
                append_line(out / "log.jsonl", record)
                peek.send(record)
                report_progress(record, peek.reference, bar)
        if done % cfg.sample_every == 0 or last:
            peek.save(nets.ema, out / "samples" / f"{done:06d}.png")
            peek.save_scores(nets, out / "scores" / f"{done:06d}.png")
        if save:
            saved = state(cfg, done, clock.read(), nets, opts, draw.rng, draw.sources)
            if writes:
                save_checkpoint(out / "checkpoint.pt", saved)
    return clock.read()


def check_finite(history, nets):
    """Stop at the first step whose losses are not finite; one device synchronisation for the whole history.

    A finite loss can still have a gradient that is not, so before anything is saved the weights are looked at too.
    """
    advice = "the last good checkpoint is kept: lower the learning rates or try another --seed"
    if history and not torch.stack([v for _, logs, _ in history for v in logs.values()]).isfinite().all():
        for step, logs, seen in history:
            for name, value in logs.items():
                if not value.isfinite():
                    sigma, loss = seen[name]
                    where = "" if sigma is None else f" (sigma {sigma[(~loss.isfinite()).int().argmax()].item():.4g})"
                    raise UserError(f"{name} is {value.item()} at step {step}{where}; {advice}")
    for name in ("fake", "discriminator", "generator") if history else ():
        if not whole(nn.utils.get_total_norm(getattr(nets, name).parameters())).isfinite():
            raise UserError(f"a weight of {name} is not finite after step {history[-1][0]}; {advice}")
    return []


def run(cfg, resume=False):
    """Everything from a resolved Config to a finished run folder; returns the report, also in report.json.

    Under torchrun, every process runs this; the first one writes and returns the report, the others return None.
    """
    device, out = pick_device(cfg.device), Path(cfg.out)
    rank, processes = start(cfg, device)
    check_writable(out)
    use_threads(cfg.threads, device)
    path = out / "checkpoint.pt"
    saved = load_checkpoint(path, device) if resume else None
    teacher, nets, opts, draw = prepare(cfg, device, out if resume and (out / "teacher.json").is_file() else "")
    fresh = (0, (0.0, 0.0), processes)
    step, seconds, before = restore(saved, cfg, nets, opts, draw.rng, path, draw.sources) if resume else fresh
    if not rank:
        open_folder(cfg, teacher, device, step, before, processes)
    share(nets, opts, cfg)
    if rank and not cfg.shard:
        train(cfg, nets, opts, draw, None, out, step, seconds)
        return leave()
    peek = Peek(teacher, cfg, out, device, prompts=draw.prompts, writes=not rank, step=step)
    cpu, wall = train(cfg, nets, opts, draw, peek, out, step, seconds)
    weights = whole(own_state(nets.ema))
    if not cfg.shard:
        leave()
    if not rank:
        save_tensors(out / "generator.safetensors", weights, sigmas=cfg.sigmas, preset=cfg.preset)
    peek.save(nets.ema, out / "samples.png", beside_teacher=True)
    control = {"regression only": control_row(cfg)} if cfg.control and cfg.method == "dmd" and processes == 1 else {}
    rows = control | (latent_rows(nets, teacher, draw, cfg) if teacher.kind == "text" else
                      rows(nets.ema, teacher, draw.data, cfg.method, images=cfg.eval_images))
    leave()
    if rank:
        return None
    rows[cfg.method]["seconds"] = wall
    report = dict(rows=rows, cpu_seconds=cpu, seconds=wall, teacher_cpu_seconds=teacher.recipe["cpu_seconds"],
                  processes=processes, sources=draw.sources, **machine(device))
    write_json(out / "report.json", report)
    return report


def control_row(cfg):
    """Metrics of a student trained on the same pairs by regression alone: what distribution matching has to beat."""
    out = Path(cfg.out) / "control"
    if not (out / "report.json").exists():
        run(replace(cfg, method="regression", out=str(out), control=False, log_to=""), resume=(out / "checkpoint.pt").exists())
    return read_json(out / "report.json")["rows"]["regression"]


def main(argv=None):
    """The command line; raises UserError for a mistake of the user's, which command() turns into exit code 2."""
    p = parser("python -m nano_dmd.train", __doc__)
    add_config_flags(p)
    p.add_argument("--resume", action="store_true", help="go on with the run in --out, to the bit")
    p.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")
    given = vars(p.parse_args(argv))
    resume, dry_run = given.pop("resume"), given.pop("dry_run")
    cfg = resolve_resumed(given) if resume else resolve(given)
    first = os.environ.get("RANK", "0") == "0"
    if first:
        print(describe(cfg), flush=True)
    if dry_run:
        return
    if not resume and (Path(cfg.out) / "checkpoint.pt").exists():
        if "out" in given:
            raise UserError(f"{cfg.out} already holds a run: add --resume to go on with it, or choose another --out")
        cfg = replace(cfg, out=free_folder(cfg.out))
    with compiled(False, asked=cfg.compile):                      # but for the steps
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
    end()

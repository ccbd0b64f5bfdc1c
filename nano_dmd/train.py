"""Distil a teacher into a one-step generator: METHODS says what is minimised, train_step is the whole algorithm.

    python -m nano_dmd.train --preset digits --method sid --seed 1
"""

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from nano_dmd import evaluate
from nano_dmd.assemble import (Clock, Draw, Peek, build, cached_pairs, check_guidance, find_data, find_prompts, find_teacher,
                               is_latent, machine, pick_device, restore, state, use_threads)
from nano_dmd.checkpoint import (UserError, append_line, check_writable, command, load_checkpoint, own_state, read_json,
                                 remove_leftovers, save_checkpoint, save_tensors, trim_log, write_json)
from nano_dmd.data import load_data
from nano_dmd.diagnostics import by_level, diagnose, to_floats
from nano_dmd.dmd_loss import diff_instruct_loss, dmd_loss, regression_loss
from nano_dmd.fake_score import denoising_loss
from nano_dmd.gan import gan_critic_loss, gan_generator_loss
from nano_dmd.generator import update_ema
from nano_dmd.parallel import averaging, end, first_then_others, leave, share, start, whole
from nano_dmd.plot import have_matplotlib, plot_run
from nano_dmd.presets import (PRESETS, Config, add_config_flags, describe, free_folder, parser,  # noqa: F401 (PRESETS: public)
                              resolve, resolve_resumed)
from nano_dmd.sid_loss import sid_loss
from nano_dmd.teacher import fast_bf16
from nano_dmd.zoo import RECIPES, compiled, save_teacher


class Method(NamedTuple):
    """A method is its two lists of (name of the weight in Config, loss(x, nets, batch, cfg) -> scalar)."""

    generator: list
    critic: list


FAKE, DISC = ("w_fake", denoising_loss), ("w_disc", gan_critic_loss)
METHODS = {
    "dmd": Method(generator=[("w_dm", dmd_loss), ("w_reg", regression_loss)], critic=[FAKE]),
    "dmd2": Method(generator=[("w_dm", dmd_loss), ("w_gan", gan_generator_loss)], critic=[FAKE, DISC]),
    "sid": Method(generator=[("w_sid", sid_loss)], critic=[FAKE]),
    "diff_instruct": Method(generator=[("w_dm", diff_instruct_loss)], critic=[FAKE]),
    "regression": Method(generator=[("w_reg", regression_loss)], critic=[]),         # the control for dmd
}


def train_step(nets, opts, draw, cfg, step=10**9):
    """cfg.critic_steps critic updates, then one generator update (that is one "step"), then the average.

    nets, opts, draw come from assemble.py; step counts from 0 and only sets the ramp of the average.
    returns {loss name: scalar tensor}, unweighted, still on the device.

    The generator does not move during the critic's updates, so the last of its batches serves both.
    Differs: DMD2 steps the generator first, SiD draws that batch afresh (one more generator pass).
    """
    logs = {}

    critic_requires_grad(nets, True)                              # 1. fit the critic to where G is now
    for i in range(cfg.critic_steps):
        batches = [draw() for _ in range(cfg.accumulate)]
        with torch.set_grad_enabled(i == cfg.critic_steps - 1 and cfg.accumulate == 1):
            xs = [nets.generator(b.z, b.cond, b.step, b.start) for b in batches]      # (B, *S) clean samples
        update("critic", [x.detach() for x in xs], nets, opts, batches, cfg, logs)

    critic_requires_grad(nets, False)                             # 2. move G; gradients pass *through* the critic
    if cfg.accumulate > 1:                                        # many graphs would not fit: make them one by one
        xs = (nets.generator(b.z, b.cond, b.step, b.start) for b in batches)
    update("generator", xs, nets, opts, batches, cfg, logs)

    update_ema(nets.ema, nets.generator, step, cfg.ema)           # 3. the copy we sample from
    return logs


def update(which, xs, nets, opts, batches, cfg, logs):
    """One Adam step of opts[which] on sum_i weight_i * loss_i, the mean over batches (and, with several, processes).

    Terms of weight 0 are not computed; logs gets every loss, unweighted, of the last batch.
    """
    terms = [(getattr(cfg, w), loss) for w, loss in getattr(METHODS[cfg.method], which) if getattr(cfg, w)]
    if not terms:
        return
    opts[which].zero_grad(set_to_none=True)
    for i, (x, batch) in enumerate(zip(xs, batches), 1):
        with averaging(nets.parallel.get(which), last=i == len(batches)) as run:
            losses = run(lambda: {loss.__name__: loss(x, nets, batch, cfg) for _, loss in terms})
            (sum(w * loss for (w, _), loss in zip(terms, losses.values())) / len(batches)).backward()
    if cfg.clip:
        nn.utils.clip_grad_norm_([p for group in opts[which].param_groups for p in group["params"]], cfg.clip)
    opts[which].step()
    logs.update({name: loss.detach() for name, loss in losses.items()})


def critic_requires_grad(nets, on):
    nets.fake.requires_grad_(on)
    nets.discriminator.requires_grad_(on)


def learning_rate(step, cfg):
    """Factor on both rates: linear warm-up, then linear decay to 0 from cfg.decay_from of the run."""
    left = (1 - step / cfg.steps) / (1 - cfg.decay_from) if cfg.decay_from < 1 else 1.0
    return min(1.0, left, (step + 1) / cfg.warmup if cfg.warmup else 1.0)


def set_learning_rates(opts, step, cfg):
    for name, opt in opts.items():
        opt.param_groups[0]["lr"] = getattr(cfg, f"lr_{name}") * learning_rate(step, cfg)


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
                record["metrics"] = evaluate.quick(nets.ema, draw.data, cfg.eval_images)
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


def report_progress(record, reference, bar):
    """The numbers that matter on the bar; a visible warning when samples explode or collapse."""
    std, spread = record["x_std"], record["spread"]
    shown = dict(mesm=record["mesm"], fake=record["fake_loss"], spread=[spread])
    bar.set_postfix({name: "-" if None in v else f"{sum(v):.3f}" for name, v in shown.items()})
    if std is not None and std > 3 * reference["x_std"]:
        bar.write(f"WARNING: samples explode: std {std:.3g}, the teacher's is {reference['x_std']:.3g}")
    if spread is not None and spread < 0.3 * reference["spread"]:
        bar.write(f"WARNING: samples collapse: spread {spread:.3g}, the teacher's is {reference['spread']:.3g}")


def prepare(cfg, device, resumed=""):
    """(Teacher, Nets, optimisers, Draw) of a run before its first step.  raises UserError where cfg does not fit together."""
    weights = [w for w, _ in METHODS[cfg.method].generator]
    if not any(getattr(cfg, w) for w in weights):
        raise UserError(f"{cfg.method} has nothing to minimise: give one of {', '.join('--' + w for w in weights)} a weight")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.tf32
    data = load_data(cfg.data, device, cfg.flip) if cfg.data and not cfg.prompts else None      # a typo shows early
    if data and not data.classes and cfg.teacher in RECIPES:      # before minutes or hours of training it
        check_guidance(cfg, 0, {})
    teacher = first_then_others(lambda: find_teacher(cfg, device, resumed))
    prompts = first_then_others(lambda: find_prompts(cfg, teacher))
    data = first_then_others(lambda: find_data(cfg, teacher, device, needs_data(cfg), data))
    regress = cfg.w_reg and "w_reg" in weights
    pairs = first_then_others(lambda: cached_pairs(cfg, teacher, device, prompts)) if regress else None
    nets, opts = build(cfg, teacher, device)
    return teacher, nets, opts, Draw(cfg, teacher, data, pairs, torch.Generator().manual_seed(cfg.seed), device, prompts)


def needs_data(cfg):
    """Only the GAN looks at real data, and the comparison with forward-noised inputs."""
    return (cfg.method == "dmd2" and cfg.w_disc > 0) or (len(cfg.sigma_list()) > 1 and not cfg.backward_simulation)


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
    rows = control | (evaluate.latent_rows(nets, teacher, draw, cfg) if is_latent(teacher) else
                      evaluate.rows(nets.ema, teacher, draw.data, cfg.method, images=cfg.eval_images))
    leave()
    if rank:
        return None
    rows[cfg.method]["seconds"] = wall
    report = dict(rows=rows, cpu_seconds=cpu, seconds=wall, teacher_cpu_seconds=teacher.recipe["cpu_seconds"],
                  processes=processes, sources=draw.sources, **machine(device))
    write_json(out / "report.json", report)
    return report


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
    print(evaluate.table(report["rows"]))
    print(f"{report['seconds']:.0f} s of distillation ({report['cpu_seconds']:.0f} CPU s); "
          f"pictures and numbers are in {cfg.out}/")


if __name__ == "__main__":
    command(main)
    end()

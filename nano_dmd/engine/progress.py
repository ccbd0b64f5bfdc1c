"""What people see of a run: the bar, log.jsonl, pictures, TensorBoard or W&B, checkpoints."""

import secrets

import torch
from tqdm import tqdm

from nano_dmd.denoiser import heun
from nano_dmd.dmd_loss import dmd_gradient
from nano_dmd.engine import pictures
from nano_dmd.engine.diagnostics import LEVELS, at_levels, by_level, diagnose
from nano_dmd.engine.files import (UserError, append_line, plain, read_json, save_checkpoint,
                                   write_json)
from nano_dmd.engine.find import guided_by


class Progress:
    """Watches a run by fixed noise.  Only the first process writes; the others do nothing.

    A sharded network answers only if all processes ask it.  Then all watch, and the first writes.
    """

    def __init__(self, cfg, teacher, device, out, prompts=None, rank=0, step=0):
        self.cfg, self.out = cfg, out
        self.writes, self.watches = rank == 0, rank == 0 or cfg.shard
        if not self.watches:
            return
        rng, classes = torch.Generator().manual_seed(0), min(teacher.classes, 16)
        self.columns, self.decode = 4 if prompts else 8, teacher.decode
        n = {"points": 20_000, "images": (classes or 8) * 8, "text": 4}[teacher.kind]
        self.z = torch.randn(len(cfg.sigma_list()), n, *teacher.shape, generator=rng).to(device)
        self.cond, levels = None, {}
        if classes:
            self.cond = torch.arange(classes, device=device).repeat_interleave(8)
        if prompts:                                # the first four, one sample each
            self.cond = prompts[torch.arange(n) % len(prompts)].to(device)
            levels = dict(sigma_min=teacher.sigmas[0], sigma_max=teacher.sigmas[1])
        self.teacher = heun(guided_by(teacher, cfg), self.z[0], self.cond, **levels)
        spread = self.teacher.std(0).mean()
        self.reference = plain(dict(x_std=self.teacher.std(), spread=spread))
        self.send = tracker(cfg, out, step) if self.writes else None

    def bar(self, step):
        """The steps that are left."""
        self.steps = tqdm(range(step, self.cfg.steps), initial=step, total=self.cfg.steps,
                          desc=self.cfg.method, disable=not self.writes)
        return self.steps

    def log(self, done, logs, nets, draw, seconds, metrics=None):
        """One line of log.jsonl, and some numbers on the bar.  metrics() -> dict, if asked."""
        if not self.watches:
            return
        batch = draw.latest
        record = dict(step=done, critic_updates=done * self.cfg.critic_steps, seconds=seconds,
                      teacher=self.reference, **plain(logs), **diagnose(nets, batch, self.cfg),
                      by_sigma=by_level(batch.seen))
        if metrics:
            record["metrics"] = metrics()
        if self.writes:
            append_line(self.out / "log.jsonl", record)
            self.send(record)
            self.show(record)

    def show(self, record):
        """Numbers on the bar; a warning when samples explode or collapse."""
        std, spread = record["x_std"], record["spread"]
        numbers = dict(mesm=record["mesm"], fake=record["fake_loss"], spread=[spread])
        shown = {k: "-" if None in v else f"{sum(v):.3f}" for k, v in numbers.items()}
        self.steps.set_postfix(shown)
        usual, usual_spread = self.reference["x_std"], self.reference["spread"]
        if std is not None and std > 3 * usual:
            self.steps.write(f"WARNING: samples explode: std {std:.3g}, teacher {usual:.3g}")
        if spread is not None and spread < 0.3 * usual_spread:
            self.steps.write(f"WARNING: samples collapse: spread {spread:.3g}, teacher "
                             f"{usual_spread:.3g}")

    def save(self, state):
        """checkpoint.pt of state(), which every process that watches must call."""
        if self.watches:
            saved = state()
            if self.writes:
                save_checkpoint(self.out / "checkpoint.pt", saved)

    def picture(self, nets, done):
        """samples/ and scores/ after `done` steps."""
        if self.watches:
            self.save_samples(nets.ema, self.out / "samples" / f"{done:06d}.png")
            self.save_scores(nets, self.out / "scores" / f"{done:06d}.png")

    @torch.no_grad()
    def save_samples(self, generator, path, beside_teacher=False):
        """The generator's answer to the fixed noise, the teacher's on its left if asked."""
        panels = [self.teacher] * beside_teacher + [generator(self.z, self.cond)]
        if self.writes:
            pictures.save_picture(path, *[self.tile(x) for x in panels])

    def tile(self, x):
        """One picture of samples, decoded where the teacher can."""
        if self.decode:
            return pictures.tile(self.decode(x), self.columns, scale=1)
        return pictures.tile(x, self.columns)

    @torch.no_grad()
    def save_scores(self, nets, path, n=3):
        """x, xt, d_real, d_fake and DMD's gradient of n samples at each of LEVELS."""
        if self.z.ndim == 3:                       # points
            return
        cond = None if self.cond is None else self.cond[:: self.columns][:n]
        x = nets.generator(self.z[:, :: self.columns][:, :n], cond)
        noise, seen = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x), []
        for _, xt, d_real, d_fake in at_levels(x, nets, cond, noise):
            g = dmd_gradient(x, d_real, d_fake)
            seen.append([v[:, :3] for v in (x, xt, d_real, d_fake, g)])
        if self.writes:
            grid = pictures.score_grid(seen, scale=max(1, 64 // x.shape[-1]))
            names = [f"sigma {level}" for level in LEVELS]
            pictures.save_picture(path, pictures.labelled(grid, names, pictures.SCORES * len(x)))


def flatten(record, prefix=""):
    """{"grad": {"dmd_loss": 1.0}, "mesm": [2.0]} -> {"grad/dmd_loss": 1.0, "mesm/0": 2.0}."""
    if isinstance(record, (int, float)):
        return {prefix: record}
    if isinstance(record, list):
        record = dict(enumerate(record))
    items = record.items() if isinstance(record, dict) else ()
    parts = [flatten(value, f"{prefix}/{name}".lstrip("/")) for name, value in items]
    return {k: v for part in parts for k, v in part.items()}


def tracker(cfg, out, step=0):
    """send(record) for --log_to.  raises UserError if the package is missing.

    A run resumed after `step` goes on in the same record, and sends the later steps again.
    """
    if not cfg.log_to:
        return lambda record: None
    try:
        if cfg.log_to == "wandb":
            import wandb

            path = out / "wandb.json"              # the name W&B knows this run by
            if not (step and path.is_file()):
                write_json(path, {"id": secrets.token_hex(8)})
            run = wandb.init(project="nano_dmd", name=out.name, dir=str(out), config=vars(cfg),
                             resume="allow", id=read_json(path, {"id": str})["id"])
            return lambda record: run.log(flatten(record), step=record["step"])
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise UserError(f"--log_to {cfg.log_to} needs a package ({e}): pip install {cfg.log_to}, "
                        "or leave it out") from e
    writer = SummaryWriter(out / "tensorboard", purge_step=step + 1)

    def send(record):
        for name, value in flatten(record).items():
            writer.add_scalar(name, value, record["step"])
        writer.flush()

    return send

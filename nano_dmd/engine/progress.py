"""log.jsonl's numbers to TensorBoard or Weights & Biases, for those who ask.  Nothing here is ever required."""

import secrets

import torch

from nano_dmd.denoiser import heun
from nano_dmd.dmd_loss import dmd_gradient
from nano_dmd.engine import pictures
from nano_dmd.engine.diagnostics import LEVELS, to_floats
from nano_dmd.engine.files import UserError, read_json, write_json
from nano_dmd.engine.find import guided_by
from nano_dmd.noise import add_noise


def report_progress(record, reference, bar):
    """The numbers that matter on the bar; a visible warning when samples explode or collapse."""
    std, spread = record["x_std"], record["spread"]
    shown = dict(mesm=record["mesm"], fake=record["fake_loss"], spread=[spread])
    bar.set_postfix({name: "-" if None in v else f"{sum(v):.3f}" for name, v in shown.items()})
    if std is not None and std > 3 * reference["x_std"]:
        bar.write(f"WARNING: samples explode: std {std:.3g}, the teacher's is {reference['x_std']:.3g}")
    if spread is not None and spread < 0.3 * reference["spread"]:
        bar.write(f"WARNING: samples collapse: spread {spread:.3g}, the teacher's is {reference['spread']:.3g}")

HOW = {"tensorboard": "pip install tensorboard", "wandb": "pip install wandb"}


def flatten(record, prefix=""):
    """{"grad": {"dmd_loss": 1.0}, "mesm": [1.0, None]} -> {"grad/dmd_loss": 1.0, "mesm/0": 1.0}: numbers only."""
    if isinstance(record, (int, float)):
        return {prefix: record}
    items = record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else ()
    return {k: v for name, value in items for k, v in flatten(value, f"{prefix}/{name}".lstrip("/")).items()}


def tracker(cfg, out, step=0):
    """send(record) for --log_to; does nothing where it is empty.  raises UserError if the package is missing.

    A run resumed after `step` goes on in the same record, and what was sent after that step is sent again, not twice.
    """
    if not cfg.log_to:
        return lambda record: None
    try:
        if cfg.log_to == "wandb":
            import wandb

            run = wandb.init(project="nano_dmd", name=out.name, dir=str(out), config=vars(cfg), resume="allow",
                             id=run_id(out, step))
            return lambda record: run.log(flatten(record), step=record["step"])
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise UserError(f"--log_to {cfg.log_to} needs a package ({e}): {HOW[cfg.log_to]}, or leave it out") from e
    writer = SummaryWriter(out / "tensorboard", purge_step=step + 1)

    def send(record):
        for name, value in flatten(record).items():
            writer.add_scalar(name, value, record["step"])
        writer.flush()

    return send


def run_id(out, step):
    """The name W&B knows a run by, in wandb.json: a resumed run is the same one, a new run in this folder another."""
    path = out / "wandb.json"
    if not (step and path.is_file()):
        write_json(path, {"id": secrets.token_hex(8)})
    return read_json(path, {"id": str})["id"]


class Peek:
    """Fixed noise, the teacher's answer to it, and pictures and numbers of the generator's answer over time.

    Where weights are sharded no process can look alone: all do the same, and the first `writes`.
    """

    def __init__(self, teacher, cfg, out, device, columns=8, prompts=None, writes=True, step=0):
        self.writes = writes
        rng, classes = torch.Generator().manual_seed(0), min(teacher.classes, 16)
        n = 20_000 if len(teacher.shape) == 1 else columns // 2 if prompts else (classes or columns) * columns
        self.z = torch.randn(len(cfg.sigma_list()), n, *teacher.shape, generator=rng).to(device)
        self.cond = torch.arange(classes, device=device).repeat_interleave(columns) if classes else None
        self.columns, self.decode = n if prompts else columns, teacher.decode
        self.send = tracker(cfg, out, step) if writes else None
        if prompts:                                               # the first four, one sample each
            index = torch.arange(n, device=device) % len(prompts)
            sample = guided_by(teacher, cfg, prompts)
            self.cond = prompts[index].to(device)
            self.teacher = heun(sample, self.z[0], index, sigma_min=teacher.sigmas[0], sigma_max=teacher.sigmas[1])
        else:
            self.teacher = heun(teacher.denoiser, self.z[0], self.cond)
        self.reference = to_floats(dict(x_std=self.teacher.std(), spread=self.teacher.std(0).mean()))

    @torch.no_grad()
    def save(self, generator, path, beside_teacher=False):
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
        """x, xt, d_real, d_fake and DMD's gradient for n samples at each of diagnostics.LEVELS; three channels of latents."""
        if self.z.ndim == 3:                                      # points
            return
        z, cond = self.z[:, :: self.columns][:, :n], None if self.cond is None else self.cond[:: self.columns][:n]
        x = nets.generator(z, cond)
        noise, seen = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x), []
        for level in LEVELS:
            sigma = x.new_full(x.shape[:1], level)
            xt = add_noise(x, sigma, noise)
            d_real, d_fake = nets.real(xt, sigma, cond), nets.fake(xt, sigma, cond)
            seen.append([v[:, :3] for v in (x, xt, d_real, d_fake, dmd_gradient(x, d_real, d_fake))])
        if self.writes:
            grid = pictures.score_grid(seen, scale=max(1, 64 // x.shape[-1]))
            rows, columns = [f"sigma {level}" for level in LEVELS], pictures.SHOWN * len(x)
            pictures.save_picture(path, pictures.labelled(grid, rows, columns))

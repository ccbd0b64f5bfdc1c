"""TODO."""

from dataclasses import dataclass, field

import torch

from nano_dmd.engine.cache import sources
from nano_dmd.engine.parallel import PROCESS, rows
from nano_dmd.noise import expand
from nano_dmd.teachers.data import look_up


@dataclass
class Batch:
    """What one update sees.  None where a method does not ask for it.

    z         (k, B, *S)  unit noise of the generator's k steps, z[0] starts it
    cond      None | (B,) class labels | (B, T, C) text embeddings
    fake_cond what the denoising loss sees instead, where some labels are dropped (cfg.critic_dropout)
    step      int         the generator step that is trained, one for the whole batch (0 for one-step)
    start     (B, *S)     data to noise instead of simulating earlier steps (only for the comparison)
    real      (B, *S)     data, with its own labels real_cond          (GAN only)
    pair_z    (1, B, *S)  noise and the teacher's Heun answer pair_x   (regression only)
    """

    z: torch.Tensor
    cond: torch.Tensor | None = None
    step: int = 0
    start: torch.Tensor | None = None
    real: torch.Tensor | None = None
    real_cond: torch.Tensor | None = None
    fake_cond: torch.Tensor | None = None
    pair_z: torch.Tensor | None = None
    pair_x: torch.Tensor | None = None
    pair_cond: torch.Tensor | None = None
    seen: dict = field(default_factory=dict)

    def mean(self, name, loss, sigma):
        """Mean over everything of loss (B, ...); keeps (sigma, loss per sample) for logs and NaN reports."""
        per_sample = loss.flatten(1).mean(1)
        self.seen[name] = (sigma, per_sample.detach())
        return per_sample.mean()


class Draw:
    """draw() -> Batch, this process's part of it; draw.latest is the last one.

    Indices, classes and steps come from the CPU generator rng, so that what the losses draw (torch's global
    stream) never changes the order of the data.
    """

    def __init__(self, cfg, teacher, data, pairs, rng, device, prompts=None):
        self.cfg, self.teacher, self.data, self.pairs, self.rng, self.device = cfg, teacher, data, pairs, rng, device
        self.prompts, self.sources = prompts, sources(cfg)       # once: a large folder takes seconds to look through
        self.k, self.latest = len(cfg.sigma_list()), None

    def integers(self, high, n):
        """On the CPU: to look something up there, the device need not be waited for."""
        return rows(lambda n: torch.randint(high, (n,), generator=self.rng), n)

    def real(self, n):
        """n samples of the data and their labels."""
        if hasattr(self.data, "images"):                          # draws jointly, reads only its own rows
            return self.data.sample(n, self.rng)
        return [None if v is None else rows(lambda _: v, n) for v in self.data.sample(PROCESS["count"] * n, self.rng)]

    def cond(self, index):
        """What the networks are told: the class itself, or the embeddings of that prompt."""
        return (self.prompts[index] if self.prompts else index).to(self.device, non_blocking=True)

    def dropped(self, cond, n):
        """cond (n, ...) with a share cfg.critic_dropout replaced by "no class" or the empty prompt."""
        drop = rows(lambda n: torch.rand(n, generator=self.rng) < self.cfg.critic_dropout, n)
        empty = self.teacher.net.net.empty.to(cond) if self.prompts else torch.full_like(cond, -1)
        return torch.where(expand(drop.to(self.device, non_blocking=True), cond), empty, cond)

    def __call__(self):
        cfg, classes, n = self.cfg, self.teacher.classes, self.cfg.batch // (PROCESS["count"] * self.cfg.accumulate)
        z = rows(lambda n: torch.randn(n, self.k, *self.teacher.shape, device=self.device), n).transpose(0, 1)
        kinds = len(self.prompts) if self.prompts else classes
        batch = self.latest = Batch(z, self.cond(self.integers(kinds, n)) if kinds else None)
        if cfg.critic_dropout and kinds:
            batch.fake_cond = self.dropped(batch.cond, n)
        if self.k > 1:
            batch.step = int(torch.randint(self.k, (), generator=self.rng))
            if not cfg.backward_simulation:
                batch.start, batch.cond = self.real(n)
        if cfg.w_disc and cfg.method == "dmd2":
            batch.real, batch.real_cond = self.real(n)
        if self.pairs:
            index = self.integers(len(self.pairs["z"]), n)
            batch.pair_cond = self.cond(self.pairs["cond"][index]) if "cond" in self.pairs else None
            z, batch.pair_x = (look_up(self.pairs[name], index, self.device) for name in ("z", "x"))
            batch.pair_z = z[None]
        return batch

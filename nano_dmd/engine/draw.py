"""Batches: everything random that an update sees.

Several processes may share a batch (engine/parallel.py). All of them draw the joint batch, from
random streams in step, and each keeps its own rows. So N processes see together what one alone
would see.
"""

from dataclasses import dataclass, field

import torch

from nano_dmd.engine.cache import sources
from nano_dmd.engine.parallel import everyone, joint
from nano_dmd.methods import needs
from nano_dmd.noise import draw_sigma, expand
from nano_dmd.teachers.data import look_up


@dataclass
class Batch:
    """What one update sees.  None where a method does not ask for it.

    z         (k, B, *S)  unit noise of the generator's k steps, z[0] starts it
    cond      None | (B,) class labels | (B, T, C) text embeddings
    fake_cond cond for the denoising loss, where some labels are dropped (cfg.critic_dropout)
    step      int         the generator step that is trained (0 for one-step)
    level     float       noise level of its input, and next_level that of the next step's, 0 after
                          the last
    start     (B, *S)     data to noise instead of simulating earlier steps (only for comparison)
    real      (B, *S)     data, with its own labels real_cond          (GAN, RealUID)
    pair_z    (1, B, *S)  noise, and the teacher's Heun answer pair_x   (regression only)
    xt, x     (B, *S)     that input and the generator's answer, once made (methods.samples)
    alone     bool        this process asks a loss without the others: jointly uses its own rows
    seen      {loss name: (sigma | None, values)}, (n B,) each for n noisings: logs, NaN reports
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
    level: float = 0.0
    next_level: float = 0.0
    xt: torch.Tensor | None = None
    x: torch.Tensor | None = None
    sigma: torch.Tensor | None = None
    alone: bool = False
    seen: dict = field(default_factory=dict)

    @property
    def critic_cond(self):
        """cond of the critic's denoising losses."""
        return self.cond if self.fake_cond is None else self.fake_cond

    def noising(self, spec, x):
        """(sigma (B,), noise (B, *S)): the random numbers of one noising of x (B, *S).

        spec names the distribution of sigma, see noise.draw_sigma.
        """
        n, mine = joint(len(x))
        sigma = draw_sigma(spec, n, x.device)[mine]
        noise = torch.randn(n, *x.shape[1:], device=x.device, dtype=x.dtype)[mine]
        self.sigma = sigma if self.sigma is None else self.sigma  # generated samples' come first
        return sigma, noise

    def jointly(self, function, *values):
        """function of values (B, ...) of all processes together; returns this one's rows of it."""
        if self.alone:
            return function(*values)
        return function(*map(everyone, values))[joint(len(values[0]))[1]]

    def keep(self, name, values):
        """The mean of a loss's values (B,); remembers them with the sigmas of their noising."""
        self.seen[name], self.sigma = (self.sigma, values), None
        return values.mean()


class Draw:
    """draw() -> Batch, this process's part of it; draw.latest is the last one.

    Indices, classes and steps come from the CPU generator rng.  What the losses draw comes from
    torch's global stream, so it never changes the order of the data.
    """

    def __init__(self, cfg, teacher, data, pairs, rng, device, prompts=None):
        self.cfg, self.teacher = cfg, teacher
        self.data, self.pairs = data, pairs
        self.prompts, self.rng = prompts, rng
        self.device = device
        self.sources = sources(cfg)  # once: a large folder takes seconds to look through
        self.levels, self.latest = [*cfg.sigma_list(), 0.0], None

    def integers(self, high, n):
        """n random numbers below high, on the CPU: tables are looked up there without a wait."""
        n, mine = joint(n)
        return torch.randint(high, (n,), generator=self.rng)[mine]

    def real(self, n):
        """n samples of the data and their labels."""
        n, mine = joint(n)
        return self.data.sample(n, self.rng, mine)

    def cond(self, index):
        """cond of index (B,): the classes (B,) themselves, or prompts' embeddings (B, T, C)."""
        found = self.prompts[index] if self.prompts else index
        return found.to(self.device, non_blocking=True)

    def dropped(self, cond, n):
        """cond (n, ...), a share cfg.critic_dropout replaced by "no class" or the empty prompt."""
        count, mine = joint(n)
        drop = (torch.rand(count, generator=self.rng) < self.cfg.critic_dropout)[mine]
        empty = self.teacher.net.net.empty.to(cond) if self.prompts else torch.full_like(cond, -1)
        return torch.where(expand(drop.to(self.device, non_blocking=True), cond), empty, cond)

    def __call__(self):
        cfg, parts = self.cfg, joint(1)[0] * self.cfg.accumulate
        n = cfg.batch // parts
        count, mine = joint(n)
        k = len(self.levels) - 1
        z = torch.randn(count, k, *self.teacher.shape, device=self.device)[mine]
        kinds = len(self.prompts) if self.prompts else self.teacher.classes
        cond = self.cond(self.integers(kinds, n)) if kinds else None
        batch = self.latest = Batch(z.transpose(0, 1), cond)
        if k > 1:
            batch.step = int(torch.randint(k, (), generator=self.rng))
            if not cfg.backward_simulation:
                batch.start, batch.cond = self.real(n)
        if cfg.critic_dropout and kinds:
            batch.fake_cond = self.dropped(batch.cond, n)
        batch.level, batch.next_level = self.levels[batch.step : batch.step + 2]
        if "real" in needs(cfg):
            batch.real, batch.real_cond = self.real(n)
        if "pairs" in needs(cfg):
            self.take_pairs(batch, self.integers(len(self.pairs["z"]), n))
        return batch

    def take_pairs(self, batch, index):
        """Put the noise-image pairs numbered index (B,) into batch."""
        if "cond" in self.pairs:
            batch.pair_cond = self.cond(self.pairs["cond"][index])
        batch.pair_z = look_up(self.pairs["z"], index, self.device)[None]
        batch.pair_x = look_up(self.pairs["x"], index, self.device)

"""TODO."""

from dataclasses import dataclass, field
from typing import Callable, NamedTuple

import torch
from torch import nn

from nano_dmd.dmd_loss import diff_instruct_loss, dmd_loss, regression_loss
from nano_dmd.engine.parallel import averaging
from nano_dmd.fake_score import denoising_loss
from nano_dmd.gan import gan_critic_loss, gan_generator_loss
from nano_dmd.generator import update_ema
from nano_dmd.sid_loss import sid_loss


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


@dataclass
class Nets:
    """real is frozen; the critic is fake + discriminator; ema is the generator people sample from.

    parallel holds {"critic", "generator"}: DDP where several processes share a batch, else nothing.
    """

    real: nn.Module
    fake: nn.Module
    discriminator: nn.Module
    generator: nn.Module
    ema: nn.Module
    sigma_data: float
    lpips: Callable | None = None
    parallel: dict = field(default_factory=dict)

"""A method is two lists of losses, and one step trains them all.

    METHODS     what each method minimises
    train_step  critic updates, one generator update, the moving average
    update      one optimiser step on a list of losses
"""

from dataclasses import dataclass
from typing import Callable, NamedTuple

import torch
from torch import nn

from nano_dmd.dmd_loss import diff_instruct_loss, dmd_loss, regression_loss
from nano_dmd.fake_score import denoising_loss
from nano_dmd.gan import gan_critic_loss, gan_generator_loss
from nano_dmd.generator import update_ema
from nano_dmd.sid_loss import sid_loss


class Method(NamedTuple):
    """Two lists of (name of the weight in Config, loss), and what a batch must bring for them.

    A loss is loss(x, nets, batch, cfg) -> one value per sample, (B,).
    """

    generator: list
    critic: list
    needs: tuple = ()               # "real" (data, for the GAN) or "pairs" (of noise and image)


FAKE = ("w_fake", denoising_loss)
DISC = ("w_disc", gan_critic_loss)
METHODS = {
    "dmd": Method([("w_dm", dmd_loss), ("w_reg", regression_loss)], [FAKE], needs=("pairs",)),
    "dmd2": Method([("w_dm", dmd_loss), ("w_gan", gan_generator_loss)], [FAKE, DISC], needs=("real",)),
    "sid": Method([("w_sid", sid_loss)], [FAKE]),
    "diff_instruct": Method([("w_dm", diff_instruct_loss)], [FAKE]),
    "regression": Method([("w_reg", regression_loss)], [], needs=("pairs",)),
}
CONTROL = "regression"                             # pairs alone: what distribution matching must beat
NEEDED_BY = {"real": "w_disc", "pairs": "w_reg"}   # without that weight, nobody needs it


def needs(cfg):
    """What a batch must bring for cfg.method at cfg's weights."""
    return [name for name in METHODS[cfg.method].needs if getattr(cfg, NEEDED_BY[name])]


@dataclass
class Nets:
    """real is frozen; the critic is fake + discriminator; people sample from ema."""

    real: nn.Module
    fake: nn.Module
    discriminator: nn.Module
    generator: nn.Module
    ema: nn.Module
    sigma_data: float
    lpips: Callable | None = None   # distance(x, y) -> (B,), for the regression loss
    backward: Callable = lambda loss, which, last: loss.backward()     # engine/parallel.py replaces it


def train_step(nets, opts, draw, cfg, step):
    """One step: cfg.critic_steps critic updates, one generator update, then the average.

    draw() -> Batch; step counts from 0 and only sets the ramp of the average.
    returns {loss name: mean}, unweighted, on the device.
    The generator rests during the critic's updates, so the last of their batches also serves it.
    Differs: DMD2 steps the generator first; SiD draws that batch afresh (one more generator pass).
    """
    logs = {}
    critic_requires_grad(nets, True)               # 1. fit the critic to where G is now
    for _ in range(cfg.critic_steps):
        batches = [draw() for _ in range(cfg.accumulate)]
        update("critic", nets, opts, batches, cfg, logs)

    critic_requires_grad(nets, False)              # 2. move G; SiD and the GAN differentiate through
    update("generator", nets, opts, batches, cfg, logs)         # the critic, whose weights rest

    update_ema(nets.ema, nets.generator, step, cfg.ema)         # 3. the copy we sample from
    return logs


def update(which, nets, opts, batches, cfg, logs):
    """One Adam step of opts[which] on sum_i weight_i * loss_i, the mean over batches.

    Terms of weight 0 are not computed.  logs gets every loss, unweighted, of the last batch.
    """
    terms = [(getattr(cfg, weight), loss) for weight, loss in getattr(METHODS[cfg.method], which)]
    terms = [(weight, loss) for weight, loss in terms if weight]
    if not terms:
        return
    opts[which].zero_grad(set_to_none=True)
    for batch in batches:
        x = samples(nets, batch, graph=which == "generator" or len(batches) == 1)     # x = G(z), (B, *S)
        total = 0.0
        for weight, loss in terms:
            values = loss(x if which == "generator" else x.detach(), nets, batch, cfg)          # (B,)
            logs[loss.__name__] = batch.keep(loss.__name__, values.detach())
            total = total + weight * values.mean()
        nets.backward(total / len(batches), which, last=batch is batches[-1])
    if cfg.clip:
        trained = [p for group in opts[which].param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(trained, cfg.clip)
    opts[which].step()


def samples(nets, batch, graph):
    """x (B, *S) of a batch.  One pass with a graph serves the last critic update and the generator's."""
    if batch.x is None or graph and not batch.x.requires_grad:
        with torch.set_grad_enabled(graph):
            batch.x = nets.generator(batch.z, batch.cond, batch.step, batch.start)
    return batch.x


def critic_requires_grad(nets, on):
    nets.fake.requires_grad_(on)
    nets.discriminator.requires_grad_(on)

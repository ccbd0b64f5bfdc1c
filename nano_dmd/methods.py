"""A method is two lists of losses, the generator's and the critic's.  train_step uses both."""

from dataclasses import dataclass, replace
from typing import Callable, NamedTuple

import torch
from torch import nn

from nano_dmd import decoupled, f_distill, real_uid, sida, trajectory
from nano_dmd.denoiser import lerp
from nano_dmd.dmd_loss import diff_instruct_loss, dmd_loss, regression_loss
from nano_dmd.fake_score import denoising_loss
from nano_dmd.gan import gan_critic_loss, gan_generator_loss
from nano_dmd.generator import update_ema
from nano_dmd.sid_loss import sid_loss, sim_loss


class Method(NamedTuple):
    """What is minimised.  A loss is loss(x, Nets, Batch, Config) -> (B,), or (noisings B,)."""

    generator: list                 # of (name of its weight in Config, loss)
    critic: list
    needs: tuple = ()               # what a batch brings: "real" data, "pairs" of noise and image
    knobs: tuple = ()               # what engine/config.py checks before a run


FAKE, DISC = ("w_fake", denoising_loss), ("w_disc", gan_critic_loss)
DM, GAN = ("w_dm", dmd_loss), ("w_gan", gan_generator_loss)
TRAJECTORY = ("w_dm", trajectory.trajectory_loss)
METHODS = {
    "dmd": Method(generator=[DM, ("w_reg", regression_loss)], critic=[FAKE], needs=("pairs",)),
    "dmd2": Method(generator=[DM, GAN], critic=[FAKE, DISC], needs=("real",)),
    "sid": Method(generator=[("w_sid", sid_loss)], critic=[FAKE]),
    "diff_instruct": Method(generator=[("w_dm", diff_instruct_loss)], critic=[FAKE]),
    "regression": Method(generator=[("w_reg", regression_loss)], critic=[], needs=("pairs",)),
}
METHODS |= {
    "f_distill": Method(
        [("w_dm", f_distill.f_distill_loss), GAN], [FAKE, DISC], ("real",), knobs=("ratio",)),
    "decoupled": Method([("w_dm", decoupled.matching_loss), ("w_aug", decoupled.augmentation_loss)],
                        [FAKE], knobs=("guidance",)),
    "sim": Method([("w_sid", sim_loss)], [FAKE]),
    "sida": Method([("w_sid", sida.sida_loss)], [FAKE, ("w_disc", sida.sida_critic_loss)],
                   ("real",), knobs=("w_disc",)),
    "real_uid": Method([("w_sid", real_uid.real_uid_loss)],
                       [("w_fake", real_uid.real_uid_critic_loss)], ("real",), knobs=("uid_a",)),
    "tdm": Method([TRAJECTORY], [("w_fake", trajectory.trajectory_denoising_loss)],
                  knobs=("ode_steps",)),
    "phased": Method([TRAJECTORY], [("w_fake", trajectory.phased_denoising_loss)],
                     knobs=("ode_steps",)),
}
CONTROL = "regression"                             # what distribution matching has to beat


def needs(cfg):
    """What a batch must bring for cfg.method.  What only a loss of weight 0 uses is left out."""
    method, user = METHODS[cfg.method], {"real": "w_disc", "pairs": "w_reg"}
    off = [weight for weight, _ in method.generator + method.critic if not getattr(cfg, weight)]
    return [name for name in method.needs if user.get(name) not in off]


@dataclass
class Nets:
    """real is frozen; the critic is fake + discriminator; people sample from ema."""

    real: nn.Module
    fake: nn.Module
    discriminator: nn.Module
    generator: nn.Module
    ema: nn.Module
    sigma_data: float
    slow_fake: nn.Module | None = None             # an average of fake that G is shown, if any
    lpips: Callable | None = None   # distance(x, y) -> (B,), for the regression loss
    backward: Callable = lambda loss, which, last: loss.backward()     # or engine/parallel.py's

    def __post_init__(self):
        self.slow_fake = self.slow_fake or self.fake


def train_step(nets, opts, draw, cfg, step):
    """Several critic updates, one generator update, then the average.  returns {loss name: mean}.

    draw() -> Batch; step counts from 0.  G's update reuses the critic's last batch.
    Differs: DMD2 updates the generator first; SiD draws a new batch for it.
    """
    logs = {}
    critic_requires_grad(nets, True)               # 1. fit the critic to where G is now
    for i in range(cfg.critic_steps):
        batches = [draw() for _ in range(cfg.accumulate)]
        shared = cfg.accumulate == 1 and i == cfg.critic_steps - 1   # x of the last serves both
        update("critic", nets, opts, batches, cfg, logs, keep_graph=shared)
        update_ema(nets.slow_fake, nets.fake, step * cfg.critic_steps + i, cfg.ema_critic)
    critic_requires_grad(nets, False)              # 2. move G; the critic's weights rest meanwhile
    update("generator", replace(nets, fake=nets.slow_fake), opts, batches, cfg, logs)
    update_ema(nets.ema, nets.generator, step, cfg.ema)           # 3. the copy we sample from
    if cfg.ida:                                    # IDA: the fake score follows G
        lerp(nets.fake, nets.generator, cfg.ida)
    return logs


def update(which, nets, opts, batches, cfg, logs, keep_graph=False):
    """One Adam step of opts[which] on sum_i weight_i * loss_i, the mean over batches.

    Terms of weight 0 are not computed.  logs gets every loss, unweighted, of the last batch.
    keep_graph: make x with the generator's graph.  The critic needs none, but G will reuse x.
    """
    terms = [(getattr(cfg, w), loss) for w, loss in getattr(METHODS[cfg.method], which)]
    if not (terms := [(weight, loss) for weight, loss in terms if weight]):
        return
    for batch in batches:
        x = samples(nets, batch, graph=which == "generator" or keep_graph)
        x = x.detach() if which == "critic" else x                # x = G(z), (B, *S)
        total = 0.0
        for weight, loss in terms:
            values = loss(x, nets, batch, cfg)                    # (B,)
            logs[loss.__name__] = batch.keep(loss.__name__, values.detach())
            total = total + weight * values.mean()
        nets.backward(total / len(batches), which, last=batch is batches[-1])
    if cfg.clip:
        nn.utils.clip_grad_norm_(opts[which].param_groups[0]["params"], cfg.clip)
    opts[which].step()
    for opt in opts.values():                      # at once: a full student's are gigabytes.  Both:
        opt.zero_grad(set_to_none=True)            # FSDP2 gives resting weights gradients, too


def samples(nets, batch, graph):
    """x (B, *S) of a batch, made once; made again if a graph is wanted and x has none."""
    if batch.x is None or graph and not batch.x.requires_grad:
        with torch.set_grad_enabled(graph):
            batch.xt, batch.x = nets.generator.path(batch.z, batch.cond, batch.step, batch.start)
    return batch.x


def critic_requires_grad(nets, on):
    nets.fake.requires_grad_(on)
    nets.discriminator.requires_grad_(on)

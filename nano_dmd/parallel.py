"""Several processes, one batch: torchrun starts them, torch's DDP averages their gradients.

    torchrun --nproc-per-node 8 -m nano_dmd.train --preset cifar10

Every process holds all the networks and works on batch / N samples. All of them draw the same random numbers for
the joint batch and take their own rows (noise.rows), so that N processes do what one would, up to the order of sums.
"""

import os
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nano_dmd import noise
from nano_dmd.checkpoint import UserError


class Group(nn.Module):
    """The networks one optimiser trains.  Its forward runs any function of them: all that DDP needs to see."""

    def __init__(self, *nets):
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, function):
        return function()


def start(cfg):
    """Join the other processes, if torchrun started several; returns (this process's number, their count)."""
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if cfg.batch % (count * cfg.accumulate):
        raise UserError(f"--batch {cfg.batch} cannot be split evenly among {count} processes with --accumulate {cfg.accumulate}")
    if count > 1 and not dist.is_initialized():                   # the timeout: all wait while one trains a teacher
        dist.init_process_group(timeout=timedelta(hours=24))
    return rank, count


def first_then_others(function):
    """function() in process 0 and only then in the others, who find in the cache what it left there."""
    if not dist.is_initialized():
        return function()
    if dist.get_rank():
        dist.barrier()
        return function()
    result = function()
    dist.barrier()
    return result


def share(nets):
    """From here on the processes share every batch: wraps what is trained in DDP, in place.

    find_unused_parameters, because a network may have weights that a loss does not reach (classes, say).
    """
    if dist.is_initialized():
        noise.PROCESS.update(rank=dist.get_rank(), count=dist.get_world_size())
        groups = {"generator": Group(nets.generator), "critic": Group(nets.fake, nets.discriminator)}
        nets.parallel = {name: DistributedDataParallel(group, broadcast_buffers=False, find_unused_parameters=True)
                         for name, group in groups.items()}


def leave():
    """The steps are done: from here on this process is on its own."""
    if dist.is_initialized():
        dist.destroy_process_group()
        noise.PROCESS.update(rank=0, count=1)


@contextmanager
def averaging(ddp, last):
    """Gives run(function): with DDP, backward through its result averages gradients, after the last of several parts."""
    with ddp.no_sync() if ddp and not last else nullcontext():
        yield ddp or (lambda function: function())

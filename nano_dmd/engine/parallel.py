"""Several processes, one batch: torchrun starts them, torch's DDP or FSDP2 averages their gradients.

    torchrun --nproc-per-node 8 -m nano_dmd.train --preset cifar10

Every process works on batch / N samples. All of them draw the same random numbers for the joint batch and take
their own rows (noise.rows), so that N processes do what one would, up to the order of sums. Each holds all the
networks (DDP), or, with --shard, an N-th of each weight, its gradient and its two moments, and borrows the rest from
the others while a block computes (FSDP2).
"""

import atexit
import os
import sys
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from nano_dmd.engine.files import UserError, note

PROCESS = dict(rank=0, count=1)                                   # set by parallel.share


def rows(draw, n):
    """This process's n rows of draw(n * processes): N processes that share a batch draw together what one would alone.

    Their random streams are in step, because all start from one seed and draw the same things.
    """
    first = PROCESS["rank"] * n
    return draw(PROCESS["count"] * n)[first : first + n]


class Group(nn.Module):
    """The weights one optimiser trains.  Its forward runs any function of them: all that DDP needs to see.

    Not the networks, whose buffers (constants, alike everywhere) DDP would send around before every step.
    """

    def __init__(self, *nets):
        super().__init__()
        self.weights = nn.ParameterList(p for net in nets for p in net.parameters())

    def forward(self, function):
        return function()


def start(cfg, device):
    """Join the other processes, if torchrun started several; returns (this process's number, their count)."""
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if cfg.batch % (count * cfg.accumulate):
        raise UserError(f"--batch {cfg.batch} cannot be split evenly among {count} processes with --accumulate {cfg.accumulate}")
    if cfg.batch == count * cfg.accumulate and not rank:
        note("a batch worked off one sample at a time has no spread: the log cannot tell whether samples collapse")
    if cfg.shard and count > 1 and device.type == "cpu" and torch.__version__ < "2.7":
        raise UserError(f"--shard on a CPU needs torch 2.7 or later, not {torch.__version__}: leave it out, or update torch")
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


def share(nets, opts, cfg):
    """From here on the processes share every batch: what is trained is wrapped in DDP or, with cfg.shard, sharded in place.

    LoRA is never sharded: there is little of it, and the frozen weights under it belong to several networks.
    """
    if not dist.is_initialized():
        return
    PROCESS.update(rank=dist.get_rank(), count=dist.get_world_size())
    lora = {"generator": cfg.lora_generator, "critic": cfg.lora_critic}
    for name, group in {"generator": [nets.generator.net], "critic": [nets.fake.net, nets.discriminator]}.items():
        if cfg.shard and not lora[name]:
            shard(group, opts[name])
        else:                                                     # a network may have weights that no loss reaches (classes, say)
            nets.parallel[name] = DistributedDataParallel(Group(*group), find_unused_parameters=True)
    if cfg.shard and not cfg.lora_generator and nets.ema is not nets.generator:
        shard([nets.ema.net])
    if cfg.shard and not any(lora.values()) and isinstance(nets.real.denoiser, nn.Module):      # not a formula
        shard([nets.real.denoiser])


def shard(group, opt=None):
    """Split every weight of some networks, and what opt remembers of it, among the processes (FSDP2, in place).

    The blocks of a network are fetched one at a time, while they compute.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    before = [p for net in group for p in net.parameters()]
    for net in group:
        net.to(memory_format=torch.contiguous_format)             # FSDP2 splits nothing else; inputs stay channels_last
        for block in blocks(net):
            fully_shard(block)
        fully_shard(net, reshard_after_forward=True)             # also after a pass without backward
        if hasattr(net, "features"):                              # the other way into a Denoiser
            register_fsdp_forward_method(net, "features")
    after = dict(zip(before, (p for net in group for p in net.parameters())))
    for settings in opt.param_groups if opt else ():
        settings["params"] = [after[p] for p in settings["params"]]
    for p in list(opt.state) if opt else ():
        opt.state[after[p]] = {k: split_like(v, after[p]) for k, v in opt.state.pop(p).items()}


def blocks(net):
    """The parts of a network that its outermost lists hold: encoder and decoder blocks."""
    for child in net.children():
        yield from child.children() if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else blocks(child)


def split_like(value, p):
    """This process's part of a moment of a sharded weight p (a step count stays whole)."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.contiguous(), p.device_mesh, p.placements) if value.shape == p.shape else value


def whole(value):
    """value, with the sharded tensors in it (a state, a norm) put together, on the CPU; every process has to ask."""
    from torch.distributed.tensor import DTensor

    return tree_map(lambda t: t.full_tensor().cpu() if isinstance(t, DTensor) else t, value)


def leave():
    """The steps are done: from here on this process is on its own."""
    if dist.is_initialized():
        dist.destroy_process_group()
        PROCESS.update(rank=0, count=1)


def end():
    """The last words of a process that worked with others: exit code 0, without the shutdown of Python's interpreter.

    DDP and FSDP2 leave gloo's threads running, and one that then still holds a Python object aborts the whole process,
    which to torchrun is a failed run (torch 2.14: 3 of 48 short runs on a busy machine; pytorch/pytorch pull request 179291).
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        atexit._run_exitfuncs()                                   # what others wanted done, wandb's last upload say
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


@contextmanager
def averaging(ddp, last):
    """Gives run(function): with DDP, backward through its result averages gradients, after the last of several parts."""
    with ddp.no_sync() if ddp and not last else nullcontext():
        yield ddp or (lambda function: function())

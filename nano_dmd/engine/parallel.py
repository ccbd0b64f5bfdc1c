"""Several processes, one batch: torchrun starts them, DDP or FSDP2 averages their gradients.

    torchrun --nproc-per-node 8 -m nano_dmd.train --preset cifar10

Every process works on batch / N samples. All draw the same random numbers for the joint batch and
keep their own rows (engine/draw.py). So N processes do what one would, up to the order of sums.
Each holds all networks (DDP). With --shard each holds an N-th of every weight, gradient and moment,
and borrows the rest while a block computes (FSDP2).
"""

import atexit
import os
import sys
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from nano_dmd.engine.files import UserError, note


def place():
    """(number of this process, their count)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def joint(n):
    """(size of a joint batch, the rows of it that are this process's) where each process has n."""
    rank, count = place()
    return n * count, slice(rank * n, rank * n + n)


def everyone(values):
    """values (n, ...) of every process, in the order of joint's rows."""
    if not dist.is_initialized():
        return values
    found = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(found, values.contiguous())
    return torch.cat(found)


def begin(cfg, device):
    """Join the other processes, if torchrun started several; returns place().  raises UserError."""
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if cfg.batch % (count * cfg.accumulate):
        raise UserError(f"--batch {cfg.batch} cannot be split evenly among {count} processes with "
                        f"--accumulate {cfg.accumulate}")
    if cfg.batch == count * cfg.accumulate and not rank:
        note("with one sample at a time, the log cannot tell whether samples collapse (no spread)")
    if cfg.control and count > 1 and not rank:
        note("--control needs one process: the control is not trained")
    if cfg.shard and count > 1 and device.type == "cpu" and torch.__version__ < "2.7":
        raise UserError(f"--shard on a CPU needs torch 2.7, not {torch.__version__}: leave it out")
    if count > 1 and not dist.is_initialized():  # the timeout: all wait while one trains a teacher
        dist.init_process_group(timeout=timedelta(hours=24))
    return place()


def first_then_others(function):
    """function() in process 0 and only then in the others.  They find its results in the cache."""
    if not dist.is_initialized():
        return function()
    if dist.get_rank():
        dist.barrier()
        return function()
    result = function()
    dist.barrier()
    return result


class Group(nn.Module):
    """The weights of one optimiser, for DDP.  Its forward hands a loss through, unchanged.

    It holds no networks: DDP would send their buffers, which are constants, before every step.
    """

    def __init__(self, *nets):
        super().__init__()
        self.weights = nn.ParameterList(p for net in nets for p in net.parameters())

    def forward(self, loss):
        return loss


def share(nets, opts, cfg):
    """From here on the processes share every batch: DDP around what is trained, or shards of it.

    LoRA is never sharded: it is small, and the frozen weights under it belong to several networks.
    """
    if not dist.is_initialized():
        return
    parts = {"generator": (cfg.lora_generator, nets.ema, nets.generator, []),
             "critic": (cfg.lora_critic, nets.slow_fake, nets.fake, [nets.discriminator])}
    ddp = {}
    for which, (lora, average, net, more) in parts.items():
        if lora or not cfg.shard:  # some weights get no gradient: unused classes, say
            group = Group(net.net, *more)
            ddp[which] = DistributedDataParallel(group, find_unused_parameters=True)
            continue
        shard([net.net, *more], opts[which])
        if average is not net:
            shard([average.net])
    if not ddp and isinstance(nets.real.denoiser, nn.Module):
        shard([nets.real.denoiser])

    def backward(loss, which, last):
        """Gradients are averaged over the processes, after the last of several parts of a batch."""
        if which not in ddp:
            return loss.backward()
        with nullcontext() if last else ddp[which].no_sync():
            ddp[which](loss).backward()

    nets.backward = backward


def shard(group, opt=None):
    """Split the weights of some networks, and opt's moments, among the processes (FSDP2).

    The blocks of a network are fetched one at a time, while they compute.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    before = [p for net in group for p in net.parameters()]
    mesh = init_device_mesh(before[0].device.type, (dist.get_world_size(),))  # torch's own: a GPU
    for net in group:
        net.to(memory_format=torch.contiguous_format)             # FSDP2 splits nothing else
        for block in blocks(net):
            fully_shard(block, mesh=mesh)
        fully_shard(net, mesh=mesh, reshard_after_forward=True)   # also after one without backward
        if hasattr(net, "features"):               # the other way into a Denoiser
            register_fsdp_forward_method(net, "features")
    if opt is None:
        return
    after = dict(zip(before, (p for net in group for p in net.parameters())))
    for settings in opt.param_groups:
        settings["params"] = [after[p] for p in settings["params"]]
    for p in list(opt.state):
        opt.state[after[p]] = {k: split_like(v, after[p]) for k, v in opt.state.pop(p).items()}


def blocks(net):
    """The parts of a network that its outermost lists hold: encoder and decoder blocks."""
    for child in net.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from child.children()
        else:
            yield from blocks(child)


def split_like(value, p):
    """This process's part of a moment of a sharded weight p (a step count stays whole)."""
    from torch.distributed.tensor import distribute_tensor

    if value.shape != p.shape:
        return value
    return distribute_tensor(value.contiguous(), p.device_mesh, p.placements)


def gather(value):
    """value with its sharded tensors put together on the CPU; all processes must call it."""
    from torch.distributed.tensor import DTensor

    return tree_map(lambda t: t.full_tensor().cpu() if isinstance(t, DTensor) else t, value)


def close():
    """The steps are done: from here on this process works alone."""
    if dist.is_initialized():
        dist.destroy_process_group()


def exit_cleanly():
    """End a process that worked with others: exit code 0, without Python's own shutdown.

    DDP and FSDP2 leave threads of gloo running.  One that still holds a Python object then aborts
    the process, and torchrun sees a failed run (torch 2.14: 3 of 48 runs; pytorch PR 179291).
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        atexit._run_exitfuncs()                    # what others want done, W&B's last upload say
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

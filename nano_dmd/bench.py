"""Where the time goes: milliseconds of every part of a step, for every method.  Measured, never asserted.

    python -m nano_dmd.bench --preset digits [--methods dmd,dmd2,sid] [--repeats 20]

net forward is the bare network, what one sample costs at least; images/s are generated and trained on;
peak is the share of the matrix-multiplication speed measured on this machine in the precision of the run.
memory is the method's peak on a GPU, but the whole process's on a CPU: there, give one method at a time to learn its own.
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

from nano_dmd.denoiser import FromEps
from nano_dmd.engine.build import prepare
from nano_dmd.engine.config import add_config_flags, number, parser, resolve
from nano_dmd.engine.files import command
from nano_dmd.engine.machine import fast_bf16, machine, median_seconds, pick_device, use_threads
from nano_dmd.evaluate import TEACHER_STEPS, latency
from nano_dmd.methods import critic_requires_grad, train_step, update
from nano_dmd.metrics.sets import table


def matmul_flops(device, bf16, n=1536, repeats=10):
    """Floating-point operations per second of an (n, n) matrix product: the machine's practical peak."""
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    return 2 * n**3 / median_seconds(lambda: a @ a, device, repeats)


def bench(cfg, repeats):
    """{part: milliseconds, ...} of one method on cfg.device."""
    device = pick_device(cfg.device)
    teacher, nets, opts, draw = prepare(cfg, device)
    batch = draw()
    denoiser, c_noise, bf16 = nets.generator.net, torch.zeros(batch.z.shape[1], device=device), nets.generator.net.bf16
    bare = torch.int64 if isinstance(denoiser, FromEps) else torch.float32            # these count timesteps

    def net_forward():
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            denoiser.net(batch.z[0], c_noise.to(bare), batch.cond)

    def forward():
        with torch.no_grad():
            nets.generator(batch.z, batch.cond)

    def critic():
        critic_requires_grad(nets, True)
        with torch.no_grad():
            x = nets.generator(batch.z, batch.cond, batch.step, batch.start)
        update("critic", [x], nets, opts, [batch], cfg, {})

    def generator():
        critic_requires_grad(nets, False)
        x = nets.generator(batch.z, batch.cond, batch.step, batch.start)
        update("generator", [x], nets, opts, [batch], cfg, {})

    def step():
        train_step(nets, opts, draw, cfg)

    functions = {"net forward": net_forward, "G forward": forward, "critic update": critic, "G update": generator,
                 "whole step": step}
    parts = {name: median_seconds(f, device, repeats) for name, f in functions.items()}
    with FlopCounterMode(display=False) as counter:
        step()
    share = counter.get_total_flops() / parts["whole step"] / matmul_flops(device, bf16)
    if teacher.kind == "text":
        parts["one image"], parts[f"{TEACHER_STEPS} guided steps"] = latency(nets, batch, repeats)
    return {f"{k} ms": 1000 * v for k, v in parts.items()} | {
        "images/s": cfg.batch / parts["whole step"], "peak %": 100 * share, "memory MiB": machine(device)["peak_memory_mib"]}


def main(argv=None):
    p = parser("python -m nano_dmd.bench", __doc__)
    add_config_flags(p)
    p.add_argument("--methods", default="dmd,dmd2,sid,diff_instruct,regression", help="comma separated")
    p.add_argument("--repeats", type=number(1, 10**6), default=20, help="timed calls; the median is printed")
    given = vars(p.parse_args(argv))
    methods, repeats = [m.strip() for m in given.pop("methods").split(",")], given.pop("repeats")
    configs = {name: resolve({**given, "method": name}) for name in methods}
    first = next(iter(configs.values()))
    device, rows = pick_device(first.device), {}
    use_threads(first.threads, device)
    for name, cfg in configs.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        rows[f"{name} {cfg.critic_steps}:1"] = bench(cfg, repeats)
    print(f"{first.preset}, batch {first.batch}, {device}, {torch.get_num_threads()} threads, "
          f"{'bf16' if first.bf16 and fast_bf16(device) else 'fp32'}, torch {torch.__version__}")
    print(table(rows))


if __name__ == "__main__":
    command(main)

"""Where the time goes: milliseconds of every part of a step, for every method.

    python -m nano_dmd.bench --preset digits [--methods NAME,NAME] [--repeats 20]

net forward  the bare network: what one sample costs at least
images/s     images generated and trained on
peak         share of the speed of matrix products measured here, in the run's precision
memory       the method's peak on a GPU; on a CPU the whole process's, so give one method at a time
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

from nano_dmd.denoiser import FromEps
from nano_dmd.engine import machine
from nano_dmd.engine.config import add_config_flags, number, parser, resolve
from nano_dmd.engine.files import command
from nano_dmd.engine.prepare import prepare
from nano_dmd.evaluate import TEACHER_STEPS, latency
from nano_dmd.methods import METHODS, critic_requires_grad, train_step, update
from nano_dmd.metrics.sets import table


def matmul_flops(device, bf16, n=1536, repeats=10):
    """Operations per second of an (n, n) matrix product: the machine's practical peak."""
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    return 2 * n**3 / machine.median_seconds(lambda: a @ a, device, repeats)


def bench(cfg, repeats):
    """{part: milliseconds, ...} of one method on cfg.device."""
    device = machine.pick_device(cfg.device)
    teacher, nets, opts, draw = prepare(cfg, device)
    batch, denoiser = draw(), nets.generator.net
    counts = isinstance(denoiser, FromEps)         # these networks are told timesteps
    dtype = torch.int64 if counts else torch.float32
    c_noise = torch.zeros(batch.z.shape[1], device=device, dtype=dtype)

    @torch.no_grad()
    def net_forward():
        with torch.autocast(device.type, torch.bfloat16, enabled=denoiser.bf16):
            denoiser.net(batch.z[0], c_noise, batch.cond)

    @torch.no_grad()
    def forward():
        nets.generator(batch.z, batch.cond)

    def one(which):
        critic_requires_grad(nets, which == "critic")
        batch.x = None
        update(which, nets, opts, [batch], cfg, {})

    functions = {"net forward": net_forward, "G forward": forward,
                 "critic update": lambda: one("critic"), "G update": lambda: one("generator"),
                 "whole step": lambda: train_step(nets, opts, draw, cfg, cfg.steps)}
    parts = {name: machine.median_seconds(f, device, repeats) for name, f in functions.items()}
    with FlopCounterMode(display=False) as counter:
        functions["whole step"]()
    speed = counter.get_total_flops() / parts["whole step"]
    share = speed / matmul_flops(device, denoiser.bf16)
    if teacher.kind == "text":
        image, guided = latency(nets, batch, repeats)
        parts |= {"one image": image, f"{TEACHER_STEPS} guided steps": guided}
    return {f"{k} ms": 1000 * v for k, v in parts.items()} | {
        "images/s": cfg.batch / parts["whole step"], "peak %": 100 * share,
        "memory MiB": machine.about(device)["peak_memory_mib"]}


def main(argv=None):
    p = parser("python -m nano_dmd.bench", __doc__)
    p.add_argument("--methods", default=",".join(METHODS), help="comma separated")
    p.add_argument("--repeats", type=number(1, 10**6), default=20, help="timed calls, for a median")
    add_config_flags(p)
    given = vars(p.parse_args(argv))
    methods, repeats = [m.strip() for m in given.pop("methods").split(",")], given.pop("repeats")
    configs = [resolve({**given, "method": name}) for name in methods]
    first, rows = configs[0], {}
    device = machine.pick_device(first.device)
    if first.threads:
        torch.set_num_threads(first.threads)
    for cfg in configs:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        rows[f"{cfg.method} {cfg.critic_steps}:1"] = bench(cfg, repeats)
    precision = "bf16" if first.bf16 and machine.fast_bf16(device) else "fp32"
    print(f"{first.preset}, batch {first.batch}, {device}, {torch.get_num_threads()} threads, "
          f"{precision}, torch {torch.__version__}")
    print(table(rows))


if __name__ == "__main__":
    command(main)

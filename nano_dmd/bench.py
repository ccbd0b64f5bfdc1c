"""Where the time goes: milliseconds of every part of a step, for every method.

    python -m nano_dmd.bench --preset digits [--methods NAME,NAME] [--repeats 20]
    python -m nano_dmd.bench --report DIR [--minutes 12] [--data IMAGES]

net forward    the bare network on a batch: what its samples cost at least
images/s       batch / whole step; the critic's further batches are not counted
peak           share of the speed of matrix products measured here, in the run's precision
memory         peak of the method on a GPU, of the whole process on a CPU: give one method at a time
bare, student, teacher   one sample by the bare network, by the student, by the teacher's guided
               steps; speed-up is the ratio of the last two

--report measures the published networks with random weights, then trains on real images.
"""

import shlex
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

from nano_dmd.engine import config, machine
from nano_dmd.engine.files import UserError, command
from nano_dmd.engine.prepare import prepare
from nano_dmd.engine.report import report
from nano_dmd.evaluate import latency
from nano_dmd.methods import METHODS, critic_requires_grad, train_step, update
from nano_dmd.metrics.sets import table
from nano_dmd.teachers.data import load_data

COMPILED = "critic update", "G update", "whole step"


def bench(cfg, repeats, limit=float("inf")):
    """{part: milliseconds, ...} of one method on cfg.device.

    repeats  timed calls of each part, for a median; fewer where they take over `limit` seconds
    With cfg.compile the updates and the whole step are compiled, all else is not.
    """
    device = machine.pick_device(cfg.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    teacher, nets, opts, draw = prepare(cfg, device)
    batches = [draw() for _ in range(cfg.accumulate)]
    parts, seconds = calls(cfg, nets, opts, draw, batches), {}
    for name, part in parts.items():
        with machine.compiled(name in COMPILED, asked=cfg.compile):
            seconds[name] = machine.median_seconds(part, device, repeats, limit)
    memory = machine.about(device)["peak_memory_mib"]
    with machine.compiled(False, asked=cfg.compile):
        seconds["student"], seconds["teacher"] = latency(
            nets, batches[0], teacher.calls, min(repeats, 5))
        with FlopCounterMode(display=False) as counter:
            parts["whole step"]()
    speed = counter.get_total_flops() / seconds["whole step"]
    share = speed / machine.matmul_flops(device, nets.generator.net.bf16)
    return {f"{k} ms": 1000 * v for k, v in seconds.items()} | {
        "speed-up": seconds["teacher"] / seconds["student"],
        "images/s": cfg.batch / seconds["whole step"], "peak %": 100 * share, "memory MiB": memory}


def calls(cfg, nets, opts, draw, batches):
    """{part of a step: function()}, on batches, but for the whole step, which draws its own."""
    z, cond = batches[0].z, batches[0].cond
    denoiser = nets.generator.net

    @torch.no_grad()
    def bare(z, cond):
        time = denoiser.time(z.new_ones(len(z)))
        with torch.autocast(z.device.type, torch.bfloat16, enabled=denoiser.bf16):
            denoiser.net(z, time, cond)

    def alone(which):
        critic_requires_grad(nets, which == "critic")
        for batch in batches:
            batch.x = None
        update(which, nets, opts, batches, cfg, {})

    return {"net forward": lambda: bare(z[0], cond),
            "G forward": lambda: torch.no_grad()(nets.generator)(z, cond),
            "critic update": lambda: alone("critic"), "G update": lambda: alone("generator"),
            "whole step": lambda: train_step(nets, opts, draw, cfg, cfg.steps),
            "bare": lambda: bare(z[0, :1], None if cond is None else cond[:1])}


def main(argv=None):
    p = config.parser("python -m nano_dmd.bench", __doc__)
    p.add_argument("--methods", default=",".join(METHODS), help="comma separated")
    p.add_argument("--repeats", type=config.number(1, 10**6), default=20, help="timed calls")
    p.add_argument("--report", metavar="DIR", help="write report.md and report.json about this "
                                                   "machine; of other flags --device and --data")
    p.add_argument("--minutes", type=config.number(1, 10**4), default=12, help="for --report")
    config.add_config_flags(p)
    given = vars(p.parse_args(argv))
    methods, repeats = [m.strip() for m in given.pop("methods").split(",")], given.pop("repeats")
    folder, minutes = given.pop("report"), given.pop("minutes")
    if folder:
        return whole_report(folder, minutes, given, argv)
    configs = [config.resolve({**given, "method": name}) for name in methods]
    first, rows = configs[0], {}
    device = machine.pick_device(first.device)
    for cfg in configs:
        rows[f"{cfg.method} {cfg.critic_steps}:1"] = bench(cfg, repeats)
    precision = "bf16" if first.bf16 and machine.fast_bf16(device) else "fp32"
    print(f"{first.preset}, batch {first.batch}, {device}, {torch.get_num_threads()} threads, "
          f"{precision}, torch {torch.__version__}")
    print(table(rows))


def whole_report(out, minutes, given, argv):
    """bench --report: prints what it wrote."""
    if wrong := sorted(given.keys() - {"device", "data"}):
        raise UserError(f"--report chooses its own settings: leave --{wrong[0]} out")
    device, data = machine.pick_device(given.get("device", "auto")), given.get("data", "")
    if data:
        load_data(data)                            # a typo shows now, not after the other parts
    words = shlex.join(["python", "-m", "nano_dmd.bench", *(argv or sys.argv[1:])])
    print(report(out, minutes, device, data, bench, words), f"this is {out}/report.md", sep="\n")


if __name__ == "__main__":
    command(main)

"""What a machine does with the published networks: a report in minutes (bench --report DIR).

Weights and images are random: speed and memory do not depend on them. plan() begins with what
matters most. The report is written again after each part, so a cut leaves what was done. On a CPU
it is a rehearsal: small networks stand for the published ones.
"""

import gc
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from nano_dmd.engine import files, machine
from nano_dmd.engine.config import resolve
from nano_dmd.methods import METHODS
from nano_dmd.metrics.sets import table
from nano_dmd.presets import PRESETS, REPORTED

BF16, FP32 = dict(bf16=True, tf32=True), dict(bf16=False, tf32=False)
HOW = {"bf16": BF16, "bf16 compiled": dict(BF16, compile=True), "fp32": FP32,
       "TF32": dict(FP32, tf32=True)}
BATCH = {"cifar10": 256, "imagenet64": 40, "sd15": 8, "sana": 4, "sdxl": 1}
SEARCHED = {"cifar10": 1024, "imagenet64": 320, "sd15": 128, "sana": 256, "sdxl": 64}  # tried first
TEXT = {"sd15": "random:tiny", "sana": "random:tiny-flow", "sdxl": "random:tiny"}
REHEARSED = {"cifar10": "random:small", "imagenet64": "random:small"} | TEXT
# Text to image, one image: what is added to a full student and a full fake score.
MEMORY = {
    "LoRA fake score, 8-bit Adam, in 24 GB": dict(lora_critic=64, adam8bit=True),
    "nothing": {}, "8-bit Adam": dict(adam8bit=True), "LoRA fake score": dict(lora_critic=64),
    "two LoRAs": dict(lora_generator=64, lora_critic=64),
    "8-bit Adam, offloaded teacher": dict(adam8bit=True, offload_teacher=True),
    "no recomputation": dict(checkpointing=False)}
TITLES = {
    "methods": "A step of each method, one critic update",
    "batch": "The largest batch that fits, in steps of a quarter",
    "memory": "Memory of text to image, one image"}
SPEED = ("critic update ms", "G update ms", "whole step ms", "images/s", "peak %", "memory MiB")
LATENCY = ("bare ms", "student ms", "teacher ms")


def plan(gpu):
    """[(section, label, network, settings)], the most important first."""
    first, second = REPORTED[:2]

    def step(net, method, how):
        return "methods", f"{net} {method}, {how}", net, dict(HOW[how], method=method)

    def steps(net):                                # a student of several steps has no pairs
        several = "," in PRESETS[net].get("sigmas", "")
        return [step(net, method, "bf16") for method in REPORTED
                if not several or "pairs" not in METHODS[method].needs]

    def memory(net):
        common = dict(BF16, method=second, batch=1)
        return [("memory", f"{net} {second}, {label}", net, common | options)
                for label, options in MEMORY.items()]

    largest = [("batch", f"{net} {first}, bf16", net, dict(BF16, method=first, batch=n))
               for net, n in SEARCHED.items()]
    compiled = [step(net, second, "bf16 compiled") for net in ("cifar10", "imagenet64", "sd15")]
    in_24_gb, *others = memory("sd15")
    return [*steps("cifar10"), step("cifar10", first, "fp32"), step("cifar10", second, "fp32"),
            *steps("sd15"), in_24_gb, *steps("imagenet64"),
            *[step("cifar10", first, "bf16 compiled")] * gpu, *others, *steps("sana"),
            *steps("sdxl"), *largest * gpu, step("cifar10", second, "TF32"),
            step("imagenet64", second, "fp32"), step("sd15", second, "fp32"), *memory("sana"),
            *memory("sdxl"), *compiled * gpu]


def report(out, minutes, device, data, bench, command):
    """Write out/report.json and out/report.md; returns the latter's text.

    minutes  for all of it; the last quarter is for a real training on data
    bench    function(cfg, repeats, limit) -> {part: number}
    """
    start, parts = time.perf_counter(), []
    out, prompts = Path(out), Path(out, "prompts.txt")
    files.write_atomic(prompts, "".join(f"picture {i}\n" for i in range(64)).encode())
    found = dict(command=command, date=time.strftime("%Y-%m-%d"), machine=what_it_is(device),
                 parts=parts)

    def left():
        return 60 * minutes - (time.perf_counter() - start)       # seconds

    def save():
        found["minutes"] = round(minutes - left() / 60, 1)
        files.write_json(out / "report.json", found)
        files.write_atomic(out / "report.md", as_markdown(found).encode())

    save()
    for section, label, net, changes in plan(device.type == "cuda"):
        if left() < 15 * minutes + 200 * ("compile" in changes):  # a compilation cannot be cut
            continue
        settings = dict(preset=net, teacher=f"random:{net}", device=str(device), critic_steps=1,
                        batch=BATCH[net], pairs=8, pair_steps=2, reg_loss="l2")
        if device.type == "cpu":
            settings |= dict(teacher=REHEARSED[net], batch=2)
        if net in TEXT:
            settings |= dict(prompts=str(prompts), half_frozen=changes["bf16"], w_gan=0, w_disc=0)
        cfg = resolve(settings | changes)
        print(f"{section}: {label}", file=sys.stderr, flush=True)
        limit_memory(device, 24 if "24 GB" in label else 0)
        cfg, numbers = attempt(bench, cfg, section == "batch", limit=minutes / 6)
        parts.append(dict(section=section, label=label, method=cfg.method, batch=cfg.batch,
                          accumulate=cfg.accumulate, **numbers))
        save()
    found["training"] = training(out / "run", left(), device, data)
    save()
    return as_markdown(found)


def what_it_is(device):
    """The machine, and the TFLOP/s of matrix products in each precision."""
    known = machine.about(device)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        known |= {"GiB": memory / 2**30, "CUDA": torch.version.cuda,
                  "cuDNN": torch.backends.cudnn.version()}
    for name in ("fp32", "TF32", "bf16"):
        torch.backends.cuda.matmul.allow_tf32 = HOW[name]["tf32"]
        known[f"TFLOP/s {name}"] = machine.matmul_flops(device, HOW[name]["bf16"]) / 1e12
    return known


def attempt(bench, cfg, search, limit):
    """(cfg that was measured, its numbers or {"failed": why}).

    Where memory runs out it tries again with less, see less_memory.
    """
    try:
        return cfg, bench(cfg, repeats=5, limit=limit)
    except Exception as e:                         # whatever it was, the other parts go on
        why, full = files.first_line(e), "out of memory" in str(e) or "ALLOC_FAILED" in str(e)
        less = less_memory(cfg, search) if full else None
    finally:
        if cfg.compile:
            torch._dynamo.reset()
        gc.collect()
        with suppress(RuntimeError):
            torch.cuda.empty_cache()
    return attempt(bench, less, search, limit) if less else (cfg, {"failed": why})


def less_memory(cfg, search):
    """cfg with three quarters of the batch (search), or the batch in more parts; None at 1."""
    if search:
        return replace(cfg, batch=cfg.batch * 3 // 4) if cfg.batch > 1 else None
    parts = 2 * cfg.accumulate
    return None if cfg.batch % parts else replace(cfg, accumulate=parts)


def limit_memory(device, gib):
    """From here on a smaller GPU: at most so many GiB of this one.  0: all of it."""
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory / 2**30
        share = min(1.0, gib / whole) if gib else 1.0
        with suppress(RuntimeError):               # after an error of the device's
            torch.cuda.set_per_process_memory_fraction(share, device)


def training(out, seconds, device, data):
    """{command, ended, rows} of a real distillation, stopped when the time is over.

    rows  {updates done: speed and metrics}, read from its log
    """
    images = data or "cifar10" * (files.cache_dir() / "cifar10").is_dir()
    what = {"preset": "digits"}
    if images:
        what = dict(preset="cifar10-scratch", data=images, teacher_steps=400, steps=2000)
    what |= dict(method=REPORTED[0], eval_every=50, log_every=50, device=device, out=out)
    flags = [word for k, v in what.items() for word in (f"--{k}", str(v))] + ["--no-compile"]
    files.delete(out)                                    # an earlier report's
    ended = "was stopped when its time was over"
    with suppress(subprocess.TimeoutExpired):
        done = subprocess.run([sys.executable, "-m", "nano_dmd.train", *flags], text=True,
                              timeout=max(seconds, 60), capture_output=True)
        ended = files.last_words(done) if done.returncode else "came to its end"
    files.note(f"the training {ended}")
    log, rows = out / "log.jsonl", {}
    batch = resolve({k: what[k] for k in ("preset", "method")}).batch
    files.trim_log(log, 10**9)                           # without a line that was cut short
    for _, line in files.read_lines(log):
        entry = files.parse_json(line, log)
        if entry.get("metrics"):
            step, seconds = entry["step"], entry["seconds"][1]
            speed = {"minutes": seconds / 60, "images/s": step * batch / seconds}
            rows[f"{step} updates"] = speed | entry["metrics"]
    words = shlex.join(["python", "-m", "nano_dmd.train", *flags])
    return dict(command=words, ended=ended, rows=rows)


def latencies(parts):
    """{network and precision: milliseconds of one sample by bare network, student, teacher}."""
    known = [p for p in parts if p["section"] == "methods" and p["method"] == REPORTED[1]
             and "compiled" not in p["label"]]
    return {p["label"].replace(f" {p['method']}", ""): {k: p[k] for k in LATENCY}
            | {"ratio": p["teacher ms"] / p["student ms"]} for p in known}


def against_official(parts):
    """{method: ratio}: how much faster than a stand-in of the official code on this machine.

    The stand-in is our step in fp32, eager, without TF32, and one more pass of the generator.
    Our steps use cuDNN's deterministic kernels.  The official code uses the fastest ones, so it may
    be faster than the stand-in.
    """
    known, rows = {p["label"]: p for p in parts if p["section"] == "methods"}, {}
    for method in REPORTED:
        slow = known.get(f"cifar10 {method}, fp32")
        for how in ("bf16", "bf16 compiled") if slow else ():
            if fast := known.get(f"cifar10 {method}, {how}"):
                more = slow["G forward ms"] if slow["accumulate"] == 1 else 0   # there already
                cost = slow["whole step ms"] + more
                rows[f"{method}, {how}"] = {"stand-in ms": cost, "ours ms": fast["whole step ms"],
                                            "times": cost / fast["whole step ms"]}
    return rows


def as_markdown(found):
    """A section for docs/gpu.md."""
    known, parts = found["machine"], [p for p in found["parts"] if "failed" not in p]
    facts = [f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in known.items()
             if k not in ("device", "peak_memory_mib")]
    rehearsal = "" if "CUDA" in known else ": a rehearsal with small networks"
    lines = [f"## {found['date']}: {known['device']}{rehearsal}", "",
             f"{', '.join(facts)}. Made in {found['minutes']} minutes by", "", "```bash",
             found["command"], "```"]

    def show(title, rows):
        if rows:
            lines.extend(["", title, "", "```text", table(rows), "```"])

    for section, title in TITLES.items():
        show(title, {p["label"]: {k: p[k] for k in ("batch", "accumulate", *SPEED)}
                     for p in parts if p["section"] == section})
    show("One sample, milliseconds", latencies(parts))
    show("Against the cost of the official code (fp32, eager, one generator pass more)",
         against_official(parts))
    show("Failed", {p["label"]: {"why": p["failed"]} for p in found["parts"] if "failed" in p})
    if "training" in found:
        ended = found["training"]["ended"]
        lines.extend(["", f"A real training. It {ended}.", "", "```bash",
                      found["training"]["command"], "```"])
        show("What its log says", found["training"]["rows"])
    return "\n".join(lines) + "\n"

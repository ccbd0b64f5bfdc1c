"""Exact resume: a run that is killed, wherever that happens, ends with the same bits as one that is not.

Without this a user with preemptible machines gets results that nobody, they included, can reproduce.
Runs are processes of their own, killed by SIGKILL; a fork server spares each of them the import of torch.
"""

import gc
import json
import multiprocessing
import os
import shutil
import signal
import time
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from nano_dmd import evaluate, methods, train
from nano_dmd.engine import files, progress
from nano_dmd.engine.files import UserError, command, load_checkpoint, read_json

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["nano_dmd.train"])

TOY = ["--preset", "toy", "--method", "sid", "--device", "cpu", "--teacher_steps", "50", "--batch", "32",
       "--steps", "60", "--warmup", "5", "--ema", "10",
       "--log_every", "7", "--sample_every", "30", "--save_every", "10"]
DIGITS = ["--preset", "digits", "--method", "dmd2", "--device", "cpu", "--teacher_steps", "5", "--batch", "8",
          "--sigmas", "2.5,0.8", "--w_gan", "0.1", "--w_disc", "0.03", "--save_every", "2"]
RUNS = {
    "toy sid": TOY,
    "toy dmd with pairs": [*TOY, "--method", "dmd", "--pairs", "50", "--pair_steps", "4"],
    "toy dmd2 with GAN": [*TOY, "--method", "dmd2", "--w_gan", "0.1", "--w_disc", "0.03", "--critic_steps", "2"],
    "toy f_distill, averaged critic": [*TOY, "--method", "f_distill", "--ema_critic", "5", "--ida", ".01"],
    "toy f_distill, exact ratio": [*TOY, "--method", "f_distill", "--ratio", "exact", "--noisings", "2"],
    "digits dmd2, 2 steps": [*DIGITS, "--steps", "9", "--log_every", "2", "--sample_every", "5"],
    "digits phased": [*DIGITS, "--method", "phased", "--ode_steps", "--steps", "4"],
    "digits dmd2, forward noised": [*DIGITS, "--steps", "4", "--no-backward_simulation"],
}


def skip_evaluation(set_attribute):
    """What is skipped comes after the last step, or is only looked at."""
    set_attribute(train, "have_matplotlib", lambda: False)
    set_attribute(evaluate, "report_rows", lambda net, teacher, data, cfg: {
        "teacher": {"NFE": 35, "seconds": 1.0}, cfg.method: {"NFE": len(net.sigmas)}})
    set_attribute(progress, "heun", lambda denoiser, z, cond=None: 0.5 * z)


def die_at(moment, number):
    """Kill this process "before", "half" through or "after" the number-th write of a file, or go "slowly" and wait."""
    real, step, seen = os.replace, methods.train_step, []

    def replace(temporary, path):
        name = Path(path).name
        seen.append(name)
        now = seen.count(name) == number and moment.endswith(name)
        if now and moment.startswith("before"):
            os.kill(os.getpid(), signal.SIGKILL)
        if now and moment.startswith("half"):                     # a write that got half way
            os.truncate(temporary, os.path.getsize(temporary) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        real(temporary, path)
        if now and moment.startswith("after"):
            os.kill(os.getpid(), signal.SIGKILL)

    files.os.replace = replace
    if moment == "slowly":                                        # and slower once it may be stopped: busy machines poll late
        train.train_step = lambda *args: (time.sleep(0.02 if args[-1] < 12 else 0.25), step(*args))[1]


def work(argv, moment, number):
    """The body of a child process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)      # a suite started in the background ignores Ctrl-C
    torch.set_num_threads(1)
    skip_evaluation(setattr)
    if moment:
        die_at(moment, number)
    command(lambda: train.main(argv))


def start(argv, moment=None, number=0):
    child = PROCESSES.Process(target=work, args=(argv, moment, number))
    child.start()
    return child


def exit_code(*args):
    child = start(*args)
    child.join()
    return child.exitcode


def leaves(obj, path=""):
    """{path: value} of nested containers; tensors as their type and bytes, so that == compares bits."""
    if isinstance(obj, torch.Tensor):
        return {path: (obj.dtype, tuple(obj.shape), obj.numpy().tobytes())}
    if isinstance(obj, (dict, list, tuple)):
        items = obj.items() if isinstance(obj, dict) else enumerate(obj)
        return {k: v for key, value in items for k, v in leaves(value, f"{path}/{key}").items()}
    return {path: obj}


def result(out):
    """All that a run leaves except clocks and paths: generator, checkpoint, log and pictures."""
    saved = load_checkpoint(out / "checkpoint.pt")
    state = leaves({k: saved[k] for k in ("step", "nets", "rng", "opts")})
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    files = [out / "generator.safetensors", out / "teacher.safetensors", *sorted(out.glob("s*/*.png"))]
    return dict(state, log=[{k: v for k, v in line.items() if k != "seconds"} for line in log],
                **{str(f.relative_to(out)): f.read_bytes() for f in files})


def differences(a, b):
    """Names of what differs between two results."""
    return sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """uninterrupted(name) -> result of RUNS[name] in one go, in this process, made once."""
    made = {}

    def make(name):
        if name not in made:
            out = tmp_path_factory.mktemp("whole") / "run"
            with pytest.MonkeyPatch.context() as patch:
                skip_evaluation(patch.setattr)
                train.main([*RUNS[name], "--threads", "1", "--out", str(out)])
            made[name] = result(out)
        return made[name]

    return make


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


def flags(name, out):
    return [*RUNS[name], "--threads", "1", "--out", str(out)]


def resume(out):
    return ["--resume", "--out", str(out)]


def wait_for(step, out, child):
    while not (out / "checkpoint.pt").exists() or load_checkpoint(out / "checkpoint.pt")["step"] < step:
        assert child.is_alive()
        time.sleep(0.001)


@pytest.mark.slow
def test_killed_from_outside(uninterrupted, out):
    """SIGKILL at any moment, three times."""
    child = start([*flags("toy sid", out), "--save_every", "1"], "slowly")
    for step in (5, 17, 18):
        wait_for(step, out, child)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL and not (out / "report.json").exists()
        assert step <= load_checkpoint(out / "checkpoint.pt")["step"] < 60
        child = start(resume(out), "slowly")
    child.join()
    assert child.exitcode == 0 and read_json(out / "report.json")["rows"]
    assert differences(result(out), uninterrupted("toy sid")) == []
    assert not list(out.rglob(".*"))


@pytest.mark.parametrize("name, moments", [
    ("toy dmd with pairs", [("half checkpoint.pt", 3), ("after checkpoint.pt", 2)]),
    ("toy dmd2 with GAN", [("before checkpoint.pt", 2), ("after checkpoint.pt", 2), ("before 000060.png", 1)]),
    ("digits dmd2, 2 steps", [("after checkpoint.pt", 1), ("half checkpoint.pt", 2), ("before checkpoint.pt", 1)]),
    ("digits dmd2, forward noised", [("after checkpoint.pt", 1)]),
], ids=lambda x: x if isinstance(x, str) else "")
def test_killed_during_saves(uninterrupted, out, name, moments):
    """The old checkpoint or the new one is there, never half of one, and either leads to the same end."""
    argv = flags(name, out)
    for moment in moments:
        assert exit_code(argv, *moment) == -signal.SIGKILL
        argv = resume(out)
    assert exit_code(argv) == 0
    assert differences(result(out), uninterrupted(name)) == []
    assert not list(out.rglob(".*"))


def test_killed_before_the_first_checkpoint(uninterrupted, out, capsys):
    """There is nothing to resume, which one sentence says; the same command simply starts over."""
    assert exit_code(flags("toy sid", out), "half checkpoint.pt", 1) == -signal.SIGKILL
    assert (out / "log.jsonl").read_text()
    with pytest.raises(UserError, match="no checkpoint at .*; start without --resume, or check --out"):
        train.main(resume(out))
    assert exit_code(flags("toy sid", out)) == 0
    assert differences(result(out), uninterrupted("toy sid")) == []


@pytest.mark.parametrize("moment", ["after checkpoint.pt", "half generator.safetensors", "before report.json"])
def test_killed_after_the_last_step(uninterrupted, out, moment):
    """Trained, but not evaluated: resuming evaluates and trains nothing."""
    assert exit_code(flags("toy sid", out), moment, 6 if "checkpoint" in moment else 1) == -signal.SIGKILL
    assert load_checkpoint(out / "checkpoint.pt")["step"] == 60 and not (out / "report.json").exists()
    assert exit_code(resume(out)) == 0
    assert read_json(out / "report.json")["rows"]["sid"]["NFE"] == 1
    assert differences(result(out), uninterrupted("toy sid")) == []


def test_resume_of_a_finished_run(toy_run, out):
    shutil.copytree(toy_run, out)
    before = result(out)
    assert exit_code(resume(out)) == 0
    assert differences(result(out), before) == []


def test_interrupted_by_the_keyboard(uninterrupted, out):
    """Ctrl-C is a clean stop with exit code 130, and can be resumed like a kill."""
    child = start(flags("toy sid", out), "slowly")
    wait_for(10, out, child)
    os.kill(child.pid, signal.SIGINT)
    child.join()
    assert child.exitcode == 130
    assert exit_code(resume(out)) == 0
    assert differences(result(out), uninterrupted("toy sid")) == []


def test_a_log_cut_short(uninterrupted, out):
    """A full disk or a power cut may leave half a line, or bytes of nothing: the rest of the log survives."""
    assert exit_code(flags("toy sid", out), "before checkpoint.pt", 4) == -signal.SIGKILL
    with open(out / "log.jsonl", "ab") as f:
        f.write(b'{"step": 42, "sid_lo\x00\xff')
    assert exit_code(resume(out)) == 0
    assert differences(result(out), uninterrupted("toy sid")) == []


def test_resume_without_the_cache(uninterrupted, out, tmp_path, monkeypatch, quick):
    """Somebody empties the cache between kill and resume: teacher and pairs are made again, the same to the bit."""
    name = "toy dmd with pairs"
    assert exit_code(flags(name, out), "before checkpoint.pt", 3) == -signal.SIGKILL
    monkeypatch.setenv("NANO_DMD_CACHE", str(tmp_path / "empty"))
    train.main(resume(out))
    assert differences(result(out), uninterrupted(name)) == []


def test_a_resumed_run_lets_go_of_its_checkpoint(out, monkeypatch, quick):
    """A large student's weights and moments would be held twice to the end."""
    assert exit_code(flags("toy sid", out), "after checkpoint.pt", 5) == -signal.SIGKILL
    load, step, seen = train.load_checkpoint, methods.train_step, []

    def watched_load(*args):
        saved = load(*args)
        seen.extend(weakref.ref(v) for v in tree_leaves([saved["nets"], saved["opts"]]) if torch.is_tensor(v))
        return saved

    def watched_step(nets, opts, *args):
        gc.collect()
        used = {id(v) for opt in opts.values() for v in tree_leaves(list(opt.state.values()))}
        assert seen and {id(ref()) for ref in seen if ref() is not None} <= used        # moments alone, and once
        return step(nets, opts, *args)

    monkeypatch.setattr(train, "load_checkpoint", watched_load)
    monkeypatch.setattr(train, "train_step", watched_step)
    train.main(resume(out))


# ---- what must not matter, and what must


def generator_bytes(argv, out):
    train.main([*argv, "--threads", "1", "--out", str(out)])
    return (out / "generator.safetensors").read_bytes()


def test_watching_changes_nothing(uninterrupted, out, quick, monkeypatch):
    """Logging, drawing and saving at every step, or never, gives the same generator: looking is free."""
    name = "toy dmd2 with GAN"
    expected = uninterrupted(name)["generator.safetensors"]
    often = ["--log_every", "1", "--sample_every", "3", "--save_every", "4"]
    never = ["--log_every", "999", "--sample_every", "999", "--save_every", "999"]
    assert generator_bytes([*RUNS[name], *often], out) == expected
    monkeypatch.setattr(progress, "diagnose", lambda *a: dict(x_std=0.5, spread=0.5, mesm=[0.0], fake_loss=[0.0]))
    assert generator_bytes([*RUNS[name], *never], out.with_name("never")) == expected


def test_resume_may_change_how_often_one_looks(uninterrupted, out):
    assert exit_code(flags("toy sid", out), "before checkpoint.pt", 3) == -signal.SIGKILL
    assert exit_code([*resume(out), "--log_every", "1", "--save_every", "25", "--sample_every", "7"]) == 0
    a, b = result(out), uninterrupted("toy sid")
    assert [k for k in differences(a, b) if not k.endswith(".png")] == ["log"]
    assert [line["step"] for line in a["log"]] == [7, 14, *range(21, 61)]


def test_seeds_decide(uninterrupted, out, quick):
    """The same seed is the same run, another seed is another one."""
    expected = uninterrupted("toy sid")["generator.safetensors"]
    assert generator_bytes(RUNS["toy sid"], out) == expected
    assert generator_bytes([*RUNS["toy sid"], "--seed", "1"], out.with_name("other")) != expected

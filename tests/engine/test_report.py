"""bench --report: what it measures can be measured, what it wrote stays, and a cut leaves what was done."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nano_dmd import bench, train
from nano_dmd.engine import machine, report
from nano_dmd.engine.config import resolve
from nano_dmd.engine.files import UserError
from nano_dmd.engine.prepare import prepare
from nano_dmd.teacher import load_teacher
from nano_dmd.teachers import zoo
from nano_dmd.teachers.data import load_data

CPU = torch.device("cpu")
NUMBERS = {f"{part} ms": 100.0 for part in ("G forward", "critic update", "G update", "whole step", "bare", "student")} | {
    "teacher ms": 5000.0, "images/s": 40.0, "peak %": 50.0, "memory MiB": 1000}


def test_random_networks_are_the_published_ones():
    """Shapes of EDM's CIFAR-10 and ImageNet-64 checkpoints; images of noise that fit the network."""
    published = {"random:cifar10": "edm-cifar10-32x32-cond-vp", "random:imagenet64": "edm-imagenet-64x64-cond-adm"}
    layouts = json.loads((Path(__file__).parents[1] / "golden" / "edm_checkpoint_layouts.json").read_text())
    assert published.keys() | {"random:small"} == zoo.RANDOM_EDM.keys()
    for name, layout in published.items():
        with torch.device("meta"):
            net = zoo.untrained(dict(network="edm", args=zoo.RANDOM_EDM[name], sigma_data=0.5, bf16=False)).net
        assert {f"model.{k}": list(v.shape) for k, v in net.state_dict().items()} == layouts[layout]["state_dict"]
    teacher = load_teacher("random:small")
    images = load_data(teacher.data)
    assert (images.shape, images.classes) == (teacher.shape, teacher.classes) == ((3, 32, 32), 10)
    cfg = resolve(dict(preset="cifar10", device="cpu", method="dmd2", teacher="random:small", batch=4, critic_steps=1))
    assert bench.bench(cfg, 1)["images/s"] > 0


@pytest.mark.parametrize("name", ["random:3x0:10", "random:4x8:10", "random:3x8:1001", "random:sid"])
def test_names_of_noise(name):
    with pytest.raises(UserError, match="names like random:3x32:10"):
        load_data(name)


@pytest.fixture(autouse=True)
def nothing_to_collect(monkeypatch):
    """Looking for lost memory after each part takes a quarter of a second, and here no part takes any."""
    monkeypatch.setattr(report.gc, "collect", lambda: None)


@pytest.fixture
def parts_alone(monkeypatch):
    """A report without its training, of a machine that need not be there."""
    monkeypatch.setattr(report, "training", lambda *args: dict(command="train", ended="came to its end", rows={}))
    monkeypatch.setattr(report, "what_it_is", lambda device: dict(device="x", torch="2", threads=1))
    monkeypatch.setattr(report, "limit_memory", lambda device, gib: None)


@pytest.mark.parametrize("gpu", [False, True])
def test_every_part_of_the_plan_is_a_run(gpu, tmp_path, parts_alone):
    """Settings resolve; each of a tiny network can be prepared; the goals' parts come first."""
    plan = list(report.plan(gpu))
    labels = [label for _, label, *_ in plan]
    assert len(set(labels)) == len(labels) - 5 * gpu and labels[0] == "cifar10 sid, bf16"      # largest batches: the same names
    early = labels[:13]
    assert {"cifar10 sid, fp32", "cifar10 dmd2, fp32", "sd15 dmd2, LoRA fake score, 8-bit Adam, in 24 GB"} < set(early)
    assert ("cifar10 sid, bf16 compiled" in early) == gpu
    seen, device = [], torch.device("cuda" if gpu else "cpu")
    report.report(tmp_path, 60, device, "", lambda cfg, repeats, limit: (seen.append(cfg), NUMBERS)[1], "bench")
    assert len(seen) == len(plan) and len({(c.preset, c.method, c.bf16, c.tf32, c.compile) for c in seen}) > 10
    for cfg in {(c.preset, c.lora_critic, c.lora_generator, c.adam8bit): c for c in seen}.values() if not gpu else ():
        assert prepare(cfg, CPU)[3]().z.shape[1] == cfg.batch


def test_a_report_holds_what_was_done(tmp_path, monkeypatch):
    """Written after every part; a part that fails says why and stops nothing; ratios by hand."""
    def measured(cfg, repeats, limit):
        written = json.loads((tmp_path / "report.json").read_text())
        assert len(written["parts"]) == len(calls)
        calls.append(cfg)
        if cfg.method == "dmd":
            raise ValueError("no room")
        return NUMBERS | {"whole step ms": 900.0 if not cfg.bf16 else 200.0}

    calls = []
    done = dict(command="train", ended="came to its end", rows={"100 updates": {"fixed_fd": 0.5}})
    monkeypatch.setattr(report, "training", lambda *args: done)
    monkeypatch.setattr(report, "what_it_is", lambda device: {"device": "x", "torch": "2", "threads": 1, "TFLOP/s bf16": 1.5})
    text = report.report(tmp_path, 60, CPU, "", measured, "python -m nano_dmd.bench --report X")
    found = json.loads((tmp_path / "report.json").read_text())
    assert text == (tmp_path / "report.md").read_text() and len(found["parts"]) == len(calls) > 20
    assert report.against_official(found["parts"])["sid, bf16"] == {"stand-in ms": 1000.0, "ours ms": 200.0, "times": 5.0}
    other = dict(found["parts"][0], section="batch", **{"whole step ms": 1.0})       # the largest batch has the same label
    assert report.against_official([*found["parts"], other])["sid, bf16"]["times"] == 5.0
    slow = [dict(p, accumulate=2) for p in found["parts"]]                          # then a step makes G(z) twice by itself
    assert report.against_official(slow)["sid, bf16"]["stand-in ms"] == 900.0
    assert report.latencies(found["parts"])["cifar10, bf16"]["ratio"] == 50.0
    for words in ("no room", "100 updates", "TFLOP/s bf16 1.5", "LoRA fake score", "bench --report X"):
        assert words in text


def test_out_of_memory_means_once_more_with_less():
    """Parts of a batch are doubled; a search takes three quarters; what fails otherwise is told, and nothing is tried again."""
    def fits(room):
        def bench(cfg, repeats, limit):
            seen.append((cfg.batch, cfg.accumulate))
            if cfg.batch // cfg.accumulate > room:
                raise torch.OutOfMemoryError("CUDA out of memory.\nTried")
            return {"images/s": 1.0}
        return bench

    seen, cfg = [], resolve(dict(preset="digits", batch=40))
    assert report.attempt(fits(10), cfg, False, 1)[1] == {"images/s": 1.0} and seen == [(40, 1), (40, 2), (40, 4)]
    seen.clear()
    assert report.attempt(fits(20), cfg, True, 1)[0].batch == 16 and seen == [(40, 1), (30, 1), (22, 1), (16, 1)]
    for search in (False, True):                                                    # 5 is odd
        seen.clear()
        assert report.attempt(fits(0), cfg, search, 1)[1] == {"failed": "CUDA out of memory."}
        assert seen[-1] == ((1, 1) if search else (40, 8))
    seen.clear()
    wrong = lambda cfg, repeats, limit: seen.append(0) or 1 / 0
    assert report.attempt(wrong, cfg, False, 1) == (cfg, {"failed": "division by zero"}) and seen == [0]


def test_a_median_leaves_the_warming_up_out(monkeypatch):
    """Two calls to warm up, then the median of `repeats`, or of as many as the limit allows, at least one."""
    calls, now = iter([100, 50, 3, 1, 2, 9, 9, 9, 9]), [0.0]
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])
    work = lambda: now.__setitem__(0, now[0] + next(calls))
    assert machine.median_seconds(work, CPU, repeats=20, limit=5.5) == 2
    assert next(calls) == 9                                                         # five calls were made
    calls = iter([100, 50, 3, 9])
    assert machine.median_seconds(work, CPU, repeats=20, limit=0.5) == 3 and next(calls) == 9
    calls = iter([100, 50, 3, 1, 2, 9, 9])
    assert machine.median_seconds(work, CPU, repeats=5) == 3
    calls = iter([100, 50, 7])
    assert machine.median_seconds(work, CPU, repeats=1) == 7


@pytest.mark.parametrize("seconds, compiled", [(400, True), (370, False)])
def test_a_compilation_needs_time_to_spare(seconds, compiled, tmp_path, monkeypatch, parts_alone):
    """Nothing can cut it: it begins with 200 seconds over the last quarter of the time, here of 12 minutes."""
    seen, now = [], iter([0.0] + [720.0 - seconds] * 200)
    monkeypatch.setattr(report.time, "perf_counter", lambda: next(now))
    report.report(tmp_path, 12, torch.device("cuda"), "", lambda cfg, repeats, limit: seen.append(cfg) or NUMBERS, "bench")
    assert any(cfg.compile for cfg in seen) == compiled and len(seen) > 40


def test_a_report_whose_time_is_over_is_a_report(tmp_path, parts_alone):
    report.report(tmp_path, 0, CPU, "", lambda *args, **more: pytest.fail("there was no time"), "bench")
    assert json.loads((tmp_path / "report.json").read_text())["parts"] == []


def test_the_training_of_a_report(tmp_path, monkeypatch, quick):
    """A real run, stopped by the clock: what its log says by then.  Of digits, where no images are found."""
    def until_it_is_stopped(command, timeout, **more):
        train.main([*command[3:], "--steps", "6", "--teacher_steps", "3", "--log_every", "2", "--eval_every", "2"])
        (tmp_path / "run" / "log.jsonl").open("a").write('{"step": 8, "metr')
        raise subprocess.TimeoutExpired(command, timeout)

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_text("of an earlier report")
    # report's alone: elsewhere torch asks other programs about this machine
    monkeypatch.setattr(report, "subprocess", SimpleNamespace(run=until_it_is_stopped, TimeoutExpired=subprocess.TimeoutExpired))
    found = report.training(tmp_path / "run", 100, CPU, "")
    assert "--preset digits" in found["command"] and "--no-compile" in found["command"]
    assert list(found["rows"]) == ["2 updates", "4 updates", "6 updates"]          # the line that was cut is left out
    assert found["ended"] == "was stopped when its time was over"
    for name, row in found["rows"].items():
        assert row["images/s"] == pytest.approx(64 * int(name[0]) / row["minutes"] / 60) and row["fd"] > 0


def test_a_training_that_fails_says_why(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 2, "", "error: the images have 30 pixels a side")
    monkeypatch.setattr(report.subprocess, "run", lambda *a, **k: failed)
    found = report.training(tmp_path / "run", 100, CPU, "")
    assert found["ended"] == "failed: error: the images have 30 pixels a side" and found["rows"] == {}


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "report", lambda *args: f"{args[:2]} {args[3]}")
    bench.main(["--report", str(tmp_path), "--minutes", "2", "--device", "cpu", "--data", "digits"])
    assert f"('{tmp_path}', 2) digits" in capsys.readouterr().out
    monkeypatch.setattr(bench, "report", lambda *args: pytest.fail("data that is not there is found first"))
    with pytest.raises(UserError, match="no data set 'nowhere'"):
        bench.main(["--report", str(tmp_path), "--device", "cpu", "--data", "nowhere"])
    with pytest.raises(UserError, match="leave --batch out"):
        bench.main(["--report", str(tmp_path), "--batch", "3"])

"""Several processes that share a batch do what one process does with the whole of it.

The processes talk over gloo on this machine's CPU; on GPUs only the transport differs.
"""

import multiprocessing
import os
import socket
import subprocess
import sys

import pytest
import torch
from test_resume import RUNS, die_at, skip_evaluation
from torch.torch_version import TorchVersion

from nano_dmd import train
from nano_dmd.engine import parallel
from nano_dmd.engine.files import UserError, command, load_tensors, read_json
from nano_dmd.engine.draw import Batch
from nano_dmd.engine.config import resolve

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["nano_dmd.train"])


def child(rank, count, port, arguments, dies, output):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    sys.stdout = sys.stderr = open(output, "a", buffering=1)     # a fork server's children escape capfd
    torch.set_num_threads(1)
    skip_evaluation(setattr)
    if dies and rank == 0:
        die_at("after checkpoint.pt", 1)
    command(lambda: train.main(arguments))


def launch(count, *arguments, dies=False, output=os.devnull):
    """Run `count` processes to their end, which for the first may be SIGKILL after its first checkpoint; exit codes.

    output: a file that gets what they print.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    together = [PROCESSES.Process(target=child, args=(i, count, port, list(arguments), dies, str(output)))
                for i in range(count)]
    for p in together:
        p.start()
    for p in together:
        p.join(120)
        p.kill()                                                  # what torchrun does to the others when one dies
    return [p.exitcode for p in together]


def train_with(count, out, *arguments):
    """The averaged generator's weights after a run of `count` processes, whose output is beside the folder."""
    codes = launch(count, *arguments, "--out", str(out), output=out.with_suffix(".txt"))
    assert codes == [0] * count, out.with_suffix(".txt").read_text()
    return load_tensors(out / "generator.safetensors")


def assert_close(a, b, atol):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda m: f"{name}: {m}")


SHORT = ["--steps", "6", "--save_every", "3", "--batch", "16", "--no-bf16", "--lr_generator", "5e-4", "--lr_critic", "5e-4"]


SLOW = {"digits dmd2, forward noised", "toy dmd with pairs"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in RUNS])
def test_two_processes_are_one_with_the_joint_batch(name, tmp_path):
    """Weights agree to 1e-6 after 6 updates of generator and critic: same batches, same noise, averaged gradients.

    The small rates matter: Adam divides by gradients that are themselves rounding errors where they should be 0.
    """
    one = train_with(1, tmp_path / "one", *RUNS[name], *SHORT)
    two = train_with(2, tmp_path / "two", *RUNS[name], *SHORT)
    assert_close(one, two, atol=1e-6)
    assert read_json(tmp_path / "two" / "report.json")["processes"] == 2


sharded = pytest.mark.skipif(torch.__version__ < "2.7", reason="FSDP2 of torch 2.6 knows no CPU")


@sharded
@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--ida", ".05", "--ema_critic", "3"]], ids=["plain", "IDA, averaged critic"])
def test_sharded_weights_train_alike(more, tmp_path):
    """--shard (FSDP2): each of two processes keeps half of every weight, and the run is that of one process to 1e-6; two or
    one resume what two began, optimiser state included."""
    arguments = [*RUNS["toy dmd2 with GAN"], *SHORT, *more]
    one = train_with(1, tmp_path / "one", *arguments)
    assert_close(train_with(2, tmp_path / "two", *arguments, "--shard"), one, atol=1e-6)
    for count in (2, 1):
        out = tmp_path / f"resumed-by-{count}"
        assert launch(2, *arguments, "--shard", "--out", str(out), dies=True)[0] != 0
        assert_close(train_with(count, out, "--resume"), one, atol=1e-6)


@sharded
@pytest.mark.slow
def test_sharded_convolutions(tmp_path):
    """The same for a U-Net and two steps.  FSDP2 wants another memory order, which rounds differently, and Adam makes steps
    of gradients that are rounding errors: so the two runs may differ by 10 percent of the way they went."""
    arguments = [*RUNS["digits dmd2, 2 steps"], *SHORT]
    one, two = train_with(1, tmp_path / "one", *arguments), train_with(2, tmp_path / "two", *arguments, "--shard")
    start = {f"net.{k}": v for k, v in load_tensors(tmp_path / "one" / "teacher.safetensors").items()}

    def distance(a, b):
        return sum((a[k] - b[k]).square().sum() for k in one).sqrt().item()

    assert distance(one, two) < 0.1 * distance(one, start)


def test_parts_of_a_batch_work_with_several_processes(tmp_path):
    """--accumulate 2 in two processes: gradients are averaged once, after the last part, and nothing hangs."""
    arguments = [*RUNS["toy dmd2 with GAN"], *SHORT, "--accumulate", "2"]
    one, two = train_with(1, tmp_path / "one", *arguments), train_with(2, tmp_path / "two", *arguments)
    assert_close(one, two, atol=1e-6)


@pytest.mark.slow
def test_a_killed_run_is_resumed_by_as_many_or_fewer(tmp_path):
    """Two processes, killed after 3 of 6 updates: resumed by two, the same bits as never killed; resumed by one, the same
    to rounding, and a message says so."""
    arguments = [*RUNS["toy dmd2 with GAN"], *SHORT]
    whole = train_with(2, tmp_path / "whole", *arguments)
    for count, atol in ((2, 0), (1, 1e-6)):
        out = tmp_path / f"resumed-by-{count}"
        assert launch(2, *arguments, "--out", str(out), dies=True)[0] != 0 and not (out / "generator.safetensors").exists()
        assert_close(train_with(count, out, "--resume"), whole, atol)
        assert ("agrees to rounding" in out.with_suffix(".txt").read_text()) == (count == 1)


def test_a_batch_that_cannot_be_shared(tmp_path):
    output = tmp_path / "output"
    assert launch(2, *RUNS["toy sid"], "--batch", "7", "--out", str(tmp_path / "run"), output=output) == [2, 2]
    assert "--batch 7 cannot be split evenly among 2 processes with --accumulate 1" in output.read_text()
    assert not (tmp_path / "run").exists()


def test_torch_too_old_to_shard(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.6.0+cpu"))
    with pytest.raises(UserError, match="--shard on a CPU needs torch 2.7, not 2.6.0"):
        parallel.begin(resolve(dict(preset="toy", shard=True)), torch.device("cpu"))


def test_a_control_that_several_processes_do_not_train_is_said(monkeypatch, capsys):
    for name, value in dict(RANK="0", WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda **args: None)
    parallel.begin(resolve(dict(preset="digits", method="dmd")), torch.device("cpu"))
    assert "the control is not trained" in capsys.readouterr().err


ENDS = """
import atexit, os

class Witness:
    def __del__(self):
        os.write(1, b"the interpreter shuts down.")

atexit.register(os.write, 1, b"exit handlers run.")
witness = Witness()
"""


def test_torchrun(tmp_path):
    """The command of the README, with the real launcher.  Its two processes end without the interpreter's shutdown, in
    which a thread of gloo's may abort them; the launcher itself, which has no such threads, goes through it."""
    (tmp_path / "sitecustomize.py").write_text(ENDS)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
                           "-m", "nano_dmd.train", *RUNS["toy sid"], *SHORT, "--out", str(tmp_path / "run")],
                          capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "run" / "report.json")["processes"] == 2
    assert done.stdout.count("seconds") and done.stdout.count("pictures and numbers are in") == 1
    assert done.stdout.count("exit handlers run.") == done.stdout.count("the interpreter shuts down.") + 2


def test_draws_are_rows_of_the_joint_draw(monkeypatch):
    """What a batch in process r of N draws are rows r n ... (r + 1) n of what one process draws for N n samples."""
    def draw(rank, count, n):
        monkeypatch.setattr(parallel, "place", lambda: (rank, count))
        torch.manual_seed(0)
        batch, x = Batch(torch.zeros(1, n, 3)), torch.zeros(n, 3)
        return *batch.noising("karras(0.01,10)", x), *batch.noising("lognormal(-1,1)", x)

    parts = [torch.cat(v) for v in zip(*[draw(rank, 3, 4) for rank in range(3)])]
    torch.testing.assert_close(parts, list(draw(0, 1, 12)), rtol=0, atol=0)

"""A method is a row, truly: one that somebody adds from outside goes through every command, and no other file knows its name.

Without this a new method would need a place in the loop, in the plots, in the tables: what the two lists are there to spare.
"""

import ast
import io
import json
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from nano_dmd import bench, compare, evaluate, plot, sample, train
from nano_dmd.dmd_loss import descend
from nano_dmd.engine.config import resolve
from nano_dmd.engine.files import UserError, load_checkpoint, read_json
from nano_dmd.gan import gan_generator_loss
from nano_dmd.methods import DISC, FAKE, METHODS, Method, needs
from nano_dmd.sid_loss import sid_loss

ROOT = Path(__file__).parents[1]
TINY = ["--device", "cpu", "--threads", "1", "--teacher_steps", "2", "--steps", "6", "--batch", "8", "--log_every", "2",
        "--sample_every", "3", "--save_every", "3", "--w_gan", ".1", "--w_disc", ".03"]
ROW = " ".join(["sid_gan", *TINY])
LOSSES = {"sid_loss", "gan_generator_loss", "denoising_loss", "gan_critic_loss"}


def in_this_process(arguments, **more):
    with redirect_stdout(io.StringIO()):
        train.main(arguments[3:])
    return SimpleNamespace(returncode=0, stderr="")


@pytest.fixture(scope="module")
def added():
    """SiD with DMD2's GAN, and nothing else changed; metrics of 1 draw instead of 5, the teacher's of 2 steps."""
    real = evaluate.measure
    with pytest.MonkeyPatch.context() as patch:
        row = Method([("w_sid", sid_loss), ("w_gan", gan_generator_loss)], [FAKE, DISC], needs=("real",))
        patch.setitem(METHODS, "sid_gan", row)
        patch.setattr(evaluate, "measure", lambda sample, data, draws=1, k=1, n=0: real(sample, data, 1, k, n))
        patch.setattr(evaluate, "heun", partial(evaluate.heun, steps=2))
        patch.setattr(compare, "subprocess", SimpleNamespace(run=in_this_process))
        yield row


@pytest.fixture(scope="module")
def compared(added, tmp_path_factory):
    """(folder, printed text) of a comparison of the new row with one that is there already."""
    out, printed = tmp_path_factory.mktemp("compared"), io.StringIO()
    rows = [ROW, ROW.replace("sid_gan", "sid")]
    with redirect_stdout(printed):
        compare.main(["--preset", "digits", "--seeds", "1", "--out", str(out), *rows])
    return out, printed.getvalue()


@pytest.fixture
def run(compared):
    """The finished run of the new row, seed 0."""
    folder, = compared[0].glob("sid_gan*/0")
    return folder


def printed(main, *argv):
    with redirect_stdout(io.StringIO()) as text:
        main([str(v) for v in argv])
    return text.getvalue()


def test_it_trains_and_reports(run):
    saved, report = load_checkpoint(run / "checkpoint.pt"), read_json(run / "report.json")
    assert saved["step"] == 6 and list(report["rows"]) == ["real halves", "teacher", "sid_gan"]
    assert report["rows"]["sid_gan"].keys() >= {"fd", "recall", "seconds", "speed-up"}
    assert not all(torch.equal(v, saved["nets"]["ema"][k]) for k, v in saved["nets"]["generator"].items())


def test_it_logs_every_loss_and_diagnoses(run):
    """Values by noise level of all four losses; gradients at the samples of the generator's two."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert LOSSES <= line.keys() and set(line["by_sigma"]) == LOSSES
        assert set(line["grad"]) == {"sid_loss", "gan_generator_loss"} and all(v > 0 for v in line["grad"].values())
        assert all(v > 0 for v in line["mesm"] + line["fake_loss"])


def test_it_is_shown_beside_the_others(compared):
    out, text = compared
    result = read_json(out / "compare.json")
    assert [row.split()[0] for row in result] == ["sid_gan", "sid", "real", "teacher"]
    assert {"sid_gan", "sid", "teacher"} <= {line.split()[0] for line in text.splitlines() if line.strip()}
    assert (out / "compare.png").stat().st_size > 5000


def test_it_resumes_to_the_bit(run, tmp_path, monkeypatch, quick):
    """Stopped after the checkpoint of step 3 and gone on with: weights, moments and log of the run that was not stopped."""
    step = train.train_step

    def stopped(nets, opts, draw, cfg, done):
        if done == 4:
            raise KeyboardInterrupt
        return step(nets, opts, draw, cfg, done)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_step", stopped)
        train.main(["--preset", "digits", "--method", "sid_gan", *TINY, "--out", str(tmp_path / "run")])
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 3
    train.main(["--resume", "--out", str(tmp_path / "run")])
    whole, resumed = (load_checkpoint(folder / "checkpoint.pt") for folder in (run, tmp_path / "run"))
    torch.testing.assert_close(resumed["nets"], whole["nets"], rtol=0, atol=0)
    torch.testing.assert_close([o["state"] for o in resumed["opts"].values()], [o["state"] for o in whole["opts"].values()],
                               rtol=0, atol=0)
    logs = [[json.loads(line) | {"seconds": 0, "teacher": 0} for line in (folder / "log.jsonl").read_text().splitlines()]
            for folder in (run, tmp_path / "run")]
    assert logs[0] == logs[1]


def test_it_is_timed(added):
    text = printed(bench.main, "--preset", "digits", "--methods", "sid_gan,sid", "--repeats", 1, *TINY)
    rows = [line.split()[:2] for line in text.splitlines()[-2:]]
    assert rows == [["sid_gan", "1:1"], ["sid", "2:1"]]


def test_it_is_plotted_sampled_and_evaluated(run, tmp_path):
    printed(plot.main, run, "--out", tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size[0] > 500
    printed(sample.main, run, "--n", 4, "--class", 3, "--out", tmp_path / "x.npy", "--device", "cpu")
    assert np.isfinite(np.load(tmp_path / "x.npy")).all()
    text = printed(evaluate.main, run, "--device", "cpu", "--metric", "fd,accuracy")
    assert [line.split()[0] for line in text.splitlines()[-3:]] == ["real", "teacher", "sid_gan"]


def test_it_is_known_by_name(added):
    """In a preset's name, in the complaint about a name that nobody knows, and as a preset of its own."""
    assert resolve(dict(method="sid_gan")).out == "runs/digits-sid_gan"
    with pytest.raises(UserError, match="--method must be one of .*sid_gan, got 'gan'"):
        resolve(dict(method="gan"))


def test_what_a_row_needs_is_what_its_batches_bring(monkeypatch, tmp_path, quick):
    """Real data for a loss of one's own, without any GAN; none where the GAN that asks for it is off."""
    def to_real_mean(x, nets, batch, cfg):
        assert batch.real.shape == x.shape
        return descend(x, x.detach() - batch.real.mean(0)).flatten(1).mean(1)

    monkeypatch.setitem(METHODS, "to_mean", Method([("w_dm", to_real_mean)], [FAKE], needs=("real",)))
    train.main(["--preset", "digits", "--method", "to_mean", *TINY[:-4], "--out", str(tmp_path / "run")])
    assert needs(resolve(dict(method="to_mean"))) == ["real"]
    assert needs(resolve(dict(preset="digits-dmd2"))) == ["real"]
    assert needs(resolve(dict(preset="digits-dmd2", w_gan=0.0, w_disc=0.0))) == []
    assert needs(resolve(dict(preset="digits-dmd"))) == ["pairs"] and needs(resolve(dict(preset="digits-sid"))) == []
    assert needs(resolve(dict(preset="digits-dmd", w_reg=0.0))) == []


def docstrings(tree):
    """The nodes that are docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            yield node.body[0].value


def test_no_other_file_names_a_method():
    """No string in the code is a method's name, or a list of names, except in methods.py and presets.py."""
    found = []
    for path in sorted([*(ROOT / "nano_dmd").rglob("*.py"), *(ROOT / "toy").rglob("*.py")]):
        if path.name in ("methods.py", "presets.py"):
            continue
        tree = ast.parse(path.read_text())
        for node in {*ast.walk(tree)} - {*docstrings(tree)}:
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if {word.strip() for word in node.value.split(",")} & METHODS.keys():
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.value!r}")
    assert not found, found

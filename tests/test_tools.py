"""sample, evaluate, bench and compare on a run that takes seconds."""

import json

import numpy as np
import pytest
import torch

from nano_dmd import bench, compare, evaluate, presets, sample, train
from nano_dmd.checkpoint import UserError

TINY = ["--teacher_steps", "30", "--steps", "3", "--batch", "16"]


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("runs") / "digits")
    train.main(["--preset", "digits-sid", *TINY, "--out", out])
    return out


@pytest.fixture(scope="module")
def two_step_run(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("runs") / "two")
    train.main(["--preset", "digits-dmd2", *TINY, "--sigmas", "2.5,0.8", "--out", out])
    return out


def test_same_seed_same_samples(digits_run, two_step_run, tmp_path):
    """The noise of sample i follows from the seed alone, also for several steps."""
    for run in (digits_run, two_step_run):
        a, b, c = (sample.sample(run, 30, seed=s) for s in (0, 0, 1))
        assert a.shape == (30, 1, 8, 8) and torch.equal(a, b) and not torch.equal(a, c)


def test_npy_and_png(digits_run, tmp_path, capsys):
    """.npy holds the float32 samples themselves, .png a picture of them."""
    sample.main([digits_run, "--n", "12", "--out", str(tmp_path / "x.npy"), "--class", "3"])
    x = np.load(tmp_path / "x.npy")
    assert x.shape == (12, 1, 8, 8) and x.dtype == np.float32
    np.testing.assert_array_equal(x, sample.sample(digits_run, 12, label=3).numpy())
    sample.main([digits_run, "--n", "12", "--out", str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flags, sentence", [
    (["--out", "x.jpg"], "must end in .png or .npy"),
    (["--n", "0"], "--n must be at least 1"),
    (["--class", "10"], "10 classes, counted from 0"),
    (["--device", "cuda:77"], "no device"),
])
def test_sample_errors(digits_run, flags, sentence):
    with pytest.raises(UserError, match=sentence):
        sample.main([digits_run, *flags])


def test_evaluate_prints_one_metric_or_all(digits_run, capsys):
    """What evaluate prints is what training wrote in report.json."""
    evaluate.main([digits_run, "--metric", "recall"])
    lines = capsys.readouterr().out.splitlines()
    report = json.load(open(f"{digits_run}/report.json"))["rows"]
    assert lines[0].split() == ["recall"] and lines[-1].split() == ["sid", f"{report['sid']['recall']:.3g}"]
    assert [line.split("  ")[0] for line in lines[1:]] == ["real halves", "teacher", "sid"]
    with pytest.raises(UserError, match="no metric 'fid' here: choose from fd"):
        evaluate.main([digits_run, "--metric", "fid"])


def test_a_run_folder_is_a_teacher(digits_run):
    """load_teacher of a run gives the network its student started from."""
    from nano_dmd.teacher import load_teacher

    teacher = load_teacher(digits_run)
    _, same, generator = evaluate.load_run(digits_run)
    z = torch.ones(2, 1, 8, 8)
    assert torch.equal(teacher.denoiser(z, torch.ones(2)), same.denoiser(z, torch.ones(2)))
    assert teacher.shape == (1, 8, 8) and teacher.classes == 10
    assert generator.sigmas == (train.resolve({"preset": "digits-sid"}).sigma_list()[0],)


def test_bench_has_every_method_and_part(capsys):
    bench.main(["--preset", "digits", *TINY, "--repeats", "1", "--pairs", "20", "--pair_steps", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(train.METHODS)
    header = lines[1]
    for column in ("net forward ms", "G forward ms", "critic update ms", "G update ms", "whole step ms", "images/s",
                   "peak %", "memory MiB"):
        assert column in header
    assert all(float(v) > 0 for line in lines[2:] for v in line.split()[2:])


def test_bench_of_a_batch_in_parts(private_cache):
    """--accumulate: the bare network is timed on a part, as the generator is (it once got the whole batch's noise levels)."""
    cfg = presets.resolve(dict(preset="toy", method="sid", teacher_steps=5, batch=32, accumulate=2, device="cpu"))
    assert bench.bench(cfg, 1)["net forward ms"] > 0


def test_compare_reuses_finished_runs_and_reports_the_spread(tmp_path, monkeypatch):
    """Mean and standard deviation over seeds, by hand; nothing runs twice; a typo is found before anything runs."""
    rows = ["sid --teacher_steps 30 --steps 2 --batch 16"]
    result = compare.compare("toy", rows, 2, tmp_path)
    reports = [json.load(open(p))["rows"]["sid"]["sw2"] for p in sorted(tmp_path.glob("*/*/report.json"))]
    assert len(reports) == 2 and reports[0] != reports[1]
    mean, spread = result[rows[0]]["sw2"]
    assert mean == pytest.approx(sum(reports) / 2) and spread == pytest.approx(abs(reports[0] - reports[1]) / 2**0.5)
    monkeypatch.setattr(compare.subprocess, "run", lambda *a, **k: pytest.fail("ran again"))
    assert compare.compare("toy", rows, 2, tmp_path) == result
    with pytest.raises(UserError, match="unknown method 'sidd'"):
        compare.compare("toy", ["sidd"], 1, tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize("metrics", [{"fixed_fd": 0.6, "fixed_recall": 0.5}, {}])
def test_compare_draws_what_there_is(metrics, tmp_path, monkeypatch):
    """Natural images have metrics of their own, and a run without data has none: a figure all the same."""
    report = dict(rows={"sid": dict(metrics, NFE=1)}, cpu_seconds=1.0, seconds=2.0)
    monkeypatch.setattr(compare, "run_once", lambda flags, folder: report)
    compare.compare("digits", ["sid"], 2, tmp_path)
    assert (tmp_path / "compare.png").stat().st_size > 1000


def test_flags_that_all_rows_share_are_not_repeated():
    values = {"fd": (1.0, 0.0)}
    result = {"dmd2 --alpha 1 --critic_steps 1": values, "dmd2 --critic_steps 5 --alpha 1": values, "teacher": values}
    assert list(compare.shorten(result)) == ["dmd2 --critic_steps 1", "dmd2 --critic_steps 5", "teacher"]


def test_the_command_line_knows_every_method():
    assert tuple(train.METHODS) == presets.METHOD_NAMES

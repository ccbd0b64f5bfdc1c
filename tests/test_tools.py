"""sample, evaluate, bench and compare on a run that takes seconds."""

import dataclasses
import json
import subprocess
import time

import numpy as np
import pytest
import torch

from nano_dmd import bench, compare, evaluate, methods, plot, sample, train
from nano_dmd.engine import cache, config, pictures, progress, runs
from nano_dmd.metrics import inception, sets
from nano_dmd.teachers import data
from nano_dmd.engine.files import UserError, write_json
from nano_dmd.teacher import Teacher

TINY = ["--teacher_steps", "30", "--steps", "3", "--batch", "16"]


def half(denoiser, z, cond=None):
    """Stands for the teacher's 35 calls, which take longer than all else."""
    return 0.5 * z


def tiny_run(out, *flags):
    with pytest.MonkeyPatch.context() as patch:
        for module in (evaluate, progress):
            patch.setattr(module, "heun", half)
        patch.setattr(evaluate, "milliseconds", lambda *args: 1.0)
        train.main([*flags, *TINY, "--out", str(out)])
    return str(out)


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("runs") / "digits", "--preset", "digits-sid")


@pytest.fixture(scope="module")
def two_step_run(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("runs") / "two", "--preset", "digits-dmd2", "--sigmas", "2.5,0.8")


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
    (["--n", "0"], "--n: must be at least 1"),
    (["--class", "10"], "10 classes, counted from 0"),
    (["--device", "cuda:77"], "no device"),
])
def test_sample_errors(digits_run, flags, sentence):
    with pytest.raises(UserError, match=sentence):
        sample.main([digits_run, *flags])


def test_evaluate_prints_one_metric_or_all(digits_run, capsys, monkeypatch):
    """What evaluate prints is what training wrote in report.json."""
    monkeypatch.setattr(evaluate, "heun", half)
    evaluate.main([digits_run, "--metric", "recall"])
    lines = capsys.readouterr().out.splitlines()
    report = json.load(open(f"{digits_run}/report.json"))["rows"]
    assert lines[0].split() == ["recall"] and lines[-1].split() == ["sid", f"{report['sid']['recall']:.3g}"]
    assert [line.split("  ")[0] for line in lines[1:]] == ["real halves", "teacher", "sid"]
    with pytest.raises(UserError, match="no metric 'sw2' here, or not .*: choose from fd"):
        evaluate.main([digits_run, "--metric", "sw2"])


def test_a_run_folder_is_a_teacher(digits_run):
    """load_teacher of a run gives the network its student started from."""
    from nano_dmd.teacher import load_teacher

    teacher = load_teacher(digits_run)
    _, same, generator = runs.load_run(digits_run)
    z = torch.ones(2, 1, 8, 8)
    assert torch.equal(teacher.denoiser(z, torch.ones(2)), same.denoiser(z, torch.ones(2)))
    assert teacher.shape == (1, 8, 8) and teacher.classes == 10
    assert generator.sigmas == (train.resolve({"preset": "digits-sid"}).sigma_list()[0],)


def test_bench_has_every_method_and_part(capsys, monkeypatch):
    monkeypatch.setattr(bench.machine, "matmul_flops", lambda *a: 1e11)
    bench.main(["--preset", "digits", *TINY, "--repeats", "1", "--pairs", "20", "--pair_steps", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(methods.METHODS)
    header = lines[1]
    for column in ("net forward ms", "G forward ms", "critic update ms", "G update ms", "whole step ms", "images/s",
                   "peak %", "memory MiB"):
        assert column in header
    assert all(float(v) > 0 for line in lines[2:] for v in line.split()[2:])


def test_bench_takes_each_methods_threads(private_cache):
    """prepare sets them, for every command; once only the first method's were obeyed."""
    for threads in (2, 1):
        cfg = config.resolve(dict(preset="toy", method="sid", teacher_steps=5, batch=8, device="cpu", threads=threads))
        bench.bench(cfg, 1)
        assert torch.get_num_threads() == threads


def test_bench_of_a_batch_in_parts(private_cache):
    """--accumulate: the bare network is timed on a part, as the generator is (it once got the whole batch's noise levels)."""
    cfg = config.resolve(dict(preset="toy", method="sid", teacher_steps=5, batch=32, accumulate=2, device="cpu"))
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
    with pytest.raises(UserError, match="--method must be one of .*'sidd'"):
        compare.compare("toy", ["sidd"], 1, tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize("metrics", [{"fixed_fd": 0.6, "fixed_recall": 0.5}, {}])
def test_compare_draws_what_there_is(metrics, tmp_path, monkeypatch):
    """Natural images have metrics of their own, and a run without data has none: a figure all the same."""
    report = dict(rows={"sid": dict(metrics, NFE=1)}, cpu_seconds=1.0, seconds=2.0)
    monkeypatch.setattr(compare, "run_once", lambda flags, folder: report)
    compare.compare("digits", ["sid"], 2, tmp_path)
    assert (tmp_path / "compare.png").stat().st_size > 1000


def test_ctrl_c_ends_a_comparison(tmp_path, monkeypatch):
    """The first row's run has made the teacher; the next is interrupted, and what waits does not start."""
    started = []

    def run(settings, folder):
        started.append(folder)
        if len(started) == 2:
            raise KeyboardInterrupt
        time.sleep(0.05)
        return dict(rows={"sid": {}}, cpu_seconds=1.0, seconds=2.0)

    monkeypatch.setattr(compare, "run_once", run)
    with pytest.raises(KeyboardInterrupt):
        compare.compare("toy", ["sid"], 20, tmp_path)
    assert len(started) < 10


def test_density_counts_what_is_inside():
    """Four cells of a square of 2.4.  A point just outside belongs to none.  White where there is none, darker where one is."""
    points = torch.tensor([[-1.205, -1.0], [1.0, -1.205], [0.5, 0.5], [float("nan"), 0.0]])
    assert (pictures.density(points, 2)[0] < 1).tolist() == [[False, True], [False, False]]


def test_flags_that_all_rows_share_are_not_repeated():
    values = {"fd": (1.0, 0.0)}
    result = {"dmd2 --alpha 1 --critic_steps 1": values, "dmd2 --critic_steps 5 --alpha 1": values, "teacher": values}
    assert list(compare.shorten(result)) == ["dmd2 --critic_steps 1", "dmd2 --critic_steps 5", "teacher"]


def test_the_command_line_knows_every_method(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    assert " | ".join(methods.METHODS) in " ".join(capsys.readouterr().out.split())       # over two lines


# ---- compare: what counts as a finished run, and what is said of one that died


def test_a_run_of_other_settings_is_not_ones_own(tmp_path, monkeypatch):
    """A folder with another preset, another batch or another seed: one sentence; what does not change the result may differ."""
    monkeypatch.setattr(compare.subprocess, "run", lambda *a, **k: pytest.fail("a run was started"))
    settings = compare.parse_row("toy", "sid --batch 8")
    write_json(tmp_path / "config.json", dataclasses.asdict(config.resolve(settings | {"out": "elsewhere", "device": "cuda"})))
    write_json(tmp_path / "report.json", dict(rows={"sid": {"sw2": 1.0}}, cpu_seconds=1, seconds=2))
    assert compare.run_once(settings, tmp_path)["rows"]["sid"]["sw2"] == 1
    for other, said in ((compare.parse_row("digits", "sid --batch 8"), "a run with preset toy, not digits"),
                        (compare.parse_row("toy", "sid --batch 9"), "batch 8, not 9"), (settings | {"seed": 1}, "seed 0, not 1")):
        with pytest.raises(UserError, match=f"{said}: choose another --out"):
            compare.run_once(other, tmp_path)


@pytest.mark.parametrize("report", ["{}", "[]", "null", '{"rows": {}, "cpu_seconds": 1, "seconds": 2}', "[" * 10**5, "1" * 5000,
                                    '{"rows": {"sid": {"sw2": "x"}}, "cpu_seconds": 1, "seconds": 2}', '{"rows": {"sid": null}}',
                                    '{"rows": {"sid": {"sw2": 1}}, "seconds": 2}'], ids=lambda r: r[:40])
def test_a_damaged_report_is_one_sentence(tmp_path, report):
    settings = compare.parse_row("toy", "sid")
    write_json(tmp_path / "config.json", dataclasses.asdict(config.resolve(settings)))
    (tmp_path / "report.json").write_text(report)
    with pytest.raises(UserError, match="report.json"):
        compare.run_once(settings, tmp_path)


@pytest.mark.parametrize("code, stderr, said", [
    (-9, "", "was killed by signal 9 .SIGKILL.: the memory may have been full"), (-15, "bar 10%",
    "was killed by signal 15 .SIGTERM."),
    (2, "bar\nerror: sid_loss is nan\nbar", "failed: error: sid_loss is nan"), (1, "", "ended with exit code 1: it said nothing"),
    (1, "Traceback\nKeyError: 3", "ended with exit code 1: KeyError: 3"), (-200, "", "was killed by signal 200 .unknown.")])
def test_a_run_that_dies_is_reported_by_its_reason(tmp_path, monkeypatch, code, stderr, said):
    monkeypatch.setattr(compare.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess([], code, "", stderr))
    with pytest.raises(UserError, match=f"the run in {tmp_path} {said}"):
        compare.run_once(compare.parse_row("toy", "sid"), tmp_path)


def test_a_row_becomes_the_command_line_of_its_run(tmp_path, monkeypatch):
    """What is asked for is what nano_dmd.train resolves: numbers, texts, switches.  The default folder has the preset's name."""
    seen = []
    failed = subprocess.CompletedProcess([], 2, "", "")
    monkeypatch.setattr(compare.subprocess, "run", lambda argv, **k: seen.append(argv[3:]) or failed)
    settings = compare.parse_row("toy", "dmd2 --w_gan 0.1 --w_disc=3e-2 --no-bf16 --dm_sigma 'lognormal(-1, 1)'") | {"seed": 7}
    with pytest.raises(UserError):
        compare.run_once(settings, tmp_path)
    p = config.parser("x", "")
    config.add_config_flags(p)
    assert config.resolve(vars(p.parse_args(seen[0]))) == config.resolve(settings | {"out": str(tmp_path)})
    out = []
    monkeypatch.setattr(compare, "compare", lambda preset, rows, seeds, out_, *a: out.append(out_) or {"sid": {"fd": (1.0, 0.0)}})
    compare.main(["--preset", "toy", "sid"])
    compare.main(["--preset", "digits", "sid"])
    assert out == ["runs/compare-toy", "runs/compare-digits"]


def test_rows_with_the_same_flags_in_another_order_stay_two():
    values = {"fd": (1.0, 0.0)}
    result = {"sid --alpha 1 --batch 8": values, "sid --batch 8 --alpha 1": values}
    assert compare.shorten(result) == result


def test_what_cannot_be_told_is_a_dash_and_null():
    """A metric that one of two runs could not tell has no mean."""
    reports = [dict(rows={"sid": {"fd": v, "recall": 0.5}}, cpu_seconds=1.0, seconds=2.0) for v in (1.0, None)]
    found = compare.summary(reports, "sid")
    assert found["fd"] == (None, 0.0) and found["recall"] == (0.5, 0.0) and "-" in compare.as_text({"sid": found})


# ---- metrics: names and small sets


@pytest.mark.parametrize("text, data, expected", [
    ("fid, isc", "x", (["fid", "isc"], "inception")), (" kid ,fid", "x", (["fid", "kid"], "inception")),
    ("recall", "digits", (["recall"], "own")), ("recall,fid", "digits", (["fid", "recall"], "inception")),
    ("precision", "x", (["precision"], "inception")), ("fixed_fd", "x", (["fixed_fd"], "own")), (None, "x", ([], "own")),
    ("fid,kdi", "x", "no metric 'kdi'"), ("isc,fixed_fd", "x", "no metric 'fixed_fd' here, or not in one call"),
    ("", "x", "no metric ''"), ("fd", "x", "no metric 'fd'"), ("fid,", "x", "no metric ''")])
def test_names_of_metrics(text, data, expected):
    teacher = Teacher("images", None, (1, 8, 8), 10, 0.5, data, None, {})
    if isinstance(expected, tuple):
        assert evaluate.wanted_metrics(text, teacher, data) == expected
        return
    with pytest.raises(UserError, match=expected):
        evaluate.wanted_metrics(text, teacher, data)


def test_names_of_metrics_of_points_and_of_other_channels():
    for shape, said in (((2,), "choose from sw2, in3, modes"), ((2, 8, 8), "choose from fixed_fd")):
        with pytest.raises(UserError, match=said):
            kind = "points" if len(shape) == 1 else "images"
            evaluate.wanted_metrics("fid", Teacher(kind, None, shape, 0, 0.5, "", None, {}), "")


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_few_images_have_the_metrics_they_can_have(count, tmp_path, capsys):
    """One image, a pair, five: a report all the same, "-" in the table, null in JSON; no number that means nothing."""
    pixels = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = data.TensorData(pixels)
    teacher = Teacher("images", lambda x, sigma, cond: 0.5 * x, (3, 8, 8), 0, 0.5, "", None, {"seconds": 0})
    generator = torch.nn.Linear(1, 1)
    generator.forward, generator.sigmas = lambda z, cond: z[0], (1.0,)
    rows = evaluate.report_rows(generator, teacher, images, config.Config(method="sid", eval_images=count), draws=2)
    assert (rows["sid"]["fixed_fd"] is None) == (count < 2) and (rows["sid"]["fixed_recall"] is None) == (count < 6)
    halves = rows.get("real halves", {"fixed_recall": None})
    assert ("real halves" in rows) == (count > 1) and (halves["fixed_recall"] is None) == (count < 12)
    write_json(tmp_path / "x.json", rows)
    assert "NaN" not in (tmp_path / "x.json").read_text() and sets.table(rows)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_few_images_on_inception_features(count, monkeypatch):
    """kid needs two images, precision and recall four; what is not there is None, and the call ends well."""
    features = lambda net, images, device: [torch.randn(len(images), 2048), torch.randn(len(images), 1008)]           # noqa: E731
    monkeypatch.setattr(inception, "load_inception", lambda *a: None)
    monkeypatch.setattr(inception, "inception_features", features)
    found = inception.inception_metrics(range(count), range(count))
    assert [name for name, v in found.items() if v is None] == {1: ["fid", "kid", "precision", "recall"],
                                                                3: ["precision", "recall"], 4: []}[count]


# ---- pictures and figures


def test_pictures_are_rounded():
    """Every 8-bit level comes back; torchvision's own conversion cuts 63 of them to the level below."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    picture = pictures.to_pil(pictures.tile(data.to_float(levels), 1, scale=1))
    assert np.array_equal(np.asarray(picture)[..., 0], levels[0, 0].numpy())


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pictures_of_any_channels(channels):
    assert pictures.tile(torch.zeros(2, channels, 8, 8), 2).shape == (3, 40, 76)


@pytest.mark.parametrize("name, start", [("x.pdf", b"%PDF"), ("x.svg", b"<?xml"), ("x.png", b"\x89PNG"), ("x.JPG", b"\xff\xd8")])
def test_a_plot_has_the_format_its_name_says(name, start, toy_run, tmp_path):
    plot.main([str(toy_run), "--out", str(tmp_path / name)])
    assert (tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(UserError, match="must end in .png, .pdf"):
        plot.main([str(toy_run), "--out", "x.docx"])


# ---- the same settings on other data, and rows of other teachers


def test_a_report_on_other_data_is_not_ones_own(tmp_path, monkeypatch):
    """The folder's name is the same, its images are not: compare says so, and so does a resume."""
    monkeypatch.setattr(compare.subprocess, "run", lambda *a, **k: pytest.fail("a run was started"))
    (tmp_path / "imgs").mkdir()
    (tmp_path / "imgs" / "a.png").write_text("1")
    settings = compare.parse_row("digits", f"dmd2 --data {tmp_path / 'imgs'}")
    cfg = config.resolve(settings)
    write_json(tmp_path / "config.json", dataclasses.asdict(cfg))
    write_json(tmp_path / "report.json", dict(rows={"dmd2": {}}, cpu_seconds=1, seconds=2, sources=cache.sources(cfg)))
    assert compare.run_once(settings, tmp_path)["seconds"] == 2
    (tmp_path / "imgs" / "a.png").write_text("two")
    with pytest.raises(UserError, match="holds a run on another --data of that name"):
        compare.run_once(settings, tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="config.json: it is not there"):
        compare.run_once(settings, tmp_path)


def test_a_teacher_that_rows_do_not_share_is_left_out(tmp_path, monkeypatch):
    """Two targets have two teachers: one row of numbers would be taken for both's."""
    def report(settings, folder):
        return dict(rows={"teacher": {"sw2": 1.5, "modes": 8}, "sid": {"sw2": 2.0, "modes": 8}}, cpu_seconds=1.0, seconds=2.0)

    monkeypatch.setattr(compare, "run_once", report)
    for row in ("sid --alpha 1", "sid --teacher_seed 1"):        # the exact mixture is the same
        found = compare.compare("toy", ["sid", row], 2, tmp_path)
        assert found["teacher"] == {"sw2": (1.5, 0.0), "modes": (8, 0.0)}
    assert "teacher" not in compare.compare("toy", ["sid", "sid --teacher toy:grid25"], 2, tmp_path)

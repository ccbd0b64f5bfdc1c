"""python -m toy: the race, its table, and pictures that show what they claim to show."""

import copy
import io
import json
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import toy.__main__ as toy
from conftest import TOY
from nano_dmd import compare, evaluate, train
from nano_dmd.denoiser import FromFlow
from nano_dmd.engine.runs import load_run
from nano_dmd.metrics import points
from nano_dmd.engine.files import UserError, command, load_tensors
from nano_dmd.dmd_loss import dmd_gradient
from nano_dmd.teacher import load_teacher
from toy import plots
from toy.mixtures import MIXTURES, Mixture

FLAGS = "--teacher_steps 30 --batch 32 --log_every 20"
RACE = ["--methods", "dmd2,sid", "--seeds", "2", "--steps", "40", "--sigma", "0.1,1", "--flags", FLAGS]
ROLES = dict(real=plots.REAL, fake=plots.FAKE, teacher=plots.TEACHER, gradient=plots.GRADIENT)


def measure_little(sample, data, draws=5, k=1, n=0):
    """The metrics of 500 points instead of 250,000."""
    return points.mixture_metrics(sample(torch.randn(1, 500, 2), None), data)


def in_this_process(arguments, capture_output, text):
    with redirect_stdout(io.StringIO()):
        train.main(arguments[3:])
    return SimpleNamespace(returncode=0, stderr="")


@pytest.fixture(scope="module")
def race(tmp_path_factory):
    """(folder, printed text) of a whole race of two methods and two seeds, without the cost of new processes."""
    out, printed = tmp_path_factory.mktemp("race"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(compare, "subprocess", SimpleNamespace(run=in_this_process))
        patch.setattr(evaluate, "measure", measure_little)
        toy.main([*RACE, "--out", str(out)])
    return out, printed.getvalue()


def pixels(path):
    """(H, W, 3) float in [0, 1] of a PNG."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")) / 255


def role(panel):
    """Whose colour a panel (H, W, 3) is drawn in: the role nearest in hue to its coloured pixels."""
    colour = panel[np.ptp(panel, axis=2) > 0.2]
    assert len(colour) > 100

    def tint(c):
        return (c - c.min(-1, keepdims=True)) / np.ptp(c, axis=-1, keepdims=True)

    roles = {name: tint(np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)])) for name, c in ROLES.items()}
    return min(roles, key=lambda name: np.abs(tint(colour).mean(0) - roles[name]).sum())


def test_table_has_every_method_and_column(race):
    """Methods by their names, not by their flags; mean (spread) for students, no CPU seconds for the teacher."""
    lines = race[1].splitlines()
    head = next(i for i, line in enumerate(lines) if line.split()[:1] == ["sw2"])
    assert lines[head].split() == ["sw2", "modes", "in3", "weight_error", "CPU", "s"]
    rows = {line.split()[0]: line for line in lines[head + 1 : head + 4]}
    assert list(rows) == ["dmd2", "sid", "teacher"]
    assert rows["dmd2"].count("(") >= 3 and rows["teacher"].count("(") == 0 and rows["teacher"].rstrip().endswith("-")
    assert "mean (standard deviation) over seeds; seeds: 2" in lines


def test_compare_files_and_runs_are_there(race):
    saved = json.loads((race[0] / "compare.json").read_text())
    assert {row.split()[0] for row in saved} >= {"dmd2", "sid", "teacher"} and (race[0] / "compare.txt").is_file()
    assert len(list(race[0].glob("*/[01]/generator.safetensors"))) == 4


def test_samples_png_shows_target_teacher_and_students(race):
    """Four panels side by side, each in its own role's colour."""
    panels = np.split(pixels(race[0] / "samples.png"), 4, axis=1)
    assert [role(p) for p in panels] == ["real", "teacher", "fake", "fake"]


def test_field_png_has_a_row_per_sigma(race):
    """Two noise levels: real score, fake score, difference; generator samples are dots in the fake colour."""
    image = pixels(race[0] / "field.png")
    assert image.shape[:2] == (860, 1200)
    for row in np.split(image, 2):
        left, middle, right = np.split(row, 3, axis=1)
        assert role(middle) == "fake" and all(p.std() > 0.05 for p in (left, middle, right))
        assert role(left) in ("real", "fake") and np.abs(left - right).mean() > 0.02


def test_movie_moves(race):
    """A frame per moment, constant axes, the last held longer; between the first and the last the samples moved."""
    with Image.open(race[0] / "samples.gif") as movie:
        frames, durations = [], []
        for i in range(movie.n_frames):
            movie.seek(i)
            frames.append(np.asarray(movie.convert("RGB")) / 255)
            durations.append(movie.info["duration"])
    assert len(frames) == len(toy.moments_of(40)) and frames[0].shape == (280, 520, 3)
    assert durations[-1] > 10 * durations[0]
    assert np.abs(frames[0] - frames[-1]).mean() > 0.005 and all(f.std() > 0.05 for f in frames)
    assert (race[0] / "samples.gif").stat().st_size < 1.5e6
    border = {tuple((f < 0.3).all(2).sum(i).argmax() for i in (0, 1)) for f in frames}      # where the axes' lines are
    assert len(border) == 1


def test_watch_is_the_training_run(race):
    """What the movie shows at its end is, bit for bit, what the race's seed 0 left in its folder."""
    folder = next(race[0].glob("sid*/0"))
    cfg = toy.config(f"sid --teacher toy:ring8 --steps 40 {FLAGS}")
    seen = {step: copy.deepcopy(nets.ema.state_dict()) for step, nets in toy.watch(cfg, [0, 7, 40])}
    saved = load_tensors(folder / "generator.safetensors")
    assert list(seen) == [0, 7, 40]
    assert all(torch.equal(saved[k], v) for k, v in seen[40].items())
    assert not all(torch.equal(saved[k], v) for k, v in seen[7].items())


def test_pictures_can_be_left_out(race, monkeypatch, capsys):
    """--no-pictures stops after the table; finished runs are not run again."""
    monkeypatch.setattr(toy, "draw_samples", lambda *a: pytest.fail("drawn"))
    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=lambda *a, **b: pytest.fail("run again")))
    toy.main([*RACE, "--out", str(race[0]), "--no-pictures"])
    assert "sid" in capsys.readouterr().out


def test_without_matplotlib_there_is_the_table_and_a_sentence(race, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    toy.main([*RACE, "--out", str(race[0])])
    *table, sentence = capsys.readouterr().out.strip().splitlines()
    assert sentence == 'pictures need matplotlib: pip install -e ".[tutorials]"'
    assert any("sw2" in line for line in table)


@pytest.mark.parametrize("target", MIXTURES)
def test_field_of_every_target(target, tmp_path):
    """The scores of every mixture at a noise level can be drawn, also for fewer updates than EARLY."""
    cfg = toy.config(f"dmd2 --teacher toy:{target} --steps 3 {FLAGS}")
    toy.draw_field(tmp_path / "field.png", cfg, [0.3])
    assert pixels(tmp_path / "field.png").shape == (450, 1200, 3) and pixels(tmp_path / "field.png").std() > 0.05


def test_arrows_are_the_scores_and_minus_the_dmd_gradient():
    """The third panel points where DMD moves a sample: against dmd_gradient."""
    real, fake, points, sigma = MIXTURES["ring8"](), MIXTURES["grid25"](), plots.lattice(6), torch.full((36,), 0.4)
    fig = plots.field_figure(fake.sample(50)[0], points, {0.4: (real.score(points, sigma), fake.score(points, sigma))})
    from matplotlib.quiver import Quiver

    shown = []
    for ax in fig.axes:
        quiver = next(c for c in ax.collections if isinstance(c, Quiver))
        shown.append(torch.tensor(np.stack([quiver.U, quiver.V], 1)))
        np.testing.assert_allclose(quiver.XY, points.numpy(), rtol=1e-6)
    g = dmd_gradient(points, real.denoise(points, sigma), fake.denoise(points, sigma))
    for arrows, expected in zip(shown, (real.score(points, sigma), fake.score(points, sigma), -g)):
        cosine = torch.nn.functional.cosine_similarity(arrows, expected)
        torch.testing.assert_close(cosine, torch.ones(36), rtol=0, atol=1e-4)


def test_visits_is_the_noised_density():
    """Samples plus Gaussian noise are a mixture: visits is its density over the largest on the lattice."""
    x, points = torch.randn(20, 2), plots.lattice(7)
    density = Mixture(x, 1e-6).log_prob(points, 0.3).exp()
    torch.testing.assert_close(plots.visits(points, x, 0.3), density / density.max(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 9, 11, 400, 7000])
def test_moments_grow_from_start_to_end(steps):
    when = toy.moments_of(steps)
    assert when[0] == 0 and when[-1] == steps and when == sorted(set(when)) and len(when) <= 40
    assert len(when) == 40 or steps <= 400


def test_several_steps_are_sampled(tmp_path):
    """A two-step generator gets one noise per step."""
    cfg = toy.config(f"sid --teacher toy:ring8 --steps 2 --sigmas 1,0.3 {FLAGS}")
    [(_, nets)] = toy.watch(cfg, [2])
    assert toy.sample(nets.ema, 10).shape == (10, 2)


@pytest.mark.parametrize("arguments, says", [
    (["--target", "ring9"], "no target 'ring9': choose from ring8,"),
    (["--methods", "dmd,gan"], "no method 'gan': choose from dmd,"),
    (["--methods", ""], "no method ''"),
    (["--seeds", "0"], "--seeds: must be at least 1, got 0"),
    (["--jobs", "-1"], "--jobs: must be at least 1, got -1"),
    (["--steps", "-5"], "--steps: must be at least 0, got -5"),
    (["--sigma", "0.1,zero"], "--sigma must be positive numbers"),
    (["--sigma", "-1"], "--sigma must be positive numbers"),
    (["--flags", "--lr_generator -1"], "--lr_generator must be at least 1e-12"),
    (["--flags", "--teacher digits"], "--teacher cannot stand in --flags"),
    (["--flags", '--data "'], "cannot read the row"),
    (["--flags", "--method sid"], "--method cannot stand"),
    (["--flags", "--nonsense 1"], "--nonsense 1"),
])
def test_mistakes_are_one_sentence(arguments, says, tmp_path, capsys):
    """Exit code 2 and one line, before anything is trained or written."""
    with pytest.raises(SystemExit) as stopped:
        command(lambda: toy.main([*arguments, "--out", str(tmp_path / "out")]))
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and says in printed and printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        toy.main(["--help"])
    text = capsys.readouterr().out
    flags = ("--target", "--methods", "--seeds", "--steps", "--flags", "--jobs", "--sigma", "--out", "--no-pictures")
    assert not stopped.value.code and all(flag in text for flag in flags)


def test_unwritable_picture_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        plots.save_movie(tmp_path / "file" / "x.gif", [Image.new("RGB", (8, 8))] * 2)


def test_a_flow_teacher_of_a_mixture(tmp_path, quick):
    """flow:ring8 is a flow network trained here: teacher, student and fake score are one, read again from the run's folder."""
    train.main([*TOY, "--teacher", "flow:ring8", "--method", "sid", "--steps", "2", "--out", str(tmp_path / "run")])
    _, teacher, generator = load_run(tmp_path / "run")
    assert type(teacher.denoiser) is type(generator.net) is FromFlow
    assert (teacher.data, teacher.sigma_data, teacher.kind) == ("toy:ring8", 0.5, "points")
    trained = load_teacher("flow:ring8", steps=50)
    x, sigma = torch.randn(3, 2), torch.tensor([0.1, 1.0, 20.0])
    assert torch.equal(trained.denoiser(x, sigma), teacher.denoiser(x, sigma))
    with pytest.raises(UserError, match="no mixture 'toy:nothing'"):
        load_teacher("flow:nothing")

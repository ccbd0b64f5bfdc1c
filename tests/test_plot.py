"""python -m nano_dmd.plot: what the four panels show is what the log says."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from nano_dmd import plot
from nano_dmd.engine.files import UserError, command
from nano_dmd.engine.diagnostics import LEVELS


@pytest.fixture
def run(toy_run, tmp_path):
    """A run folder that holds nothing but the log of a real run."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "log.jsonl").write_text((toy_run / "log.jsonl").read_text())
    return folder


def curves(ax):
    """{label: (x, y)} of a panel."""
    return {line.get_label(): line.get_data() for line in ax.lines}


def test_panels_show_the_log(run):
    """Every number of the log at its step, in the panel that is named after it."""
    log = plot.read_log(run)
    fig = plot.diagnostics([run])
    mesm, fake, grad, samples = fig.axes
    steps = [r["step"] for r in log]
    assert len(steps) > 1
    for ax, key in ((mesm, "mesm"), (fake, "fake_loss")):
        assert ax.get_title().startswith(key) and ax.get_yscale() == "log"
        for i, level in enumerate(LEVELS):
            np.testing.assert_array_equal(curves(ax)[f"sigma {level:g}"], [steps, [r[key][i] for r in log]])
    np.testing.assert_array_equal(curves(grad)["sid_loss"], [steps, [r["grad"]["sid_loss"] for r in log]])
    assert set(curves(samples)) == {"x_mean", "x_std", "spread", "x_std of the teacher", "spread of the teacher"}
    np.testing.assert_array_equal(curves(samples)["spread"], [steps, [r["spread"] for r in log]])
    assert all(ax.get_xlabel() and ax.get_ylabel() and ax.get_legend() for ax in fig.axes)


def test_teacher_is_a_reference_where_the_log_has_it(run):
    lines = [json.loads(line) | {"teacher": {"x_std": 0.5, "spread": 0.4}} for line in open(run / "log.jsonl")]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = plot.diagnostics([run]).axes[3]
    assert curves(samples)["spread of the teacher"][1] == [0.4, 0.4] and "x_mean of the teacher" not in curves(samples)


@pytest.mark.filterwarnings("error:Data has no positive values")
def test_a_fake_score_that_is_the_teacher_has_no_logarithm(run):
    """regression alone: d_fake = d_real throughout, so the gap is drawn on a linear scale, without matplotlib's warning."""
    lines = [json.loads(line) | {"mesm": [0.0] * len(LEVELS)} for line in open(run / "log.jsonl")]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    fig = plot.diagnostics([run])
    fig.canvas.draw()
    assert [ax.get_yscale() for ax in fig.axes[:2]] == ["linear", "log"]


def test_several_runs_differ_in_line_style(run, tmp_path):
    """A quantity keeps its colour and appears once in the legend; the runs are named above the panels."""
    second = tmp_path / "second"
    second.mkdir()
    (second / "log.jsonl").write_text((run / "log.jsonl").read_text().replace("sid_loss", "dmd_loss"))
    fig = plot.diagnostics([run, second])
    first, other = [line for line in fig.axes[3].lines if line.get_label() == "spread"]
    assert first.get_color() == other.get_color() and first.get_linestyle() != other.get_linestyle()
    assert [t.get_text() for t in fig.axes[2].get_legend().get_texts()] == ["sid_loss", "dmd_loss"]
    assert [t.get_text() for t in fig.legends[0].get_texts()] == [f"{run} (20 updates)", f"{second} (20 updates)"]


def test_picture_is_written(run, tmp_path, capsys):
    """By plot_run and by the command line; four panels of ink."""
    assert plot.plot_run(run) == run / "diagnostics.png"
    plot.main([str(run), str(run), "--out", str(tmp_path / "two.png")])
    assert "two.png" in capsys.readouterr().out
    for path in (run / "diagnostics.png", tmp_path / "two.png"):
        with Image.open(path) as image:
            assert image.format == "PNG" and image.size == (1200, 900)
            pixels = np.asarray(image.convert("RGB")) / 255
        assert all(panel.std() > 0.05 for row in np.split(pixels, 2) for panel in np.array_split(row, 2, axis=1))


def test_one_line_and_no_critic_is_enough(run):
    """The first lines of a run, and a method without losses by noise level, can be drawn."""
    line = json.loads(open(run / "log.jsonl").readline())
    line = {k: v for k, v in line.items() if not k.endswith("_loss") or k == "fake_loss"}
    line |= {"regression_loss": 0.1, "grad": {"regression_loss": 1.0}, "by_sigma": {}}
    (run / "log.jsonl").write_text(json.dumps(line))
    fig = plot.diagnostics([run])
    assert curves(fig.axes[2])["regression_loss"][1] == [1.0]
    plot.save_figure(fig, run / "x.png")


@pytest.mark.parametrize("text, says", [(None, "is this a run folder?"), ("", "is empty"), ('{"step": 1', "is damaged"),
                                        ("3\n", "damaged in line 1: it is 3, not a table"),
                                        ('{"step": 1}\n', "it has no x_mean"), ("\n\n3\n", "damaged in line 3"),
                                        ("[" * 10**5, "is damaged"),
                                        ('{"step": %s}' % ("1" * 5000), "is damaged")])
def test_bad_logs_are_one_sentence(text, says, run, capsys):
    if text is None:
        (run / "log.jsonl").unlink()
    else:
        (run / "log.jsonl").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        command(lambda: plot.main([str(run)]))
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and says in printed and str(run) in printed and printed.count("\n") == 1


def test_too_many_runs_are_refused(run):
    with pytest.raises(UserError, match="at most 5 runs fit in one figure, got 6"):
        plot.diagnostics([run] * 6)


def test_missing_matplotlib_is_one_sentence(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stopped:
        command(lambda: plot.main([str(run)]))
    assert stopped.value.code == 2
    assert capsys.readouterr().err == 'error: pictures need matplotlib: pip install -e ".[tutorials]"\n'


def test_comparison_shows_mean_spread_and_the_teacher():
    """One panel a metric: a dot at each row's mean, a bar of its spread, a line at the teacher's value."""
    result = {"dmd": {"fd": (0.2, 0.05)}, "sid": {"fd": (0.3, 0.1)}, "teacher": {"fd": (0.1, 0.0)}, "real halves": {}}
    (ax,) = plot.comparison(result, ["fd"], ("teacher", "real halves")).axes
    container = ax.containers[0]
    np.testing.assert_array_equal(container.lines[0].get_xdata(), [0.2, 0.3])
    bars = [segment[:, 0] for segment in container.lines[2][0].get_segments()]
    np.testing.assert_allclose(bars, [[0.15, 0.25], [0.2, 0.4]])
    assert ax.get_xlabel() == "fd" and [t.get_text() for t in ax.get_yticklabels()] == ["dmd", "sid"]
    assert any(line.get_label() == "teacher" and set(line.get_xdata()) == {0.1} for line in ax.lines)

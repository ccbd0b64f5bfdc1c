"""The metrics themselves: each against a closed form, an independent computation, or a sample made to fool it."""

import math

import pytest
import torch
from torch import nn

from closed_forms import rng
from nano_dmd import evaluate
from nano_dmd.denoiser import heun
from nano_dmd.engine import progress, runs
from nano_dmd.engine.config import resolve
from nano_dmd.engine.prepare import prepare
from nano_dmd.metrics import images, points, sets
from nano_dmd.engine.files import UserError
from nano_dmd.teachers.data import load_data
from toy.mixtures import MIXTURES, Mixture


def test_frechet_of_gaussians_with_commuting_covariances():
    """Means m apart and std a, b per axis: |m|^2 + sum (a - b)^2, exactly, for samples standardised by hand."""
    x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), (x - x.mean(0)).T, upper=False).T  # cov = I
    a, b, m = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 0.5]), torch.tensor([1.0, -1.0, 0.0])
    expected = (m.square().sum() + (a - b).square().sum()).item()                     # 2 + 1 + 0 + 6.25
    assert expected == 9.25
    assert sets.frechet(x * a, x * b + m) == pytest.approx(expected, rel=1e-10)


def test_frechet_against_an_independent_matrix_root():
    """tr (Cx Cy)^(1/2) through the eigenvalues of the plain, non-symmetric product."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(200, 8, generator=rng) @ torch.randn(8, 8, generator=rng)
    y = torch.randn(300, 8, generator=rng) @ torch.randn(8, 8, generator=rng) + 1
    cx, cy = x.double().T.cov(), y.double().T.cov()
    cross = torch.linalg.eigvals(cx @ cy).real.clamp(min=0).sqrt().sum()
    expected = (x.double().mean(0) - y.double().mean(0)).square().sum() + cx.trace() + cy.trace() - 2 * cross
    assert sets.frechet(x, y) == pytest.approx(expected.item(), rel=1e-8)
    assert sets.frechet(x, x) == pytest.approx(0, abs=1e-6)


def test_coverage_by_hand():
    """Four points on a line, 1-NN balls of radius 1; queries in the middle of a ball, on no ball, far away."""
    by = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    of = torch.tensor([[0.5], [2.0], [5.0], [100.0]])
    assert sets.coverage(of, by, k=1) == 0.5
    assert sets.coverage(by, by, k=1) == 1.0


def test_sliced_w2_of_a_shift():
    """Moving every point by v costs |v . d| in direction d: sqrt(mean over the half circle) = |v| / sqrt 2."""
    x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v = torch.tensor([0.3, -0.4], dtype=torch.float64)
    a, b, c = (points.projections(y.float()) for y in (x, x + v, x[torch.randperm(1000)]))
    assert points.sliced_w2(a, b) == pytest.approx(0.5 / math.sqrt(2), rel=1e-4)
    assert points.sliced_w2(a, c) == pytest.approx(0, abs=1e-6)


def test_true_samples_score_as_true():
    """Fresh samples of ring8: sw2 near 1, in3 = 1 - exp(-9/2) = .9889, all modes, weight error of a 50k draw."""
    ring = MIXTURES["ring8"]()
    stream = torch.Generator().manual_seed(0)
    m = evaluate.measure(lambda z, cond: ring.sample(z.shape[1], stream)[0], ring, draws=2)
    assert 0.6 < m["sw2"] < 1.5 and m["modes"] == 8 and m["weight_error"] < 0.05
    assert m["in3"] == pytest.approx(1 - math.exp(-4.5), abs=2e-3)


@pytest.mark.parametrize("spoil, metric, bad", [
    (lambda x, ring: x * (x[:, :1] > -0.6), "modes", 7),                              # the leftmost mode goes missing
    (lambda x, ring: 0.8 * x, "in3", 0.7),                                            # every mode is a bit off
])
def test_spoiled_samples_are_noticed(spoil, metric, bad):
    ring = MIXTURES["ring8"]()
    x = ring.sample(20_000, torch.Generator().manual_seed(0))[0]
    assert points.mixture_metrics(spoil(x, ring), ring)[metric] <= bad


def test_weight_error_is_the_largest_relative_error():
    """Weights 1.6 and 0.4 against uniform: 0.6."""
    skewed, ring = MIXTURES["ring8_skewed"](), MIXTURES["ring8"]()
    x = skewed.sample(100_000, torch.Generator().manual_seed(0))[0]
    assert points.mixture_metrics(x, ring)["weight_error"] == pytest.approx(0.6, abs=0.03)


def test_image_metrics_see_what_each_other_misses():
    """Class means fool accuracy, noisy copies fool the Frechet distance; recall and nearest tell."""
    data = load_data("digits")
    real = images.split_halves(data)
    assert real["accuracy"] > 0.95 and real["recall"] > 0.9 and real["fd"] < 0.4
    order, net = torch.randperm(1797, generator=torch.Generator().manual_seed(0)), images.digit_classifier(data)
    with torch.no_grad():                                         # the space of feat_fd is everybody's
        halves = [net.features(data.x[half]) for half in (order[:898], order[898:])]
    assert real["feat_fd"] == pytest.approx(sets.frechet(*halves), rel=1e-5)
    means = torch.stack([data.x[data.labels == c].mean(0) for c in range(10)])[data.labels]
    fooled = images.digit_metrics(means, data.labels, data)
    assert fooled["accuracy"] == 1.0 and fooled["recall"] < 0.1 and fooled["fd"] > 10 * real["fd"]
    copies = images.digit_metrics(data.x, data.labels, data)
    assert copies["nearest"] == pytest.approx(0, abs=1e-2) and copies["fd"] == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        net = images.digit_classifier(data)
        assert (net(data.x[1::2]).argmax(1) == data.labels[1::2]).float().mean() > 0.95   # images it never saw


def test_one_sample_for_each_digit_or_each_second_of_mnist(monkeypatch):
    """The labels asked for are those of the data; a larger set is thinned evenly."""
    seen = []
    monkeypatch.setattr(images, "digit_metrics", lambda x, labels, data: seen.append((x, labels)) or dict(fd=0.0))
    for name, count in (("digits", 1797), ("mnist", 2500)):
        data = load_data(name)
        evaluate.measure(lambda z, cond: z[0] * 0 + cond[:, None, None, None], data, draws=1)
        x, labels = seen.pop()
        assert len(x) == count and (x[:, 0, 0, 0] == labels).all()
        assert name == "digits" and torch.equal(labels, data.labels) or (torch.bincount(labels) == 250).all()


@pytest.mark.slow
def test_mnist_has_the_metrics_of_digits():
    """Its own classifier, its own neighbours; real halves are real, and grey pictures are not."""
    data = load_data("mnist")
    assert images.is_digits(data)
    real = images.split_halves(data)
    assert real["accuracy"] > 0.9 and real["recall"] > 0.9
    grey = images.digit_metrics(data.x.mean(0, keepdim=True).expand(200, -1, -1, -1), data.labels[::25], data)
    assert grey["recall"] == 0 and grey["fd"] > 5 * real["fd"] and grey["accuracy"] < 0.2


def test_the_teacher_is_guided_as_in_training(tmp_path, monkeypatch):
    """--guidance 2: the report's teacher row (70 network calls) and the log's reference are of u + 2 (c - u)."""
    cfg = resolve(dict(preset="digits", method="sid", guidance=2.0, teacher_steps=5, device="cpu"))
    teacher, nets, _, draw = prepare(cfg, torch.device("cpu"))
    asked = []
    for module in (evaluate, progress):
        monkeypatch.setattr(module, "heun", lambda denoiser, z, cond: (asked.append(denoiser), z)[1])
    monkeypatch.setattr(evaluate, "measure", lambda sample, *args: (sample(torch.zeros(1, 2, 1, 8, 8), None), {"fd": 1.0})[1])
    rows = evaluate.report_rows(nets.ema, teacher, draw.data, cfg, draws=1)
    progress.Progress(cfg, teacher, torch.device("cpu"), tmp_path)
    x, sigma, cond = torch.randn(2, 1, 8, 8), torch.ones(2), torch.tensor([1, 7])
    u, c = teacher.denoiser(x, sigma, None), teacher.denoiser(x, sigma, cond)
    assert rows["teacher"]["NFE"] == 70 and rows["sid"]["NFE"] == 1
    assert all(torch.allclose(denoiser(x, sigma, cond), u + 2 * (c - u), atol=1e-6) for denoiser in asked) and len(asked) >= 2


def test_measure_depends_on_nothing_but_the_sampler():
    """Two calls agree to the bit: the noise comes from fixed seeds, whatever the global stream holds."""
    ring = Mixture([[0.0, 0.0], [1.0, 0.0]], 0.1)
    first = evaluate.measure(lambda z, cond: 0.1 * z[0], ring, draws=1)
    torch.randn(7)
    assert evaluate.measure(lambda z, cond: 0.1 * z[0], ring, draws=1) == first


class Answer(nn.Module):
    """A one-step generator that answers function(z[0], cond)."""

    def __init__(self, function):
        super().__init__()
        self.function, self.sigmas, self.weight = function, (1.0,), nn.Parameter(torch.zeros(()))

    def forward(self, z, cond=None):
        return self.function(z[0], cond)


def test_pairing_is_a_correlation_within_the_classes():
    """1 for a student that gives the teacher's own answers, in any affine units; near 0 for one that ignores z, or knows the
    class alone, as 500 pairs resolve it (five standard errors, .22); -1 for the mirrored ring."""
    ring = MIXTURES["ring8"]()
    apart = Mixture([[-3.0, 0.0], [3.0, 0.0]], 0.3, labels=torch.tensor([0, 1]))
    for teacher, classes in ((ring, 0), (apart, 2)):
        own = lambda z, cond: heun(teacher, z, cond)
        found = lambda function: evaluate.pairing(Answer(function), teacher, (2,), classes)
        assert found(own) == pytest.approx(1, abs=1e-6) and found(lambda z, c: 3 * own(z, c) + 1) == pytest.approx(1, abs=1e-6)
        assert found(lambda z, c: -own(z, c)) == pytest.approx(-1, abs=1e-6)
        assert abs(found(lambda z, c: own(z, c).roll(2, 0))) < 0.22               # the same classes, other noise
    assert abs(found(lambda z, c: (6.0 * c[:, None] - 3) + 0.3 * torch.randn(z.shape, generator=rng(3)))) < 0.22


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match="cannot read .*config.json.*is this a run folder"):
        runs.load_run(tmp_path)


def test_table_aligns_and_marks_what_is_missing():
    assert sets.table({"a": {"x": 1.23456, "n": 8}, "bb": {"x": 0.5}}) == "       x  n\na   1.23  8\nbb   0.5  -"

"""Metrics of natural images: Frechet against two other computations, Inception run with random weights, stand-ins in order."""

import pickle
import sys
import urllib.error

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_fidelity
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_statistics_to_metric

from nano_dmd.metrics.images import fixed_features, generate, standin_metrics, to_uint8
from nano_dmd.metrics.inception import METRICS, inception_features, inception_metrics, load_inception
from nano_dmd.metrics.sets import gaussian_distance
from nano_dmd.metrics.sets import moments as moments_of
from nano_dmd.engine.files import UserError
from nano_dmd.teachers.data import TensorData, load_data, to_float


def moments(d, seed):
    """Mean and covariance of 3 d points that are far from isotropic."""
    rng = torch.Generator().manual_seed(seed)
    return moments_of(torch.randn(3 * d, d, generator=rng) @ torch.randn(d, d, generator=rng) + torch.randn(d, generator=rng))


@pytest.mark.parametrize("d", [2, 8, 64])
def test_frechet_against_torch_fidelity_and_forty_digits(d):
    """They take the eigenvalues of the product; mpmath its root."""
    x, y = moments(d, 0), moments(d, 1)
    theirs = fid_statistics_to_metric(*[dict(zip(("mu", "sigma"), (v.numpy() for v in m))) for m in (x, y)], False)
    assert gaussian_distance(*x, *y) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert gaussian_distance(*x, *x) == pytest.approx(0, abs=1e-6 * x[1].trace().item())
    if d <= 8:
        with mpmath.workdps(40):
            root = mpmath.sqrtm(mpmath.matrix(x[1].tolist()) * mpmath.matrix(y[1].tolist()))
            cross = sum(mpmath.re(root[i, i]) for i in range(d))
        expected = (x[0] - y[0]).square().sum() + (x[1] + y[1]).trace() - 2 * float(cross)
        assert gaussian_distance(*x, *y) == pytest.approx(expected.item(), rel=1e-10)


def test_bytes_survive_the_way_to_float_and_back():
    """And -1, 0, 1 become 0, 128, 255, as in EDM."""
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(every)), every)
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]


def sampler(z, cond):
    """Uses every slice of the noise and the class, and no image but its own."""
    assert cond.dtype == torch.int64 and cond.shape == z.shape[1:2]
    return torch.tanh(z[0] + 0.1 * z[-1]) + 0.01 * cond[:, None, None, None]


def test_generated_images_depend_on_their_seeds_alone():
    """Not on batches, on the other images, on the global stream, or on who makes them."""
    def images(seeds, batch):
        torch.randn(batch)
        made = list(generate(sampler, seeds, (3, 8, 8), classes=5, k=2, batch=batch, show=False))
        assert {len(b) for b in made[:-1]} <= {batch}
        return torch.cat(made)

    all_at_once = images(range(10, 21), 100)
    assert all_at_once.shape == (11, 3, 8, 8) and all_at_once.dtype == torch.uint8
    assert torch.equal(images(range(10, 21), 4), all_at_once)
    assert torch.equal(images([20, 13], 1), all_at_once[[10, 3]])
    shares = [images(range(10, 21)[r::3], 2) for r in range(3)]
    assert torch.equal(torch.cat(shares), torch.cat([all_at_once[r::3] for r in range(3)]))


def test_generate_draws_noise_then_class():
    """One step or several start from the same noise; all classes come up."""
    seen = []
    for k in (1, 3):
        list(generate(lambda z, cond: seen.append((z, cond)) or z[0], range(200), (2, 4, 4), 10, k, batch=200, show=False))
    (one, cond), (three, _) = seen
    rng = torch.Generator().manual_seed(7)
    assert torch.equal(torch.randn(2, 4, 4, generator=rng), one[0, 7]) and torch.randint(10, (), generator=rng) == cond[7]
    assert torch.equal(three[0], one[0]) and set(cond.tolist()) == set(range(10))
    assert three.mean().abs() < 0.03 and (three.std() - 1).abs() < 0.03
    list(generate(lambda z, cond: z[0] if cond is None else None, range(2), (3, 4, 4), show=False))


@pytest.fixture(scope="module")
def digits():
    """The real images at hand without a download: x (1797, 1, 32, 32) in [-1, 1] and labels, in random order."""
    data, order = load_data("digits"), torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    return F.interpolate(data.x[order], scale_factor=4, mode="bilinear").clamp(-1, 1), data.labels[order]


def test_fixed_features_are_fixed(digits):
    """Pinned numbers; no batch effect; no random number used up."""
    state, x = torch.get_rng_state(), digits[0][:5]
    features = fixed_features(x)
    assert features.shape == (5, 16 * 16 + 16) and fixed_features(x.expand(-1, 3, -1, -1)).shape == (5, 16 * 16 + 48)
    assert torch.allclose(torch.cat([fixed_features(v) for v in x.split(2)]), features, atol=1e-6)
    assert torch.equal(state, torch.get_rng_state())
    ramp = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    assert fixed_features(ramp)[0, [0, 100, 255, 256, 303]].tolist() == pytest.approx(PINNED, abs=1e-4)


PINNED = [0.65277, 0.05061, 0.17938, -0.23338, 0.23338]


def damaged(x, labels):
    """{kind: sets of images, each farther from x}."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    fill = lambda some: some.repeat(len(x) // len(some) + 1, 1, 1, 1)[: len(x)]       # noqa: E731
    return {"noise": [x + s * noise for s in (0.05, 0.1, 0.2, 0.4)],
            "blur": [F.avg_pool2d(x, k, 1, k // 2, count_include_pad=False) for k in (3, 5, 7)],
            "contrast": [s * x for s in (0.95, 0.8, 0.5)],
            "brightness": [x + s for s in (0.05, 0.1, 0.2)],
            "lost classes": [fill(x[labels < k]) for k in (8, 5, 1)],
            "repeated": [fill(x[:k]) for k in (200, 50, 10, 1)],
            "upside down": [x.flip(2)]}


def test_standins_order_damaged_images(digits):
    """Every damage is seen above the distance between two real sets, and more of it is farther."""
    x, labels = digits
    data, x, labels = TensorData(x[:400]), x[400:800], labels[400:800]
    floor, sets = standin_metrics([to_uint8(x)], data), damaged(x, labels)
    assert floor["fixed_precision"] > 0.8 and floor["fixed_recall"] > 0.8
    for kind, versions in sets.items():
        distance = [standin_metrics([to_uint8(v)], data)["fixed_fd"] for v in versions]
        assert floor["fixed_fd"] < distance[0] and distance == sorted(distance), (kind, floor, distance)
    one_class = standin_metrics([to_uint8(sets["lost classes"][-1])], data)
    noisy = standin_metrics([to_uint8(sets["noise"][-1])], data)
    assert one_class["fixed_precision"] > 0.8 and one_class["fixed_recall"] < 0.3 and noisy["fixed_precision"] < 0.05


def test_standins_of_the_data_itself(digits):
    """0, 1, 1, also of the n images picked from it; a data set and its batches are the same thing."""
    data = TensorData(digits[0][:500])
    for found in (standin_metrics(data, data), standin_metrics(data, data, n=100)):
        assert found == pytest.approx(dict(fixed_fd=0, fixed_precision=1, fixed_recall=1), abs=1e-6)
    batches = [to_uint8(v) for v in data.x.split(64)]
    assert standin_metrics(batches, data)["fixed_fd"] == pytest.approx(0, abs=1e-6)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """Random weights in a file like torch-fidelity's, of an Inception that works at 75x75: 16 times as fast."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({}, path)
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, tensors: None)
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
        patch.undo()
        for p in net.parameters():
            if p.ndim == 4:                                       # else nothing is left after 40 layers
                torch.nn.init.kaiming_normal_(p, nonlinearity="relu")
        torch.save(net.state_dict(), path)
        patch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75)
        yield path


@pytest.fixture(scope="module")
def sets():
    """Two data sets of 40 coloured images that differ."""
    rng = torch.Generator().manual_seed(0)
    colours = [torch.rand(40, 3, 4, 4, generator=rng) * scale for scale in (255, 180)]
    return [TensorData(F.interpolate(c, scale_factor=8, mode="bilinear").to(torch.uint8)) for c in colours]


class Bytes(torch.utils.data.Dataset):
    """What torch-fidelity takes."""

    def __init__(self, data):
        self.pixels = data.pixels

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return self.pixels[i]


@pytest.fixture(scope="module")
def ours(inception, sets):
    """One set against the other, from batches of 7."""
    return inception_metrics(iter(sets[0].pixels.split(7)), sets[1], weights=inception)


def test_inception_metrics_are_torch_fidelitys(inception, sets, ours):
    """End to end against its own loop over the same images."""
    theirs = torch_fidelity.calculate_metrics(
        input1=Bytes(sets[0]), input2=Bytes(sets[1]), fid=True, isc=True, kid=True, prc=True, kid_subset_size=40, cuda=False,
        save_cpu_ram=True, verbose=False, feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception))
    names = dict(fid="frechet_inception_distance", isc="inception_score_mean", kid="kernel_inception_distance_mean",
                 precision="precision", recall="recall")
    assert tuple(ours) == METRICS and ours["fid"] > 0
    for name, theirs_name in names.items():                       # inception scores of random weights are hardly above 1
        assert ours[name] - (name == "isc") == pytest.approx(theirs[theirs_name] - (name == "isc"), rel=1e-3), name


def test_moments_in_a_file_are_as_good_as_their_data(inception, sets, ours, tmp_path):
    mu, sigma = moments_of(inception_features(load_inception(inception), sets[1])[0])
    np.savez(tmp_path / "ref.npz", mu=mu.numpy(), sigma=sigma.numpy())
    found = inception_metrics([sets[0].pixels], str(tmp_path / "ref.npz"), weights=inception)
    assert found == pytest.approx({"fid": ours["fid"], "isc": ours["isc"]}, rel=1e-6)


def test_inception_metrics_of_the_data_itself(inception, sets, ours):
    itself = inception_metrics(sets[1], sets[1], weights=inception)
    assert itself["fid"] == pytest.approx(0, abs=1e-3 * ours["fid"])
    assert itself["precision"] == itself["recall"] == 1 and itself["kid"] < 0                   # unbiased, so it may be


def test_inception_features_of_large_batches():
    """Taken apart on the way in and put together on the way out; any function of images will do as the network."""
    images = torch.randint(256, (230, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    means, most = inception_features(lambda b: (b.float().mean((2, 3)), b.float().amax((1, 2, 3))), images.split(220))
    assert torch.equal(means, images.float().mean((2, 3))) and torch.equal(most, images.float().amax((1, 2, 3)))


def test_inception_takes_grey_images(inception, sets):
    grey = sets[0].pixels[:4, :1]
    found = [inception_metrics([v], None, weights=inception) for v in (grey, grey.expand(-1, 3, -1, -1))]
    assert list(found[0]) == ["isc"] and found[0] == found[1]


def test_metrics_that_the_reference_does_not_allow(sets, tmp_path):
    """Said before anything is downloaded or computed."""
    for reference, wanted, message in [
            (sets[0], ["fid", "clip"], "no metric 'clip' with this reference; use fid, isc, kid"),
            (tmp_path / "ref.npz", ["fid", "recall"], "no metric 'recall' with this reference; use fid, isc$"),
            (None, ["fid"], "no metric 'fid' with this reference; use isc$")]:
        with pytest.raises(UserError, match=message):
            inception_metrics(sets[1], reference, wanted)


class Hostile:
    """Makes a file when unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_wrong_reference_files(tmp_path):
    np.savez(tmp_path / "small.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez(tmp_path / "names.npz", mean=np.zeros(2048))
    np.savez(tmp_path / "code.npz", mu=np.array([Hostile(tmp_path / "executed")]), sigma=np.eye(2048))
    (tmp_path / "text.npz").write_text("hello")
    for name, message in dict(small=r"cannot read mu and sigma in .*: their shapes are \(64,\)", names="cannot read mu",
                              code="cannot read .*allow_pickle", text="cannot read", missing="cannot read .*No such").items():
        with pytest.raises(UserError, match=message):
            inception_metrics([], str(tmp_path / f"{name}.npz"), ["fid"])
    assert not (tmp_path / "executed").exists()


def test_wrong_weights(tmp_path):
    torch.save({"fc.bias": torch.zeros(1008)}, tmp_path / "other.pth")
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Hostile(tmp_path / "executed"), 2))
    for name in ("other", "code", "missing"):
        with pytest.raises(UserError, match=f"{name}.pth does not hold Inception's weights.*; get https://github.com/toshas/.*"
                                            "6726825d.pth, give --inception-weights"):
            load_inception(tmp_path / f"{name}.pth")
    assert not (tmp_path / "executed").exists()


def test_without_network_or_torch_fidelity(monkeypatch):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    with pytest.raises(UserError, match="cannot download Inception's .*not known.*; get https://.* give --inception-weights"):
        load_inception()
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(UserError, match=r'need torch-fidelity .*: pip install "nano_dmd\[eval\]"'):
        load_inception()

"""Data sets: the same images through every reader are the same tensors, and samples depend on the generator alone."""

import hashlib
import io
import json
import pickle
import urllib.error
import zipfile

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from nano_dmd import data, noise
from nano_dmd.checkpoint import UserError
from nano_dmd.data import TensorData, load_data

LABELS = [0, 0, 0, 0, 0, 1, 1, 1, 2, 2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NANO_DMD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pixels():
    """(10, 3, 32, 32) uint8."""
    return np.random.RandomState(0).randint(0, 256, (10, 3, 32, 32), dtype=np.uint8)


def png(image):
    """(C, H, W) uint8 -> the bytes of a file."""
    image = image.transpose(1, 2, 0)
    Image.fromarray(image if image.shape[2] == 3 else image[..., 0]).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def write_folder(path, images, labels=None):
    """Class folders, or with labels None one folder of images."""
    for i, image in enumerate(images):
        file = path / ("" if labels is None else "cab"[labels[i]]) / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(image))
    return str(path)


def write_zip(path, images, labels):
    """EDM's format; labels: those of dataset.json, None for null, ... for no such file."""
    names = [f"{i // 4:05}/img{i:08}.png" for i in range(len(images))]
    with zipfile.ZipFile(path, "w") as f:
        for name, image in [*zip(names, images)][::-1]:           # names, not the order in the archive, decide
            f.writestr(name, png(image))
        if labels is not ...:
            f.writestr("dataset.json", json.dumps({"labels": labels and list(zip(names, labels))}))
    return str(path)


def write_cifar(root, images, labels, monkeypatch):
    """CIFAR-10's pickles, two images in each training batch and the first one for testing, with their checksums."""
    root.mkdir(parents=True)

    def dump(name, content):
        (root / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((root / name).read_bytes()).hexdigest()]

    flat = images.reshape(len(images), -1)
    parts = [slice(i, i + 2) for i in range(0, 10, 2)]
    train = [dump(f"data_batch_{i + 1}", {"data": flat[part], "labels": labels[part]}) for i, part in enumerate(parts)]
    test = [dump("test_batch", {"data": flat[:1], "labels": labels[:1]})]
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", test)
    meta = dump("batches.meta", {"label_names": [*"abc"]})
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})


def test_every_reader_gives_the_same_images(tmp_path, pixels, monkeypatch):
    """Class folders (named c, a, b: sorted by name), an EDM .zip and CIFAR-10's pickles."""
    by_name = [1, 2, 0]                                           # class 0 is the second letter of "cab" in the alphabet
    write_cifar(tmp_path / "cache" / "cifar10" / "cifar-10-batches-py", pixels, LABELS, monkeypatch)
    names = {"cifar10": "cifar10", "zip": write_zip(tmp_path / "x.zip", pixels, LABELS),
             "folder": write_folder(tmp_path / "x", pixels, [by_name[label] for label in LABELS])}
    for name in names.values():
        found = load_data(name)
        assert found.shape == (3, 32, 32) and found.classes == 3 and len(found) == 10 and found.pixels.dtype == torch.uint8
        assert found.labels.dtype == torch.int64 and found.labels.tolist() == LABELS
        assert torch.equal(found.x, torch.from_numpy(pixels).float() / 127.5 - 1)
    assert torch.equal(load_data("cifar10-test").x, load_data("cifar10").x[:1])


def test_the_order_in_dataset_json_does_not_matter(tmp_path, pixels):
    path = write_zip(tmp_path / "x.zip", pixels, ...)
    with zipfile.ZipFile(path, "a") as f:
        table = [[f"{i // 4:05}/img{i:08}.png", label] for i, label in enumerate(LABELS)]
        f.writestr("dataset.json", json.dumps({"labels": table[::-1]}))
    assert load_data(path).labels.tolist() == LABELS


def test_images_without_classes(tmp_path, pixels):
    """A folder of images alone, and a .zip whose labels are null or not there."""
    for path in (write_folder(tmp_path / "x", pixels), write_zip(tmp_path / "x.zip", pixels, None),
                 write_zip(tmp_path / "y.zip", pixels, ...)):
        found = load_data(path)
        assert found.labels is None and found.classes == 0 and found.sample(4)[1] is None
        assert torch.equal(found.pixels, torch.from_numpy(pixels))


def test_grey_images_keep_their_channel_in_a_zip_and_become_rgb_in_a_folder(tmp_path, pixels):
    grey = torch.from_numpy(pixels[:, :1])
    assert torch.equal(load_data(write_zip(tmp_path / "x.zip", pixels[:, :1], LABELS)).pixels, grey)
    assert torch.equal(load_data(write_folder(tmp_path / "x", pixels[:, :1])).pixels, grey.expand(-1, 3, -1, -1))


def test_images_are_decoded_once_and_again_when_a_file_changes(tmp_path, pixels, monkeypatch):
    folder, archive = write_folder(tmp_path / "x", pixels), write_zip(tmp_path / "x.zip", pixels, LABELS)
    first = [load_data(name).x for name in (folder, archive)]
    with monkeypatch.context() as patch:
        patch.setattr(data, "decode", None)
        assert all(torch.equal(load_data(name).x, x) for name, x in zip((folder, archive), first))
    write_folder(tmp_path / "x", 255 - pixels[:1])
    write_zip(tmp_path / "x.zip", 255 - pixels, LABELS)
    negative = 255 - torch.from_numpy(pixels)
    assert torch.equal(load_data(folder).pixels, torch.cat([negative[:1], 255 - negative[1:]]))
    assert torch.equal(load_data(archive).pixels, negative)


def test_large_sets_give_the_same_samples_from_their_file(tmp_path, pixels, monkeypatch):
    path = write_zip(tmp_path / "x.zip", pixels, LABELS)
    small = load_data(path).sample(64, torch.Generator().manual_seed(3))
    monkeypatch.setattr(data, "RESIDENT", 0)
    large = load_data(path).sample(64, torch.Generator().manual_seed(3))
    assert torch.equal(small[0], large[0]) and torch.equal(small[1], large[1])


def test_samples_are_float_images_with_their_labels(pixels):
    """In [-1, 1], both ends reached, drawn by the given generator and by nothing else."""
    found, rng = TensorData(torch.from_numpy(pixels), torch.tensor(LABELS)), torch.Generator().manual_seed(1)
    state = torch.get_rng_state()
    x, cond = found.sample(200, rng)
    index = torch.randint(10, (200,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(state, torch.get_rng_state())
    assert x.dtype == torch.float32 and (x.min(), x.max()) == (-1, 1)
    assert torch.equal(x, found.x[index]) and torch.equal(x, found.images(index)) and torch.equal(cond, found.labels[index])


def test_flip_mirrors_half_of_the_same_images(pixels):
    plain, flipping = (TensorData(torch.from_numpy(pixels), flip=flip) for flip in (False, True))
    (x, _), (y, _) = (d.sample(400, torch.Generator().manual_seed(0)) for d in (plain, flipping))
    same, mirrored = (y == x).flatten(1).all(1), (y == x.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all() and 150 < mirrored.sum() < 250


def test_two_processes_draw_what_one_would(pixels, monkeypatch):
    """Twice, so that the streams are seen to stay in step."""
    found = TensorData(torch.from_numpy(pixels), torch.tensor(LABELS), flip=True)

    def draw(n):
        rng = torch.Generator().manual_seed(5)
        return [found.sample(n, rng) for _ in range(2)]

    parts, one = [], draw(12)
    monkeypatch.setitem(noise.PROCESS, "count", 2)
    for rank in range(2):
        monkeypatch.setitem(noise.PROCESS, "rank", rank)
        parts.append(draw(6))
    for (x, cond), a, b in zip(one, *parts):
        assert torch.equal(x, torch.cat([a[0], b[0]])) and torch.equal(cond, torch.cat([a[1], b[1]]))


def test_digits_and_mixtures_are_as_before():
    digits = load_data("digits")
    assert digits.x.shape == (1797, 1, 8, 8) and digits.x.dtype == torch.float32 and digits.x is digits.pixels
    assert (digits.x.min(), digits.x.max(), digits.classes, digits.labels.dtype) == (-1, 1, 10, torch.int64)
    assert load_data("toy:ring8").shape == (2,)


def spoil(path, change, pattern="09.png"):
    for file in path.glob(pattern):
        file.write_bytes(change(file.read_bytes()))


WRONG = {
    "another size": (lambda p: spoil(p, lambda b: png(np.zeros((3, 24, 24), np.uint8))),
                     r"09.png in .*x is 24x24 RGB, 00.png is 32x32 RGB: .*one size"),
    "not square": (lambda p: spoil(p, lambda b: png(np.zeros((3, 32, 28), np.uint8)), "*"), "00.png in .*x is 28x32 RGB.*square"),
    "cut short": (lambda p: spoil(p, lambda b: b[:1000]), "cannot read the image 09.png in .*x"),
    "no image": (lambda p: spoil(p, lambda b: b"hello"), "cannot read the image 09.png in .*x.*cannot identify"),
    "no images": (lambda p: [f.unlink() for f in p.iterdir()], "no .png or .jpg images in .*x"),
    "no images in a class": (lambda p: (p / "train" / "cat").mkdir(parents=True), "no .png .*x/train: every folder in .*should"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_folders_get_one_sentence_and_leave_nothing(tmp_path, pixels, case):
    change, message = WRONG[case]
    path = write_folder(tmp_path / "x", pixels)
    change(tmp_path / "x")
    with pytest.raises(UserError, match=message):
        load_data(path)
    assert not (tmp_path / "cache").exists() or list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("labels, message", [
    ([0.5] * 10, r"labels 00000/img00000000.png with 0.5: labels must be class numbers"),
    ([0] * 9 + [[0, 1, 0]], r"labels 00002/img00000009.png with \[0, 1, 0\]: labels must be class numbers"),
    ([0] * 9 + [-1], "img00000009.png with -1"),
    ([True] * 10, "with True"),
    ([0] * 9, "no .zip of EDM.* with a label for every image .*img00000009"),
])
def test_wrong_labels_of_a_zip(tmp_path, pixels, labels, message):
    with pytest.raises(UserError, match=message):
        load_data(write_zip(tmp_path / "x.zip", pixels, labels))


def test_wrong_zips(tmp_path, pixels):
    write_zip(tmp_path / "x.zip", pixels, LABELS)
    (tmp_path / "cut.zip").write_bytes((tmp_path / "x.zip").read_bytes()[:-50])
    with zipfile.ZipFile(tmp_path / "list.zip", "w") as f:
        f.writestr("a.png", png(pixels[0]))
        f.writestr("dataset.json", "[1, 2]")
    for name, message in {"cut": "not a zip file", "list": "list indices"}.items():
        with pytest.raises(UserError, match=f"{name}.zip is no .zip of EDM's dataset_tool.py.*{message}"):
            load_data(str(tmp_path / f"{name}.zip"))
    with pytest.raises(UserError, match="no .png or .jpg images in .*empty.zip"):
        load_data(write_zip(tmp_path / "empty.zip", [], None))


def test_a_name_that_is_no_data_set():
    for name in ("cifar100", "/nowhere/images"):
        with pytest.raises(UserError, match=f"no data set '{name}': use digits, cifar10, toy:NAME, a folder"):
            load_data(name)
    with pytest.raises(UserError, match="no mixture 'toy:square'"):
        load_data("toy:square")


def test_cifar10_out_of_reach_says_what_to_put_where(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", unreachable)
    with pytest.raises(UserError, match="cannot download CIFAR-10 .*not known.*; get https://www.cs.toronto.edu/.*gz by hand "
                                        f"and put it at {tmp_path}/cache/cifar10/cifar-10-python.tar.gz"):
        load_data("cifar10")


def test_a_broken_cache_says_what_to_delete(tmp_path, pixels):
    path = write_folder(tmp_path / "x", pixels)
    load_data(path)
    file = next((tmp_path / "cache").glob("data-*/images.npy"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot read .*cache/data-.*; delete it to have it made again"):
        load_data(path)


def test_a_cache_that_cannot_be_written(tmp_path, pixels):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(UserError, match="cannot write .*cache.*NANO_DMD_CACHE"):
        load_data(write_folder(tmp_path / "x", pixels))


def test_another_process_may_be_faster(tmp_path, pixels, monkeypatch):
    """Its folder is taken; ours leaves no trace."""
    path, replace = write_folder(tmp_path / "x", pixels), data.os.replace

    def late(new, folder):
        monkeypatch.setattr(data.os, "replace", replace)
        load_data(path)
        replace(new, folder)

    monkeypatch.setattr(data.os, "replace", late)
    assert torch.equal(load_data(path).pixels, torch.from_numpy(pixels))
    assert [p.name[:5] for p in (tmp_path / "cache").iterdir()] == ["data-"]

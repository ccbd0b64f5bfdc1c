"""Data sets: the same images through every reader are the same tensors, and samples depend on the generator alone."""

import hashlib
import io
import json
import os
import pickle
import re
import struct
import urllib.error
import zipfile
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from nano_dmd.engine.config import resolve
from nano_dmd.engine.files import UserError
from nano_dmd.methods import METHODS
from nano_dmd.teachers import data, zoo
from nano_dmd.teachers.data import TensorData, load_data

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
    assert all(load_data(name, flip=True).flip for name in ("digits", "mnist", "random:3x8:2"))


def test_two_processes_draw_what_one_would(pixels):
    """Each asks for its own rows of a joint draw.  Twice, so that the streams are seen to stay in step."""
    found = TensorData(torch.from_numpy(pixels), torch.tensor(LABELS), flip=True)
    mixture = load_data("toy:ring8")

    def draw(data, rows):
        rng = torch.Generator().manual_seed(5)
        return [data.sample(12, rng, rows) for _ in range(2)]

    for data in (found, mixture):
        parts = [draw(data, slice(6 * rank, 6 * rank + 6)) for rank in range(2)]
        for (x, cond), a, b in zip(draw(data, slice(None)), *parts):
            assert torch.equal(x, torch.cat([a[0], b[0]]))
            assert cond is None or torch.equal(cond, torch.cat([a[1], b[1]]))


def test_digits_and_mixtures_are_as_before():
    digits = load_data("digits")
    assert digits.x.shape == (1797, 1, 8, 8) and digits.x.dtype == torch.float32 and digits.x is digits.pixels
    assert (digits.x.min(), digits.x.max(), digits.classes, digits.labels.dtype) == (-1, 1, 10, torch.int64)
    assert load_data("toy:ring8").shape == (2,)


def spoil(path, change, pattern="09.png"):
    for file in path.glob(pattern):
        file.write_bytes(change(file.read_bytes()))


HEADER = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
HUGE = b"\x89PNG\r\n\x1a\n\0\0\0\r" + HEADER + struct.pack(">I", zlib.crc32(HEADER)) + b"\0\0\0\0IDAT" + bytes(4)

WRONG = {
    "another size": (lambda p: spoil(p, lambda b: png(np.zeros((3, 24, 24), np.uint8))),
                     r"09.png in .*x is 24x24 RGB, 00.png is 32x32 RGB: .*one size"),
    "not square": (lambda p: spoil(p, lambda b: png(np.zeros((3, 32, 28), np.uint8)), "*"), "00.png in .*x is 28x32 RGB.*square"),
    "cut short": (lambda p: spoil(p, lambda b: b[:1000]), "cannot read the image 09.png in .*x"),
    "no image": (lambda p: spoil(p, lambda b: b"hello"), "cannot read the image 09.png in .*x.*cannot identify"),
    "no images": (lambda p: [f.unlink() for f in p.iterdir()], "no images in .*x: it should hold .png"),
    "no images in a class": (lambda p: [(p / "cat").mkdir(), (p / "dog").mkdir(), *(f.rename(p / "dog" / f.name) for f in
                                        p.glob("*.png"))], "x/cat is not a folder of images: .*x should hold one for each class"),
    "splits in place of classes": (lambda p: [(p / "train" / "cat").mkdir(parents=True), *(f.rename(p / "train" / "cat" / f.name)
                                              for f in p.glob("*.png"))],
                                              "x/train is not a folder of images: .*x should hold one for"),
    "images beside classes": (lambda p: [(p / "dog").mkdir(), (p / "09.png").rename(p / "dog" / "09.png")],
                              "x/00.png is not a folder of images: .*x should hold .*, or images alone"),
    "a link to nothing": (lambda p: (p / "a.png").symlink_to("/nowhere/a.png"), "cannot look at .*a.png: No such file.*link"),
    "a link to itself": (lambda p: (p / "a.png").symlink_to(p / "a.png"), "cannot look at .*a.png: .*symbolic"),
    "a pipe": (lambda p: os.mkfifo(p / "a.png"), "cannot read .*a.png: it is not a file"),
    "200 megapixels": (lambda p: spoil(p, lambda b: HUGE, "00.png"), "cannot read the image 00.png .*exceeds limit"),
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
    ([0.5] * 10, "0.5 is the label of 00000/img00000000.png"),
    ([0] * 9 + [[0, 1, 0]], r"\[0, 1, 0\] is the label of 00002/img00000009.png"),
    ([0] * 9 + [-1], "-1 is the label of 00002/img00000009.png"),
    ([True] * 10, "True is the label"),
    ([2**70] * 10, "1180591620717411303424 is the label"),
    ([10**6] * 10, "1000000 is the label"),
    ([0] * 9, "'00002/img00000009.png'"),
])
def test_wrong_labels_of_a_zip(tmp_path, pixels, labels, message):
    with pytest.raises(UserError, match=f"dataset.json in .*x.zip should label every image from 0 to 99999: {message}"):
        load_data(write_zip(tmp_path / "x.zip", pixels, labels))


def test_wrong_zips(tmp_path, pixels):
    write_zip(tmp_path / "x.zip", pixels, LABELS)
    (tmp_path / "cut.zip").write_bytes((tmp_path / "x.zip").read_bytes()[:-50])
    with zipfile.ZipFile(tmp_path / "list.zip", "w") as f:
        f.writestr("a.png", png(pixels[0]))
        f.writestr("dataset.json", "[1, 2]")
    with zipfile.ZipFile(tmp_path / "deep.zip", "w") as f:
        f.writestr("a.png", png(pixels[0]))
        f.writestr("dataset.json", "[" * 100_000)
    locked = bytearray((tmp_path / "x.zip").read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):   # the bit that says "encrypted", of every file in it
        for at in (m.start() for m in re.finditer(re.escape(mark), bytes(locked))):
            locked[at + flags] |= 1
    (tmp_path / "locked.zip").write_bytes(locked)
    for name, message in {"cut": "cannot read .*not a zip file", "list": "should label every image",
                          "deep": "should label every image", "locked": "should label every image.*encrypted"}.items():
        with pytest.raises(UserError, match=message):
            load_data(str(tmp_path / f"{name}.zip"))
    write_zip(damaged := tmp_path / "y.zip", pixels, ...)
    damaged.write_bytes(damaged.read_bytes().replace(b"IDAT", b"IDAX"))            # checksums no longer fit
    with pytest.raises(UserError, match="cannot read the image 00000/img00000000.png in .*y.zip: Bad CRC"):
        load_data(str(damaged))
    with pytest.raises(UserError, match="no images in .*empty.zip"):
        load_data(write_zip(tmp_path / "empty.zip", [], None))


def test_a_name_that_is_no_data_set():
    for name in ("cifar100", "/nowhere/images"):
        with pytest.raises(UserError, match=f"no data set '{name}': use digits, mnist, cifar10, toy:NAME, a folder"):
            load_data(name)
    with pytest.raises(UserError, match="no mixture 'toy:square'"):
        load_data("toy:square")


def test_cifar10_out_of_reach_says_what_to_put_where(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", unreachable)
    with pytest.raises(UserError, match="cannot download CIFAR-10.*not known.*; get https://www.cs.toronto.edu/.*gz by hand "
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
    path, replace = write_folder(tmp_path / "x", pixels), os.replace

    def late(new, folder):
        monkeypatch.setattr(os, "replace", replace)
        load_data(path)
        replace(new, folder)

    monkeypatch.setattr(os, "replace", late)
    assert torch.equal(load_data(path).pixels, torch.from_numpy(pixels))
    assert [p.name[:5] for p in (tmp_path / "cache").iterdir()] == ["data-"] * 2      # the entry, and what made it


# ---- what a person sees


def seen(tmp_path, image, suffix=".png", **how):
    """(1, H, W, 3) uint8 as load_data reads the one image of a folder, which middle_square must read alike."""
    path = tmp_path / "one" / f"a{suffix}"
    path.parent.mkdir(exist_ok=True)
    image.save(path, **how)
    found = load_data(str(path.parent)).pixels[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(found, data.middle_square(path, found.shape[0]))
    return found.astype(int)


@pytest.mark.parametrize("suffix, how", [(".png", {}), (".jpg", dict(quality=95)), (".webp", dict(lossless=True))])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_photos_are_upright(tmp_path, orientation, suffix, how):
    """Every EXIF orientation: the pixels are those of the upright picture, to within what the format loses (5 of 255)."""
    upper = np.zeros((16, 16, 3), np.uint8)
    upper[:8, :5] = 255
    lying = {2: upper[:, ::-1], 3: upper[::-1, ::-1], 4: upper[::-1], 5: upper.transpose(1, 0, 2), 6: np.rot90(upper),
             7: upper[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(upper, -1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = seen(tmp_path, Image.fromarray(np.ascontiguousarray(lying)), suffix, exif=exif, **how)
    assert np.abs(found - upper).mean() < 5


def test_every_kind_of_pixel_is_the_colour_one_sees(tmp_path):
    """16-bit grey keeps its levels, transparency is on white, palettes, bits and CMYK are their colours."""
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for sixteen in (ramp * 257, ramp * 256):                      # both ways in which tools scale
        assert (seen(tmp_path, Image.fromarray(sixteen)) == ramp[..., None]).all()
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:4] = 10, 200, 30, 255                                  # green above; below, black that nobody sees
    clear[7] = 0, 0, 0, 128
    found = seen(tmp_path, Image.fromarray(clear))
    assert (found[:4] == (10, 200, 30)).all() and (found[4:7] == 255).all() and (abs(found[7] - 127) <= 1).all()
    palette = Image.fromarray(clear[..., :3]).convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    assert (seen(tmp_path, palette)[:4] == (10, 200, 30)).all()
    palette.info["transparency"] = palette.getpixel((0, 7))
    assert (seen(tmp_path, palette, transparency=palette.getpixel((0, 7)))[4:] == 255).all()
    assert (seen(tmp_path, Image.new("1", (8, 8), 1)) == 255).all()
    (tmp_path / "one" / "a.png").unlink()
    assert np.abs(seen(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), ".jpg") - (255, 0, 0)).max() <= 4


def test_grey_with_transparency_stays_grey_in_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as f:
        for name, kind, value in (("a", "LA", (7, 255)), ("b", "L", 7), ("c", "1", 1)):
            image = Image.new(kind, (4, 4), value)
            image.save(buffer := io.BytesIO(), "PNG")
            f.writestr(f"{name}.png", buffer.getvalue())
    assert load_data(str(tmp_path / "x.zip")).pixels[:, 0, 0, 0].tolist() == [7, 7, 255]


def test_class_folders_are_searched_and_all_formats_read(tmp_path, pixels, capsys):
    """Folders within a class belong to it; hidden files, copies and what macOS keeps are no images; the rest is counted aloud."""
    for i, name in enumerate(("a/1.png", "a/more/2.webp", "a/more/deeper/3.bmp", "b/4.gif", "b/5.JPEG")):
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i].transpose(1, 2, 0)).save(tmp_path / "x" / name)
    for name in (".git/1.png", "a/.ipynb_checkpoints/1-checkpoint.png", "a/._1.png", "__MACOSX/1.png", "b/.hidden.png"):
        (tmp_path / "x" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "x" / name).write_bytes(b"no image")
    (tmp_path / "x" / "b" / "6.tiff").write_bytes(b"II*")
    (tmp_path / "x" / "a" / "1.txt").write_text("a caption is not left out: it is no image")
    found = load_data(str(tmp_path / "x"))
    assert found.labels.tolist() == [0, 0, 0, 1, 1] and "1 files in" in (said := capsys.readouterr().err) and "b/6.tiff" in said


@pytest.mark.parametrize("names, order, said", [
    (range(12), range(12), ""), (range(1, 4), range(1, 4), "class 0 is folder 1"), ((0, 2, 10), (0, 2, 10), "are not 0, 1"),
    (("0", "x", "10"), ("0", "10", "x"), ""), (("00", "01", "02"), ("00", "01", "02"), "")], ids=str)
def test_folders_called_by_numbers_are_in_their_order(tmp_path, names, order, said, capsys):
    for name in names:
        (tmp_path / "x" / str(name)).mkdir(parents=True)
        Image.new("RGB", (4, 4), (list(order).index(name), 0, 0)).save(tmp_path / "x" / str(name) / "a.png")
    found = load_data(str(tmp_path / "x"))
    assert found.labels.tolist() == found.pixels[:, 0, 0, 0].tolist() == list(range(len(names)))
    assert said in capsys.readouterr().err if said else not capsys.readouterr().err.startswith("note")


def test_a_zip_of_class_folders_says_that_it_has_no_classes(tmp_path, pixels, capsys):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as f:
        for name in ("cat/a.png", "dog/a.png"):
            f.writestr(name, png(pixels[0]))
    assert load_data(str(tmp_path / "x.zip")).labels is None and "its images have no classes" in capsys.readouterr().err


def unpack(archive, folder):
    with zipfile.ZipFile(archive) as f:
        f.extractall(folder)
    return str(folder)


def test_edm_folders_are_read_like_their_zip(tmp_path, pixels, capsys):
    """An unpacked .zip, one with a folder on top and macOS's files, null labels, and without dataset.json: never a class for
    every thousand images.  Labels of images that are not there are counted aloud."""
    archive = write_zip(tmp_path / "x.zip", pixels, LABELS)
    with zipfile.ZipFile(archive) as f, zipfile.ZipFile(tmp_path / "top.zip", "w") as g:
        for name in f.namelist():
            g.writestr(f"mine/{name}", f.read(name))
            g.writestr(f"__MACOSX/mine/._{name.split('/')[-1]}", b"\0\5\x16\7")
    for path in (unpack(archive, tmp_path / "flat"), str(tmp_path / "top.zip"), unpack(tmp_path / "top.zip", tmp_path / "top")):
        found = load_data(path)
        assert found.labels.tolist() == LABELS and torch.equal(found.pixels, torch.from_numpy(pixels))
    for name, labels in (("null", None), ("none", ...)):
        found = load_data(unpack(write_zip(tmp_path / f"{name}.zip", pixels, labels), tmp_path / name))
        assert found.labels is None and len(found) == 10
    (tmp_path / "flat" / "00002" / "img00000009.png").unlink()
    capsys.readouterr()
    assert len(load_data(str(tmp_path / "flat"))) == 9 and "labels 1 images that are not there" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cifar10-small", "cifar10-scratch"])
def test_a_teacher_of_ones_own_has_the_channels_and_classes_of_the_data(name, tmp_path):
    for i in range(12):
        (tmp_path / "twelve" / f"{i:02}").mkdir(parents=True)
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / "twelve" / f"{i:02}" / "a.png")
    grey = write_zip(tmp_path / "grey.zip", np.zeros((4, 1, 16, 16), np.uint8), None)
    for path, shape, classes in ((tmp_path / "twelve", [3, 16, 16], 12), (grey, [1, 16, 16], 0)):
        recipe = zoo.fitted(zoo.RECIPES[name], load_data(str(path)))
        assert zoo.nonsense(recipe | dict(shape=shape, classes=classes)) == ""
        cond = torch.tensor([0, 11]) if classes else None
        assert zoo.untrained(recipe)(torch.zeros(2, *shape), torch.ones(2), cond).shape == (2, *shape)
    with pytest.raises(UserError, match="have 7 pixels a side"):
        zoo.fitted(zoo.RECIPES[name], load_data(write_zip(tmp_path / "odd.zip", np.zeros((4, 1, 7, 7), np.uint8), None)))


@pytest.mark.parametrize("name, count, side, levels", [("digits", 1797, 8, 17), ("mnist", 5000, 28, 256)])
def test_shipped_digits(name, count, side, levels):
    """Both sets come with the package: their size, their range, ten classes, and the licence beside the file."""
    shipped = load_data(name)
    assert shipped.x.shape == (count, 1, side, side) and shipped.classes == 10 and shipped.name == name == data.identity(name)
    assert shipped.x.min() == -1 and shipped.x.max() == 1 and len(shipped.x.unique()) <= levels
    each = torch.bincount(shipped.labels)
    assert each.sum() == count and each.min() > 150
    assert name != "mnist" or (each == 500).all()
    assert data.SHIPPED[name][0] in (data.ASSETS / "ATTRIBUTION.md").read_text()


def test_mnist_is_a_preset_of_every_method():
    """mnist's rows are those of digits with another teacher, whose recipe has the pictures' size, and other steps.

    Two steps need a level that hides a digit of this size: with 0.6 between them the last one ended in black pictures.
    """
    for method in METHODS:
        small, large = resolve(dict(preset="digits", method=method)), resolve(dict(preset="mnist", method=method))
        assert (small.teacher, large.teacher) == ("digits", "mnist")
        two = {"tdm": "10,2", "phased": "10,2"}
        assert large.sigmas == two.get(method, small.sigmas)
        assert replace(large, preset=small.preset, teacher="digits", out=small.out, sigmas=small.sigmas) == small
    net = zoo.untrained(zoo.RECIPES["mnist"])
    x = torch.zeros(2, 1, 28, 28)
    assert net(x, torch.ones(2), torch.tensor([0, 9])).shape == x.shape
    assert zoo.nonsense(zoo.RECIPES["mnist"] | dict(shape=[1, 28, 28], classes=10)) == ""
    assert "do not fit" in zoo.nonsense(zoo.RECIPES["mnist"] | dict(shape=[1, 10, 10], classes=10))
    with pytest.raises(UserError, match="have 10 pixels a side: this teacher needs a multiple of 4"):
        zoo.fitted(zoo.RECIPES["mnist"], TensorData(torch.zeros(2, 1, 10, 10)))

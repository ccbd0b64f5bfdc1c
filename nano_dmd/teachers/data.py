"""Data sets: something with .shape, .classes and .sample(n, generator) -> (x, cond).

    digits                  1,797 real handwritten digits, 8x8, shipped with the package
    cifar10, cifar10-test   50,000 and 10,000 images, 32x32 RGB, downloaded once by torchvision
    a folder                of class folders of images, or of images alone
    a folder or .zip        as EDM's dataset_tool.py writes it: images and dataset.json with their class numbers
    toy:NAME                an exact mixture, see toy.mixtures.MIXTURES

Images of one set are square and share one size. They are decoded once, to <cache>/data-<key>/images.npy, and read from
there through the page cache: the second time a set of any size is there at once, and ImageNet needs no 15 GB of memory.

An image is what a person sees: turned as its EXIF says, 16 bits scaled to 8, on white where it is transparent. Hidden files
and copies (.ipynb_checkpoints, ._photo.png, __MACOSX) are no images of the set.
"""

import io
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from nano_dmd.engine.cache import cached, fingerprint, visible, visible_files
from nano_dmd.engine.files import (UserError, cache_dir, first_line, note, parse_json, read_bytes,
                                   sync)
from nano_dmd.engine.parallel import rows
from nano_dmd.noise import expand

DIGITS = Path(__file__).parent / "assets" / "digits8x8.npz"

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")

IMAGES = ", ".join(SUFFIXES)

MOST_CLASSES = 100_000

RESIDENT = 2**31                                                  # bytes; a larger table stays in its file, off the device


def resident(table, device):
    """A table (N, ...) on device if it is small enough; else where it is, in the host's memory or a mapped file."""
    return table.to(device) if table.nbytes < RESIDENT else table


def look_up(table, index, device):
    """Rows number index (B,), which are on the CPU, of a resident() table: (B, ...) on device, which is not waited for."""
    found = table[index.to(table.device, non_blocking=True)]
    if device.type == "cuda" and not found.is_cuda:
        found = found.pin_memory()
    return found.to(device, non_blocking=True)


class TensorData:
    """Images pixels (N, C, H, W), float32 in [-1, 1] or uint8, labels (N,) int64 or None; samples arrive on device."""

    def __init__(self, pixels, labels=None, device=None, flip=False, name=""):
        self.device, self.flip, self.name = torch.device(device or pixels.device), flip, name
        self.pixels = resident(pixels, self.device)
        self.labels = None if labels is None else labels.to(self.device)
        self.shape, self.classes = tuple(pixels.shape[1:]), 0 if labels is None else int(labels.max()) + 1

    def __len__(self):
        return len(self.pixels)

    @property
    def x(self):
        """All images at once, (N, C, H, W) float32 on the device: for small sets."""
        return to_float(self.pixels.to(self.device))

    def unlabelled(self):
        """The same images for an unconditional teacher."""
        return TensorData(self.pixels, None, self.device, self.flip, self.name)

    def images(self, index):
        """Images number index (B,) int64 -> (B, C, H, W) float32 in [-1, 1] on the device."""
        return to_float(look_up(self.pixels, index, self.device))

    def sample(self, n, generator=None):
        """n images drawn with replacement, mirrored at random if flip; of N processes, each gets its n of a joint draw.

        The CPU generator makes the order independent of the device.
        """
        index = rows(lambda n: torch.randint(len(self), (n,), generator=generator), n)
        x, cond = self.images(index), None if self.labels is None else look_up(self.labels, index, self.device)
        if self.flip:
            mirror = rows(lambda n: torch.randint(2, (n,), generator=generator), n).bool().to(self.device, non_blocking=True)
            x = torch.where(expand(mirror, x), x.flip(-1), x)
        return x, cond


def to_float(pixels):
    """uint8 0..255 -> float32 in [-1, 1]; float32 stays as it is."""
    return pixels if pixels.is_floating_point() else pixels.float().div_(127.5).sub_(1)


def load_digits(device="cpu"):
    """1,797 real handwritten digits, 8x8, ten classes (UCI, CC BY 4.0; see assets/ATTRIBUTION.md)."""
    with np.load(DIGITS, allow_pickle=False) as f:
        x, labels = torch.from_numpy(f["images"]), torch.from_numpy(f["labels"])
    return TensorData((x.float() / 8 - 1)[:, None], labels.long(), device, name="digits")


def cifar10(name):
    """(labels, N, images (N, 3, 32, 32) uint8) by torchvision, which opens the pickles if their checksums are right."""
    from torchvision.datasets import CIFAR10

    root = cache_dir() / "cifar10"
    try:
        data = CIFAR10(root, train=name == "cifar10", download=True)
    except (OSError, RuntimeError) as e:
        raise UserError(f"cannot download CIFAR-10 ({first_line(e)}); get {CIFAR10.url} by hand and put it at "
                        f"{root / CIFAR10.filename}") from e
    return data.targets, len(data), data.data.transpose(0, 3, 1, 2)


def is_image(name):
    return name.lower().endswith(SUFFIXES)


def image_files(folder):
    """All image files in a folder and the folders in it, in the order of their names.  raises UserError if there is none."""
    names = visible_files(folder)
    if not any(map(is_image, names)):
        raise UserError(f"no images in {folder}: give a folder that holds {IMAGES} files")
    tell_left_out(folder, names)
    return [Path(folder, name) for name in names if is_image(name)]


def tell_left_out(place, names):
    """Say how many files are left out: neither images that we read, nor captions or tables of images."""
    if others := [n for n in names if not is_image(n) and not n.endswith((".txt", ".json", ".jsonl", "/"))]:
        note(f"{len(others)} files in {place} are left out, {others[0]} for example: images are {IMAGES}")


def open_image(source, grey=False):
    """A PIL image of a file as a person sees it, RGB; with grey, L for one that has no colour.  raises PIL's errors."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(Image.open(source))
    no_colour = image.mode[0] in "1LI"                            # bits, bytes, 16 bits
    if image.mode[0] == "I":                                      # PIL's own conversion cuts at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if {"A", "a"} & set(image.getbands()) or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if grey and no_colour else "RGB")


def middle_square(file, side):
    """uint8 (side, side, 3): the middle square of an image, file or PIL image, by Lanczos."""
    from PIL import Image, ImageOps

    try:
        image = file if isinstance(file, Image.Image) else open_image(io.BytesIO(read_bytes(file)))
        return np.array(ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS))
    except UserError:
        raise
    except Exception as e:                                        # PIL's complaints share no base class
        raise UserError(f"cannot read the image {file}: {first_line(e)}") from e


def list_folder(path):
    """(names of files, and of folders in it as "a/", read) of a folder; read(name) -> bytes."""
    folders = [f"{name}/" for name in os.listdir(path) if visible(name) and os.path.isdir(path / name)]
    return visible_files(path) + folders, lambda name: read_bytes(path / name)


def list_zip(path):
    """(file names, read) of a .zip, without what a person does not see."""
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, ValueError, zipfile.BadZipFile) as e:
        raise UserError(f"cannot read {path} ({first_line(e)}); give a folder of images or a .zip made by EDM's tool") from e

    def read(name):
        try:
            return archive.read(name)
        except Exception as e:                                    # encrypted, damaged, packed by an unknown method
            raise UserError(f"cannot read {name} in {path}: {first_line(e)}") from e

    return sorted({n for n in archive.namelist() if not n.endswith("/") and all(map(visible, n.split("/")))}), read


def list_images(path, names, read):
    """(image names, their class numbers or None) of what list_folder or list_zip found.

    With a dataset.json, as EDM writes it, the class numbers are the ones in there; a folder without one has its images in
    folders, one for each class, or has no classes.  raises UserError where it is neither
    """
    images, tables = [n for n in names if is_image(n)], [n for n in names if n.split("/")[-1] == "dataset.json"]
    if not images:
        raise UserError(f"no images in {path}: it should hold {IMAGES} files")
    if tables:
        return images, labels_of_table(path, min(tables, key=len), images, read)
    edm = all(re.fullmatch(r"(.*/)?\d{5}/img\d{8}\.\w+", n) for n in images)         # not a class for every thousand
    if edm or not path.is_dir():
        if not edm and any("/" in n for n in images):
            note(f"{path} has no dataset.json: its images have no classes, its folders are none")
        return images, None
    return labels_of_folders(path, images, names)


def labels_of_table(path, table, images, read):
    """The class number of each image by EDM's dataset.json, {"labels": [[name, number], ...]}; None where it has none."""
    found = parse_json(read(table), f"{table} in {path}")
    try:
        table_of, inside = dict(found.get("labels") or ()), len(table) - len("dataset.json")          # its folder's name
        labels = [table_of.pop(name[inside:]) for name in images] if table_of else None
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{table} in {path} does not hold a label for every image ({first_line(e)}), as EDM's tool writes") from e
    if wrong := [(n, v) for n, v in zip(images, labels or []) if type(v) is not int or not 0 <= v < MOST_CLASSES]:
        raise UserError(f"{path} labels {wrong[0][0]} with {wrong[0][1]!r:.40}: labels must be class numbers 0, 1, ...")
    if table_of:
        note(f"{table} in {path} labels {len(table_of)} images that are not there, {next(iter(table_of))} for example")
    return labels


def labels_of_folders(path, images, names):
    """(images in the order of their classes, class numbers): the folders are the classes, in the order of their names, or of
    their numbers if all are called by one; None without folders."""
    folders = {n.split("/")[0] for n in names if "/" in n}
    lost = [n for n in images if "/" not in n]
    if not folders or not any("/" in n for n in images):
        return images, None
    if lost:
        raise UserError(f"{path} holds {len(lost)} images ({lost[0]}) beside folders of images ({min(folders)}): put each image "
                        "into the folder of its class, or all into one folder")
    for folder in sorted(folders):
        inside = [n for n in images if n.startswith(folder + "/")]
        if not any(n.count("/") == 1 for n in inside):            # train/cat/1.png: a class "train" is not meant
            deeper = f", but {inside[0]} (give the folder whose folders are the classes)" if inside else ""
            raise UserError(f"no images in {path / folder}{deeper}: every folder in {path} should hold those of one class, "
                            f"{IMAGES} files")
    numeric = all(re.fullmatch(r"\d{1,9}", f, re.ASCII) for f in folders)
    order = {f: i for i, f in enumerate(sorted(folders, key=lambda f: (int(f), f) if numeric else f))}
    if numeric and [int(f) for f in order] != list(order.values()):
        note(f"the class folders of {path} are not 0, 1, ...: class 0 is folder {next(iter(order))}, and so on in the order of "
             "the numbers")
    images = sorted(images, key=lambda n: (order[n.split("/")[0]], n))
    return images, [order[n.split("/")[0]] for n in images]


def identity(name):
    """What a data set is besides its name, for cache keys: its whole path and a fingerprint of its files, if it has some."""
    path = Path(name).absolute()
    if name in ("digits", "cifar10", "cifar10-test") or name.startswith("toy:"):
        return name
    return [str(path), fingerprint(path)]


def decode(names, read, path):
    """Yields images (C, H, W) uint8: RGB, but grey ones of a .zip keep their one channel, as in EDM."""
    first = None
    for name in names:
        data = read(name)
        try:
            image = open_image(io.BytesIO(data), grey=path.is_file())
        except Exception as e:                                    # PIL's complaints share no base class
            raise UserError(f"cannot read the image {name} in {path}: {first_line(e)}") from e
        first = first or (image.mode, image.size)
        if (image.mode, image.size) != first or image.width != image.height:
            raise UserError(f"{name} in {path} is {image.width}x{image.height} {image.mode}, {names[0]} is {first[1][0]}x"
                            f"{first[1][1]} {first[0]}: images must be square, of one size and kind; crop and resize them first")
        yield np.atleast_3d(image).transpose(2, 0, 1)


def write_rows(path, count, rows):
    """count arrays of one shape and dtype as the rows of one .npy, without holding them all; safely on the disk."""
    with open(path, "wb") as f:                                   # not a mapped file: a full disk would kill the process
        for i, row in enumerate(rows):
            if i == 0:
                header = dict(descr=row.dtype.str, fortran_order=False, shape=(count, *row.shape))
                np.lib.format.write_array_header_1_0(f, header)
            f.write(row.tobytes())
        f.flush()
        sync(f.fileno())


def write_images(folder, labels, count, images):
    """images.npy and labels.npy (empty for None) in a new folder."""
    folder.mkdir()
    np.save(folder / "labels.npy", np.array([] if labels is None else labels, dtype=np.int64))
    write_rows(folder / "images.npy", count, tqdm(images, "decoding images", count))


def read_table(path, dtype, shape):
    """The array in an .npy of the cache, mapped where the system can.  raises UserError unless it is as it was written.

    shape  of it, None = any length
    """
    try:
        if not path.is_file():
            raise OSError("it is not a file")
        try:                                                      # mode c, a private copy on write: torch asks for writable
            table = np.load(path, mmap_mode="c", allow_pickle=False)
        except OSError:                                           # some network drives cannot map a file
            table = np.load(path, allow_pickle=False)
        if not isinstance(table, np.ndarray):
            raise ValueError("it is an archive")
        if table.dtype != dtype or len(table.shape) != len(shape) or any(n not in (None, m) for n, m in zip(shape, table.shape)):
            raise ValueError(f"it holds {table.dtype} of shape {table.shape}")
    except (OSError, ValueError, EOFError, SyntaxError) as e:
        raise UserError(f"cannot read {path}: {first_line(e)}; delete it to have it made again") from e
    return table


def decode_once(name, made_of, source):
    """(pixels (N, C, H, W) uint8, labels (N,) or None) from the cache; source() -> (labels, N, images) fills it."""
    folder = cached(name, made_of, lambda path: write_images(path, *source()), parts=("images.npy", "labels.npy"))
    pixels, labels = read_table(folder / "images.npy", np.uint8, [None] * 4), read_table(folder / "labels.npy", np.int64, [None])
    n, channels, height, width = pixels.shape
    right = len(labels) in (0, n) and not ((labels < 0) | (labels >= MOST_CLASSES)).any()
    if not n or not right or channels not in (1, 3) or height != width:
        raise UserError(f"{folder} is damaged: {pixels.shape} images, {len(labels)} labels; delete it to have it made again")
    return torch.from_numpy(pixels), torch.from_numpy(np.array(labels)) if len(labels) else None


def read_images(path, names, read):
    """(labels or None, N, iterator over N images (C, H, W) uint8) of what list_folder or list_zip found."""
    images, labels = list_images(path, names, read)
    return labels, len(images), decode(images, read, path)


def load_data(name, device="cpu", flip=False):
    """A data set by name (see above) on device; flip: images drawn are mirrored at random.  raises UserError if there is none."""
    if name == "digits":
        return load_digits(device)
    if name.startswith("toy:"):
        from toy.mixtures import MIXTURES

        if name[4:] not in MIXTURES:
            raise UserError(f"no mixture {name!r}: use one of {', '.join('toy:' + m for m in MIXTURES)}")
        return MIXTURES[name[4:]]().to(device)
    if name in ("cifar10", "cifar10-test"):
        return TensorData(*decode_once(f"data-{name}", name, lambda: cifar10(name)), device, flip, name)
    path = Path(os.path.abspath(name))
    if not (os.path.isdir(path) or os.path.isfile(path)):
        raise UserError(f"no data set {name!r:.200}: use digits, cifar10, toy:NAME, a folder of images or a .zip made by "
                        "EDM's tool")
    names, read = list_folder(path) if path.is_dir() else list_zip(path)
    tell_left_out(path, names)
    return TensorData(*decode_once("data", identity(name), lambda: read_images(path, names, read)), device, flip, str(path))

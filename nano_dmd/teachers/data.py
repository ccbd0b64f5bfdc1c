"""Data sets: .kind, .shape, .classes and .sample(n, generator, rows) -> (x, cond).

    digits, mnist          real handwritten digits, shipped: 1,797 of 8x8, 5,000 of 28x28
    cifar10, cifar10-test  50,000 and 10,000 images, 32x32 RGB, downloaded once by torchvision
    a folder               of class folders of images, or of images alone
    a folder or .zip       as EDM's dataset_tool.py writes it: images and dataset.json with labels
    toy:NAME               an exact mixture, see toy.mixtures.MIXTURES
    random:CxS:K           1,000 images of noise, SxS pixels, K classes: to measure speed alone

sample draws n samples and returns the slice `rows` of them: several processes share one draw. All
images of a set are square and of one size. Files are decoded once, to <cache>/data-<key>. An image
is what a person sees: turned as its EXIF says, 16 bits scaled to 8, on white where it is
transparent. Hidden files and folders (.ipynb_checkpoints, ._photo.png, __MACOSX) are left out.
"""

import io
import json
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from nano_dmd.engine.cache import cached, fingerprint, visible, visible_files
from nano_dmd.engine.files import MADE_AGAIN, UserError, blame, cache_dir, note, read_bytes, sync
from nano_dmd.noise import expand

ASSETS = Path(__file__).parents[1] / "assets"
SHIPPED = {"digits": ("digits8x8.npz", 16), "mnist": ("mnist28x28.npz", 255)}  # file, largest
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
BESIDE = (".txt", ".json", ".jsonl", "/")          # captions, tables and folders: no images
MOST_CLASSES = 100_000
RESIDENT = 2**31                                   # bytes; a larger table stays off the device


def resident(table, device):
    """A table (N, ...) on device if it is small, else where it is: in memory or a mapped file."""
    return table.to(device) if table.nbytes < RESIDENT else table


def look_up(table, index, device):
    """Rows (B, ...) of a resident() table on device, without a wait; index (B,) is on the CPU."""
    found = table[index.to(table.device, non_blocking=True)]
    if device.type == "cuda" and not found.is_cuda:
        found = found.pin_memory()
    return found.to(device, non_blocking=True)


def to_float(pixels):
    """uint8 0..255 -> float32 in [-1, 1]; float32 stays as it is."""
    return pixels if pixels.is_floating_point() else pixels.float().div_(127.5).sub_(1)


class TensorData:
    """Images pixels (N, C, H, W), float32 in [-1, 1] or uint8, and labels (N,) int64 or None."""

    kind = "images"

    def __init__(self, pixels, labels=None, device=None, flip=False, name=""):
        self.device, self.name = torch.device(device or pixels.device), name
        self.flip, self.pixels = flip, resident(pixels, self.device)
        self.labels = None if labels is None else labels.to(self.device)
        self.shape = tuple(pixels.shape[1:])
        self.classes = 0 if labels is None else int(labels.max()) + 1

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

    def sample(self, n, generator=None, rows=slice(None)):
        """(x, labels): the slice rows of n random images, mirrored at random if flip."""
        index = torch.randint(len(self), (n,), generator=generator)[rows]
        x, labels = self.images(index), self.labels
        if self.flip:
            mirror = torch.randint(2, (n,), generator=generator)[rows].bool()
            x = torch.where(expand(mirror.to(self.device, non_blocking=True), x), x.flip(-1), x)
        return x, None if labels is None else look_up(labels, index, self.device)


def load_digits(device="cpu", name="digits", flip=False):
    """Real handwritten digits of ten classes; SHIPPED names the sets (assets/ATTRIBUTION.md)."""
    file, largest = SHIPPED[name]
    with np.load(ASSETS / file, allow_pickle=False) as f:
        x, labels = torch.from_numpy(f["images"]), torch.from_numpy(f["labels"])
    x = (x.float() / (largest / 2) - 1)[:, None]
    return TensorData(x, labels.long(), device, flip, name)


def cifar10(name):
    """(images (N, 3, 32, 32) uint8, N, labels) by torchvision, which checks the files."""
    from torchvision.datasets import CIFAR10

    root = cache_dir() / "cifar10"
    by_hand = f"get {CIFAR10.url} by hand and put it at {root / CIFAR10.filename}"
    with blame("cannot download CIFAR-10", by_hand):
        data = CIFAR10(root, train=name == "cifar10", download=True)
    return data.data.transpose(0, 3, 1, 2), len(data), data.targets


def open_image(data, grey=False):
    """The PIL image in data (bytes) as a person sees it: RGB, or L if grey and it has no colour."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    no_colour = image.mode[0] in "1LI"             # bits, bytes, 16 bits
    if image.mode[0] == "I":                       # PIL's own conversion cuts at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if {"A", "a"} & set(image.getbands()) or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if grey and no_colour else "RGB")


def middle_square(file, side):
    """uint8 (side, side, 3): the middle square of an image, file or PIL image, by Lanczos."""
    from PIL import Image, ImageOps

    with blame(f"cannot read the image {file}"):
        image = file if isinstance(file, Image.Image) else open_image(read_bytes(file))
        return np.array(ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS))


def images_among(names, place):
    """The images among the files in a place; says what is left out.  raises UserError for none."""
    images = [n for n in names if n.lower().endswith(SUFFIXES)]
    if not images:
        raise UserError(f"no images in {place}: it should hold {', '.join(SUFFIXES)} files")
    if others := [n for n in names if not n.lower().endswith((*SUFFIXES, *BESIDE))]:
        note(f"{len(others)} files in {place} are left out, {others[0]} for example")
    return images


def image_files(folder):
    """The paths of all images in a folder and the folders in it, sorted.  raises UserError."""
    return [Path(folder, name) for name in images_among(visible_files(folder), folder)]


def opened(path):
    """(names, read) of a folder or .zip: files "a/b.png", folders "a/"; read(name) -> bytes."""
    if path.is_dir():
        folders = [f"{n}/" for n in os.listdir(path) if visible(n) and os.path.isdir(path / n)]
        return visible_files(path) + folders, lambda name: read_bytes(path / name)
    with blame(f"cannot read {path}", "give a folder of images or a .zip made by EDM's tool"):
        archive = zipfile.ZipFile(path)
    names = {n for n in archive.namelist() if all(map(visible, n.split("/")))}
    return sorted(names), archive.read


def with_labels(path, names, images, read):
    """(images in order, class numbers or None); classes are dataset.json's, else the folders."""
    tables = [n for n in names if n.split("/")[-1] == "dataset.json"]
    if tables:
        return images, table_labels(path, min(tables, key=len), images, read)
    edm = all(re.fullmatch(r"(.*/)?\d{5}/img\d{8}\.\w+", n) for n in images)  # 1,000 in each
    classes = not edm and any("/" in n for n in images)
    if classes and path.is_dir():
        return class_folders(path, names, images)
    if classes:
        note(f"{path} has no dataset.json: its images have no classes")
    return images, None


def table_labels(path, table, images, read):
    """The class number of each image by EDM's {"labels": [[name, number], ...]}; None without."""
    with blame(f"{table} in {path} should label every image from 0 to {MOST_CLASSES - 1}"):
        label_of = dict(json.loads(read(table)).get("labels") or ())
        start = len(table) - len("dataset.json")
        labels = [label_of.pop(name[start:]) for name in images] if label_of else None
        for name, v in zip(images, labels or []):
            if type(v) is not int or not 0 <= v < MOST_CLASSES:
                raise ValueError(f"{v!r:.40} is the label of {name}")
    if label_of:
        note(f"{table} in {path} labels {len(label_of)} images that are not there")
    return labels


def class_folders(path, names, images):
    """(images by class, class numbers): the folders in path, sorted by name or by number."""
    folders = {n.split("/")[0] for n in names if "/" in n}
    wrong = [n for n in images if "/" not in n]
    wrong += sorted(folders - {n.split("/")[0] for n in images if n.count("/") == 1})
    if wrong:
        raise UserError(f"{path / wrong[0]} is not a folder of images: {path} should hold one for "
                        "each class, or images alone")
    numeric = all(map(str.isdecimal, folders))
    order = sorted(sorted(folders), key=int if numeric else str)
    if numeric and [int(f) for f in order] != [*range(len(order))]:
        note(f"the class folders of {path} are not 0, 1, ...: class 0 is folder {order[0]}")
    number = {folder: i for i, folder in enumerate(order)}
    images = sorted(images, key=lambda n: number[n.split("/")[0]])
    return images, [number[n.split("/")[0]] for n in images]


def decode(names, read, path):
    """Yields images (C, H, W) uint8: RGB, but grey ones of a .zip keep their one channel (EDM)."""
    first = None
    for name in names:
        with blame(f"cannot read the image {name} in {path}"):
            image = open_image(read(name), grey=path.is_file())
        kind = f"{image.width}x{image.height} {image.mode}"
        first = first or kind
        if kind != first or image.width != image.height:
            raise UserError(f"{name} in {path} is {kind}, {names[0]} is {first}: crop and resize "
                            "them to be square, of one size and kind")
        yield np.atleast_3d(image).transpose(2, 0, 1)


def write_rows(path, count, arrays):
    """count arrays of one shape and dtype as the rows of one .npy, without holding them all."""
    with open(path, "wb") as f:                    # a mapped file on a full disk kills the process
        for i, row in enumerate(arrays):
            if i == 0:
                header = dict(descr=row.dtype.str, fortran_order=False, shape=(count, *row.shape))
                np.lib.format.write_array_header_1_0(f, header)
            f.write(row.tobytes())
        f.flush()
        sync(f.fileno())


def read_table(path, dtype, shape):
    """The array in an .npy of the cache, mapped if possible; None in shape is any length."""
    with blame(f"cannot read {path}", MADE_AGAIN):
        if not path.is_file():
            raise OSError("it is not a file")
        try:                                       # c, a private copy on write: torch asks for it
            array = np.load(path, mmap_mode="c", allow_pickle=False)
        except OSError:                            # some network drives cannot map a file
            array = np.load(path, allow_pickle=False)
        fits = [n in (None, m) for n, m in zip(shape, array.shape)]
        if array.dtype != dtype or array.ndim != len(shape) or not all(fits):
            raise ValueError(f"it holds {array.dtype} of shape {array.shape}")
        return array


def decoded(name, made_of, source):
    """(pixels (N, C, H, W) uint8, labels (N,) or None); source() -> (images, N, labels) once."""
    def make(folder):
        images, count, labels = source()
        folder.mkdir()
        np.save(folder / "labels.npy", np.array(labels or [], dtype=np.int64))
        write_rows(folder / "images.npy", count, tqdm(images, "decoding images", count))

    folder = cached(name, made_of, make, parts=("images.npy", "labels.npy"))
    pixels = torch.from_numpy(read_table(folder / "images.npy", np.uint8, [None] * 4))
    labels = torch.from_numpy(np.array(read_table(folder / "labels.npy", np.int64, [None])))
    n, channels, height, width = pixels.shape
    right = len(labels) in (0, n) and ((0 <= labels) & (labels < MOST_CLASSES)).all()
    if not n or not right or channels not in (1, 3) or height != width:
        raise UserError(f"{folder} is damaged: images {(n, channels, height, width)}, "
                        f"{len(labels)} labels; {MADE_AGAIN}")
    return pixels, labels if len(labels) else None


def noise_images(name, device, flip):
    """random:3x32:10 as TensorData.  raises UserError."""
    found = re.fullmatch(r"random:([13])x(\d{1,3}):(\d{1,3}|1000)", name, re.ASCII)
    channels, side, classes = map(int, found.groups()) if found else (0, 0, 0)
    if not side:
        raise UserError(f"no data set {name!r:.80}: noise has names like random:3x32:10")
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (1000, channels, side, side), generator=rng, dtype=torch.uint8)
    labels = torch.arange(1000) % classes if classes else None
    return TensorData(pixels, labels, device, flip, name)


def identity(name):
    """A data set's part of a cache key: its name, and the content of a mixture or of files."""
    if name in (*SHIPPED, "cifar10", "cifar10-test") or name.startswith("random:"):
        return name
    if name.startswith("toy:"):
        return [name, numbers(load_data(name))]
    return [str(Path(name).absolute()), fingerprint(name)]


def numbers(mixture):
    """What an exact mixture is made of, for cache keys."""
    return [v.tolist() for v in (mixture.means, mixture.std, mixture.weights)]


def load_data(name, device="cpu", flip=False):
    """A data set by name (see above); flip mirrors images at random.  raises UserError."""
    if name in SHIPPED:
        return load_digits(device, name, flip)
    if name.startswith("toy:"):
        from toy.mixtures import MIXTURES

        if name[4:] not in MIXTURES:
            raise UserError(f"no mixture {name!r}: use toy:{', toy:'.join(MIXTURES)}")
        return MIXTURES[name[4:]]().to(device)
    if name.startswith("random:"):
        return noise_images(name, device, flip)
    if name in ("cifar10", "cifar10-test"):
        tensors = decoded(f"data-{name}", name, lambda: cifar10(name))
        return TensorData(*tensors, device, flip, name)
    path = Path(os.path.abspath(name))
    if not (os.path.isdir(path) or os.path.isfile(path)):
        raise UserError(f"no data set {name!r:.200}: use {', '.join(SHIPPED)}, cifar10, toy:NAME, "
                        "a folder of images or a .zip made by EDM's tool")
    names, read = opened(path)
    images = images_among(names, path)

    def source():
        ordered, labels = with_labels(path, names, images, read)
        return decode(ordered, read, path), len(images), labels

    return TensorData(*decoded("data", identity(name), source), device, flip, str(path))

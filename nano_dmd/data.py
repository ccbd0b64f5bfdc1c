"""Data sets: something with .shape, .classes and .sample(n, generator) -> (x, cond).

    digits                  1,797 real handwritten digits, 8x8, shipped with the package
    cifar10, cifar10-test   50,000 and 10,000 images, 32x32 RGB, downloaded once by torchvision
    a folder                of class folders of .png and .jpg images, or of images alone
    a .zip                  as EDM's dataset_tool.py writes it: images and dataset.json with their class numbers
    toy:NAME                an exact mixture, see toy.mixtures.MIXTURES

Images of one set are square and share one size. They are decoded once, to <cache>/data-<key>/images.npy, and read from
there through the page cache: the second time a set of any size is there at once, and ImageNet needs no 15 GB of memory.
"""

import hashlib
import io
import json
import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from nano_dmd.checkpoint import UserError, cache_dir, first_line, unwritable
from nano_dmd.noise import expand, rows

DIGITS = Path(__file__).parent / "assets" / "digits8x8.npz"
SUFFIXES = (".png", ".jpg", ".jpeg")
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

    def __init__(self, pixels, labels=None, device=None, flip=False):
        self.device, self.flip = torch.device(device or pixels.device), flip
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
        return TensorData(self.pixels, None, self.device, self.flip)

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
    return TensorData((x.float() / 8 - 1)[:, None], labels.long(), device)


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


def image_files(folder):
    """All image files in a folder and the folders in it, in the order of their names.  raises UserError if there is none."""
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (*SUFFIXES, ".webp"))
    if not files:
        raise UserError(f"no images in {folder}: give a folder that holds .png, .jpg or .webp files")
    return files


def middle_square(file, side):
    """uint8 (side, side, 3): the middle square of an image, file or PIL image, by Lanczos."""
    from PIL import Image, ImageOps

    try:
        image = (file if isinstance(file, Image.Image) else Image.open(file)).convert("RGB")
    except (OSError, SyntaxError, ValueError) as e:               # PIL's complaints
        raise UserError(f"cannot read the image {file}: {first_line(e)}") from e
    return np.array(ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS))


def list_folder(path):
    """(image names, their class numbers) of a folder: its folders are the classes, sorted by name; None without any."""
    folders = sorted(e.name for e in os.scandir(path) if e.is_dir() and not e.name.startswith("."))
    names, labels = [], []
    for label, folder in enumerate(folders or [""]):
        inside = [os.path.join(folder, f) for f in sorted(os.listdir(path / folder)) if f.lower().endswith(SUFFIXES)]
        if folder and not inside:
            raise UserError(f"no .png or .jpg images in {path / folder}: every folder in {path} should hold those of one class")
        names, labels = names + inside, labels + [label] * len(inside)
    return names, labels if folders else None


def list_zip(path):
    """(image names, their class numbers or None, read) of an EDM .zip: dataset.json is {"labels": [[name, number], ...]}."""
    try:
        archive = zipfile.ZipFile(path)
        names = sorted(n for n in archive.namelist() if n.lower().endswith(SUFFIXES))
        table = json.loads(archive.read("dataset.json"))["labels"] if "dataset.json" in archive.namelist() else None
        table = dict(table or ())
        labels = [table[name] for name in names] if table else None
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path} is no .zip of EDM's dataset_tool.py with a label for every image ({first_line(e)})") from e
    if wrong := [(n, v) for n, v in zip(names, labels or []) if type(v) is not int or v < 0]:
        raise UserError(f"{path} labels {wrong[0][0]} with {wrong[0][1]}: labels must be class numbers 0, 1, ...")
    return names, labels, archive.read


def fingerprint(path):
    """Ten hex digits that change when a file of the folder, or the .zip, is another one or was written to."""
    files = [os.path.join(path, name) for name in list_folder(path)[0]] if path.is_dir() else [str(path)]
    stamps = [(file, s.st_size, s.st_mtime_ns) for file in files if (s := os.stat(file))]
    return hashlib.sha256(repr(stamps).encode()).hexdigest()[:10]


def read_images(path):
    """(labels or None, N, iterator over N images (C, H, W) uint8) of a folder or an EDM .zip, in the order of their names."""
    names, labels, read = (*list_folder(path), lambda n: (path / n).read_bytes()) if path.is_dir() else list_zip(path)
    if not names:
        raise UserError(f"no .png or .jpg images in {path}")
    return labels, len(names), decode(names, read, path)


def decode(names, read, path):
    """Yields images (C, H, W) uint8: RGB, but grey ones of a .zip keep their one channel, as in EDM."""
    from PIL import Image

    first = None
    for name in names:
        try:
            image = Image.open(io.BytesIO(read(name)))
            image = image.convert("L" if image.mode == "L" and path.is_file() else "RGB")
        except Exception as e:                                    # PIL's and zipfile's complaints share no base class
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
        os.fsync(f.fileno())


def write_images(folder, labels, count, images):
    """images.npy and labels.npy (empty for None) in a new folder: complete, or no folder at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".data-", suffix=".tmp") as tmp:
            (new := Path(tmp) / "new").mkdir()
            np.save(new / "labels.npy", np.array([] if labels is None else labels, dtype=np.int64))
            write_rows(new / "images.npy", count, tqdm(images, "decoding images", count))
            os.replace(new, folder)
    except OSError as e:
        if not folder.exists():                                   # else another process was faster
            raise unwritable(folder, e) from e


def decode_once(key, source):
    """(pixels (N, C, H, W) uint8, labels (N,) or None) from the cache; source() -> (labels, N, images) fills it."""
    folder = cache_dir() / f"data-{key}"
    if not folder.exists():
        write_images(folder, *source())
    try:                                                          # mode c, a private copy on write: torch asks for writable
        pixels, labels = np.load(folder / "images.npy", mmap_mode="c"), torch.from_numpy(np.load(folder / "labels.npy"))
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {folder}: {first_line(e)}; delete it to have it made again") from e
    return torch.from_numpy(pixels), labels if len(labels) else None


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
        return TensorData(*decode_once(name, lambda: cifar10(name)), device, flip)
    path = Path(name).absolute()
    if not path.exists():
        raise UserError(f"no data set {name!r}: use digits, cifar10, toy:NAME, a folder of images or a .zip made by EDM's tool")
    return TensorData(*decode_once(fingerprint(path), lambda: read_images(path)), device, flip)
